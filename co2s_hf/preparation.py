"""From any data source to a `datasets.DatasetDict` that carries everything: bytes of images, labels, classes.

Images and label maps that need no rule keep their bytes; others are written as PNG, which loses nothing of what
training would see.
"""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict, Features
from datasets import Image as ImageColumn
from PIL import Image

from .data import Sample, Samples
from .reading import IGNORE, ImageRule, LabelRule, StoredFile
from .sources import Source
from .splits import SPLITS


FEATURES = Features({"image": ImageColumn(), "label": ImageColumn()})


def prepared(
    source: Source, tile_size: int | None = None, tile_overlap: int = 0, cache_dir: str | Path | None = None
) -> DatasetDict:
    """The source as a data set with the splits `labeled`, `unlabeled` and `validation`.

    Args:
        source: Opened, and so checked.
        tile_size: Cut larger images into tiles of this side in pixels; the last of a row or column is moved inside.
        tile_overlap: Pixels that neighbouring tiles share at least.
        cache_dir: Where the splits are written while they are made.

    Returns:
        Columns `image` (8-bit RGB or grey) and `label` (class indices, 255 for no class; null where there is none),
        with their bytes inside.

    Raises:
        ValueError: The overlap is not smaller than the tile.
    """
    check_tiles(tile_size, tile_overlap)
    return DatasetDict(
        {
            split: Dataset.from_generator(
                _rows,
                features=FEATURES,
                cache_dir=None if cache_dir is None else str(cache_dir),
                gen_kwargs={"samples": getattr(source, split), "tile_size": tile_size, "tile_overlap": tile_overlap},
                split=split,
            )
            for split in SPLITS
        }
    )


def check_tiles(tile_size: int | None, tile_overlap: int):
    """Refuse an overlap that leaves no step from tile to tile.

    Raises:
        ValueError: The overlap is not smaller than the tile.
    """
    if tile_size is not None and not 0 <= tile_overlap < tile_size:
        raise ValueError(f"The overlap of {tile_overlap} px must be smaller than the tile of {tile_size} px.")


def description(source: Source) -> dict:
    """What classes.json says of a prepared data set: the classes, and the value that means none of them."""
    classes = []
    for index, name in source.id2label.items():
        entry = {"name": name}
        if source.palette is not None:
            entry["color"] = source.palette[index]
        if source.class_concepts is not None:
            entry["concepts"] = source.class_concepts[name]
        classes.append(entry)
    return {"classes": classes, "ignore_index": IGNORE}


def tile_boxes(size: tuple[int, int], tile_size: int, overlap: int) -> list[tuple[int, int, int, int]]:
    """Boxes (left, upper, right, lower) that cover an image of (width, height)."""

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


def _rows(samples: Samples, tile_size: int | None, tile_overlap: int) -> Iterator[dict]:
    for sample in samples:
        if tile_size is not None:
            yield from _tiles(sample, tile_size, tile_overlap)
            continue
        image = _cell(sample.image, None if sample.image_rule == ImageRule() else sample.load_image)
        label = None
        if sample.label is not None:
            label = _cell(sample.label, None if sample.label_rule == LabelRule() else sample.load_label)
        yield {"image": image, "label": label}


def _cell(file: StoredFile, load: Callable[[], Image.Image] | None) -> dict:
    """A file as it is, or as the picture that a rule makes of it."""
    path = Path(file.path)
    if load is None:
        return {"bytes": file.read_bytes(), "path": path.name}
    return {"bytes": _png(load()), "path": path.with_suffix(".png").name}


def _tiles(sample: Sample, tile_size: int, overlap: int) -> Iterator[dict]:
    image = sample.load_image()
    label = None if sample.label is None else sample.load_label()
    for left, upper, right, lower in tile_boxes(image.size, tile_size, overlap):
        box, name = (left, upper, right, lower), f"{Path(sample.image.path).stem}_{left}_{upper}.png"
        cells = {"image": image, "label": label}
        yield {
            column: None if picture is None else {"bytes": _png(picture.crop(box)), "path": name}
            for column, picture in cells.items()
        }


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()
