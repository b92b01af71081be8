"""A saved model works without this package.

Some tests run in a separate environment that has only torch, transformers, Pillow and their requirements.
"""

import json
import logging

import numpy as np
import pytest
import torch
from helpers import make_model
from isolation import make_environment, run_isolated
from PIL import Image
from safetensors.torch import load_file
from transformers import pipeline

from co2s_hf import Co2SImageProcessor, Co2SImageSegmentationPipeline


LOAD_AND_RUN = """
import importlib.util, json, sys
from pathlib import Path

assert all(importlib.util.find_spec(name) is None for name in ("co2s_hf", "accelerate", "peft", "kornia", "datasets"))
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline

path, folder = sys.argv[1], Path(sys.argv[2])
model = AutoModelForSemanticSegmentation.from_pretrained(path, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=True)
image = Image.open(folder / "image.png")
with torch.no_grad():
    logits = model(**processor(image, return_tensors="pt")).logits
save_file({"logits": logits}, folder / "logits.safetensors")
segment = pipeline("image-segmentation", model=path, trust_remote_code=True)
print("TASK", pipeline(model=path, trust_remote_code=True).task)
segments = segment(str(folder / "image.png"))
for part in segments:
    part["mask"].save(folder / f"{part['label']}.png")
print("SCORES", json.dumps({part["label"]: part["score"] for part in segments}))
if len(sys.argv) > 3:
    with torch.no_grad():
        model.dinov3.guidance.queries += 0.5
    model.save_pretrained(sys.argv[3])
    processor.save_pretrained(sys.argv[3])
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return make_environment(tmp_path_factory.mktemp("bare") / "packages")


@pytest.fixture
def image():
    return Image.fromarray((255 * np.random.default_rng(0).random((50, 70, 3))).astype(np.uint8))


@pytest.fixture
def saved(tmp_path, image):
    """Save a model and its processor in `tmp_path / "model"`, an image beside it, and return the model, loaded."""
    model = make_model(seed=3, clip_temperature=0.5, dinov3_temperature=2.0)
    with torch.no_grad():  # spreads the classes: each gets some pixels
        model.clip.decoder.head.bias += 1
    model.save_pretrained(tmp_path / "model")
    Co2SImageProcessor.from_model_config(model.config).save_pretrained(tmp_path / "model")
    image.save(tmp_path / "image.png")
    # Loaded weights are not aligned in memory as fresh ones are, which changes the last bits of the logits.
    return type(model).from_pretrained(tmp_path / "model")


def printed(done, key):
    assert done.returncode == 0, done.stderr[-3000:]
    return next(line.removeprefix(f"{key} ") for line in done.stdout.splitlines() if line.startswith(key))


def expected_logits(model, image):
    with torch.no_grad():
        return model(**Co2SImageProcessor.from_model_config(model.config)(image, return_tensors="pt")).logits


def test_model_processor_and_pipeline_give_the_same_values_without_the_package(saved, environment, tmp_path, image):
    done = run_isolated(environment, LOAD_AND_RUN, tmp_path / "model", tmp_path)
    assert printed(done, "TASK") == "image-segmentation"
    assert "not supported" not in done.stderr
    logits = expected_logits(saved, image)
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], logits)
    confidence, labels = logits[0].softmax(dim=0).max(dim=0)
    scores = json.loads(printed(done, "SCORES"))
    assert list(scores) == [saved.config.id2label[index] for index in labels.unique().tolist()]
    for index in labels.unique().tolist():
        label = saved.config.id2label[index]
        mask = np.asarray(Image.open(tmp_path / f"{label}.png"))
        np.testing.assert_array_equal(mask, 255 * (labels == index).numpy())
        assert scores[label] == pytest.approx(confidence[labels == index].mean().item(), rel=1e-5)


def test_model_can_be_changed_and_saved_again_without_the_package(saved, environment, tmp_path, image):
    first = run_isolated(environment, LOAD_AND_RUN, tmp_path / "model", tmp_path, tmp_path / "again")
    assert first.returncode == 0, first.stderr[-3000:]
    second = run_isolated(environment, LOAD_AND_RUN, tmp_path / "again", tmp_path)
    assert "SCORES" in second.stdout, second.stderr[-3000:]
    with torch.no_grad():
        saved.dinov3.guidance.queries += 0.5
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], expected_logits(saved, image))
    reloaded = type(saved).from_pretrained(tmp_path / "again")  # with this package again
    assert torch.equal(reloaded.dinov3.guidance.queries, saved.dinov3.guidance.queries)


def test_pipeline_needs_no_trust_remote_code_with_the_package(saved, tmp_path, image, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # so that caplog gets its warnings
    segment = pipeline("image-segmentation", model=str(tmp_path / "model"))
    assert type(segment.model) is type(saved)
    segments = segment(image)
    labels = expected_logits(saved, image)[0].argmax(dim=0)
    assert [part["label"] for part in segments] == [saved.config.id2label[n] for n in labels.unique().tolist()]
    for part in segments:
        expected = 255 * (labels == saved.config.label2id[part["label"]]).numpy()
        np.testing.assert_array_equal(np.asarray(part["mask"]), expected)
    assert not caplog.records


def test_pipeline_class_of_the_package_returns_scores(saved, tmp_path, image):
    path = str(tmp_path / "model")
    segment = pipeline("image-segmentation", model=path, pipeline_class=Co2SImageSegmentationPipeline)
    segments = segment(image)
    confidence, labels = expected_logits(saved, image)[0].softmax(dim=0).max(dim=0)
    expected = [confidence[labels == index].mean().item() for index in labels.unique().tolist()]
    assert [part["score"] for part in segments] == pytest.approx(expected, rel=1e-5)
    middle = sum(expected) / len(expected)
    assert [part["score"] for part in segment(image, threshold=middle)] == pytest.approx(
        [score for score in expected if score >= middle], rel=1e-5
    )
    with pytest.raises(ValueError, match=r"`subtask` is 'panoptic'.*use 'semantic'"):
        segment(image, subtask="panoptic")


CHANGE_CLASSES = """
import sys
from transformers import AutoModelForSemanticSegmentation

model = AutoModelForSemanticSegmentation.from_pretrained(sys.argv[1], trust_remote_code=True)
model.set_class_concepts({"roof": ["roof"], "water": ["water"]})
"""


def test_changing_classes_without_the_package_names_the_package(environment, tmp_path):
    make_model(text_encoder="co2s-tiny-clip").save_pretrained(tmp_path / "model")
    done = run_isolated(environment, CHANGE_CLASSES, tmp_path / "model")
    assert done.returncode == 1
    expected = "OSError: 'co2s-tiny-clip' ships with the package co2s_hf, which is not installed here: pip install"
    assert expected in done.stderr
