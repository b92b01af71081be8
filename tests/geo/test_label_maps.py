"""Which rasters of a folder are scenes, and which are label maps."""

import logging

import numpy as np
import pytest
from helpers import PLACE, run_command, save_checkpoint, write_raster

from co2s_hf.geo.scene_files import find_scenes


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (3, 20, 24), dtype=np.uint8)


def names_of(folder, caplog) -> list[str]:
    """Return the names of the scenes in a folder. caplog then has the warnings."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "co2s_hf"):
        return [str(name) for name in find_scenes([str(folder)]).values()]


def test_the_maps_of_this_package_are_no_scenes(image, tmp_path, caplog):
    """Also in their own folder: a second run must not map the maps of the first one."""
    save_checkpoint(tmp_path / "model", crop_size=16)
    (tmp_path / "site").mkdir()
    write_raster(tmp_path / "site" / "scene.tif", image, **PLACE)
    words = ("--checkpoint", tmp_path / "model", "--use_cpu", "--save_confidence", "--save_probabilities")
    output = ("--output", tmp_path / "site" / "map.tif")
    assert run_command("predict", tmp_path / "site" / "scene.tif", *words, *output).returncode == 0
    assert names_of(tmp_path / "site", caplog) == ["scene"]
    left_out = [record.getMessage() for record in caplog.records]
    assert [message.split("'")[1] for message in left_out] == [
        str(tmp_path / "site" / f"{name}.tif") for name in ("map", "map_confidence", "map_probabilities")
    ]
    assert all("is a map of this package" in message and "name the file itself" in message for message in left_out)

    assert run_command("predict", tmp_path / "site", *words, "--output", tmp_path / "maps").returncode == 0
    written = sorted(path.name for path in (tmp_path / "maps").glob("*.tif"))
    assert written == ["scene.tif", "scene_confidence.tif", "scene_probabilities.tif"]


def test_label_maps_are_recognized_by_their_values(tmp_path, caplog):
    random = np.random.default_rng(0)
    grey = random.integers(0, 256, (1, 20, 24), dtype=np.uint8)
    arrays = {
        "classes": random.integers(0, 8, (1, 20, 24), dtype=np.uint8),
        "ignored": np.where(grey < 99, 255, grey % 32).astype(np.uint8),
        "mask": np.where(grey < 99, 255, 0).astype(np.uint8),
        "dark": grey // 4,  # 0 to 63, but more values than classes
        "grey": grey,
        "bright": np.full((1, 20, 24), 90, dtype=np.uint8),
        "deep": random.integers(0, 8, (1, 20, 24)).astype(np.uint16),
        "rgb": random.integers(0, 8, (3, 20, 24), dtype=np.uint8),
    }
    for name, values in arrays.items():
        write_raster(tmp_path / f"{name}.tif", values, **PLACE)
    assert names_of(tmp_path, caplog) == ["bright", "dark", "deep", "grey", "rgb"]
    held = (
        ("classes", "8 values from 0 to 7"),
        ("ignored", "33 values from 0 to 255"),
        ("mask", "2 values from 0 to 255"),
    )
    assert [record.getMessage() for record in caplog.records] == [
        f"'{tmp_path}/{name}.tif' is left out, because it looks like a label map: its only band holds {values}. If it "
        "is a scene, name the file itself."
        for name, values in held
    ]
    assert len(find_scenes([str(tmp_path / "classes.tif")])) == 1 and len(find_scenes([str(tmp_path / "*.tif")])) == 8


def test_folders_of_label_maps_beside_images_are_left_out(image, tmp_path, caplog):
    for name in ("images/a", "labels/a", "north/images/b", "north/labels/b", "other/labels/c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_raster(tmp_path / f"{name}.tif", image, **PLACE)
    assert names_of(tmp_path, caplog) == ["images/a", "north/images/b", "other/labels/c"]
    assert [record.getMessage().split("'")[1] for record in caplog.records] == [
        str(tmp_path / "labels"), str(tmp_path / "north" / "labels")
    ]  # fmt: skip
    assert names_of(tmp_path / "labels", caplog) == ["a"] and not caplog.records


def test_rasters_that_cannot_be_read_are_scenes_whose_error_is_reported(tmp_path, caplog):
    (tmp_path / "a.tif").write_bytes(b"II*\0 damaged")
    assert names_of(tmp_path, caplog) == ["a"] and not caplog.records
