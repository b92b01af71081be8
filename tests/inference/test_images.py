import numpy as np
import pytest
import torch
from helpers import PLACE, save_checkpoint, write_raster
from PIL import Image

from co2s_hf import Co2SImageProcessor
from co2s_hf.inference.images import (
    load_for_prediction,
    load_model,
    predict_logits,
    prediction_pictures,
    segment_image,
    window_side,
)
from co2s_hf.inference.windows import sliding_window_logits
from co2s_hf.model.modeling_co2s import fuse_logits
from co2s_hf.utils.errors import UserFileNotFoundError, UserOSError, UserValueError


def test_a_trained_model_is_loaded_with_its_image_processor_and_crop_size(tmp_path):
    saved = save_checkpoint(tmp_path / "model", crop_size=16)
    model, image_processor, crop_size = load_for_prediction(str(tmp_path / "model"))
    assert crop_size == 16 and not model.training and model.config.fusion == saved.config.fusion
    assert image_processor.image_mean == saved.config.image_mean
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in model.state_dict().items())
    model, _, crop_size = load_for_prediction(str(tmp_path / "model"), fusion="clip", crop_size=32)
    assert crop_size == 32 and model.config.fusion == "clip"
    eager, _ = load_model(str(tmp_path / "model"), attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"


def test_a_wrong_checkpoint_is_named(tmp_path, hub):
    save_checkpoint(tmp_path / "model")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    for name in (str(tmp_path / "missing"), "user/missing", str(tmp_path / "other"), str(tmp_path / "damaged")):
        with pytest.raises(
            UserOSError, match=f"`checkpoint` is '{name}', which cannot be loaded; expected the folder"
        ):
            load_for_prediction(name)
    with pytest.raises(
        UserValueError, match=r"model has no `crop_size` in its .*side of the windows: `crop_size=512`"
    ):
        load_for_prediction(str(tmp_path / "model"))


def test_windows_have_the_side_of_the_training_crops(model):
    with pytest.raises(UserValueError, match="The model has no `crop_size`"):
        window_side(model, None)
    assert window_side(model, 24) == 24
    model.config.crop_size = 48
    assert window_side(model, None) == 48 and window_side(model, 24) == 24


def test_segment_image_returns_the_fused_prediction(model):
    image_processor = Co2SImageProcessor.from_model_config(model.config)
    image = np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)
    found = segment_image(model, image_processor, Image.fromarray(image), crop_size=16)
    pixel_values = image_processor(image, return_tensors="pt")["pixel_values"]
    logits = sliding_window_logits(model, pixel_values, 16, blend="smooth")
    expected = fuse_logits(logits["clip"], logits["dinov3"])[0].softmax(dim=0).numpy()
    assert np.array_equal(found.probabilities, expected) and np.array_equal(found.labels, expected.argmax(axis=0))
    assert np.array_equal(found.confidence, expected.max(axis=0)) and found.labels.dtype == np.uint8
    halved = Co2SImageProcessor.from_model_config(model.config, do_resize=True, size={"height": 15, "width": 20})
    assert segment_image(model, halved, image, crop_size=16).labels.shape == (30, 41)
    thin = image[:3]  # an image of three rows, not of three bands
    assert np.array_equal(
        segment_image(model, image_processor, thin, crop_size=16).probabilities,
        segment_image(model, image_processor, Image.fromarray(thin), crop_size=16).probabilities,
    )
    with pytest.raises(UserValueError, match="has no `crop_size`"):
        segment_image(model, image_processor, image)
    with pytest.raises(ValueError, match=r"shape \(3, 30, 41\); expected \(height, width, 3\)"):
        segment_image(model, image_processor, np.moveaxis(image, -1, 0), crop_size=16)


def test_segment_image_reads_a_file_as_the_training_images_were_read(model, tmp_path):
    image_processor = Co2SImageProcessor.from_model_config(model.config)
    image = np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    expected = segment_image(model, image_processor, image, crop_size=16).probabilities
    for path in (tmp_path / "image.png", str(tmp_path / "image.png")):
        assert np.array_equal(segment_image(model, image_processor, path, crop_size=16).probabilities, expected)
    sixteen = np.moveaxis(image[..., [2, 0, 1]], -1, 0).astype(np.uint16) * 10
    write_raster(tmp_path / "image.tif", sixteen, **PLACE)
    model.config.image_bands, model.config.image_scale = [2, 3, 1], [[0, 2550]]
    found = segment_image(model, image_processor, tmp_path / "image.tif", crop_size=16)
    assert np.array_equal(found.probabilities, expected)
    with pytest.raises(UserFileNotFoundError, match=r"`image` is 'image.jpg', and there is no such file"):
        segment_image(model, image_processor, "image.jpg", crop_size=16)


