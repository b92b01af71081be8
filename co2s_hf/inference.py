"""Prediction for images of any size by overlapping windows."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .configuration_co2s import Co2SConfig
from .image_processing_co2s import Co2SImageProcessor
from .modeling_co2s import STUDENTS, Co2SForSemanticSegmentation, fuse_logits


BLENDS = ("smooth", "average")


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
    image_processor = Co2SImageProcessor.from_pretrained(checkpoint, revision=revision)
    return model, image_processor, window_side(model, crop_size)


def window_side(model: Co2SForSemanticSegmentation, crop_size: int | None) -> int:
    """The side of the windows: what is asked for, or that of the crops that the model was trained on.

    Raises:
        ValueError: Nothing is asked for, and the model does not know its own.
    """
    crop_size = model.config.crop_size if crop_size is None else crop_size
    if crop_size is None:
        name = model.config.name_or_path or "This model"
        raise ValueError(f"{name} does not say on which crops it was trained. Pass --crop_size.")
    return crop_size


def window_overlap(crop_size: int) -> int:
    """Pixels that neighbouring windows share in the paper's evaluation, whose stride is int(crop * 5 / 6)."""
    return crop_size - crop_size * 5 // 6


def window_starts(length: int, crop_size: int, overlap_px: int | None = None) -> list[int]:
    """Where windows begin along one side, neighbours sharing `overlap_px`, the last one moved inside the image.

    The paper's overlap when none is given.
    """
    overlap_px = window_overlap(crop_size) if overlap_px is None else overlap_px
    starts = list(range(0, max(length - crop_size, 0) + 1, max(1, crop_size - overlap_px)))
    if starts[-1] + crop_size < length:
        starts.append(length - crop_size)
    return starts


