"""Dry runs of the prediction of images."""

import re

import numpy as np
import pytest
from helpers import run_command, save_checkpoint
from PIL import Image

from co2s_hf import Co2SImageProcessor
from co2s_hf.data.reading import ImageRule
from co2s_hf.inference.dry_run import _num_windows, describe_rule


@pytest.fixture
def images(tmp_path):
    """Two images of 48 x 32 and 16 x 16 pixels, and a file that is no image."""
    (tmp_path / "images").mkdir()
    for name, size in (("a", (32, 48)), ("b", (16, 16))):
        pixels = np.random.default_rng(0).integers(256, size=(*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{name}.png")
    return tmp_path / "images"


def test_images_are_read_and_counted_and_nothing_is_written(images, tmp_path):
    save_checkpoint(tmp_path / "model", crop_size=16)
    command = ("predict", "--images", images, "--checkpoint", tmp_path / "model", "--use_cpu")
    command += ("--output_dir", tmp_path / "out")
    tried = run_command(*command, "--dry_run")
    assert tried.returncode == 0, tried.stderr
    # Windows of 16 pixels that share 3: three rows of four, and one.
    start = (
        "2 images to predict (0 are done already): up to 48 x 32 pixels, together 0.0 megapixels, 13 windows of 16 "
    )
    assert tried.stdout.startswith(start) and "read as RGB or grey, 8 bits, no scale" in tried.stdout
    assert re.search(
        r"about 0\.\d s \(from 12 windows\); memory at most \d\.\d GB; disk at most 0\.00 GB", tried.stdout
    )
    assert not (tmp_path / "out").exists()

    assert run_command(*command).returncode == 0
    (tmp_path / "out" / "labels" / "b.png").unlink()
    (images / "c.png").write_bytes(b"no image")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    tried = run_command(*command, "--dry_run")
    assert tried.returncode == 1 and "c.png" in tried.stderr  # as in the real run, which would leave it out
    assert tried.stdout.startswith("1 images to predict (1 are done already): up to 16 x 16 pixels")
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    refused = run_command(*command, "--dry_run", "--flip")
    assert refused.returncode == 1 and "holds other predictions: --flip was False" in refused.stderr


def test_windows_are_counted_after_the_resizing():
    assert _num_windows((48, 32), 16, Co2SImageProcessor()) == 12
    assert _num_windows((48, 32), 16, Co2SImageProcessor(do_resize=True, size={"shortest_edge": 16})) == 2
    assert _num_windows((48, 32), 16, Co2SImageProcessor(do_resize=True, size={"height": 16, "width": 16})) == 1


def test_rules_are_described():
    assert describe_rule(ImageRule()) == "RGB or grey, 8 bits, no scale"
    assert describe_rule(ImageRule((4, 3, 2), ((0, 3000),))) == "bands 4, 3, 2, scale 0 to 3000"
