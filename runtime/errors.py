"""What a user can do wrong, and how files are written so that nothing is ever left half done.

`UserError` is for mistakes that the person at the keyboard can mend: its message is one plain line
that names what was found, what was expected and what to do. The command line prints that line and
exits with 2; every other exception is a bug and keeps its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the input; `str(error)` is one line for the user."""


class FormatError(UserError):
    """A file that is not what it claims to be, or not what was asked for."""
