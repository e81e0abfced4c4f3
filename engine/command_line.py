"""From flags to settings, and from whatever goes wrong to one line and an exit status.

Nothing here imports torch: that takes seconds, and who asks for --help or mistypes a flag should not wait for
them. So a program reads its flags twice: first `answer_early`, then, with torch imported, for good.
"""

import argparse
import contextlib
import dataclasses
import os
import re
import signal
import sys
import tempfile
import traceback
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


# ----------------------------------------------------------------------------------------------------------
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
    use_plain_streams()
    sys.excepthook = say_stopped  # Ctrl-C in the imports to come, before exit_status takes over
    try:
        read_flags()
    except UserError as error:
        sys.exit(tell(error))


def say_stopped(kind, error, trace):
    """sys.excepthook: Ctrl-C is a line, anything else what Python makes of it."""
    if issubclass(kind, KeyboardInterrupt):
        say("stopped; nothing was written")
    else:
        sys.__excepthook__(kind, error, trace)


def check_flags(configs, description, argv):
    """UserError for a flag that is unknown, not a number, or out of its range."""
    if isinstance(configs, dict):
        word, argv = choose_command(configs, argv, description)
        configs = configs[word]
    check_ranges(configs(**parse(configs, argv, description)))


# ----------------------------------------------------------------------------------------------------------
# Exit status


class Stop:
    """Within the block, Ctrl-C once sets `asked`, to finish the step and save; twice is KeyboardInterrupt."""

    def __enter__(self):
        self.asked = False
        self.before = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def handle(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this step, then saving (Ctrl-C again: stop at once)", file=sys.stderr)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def exit_status(work, stopped="stopped; nothing was written"):
    """Call work() -> 0, or 130 if it returns None because it was stopped.

    Whatever goes wrong becomes one line on stderr and 2: what a user can mend with its remedy, anything else
    with where its traceback is. Ctrl-C becomes the line that the exception carries, or `stopped`, and 130.
    """
    warnings.filterwarnings("once", category=UserWarning)
    warnings.formatwarning = lambda message, *_, **__: f"note: {one_line(str(message))}\n"
    use_plain_streams()
    try:
        status = 130 if work() is None else 0
        flush()
        return status
    except HelpShown:
        return 0
    except KeyboardInterrupt as error:
        say(str(error) or stopped)
        return 130
    except BrokenPipeError:  # as with `| head -1`: nobody reads on
        silence()
        return 141  # what a shell reports of a program that ends so
    except (Exception, SystemExit) as error:  # sys.exit in a reward file is no end of ours
        return tell(error)


def tell(error):
    """One line on stderr that says what went wrong -> exit status 2."""
    if isinstance(error, UserError):
        said = str(error)
    elif isinstance(error, known("torch", "OutOfMemoryError")):
        said = "out of GPU memory; try a lower --micro-batch-tokens, --group-size or --max-new-tokens "
        said += f"({first_line(error)})"
    elif isinstance(error, (OSError, *known("safetensors", "SafetensorError"))):
        said = f"a file cannot be read or written ({first_line(error)}); "
        said += "look at the disk's room and permissions"
    else:
        what = "sys.exit was called" if isinstance(error, SystemExit) else type(error).__name__
        said = f"unexpected: {what} ({first_line(error)}); {keep_traceback(error)}"
    say(f"error: {said}")
    return 2


def known(module, name):
    """(error class,) if its module is imported, else (): what is not imported has raised nothing."""
    module = sys.modules.get(module)
    return (getattr(module, name),) if module else ()


def keep_traceback(error):
    """Write it into the run folder, or a temporary file where there is none -> a clause that says where."""
    text = "".join(traceback.format_exception(error))
    with contextlib.suppress(OSError, TypeError):
        path = Path(getattr(error, "run_folder", None)) / "minigrao-error.log"
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
        return f"its traceback is in {path}"
    with contextlib.suppress(OSError):
        file, path = tempfile.mkstemp(prefix="minigrao-error-", suffix=".log")
        with open(file, "w", encoding="utf-8", errors="backslashreplace") as log:
            log.write(text)
        return f"its traceback is in {path}"
    return "its traceback could not be kept"


# ----------------------------------------------------------------------------------------------------------
# Streams


def one_line(text, most=800):
    """Text without line breaks and other control characters, and of a length that a terminal can show.

    The middle is cut: a message begins with the thing and ends with the remedy.
    """
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", text).strip()
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def say(text):
    """One line on stderr."""
    with contextlib.suppress(BrokenPipeError):
        print(one_line(text), file=sys.stderr, flush=True)


def use_plain_streams():
    """Let a terminal that knows only ASCII get an escape for what it cannot show, instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def flush():
    """Write what stdout holds back; whether anybody still reads it is no matter of the exit status."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        silence()


def silence():
    """Send what is still to be written nowhere: the interpreter flushes on its way out and would complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a stream of a test, say
            stream.flush()
            continue
        with contextlib.suppress(OSError, ValueError):
            os.dup2(nowhere, stream.fileno())
