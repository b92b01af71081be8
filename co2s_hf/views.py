"""Weak and strong views of images, and CutMix (the augmentation of UniMatch, arXiv 2208.09910, as Co2S uses it).

Every random number is drawn per sample from a generator of its own (`sample_generator`), in the loader's worker and
independent of how many workers there are. Geometry is applied there, once, to image and mask together; the strong
views' appearance is drawn there as numbers and applied to whole batches on the device. So weak view, strong views,
mask and padding share one geometry by construction.
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
NO_BLUR_SIGMA_PX = 0.01  # its kernel is exactly one pixel
CUTMIX_PROBABILITY, CUTMIX_AREA, CUTMIX_ASPECT = 0.5, (0.02, 0.4), (0.3, 1 / 0.3)


@dataclass(frozen=True)
class Geometry:
    """A random crop and flip: `box` of the source image fills `filled` pixels of a square of `crop_size`."""

    source_size: tuple[int, int]  # width, height
    box: tuple[float, float, float, float]  # left, upper, right, lower, in source pixels
    filled: tuple[int, int]  # width, height
    crop_size: int
    flip: bool

    @classmethod
    def draw(cls, rng: np.random.Generator, image_size: tuple[int, int], crop_size: int, scale: float) -> "Geometry":
        """Draw for an image of (width, height) to be scaled: a crop anywhere, a horizontal flip half the time."""
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
        """Crop and scale in one resampling; what the image does not fill, below and to the right, becomes `fill`.

        An image of another size than the source's shows the same scene, coarser or finer.

        Returns:
            Array (crop size, crop size) or (crop size, crop size, channels) of the image's type.
        """
        ratios = [own / source for own, source in zip(image.size, self.source_size)] * 2
        box = tuple(side * ratio for side, ratio in zip(self.box, ratios))
        content = np.asarray(image.resize(self.filled, resample, box=box))
        crop = np.full((self.crop_size, self.crop_size, *content.shape[2:]), fill, dtype=content.dtype)
        crop[: self.filled[1], : self.filled[0]] = content
        return np.ascontiguousarray(crop[:, ::-1] if self.flip else crop)

    def padding(self) -> np.ndarray:
        """Boolean (crop size, crop size), true where there is no image."""
        empty = np.ones((self.crop_size, self.crop_size), dtype=bool)
        empty[: self.filled[1], : self.filled[0]] = False
        return np.ascontiguousarray(empty[:, ::-1] if self.flip else empty)


def draw_appearance(rng: np.random.Generator) -> np.ndarray:
    """Numbers of one strong view: brightness, contrast, saturation factors, hue (radians), grey (0 or 1), blur sigma.

    Returns:
        Array (6,), float32, for one row of [`strong_view`].
    """
    factors, hue = np.ones(3), 0.0
    if rng.random() < JITTER_PROBABILITY:
        factors = rng.uniform(1 - JITTER_STRENGTH, 1 + JITTER_STRENGTH, size=3)
        hue = rng.uniform(-HUE_STRENGTH, HUE_STRENGTH) * 2 * np.pi
    gray = float(rng.random() < GRAY_PROBABILITY)
    sigma = rng.uniform(*BLUR_SIGMA_PX) if rng.random() < BLUR_PROBABILITY else NO_BLUR_SIGMA_PX
    return np.array([*factors, hue, gray, sigma], dtype=np.float32)


def draw_cutmix_box(rng: np.random.Generator, size: int) -> np.ndarray:
    """Boolean (size, size), true in a box of 2 to 40 % of the area and aspect 0.3 to 3.33; half the time nowhere."""
    mask = np.zeros((size, size), dtype=bool)
    if rng.random() < CUTMIX_PROBABILITY:
        while True:  # until the box fits; more than half of all draws do
            area = rng.uniform(*CUTMIX_AREA) * size * size
            aspect = rng.uniform(*CUTMIX_ASPECT)
            width, height = int(np.sqrt(area / aspect)), int(np.sqrt(area * aspect))
            if 1 <= width <= size and 1 <= height <= size:
                break
        left, upper = rng.integers(size - width + 1), rng.integers(size - height + 1)
        mask[upper : upper + height, left : left + width] = True
    return mask


def strong_view(images: torch.Tensor, appearance: torch.Tensor) -> torch.Tensor:
    """Change the colours and sharpness of a batch; every pixel stays where it is.

    Args:
        images: (batch, 3, height, width), float, 0..1.
        appearance: (batch, 6), rows of [`draw_appearance`].

    Returns:
        Tensor like `images`.
    """
    brightness, contrast, saturation, hue, gray, sigma = appearance.to(images.device).unbind(dim=1)
    images = adjust_brightness_accumulative(images, brightness)
    images = adjust_contrast_with_mean_subtraction(images, contrast)
    images = adjust_saturation_with_gray_subtraction(images, saturation)
    images = adjust_hue(images, hue)
    images = torch.where(gray.bool().view(-1, 1, 1, 1), rgb_to_grayscale(images), images)
    # Two standard deviations to each side. (kornia's gaussian_blur2d would wait for the device to check sigma.)
    kernel = get_gaussian_kernel1d(4 * int(BLUR_SIGMA_PX[1]) + 1, sigma.unsqueeze(1))
    return filter2d_separable(images, kernel, kernel, border_type="replicate")


def normalize(images: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    """(image - mean) / std per channel, for a batch of images in 0..1."""
    mean, std = (_per_channel(tuple(values), images.device) for values in (mean, std))
    return (images - mean) / std


@lru_cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """(1, channels, 1, 1) on the device, copied there once."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


def cutmix(own: torch.Tensor, other: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Paste `other` into `own` inside the boxes.

    Args:
        own: (batch, height, width) or (batch, channels, height, width).
        other: The same shape: the partner images, or their labels, confidences or padding.
        boxes: Boolean (batch, height, width).
    """
    return torch.where(boxes if own.ndim == 3 else boxes.unsqueeze(1), other, own)


@dataclass
class Views:
    """One batch on the device. Images are normalised floats (batch, channels, height, width).

    Without unlabelled images (`weak` is None) a step is supervised. `strong_1` and `strong_2` are not mixed yet.
    Without explicit partners neighbours in the batch are mixed with each other; explicit ones are predicted in the
    same pass.
    """

    labeled: torch.Tensor
    labels: torch.Tensor  # (labelled batch, height, width), class indices or the ignore index
    weak: torch.Tensor | None = None
    strong_1: torch.Tensor | None = None
    strong_2: torch.Tensor | None = None
    padding: torch.Tensor | None = None  # (unlabelled batch, height, width), true where there is no image
    cutmix_boxes_1: torch.Tensor | None = None  # (unlabelled batch, height, width), true where the partner is pasted
    cutmix_boxes_2: torch.Tensor | None = None
    partner_weak: torch.Tensor | None = None
    partner_strong_1: torch.Tensor | None = None
    partner_strong_2: torch.Tensor | None = None
    partner_padding: torch.Tensor | None = None
    partner_order: list[int] | None = None  # where partners come from the batch: their places in it
    hidden_labels: torch.Tensor | None = None  # of the weak view, to measure pseudo-labels and never to train on


def make_views(batch: dict[str, torch.Tensor], mean: list[float], std: list[float]) -> Views:
    """Turn a batch of [`co2s_hf.data.PairedViews`], already on the device, into what the objective takes.

    Args:
        batch: Collated items.
        mean: What images are normalised with (`config.image_mean`).
        std: The same (`config.image_std`).
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
