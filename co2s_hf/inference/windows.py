"""Cut an image of any size into overlapping windows, predict them in batches and join their logits.

Images, scenes and evaluations are all predicted by [`joined_pieces`]. Within `torch.autocast` (or Accelerate's
`autocast`), the model computes in the type of autocast. Its weights keep their type, and the logits are joined and
fused in float32.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from ..model.modeling_co2s import STUDENTS, Co2SForSemanticSegmentation
from ..utils.errors import UserValueError


BLENDS = ("smooth", "average")


def window_overlap(crop_size: int) -> int:
    """Return the overlap of neighbouring windows in the paper's evaluation: its stride is int(crop_size * 5 / 6)."""
    return crop_size - crop_size * 5 // 6


def window_starts(length: int, crop_size: int, overlap_px: int | None = None) -> list[int]:
    """Return where the windows start along one side of an image.

    The last window is moved back so that it ends at the end of the image. It may then overlap more than the others.

    Args:
        length: Length of the side in pixels.
        crop_size: Side of a window in pixels. A shorter image has a single window, which starts at 0.
        overlap_px: Pixels that neighbouring windows share. None: the paper's overlap, [`window_overlap`].
    """
    overlap_px = window_overlap(crop_size) if overlap_px is None else overlap_px
    starts = list(range(0, max(length - crop_size, 0) + 1, max(1, crop_size - overlap_px)))
    if starts[-1] + crop_size < length:
        starts.append(length - crop_size)
    return starts


