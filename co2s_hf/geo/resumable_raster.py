"""Keep the finished rows of a map on disk, so that a run can continue after a crash."""

import json
import logging
import os
import re
import shutil
import zlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from ..utils.errors import UserFileExistsError, UserOSError, UserValueError
from ..utils.files import WORK_FOLDER, write_json


PROGRESS = "progress.json"
ROWS_SUFFIX = ".rows"
OWN_FILES = re.compile(rf"\w+\{ROWS_SUFFIX}|{re.escape(PROGRESS)}")
CHECK_BYTES = 2**24  # bytes of finished rows that are checked at a time

logger = logging.getLogger(__name__)


def unfinished_folder(destination: Path) -> Path:
    """Return the hidden folder for the unfinished content of a file, in the same folder as the file."""
    return destination.with_name(f".{destination.name}.unfinished")


def remove_unfinished(destination: Path):
    """Remove the folder of finished rows. A link, or a folder with other files, stays and is named in a warning."""
    folder = unfinished_folder(destination)
    try:
        _check_folder(folder)
    except UserOSError as error:
        logger.warning(str(error))
    else:
        shutil.rmtree(folder, ignore_errors=True)


def file_error(error: OSError, path: Path) -> UserOSError:
    """Convert an error of the operating system, such as a full disk, to one with the path and the remedy.

    Args:
        error: The error.
        path: Path to name if the error does not have one.
    """
    return UserOSError(
        f"'{error.filename or path}' cannot be read or written: {error.strerror or error}. Free some space, change "
        "the permissions, or choose another destination."
    )


