"""What the commands of plots share: errors of one line, and no file written over unasked."""

import argparse
import json

from data import UserError
from engine.command_line import OneLineParser


def parser(doc):
    return OneLineParser(
        description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def check_target(path, overwrite, ours):
    """Make ready for writing the file `path`: called before the hours of work that end in it.

    UserError where something is there: without --overwrite whatever it is, and with it what is not our own.
    ours: the keys of the JSON object that the file has to hold, or a function that raises UserError or
    ValueError for a file that is none of ours.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return
    if not overwrite:
        raise UserError(f"{path} exists already: choose another name, or --overwrite it")
    try:
        if callable(ours):
            ours(path)
        elif not set(ours) <= set(json.loads(path.read_text())):
            raise ValueError
    except (UserError, OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} is no file that this command writes, so --overwrite leaves it alone; choose another name"
        ) from error
