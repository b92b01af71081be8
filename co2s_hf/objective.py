"""The training objective: from one batch of views to named losses.

Both students learn from labels, from their own confident pseudo-labels on strong views and on perturbed features
(UniMatch, arXiv 2208.09910), and from each other where one is surer (the paper's global-local collaborative fusion).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .modeling_co2s import STUDENTS, Co2SForSemanticSegmentation, semantic_cross_entropy
from .views import Views, cutmix


STABILITY_PEAK, STABILITY_RAMP = 0.5, 0.2
STABILITY_MODES = ("paper", "reference", "off")


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

    def loss(self, logits: torch.Tensor, threshold: float) -> torch.Tensor:
        """Cross-entropy where confident, divided by the number of all pixels that show an image.

        Dividing by all, not by the confident ones, lets the term grow as the student becomes sure.
        """
        counted = ~self.padding
        kept = (self.confidence >= threshold) & counted
        per_pixel = F.cross_entropy(logits.float(), self.labels, reduction="none")
        return (per_pixel * kept).sum() / counted.sum().clamp(min=1)


def stability_weight(step: int, total_steps: int) -> float:
    """Weight of the stability loss: 0 to 0.5 along half a cosine over the first fifth of the steps, then 0.5.

    Args:
        step: Steps done, from 0.
        total_steps: Length of the whole training.
    """
    ramp = round(STABILITY_RAMP * total_steps)
    if step >= ramp - 1:
        return STABILITY_PEAK
    return STABILITY_PEAK * 0.5 * (1 - math.cos(math.pi * step / (ramp - 1)))


def stability_losses(
    clip_logits: torch.Tensor, dinov3_logits: torch.Tensor, threshold: float, mode: str = "paper"
) -> dict[str, torch.Tensor]:
    """Let the less confident student learn the other's class probabilities, pixel by pixel.

    A student learns where only the other one is confident, or where both are and the other at least as much.

    Args:
        clip_logits: (batch, classes, height, width) of the weak view.
        dinov3_logits: The same of the other student.
        threshold: Confidence from which a student may teach.
        mode: "paper" sends gradient into the student that learns; "reference" repeats the authors' code, whose loss
            has the same value and no gradient at all.

    Returns:
        Per student the mean squared difference over its pixels and the classes, 0 if it has none to learn.
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
        losses[name] = (squared * learns).sum() / learns.sum().clamp(min=1)
    return losses


@dataclass
class _Partner:
    """What is pasted into the strong views: other images' strong views, and where those show nothing."""

    strong_1: torch.Tensor
    strong_2: torch.Tensor
    padding: torch.Tensor


