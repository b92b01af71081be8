"""Try a training: a few real steps and one validation image, to estimate the time and the memory of the whole run.

`setup` makes the checks of a run and writes nothing. [`try_steps`] then changes the weights, so the run must not be
continued.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from torch.utils.data import default_collate

from ..data.options import DataOptions
from ..inference.dry_run import describe_rule
from ..utils.measuring import format_duration, peak_memory_gb
from .evaluation import confusion_matrices
from .loop import NUM_SHOWN, training_step
from .optimization import training_size
from .options import TrainingOptions
from .run import Run, draw_scenes, drawn_folder, images_per_step


@contextmanager
def temporary_scenes(options: TrainingOptions, data_options: DataOptions) -> Iterator[None]:
    """Draw the scenes of `data="drawn"` into a temporary folder, unless they exist. `data_options` change in place."""
    data_options.fill()
    if data_options.data != "drawn" or drawn_folder(options).exists():
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        draw_scenes(Path(folder, "scenes"), options.seed)
        data_options.data, data_options.data_dir = None, str(Path(folder, "scenes"))
        yield


def try_steps(run: Run, evaluate_first: bool = False) -> str:
    """Do a few steps of a training and predict one validation image. Every process must call this.

    Args:
        run: Made by [`setup`]. It cannot be trained afterwards.
        evaluate_first: The training also evaluates before the first step.

    Returns:
        Lines for the user: how images are read, batches, steps, parameters, expected time and memory.
    """
    options, accelerator, per_batch = run.options, run.accelerator, run.options.per_device_train_batch_size
    left, warm_up = options.max_train_steps - run.steps_done, max(run.warm_up.steps - run.steps_done, 0)
    bound = "at most " if run.warm_up.end is None else ""
    phases = [(warm_up, f"{bound}{warm_up} with labelled images alone", 0)]
    phases.append((left - warm_up, f"{left - warm_up} with unlabelled images", run.warm_up.steps))
    steps_seconds, parts = 0.0, []
    for steps, text, first in phases:
        if steps:
            seconds = _step_seconds(run, first)
            parts.append(f"{text} ({seconds:.2g} s each)")
            steps_seconds += steps * seconds
    images = len(run.data.validation)
    evaluations = 1 + evaluate_first + (options.max_train_steps - 1) // (options.eval_steps or options.max_train_steps)
    shown = min(NUM_SHOWN, images) / images  # these images are predicted once more, for the figure
    total = steps_seconds + (evaluations + shown) * _evaluation_seconds(run)
    unlabeled = f" and {per_batch} unlabelled" if options.method == "co2s" else ""
    memory = "GPU memory" if accelerator.device.type == "cuda" else "memory"
    lines = [
        f"Images are read as {describe_rule(run.data.labeled.image_rule)}; crops of {options.crop_size} pixels.",
        f"Batches: {per_batch} labelled{unlabeled} images; {options.gradient_accumulation_steps} per step on each of "
        f"{accelerator.num_processes} x {accelerator.device.type}, mixed precision {accelerator.mixed_precision}.",
        training_size(run.model, run.optimizer),
        f"Steps: {'; '.join(parts)}.",
        f"Evaluations: {evaluations}, of {images} images.",
        f"Dry run: about {format_duration(total)}, {format_duration(steps_seconds)} of them for the steps (from one "
        f"step of each kind and one validation image); peak {memory} {peak_memory_gb(accelerator.device):.1f} GB. "
        "Nothing was written.",
    ]
    return "\n".join(lines)


def _step_seconds(run: Run, first_step: int) -> float:
    """Do two steps, the first of which may prepare the device, and return the seconds of the second one."""
    options, images = run.options, images_per_step(run.options, run.accelerator)
    batches, size = options.gradient_accumulation_steps, options.per_device_train_batch_size
    for _ in range(2):
        start = time.perf_counter()
        loading = 0.0
        for number in range(batches):
            began = time.perf_counter()
            place = first_step * images + number * size
            batch = default_collate([run.items[place + index] for index in range(size)])
            loading += time.perf_counter() - began
            batch = send_to_device(batch, run.accelerator.device)
            training_step(run, batch, first_step * batches + number)
        _wait(run)
        seconds = time.perf_counter() - start
    # Worker processes load images while the device computes.
    workers = options.dataloader_num_workers
    return max(seconds - loading, loading / workers) if workers else seconds


def _evaluation_seconds(run: Run) -> float:
    """Predict one validation image, and return the expected seconds for all of them."""
    data, start = run.data, time.perf_counter()
    confusion_matrices(run.model, run.image_processor, data.validation[:1], run.options.crop_size, run.accelerator)
    _wait(run)
    pixels = [facts.size[0] * facts.size[1] for facts in data.scans["validation"].images]
    return (time.perf_counter() - start) * sum(pixels) / pixels[0] / run.accelerator.num_processes


def _wait(run: Run):
    """Wait until the device has done all computations."""
    if run.accelerator.device.type == "cuda":
        torch.cuda.synchronize(run.accelerator.device)


__all__ = ["temporary_scenes", "try_steps"]
