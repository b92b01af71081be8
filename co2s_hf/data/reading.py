"""Read image files as 8-bit RGB and label files as maps of class indices, under explicit rules.

The meaning of bands, bit depths and label values is never guessed. A file that the rules do not cover is refused, and
the error describes its content.
"""

import itertools
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from ..model.configuration_co2s import Co2SConfig
from ..utils.errors import UserError, UserFileNotFoundError, UserValueError
from .image_files import FORMAT_NAMES, REPLACE_FILE, StoredFile, TooLargeError, open_pillow, open_raster
from .options import IGNORE


logger = logging.getLogger(__name__)

UNKNOWN = -1  # index of a label value or colour that no rule covers
PERCENTILES = (2, 98)  # with `scale="percentiles"`, these percentiles of a band become 0 and 255
PERCENTILE_SAMPLE_PX = 256  # rows and columns of larger files are thinned for percentiles; at least this many remain
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
DESCRIBED_PX, DESCRIBED_BANDS = 256, 16  # an error describes so many rows, columns and bands of a file


def find_images(
    folder: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES, leave_out_labels: bool = False
) -> list[Path]:
    """Find all image files in a folder and its subfolders. Hidden files and folders are skipped.

    Links to folders are followed, but every folder is searched once: under its own path if it is below `folder`, or
    else under the first link to it. A file is found under each of its names, because a link is a usual way to list an
    image in several sets.

    Args:
        folder: Where to search.
        suffixes: Suffixes of image files, in lower case.
        leave_out_labels: Leave out folders labels/ that are beside a folder images/. A warning names them.

    Returns:
        Paths in sorted order.

    Raises:
        UserFileNotFoundError: The folder does not exist.
    """
    if not folder.is_dir():
        raise UserFileNotFoundError(f"The folder '{folder}' does not exist.")
    found, searched, waiting = [], set(), [str(folder)]
    while waiting:
        links = []  # searched after all other folders
        for root, folders, names in itertools.chain.from_iterable(map(os.walk, waiting)):
            real = os.path.realpath(root)
            if real in searched:
                folders.clear()
                continue
            searched.add(real)
            if leave_out_labels and {"images", "labels"} <= set(folders):
                logger.warning(
                    f"'{Path(root, 'labels')}' is left out, because label maps are expected beside images/. If it "
                    "holds images, name it, too."
                )
                folders.remove("labels")
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            links += [path for name in folders if os.path.islink(path := os.path.join(root, name))]
            found += [Path(root, name) for name in names if not name.startswith(".")]
        waiting = links
    return sorted(path for path in found if path.suffix.lower() in suffixes)


def base_scale(size: tuple[int, int], base_size: tuple[int, int] | None) -> float:
    """Compute the factor that scales an image to fit into `base_size`.

    Args:
        size: Width and height of the image in pixels.
        base_size: (long, short) side in pixels, for landscape and portrait format alike. None: the factor is 1.
    """
    return 1.0 if base_size is None else min(max(base_size) / max(size), min(base_size) / min(size))


