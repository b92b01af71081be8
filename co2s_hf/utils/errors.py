"""Errors that the user can correct, as opposed to bugs.

A command that fails with a [`UserError`] prints the message without a traceback. Every other exception keeps its
traceback. Messages name Python parameters in backticks, such as `bands` or `bands=(4, 3, 2)`. The command line turns
these into --bands and --bands 4,3,2.

Messages hide the secrets of addresses: see [`redact`]. The exception that caused a [`UserError`] is not changed. So a
traceback outside the command line may show them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from .model_files import check_model_files
from .redaction import redacted


class UserError(Exception):
    """A value, file, library or permission is wrong or missing.

    The message names it, what was expected and the remedy. Its secrets are hidden.
    """

    def __init__(self, *args):
        super().__init__(*redacted(args))


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


@contextmanager
def loading(
    what: str, expected: str | None = None, name: str | Path | None = None, model_type: str | None = None
) -> Iterator[None]:
    """Turn the errors of a model that cannot be loaded into a UserOSError.

    transformers, safetensors and peft raise many types for missing, damaged or unsuitable files. Wrong values in a
    configuration also cause errors that otherwise point to bugs, such as AttributeError.

    Args:
        what: Name of the model, and of the parameter that gave it, for the message.
        expected: What the parameter should have been, for the message.
        name: Folder of the model, whose files are checked before the block; or its name on the Hub. None: no check.
        model_type: Type that the configuration of the model must name. None: any.
    """
    try:
        if name is not None:
            check_model_files(name, model_type)
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError, StrictDataclassError) as error:
        remedy = "" if expected is None else f"; expected {expected}"
        raise UserOSError(f"{what} cannot be loaded{remedy}. {error}") from error
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError) as error:
        reason = f"Its configuration is damaged or of another program: {type(error).__name__}: {error}"
        raise UserOSError(f"{what} cannot be loaded. {reason}") from error
