"""Prediction for images of any size by overlapping windows."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .image_processing_co2s import Co2SImageProcessor
from .modeling_co2s import STUDENTS, Co2SForSemanticSegmentation, fuse_logits


WINDOW_OVERLAP = 6  # neighbouring windows share one sixth of their side, as in the paper's evaluation


def load_for_prediction(
    checkpoint: str, fusion: str | None = None, crop_size: int | None = None, revision: str | None = None
) -> tuple[Co2SForSemanticSegmentation, Co2SImageProcessor, int]:
    """A trained model, its image processor, and the side of the windows to predict in.

    Args:
        checkpoint: Folder or Hub name.
        fusion: Instead of the model's own.
        crop_size: Instead of the crops that the model was trained on.
        revision: Branch, tag or commit of a checkpoint on the Hub.

    Raises:
        ValueError: No crop size is given, and the model does not know its own.
    """
    model = Co2SForSemanticSegmentation.from_pretrained(checkpoint, revision=revision)
    model.config.fusion = fusion or model.config.fusion
    crop_size = crop_size or model.config.crop_size
    if crop_size is None:
        raise ValueError(f"{checkpoint} does not say on which crops it was trained. Pass --crop_size.")
    return model, Co2SImageProcessor.from_pretrained(checkpoint, revision=revision), crop_size


def window_starts(length: int, crop_size: int) -> list[int]:
    """Where windows begin along one side: stride int(crop * 5 / 6), the last one moved inside the image."""
    stride = max(1, crop_size * (WINDOW_OVERLAP - 1) // WINDOW_OVERLAP)
    starts = list(range(0, max(length - crop_size, 0) + 1, stride))
    if starts[-1] + crop_size < length:
        starts.append(length - crop_size)
    return starts


def _windows(height: int, width: int, crop_size: int) -> Iterator[tuple[slice, slice]]:
    for top in window_starts(height, crop_size):
        for left in window_starts(width, crop_size):
            yield slice(top, top + crop_size), slice(left, left + crop_size)


@torch.no_grad()
def sliding_window_logits(
    model: Co2SForSemanticSegmentation,
    pixel_values: torch.Tensor,
    crop_size: int,
    students: tuple[str, ...] = STUDENTS,
    windows_per_batch: int = 8,
    flip: bool = False,
) -> dict[str, torch.Tensor]:
    """Each student's logits, averaged where windows overlap.

    Args:
        model: In evaluation mode.
        pixel_values: (1, channels, height, width), as the image processor makes it, of any size.
        crop_size: Side of a window in pixels; an image smaller than that is one window.
        students: Names of the students to compute.
        windows_per_batch: Windows that pass through the model together.
        flip: Predict each window mirrored, too, and average: twice the time for a little accuracy.

    Returns:
        Per student (1, classes, height, width), float32, on the model's device.

    Raises:
        ValueError: The batch holds more than one image.
    """
    if pixel_values.shape[0] != 1:
        raise ValueError(f"`pixel_values` holds {pixel_values.shape[0]} images; windows are cut from one at a time.")
    height, width = pixel_values.shape[-2:]
    pixel_values = pixel_values.to(model.device)
    shape = (1, model.config.num_labels, height, width)
    sums = {name: torch.zeros(shape, device=model.device) for name in students}
    visits = torch.zeros(1, 1, height, width, device=model.device)
    windows = list(_windows(height, width, crop_size))
    for start in range(0, len(windows), windows_per_batch):
        batch = windows[start : start + windows_per_batch]
        crops = torch.cat([pixel_values[..., rows, columns] for rows, columns in batch])
        logits = model.student_logits(crops, students=students)
        if flip:
            mirrored = model.student_logits(crops.flip(-1), students=students)
            logits = {name: (logits[name] + mirrored[name].flip(-1)) / 2 for name in students}
        for n, (rows, columns) in enumerate(batch):
            visits[..., rows, columns] += 1
            for name in students:
                sums[name][..., rows, columns] += logits[name][n].float()
    return {name: total / visits for name, total in sums.items()}


def predict_logits(
    model: Co2SForSemanticSegmentation,
    pixel_values: torch.Tensor,
    crop_size: int,
    size: tuple[int, int],
    flip: bool = False,
) -> dict[str, torch.Tensor]:
    """Logits of the students and of their fusion for one image, by sliding windows.

    Where the model's fusion is one student, that student is all that is computed.

    Args:
        model: In evaluation mode.
        pixel_values: (1, channels, height, width).
        crop_size: Side of a window in pixels.
        size: (height, width) of the label; logits are resized to it as the paper does (bilinear, corners aligned).
        flip: See [`sliding_window_logits`].

    Returns:
        A student's name or "fused" -> (classes, height, width), float32, on the model's device. "fused" comes last.
    """
    fusion = model.config.fusion
    students = (fusion,) if fusion in STUDENTS else STUDENTS
    logits = sliding_window_logits(model, pixel_values, crop_size, students, flip=flip)
    predictions = {name: fused_logits(logits, name, size) for name in students}
    return predictions | {"fused": fused_logits(logits, fusion, size)}


def fused_logits(logits: dict[str, torch.Tensor], fusion: str, size: tuple[int, int]) -> torch.Tensor:
    """One fusion of the students' logits for one image, at another size.

    Args:
        logits: What [`sliding_window_logits`] returns.
        fusion: As in the configuration; a student's name is that student alone.
        size: (height, width); the fused logits are resized to it as the paper does (bilinear, corners aligned).

    Returns:
        (classes, height, width).
    """
    fused = logits[fusion] if fusion in STUDENTS else fuse_logits(logits["clip"], logits["dinov3"], fusion)
    if size != tuple(fused.shape[-2:]):
        fused = F.interpolate(fused, size=size, mode="bilinear", align_corners=True)
    return fused[0]
