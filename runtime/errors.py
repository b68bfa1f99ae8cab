"""Errors for users, as opposed to bugs.

`UserError` is for mistakes that the user can correct: its message is one plain line that states
what was found, what was expected and what to do. The command line prints that line and exits with
2; every other exception is a bug and keeps its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the input; `str(error)` is one line for the user."""


class FormatError(UserError):
    """A file that is damaged, malformed or of the wrong kind."""
