"""Log a training run: mean losses, coverage of the pseudo-labels, speed, memory and warnings."""

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..model.modeling_co2s import STUDENTS
from ..utils.errors import UserError, UserOSError, UserValueError
from ..utils.files import write_text
from ..utils.measuring import peak_memory_gb


# Measurements of the machine. The other values of a log line are the same when a run is repeated.
MEASURED = ("seconds", "images_per_second", "peak_memory_gb")

# A class has vanished if its coverage, relative to its share of the labelled pixels, was lower in that many lines.
VANISHED_COVERAGE, VANISHED_LINES = 0.01, 3


class Logbook:
    """Average the losses of several steps, print them, write them to `log.jsonl` and send them to the trackers.

    Args:
        accelerator: Accelerate's state of the run. The means are over all its processes.
        path: The log file, with one JSON object per line.
        id2label: Class names by index, for the values per class.
        labeled_share: Share of the labelled pixels of each class. None: each class has the same share.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        path: Path,
        id2label: dict[int, str],
        labeled_share: Sequence[float] | None = None,
    ):
        self.accelerator, self.path, self.id2label = accelerator, path, id2label
        shares = [1 / len(id2label)] * len(id2label) if labeled_share is None else labeled_share
        self.labeled_share = dict(zip(id2label.values(), map(float, shares)))
        self.entries, self.images, self.started = [], 0, time.perf_counter()

    def add(self, losses: dict[str, torch.Tensor], images: int):
        """Add the losses of one batch. `images` is the number of its images on all processes together."""
        self.entries.append({name: value.detach() for name, value in losses.items()})
        self.images += images

    def start(self):
        """Start the clock of the images per second."""
        self.started = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of an evaluation or of saving a checkpoint from the images per second."""
        start = time.perf_counter()
        yield
        self.started += time.perf_counter() - start

    def write(self, step: int, learning_rates: dict[str, float]):
        """Report the means since the last call. Every process must call this."""
        if not self.entries:  # every step was skipped
            return
        means = self._means()
        # The mean of `without_labels` is a share of batches; report their number instead.
        batches = len(self.entries) * self.accelerator.num_processes
        means["batches_without_labels"] = round(means.pop("without_labels") * batches)
        seconds = time.perf_counter() - self.started
        means |= {
            "seconds": seconds,
            "images_per_second": self.images / seconds,
            "peak_memory_gb": peak_memory_gb(self.accelerator.device),
        }
        self.entries, self.images, self.started = [], 0, time.perf_counter()
        if not self.accelerator.is_main_process:
            return
        tqdm.write(self._summary(step, means))
        # A resumed run replaces the lines that were written after its checkpoint.
        lines = [line for line in read_log(self.path) if line["step"] < step]
        lines.append({"step": step, "learning_rates": learning_rates, **means})
        self._warn_of_vanished_classes(lines)
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        rates = {f"learning_rate/{name}": rate for name, rate in learning_rates.items()}
        self.accelerator.log(flatten(means) | rates, step=step)

    def _means(self) -> dict[str, float | dict[str, float]]:
        names = dict.fromkeys(name for entry in self.entries for name in entry)  # warm-up steps have fewer losses
        means = {
            name: torch.stack([entry[name] for entry in self.entries if name in entry]).float().mean(dim=0)
            for name in names
        }
        means = self.accelerator.reduce(means, reduction="mean")
        for student in STUDENTS:
            right, known = (means.pop(f"{student}/{term}_fraction", None) for term in ("right", "known"))
            if known is not None and known > 0:  # without pixels there is no accuracy
                means[f"{student}/pseudo_label_accuracy"] = right / known
            right, known = (means.pop(f"{student}/{term}_coverage", None) for term in ("right", "known"))
            if known is not None:
                means[f"{student}/accuracy_by_class"] = right / known  # NaN for a class without known pixels
        return {
            name: value.item()
            if value.ndim == 0
            else {self.id2label[index]: share for index, share in enumerate(value.tolist()) if not math.isnan(share)}
            for name, value in means.items()
        }

    @staticmethod
    def _summary(step: int, means: dict) -> str:
        losses = [name for name in means if name == "loss" or name.endswith("/loss")]
        parts = [f"step {step:5d}", *(f"{name} {means[name]:.3f}" for name in losses)]
        for term in ("confident_fraction", "pseudo_label_accuracy"):
            if shares := [f"{100 * means[name]:.0f} %" for name in means if name.endswith(term)]:
                parts.append(f"{term.replace('_fraction', '').replace('_', ' ')} {' / '.join(shares)}")
        if count := means["batches_without_labels"]:
            parts.append(f"{count} batches without a labelled pixel")
        return "  ".join([*parts, f"{means['images_per_second']:.1f} images/s"])

    def _warn_of_vanished_classes(self, lines: list[dict]):
        """Warn when a class has no confident pseudo-labels any more. A training usually collapses in this way."""
        for student in STUDENTS:
            coverage = [line[f"{student}/coverage"] for line in lines if f"{student}/coverage" in line]
            for label, share in self.labeled_share.items():
                if share == 0:
                    continue
                is_low = [values[label] < VANISHED_COVERAGE * share for values in coverage[-VANISHED_LINES - 1 :]]
                # Warn once: the line before these was not low, or there was none.
                if is_low[-VANISHED_LINES:] == [True] * VANISHED_LINES and is_low != [True] * (VANISHED_LINES + 1):
                    tqdm.write(
                        f"Warning: '{label}' has vanished from the {student} student's confident pseudo-labels: they "
                        f"cover {100 * coverage[-1][label]:.2f} % of the pixels at step {lines[-1]['step']}, but "
                        f"{100 * share:.1f} % of the labelled pixels are '{label}'. If it does not return, label more "
                        "of it, use `recipe='balanced'`, lower `confidence_threshold`, or try "
                        "`class_weights='balanced'`."
                    )


