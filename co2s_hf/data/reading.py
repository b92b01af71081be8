"""Read image files as 8-bit RGB and label files as maps of class indices, under explicit rules.

The meaning of bands, bit depths and label values is never guessed. A file that the rules do not cover is refused, and
the error describes its content.
"""

import itertools
import logging
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from ..model.configuration_co2s import Co2SConfig
from ..utils.errors import UserError, UserFileNotFoundError, UserValueError
from .bands import PERCENTILES, Bands, BandsError, RasterBands, Scale, check_bands, resolve_bands
from .image_files import FORMAT_NAMES, REPLACE_FILE, StoredFile, TooLargeError, open_pillow, open_raster
from .options import IGNORE


logger = logging.getLogger(__name__)

UNKNOWN = -1  # index of a label value or colour that no rule covers
PERCENTILE_SAMPLE_PX = 256  # rows and columns of larger files are thinned for percentiles; at least this many remain
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
PILLOW_TYPES = {"I": "int32", "I;16": "uint16", "I;16B": "uint16", "F": "float32"}  # modes of more than 8 bits
NEEDS_RASTERIO = "This needs rasterio: pip install 'co2s_hf[scenes]'."
GDAL_METADATA = 42112  # TIFF tag with descriptions and colours of bands
DESCRIBED_PX = 256  # an error describes the values of so many rows and columns of a file
USUAL_LIMITS = (1, 255, 3000, 10000)  # of reflectance as a fraction, 8 bits, and reflectance times 10000


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

    Without `bands` and `scale`, the rule covers only files of 1 or 8 bits with RGB, grey or palette colours. They may
    have transparency: pixels that are fully transparent become black, as pixels without data do.

    Args:
        bands: Numbers of the bands for red, green and blue. They start at 1, as in GDAL.
        scale: (low, high) values that become 0 and 255, one pair for all bands or one pair per band. Values outside
            this range are clipped.
        preset: Name of the entry of `PRESETS` that gave `bands`. Files with another number of bands are refused.
    """

    bands: tuple[int, int, int] | None = None
    scale: tuple[tuple[float, float], ...] | None = None
    preset: str | None = None

    @classmethod
    def of_config(cls, config: Co2SConfig) -> "ImageRule":
        """Return the rule by which the training images of a model were read."""
        scale = None if config.image_scale is None else tuple(tuple(pair) for pair in config.image_scale)
        return cls(None if config.image_bands is None else tuple(config.image_bands), scale)

    @classmethod
    def of_options(cls, bands: Bands | str | None, scale: Scale | None) -> "ImageRule":
        """Return the rule for `bands`, which may name a preset. The scale of a preset is used if there is none."""
        return cls(*resolve_bands(bands, scale))

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
                return self.read_raster(file, raster)
        with open_image(file) as image:
            _check_8_bit(file, image)
            if base_size is not None:
                scale *= base_scale(image.size, base_size)
                image.draft("RGB", tuple(math.ceil(side * scale) for side in image.size))
            return _to_rgb(image)

    def read_raster(self, file: StoredFile, raster, window: tuple | None = None) -> Image.Image:
        """Read an image, or a window of it, from an open raster as 8-bit RGB.

        Args:
            file: The image.
            raster: The open `rasterio.DatasetReader`.
            window: ((first row, end), (first column, end)). None: the whole image.

        Raises:
            BandsError: The rule does not cover the raster.
        """
        return Image.fromarray(self.to_8_bit(_filled(self._read_bands(file, raster, self.scale, window))))

    def _read_bands(self, file: StoredFile, raster, scale: Scale | str | None, window=None) -> np.ma.MaskedArray:
        """Read the bands of an open raster, after a check that they can become 8-bit RGB with `scale`."""
        _check_real(file, raster)
        found = _bands_of(raster)
        bands = check_bands(found, str(file), self.bands, scale, self.preset)
        if found.tagged_alpha:  # a band that GDAL wrongly takes for transparency must not hide pixels
            has_mask = found.alpha_is_mask(bands, self.preset)
        else:  # without `bands` and `scale`, other images are read with Pillow, which knows no pixels without data
            has_mask = self.bands is not None or scale is not None
        values = raster.read(list(bands), window=window, masked=has_mask)
        return values if has_mask else np.ma.masked_array(values)

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
            with np.errstate(over="ignore"):  # -3.4e38, a usual value for "no data", becomes infinite and then 0
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
            the content of an image, and the bands and the scale to choose for it.

    Raises:
        UserValueError: The file does not exist, is too large or cannot be read.
    """
    try:
        with open_pillow(file) as image:
            yield image
    except UserError:
        raise
    except Image.UnidentifiedImageError as error:
        if expected is None:
            _check_raster(file)
        elif (content := _describe_raster(file)) is not None:
            raise UserValueError(f"{file} holds {content}; expected {expected}") from error
        raise UserValueError(f"{file} cannot be read as an image; expected {FORMAT_NAMES}. {REPLACE_FILE}") from error
    except MemoryError as error:
        raise UserValueError(
            f"{file} cannot be read as an image: there is not enough memory. {REPLACE_FILE}"
        ) from error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's, for damaged content
        raise UserValueError(f"{file} cannot be read as an image: {error}. {REPLACE_FILE}") from error


