"""Which scenes are meant by words of a command line, and where their maps go."""

import glob
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from .reading import find_images


RASTER_SUFFIXES = (".tif", ".tiff", ".vrt", ".jp2", ".img")


def is_address(source: str) -> bool:
    """Whether it is on the web, or in one of GDAL's other file systems."""
    return "://" in source or source.startswith("/vsi")


def scene_name(source: str) -> str:
    """What to call a scene: the name of its file, without what an address may ask for, which can be a secret."""
    if is_address(source):
        return PurePosixPath(urlsplit(source).path).name
    return Path(source).name


def find_scenes(words: list[str]) -> dict[str, Path]:
    """The scenes that files, folders, patterns and addresses name.

    Args:
        words: Folders are searched for rasters, however deep. What is no file, and no pattern of files, is left to
            GDAL where it looks like one of its addresses: https://..., s3://..., /vsizip/..., NETCDF:"file":variable.

    Returns:
        For every scene what its map is called, without a suffix, relative to the folder of all maps.

    Raises:
        FileNotFoundError: A word names nothing.
        ValueError: Two scenes would have maps of the same name.
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
            kinds = ", ".join(RASTER_SUFFIXES)
            remedy = f"no file ends in {kinds}" if path.is_dir() else "there is no such file"
            raise FileNotFoundError(f"'{word}' holds no scene: {remedy}.")
        scenes |= found
    names: dict[Path, str] = {}
    for scene, name in scenes.items():
        if names.setdefault(name, scene) != scene:
            raise ValueError(f"'{scene}' and '{names[name]}' would both become {name}.tif. Segment them apart.")
    return scenes


def plan_maps(words: list[str], output: str | Path) -> dict[str, Path]:
    """Where the map of every scene goes: to `output` itself where it ends in .tif, else below that folder.

    Raises:
        FileNotFoundError, ValueError: As [`find_scenes`], or one map's name is given for several scenes, or the next
            run would take the maps for scenes.
    """
    scenes, output = find_scenes(words), Path(output)
    is_file = output.suffix.lower() in (".tif", ".tiff")
    if is_file and len(scenes) > 1:
        raise ValueError(f"--output '{output}' is one file for {len(scenes)} scenes; name a folder.")
    for folder in (Path(word) for word in words if Path(word).is_dir()):
        if output.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"--output '{output}' lies inside '{folder}': the next run would take maps for scenes.")
    return {scene: output if is_file else output / f"{name}.tif" for scene, name in scenes.items()}


def shared_out(maps: dict[str, Path], num_processes: int) -> list[dict[str, Path]]:
    """Every process's share of the scenes: the largest files first, dealt out in turn."""

    def size(scene: str) -> int:
        return Path(scene).stat().st_size if Path(scene).is_file() else 0

    ordered = sorted(maps, key=lambda scene: (-size(scene), scene))
    return [{scene: maps[scene] for scene in ordered[rank::num_processes]} for rank in range(num_processes)]
