import json
import pickle
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers import RESUMABLE_RUN, forget_accelerator, run_command
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR

from co2s_hf.training import checkpoints
from co2s_hf.training.checkpoints import (
    check_output_dir,
    checkpoint_step,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from co2s_hf.training.options import TrainingOptions
from co2s_hf.utils.errors import UserOSError


def test_missing_checkpoints_are_named(tmp_path):
    assert find_checkpoint(tmp_path, None) is None
    with pytest.raises(FileNotFoundError, match="There is no checkpoint in"):
        find_checkpoint(tmp_path, "last")
    with pytest.raises(FileNotFoundError, match="is not a checkpoint; give 'last' or a folder such as"):
        find_checkpoint(tmp_path, str(tmp_path))
    for step in (3, 20, 100):
        (tmp_path / f"step-{step:07d}").mkdir()
    (tmp_path / "step-old").mkdir()  # not a checkpoint
    (tmp_path / "step-0000200").touch()
    with pytest.raises(FileNotFoundError, match=r"'.*step-old' is not a checkpoint"):
        find_checkpoint(tmp_path, str(tmp_path / "step-old"))
    assert checkpoint_step(find_checkpoint(tmp_path, "last")) == 100
    assert checkpoint_step(find_checkpoint(tmp_path, str(tmp_path / "step-0000020"))) == 20


def test_only_the_folder_of_a_run_is_overwritten(tmp_path):
    (tmp_path / "model").mkdir()
    options = TrainingOptions(output_dir=str(tmp_path), overwrite_output_dir=True)
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        check_output_dir(options)
    (tmp_path / "arguments.json").write_text("{}")
    check_output_dir(options)
    with pytest.raises(FileExistsError, match=r"`resume_from_checkpoint='last'`"):
        check_output_dir(TrainingOptions(output_dir=str(tmp_path)))


def test_the_revision_is_that_of_a_repository_that_tracks_this_package(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "__file__", str(tmp_path / "checkpoints.py"))
    (tmp_path / "checkpoints.py").touch()
    assert checkpoints._git_revision() is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "of somebody else"], check=True)
    assert checkpoints._git_revision() is None  # as in a virtual environment inside another project
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "with the package"], check=True)
    revision = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert checkpoints._git_revision() == revision
    (tmp_path / "checkpoints.py").write_text("# changed")
    assert checkpoints._git_revision() == f"{revision}-dirty"


class Training:
    """A model with one linear layer, and everything that a checkpoint of it has."""

    def __init__(self, features: int = 3):
        forget_accelerator()
        self.accelerator = Accelerator(cpu=True)
        self.model = torch.nn.Linear(features, 1)
        optimizer = torch.optim.AdamW(self.model.parameters())
        self.states = {"schedule": LambdaLR(optimizer, lambda step: 1 / (1 + step))}
        self.prepared, self.optimizer = self.accelerator.prepare(self.model, optimizer)

    def step(self):
        self.accelerator.backward(self.prepared(torch.ones(1, self.model.in_features)).sum())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.states["schedule"].step()

    def save(self, root: Path, step: int):
        save_checkpoint(self.accelerator, root, step, self.states)

    def load(self, folder: Path):
        load_checkpoint(self.accelerator, folder, self.states)

    @property
    def values(self) -> list[float]:
        """Weights, moments of the optimizer, and the learning rate."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*self.model.parameters(), *moments]
        return [*torch.cat([tensor.detach().flatten() for tensor in tensors]).tolist(), *self.rates]

    @property
    def rates(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]


@pytest.fixture
def saved(tmp_path) -> Path:
    """A folder of checkpoints after steps 1 and 2."""
    training = Training()
    for step in (1, 2):
        training.step()
        training.save(tmp_path / "checkpoints", step)
    return tmp_path / "checkpoints"


def test_a_restored_training_goes_on_alike(saved):
    uninterrupted = Training()
    uninterrupted.load(saved / "step-0000001")
    uninterrupted.step()
    resumed = Training()
    assert resumed.values != uninterrupted.values
    resumed.load(saved / "step-0000002")
    assert resumed.values == uninterrupted.values and resumed.rates == [1e-3 / 3]


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_two_checkpoints_of_one_continuation_are_kept(saved):
    training = Training()
    for step in (3, 5):
        training.save(saved, step)
    assert names(saved) == ["step-0000003", "step-0000005"]
    (saved / "step-0000003" / "old").touch()
    # The run is continued from an earlier checkpoint. It writes over its former continuation.
    training.save(saved, 2)
    assert names(saved) == ["step-0000002"]
    training.save(saved, 3)
    assert names(saved) == ["step-0000002", "step-0000003"] and not (saved / "step-0000003" / "old").exists()


def remove(path: Path):
    path.unlink()


def cut(path: Path):
    path.write_bytes(path.read_bytes()[:-20])


def empty(path: Path):
    path.write_bytes(b"")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "states.json"])
@pytest.mark.parametrize(("damage", "problem"), [(remove, "missing"), (cut, "damaged"), (empty, "damaged")])
def test_damaged_files_are_named_with_a_remedy(name, damage, problem, saved):
    damage(saved / "step-0000002" / name)
    with pytest.raises(UserOSError) as error:
        Training().load(saved / "step-0000002")
    assert str(error.value) == (
        f"The checkpoint '{saved / 'step-0000002'}' cannot be loaded: '{name}' is {problem}. Remove this folder. The "
        "run can then continue from step-0000001."
    )
    shutil.rmtree(saved / "step-0000001")
    with pytest.raises(UserOSError, match=rf"'{name}' is {problem}\. Start again with `overwrite_output_dir=True`\."):
        Training().load(saved / "step-0000002")


def test_states_of_another_model_are_refused(saved):
    with pytest.raises(UserOSError, match=r"it does not fit this run: .*size mismatch for weight"):
        Training(features=4).load(saved / "step-0000001")
    (saved / "step-0000001" / "states.json").write_text("{}")
    with pytest.raises(UserOSError, match=r"it does not fit this run: 'schedule'"):
        Training().load(saved / "step-0000001")


class Hostile:
    """An object that creates a file when it is unpickled without restrictions."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, partial(pickle.dump, protocol=2)], ids=["torch.save", "pickle.dump"])