@dataclass(frozen=True)
class ImageRule:
    """A rule that converts the bands of an image file to red, green and blue.

    Without `bands` and `scale`, the rule covers only files of 1 or 8 bits with RGB, grey or palette colours.

    Args:
        bands: Numbers of the bands for red, green and blue. They start at 1, as in GDAL.
        scale: (low, high) values that become 0 and 255, one pair for all bands or one pair per band. Values outside
            this range are clipped.
    """

    bands: tuple[int, int, int] | None = None
    scale: tuple[tuple[float, float], ...] | None = None

    @classmethod
    def of_config(cls, config: Co2SConfig) -> "ImageRule":
        """Return the rule by which the training images of a model were read."""
        scale = None if config.image_scale is None else tuple(tuple(pair) for pair in config.image_scale)
        return cls(None if config.image_bands is None else tuple(config.image_bands), scale)

    def read(self, file: StoredFile, base_size: tuple[int, int] | None = None, scale: float = 1.0) -> Image.Image:
        """Read an image as 8-bit RGB.

        If `base_size` is given, a JPEG file that the caller will make smaller is decoded at a half, a quarter or an
        eighth of its size, which is faster. The decoded image is never smaller than the size that the caller needs.

        Args:
            file: The image.
            base_size: (long, short) side in pixels. The caller will scale the image to fit into it. None: the file is
                decoded at its full size.
            scale: Factor by which the caller will then scale the image.

        Raises:
            UserValueError: The file cannot be read, or the rule does not cover it.
            UserImportError: `bands` or `scale` is given and rasterio is not installed.
        """
        if self.bands is not None or self.scale is not None:
            with open_raster(file, self.bands) as raster:
                values = _filled(_read_masked(raster, self.bands))
                self.check(str(file), values.dtype, len(values), lambda: _describe_bands(values, len(values)))
                return Image.fromarray(self.to_8_bit(values))
        with open_image(file) as image:
            if image.mode not in ("RGB", "L", "P", "1"):
                raise UserValueError(
                    f"{file} {_describe_image(image)}; expected 8-bit RGB. {_band_remedy(image.mode)}"
                )
            if base_size is not None:
                scale *= base_scale(image.size, base_size)
                image.draft("RGB", tuple(math.ceil(side * scale) for side in image.size))
            return image.convert("RGB")

    def check(self, name: str, dtype: np.dtype, num_bands: int, held: Callable[[], str]):
        """Check that bands can become 8-bit RGB.

        Args:
            name: Name of the file, for the message.
            dtype: Type of the bands.
            num_bands: Number of the bands.
            held: Function that describes the content of the file. It is called for an error only.

        Raises:
            UserValueError: There are not one or three bands, or `scale` is missing for values of more than 8 bits.
        """
        if num_bands not in (1, 3):
            example = "(3, 2, 1)" if num_bands > 2 else "(1, 1, 1)"
            raise UserValueError(f"{name} holds {held()}. Choose red, green and blue: `bands={example}`.")
        if self.scale is None and dtype != np.uint8:
            raise UserValueError(
                f"{name} holds {held()}. Choose the values that become 0 and 255: `scale=((0, 3000),)`, or "
                "`scale='percentiles'`."
            )

    def to_8_bit(self, values: np.ndarray) -> np.ndarray:
        """Scale bands to 8-bit RGB.

        Args:
            values: (1 or 3, height, width). A single band is used for red, green and blue.

        Returns:
            Array (height, width, 3), uint8. NaN becomes 0.
        """
        if self.scale is None:
            return np.moveaxis(values if len(values) == 3 else np.repeat(values, 3, axis=0), 0, -1)
        result = np.empty((*values.shape[1:], 3), dtype=np.uint8)
        for place in range(3):  # one band at a time, which takes less memory
            low, high = np.float32(self.scale[place % len(self.scale)])
            scaled = (values[place % len(values)].astype(np.float32) - low) * (255 / (high - low))
            result[..., place] = np.nan_to_num(scaled, nan=0.0).clip(0, 255).round()
        return result


