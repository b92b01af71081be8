"""Cut rasters, and the labels that polygons give them, into tiles. Nothing larger than a tile is in memory."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ..data.blocks import Box, block_boxes
from ..data.export import Tile, tile_boxes
from ..data.options import IGNORE
from .burning import PolygonSet
from .georeferencing import GeoGrid
from .options import TileOptions
from .raster_group import RasterGroup, part_of
from .vector_labels import VectorLabels


@dataclass(frozen=True)
class TileFacts:
    """What is known of a tile.

    Args:
        name: Name of the file of the tile.
        block: Number of its block.
        raster: Name of its raster.
        grid: Its pixel grid.
        counts: Class index, or 255 for "no class" -> number of pixels.
        digest: Hash of the pixels of the image.
        in_area: Whether the tile touches the validation area.
    """

    name: str
    block: int
    raster: str
    grid: GeoGrid
    counts: dict[int, int]
    digest: bytes
    in_area: bool

    @property
    def classes(self) -> frozenset[int]:
        """Indices of the classes in the tile."""
        return frozenset(self.counts) - {IGNORE}


class TileCutter:
    """Cuts rasters into tiles, block after block.

    A block is divided as an image is: the last tile of a row or column is moved back so that it ends at the border of
    the block. No tile is in two blocks. Pixels without data are black and have no class.

    Args:
        group: The rasters.
        labels: Labels of the rasters.
        options: Sides of tiles and blocks.
        area: Polygons of the validation area. Tiles that touch it have labels only inside it. None: there is none.

    Attributes:
        facts: Facts about each tile that [`rows`] has returned, in this order.
        num_without_data: Number of tiles that were left out because no pixel has data.
        num_plain: Number of tiles that were left out because they have no label, and all pixels have one colour.
        num_useless: Number of tiles that were left out because they touch the validation area, but have no label in
            it.
    """

    def __init__(self, group: RasterGroup, labels: VectorLabels, options: TileOptions, area: PolygonSet | None = None):
        self.group, self.labels, self.options, self.area = group, labels, options, area
        self.facts: list[TileFacts] = []
        self.num_without_data = self.num_plain = self.num_useless = 0

    def rows(self, block_px: int, progress: bool = False) -> Iterator[dict]:
        """Return the rows of the data set: the PNG files of image and label map. The label map may be None.

        Args:
            block_px: Side of a block in pixels.
            progress: Show a progress bar.
        """
        tiles = self._boxes(block_px)
        for block, raster, box in tqdm(tiles, desc="cutting tiles", unit="tile", disable=not progress, leave=False):
            if (tile := self._cut(block, raster, box)) is not None:
                yield tile.row()

    def _boxes(self, block_px: int) -> list[tuple[int, str, Box]]:
        """Return block, raster and place of each tile."""
        found, block, size = [], 0, self.options.tile_size
        for raster, grid in self.group.grids.items():
            for left, upper, right, lower in block_boxes((grid.width, grid.height), block_px, size):
                inner = tile_boxes((right - left, lower - upper), size, self.options.tile_overlap)
                found += [(block, raster, (left + a, upper + b, left + c, upper + d)) for a, b, c, d in inner]
                block += 1
        return found

    def _cut(self, block: int, raster: str, box: Box) -> Tile | None:
        """Cut a tile, and note its facts. None: it is left out."""
        left, upper, right, lower = box
        values, valid = self.group.rasters[raster].read(slice(upper, lower), slice(left, right))
        if not valid.any():
            self.num_without_data += 1
            return None
        pixels = np.array(self.group.rule.to_8_bit(values), order="C")
        pixels[~valid] = 0
        grid = part_of(self.group.grids[raster], box)
        labels = self.labels.read(grid)
        labels[~valid] = IGNORE
        in_area = self.area is not None and self.area.touches(grid) and (inside := self.area.covers(grid)).any()
        if in_area:
            labels[~inside] = IGNORE
        indices, numbers = np.unique(labels, return_counts=True)
        counts = dict(zip(indices.tolist(), numbers.tolist()))
        name = f"{self.group.names[raster]}_{left}_{upper}.png"
        tile = Tile(name, Image.fromarray(pixels), Image.fromarray(labels) if set(counts) != {IGNORE} else None)
        if in_area and tile.label is None:
            self.num_useless += 1
            return None
        if tile.label is None and tile.is_plain:
            self.num_plain += 1
            return None
        digest = hashlib.blake2b(pixels, digest_size=16).digest()
        self.facts.append(TileFacts(name, block, raster, grid, counts, digest, in_area))
        return tile


def choose_block_px(grids: Sequence[GeoGrid], labels: VectorLabels, options: TileOptions, enough: int) -> int:
    """Return the side of the blocks in which the sets are drawn.

    Args:
        grids: Pixel grids of the rasters.
        labels: Labels of the rasters.
        options: Sides of tiles and blocks. If it has a side of the blocks, this is returned.
        enough: Number of blocks with labels that is enough.

    Returns:
        Four or two tiles if this gives enough blocks with labels, or else one tile.
    """
    if options.block_px is not None:
        return options.block_px
    for num_tiles in (4, 2):
        block_px, found = num_tiles * options.tile_size, 0
        for grid in grids:
            for box in block_boxes((grid.width, grid.height), block_px, options.tile_size):
                found += labels.coverage(part_of(grid, box)) != "outside"
                if found >= enough:
                    return block_px
    return options.tile_size
