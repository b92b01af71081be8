"""The image processor: values, labels, label maps, refused inputs; and the pipeline within this package."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import make_config
from PIL import Image
from transformers import AutoImageProcessor, pipeline
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from co2s_hf import Co2SImageProcessor, Co2SImageSegmentationPipeline


RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, size=(5, 7, 3), dtype=np.uint8)
EXPECTED = ((PIXELS / 255 - np.array(IMAGENET_DEFAULT_MEAN)) / np.array(IMAGENET_DEFAULT_STD)).transpose(2, 0, 1)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(PIXELS),
        PIXELS,
        PIXELS.transpose(2, 0, 1),
        PIXELS.astype(np.float32),
        torch.from_numpy(PIXELS).permute(2, 0, 1),
        [Image.fromarray(PIXELS)],
        torch.from_numpy(PIXELS)[None],
        torch.from_numpy(PIXELS).bfloat16(),  # holds 0..255 exactly
        (PIXELS,),
    ],
    ids=["pil", "last", "first", "float", "tensor", "list", "batch", "bfloat16", "tuple"],
)
def test_every_kind_of_image_gives_the_same_values(image):
    pixel_values = Co2SImageProcessor()(image, return_tensors="pt")["pixel_values"]
    assert pixel_values.dtype == torch.float32
    np.testing.assert_allclose(pixel_values.numpy(), EXPECTED[None], atol=1e-5)


@pytest.mark.parametrize("gray", [PIXELS[..., 0], Image.fromarray(PIXELS[..., 0]), PIXELS[..., :1]])
def test_grey_images_are_repeated_for_three_bands(gray):
    processor = Co2SImageProcessor(do_normalize=False)
    expected = np.repeat(PIXELS[None, None, ..., 0] / 255, 3, axis=1)
    np.testing.assert_allclose(processor(gray, return_tensors="np")["pixel_values"], expected, atol=1e-6)


def test_segmentation_maps_become_labels_and_can_be_reduced():
    labels = np.array([[0, 1, 2], [255, 6, 1]], dtype=np.uint8)
    image = np.zeros((2, 3, 3), dtype=np.uint8)
    palette_map = Image.fromarray(labels)
    palette_map.putpalette([value for n in range(256) for value in (n, 255 - n, 0)])
    for map_ in (labels, palette_map, torch.from_numpy(labels), [labels]):
        batch = Co2SImageProcessor()(image, map_, return_tensors="pt")
        assert batch["labels"].dtype == torch.int64 and batch["labels"].tolist() == [labels.tolist()]
    reduced = Co2SImageProcessor(do_reduce_labels=True)(image, labels, return_tensors="pt")["labels"]
    assert reduced.tolist() == [[[255, 0, 1], [255, 5, 0]]]


def test_labels_of_any_integer_value_are_kept():
    labels = np.array([[0, 1], [300, -100]])
    image = np.zeros((2, 2, 3), dtype=np.uint8)
    resized = Co2SImageProcessor(do_resize=True, size={"height": 4, "width": 4})(image, labels, return_tensors="np")
    assert resized["labels"].tolist() == [np.kron(labels, np.ones((2, 2), dtype=int)).tolist()]
    reduced = Co2SImageProcessor(do_reduce_labels=True)(image, labels, return_tensors="np")
    assert reduced["labels"].tolist() == [[[255, 0], [299, -100]]]
    mask = np.array([[True, False], [False, True]])
    assert Co2SImageProcessor()(image, mask, return_tensors="np")["labels"].tolist() == [[[1, 0], [0, 1]]]


def test_bands_are_found_in_images_of_few_rows():
    for height in (1, 2, 4):
        pixels = RNG.integers(0, 256, size=(height, 6, 3), dtype=np.uint8)
        from_array = Co2SImageProcessor()(pixels, return_tensors="np")["pixel_values"]
        from_pil = Co2SImageProcessor()(Image.fromarray(pixels), return_tensors="np")["pixel_values"]
        assert np.array_equal(from_array, from_pil)


def test_unsupported_settings_are_refused():
    for setting in ({"do_pad": True}, {"do_center_crop": True}, {"data_format": "channels_last"}):
        with pytest.raises(ValueError, match="is not supported"):
            Co2SImageProcessor()(PIXELS, **setting, crop_size=4)
    with pytest.raises(ValueError, match="NaN or infinite"):
        Co2SImageProcessor(do_rescale=False)(NAN_IMAGE / 255)
    converted = Co2SImageProcessor(do_convert_rgb=True)(Image.fromarray(PIXELS).convert("RGBA"), return_tensors="np")
    np.testing.assert_allclose(converted["pixel_values"], EXPECTED[None], atol=1e-5)


def test_images_are_resized_bilinearly_and_maps_to_the_nearest_label():
    labels = np.kron(np.array([[0, 3], [255, 1]], dtype=np.uint8), np.ones((4, 4), dtype=np.uint8))
    image = np.stack([labels] * 3, axis=-1)
    processor = Co2SImageProcessor()
    assert processor(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 8, 8)  # not resized by default
    settings = {"do_normalize": False, "do_resize": True, "size": {"height": 4, "width": 6}}
    batch = processor(image, labels, **settings, return_tensors="pt")
    expected = Image.fromarray(labels).resize((6, 4), Image.Resampling.BILINEAR)
    expected = np.broadcast_to(np.asarray(expected) / 255, (1, 3, 4, 6))
    np.testing.assert_allclose(batch["pixel_values"].numpy(), expected, atol=1e-6)
    corners = batch["pixel_values"][0, 0, [0, 0, -1, -1], [0, -1, 0, -1]] * 255
    assert corners.round().tolist() == [0, 3, 255, 1]
    assert batch["labels"].tolist() == [[[0] * 3 + [3] * 3] * 2 + [[255] * 3 + [1] * 3] * 2]


def test_settings_survive_a_round_trip(tmp_path):
    processor = Co2SImageProcessor.from_model_config(
        make_config(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]), do_reduce_labels=True
    )
    processor.save_pretrained(tmp_path)
    expected = processor(PIXELS, return_tensors="pt")["pixel_values"]
    for loader in (Co2SImageProcessor, AutoImageProcessor):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is Co2SImageProcessor and loaded.do_reduce_labels
        assert list(loaded.image_mean) == [0.1, 0.2, 0.3] and list(loaded.image_std) == [0.4, 0.5, 0.6]
        assert torch.equal(loaded(PIXELS, return_tensors="pt")["pixel_values"], expected)


def test_label_maps_and_scores_from_logits():
    logits = torch.tensor([[[0.0, 2.0], [0.0, 0.0]], [[1.0, 0.0], [-1.0, 3.0]]]).unsqueeze(0)  # (1, 2 classes, 2, 2)
    outputs = SimpleNamespace(logits=logits)
    processor = Co2SImageProcessor()
    assert processor.post_process_semantic_segmentation(outputs)[0].tolist() == [[1, 0], [0, 1]]
    result = processor.post_process_semantic_segmentation(outputs, [(4, 6)], return_segmentation_scores=True)[0]
    assert result.segmentation.shape == (4, 6)
    assert result.segmentation[[0, -1]].tolist() == [[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]
    torch.testing.assert_close(result.segmentation_scores.sum(0), torch.ones(4, 6))
    torch.testing.assert_close(result.segmentation_scores[:, 0, 0], logits[0, :, 0, 0].softmax(0))
    with pytest.raises(ValueError, match="2 target sizes were given for a batch of 1"):
        processor.post_process_semantic_segmentation(outputs, [(4, 6), (4, 6)])


def test_pipeline_returns_the_masks_of_the_label_map(model, tmp_path, caplog):
    model.save_pretrained(tmp_path)
    processor = Co2SImageProcessor.from_model_config(model.config)
    processor.save_pretrained(tmp_path)
    segments = pipeline("image-segmentation", model=str(tmp_path))(Image.fromarray(PIXELS))
    assert "not supported" not in caplog.text
    with torch.no_grad():
        labels = model(**processor(PIXELS, return_tensors="pt")).logits[0].argmax(dim=0).numpy()
    assert [segment["label"] for segment in segments] == [model.config.id2label[n] for n in np.unique(labels)]
    for segment in segments:
        expected = 255 * (labels == model.config.label2id[segment["label"]])
        np.testing.assert_array_equal(np.asarray(segment["mask"]), expected)


def test_the_statistics_of_a_call_set_the_number_of_bands():
    bands = RNG.integers(0, 256, size=(5, 7, 4), dtype=np.uint8)
    mean, std = [0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]
    expected = ((bands / 255 - np.array(mean)) / np.array(std)).transpose(2, 0, 1)
    for image in (bands, bands.transpose(2, 0, 1)):
        found = Co2SImageProcessor()(image, image_mean=mean, image_std=std, return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(found, expected[None], atol=1e-5)
    found = Co2SImageProcessor()(bands / 255, image_mean=mean, image_std=std, do_rescale=False)["pixel_values"]
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"shape \(5, 7, 3\), which has neither 4 bands"):
        Co2SImageProcessor()(PIXELS, image_mean=mean, image_std=std)
    found = Co2SImageProcessor()(PIXELS, image_mean=0.5, image_std=0.25, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(found[0], (PIXELS.transpose(2, 0, 1) / 255 - 0.5) / 0.25, atol=1e-5)


WRONG_STATISTICS = [
    ({"image_std": [0.2, 0.0, 0.2]}, "`image_std` is"),
    ({"image_std": 0.0}, "`image_std` is 0.0; expected finite numbers above 0, one per band"),
    ({"image_std": [0.2, float("nan"), 0.2]}, "`image_std` is"),
    ({"image_std": [0.2, 0.2, float("inf")]}, "`image_std` is"),
    ({"image_std": [0.2, -0.2, 0.2]}, "`image_std` is"),
    ({"image_std": []}, "`image_std` is"),
    ({"image_std": [0.2, 0.2]}, "`image_mean` has 3 values and `image_std` has 2"),
    ({"image_mean": [0.5, 0.5, float("nan")]}, "`image_mean` is"),
    ({"image_mean": [0.5, 0.5]}, "`image_mean` has 2 values and `image_std` has 3"),
    ({"rescale_factor": 0.0}, "`rescale_factor` is 0.0; expected a finite number above 0"),
    ({"rescale_factor": float("nan")}, "`rescale_factor` is nan"),
    ({"do_resize": True}, "`size` is {}; with `do_resize`, expected"),
    ({"do_resize": True, "size": {"shortest_edge": 0}}, "`size` is {'shortest_edge': 0}; with `do_resize`, expected"),
    ({"do_resize": True, "size": {"height": 9, "width": -1}}, "`size` is {'height': 9, 'width': -1}; with"),
    ({"do_resize": True, "size": {"shortest_edge": 2**20}}, "`size` is {'shortest_edge': 1048576}; with"),
    ({"do_resize": True, "size": {"shortest_edge": 9}, "resample": 99}, "`resample` is 99; expected one of [0, "),
]


@pytest.mark.parametrize(("settings", "message"), WRONG_STATISTICS)
def test_statistics_that_give_every_image_the_same_values_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        Co2SImageProcessor(**settings)
    with pytest.raises(ValueError, match=re.escape(message)):
        Co2SImageProcessor()(PIXELS, **settings)
    Co2SImageProcessor().save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | settings), encoding="utf-8")
    for loader in (Co2SImageProcessor, AutoImageProcessor):
        with pytest.raises(ValueError, match=re.escape(message)):
            loader.from_pretrained(tmp_path)


def test_statistics_that_are_no_numbers_are_refused(tmp_path):
    Co2SImageProcessor().save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    for value in (["a", "b", "c"], "0.5", [True, True, True], {"red": 1}):
        path.write_text(json.dumps({"image_std": value}), encoding="utf-8")
        with pytest.raises(ValueError, match=r"`image_std` is .* expected finite numbers above 0"):
            Co2SImageProcessor.from_pretrained(tmp_path)


def test_the_pipeline_accepts_the_parameters_of_the_hub(model):
    """As in transformers, the thresholds of overlapping masks have no effect on semantic segmentation."""
    processor = Co2SImageProcessor.from_model_config(model.config)
    segment = Co2SImageSegmentationPipeline(model=model, image_processor=processor)
    image = Image.fromarray(PIXELS)
    expected = segment(image)
    assert expected and all(0 < part["score"] <= 1 for part in expected)
    assert segment(image, subtask="semantic", mask_threshold=0.9, overlap_mask_area_threshold=0.1) == expected
    highest = max(part["score"] for part in expected)
    assert [part["score"] for part in segment(image, threshold=highest, mask_threshold=0.5)] == [highest]


NAN_IMAGE = PIXELS.astype(np.float32)
NAN_IMAGE[1, 2, 0] = np.nan


@pytest.mark.parametrize(
    ("image", "maps", "message"),
    [
        (PIXELS.astype(np.uint16) * 40, None, "Image 0 is 16-bit (uint16"),
        (Image.fromarray(PIXELS[..., 0].astype(np.uint16)), None, "Image 0 has the PIL mode 'I;16'"),
        (np.zeros((5, 7, 4), dtype=np.uint8), None, "shape (5, 7, 4), which has neither 3 bands nor 1 at either end"),
        (np.zeros((4, 5, 7), dtype=np.uint8), None, "shape (4, 5, 7), which has neither 3 bands nor 1 at either end"),
        ([], None, "No image was given"),
        (Image.new("RGBA", (7, 5)), None, "PIL mode 'RGBA'; expected 8-bit RGB"),
        (NAN_IMAGE, None, "Image 0 contains 1 NaN or infinite values"),
        (PIXELS.astype(np.float32) - 300, None, "expected 0 to 255"),
        (np.zeros((0, 7, 3), dtype=np.uint8), None, "expected (height, width, channels) with no size of 0"),
        ([PIXELS, PIXELS[:4]], None, "Images of different sizes (height, width) [(4, 7), (5, 7)]"),
        (PIXELS, PIXELS[:4, :, 0], "Segmentation map 0 is 4x7 (height x width), but its image is 5x7"),
        (PIXELS, np.zeros((5, 7)), "the type float64; expected integer class indices"),
        (PIXELS, Image.fromarray(PIXELS), "Turn colours into class indices first"),
        (PIXELS, [PIXELS[..., 0]] * 2, "There are 1 images and 2 segmentation maps"),
    ],
)
def test_errors_name_the_input_and_the_remedy(image, maps, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Co2SImageProcessor()(image, maps, return_tensors="pt")
