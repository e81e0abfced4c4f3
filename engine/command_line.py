"""From flags to settings, and from whatever goes wrong to one line and an exit status."""

import argparse
import dataclasses
import sys
import warnings

import safetensors
import torch

from data import UserError
from engine.models import first_line
from engine.settings import PRESETS


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def parse(config_class, argv, description):
    """The flags of a config dataclass that were given on a command line -> {field: value}; make the config from it, then check it."""
    parser = OneLineParser(
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for f in dataclasses.fields(config_class):
        flag, rule = "--" + f.name.replace("_", "-"), f.metadata
        presets = {name: preset | config_class.presets.get(name, {}) for name, preset in PRESETS.items()}
        by_model = [
            f"{name}: {preset[f.name]}" for name, preset in presets.items() if preset.get(f.name) is not None
        ]
        default = "" if f.default is None or f.type is bool else f" [{f.default}]"
        if by_model and f.name != "quantize":
            default = f" [{', '.join(by_model)}]"
        options = dict(default=argparse.SUPPRESS, help=(rule["help"] + default).replace("%", "%%"))
        if f.type is bool:
            parser.add_argument(flag, action="store_true", **options)
        else:
            parser.add_argument(
                flag, type=f.type, metavar="|".join(rule["choices"] or [f.type.__name__.upper()]), **options
            )
    return vars(parser.parse_args(argv))


def exit_status(work, stopped="stopped at once; what was saved at the last checkpoint stands (--resume)"):
    """Call work() -> 0, or 130 if it returns None because it was stopped; what a user can mend becomes one line on stderr and 2. stopped: said at Ctrl-C."""
    warnings.filterwarnings("once", category=UserWarning)
    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"
    try:
        return 130 if work() is None else 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except (OSError, safetensors.SafetensorError) as error:
        print(
            f"error: a file cannot be read or written ({first_line(error)}); look at the disk's room and permissions",
            file=sys.stderr,
        )
    except torch.OutOfMemoryError as error:
        print(
            f"error: out of GPU memory; try a lower --micro-batch-tokens, --group-size or --max-new-tokens ({first_line(error)})",
            file=sys.stderr,
        )
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130
    return 2
