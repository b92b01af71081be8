"""Kill trainings at random moments: the resumed run is the uninterrupted one, bit for bit."""

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import forget_accelerator, made_once
from kills import count_operations, kill

from co2s_hf.data.options import DataOptions
from co2s_hf.training import loop
from co2s_hf.training.checkpoints import save_checkpoint
from co2s_hf.training.logbook import MEASURED, read_log
from co2s_hf.training.options import TrainingOptions


# Checkpoints and evaluations after every second step of 6, so that many kills come while files are written.
OPTIONS = {"max_train_steps": 6, "checkpointing_steps": 2, "eval_steps": 2, "logging_steps": 1, "seed": 5}
OPTIONS |= {"crop_size": 32, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
OPTIONS |= {"supervised_warmup_steps": 2, "from_scratch": True}
KILLS = 4  # of one training


def train(data: Path, output: Path, recipe: str):
    """Start a training in this process, or continue the one in the folder."""
    forget_accelerator()
    # Drawing takes longer than the training.
    loop.draw_curves = loop.draw_predictions = lambda *args: None
    options = TrainingOptions(**OPTIONS, recipe=recipe, output_dir=str(output))
    if any((output / "checkpoints").glob("step-*")):
        options.resume_from_checkpoint = "last"
    elif (output / "arguments.json").exists():  # killed before the first checkpoint
        options.overwrite_output_dir = True
    loop.train(loop.setup(options, DataOptions(data_dir=str(data))))


@pytest.fixture(scope="session")
def whole_run(scenes_folder, tmp_path_factory) -> Callable[[str], tuple[Path, int]]:
    """A function that makes an uninterrupted training. It returns its output and the number of its file operations."""

    def run(recipe: str) -> tuple[Path, int]:
        def make(folder: Path):
            folder.mkdir()
            total = count_operations(lambda: train(scenes_folder, folder / "run", recipe), folder)
            (folder / "total").write_text(str(total))

        folder = made_once(tmp_path_factory, f"whole-run-{recipe}", make)
        return folder / "run", int((folder / "total").read_text())

    return run


def assert_same(found: Path, expected: Path):
    """Compare everything that a training leaves, but not times, paths and commands."""
    names = [{str(path.relative_to(run)) for path in run.rglob("*")} for run in (found, expected)]
    assert names[0] == names[1]  # nothing is missing, and no temporary file is left
    for folder in ("model", "best_model"):
        for name in ("model.safetensors", "config.json", "metrics.json", "preprocessor_config.json"):
            assert (found / folder / name).read_bytes() == (expected / folder / name).read_bytes(), (folder, name)
    for name in ("metrics.json", "splits/labeled.txt", "splits/splits.json"):
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    logs = [
        [{name: line[name] for name in line if name not in MEASURED} for line in read_log(run / "log.jsonl")]
        for run in (found, expected)
    ]
    assert logs[0] == logs[1]
    for checkpoint in sorted((expected / "checkpoints").iterdir()):
        other = found / "checkpoints" / checkpoint.name
        for name in ("model.safetensors", "states.json"):
            assert (other / name).read_bytes() == (checkpoint / name).read_bytes(), (checkpoint.name, name)
        states = [torch.load(folder / "optimizer.bin", weights_only=True)["state"] for folder in (other, checkpoint)]
        assert states[0].keys() == states[1].keys() and len(states[0]) > 50
        for number, state in states[1].items():
            assert all(torch.equal(states[0][number][name], value) for name, value in state.items())


def kill_and_compare(seed: int, kills: int, data: Path, folder: Path, recipe: str, expected: Path, total: int) -> int:
    """Kill a training several times at random moments, let it end, and compare. Return the number of kills.

    Args:
        seed: Seed of the moments.
        kills: Number of processes to kill.
        data: Folder of the data.
        folder: Empty folder.
        recipe: Recipe of the training.
        expected: Output of the uninterrupted training.
        total: Number of its file operations.
    """
    rng, done = random.Random(seed), 0

    def run():
        train(data, folder / "run", recipe)

    for number in range(kills):
        at = rng.randrange(total if number == 0 else total // 2)  # a resumed training has fewer operations
        done += kill(run, folder, at, delay=rng.choice([0, rng.uniform(0, 0.02)]))
    assert not kill(run, folder, at=10**9)
    assert_same(folder / "run", expected)
    return done


def test_a_killed_training_is_resumed_bit_for_bit(scenes_folder, whole_run, tmp_path):
    assert kill_and_compare(0, 1, scenes_folder, tmp_path, "paper", *whole_run("paper")) == 1


def test_kills_immediately_after_a_checkpoint_lose_no_evaluation(scenes_folder, whole_run, tmp_path):
    def save_and_die(*args):
        save_checkpoint(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    def run_to_the_next_checkpoint():
        loop.save_checkpoint = save_and_die
        train(scenes_folder, tmp_path / "run", "paper")

    was_killed = [kill(run_to_the_next_checkpoint, tmp_path, at=10**9) for _ in range(3)]
    assert was_killed == [True, True, False]
    assert_same(tmp_path / "run", whole_run("paper")[0])


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "seed"), [*(("paper", n) for n in range(1, 7)), ("balanced", 7), ("balanced", 8)])
def test_a_training_that_is_killed_often_is_resumed_bit_for_bit(recipe, seed, scenes_folder, whole_run, tmp_path):
    killed = kill_and_compare(seed, KILLS, scenes_folder, tmp_path, recipe, *whole_run(recipe))
    print(f"{killed} kills")
    assert killed >= KILLS // 2  # the others came after the end
