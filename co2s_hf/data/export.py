"""Convert an opened data source to a `datasets.DatasetDict` that contains the images and the label maps.

Files keep their bytes if no rule applies to them and no tiles are cut. All other images and label maps are stored as
PNG after their rule is applied. Training on the result therefore gets the same values.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import Dataset, DatasetDict, Features
from datasets import Image as ImageColumn
from PIL import Image

from ..utils.errors import UserValueError
from .reading import IGNORE, ImageRule, LabelRule, StoredFile
from .samples import Sample
from .sources import Source
from .splits import SPLITS


# Files of aerial images are as small as at level 6, the default, and are written in a third of the time.
PNG_LEVEL = 2
FEATURES = Features({"image": ImageColumn(), "label": ImageColumn()})


def prepared(
    source: Source, tile_size: int | None = None, tile_overlap: int = 0, cache_dir: str | Path | None = None
) -> DatasetDict:
    """Convert a source to a data set with the splits "labeled", "unlabeled" and "validation".

    If images are cut, a tile of a labelled image in which no pixel has a label becomes unlabelled, and such a tile of
    a validation image is left out. Unlabelled tiles of one colour, as outside a photographed area, are left out, too.
    So is a set without images.

    Args:
        source: The opened source.
        tile_size: Side in pixels of square tiles. Larger images are cut into them. The last tile of a row or column is
            moved back so that it ends at the border of the image. None: images are not cut.
        tile_overlap: Least number of pixels that neighbouring tiles share.
        cache_dir: Folder for temporary files. None: the cache of `datasets`.

    Returns:
        Data set with the columns `image` (8-bit RGB or grey) and `label` (class indices, 255 for pixels without a
        class; null for an image without a label map). Both contain the bytes of the files.

    Raises:
        UserValueError: The overlap is not smaller than the tile.
    """
    check_tiles(tile_size, tile_overlap)
    tables = {
        split: Dataset.from_generator(
            _rows,
            features=FEATURES,
            cache_dir=None if cache_dir is None else str(cache_dir),
            gen_kwargs={"source": source, "split": split, "tile_size": tile_size, "tile_overlap": tile_overlap},
            split=split,
        )
        for split in SPLITS
        if any(True for _ in _rows(source, split, tile_size, tile_overlap))  # `from_generator` needs a row
    }
    return DatasetDict(tables)


def check_tiles(tile_size: int | None, tile_overlap: int):
    """Check that the overlap is smaller than the tile.

    Raises:
        UserValueError: The overlap is negative, not smaller than the tile, or given without a tile size.
    """
    if tile_size is None and tile_overlap:
        raise UserValueError(f"`tile_overlap` is {tile_overlap}; it goes with `tile_size`.")
    if tile_size is not None and not 0 <= tile_overlap < tile_size:
        raise UserValueError(
            f"`tile_overlap` is {tile_overlap}; expected 0 or more, and less than `tile_size`, which is {tile_size}."
        )


def description(source: Source) -> dict:
    """Return the content of classes.json for the exported data set: the classes, the ignore index and more facts.

    The ground sampling distance is stored if it is known, and the bands and the scale of raw files if they have any.
    """
    classes = []
    for index, name in source.id2label.items():
        entry = {"name": name}
        if source.palette is not None:
            entry["color"] = source.palette[index]
        if source.class_concepts is not None:
            entry["concepts"] = source.class_concepts[name]
        classes.append(entry)
    facts = {"classes": classes, "ignore_index": IGNORE}
    if source.ground_sampling_distance_m is not None:
        facts["ground_sampling_distance_m"] = source.ground_sampling_distance_m
    bands, scale = source.read_rule.bands, source.read_rule.scale
    if bands or scale:
        conversion = {"bands": bands and list(bands), "scale": scale and [list(pair) for pair in scale]}
        facts["converted_from"] = {name: value for name, value in conversion.items() if value is not None}
    return facts


def tile_boxes(size: tuple[int, int], tile_size: int, overlap: int) -> list[tuple[int, int, int, int]]:
    """Compute the tiles that cover an image.

    Args:
        size: Width and height of the image in pixels.
        tile_size: Side of a tile in pixels. A smaller image is one tile.
        overlap: Least number of pixels that neighbouring tiles share.

    Returns:
        Boxes (left, upper, right, lower) in pixels, row by row.
    """

    def starts(length: int) -> list[int]:
        if length <= tile_size:
            return [0]
        return [*range(0, length - tile_size, tile_size - overlap), length - tile_size]

    width, height = size
    return [
        (left, upper, min(left + tile_size, width), min(upper + tile_size, height))
        for upper in starts(height)
        for left in starts(width)
    ]


def _rows(source: Source, split: str, tile_size: int | None, tile_overlap: int) -> Iterator[dict]:
    samples = getattr(source, split)
    if tile_size is None:
        yield from map(_row, samples)
        return
    for sample in samples:
        for tile in _tiles(sample, tile_size, tile_overlap):
            if not tile.is_plain if split == "unlabeled" else tile.has_class:
                yield tile.row()
    for sample in source.labeled if split == "unlabeled" else ():
        for tile in _tiles(sample, tile_size, tile_overlap):
            if not tile.has_class and not tile.is_plain:
                yield replace(tile, label=None).row()


def _row(sample: Sample) -> dict:
    image = _cell(sample.image, None if sample.image_rule == ImageRule() else sample.load_image)
    label = None
    if sample.label is not None:
        label = _cell(sample.label, None if sample.label_rule == LabelRule() else sample.load_label)
    return {"image": image, "label": label}


def _cell(file: StoredFile, load: Callable[[], Image.Image] | None) -> dict:
    """Return the cell for a file: its own bytes, or a PNG of what `load` returns."""
    if load is None:
        return {"bytes": file.read_bytes(), "path": file.name}
    return {"bytes": _png(load()), "path": file.name and f"{Path(file.name).stem}.png"}


@dataclass(frozen=True)
class Tile:
    """A part of an image and of its label map."""

    name: str
    image: Image.Image
    label: Image.Image | None

    @property
    def has_class(self) -> bool:
        """Whether a pixel has a label."""
        return self.label is not None and self.label.getextrema() != (IGNORE, IGNORE)

    @property
    def is_plain(self) -> bool:
        """Whether all pixels of the image have the same colour."""
        return all(low == high for low, high in self.image.getextrema())

    def row(self) -> dict:
        """Return the row of the data set."""
        pictures = {"image": self.image, "label": self.label}
        return {
            column: None if picture is None else {"bytes": _png(picture), "path": self.name}
            for column, picture in pictures.items()
        }


def _tiles(sample: Sample, tile_size: int, overlap: int) -> Iterator[Tile]:
    image = sample.load_image()
    label = None if sample.label is None else sample.load_label()
    for box in tile_boxes(image.size, tile_size, overlap):
        name = f"{Path(sample.image.name).stem}_{box[0]}_{box[1]}.png"
        yield Tile(name, image.crop(box), None if label is None else label.crop(box))


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG", compress_level=PNG_LEVEL)
    return stream.getvalue()