def pseudo_label_table(log: list[dict], labeled_share: dict[str, float]) -> str | None:
    """Format the coverage and, if it is known, the accuracy of the pseudo-labels of each class, in per cent.

    Args:
        log: Lines of log.jsonl. The last line with pseudo-labels is shown.
        labeled_share: Class name -> share of the labelled pixels.

    Returns:
        Several lines. None if the log has no pseudo-labels.
    """
    lines = [line for line in log if any(f"{student}/coverage" in line for student in STUDENTS)]
    if not lines:
        return None
    columns = {"labels": labeled_share}
    for student in STUDENTS:
        for term, title in (("coverage", student), ("accuracy_by_class", "right")):
            if (values := lines[-1].get(f"{student}/{term}")) is not None:
                columns[f"{title} ({student})" if title == "right" else title] = values
    width = max(map(len, labeled_share)) + 2
    rows = [" " * width + "".join(f"{title:>16}" for title in columns)]
    for label in labeled_share:
        cells = [f"{100 * values[label]:.1f}" if label in values else "-" for values in columns.values()]
        rows.append(f"{label:{width}}" + "".join(f"{cell:>16}" for cell in cells))
    heading = f"Pseudo-labels at step {lines[-1]['step']}: share of the pixels of each class, in per cent"
    return "\n".join([heading + (", and how many are right" if "right" in rows[0] else ""), *rows])


class DivergenceError(UserError, FloatingPointError):
    """The losses of two steps in a row are not finite."""


class NonFiniteGuard:
    """Skip a step if one of its losses is not finite. Stop the run if a loss of the next step is not finite either."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.last_skipped = accelerator, -2

    def broken_batches(self, losses: list[torch.Tensor], names: list[list[str]], step: int) -> list[bool]:
        """Return for each batch of a step whether its loss is not finite. If one is, the step must be skipped.

        All processes return the same values. A GPU is waited for once, so call this once per step.

        Args:
            losses: Loss of each batch of this process, scalars.
            names: Names of the images in each of these batches.
            step: Number of steps done before.

        Raises:
            DivergenceError: The previous step was skipped, too.
        """
        counts = self.accelerator.reduce((~torch.isfinite(torch.stack(losses).detach())).float(), reduction="sum")
        broken = [count > 0 for count in counts.tolist()]
        if any(broken):
            own = [name for batch, is_broken in zip(names, broken) if is_broken for name in batch]
            problem = f"The loss of step {step + 1} is not finite. Its images: {', '.join(gather_object(own))}."
            if self.last_skipped == step - 1:
                raise DivergenceError(
                    f"{problem} The step before was skipped for the same reason. The checkpoints are unchanged. "
                    "Start again with a lower `learning_rate`, or in float32."
                )
            if self.accelerator.is_main_process:
                tqdm.write(f"Warning: {problem} The step is skipped.", file=sys.stderr)
            self.last_skipped = step
        return broken


def flatten(means: dict[str, float | dict[str, float]]) -> dict[str, float]:
    """Turn {"a": 1, "b": {"c": 2}} into {"a": 1, "b/c": 2}, the form that trackers accept."""
    flat = {}
    for name, value in means.items():
        flat |= {f"{name}/{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def read_log(path: Path) -> list[dict]:
    """Read the lines of a log file. Return an empty list if the file does not exist.

    Raises:
        UserOSError: The file cannot be read.
        UserValueError: A line is damaged.
    """
    if not path.exists():
        return []
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserOSError(f"'{path}' cannot be read: {error}. Remove it.") from error
    lines = []
    for number, text in enumerate(content.splitlines(), start=1):
        try:
            lines.append(json.loads(text))
            _ = lines[-1]["step"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserValueError(f"Line {number} of '{path}' is damaged. Remove this line.") from error
    return lines
