"""The wheel in an empty environment. This test installs packages, so it needs a package index."""

import subprocess
import sys

import pytest
from helpers import EXAMPLES, environment


ROOT = EXAMPLES.parent


def run(*words, **variables) -> str:
    """Run a program without this checkout on its path; return what it printed."""
    clean = {name: value for name, value in environment().items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_trains_predicts_and_pushes(hub, scenes_folder, tmp_path):
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("co2s_hf-*.whl")
    run(sys.executable, "-m", "venv", tmp_path / "env")
    programs = tmp_path / "env" / "bin"
    run(programs / "pip", "install", "-q", "-c", ROOT / "constraints.txt", f"{wheel}[train]")

    output = tmp_path / "run"
    words = ("--data_dir", scenes_folder, "--crop_size", 32, "--per_device_train_batch_size", 2)
    printed = run(programs / "co2s", "train", *words, "--max_train_steps", 2, "--output_dir", output)
    assert "mean IoU" in printed and (output / "model" / "README.md").exists()
    assert "whdld" in run(programs / "co2s", "train", "--help")  # the recipes are in the wheel
    images = sorted((scenes_folder / "images").glob("*.png"))[:2]
    model = ("--checkpoint", output / "model")
    printed = run(programs / "co2s", "predict", *model, "--images", *images, "--output_dir", tmp_path / "out")
    assert "2 of 2 images are in" in printed and len(list((tmp_path / "out" / "labels").glob("*.png"))) == 2
    printed = run(programs / "co2s", "predict", *model, "--crop_size", 256, "--output_dir", tmp_path / "real")
    assert "16 of 16 images are in" in printed  # the real images are in the wheel
    printed = run(programs / "co2s", "push", *model, "--hub_model_id", "user/wheel", "--handler")
    assert "Published" in printed
    repository = hub.repositories["model", "user/wheel"]
    published = set(repository.trees[repository.refs["main"]])
    assert {"README.md", "config.json", "handler.py", "modeling_co2s.py", "model.safetensors"} <= published
