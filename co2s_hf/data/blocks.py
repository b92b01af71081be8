"""Divide large images into square blocks, and draw the three sets in whole blocks.

Neighbouring pixels look alike. If neighbouring tiles of one image were in different sets, the validation would measure
pixels that are almost those of the training. A block is therefore in one set as a whole. Nothing is read here.
"""

from collections.abc import Sequence

import numpy as np

from ..utils.errors import UserValueError
from ..utils.seeding import SPLIT_STREAM, random_generator
from .splits import draw_labeled, draw_validation


Box = tuple[int, int, int, int]  # left, upper, right, lower, in pixels


def block_boxes(size: tuple[int, int], block_px: int, least_px: int = 1) -> list[Box]:
    """Divide an image into blocks. They cover it without overlap.

    Args:
        size: Width and height of the image in pixels.
        block_px: Side of a block in pixels.
        least_px: Least side of a block in pixels, such as the side of a tile. At the right and lower border, a rest
            that is narrower, or narrower than half a block, becomes part of the last block. A smaller image is one
            block.

    Returns:
        The blocks in Z-order (Morton order), so that blocks that follow each other are close to each other.
    """
    columns, rows = (_edges(length, block_px, max(least_px, block_px / 2)) for length in size)
    places = [(column, row) for row in range(len(rows) - 1) for column in range(len(columns) - 1)]
    places.sort(key=lambda place: _z_order(*place))
    return [(columns[column], rows[row], columns[column + 1], rows[row + 1]) for column, row in places]


def _edges(length: int, block_px: int, least: float) -> list[int]:
    edges = [*range(0, length, block_px), length]
    if len(edges) > 2 and edges[-1] - edges[-2] < least:
        del edges[-2]
    return edges


def _z_order(column: int, row: int) -> int:
    """Interleave the bits of a column and a row."""
    bits = range(max(column, row).bit_length())
    return sum((column >> bit & 1) << 2 * bit | (row >> bit & 1) << 2 * bit + 1 for bit in bits)


def check_block_px(block_px: int | None, tile_size: int):
    """Check that a block is not smaller than a tile.

    Raises:
        UserValueError: It is smaller.
    """
    if block_px is not None and block_px < tile_size:
        raise UserValueError(
            f"`block_px` is {block_px}, but `tile_size` is {tile_size}. Choose blocks of several tiles, such as "
            f"`block_px={4 * tile_size}`."
        )


def default_block_px(sizes: Sequence[tuple[int, int]], tile_size: int, enough: int) -> int:
    """Return a side of blocks: four or two tiles if this gives enough blocks, or else one tile.

    Args:
        sizes: Width and height of each image in pixels.
        tile_size: Side of a tile in pixels.
        enough: Number of blocks that is enough.
    """
    for num_tiles in (4, 2):
        if sum(len(block_boxes(size, num_tiles * tile_size, tile_size)) for size in sizes) >= enough:
            return num_tiles * tile_size
    return tile_size


def draw_blocks(
    classes: Sequence[frozenset[int]], labeled_fraction: float, validation_fraction: float | None, seed: int
) -> list[str]:
    """Draw the set of each block, evenly over the images.

    As many runs of blocks that follow each other are formed as blocks are drawn, and one block of each run is drawn.
    Another block is drawn instead if a class would then have no training block. Blocks of the rarest classes are drawn
    first for the labelled set.

    Args:
        classes: Class indices in the labels of each block, in the order of [`block_boxes`], image after image. An
            empty set: no pixel of the block has a label. Such blocks are unlabelled.
        labeled_fraction: Share (above 0, up to 1) of the training blocks with labels that keeps them.
        validation_fraction: Share (above 0, up to 1) of the blocks with labels to draw for validation. None: no
            validation block is drawn.
        seed: Seed of the draw.

    Returns:
        "labeled", "unlabeled" or "validation" for each block. No set that is drawn is empty.

    Raises:
        UserValueError: There are fewer blocks with labels than sets.
    """
    places = [place for place, present in enumerate(classes) if present]
    drawn = ["validation"] * (validation_fraction is not None) + ["labeled"]
    drawn += ["unlabeled"] * (labeled_fraction < 1 and len(places) == len(classes))
    if len(places) < len(drawn):
        raise UserValueError(
            f"The images have {len(places)} block{'s' * (len(places) != 1)} with labels, but {len(drawn)} sets are "
            f"drawn ({', '.join(drawn)}). Choose smaller blocks with `block_px`. They must not be smaller than the "
            "tiles, so choose a smaller `tile_size`, too, if needed."
        )
    sets = ["unlabeled"] * len(classes)
    if validation_fraction is not None:
        wanted = _number(validation_fraction, len(places), len(places) - len(drawn) + 1)
        order = _even_order(len(places), wanted, random_generator(seed, SPLIT_STREAM, 0))
        known = [classes[place] for place in places]
        held_out, others = draw_validation(known, range(len(places)), wanted / len(places), seed, order)
        for index in held_out:
            sets[places[index]] = "validation"
        places = [places[index] for index in others]
    wanted = _number(labeled_fraction, len(places), len(places) - ("unlabeled" in drawn))
    order = _even_order(len(places), wanted, random_generator(seed, SPLIT_STREAM, 1))
    for index in draw_labeled([classes[place] for place in places], wanted / len(places), seed, order)[0]:
        sets[places[index]] = "labeled"
    return sets


def _number(fraction: float, total: int, most: int) -> int:
    return min(max(1, round(fraction * total)), most)


def _even_order(total: int, wanted: int, rng: np.random.Generator) -> list[int]:
    """Return an order of which the first `wanted` indices lie in different runs of neighbours.

    Args:
        total: Number of indices.
        wanted: Number of runs.
        rng: Random generator.
    """
    runs = [rng.permutation(run).tolist() for run in np.array_split(np.arange(total), wanted)]
    runs = [runs[place] for place in rng.permutation(wanted)]
    return [run[turn] for turn in range(len(max(runs, key=len))) for run in runs if turn < len(run)]