def differences(before: dict, now: dict) -> dict[str, tuple]:
    """Compare settings, of JSON types. Dictionaries are compared entry by entry.

    Args:
        before, now: The settings. Those that are only in `before` are not compared.

    Returns:
        Name of each setting that differs -> (value before, value now). None: there is no such value.
    """
    found = {}
    for name, new in now.items():
        old = before.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            pairs = {f"{name}.{key}": (old.get(key), new.get(key)) for key in old | new}
        else:
            pairs = {name: (old, new)}
        found |= {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    return found


@dataclass
class Progress:
    """The state of an unfinished map, as it is stored in its folder.

    Args:
        rows_done: Number of finished rows, from the top.
        settings, parts: See [`ResumableRaster`].
        checksums: Checksum of the finished rows of each plane.
        runs: For each run with other `rounding` than the run before: its first row ("from_row") and its `rounding`.
        outputs: Paths, relative to the folder of the map, that are about to be replaced by the files of the map.

    Raises:
        TypeError: A field is missing, or has another type.
    """

    rows_done: int
    settings: dict
    parts: dict
    checksums: dict = field(default_factory=dict)
    runs: list = field(default_factory=list)
    outputs: list = field(default_factory=list)

    def __post_init__(self):
        for one in fields(self):
            if type(getattr(self, one.name)) is not one.type:
                raise TypeError(f"{one.name} is {getattr(self, one.name)!r}")
        if not all(type(run) is dict for run in self.runs):
            raise TypeError(f"runs is {self.runs!r}")

    @classmethod
    def read(cls, folder: Path) -> "Progress | None":
        """Read the progress of an interrupted run. None: there is none, or it was killed before it finished a row.

        Raises:
            UserOSError: The folder is a link or a file, cannot be read, or has files that no run has written.
            UserValueError: The file is damaged.
        """
        _check_folder(folder)
        path = folder / PROGRESS
        try:
            progress = cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise file_error(error, path) from error
        except (ValueError, TypeError, RecursionError) as error:
            raise _damaged(path, str(error)) from error
        return progress if progress.rows_done else None


class ResumableRaster:
    """Raster planes on disk that are filled from the top, row by row.

    A plane has one value per pixel, for example the label or the confidence. Each plane is an uncompressed file in a
    hidden folder beside the map. The count of finished rows and their checksum are written after the rows. If a
    process is killed or a machine crashes, only the rows of the last write are therefore lost.

    Args:
        destination: Path of the map.
        height, width: Size in pixels.
        planes: Name -> NumPy type of each plane.
        settings: Everything that changes the values of the pixels, as JSON types. Rows that were made with other
            settings are not continued.
        resume: Continue after the finished rows, if there are any.
        rounding: What changes the values by rounding alone, such as the device. It may be different after a resume.
        parts: Files that the pixels are read from: name -> size and time, as JSON types. A file that an earlier run
            has found must not have changed. A file that was missing may be there now.
        is_dry_run: Only make the checks: create nothing. Rows cannot be written then.

    Attributes:
        rows_done: Number of finished rows, from the top.
        runs: Which rows were made with which `rounding`; see [`Progress`].

    Raises:
        UserFileExistsError: There are finished rows, and `resume` is False.
        UserValueError: The finished rows were made with other settings or from other files, or are damaged.
        UserOSError: The folder cannot be written, is a link, or has other files; or the disk is too small for the
            whole map.
    """

    def __init__(
        self,
        destination: Path,
        height: int,
        width: int,
        planes: dict[str, np.dtype],
        settings: dict,
        resume: bool = False,
        *,
        rounding: dict | None = None,
        parts: dict | None = None,
        is_dry_run: bool = False,
    ):
        self.destination, self.folder = destination, unfinished_folder(destination)
        self.height, self.width, self.settings = height, width, settings
        self.planes = {name: np.dtype(dtype) for name, dtype in planes.items()}
        self.rounding, self.parts = rounding or {}, parts or {}
        before = Progress.read(self.folder)
        if before is None:
            self._progress = Progress(0, settings, dict(self.parts))
            if is_dry_run:
                self._check_space()
            else:
                self._start()
        else:
            self._continue(before, resume)

    @property
    def rows_done(self) -> int:
        return self._progress.rows_done

    @property
    def runs(self) -> list[dict]:
        return self._progress.runs

    def _continue(self, before: Progress, resume: bool):
        """Continue after the finished rows of an interrupted run."""
        if not resume:
            raise UserFileExistsError(
                f"'{self.folder}' has finished rows of an interrupted run. Continue them with `resume=True`, or "
                "remove that folder."
            )
        differing = differences(before.settings, json.loads(json.dumps(self.settings)))
        if differing:
            listed = "; ".join(f"{name} was {old}, now {new}" for name, (old, new) in differing.items())
            raise UserValueError(
                f"The rows in '{self.folder}' were made with other settings: {listed}. Use the previous settings, or "
                "remove that folder."
            )
        parts = json.loads(json.dumps(self.parts))
        if changed := [name for name, facts in parts.items() if before.parts.get(name, facts) != facts]:
            raise UserValueError(
                f"'{changed[0]}' has changed since the rows in '{self.folder}' were made from it. Restore it, or "
                "remove that folder."
            )
        before.parts |= parts
        self._progress = before
        self._check_rows()

    def _check_rows(self):
        """Check that the finished rows are those that were written."""
        if not 0 < self.rows_done <= self.height:
            raise _damaged(self.folder / PROGRESS, f"{self.rows_done} finished rows of {self.height}")
        for name, dtype in self.planes.items():
            path, row_bytes = self._path(name), self.width * dtype.itemsize
            if not path.is_file() or path.stat().st_size != self.height * row_bytes:
                raise _damaged(path, f"expected a file of {self.height * row_bytes} bytes")
            checksum, left = 0, self.rows_done * row_bytes
            with path.open("rb") as file:
                while left:
                    piece = file.read(min(left, CHECK_BYTES))
                    checksum, left = zlib.crc32(piece, checksum), left - len(piece)
            if checksum != self._progress.checksums.get(name):
                raise _damaged(path, "its checksum differs")

    @property
    def needed_bytes(self) -> int:
        """Bytes on disk that the map needs at most. The final files are compressed, but possibly not much smaller, and
        they exist at the same time as the rows."""
        return 2 * self.height * self.width * sum(dtype.itemsize for dtype in self.planes.values())

    def _check_space(self):
        folder = self.folder.absolute().parent
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        if free < self.needed_bytes:
            raise UserOSError(
                f"The disk of '{self.folder.parent}' has {free / 1e9:.2f} GB left; this map needs up to "
                f"{self.needed_bytes / 1e9:.2f} GB. Free some space, or choose another destination."
            )

    def _start(self):
        """Create the folder and reserve the space of all planes."""
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._check_space()
            if self.folder.exists():  # of a run that finished no row
                shutil.rmtree(self.folder)
            self.folder.mkdir()
            for name, dtype in self.planes.items():
                self._reserve(self._path(name), self.height * self.width * dtype.itemsize)
            self._write_progress()
        except OSError as error:
            remove_unfinished(self.destination)
            if isinstance(error, UserOSError):
                raise
            raise file_error(error, self.folder) from error

    @staticmethod
    def _reserve(path: Path, size: int):
        """Create a file of `size` bytes and reserve its space, so that a full disk is an error now and not later."""
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            file.truncate(size)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{ROWS_SUFFIX}"

    def _write_progress(self):
        write_json(self.folder / PROGRESS, asdict(self._progress))

    def write(self, rows: slice, values: dict[str, np.ndarray]):
        """Write finished rows of all planes.

        Args:
            rows: The rows that follow the finished rows.
            values: Name of each plane -> values (rows, width) in its type.
        """
        progress, checksums = self._progress, {}
        for name, plane in values.items():
            content = np.ascontiguousarray(plane).data.cast("B")
            with self._path(name).open("r+b") as file:
                file.seek(rows.start * self.width * plane.itemsize)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            checksums[name] = zlib.crc32(content, progress.checksums.get(name, 0))
        if not progress.runs or self.changes_rounding:
            progress.runs.append({"from_row": rows.start} | self.rounding)
        progress.rows_done, progress.checksums = rows.stop, checksums
        self._write_progress()

    @property
    def changes_rounding(self) -> bool:
        """Whether the last finished rows were made with another `rounding` than that of this run."""
        return bool(self.runs) and not self.rounding.items() <= self.runs[-1].items()

    def read(self, name: str, rows: slice) -> np.ndarray:
        """Read finished rows of a plane, (rows, width)."""
        dtype, count = self.planes[name], (rows.stop - rows.start) * self.width
        offset = rows.start * self.width * dtype.itemsize
        return np.fromfile(self._path(name), dtype, count, offset=offset).reshape(-1, self.width)

    def note_outputs(self, paths: list[Path]):
        """Store which files are about to be replaced. If this run is killed then, the next run may replace them."""
        self._progress.outputs = [_relative(path, self.destination) for path in paths]
        self._write_progress()

    def remove(self):
        """Remove the folder with all rows."""
        remove_unfinished(self.destination)


def was_replacing(destination: Path, path: Path) -> bool:
    """Return whether a killed run of the map at `destination` was about to replace the file at `path`.

    Raises:
        UserOSError, UserValueError: As in [`Progress.read`].
    """
    progress = Progress.read(unfinished_folder(destination))
    return progress is not None and _relative(path, destination) in progress.outputs


def _relative(path: Path, destination: Path) -> str:
    return os.path.relpath(path.absolute(), destination.absolute().parent)


def _check_folder(folder: Path):
    """Check that a folder, if it exists, is a folder and contains only what a [`ResumableRaster`] writes."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserOSError(
            f"'{folder}' is a link or a file; expected the folder of an unfinished map. Remove it, or choose another "
            "destination."
        )
    if not folder.exists():
        return
    try:
        others = [path for path in folder.iterdir() if not _is_own(path)]
    except OSError as error:
        raise file_error(error, folder) from error
    if others:
        raise UserOSError(
            f"'{others[0]}' is a link, or a file that this version of the package does not write there. Move it away, "
            "or choose another destination."
        )


def _is_own(path: Path) -> bool:
    kind = OWN_FILES if path.is_file() else WORK_FOLDER if path.is_dir() else None
    return kind is not None and not path.is_symlink() and kind.fullmatch(path.name) is not None


def _damaged(path: Path, reason: str) -> UserValueError:
    return UserValueError(f"'{path}' is damaged ({reason}). Remove its folder to start from the first row.")
