"""Read georeferenced rasters window by window: files, mosaics (VRT), web addresses, everything that GDAL opens.

The user has named the raster, so an address or a mosaic may be opened. But a file is only opened as what its name
says: a file scene.tif that contains a mosaic is refused.

A whole raster is never in memory at its full size. Each read also returns a mask of the valid pixels: those that are
not nodata, not transparent and not NaN.
"""

import itertools
import math
import os
import stat
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import rasterio
from affine import Affine
from rasterio._err import CPLE_BaseError
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from ..data.bands import RasterBands, Scale, check_bands, resolve_bands
from ..data.image_files import StoredFile, check_blocks, check_names_no_file, raster_driver
from ..data.reading import ImageRule, percentile_ranges
from ..utils.errors import UserValueError
from ..utils.redaction import redact
from .georeferencing import GeoGrid
from .scene_files import is_local, scene_name


SAMPLE_PX = 1024  # longer side of the sample from which the range of a band's values is computed
FEW_PX = 1000  # if fewer pixels of the sample have data, the scene is read at its full size
GDAL_OPTIONS = {
    "GDAL_CACHEMAX": 128 * 2**20,  # bytes; GDAL's default is a twentieth of the memory of the machine
    "GDAL_HTTP_CONNECTTIMEOUT": "30",  # seconds
    "GDAL_HTTP_TIMEOUT": "120",
    "GDAL_HTTP_MAX_RETRY": "5",
    "GDAL_HTTP_RETRY_DELAY": "1",
    "GDAL_VRT_ENABLE_PYTHON": "NO",  # a mosaic may contain a program
}
# Suffix -> GDAL's driver. Any driver may open a raster with another suffix, and GDAL's names of a part of a file.
DRIVERS = {
    ".tif": "GTiff",
    ".tiff": "GTiff",
    ".jp2": "JP2OpenJPEG",
    ".vrt": "VRT",
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
}


class UnreadableScene(UserValueError):
    """A scene cannot be read, either when it is opened or later."""


def open_scene(source: str) -> rasterio.DatasetReader:
    """Open a raster that the user has named.

    Args:
        source: Path or address that GDAL opens.

    Raises:
        RasterioError: The raster cannot be opened, or is not what its name says.
        UserValueError: The raster, or a file beside it, names other files, or has blocks that are too large.
    """
    # A scene without a position gets an error of its own, and files beside a scene need none.
    warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)
    if is_local(source):
        mode = os.stat(source).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening it could wait forever
            raise UserValueError(f"{source} is no file, but a pipe or a device. Replace it.")
        check_beside(source)
    # A Path is opened as a file. Text could be one of GDAL's own names, also if a file has that name.
    raster = rasterio.open(Path(source) if is_local(source) else source, driver=_driver(source))
    try:
        check_names_no_file(raster, redact(source))
        check_blocks(raster, redact(source))
    except UserValueError:
        raster.close()
        raise
    return raster


def check_beside(path: str):
    """Check the files with the overviews and the mask of a raster. GDAL would open them with any driver.

    Args:
        path: Path of the raster.

    Raises:
        UserValueError: Such a file is no GeoTIFF, or names another file.
    """
    folder, name = os.path.split(path)
    expected = (f"{name}.ovr".lower(), f"{name}.msk".lower())
    for beside in (os.path.join(folder, other) for other in os.listdir(folder or ".") if other.lower() in expected):
        if raster_driver(StoredFile(beside)) != "GTiff":
            raise UserValueError(f"{beside} is no GeoTIFF, as files with overviews or masks are. Remove it.")
        with rasterio.open(Path(beside), driver="GTiff") as raster:
            check_names_no_file(raster, beside)
        check_beside(beside)


def _driver(source: str) -> str | None:
    """Return the driver that the name of a raster asks for. None: any driver."""
    if not is_local(source) and not source.startswith(("http://", "https://", "s3://", "gs://", "az://", "/vsi")):
        return None
    suffix = os.path.splitext(scene_name(source))[1].lower()
    if suffix == ".img" and is_local(source):  # the suffix of two formats
        with StoredFile(source).open() as stream:
            return "HFA" if stream.read(15) == b"EHFA_HEADER_TAG" else "ENVI"
    return DRIVERS.get(suffix)


