"""Dry runs of scenes: the same checks as a real run, estimates, and no file."""

import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from helpers import PLACE, Pixelwise, run_command, save_checkpoint, write_raster

from co2s_hf import Co2SImageProcessor
from co2s_hf.geo.dry_run import Speed, check_scene
from co2s_hf.geo.scenes import segment_scene
from co2s_hf.utils.errors import UserFileExistsError, UserOSError, UserValueError


IMAGE_PROCESSOR = Co2SImageProcessor()
SPEED = Speed(0.5, "1 batches of 1 windows")


@pytest.fixture
def scene(tmp_path):
    """A raster of 60 x 100 pixels. The left half has no data."""
    image = np.random.default_rng(0).integers(1, 256, (4, 60, 100), dtype=np.uint8)
    image[:, :, :50] = 0
    return write_raster(tmp_path / "scene.tif", image, nodata=0, photometric="minisblack", **PLACE)


def check(scene, destination, **options):
    options = {"bands": (1, 2, 3), "overlap_px": 6} | options
    return check_scene(Pixelwise(), IMAGE_PROCESSOR, scene, destination, **options)


def test_a_scene_is_described_and_nothing_is_written(scene, tmp_path):
    found = check(scene, tmp_path / "deep" / "map.tif", save_probabilities=True)
    assert found.facts == [
        "scene.tif: 100 x 60 pixels (0.0 megapixels) of 0.5 m, bands 1, 2, 3 of 4 (uint8); 60 windows of 16 x 16 "
        "pixels.",
        "8 bits, no scale; nodata value 0",
    ]
    assert found.windows == 60 and found.disk_gb == 2 * 60 * 100 * 5 / 1e9  # labels, confidence, three classes
    assert 0.3 < found.share < 1  # windows at the border of the data contain some
    assert found.speed.batches == "2 batches of 4 windows"
    assert found.seconds == pytest.approx(60 * found.share * found.speed.seconds)
    assert [path.name for path in tmp_path.iterdir()] == ["scene.tif"]


def test_the_time_of_another_scene_is_used(scene, tmp_path, monkeypatch):
    monkeypatch.setattr(Pixelwise, "student_logits", None)  # no window is predicted
    found = check(scene, tmp_path / "map.tif", speed=SPEED, resample_to=1)
    assert found.windows == 15 and found.seconds == pytest.approx(15 * found.share * 0.5)
    assert "read as 50 x 30 pixels (0.0 megapixels) of 1 m" in found.facts[0]


def test_windows_are_those_of_the_real_run(scene, tmp_path):
    model = Pixelwise()
    segment_scene(
        model, IMAGE_PROCESSOR, scene, tmp_path / "map.tif", bands=(1, 2, 3), overlap_px=6, show_progress=False
    )
    found = check(scene, tmp_path / "other.tif")
    assert model.num_windows == pytest.approx(found.windows * found.share, abs=12)
    assert check(scene, tmp_path / "map.tif", resume=True).windows == 0  # this map is complete


def test_an_interrupted_map_needs_the_windows_of_the_other_rows(scene, tmp_path, monkeypatch):
    run = {"bands": (1, 2, 3), "overlap_px": 6, "show_progress": False}
    model, predict = Pixelwise(), Pixelwise.student_logits

    def fails_at_the_end(self, pixel_values, students):
        if self.num_windows > 20:
            raise torch.OutOfMemoryError("full")
        return predict(self, pixel_values, students)

    monkeypatch.setattr(Pixelwise, "student_logits", fails_at_the_end)
    with pytest.raises(torch.OutOfMemoryError):
        segment_scene(model, IMAGE_PROCESSOR, scene, tmp_path / "map.tif", **run)
    monkeypatch.setattr(Pixelwise, "student_logits", predict)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    found = check(scene, tmp_path / "map.tif", resume=True)
    assert 0 < found.windows < 60 and found.windows % 10 == 0  # whole rows of windows
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserFileExistsError, match="has finished rows of an interrupted run"):
        check(scene, tmp_path / "map.tif")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bands": None}, UserValueError, "4 bands"),
        ({"bands": (1, 2, 7)}, UserValueError, "no band 7"),
        ({"overlap_px": 16}, UserValueError, "`overlap_px` is 16"),
        ({"destination": "scene.tif"}, UserValueError, "is the scene itself"),
        ({"destination": "old.tif"}, UserFileExistsError, "old.tif' exists already"),
        ({"destination": "old.tif/map.tif"}, UserOSError, "cannot be created"),
    ],
)
def test_errors_of_the_real_run_are_found(scene, tmp_path, options, error, message):
    (tmp_path / "old.tif").touch()
    destination = tmp_path / options.pop("destination", "map.tif")
    with pytest.raises(error, match=message):
        check(scene, destination, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.tif", "scene.tif"]


def test_a_disk_that_is_too_small_is_found(scene, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**6, 10**6 - 23_999, 23_999)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserOSError, match="this map needs up to"):
        check(scene, tmp_path / "new" / "map.tif")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=24_000))
    assert check(scene, tmp_path / "new" / "map.tif").windows == 60


def test_the_command_tries_scenes_and_images(scene, tmp_path):
    save_checkpoint(tmp_path / "model", crop_size=16)
    model = ("--checkpoint", tmp_path / "model", "--use_cpu")
    (tmp_path / "scenes").mkdir()
    for name in ("a.tif", "b.tif"):
        shutil.copy(scene, tmp_path / "scenes" / name)
    maps = ("predict", tmp_path / "scenes", *model, "--output", tmp_path / "maps", "--bands", "1,2,3")
    tried = run_command(*maps, "--dry_run")
    assert tried.returncode == 0, tried.stderr
    lines = tried.stdout.splitlines()
    assert lines[0].startswith("a.tif: 100 x 60 pixels (0.0 megapixels) of 0.5 m, bands 1, 2, 3 of 4 (uint8); 40 win")
    assert lines[3].startswith("b.tif: 100 x 60 pixels") and "from 2 batches of 4 windows" in lines[5]
    assert "Dry run: 2 scenes can be mapped, 80 windows, about" in lines[6] and "Nothing was written." in lines[6]
    refused = run_command(*maps[:-2], "--dry_run")
    assert refused.returncode == 1 and refused.stderr.count("Left out: ") == 2 and "--bands" in refused.stderr
    assert "Dry run: 0 scenes can be mapped" in refused.stdout and not (tmp_path / "maps").exists()
    done = run_command(*maps)
    assert lines[0] in done.stdout and lines[3] in done.stdout  # a real run says it before it predicts
    again = run_command(*maps, "--dry_run")
    assert again.returncode == 1 and again.stderr.count("exists already") == 2
