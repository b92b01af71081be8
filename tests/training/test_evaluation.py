import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers import make_model, open_folder
from PIL import Image

from co2s_hf import Co2SImageProcessor
from co2s_hf.data.options import DataOptions
from co2s_hf.training.confusion import ConfusionMatrix
from co2s_hf.training.evaluation import (
    Evaluation,
    Scores,
    confusion_matrices,
    evaluate,
    largest_class_mean_iou,
    predictors,
)
from co2s_hf.utils.errors import UserError


ID2LABEL = {0: "land", 1: "road", 2: "water"}


@pytest.fixture
def matrix():
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([0, 0, 1, 0]), torch.tensor([0, 0, 1, 1]))
    return matrix


@pytest.fixture
def evaluation(matrix):
    return Evaluation(
        data="fields",
        dataset_id=None,
        data_hash="0123456789ab",
        num_images=4,
        crop_size=32,
        fusion="confidence",
        flip=False,
        scores={"fused": Scores.from_confusion(matrix, ID2LABEL)},
        largest_class_mean_iou=0.25,
        step=7,
        confusion=matrix,
    )


def test_predictors_follow_the_fusion():
    assert predictors(make_model().config) == ("clip", "dinov3", "fused")
    assert predictors(make_model(fusion="clip").config) == ("clip", "fused")


def test_every_pixel_is_counted_once(scenes_folder):
    data = open_folder(scenes_folder)
    model = make_model(id2label=data.id2label, palette=data.palette).train()
    processor = Co2SImageProcessor.from_model_config(model.config)
    accelerator = Accelerator(cpu=True)
    matrices = confusion_matrices(model, processor, data.validation, crop_size=32, accelerator=accelerator)
    assert model.training and set(matrices) == {"clip", "dinov3", "fused"}
    for matrix in matrices.values():
        assert matrix.counts.sum() == 2 * 48 * 48
    truth = torch.zeros(6, dtype=torch.int64)
    for sample in data.validation:
        labels = processor(sample.load_image(), sample.load_label(), return_tensors="pt")["labels"]
        truth += torch.bincount(labels.flatten(), minlength=6)
    assert torch.equal(matrices["clip"].counts.sum(1), truth)

    found = evaluate(model, processor, data, DataOptions(data_dir=str(scenes_folder)), 32, accelerator, step=3)
    assert torch.equal(found.confusion.counts, matrices["fused"].counts)
    assert found.scores["clip"] == Scores.from_confusion(matrices["clip"], data.id2label)
    assert (found.data, found.num_images, found.step, found.data_hash) == (scenes_folder.name, 2, 3, data.hash)


def test_each_process_reads_its_own_samples_alone(scenes_folder):
    data = open_folder(scenes_folder)
    samples = [*data.labeled, *data.validation]
    model = make_model(id2label=data.id2label, palette=data.palette)
    processor, read = Co2SImageProcessor.from_model_config(model.config), []

    class Recorded(list):
        """Samples that record which of them are read. A row of a data set contains the bytes of its files."""

        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

        def __iter__(self):
            return (self[index] for index in range(len(self)))

    for rank, expected in ((0, [0, 2, 4]), (1, [1, 3])):
        process = SimpleNamespace(num_processes=2, process_index=rank, is_main_process=False, autocast=nullcontext)
        matrices = confusion_matrices(model, processor, Recorded(samples), 32, process)
        own = confusion_matrices(model, processor, samples[rank::2], 32, Accelerator(cpu=True))
        assert torch.equal(matrices["fused"].counts, own["fused"].counts) and read == expected
        read.clear()


def test_scores_by_hand(matrix):
    scores = Scores.from_confusion(matrix, ID2LABEL)
    assert scores.iou == {"land": pytest.approx(2 / 3), "road": 0.5, "water": None}
    assert scores.f1 == {"land": pytest.approx(0.8), "road": pytest.approx(2 / 3), "water": None}
    assert scores.accuracy == 0.75 and scores.mean_iou == pytest.approx(7 / 12)
    assert scores.mean_iou_paper == pytest.approx(7 / 18) and scores.mean_f1 == pytest.approx(22 / 30)
    assert largest_class_mean_iou(matrix) == pytest.approx(0.25)


def test_the_table_shows_absent_classes_as_such(evaluation):
    assert evaluation.table().splitlines() == [
        "                             fused",
        "land                          66.7",
        "road                          50.0",
        "water                            -",
        "mean IoU                      58.3",
        "mean (paper's convention)     38.9",
        "mean F1                       73.3",
        "pixel accuracy                75.0",
    ]


def test_json_gives_the_same_evaluation(evaluation, tmp_path):
    text = json.dumps(evaluation.to_dict(), allow_nan=False)
    assert "confusion" not in text and "checkpoint" not in text
    (tmp_path / "metrics.json").write_text(text)
    assert Evaluation.read(tmp_path / "metrics.json") == evaluation
    best = replace(evaluation, is_best=True, checkpoint="user/name")
    assert Evaluation.from_dict(json.loads(json.dumps(best.to_dict()))) == best


class PartlyLabeled:
    """A sample whose label map has eight rows without a class."""

    def __init__(self, sample):
        self.sample = sample

    def load_image(self):
        return self.sample.load_image()

    def load_label(self):
        labels = np.array(self.sample.load_label())
        labels[:8] = 255
        return Image.fromarray(labels)


def test_the_label_that_the_model_ignores_does_not_change_its_evaluation(scenes_folder):
    data, accelerator = open_folder(scenes_folder), Accelerator(cpu=True)
    found = []
    for ignore_index in (255, -100, 100):
        model = make_model(id2label=data.id2label, palette=None, semantic_loss_ignore_index=ignore_index)
        processor = Co2SImageProcessor.from_model_config(model.config)
        found.append(confusion_matrices(model, processor, [PartlyLabeled(data.validation[0])], 32, accelerator))
    assert found[0]["fused"].counts.sum() == 48 * 40
    for matrices in found[1:]:
        assert all(torch.equal(matrices[name].counts, found[0][name].counts) for name in found[0])


@pytest.mark.parametrize("names", [["roof", "lawn", "lake"], ["land", "water", "road"], ["land", "road"]])
def test_a_model_is_not_evaluated_on_other_classes(scenes_folder, names):
    """Also if only the order differs: the labels would be counted as the wrong classes."""
    data = replace(open_folder(scenes_folder), id2label=dict(enumerate(names)))
    model = make_model()
    processor = Co2SImageProcessor.from_model_config(model.config)
    message = f"The model predicts land, road, water, but the data is labelled with {', '.join(names)}"
    with pytest.raises(UserError, match=message):
        evaluate(model, processor, data, DataOptions(data_dir=str(scenes_folder)), 16, Accelerator(cpu=True))


def test_the_table_shows_every_name_in_one_line(evaluation, matrix):
    scores = Scores.from_confusion(matrix, {0: "bare\nsoil", 1: "\x1b[31mroad", 2: "x" * 100})
    lines = replace(evaluation, scores={"fused": scores}).table().splitlines()
    assert [line[:40].strip() for line in lines[1:4]] == ["bare soil", "[31mroad", "x" * 26 + "…" + "x" * 13]
