"""Writing results so that nothing is lost: beside their place first, moved there when complete."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_new_folder(path: str | Path, remedy: str = "Choose another, or remove it.") -> Path:
    """Refuse a folder that already holds something.

    Raises:
        FileExistsError: The path is a file or a folder with content.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"'{path}' already exists and is not an empty folder. {remedy}")
    return path


@contextmanager
def written_beside(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside `path` to fill; on success it takes the place of `path`, whole.

    What stood there stays untouched until then, and if anything fails.
    """
    path = Path(path).resolve()  # a link stays a link to the new content
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    previous = path.with_name(f"{folder.name}-previous")
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())  # mkdtemp makes it private
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
    """Give a temporary path beside `path`, of its suffix, to write a file to; on success it takes its place, whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str):
    """Write a small file; readers see the old content or the new one, never a part."""
    with written_file(path) as temporary, temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # or the move might outlive the content when the machine stops


def write_json(path: str | Path, content: dict):
    """Write JSON in the same way; no NaN, which JSON does not know."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
