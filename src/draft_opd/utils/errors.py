"""Exceptions whose message is one line for the user; the command line shows no traceback."""

from __future__ import annotations


def one_line(text: object, longest: int = 200) -> str:
    """A message for a one-line error: without line breaks, cut to `longest` characters."""
    return " ".join(str(text).split())[:longest]


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, and how to mend it.

    The command line prints it without a traceback and exits with status 2.
    """


class RowProblem(Exception):
    """Why one row of data cannot be used, in words that hold nothing of its text."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left; by name, so that torch need not be loaded."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in text
        or "out of memory" in text
    )


class Failure(Exception):
    """Work that could not go on, through no fault of the input: status 1, the same one line."""

    status = 1


class Stopped(Failure):
    """Ended on request, everything saved: status 75 (sysexits' "try again later")."""

    status = 75