class Co2SObjective(nn.Module):
    """A model with its losses. Wrap and call this one in distributed training: its forward is the whole step.

    Args:
        model: A [`Co2SForSemanticSegmentation`], bare or with adapters.
        threshold: Confidence from which pseudo-labels count and students teach (tau).
        strong_weight: Weight of each strong view's loss.
        feature_dropout_weight: Weight of the perturbed features' loss.
        feature_dropout: Probability that a feature channel is dropped.
        stability: "paper", "reference" (see [`stability_losses`]) or "off".

    Raises:
        ValueError: A name or range does not fit.
    """

    def __init__(
        self,
        model: Co2SForSemanticSegmentation,
        threshold: float = 0.95,
        strong_weight: float = 0.25,
        feature_dropout_weight: float = 0.5,
        feature_dropout: float = 0.5,
        stability: str = "paper",
    ):
        super().__init__()
        if not 0 <= threshold <= 1:
            raise ValueError(f"`threshold` is {threshold}; a probability lies between 0 and 1.")
        if stability not in STABILITY_MODES:
            raise ValueError(f"`stability` is '{stability}'; choose one of {', '.join(STABILITY_MODES)}.")
        self.model = model
        self.threshold = threshold
        self.strong_weight = strong_weight
        self.feature_dropout_weight = feature_dropout_weight
        self.feature_dropout = feature_dropout
        self.stability = stability

    def forward(self, views: Views, stability_weight: float = 0.0) -> dict[str, torch.Tensor]:
        """Compute every loss with one backbone pass per student.

        Args:
            views: One batch; without unlabelled images only `loss_supervised` is computed.
            stability_weight: lambda of this step, see [`stability_weight`].

        Returns:
            `loss` (the sum to minimise, with gradient) and, detached, `<student>/loss_supervised`,
            `/loss_strong_1`, `/loss_strong_2`, `/loss_feature_dropout`, `/loss_stability`, `/loss` and
            `/confident_fraction` (of the pixels that show an image).
        """
        if views.weak is None:
            logits = self.model.student_logits(views.labeled)
            losses = {name: {"loss_supervised": self._supervised(logits[name], views)} for name in STUDENTS}
            totals = {name: 0.5 * terms["loss_supervised"] for name, terms in losses.items()}
            return self._report(losses, totals)

        partner = self._partner(views)
        images = [
            views.labeled,
            views.weak,
            cutmix(views.strong_1, partner.strong_1, views.cutmix_boxes_1),
            cutmix(views.strong_2, partner.strong_2, views.cutmix_boxes_2),
        ]
        if views.partner_weak is not None:
            images.append(views.partner_weak)
        sizes = [len(part) for part in images]
        weak_samples = slice(sizes[0], sizes[0] + sizes[1])
        logits = self.model.student_logits(
            torch.cat(images), dropout_samples=weak_samples, dropout_probability=self.feature_dropout
        )

        losses, weak_logits = {}, {}
        for name in STUDENTS:
            parts = logits[name].split([*sizes, sizes[1]])
            labeled, weak_logits[name], strong_1, strong_2, perturbed = *parts[:4], parts[-1]
            own = PseudoLabels.from_logits(weak_logits[name], views.padding)
            partner_logits = weak_logits[name].roll(-1, dims=0) if views.partner_weak is None else parts[4]
            other = PseudoLabels.from_logits(partner_logits, partner.padding)
            confident = (own.confidence >= self.threshold) & ~own.padding
            losses[name] = {
                "loss_supervised": self._supervised(labeled, views),
                "loss_strong_1": own.mixed_with(other, views.cutmix_boxes_1).loss(strong_1, self.threshold),
                "loss_strong_2": own.mixed_with(other, views.cutmix_boxes_2).loss(strong_2, self.threshold),
                "loss_feature_dropout": own.loss(perturbed, self.threshold),
                "confident_fraction": confident.sum() / (~own.padding).sum().clamp(min=1),
            }
        if self.stability == "off":
            stability = {name: logits[name].new_zeros(()) for name in STUDENTS}
        else:
            stability = stability_losses(weak_logits["clip"], weak_logits["dinov3"], self.threshold, self.stability)

        totals = {}
        for name, terms in losses.items():
            terms["loss_stability"] = stability[name]
            strong = self.strong_weight * (terms["loss_strong_1"] + terms["loss_strong_2"])
            perturbed = self.feature_dropout_weight * terms["loss_feature_dropout"]
            totals[name] = 0.5 * (terms["loss_supervised"] + strong + perturbed)
            totals[name] = totals[name] + stability_weight * terms["loss_stability"]
        return self._report(losses, totals)

    def _supervised(self, logits: torch.Tensor, views: Views) -> torch.Tensor:
        return semantic_cross_entropy(logits, views.labels, self.model.config.semantic_loss_ignore_index)

    @staticmethod
    def _partner(views: Views) -> _Partner:
        if views.partner_weak is not None:
            return _Partner(views.partner_strong_1, views.partner_strong_2, views.partner_padding)
        # The next image of the batch; a batch of one has no other image, so nothing is pasted into it.
        return _Partner(*(tensor.roll(-1, dims=0) for tensor in (views.strong_1, views.strong_2, views.padding)))

    @staticmethod
    def _report(
        losses: dict[str, dict[str, torch.Tensor]], totals: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        report = {f"{name}/{term}": value.detach() for name, terms in losses.items() for term, value in terms.items()}
        report |= {f"{name}/loss": total.detach() for name, total in totals.items()}
        return {"loss": sum(totals.values()), **report}
