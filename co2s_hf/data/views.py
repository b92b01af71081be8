"""Weak and strong views of images, and CutMix: the augmentation of UniMatch (arXiv 2208.09910), which Co2S uses.

The worker processes of the data loader draw all random numbers, from one generator per item (`random_generator`). They
crop and flip an image and its label map with the same geometry. For the strong views, they draw numbers only; the
device applies these numbers to whole batches of weak views. The weak view, the strong views, the label map and the
padding therefore always have the same geometry.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from kornia.color import rgb_to_grayscale
from kornia.enhance import (
    adjust_brightness_accumulative,
    adjust_contrast_with_mean_subtraction,
    adjust_hue,
    adjust_saturation_with_gray_subtraction,
)
from kornia.filters import filter2d_separable, get_gaussian_kernel1d
from PIL import Image


SCALE_RANGE = (0.5, 2.0)
JITTER_PROBABILITY, JITTER_STRENGTH, HUE_STRENGTH = 0.8, 0.5, 0.25
GRAY_PROBABILITY = 0.2
BLUR_PROBABILITY, BLUR_SIGMA_PX = 0.5, (0.1, 2.0)
NO_BLUR_SIGMA_PX = 0.01  # a Gaussian kernel of this width is exactly one pixel
CUTMIX_PROBABILITY, CUTMIX_AREA, CUTMIX_ASPECT = 0.5, (0.02, 0.4), (0.3, 1 / 0.3)


@dataclass(frozen=True)
class Geometry:
    """A random scale, crop and horizontal flip.

    Args:
        source_size: Width and height in pixels of the image that the geometry was drawn for.
        box: Crop (left, upper, right, lower) in pixels of that image.
        filled: Width and height in pixels of the crop after scaling. It fills the upper left part of the view. The
            rest of the view are pixels without data.
        crop_size: Side of the square view in pixels.
        flip: Whether the view is then mirrored left to right.
    """

    source_size: tuple[int, int]
    box: tuple[float, float, float, float]
    filled: tuple[int, int]
    crop_size: int
    flip: bool

    @classmethod
    def draw(cls, rng: np.random.Generator, image_size: tuple[int, int], crop_size: int, scale: float) -> "Geometry":
        """Draw the place of the crop, and a flip with probability 0.5.

        Args:
            rng: Random generator.
            image_size: Width and height of the image in pixels.
            crop_size: Side of the view in pixels.
            scale: Factor by which the image is scaled.
        """
        box, filled = [], []
        for side in image_size:
            scaled = max(1, round(side * scale))
            length = min(crop_size, scaled)
            start = int(rng.integers(scaled - length + 1))
            box.append((start * side / scaled, (start + length) * side / scaled))
            filled.append(length)
        (left, right), (upper, lower) = box
        return cls(image_size, (left, upper, right, lower), tuple(filled), crop_size, flip=bool(rng.random() < 0.5))

    def apply(self, image: Image.Image, fill: int, resample: Image.Resampling) -> np.ndarray:
        """Crop, scale and flip an image or a label map. Cropping and scaling are one resampling.

        Args:
            image: It may be larger or smaller than `source_size` if it shows the same scene.
            fill: Value of pixels without data.
            resample: Resampling filter of Pillow.

        Returns:
            Array (crop_size, crop_size) or (crop_size, crop_size, channels) of the image's type.
        """
        ratios = [own / source for own, source in zip(image.size, self.source_size)] * 2
        box = tuple(side * ratio for side, ratio in zip(self.box, ratios))
        content = np.asarray(image.resize(self.filled, resample, box=box))
        crop = np.full((self.crop_size, self.crop_size, *content.shape[2:]), fill, dtype=content.dtype)
        crop[: self.filled[1], : self.filled[0]] = content
        return np.ascontiguousarray(crop[:, ::-1] if self.flip else crop)

    def padding(self) -> np.ndarray:
        """Return a boolean array (crop_size, crop_size), true for pixels without data."""
        empty = np.ones((self.crop_size, self.crop_size), dtype=bool)
        empty[: self.filled[1], : self.filled[0]] = False
        return np.ascontiguousarray(empty[:, ::-1] if self.flip else empty)


def draw_appearance(rng: np.random.Generator) -> np.ndarray:
    """Draw the numbers of one strong view.

    Returns:
        Array (6,), float32: factors of brightness, contrast and saturation, shift of the hue in radians, 1 for grey
        or 0 for colour, and sigma of the blur in pixels.
    """
    factors, hue = np.ones(3), 0.0
    if rng.random() < JITTER_PROBABILITY:
        factors = rng.uniform(1 - JITTER_STRENGTH, 1 + JITTER_STRENGTH, size=3)
        hue = rng.uniform(-HUE_STRENGTH, HUE_STRENGTH) * 2 * np.pi
    gray = float(rng.random() < GRAY_PROBABILITY)
    sigma = rng.uniform(*BLUR_SIGMA_PX) if rng.random() < BLUR_PROBABILITY else NO_BLUR_SIGMA_PX
    return np.array([*factors, hue, gray, sigma], dtype=np.float32)


def draw_cutmix_box(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw a box for CutMix with probability 0.5.

    The area of the box is 2 to 40 % of the view, and its aspect ratio is 0.3 to 3.33.

    Args:
        rng: Random generator.
        size: Side of the view in pixels.

    Returns:
        Boolean array (size, size), true inside the box; false everywhere if there is no box.
    """
    mask = np.zeros((size, size), dtype=bool)
    if rng.random() < CUTMIX_PROBABILITY:
        while True:  # more than half of all boxes fit into the view
            area = rng.uniform(*CUTMIX_AREA) * size * size
            aspect = rng.uniform(*CUTMIX_ASPECT)
            width, height = int(np.sqrt(area / aspect)), int(np.sqrt(area * aspect))
            if 1 <= width <= size and 1 <= height <= size:
                break
        left, upper = rng.integers(size - width + 1), rng.integers(size - height + 1)
        mask[upper : upper + height, left : left + width] = True
    return mask


