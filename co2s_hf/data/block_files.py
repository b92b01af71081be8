"""Cut images and their label maps into blocks, as new files. Rasters of any size are read window by window.

The rules for images and label values are applied: the new files are 8-bit RGB and class indices. A file of at most
`MAX_PIXELS` is decoded once, as a whole.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ..utils.errors import UserValueError
from .blocks import Box, block_boxes
from .image_files import StoredFile, TooLargeError, open_pillow, open_raster
from .reading import IGNORE, UNKNOWN, ImageRule, LabelRule, open_image
from .samples import Sample, Samples
from .validation.checks import Finding, unreadable


def read_size(sample: Sample) -> tuple[int, int]:
    """Return width and height of an image in pixels, without decoding it.

    Raises:
        UserValueError: The file cannot be read.
    """
    try:
        with open_pillow(sample.image) as image:
            return image.size
    except (OSError, TooLargeError):  # another format than those of Pillow, or a large image
        with open_raster(sample.image, at_once=False) as raster:
            return raster.width, raster.height


def cut_samples(
    samples: Samples, block_px: int, least_px: int, folder: Path, progress: bool = False
) -> tuple[Samples, dict[str, str], list[Finding]]:
    """Cut all images and label maps.

    Args:
        samples: The images.
        block_px, least_px: Sides in pixels, see [`block_boxes`].
        folder: Folder for the new files.
        progress: Show a progress bar.

    Returns:
        The blocks, image after image in the order of [`block_boxes`]. A block in which no pixel has a label has no
        label file.
        Path of each new file -> image or label file, and place of the block in it.
        Errors about files that cannot be cut.
    """
    pairs: list[tuple[str, str | None]] = []
    origins: dict[str, str] = {}
    findings = []
    for number, sample in enumerate(tqdm(samples, desc="cutting blocks", disable=not progress, leave=False)):
        try:
            for box, image, label in _blocks(sample, block_px, least_px):
                name = f"{number}/{Path(sample.image.name).stem}_{box[0]}_{box[1]}.png"
                place = f"(block at column {box[0]}, row {box[1]})"
                files = []
                for kind, picture, file in (("images", image, sample.image), ("labels", label, sample.label)):
                    path = folder / kind / name
                    if picture is not None:
                        path.parent.mkdir(parents=True, exist_ok=True)
                        picture.save(path, compress_level=1)
                        origins[str(path)] = f"{file} {place}"
                    files.append(None if picture is None else str(path))
                pairs.append(tuple(files))
        except _OtherSizeError as error:
            findings.append(Finding("sizes that differ", str(error), cause="sizes"))
        except UserValueError as error:
            findings.append(unreadable(str(sample.image), str(error)))
    return Samples.of_files([image for image, _ in pairs], [label for _, label in pairs]), origins, findings


class _OtherSizeError(UserValueError):
    """A label map has not the size of its image."""


def _blocks(sample: Sample, block_px: int, least_px: int) -> Iterator[tuple[Box, Image.Image, Image.Image | None]]:
    """Return box, image and label map of each block. The label map is None if no pixel has a label."""
    with ExitStack() as opened:
        size, read_image = opened.enter_context(_open_image(sample.image, sample.image_rule))
        read_label = None
        if sample.label is not None:
            label_size, read_label = opened.enter_context(_open_label(sample.label, sample.label_rule))
            if label_size != size:
                raise _OtherSizeError(
                    f"{sample.label} is {label_size[0]}x{label_size[1]} px, but {sample.image} is "
                    f"{size[0]}x{size[1]} px. Each pixel of an image needs one label."
                )
        for box in block_boxes(size, block_px, least_px):
            label = None if read_label is None else read_label(box)
            yield box, read_image(box), None if label is None or label.getextrema() == (IGNORE, IGNORE) else label


Reader = Callable[[Box], Image.Image]


@contextmanager
def _open_image(file: StoredFile, rule: ImageRule) -> Iterator[tuple[tuple[int, int], Reader]]:
    """Open an image, and return its size and a function that reads a box as 8-bit RGB."""
    try:
        image = rule.read(file)
    except TooLargeError:
        with open_raster(file, rule.bands, at_once=False) as raster:
            _refuse_palette(raster, file)
            yield (raster.width, raster.height), lambda box: rule.read_raster(file, raster, _window(box))
        return
    yield image.size, image.crop


@contextmanager
def _open_label(file: StoredFile, rule: LabelRule) -> Iterator[tuple[tuple[int, int], Reader]]:
    """Open a label map, and return its size and a function that reads the class indices of a box."""
    try:
        label = rule.read(file)
        if rule == LabelRule():
            with open_image(file) as stored:
                palette = stored.getpalette()
            if palette is not None:  # the colours of the classes
                label.putpalette(palette)
    except TooLargeError:
        with open_raster(file, None if rule.colors is None else (1, 2, 3), at_once=False) as raster:
            if rule.colors is None and (raster.count > 1 or np.dtype(raster.dtypes[0]).kind not in "iu"):
                held = f"{raster.count} band{'s' * (raster.count > 1)} of {raster.dtypes[0]}"
                raise UserValueError(
                    f"{file} holds {held}; expected one band of class indices. If its"
                    " colours stand for classes, list them: `label_colors='classes.json'`."
                ) from None
            yield (raster.width, raster.height), lambda box: _label_window(raster, box, rule, file)
        return
    yield label.size, label.crop


def _refuse_palette(raster, file: StoredFile):
    if raster.count == 1 and raster.colorinterp[0].name == "palette":
        raise UserValueError(
            f"{file} has a palette, and is too large to be read at once. Save it as RGB: `gdal_translate -expand rgb`."
        )


def _window(box: Box) -> tuple[tuple[int, int], tuple[int, int]]:
    left, upper, right, lower = box
    return (upper, lower), (left, right)


def _label_window(raster, box: Box, rule: LabelRule, file: StoredFile) -> Image.Image:
    if rule.colors is None:
        values = raster.read(1, window=_window(box))
    else:
        red, green, blue = raster.read([1, 2, 3], window=_window(box)).astype(np.int32)
        values = (red << 16) + (green << 8) + blue
    indices = rule.indices(values)
    if (indices == UNKNOWN).any():
        row, column = np.argwhere(indices == UNKNOWN)[0].tolist()
        raise UserValueError(
            f"{file} has the label {rule.format_value(int(values[row, column]))} at column {box[0] + column}, row "
            f"{box[1] + row}, which no rule covers. Add it to `label_map` or `label_colors`, or correct the file."
        )
    return Image.fromarray(indices.astype(np.uint8))
