"""Draw the sets of large images in blocks: choose the side of a block, cut all images, draw the set of each block."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from ..utils.errors import UserValueError
from .block_files import cut_samples, read_size
from .blocks import check_block_px, default_block_px, draw_blocks
from .options import PERCENTILES_SCALE, DataOptions
from .reading import ImageRule
from .samples import Samples
from .splits import SPLITS
from .validation.checks import merge_findings, raise_errors
from .validation.scan import scan_labels


@dataclass(frozen=True)
class BlockCut:
    """How images are cut into blocks before the sets are drawn.

    Args:
        folder: Folder for the files of the blocks. It must exist as long as the blocks are read.
        tile_size: Side in pixels of the tiles that the blocks will be cut into. No block of a larger image is smaller.
        block_px: Side of a block in pixels. None: images are cut only if fewer of them have labels than sets are
            drawn. The side is then that of [`default_block_px`].

    Raises:
        UserValueError: A block is smaller than a tile.
    """

    folder: Path
    tile_size: int
    block_px: int | None = None

    def __post_init__(self):
        check_block_px(self.block_px, self.tile_size)


@dataclass(frozen=True)
class BlockSets:
    """Sets of blocks.

    Args:
        sets: "labeled", "unlabeled" and "validation" -> blocks, as 8-bit RGB images and maps of class indices.
        block_px: Side of a block in pixels.
        read_rule: Rule by which the original images were read.
        origins: Path of the file of a block -> original file, and place of the block in it.
    """

    sets: dict[str, Samples]
    block_px: int
    read_rule: ImageRule
    origins: dict[str, str]


def choose_block_px(
    cut: BlockCut, pool: Samples | None, settled: dict[str, Samples], options: DataOptions
) -> int | None:
    """Return the side of the blocks in pixels, or None if images are drawn as a whole.

    Args:
        cut: How to cut.
        pool: All samples to draw from. None: no set is drawn.
        settled: Sets that already exist.
        options: Options of the data.

    Raises:
        UserValueError: `block_px` is given, but no set is drawn, or images are drawn in other groups.
    """
    if cut.block_px is not None and options.group_regex is not None:
        raise UserValueError(
            f"`block_px` is {cut.block_px} and `group_regex` is '{options.group_regex}'. Give one of them: the sets "
            "are drawn in blocks, or in groups of images."
        )
    if cut.block_px is not None and pool is None:
        raise UserValueError(
            f"`block_px` is {cut.block_px}, but the data already has its sets, so none are drawn. Leave `block_px` "
            "out, or draw new sets: `labeled_fraction=0.125`."
        )
    if cut.block_px is not None or pool is None or options.group_regex is not None:
        return cut.block_px
    known = [place for place, label in enumerate(pool.files("label")) if label is not None]
    shares = [_labeled_fraction(options)] + [options.validation_fraction] * ("validation" not in settled)
    num_sets = len(shares) + (shares[0] < 1 and len(known) == len(pool))
    if not known or len(known) >= num_sets:
        return None
    enough = max(num_sets, *(math.ceil(1 / share) for share in shares))
    return default_block_px([read_size(pool[place]) for place in known], cut.tile_size, enough)


def _labeled_fraction(options: DataOptions) -> float:
    return 1.0 if options.labeled_fraction is None else options.labeled_fraction


def draw_block_sets(
    cut: BlockCut,
    block_px: int,
    pool: Samples,
    settled: dict[str, Samples],
    options: DataOptions,
    seed: int,
    progress: bool = False,
) -> BlockSets:
    """Cut all images into blocks, and draw the missing sets from the blocks of a pool.

    Args:
        cut: How to cut.
        block_px: Side of the blocks in pixels.
        pool: All samples to draw from.
        settled: Sets that already exist.
        options: Options of the data.
        seed: Seed of the draw.
        progress: Show progress bars.

    Raises:
        DataError: Files cannot be used. The message lists all of them.
        UserValueError: There are fewer blocks with labels than sets.
    """
    rule = pool.image_rule
    if options.scale == PERCENTILES_SCALE:
        training = pool + settled["unlabeled"] if "unlabeled" in settled else pool
        rule = training.percentile_rule()
    blocks, origins, findings = {}, {}, []
    for name, samples in {"pool": pool, **settled}.items():
        samples = replace(samples, image_rule=rule)
        blocks[name], files, errors = cut_samples(samples, block_px, cut.tile_size, cut.folder / name, progress)
        origins |= files
        findings += errors
    raise_errors(merge_findings(findings))
    pool = blocks.pop("pool")
    classes = [frozenset() if facts is None else facts.classes for facts in scan_labels(pool, progress)]
    fraction = None if "validation" in settled else options.validation_fraction
    drawn = draw_blocks(classes, _labeled_fraction(options), fraction, seed)
    for name in SPLITS:
        part = pool.select([place for place, chosen in enumerate(drawn) if chosen == name])
        blocks[name] = blocks[name] + part if name in blocks else part
    return BlockSets(blocks, block_px, rule, origins)
