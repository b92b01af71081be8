import math
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from helpers import load_parity

from co2s_hf.training.confusion import ConfusionMatrix


METRICS = Path(__file__).parents[2] / "co2s_hf" / "training" / "metrics.py"


def test_iou_is_the_authors():
    fixture = load_parity("metric")
    matrix = ConfusionMatrix(6)
    for prediction, label in zip(fixture["predictions"], fixture["labels"]):
        matrix.update(prediction, label)
    torch.testing.assert_close(100 * matrix.iou().nan_to_num().float(), fixture["iou"], atol=1e-4, rtol=0)
    assert 100 * matrix.mean_iou_paper() == pytest.approx(fixture["mean_iou"].item(), abs=1e-4)
    assert matrix.iou()[5].isnan()  # the class that occurs nowhere is left out
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


def test_f1_by_hand():
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]))
    assert matrix.f1()[:2].tolist() == pytest.approx([2 / 3, 2 / 3]) and matrix.f1()[2].isnan()
    assert matrix.mean_f1() == pytest.approx(2 / 3)


def test_the_evaluate_library_loads_the_metric_from_its_file(tmp_path):
    metric = evaluate.load(str(METRICS), num_labels=6, cache_dir=str(tmp_path))
    fixture = load_parity("metric")
    for prediction, label in zip(fixture["predictions"], fixture["labels"]):
        metric.add(prediction=prediction, reference=label)
    results = metric.compute()
    assert results["mean_iou_paper"] == pytest.approx(fixture["mean_iou"].item() / 100, abs=1e-6)
    # The next call starts from zero. Maps of different sizes, arrays and lists may be mixed.
    results = metric.compute(
        predictions=[np.array([[0, 1]]), [[1], [1]]], references=[np.array([[0, 255]]), [[1], [0]]]
    )
    assert results["accuracy"] == pytest.approx(2 / 3) and results["iou"][:2] == [0.5, 0.5]
    assert math.isnan(results["iou"][2])
