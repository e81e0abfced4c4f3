"""The benchmark: python -m plots.bench, see plots/bench/__main__.py."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on import it reports a missing optional kernel