@pytest.mark.parametrize(
    "name", ["optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "pytorch_model.bin"]
)
def test_a_checkpoint_of_a_stranger_cannot_run_code(save, name, uninterrupted, scenes_folder, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step-0000006"
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    for path in (folder / name, folder / "scheduler.bin", folder / "sampler.bin"):  # no training has the last two
        with path.open("wb") as file:
            save(Hostile(tmp_path / "proof"), file)
    words = ("--data_dir", scenes_folder, "--output_dir", tmp_path / "run", *RESUMABLE_RUN)
    run = run_command("train", *words, "--resume_from_checkpoint", "last")
    assert not (tmp_path / "proof").exists()
    assert run.returncode == 1 and f"error: The checkpoint '{folder}' cannot be loaded: " in run.stderr


def test_damaged_records_and_logs_are_named_with_a_remedy(uninterrupted, scenes_folder, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(uninterrupted, output)
    words = ("--data_dir", scenes_folder, "--output_dir", output, *RESUMABLE_RUN, "--resume_from_checkpoint", "last")

    def error() -> str:
        run = run_command("train", *words)
        assert run.returncode == 1
        return run.stderr.splitlines()[-1]

    log, record = output / "log.jsonl", output / "arguments.json"
    lines = log.read_text().splitlines()
    for torn in (lines[-1][:-10], "[1]", '{"loss": 1.0}', ""):
        log.write_bytes("\n".join([*lines[:2], torn, *lines[2:]]).encode() + b"\xff")
        assert error() == f"error: Line 3 of '{log}' is damaged. Remove this line."
    log.write_text("\n".join(lines))
    facts = json.loads(record.read_text())
    remedy = "Restore it, or start again with --overwrite_output_dir."
    for text, problem in (
        (record.read_text()[:100], "is damaged: "),
        ("[1]", "is damaged: expected the record of a run"),
        (json.dumps({name: facts[name] for name in facts if name != "data_hash"}), "it lacks data_hash"),
    ):
        record.write_text(text)
        message = error()
        assert message.startswith(f"error: '{record}' is") and problem in message and message.endswith(remedy)


def test_weights_of_another_shape_are_refused(uninterrupted, scenes_folder, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    weights = tmp_path / "run" / "checkpoints" / "step-0000006" / "model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    save_file({**tensors, name: torch.zeros(7)}, weights, metadata={"format": "pt"})
    words = ("--data_dir", scenes_folder, "--output_dir", tmp_path / "run", *RESUMABLE_RUN)
    run = run_command("train", *words, "--resume_from_checkpoint", "last")
    assert run.returncode == 1 and f"size mismatch for {name}" in run.stderr
    assert "Remove this folder. The run can then continue from step-0000003." in run.stderr
    shutil.rmtree(weights.parent)
    assert find_checkpoint(weights.parents[1], "last").name == "step-0000003"


def test_a_renewed_signature_of_an_address_is_the_same_run(tmp_path):
    def record(address):
        return {"arguments": {"dataset_name": address}, "num_processes": 1, "data_hash": "abc"}

    checkpoint = tmp_path / "checkpoints" / "step-0000001"
    checkpoint.mkdir(parents=True)
    # Earlier versions wrote the secrets.
    (tmp_path / "arguments.json").write_text(json.dumps(record("https://me:a@host/x?sig=1")), encoding="utf-8")
    hidden = "https://HIDDEN@host/x?HIDDEN"
    assert checkpoints.check_same_run(checkpoint, record(hidden))["arguments"]["dataset_name"] == hidden
    with pytest.raises(ValueError, match=r"`dataset_name` was https://HIDDEN@host/x\?HIDDEN, now https://host/y"):
        checkpoints.check_same_run(checkpoint, record("https://host/y"))


@pytest.mark.parametrize(
    ("before", "now", "remedy"),
    [
        ("bf16", "no", "Resume with `mixed_precision='bf16'` on a GPU, or on a CPU with these instructions."),
        ("no", "bf16", "Resume with `mixed_precision='no'`."),
        ("no", "no", None),
    ],
)
def test_a_run_that_is_resumed_on_another_machine_explains_the_precision(before, now, remedy, tmp_path):
    def record(precision, seed):
        return {"arguments": {"mixed_precision": precision, "seed": seed}, "num_processes": 1, "data_hash": "a"}

    (tmp_path / "arguments.json").write_text(json.dumps(record(before, 1)), encoding="utf-8")
    with pytest.raises(ValueError) as error:
        checkpoints.check_same_run(tmp_path / "checkpoints" / "step-0000001", record(now, 2))
    precision = f"`mixed_precision` was {before}, now {now}; " if remedy else ""
    reason = "A CPU without bfloat16 instructions uses `mixed_precision='no'` also if bf16 is requested."
    assert str(error.value) == (
        f"This is not the run in {tmp_path}: {precision}`seed` was 1, now 2. Resume with the options of that run."
        + (f" {reason} {remedy}" if remedy else "")
    )
