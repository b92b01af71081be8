"""Write and check the files of a run: checkpoints, the record of its options, and the trained model."""

import json
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import load
from safetensors import safe_open
from safetensors.torch import load_file

from .. import __version__
from ..data.options import DataOptions
from ..data.sources import Source
from ..data.splits import write_lists
from ..model.image_processing_co2s import Co2SImageProcessor
from ..model.loading_co2s import check_finite
from ..model.modeling_co2s import Co2SForSemanticSegmentation
from ..utils.devices import explain_precision
from ..utils.errors import UserFileNotFoundError, UserOSError, UserValueError
from ..utils.files import check_new_folder, clean, flush, flush_folder, remove_results, write_json, written_beside
from ..utils.redaction import redacted
from .evaluation import Evaluation
from .options import TrainingOptions


RECORD = "arguments.json"  # saved models contain the same facts in training.json
UNFINISHED = ".unfinished-"  # a checkpoint that is being written
WEIGHTS = "model.safetensors"
STATES = "states.json"  # in a checkpoint: what Accelerate does not save
CHECKPOINTS_KEPT = 2
# What a run writes into its folder beside the record; `overwrite_output_dir` removes it. TensorBoard writes co2s_hf/.
WRITTEN = ("checkpoints", "model", "best_model", "adapter", "best_adapter", "merged", "splits", "co2s_hf")
WRITTEN += ("log.jsonl", "metrics.json", "metrics_before.json", "predictions.png", "curves.png")
# Options that do not change the trained weights. A resumed run may change them.
MAY_CHANGE = {"resume_from_checkpoint", "overwrite_output_dir", "output_dir", "dataloader_num_workers"}
MAY_CHANGE |= {"eval_steps", "eval_epochs", "report_to", "measure_pseudo_labels"}
LIBRARIES = ("torch", "transformers", "accelerate", "kornia")


class Stateful(Protocol):
    """An object whose state is numbers, text and lists of these, which JSON keeps. For example, a schedule."""

    def state_dict(self) -> dict:
        """Return the state."""

    def load_state_dict(self, state: dict):
        """Restore the state."""


def save_model(
    model: Co2SForSemanticSegmentation,
    image_processor: Co2SImageProcessor,
    folder: str | Path,
    evaluation: Evaluation | None = None,
):
    """Write model and image processor into one folder for `from_pretrained`. The folder appears when it is complete.

    Args:
        model: The model, without Accelerate's wrapper.
        image_processor: Image processor of the model.
        folder: Folder to create or replace.
        evaluation: Results to write as metrics.json. None: write no metrics.json.
    """
    with written_beside(folder) as target:
        model.save_pretrained(target)
        image_processor.save_pretrained(target)
        if evaluation is not None:
            write_json(target / "metrics.json", evaluation.to_dict())


def save_checkpoint(
    accelerator: Accelerator, root: Path, step: int, states: Mapping[str, Stateful], keep: int = CHECKPOINTS_KEPT
):
    """Save weights, optimizer, random states and other states as `root/step-<step>`. Every process must call this.

    The folder appears when every process has written its part and everything is on the disk. Then older checkpoints
    are removed. Later ones are removed, too: they are of a run that was continued from an earlier checkpoint.

    Args:
        accelerator: Accelerate's state of the run.
        root: Folder of all checkpoints of the run.
        step: Number of steps done.
        states: Name -> what else to save, such as the schedule.
        keep: Number of checkpoints to keep, this one included.
    """
    folder = root / f"step-{step:07d}"
    unfinished = root / f"{UNFINISHED}{step:07d}"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(unfinished)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(unfinished / STATES, {name: state.state_dict() for name, state in states.items()})
        flush_folder(unfinished)
        remove_results(root, [folder.name])
        unfinished.rename(folder)
        flush(root)
        found = _checkpoints(root)
        newest = found.index(folder) + 1
        remove_results(root, [other.name for other in (*found[: max(newest - keep, 0)], *found[newest:])])
    accelerator.wait_for_everyone()


def clean_run(output_dir: Path):
    """Clean up what a killed run left in its folder and among its checkpoints."""
    root = output_dir / "checkpoints"
    clean(output_dir)
    clean(root)
    for unfinished in root.glob(f"{UNFINISHED}*"):
        shutil.rmtree(unfinished)


