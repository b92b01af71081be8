"""Write files and folders atomically, and clean up after processes that were killed while they wrote.

A file or folder NAME is written in a work folder beside it, `.xxxxxxxx.co2s`, which contains:

- `.lock`: locked by the process that writes. The operating system unlocks it when that process ends, however it ends.
- `new/NAME`: the new content, until it is complete and on the disk. Then it is renamed to NAME.
- `previous/NAME`: the content of an existing folder NAME, while it is replaced.

A file replaces another one in one step. A folder cannot do so on every system: NAME becomes `previous/NAME`, then
`new/NAME` becomes NAME. If a kill comes between these two steps, NAME is missing, and both contents are complete.
[`recover`] then does the second step.
"""

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import UserFileExistsError, UserOSError, UserValueError


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

SUFFIX, LOCK, NEW, PREVIOUS = ".co2s", ".lock", "new", "previous"
WORK_FOLDER = re.compile(r"\.[a-z0-9_]{8}" + re.escape(SUFFIX))  # mkdtemp draws eight characters


def check_new_folder(path: str | Path, remedy: str = "Choose another folder, or remove it.") -> Path:
    """Raise an error if a folder already has content. What a killed process left in it does not count.

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
    recover(path)
    clean(path)
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
    try:  # permissions alone do not tell: the superuser has all of them, even on disks that cannot be written to
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise UserOSError(
            f"'{path}' cannot be created: '{existing}' is no folder that can be written to. {remedy}"
        ) from error


def check_decoded(paths: Iterable[str]):
    """Raise an error if the name of a file is not text in the encoding of the system.

    Python keeps the bytes of such a name as surrogates. Libraries such as Arrow and GDAL do not accept them.

    Args:
        paths: Paths as the system gives them.

    Raises:
        UserValueError: A path has bytes that cannot be decoded.
    """
    for path in paths:
        try:
            path.encode("utf-8")
        except UnicodeEncodeError as error:
            shown, encoding = path.encode("ascii", "backslashreplace").decode(), sys.getfilesystemencoding()
            raise UserValueError(
                f"The name of the file '{shown}' cannot be decoded as {encoding}, the encoding of the system. Rename "
                "the file; or, if the name is UTF-8, set the environment variable PYTHONUTF8=1."
            ) from error


@contextmanager
def written_beside(path: str | Path) -> Iterator[Path]:
    """Fill a temporary folder that replaces `path` when the block ends without an error.

    If the block fails, the previous content of `path` stays as it was and the temporary folder is removed. If the
    process is killed, [`recover`] finds the previous or the new content.

    Args:
        path: Folder to create or replace. A symbolic link keeps pointing to the same folder, which gets the new
            content.

    Yields:
        The temporary folder. It is on the same disk as `path`, so that renaming it is atomic.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    with _work_folder(path) as (new, previous):
        new.mkdir()
        yield new
        flush_folder(new)
        try:
            if path.exists():
                os.replace(path, previous)
            os.replace(new, path)
        except BaseException:
            if previous.exists() and not path.exists():
                os.replace(previous, path)
            raise
        flush(path.parent)  # the new name


@contextmanager
def written_file(path: str | Path) -> Iterator[Path]:
    """Write a temporary file that replaces `path` when the block ends without an error.

    Args:
        path: File to create or replace.

    Yields:
        The temporary path. It is on the same disk and has the same name, because some writers choose the file format
        by the suffix.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _work_folder(path) as (new, _):
        yield new
        flush(new)  # otherwise the rename may be on the disk before the content
        os.replace(new, path)


def write_text(path: str | Path, text: str):
    """Write a small UTF-8 text file atomically: a reader sees either the old or the new content."""
    with written_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: dict):
    """Write a JSON file atomically.

    Raises:
        ValueError: A number is NaN or infinite, which JSON does not allow.
    """
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def recover(path: str | Path):
    """Complete the replacement of a folder if a process was killed in the middle of it, and remove what it left.

    Call this before reading a folder that [`written_beside`] writes.

    Args:
        path: Folder that may be missing. For a name that is no path, such as a model on the Hub, nothing happens.
    """
    clean(Path(path).resolve().parent)


def clean(folder: Path):
    """Clean up what killed processes left directly below a folder. Folders of living processes are not touched.

    Args:
        folder: If it is missing, or cannot be read or changed, nothing happens.
    """
    with suppress(OSError):
        # A link with such a name is not ours, and its target must not change.
        found = [e for e in os.scandir(folder) if WORK_FOLDER.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
        for work in map(Path, found):
            with _locked(work) as is_abandoned:
                if is_abandoned:
                    _complete(work)
            if is_abandoned:
                shutil.rmtree(work, ignore_errors=True)


def remove_results(folder: Path, names: Iterable[str]):
    """Remove some files and folders of an earlier run, and what a killed run left.

    A folder is renamed first. So a kill in the middle leaves no half of it under its name.

    Args:
        folder: Folder of the run. It need not exist.
        names: Names of the files and folders. They need not exist.
    """
    clean(folder)
    for path in (folder / name for name in names):
        if path.is_dir() and not path.is_symlink():
            with _work_folder(path) as (removed, _):
                os.replace(path, removed)
        else:
            path.unlink(missing_ok=True)


def flush_folder(folder: Path):
    """Wait until a folder with everything in it is on the disk."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            flush(Path(parent, name))
        flush(Path(parent))


def flush(path: Path):
    """Wait until a file, or the names in a folder, are on the disk. Otherwise a power cut may leave an empty file."""
    if path.is_symlink() or (path.is_dir() and os.name == "nt"):  # Windows cannot open folders
        return
    # Some network disks refuse this for folders.
    with suppress(OSError) if path.is_dir() else nullcontext():
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def try_lock(file: BinaryIO | int) -> bool:
    """Lock an open file until it is closed or the process ends.

    Args:
        file: The file; or the descriptor of a folder, except on Windows.

    Returns:
        False if another process has locked it. True, too, on disks that know no locks.
    """
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass
    return True


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Lock the folder of a run while the run writes into it, so that no other run does. It is created if needed.

    Windows, and some network disks, know no locks of folders. There, nothing is locked.

    Raises:
        UserOSError: Another run has locked the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not try_lock(descriptor):
            raise UserOSError(
                f"Another run writes into '{folder}'. Wait until it has ended, or choose another `output_dir`."
            )
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _work_folder(path: Path) -> Iterator[tuple[Path, Path]]:
    """Make a work folder beside a path, and remove it at the end.

    Yields:
        Paths for the new and the previous content. Nothing exists there yet.
    """
    work = Path(tempfile.mkdtemp(prefix=".", suffix=SUFFIX, dir=path.parent))
    new, previous = work / NEW / path.name, work / PREVIOUS / path.name
    try:
        with _locked(work):
            new.parent.mkdir()
            previous.parent.mkdir()
            yield new, previous
    finally:
        if path.exists() or not previous.exists():  # otherwise both renames failed, and `recover` needs this folder
            shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _locked(work: Path) -> Iterator[bool]:
    """Lock a work folder.

    Yields:
        Whether it is locked, see [`try_lock`].
    """
    with (work / LOCK).open("ab") as file:
        yield try_lock(file)


def _complete(work: Path):
    """Do the second step of a replacement, if the first one was done."""
    for previous in (work / PREVIOUS).glob("*"):
        new, path = work / NEW / previous.name, work.parent / previous.name
        if new.exists() and not path.exists():
            os.replace(new, path)