def _filled(values: np.ma.MaskedArray) -> np.ndarray:
    return values.filled(np.nan if values.dtype.kind == "f" else 0)


def percentile_scale(
    files: Iterable[StoredFile], rule: ImageRule, percentiles: tuple[float, float] = PERCENTILES
) -> tuple[tuple[float, float], ...]:
    """Compute the `scale` of an [`ImageRule`] from percentiles of the values of all files together.

    All files get the same scale. If every file had its own scale, the same field would look different in every file.
    Pixels without data and files that cannot be read with the bands of the rule are left out.

    Args:
        files: The images. For large images, not all pixels are used: see `PERCENTILE_SAMPLE_PX`.
        rule: The rule without a scale.
        percentiles: Lower and upper percentile, 0 to 100.

    Returns:
        A (low, high) pair per band.

    Raises:
        UserImportError: rasterio is not installed.
        UserValueError: No file can be read, the files have different numbers of bands, or a band is constant.
    """
    samples, errors = [], []
    for file in files:
        try:
            with open_raster(file, rule.bands) as raster:
                values = rule._read_bands(file, raster, "percentiles")
        except ValueError as error:  # the checks of the data report this file later
            errors.append(error)
            continue
        steps = [max(1, side // PERCENTILE_SAMPLE_PX) for side in values.shape[1:]]
        thinned = values[:, :: steps[0], :: steps[1]]
        samples.append(thinned.astype(np.float32).filled(np.nan).reshape(len(values), -1))
    if not samples:
        raise UserValueError(
            "None of the images can be read, so there are no percentiles for `scale='percentiles'`."
            + "".join(f" {error}" for error in errors[:1])
        )
    counts = sorted({len(values) for values in samples})
    if len(counts) != 1:
        raise UserValueError(
            f"The images have different numbers of bands: {counts}. Name three that all of them have: "
            "`bands=(1, 1, 1)`, which shows band 1 in grey."
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
            largest = next((limit for limit in USUAL_LIMITS if np.nanmax(values) <= limit), USUAL_LIMITS[-1])
            raise UserValueError(
                f"A band holds the value {low:g} almost everywhere, so percentiles give no range. Choose the values "
                f"that become 0 and 255: `scale=((0, {largest}),)`."
            )
    return tuple((low, high) for low, high in ranges)


def _check_8_bit(file: StoredFile, image: Image.Image):
    """Check that Pillow has opened an 8-bit image, and has not reduced its values to 8 bits.

    Raises:
        UserValueError: It is another image. The message names the bands and the scale to choose.
    """
    is_reduced = any(";16" in str(tile[-1]) for tile in getattr(image, "tile", ()))
    if image.mode in ("RGB", "RGBA", "L", "LA", "P", "PA", "1") and not is_reduced:
        metadata = str(getattr(image, "tag_v2", {}).get(GDAL_METADATA, ""))
        if 'role="description"' in metadata or 'role="colorinterp"' in metadata:
            _check_raster(file, must_choose=False)  # the bands may have another order than red, green, blue
        return
    if image.mode in PILLOW_TYPES or is_reduced:
        _check_raster(file)
        try:  # rasterio is not installed
            check_bands(_bands_of_pillow(image), str(file))
        except BandsError as error:
            raise _with_remedy(error, f"{error} {NEEDS_RASTERIO}") from error
    raise UserValueError(f"{file} {_describe_image(image)}; expected 8-bit RGB. Save it as RGB.")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an 8-bit image to RGB. Pixels that are fully transparent become black."""
    if "A" not in image.getbands():
        return image.convert("RGB")
    black = Image.new("RGB", image.size)
    black.paste(image.convert("RGB"), mask=image.getchannel("A").point(lambda alpha: 255 * (alpha > 0)))
    return black


def _with_remedy(error: BandsError, message: str) -> BandsError:
    """Return the same error with another message."""
    changed = BandsError(message)
    changed.problem = error.problem
    return changed


def _check_raster(file: StoredFile, must_choose: bool = True):
    """Check a file with rasterio. No error: rasterio cannot open it, or is not installed.

    Args:
        file: The file.
        must_choose: Pillow cannot read it as 8-bit RGB, so it is always an error.

    Raises:
        BandsError: The file is a raster. The message names the bands and the scale to choose.
        TooLargeError: The file is too large to be read.
    """
    try:
        with open_raster(file) as raster:
            _check_real(file, raster)
            check_bands(_bands_of(raster), str(file), must_choose=must_choose)
    except (BandsError, TooLargeError):
        raise
    except (ImportError, ValueError):
        return


def _check_real(file: StoredFile, raster):
    if any(dtype.startswith("complex") for dtype in raster.dtypes):
        raise BandsError(f"{file} holds complex numbers; expected real numbers. {REPLACE_FILE}")


def _bands_of(raster) -> RasterBands:
    """Return what a raster tells about its bands."""

    def sample(bands: Bands) -> np.ndarray:
        shape = (len(bands), min(raster.height, DESCRIBED_PX), min(raster.width, DESCRIBED_PX))
        values = raster.read(list(bands), out_shape=shape, masked=True)
        values = np.abs(values) if values.dtype.kind == "c" else values  # complex numbers are only described
        values = values.astype(np.float32).filled(np.nan)
        values[~np.isfinite(values)] = np.nan
        return values.reshape(len(bands), -1)

    return RasterBands.of(raster, sample)


def _bands_of_pillow(image: Image.Image) -> RasterBands:
    """Return what Pillow tells about the bands of an image of more than 8 bits."""
    names = image.getbands() if image.mode not in PILLOW_TYPES else ("",)
    names = tuple({"R": "red", "G": "green", "B": "blue", "A": "alpha"}.get(name, "") for name in names)
    # Pillow reduces several bands of 16 bits to 8 bits. Their values are then known approximately.
    factor = 1 if image.mode in PILLOW_TYPES else 257
    values = np.asarray(image).astype(np.float32).reshape(-1, len(names)).T * factor
    dtypes = (PILLOW_TYPES.get(image.mode, "uint16"),) * len(names)
    return RasterBands(
        dtypes, names, tuple(name or None for name in names), lambda bands: values[[band - 1 for band in bands]]
    )


def _describe_image(image: Image.Image) -> str:
    """Describe the content of an image that Pillow has opened."""
    if image.mode in PILLOW_TYPES:
        low, high = np.asarray(image).min(), np.asarray(image).max()
        return f"has the PIL mode '{image.mode}' (1 band of {PILLOW_TYPES[image.mode]}, values {low:g} to {high:g})"
    return f"has the PIL mode '{image.mode}' ({len(image.getbands())} bands of uint8)"


def _describe_raster(file: StoredFile) -> str | None:
    """Describe the content of a file that Pillow cannot open. None: rasterio cannot open it, or is not installed.

    Raises:
        TooLargeError: The file is too large to be read.
    """
    try:
        with open_raster(file) as raster:
            found = _bands_of(raster)
            return found.describe(found.sample(found.image_bands[:3]))
    except TooLargeError:
        raise
    except (ImportError, ValueError):
        return None
