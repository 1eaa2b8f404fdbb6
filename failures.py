"""What ends the program with a line instead of a traceback, and the exit codes. This room imports no other."""


class Failure(Exception):
    """Ends the program with `code` and the message, one or two lines, instead of a traceback."""

    code = 1


class UsageError(Failure):
    """A flag that is wrong or does not fit the others."""

    code = 2


class DataError(Failure):
    """Training pictures that are missing, unreadable or too few."""

    code = 3


class NonFiniteError(Failure):
    """A loss became NaN or infinite."""

    code = 4


class CheckpointError(Failure):
    """A checkpoint that cannot be read, or a disk that cannot be written."""

    code = 5


class LockedError(Failure):
    """Another process is training in this run's folder."""

    code = 6
