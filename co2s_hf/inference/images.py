"""Load a trained model, predict images in memory, fuse the students, and draw the pictures of a prediction."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..data.image_files import StoredFile
from ..data.reading import ImageRule
from ..model.configuration_co2s import Co2SConfig
from ..model.image_processing_co2s import Co2SImageProcessor
from ..model.modeling_co2s import STUDENTS, Co2SForSemanticSegmentation, calibrate_and_fuse
from ..utils.errors import UserFileNotFoundError, UserValueError, loading
from ..utils.files import recover
from .windows import sliding_window_logits


def load_model(
    checkpoint: str, revision: str | None = None, **model_kwargs
) -> tuple[Co2SForSemanticSegmentation, Co2SImageProcessor]:
    """Load a trained model and its image processor.

    Args:
        checkpoint: Folder of a trained model, or its name on the Hub.
        revision: Branch, tag or commit on the Hub. None: the main branch.
        model_kwargs: Further arguments of `from_pretrained` for the model, such as `attn_implementation="eager"`.

    Returns:
        The model, in evaluation mode and on the CPU, and its image processor.

    Raises:
        UserOSError: There is no such model, or its files cannot be read or downloaded.
    """
    recover(checkpoint)
    what = f"`checkpoint` is '{checkpoint}', which"
    expected = "the folder of a trained model or its name on the Hub"
    with loading(what, expected, checkpoint, Co2SConfig.model_type):
        model = Co2SForSemanticSegmentation.from_pretrained(checkpoint, revision=revision, **model_kwargs)
        image_processor = Co2SImageProcessor.from_pretrained(checkpoint, revision=revision)
    return model, image_processor


def load_for_prediction(
    checkpoint: str, fusion: str | None = None, crop_size: int | None = None, revision: str | None = None
) -> tuple[Co2SForSemanticSegmentation, Co2SImageProcessor, int]:
    """Load a trained model, its image processor and the side of the windows to predict with.

    Args:
        checkpoint: Folder of a trained model, or its name on the Hub.
        fusion: How to fuse the students. None: the fusion in the model's configuration.
        crop_size: Side of the windows in pixels. None: the side of the crops in training.
        revision: Branch, tag or commit on the Hub. None: the main branch.

    Returns:
        The model (in evaluation mode, on the CPU), its image processor, and the side of the windows in pixels.

    Raises:
        UserOSError: There is no such model, or its files cannot be read or downloaded.
        UserValueError: `crop_size` is None, and the configuration of the model has none.
    """
    model, image_processor = load_model(checkpoint, revision)
    model.config.fusion = fusion or model.config.fusion
    return model, image_processor, window_side(model, crop_size)


def window_side(model: Co2SForSemanticSegmentation, crop_size: int | None) -> int:
    """Return the side of the windows in pixels: `crop_size`, or else the side of the crops in training.

    Raises:
        UserValueError: `crop_size` is None, and the configuration of the model has none.
    """
    crop_size = model.config.crop_size if crop_size is None else crop_size
    if crop_size is None:
        name = model.config.name_or_path or "The model"
        raise UserValueError(
            f"{name} has no `crop_size` in its configuration, the side of its training crops in pixels. Choose the "
            "side of the windows: `crop_size=512`."
        )
    return crop_size


def predict_logits(
    model: Co2SForSemanticSegmentation,
    pixel_values: torch.Tensor,
    crop_size: int,
    size: tuple[int, int],
    flip: bool = False,
) -> dict[str, torch.Tensor]:
    """Compute the logits of the students and of their fusion for one image, by overlapping windows.

    If the fusion is one student, only that student is computed.

    Args:
        model: Model in evaluation mode. Within `torch.autocast`, it computes in the type of autocast.
        pixel_values: One image (1, channels, height, width), from the image processor.
        crop_size: Side of a window in pixels.
        size: (height, width) of the label map. Logits are resized to it as in the paper (bilinear, corners aligned).
        flip: See [`sliding_window_logits`].

    Returns:
        Name of each computed student, then "fused" -> logits (classes, height, width), float32, on the device of the
        model, without gradients. All of them are divided by the temperatures of the students.
    """
    config, students = model.config, fused_students(model.config)
    logits = sliding_window_logits(model, pixel_values, crop_size, students, flip=flip)
    predictions = {name: fused_logits(logits, config, size, name) for name in students}
    return predictions | {"fused": fused_logits(logits, config, size)}


def fused_logits(
    logits: dict[str, torch.Tensor], config: Co2SConfig, size: tuple[int, int], fusion: str | None = None
) -> torch.Tensor:
    """Calibrate and fuse the students' logits of one image, and resize the result.

    Args:
        logits: Per student (1, classes, height, width), as [`sliding_window_logits`] returns them.
        config: Configuration of the model, with the temperatures of the students.
        size: (height, width) to resize to, as in the paper (bilinear, corners aligned).
        fusion: One of [`FUSIONS`]; the name of a student: only the logits of that student. None: `config.fusion`.

    Returns:
        (classes, height, width).
    """
    fused = calibrate_and_fuse(logits, config, fusion)
    if size != tuple(fused.shape[-2:]):
        fused = F.interpolate(fused, size=size, mode="bilinear", align_corners=True)
    return fused[0]


def fused_students(config: Co2SConfig) -> tuple[str, ...]:
    """Return the names of the students that the fusion of the model needs."""
    return (config.fusion,) if config.fusion in STUDENTS else STUDENTS


@dataclass(frozen=True)
class Segmentation:
    """The prediction for one image.

    Args:
        labels: Label map (height, width), uint8.
        probabilities: Fused class probabilities (classes, height, width), float32, 0 to 1.
    """

    labels: np.ndarray
    probabilities: np.ndarray

    @property
    def confidence(self) -> np.ndarray:
        """Probability of the predicted class, (height, width), 0 to 1."""
        return self.probabilities.max(axis=0)


def segment_image(
    model: Co2SForSemanticSegmentation,
    image_processor: Co2SImageProcessor,
    image: Image.Image | np.ndarray | str | Path,
    crop_size: int | None = None,
    overlap_px: int | None = None,
    blend: str = "smooth",
    windows_per_batch: int = 8,
) -> Segmentation:
    """Segment an image file, or an image in memory, of any size, by overlapping windows.

    [`co2s_hf.geo.scenes.segment_scene`] does the same for raster files of any size.

    Args:
        model: Model in evaluation mode. Its configuration contains the fusion of the students. For bfloat16, call this
            function within `torch.autocast(model.device.type, torch.bfloat16)`.
        image_processor: Image processor of the model.
        image: 8-bit RGB or grey: a PIL image, an array (height, width, bands) or (height, width), or the path of an
            image file. A file is read as the training images of the model were: with the bands and the scale in its
            configuration.
        crop_size: Side of the windows in pixels. None: the side of the crops in training.
        overlap_px, blend: See [`WindowGrid`].
        windows_per_batch: Windows per forward pass.

    Raises:
        UserValueError: `crop_size` is None, and the configuration of the model has none.
        UserFileNotFoundError: There is no such file.
        UserValueError: The file cannot be read, or the rule of the model does not cover it.
        ValueError: The image is not RGB or grey with values from 0 to 255.
        TypeError: `image` is of another type.
    """
    crop_size = window_side(model, crop_size)
    if isinstance(image, str | Path):
        if not Path(image).is_file():
            raise UserFileNotFoundError(f"`image` is '{image}', and there is no such file.")
        image = ImageRule.of_config(model.config).read(StoredFile(str(image)))
    _check_image(image)
    layout = "channels_last" if np.ndim(image) == 3 else None
    pixel_values = image_processor(image, input_data_format=layout, return_tensors="pt")["pixel_values"]
    size = (image.height, image.width) if isinstance(image, Image.Image) else image.shape[:2]
    logits = sliding_window_logits(
        model,
        pixel_values,
        crop_size,
        fused_students(model.config),
        windows_per_batch,
        overlap_px=overlap_px,
        blend=blend,
    )
    probabilities = fused_logits(logits, model.config, size).softmax(dim=0).cpu().numpy()
    return Segmentation(probabilities.argmax(axis=0).astype(np.uint8), probabilities)


def _check_image(image: Image.Image | np.ndarray):
    """Check the type, the shape and the data type of an image. The image processor checks the values.

    Raises:
        TypeError, ValueError: See [`segment_image`].
    """
    expected = "a PIL image, an array (height, width, 3), (height, width, 1) or (height, width), or the path of a file"
    if isinstance(image, Image.Image):
        return
    if not isinstance(image, np.ndarray):
        raise TypeError(f"`image` is of the type {type(image).__name__}; expected {expected}.")
    if image.ndim not in (2, 3) or 0 in image.shape or (image.ndim == 3 and image.shape[-1] not in (1, 3)):
        raise ValueError(
            f"`image` has the shape {image.shape}; expected (height, width, 3), (height, width, 1) or (height, width)."
        )
    if image.dtype.kind not in "uif":
        raise ValueError(f"`image` has the data type {image.dtype}; expected numbers from 0 to 255, such as uint8.")


def prediction_pictures(
    image: Image.Image, logits: torch.Tensor, palette: np.ndarray, opacity: float = 0.5
) -> dict[str, Image.Image]:
    """Draw the pictures of one prediction.

    Args:
        image: The image that was predicted.
        logits: Its fused logits (classes, height, width), of the size of the image.
        palette: RGB colours (classes, 3), uint8.
        opacity: Weight of the colours in the overlay, 0 to 1.

    Returns:
        "labels": class indices, one band of 8 bits with the palette. "overlay": the image, blended with its coloured
        label map, RGB. "confidence": probability of the predicted class, 0 to 255 for 0 to 1, one band of 8 bits.
    """
    from ..utils.figures import overlay  # matplotlib is optional: prediction in memory works without it

    confidence, labels = (values.cpu().numpy() for values in logits.softmax(dim=0).max(dim=0))
    indices = Image.fromarray(labels.astype(np.uint8))
    indices.putpalette(palette.flatten().tolist())
    return {
        "labels": indices,
        "overlay": overlay(image, labels, palette, opacity),
        "confidence": Image.fromarray((255 * confidence).round().astype(np.uint8)),
    }
