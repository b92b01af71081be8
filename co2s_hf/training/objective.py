"""The training objective: from one batch of views to named losses.

Each student is trained with the labels, with its own confident pseudo-labels on strong views and on perturbed features
(UniMatch, arXiv 2208.09910), and with the predictions of the other student in pixels where that student is more
confident (the paper's global-local collaborative fusion).

Each loss is first a sum over pixels and a pixel count. At the end the sum is divided by the count. In a distributed
run the counts are averaged over the processes before the division, and distributed training averages the gradients.
The result is the same as on one process with the whole batch, with two exceptions: CutMix pairs other images if a
process has an odd number of images, and hard-pixel mining only compares the pixels of its own process.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from ..data.options import IGNORE
from ..data.views import Views, cutmix
from ..model.modeling_co2s import STUDENTS, Co2SForSemanticSegmentation
from .class_balance import BALANCES, Balance, ClassStatistics, class_thresholds, logit_shift
from .pseudo_labels import CONFIDENCE_MODES, Mean, PseudoLabels, of_each_pixel


STABILITY_PEAK, STABILITY_RAMP = 0.5, 0.2
STABILITY_MODES = ("paper", "reference", "off")
LABELED_LOSSES = ("cross_entropy", "ohem")
OHEM_THRESHOLD, OHEM_LEAST_SHARE = 0.7, 1 / 16


def labeled_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    kind: str = "cross_entropy",
    class_weights: torch.Tensor | None = None,
) -> Mean:
    """Compute the cross-entropy over labelled pixels.

    Args:
        logits: (batch, classes, height, width).
        labels: (batch, height, width), class indices or `ignore_index`.
        ignore_index: Label of pixels to leave out.
        kind: "cross_entropy", or "ohem" (online hard example mining, arXiv 1604.03540): only pixels with a probability
            of the true class below 0.7, and at least the hardest sixteenth of the pixels.
        class_weights: (classes,), weights of the pixels of each class.

    Returns:
        Weighted sum over pixels, with gradient (zero if all pixels are ignored), and the sum of the weights.
    """
    per_pixel = F.cross_entropy(logits.float(), labels, ignore_index=ignore_index, reduction="none")
    weights = (labels != ignore_index).float()
    if class_weights is not None:
        weights = weights * class_weights[labels.where(labels != ignore_index, 0)]
    if kind == "ohem":
        weights = weights * _hard_pixels(per_pixel.detach(), labels != ignore_index)
    return Mean((per_pixel * weights).sum(), weights.sum())


def _hard_pixels(per_pixel: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Select the hard pixels of "ohem" by their cross-entropy; return a boolean mask (batch, height, width)."""
    hardest = per_pixel[counted].sort(descending=True).values
    if len(hardest) == 0:
        return counted
    least = hardest[math.ceil(OHEM_LEAST_SHARE * len(hardest)) - 1]
    return (per_pixel > -math.log(OHEM_THRESHOLD)) | (per_pixel >= least)


def stability_weight(step: int, total_steps: int, peak: float = STABILITY_PEAK) -> float:
    """Return the weight of the stability loss. It rises from 0 along a half cosine in the first fifth of the steps.

    Args:
        step: Number of steps done, from 0.
        total_steps: Number of steps of the training.
        peak: Weight after the rise.
    """
    ramp = round(STABILITY_RAMP * total_steps)
    if step >= ramp - 1:
        return peak
    return peak * 0.5 * (1 - math.cos(math.pi * step / (ramp - 1)))


