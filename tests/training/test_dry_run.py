"""Dry runs of trainings: a few steps, estimates, and no file."""

import re

import pytest
from helpers import SMALL_RUN, run_command


def facts(stdout: str) -> dict[str, str]:
    """Return the lines of the estimates by their first word."""
    return {line.split()[0].rstrip(":"): line for line in stdout.splitlines() if line.strip()}


def test_a_training_is_tried_and_nothing_is_written(scenes_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("--data_dir", scenes_folder, *SMALL_RUN, "--use_cpu", "--output_dir", "run")
    more = ("--gradient_accumulation_steps", 2, "--eval_steps", 1)
    tried = run_command("train", *words, *more, "--dry_run")
    assert tried.returncode == 0, tried.stderr
    assert not list(tmp_path.iterdir())
    found = facts(tried.stdout)
    assert found["images"].split() == ["images", "3", "5", "2"]
    assert found["Images"] == "Images are read as RGB or grey, 8 bits, no scale; crops of 32 pixels."
    assert found["Batches"].startswith("Batches: 2 labelled and 2 unlabelled images; 2 per step on each of 1 x cpu")
    assert re.fullmatch(r"Trained (1\.\d\d) M of \1 M parameters; optimiser state 13\.\d MB\.", found["Trained"])
    pattern = r"Steps: 2 with labelled images alone \(.* s each\); 2 with unlabelled images \(.* s each\)\."
    assert re.fullmatch(pattern, found["Steps"])
    assert found["Evaluations"] == "Evaluations: 4, of 2 images."
    assert re.search(r"about [\d.]+ s, [\d.]+ s of them .*; peak memory \d\.\d GB\. Nothing", found["Dry"])


def test_a_supervised_training_has_steps_of_one_kind(scenes_folder, tmp_path):
    words = ("--data_dir", scenes_folder, "--from_scratch", "--max_train_steps", 3, "--crop_size", 32, "--use_cpu")
    words += ("--method", "supervised", "--per_device_train_batch_size", 1, "--output_dir", tmp_path / "run")
    found = facts(run_command("train", *words, "--dry_run").stdout)
    assert re.fullmatch(r"Steps: 3 with labelled images alone \(.* s each\)\.", found["Steps"])
    assert found["Batches"].startswith("Batches: 1 labelled images; 1 per step")


def test_errors_of_the_real_run_are_found(scenes_folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").touch()
    words = ("train", "--data_dir", scenes_folder, *SMALL_RUN, "--use_cpu", "--dry_run")
    refused = run_command(*words, "--output_dir", tmp_path / "run")
    assert refused.returncode == 1 and "already exists and is not an empty folder" in refused.stderr
    refused = run_command(*words, "--output_dir", tmp_path / "new", "--class_weights", "1", "2")
    assert refused.returncode == 1 and "2 weights for 6 classes" in refused.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "mine.txt"]


def test_an_adaptation_is_tried(scenes_folder, base_folder, tmp_path):
    words = ("--checkpoint", base_folder, "--data_dir", scenes_folder, "--max_train_steps", 3, "--use_cpu")
    words += ("--class_names", *"abcdef", "--per_device_train_batch_size", 2, "--output_dir", tmp_path / "run")
    tried = run_command("finetune", *words, "--dry_run")
    assert tried.returncode == 0, tried.stderr
    found = facts(tried.stdout)
    assert found["Evaluations"] == "Evaluations: 2, of 2 images."  # also before the first step
    assert re.search(r"Steps: 3 with labelled images alone", found["Steps"])
    trained, total = re.match(r"Trained (\S+) M of (\S+) M", found["Trained"]).groups()
    assert float(trained) < float(total)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_drawn_scenes_are_temporary(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tried = run_command("train", "--data", "drawn", "--max_train_steps", 4, "--from_scratch", "--use_cpu", "--dry_run")
    assert tried.returncode == 0, tried.stderr
    assert facts(tried.stdout)["images"].split() == ["images", "8", "120", "24"]
    assert not list(tmp_path.iterdir())
