"""A map in the making: its finished rows on disk, safe from whatever ends the program."""

import json
import os
import shutil
from pathlib import Path

import numpy as np

from .files import write_json


def unfinished_folder(destination: Path) -> Path:
    """Where a map is made."""
    return destination.with_name(f".{destination.name}.unfinished")


def name_place(error: OSError, place: Path):
    """Let an error of the system ("no space left") say where, if it does not."""
    if error.errno is not None and error.filename is None:
        error.filename = str(place)


class UnfinishedMap:
    """Planes of pixels that fill from the top, in a hidden folder beside the place where the map is going to appear.

    Plain uncompressed files: written rows are on disk before the count of finished rows says so, hence a program that
    is killed, or a machine that stops, loses the rows in flight alone.

    Args:
        destination: Of the map.
        height, width: In pixels.
        planes: Type of the values of each plane, by name.
        settings: All that the pixels depend on, as JSON has it; rows made with others are not continued.
        resume: Continue the rows that are there, if any.

    Raises:
        FileExistsError: There are unfinished rows, and they are not to be continued.
        ValueError: They were made with other settings.
        OSError: The folder cannot be written, or the disk is too small for the whole map.
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
        found = self._found()
        if found is not None and found["rows_done"]:
            self._continue(found, resume)
        else:
            self._begin()

    def _found(self) -> dict | None:
        try:
            return json.loads(self._progress.read_text())
        except FileNotFoundError:
            return None
        except json.JSONDecodeError as error:
            raise ValueError(f"'{self._progress}' is damaged ({error}). Remove its folder to begin anew.") from error

    def _continue(self, found: dict, resume: bool):
        if not resume:
            raise FileExistsError(
                f"An interrupted run left finished rows in '{self.folder}'. Go on with --resume, or remove them."
            )
        before, now = found["settings"], json.loads(json.dumps(self.settings))
        differing = [
            f"{name} was {before.get(name)}, now {now[name]}" for name in now if before.get(name) != now[name]
        ]
        if differing:
            raise ValueError(
                f"The rows in '{self.folder}' were made otherwise: {'; '.join(differing)}. Repeat what they were made "
                "with, or remove that folder."
            )
        self.rows_done = found["rows_done"]

    def _begin(self):
        size = self.height * self.width * sum(dtype.itemsize for dtype in self.planes.values())
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            # The finished files are compressed, but not always by much: room for both.
            free = shutil.disk_usage(self.folder.parent).free
            if free < 2 * size:
                raise OSError(
                    f"The disk of '{self.folder.parent}' has {free / 1e9:.2f} GB left; this map needs up to "
                    f"{2 * size / 1e9:.2f} GB while it is made. Free some, or choose another destination."
                )
            shutil.rmtree(self.folder, ignore_errors=True)  # begun, and not one row of it finished
            self.folder.mkdir()
            for name, dtype in self.planes.items():
                self._reserve(self.folder / name, self.height * self.width * dtype.itemsize)
            self._note()
        except OSError as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            name_place(error, self.folder)
            raise

    @staticmethod
    def _reserve(path: Path, size: int):
        """A file of so many bytes, which the disk has then: it does not fill up half-way."""
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            file.truncate(size)

    def _note(self):
        write_json(self._progress, {"rows_done": self.rows_done, "settings": self.settings})

    def write(self, rows: slice, values: dict[str, np.ndarray]):
        """Add finished rows: for every plane (rows, width)."""
        for name, plane in values.items():
            with (self.folder / name).open("r+b") as file:
                file.seek(rows.start * self.width * plane.itemsize)
                file.write(np.ascontiguousarray(plane).data)
                file.flush()
                os.fsync(file.fileno())
        self.rows_done = rows.stop
        self._note()

    def read(self, name: str, rows: slice) -> np.ndarray:
        """Finished rows of a plane, (rows, width)."""
        dtype, count = self.planes[name], (rows.stop - rows.start) * self.width
        offset = rows.start * self.width * dtype.itemsize
        return np.fromfile(self.folder / name, dtype, count, offset=offset).reshape(-1, self.width)

    def remove(self):
        shutil.rmtree(self.folder, ignore_errors=True)