@dataclass(frozen=True)
class WindowGrid:
    """The windows of an image, row by row, and the weights that join them.

    Args:
        height, width: Size of the image in pixels.
        crop_size: Side of a window in pixels. If the image is shorter, the windows are as short as the image.
        overlap_px: Pixels that neighbouring windows share, 0 to `crop_size` - 1. None: the paper's overlap, a sixth of
            the side.
        blend: Weights where windows overlap. "average" gives all pixels of a window the same weight (as in the paper).
            "smooth" lowers the weight towards the edges of a window, where the model has the least context. This
            avoids visible seams.

    Raises:
        UserValueError: `crop_size`, `overlap_px` or `blend` is out of range.
    """

    height: int
    width: int
    crop_size: int
    overlap_px: int | None = None
    blend: str = "average"

    def __post_init__(self):
        if self.blend not in BLENDS:
            raise UserValueError(f"`blend` is '{self.blend}'; expected {' or '.join(BLENDS)}.")
        if self.crop_size < 1:
            raise UserValueError(f"`crop_size` is {self.crop_size}; expected at least 1 pixel.")
        if self.overlap_px is not None and not 0 <= self.overlap_px < self.crop_size:
            raise UserValueError(
                f"`overlap_px` is {self.overlap_px}; expected 0 to {self.crop_size - 1}, less than the side of the "
                f"windows, {self.crop_size} pixels."
            )

    @property
    def overlap(self) -> int:
        """Pixels that neighbouring windows share."""
        return window_overlap(self.crop_size) if self.overlap_px is None else self.overlap_px

    @cached_property
    def tops(self) -> list[int]:
        """First image row of each row of windows."""
        return window_starts(self.height, self.crop_size, self.overlap)

    @cached_property
    def lefts(self) -> list[int]:
        """First image column of each column of windows."""
        return window_starts(self.width, self.crop_size, self.overlap)

    @property
    def window(self) -> tuple[int, int]:
        """(height, width) of every window, in pixels."""
        return min(self.crop_size, self.height), min(self.crop_size, self.width)

    def windows(self, first_row: int = 0) -> Iterator[tuple[slice, slice]]:
        """Yield the image rows and columns of every window, from left to right and from top to bottom.

        Args:
            first_row: Row of windows to start with.
        """
        height, width = self.window
        for top in self.tops[first_row:]:
            for left in self.lefts:
                yield slice(top, top + height), slice(left, left + width)

    def rows_per_batch(self, windows_per_batch: int) -> int:
        """Return the number of rows of windows that form a group. A batch never contains windows of two groups.

        A resumed run starts with a whole group. It therefore forms the same batches as the first run, and its logits
        are the same bit by bit.
        """
        return max(1, windows_per_batch // len(self.lefts))

    def restart_row(self, row: int, windows_per_batch: int) -> int:
        """Return the row of windows at which to restart, so that `row` and all later rows get the same results.

        The restart may be above `row`, for two reasons: windows above `row` overlap it, and the batches must be the
        same as in an uninterrupted run.
        """
        overlapping = next(n for n, top in enumerate(self.tops) if top + self.window[0] > self.tops[row] or n == row)
        return overlapping - overlapping % self.rows_per_batch(windows_per_batch)

    def weight(self) -> torch.Tensor:
        """Return the weights of the pixels of a window, (height, width), above 0 and up to 1."""
        height, width = (self._ramp(side) for side in self.window)
        return height[:, None] * width

    def _ramp(self, length: int) -> torch.Tensor:
        """Return the weights along one side of a window."""
        if self.blend == "average":
            return torch.ones(length)
        from_edge = torch.minimum(torch.arange(length), torch.arange(length - 1, -1, -1)) + 0.5
        return torch.sin(torch.pi / 2 * (from_edge / max(self.overlap, 1)).clamp(max=1)) ** 2


@dataclass(frozen=True)
class Window:
    """The pixels of one window of a [`WindowGrid`].

    Args:
        pixel_values: (channels, height, width), from the image processor.
        valid: Mask (height, width), boolean. It is False for pixels without data, which get the weight 0. None: all
            pixels are valid.
    """

    pixel_values: torch.Tensor
    valid: torch.Tensor | None = None


@dataclass(frozen=True)
class JoinedPiece:
    """A finished part of the image: no later window overlaps it.

    Args:
        row: Index of the row of windows that completed the part.
        rows, columns: Image rows and columns of the part.
        sums: Weighted sums of the logits, (students x classes, rows, columns), float32.
        weights: Sums of the weights, (rows, columns). 0 where no window has valid pixels.
    """

    row: int
    rows: slice
    columns: slice
    sums: torch.Tensor
    weights: torch.Tensor


class _Accumulator:
    """Sums the weighted logits of windows.

    It keeps only the rows that later windows overlap. Its memory therefore grows with the width of the image, but not
    with the height.
    """

    def __init__(self, grid: WindowGrid, num_channels: int, device: torch.device):
        self.grid, self.num_channels, self.device = grid, num_channels, device
        self.weight = grid.weight().to(device)
        # Sums for the rows that the next row of windows overlaps. The last channel sums the weights.
        self.pending = torch.zeros(num_channels + 1, 0, grid.width, device=device)

    def add_row(
        self, row: int, windows: Iterator[tuple[torch.Tensor, torch.Tensor | None] | None]
    ) -> Iterator[JoinedPiece]:
        """Add one row of windows and yield the pieces that it completes.

        Args:
            row: Index of the row of windows.
            windows: (logits, valid) of each window. None for a window without valid pixels.
        """
        grid = self.grid
        (height, width), is_last = grid.window, row + 1 == len(grid.tops)
        num_rows = height if is_last else grid.tops[row + 1] - grid.tops[row]
        pending = torch.zeros(self.num_channels + 1, height - num_rows, grid.width, device=self.device)
        rows = slice(grid.tops[row], grid.tops[row] + num_rows)
        active = torch.zeros(self.num_channels + 1, height, width, device=self.device)
        for left, next_left, window in zip(grid.lefts, [*grid.lefts[1:], grid.width], windows):
            if window is not None:
                logits, valid = window
                weight = self.weight if valid is None else self.weight * valid
                active[:-1] += logits * weight
                active[-1] += weight
            columns, num_columns = slice(left, next_left), next_left - left
            done = active[..., :num_columns]
            from_above = self.pending[..., columns]
            done[:, : from_above.shape[1]] += from_above
            pending[..., columns] = done[:, num_rows:]
            yield JoinedPiece(row, rows, columns, done[:-1, :num_rows], done[-1, :num_rows])
            active = F.pad(active[..., num_columns:], (0, num_columns))
        self.pending = pending


def precision(model: Co2SForSemanticSegmentation) -> str:
    """Describe the precision in which a model computes now: the type of its weights, and that of `torch.autocast`."""
    device = model.device.type
    if not torch.is_autocast_enabled(device):
        return str(model.dtype)
    return f"{model.dtype} with autocast to {torch.get_autocast_dtype(device)}"


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
    """Predict an image window by window and yield every part of it as soon as it is complete.

    Neither the whole image nor all of its logits are in memory at any time. For bfloat16, iterate within
    `torch.autocast`: see the top of this file.

    Args:
        model: Model in evaluation mode.
        grid: The windows of the image.
        windows: One [`Window`] for each position of `grid.windows(first_row)`, in that order. None for a window
            without valid pixels, which is not predicted.
        students: Names of the students to compute, in one forward pass.
        windows_per_batch: Windows per forward pass.
        flip: Also predict each window mirrored and average the two. This doubles the time and improves the accuracy
            a little.
        first_row: Row of windows to start with. See [`WindowGrid.restart_row`].

    Yields:
        Pieces from left to right and from top to bottom. The channels of their sums are the classes of the first
        student, followed by the classes of the second student.
    """
    windows = iter(windows)
    accumulator = _Accumulator(grid, len(students) * model.config.num_labels, model.device)
    step = grid.rows_per_batch(windows_per_batch)
    for start in range(first_row, len(grid.tops), step):
        rows = range(start, min(start + step, len(grid.tops)))
        group = itertools.islice(windows, len(rows) * len(grid.lefts))
        predictions = _predict_windows(model, group, students, windows_per_batch, flip)
        for row in rows:
            yield from accumulator.add_row(row, itertools.islice(predictions, len(grid.lefts)))


def _predict_windows(model, windows, students, windows_per_batch, flip):
    """Yield (logits, valid) for each window in order, or None for None. Only the last batch may be smaller."""
    waiting = []
    for window in windows:
        waiting.append(window)
        if sum(window is not None for window in waiting) == windows_per_batch:
            yield from _predict_batch(model, waiting, students, flip)
            waiting = []
    yield from _predict_batch(model, waiting, students, flip)


def _predict_batch(model, windows, students, flip):
    """Return (logits, valid) for each window of one batch. The logits of the students are concatenated."""
    with_data = [window for window in windows if window is not None]
    if not with_data:
        return windows
    batch = torch.stack([window.pixel_values for window in with_data]).to(model.device, model.dtype)
    logits = model.student_logits(batch, students=students)
    if flip:
        mirrored = model.student_logits(batch.flip(-1), students=students)
        logits = {name: (logits[name] + mirrored[name].flip(-1)) / 2 for name in students}
    predictions = iter(torch.cat([logits[name].float() for name in students], dim=1))
    masks = (None if window is None or window.valid is None else window.valid.to(model.device) for window in windows)
    return [None if window is None else (next(predictions), valid) for window, valid in zip(windows, masks)]


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
    """Compute the logits of each student for one image in memory, by overlapping windows.

    Args:
        model: Model in evaluation mode.
        pixel_values: One image (1, channels, height, width) of any size, from the image processor.
        crop_size, overlap_px, blend: See [`WindowGrid`].
        students, windows_per_batch, flip: See [`joined_pieces`].

    Returns:
        Student -> logits (1, classes, height, width), float32, on the device of the model, without gradients.

    Raises:
        ValueError: The batch contains more than one image.
    """
    if pixel_values.shape[0] != 1:
        raise ValueError(f"`pixel_values` has {pixel_values.shape[0]} images; expected 1. Pass them one at a time.")
    height, width = pixel_values.shape[-2:]
    grid = WindowGrid(height, width, crop_size, overlap_px, blend)
    windows = (Window(pixel_values[0, :, rows, columns]) for rows, columns in grid.windows())
    joined = torch.empty(len(students) * model.config.num_labels, height, width, device=model.device)
    for piece in joined_pieces(model, grid, windows, students, windows_per_batch, flip):
        joined[:, piece.rows, piece.columns] = piece.sums / piece.weights
    return {name: logits[None] for name, logits in zip(students, joined.chunk(len(students)))}
