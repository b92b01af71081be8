"""Read the training data that the QGIS plugin Deepness exports: tiles of a raster, and their masks, in one folder.

The plugin (https://github.com/PUTvision/qgis-plugin-deepness) writes tile_img_X_Y.png and tile_mask_X_Y.png. X and Y
count the tiles from the left and from the top. A mask has one band: 255 inside the polygons of a layer, 0 elsewhere.
Neighbouring tiles usually overlap (by 15 % unless changed). The export does not say by how much, so it is measured.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ..utils.errors import UserValueError
from .image_files import StoredFile
from .reading import LabelRule
from .samples import Samples
from .validation.checks import Finding


TILES_KIND = "tiles of Deepness"  # heading of the findings
MASK_RULE = LabelRule(label_map=((0, 0, 0), (255, 255, 1)))
NAMES = {name: re.compile(rf"tile_{name}_(\d{{1,9}})_(\d{{1,9}})\.png") for name in ("img", "mask")}
Place = tuple[str, int, int]  # folder, X, Y
MOST_PAIRS = 200  # of neighbouring masks that are compared
NUM_BLOCKS = (8, 4, 2, 1)  # of the validation set, if all blocks are full: the first number that loses few tiles
MOST_LOST = 0.2  # share of the training tiles that may be lost because they overlap validation tiles


def are_tiles(samples: Samples) -> bool:
    """Return whether all images and label files have the names of tiles and masks."""
    pairs = zip(samples.paths, samples.files("label"))
    return all(_place("img", image) and (mask is None or _place("mask", mask.path)) for image, mask in pairs)


def find_tiles(folder: Path) -> tuple[Samples, list[Finding]] | None:
    """Pair the tiles and the masks of exports: those of a folder and of its direct subfolders, one export per folder.

    Returns:
        The samples, and a warning for each mask without a tile. None: the folder has `images/`, or no tiles and masks.

    Raises:
        UserValueError: There are masks, but no tiles.
    """
    if (folder / "images").exists():
        return None
    files = [str(path) for pattern in ("tile_*.png", "*/tile_*.png") for path in folder.glob(pattern)]
    tiles, masks = (
        {place: path for path in sorted(files) if (place := _place(name, path)) is not None} for name in NAMES
    )
    if not tiles and not masks:
        return None
    if not tiles:
        raise UserValueError(
            f"'{folder}' has masks of Deepness, such as '{next(iter(masks.values()))}', but no tiles "
            "tile_img_X_Y.png. Export the image tiles, too."
        )
    findings = [
        Finding("labels without an image", f"{path} has no tile of the same place.", True, "no tile")
        for place, path in masks.items()
        if place not in tiles
    ]
    return Samples.of_files(list(tiles.values()), [masks.get(place) for place in tiles]), findings


class TileGrid:
    """The places of tiles, and which of them overlap.

    Args:
        tiles: The tiles. Their masks are read to measure the overlap.
    """

    def __init__(self, tiles: Samples):
        places = [_place("img", path) or (path, 0, 0) for path in tiles.paths]  # other images overlap no tile
        folders = {folder: number for number, folder in enumerate(dict.fromkeys(folder for folder, _, _ in places))}
        self._places = np.array([(folders[folder], x, y) for folder, x, y in places], dtype=np.int64).reshape(-1, 3)
        masks = dict(zip(map(tuple, self._places.tolist()), tiles.files("label")))
        self._reaches = []
        for number in folders.values():
            own = {(x, y): mask for (folder, x, y), mask in masks.items() if folder == number and mask is not None}
            self._reaches.append(measure_reach(own))

    def overlapping(self, index: int) -> list[int]:
        """Return the indices of the tiles that may overlap a tile. It is one of them."""
        folder, *place = self._places[index]
        is_near = np.abs(self._places[:, 1:] - place).max(axis=1) <= self._reaches[folder]
        return np.flatnonzero(is_near & (self._places[:, 0] == folder)).tolist()

    def overlapping_among(self, indices: Sequence[int]) -> Callable[[int], list[int]]:
        """Return [`overlapping`] for a list of some tiles. Its argument and its result are indices of this list."""
        number = {index: place for place, index in enumerate(indices)}
        return lambda place: [number[other] for other in self.overlapping(indices[place]) if other in number]

    def blocks(self, fraction: float) -> list[tuple[int, int, int]]:
        """Return the block of each tile: its export, column and row. Whole blocks are drawn for validation.

        Args:
            fraction: Share of the tiles to draw.
        """
        blocks = np.empty_like(self._places)
        side = _block_side(len(self._places), fraction, max(self._reaches))
        for folder in range(len(self._reaches)):
            inside = self._places[:, 0] == folder
            places = self._places[inside, 1:]
            places = places - places.min(axis=0)
            # A rest that is narrower than half a block becomes part of the last block.
            last = np.maximum((places.max(axis=0) + 1 + side // 2) // side, 1) - 1
            blocks[inside] = np.column_stack([np.full(len(places), folder), np.minimum(places // side, last)])
        return list(map(tuple, blocks.tolist()))


def without_overlap(tiles: Samples, others: Samples) -> Samples:
    """Leave out the tiles that may overlap one of the others."""
    grid = TileGrid(tiles + others)
    lost = {index for place in range(len(others)) for index in grid.overlapping(len(tiles) + place)}
    return tiles.select([index for index in range(len(tiles)) if index not in lost])


def _place(name: str, path: str) -> Place | None:
    """Return folder, X and Y of a tile ("img") or a mask ("mask"). None: it has another name."""
    found = NAMES[name].fullmatch(Path(path).name)
    return found and (str(Path(path).parent), int(found[1]), int(found[2]))


def _block_side(num_tiles: int, fraction: float, reach: int) -> int:
    """Choose the side of a block in tiles: few large blocks lose fewer tiles, many small ones show more places."""
    wanted = fraction * num_tiles
    for number in NUM_BLOCKS:
        side = max(1, math.ceil(math.sqrt(wanted / number)))
        if number * ((side + 2 * reach) ** 2 - side**2) <= MOST_LOST * (num_tiles - wanted):
            break
    return side


def measure_reach(masks: dict[tuple[int, int], StoredFile]) -> int:
    """Measure from masks up to how many places apart two tiles overlap. 0: they do not overlap.

    The masks of an export are cut from one large mask, so where tiles overlap, their masks are equal. The result is
    the largest overlap at which this is true of all pairs of neighbours, so it is never too small. If all masks are
    blank or cannot be read, an overlap of at most half a tile is assumed.

    Args:
        masks: (X, Y) -> mask.
    """
    overlaps, side, num_pairs = None, 0, 0
    for one, other in _borders(masks):
        if len(one) != len(other) or (overlaps is not None and len(one) != side):
            continue
        if len({*one, *other}) == 1:  # both are blank: every overlap is possible
            continue
        if overlaps is None:
            side, overlaps = len(one), range(1, len(one))
        overlaps = [overlap for overlap in overlaps if one[-overlap:] == other[:overlap]]
        num_pairs += 1
        if not overlaps or num_pairs == MOST_PAIRS:
            break
    if overlaps is None:
        return 1
    return (side - 1) // (side - max(overlaps, default=0))


def _borders(masks: dict[tuple[int, int], StoredFile]) -> Iterator[tuple[Sequence[bytes], Sequence[bytes]]]:
    """Return the columns of masks and of their right neighbours, and the rows of masks and of their lower neighbours.

    Masks that cannot be read are skipped. They become errors of the data when all files are checked.
    """
    for (x, y), mask in masks.items():
        for neighbour, transpose in ((masks.get((x + 1, y)), True), (masks.get((x, y + 1)), False)):
            if neighbour is None:
                continue
            try:
                pair = [LabelRule().read_values(file) for file in (mask, neighbour)]
            except UserValueError:
                continue
            if pair[0].shape == pair[1].shape:
                yield tuple([line.tobytes() for line in (values.T if transpose else values)] for values in pair)
