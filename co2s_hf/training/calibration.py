"""Calibrate the students: temperatures that make a confidence of 80 % right in 80 % of the pixels.

Temperature scaling (Guo et al. 2017, arXiv 1706.04599): the class probabilities are softmax(logits / T), with one T
per student. T > 1 makes a student less confident. T does not change the class that a student predicts, but it decides
which student wins the fusion, and which student teaches the other one. Validation images are never used here.

- [`fit_temperature`]: T from labels. [`agreement_temperature`]: T from the other student's predictions.
- [`calibrate`]: collect the logits of random views at the end of a training, and store T in the configuration.
- [`RunningCalibration`]: follow T and the scores of the students during a training.
"""

import math
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn
from torch.utils.data import DataLoader, Subset

from ..data.options import IGNORE
from ..data.samples import PairedViews
from ..data.sources import Source
from ..data.views import normalize
from ..model.modeling_co2s import STUDENTS, Co2SForSemanticSegmentation
from .options import TrainingOptions


CALIBRATION_METHODS = ("labels", "agreement")
TEMPERATURE_RANGE = (1 / 4, 8.0)
NUM_BISECTIONS = 30  # the logarithm of T is then exact to 4e-9
NUM_VIEWS = 64  # views to calibrate on
PIXELS_PER_SIDE = 64  # of a view, evenly spaced: neighbouring pixels say the same
FIRST_VIEW = 10**9  # number of the first view to calibrate on; no training gets so far
NUM_BINS = 15

RUNNING_PIXELS_PER_SIDE = 16
RUNNING_RATE = 0.05  # step size on log T
RUNNING_MAX_STEP = 0.1  # largest change of log T in one step
RUNNING_DECAY = 0.99  # of the averages; they remember about 100 steps
LEAST_IOU, LEAST_COVERAGE = 0.8, 0.5  # share of the other student's value that a student needs to teach


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = 255) -> float:
    """Find the temperature with the lowest negative log-likelihood of the labels.

    The likelihood is concave in 1 / T, so there is one best T. There, the mean logit that the probabilities expect is
    the mean logit of the true class.

    Args:
        logits: (pixels, classes).
        labels: (pixels,), class indices or `ignore_index`.
        ignore_index: Label of pixels to leave out.

    Returns:
        The temperature, in [`TEMPERATURE_RANGE`]. 1 if all pixels are ignored.
    """
    kept = labels != ignore_index
    logits, labels = logits[kept].double(), labels[kept].long()
    if len(labels) == 0:
        return 1.0
    of_labels = logits.gather(1, labels[:, None]).mean()
    return _solve(lambda temperature: ((logits / temperature).softmax(1) * logits).sum(1).mean() - of_labels)


def agreement_temperature(logits: torch.Tensor, other_logits: torch.Tensor) -> float:
    """Find the temperature at which the mean confidence of a student is the rate at which the other student agrees.

    This needs no labels. If both students make the same mistakes, the temperature is too low.

    Args:
        logits: (pixels, classes), of the student to calibrate.
        other_logits: The same for the other student.

    Returns:
        The temperature of the first student, in [`TEMPERATURE_RANGE`]. 1 without pixels.
    """
    if len(logits) == 0:
        return 1.0
    agreement = (logits.argmax(1) == other_logits.argmax(1)).double().mean()
    logits = logits.double()
    return _solve(lambda temperature: (logits / temperature).softmax(1).amax(1).mean() - agreement)