class SceneRaster:
    """A georeferenced raster that is read window by window, in its own pixels or in larger or smaller ones.

    Several threads may read at the same time, because each thread opens the file separately.

    Args:
        source: Path or address that GDAL opens.
        bands: Numbers, from 1, of the bands for red, green and blue, or the name of a preset of data/bands.py. None:
            all bands except transparency.
        resample_to_m: Ground sampling distance to read at, in metres. None: that of the scene.
        scale: As in [`ImageRule`], or "percentiles": the percentiles of this scene. None: that of the preset.

    Attributes:
        grid: Pixel grid of the scene.
        read_grid: Pixel grid of `read`: `grid`, or the grid with pixels of `resample_to_m`.
        dtype: Common type of the bands.
        tags: Metadata of the file.
        nodata: Value of pixels without data. None: there is no such value.
        num_bands: Number of bands of the file.

    Raises:
        UnreadableScene: The scene cannot be opened, or has no bands or no position on Earth.
        BandsError: The scene lacks one of `bands`, or has not the bands of the preset.
        UserValueError: `resample_to_m` is given, and the coordinates cannot be converted to metres.
    """

    def __init__(
        self,
        source: str,
        bands: tuple[int, ...] | str | None = None,
        resample_to_m: float | None = None,
        scale: Scale | str | None = None,
    ):
        self.source = source
        self._local, self._opened, self._lock = threading.local(), [], threading.Lock()
        raster = self._raster()
        self._check_kind(raster)
        gcps, gcps_crs = raster.gcps
        crs = gcps_crs if gcps else raster.crs
        self.grid = GeoGrid(raster.height, raster.width, raster.transform, crs, tuple(gcps), raster.rpcs)
        self.tags, self.nodata, self.num_bands = raster.tags(), raster.nodata, raster.count
        if crs is None and raster.rpcs is None:
            raise UnreadableScene(
                f"{self.source} has no coordinate system, so its position on Earth is unknown. Add one (`rio "
                "edit-info --crs EPSG:32640 --transform ... FILE`). To predict it as an image without georeferencing: "
                "`segment_image` (on the command line `images`)."
            )
        self._check_transform()
        self._found = RasterBands.of(raster, self._sample_bands)
        self._chosen, self._scale, self._preset = resolve_bands(bands, scale)
        self.bands = self._chosen or self._found.image_bands
        if not self.bands:
            raise UnreadableScene(f"{self.source} has only a transparency band; expected bands with an image.")
        if self._found.lacks(self._chosen, self._preset):
            self._check_bands()
        # A band that is chosen as a colour is not used as transparency, even if GDAL marks it as such.
        no_masks = {MaskFlags.all_valid}
        if not self._found.alpha_is_mask(self.bands, self._preset):
            no_masks.add(MaskFlags.alpha)
        self._has_mask = any(not no_masks & set(raster.mask_flag_enums[number - 1]) for number in self.bands)
        self.dtype = np.result_type(*{raster.dtypes[number - 1] for number in self.bands})
        self.read_grid = self.grid
        if resample_to_m is not None:
            self.resample(resample_to_m)

    def resample(self, distance_m: float):
        """Read at another ground sampling distance from now on.

        Args:
            distance_m: Height and width of the central pixel on the ground, in metres.

        Raises:
            UserValueError: The coordinates cannot be converted to metres.
        """
        sizes = zip((self.grid.height, self.grid.width), self.pixel_size_m())
        self.read_grid = self.grid.resized(*(max(1, round(n * size / distance_m)) for n, size in sizes))

    def pixel_size_m(self) -> tuple[float, float]:
        """Return the height and the width on the ground of the central pixel of the scene, in metres.

        Raises:
            UserValueError: The coordinates cannot be converted to metres, or the size of this pixel does not hold for
                all pixels.
        """
        ground = self.grid.on_ground()
        ground.check_corners()
        return ground.pixel_size_m()

    def _check_kind(self, raster: rasterio.DatasetReader):
        """Refuse rasters without bands, and rasters with values that are not intensities."""
        if raster.count == 0:
            inner = "".join(f"\n  {name}" for name in raster.subdatasets)
            raise UnreadableScene(
                f"{self.source} has no bands. "
                + (f"Name one of the rasters inside it:{inner}" if inner else "Replace it.")
            )
        dtypes = set(raster.dtypes)
        if any(dtype.startswith("complex") for dtype in dtypes):
            raise UnreadableScene(f"{self.source} holds complex numbers ({', '.join(dtypes)}); expected real numbers.")
        if ColorInterp.palette in raster.colorinterp:
            raise UnreadableScene(
                f"{self.source} holds palette indices; expected colours. Convert them: `gdal_translate -expand rgb`."
            )

    def _check_transform(self):
        """Refuse a scene without a transform, and a transform that gives all pixels of a row one place."""
        transform = self.grid.transform
        if transform == Affine.identity() and not self.grid.gcps and self.grid.rpcs is None:
            raise UnreadableScene(
                f"{self.source} has a coordinate system, but no transform, control points or RPCs, so its position on "
                "Earth is unknown. Add a transform (`rio edit-info --transform ... FILE`). To predict it as an image "
                "without georeferencing: `segment_image` (on the command line `images`)."
            )
        if not (math.isfinite(sum(transform)) and transform.determinant):
            raise UnreadableScene(
                f"{self.source} has the transform {tuple(transform)[:6]}, which gives its pixels no area on Earth. "
                "Correct it: `rio edit-info --transform ... FILE`."
            )

    @property
    def step(self) -> tuple[float, float]:
        """Height and width of a pixel of `read_grid`, in pixels of the scene."""
        return self.grid.height / self.read_grid.height, self.grid.width / self.read_grid.width

    def _check_bands(self):
        """Check that the bands can become 8-bit RGB with the scale."""
        check_bands(self._found, self.source, self._chosen, self._scale, self._preset, advise_percentiles=True)

    def image_rule(self, others: Sequence["SceneRaster"] = ()) -> ImageRule:
        """Return the rule that converts the bands to 8-bit RGB.

        Percentiles are those of a sample of the pixels. If no pixel is valid, there is nothing to scale, and the range
        is 0 to 255.

        Args:
            others: Rasters that get the same rule. They were opened with the same `bands` and `scale`.

        Raises:
            BandsError: The bands and the scale do not give 8-bit RGB. The message names those to choose.
            UserValueError: A band has no percentiles.
        """
        for raster in (self, *others):
            raster._check_bands()
        scale = self._scale
        if scale == "percentiles":
            values = self._values_for_percentiles()
            if others:
                thinned = [raster._values_for_percentiles()[:, :: 1 + len(others)] for raster in others]
                values = np.concatenate([values[:, :: 1 + len(others)], *thinned], axis=1)
            try:
                scale = percentile_ranges(values) if values.size else ((0, 255),)
            except ValueError as error:
                raise UserValueError(f"{self.source}: {error}") from error
        return ImageRule(self.bands, scale)

    def _values_for_percentiles(self) -> np.ndarray:
        """Return the values of some pixels, (bands, pixels), NaN in a band without data.

        They are a sample of the whole scene. If few pixels of the sample have data, such as those of a corner, they
        are all pixels with data instead, or the first ones. No pixel: the scene has no data.
        """
        height, width, shape = self.grid.height, self.grid.width, self.sample_shape(SAMPLE_PX)
        values = self._values(self.bands, Window(0, 0, width, height), shape)
        if values.shape[1] >= FEW_PX or shape == (height, width):
            return values
        found, num_pixels = [], 0
        for top, left in itertools.product(range(0, height, SAMPLE_PX), range(0, width, SAMPLE_PX)):
            size = min(SAMPLE_PX, height - top), min(SAMPLE_PX, width - left)
            found.append(self._values(self.bands, Window(left, top, size[1], size[0]), size))
            num_pixels += found[-1].shape[1]
            if num_pixels >= SAMPLE_PX**2:
                break
        return np.concatenate(found, axis=1)

    def _sample_bands(self, bands: tuple[int, ...]) -> np.ndarray:
        """Read a sample of some bands for an error message, (bands, pixels), float32, NaN for no data."""
        return self._values(bands, Window(0, 0, self.grid.width, self.grid.height), self.sample_shape(SAMPLE_PX))

    def _values(self, bands: tuple[int, ...], window: Window, shape: tuple[int, int]) -> np.ndarray:
        """Read the pixels of a window that have data in at least one band, (bands, pixels), float32."""
        with self._gdal():
            values = self._raster().read(list(bands), window=window, out_shape=(len(bands), *shape), masked=True)
        values = values.astype(np.float32).filled(np.nan).reshape(len(bands), -1)
        values[~np.isfinite(values)] = np.nan
        return values[:, ~np.isnan(values).all(axis=0)]

    def read(self, rows: slice, columns: slice) -> tuple[np.ndarray, np.ndarray]:
        """Read a window.

        Args:
            rows, columns: In pixels of `read_grid`.

        Returns:
            The values of the bands (bands, height, width), in the type of the scene, and the mask of valid pixels
            (height, width), boolean.
        """
        (down, across), shape = self.step, (rows.stop - rows.start, columns.stop - columns.start)
        window = Window(columns.start * across, rows.start * down, shape[1] * across, shape[0] * down)
        return self._read(window, shape, Resampling.average if max(self.step) > 1 else Resampling.bilinear)

    def valid(self, rows: slice) -> np.ndarray:
        """Return the mask of valid pixels for some rows of `grid`, boolean (rows, width)."""
        shape = (rows.stop - rows.start, self.grid.width)
        window = Window(0, rows.start, shape[1], shape[0])
        if self.dtype.kind == "f":
            return self._read(window, shape, Resampling.nearest)[1]
        return self._mask(window, shape, Resampling.nearest)

    def sample_shape(self, side_px: int) -> tuple[int, int]:
        """Return (height, width) of the scene after it is reduced to at most `side_px` pixels on its longer side."""
        factor = min(1.0, side_px / max(self.grid.height, self.grid.width))
        return max(1, round(self.grid.height * factor)), max(1, round(self.grid.width * factor))

    def sample(self, side_px: int) -> tuple[np.ndarray, np.ndarray]:
        """Read the whole scene at the size of [`sample_shape`] by nearest neighbour. Returns as in [`read`]."""
        whole = Window(0, 0, self.grid.width, self.grid.height)
        return self._read(whole, self.sample_shape(side_px), Resampling.nearest)

    def _read(self, window: Window, shape: tuple[int, int], resampling: Resampling) -> tuple[np.ndarray, np.ndarray]:
        """Read a window (in pixels of `grid`) and its mask, both resampled to `shape`."""
        options = {"window": window, "out_shape": (len(self.bands), *shape), "resampling": resampling}
        with self._gdal():
            values = self._raster().read(list(self.bands), **options)
        valid = self._mask(window, shape, resampling)
        if self.dtype.kind == "f":
            valid &= np.isfinite(values).all(axis=0)
        return values, valid

    def _mask(self, window: Window, shape: tuple[int, int], resampling: Resampling) -> np.ndarray:
        """Read the mask of valid pixels from nodata values, mask bands and transparency, boolean.

        An integer nodata value (0 or 255) may also be a valid value of a single band. A pixel is therefore without
        data only if all bands have the nodata value. A floating-point nodata value is never a valid value. A pixel is
        then without data if at least one band has the nodata value.
        """
        if not self._has_mask:
            return np.ones(shape, dtype=bool)
        options = {"window": window, "out_shape": (len(self.bands), *shape), "resampling": resampling}
        with self._gdal():
            masks = self._raster().read_masks(list(self.bands), **options) > 0
        return masks.all(axis=0) if self.dtype.kind == "f" else masks.any(axis=0)

    def _raster(self) -> rasterio.DatasetReader:
        """Return the opened file of this thread."""
        if not hasattr(self._local, "raster"):
            with self._gdal():
                self._local.raster = open_scene(self.source)
            with self._lock:
                self._opened.append(self._local.raster)
        return self._local.raster

    @contextmanager
    def _gdal(self) -> Iterator[None]:
        """Set GDAL's options in this thread, and raise its errors as [`UnreadableScene`]."""
        try:
            with rasterio.Env(**GDAL_OPTIONS):
                yield
        except UserValueError as error:
            raise UnreadableScene(str(error)) from error
        except (RasterioError, CPLE_BaseError) as error:
            raise UnreadableScene(
                f"{self.source} cannot be read: {str(error.__cause__ or error).rstrip('.')}. Expected a complete "
                "raster file that GDAL opens. Check the path, or copy the file again."
            ) from error

    def close(self):
        """Close the opened files of all threads."""
        for raster in self._opened:
            raster.close()

    def __enter__(self) -> "SceneRaster":
        return self

    def __exit__(self, *error):
        self.close()
