"""Draw the sets of tiles in blocks, or by a validation area, so that no training tile shows validation pixels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import shapely

from ..data.blocks import draw_blocks
from ..data.splits import SPLITS
from ..utils.errors import UserValueError
from .georeferencing import LONG_LAT, convert
from .label_tiles import TileFacts


SMALL_SHARE = 0.01  # of a tile; tiles of neighbouring rasters share less, if their coordinate systems differ


@dataclass(frozen=True)
class TileSets:
    """Sets of tiles.

    Args:
        tiles: "labeled", "unlabeled" and "validation" -> indices of the tiles.
        num_blocks: "labeled", "unlabeled" and "validation" -> number of blocks that have tiles in the set.
        num_copies: Number of training tiles that were left out because a validation tile shows the same.
        num_useless: Number of tiles of validation blocks that were left out because they have no label.
    """

    tiles: dict[str, list[int]]
    num_blocks: dict[str, int]
    num_copies: int
    num_useless: int


def num_blocks_needed(labeled_fraction: float, validation_fraction: float | None) -> int:
    """Return how many blocks with labels are enough to draw the sets in about these shares."""
    shares = [labeled_fraction] + [validation_fraction] * (validation_fraction is not None)
    return max(len(shares) + (labeled_fraction < 1), *(math.ceil(1 / share) for share in shares))


def draw_tile_sets(
    facts: Sequence[TileFacts], labeled_fraction: float, validation_fraction: float | None, seed: int
) -> TileSets:
    """Draw the set of each tile.

    Tiles without a label are unlabelled. In a validation block they are left out.

    Args:
        facts: The tiles.
        labeled_fraction: Share of the training blocks with labels that keeps them.
        validation_fraction: Share of the blocks with labels to draw for validation. None: the tiles in the validation
            area are validation tiles.
        seed: Seed of the draw.

    Raises:
        UserValueError: A set that is needed would be empty.
    """
    _check_labels(facts, validation_fraction is None)
    classes: dict[int, frozenset[int]] = {}  # of each block
    for tile in facts:
        if not tile.in_area:
            classes[tile.block] = classes.get(tile.block, frozenset()) | tile.classes
    drawn = dict(zip(classes, draw_blocks(list(classes.values()), labeled_fraction, validation_fraction, seed)))
    tiles, num_useless = {split: [] for split in SPLITS}, 0
    for place, tile in enumerate(facts):
        split = "validation" if tile.in_area else drawn[tile.block]
        if tile.classes:
            tiles[split].append(place)
        elif split == "validation":
            num_useless += 1
        else:
            tiles["unlabeled"].append(place)
    copies = _copies_of_validation(facts, tiles["validation"], validation_fraction is None)
    for split in ("labeled", "unlabeled"):
        tiles[split] = [place for place in tiles[split] if place not in copies]
    if not tiles["labeled"]:
        raise UserValueError(
            "All labelled training tiles show the same as validation tiles. Choose smaller blocks with `block_px`, "
            "another `seed`, or other rasters."
        )
    num_blocks = {split: len({facts[place].block for place in places}) for split, places in tiles.items()}
    return TileSets(tiles, num_blocks, len(copies), num_useless)


def _check_labels(facts: Sequence[TileFacts], has_area: bool):
    """Check that there are tiles with labels for the training, and in the validation area."""
    labeled = [tile for tile in facts if tile.classes]
    if not labeled:
        raise UserValueError(
            f"None of the {len(facts)} tiles has a label: the features lie where the rasters have no data, or outside "
            "the labelled area. Correct the files."
        )
    if has_area and not any(tile.in_area for tile in labeled):
        raise UserValueError(
            "No tile has a label in the validation area. Name an area in which features, or the background, lie."
        )
    if has_area and all(tile.in_area for tile in labeled):
        raise UserValueError(
            f"The validation area touches all {len(labeled)} tiles with labels, so none remains for the training. "
            "Choose a smaller area, or a smaller `tile_size`."
        )


def _copies_of_validation(facts: Sequence[TileFacts], validation: list[int], has_area: bool) -> set[int]:
    """Return the other tiles with the pixels of a validation tile, or with a validation tile of another raster.

    With a validation area, training tiles lie outside it, whatever raster they are of.
    """
    held_out = set(validation)
    digests = {facts[place].digest for place in validation}
    others = [place for place in range(len(facts)) if place not in held_out]
    copies = {place for place in others if facts[place].digest in digests}
    if has_area or len({tile.raster for tile in facts}) == 1:
        return copies
    rasters = np.array([tile.raster for tile in facts])
    places, outlines = np.array(others), _outlines(facts)
    if not len(places):
        return copies
    pairs = shapely.STRtree(outlines[validation]).query(outlines[places], predicate="intersects")
    ours, theirs = places[pairs[0]], np.array(validation)[pairs[1]]
    different = rasters[ours] != rasters[theirs]
    ours, theirs = ours[different], theirs[different]
    shared = shapely.area(shapely.intersection(outlines[ours], outlines[theirs])) / shapely.area(outlines[ours])
    return copies | set(ours[shared > SMALL_SHARE].tolist())


def _outlines(facts: Sequence[TileFacts]) -> np.ndarray:
    """Return the outlines of tiles in degrees."""
    found = np.empty(len(facts), dtype=object)
    for place, tile in enumerate(facts):
        grid = tile.grid
        x, y = grid.transform @ (np.array([0, grid.width, grid.width, 0]), np.array([0, 0, grid.height, grid.height]))
        found[place] = shapely.Polygon(np.stack(convert(grid.crs, LONG_LAT, x, y), axis=1))
    return found
