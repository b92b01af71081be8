"""Open the image files of a data set safely. A data set may come from strangers.

GDAL and Pillow open more than a hundred formats. Some formats make them read other files, request web addresses or
start programs. A file is therefore opened by the one reader that its first bytes ask for, and only for the formats of
images. Files beside the image (.aux.xml, .ovr, .msk, world files) are not read. The size of an image is checked before
anything is decoded.
"""

import io
import os
import re
import stat
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import BinaryIO

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ..utils.errors import UserError, UserImportError, UserValueError
from ..utils.redaction import redact


MAX_PIXELS = 2**28  # of one image: 16384 x 16384
MAX_BYTES = 2**31  # of the decoded bands of one image, and of one block of a raster
FORMAT_NAMES = "PNG, JPEG, TIFF, BMP, WebP or JPEG 2000"
CONTROL_CHARACTERS = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029]")  # also the ends of lines of Unicode
LONGEST_NAME = 255  # bytes that file systems allow
UNSAFE_CHARACTERS = re.compile(rf'{CONTROL_CHARACTERS.pattern}|[<>:"|?*]')  # in a file name, on some system
LONGEST_STEM, LONGEST_SUFFIX = 150, 16  # bytes and characters of the names of new files
REPLACE_FILE = "Replace it, or remove it from its list."
GDAL_OPTIONS = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_PAM_ENABLED": "NO"}  # no files beside the image

# First bytes of a file -> GDAL's driver, and Pillow's class (None: the format is read with rasterio only).
_READERS: tuple[tuple[bytes, str, type[ImageFile] | None], ...] = (
    (b"\x89PNG\r\n\x1a\n", "PNG", PngImageFile),
    (b"\xff\xd8\xff", "JPEG", JpegImageFile),
    *((order, "GTiff", TiffImageFile) for order in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    (b"BM", "BMP", BmpImageFile),
    (b"RIFF????WEBP", "WEBP", WebPImageFile),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JP2OpenJPEG", None),
    (b"\xff\x4f\xff\x51", "JP2OpenJPEG", None),
)


class TooLargeError(UserValueError):
    """An image has more pixels or bytes than are read at a time."""


@dataclass(frozen=True)
class StoredFile:
    """A file on disk, or a file whose bytes are in a data set.

    Args:
        path: Path on disk; for a file in a data set, its original name, or "".
        data: The bytes of a file in a data set. None: the file is on disk.
        row: Split and row number of a file in a data set, for messages.
    """

    path: str
    data: bytes | None = None
    row: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.row, redact(self.path) if self.row else self.path)))

    @property
    def name(self) -> str:
        """The last part of the path, as a safe name of a new file. The path of a row comes from its data set.

        It has no folders, no control characters, no characters that Windows forbids, and a length that every file
        system allows. "" if there is none.
        """
        path = re.split("[?#]", redact(self.path))[0] if "://" in self.path else self.path  # it may be a web address
        name = PurePosixPath(UNSAFE_CHARACTERS.sub("_", path.replace("\\", "/"))).name
        stem, suffix = os.path.splitext("" if name == ".." else name)
        stem = stem.encode("utf-8", "replace")[:LONGEST_STEM].decode("utf-8", "ignore")
        return stem + suffix.encode("ascii", "ignore").decode()[:LONGEST_SUFFIX]

    def read_bytes(self) -> bytes:
        """Read the whole file."""
        with self.open() as stream:
            return stream.read()

    def open(self) -> BinaryIO:
        """Open the file for reading.

        Raises:
            UserValueError: The file does not exist or cannot be opened, or it is a folder, a pipe or a device.
        """
        if self.data is not None:
            return io.BytesIO(self.data)
        try:
            if stat.S_ISREG(os.stat(self.path).st_mode):  # opening a pipe or a device could wait forever
                return open(self.path, "rb")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserValueError(f"{self} does not exist. Correct the list that names it.") from error
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
            raise UserValueError(f"{self} cannot be opened: {error}. {REPLACE_FILE}") from error
        raise UserValueError(f"{self} is no file, but a folder or a device. {REPLACE_FILE}")


