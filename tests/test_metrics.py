import math

import pytest
import torch
from conftest import load_parity

from co2s_hf.metrics import ConfusionMatrix


def test_iou_is_the_authors():
    fixture = load_parity("metric")
    matrix = ConfusionMatrix(6)
    for prediction, label in zip(fixture["predictions"], fixture["labels"]):
        matrix.update(prediction, label)
    torch.testing.assert_close(100 * matrix.iou().nan_to_num().float(), fixture["iou"], atol=1e-4, rtol=0)
    assert 100 * matrix.mean_iou_paper() == pytest.approx(fixture["mean_iou"].item(), abs=1e-4)
    assert matrix.iou()[5].isnan()  # the class that never occurs: left out, not 0
    assert 100 * matrix.mean_iou() == pytest.approx(fixture["iou"][:5].mean().item(), abs=1e-4)


def test_counts_by_hand():
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([[0, 1, 1, 2]]), torch.tensor([[0, 1, 0, 255]]))
    assert matrix.counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert matrix.iou()[:2].tolist() == [0.5, 0.5] and matrix.accuracy() == pytest.approx(2 / 3)
    assert math.isnan(ConfusionMatrix(3).accuracy())


def test_wrong_values_are_named():
    matrix = ConfusionMatrix(3)
    with pytest.raises(ValueError, match=r"A label lies outside the 3 classes: values go from 0 to 7"):
        matrix.update(torch.tensor([0, 1]), torch.tensor([0, 7]))
    with pytest.raises(ValueError, match=r"A prediction lies outside"):
        matrix.update(torch.tensor([0, -1]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"\(2,\) and labels \(3,\)"):
        matrix.update(torch.zeros(2).long(), torch.zeros(3).long())
    assert matrix.counts.sum() == 0
