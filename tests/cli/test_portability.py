"""Commands on systems with another encoding, and without the modules that only Unix has."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import environment, run_command, save_checkpoint
from PIL import Image


# As on Windows: no module `resource`, and text that is not UTF-8 unless its encoding is named. Our own modules must
# name it everywhere. psutil, which Accelerate needs, imports `resource` on Linux; on Windows it does not.
AS_ON_WINDOWS = """
import json, sys, warnings
import psutil
sys.modules["resource"] = None
warnings.filterwarnings("error", category=EncodingWarning, module="co2s_hf")
from co2s_hf.cli import main
for words in json.loads(sys.argv[1]):
    main(words)
"""


@pytest.fixture
def data(tmp_path):
    """A folder of five labelled and one unlabelled image; the classes and an image have names with umlauts."""
    rng, folder = np.random.default_rng(0), tmp_path / "data"
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for name in ("a", "b", "c", "d", "e", "fü"):
        Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(folder / f"images/{name}.png")
        if name != "fü":
            Image.fromarray(rng.integers(2, size=(32, 32), dtype=np.uint8)).save(folder / f"labels/{name}.png")
    classes = [{"name": "Gebäude"}, {"name": "Łąka"}]
    (folder / "classes.json").write_text(json.dumps(classes, ensure_ascii=False), encoding="utf-8")
    return folder


def commands(data, output) -> list[list[str]]:
    """Train two steps, and predict the images."""
    train = ["train", "--data_dir", data, "--labeled_fraction", "1/2", "--output_dir", output / "run", "--use_cpu"]
    train += ["--from_scratch", "--recipe", "paper", "--max_train_steps", 2, "--supervised_warmup_steps", 1]
    train += ["--crop_size", 32, "--per_device_train_batch_size", 2, "--card_samples", 0]
    predict = ["predict", "--images", data / "images", "--checkpoint", output / "run" / "model", "--use_cpu"]
    return [list(map(str, words)) for words in (train, [*predict, "--output_dir", output / "pictures"])]


def as_on_windows(data, output, **variables) -> subprocess.CompletedProcess:
    words = [sys.executable, "-X", "warn_default_encoding", "-c", AS_ON_WINDOWS, json.dumps(commands(data, output))]
    variables = environment() | {"PYTHONUTF8": "0", "PYTHONIOENCODING": ""} | variables
    return subprocess.run(words, capture_output=True, env=variables, timeout=300)


def test_names_with_umlauts_need_no_utf8_output(data, tmp_path):
    """The class names are printed by a process whose output is ASCII, and the results are those of this process."""
    ascii_data = tmp_path / "ascii"
    shutil.copytree(data, ascii_data)
    (ascii_data / "images" / "fü.png").rename(ascii_data / "images" / "f.png")
    done = as_on_windows(ascii_data, tmp_path / "there", LC_ALL="C")
    assert done.returncode == 0, done.stderr.decode()
    assert rb"Geb\xe4ude" in done.stdout and rb"\u0141\u0105ka" in done.stdout  # the output is ASCII
    for words in commands(data, tmp_path / "here"):
        here = run_command(*words)
        assert here.returncode == 0, here.stderr
    there, here = tmp_path / "there", tmp_path / "here"
    scores = [json.loads((run / "run/metrics.json").read_text(encoding="utf-8"))["fused"] for run in (there, here)]
    assert scores[0] == scores[1] and list(scores[0]["iou"]) == ["Gebäude", "Łąka"]
    for name in ("a", "b", "f"):
        pictures = there / f"pictures/labels/{name}.png", here / f"pictures/labels/{name.replace('f', 'fü')}.png"
        first, second = (np.asarray(Image.open(path)) for path in pictures)
        assert first.shape == (32, 32) and np.array_equal(first, second)


def test_a_name_that_cannot_be_decoded_is_one_message(data, tmp_path):
    """Such names come from archives in an old encoding."""
    os.rename(os.fsencode(data / "images" / "a.png"), os.fsencode(data / "images") + b"/stra\xdfe.tif")
    model = save_checkpoint(tmp_path / "model", crop_size=32) and tmp_path / "model"
    train, predict = commands(data, tmp_path / "out")
    for words in (train, [*predict, "--checkpoint", model], ["predict", data / "images", "--checkpoint", model]):
        done = run_command(*words)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert r"stra\udcdfe.tif' cannot be decoded as utf-8" in done.stderr and "Rename the file" in done.stderr
