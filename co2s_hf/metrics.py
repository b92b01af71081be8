"""Segmentation metrics as a module of the evaluate library, offline.

    metric = SegmentationMetric(num_labels=6)              # or evaluate.load("co2s_hf/metrics.py", num_labels=6)
    metric.add_batch(predictions=maps, references=labels)  # as often as needed, on every process
    metric.compute()

Apart from confusion.py, which scripts import directly: examples/evaluate.py hides the library from its neighbours.
"""

import datasets
import evaluate
import numpy as np
import torch

from .confusion import ConfusionMatrix


class SegmentationMetric(evaluate.Metric):
    """IoU, F1 and accuracy as a module of the evaluate library, accumulated in a confusion matrix.

    Each process of a distributed evaluation adds its own images (none twice); `compute` sums over the processes.

    Args:
        num_labels: Number of classes.
        ignore_index: Label of pixels to leave out.
        kwargs: Of [`evaluate.Metric`].
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
        """Add one predicted label map and its labels, (height, width)."""
        self.matrix.update(torch.as_tensor(np.asarray(prediction)), torch.as_tensor(np.asarray(reference)))

    def add_batch(self, *, predictions, references):
        """Add predicted label maps and their labels, one (height, width) each."""
        for prediction, reference in zip(predictions, references, strict=True):
            self.add(prediction=prediction, reference=reference)

    def compute(self, *, predictions=None, references=None) -> dict[str, float | list[float]]:
        """Return the metrics of everything added since the last time, over all processes.

        Args:
            predictions: Label maps to add first.
            references: Their labels.

        Returns:
            `mean_iou`, `mean_iou_paper` (absent classes count as 0), `mean_f1`, `accuracy`, and per class `iou` and
            `f1` (NaN for absent ones); all 0..1.
        """
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        matrix = self.matrix.over_processes()
        self.matrix = ConfusionMatrix(matrix.num_labels, matrix.ignore_index)
        return {
            "mean_iou": matrix.mean_iou(),
            "mean_iou_paper": matrix.mean_iou_paper(),
            "mean_f1": matrix.mean_f1(),
            "accuracy": matrix.accuracy(),
            "iou": matrix.iou().tolist(),
            "f1": matrix.f1().tolist(),
        }