@dataclass(frozen=True)
class WindowGrid:
    """Where windows stand on an image, row by row, and how they are joined.

    Args:
        height, width: Of the image, in pixels.
        crop_size: Side of a window in pixels; a side of the image shorter than that is covered by one window.
        overlap_px: Pixels that neighbouring windows share; a sixth of the side (the paper's) when left out.
        blend: Where windows overlap, "average" counts them alike (the paper's way), "smooth" less and less towards
            their edges, where they know least of what lies around, so that no seams show.

    Raises:
        ValueError: The overlap leaves no step from window to window, or `blend` is unknown.
    """

    height: int
    width: int
    crop_size: int
    overlap_px: int | None = None
    blend: str = "average"

    def __post_init__(self):
        if self.blend not in BLENDS:
            raise ValueError(f"`blend` is '{self.blend}'; choose one of {', '.join(BLENDS)}.")
        if self.crop_size < 1:
            raise ValueError(f"`crop_size` is {self.crop_size}; windows are at least 1 px wide.")
        if self.overlap_px is not None and not 0 <= self.overlap_px < self.crop_size:
            raise ValueError(
                f"Windows of {self.crop_size} px that overlap by {self.overlap_px} px leave no step from one to the "
                f"next; the overlap lies between 0 and {self.crop_size - 1}."
            )

    @property
    def overlap(self) -> int:
        """Pixels that neighbouring windows share."""
        return window_overlap(self.crop_size) if self.overlap_px is None else self.overlap_px

    @cached_property
    def tops(self) -> list[int]:
        return window_starts(self.height, self.crop_size, self.overlap)

    @cached_property
    def lefts(self) -> list[int]:
        return window_starts(self.width, self.crop_size, self.overlap)

    @property
    def window(self) -> tuple[int, int]:
        """(height, width) of every window."""
        return min(self.crop_size, self.height), min(self.crop_size, self.width)

    def windows(self, first_row: int = 0) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of every window, from the left and from the top, or from a later row of windows on."""
        height, width = self.window
        for top in self.tops[first_row:]:
            for left in self.lefts:
                yield slice(top, top + height), slice(left, left + width)

    def rows_per_batch(self, windows_per_batch: int) -> int:
        """Rows of windows that share batches. No batch reaches beyond, so that each such row repeats bit by bit."""
        return max(1, windows_per_batch // len(self.lefts))

    def restart_row(self, row: int, windows_per_batch: int) -> int:
        """The row of windows to begin with where the results from `row` on shall be as if begun at the top."""
        reaching = next(n for n, top in enumerate(self.tops) if top + self.window[0] > self.tops[row] or n == row)
        return reaching - reaching % self.rows_per_batch(windows_per_batch)

    def weight(self) -> torch.Tensor:
        """What each pixel of a window counts, (height, width), above 0 to 1."""
        height, width = (self._ramp(side) for side in self.window)
        return height[:, None] * width

    def _ramp(self, length: int) -> torch.Tensor:
        if self.blend == "average":
            return torch.ones(length)
        from_edge = torch.minimum(torch.arange(length), torch.arange(length - 1, -1, -1)) + 0.5
        return torch.sin(torch.pi / 2 * (from_edge / max(self.overlap, 1)).clamp(max=1)) ** 2


@dataclass(frozen=True)
class Window:
    """What is read for one place of a [`WindowGrid`].

    Args:
        pixel_values: (channels, height, width), as the image processor makes it.
        valid: Boolean (height, width): pixels that are to count. All of them when left out.
    """

    pixel_values: torch.Tensor
    valid: torch.Tensor | None = None


@dataclass(frozen=True)
class JoinedPiece:
    """A part of the image that no later window reaches.

    Args:
        row: Which row of windows it was finished with.
        rows, columns: Where it is.
        sums: Weighted sums of the logits, (students x classes, rows, columns), float32.
        weights: Sums of the weights, (rows, columns); 0 where no window had a pixel that counts.
    """

    row: int
    rows: slice
    columns: slice
    sums: torch.Tensor
    weights: torch.Tensor


class _Mosaic:
    """Adds up windows, and keeps no more than what later windows still reach: memory grows with the width alone."""

    def __init__(self, grid: WindowGrid, num_channels: int, device: torch.device):
        self.grid, self.num_channels, self.device = grid, num_channels, device
        self.weight = grid.weight().to(device)
        # What the windows so far say about the rows below; the last channel sums the weights.
        self.below = torch.zeros(num_channels + 1, 0, grid.width, device=device)

    def join(self, row: int, windows: Iterator[tuple[torch.Tensor, torch.Tensor | None] | None]):
        """Add one row of windows, (logits, valid) each or None for nothing; yields its [`JoinedPiece`]s."""
        grid = self.grid
        (height, width), last = grid.window, row + 1 == len(grid.tops)
        num_rows = height if last else grid.tops[row + 1] - grid.tops[row]
        below = torch.zeros(self.num_channels + 1, height - num_rows, grid.width, device=self.device)
        rows = slice(grid.tops[row], grid.tops[row] + num_rows)
        active = torch.zeros(self.num_channels + 1, height, width, device=self.device)
        for left, following, window in zip(grid.lefts, [*grid.lefts[1:], grid.width], windows):
            if window is not None:
                logits, valid = window
                weight = self.weight if valid is None else self.weight * valid
                active[:-1] += logits * weight
                active[-1] += weight
            columns, num_columns = slice(left, following), following - left
            done = active[..., :num_columns]
            above = self.below[..., columns]
            done[:, : above.shape[1]] += above
            below[..., columns] = done[:, num_rows:]
            yield JoinedPiece(row, rows, columns, done[:-1, :num_rows], done[-1, :num_rows])
            active = F.pad(active[..., num_columns:], (0, num_columns))
        self.below = below


@torch.no_grad()
def joined_pieces(
    model: Co2SForSemanticSegmentation,
    grid: WindowGrid,
    windows: Iterable[Window | None],
    students: tuple[str, ...] = STUDENTS,
    windows_per_batch: int = 8,
    flip: bool = False,
    first_row: int = 0,
) -> Iterator[JoinedPiece]:
    """Predict an image window by window, and hand back every part of it as soon as it is final.

    Neither the image nor its logits are ever whole in memory.

    Args:
        model: In evaluation mode.
        grid: Where the windows stand.
        windows: What is read for each place of `grid.windows(first_row)`, in that order; None is not predicted.
        students: Names of the students to compute, both in one pass.
        windows_per_batch: Windows that pass through the model together.
        flip: Predict each window mirrored, too, and average: twice the time for a little accuracy.
        first_row: See [`WindowGrid.restart_row`].

    Yields:
        Pieces from the left and from the top; their sums have the students one after the other.
    """
    windows = iter(windows)
    mosaic = _Mosaic(grid, len(students) * model.config.num_labels, model.device)
    step = grid.rows_per_batch(windows_per_batch)
    for start in range(first_row, len(grid.tops), step):
        rows = range(start, min(start + step, len(grid.tops)))
        together = itertools.islice(windows, len(rows) * len(grid.lefts))
        predicted = _predicted(model, together, students, windows_per_batch, flip)
        for row in rows:
            yield from mosaic.join(row, itertools.islice(predicted, len(grid.lefts)))


def _predicted(model, windows, students, windows_per_batch, flip):
    """(logits, valid) for each window, None for None, in order; the model sees full batches."""
    waiting = []
    for window in windows:
        waiting.append(window)
        if sum(window is not None for window in waiting) == windows_per_batch:
            yield from _predicted_batch(model, waiting, students, flip)
            waiting = []
    yield from _predicted_batch(model, waiting, students, flip)


def _predicted_batch(model, windows, students, flip):
    """(logits, valid) for each window of one batch; the students' logits one after the other."""
    seen = [window for window in windows if window is not None]
    if not seen:
        return windows
    batch = torch.stack([window.pixel_values for window in seen]).to(model.device, model.dtype)
    logits = model.student_logits(batch, students=students)
    if flip:
        mirrored = model.student_logits(batch.flip(-1), students=students)
        logits = {name: (logits[name] + mirrored[name].flip(-1)) / 2 for name in students}
    predictions = iter(torch.cat([logits[name].float() for name in students], dim=1))
    valid = (None if window is None or window.valid is None else window.valid.to(model.device) for window in windows)
    return [None if window is None else (next(predictions), pixels) for window, pixels in zip(windows, valid)]


