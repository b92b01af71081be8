"""From stored files to 8-bit RGB images and maps of class indices, under explicit rules.

What bands, bit depth or label values mean is never guessed: a file that the rules do not cover is refused with what it
holds.
"""

import io
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from .configuration_co2s import Co2SConfig


IGNORE = 255  # in every label map that leaves this module
UNKNOWN = -1  # a label value or colour without a rule
PERCENTILES = (2, 98)  # of the values of a band, where nothing else says what becomes 0 and 255
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")


def find_images(folder: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> list[Path]:
    """Every image file in a folder and those below it, sorted; hidden ones are left out.

    Raises:
        FileNotFoundError: The folder does not exist.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"The folder '{folder}' does not exist.")
    found = []
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in suffixes)


def base_scale(size: tuple[int, int], base_size: tuple[int, int] | None) -> float:
    """The factor by which an image of (width, height) just fits into (long, short) sides, whichever way it lies."""
    return 1.0 if base_size is None else min(max(base_size) / max(size), min(base_size) / min(size))


@dataclass(frozen=True)
class StoredFile:
    """A file on disk, or the bytes of one inside a data set.

    Args:
        path: On disk, or what the file inside a data set was called (perhaps nothing).
        data: Its bytes.
        row: Where it stands in the data set, to tell people.
    """

    path: str
    data: bytes | None = None
    row: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.row, self.path)))

    def read_bytes(self) -> bytes:
        return Path(self.path).read_bytes() if self.data is None else self.data

    def open(self) -> BinaryIO:
        return open(self.path, "rb") if self.data is None else io.BytesIO(self.data)


@dataclass(frozen=True)
class ImageRule:
    """How the bands of a file become red, green and blue. Without a rule only 8-bit RGB and grey files are read.

    Args:
        bands: Numbers from 1 of the bands for red, green and blue (GDAL's count).
        scale: (low, high) of each of them: these values become 0 and 255, and what lies outside is clipped. One pair
            serves all three.
    """

    bands: tuple[int, int, int] | None = None
    scale: tuple[tuple[float, float], ...] | None = None

    @classmethod
    def of_config(cls, config: Co2SConfig) -> "ImageRule":
        """How the files were read that a model was trained on."""
        scale = None if config.image_scale is None else tuple(tuple(pair) for pair in config.image_scale)
        return cls(None if config.image_bands is None else tuple(config.image_bands), scale)

    def read(self, file: StoredFile, base_size: tuple[int, int] | None = None, scale: float = 1.0) -> Image.Image:
        """Read an image as 8-bit RGB.

        Args:
            file: The image.
            base_size: (long, short) side that it is going to be scaled to fit into ...
            scale: ... and how much further. A JPEG file may then be decoded at a half, a quarter or an eighth of its
                size, which is quicker, as long as that is no smaller than what is needed.

        Raises:
            ValueError: It cannot be read, or the rule does not cover it.
        """
        if self.bands is not None or self.scale is not None:
            values = read_bands(file, self.bands)
            self.check(str(file), values.dtype, len(values), lambda: _summary(values))
            return Image.fromarray(self.to_8_bit(values))
        with opened(file) as image:
            if image.mode not in ("RGB", "L", "P", "1"):
                raise ValueError(f"{file} {_held_by(image)}; expected 8-bit RGB. {_band_remedy(image.mode)}")
            if base_size is not None:
                scale *= base_scale(image.size, base_size)
                image.draft("RGB", tuple(math.ceil(side * scale) for side in image.size))
            return image.convert("RGB")

    def check(self, name: str, dtype: np.dtype, num_bands: int, held: Callable[[], str]):
        """Refuse bands that would not become three of 8 bits.

        Args:
            name: Of the file.
            dtype, num_bands: Of what is read from it.
            held: Says what it holds.

        Raises:
            ValueError: They would not.
        """
        if num_bands not in (1, 3):
            raise ValueError(f"{name} holds {held()}. Choose three of them: --bands 3,2,1.")
        if self.scale is None and dtype != np.uint8:
            raise ValueError(
                f"{name} holds {held()}. Say what becomes 0 and 255: --scale 0 3000, or --scale percentiles."
            )

    def to_8_bit(self, values: np.ndarray) -> np.ndarray:
        """One or three bands (bands, height, width) as (height, width, 3), uint8; NaN becomes 0."""
        if len(values) == 1:
            values = np.repeat(values, 3, axis=0)
        if self.scale is None:
            return np.moveaxis(values, 0, -1)
        pairs = np.array(self.scale if len(self.scale) == 3 else self.scale * 3, dtype=np.float32)
        low, high = pairs[:, 0, None, None], pairs[:, 1, None, None]
        scaled = np.nan_to_num((values.astype(np.float32) - low) * (255 / (high - low)), nan=0.0)
        return np.moveaxis(scaled.clip(0, 255).round().astype(np.uint8), 0, -1)


@dataclass(frozen=True)
class LabelRule:
    """What the values of label files mean. Without further rules they are class indices.

    Args:
        ignore_index: Value that means "no class".
        reduce_labels: 0 means "no class" as well, and the classes start at 1.
        label_map: (value, class index) pairs; other values are refused.
        colors: RGB colour of every class, in label order, where masks show colours.
        ignore_colors: Colours that mean "no class".
    """

    ignore_index: int = IGNORE
    reduce_labels: bool = False
    label_map: tuple[tuple[int, int], ...] | None = None
    colors: tuple[tuple[int, int, int], ...] | None = None
    ignore_colors: tuple[tuple[int, int, int], ...] = ()

    def read(self, file: StoredFile) -> Image.Image:
        """Read a label map as a one-band image of class indices, 255 for pixels without a class.

        Raises:
            ValueError: It cannot be read, is no map of labels, or has values without a rule.
        """
        values = self.read_values(file)
        indices = self._of_bytes[values] if values.dtype == np.uint8 else self.indices(values)
        if (indices == UNKNOWN).any():
            unknown = self.show(int(values[indices == UNKNOWN][0]))
            raise ValueError(f"{file} has the label {unknown}, which no rule covers.")
        return Image.fromarray(indices.astype(np.uint8))

    def read_values(self, file: StoredFile) -> np.ndarray:
        """The values as they stand in the file, (height, width), integers; colours as 65536 red + 256 green + blue."""
        with opened(file, "one band of class indices. Save it as an 8-bit PNG.") as image:
            if self.colors is not None:
                red, green, blue = np.moveaxis(np.asarray(image.convert("RGB"), dtype=np.int32), -1, 0)
                return (red << 16) + (green << 8) + blue
            if image.mode not in ("L", "P", "I", "I;16", "I;16B", "1"):
                remedy = "Save whole numbers."
                if len(image.getbands()) > 1:
                    remedy = "If its colours stand for classes, list them: --label_colors classes.json."
                raise ValueError(f"{file} {_held_by(image)}; expected one band of class indices. {remedy}")
            values = np.asarray(image)  # a palette is for viewing: the indices behind it count
            return values.astype(np.uint8) if image.mode == "1" else values

    def indices(self, values: np.ndarray) -> np.ndarray:
        """Class indices of values as they stand in a file; 255 for "no class", -1 where no rule covers the value."""
        values = values.astype(np.int64)
        if self._table is not None:
            known, meaning = self._table
            place = np.searchsorted(known, values).clip(max=len(known) - 1)
            return np.where(known[place] == values, meaning[place], UNKNOWN)
        ignored = values == self.ignore_index
        if self.reduce_labels:
            ignored, values = ignored | (values == 0), values - 1
        return np.where(ignored, IGNORE, np.where((values < 0) | (values >= IGNORE), UNKNOWN, values))

    @cached_property
    def _of_bytes(self) -> np.ndarray:
        """Class indices of the values 0 to 255: looking them up is quicker than working each pixel out."""
        return self.indices(np.arange(256)).astype(np.int16)

    def show(self, value: int) -> str:
        """A value as its file has it: a number or an RGB colour."""
        return f"({value >> 16}, {value >> 8 & 255}, {value & 255})" if self.colors is not None else str(value)

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The values that are listed, sorted, and their classes."""
        if self.colors is not None:
            meaning = {_code(color): index for index, color in enumerate(self.colors)}
            meaning |= {_code(color): IGNORE for color in self.ignore_colors}
        elif self.label_map is not None:
            meaning = {self.ignore_index: IGNORE} | dict(self.label_map)
        else:
            return None
        known = np.array(sorted(meaning))
        return known, np.array([meaning[value] for value in known.tolist()])


def _code(color: tuple[int, int, int]) -> int:
    red, green, blue = color
    return (red << 16) + (green << 8) + blue


@contextmanager
def opened(file: StoredFile, expected: str | None = None) -> Iterator[Image.Image]:
    """The file as Pillow opens it; what Pillow says of a broken file becomes an error that names it.

    Args:
        file: An image or a label map.
        expected: What a raster that Pillow does not know should have been; 8-bit RGB when left out.
    """
    try:
        with file.open() as stream, _pillow_image(stream) as image:
            yield image
    except Image.UnidentifiedImageError as error:
        held = _describe_raster(file)
        if held is None:
            raise ValueError(f"{file} cannot be read as an image. Replace it, or take it off its list.") from error
        raise ValueError(f"{file} holds {held}; expected {expected or '8-bit RGB. ' + _band_remedy()}") from error
    except FileNotFoundError as error:
        raise ValueError(f"{file} does not exist. Correct the list that it is on.") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{file} cannot be read as an image: {error}. Replace it, or take it off its list."
        ) from error


@contextmanager
def _pillow_image(stream: BinaryIO) -> Iterator[Image.Image]:
    """Pillow's image, whose complaints about the content are all of one kind: some are bare ValueErrors."""
    try:
        image = Image.open(stream)
    except ValueError as error:
        raise OSError(str(error)) from error
    with image:
        yield image


def read_bands(file: StoredFile, bands: tuple[int, ...] | None = None) -> np.ndarray:
    """Bands of a raster, (bands, height, width), in the file's own type; all of them when none are named.

    Pixels that the file calls nodata become NaN where its type has one, else 0.

    Raises:
        ImportError: rasterio is missing.
        ValueError: The file cannot be read or has no such band.
    """
    values = _masked_bands(file, bands)
    return values.filled(np.nan if values.dtype.kind == "f" else 0)


def _masked_bands(file: StoredFile, bands: tuple[int, ...] | None) -> np.ma.MaskedArray:
    rasterio = _rasterio(file)
    try:
        with rasterio.open(io.BytesIO(file.data) if file.data is not None else file.path) as raster:
            if bands is not None and max(bands) > raster.count:
                raise ValueError(f"{file} has {raster.count} bands, none with the number {max(bands)}. See --bands.")
            return raster.read(list(bands) if bands is not None else None, masked=True)
    except rasterio.errors.RasterioError as error:
        raise ValueError(
            f"{file} cannot be read as a raster: {error}. Replace it, or take it off its list."
        ) from error


def percentile_scale(
    files: Iterable[StoredFile], bands: tuple[int, ...] | None, percentiles: tuple[float, float] = PERCENTILES
) -> tuple[tuple[float, float], ...]:
    """The range that most values of the files lie in, per band, for [`ImageRule`].

    One range for all of them: scaled one by one, the same field would look different in every file. Nodata does not
    count, nor do files that cannot be read.

    Raises:
        ImportError: rasterio is missing.
        ValueError: A band holds one value alone, or nothing can be read.
    """
    flat = []
    for file in files:
        try:
            values = _masked_bands(file, bands)
        except ValueError:  # the checks will name it, with everything else that is wrong
            continue
        thinned = values[:, :: max(1, values.shape[1] // 256), :: max(1, values.shape[2] // 256)]
        flat.append(thinned.astype(np.float32).filled(np.nan).reshape(len(values), -1))
    counts = sorted({len(values) for values in flat})
    if len(counts) != 1:
        raise ValueError(
            f"The images have different numbers of bands: {counts}. Name three that all of them have: --bands 3,2,1."
            if counts
            else "None of the images can be read: there are no percentiles to scale by."
        )
    return percentile_ranges(np.concatenate(flat, axis=1), percentiles)


def percentile_ranges(
    values: np.ndarray, percentiles: tuple[float, float] = PERCENTILES
) -> tuple[tuple[float, float], ...]:
    """The range that most values of each band lie in.

    Args:
        values: (bands, values); NaN do not count.
        percentiles: Where the range begins and ends.

    Raises:
        ValueError: A band holds one value alone, or none.
    """
    if np.isnan(values).all(axis=1).any():
        raise ValueError("A band holds nothing but nodata: there is no range to scale.")
    ranges = np.nanpercentile(values, percentiles, axis=1).T.tolist()
    for low, high in ranges:
        if not low < high:
            raise ValueError(f"A band holds the value {low} almost everywhere: there is no range to scale.")
    return tuple((low, high) for low, high in ranges)


def _rasterio(file: StoredFile):
    try:
        import rasterio
    except ImportError as error:
        raise ImportError(f"Reading the bands of {file} needs rasterio: pip install 'co2s_hf[scenes]'.") from error
    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)  # pictures need no place
    return rasterio


def _held_by(image: Image.Image) -> str:
    """What a file holds, in words, as Pillow sees it."""
    kinds = {"I": "int32", "I;16": "uint16", "I;16B": "uint16", "F": "float32"}
    if image.mode in kinds:
        low, high = np.asarray(image).min(), np.asarray(image).max()
        return f"has the PIL mode '{image.mode}' (1 band of {kinds[image.mode]}, values {low:g} to {high:g})"
    return f"has the PIL mode '{image.mode}' ({len(image.getbands())} bands of uint8)"


def _describe_raster(file: StoredFile) -> str | None:
    """What a file holds that only a raster library reads; None if nothing can tell."""
    try:
        return _summary(read_bands(file))
    except (ImportError, ValueError):
        return None


def _summary(values: np.ndarray) -> str:
    low, high = (np.nanmin(values), np.nanmax(values))
    return f"{len(values)} band{'s' * (len(values) > 1)} of {values.dtype}, values {low:g} to {high:g}"


def _band_remedy(mode: str | None = None) -> str:
    needs = "(needs rasterio: pip install 'co2s_hf[scenes]')."
    if mode in ("RGBA", "RGBX", "CMYK"):
        return f"Leave the fourth band out with --bands 1,2,3 {needs}"
    if mode in ("LA", "La"):
        return f"Leave the second band out with --bands 1,1,1 {needs}"
    if mode in ("I", "I;16", "I;16B", "F"):
        return f"Say what becomes 0 and 255: --scale 0 3000, or --scale percentiles {needs}"
    return (
        "Say which bands are red, green and blue and what becomes 0 and 255: --bands 4,3,2 --scale 0 3000, or --scale "
        f"percentiles {needs}"
    )
