"""Kill pretrainings at random moments: the resumed run is the uninterrupted one, bit for bit."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import forget_accelerator, made_once
from kills import count_operations, kill

from co2s_hf.training.pretraining import loop


# With a teacher, whose features are cached, and with a checkpoint after every second step of 6.
OPTIONS = {"max_train_steps": 6, "checkpointing_steps": 2, "logging_steps": 1}


@pytest.fixture(scope="session")
def run(pretrain) -> Callable[[Path], None]:
    """A function that starts a pretraining in this process, or continues the one in the folder."""

    def start(output: Path):
        forget_accelerator()
        loop.draw_curves = lambda *args: None  # takes longer than the rest
        can_resume = any((output / "checkpoints").glob("step-*"))
        # Otherwise it may have been killed before the first checkpoint.
        overwrites = not can_resume and (output / "pretraining.json").exists()
        pretrain("distillation", output, **OPTIONS, resume=can_resume, overwrite_output_dir=overwrites)

    return start


@pytest.fixture(scope="session")
def whole_run(run, tmp_path_factory) -> tuple[Path, int]:
    """The output of an uninterrupted pretraining, and the number of its file operations."""

    def make(folder: Path):
        folder.mkdir()
        total = count_operations(lambda: run(folder / "run"), folder)
        (folder / "total").write_text(str(total))

    folder = made_once(tmp_path_factory, "whole-pretraining", make)
    return folder / "run", int((folder / "total").read_text())


@pytest.mark.parametrize(("seed", "kills"), [(0, 1), *(pytest.param(n, 3, marks=pytest.mark.slow) for n in (1, 2, 3))])
def test_a_killed_pretraining_is_resumed_bit_for_bit(seed, kills, run, whole_run, tmp_path):
    (expected, total), found, rng = whole_run, tmp_path / "run", random.Random(seed)
    killed = 0
    for number in range(kills):
        at = rng.randrange(total if number == 0 else total // 2)  # a resumed one has fewer operations
        # Without a delay the first kill always comes before the end, wherever it is.
        delay = rng.choice([0, rng.uniform(0, 0.02)]) if number else 0
        killed += kill(lambda: run(found), tmp_path, at, delay)
    print(f"{killed} kills")
    assert killed >= 1 and not kill(lambda: run(found), tmp_path, at=10**9)

    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (found, expected)]
    assert names[0] == names[1] and any(name.endswith(".f16") for name in names[0])
    for name in names[1]:
        path, other = expected / name, found / name
        if path.suffix in (".safetensors", ".f16", ".jsonl") or path.name in ("states.json", "config.json"):
            assert other.read_bytes() == path.read_bytes(), name
        elif path.name == "optimizer.bin":
            states = [torch.load(file, weights_only=True)["state"] for file in (other, path)]
            assert states[0].keys() == states[1].keys()
            for key, state in states[1].items():
                assert all(torch.equal(states[0][key][term], value) for term, value in state.items())
