"""What identifies a scene, so that a resumed run notices that the scene has changed. Which mosaics can be read.

A local file is identified by its size and the time of its last change. So are the local files that it names: the
parts of a mosaic, or the values beside a header. rasterio gives neither for an address, so an address is identified by
the values of some of its pixels. The query of an address is left out: it may be a signature, which is renewed although
the scene stays the same.
"""

import itertools
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rasterio.errors import RasterioError

from ..utils.errors import UserFileNotFoundError, UserValueError
from ..utils.redaction import redact
from .rasters import SceneRaster, UnreadableScene, open_scene
from .scene_files import is_address, is_local, scene_name


SAMPLES = 3  # windows along each side of a scene whose values are compared
SAMPLE_PX = 32  # side of such a window
# Programs that only look at a scene write statistics and overviews into these files.
SIDE_SUFFIXES = (".aux.xml", ".ovr")

_failures: list[str] = []  # messages of mosaics that could not be read in this process; see `failures_remembered`


@dataclass(frozen=True)
class SceneIdentity:
    """What identifies a scene, as JSON types.

    Args:
        facts: Name, and size and time of a local file or a checksum of some pixels of an address.
        parts: Size and time of each local file that the scene names, by its path relative to the scene. A file that
            is missing is left out.
    """

    facts: dict
    parts: dict[str, dict]

    @classmethod
    def of(cls, scene: SceneRaster) -> "SceneIdentity":
        """Identify an opened scene. Call this before the first read.

        Raises:
            UserFileNotFoundError: A part of a mosaic is missing.
            UnreadableScene: A part of a mosaic could not be read before in this process.
            UnreadableScene: The scene, or a part of it, is at an address, and some of its pixels cannot be read.
        """
        source = scene.source
        files = set() if is_address(source) else _named_files(source)
        _check_parts(source, files)
        facts = {"scene": {"name": scene_name(source)} | (_file_facts(source) if is_local(source) else {})}
        if is_address(source) or any(is_address(file) for file in files):
            facts["scene_sample"] = _sample_checksum(scene)
        folder = Path(source).absolute().parent if is_local(source) else Path.cwd()
        parts = {os.path.relpath(file, folder): _file_facts(file) for file in sorted(files) if is_local(file)}
        parts.pop(scene_name(source), None)  # GDAL lists the scene itself, perhaps by another path
        return cls(facts, parts)

    def parts_checksum(self) -> str | None:
        """Return one checksum of all parts, for the tags of the map. None: there are no parts."""
        return _checksum(repr(sorted(self.parts.items())).encode()) if self.parts else None


def _named_files(source: str) -> set[str]:
    """Return the files that a scene names, also those that a mosaic in a mosaic names."""
    found, waiting = {source}, [source]
    while waiting:
        try:
            with open_scene(waiting.pop()) as raster:
                files = {file for file in raster.files if not file.lower().endswith(SIDE_SUFFIXES)} - found
        except (RasterioError, UserValueError):  # a broken part; reading the scene will raise an error with its name
            continue
        found |= files
        waiting += [file for file in files if file.lower().endswith(".vrt") and is_local(file)]
    return found - {source}


def _check_parts(source: str, files: set[str]):
    """Check that no part is missing, and that GDAL can report a part that it cannot read."""
    # Names with a colon, such as NETCDF:"file":variable, are no paths.
    missing = [file for file in sorted(files) if not is_address(file) and ":" not in file and not is_local(file)]
    if missing:
        raise UserFileNotFoundError(
            f"{source} cannot be read: its part '{missing[0]}' is missing. Restore it, or make the mosaic again."
        )
    for file in files | {source}:
        if any(re.search(rf"(?<![\w./-]){re.escape(redact(file))}(?![\w/-])", message) for message in _failures):
            raise UnreadableScene(
                f"{source} cannot be read now: '{file}' could not be read before, and GDAL may read zeros instead in "
                "this process. Start a new Python process. It can continue the finished rows: `resume=True`."
            )


@contextmanager
def failures_remembered(source: str) -> Iterator[None]:
    """Remember a mosaic that cannot be read. [`SceneIdentity.of`] then refuses it, and its part with the error.

    GDAL reports a part of a mosaic that it cannot open once per thread. After that it reads zeros without an error, as
    long as the process has any mosaic open, for example the user's own one. A second run would make a wrong map.
    """
    try:
        yield
    except UnreadableScene as error:
        if scene_name(source).lower().endswith(".vrt"):
            _failures.append(str(error))
        raise


def _file_facts(path: str) -> dict:
    facts = os.stat(path)
    return {"bytes": facts.st_size, "modified": facts.st_mtime}


def _sample_checksum(scene: SceneRaster) -> str:
    """Return a checksum of the values of some windows of a scene, evenly spread over it."""
    windows = itertools.product(_spread(scene.read_grid.height), _spread(scene.read_grid.width))
    return _checksum(*(values.tobytes() for window in windows for values in scene.read(*window)))


def _spread(length: int) -> list[slice]:
    side = min(SAMPLE_PX, length)
    starts = {round(n * (length - side) / (SAMPLES - 1)) for n in range(SAMPLES)}
    return [slice(start, start + side) for start in sorted(starts)]


def _checksum(*contents: bytes) -> str:
    checksum = 0
    for content in contents:
        checksum = zlib.crc32(content, checksum)
    return f"{checksum:08x}"
