"""Make a data set from rasters and from polygons that are their labels: tiles, sets, classes."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from datasets import (
    Dataset,
    DatasetDict,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from datasets import Image as ImageColumn

from ..data.bands import resolve_bands
from ..data.blocks import check_block_px
from ..data.export import FEATURES, check_tiles
from ..data.options import DataOptions
from ..data.reading import ImageRule
from ..data.samples import Samples
from ..data.sources import Source
from ..data.splits import SPLITS
from ..data.validation.checks import Scans, merge_findings, never_labeled
from ..data.validation.scan import ImageFacts, LabelFacts
from ..utils.errors import UserValueError
from ..utils.figures import palette_or_default
from .label_tiles import TileCutter, TileFacts, choose_block_px
from .options import TileOptions, VectorLabelOptions
from .raster_group import open_rasters
from .tile_sets import TileSets, draw_tile_sets, num_blocks_needed
from .vector_labels import open_area, open_vector_labels


@dataclass(frozen=True)
class PreparedRasters:
    """A data set of tiles.

    Args:
        source: The sets, the classes, and what is known of the tiles.
        splits: The same tiles as a data set, with the columns image and label.
        summary: Lines for the user: features, tiles and blocks.
    """

    source: Source
    splits: DatasetDict
    summary: list[str]


@contextmanager
def labeled_rasters(
    rasters: Sequence[str],
    vector_options: VectorLabelOptions,
    data_options: DataOptions,
    tile_options: TileOptions,
) -> Iterator[TileCutter]:
    """Open rasters and the polygons that are their labels, and check that they fit each other.

    Args:
        rasters: Files, folders, patterns and addresses, as in [`find_scenes`].
        vector_options: The polygons and the areas.
        data_options: Bands, scale and class names.
        tile_options: Sides of tiles and blocks, and the ground sampling distance.

    Raises:
        UserFileNotFoundError: A file is missing.
        UserValueError: A file cannot be used, or the files do not fit each other.
    """
    check_tiles(tile_options.tile_size, tile_options.tile_overlap)
    check_block_px(tile_options.block_px, tile_options.tile_size)
    with open_rasters(rasters, data_options.bands, data_options.scale, tile_options.resample_to) as group:
        labels = open_vector_labels(vector_options, group.grids, data_options.class_names)
        _check_classes(labels.class_names)
        area = None
        if vector_options.validation_area is not None:
            layer = vector_options.validation_area_layer
            area = open_area(vector_options.validation_area, layer, group.grids, "validation_area")
        yield TileCutter(group, labels, tile_options, area)


def prepare_rasters(
    cutter: TileCutter, data_options: DataOptions, cache_dir: str | Path, seed: int = 0, progress: bool = False
) -> PreparedRasters:
    """Cut rasters into tiles with labels, and draw their sets.

    Args:
        cutter: Cuts the tiles. [`labeled_rasters`] makes it.
        data_options: Bands, scale, and shares of the sets.
        cache_dir: Folder for the tiles. It must exist as long as the result is used.
        seed: Seed of the drawn sets.
        progress: Show a progress bar.

    Raises:
        UserValueError: A raster cannot be read, or a set would be empty.
    """
    group, labels = cutter.group, cutter.labels
    labeled_fraction = data_options.labeled_fraction or 1.0
    validation_fraction = data_options.validation_fraction if cutter.area is None else None
    enough = num_blocks_needed(labeled_fraction, validation_fraction)
    block_px = choose_block_px(list(group.grids.values()), labels, cutter.options, enough)
    table = _table(cutter, block_px, cache_dir, progress)
    sets = draw_tile_sets(cutter.facts, labeled_fraction, validation_fraction, seed)
    rule, bands, scale = ImageRule(), data_options.bands, data_options.scale
    if bands is not None or scale is not None:
        rule = ImageRule(resolve_bands(bands, scale)[0], group.rule.scale)
    source = _source(table, cutter.facts, sets, labels.class_names, rule, group.distance_m)
    _check_two_classes(source)
    parts = {split: table.select(places) for split, places in sets.tiles.items() if places}
    lines = [*labels.summary(), *_tile_lines(cutter, sets, block_px)]
    return PreparedRasters(source, DatasetDict(parts), lines)


def _check_classes(names: list[str]):
    if len(names) < 2:
        raise UserValueError(
            f"There is only one class, '{names[0]}', but a segmentation needs two. If the pixels that no feature "
            "covers are of another class, such as other, say so: `background='other'`. Do this for the area in which "
            "everything was labelled alone: `labeled_area='area.gpkg'`."
        )


def _table(cutter: TileCutter, block_px: int, cache_dir: str | Path, progress: bool) -> Dataset:
    """Write all tiles into a table in a folder."""
    rows = cutter.rows(block_px, progress)
    if (first := next(rows, None)) is None:  # `from_generator` needs a row
        raise UserValueError(
            "The rasters have no tile: their pixels have no data, or lie outside the labels and have one colour. Name "
            "other rasters."
        )
    with _one_progress_bar():
        # Without a fingerprint, `datasets` would pickle the rasters and the polygons to compute one.
        return Dataset.from_generator(
            lambda: itertools.chain([first], rows), features=FEATURES, cache_dir=str(cache_dir), fingerprint="tiles"
        )


@contextmanager
def _one_progress_bar() -> Iterator[None]:
    """Hide the progress bars of `datasets`. They do not know the number of tiles."""
    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()


def _source(
    table: Dataset, facts: list[TileFacts], sets: TileSets, names: list[str], rule: ImageRule, distance_m: float
) -> Source:
    """Describe the data set in the way of [`open_source`], without decoding the tiles again."""
    rows = [""] * len(facts)
    for split, places in sets.tiles.items():
        for number, place in enumerate(places):
            rows[place] = f"{split}[{number}]"
    for column in FEATURES:
        table = table.cast_column(column, ImageColumn(decode=False))
    table = table.add_column("row", rows)
    samples = {split: Samples(table.select(places)) for split, places in sets.tiles.items()}
    scans = {split: _scans([facts[place] for place in places]) for split, places in sets.tiles.items()}
    id2label = dict(enumerate(names))
    return Source(
        **samples,
        id2label=id2label,
        palette=distinct_palette(len(names)),
        class_concepts={name: [name.replace("_", " ")] for name in names},
        scans=scans,
        findings=tuple(merge_findings(never_labeled(scans["labeled"], id2label))),
        lists={split: [(facts[place].name, None) for place in places] for split, places in sets.tiles.items()},
        read_rule=rule,
        ground_sampling_distance_m=distance_m,
    )


def _scans(tiles: list[TileFacts]) -> Scans:
    sizes = [(tile.grid.width, tile.grid.height) for tile in tiles]
    images = [ImageFacts(tile.name, size) for tile, size in zip(tiles, sizes)]
    labels = [LabelFacts(tile.name, size, tile.counts) if tile.classes else None for tile, size in zip(tiles, sizes)]
    return Scans(images, labels)


def _check_two_classes(source: Source):
    """Check that a set with labels has pixels of both classes, if there are two. A training could not use it."""
    for split in ("labeled", "validation"):
        present = frozenset().union(*(facts.classes for facts in source.scans[split].labels))
        if len(source.id2label) == 2 and len(present) == 1:
            (missing,) = set(source.id2label) - present
            raise UserValueError(
                f"The {split} tiles have no pixel of the class '{source.id2label[missing]}', and there are only two "
                "classes. Choose another `seed`, smaller blocks with `block_px`, or another `validation_area`."
            )


def distinct_palette(num_labels: int) -> list[list[int]]:
    """Return a different colour for each class: those of [`palette_or_default`], and then more hues.

    Args:
        num_labels: Number of classes, up to 255.
    """
    colors: dict[tuple[int, ...], None] = dict.fromkeys(map(tuple, palette_or_default(None, 20).tolist()))
    for number in itertools.count():
        if len(colors) >= num_labels:
            return [list(color) for color in colors][:num_labels]
        hue, saturation, value = number * 0.618034 % 1, (0.9, 0.55)[number % 2], (0.95, 0.7, 0.45)[number % 3]
        found = matplotlib.colors.hsv_to_rgb((hue, saturation, value))
        colors[tuple((255 * found).astype(int).tolist())] = None


def _tile_lines(cutter: TileCutter, sets: TileSets, block_px: int) -> list[str]:
    """Return lines for the user about the tiles and the blocks."""
    group, size, first = cutter.group, cutter.options.tile_size, next(iter(cutter.group.rasters))
    count = f"'{first}'" if len(group.rasters) == 1 else f"{len(group.rasters)} rasters"
    lines = [f"Cut {count} into tiles of {size} px at {group.distance_m:.3g} m per pixel, in blocks of {block_px} px."]
    left_out = {
        "without data": cutter.num_without_data,
        "without a label and of one colour": cutter.num_plain,
        "for validation, but without a label": cutter.num_useless + sets.num_useless,
        "for training that show the same as validation tiles": sets.num_copies,
    }
    lines += [f"Tiles {text}, which were left out: {number:,}." for text, number in left_out.items() if number]
    blocks = ", ".join(f"{sets.num_blocks[split]} {split}" for split in SPLITS)
    by_area = " Validation tiles are those that touch the validation area." if cutter.area is not None else ""
    return [*lines, f"Blocks with tiles in each set: {blocks}.{by_area}"]


__all__ = ["PreparedRasters", "distinct_palette", "labeled_rasters", "prepare_rasters"]
