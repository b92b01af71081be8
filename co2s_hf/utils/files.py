"""Write files and folders atomically: to a temporary path in the same folder first, renamed when complete."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserFileExistsError, UserOSError


def check_new_folder(path: str | Path, remedy: str = "Choose another folder, or remove it.") -> Path:
    """Raise an error if a folder already has content.

    Args:
        path: Folder that a run is about to create or fill.
        remedy: Last sentence of the error message.

    Returns:
        `path` as a Path.

    Raises:
        UserFileExistsError: The path is a file, or a folder with content.
        UserOSError: The folder cannot be created.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserFileExistsError(f"'{path}' already exists and is not an empty folder. {remedy}")
    check_writable(path, remedy)
    return path


def check_writable(path: Path, remedy: str):
    """Raise an error if a folder, or its next parent that exists, cannot be written to.

    Args:
        path: Folder that a run is about to create or fill.
        remedy: Last sentence of the error message.

    Raises:
        UserOSError: The folder cannot be created or written to.
    """
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserOSError(f"'{path}' cannot be created: '{existing}' is no folder that can be written to. {remedy}")


@contextmanager
def written_beside(path: str | Path) -> Iterator[Path]:
    """Fill a temporary folder that replaces `path` when the block ends without an error.

    If the block fails, the previous content of `path` stays as it was and the temporary folder is removed.

    Args:
        path: Folder to create or replace. A symbolic link keeps pointing to the same folder, which gets the new
            content.

    Yields:
        The temporary folder. It lies in the parent folder of `path`, so that renaming it is atomic.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    previous = path.with_name(f"{folder.name}-previous")
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())  # mkdtemp gives access to the owner only
        if path.exists():
            os.replace(path, previous)
        os.replace(folder, path)
    except BaseException:
        if previous.exists() and not path.exists():
            os.replace(previous, path)
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if previous.exists():
        shutil.rmtree(previous)


@contextmanager
def written_file(path: str | Path) -> Iterator[Path]:
    """Write a temporary file that replaces `path` when the block ends without an error.

    Args:
        path: File to create or replace.

    Yields:
        The temporary path. It lies in the same folder and has the same suffix, because some writers choose the file
        format by the suffix.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str):
    """Write a small UTF-8 text file atomically: a reader sees either the old or the new content."""
    with written_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # otherwise the rename may be on the disk before the content


def write_json(path: str | Path, content: dict):
    """Write a JSON file atomically.

    Raises:
        ValueError: A number is NaN or infinite, which JSON does not allow.
    """
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
