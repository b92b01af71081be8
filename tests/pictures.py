"""Read the colours of figures at known places."""

from pathlib import Path

import numpy as np
from PIL import Image


def read_picture(path: Path) -> np.ndarray:
    """Return a picture as (height, width, 3), uint8."""
    return np.asarray(Image.open(path).convert("RGB"))


def middle_row(picture: np.ndarray, color: tuple[int, int, int]) -> int:
    """Return the row in the middle of all pixels of a colour."""
    rows = np.flatnonzero((picture == color).all(axis=-1).any(axis=1))
    return int(rows[0] + rows[-1]) // 2


def color_runs(line: np.ndarray, min_length: int = 30) -> list[tuple[int, int, int]]:
    """Return the colours along a line of pixels (n, 3) that repeat for at least `min_length` pixels, without white."""
    starts = np.flatnonzero(np.r_[True, (line[1:] != line[:-1]).any(axis=1)])
    lengths = np.diff(np.r_[starts, len(line)])
    colors = [tuple(map(int, line[start])) for start, length in zip(starts, lengths) if length >= min_length]
    return [color for color in colors if color != (255, 255, 255)]
