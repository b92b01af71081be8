"""Resume runs of the paper's recipes, whose protocols set options that other runs do not have, and of other labels."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import SMALL_RUN, run_command
from PIL import Image
from safetensors.torch import load_file

from co2s_hf.cli.command_line import RECIPES, recipe_names
from co2s_hf.data.benchmarks import BENCHMARKS
from co2s_hf.training import loop


SIDE = 64
SETS = {"labeled": 4, "unlabeled": 6, "val": 1}  # images in each list; a step of the protocol takes up to 2 of a set


def write_benchmark(folder: Path, dataset: str):
    """Write a small copy of a benchmark with its lists at the top of `splits/`. The label maps have all classes."""
    facts = BENCHMARKS[dataset]
    values = np.arange(len(facts.classes)) + facts.reduce_labels
    rng = np.random.default_rng(0)
    for name in ("images", "labels", "splits"):
        (folder / name).mkdir(parents=True)
    for split, count in SETS.items():
        names = [f"{split}_{n}.png" for n in range(count)]
        lines = "".join(f"images/{name} labels/{name}\n" for name in names)
        (folder / "splits" / f"{split}.txt").write_text(lines, encoding="utf-8")
        for name in names:
            labels = np.resize(rng.permutation(values), (SIDE, SIDE)).astype(np.uint8)
            Image.fromarray(labels).save(folder / "labels" / name)
            Image.fromarray(rng.integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8)).save(folder / "images" / name)


@pytest.fixture
def no_figures(monkeypatch):
    """Write empty files instead of the figures of a run, which take half of the time here."""
    for name in ("draw_curves", "draw_predictions"):
        monkeypatch.setattr(loop, name, lambda *args: args[-1].touch())


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_run_of_a_recipe_continues_bit_by_bit(recipe, backbones, no_figures, tmp_path):
    dataset = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8"))["dataset"]
    write_benchmark(tmp_path / "data", dataset)
    words = [
        "train",
        "--config",
        recipe,
        "--data_dir",
        tmp_path / "data",
        "--splits_dir",
        tmp_path / "data" / "splits",
    ]
    words += ["--clip_model", backbones[0], "--dinov3_model", backbones[1], "--output_dir", tmp_path / "run"]
    words += ["--max_train_steps", 3, "--checkpointing_steps", 2, "--crop_size", 32, "--eval_short_side", 32]
    words += ["--use_cpu", "--card_samples", 0]
    done = run_command(*words)
    assert done.returncode == 0, done.stderr
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")

    (tmp_path / "run" / "model" / "model.safetensors").unlink()
    done = run_command(*words, "--resume_from_checkpoint", "last")
    assert done.returncode == 0, done.stderr
    assert "Resumed after step 2 from" in done.stdout
    resumed = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert resumed.keys() == weights.keys()
    assert all(resumed[name].equal(weights[name]) for name in weights)
    # The third step changed the weights. So they are only equal if the resumed run did the same step.
    start = load_file(tmp_path / "run" / "checkpoints" / "step-0000002" / "model.safetensors")
    shared = [name for name in weights if f"model.{name}" in start]
    assert shared and not all(start[f"model.{name}"].equal(weights[name]) for name in shared)


def test_a_run_does_not_continue_with_other_label_files(scenes_folder, no_figures, tmp_path):
    """The sets of images are the same, but a list names other label files for them."""
    shutil.copytree(scenes_folder, tmp_path / "data")
    shutil.copytree(tmp_path / "data" / "labels", tmp_path / "data" / "corrected")
    words = ("train", "--data_dir", tmp_path / "data", *SMALL_RUN, "--checkpointing_steps", 2, "--use_cpu")
    words += ("--card_samples", 0, "--output_dir", tmp_path / "run")
    assert run_command(*words).returncode == 0
    path = tmp_path / "data" / "splits" / "labeled.txt"
    path.write_text(path.read_text(encoding="utf-8").replace(" labels/", " corrected/"), encoding="utf-8")
    done = run_command(*words, "--resume_from_checkpoint", "last")
    assert done.returncode == 1 and "This is not the run in" in done.stderr and "label_hash" in done.stderr

    # The records of older runs have no hash of the label files. These runs continue.
    record = json.loads((tmp_path / "run" / "arguments.json").read_text(encoding="utf-8"))
    del record["label_hash"]
    (tmp_path / "run" / "arguments.json").write_text(json.dumps(record), encoding="utf-8")
    done = run_command(*words, "--resume_from_checkpoint", "last")
    assert done.returncode == 0 and "Resumed after step 2 from" in done.stdout, done.stderr
