"""Exceptions that end the program with a short message instead of a traceback, and their exit codes."""

import os


class Failure(Exception):
    """Ends the program with exit code `code` and a message of one or two lines, without a traceback.

    `silent`: another process of the same run prints the message.
    """

    code = 1

    def __init__(self, message):
        super().__init__(message)
        self.silent = os.environ.get("RANK", "0") != "0"    # all ranks have the same command line


class UsageError(Failure):
    """A flag that is invalid or contradicts another, or a training that needs more memory than there is."""

    code = 2


class DataError(Failure):
    """Training pictures or published weights that are missing, unreadable or unfit, or too few pictures."""

    code = 3


class NonFiniteError(Failure):
    """A loss or a weight became NaN or infinite, or processes of one run hold different weights."""

    code = 4


class CheckpointError(Failure):
    """A checkpoint that cannot be read, or a disk that cannot be written."""

    code = 5


class LockedError(Failure):
    """Another process is training in this run's folder."""

    code = 6


class LostRankError(Failure):
    """Another process of the same run was killed, stopped, or lost with its machine."""

    code = 7


# what to run, in messages where the command line is not known; `parameter.to_resume` where it is
TO_RESUME = "the same command again (without --restart or --pretrained_model) to resume from the newest checkpoint"


def out_of_memory_on(error):
    """Return what has no memory left, "the GPU" or "this machine", by an exception; None if that is of another kind."""
    if type(error).__name__ == "OutOfMemoryError" or "MPS backend out of memory" in str(error):
        return "the GPU"
    return "this machine" if isinstance(error, MemoryError) or "can't allocate memory" in str(error) else None


def first_line(error):
    """Return the first line of an exception's message, joined with the second if it ends in a colon, at most 200
    characters; the name of the exception's type if the message is empty.
    """
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    return (f"{first} {rest[0]}" if first.endswith(":") and rest else first)[:200]
