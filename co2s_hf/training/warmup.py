"""The warm-up on labelled images alone, which may end by itself.

Pseudo-labels of an untrained model do more harm than good. How many steps of warm-up a model needs depends on its
backbones and on the data. The recipe "balanced" therefore predicts unlabelled images every few steps, and ends the
warm-up when enough pixels of every labelled class are predicted with at least tau.

A training whose warm-up ends by itself after N steps is the same, bit for bit, as one with N steps of warm-up given.
"""

from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader

from ..data.samples import PairedViews, WeakViews
from ..data.views import normalize
from .class_balance import ClassStatistics
from .objective import Co2SObjective
from .options import TrainingOptions


FLOOR = 0.2  # coverage of a class that is enough, relative to its share of the labelled pixels
LEAST_CHECK_STEPS, CHECKS_PER_TRAINING = 10, 40  # look every 10 steps, or every fortieth of a long training
VIEWS_PER_CHECK = 16


@dataclass
class WarmUp:
    """The length of the warm-up. It is part of a checkpoint if the warm-up ends by itself.

    Args:
        longest: Largest number of steps.
        check_steps: Look every N steps whether to end. None: the warm-up has `longest` steps.
        end: Number of steps of the warm-up. None: not decided yet.
    """

    longest: int
    check_steps: int | None = None
    end: int | None = None

    @classmethod
    def for_options(cls, options: TrainingOptions) -> "WarmUp":
        """Make the warm-up of a run. It ends by itself if `supervised_warmup_steps` is None."""
        if options.supervised_warmup_steps is not None or options.longest_warmup == 0:
            return cls(options.longest_warmup, end=options.longest_warmup)
        return cls(options.longest_warmup, max(LEAST_CHECK_STEPS, options.max_train_steps // CHECKS_PER_TRAINING))

    @property
    def steps(self) -> int:
        """Number of steps of the warm-up, as far as it is known: at most this many."""
        return self.longest if self.end is None else self.end

    def must_check(self, done: int) -> bool:
        """Return whether to measure the coverage after this number of steps."""
        return self.end is None and (done % self.check_steps == 0 or done == self.longest)

    def end_if_covered(self, done: int, coverage: dict[str, torch.Tensor], names: list[str]) -> str | None:
        """End the warm-up if the coverage is high enough everywhere, or if it has the largest number of steps.

        Args:
            done: Number of steps done.
            coverage: Name of each student -> coverage of each class relative to its share of the labelled pixels,
                (classes,); NaN for a class without labelled pixels.
            names: Names of the classes.

        Returns:
            One line that says why the warm-up ends. None if it goes on.
        """
        low = [
            f"{names[index]} ({student} {values[index]:.2f})"
            for student, values in coverage.items()
            for index in (values < FLOOR).nonzero().flatten().tolist()
        ]
        if low and done < self.longest:
            return None
        self.end = done
        if not low:
            return f"The warm-up ends after step {done}: every class has enough pseudo-labels."
        return (
            f"The warm-up ends after step {done}, which is its upper bound. Coverage relative to the labels is below "
            f"{FLOOR} for: {', '.join(low)}."
        )

    def state_dict(self) -> dict:
        """Return the decision, for a checkpoint."""
        return {"end": self.end}

    def load_state_dict(self, state: dict):
        """Restore the decision from a checkpoint."""
        self.end = state["end"]


@torch.no_grad()
def relative_coverage(
    objective: Co2SObjective, items: PairedViews, check: int, batch_size: int
) -> dict[str, torch.Tensor]:
    """Measure the coverage that pseudo-labels would have now under one threshold, without logit adjustment.

    Neither the weights, nor the running statistics, nor the random numbers of the training change.

    Args:
        objective: The objective, without Accelerate's wrapper.
        items: Items of the training. Weak views of their unlabelled images are measured.
        check: Number of the check; every check takes other views.
        batch_size: Images per forward pass.

    Returns:
        Name of each student -> for each class the share of the pixels that are predicted as that class with at least
        tau, relative to the class's share of the labelled pixels, (classes,). NaN for a class without labelled pixels.
    """
    accelerator, config, share = objective.accelerator, objective.model.config, objective.labeled_share
    views = max(VIEWS_PER_CHECK, accelerator.num_processes)  # every process has at least one
    numbers = range(check * views, (check + 1) * views)
    own_numbers = numbers[accelerator.process_index :: accelerator.num_processes]
    statistics = {name: ClassStatistics(config.num_labels, objective.balance).to(share) for name in objective.students}
    sums = dict.fromkeys(objective.students, 0)
    # Without a generator of its own, the loader would draw a number from the generator of the training.
    for batch in DataLoader(WeakViews(items, own_numbers), batch_size, generator=torch.Generator()):
        images = normalize(batch["weak"].to(share.device).float() / 255, config.image_mean, config.image_std)
        with accelerator.autocast():
            logits = objective.model.student_logits(images, objective.students)
        for name in objective.students:
            sums[name] = sums[name] + statistics[name].measure(logits[name], batch["padding"].to(share.device))
    coverage = {}
    for name in objective.students:
        statistics[name].update(accelerator.reduce(sums[name], reduction="sum"))
        # tau itself, not thresholds per class: these let pixels through even if the model has learned nothing yet.
        thresholds = torch.full_like(share, objective.threshold)
        coverage[name] = statistics[name].coverage(thresholds) / share.where(share > 0, torch.nan)
    return coverage


__all__ = ["WarmUp", "relative_coverage"]
