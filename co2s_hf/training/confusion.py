"""The confusion matrix, from which all segmentation scores are computed."""

import torch
from accelerate import PartialState
from accelerate.utils import reduce


# Method of ConfusionMatrix -> title of the metric. All tables, cards and metrics use this dictionary.
METRICS = {
    "mean_iou": "mean IoU",
    "mean_iou_paper": "mean IoU (paper's convention: absent classes count as 0)",
    "mean_f1": "mean F1",
    "accuracy": "pixel accuracy",
}


class ConfusionMatrix:
    """Number of pixels of each true class (row) and predicted class (column). Ignored pixels are not counted.

    Args:
        num_labels: Number of classes.
        ignore_index: Label of pixels to leave out.
    """

    def __init__(self, num_labels: int, ignore_index: int = 255):
        self.num_labels, self.ignore_index = num_labels, ignore_index
        self.counts = torch.zeros(num_labels, num_labels, dtype=torch.int64)

    def update(self, predictions: torch.Tensor, labels: torch.Tensor):
        """Count the pixels of label maps.

        Args:
            predictions: Predicted class indices, any shape.
            labels: True class indices or `ignore_index`, same shape.

        Raises:
            ValueError: The shapes differ, or a value is not a class.
        """
        if predictions.shape != labels.shape:
            raise ValueError(
                f"Predictions have the shape {tuple(predictions.shape)} and labels {tuple(labels.shape)}; they must "
                "be the same."
            )
        kept = labels != self.ignore_index
        labels, predictions = labels[kept].long(), predictions[kept].long()
        for name, values in (("label", labels), ("prediction", predictions)):
            if values.numel() and not 0 <= values.min() <= values.max() < self.num_labels:
                raise ValueError(
                    f"A {name} lies outside the {self.num_labels} classes: values go from {values.min()} to "
                    f"{values.max()}, expected 0 to {self.num_labels - 1} (or {self.ignore_index} in labels)."
                )
        pairs = torch.bincount(labels * self.num_labels + predictions, minlength=self.num_labels**2)
        self.counts += pairs.view(self.num_labels, self.num_labels).to(self.counts.device)

    def over_processes(self) -> "ConfusionMatrix":
        """Return the sum of the counts of all processes. Every process must call this."""
        matrix = ConfusionMatrix(self.num_labels, self.ignore_index)
        matrix.counts = self.counts
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            matrix.counts = reduce(self.counts.to(PartialState().device), reduction="sum").cpu()
        return matrix

    def iou(self) -> torch.Tensor:
        """Return the intersection over union (classes,), 0 to 1; NaN for a class that occurs nowhere."""
        intersection = self.counts.diag().double()
        return intersection / (self.counts.sum(dim=0) + self.counts.sum(dim=1) - self.counts.diag())

    def mean_iou(self) -> float:
        """Return the mean IoU over the classes that occur in labels or predictions."""
        return self.iou().nanmean().item()

    def mean_iou_paper(self) -> float:
        """Return the mean IoU over all classes; a class that occurs nowhere counts as 0 (the paper's convention)."""
        return self.iou().nan_to_num(nan=0.0).mean().item()

    def accuracy(self) -> float:
        """Return the share of pixels with the right prediction, 0 to 1; NaN without pixels."""
        return (self.counts.diag().sum() / self.counts.sum()).item()

    def f1(self) -> torch.Tensor:
        """Return the F1 score (Dice) (classes,), 0 to 1; NaN for a class that occurs nowhere."""
        return 2 * self.counts.diag().double() / (self.counts.sum(dim=0) + self.counts.sum(dim=1))

    def mean_f1(self) -> float:
        """Return the mean F1 over the classes that occur in labels or predictions."""
        return self.f1().nanmean().item()


__all__ = ["METRICS", "ConfusionMatrix"]
