"""Find scenes by file, folder, pattern or address, and choose the paths of their maps."""

import glob
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from ..data.reading import find_images
from ..utils.errors import UserFileNotFoundError, UserValueError


RASTER_SUFFIXES = (".tif", ".tiff", ".vrt", ".jp2", ".img")


def is_address(source: str) -> bool:
    """Return whether a source is a web address or a path of one of GDAL's virtual file systems."""
    return "://" in source or source.startswith("/vsi")


def is_local(source: str) -> bool:
    """Return whether a source is an existing local file."""
    return not is_address(source) and Path(source).exists()


def scene_name(source: str) -> str:
    """Return the file name of a scene. The query of an address is left out, because it may contain a secret."""
    if is_address(source):
        return PurePosixPath(urlsplit(source).path).name
    return Path(source).name


def find_scenes(words: list[str]) -> dict[str, Path]:
    """Find scenes by file, folder, pattern or address.

    Args:
        words: Each is a file, a folder (all rasters in it and in its subfolders), a pattern such as "*.jp2", or an
            address that GDAL opens: https://..., s3://..., /vsizip/..., NETCDF:"file":variable. Addresses are not
            checked here.

    Returns:
        Scene -> path of its map, without a suffix and relative to the folder of all maps.

    Raises:
        UserFileNotFoundError: There is no scene for a word.
        UserValueError: Two scenes would have maps of the same name.
    """
    scenes: dict[str, Path] = {}
    for word in words:
        path = Path(word)
        if is_address(word):
            found = {word: Path(Path(scene_name(word)).stem)}
        elif path.is_dir():
            found = {str(file): file.relative_to(path).with_suffix("") for file in find_images(path, RASTER_SUFFIXES)}
        elif path.exists():
            found = {str(path): Path(path.stem)}
        elif ":" in word:
            found = {word: Path("_".join(Path(part.strip('"')).stem for part in word.split(":")[1:]))}
        else:
            files = (Path(file) for file in sorted(glob.glob(word, recursive=True)))
            found = {str(file): Path(file.stem) for file in files if file.is_file()}
        if not found:
            if path.is_dir():
                raise UserFileNotFoundError(
                    f"The folder '{word}' has no scenes; expected files that end in {', '.join(RASTER_SUFFIXES)}."
                )
            raise UserFileNotFoundError(
                f"'{word}' matches no file; expected an existing file or folder, a pattern, or an address."
            )
        scenes |= found
    names: dict[Path, str] = {}
    for scene, name in scenes.items():
        if names.setdefault(name, scene) != scene:
            raise UserValueError(
                f"'{scene}' and '{names[name]}' would have the same map, {name}.tif. Segment them in separate runs."
            )
    return scenes


def plan_maps(words: list[str], output: str | Path) -> dict[str, Path]:
    """Choose the path of the map of every scene.

    Args:
        words: See [`find_scenes`].
        output: Path of the map (.tif) of a single scene, or folder for the maps of all scenes.

    Returns:
        Scene -> path of its map.

    Raises:
        UserFileNotFoundError, UserValueError: As in [`find_scenes`].
        UserValueError: `output` is one file for several scenes, or lies in a folder that is searched for scenes.
    """
    scenes, output = find_scenes(words), Path(output)
    is_file = output.suffix.lower() in (".tif", ".tiff")
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