def load_checkpoint(accelerator: Accelerator, folder: Path, states: Mapping[str, Stateful]):
    """Restore what [`save_checkpoint`] saved. Every process must call this.

    A checkpoint of a stranger cannot run code: PyTorch reads its files with `weights_only=True`. Objects that are
    registered with Accelerate would be an exception. So they are passed to this function, and saved as JSON.

    Args:
        accelerator: Accelerate's state of the run, with the prepared model and optimizer.
        folder: The checkpoint.
        states: Name -> what else to restore.

    Raises:
        UserOSError: A file is missing or damaged, or is not of this run.
    """
    random_states = folder / f"random_states_{accelerator.process_index}.pkl"
    try:
        if not all(path.is_file() for path in _readers(folder, random_states)):  # opening a pipe could wait forever
            raise FileNotFoundError("a file is missing")
        saved = json.loads((folder / STATES).read_text(encoding="utf-8"))
        check_finite(load_file(folder / WEIGHTS).items(), f"'{folder / WEIGHTS}'")
        load(random_states)  # Accelerate ignores errors of this file
        accelerator.load_state(folder)
        for name, state in states.items():
            state.load_state_dict(saved[name])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # damaged files cause errors of many types
        problem = _damage(folder, random_states) or f"it does not fit this run: {' '.join(str(error).split()):.500}"
        earlier = [other for other in _checkpoints(folder.parent) if checkpoint_step(other) < checkpoint_step(folder)]
        remedy = (
            f"Remove this folder. The run can then continue from {earlier[-1].name}."
            if earlier
            else "Start again with `overwrite_output_dir=True`."
        )
        raise UserOSError(f"The checkpoint '{folder}' cannot be loaded: {problem}. {remedy}") from error
    accelerator.print(f"Resumed after step {checkpoint_step(folder)} from {folder}.")


def _damage(folder: Path, random_states: Path) -> str | None:
    """Say which file of a checkpoint is missing or cannot be read. None: none of them."""
    for path, read in _readers(folder, random_states).items():
        if not path.is_file():
            return f"'{path.name}' is missing"
        try:
            read(path)
        except Exception:
            return f"'{path.name}' is damaged"
    return None


def _readers(folder: Path, random_states: Path) -> dict[Path, Callable]:
    """Return the files of a checkpoint, each with a function that reads it."""

    def open_weights(path: Path):
        with safe_open(path, "pt"):
            pass

    return {
        folder / WEIGHTS: open_weights,
        folder / "optimizer.bin": load,
        random_states: load,
        folder / STATES: lambda path: json.loads(path.read_text(encoding="utf-8")),
    }


def _checkpoints(root: Path) -> list[Path]:
    """Return all checkpoints of a run, the newest one last."""
    return sorted(filter(_is_checkpoint, root.glob("step-*")), key=checkpoint_step)


def _is_checkpoint(folder: Path) -> bool:
    return folder.is_dir() and re.fullmatch(r"step-\d+", folder.name) is not None


def find_checkpoint(root: Path, name: str | None) -> Path | None:
    """Return the checkpoint to resume from.

    Args:
        root: Folder of all checkpoints of the run.
        name: "last" for the newest checkpoint in `root`, or the path of any checkpoint. None: do not resume.

    Returns:
        Path of the checkpoint. None if `name` is None.

    Raises:
        UserFileNotFoundError: There is no such checkpoint.
    """
    if name is None:
        return None
    if name == "last":
        if checkpoints := _checkpoints(root):
            return checkpoints[-1]
        raise UserFileNotFoundError(
            f"There is no checkpoint in '{root}' to resume from. Start without resuming. If the folder of the run "
            "exists, add `overwrite_output_dir=True`."
        )
    folder = Path(name)
    if not _is_checkpoint(folder):
        raise UserFileNotFoundError(
            f"'{folder}' is not a checkpoint; give 'last' or a folder such as {root / 'step-0000200'}."
        )
    return folder


def checkpoint_step(folder: Path) -> int:
    """Return the number of steps that were done when the checkpoint was saved."""
    return int(folder.name.removeprefix("step-"))


def is_in_run(checkpoint: Path | None, output_dir: Path) -> bool:
    """Return whether a checkpoint belongs to the run in the output folder. That run is then continued in place."""
    return checkpoint is not None and checkpoint.resolve().parent.parent == output_dir.resolve()


def make_record(
    options: TrainingOptions,
    data_options: DataOptions,
    data: Source,
    accelerator: Accelerator,
    command: Sequence[str],
    is_drawn: bool,
) -> dict:
    """Collect everything that is needed to repeat a run, in types that JSON keeps.

    Args:
        options: Options of the run, with all defaults filled in.
        data_options: Options of the data.
        data: The opened data.
        accelerator: Accelerate's state of the run.
        command: Words of the command line after the program's name, such as ["train", "--seed", "1"].
        is_drawn: The images are scenes that this package drew.
    """
    facts = {"name": data_options.data_name, "id": data_options.dataset_id, "partition": data_options.partition}
    facts |= {"is_drawn": is_drawn, "is_real": data_options.is_real}
    facts |= {f"num_{name}": len(lines) for name, lines in data.lists.items()}
    record = {
        "command": list(command),
        "arguments": asdict(data_options) | asdict(options),
        "num_processes": accelerator.num_processes,
        "data": facts,
        "data_hash": data.hash,
        "label_hash": data.label_hash,
        "device": str(accelerator.device),
        "mixed_precision": accelerator.mixed_precision,
        "versions": {
            "co2s_hf": __version__,
            **{name: version(name) for name in LIBRARIES},
            "python": platform.python_version(),
        },
        "git_revision": _git_revision(),
    }
    # Tuples become lists, as in the saved record, with which it is compared.
    return redacted(json.loads(json.dumps(record)))


