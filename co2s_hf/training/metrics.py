"""Segmentation metrics as a module of the evaluate library. It loads without network access.

    metric = evaluate.load("co2s_hf/training/metrics.py", num_labels=6)  # or SegmentationMetric(num_labels=6)
    metric.add_batch(predictions=maps, references=labels)  # as often as needed, on every process
    metric.compute()

This module is separate from confusion.py, so that a training does not import the evaluate library. In a script of
examples/, `import evaluate` would import examples/evaluate.py.
"""

import datasets
import evaluate
import numpy as np
import torch

from .confusion import METRICS, ConfusionMatrix


class SegmentationMetric(evaluate.Metric):
    """IoU, F1 and accuracy of semantic segmentation, accumulated in a confusion matrix.

    In a distributed evaluation each process adds its own images, and `compute` sums over the processes.

    Args:
        num_labels: Number of classes.
        ignore_index: Label of pixels to leave out.
        kwargs: Further arguments of [`evaluate.Metric`].
    """

    def __init__(self, num_labels: int, ignore_index: int = 255, **kwargs):
        super().__init__(**kwargs)
        self.matrix = ConfusionMatrix(num_labels, ignore_index)

    def _info(self) -> evaluate.MetricInfo:
        label_map = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description="Mean IoU, F1 and accuracy of semantic segmentation from a confusion matrix.",
            citation="",
            inputs_description="predictions, references: integer label maps (height, width), of any sizes.",
            features=datasets.Features({"predictions": label_map, "references": label_map}),
        )

    def add(self, *, prediction, reference):
        """Add one predicted label map and its true labels, both (height, width)."""
        self.matrix.update(torch.as_tensor(np.asarray(prediction)), torch.as_tensor(np.asarray(reference)))

    def add_batch(self, *, predictions, references):
        """Add several predicted label maps and their true labels, each (height, width)."""
        for prediction, reference in zip(predictions, references, strict=True):
            self.add(prediction=prediction, reference=reference)

    def compute(self, *, predictions=None, references=None) -> dict[str, float | list[float]]:
        """Compute the metrics of all label maps added since the last call, over all processes.

        Args:
            predictions: Further predicted label maps to add first, each (height, width).
            references: True label maps of `predictions`.

        Returns:
            `mean_iou`, `mean_iou_paper` (absent classes count as 0), `mean_f1`, `accuracy`, and per class `iou` and
            `f1` (NaN for absent classes); all 0 to 1.
        """
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        matrix = self.matrix.over_processes()
        self.matrix = ConfusionMatrix(matrix.num_labels, matrix.ignore_index)
        means = {name: getattr(matrix, name)() for name in METRICS}
        return means | {"iou": matrix.iou().tolist(), "f1": matrix.f1().tolist()}
