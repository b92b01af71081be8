"""The training objective: from one batch of views to named losses.

Both students learn from labels, from their own confident pseudo-labels on strong views and on perturbed features
(UniMatch, arXiv 2208.09910), and from each other where one is surer (the paper's global-local collaborative fusion).

Every loss is a sum over pixels and the number it is divided by, kept apart until the end: so the processes of a
distributed run divide by the pixels of all of them, and compute what one process would with the whole batch (given
even batches, whose CutMix pairs are not torn; mining of hard pixels keeps to each process's own).
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from .modeling_co2s import STUDENTS, Co2SForSemanticSegmentation
from .views import Views, cutmix


STABILITY_PEAK, STABILITY_RAMP = 0.5, 0.2
STABILITY_MODES = ("paper", "reference", "off")
CONFIDENCE_MODES = ("pixelwise", "pixelratio", "pixelavg")
LABELED_LOSSES = ("cross_entropy", "ohem")
OHEM_THRESHOLD, OHEM_LEAST_SHARE = 0.7, 1 / 16


class Mean(NamedTuple):
    """A sum over pixels, a scalar or one per class, and the number of pixels to divide it by."""

    total: torch.Tensor
    count: torch.Tensor


@dataclass
class PseudoLabels:
    """What one student believes of a weak view: class and its probability per pixel, and where there is no image."""

    labels: torch.Tensor
    confidence: torch.Tensor
    padding: torch.Tensor

    @classmethod
    def from_logits(cls, logits: torch.Tensor, padding: torch.Tensor) -> "PseudoLabels":
        """Take the most probable class; no gradient."""
        confidence, labels = logits.detach().float().softmax(dim=1).max(dim=1)
        return cls(labels, confidence, padding)

    def mixed_with(self, partner: "PseudoLabels", boxes: torch.Tensor) -> "PseudoLabels":
        """The pseudo-labels of a strong view that was mixed with the partner's."""
        return PseudoLabels(
            cutmix(self.labels, partner.labels, boxes),
            cutmix(self.confidence, partner.confidence, boxes),
            cutmix(self.padding, partner.padding, boxes),
        )

    def confident(self, threshold: float) -> torch.Tensor:
        """Boolean (batch, height, width): pixels of the image whose confidence reaches the threshold."""
        return (self.confidence >= threshold) & ~self.padding

    def loss(self, logits: torch.Tensor, threshold: float, mode: str = "pixelwise") -> Mean:
        """Cross-entropy of (batch, classes, height, width), weighted by confidence; divided by all pixels of images.

        Dividing by all, not by the confident ones, lets the term grow as the student becomes sure.

        Args:
            logits: Of a strong view or of perturbed features.
            threshold: Confidence from which a pixel counts as confident.
            mode: "pixelwise" keeps the confident pixels (the paper); "pixelratio" weights an image's pixels by its
                share of confident ones, "pixelavg" by its mean confidence.
        """
        counted = ~self.padding
        if mode == "pixelwise":
            weights = self.confident(threshold).float()
        else:
            sureness = self.confident(threshold).float() if mode == "pixelratio" else self.confidence * counted
            share = sureness.sum(dim=(1, 2)) / counted.sum(dim=(1, 2)).clamp(min=1)
            weights = share[:, None, None] * counted
        per_pixel = F.cross_entropy(logits.float(), self.labels, reduction="none")
        return Mean((per_pixel * weights).sum(), counted.sum())


def labeled_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    kind: str = "cross_entropy",
    class_weights: torch.Tensor | None = None,
) -> Mean:
    """Cross-entropy over labelled pixels; its sum is connected to the graph even when all pixels are ignored.

    Args:
        logits: (batch, classes, height, width).
        labels: (batch, height, width), class indices or `ignore_index`.
        ignore_index: Label of the pixels to leave out.
        kind: "cross_entropy", or "ohem" (online hard example mining, arXiv 1604.03540): only pixels whose class has a
            probability below 0.7, though never fewer than the hardest sixteenth.
        class_weights: (classes,), weights of the pixels of each class.
    """
    per_pixel = F.cross_entropy(logits.float(), labels, ignore_index=ignore_index, reduction="none")
    weights = (labels != ignore_index).float()
    if class_weights is not None:
        weights = weights * class_weights[labels.where(labels != ignore_index, 0)]
    if kind == "ohem":
        weights = weights * _hard_pixels(per_pixel.detach(), labels != ignore_index)
    return Mean((per_pixel * weights).sum(), weights.sum())


