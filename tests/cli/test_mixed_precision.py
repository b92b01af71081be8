"""`--mixed_precision bf16` is the same computation in scenes, images, evaluations and example pictures."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import torch
from accelerate import Accelerator
from helpers import PLACE, forget_accelerator, make_model, open_folder, read_metrics, run_command, save_checkpoint
from PIL import Image

from co2s_hf import Co2SImageProcessor
from co2s_hf.cli import model_folders
from co2s_hf.inference.images import predict_logits
from co2s_hf.training.evaluation import predict_examples
from co2s_hf.utils import devices


SIZE = (48, 64)
OTHER_DEVICE = "meta"  # a device of PyTorch that every machine has, in the place of a GPU


@pytest.fixture(autouse=True)
def processor_with_bfloat16(monkeypatch):
    monkeypatch.setattr(devices, "has_bfloat16_instructions", lambda: True)
    forget_accelerator()
    yield
    forget_accelerator()


def best_classes(model, pixel_values) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels and the confidence of the fused prediction, both (height, width)."""
    confidence, labels = predict_logits(model, pixel_values, 64, SIZE)["fused"].softmax(0).max(0)
    return labels.numpy().astype("uint8"), confidence.numpy()


@pytest.fixture
def expected(tmp_path):
    """The labels and the confidence of a model with autocast, for an image in data/ and scene.tif.

    The labels are also the label map of the image.
    """
    model = save_checkpoint(tmp_path / "model", crop_size=64)
    image, *others = np.random.default_rng(0).integers(1, 256, (3, *SIZE, 3), dtype="uint8")
    processor = Co2SImageProcessor.from_model_config(model.config)
    pixel_values = processor(image, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    with torch.autocast("cpu", torch.bfloat16):
        labels, confidence = best_classes(model, pixel_values)
    for other in (best_classes(model, pixel_values), best_classes(make_model(crop_size=64).bfloat16(), pixel_values)):
        assert 0.001 < (other[0] != labels).mean() < 0.2  # float32 and weights in bfloat16 are other computations
    data = tmp_path / "data"
    for name in ("images", "labels", "splits"):
        (data / name).mkdir(parents=True)
    for name, split, pixels in zip("abc", ("val", "labeled", "unlabeled"), (image, *others)):
        Image.fromarray(pixels).save(data / "images" / f"{name}.png")
        Image.fromarray(labels).save(data / "labels" / f"{name}.png")
        (data / "splits" / f"{split}.txt").write_text(f"images/{name}.png labels/{name}.png\n", encoding="utf-8")
    classes = [{"name": name} for name in model.config.id2label.values()]
    (data / "classes.json").write_text(json.dumps(classes), encoding="utf-8")
    place = {"driver": "GTiff", "count": 3, "height": SIZE[0], "width": SIZE[1], "dtype": "uint8", **PLACE}
    with rasterio.open(tmp_path / "scene.tif", "w", **place) as raster:
        raster.write(np.moveaxis(image, -1, 0))
    return labels, confidence


def run(command, tmp_path, *words):
    done = run_command(command, *words, "--checkpoint", tmp_path / "model", "--use_cpu", "--mixed_precision", "bf16")
    assert done.returncode == 0, done.stderr


def test_the_map_of_a_scene_is_that_of_autocast(expected, tmp_path):
    output = ("--output", tmp_path / "map.tif", "--save_confidence", "--score_dtype", "float32")
    run("predict", tmp_path, tmp_path / "scene.tif", *output)
    with rasterio.open(tmp_path / "map.tif") as labels, rasterio.open(tmp_path / "map_confidence.tif") as confidence:
        assert np.array_equal(labels.read(1), expected[0])
        np.testing.assert_allclose(confidence.read(1), expected[1], rtol=1e-5)


def test_the_label_map_of_an_image_is_that_of_autocast(expected, tmp_path):
    words = ("--images", tmp_path / "data" / "images" / "a.png", "--output_dir", tmp_path / "out", "--save_confidence")
    run("predict", tmp_path, *words)
    kinds = ("labels", "confidence")
    labels, confidence = (np.asarray(Image.open(tmp_path / "out" / kind / "a.png")) for kind in kinds)
    assert np.array_equal(labels, expected[0])
    assert np.array_equal(confidence, (255 * expected[1]).round())


def test_an_evaluation_measures_the_predictions_of_autocast(expected, tmp_path):
    run("evaluate", tmp_path, "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "out")
    assert read_metrics(tmp_path / "out")["fused"]["accuracy"] == 1


def test_example_pictures_show_the_predictions_of_autocast(expected, tmp_path):
    model = make_model(crop_size=64)
    processor, data = Co2SImageProcessor.from_model_config(model.config), open_folder(tmp_path / "data")
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    example = predict_examples(model, processor, data.validation, 64, accelerator)[0]
    assert np.array_equal(example.maps["fused"], expected[0])
    np.testing.assert_allclose(example.confidence, expected[1], rtol=1e-5)


def test_the_images_of_a_model_card_are_predicted_on_the_device_of_the_training(expected, tmp_path, monkeypatch):
    """The values of the device "meta" cannot be drawn, so the prediction is replaced by a record of its device."""
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", OTHER_DEVICE)
    accelerator, found = Accelerator(), []

    def predict(model, image_processor, samples, crop_size, given):
        found.append((model.device.type, len(samples), crop_size, given))
        return []

    monkeypatch.setattr(model_folders, "predict_examples", predict)
    monkeypatch.setattr(model_folders, "draw_predictions", lambda *_: None)
    data = SimpleNamespace(validation=open_folder(tmp_path / "data").validation, palette=None, id2label={})
    trained = SimpleNamespace(data=data, evaluation=SimpleNamespace(crop_size=64))
    model_folders._add_samples(tmp_path / "model", trained, 1, accelerator)
    assert found == [(OTHER_DEVICE, 1, 64, accelerator)]