def sliding_window_logits(
    model: Co2SForSemanticSegmentation,
    pixel_values: torch.Tensor,
    crop_size: int,
    students: tuple[str, ...] = STUDENTS,
    windows_per_batch: int = 8,
    flip: bool = False,
    overlap_px: int | None = None,
    blend: str = "average",
) -> dict[str, torch.Tensor]:
    """Each student's logits for an image in memory, joined where windows overlap.

    Args:
        model: In evaluation mode.
        pixel_values: (1, channels, height, width), as the image processor makes it, of any size.
        crop_size, overlap_px, blend: See [`WindowGrid`].
        students, windows_per_batch, flip: See [`joined_pieces`].

    Returns:
        Per student (1, classes, height, width), float32, on the model's device.

    Raises:
        ValueError: The batch holds more than one image.
    """
    if pixel_values.shape[0] != 1:
        raise ValueError(f"`pixel_values` holds {pixel_values.shape[0]} images; windows are cut from one at a time.")
    height, width = pixel_values.shape[-2:]
    grid = WindowGrid(height, width, crop_size, overlap_px, blend)
    windows = (Window(pixel_values[0, :, rows, columns]) for rows, columns in grid.windows())
    joined = torch.empty(len(students) * model.config.num_labels, height, width, device=model.device)
    for piece in joined_pieces(model, grid, windows, students, windows_per_batch, flip):
        joined[:, piece.rows, piece.columns] = piece.sums / piece.weights
    return {name: logits[None] for name, logits in zip(students, joined.chunk(len(students)))}


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
    fusion, students = model.config.fusion, fused_students(model.config)
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


def fused_students(config: Co2SConfig) -> tuple[str, ...]:
    """The students that the model's fusion needs."""
    return (config.fusion,) if config.fusion in STUDENTS else STUDENTS


@dataclass(frozen=True)
class Segmentation:
    """What a model says about an image.

    Args:
        labels: Class of every pixel, (height, width), uint8.
        probabilities: Fused class probabilities, (classes, height, width), float32, 0 to 1.
    """

    labels: np.ndarray
    probabilities: np.ndarray

    @property
    def confidence(self) -> np.ndarray:
        """Probability of the class that was chosen, (height, width), 0 to 1."""
        return self.probabilities.max(axis=0)


def segment_image(
    model: Co2SForSemanticSegmentation,
    image_processor: Co2SImageProcessor,
    image: Image.Image | np.ndarray,
    crop_size: int | None = None,
    overlap_px: int | None = None,
    blend: str = "smooth",
    windows_per_batch: int = 8,
) -> Segmentation:
    """Segment an image in memory, of any size, by windows; `scenes.segment_scene` does the same with files.

    Args:
        model: In evaluation mode; its configuration says how the students are fused.
        image_processor: Of the model.
        image: 8-bit RGB or grey: PIL, or (height, width, bands).
        crop_size: Side of the windows in pixels; the crops that the model was trained on when left out.
        overlap_px, blend: See [`WindowGrid`].
        windows_per_batch: Windows that pass through the model together.

    Raises:
        ValueError: The image is no RGB of values from 0 to 255, or no crop size is known.
    """
    crop_size = window_side(model, crop_size)
    if isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[-1] not in (1, 3):
        raise ValueError(f"`image` has the shape {image.shape}; expected (height, width, 3), or 1 band of grey.")
    layout = "channels_last" if np.ndim(image) == 3 else None
    pixel_values = image_processor(image, input_data_format=layout, return_tensors="pt")["pixel_values"]
    size = (image.height, image.width) if isinstance(image, Image.Image) else image.shape[:2]
    students = fused_students(model.config)
    logits = sliding_window_logits(
        model, pixel_values, crop_size, students, windows_per_batch, overlap_px=overlap_px, blend=blend
    )
    probabilities = fused_logits(logits, model.config.fusion, size).softmax(dim=0).cpu().numpy()
    return Segmentation(probabilities.argmax(axis=0).astype(np.uint8), probabilities)
