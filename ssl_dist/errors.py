"""The one exception that means "the user can mend this": one line, exit code 2, no traceback."""


class UserError(ValueError):
    """A mistake in what the user gave. The message names the key or file, the value and the remedy.

    met_alone: only this rank has met it, so this rank must say it; else all have and the first one says it.
    """

    met_alone = False
