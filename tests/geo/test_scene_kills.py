"""Kill the mapping of a scene at random moments: the resumed map is the uninterrupted one, with all its files."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyogrio
import pytest
import torch
from helpers import PLACE, made_once, make_model, write_raster
from kills import count_operations, kill

from co2s_hf import Co2SImageProcessor
from co2s_hf.geo.scenes import segment_scene


HEIGHT = 60
PHASES = ("start", "prediction", "writing of the files", "renames", "removal of the rows")


def map_scene(source: Path, folder: Path):
    """Map a scene, or continue. The polygons are in another folder than the map."""
    torch.set_num_threads(1)  # as in the killed processes: with several threads, sums may differ in the last bit
    model, polygons = make_model(crop_size=16), folder / "polygons" / "objects.gpkg"
    image_processor = Co2SImageProcessor.from_model_config(model.config)
    options = {"save_confidence": True, "vector": polygons, "overlap_px": 4, "show_progress": False}
    segment_scene(model, image_processor, source, folder / "maps" / "map.tif", resume=True, **options)


@pytest.fixture
def whole(tmp_path_factory) -> tuple[Path, Path, int]:
    """A scene, the folder of its uninterrupted map, and the number of file operations in that folder."""

    def make(folder: Path):
        (folder / "whole").mkdir(parents=True)
        image = np.random.default_rng(0).integers(1, 256, (3, HEIGHT, 40)).astype(np.uint8)
        write_raster(folder / "scene.tif", image, **PLACE)
        total = count_operations(lambda: map_scene(folder / "scene.tif", folder / "whole"), folder / "whole")
        (folder / "total").write_text(str(total))

    folder = made_once(tmp_path_factory, "whole-map", make)
    return folder / "scene.tif", folder / "whole", int((folder / "total").read_text())


def names(folder: Path) -> set[str]:
    """Return everything below a folder, hidden files too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def content(path: Path) -> object:
    """Return the content of a file. A GeoPackage contains the time of the run, so only its rows are read."""
    if path.suffix != ".gpkg":
        return path.read_bytes() if path.is_file() else None
    facts, _, outlines, columns = pyogrio.raw.read(path)
    return facts["crs"], list(outlines), [list(column) for column in columns]


def phase(folder: Path) -> str:
    """Return in which of the [`PHASES`] a run was killed."""
    progress = folder / "maps" / ".map.tif.unfinished" / "progress.json"
    if (folder / "maps" / "map.tif").exists():
        return "removal of the rows"
    if any(path.is_file() for path in folder.glob("*/[mo]*")):
        return "renames"
    rows = json.loads(progress.read_text())["rows_done"] if progress.exists() else 0
    return "writing of the files" if rows == HEIGHT else "prediction" if rows else "start"


def kill_and_compare(whole: tuple[Path, Path, int], folder: Path, at: int, delay: float = 0.0) -> str:
    """Kill the mapping of a scene, let it end, and compare.

    Args:
        whole: The scene and its uninterrupted map.
        folder: New folder for the map.
        at, delay: When to kill; see [`kill`].

    Returns:
        The phase in which it was killed.
    """
    source, expected, _ = whole
    folder.mkdir()
    assert kill(lambda: map_scene(source, folder), folder, at, delay)
    killed_in = phase(folder)
    map_scene(source, folder)
    assert names(folder) == names(expected)  # nothing is missing, and no temporary file is left
    assert [name for name in names(expected) if content(folder / name) != content(expected / name)] == []
    return killed_in


@pytest.mark.parametrize(("share", "expected"), [(0.2, "prediction"), (0.95, "renames")])
def test_a_killed_mapping_continues(share, expected, whole, tmp_path):
    assert kill_and_compare(whole, tmp_path / "out", round(share * whole[2])) == expected


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(whole, tmp_path):
    """30 kills are spread over the whole run, 12 of them inside an operation; 20 come close to its end."""
    total, draw, phases = whole[2], random.Random(17), Counter()
    moments = [(draw.randrange(n * total // 30, (n + 1) * total // 30), draw.uniform(0, 0.04)) for n in range(30)]
    moments = [(at, delay if n % 2 and n < 24 else 0.0) for n, (at, delay) in enumerate(moments)]
    moments += [(total - draw.randrange(1, 50), 0.0) for _ in range(20)]
    for number, (at, delay) in enumerate(moments):
        phases[kill_and_compare(whole, tmp_path / str(number), at, delay)] += 1
    print(dict(phases))
    assert set(phases) == set(PHASES)
