"""Write and check the files of a run: checkpoints, the record of its options, and the trained model."""

import json
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from accelerate import Accelerator

from .. import __version__
from ..data.options import DataOptions
from ..data.sources import Source
from ..data.splits import write_lists
from ..model.image_processing_co2s import Co2SImageProcessor
from ..model.modeling_co2s import Co2SForSemanticSegmentation
from ..utils.errors import UserFileNotFoundError, UserValueError
from ..utils.files import check_new_folder, write_json, written_beside
from .evaluation import Evaluation
from .options import TrainingOptions


RECORD = "arguments.json"  # saved models contain the same facts in training.json
CHECKPOINTS_KEPT = 2
# Everything that a run writes into its folder; `overwrite_output_dir` removes it. TensorBoard writes co2s_hf/.
WRITTEN = ("checkpoints", "model", "best_model", "adapter", "best_adapter", "merged", "splits", "co2s_hf")
WRITTEN += (RECORD, "log.jsonl", "metrics.json", "metrics_before.json", "predictions.png", "curves.png")
# Options that do not change the trained weights. A resumed run may change them.
MAY_CHANGE = {"resume_from_checkpoint", "overwrite_output_dir", "output_dir", "dataloader_num_workers"}
MAY_CHANGE |= {"eval_steps", "eval_epochs", "report_to", "measure_pseudo_labels"}
LIBRARIES = ("torch", "transformers", "accelerate", "kornia")


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


def save_checkpoint(accelerator: Accelerator, root: Path, step: int, keep: int = CHECKPOINTS_KEPT):
    """Save weights, optimizer, schedule and random states as `root/step-<step>`. Every process must call this.

    The folder appears when every process has written its part. Then older checkpoints are removed.

    Args:
        accelerator: Accelerate's state of the run.
        root: Folder of all checkpoints of the run.
        step: Number of steps done.
        keep: Number of checkpoints to keep, this one included.
    """
    folder = root / f"step-{step:07d}"
    unfinished = root / f".unfinished-{step:07d}"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)  # from a run that was killed while it wrote
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(unfinished)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        for old in sorted(root.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


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
        if checkpoints := sorted(root.glob("step-*")):
            return checkpoints[-1]
        raise UserFileNotFoundError(f"There is no checkpoint in '{root}' to resume from. Start without resuming.")
    folder = Path(name)
    if not (folder.is_dir() and folder.name.startswith("step-")):
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
        "device": str(accelerator.device),
        "mixed_precision": accelerator.mixed_precision,
        "versions": {
            "co2s_hf": __version__,
            **{name: version(name) for name in LIBRARIES},
            "python": platform.python_version(),
        },
        "git_revision": _git_revision(),
    }
    return json.loads(json.dumps(record))  # tuples become lists, as in the saved record, with which it is compared


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
    """Refuse to resume a run with other options, other sets of images or another number of processes.

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
    saved = json.loads(path.read_text(encoding="utf-8"))
    before, now = ({**r["arguments"], **{n: r[n] for n in ("num_processes", "data_hash")}} for r in (saved, record))
    differing = [
        f"`{name}` was {before.get(name)}, now {now[name]}"
        for name in now
        if name not in MAY_CHANGE and now[name] != before.get(name)
    ]
    if differing:
        raise UserValueError(
            f"This is not the run in {output_dir}: {'; '.join(differing)}. Resume with the options of that run."
        )
    return saved


def start_output(options: TrainingOptions, data: Source, record: dict):
    """Create the output folder, remove the results of an earlier run, and write the record and the sets."""
    output_dir = Path(options.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    for path in (output_dir / name for name in WRITTEN):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
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
            subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
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
    "find_checkpoint",
    "is_in_run",
    "make_record",
    "save_checkpoint",
    "save_model",
    "start_output",
]
