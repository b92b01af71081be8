"""Keep the finished rows of a map on disk, so that a run can continue after a crash."""

import json
import os
import shutil
from pathlib import Path

import numpy as np

from ..utils.errors import UserFileExistsError, UserOSError, UserValueError
from ..utils.files import write_json


def unfinished_folder(destination: Path) -> Path:
    """Return the hidden folder for the finished rows of the map at `destination`, in the same folder as the map."""
    return destination.with_name(f".{destination.name}.unfinished")


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


class ResumableRaster:
    """Raster planes on disk that are filled from the top, row by row.

    A plane has one value per pixel, for example the label or the confidence. Each plane is an uncompressed file in a
    hidden folder beside the map. The count of finished rows is written after the rows. If a process is killed or a
    machine crashes, only the rows of the last write are therefore lost.

    Args:
        destination: Path of the map.
        height, width: Size in pixels.
        planes: Name -> NumPy type of each plane.
        settings: Everything that the pixels depend on, as JSON types. Rows that were made with other settings are not
            continued.
        resume: Continue after the finished rows, if there are any.

    Attributes:
        rows_done: Number of finished rows, from the top.

    Raises:
        UserFileExistsError: There are finished rows, and `resume` is False.
        UserValueError: The finished rows were made with other settings, or their count is damaged.
        UserOSError: The folder cannot be written, or the disk is too small for the whole map.
    """

    def __init__(
        self,
        destination: Path,
        height: int,
        width: int,
        planes: dict[str, np.dtype],
        settings: dict,
        resume: bool = False,
    ):
        self.folder = unfinished_folder(destination)
        self.height, self.width, self.settings = height, width, settings
        self.planes = {name: np.dtype(dtype) for name, dtype in planes.items()}
        self.rows_done, self._progress = 0, self.folder / "progress.json"
        progress = self._read_progress()
        if progress is not None and progress["rows_done"]:
            self._continue(progress, resume)
        else:
            self._start()

    def _read_progress(self) -> dict | None:
        """Return the count of finished rows and the settings of an interrupted run. None if there is none."""
        try:
            return json.loads(self._progress.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except json.JSONDecodeError as error:
            raise UserValueError(
                f"'{self._progress}' is damaged ({error}). Remove its folder to start from the first row."
            ) from error

    def _continue(self, progress: dict, resume: bool):
        """Continue after the finished rows of an interrupted run."""
        if not resume:
            raise UserFileExistsError(
                f"'{self.folder}' has finished rows of an interrupted run. Continue them with `resume=True`, or "
                "remove that folder."
            )
        before, now = progress["settings"], json.loads(json.dumps(self.settings))
        differing = [
            f"{name} was {before.get(name)}, now {now[name]}" for name in now if before.get(name) != now[name]
        ]
        if differing:
            raise UserValueError(
                f"The rows in '{self.folder}' were made with other settings: {'; '.join(differing)}. Use the previous "
                "settings, or remove that folder."
            )
        self.rows_done = progress["rows_done"]

    def _start(self):
        """Create the folder and reserve the space of all planes."""
        size = self.height * self.width * sum(dtype.itemsize for dtype in self.planes.values())
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            # The final files are compressed, but possibly not much smaller. Both exist at the same time.
            free = shutil.disk_usage(self.folder.parent).free
            if free < 2 * size:
                raise UserOSError(
                    f"The disk of '{self.folder.parent}' has {free / 1e9:.2f} GB left; this map needs up to "
                    f"{2 * size / 1e9:.2f} GB. Free some space, or choose another destination."
                )
            shutil.rmtree(self.folder, ignore_errors=True)  # of a run that finished no row
            self.folder.mkdir()
            for name, dtype in self.planes.items():
                self._reserve(self.folder / name, self.height * self.width * dtype.itemsize)
            self._write_progress()
        except OSError as error:
            shutil.rmtree(self.folder, ignore_errors=True)
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

    def _write_progress(self):
        write_json(self._progress, {"rows_done": self.rows_done, "settings": self.settings})

    def write(self, rows: slice, values: dict[str, np.ndarray]):
        """Write finished rows of all planes.

        Args:
            rows: The rows that follow the finished rows.
            values: Name of each plane -> values (rows, width) in its type.
        """
        for name, plane in values.items():
            with (self.folder / name).open("r+b") as file:
                file.seek(rows.start * self.width * plane.itemsize)
                file.write(np.ascontiguousarray(plane).data)
                file.flush()
                os.fsync(file.fileno())
        self.rows_done = rows.stop
        self._write_progress()

    def read(self, name: str, rows: slice) -> np.ndarray:
        """Read finished rows of a plane, (rows, width)."""
        dtype, count = self.planes[name], (rows.stop - rows.start) * self.width
        offset = rows.start * self.width * dtype.itemsize
        return np.fromfile(self.folder / name, dtype, count, offset=offset).reshape(-1, self.width)

    def remove(self):
        """Remove the folder with all rows."""
        shutil.rmtree(self.folder, ignore_errors=True)