def strong_view(images: torch.Tensor, appearance: torch.Tensor) -> torch.Tensor:
    """Change the colours and the sharpness of weak views. The geometry does not change.

    Args:
        images: (batch, 3, height, width), float, 0 to 1.
        appearance: (batch, 6); each row is a result of [`draw_appearance`].

    Returns:
        Tensor of the same shape and range.
    """
    brightness, contrast, saturation, hue, gray, sigma = appearance.to(images.device).unbind(dim=1)
    images = adjust_brightness_accumulative(images, brightness)
    images = adjust_contrast_with_mean_subtraction(images, contrast)
    images = adjust_saturation_with_gray_subtraction(images, saturation)
    images = adjust_hue(images, hue)
    images = torch.where(gray.bool().view(-1, 1, 1, 1), rgb_to_grayscale(images), images)
    # The kernel reaches two times the largest sigma to each side. kornia's gaussian_blur2d is not used: it checks
    # sigma on the host, which waits for the device.
    kernel = get_gaussian_kernel1d(4 * int(BLUR_SIGMA_PX[1]) + 1, sigma.unsqueeze(1))
    return filter2d_separable(images, kernel, kernel, border_type="replicate")


def normalize(images: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    """Normalise images: (image - mean) / std per channel.

    Args:
        images: (batch, channels, height, width), 0 to 1.
        mean: One value per channel.
        std: One value per channel.
    """
    mean, std = (_per_channel(tuple(values), images.device) for values in (mean, std))
    return (images - mean) / std


@lru_cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return the values as a tensor (1, channels, 1, 1). Because of the cache, they are copied to the device once."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


def cutmix(own: torch.Tensor, other: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Paste `other` into `own` inside the boxes.

    Args:
        own: Images, labels, confidences or padding, (batch, height, width) or (batch, channels, height, width).
        other: The same for the partners, in the same shape.
        boxes: Boolean (batch, height, width), true where `other` is pasted.
    """
    return torch.where(boxes if own.ndim == 3 else boxes.unsqueeze(1), other, own)


@dataclass
class Views:
    """One batch on the device: the input of the objective.

    Images are normalised floats (batch, channels, height, width). The strong views are not mixed by CutMix yet.

    Args:
        labeled: Images with labels.
        labels: (labelled batch, height, width), class indices, or 255 for no class.
        weak: Weak views of the unlabelled images. None: the step is supervised, and all fields below are None.
        strong_1, strong_2: Strong views of the same images.
        padding: Boolean (unlabelled batch, height, width), true for pixels without data.
        cutmix_boxes_1, cutmix_boxes_2: Boolean (unlabelled batch, height, width), true where the partner is pasted.
        partner_weak, partner_strong_1, partner_strong_2, partner_padding: Views to paste. The model predicts them in
            the same pass. None: other images of the batch are pasted.
        partner_order: If images of the batch are pasted: for each image, the position of the one to paste.
        hidden_labels: Labels of the weak views, to measure pseudo-labels. They are never trained on.
    """

    labeled: torch.Tensor
    labels: torch.Tensor
    weak: torch.Tensor | None = None
    strong_1: torch.Tensor | None = None
    strong_2: torch.Tensor | None = None
    padding: torch.Tensor | None = None
    cutmix_boxes_1: torch.Tensor | None = None
    cutmix_boxes_2: torch.Tensor | None = None
    partner_weak: torch.Tensor | None = None
    partner_strong_1: torch.Tensor | None = None
    partner_strong_2: torch.Tensor | None = None
    partner_padding: torch.Tensor | None = None
    partner_order: list[int] | None = None
    hidden_labels: torch.Tensor | None = None


def make_views(batch: dict[str, torch.Tensor], mean: list[float], std: list[float]) -> Views:
    """Normalise a batch on the device and make its strong views.

    Args:
        batch: Items of [`PairedViews`], collated.
        mean: Mean of the normalisation per channel (`config.image_mean`).
        std: Standard deviation of the normalisation per channel (`config.image_std`).
    """
    views = {"labeled": normalize(batch["labeled"].float() / 255, mean, std), "labels": batch["labels"].long()}
    for prefix in ("", "partner_"):
        if f"{prefix}weak" in batch:
            weak = batch[f"{prefix}weak"].float() / 255
            views[f"{prefix}weak"] = normalize(weak, mean, std)
            views[f"{prefix}padding"] = batch[f"{prefix}padding"]
            for n in (1, 2):
                strong = strong_view(weak, batch[f"{prefix}appearance_{n}"])
                views[f"{prefix}strong_{n}"] = normalize(strong, mean, std)
    views |= {key: batch[key] for key in ("cutmix_boxes_1", "cutmix_boxes_2") if key in batch}
    if "hidden_labels" in batch:
        views["hidden_labels"] = batch["hidden_labels"].long()
    return Views(**views)
