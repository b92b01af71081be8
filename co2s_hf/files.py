"""Writing results so that nothing is lost: beside their place first, moved there when complete."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_new_folder(path: str | Path) -> Path:
    """Refuse a folder that already holds something.

    Raises:
        FileExistsError: The path is a file or a folder with content.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"'{path}' already exists and is not an empty folder. Choose another, or remove it.")
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


def write_text(path: str | Path, text: str):
    """Write a small file; readers see the old content or the new one, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