def stability_losses(
    clip_logits: torch.Tensor,
    dinov3_logits: torch.Tensor,
    threshold: float | dict[str, float | torch.Tensor],
    mode: str = "paper",
    padding: torch.Tensor | None = None,
) -> dict[str, Mean]:
    """Compute the losses between the students. In each pixel, the more confident student teaches the other one.

    The loss of a student counts the pixels in which the other student reaches the threshold, and in which the student
    itself is below the threshold or not more confident than the other one. The paper averages over these pixels. It
    does not mention padding, which the authors' code counts like the image. Padding is no image: predictions there say
    nothing about one. Therefore it is left out if `padding` is given.

    Args:
        clip_logits: (batch, classes, height, width), of the weak view.
        dinov3_logits: Logits of the other student, same shape.
        threshold: Lowest confidence of a student that teaches, 0 to 1. For thresholds per class: name of each student
            -> (classes,); the threshold of a pixel is that of its predicted class.
        mode: "paper": gradients flow to the student that is taught. "reference": the same value without gradients, as
            in the authors' code.
        padding: Boolean (batch, height, width), true for pixels without data, which are not counted. None: count all.

    Returns:
        Name of each student -> squared differences of the probabilities, averaged over the classes and summed over the
        counted pixels, and the number of these pixels.
    """
    probabilities, confidence, is_confident = {}, {}, {}
    for name, logits in zip(STUDENTS, (clip_logits, dinov3_logits)):
        probabilities[name] = logits.float().softmax(dim=1)
        confidence[name], labels = probabilities[name].detach().max(dim=1)
        own_threshold = threshold[name] if isinstance(threshold, dict) else threshold
        is_confident[name] = confidence[name] >= of_each_pixel(own_threshold, labels)
    losses = {}
    for name, teacher in (("clip", "dinov3"), ("dinov3", "clip")):
        learns = is_confident[teacher] & (~is_confident[name] | (confidence[teacher] >= confidence[name]))
        if padding is not None:
            learns = learns & ~padding
        own = probabilities[name].detach() if mode == "reference" else probabilities[name]
        squared = (own - probabilities[teacher].detach()).square().mean(dim=1)
        losses[name] = Mean((squared * learns).sum(), learns.sum())
    return losses


