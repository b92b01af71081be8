"""transformers' auto classes and `pipeline` with this package imported."""

import numpy as np
import pytest
import torch
from helpers import save_checkpoint
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    ImageSegmentationPipeline,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
    pipeline,
)

from co2s_hf import Co2SConfig, Co2SForSemanticSegmentation, Co2SImageProcessor, Co2SImageSegmentationPipeline


@pytest.fixture
def questions(monkeypatch):
    """The questions that a test asks on the terminal. transformers hides the error of a closed input."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "n")
    return asked


@pytest.fixture
def image():
    return Image.fromarray((255 * np.random.default_rng(0).random((50, 70, 3))).astype(np.uint8))


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}, {"trust_remote_code": False}])
def test_the_pipeline_returns_scores_and_asks_nothing(trust, questions, tmp_path, image):
    model = save_checkpoint(tmp_path / "model", seed=3)
    segment = pipeline("image-segmentation", model=str(tmp_path / "model"), **trust)
    assert type(segment) is Co2SImageSegmentationPipeline and type(segment.model) is Co2SForSemanticSegmentation
    segments = segment(image)
    pixel_values = Co2SImageProcessor.from_model_config(model.config)(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        confidence, labels = model(pixel_values).logits[0].softmax(dim=0).max(dim=0)
    present = labels.unique().tolist()
    assert [part["label"] for part in segments] == [model.config.id2label[index] for index in present]
    for part, index in zip(segments, present):
        assert part["score"] == pytest.approx(confidence[labels == index].mean().item(), rel=1e-5)
        np.testing.assert_array_equal(np.asarray(part["mask"]), 255 * (labels == index).numpy())
    assert questions == []


def test_the_pipeline_takes_a_loaded_model(model, questions, image):
    processor = Co2SImageProcessor.from_model_config(model.config)
    segment = pipeline("image-segmentation", model=model, image_processor=processor)
    assert all(0 < part["score"] <= 1 for part in segment(image)) and questions == []


def test_auto_classes_use_the_code_of_the_package(questions, tmp_path):
    save_checkpoint(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is Co2SConfig
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is Co2SImageProcessor
    assert type(AutoModelForSemanticSegmentation.from_pretrained(tmp_path)) is Co2SForSemanticSegmentation
    assert questions == []


def test_other_models_get_the_pipeline_of_transformers(image):
    config = SegformerConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], decoder_hidden_size=8, num_labels=3)
    segment = pipeline(
        "image-segmentation", model=SegformerForSemanticSegmentation(config), image_processor=SegformerImageProcessor()
    )
    assert type(segment) is ImageSegmentationPipeline
    assert {part["score"] for part in segment(image)} == {None}
