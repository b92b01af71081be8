"""The handler of Inference Endpoints, as it is copied beside a saved model."""

import base64
import io

import numpy as np
import pytest
import torch
from helpers import make_model, save_checkpoint
from isolation import make_environment, run_isolated
from PIL import Image

from co2s_hf import Co2SImageProcessor
from co2s_hf.hub.publishing import add_handler
from co2s_hf.model.handler import MAX_BYTES, EndpointHandler


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("endpoint") / "model"
    save_checkpoint(folder, seed=3)
    add_handler(folder)
    return folder


@pytest.fixture(scope="module")
def handler(folder):
    return EndpointHandler(str(folder))


@pytest.fixture
def image():
    return Image.fromarray((255 * np.random.default_rng(0).random((30, 44, 3))).astype(np.uint8))


def png(image, kind="PNG"):
    stream = io.BytesIO()
    image.save(stream, format=kind)
    return stream.getvalue()


def decode_masks(segments):
    return {part["label"]: np.asarray(Image.open(io.BytesIO(base64.b64decode(part["mask"])))) for part in segments}


def test_masks_and_scores_are_those_of_the_model(handler, image):
    segments = handler({"inputs": png(image)})
    model = make_model(seed=3)
    with torch.no_grad():
        logits = model(**Co2SImageProcessor.from_model_config(model.config)(image, return_tensors="pt")).logits[0]
    probabilities, labels = logits.softmax(dim=0).max(dim=0)
    scores = {n: probabilities[labels == n].mean().item() for n in labels.unique().tolist()}
    assert [part["label"] for part in segments] == [model.config.id2label[n] for n in scores]
    assert [part["score"] for part in segments] == pytest.approx(list(scores.values()), rel=1e-5)
    labels = labels.numpy()
    for label, mask in decode_masks(segments).items():
        np.testing.assert_array_equal(mask, 255 * (labels == model.config.label2id[label]))


def test_every_kind_of_input_gives_the_same_result(handler, image):
    expected = handler({"inputs": image})
    text = base64.b64encode(png(image)).decode()
    lines = "\n".join(text[n : n + 76] for n in range(0, len(text), 76))
    for inputs in (png(image), text, lines, f"data:image/png;base64,{text}", png(image.convert("RGBA"))):
        assert handler({"inputs": inputs}) == expected


def test_classes_below_the_threshold_are_left_out(handler, image):
    scores = [part["score"] for part in handler({"inputs": image})]
    highest = handler({"inputs": image, "parameters": {"threshold": max(scores)}})
    assert [part["score"] for part in highest] == [max(scores)]


def test_the_parameters_of_the_hub_are_accepted(handler, image):
    expected = handler({"inputs": image})
    parameters = {"subtask": "semantic", "mask_threshold": 0.9, "overlap_mask_area_threshold": 0, "threshold": None}
    assert handler({"inputs": image, "parameters": parameters}) == expected
    assert handler({"inputs": image, "parameters": None}) == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, r"`inputs` is missing"),
        ({"inputs": "no base64!"}, r"not base64"),
        ({"inputs": b"no image"}, r"cannot be read as an image"),
        ({"inputs": 7}, r"`inputs` is int"),
        ({"inputs": bytes(MAX_BYTES + 1)}, r"at most 20000000 are accepted"),
        ({"inputs": png(Image.new("L", (5000, 5000)))}, r"5000x5000 pixels; at most 4194304"),
        ({"inputs": png(Image.new("I;16", (4, 4)))}, r"more than 8 bits"),
        ({"inputs": png(Image.effect_noise((64, 64), 9))[:-1000]}, r"damaged"),
        ({"inputs": png(Image.effect_noise((64, 64), 9), "JPEG")[:200]}, r"cannot be read|damaged"),
        ({"inputs": Image.new("RGB", (8, 8)), "parameters": {"size": 3}}, r"`parameters` is \{'size': 3\}"),
        ({"inputs": Image.new("RGB", (8, 8)), "parameters": {"threshold": "0.5"}}, r"a number from 0 to 1"),
        ({"inputs": Image.new("RGB", (8, 8)), "parameters": {"threshold": True}}, r"`threshold` is True; expected"),
        (
            {"inputs": Image.new("RGB", (8, 8)), "parameters": {"mask_threshold": 2}},
            r"`mask_threshold` is 2; expected",
        ),
        (
            {"inputs": Image.new("RGB", (8, 8)), "parameters": {"overlap_mask_area_threshold": float("nan")}},
            r"`overlap_mask_area_threshold` is nan; expected a number from 0 to 1",
        ),
        ({"inputs": Image.new("RGB", (8, 8)), "parameters": {"subtask": "panoptic"}}, r"`subtask` is 'panoptic'"),
        ({"inputs": Image.new("RGB", (8, 8)), "parameters": [1]}, r"`parameters` is \[1\]"),
    ],
)
def test_errors_explain_what_is_wrong_with_a_request(handler, data, message):
    with pytest.raises(ValueError, match=message):
        handler(data)


def test_the_handler_needs_only_transformers_torch_and_pillow(folder, tmp_path, image, handler):
    image.save(tmp_path / "image.png")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from handler import EndpointHandler\n"
        "parts = EndpointHandler(sys.argv[1])({'inputs': open(sys.argv[2], 'rb').read()})\n"
        "print([(part['label'], len(part['mask'])) for part in parts], sorted(parts[0]))"
    )
    environment = make_environment(tmp_path / "bare" / "packages")
    done = run_isolated(environment, code, folder, tmp_path / "image.png")
    assert done.returncode == 0, done.stderr[-3000:]
    expected = handler({"inputs": image})
    assert f"{[(part['label'], len(part['mask'])) for part in expected]} ['label', 'mask', 'score']" in done.stdout