@pytest.mark.parametrize(
    ("image", "kind", "message"),
    [
        (torch.zeros(3, 20, 20), TypeError, r"type Tensor; expected a PIL image, an array \(height, width, 3\)"),
        (None, TypeError, r"type NoneType; expected a PIL image"),
        (np.zeros((2, 20, 20, 3), np.uint8), ValueError, r"shape \(2, 20, 20, 3\); expected \(height, width, 3\)"),
        (np.zeros(20, np.uint8), ValueError, r"shape \(20,\); expected \(height, width, 3\)"),
        (np.zeros((0, 20, 3), np.uint8), ValueError, r"shape \(0, 20, 3\); expected \(height, width, 3\)"),
        (np.full((20, 20, 3), "a"), ValueError, r"data type <U1; expected numbers from 0 to 255"),
        (np.zeros((20, 20), complex), ValueError, r"data type complex128; expected numbers from 0 to 255"),
    ],
)
def test_segment_image_names_what_it_expects(image, kind, message, model):
    image_processor = Co2SImageProcessor.from_model_config(model.config)
    with pytest.raises(kind, match=message):
        segment_image(model, image_processor, image, crop_size=16)


def test_predicted_logits_of_the_students_and_of_their_fusion(model):
    image = torch.randn(1, 3, 20, 28)
    found = predict_logits(model, image, crop_size=16, size=(20, 28))
    windows = sliding_window_logits(model, image, crop_size=16)
    assert list(found) == ["clip", "dinov3", "fused"]
    assert torch.equal(found["clip"], windows["clip"][0]) and torch.equal(found["dinov3"], windows["dinov3"][0])
    assert torch.equal(found["fused"], fuse_logits(windows["clip"], windows["dinov3"])[0])
    # The corners of a resized map are the corners of the map.
    small = predict_logits(model, image, crop_size=16, size=(10, 14))["clip"]
    torch.testing.assert_close(small[:, [0, 0, -1], [0, -1, -1]], windows["clip"][0][:, [0, 0, -1], [0, -1, -1]])


def test_predictions_are_divided_by_the_temperatures(model):
    image = torch.randn(1, 3, 20, 28)
    windows = sliding_window_logits(model, image, crop_size=16)
    model.config.clip_temperature, model.config.dinov3_temperature = 0.5, 2.0
    again = sliding_window_logits(model, image, crop_size=16)
    assert torch.equal(again["clip"], windows["clip"]) and torch.equal(again["dinov3"], windows["dinov3"])
    found = predict_logits(model, image, crop_size=16, size=(20, 28))
    clip, dinov3 = windows["clip"] / 0.5, windows["dinov3"] / 2
    assert torch.equal(found["clip"], clip[0]) and torch.equal(found["dinov3"], dinov3[0])
    assert torch.equal(found["fused"], fuse_logits(clip, dinov3)[0])
    # Of one window, the model itself gives the same.
    with torch.no_grad():
        whole = model(image[..., :16, :16]).logits
    torch.testing.assert_close(predict_logits(model, image[..., :16, :16], 16, (16, 16))["fused"], whole[0])


def test_flip_averages_the_image_and_its_mirror_image(model):
    image = torch.randn(1, 3, 16, 16)
    plain, mirrored = (model.student_logits(x)["clip"].detach() for x in (image, image.flip(-1)))
    found = predict_logits(model, image, crop_size=16, size=(16, 16), flip=True)
    torch.testing.assert_close(found["clip"], ((plain + mirrored.flip(-1)) / 2)[0])


def test_if_the_fusion_is_one_student_only_that_student_is_computed(model):
    image = torch.randn(1, 3, 16, 16)
    both = predict_logits(model, image, crop_size=16, size=(16, 16))
    model.config.fusion = "dinov3"
    alone = predict_logits(model, image, crop_size=16, size=(16, 16))
    assert list(alone) == ["dinov3", "fused"] and torch.equal(alone["fused"], both["dinov3"])


def test_pictures_of_a_prediction_have_the_colours_of_the_classes_and_the_confidence():
    palette = np.array([[200, 0, 0], [0, 0, 200]], dtype=np.uint8)
    probabilities = torch.tensor([[[0.9, 0.4]], [[0.1, 0.6]]])  # (classes, 1, 2)
    found = prediction_pictures(Image.new("RGB", (2, 1), (100, 100, 100)), probabilities.log(), palette, opacity=0.25)
    assert list(found) == ["labels", "overlay", "confidence"]
    assert found["labels"].mode == "P" and np.asarray(found["labels"]).tolist() == [[0, 1]]
    assert np.asarray(found["labels"].convert("RGB")).tolist() == [[[200, 0, 0], [0, 0, 200]]]
    assert np.asarray(found["overlay"]).tolist() == [[[125, 75, 75], [75, 75, 125]]]
    assert found["confidence"].mode == "L" and np.asarray(found["confidence"]).tolist() == [[230, 153]]
