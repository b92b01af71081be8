"""Cut images into square tiles, and draw augmented crops of the tiles that are aligned to the patches."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ...data.reading import ImageRule, StoredFile, find_images
from ...data.samples import Samples
from ...data.validation.checks import merge_findings, raise_errors, unreadable
from ...data.validation.scan import scan_images
from ...data.views import draw_appearance
from ...utils.errors import UserFileNotFoundError, UserValueError
from ...utils.seeding import PRETRAINING_STREAM, PRETRAINING_VIEWS_STREAM, random_generator


@dataclass(frozen=True)
class Tile:
    """A square part of an image.

    Args:
        path: Path of the image.
        box: Left, upper, right and lower edge in pixels of the image.
        digest: Hash of the image file, which identifies cached features.
    """

    path: str
    box: tuple[int, int, int, int]
    digest: str = ""

    def read(self, size: int) -> Image.Image:
        """Read the tile as an RGB image of `size` x `size` pixels."""
        image = ImageRule().read(StoredFile(self.path))
        return image.resize((size, size), Image.Resampling.BICUBIC, box=self.box)


def list_tiles(folders: Sequence[str], exclude: str | None, tile_size: int, progress: bool = False) -> list[Tile]:
    """Find and decode all images in some folders, and cut them into tiles.

    The tiles of a large image form a grid. They overlap if the image's side is no multiple of the tile's side. The
    tile of an image with a side below `tile_size` is its largest square in the middle, which is enlarged when it is
    read.

    Args:
        folders: Folders of images; subfolders are searched, too. Folders labels/ beside a folder images/ are left out.
        exclude: Text file that names images to leave out, such as a list of validation images. Each line begins with
            the image's path below one of the folders or below its parent. A space ends the path, or a tab if there is
            one. None: use all images.
        tile_size: Side of a tile in pixels.
        progress: Show a progress bar.

    Raises:
        UserFileNotFoundError: A folder or the list does not exist, or the folders have no image.
        UserValueError: The list names an image that is not there.
        DataError: An image cannot be read. The message lists all of them.
    """
    paths = [path for folder in folders for path in find_images(Path(folder), leave_out_labels=True)]
    if exclude is not None:
        left_out = _excluded(folders, Path(exclude))
        paths = [path for path in paths if path.resolve() not in left_out]
    if not paths:
        raise UserFileNotFoundError(f"`images` is {', '.join(folders)}, where no image is found. Name other folders.")
    facts = scan_images(Samples.of_files([str(path) for path in paths], [None] * len(paths)), progress)
    raise_errors(merge_findings(unreadable(found.name, found.error) for found in facts if found.error))
    return [
        Tile(str(path), box, found.digest)
        for path, found in zip(paths, facts)
        for box in _boxes(*found.size, tile_size)
    ]


def _excluded(folders: Sequence[str], list_file: Path) -> set[Path]:
    """Return the resolved paths of the images that a list names."""
    if not list_file.is_file():
        raise UserFileNotFoundError(f"`exclude` is '{list_file}', which does not exist.")
    try:
        lines = list_file.read_text(encoding="utf-8-sig").splitlines()
    except ValueError as error:
        raise UserValueError(
            f"`exclude` is '{list_file}', which is not a UTF-8 text file with one image per line ({error})."
        ) from error
    roots = [root for folder in folders for root in (Path(folder), Path(folder).parent)]
    found = set()
    for line in filter(None, map(str.strip, lines)):
        name = line.split("\t")[0].strip() if "\t" in line else line.split()[0]
        name = name.replace("\\", "/")  # as in lists that were written on Windows
        is_below = not Path(name).is_absolute() and ".." not in Path(name).parts
        existing = [root / name for root in roots if is_below and os.path.isfile(root / name)]
        if not existing:
            raise UserValueError(
                f"{list_file} names '{name:.200}', which is not below {', '.join(folders)}. Correct the line."
            )
        found |= {path.resolve() for path in existing}
    return found


def _boxes(width: int, height: int, tile_size: int) -> list[tuple[int, int, int, int]]:
    side = min(width, height, tile_size)
    lefts, uppers = (_starts(length, side, tile_size) for length in (width, height))
    return [(left, upper, left + side, upper + side) for upper in uppers for left in lefts]


def _starts(length: int, side: int, tile_size: int) -> list[int]:
    """Return the first pixels of the tiles along one axis. A rest below an eighth of a tile is left out."""
    if side < tile_size:
        return [(length - side) // 2]
    count = max(1, round((length - side) / side + 0.375) + 1) if length > side else 1
    return [round(index * (length - side) / max(count - 1, 1)) for index in range(count)]


@dataclass(frozen=True)
class CropGeometry:
    """A square crop of a tile, in units of patches of the tile, and a flip and rotations by 90 degrees.

    Args:
        left, upper, side: Place and side of the crop in patches.
        flip: Mirror left to right, after cropping.
        turns: Number of rotations by 90 degrees, after the flip.
    """

    left: int
    upper: int
    side: int
    flip: bool
    turns: int

    @classmethod
    def draw(cls, rng: np.random.Generator, grid: int, sides: Sequence[int]) -> "CropGeometry":
        """Draw a crop of a tile with `grid` x `grid` patches. Its side is one of `sides`."""
        side = int(rng.choice(sides))
        left, upper = rng.integers(grid - side + 1, size=2).tolist()
        return cls(left, upper, side, bool(rng.integers(2)), int(rng.integers(4)))

    def of_image(self, tile: Image.Image, grid: int, size: int) -> np.ndarray:
        """Return the crop of a tile, (size, size, 3), uint8."""
        patch = tile.width / grid
        box = (self.left, self.upper, self.left + self.side, self.upper + self.side)
        crop = tile.resize((size, size), Image.Resampling.BILINEAR, box=tuple(edge * patch for edge in box))
        return self._turned(np.asarray(crop)).copy()

    def of_features(self, features: np.ndarray, size: int) -> torch.Tensor:
        """Return the crop of a feature grid (grid, grid, channels), resized to (channels, size, size), float32."""
        crop = features[self.upper : self.upper + self.side, self.left : self.left + self.side]
        crop = torch.from_numpy(self._turned(crop).copy()).float().permute(2, 0, 1)
        if self.side == size:
            return crop
        return torch.nn.functional.interpolate(crop[None], size=(size, size), mode="bilinear", antialias=True)[0]

    def _turned(self, values: np.ndarray) -> np.ndarray:
        return np.rot90(values[:, ::-1] if self.flip else values, self.turns)


class TileCrops(Dataset):
    """The items of a whole pretraining. An item is one augmented crop of one tile.

    Each pass through the tiles has a new random order. Order and crops depend only on the seed and the index of the
    item, so that a run can continue from any item.

    Each item is a dictionary: `image` (3, crop, crop), uint8; `appearance` (6,), float32, see [`draw_appearance`];
    `tile`, the number of the tile; with `teacher`: `features` (channels, patches, patches) and `class_token`
    (channels,) of the teacher, float32.

    Args:
        tiles: All tiles.
        tile_size: Side of a tile in pixels.
        crop_size: Side of a crop in pixels, after resizing.
        patch_size: Side of a patch of the model in pixels.
        scales: Smallest and largest factor of the crops' random scale.
        length: Number of items.
        seed: Seed of all random numbers.
        teacher: Cached or computed features of the teacher, see [`TeacherFeatures`]. None: no teacher.
    """

    def __init__(
        self,
        tiles: Sequence[Tile],
        tile_size: int,
        crop_size: int,
        patch_size: int,
        scales: tuple[float, float],
        length: int,
        seed: int = 0,
        teacher=None,
    ):
        self.tiles, self.tile_size, self.crop_size = tiles, tile_size, crop_size
        self.grid, self.crop_grid = tile_size // patch_size, crop_size // patch_size
        # A crop of fewer patches of the tile is enlarged: its scale is above 1.
        smallest, largest = (round(self.crop_grid / scale) for scale in reversed(scales))
        self.sides = range(max(1, smallest), min(self.grid, largest) + 1)
        self.length, self.seed, self.teacher = length, seed, teacher

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        lap, place = divmod(index, len(self.tiles))
        number = int(_order(self.seed, lap, len(self.tiles))[place])
        rng = random_generator(self.seed, PRETRAINING_VIEWS_STREAM, index)
        geometry = CropGeometry.draw(rng, self.grid, self.sides)
        tile = self.tiles[number].read(self.tile_size)
        image = torch.from_numpy(geometry.of_image(tile, self.grid, self.crop_size)).permute(2, 0, 1)
        item = {"image": image, "appearance": torch.from_numpy(draw_appearance(rng)), "tile": number}
        if self.teacher is not None:
            features, class_token = self.teacher(self.tiles[number], tile)
            item["features"] = geometry.of_features(features, self.crop_grid)
            item["class_token"] = torch.from_numpy(np.array(class_token)).float()  # a copy: the cache is read-only
        return item


_orders: dict[tuple[int, int, int], np.ndarray] = {}


def _order(seed: int, lap: int, size: int) -> np.ndarray:
    """Return the order of the tiles in one pass. Only the newest order is kept."""
    key = (seed, lap, size)
    if key not in _orders:
        _orders.clear()
        _orders[key] = random_generator(seed, PRETRAINING_STREAM, lap).permutation(size)
    return _orders[key]
