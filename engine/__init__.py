"""What no paper mentions: sampling, scoring, files, flags, the loop around a step."""

import logging

# On import bitsandbytes reports a missing optional CPU kernel. Whoever imports it here comes by this line.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
