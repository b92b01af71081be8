"""The files of a pretraining: the record of its options, its checkpoints, and the log of its losses."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ...utils.devices import explain_precision
from ...utils.errors import UserFileNotFoundError, UserValueError
from ...utils.files import check_new_folder, check_writable, clean, remove_results, write_json, write_text
from ...utils.redaction import redacted
from ..checkpoints import clean_run, find_checkpoint, read_record
from ..logbook import read_log
from .options import PretrainingOptions
from .tiles import Tile


RECORD, LOG, MODEL, FEATURES = "pretraining.json", "log.jsonl", "model", "teacher_features"
# What a pretraining writes into its folder beside the record; `overwrite_output_dir` removes it. The features of a
# teacher stay: their file fits the teacher and the images, or it is not used.
WRITTEN = ("checkpoints", MODEL, LOG, "curves.png")
# Options that do not change the trained weights. A resumed pretraining may change them.
MAY_CHANGE = {"resume", "overwrite_output_dir", "output_dir", "cache_dir", "cache_features", "dataloader_num_workers"}
MAY_CHANGE |= {"logging_steps", "checkpointing_steps"}


def features_folder(options: PretrainingOptions) -> Path:
    """Return the folder of the teacher's cached features."""
    return Path(options.cache_dir or Path(options.output_dir) / FEATURES)


def check_outputs(options: PretrainingOptions, accelerator: Accelerator) -> Path | None:
    """Check the folders that will be written to, and find the checkpoint to resume from.

    Returns:
        The checkpoint. None for a new pretraining.

    Raises:
        UserError: A folder cannot be used, or there is no checkpoint of a pretraining with these options.
    """
    output_dir = Path(options.output_dir)
    if options.teacher is not None and options.cache_features:
        check_writable(features_folder(options), "Choose another `cache_dir`, or `cache_features=False`.")
    if options.resume:
        checkpoint = find_checkpoint(output_dir / "checkpoints", "last")
        _check_same(options, checkpoint, accelerator.num_processes)
        return checkpoint
    if accelerator.is_main_process:
        clean(output_dir)
    may_overwrite = options.overwrite_output_dir and (output_dir / RECORD).exists()
    # An interrupted computation of the teacher's features continues.
    has_only_features = output_dir.is_dir() and [path.name for path in output_dir.iterdir()] == [FEATURES]
    if accelerator.is_main_process and not (may_overwrite or has_only_features):
        check_new_folder(
            output_dir,
            "Choose another `output_dir`, continue with `resume=True`, or start again with "
            "`overwrite_output_dir=True`.",
        )
    return None


def _check_same(options: PretrainingOptions, checkpoint: Path, num_processes: int):
    """Compare the options and the number of processes with those of the pretraining that saved a checkpoint."""
    output_dir = Path(options.output_dir)
    if not (output_dir / RECORD).is_file():
        raise UserFileNotFoundError(
            f"'{output_dir / RECORD}' does not exist, so '{output_dir}' is not the folder of a pretraining. Choose "
            "its folder, or another one without `resume`."
        )
    now = as_record(options)
    before = read_record(output_dir / RECORD, list(now))
    different = [name for name in now if name not in MAY_CHANGE and now[name] != before[name]]
    if different:
        changes = "; ".join(f"`{name}` was {before[name]} and is {now[name]}" for name in different)
        raise UserValueError(
            f"The pretraining in '{output_dir}' had other options: {changes}. Give the same ones."
            + explain_precision(before["mixed_precision"], now["mixed_precision"])
        )
    processes_before = len(list(checkpoint.glob("random_states_*.pkl")))
    if processes_before != num_processes:
        raise UserValueError(
            f"'{checkpoint}' was saved by {processes_before} processes, but this pretraining has {num_processes}. "
            "Continue with as many processes as before."
        )


def as_record(options: PretrainingOptions) -> dict:
    """Return the options in types that JSON keeps, without secrets."""
    return redacted(json.loads(json.dumps(asdict(options))))


def begin(options: PretrainingOptions, tiles: Sequence[Tile], checkpoint: Path | None):
    """Write the record of a new pretraining, and remove earlier results. For a resumed one, compare the images.

    Raises:
        UserValueError: The images are not those of the pretraining that is to be continued, or its log is damaged.
    """
    output_dir = Path(options.output_dir)
    digest = hashlib.blake2b(repr([(tile.digest, tile.box) for tile in tiles]).encode(), digest_size=8).hexdigest()
    if checkpoint is None:
        # The record is replaced, not removed. So a pretraining that is killed here can be overwritten again.
        remove_results(output_dir, WRITTEN)
        write_json(output_dir / RECORD, as_record(options) | {"data_hash": digest})
        return
    if read_record(output_dir / RECORD).get("data_hash", digest) != digest:
        raise UserValueError(
            f"The images are not those of the pretraining in '{output_dir}'. Restore them, or start again with "
            "`overwrite_output_dir=True`."
        )
    clean_run(output_dir)
    read_log(output_dir / LOG)


class LossLog:
    """Average the losses of several steps, print them and append them to `log.jsonl`.

    Args:
        accelerator: Accelerate's state. The means are over all its processes.
        path: The log file, with one JSON object per line.
    """

    def __init__(self, accelerator: Accelerator, path: Path):
        self.accelerator, self.path = accelerator, path
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, losses: dict[str, torch.Tensor]):
        """Add the losses of one step. A step may lack some of them."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
            self.counts[name] = self.counts.get(name, 0) + 1

    def write(self, step: int):
        """Report the means since the last call. Every process must call this.

        Raises:
            UserValueError: The loss is not finite.
        """
        means = self._means()
        if not math.isfinite(means["loss"]):
            raise UserValueError(f"The loss is not finite at step {step}. Lower `learning_rate`.")
        if not self.accelerator.is_main_process:
            return
        tqdm.write(f"step {step:5d}  " + "  ".join(f"{name} {value:.3f}" for name, value in means.items()))
        # A resumed pretraining replaces the lines that were written after its checkpoint.
        lines = [line for line in read_log(self.path) if line["step"] < step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in [*lines, {"step": step, **means}]))

    def _means(self) -> dict[str, float]:
        device = self.accelerator.device
        # Processes may have different names: a batch without texts has no losses of texts.
        names = dict.fromkeys(gather_object(list(self.sums)))
        sums = {name: self.sums.get(name, torch.zeros((), device=device)) for name in names}
        counts = {name: torch.tensor(float(self.counts.get(name, 0)), device=device) for name in names}
        self.sums, self.counts = {}, {}
        sums, counts = (self.accelerator.reduce(values, reduction="sum") for values in (sums, counts))
        return {name: (sums[name] / counts[name]).item() for name in names}


__all__ = ["LOG", "MODEL", "LossLog", "as_record", "begin", "check_outputs", "features_folder"]