def _hard_pixels(per_pixel: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Boolean (batch, height, width), true where the cross-entropy is high enough to be mined."""
    hardest = per_pixel[counted].sort(descending=True).values
    if len(hardest) == 0:
        return counted
    least = hardest[math.ceil(OHEM_LEAST_SHARE * len(hardest)) - 1]
    return (per_pixel > -math.log(OHEM_THRESHOLD)) | (per_pixel >= least)


def stability_weight(step: int, total_steps: int, peak: float = STABILITY_PEAK) -> float:
    """Weight of the stability loss: 0 to its peak along half a cosine over the first fifth of the steps.

    Args:
        step: Steps done, from 0.
        total_steps: Length of the whole training.
        peak: The weight from then on.
    """
    ramp = round(STABILITY_RAMP * total_steps)
    if step >= ramp - 1:
        return peak
    return peak * 0.5 * (1 - math.cos(math.pi * step / (ramp - 1)))


def stability_losses(
    clip_logits: torch.Tensor, dinov3_logits: torch.Tensor, threshold: float, mode: str = "paper"
) -> dict[str, Mean]:
    """Let the less confident student learn the other's class probabilities, pixel by pixel.

    A student learns where only the other one is confident, or where both are and the other at least as much.

    Args:
        clip_logits: (batch, classes, height, width) of the weak view.
        dinov3_logits: The same of the other student.
        threshold: Confidence from which a student may teach.
        mode: "paper" sends gradient into the student that learns; "reference" repeats the authors' code, whose loss
            has the same value and no gradient at all.

    Returns:
        Per student the squared differences, averaged over the classes, of the pixels that it learns, and their number.
    """
    probabilities = {"clip": clip_logits.float().softmax(dim=1), "dinov3": dinov3_logits.float().softmax(dim=1)}
    confidence = {name: p.detach().amax(dim=1) for name, p in probabilities.items()}
    losses = {}
    for name, teacher in (("clip", "dinov3"), ("dinov3", "clip")):
        learns = (confidence[teacher] >= threshold) & (
            (confidence[name] < threshold) | (confidence[teacher] >= confidence[name])
        )
        own = probabilities[name].detach() if mode == "reference" else probabilities[name]
        squared = (own - probabilities[teacher].detach()).square().mean(dim=1)
        losses[name] = Mean((squared * learns).sum(), learns.sum())
    return losses


class Co2SObjective(nn.Module):
    """A model with its losses. Wrap and call this one in distributed training: its forward is the whole step.

    Args:
        model: A [`Co2SForSemanticSegmentation`], bare or with adapters.
        students: Which students train. One alone has nobody to exchange with.
        threshold: Confidence from which pseudo-labels count and students teach (tau).
        strong_weight: Weight of each strong view's loss.
        feature_dropout_weight: Weight of the perturbed features' loss.
        feature_dropout: Probability that a feature channel is dropped.
        stability: "paper", "reference" (see [`stability_losses`]) or "off".
        confidence_mode: How pseudo-labels are weighted, see [`PseudoLabels.loss`].
        labeled_loss: "cross_entropy" or "ohem", see [`labeled_loss`].
        class_weights: (classes,), weights of the labelled pixels of each class.
        accelerator: Of a distributed run: losses are means over the pixels of all its processes.

    Raises:
        ValueError: A name or range does not fit.
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
        confidence_mode: str = "pixelwise",
        labeled_loss: str = "cross_entropy",
        class_weights: torch.Tensor | None = None,
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
        if class_weights is not None and tuple(class_weights.shape) != (model.config.num_labels,):
            raise ValueError(
                f"`class_weights` has the shape {tuple(class_weights.shape)}; {model.config.num_labels} classes ask "
                f"for ({model.config.num_labels},)."
            )
        self.model = model
        self.students = tuple(students)
        self.threshold = threshold
        self.strong_weight = strong_weight
        self.feature_dropout_weight = feature_dropout_weight
        self.feature_dropout = feature_dropout
        self.stability = stability
        self.confidence_mode = confidence_mode
        self.labeled_loss = labeled_loss
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.accelerator = accelerator

    def forward(self, views: Views, stability_weight: float = 0.0) -> dict[str, torch.Tensor]:
        """Compute every loss with one backbone pass per student.

        Args:
            views: One batch; without unlabelled images only `loss_supervised` is computed.
            stability_weight: lambda of this step, see [`stability_weight`].

        Returns:
            `loss` (the sum to minimise, with gradient) and, detached, for every student `<student>/loss_supervised`,
            `/loss_strong_1`, `/loss_strong_2`, `/loss_feature_dropout`, `/loss_stability`, `/loss`,
            `/confident_fraction` (of the pixels that show an image), `/coverage` (classes,) (the same by pseudo-label)
            and, where `views.hidden_labels` are given, `/known_fraction` and `/right_fraction`: the same of confident
            pixels whose class is known, and of those that have it; and `without_labels`, 1 for a batch whose labels
            are all ignored, else 0. The mean over the processes of any of them is its value for the global batch.
        """
        if views.weak is None:
            logits = self.model.student_logits(views.labeled, students=self.students)
            means = {name: {"loss_supervised": self._supervised(logits[name], views)} for name in self.students}
        else:
            means = self._semi_supervised(views)
        terms = self._divided(means)
        report = {f"{name}/{term}": value.detach() for name in terms for term, value in terms[name].items()}
        totals = {name: self._total(student_terms, stability_weight) for name, student_terms in terms.items()}
        report |= {f"{name}/loss": total.detach() for name, total in totals.items()}
        ignored = views.labels == self.model.config.semantic_loss_ignore_index
        return {"loss": sum(totals.values()), "without_labels": ignored.all().float(), **report}

    def _semi_supervised(self, views: Views) -> dict[str, dict[str, Mean]]:
        views = _with_partners(views)
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

        means, weak_logits = {}, {}
        for name in self.students:
            parts = logits[name].split([*sizes, sizes[1]])
            labeled, weak_logits[name], strong_1, strong_2, perturbed = *parts[:4], parts[-1]
            own = PseudoLabels.from_logits(weak_logits[name], views.padding)
            partner_logits = parts[4] if views.partner_order is None else weak_logits[name][views.partner_order]
            other = PseudoLabels.from_logits(partner_logits, views.partner_padding)
            mixed_1, mixed_2 = (own.mixed_with(other, boxes) for boxes in (views.cutmix_boxes_1, views.cutmix_boxes_2))
            means[name] = {
                "loss_supervised": self._supervised(labeled, views),
                "loss_strong_1": mixed_1.loss(strong_1, self.threshold, self.confidence_mode),
                "loss_strong_2": mixed_2.loss(strong_2, self.threshold, self.confidence_mode),
                "loss_feature_dropout": own.loss(perturbed, self.threshold, self.confidence_mode),
                **self._quality(own, views),
            }
        if self.stability != "off" and len(self.students) == 2:
            stability = stability_losses(weak_logits["clip"], weak_logits["dinov3"], self.threshold, self.stability)
            for name, mean in stability.items():
                means[name]["loss_stability"] = mean
        return means

    def _supervised(self, logits: torch.Tensor, views: Views) -> Mean:
        ignore_index = self.model.config.semantic_loss_ignore_index
        return labeled_loss(logits, views.labels, ignore_index, self.labeled_loss, self.class_weights)

    def _drop_channels(self, features: torch.Tensor) -> torch.Tensor:
        """Drop whole channels of feature maps (batch, channels, h, w), scaling the others up.

        Every process draws for the global batch and takes its own rows, so the number of processes changes nothing.
        """
        processes, rank = 1, 0
        if self.accelerator is not None:
            processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        batch_size, channels = features.shape[:2]
        draws = torch.rand(processes * batch_size, channels, 1, 1, device=features.device)
        kept = draws[rank * batch_size : (rank + 1) * batch_size] >= self.feature_dropout
        return features * kept / max(1 - self.feature_dropout, 1e-6)

    def _quality(self, own: PseudoLabels, views: Views) -> dict[str, Mean]:
        """What is measured, not trained on: how much of the images pseudo-labels cover, how often they are right."""
        confident = own.confident(self.threshold)
        pixels = (~own.padding).sum()
        coverage = torch.bincount(own.labels[confident], minlength=self.model.config.num_labels)
        quality = {"confident_fraction": Mean(confident.sum(), pixels), "coverage": Mean(coverage, pixels)}
        if views.hidden_labels is not None:
            known = confident & (views.hidden_labels != self.model.config.semantic_loss_ignore_index)
            right = known & (own.labels == views.hidden_labels)
            quality |= {"right_fraction": Mean(right.sum(), pixels), "known_fraction": Mean(known.sum(), pixels)}
        return quality

    def _divided(self, means: dict[str, dict[str, Mean]]) -> dict[str, dict[str, torch.Tensor]]:
        """Divide every sum by its number of pixels, averaged over the processes in one exchange."""
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
        total = 0.5 * total
        if "loss_stability" in terms:
            total = total + stability_weight * terms["loss_stability"]
        return total


def _with_partners(views: Views) -> Views:
    """Pair the images of a batch for CutMix, unless partners are given.

    Neighbours swap, so a batch split among processes pairs as it would whole. The last image of an odd batch takes
    the first; a batch of one has no other image, so nothing is pasted into it.
    """
    if views.partner_weak is not None:
        return views
    count = len(views.weak)
    order = [(index ^ 1) % count for index in range(count)]
    names = ("strong_1", "strong_2", "padding")
    return replace(views, partner_order=order, **{f"partner_{name}": getattr(views, name)[order] for name in names})
