"""Find scenes by file, folder, pattern or address, and choose the paths of their maps."""

import glob
import itertools
import logging
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, urlsplit

from ..data.reading import find_images
from ..utils.errors import UserFileNotFoundError, UserValueError
from ..utils.files import check_decoded
from ..utils.redaction import redact


logger = logging.getLogger(__name__)

RASTER_SUFFIXES = (".tif", ".tiff", ".vrt", ".jp2", ".img")
# In a folder, these are no scenes: pictures rarely have a position, and the other files contain several rasters.
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CONTAINER_SUFFIXES = (".nc", ".hdf", ".h5", ".zip")
# A name that ends so is meant as a file. Other names with a dot may be folders, such as maps.v2.
OTHER_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".pdf", ".svg", ".zip", ".json", ".nc", ".shp")
OTHER_SUFFIXES += (".gpkg", ".geojson", ".parquet", ".vrt", ".jp2", ".img", ".cog")


def is_address(source: str) -> bool:
    """Return whether a source is a web address or a path of one of GDAL's virtual file systems."""
    return "://" in source or source.startswith("/vsi")


def is_local(source: str) -> bool:
    """Return whether a source is an existing local file."""
    return not is_address(source) and Path(source).exists()


def scene_name(source: str) -> str:
    """Return the file name of a scene. The query of an address is left out, because it may contain a secret."""
    if is_address(source):
        address = urlsplit(redact(source))
        named = parse_qs(address.query).get("url")  # of GDAL's form /vsicurl?url=https%3A%2F%2F...
        return PurePosixPath(urlsplit(named[0]).path if named else address.path).name
    return Path(source).name


def find_scenes(words: list[str]) -> dict[str, Path]:
    """Find scenes by file, folder, pattern or address.

    Args:
        words: Each is a file, a folder (all scenes in it and in its subfolders), a pattern such as "*.jp2", or an
            address that GDAL opens: https://..., s3://..., /vsizip/..., NETCDF:"file":variable. Addresses and files
            are not checked here. In a folder, label maps are left out: see [`why_label_map`]. So are pictures, files
            with several rasters, and folders labels/ beside a folder images/. Warnings name them.

    Returns:
        Scene -> path of its map, without a suffix and relative to the folder of all maps.

    Raises:
        UserFileNotFoundError: There is no scene for a word.
        UserValueError: Two scenes would have maps of the same name, or a mosaic (VRT) in a folder names rasters
            outside this folder, or a name cannot be decoded.
    """
    scenes = search_scenes(words)
    names: dict[Path, str] = {}
    for scene, name in scenes.items():
        if names.setdefault(name, scene) != scene:
            raise UserValueError(
                f"'{scene}' and '{names[name]}' would have the same map, {name}.tif. Segment them in separate runs."
            )
    return scenes


def search_scenes(words: list[str]) -> dict[str, Path]:
    """Find scenes as [`find_scenes`] does. Scenes from several words may have the same name."""
    scenes: dict[str, Path] = {}
    for word in words:
        path = Path(word)
        if is_address(word):
            found = {word: Path(Path(scene_name(word)).stem)}
        elif path.is_dir():
            found = {str(file): file.relative_to(path).with_suffix("") for file in _scenes_of_folder(path)}
        elif path.exists():
            found = {str(path): Path(path.stem)}
        elif ":" in word:
            found = {word: Path("_".join(Path(part.strip('"')).stem for part in word.split(":")[1:]))}
        else:
            files = (Path(file) for file in sorted(glob.glob(word, recursive=True)))
            found = {str(file): Path(file.stem) for file in files if file.is_file()}
            if path.suffix.lower() != ".vrt":  # such as "scenes/*": the user has not named mosaics
                _check_mosaics(map(Path, found), _start_of_pattern(path))
        if not found:
            if path.is_dir():
                raise UserFileNotFoundError(
                    f"The folder '{word}' has no scenes; expected files that end in {', '.join(RASTER_SUFFIXES)} and "
                    "are no label maps."
                )
            raise UserFileNotFoundError(
                f"'{word}' matches no file; expected an existing file or folder, a pattern, or an address."
            )
        scenes |= found
    check_decoded(scenes)
    return scenes


