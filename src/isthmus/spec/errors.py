"""The errors that a user can do something about: the command line prints them as one line, without a traceback."""

from __future__ import annotations


class IsthmusError(ValueError):
    """Something about the input, the machine or the files is not as it must be.

    The message names what it is about, what was found, what was wanted, and the fix. ``exit_code`` is what the command
    line then ends with; an instance or a subclass may set another.
    """

    exit_code: int = 2
