"""Fixtures for the tests of cards and publishing."""

from collections.abc import Callable

import pytest

from co2s_hf.training.evaluation import Evaluation, Scores


@pytest.fixture
def make_evaluation() -> Callable[..., Evaluation]:
    """A function that makes an [`Evaluation`] of three classes with known scores."""

    def scores(iou: float) -> Scores:
        per_class = {"land": iou, "road": None, "water": 0.25}
        return Scores(iou, iou / 2, mean_f1=0.6, accuracy=0.75, iou=per_class, f1=per_class)

    def make(data: str = "fields", fused: float = 0.5, **changes) -> Evaluation:
        facts = {"data": data, "dataset_id": None, "data_hash": "abc123", "num_images": 7, "crop_size": 64}
        facts |= {"fusion": "confidence", "flip": False, "largest_class_mean_iou": 0.125}
        facts |= {"scores": {"clip": scores(0.4), "dinov3": scores(0.45), "fused": scores(fused)}}
        return Evaluation(**facts | changes)

    return make