@dataclass(frozen=True)
class LabelRule:
    """A rule that converts the values of label files to class indices. By default, the values are class indices.

    Args:
        ignore_index: Value that means "no class".
        reduce_labels: The value 0 also means "no class", and the classes start at 1.
        label_map: (lowest value, highest value, class index) of each range of values. Other values are errors. A value
            of a range belongs to this class even if it is `ignore_index`.
        colors: RGB colour of each class, in label order, for label files that hold colours.
        ignore_colors: Colours that mean "no class".
    """

    ignore_index: int = IGNORE
    reduce_labels: bool = False
    label_map: tuple[tuple[int, int, int], ...] | None = None
    colors: tuple[tuple[int, int, int], ...] | None = None
    ignore_colors: tuple[tuple[int, int, int], ...] = ()

    def read(self, file: StoredFile) -> Image.Image:
        """Read a label map.

        Returns:
            Image with one band of class indices, 255 for pixels without a class.

        Raises:
            UserValueError: The file cannot be read, is not a label map, or has values that no rule covers.
        """
        values = self.read_values(file)
        indices = self._indices_of_16_bits[values] if values.dtype in (np.uint8, np.uint16) else self.indices(values)
        if (indices == UNKNOWN).any():
            unknown = self.format_value(int(values[indices == UNKNOWN][0]))
            raise UserValueError(
                f"{file} has the label {unknown}, which no rule covers. Add it to `label_map` or `label_colors`, or "
                "correct the file."
            )
        return Image.fromarray(indices.astype(np.uint8))

    def read_values(self, file: StoredFile) -> np.ndarray:
        """Read the values of a label file without changing their meaning.

        Returns:
            Array (height, width) of integers. A colour is 65536 red + 256 green + blue.

        Raises:
            UserValueError: The file cannot be read, or is not a label map.
        """
        with open_image(file, "one band of class indices. Save it as an 8-bit PNG.") as image:
            if self.colors is not None:
                red, green, blue = np.moveaxis(np.asarray(image.convert("RGB"), dtype=np.int32), -1, 0)
                return (red << 16) + (green << 8) + blue
            if image.mode not in ("L", "P", "I", "I;16", "I;16B", "1"):
                remedy = "Save whole numbers."
                if len(image.getbands()) > 1:
                    remedy = "If its colours stand for classes, list them: `label_colors='classes.json'`."
                raise UserValueError(f"{file} {_describe_image(image)}; expected one band of class indices. {remedy}")
            values = np.asarray(image)  # for a file with a palette, these are the indices, not the colours
            return values.astype(np.uint8) if image.mode == "1" else values

    def indices(self, values: np.ndarray) -> np.ndarray:
        """Convert values of a label file to class indices.

        Args:
            values: Integers of any shape.

        Returns:
            Array of the same shape: class indices, 255 for "no class", -1 for values that no rule covers.
        """
        values = values.astype(np.int64)
        if self._ranges is not None:
            lows, highs, indices = self._ranges
            place = (np.searchsorted(lows, values, side="right") - 1).clip(min=0)
            return np.where((lows[place] <= values) & (values <= highs[place]), indices[place], UNKNOWN)
        ignored = values == self.ignore_index
        if self.reduce_labels:
            ignored, values = ignored | (values == 0), values - 1
        return np.where(ignored, IGNORE, np.where((values < 0) | (values >= IGNORE), UNKNOWN, values))

    def format_value(self, value: int) -> str:
        """Format a value as the file holds it: a number, or an RGB colour."""
        return f"({value >> 16}, {value >> 8 & 255}, {value & 255})" if self.colors is not None else str(value)

    @property
    def has_ranges(self) -> bool:
        """Whether the rule gives one class to a range of values."""
        return any(low < high for low, high, _ in self.label_map or ())

    @cached_property
    def _indices_of_16_bits(self) -> np.ndarray:
        """Class indices of the values 0 to 65535. A look-up is faster than a computation per pixel."""
        return self.indices(np.arange(1 << 16)).astype(np.int16)

    @cached_property
    def _ranges(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Lowest values, highest values and class indices of sorted ranges, if the rule lists values or colours."""
        if self.colors is not None:
            index_of = {_color_value(color): index for index, color in enumerate(self.colors)}
            index_of |= {_color_value(color): IGNORE for color in self.ignore_colors}
            ranges = [(value, value, index) for value, index in index_of.items()]
        elif self.label_map is not None:
            ranges = list(self.label_map)
            if not any(low <= self.ignore_index <= high for low, high, _ in ranges):
                ranges.append((self.ignore_index, self.ignore_index, IGNORE))
        else:
            return None
        return tuple(np.array(sorted(ranges)).T)


def _color_value(color: tuple[int, int, int]) -> int:
    red, green, blue = color
    return (red << 16) + (green << 8) + blue


@contextmanager
def open_image(file: StoredFile, expected: str | None = None) -> Iterator[Image.Image]:
    """Open a file with Pillow. Errors, also those inside the `with` block, name the file.

    Args:
        file: An image or a label map.
        expected: Expected content and remedy, for the error message about a format that Pillow does not know. None:
            8-bit RGB.

    Raises:
        UserValueError: The file does not exist, is too large or cannot be read.
    """
    try:
        with open_pillow(file) as image:
            yield image
    except UserError:
        raise
    except Image.UnidentifiedImageError as error:
        content = _describe_raster(file)
        if content is None:
            raise UserValueError(
                f"{file} cannot be read as an image; expected {FORMAT_NAMES}. {REPLACE_FILE}"
            ) from error
        raise UserValueError(
            f"{file} holds {content}; expected {expected or '8-bit RGB. ' + _band_remedy()}"
        ) from error
    except MemoryError as error:
        raise UserValueError(
            f"{file} cannot be read as an image: there is not enough memory. {REPLACE_FILE}"
        ) from error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's, for damaged content
        raise UserValueError(f"{file} cannot be read as an image: {error}. {REPLACE_FILE}") from error


def read_bands(file: StoredFile, bands: tuple[int, ...] | None = None) -> np.ndarray:
    """Read bands of a raster with rasterio.

    Args:
        file: The raster.
        bands: Band numbers from 1. None: all bands.

    Returns:
        Array (bands, height, width) of the file's type. Pixels without data are NaN in float types, and 0 in others.

    Raises:
        UserImportError: rasterio is not installed.
        UserValueError: The file cannot be read, is too large, or lacks one of `bands`.
    """
    with open_raster(file, bands) as raster:
        return _filled(_read_masked(raster, bands))


def _read_masked(raster, bands: tuple[int, ...] | None) -> np.ma.MaskedArray:
    return raster.read(list(bands) if bands is not None else None, masked=True)


def _filled(values: np.ma.MaskedArray) -> np.ndarray:
    return values.filled(np.nan if values.dtype.kind == "f" else 0)


def percentile_scale(
    files: Iterable[StoredFile], bands: tuple[int, ...] | None, percentiles: tuple[float, float] = PERCENTILES
) -> tuple[tuple[float, float], ...]:
    """Compute the `scale` of an [`ImageRule`] from percentiles of the values of all files together.

    All files get the same scale. If every file had its own scale, the same field would look different in every file.
    Pixels without data and files that cannot be read are left out.

    Args:
        files: The images. For large images, not all pixels are used: see `PERCENTILE_SAMPLE_PX`.
        bands: Band numbers from 1. None: all bands.
        percentiles: Lower and upper percentile, 0 to 100.

    Returns:
        A (low, high) pair per band.

    Raises:
        UserImportError: rasterio is not installed.
        UserValueError: No file can be read, the files have different numbers of bands, or a band is constant.
    """
    samples = []
    for file in files:
        try:
            with open_raster(file, bands) as raster:
                values = _read_masked(raster, bands)
        except ValueError:  # the checks of the data report this file later
            continue
        steps = [max(1, side // PERCENTILE_SAMPLE_PX) for side in values.shape[1:]]
        thinned = values[:, :: steps[0], :: steps[1]]
        samples.append(thinned.astype(np.float32).filled(np.nan).reshape(len(values), -1))
    if not samples:
        raise UserValueError("None of the images can be read, so there are no percentiles for `scale='percentiles'`.")
    counts = sorted({len(values) for values in samples})
    if len(counts) != 1:
        raise UserValueError(
            f"The images have different numbers of bands: {counts}. Name three that all of them have: "
            "`bands=(3, 2, 1)`."
        )
    return percentile_ranges(np.concatenate(samples, axis=1), percentiles)


def percentile_ranges(
    values: np.ndarray, percentiles: tuple[float, float] = PERCENTILES
) -> tuple[tuple[float, float], ...]:
    """Compute two percentiles of each band.

    Args:
        values: (bands, number of values). NaN values are left out.
        percentiles: Lower and upper percentile, 0 to 100.

    Returns:
        A (low, high) pair per band.

    Raises:
        UserValueError: A band is constant, or has no values.
    """
    if np.isnan(values).all(axis=1).any():
        raise UserValueError("A band holds only pixels without data, so it cannot be scaled. Choose other `bands`.")
    ranges = np.nanpercentile(values, percentiles, axis=1).T.tolist()
    for low, high in ranges:
        if not low < high:
            raise UserValueError(
                f"A band holds the value {low} almost everywhere, so percentiles give no range. Choose the values "
                "that become 0 and 255: `scale=((0, 3000),)`."
            )
    return tuple((low, high) for low, high in ranges)


def _describe_image(image: Image.Image) -> str:
    """Describe the content of an image that Pillow has opened."""
    types = {"I": "int32", "I;16": "uint16", "I;16B": "uint16", "F": "float32"}
    if image.mode in types:
        low, high = np.asarray(image).min(), np.asarray(image).max()
        return f"has the PIL mode '{image.mode}' (1 band of {types[image.mode]}, values {low:g} to {high:g})"
    return f"has the PIL mode '{image.mode}' ({len(image.getbands())} bands of uint8)"


def _describe_raster(file: StoredFile) -> str | None:
    """Describe the content of a file that Pillow cannot open. None: rasterio cannot open it, or is not installed.

    Raises:
        TooLargeError: The file is too large to be read.
    """
    try:
        with open_raster(file) as raster:
            bands = raster.indexes[:DESCRIBED_BANDS]
            shape = (len(bands), min(raster.height, DESCRIBED_PX), min(raster.width, DESCRIBED_PX))
            return _describe_bands(_filled(raster.read(list(bands), out_shape=shape, masked=True)), raster.count)
    except TooLargeError:
        raise
    except (ImportError, ValueError):
        return None


def _describe_bands(values: np.ndarray, num_bands: int) -> str:
    """Describe bands. `values` may be a sample of some bands and pixels."""
    low, high = (np.nanmin(values), np.nanmax(values))
    return f"{num_bands} band{'s' * (num_bands > 1)} of {values.dtype}, values {low:g} to {high:g}"


def _band_remedy(mode: str | None = None) -> str:
    """Return a sentence with the options for a file that is not 8-bit RGB. `mode` is its PIL mode, if it has one."""
    needs = "(needs rasterio: pip install 'co2s_hf[scenes]')."
    if mode in ("RGBA", "RGBX", "CMYK"):
        return f"Leave the fourth band out: `bands=(1, 2, 3)` {needs}"
    if mode in ("LA", "La"):
        return f"Leave the second band out: `bands=(1, 1, 1)` {needs}"
    scale = "the values that become 0 and 255: `scale=((0, 3000),)`, or `scale='percentiles'`"
    if mode in ("I", "I;16", "I;16B", "F"):
        return f"Choose {scale} {needs}"
    return f"Choose the bands for red, green and blue: `bands=(4, 3, 2)`, and {scale} {needs}"
