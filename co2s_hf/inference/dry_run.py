"""Read images without predicting them, and estimate the time, the memory and the disk space of their pictures."""

import time
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from ..data.reading import ImageRule
from ..data.samples import Samples
from ..model.image_processing_co2s import Co2SImageProcessor
from ..model.modeling_co2s import Co2SForSemanticSegmentation
from ..utils.errors import UserValueError
from ..utils.figures import palette_or_default
from ..utils.measuring import format_duration, peak_memory_gb
from .folders import picture_paths
from .images import predict_logits, prediction_pictures
from .windows import WindowGrid


MEASURED_SIDE = 3  # an image of at most so many windows along each side is predicted to measure the time
LOGITS_PER_CLASS = 9  # float32 values per pixel and class while an image is predicted: logits, their fusion, scores


def check_pictures(
    model: Co2SForSemanticSegmentation,
    image_processor: Co2SImageProcessor,
    crop_size: int,
    samples: Samples,
    pictures: Sequence[str],
    output_dir: Path,
    accelerator: Accelerator,
    flip: bool = False,
    save_confidence: bool = False,
) -> tuple[str, list[str]]:
    """Read every image that [`predict_into_folder`] would predict, and estimate what the predictions need.

    Args:
        model, image_processor, crop_size, samples, pictures, output_dir, accelerator, save_confidence: As in
            [`predict_into_folder`].
        flip: Average with the prediction for the mirrored image.

    Returns:
        Lines for the user, and one message for each image that cannot be read.
    """
    sizes, problems, first = [], [], None
    todo = {
        picture: place
        for place, picture in enumerate(pictures)
        if not all(path.exists() for path in picture_paths(output_dir, picture, save_confidence).values())
    }
    for place in tqdm(todo.values(), desc="reading", leave=False):
        try:
            image = samples[place].load_image()
        except UserValueError as error:
            problems.append(str(error))
            continue
        sizes.append(image.size)
        first = first or image
    done = len(set(pictures)) - len(todo)
    if first is None:
        return f"{len(todo)} images to predict, of which none can be read; {done} are done already.", problems
    windows = sum(_num_windows(size, crop_size, image_processor) for size in sizes)
    pixels, largest = sum(width * height for width, height in sizes), max(sizes, key=lambda size: size[0] * size[1])
    seconds, measured = _measure(model, image_processor, crop_size, first, accelerator, flip)
    seconds *= windows / accelerator.num_processes
    logits_gb = 4 * LOGITS_PER_CLASS * model.config.num_labels * largest[0] * largest[1] / 1e9
    memory_gb, disk_gb = peak_memory_gb(accelerator.device) + logits_gb, pixels * (5 if save_confidence else 4) / 1e9
    return (
        f"{len(sizes)} images to predict ({done} are done already): up to {largest[0]} x {largest[1]} pixels, "
        f"together {pixels / 1e6:.1f} megapixels, {windows} windows of {crop_size} pixels.\n"
        f"  read as {describe_rule(samples.image_rule)}\n"
        f"  about {format_duration(seconds)} (from {measured} windows); memory at most {memory_gb:.1f} GB; disk at "
        f"most {disk_gb:.2f} GB\nDry run: nothing was written."
    ), problems


def describe_rule(rule: ImageRule) -> str:
    """Describe how images are read: bands, type and scale."""
    bands = "RGB or grey" if rule.bands is None else f"bands {', '.join(map(str, rule.bands))}"
    if rule.scale is None:
        return f"{bands}, 8 bits, no scale"
    return f"{bands}, scale " + ", ".join(f"{low:g} to {high:g}" for low, high in rule.scale)


def _num_windows(size: tuple[int, int], crop_size: int, image_processor: Co2SImageProcessor) -> int:
    """Return the number of windows of an image of this width and height, after the resizing of the processor."""
    width, height = size
    if image_processor.do_resize:
        wanted = image_processor.size
        if wanted.get("shortest_edge"):
            height, width = (round(side * wanted["shortest_edge"] / min(size)) for side in (height, width))
        else:
            height, width = wanted["height"], wanted["width"]
    grid = WindowGrid(height, width, crop_size)
    return len(grid.tops) * len(grid.lefts)


def _measure(
    model: Co2SForSemanticSegmentation,
    image_processor: Co2SImageProcessor,
    crop_size: int,
    image: Image.Image,
    accelerator: Accelerator,
    flip: bool,
) -> tuple[float, int]:
    """Predict a part of an image twice. Return the seconds per window, of the second time, and how many they are."""
    part = image.crop((0, 0, *(min(side, MEASURED_SIDE * crop_size) for side in image.size)))
    palette = palette_or_default(model.config.palette, model.config.num_labels)
    for _ in range(2):  # the first time prepares libraries and the device
        start = time.perf_counter()
        with accelerator.autocast():
            inputs = image_processor(part, return_tensors="pt")
            logits = predict_logits(model, inputs["pixel_values"], crop_size, (part.height, part.width), flip)
        prediction_pictures(part, logits["fused"], palette)
        seconds = time.perf_counter() - start
    windows = _num_windows(part.size, crop_size, image_processor)
    return seconds / windows, windows


__all__ = ["check_pictures", "describe_rule"]
