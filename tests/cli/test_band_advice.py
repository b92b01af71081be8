"""The advice of an error about bands can be followed as it stands: the command then succeeds."""

import re
import shlex

import numpy as np
import pytest
import rasterio
from helpers import run_command, save_checkpoint
from unusual_rasters import RASTERS, make


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model with random weights for windows of 32 px."""
    folder = tmp_path_factory.mktemp("advice") / "model"
    save_checkpoint(folder, crop_size=32)
    return folder


def advised_flags(message: str) -> list[list[str]]:
    """Return the flags of each piece of advice in a message: [["--bands", "4,3,2", "--scale", "0", "3000"]]."""
    pieces = re.findall(r"\b[Uu]se (--.*?)\.(?=\s|$)", message)
    return [shlex.split(piece.replace(" and ", " ")) for piece in pieces]


@pytest.mark.parametrize("name", [name for name, (_, problem, _) in RASTERS.items() if problem])
def test_a_scene_is_predicted_with_the_advised_flags(name, checkpoint, tmp_path):
    arguments, problem, advice = RASTERS[name]
    scene = make(tmp_path / "scene.tif", **arguments)
    words = ("predict", scene, "--checkpoint", checkpoint, "--output")
    failed = run_command(*words, tmp_path / "no.tif")
    assert failed.returncode == 1
    (line,) = [line for line in failed.stderr.splitlines() if line.startswith("Left out: ")]
    expected = re.sub(r"`bands=\((\d), (\d), (\d)\)`", r"--bands \1,\2,\3", advice).replace(
        "SCALE", "--scale percentiles"
    )
    expected = re.sub(r"`bands='(.*?)'`", r"--bands \1", expected)
    assert line == f"Left out: {scene} has {problem} {expected}"
    pieces = advised_flags(line)
    assert len(pieces) == (2 if name == "four bands" else 1)
    for number, flags in enumerate(pieces):
        done = run_command(*words, tmp_path / f"map{number}.tif", *flags)
        assert done.returncode == 0, done.stderr
        with rasterio.open(tmp_path / f"map{number}.tif") as raster:
            assert (raster.read(1) < 3).all()  # every pixel has a class


@pytest.mark.parametrize("name", [name for name, (_, problem, _) in RASTERS.items() if problem])
def test_an_image_is_predicted_with_the_advised_flags(name, checkpoint, tmp_path):
    image = make(tmp_path / "image.tif", **RASTERS[name][0])
    words = ("predict", "--images", image, "--checkpoint", checkpoint, "--output_dir")
    failed = run_command(*words, tmp_path / "no")
    assert failed.returncode == 1
    (line,) = [line for line in failed.stderr.splitlines() if line.startswith("Left out: ")]
    pieces = advised_flags(line)
    assert len(pieces) == (2 if name == "four bands" else 1)
    for number, flags in enumerate(pieces):
        done = run_command(*words, tmp_path / f"out{number}", *flags)
        assert done.returncode == 0, done.stderr
        assert [path.name for path in (tmp_path / f"out{number}" / "labels").iterdir()] == ["image.png"]


def test_the_advice_for_a_model_with_its_own_bands_can_be_followed(tmp_path):
    save_checkpoint(tmp_path / "model", crop_size=32, image_bands=[4, 3, 2], image_scale=[[0, 3000]])
    scene = make(tmp_path / "scene.tif", 3, "uint16")
    for words in (("predict", scene, "--output"), ("predict", "--images", scene, "--output_dir")):
        words = (*words[:-1], "--checkpoint", tmp_path / "model", words[-1])
        failed = run_command(*words, tmp_path / "no.tif")
        (flags,) = advised_flags(failed.stderr.strip().splitlines()[-1])
        assert failed.returncode == 1 and flags == ["--bands", "1,2,3", "--scale", "0", "3000"]
        done = run_command(*words, tmp_path / f"done{len(words)}.tif", *flags)
        assert done.returncode == 0, done.stderr


def test_a_preset_chooses_the_bands_and_the_scale_of_a_scene(checkpoint, tmp_path):
    scene = make(tmp_path / "scene.tif", 12, "uint16")
    tags = []
    for name, flags in (
        ("preset", ("--bands", "sentinel-2")),
        ("numbers", ("--bands", "4,3,2", "--scale", 0, 3000)),
        ("shifted", ("--bands", "sentinel-2", "--scale", 1000, 4000)),
    ):
        done = run_command("predict", scene, "--checkpoint", checkpoint, "--output", tmp_path / f"{name}.tif", *flags)
        assert done.returncode == 0, done.stderr
        with rasterio.open(tmp_path / f"{name}.tif") as raster:
            tags.append((raster.tags()["CO2S_BANDS"], raster.tags()["CO2S_SCALE"].replace(".0", ""), raster.read(1)))
    assert tags[0][:2] == tags[1][:2] == ("[4, 3, 2]", "[[0, 3000]]") and np.array_equal(tags[0][2], tags[1][2])
    assert tags[2][:2] == ("[4, 3, 2]", "[[1000, 4000]]")
