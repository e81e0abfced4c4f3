"""From flags to settings, and from whatever goes wrong to one line and an exit status.

Nothing here imports torch: that takes seconds, and who asks for --help or mistypes a flag should not wait for
them. So a program reads its flags twice: first `answer_early`, then, with torch imported, for good.
"""

import argparse
import dataclasses
import sys
import warnings
from pathlib import Path

from data.errors import UserError, first_line
from engine.settings import PRESETS, RENAMED_SETTINGS, check_ranges


class HelpShown(SystemExit):
    """--help has been answered; all other calls of sys.exit are somebody else's."""


class OneLineParser(argparse.ArgumentParser):
    """argparse without its usage text in front of every error."""

    def error(self, message):
        raise UserError(f"{message} (see --help)")

    def exit(self, status=0, message=None):
        raise HelpShown(status)


# ------------------------------------------------------------------------------------------------------------
# Flags


def parse(config_class, argv, description):
    """The flags of a config dataclass that were given on a command line -> {field: value}.

    Make the config from it, then check_settings. UserError for a flag that is unknown or of another type.
    """
    parser = OneLineParser(
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for f in dataclasses.fields(config_class):
        flags = spellings(f.name)
        options = {
            "dest": f.name,
            "default": argparse.SUPPRESS,
            "help": (f.metadata["help"] + shown_default(config_class, f)).replace("%", "%%"),
        }
        if f.type is bool:
            parser.add_argument(*flags, action="store_true", **options)
        else:
            metavar = "|".join(f.metadata["choices"] or [f.type.__name__.upper()])
            parser.add_argument(*flags, type=f.type, metavar=metavar, **options)
    return vars(parser.parse_args(argv))


def spellings(name):
    """A setting's flag, and the former ones that still stand for it."""
    names = [name, *(old for old, new in RENAMED_SETTINGS.items() if new == name)]
    return ["--" + name.replace("_", "-") for name in names]


def shown_default(config_class, f):
    """A field's default as --help shows it: " [0.5]", or " [tiny: 100, chat: 200]" by model."""
    by_model = []
    for name, preset in PRESETS.items():
        value = (preset | config_class.presets.get(name, {})).get(f.name)
        if value is not None:
            by_model.append(f"{name}: {value}")
    if by_model and f.name != "quantize":  # whose help text says it
        return f" [{', '.join(by_model)}]"
    return "" if f.default is None or f.type is bool else f" [{f.default}]"


def choose_command(configs, argv, description):
    """The first word of a command line, and the flags behind it -> (word, argv without it).

    configs: a dict by first words; with an entry for "", the word may be left out. --help in its place is
    answered. UserError for any other word.
    """
    word = argv[0] if argv else ""
    program = Path(sys.argv[0]).name.partition(" ")[0]
    if "" in configs and (word == "" or word.startswith("-")):
        return "", argv
    words = [name for name in configs if name]
    if word in ("-h", "--help"):
        print(f"{description}\nusage: python {program} {'|'.join(words)} [flags]")
        print(f"for the flags: python {program} {words[0]} --help")
        raise HelpShown(0)
    if word not in words:
        wrong = f"no command {word!r}" if word else "no command"
        raise UserError(f"{wrong}: the first word is one of {', '.join(words)} (see --help)")
    sys.argv[0] = f"{program} {word}"  # what the usage and the hint how to resume call the program
    return word, argv[1:]


def answer_early(configs, description, argv=None):
    """Answer --help and mistyped flags at once, and exit; return where the flags are right.

    configs: a config dataclass, or {first word: dataclass}, see choose_command; description: the text of
    --help. To be called before the imports that take seconds:

        if __name__ == "__main__":
            answer_early(GraoConfig, __doc__)

        import torch
    """
    answer(lambda: check_flags(configs, description, sys.argv[1:] if argv is None else argv))


def answer(read_flags):
    """answer_early for a program with a parser of its own: what read_flags() raises is its answer."""
    try:
        read_flags()
    except UserError as error:
        sys.exit(tell(error))


def check_flags(configs, description, argv):
    """UserError for a flag that is unknown, not a number, or out of its range."""
    if isinstance(configs, dict):
        word, argv = choose_command(configs, argv, description)
        configs = configs[word]
    check_ranges(configs(**parse(configs, argv, description)))


# ------------------------------------------------------------------------------------------------------------
# Exit status


def exit_status(work, stopped="stopped at once; what was saved at the last checkpoint stands (--resume)"):
    """Call work() -> 0, or 130 if it returns None because it was stopped.

    What a user can mend becomes one line on stderr and 2; Ctrl-C the line `stopped` and 130.
    """
    warnings.filterwarnings("once", category=UserWarning)
    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"
    try:
        return 130 if work() is None else 0
    except HelpShown:
        return 0
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130
    except (
        UserError,
        OSError,
        *known("safetensors", "SafetensorError"),
        *known("torch", "OutOfMemoryError"),
    ) as error:
        return tell(error)


def tell(error):
    """One line on stderr that says what went wrong -> exit status 2."""
    said = first_line(error)
    if isinstance(error, UserError):
        said = str(error)
    elif isinstance(error, known("torch", "OutOfMemoryError")):
        said = (
            f"out of GPU memory; try a lower --micro-batch-tokens, --group-size or --max-new-tokens ({said})"
        )
    else:
        said = f"a file cannot be read or written ({said}); look at the disk's room and permissions"
    print(f"error: {said}", file=sys.stderr)
    return 2


def known(module, name):
    """(error class,) if its module is imported, else (): what is not imported has raised nothing."""
    module = sys.modules.get(module)
    return (getattr(module, name),) if module else ()
