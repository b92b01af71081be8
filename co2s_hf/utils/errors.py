"""Errors that the user can correct, as opposed to bugs.

A command that fails with a [`UserError`] prints the message without a traceback. Every other exception keeps its
traceback. Messages name Python parameters in backticks, such as `bands` or `bands=(4, 3, 2)`. The command line turns
these into --bands and --bands 4,3,2.
"""


class UserError(Exception):
    """A value, file, library or permission is wrong or missing.

    The message names it, what was expected and the remedy.
    """


class UserValueError(UserError, ValueError):
    """A value cannot be used."""


class UserOSError(UserError, OSError):
    """The operating system or the network refused an operation."""


class UserFileNotFoundError(UserError, FileNotFoundError):
    """A file or folder is missing."""


class UserFileExistsError(UserError, FileExistsError):
    """A file or folder exists already and must not be overwritten."""


class UserImportError(UserError, ImportError):
    """An optional library is not installed."""
