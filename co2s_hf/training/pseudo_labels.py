"""Pseudo-labels of the unlabelled images, and the cross-entropy against them (UniMatch, arXiv 2208.09910)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..data.views import cutmix


CONFIDENCE_MODES = ("pixelwise", "pixelratio", "pixelavg")


class Mean(NamedTuple):
    """The numerator and the denominator of a mean.

    Args:
        total: Sum over pixels: a scalar, or (classes,).
        count: Number of pixels to divide by.
    """

    total: torch.Tensor
    count: torch.Tensor


def of_each_pixel(threshold: float | torch.Tensor, labels: torch.Tensor) -> float | torch.Tensor:
    """Return the threshold of every pixel: that of its class, or the one threshold of all classes.

    Args:
        threshold: One value, or one per class, (classes,).
        labels: (batch, height, width), class indices.
    """
    return threshold[labels] if isinstance(threshold, torch.Tensor) else threshold


@dataclass
class PseudoLabels:
    """Pseudo-labels of a batch of weak views from one student: class, confidence and padding mask per pixel.

    Args:
        labels: (batch, height, width), class indices.
        confidence: (batch, height, width), probability of that class, 0 to 1.
        padding: Boolean (batch, height, width), true outside the image.
    """

    labels: torch.Tensor
    confidence: torch.Tensor
    padding: torch.Tensor

    @classmethod
    def from_logits(cls, logits: torch.Tensor, padding: torch.Tensor) -> "PseudoLabels":
        """Take the most probable class of every pixel. No gradients flow.

        Args:
            logits: (batch, classes, height, width).
            padding: Boolean (batch, height, width).
        """
        confidence, labels = logits.detach().float().softmax(dim=1).max(dim=1)
        return cls(labels, confidence, padding)

    def mixed_with(self, partner: "PseudoLabels", boxes: torch.Tensor) -> "PseudoLabels":
        """Mix with the pseudo-labels of the partner images, as CutMix mixed the images.

        Args:
            partner: Pseudo-labels of the pasted images.
            boxes: Boolean (batch, height, width), true where the partner is pasted.
        """
        return PseudoLabels(
            cutmix(self.labels, partner.labels, boxes),
            cutmix(self.confidence, partner.confidence, boxes),
            cutmix(self.padding, partner.padding, boxes),
        )

    def confident(self, threshold: float | torch.Tensor) -> torch.Tensor:
        """Return a boolean mask (batch, height, width): image pixels with at least this confidence.

        Args:
            threshold: One value, 0 to 1, or one per class, (classes,).
        """
        return (self.confidence >= of_each_pixel(threshold, self.labels)) & ~self.padding

    def loss(self, logits: torch.Tensor, threshold: float | torch.Tensor, mode: str = "pixelwise") -> Mean:
        """Compute the cross-entropy against these labels, weighted by confidence, over all image pixels.

        The sum is divided by the number of all image pixels, not of the confident ones. Therefore the loss grows with
        the share of confident pixels.

        Args:
            logits: (batch, classes, height, width), of a strong view or of perturbed features.
            threshold: Lowest confidence of a confident pixel, 0 to 1: one value, or one per class, (classes,).
            mode: Weights of the pixels. "pixelwise": 1 for confident pixels, else 0 (the paper). "pixelratio": the
                share of confident pixels in the image. "pixelavg": the mean confidence of the image.

        Returns:
            Weighted sum over pixels, with gradients to `logits`, and the number of image pixels.
        """
        counted = ~self.padding
        if mode == "pixelwise":
            weights = self.confident(threshold).float()
        else:
            pixels = self.confident(threshold).float() if mode == "pixelratio" else self.confidence * counted
            share = pixels.sum(dim=(1, 2)) / counted.sum(dim=(1, 2)).clamp(min=1)
            weights = share[:, None, None] * counted
        per_pixel = F.cross_entropy(logits.float(), self.labels, reduction="none")
        return Mean((per_pixel * weights).sum(), counted.sum())


__all__ = ["CONFIDENCE_MODES", "Mean", "PseudoLabels", "of_each_pixel"]
