"""The error that tells a user what to put right, and what an error of someone else's says in one line."""


class UserError(Exception):
    """A mistake that a user can fix. The message is one line that names the thing and the remedy."""


def first_line(error, most=200):
    """The first line of an error's text, at most `most` characters; the error's class where there is none."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # an error class of the user's own, whose __str__ fails
        lines = []
    return lines[0][:most] if lines else type(error).__name__