def _scenes_of_folder(folder: Path) -> list[Path]:
    """Find the scenes of a folder: no label maps, and no mosaics with parts outside the folder."""
    from .label_maps import why_label_map  # needs rasterio

    scenes = []
    found = find_images(folder, RASTER_SUFFIXES + PICTURE_SUFFIXES + CONTAINER_SUFFIXES, leave_out_labels=True)
    check_decoded(map(str, found))
    _warn_of_other_files(folder, found)
    for path in (path for path in found if path.suffix.lower() in RASTER_SUFFIXES):
        _check_mosaics([path], folder)
        if (reason := why_label_map(path)) is None:
            scenes.append(path)
        else:
            logger.warning(f"'{path}' is left out, because it {reason}. If it is a scene, name the file itself.")
    return scenes


def _warn_of_other_files(folder: Path, paths: list[Path]):
    """Say which files of a folder are no scenes, and how to predict them.

    A picture beside a raster of the same name is not counted: it shows the raster, as a quick-look does.
    """
    rasters = {path.with_suffix("") for path in paths if path.suffix.lower() in RASTER_SUFFIXES}
    reasons = {
        PICTURE_SUFFIXES: f"pictures have no position on Earth. To predict them as images: `images=['{folder}']`.",
        CONTAINER_SUFFIXES: "such a file may contain several rasters. Name one of them, such as NETCDF:file.nc:band.",
    }
    for suffixes, reason in reasons.items():
        left_out = [path for path in paths if path.suffix.lower() in suffixes and path.with_suffix("") not in rasters]
        if left_out:
            listed = ", ".join(sorted({path.suffix.lower() for path in left_out}))
            count = "1 file is" if len(left_out) == 1 else f"{len(left_out)} files are"
            logger.warning(f"{count} left out of '{folder}' ({listed}): {reason}")


def _check_mosaics(paths: Iterable[Path], folder: Path):
    """Check the mosaics among some files of a folder."""
    from .mosaics import check_mosaic  # needs rasterio

    for path in paths:
        if path.suffix.lower() == ".vrt":
            check_mosaic(path, folder)


def _start_of_pattern(pattern: Path) -> Path:
    """Return the folder in which a pattern searches: the part before the first wildcard."""
    parts = list(itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    return Path(*parts)


def plan_maps(words: list[str], output: str | Path) -> dict[str, Path]:
    """Choose the path of the map of every scene.

    Args:
        words: See [`find_scenes`].
        output: Path of the map (.tif) of a single scene, or folder for the maps of all scenes.

    Returns:
        Scene -> path of its map.

    Raises:
        UserFileNotFoundError, UserValueError: As in [`find_scenes`].
        UserValueError: `output` is one file for several scenes, is a file that does not end in .tif, or lies in a
            folder that is searched for scenes.
    """
    output = Path(output)
    is_file = output.suffix.lower() in (".tif", ".tiff")
    if not is_file and (output.is_file() or (output.suffix.lower() in OTHER_SUFFIXES and not output.is_dir())):
        raise UserValueError(
            f"`output` is '{output}'; expected a name that ends in .tif for the map of one scene, such as "
            f"'{output.with_suffix('.tif')}', or a folder. A quick-look (.png) is written beside each map."
        )
    scenes = find_scenes(words)
    if is_file and len(scenes) > 1:
        raise UserValueError(f"`output` is one file, '{output}', for {len(scenes)} scenes; expected a folder.")
    for folder in (Path(word) for word in words if Path(word).is_dir()):
        if output.resolve().is_relative_to(folder.resolve()):
            raise UserValueError(
                f"`output` is '{output}', inside '{folder}': the next run would read the maps as scenes. Choose a "
                "path outside."
            )
    return {scene: output if is_file else output / f"{name}.tif" for scene, name in scenes.items()}


def shared_out(maps: dict[str, Path], num_processes: int) -> list[dict[str, Path]]:
    """Distribute the scenes over the processes: sorted by file size, the largest first, then in turn.

    Args:
        maps: Scene -> path of its map.
        num_processes: Number of processes.

    Returns:
        The part of `maps` of each process.
    """

    def size(scene: str) -> int:
        return Path(scene).stat().st_size if Path(scene).is_file() else 0

    ordered = sorted(maps, key=lambda scene: (-size(scene), scene))
    return [{scene: maps[scene] for scene in ordered[rank::num_processes]} for rank in range(num_processes)]