class Co2SObjective(nn.Module):
    """The model together with its losses. The forward computes all losses of a batch.

    Distributed training wraps this module instead of the model.

    Args:
        model: A [`Co2SForSemanticSegmentation`], with or without adapters.
        students: The students to train. A single student has no stability loss.
        threshold: tau: lowest confidence of pseudo-labels that are used, and of a student that teaches, 0 to 1.
        strong_weight: Weight of the loss on each strong view.
        feature_dropout_weight: Weight of the loss on perturbed features.
        feature_dropout: Probability of dropping a feature channel.
        stability: "paper", "reference" (see [`stability_losses`]) or "off".
        counts_padding: Also count pixels without data in the stability loss, as the authors' code does.
        confidence_mode: Weights of pseudo-labels, see [`PseudoLabels.loss`].
        labeled_loss: "cross_entropy" or "ohem", see [`labeled_loss`].
        class_weights: (classes,), weights of the labelled pixels of each class.
        balance: How pseudo-labels keep every class.
        labeled_share: (classes,), share of the labelled pixels of each class. Needed for `balance.cap`.
        accelerator: Accelerate's state of a distributed run. The mean of each loss over the processes is then the loss
            of the whole batch.

    Raises:
        ValueError: A name, a value or the shape of the class weights is wrong.
    """

    def __init__(
        self,
        model: Co2SForSemanticSegmentation,
        students: tuple[str, ...] = STUDENTS,
        threshold: float = 0.95,
        strong_weight: float = 0.25,
        feature_dropout_weight: float = 0.5,
        feature_dropout: float = 0.5,
        stability: str = "paper",
        counts_padding: bool = False,
        confidence_mode: str = "pixelwise",
        labeled_loss: str = "cross_entropy",
        class_weights: torch.Tensor | None = None,
        balance: Balance = BALANCES["paper"],
        labeled_share: torch.Tensor | None = None,
        accelerator: Accelerator | None = None,
    ):
        super().__init__()
        if not students or set(students) - set(STUDENTS):
            raise ValueError(f"`students` is {students}; give one or both of {STUDENTS}.")
        if not 0 <= threshold <= 1:
            raise ValueError(f"`threshold` is {threshold}; a probability lies between 0 and 1.")
        for name, value, allowed in (
            ("stability", stability, STABILITY_MODES),
            ("confidence_mode", confidence_mode, CONFIDENCE_MODES),
            ("labeled_loss", labeled_loss, LABELED_LOSSES),
        ):
            if value not in allowed:
                raise ValueError(f"`{name}` is '{value}'; choose one of {', '.join(allowed)}.")
        num_labels = model.config.num_labels
        for name, values in (("class_weights", class_weights), ("labeled_share", labeled_share)):
            if values is not None and tuple(values.shape) != (num_labels,):
                raise ValueError(
                    f"`{name}` has the shape {tuple(values.shape)}; {num_labels} classes need ({num_labels},)."
                )
        if balance.cap is not None and labeled_share is None:
            raise ValueError("`balance.cap` needs `labeled_share`, the share of the labelled pixels of each class.")
        self.model = model
        self.students = tuple(students)
        self.threshold = threshold
        self.strong_weight = strong_weight
        self.feature_dropout_weight = feature_dropout_weight
        self.feature_dropout = feature_dropout
        self.stability, self.counts_padding = stability, counts_padding
        self.confidence_mode = confidence_mode
        self.labeled_loss = labeled_loss
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.balance = balance
        self.register_buffer("labeled_share", labeled_share, persistent=False)
        kept = self.students if balance.needs_statistics else ()
        self.statistics = nn.ModuleDict({name: ClassStatistics(num_labels, balance) for name in kept})
        self.accelerator = accelerator

    def forward(self, views: Views, stability_weight: float = 0.0) -> dict[str, torch.Tensor]:
        """Compute all losses with one backbone pass per student.

        Args:
            views: Views of one batch. Without unlabelled images only `loss_supervised` is computed.
            stability_weight: lambda of this step, see [`stability_weight`].

        Returns:
            `loss`: the sum to minimise, a scalar with gradients. All other values have no gradients.
            `without_labels`: 1 if all labels of the batch are ignored, else 0. For each student, as `<student>/...`:

            - `loss_supervised`, `loss_strong_1`, `loss_strong_2`, `loss_feature_dropout`, `loss_stability`, `loss`;
            - `confident_fraction`: share of the image pixels with confident pseudo-labels;
            - `coverage` (classes,): the same share for each pseudo-label class;
            - with `views.hidden_labels` also `known_fraction`: share of the image pixels with a confident pseudo-label
              and a known true class; and `right_fraction`: share of the image pixels in which these two agree;
            - and `known_coverage`, `right_coverage` (classes,): the same shares for each pseudo-label class.

            The mean of each value over the processes is its value for the global batch.
        """
        means = self._labeled_only(views) if views.weak is None else self._semi_supervised(views)
        terms = self._divided(means)
        report = {f"{name}/{term}": value.detach() for name in terms for term, value in terms[name].items()}
        totals = {name: self._total(student_terms, stability_weight) for name, student_terms in terms.items()}
        report |= {f"{name}/loss": total.detach() for name, total in totals.items()}
        without_labels = (views.labels == IGNORE).all().float()
        return {"loss": sum(totals.values()), "without_labels": without_labels, **report}

    def _labeled_only(self, views: Views) -> dict[str, dict[str, Mean]]:
        logits = self.model.student_logits(views.labeled, students=self.students)
        return {name: {"loss_supervised": self._supervised(logits[name], views)} for name in self.students}

    def _semi_supervised(self, views: Views) -> dict[str, dict[str, Mean]]:
        views = with_partners(views)
        images = [
            views.labeled,
            views.weak,
            cutmix(views.strong_1, views.partner_strong_1, views.cutmix_boxes_1),
            cutmix(views.strong_2, views.partner_strong_2, views.cutmix_boxes_2),
        ]
        if views.partner_order is None:
            images.append(views.partner_weak)
        sizes = [len(part) for part in images]
        weak_samples = slice(sizes[0], sizes[0] + sizes[1])
        logits = self.model.student_logits(
            torch.cat(images), self.students, perturbed_samples=weak_samples, perturb=self._drop_channels
        )

        parts = {name: logits[name].split([*sizes, sizes[1]]) for name in self.students}
        self._update_statistics({name: parts[name][1] for name in self.students}, views.padding)
        means, unbiased, thresholds = {}, {}, {}
        for name in self.students:
            labeled, weak, strong_1, strong_2, perturbed = *parts[name][:4], parts[name][-1]
            thresholds[name], shift = self._rules(name)
            unbiased[name] = weak - shift
            own = PseudoLabels.from_logits(unbiased[name], views.padding)
            partner = parts[name][4] if views.partner_order is None else weak[views.partner_order]
            other = PseudoLabels.from_logits(partner - shift, views.partner_padding)
            mixed_1, mixed_2 = (own.mixed_with(other, boxes) for boxes in (views.cutmix_boxes_1, views.cutmix_boxes_2))
            means[name] = {
                "loss_supervised": self._supervised(labeled, views),
                "loss_strong_1": mixed_1.loss(strong_1 + shift, thresholds[name], self.confidence_mode),
                "loss_strong_2": mixed_2.loss(strong_2 + shift, thresholds[name], self.confidence_mode),
                "loss_feature_dropout": own.loss(perturbed + shift, thresholds[name], self.confidence_mode),
                **self._quality(own, thresholds[name], views),
            }
        if self.stability != "off" and len(self.students) == 2:
            padding = None if self.counts_padding else views.padding
            stability = stability_losses(unbiased["clip"], unbiased["dinov3"], thresholds, self.stability, padding)
            for name, mean in stability.items():
                means[name]["loss_stability"] = mean
        return means

    def _update_statistics(self, weak_logits: dict[str, torch.Tensor], padding: torch.Tensor):
        """Add a batch to the running statistics of the students. All processes add the same sums."""
        for name, statistics in self.statistics.items():
            sums = statistics.measure(weak_logits[name], padding)
            if self.accelerator is not None:
                sums = self.accelerator.reduce(sums, reduction="sum")
            statistics.update(sums)

    def _rules(self, student: str) -> tuple[float | torch.Tensor, float | torch.Tensor]:
        """Return the thresholds of a student, (classes,), and the shift of its logits, (classes, 1, 1); or numbers."""
        if student not in self.statistics:
            return self.threshold, 0.0
        statistics = self.statistics[student]
        thresholds = class_thresholds(statistics, self.balance, self.threshold, self.labeled_share)
        shift = logit_shift(statistics, self.balance.logit_adjustment) if self.balance.logit_adjustment else 0.0
        return thresholds, shift

    def _supervised(self, logits: torch.Tensor, views: Views) -> Mean:
        return labeled_loss(logits, views.labels, IGNORE, self.labeled_loss, self.class_weights)

    def _drop_channels(self, features: torch.Tensor) -> torch.Tensor:
        """Drop whole channels of feature maps (batch, channels, h, w) and scale up the others.

        Every process draws random numbers for the whole batch and uses its own rows of them. Therefore the result does
        not depend on the number of processes.
        """
        processes, rank = 1, 0
        if self.accelerator is not None:
            processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        batch_size, channels = features.shape[:2]
        draws = torch.rand(processes * batch_size, channels, 1, 1, device=features.device)
        kept = draws[rank * batch_size : (rank + 1) * batch_size] >= self.feature_dropout
        return features * kept / max(1 - self.feature_dropout, 1e-6)

    def _quality(self, own: PseudoLabels, threshold: float | torch.Tensor, views: Views) -> dict[str, Mean]:
        """Measure the coverage and the accuracy of the pseudo-labels, for the log only."""
        confident = own.confident(threshold)
        pixels = (~own.padding).sum()
        coverage = self._by_class(own, confident)
        quality = {"confident_fraction": Mean(confident.sum(), pixels), "coverage": Mean(coverage, pixels)}
        if views.hidden_labels is not None:
            known = confident & (views.hidden_labels != IGNORE)
            right = known & (own.labels == views.hidden_labels)
            quality |= {"right_fraction": Mean(right.sum(), pixels), "known_fraction": Mean(known.sum(), pixels)}
            quality["right_coverage"] = Mean(self._by_class(own, right), pixels)
            quality["known_coverage"] = Mean(self._by_class(own, known), pixels)
        return quality

    def _by_class(self, own: PseudoLabels, counted: torch.Tensor) -> torch.Tensor:
        """Return the number of counted pixels of each pseudo-label class, (classes,)."""
        return torch.bincount(own.labels[counted], minlength=self.model.config.num_labels)

    def _divided(self, means: dict[str, dict[str, Mean]]) -> dict[str, dict[str, torch.Tensor]]:
        """Divide every sum by its pixel count. The counts are first averaged over the processes, all in one call."""
        keys = [(name, term) for name in means for term in means[name]]
        counts = torch.stack([means[name][term].count.detach().float() for name, term in keys])
        if self.accelerator is not None:
            counts = self.accelerator.reduce(counts, reduction="mean")
        counts = counts.where(counts > 0, 1)
        terms = {name: {} for name in means}
        for (name, term), count in zip(keys, counts):
            terms[name][term] = means[name][term].total / count
        return terms

    def _total(self, terms: dict[str, torch.Tensor], stability_weight: float) -> torch.Tensor:
        total = terms["loss_supervised"]
        if "loss_strong_1" in terms:
            total = total + self.strong_weight * (terms["loss_strong_1"] + terms["loss_strong_2"])
            total = total + self.feature_dropout_weight * terms["loss_feature_dropout"]
        total = 0.5 * total  # the authors halve the sum of all these losses
        if "loss_stability" in terms:
            total = total + stability_weight * terms["loss_stability"]
        return total


def with_partners(views: Views) -> Views:
    """Pair the images of a batch for CutMix, unless the views already contain partners.

    Neighbours form pairs. Therefore a batch that is divided among processes has the same pairs as the whole batch. The
    partner of the last image of an odd batch is the first image. The image of a batch of one is its own partner.
    """
    if views.partner_weak is not None:
        return views
    count = len(views.weak)
    order = [(index ^ 1) % count for index in range(count)]
    names = ("strong_1", "strong_2", "padding")
    return replace(views, partner_order=order, **{f"partner_{name}": getattr(views, name)[order] for name in names})
