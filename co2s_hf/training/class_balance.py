"""Pseudo-labels that keep every class: thresholds per class, and logits adjusted by how often a class is predicted.

With one threshold for all classes, frequent classes get most of the pseudo-labels. The students then predict rare
classes less and less, until these vanish. Every rule here works on running statistics of one student's predictions for
the weak views. The statistics are buffers: they are saved with a checkpoint.

- Class-wise thresholds (CBST, arXiv 1810.07911): a share of the pixels of every predicted class becomes confident.
- Cap (DARS, arXiv 2107.11279): no class gets more pseudo-labels than its share of the labelled pixels allows.
- FreeMatch (arXiv 2205.07246): one threshold that follows the mean confidence, lower for classes with a low mean
  probability.
- Logit adjustment (DebiasPL, arXiv 2201.01490): the logits of classes that are predicted often are lowered before the
  pseudo-label is chosen. So the class of a pseudo-label changes, too.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


# Confidences are counted in bins of their log-odds. Bins of the confidence itself would be too wide close to 1, where
# most of the confidences are. The range goes from 0.02 to 0.999999.
LOWEST_LOG_ODDS, HIGHEST_LOG_ODDS, NUM_BINS = -4.0, 14.0, 144


@dataclass(frozen=True)
class Balance:
    """How a recipe keeps every class. The default does nothing: one fixed threshold, as in the paper.

    Args:
        thresholds: "fixed": tau for every class. "quantile": per predicted class the confidence that `share` of its
            pixels reach, at most tau. "freematch": tau times the mean confidence, relative to the most probable class.
        share: With "quantile": share of the pixels of each predicted class that become confident, 0 to 1.
        cap: A class gets at most `cap` times its share of the labelled pixels as pseudo-labels, in pixels of the
            unlabelled images. Its threshold then rises, even above tau. None: no limit.
        logit_adjustment: lambda of the logit adjustment; 0 leaves it out. The paper of DebiasPL uses 0.4 to 0.5.
        rare_class_temperature: T of rare-class sampling, see [`RareClasses`]. None: labelled images in random order.
        teacher_decay: Decay of a mean teacher that makes the pseudo-labels, see [`TaughtObjective`]. None: each
            student makes its own, as in the paper.
        exchange: With a mean teacher: how its students are fused, see [`fuse_logits`].
        momentum: Weight of the past in the running mean probability and mean confidence, from batch to batch, 0 to 1.
        quantile_momentum: The same for "quantile" and `cap`. It is lower: confidence rises quickly when the unlabelled
            images come in, and a late threshold lets too many pixels through.

    Raises:
        ValueError: A value is out of range.
    """

    thresholds: Literal["fixed", "quantile", "freematch"] = "fixed"
    share: float = 0.5
    cap: float | None = None
    logit_adjustment: float = 0.0
    rare_class_temperature: float | None = None
    teacher_decay: float | None = None
    exchange: Literal["confidence", "average"] = "confidence"
    momentum: float = 0.99
    quantile_momentum: float = 0.9

    def __post_init__(self):
        if self.thresholds not in ("fixed", "quantile", "freematch"):
            raise ValueError(f"`thresholds` is '{self.thresholds}'; choose fixed, quantile or freematch.")
        if not 0 < self.share <= 1:
            raise ValueError(f"`share` is {self.share}; it must be above 0 and at most 1.")
        for name in ("momentum", "quantile_momentum"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"`{name}` is {value}; it must be at least 0 and less than 1.")
        if self.logit_adjustment < 0:
            raise ValueError(f"`logit_adjustment` is {self.logit_adjustment}; it must be at least 0.")
        for name in ("cap", "rare_class_temperature"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"`{name}` is {value}; it must be above 0.")

    @property
    def needs_statistics(self) -> bool:
        """Whether thresholds or logits depend on running statistics of the predictions."""
        return self.thresholds != "fixed" or self.cap is not None or self.logit_adjustment > 0


# Recipe of a training -> how it keeps every class.
BALANCED = Balance(thresholds="quantile", share=0.7, logit_adjustment=0.5, teacher_decay=0.98, exchange="average")
BALANCES = {"balanced": BALANCED, "paper": Balance(), "released": Balance()}


class ClassStatistics(nn.Module):
    """Running statistics of one student's predictions for weak views.

    All of them are sums over pixels that decay from batch to batch. Means and shares are quotients of two such sums.
    Therefore they are right from the first batch on.

    Args:
        num_labels: Number of classes.
        balance: The rules, with the factors on the sums of the past at each update.
    """

    def __init__(self, num_labels: int, balance: Balance):
        super().__init__()
        self.balance = balance
        self.register_buffer("counts", torch.zeros(num_labels, NUM_BINS))  # pixels, by predicted class and confidence
        self.register_buffer("probability", torch.zeros(num_labels))
        self.register_buffer("confidence", torch.zeros(1))
        self.register_buffer("pixels", torch.zeros(1))

    @torch.no_grad()
    def measure(self, logits: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        """Compute the sums of one batch as one vector, for [`update`]. The vectors of several processes may be added.

        Args:
            logits: (batch, classes, height, width), of the weak views.
            padding: Boolean (batch, height, width), true outside the image. Such pixels are not counted.
        """
        probabilities = logits.detach().float().softmax(dim=1)
        confidence, labels = (values[~padding] for values in probabilities.max(dim=1))
        places = labels * NUM_BINS + _positions(confidence).long().clamp(0, NUM_BINS - 1)
        counts = torch.bincount(places, minlength=self.counts.numel()).float()
        total = (probabilities * ~padding.unsqueeze(1)).sum(dim=(0, 2, 3))
        return torch.cat([counts, total, confidence.sum().view(1), counts.sum().view(1)])

    @torch.no_grad()
    def update(self, sums: torch.Tensor):
        """Add the sums of a batch, from [`measure`], to those of the past; nothing if they are not finite."""
        sums = sums.where(sums.isfinite().all(), 0.0)  # the training skips a batch whose loss is not finite
        buffers = (self.counts, self.probability, self.confidence, self.pixels)
        for buffer, new in zip(buffers, sums.split([buffer.numel() for buffer in buffers])):
            momentum = self.balance.quantile_momentum if buffer is self.counts else self.balance.momentum
            buffer.mul_(momentum).add_(new.view_as(buffer))

    def mean_probability(self) -> torch.Tensor:
        """Return the mean probability of every class, (classes,)."""
        return self.probability / self.pixels.clamp(min=1e-12)

    def mean_confidence(self) -> torch.Tensor:
        """Return the mean of the largest probability of a pixel, (1,)."""
        return self.confidence / self.pixels.clamp(min=1e-12)

    def predicted_share(self) -> torch.Tensor:
        """Return the share of the pixels that each class is predicted in, (classes,)."""
        return self.counts.sum(dim=1) / self.counts.sum().clamp(min=1e-12)

    def coverage(self, thresholds: torch.Tensor) -> torch.Tensor:
        """Return the share of all pixels that are predicted as a class with at least its threshold, (classes,).

        Args:
            thresholds: (classes,), 0 to 1. Within a bin, the confidences are taken as evenly spread.
        """
        places = _positions(thresholds).unsqueeze(1) - torch.arange(NUM_BINS, device=thresholds.device)
        above = 1 - places.clamp(0, 1)  # share of each bin above the threshold
        return (self.counts * above).sum(dim=1) / self.counts.sum().clamp(min=1e-12)

    def confidence_reached_by(self, share: torch.Tensor | float) -> torch.Tensor:
        """Return the confidence that this share of the pixels of each predicted class reaches, (classes,).

        Args:
            share: 0 to 1, one value or (classes,).

        Returns:
            Probabilities. They are interpolated within a bin. It is 1 for a class that is predicted nowhere.
        """
        totals = self.counts.sum(dim=1)
        below = (1 - torch.as_tensor(share, device=totals.device).expand_as(totals)) * totals
        reached = self.counts.cumsum(dim=1)
        # The first bin up to which at least `below` pixels lie. An empty bin is never it.
        index = ((reached >= below.unsqueeze(1)) & (self.counts > 0)).float().argmax(dim=1, keepdim=True)
        within = self.counts.gather(1, index)
        passed = below.unsqueeze(1) - (reached.gather(1, index) - within)
        place = index + (passed / within.clamp(min=1e-12)).clamp(0, 1)
        width = (HIGHEST_LOG_ODDS - LOWEST_LOG_ODDS) / NUM_BINS
        return (LOWEST_LOG_ODDS + width * place.squeeze(1)).sigmoid().where(totals > 0, 1.0)


def _positions(confidence: torch.Tensor) -> torch.Tensor:
    """Return the place of each confidence on the scale of the bins, 0 to NUM_BINS."""
    position = (torch.logit(confidence, eps=1e-7) - LOWEST_LOG_ODDS) / (HIGHEST_LOG_ODDS - LOWEST_LOG_ODDS)
    return (position * NUM_BINS).clamp(0, NUM_BINS)


def class_thresholds(
    statistics: ClassStatistics, balance: Balance, threshold: float, labeled_share: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the lowest confidence of a confident pixel for every predicted class, (classes,).

    Args:
        statistics: Running statistics of the student.
        balance: The rules.
        threshold: tau, 0 to 1.
        labeled_share: Share of the labelled pixels of each class, (classes,); needed for `balance.cap`.
    """
    thresholds = torch.full_like(statistics.probability, threshold)
    if balance.thresholds == "quantile":
        thresholds = thresholds.minimum(statistics.confidence_reached_by(balance.share))
    elif balance.thresholds == "freematch":
        mean = statistics.mean_probability()
        thresholds = statistics.mean_confidence() * mean / mean.max().clamp(min=1e-12)
    if balance.cap is not None:
        allowed = balance.cap * labeled_share / statistics.predicted_share().clamp(min=1e-12)
        capped = statistics.confidence_reached_by(allowed.clamp(max=1))
        thresholds = thresholds.maximum(capped.where(allowed < 1, 0.0))
    return thresholds


def logit_shift(statistics: ClassStatistics, strength: float) -> torch.Tensor:
    """Return lambda log q for every class, (classes, 1, 1), where q is the running mean of the probabilities.

    Subtract it from logits to choose pseudo-labels. Add it to the logits that are trained on these pseudo-labels: a
    frequent class must then win by a margin.

    Args:
        statistics: Running statistics of the student.
        strength: lambda.
    """
    return strength * statistics.mean_probability().clamp(min=1e-6).log().view(-1, 1, 1)


__all__ = ["BALANCES", "Balance", "ClassStatistics", "class_thresholds", "logit_shift"]
