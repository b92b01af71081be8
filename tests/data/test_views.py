import colorsys

import numpy as np
import torch
from kornia.color import rgb_to_grayscale
from PIL import Image

from co2s_hf.data.views import (
    NO_BLUR_SIGMA_PX,
    Geometry,
    cutmix,
    draw_appearance,
    draw_cutmix_box,
    normalize,
    strong_view,
)
from co2s_hf.utils.seeding import random_generator


def coordinates_image(width, height):
    """An image with the column as red and the row as green, and a mask with the column as label."""
    columns, rows = np.meshgrid(np.arange(width, dtype=np.uint8), np.arange(height, dtype=np.uint8))
    image = np.stack([columns, rows, np.full_like(rows, 200)], axis=-1)
    return Image.fromarray(image), Image.fromarray(columns)


def test_image_mask_and_padding_have_the_same_geometry():
    image, mask = coordinates_image(width=90, height=60)
    counts = {"flip": 0, "padding": 0, "enlarged": 0}
    for index in range(40):
        rng = random_generator(0, 0, index)
        wanted = rng.uniform(0.5, 2)
        geometry = Geometry.draw(rng, image.size, crop_size=64, scale=wanted)
        crop = geometry.apply(image, 0, Image.Resampling.BILINEAR).astype(int)
        labels = geometry.apply(mask, 255, Image.Resampling.NEAREST).astype(int)
        padding = geometry.padding()
        assert crop.shape == (64, 64, 3) and labels.shape == padding.shape == (64, 64)
        assert (crop[padding] == 0).all() and (labels[padding] == 255).all() and (crop[~padding][:, 2] == 200).all()
        assert np.abs(crop[..., 0] - labels)[~padding].max() <= 2  # columns agree up to the resampling
        steps = np.diff(crop[..., 0][~padding].reshape(-1, geometry.filled[0]), axis=1)
        assert (steps <= 0).all() if geometry.flip else (steps >= 0).all()
        scale = geometry.filled[0] / (geometry.box[2] - geometry.box[0])
        assert abs(scale - wanted) < 0.02
        counts["flip"] += geometry.flip
        counts["padding"] += padding.any()
        counts["enlarged"] += scale > 1
    assert all(5 < count < 35 for count in counts.values()), counts


def test_crops_reach_every_border():
    boxes = np.array([Geometry.draw(random_generator(1, 0, n), (100, 80), 32, 1.0).box for n in range(300)])
    assert boxes[:, 0].min() < 2 and boxes[:, 1].min() < 2
    assert boxes[:, 2].max() > 98 and boxes[:, 3].max() > 78
    assert (boxes >= 0).all() and boxes[:, 2].max() <= 100 and boxes[:, 3].max() <= 80


IDENTITY = [1.0, 1.0, 1.0, 0.0, 0.0, NO_BLUR_SIGMA_PX]


def test_neutral_appearance_changes_nothing():
    images = torch.rand(2, 3, 12, 10)
    torch.testing.assert_close(strong_view(images, torch.tensor([IDENTITY] * 2)), images, atol=1e-5, rtol=1e-4)


def opposite_hues(image: np.ndarray) -> np.ndarray:
    """Turn the hue of an RGB image (3, height, width), 0 to 1, by half a circle."""
    pixels = [colorsys.rgb_to_hsv(*pixel) for pixel in image.reshape(3, -1).T]
    turned = [colorsys.hsv_to_rgb((hue + 0.5) % 1, saturation, value) for hue, saturation, value in pixels]
    return np.array(turned).T.reshape(image.shape)


def gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blur (channels, height, width) with 9 weights per axis; pixels at the border are repeated outside."""
    weights = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
    weights /= weights.sum()
    padded = np.pad(image, ((0, 0), (4, 4), (4, 4)), mode="edge")
    rows = sum(weight * padded[:, n : n + image.shape[1]] for n, weight in enumerate(weights))
    return sum(weight * rows[:, :, n : n + image.shape[2]] for n, weight in enumerate(weights))


def test_each_number_changes_only_its_own_image():
    image = torch.rand(3, 12, 12) * 0.6 + 0.2
    rows = [list(IDENTITY) for _ in range(6)]
    changed = {
        "brightness": (0, 0.5),
        "contrast": (1, 0.0),
        "saturation": (2, 0.0),
        "hue": (3, np.pi),
        "gray": (4, 1.0),
    }
    for n, (column, value) in enumerate(changed.values()):
        rows[n][column] = value
    rows[5][5] = 1.5
    dark, flat, pale, shifted, gray, blurred = strong_view(image.expand(6, 3, 12, 12), torch.tensor(rows))
    torch.testing.assert_close(dark, image * 0.5, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(flat, rgb_to_grayscale(image).mean().expand(3, 12, 12), atol=1e-5, rtol=1e-4)
    for colorless in (pale, gray):
        torch.testing.assert_close(colorless, rgb_to_grayscale(image).expand(3, 12, 12), atol=1e-5, rtol=1e-4)
    assert np.abs(shifted.numpy() - opposite_hues(image.numpy())).max() < 1e-4
    assert np.abs(blurred.numpy() - gaussian_blur(image.numpy(), 1.5)).max() < 1e-5


def test_drawn_appearance_has_the_papers_rates_and_ranges():
    drawn = np.array([draw_appearance(np.random.default_rng(n)) for n in range(2000)])
    jittered = drawn[:, 0] != 1
    assert abs(jittered.mean() - 0.8) < 0.03 and abs(drawn[:, 4].mean() - 0.2) < 0.03
    assert abs((drawn[:, 5] > NO_BLUR_SIGMA_PX).mean() - 0.5) < 0.04
    assert drawn[:, :3].min() >= 0.5 and drawn[:, :3].max() <= 1.5 and drawn[jittered, :3].std() > 0.25
    assert np.abs(drawn[:, 3]).max() <= np.pi / 2 and np.abs(drawn[:, 3]).max() > 1.5
    assert drawn[:, 5].max() <= 2.0


def test_cutmix_boxes_have_the_papers_sizes():
    masks = [draw_cutmix_box(np.random.default_rng(n), 64) for n in range(1000)]
    boxes = [mask for mask in masks if mask.any()]
    assert abs(len(boxes) / len(masks) - 0.5) < 0.05
    for mask in boxes:
        rows, columns = mask.any(axis=1), mask.any(axis=0)
        assert mask.sum() == rows.sum() * columns.sum()  # a full rectangle
        assert 0.015 < mask.mean() <= 0.4
        assert 0.25 < rows.sum() / columns.sum() < 4.0


def test_cutmix_pastes_only_inside_the_box():
    boxes = torch.tensor([[[True, False], [False, False]]])
    own, other = torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)
    assert cutmix(own, other, boxes)[0, :, 0, 0].tolist() == [1, 1, 1] and cutmix(own, other, boxes).sum() == 3
    assert cutmix(own[:, 0], other[:, 0], boxes).tolist() == [[[1, 0], [0, 0]]]


def test_normalize():
    image = torch.full((1, 3, 2, 2), 0.5)
    found = normalize(image, [0.5, 0.25, 0.0], [1.0, 0.5, 0.25])
    assert found[0, :, 0, 0].tolist() == [0.0, 0.5, 2.0]