@contextmanager
def open_pillow(file: StoredFile) -> Iterator[ImageFile]:
    """Open an image with Pillow.

    Args:
        file: The image.

    Raises:
        PIL.UnidentifiedImageError: The file has another format, or pixels that Pillow has no mode for.
        TooLargeError: The image has more than `MAX_PIXELS`.
        UserValueError: The file cannot be opened.
    """
    with file.open() as stream:
        _, reader = _reader(stream)
        if reader is None:
            raise Image.UnidentifiedImageError(f"expected {FORMAT_NAMES}")
        try:
            # `Image.open` would apply Pillow's limit of 179 million pixels, and warn above 89 million.
            image = reader(stream)
        except (SyntaxError, IndexError, TypeError, struct.error) as error:  # as `Image.open` does
            raise Image.UnidentifiedImageError(str(error)) from error
        with image:
            check_size(file, image.width, image.height, len(image.getbands()), 1)
            with _pillow_limit_raised(image):
                yield image


_LIMIT_LOCK = threading.RLock()


@contextmanager
def _pillow_limit_raised(image: ImageFile) -> Iterator[None]:
    """Allow `MAX_PIXELS` while a large TIFF is decoded: Pillow then applies its own limit for a second time.

    The limit is a variable of the module `PIL.Image`. It is changed only for images above it, one at a time.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if not isinstance(image, TiffImageFile) or limit is None or image.width * image.height <= limit:
        yield
        return
    with _LIMIT_LOCK:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, MAX_PIXELS
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


@contextmanager
def open_raster(file: StoredFile, bands: tuple[int, ...] | None = None, at_once: bool = True):
    """Open an image with rasterio. Errors, also those inside the `with` block, name the file.

    Args:
        file: The image.
        bands: Numbers, from 1, of the bands that will be read. None: all bands.
        at_once: Check that the bands are small enough to be read at once. False: the caller reads windows.

    Returns:
        A context manager that gives the open `rasterio.DatasetReader`.

    Raises:
        UserImportError: rasterio is not installed.
        TooLargeError: The bands are too large to be read.
        UserValueError: The file cannot be read, has another format, or names another file.
    """
    rasterio = _import_rasterio(file)
    from rasterio._err import CPLE_BaseError  # rasterio raises some of GDAL's errors unchanged

    driver = raster_driver(file)
    if driver is None:
        raise UserValueError(f"{file} cannot be read as a raster; expected {FORMAT_NAMES}. {REPLACE_FILE}")
    try:
        with rasterio.Env(**GDAL_OPTIONS), _opened(rasterio, file, driver) as raster:
            check_names_no_file(raster, file)
            if at_once:
                itemsize = max(_itemsize(dtype) for dtype in raster.dtypes)
                num_bands = raster.count if bands is None else len(bands)
                check_size(file, raster.width, raster.height, num_bands, itemsize)
            check_blocks(raster, file)
            yield raster
    except UserError:
        raise
    except (rasterio.errors.RasterioError, CPLE_BaseError, MemoryError) as error:
        reason = str(error) or "there is not enough memory"
        raise UserValueError(f"{file} cannot be read as a raster: {reason}. {REPLACE_FILE}") from error


@contextmanager
def _opened(rasterio: ModuleType, file: StoredFile, driver: str):
    if file.data is None:
        # rasterio takes a Path for no address, and GDAL takes an absolute path for none of its own names, such as
        # "GTIFF_DIR:1:FILE".
        with rasterio.open(Path(os.path.abspath(file.path)), driver=driver) as raster:
            yield raster
    else:
        with rasterio.MemoryFile(file.data) as memory, memory.open(driver=driver) as raster:
            yield raster


def check_size(file: StoredFile, width: int, height: int, num_bands: int, itemsize: int):
    """Check that an image can be decoded at once.

    Args:
        file: The image.
        width, height: In pixels.
        num_bands: Number of the bands that will be read.
        itemsize: Bytes of a value.

    Raises:
        TooLargeError: It has more than `MAX_PIXELS`, or its bands more than `MAX_BYTES`.
    """
    if width * height > MAX_PIXELS:
        raise TooLargeError(
            f"{file} has {width} x {height} pixels; at most {MAX_PIXELS:,} are read at once. Cut it into tiles."
        )
    num_bytes = width * height * num_bands * itemsize
    if num_bytes > MAX_BYTES:
        fewer = "Read fewer bands: `bands=(3, 2, 1)`. Or cut it into tiles." if num_bands > 3 else "Cut it into tiles."
        raise TooLargeError(
            f"{file} has {num_bands} bands of {width} x {height} pixels, {num_bytes / 2**30:.1f} GiB; at most "
            f"{MAX_BYTES / 2**30:.0f} GiB are read at once. {fewer}"
        )


def check_blocks(raster, name: StoredFile | str):
    """Check that one block of a raster can be decoded. GDAL always decodes whole blocks, also for a few pixels.

    Args:
        raster: The open `rasterio.DatasetReader`.
        name: Name of the file for the message.

    Raises:
        TooLargeError: A block has more than `MAX_BYTES`.
    """
    together = raster.count if raster.tags(ns="IMAGE_STRUCTURE").get("INTERLEAVE") == "PIXEL" else 1
    for (height, width), dtype in zip(raster.block_shapes, raster.dtypes):
        num_bytes = height * width * together * _itemsize(dtype)
        if num_bytes > MAX_BYTES:
            raise TooLargeError(
                f"{name} has blocks of {width} x {height} pixels, {num_bytes / 2**30:.1f} GiB; at most "
                f"{MAX_BYTES / 2**30:.0f} GiB are read at once. Save it with smaller blocks: `gdal_translate -co "
                "TILED=YES`."
            )


def check_names_no_file(raster, name: StoredFile | str):
    """Check that the metadata of a raster do not name a file with overviews. GDAL would open any file or address.

    Args:
        raster: The open `rasterio.DatasetReader`.
        name: Name of the file for the message.

    Raises:
        UserValueError: The metadata name a file.
    """
    if "OVERVIEW_FILE" in raster.tags(ns="OVERVIEWS"):
        raise UserValueError(
            f"{name} names another file with its overviews (OVERVIEW_FILE in its metadata), which is not opened. Save "
            "it without: `gdal_translate -nomd`."
        )


def raster_driver(file: StoredFile) -> str | None:
    """Return GDAL's driver for the format that the first bytes of a file name. None: the file is no image.

    Raises:
        UserValueError: The file cannot be opened.
    """
    with file.open() as stream:
        return _reader(stream)[0]


def _reader(stream: BinaryIO) -> tuple[str | None, type[ImageFile] | None]:
    """Return GDAL's driver and Pillow's class for the first bytes of a file. None: the file has another format."""
    head = stream.read(16)
    stream.seek(0)
    for signature, driver, reader in _READERS:
        if all(expected in (found, ord("?")) for expected, found in zip(signature, head.ljust(16, b"\0"))):
            return driver, reader
    return None, None


def _itemsize(dtype: str) -> int:
    """Return the bytes of a value of one of rasterio's types, such as "uint8" or "complex_int16"."""
    return 4 if dtype == "complex_int16" else np.dtype(dtype).itemsize


def _import_rasterio(file: StoredFile) -> ModuleType:
    try:
        import rasterio
    except ImportError as error:
        raise UserImportError(f"Reading the bands of {file} needs rasterio: pip install 'co2s_hf[scenes]'.") from error
    # Training images need no coordinates, so a missing georeference is no problem.
    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
    return rasterio
