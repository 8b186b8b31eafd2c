"""Errors that a user can cause: a message has a line for each fault, which says what is wrong, where, what to do."""


class SddError(Exception):
    """Shown by the command line as one line, or one for each of several faults; exit code 2."""


def one_line(error: BaseException | str, most: int = 200) -> str:
    """What an error says, on one line of at most `most` characters; of an error that says nothing, its type."""
    return (" ".join(str(error).split()) or type(error).__name__)[:most]


class RecipeError(SddError):
    """A recipe cannot be read, or one of its settings is unknown or out of range."""


class SourceError(SddError):
    """The input table, tar or folder cannot be used as it is."""


class BackendError(SddError):
    """A model cannot be loaded: weights or packages missing, or of the wrong kind."""


class ShardError(SddError):
    """A dataset folder holds something that contradicts its manifests."""


class RunError(SddError):
    """The run cannot start or go on: no cluster, no space, no permission."""


class QueryError(SddError):
    """What was asked of a dataset cannot be answered: wrong SQL, or nothing there to ask."""
