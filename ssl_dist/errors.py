"""The exceptions that end a command with one line for people and no traceback."""


class UserError(ValueError):
    """A mistake in what the user gave: exit code 2. The message names the key or file, the value and the remedy.

    agreed: all ranks raise it together, so the first one says it. met_alone: only this rank has met it, so this rank
    must say it. Neither: it was met before the ranks met, most likely by all of them.
    """

    agreed = False
    met_alone = False


class Fault(RuntimeError):
    """Something that ends the run: exit code 1. The message names the rank, its host, the step and the cause.

    agreed: as above; else every rank says its own. code: another exit code, that of the rank behind it.
    """

    agreed = False
    code = 1