def check_output_dir(options: TrainingOptions):
    """Refuse an output folder with content, unless an earlier run in it is to be overwritten.

    Raises:
        UserFileExistsError: The folder has content.
    """
    output_dir = Path(options.output_dir)
    if not (options.overwrite_output_dir and (output_dir / RECORD).exists()):
        check_new_folder(
            output_dir,
            "Choose another `output_dir`, continue with `resume_from_checkpoint='last'`, or start again with "
            "`overwrite_output_dir=True`.",
        )


def check_same_run(checkpoint: Path, record: dict) -> dict:
    """Refuse to resume a run with other options, other sets, other label files or another number of processes.

    Args:
        checkpoint: Checkpoint of the earlier run, in its `checkpoints/`.
        record: Record of the present run, see [`make_record`].

    Returns:
        The record of the earlier run.

    Raises:
        UserFileNotFoundError: The checkpoint is not in the folder of a run.
        UserValueError: The runs differ. The message lists the differences.
    """
    output_dir = checkpoint.resolve().parent.parent
    path = output_dir / RECORD
    if not path.exists():
        raise UserFileNotFoundError(
            f"'{path}' does not exist, so '{checkpoint}' is not in the folder of its run. Move the checkpoint back "
            "into the checkpoints/ of that run."
        )
    saved = read_record(path, ("arguments", "num_processes", "data_hash"))
    facts = ["num_processes", "data_hash", *(["label_hash"] if "label_hash" in saved else [])]  # older runs have none
    before, now = ({**r["arguments"], **{name: r[name] for name in facts}} for r in (saved, record))
    differing = [
        f"`{name}` was {before.get(name)}, now {now[name]}"
        for name in now
        if name not in MAY_CHANGE and now[name] != before.get(name)
    ]
    if differing:
        raise UserValueError(
            f"This is not the run in {output_dir}: {'; '.join(differing)}. Resume with the options of that run."
            + explain_precision(before.get("mixed_precision"), now.get("mixed_precision"))
        )
    return saved


def read_record(path: Path, needed: Sequence[str] = ()) -> dict:
    """Read the record of an earlier run, without secrets.

    Args:
        path: The JSON file.
        needed: Names that it must have.

    Raises:
        UserValueError: The record is damaged, or lacks a name.
    """
    remedy = "Restore it, or start again with `overwrite_output_dir=True`."
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserValueError(f"'{path}' is damaged: {error}. {remedy}") from error
    if not isinstance(record, dict):
        raise UserValueError(f"'{path}' is damaged: expected the record of a run. {remedy}")
    if missing := [name for name in needed if name not in record]:
        raise UserValueError(f"'{path}' is not complete: it lacks {', '.join(missing)}. {remedy}")
    return redacted(record)  # earlier versions wrote the secrets, too


def start_output(options: TrainingOptions, data: Source, record: dict):
    """Create the output folder, remove the results of an earlier run, and write the record and the sets.

    The record is replaced, not removed. So a run that is killed in the middle can be overwritten like any other one.
    """
    output_dir = Path(options.output_dir)
    remove_results(output_dir, WRITTEN)
    write_json(output_dir / RECORD, record)
    drawn = {name: record["arguments"][name] for name in ("seed", "labeled_fraction", "validation_fraction")}
    write_lists(output_dir / "splits", data.lists, {"hash": data.hash} | drawn)


def _git_revision() -> str | None:
    """Return the git commit of this package, with "-dirty" if files were changed.

    It is None without git, and if git does not track this file, as in a virtual environment inside another repository.
    """
    tracked = ["git", "ls-files", "--error-unmatch", __file__]
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answers = [
            subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, encoding="utf-8")
            for command in (tracked, describe)
        ]
    except OSError:
        return None
    return None if answers[0].returncode else answers[1].stdout.strip() or None


__all__ = [
    "CHECKPOINTS_KEPT",
    "RECORD",
    "check_output_dir",
    "check_same_run",
    "checkpoint_step",
    "clean_run",
    "find_checkpoint",
    "is_in_run",
    "load_checkpoint",
    "make_record",
    "read_record",
    "save_checkpoint",
    "save_model",
    "start_output",
]