def _solve(excess: Callable[[float], torch.Tensor]) -> float:
    """Find the temperature at which a decreasing function is zero, by bisection of log T."""
    low, high = map(math.log, TEMPERATURE_RANGE)
    for _ in range(NUM_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(math.exp(middle)) > 0 else (low, middle)
    return math.exp((low + high) / 2)


def expected_calibration_error(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0, ignore_index: int = 255
) -> float:
    """Compute the expected calibration error (ECE) with 15 bins of equal width (Guo et al. 2017, equation 3).

    Args:
        logits: (pixels, classes).
        labels: (pixels,), class indices or `ignore_index`.
        temperature: Divides the logits.
        ignore_index: Label of pixels to leave out.

    Returns:
        Mean absolute difference of confidence and accuracy over the bins, weighted by their pixels, 0 to 1. NaN if all
        pixels are ignored.
    """
    kept = labels != ignore_index
    confidence, predicted = (logits[kept].double() / temperature).softmax(1).max(1)
    difference = confidence - (predicted == labels[kept]).double()
    bins = (confidence * NUM_BINS).ceil().long().clamp(1, NUM_BINS) - 1  # a bin contains its upper end
    sums = torch.zeros(NUM_BINS, dtype=torch.double, device=logits.device).index_add_(0, bins, difference)
    return (sums.abs().sum() / kept.sum()).item()


def calibrate(
    model: Co2SForSemanticSegmentation,
    data: Source,
    options: TrainingOptions,
    accelerator: Accelerator,
    method: str = "labels",
) -> dict[str, float]:
    """Fit a temperature for each trained student, and store it in the configuration. Every process must call this.

    Args:
        model: The trained model, without Accelerate's wrapper. It is in evaluation mode during the call.
        data: The opened data.
        options: Options of the training, with all defaults filled in.
        accelerator: Accelerate's state.
        method: "labels": [`fit_temperature`] on new weak views of the labelled images. The training used the same
            images in other views, so the temperatures are rather too low. "agreement": [`agreement_temperature`] on
            weak views of the unlabelled images. It needs two students.

    Returns:
        Name of each trained student -> temperature.

    Raises:
        ValueError: `method` has another value, or "agreement" has only one student.
    """
    students = tuple(options.students.split(","))
    if method not in CALIBRATION_METHODS:
        raise ValueError(f"`method` is '{method}'; choose one of {', '.join(CALIBRATION_METHODS)}.")
    if method == "agreement" and len(students) < 2:
        raise ValueError("`method='agreement'` needs two students. Use `method='labels'`.")
    logits, labels = sample_logits(model, data, options, accelerator, from_labeled=method == "labels")
    if method == "labels":
        temperatures = [fit_temperature(logits[name], labels) for name in students]
    else:
        temperatures = [
            agreement_temperature(logits[name], logits[other]) for name, other in (students, students[::-1])
        ]
    # On a GPU, the same sums may differ in their last digits between processes.
    temperatures = broadcast(torch.tensor(temperatures, device=accelerator.device)).tolist()
    found = {name: round(temperature, 4) for name, temperature in zip(students, temperatures)}
    for name, temperature in found.items():
        setattr(model.config, f"{name}_temperature", temperature)
    return found


@torch.no_grad()
def sample_logits(
    model: Co2SForSemanticSegmentation,
    data: Source,
    options: TrainingOptions,
    accelerator: Accelerator,
    from_labeled: bool = True,
    num_views: int = NUM_VIEWS,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Predict random weak views, and return evenly spaced pixels of them. The views are not those of the training.

    Args:
        model: The trained model. It is in evaluation mode during the call.
        data: The opened data.
        options: Options of the training: students, crop, batch and base size, seed.
        accelerator: Accelerate's state.
        from_labeled: Take views of the labelled images. False: of the unlabelled images.
        num_views: Number of views.

    Returns:
        Name of each trained student -> logits (pixels, classes), float32, not divided by a temperature; and the labels
        (pixels,), without ignored pixels. Of unlabelled images: the pixels with data, and None.
    """
    students, config = tuple(options.students.split(",")), model.config
    length = FIRST_VIEW + num_views
    items = PairedViews(
        data.labeled,
        data.unlabeled,
        options.crop_size,
        length=length,
        num_labeled_only=length if from_labeled else FIRST_VIEW,
        seed=options.seed,
        base_size=options.base_size,
    )
    loader = DataLoader(Subset(items, range(FIRST_VIEW, length)), batch_size=options.per_device_train_batch_size)
    was_training = model.training
    model.eval()
    logits, labels = {name: [] for name in students}, []
    for batch in loader:
        images = batch["labeled" if from_labeled else "weak"].to(accelerator.device).float() / 255
        with accelerator.autocast():
            found = model.student_logits(normalize(images, config.image_mean, config.image_std), students)
        if from_labeled:
            targets = _evenly_spaced(batch["labels"].to(accelerator.device).long(), PIXELS_PER_SIDE)
            kept = targets != IGNORE
            labels.append(targets[kept])
        else:
            kept = ~_evenly_spaced(batch["padding"].to(accelerator.device), PIXELS_PER_SIDE)
        for name in students:
            logits[name].append(_evenly_spaced(found[name], PIXELS_PER_SIDE).movedim(1, -1)[kept].float())
    model.train(was_training)
    return {name: torch.cat(parts) for name, parts in logits.items()}, torch.cat(labels) if from_labeled else None


def _evenly_spaced(maps: torch.Tensor, pixels_per_side: int) -> torch.Tensor:
    """Take every n-th row and column of maps (..., height, width); keep at least `pixels_per_side` per side."""
    height, width = maps.shape[-2:]
    return maps[..., :: max(1, height // pixels_per_side), :: max(1, width // pixels_per_side)]


class RunningCalibration(nn.Module):
    """Follow the temperatures and the scores of the students during a training, from its labelled batches.

    Each step uses the logits of new views before the weights learn from them. The buffers are part of a checkpoint, so
    a resumed training has the same values bit by bit.

    Args:
        num_labels: Number of classes.
        students: Names of the trained students.
        accelerator: Accelerate's state of a distributed run. All processes then get the same values.
    """

    def __init__(
        self,
        num_labels: int,
        students: Sequence[str] = STUDENTS,
        accelerator: Accelerator | None = None,
    ):
        super().__init__()
        self.students, self.accelerator = tuple(students), accelerator
        self.register_buffer("log_temperatures", torch.zeros(len(self.students)))
        self.register_buffer("confusion", torch.zeros(len(self.students), num_labels, num_labels))
        self.register_buffer("coverage", torch.zeros(len(self.students)))

    @property
    def temperatures(self) -> dict[str, torch.Tensor]:
        """Name of each student -> temperature, a scalar without gradients. 1 before the first update."""
        return dict(zip(self.students, self.log_temperatures.exp()))

    @property
    def mean_iou(self) -> dict[str, torch.Tensor]:
        """Name of each student -> mean IoU on the labelled views of about the last 100 steps; 0 before the first."""
        intersection = self.confusion.diagonal(dim1=1, dim2=2)
        union = self.confusion.sum(dim=1) + self.confusion.sum(dim=2) - intersection
        return dict(zip(self.students, (intersection / union).nanmean(dim=1).nan_to_num(0.0)))

    @property
    def may_teach(self) -> dict[str, torch.Tensor]:
        """Name of each student -> whether it may teach the other one, a boolean scalar.

        A student that is far behind learns and does not teach: its mean IoU is below 0.8 of the other student's, or
        its coverage is below half of the other student's.
        """
        iou, flags = torch.stack(list(self.mean_iou.values())), torch.ones_like(self.coverage, dtype=torch.bool)
        for values, least in ((iou, LEAST_IOU), (self.coverage, LEAST_COVERAGE)):
            flags &= values >= least * values.flip(0)
        return dict(zip(self.students, flags))

    @torch.no_grad()
    def update(
        self,
        logits: dict[str, torch.Tensor],
        labels: torch.Tensor,
        coverage: dict[str, torch.Tensor] | None = None,
    ):
        """Learn from one labelled batch. Every process must call this.

        Args:
            logits: Name of each student -> logits of the labelled views (batch, classes, height, width). They are not
                divided by a temperature.
            labels: (batch, height, width), class indices or 255.
            coverage: Name of each student -> share of the pixels of the weak views with a confident pseudo-label, a
                scalar. None: a supervised step, which does not change the coverage.
        """
        slopes, counts = [], []
        for name, temperature in self.temperatures.items():
            slopes.append(_likelihood_slope(logits[name].float(), labels, temperature, IGNORE))
            counts.append(_confusion_counts(logits[name], labels, IGNORE))
        slopes, counts = torch.stack(slopes), torch.stack(counts)  # (students, 2), (students, classes, classes)
        covered = torch.stack([coverage[name].float() for name in self.students]) if coverage else self.coverage
        slopes, counts, covered = self._mean_over_processes(slopes, counts, covered)
        steps = RUNNING_RATE * slopes[:, 0] / slopes[:, 1].clamp(min=1)
        # The loss of a broken batch is not finite. The training skips that batch.
        self.log_temperatures += steps.nan_to_num(0.0).clamp(-RUNNING_MAX_STEP, RUNNING_MAX_STEP)
        self.log_temperatures.clamp_(*map(math.log, TEMPERATURE_RANGE))
        self.confusion.lerp_(counts, 1 - RUNNING_DECAY)
        self.coverage.lerp_(covered, 1 - RUNNING_DECAY)

    def _mean_over_processes(self, *values: torch.Tensor) -> list[torch.Tensor]:
        """Average tensors over the processes, all in one call."""
        if self.accelerator is None:
            return list(values)
        flat = self.accelerator.reduce(torch.cat([value.flatten() for value in values]), reduction="mean")
        return [part.view_as(value) for part, value in zip(flat.split([v.numel() for v in values]), values)]


def _likelihood_slope(
    logits: torch.Tensor, labels: torch.Tensor, temperature: torch.Tensor, ignore_index: int
) -> torch.Tensor:
    """Return the slope of the log-likelihood over log T, summed over evenly spaced pixels, and their number, (2,)."""
    logits, labels = (_evenly_spaced(maps, RUNNING_PIXELS_PER_SIDE) for maps in (logits, labels))
    kept = labels != ignore_index
    expected = ((logits / temperature).softmax(dim=1) * logits).sum(dim=1)
    of_labels = logits.gather(1, labels.where(kept, 0).unsqueeze(1)).squeeze(1)
    return torch.stack([((expected - of_labels) * kept).sum() / temperature, kept.sum()])


def _confusion_counts(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Return the number of pixels of each true class (row) and predicted class (column), float."""
    num_labels, kept = logits.shape[1], labels != ignore_index
    # Ignored pixels are counted in one more place, which is cut off: selecting pixels would wait for the device.
    pairs = (labels * num_labels + logits.argmax(dim=1)).where(kept, num_labels**2).flatten()
    counts = torch.bincount(pairs, minlength=num_labels**2 + 1)[:-1]
    return counts.view(num_labels, num_labels).float()


__all__ = [
    "CALIBRATION_METHODS",
    "TEMPERATURE_RANGE",
    "RunningCalibration",
    "agreement_temperature",
    "calibrate",
    "expected_calibration_error",
    "fit_temperature",
    "sample_logits",
]
