"""The error that tells a user what to put right."""


class UserError(Exception):
    """A mistake that a user can fix. The message is one line that names the thing and the remedy."""
