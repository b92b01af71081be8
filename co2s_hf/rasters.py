"""Georeferenced rasters as a source of windows: whatever GDAL opens, files, mosaics (VRT), addresses on the web.

Rasters are never read whole. Nodata, transparency and NaN are told apart from pixels that were seen.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import rasterio
from rasterio._err import CPLE_BaseError
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import RasterioError
from rasterio.windows import Window

from .ground import Place
from .reading import ImageRule, percentile_ranges


SAMPLE_PX = 1024  # longer side of what is looked at to tell the range of a band's values
# A small cache of blocks (GDAL's own takes a twentieth of the machine), and patience with servers.
GDAL_OPTIONS = {
    "GDAL_CACHEMAX": 128 * 2**20,
    "GDAL_HTTP_CONNECTTIMEOUT": "30",  # seconds
    "GDAL_HTTP_TIMEOUT": "120",
    "GDAL_HTTP_MAX_RETRY": "5",
    "GDAL_HTTP_RETRY_DELAY": "1",
}


class UnreadableScene(ValueError):
    """A scene that cannot be read, from the start or in the middle."""


class SceneRaster:
    """A georeferenced raster, read window by window on its own pixel grid or on a coarser or finer one.

    Several threads may read at the same time: each has the file open for itself.

    Args:
        source: Path or address that GDAL opens.
        bands: Numbers from 1 of the bands for red, green and blue. Left out: all that are not transparency.
        resample_to_m: Ground sampling distance to read at, in metres. Left out: the scene's own.

    Raises:
        UnreadableScene: It cannot be opened, has no bands, no place on Earth, or not the bands asked for.
        ValueError: Its coordinate system tells no metres to resample to.
    """

    def __init__(self, source: str, bands: tuple[int, ...] | None = None, resample_to_m: float | None = None):
        self.source = source
        self._local, self._opened, self._lock = threading.local(), [], threading.Lock()
        raster = self._raster()
        self._check_kind(raster)
        gcps, gcps_crs = raster.gcps
        crs = gcps_crs if gcps else raster.crs
        self.place = Place(raster.height, raster.width, raster.transform, crs, tuple(gcps), raster.rpcs)
        self.tags = raster.tags()
        if crs is None and raster.rpcs is None:
            raise UnreadableScene(
                f"{self.source} has no coordinate system: nobody could tell where its map lies. Give it one (`rio "
                "edit-info --crs EPSG:32640 --transform ... FILE`), or predict it as a picture: --images."
            )
        alpha = [number for number, kind in zip(raster.indexes, raster.colorinterp) if kind == ColorInterp.alpha]
        self.bands = bands or tuple(number for number in raster.indexes if number not in alpha)
        if not self.bands:
            raise UnreadableScene(f"{self.source} has no bands but transparency.")
        if unknown := [number for number in self.bands if number not in raster.indexes]:
            raise UnreadableScene(f"{self.source} holds {self.held()}. There is no band {unknown[0]}. See --bands.")
        # A band that is asked for as a colour is no transparency, whatever GDAL calls it.
        no_masks = {MaskFlags.all_valid} | ({MaskFlags.alpha} if set(self.bands) & set(alpha) else set())
        self._has_mask = any(not no_masks & set(raster.mask_flag_enums[number - 1]) for number in self.bands)
        self.dtype = np.result_type(*(raster.dtypes[number - 1] for number in self.bands))
        self.grid = self.place
        if resample_to_m is not None:
            sizes = zip((self.place.height, self.place.width), self.place.ground().pixel_size_m())
            self.grid = self.place.on_grid(*(max(1, round(n * size / resample_to_m)) for n, size in sizes))

    def _check_kind(self, raster: rasterio.DatasetReader):
        if raster.count == 0:
            inner = "".join(f"\n  {name}" for name in raster.subdatasets)
            raise UnreadableScene(
                f"{self.source} has no bands. "
                + (f"Name one of the rasters in it:{inner}" if inner else "Replace it.")
            )
        kinds = set(raster.dtypes)
        if any(kind.startswith("complex") for kind in kinds):
            raise UnreadableScene(f"{self.source} holds complex numbers ({', '.join(kinds)}); expected real ones.")
        if ColorInterp.palette in raster.colorinterp:
            raise UnreadableScene(
                f"{self.source} holds indices of a palette, not colours. Expand it: `gdal_translate -expand rgb`."
            )

    @property
    def step(self) -> tuple[float, float]:
        """Pixels of the scene, down and across, that make one of the grid that is read."""
        return self.place.height / self.grid.height, self.place.width / self.grid.width

    def image_rule(self, scale: tuple[tuple[float, float], ...] | str | None) -> ImageRule:
        """How the bands become 8-bit colours.

        Args:
            scale: As in [`ImageRule`], or "percentiles": those of the whole scene, from a sample of its pixels.

        Raises:
            ValueError: The bands would not become three of 8 bits; the error lists all that the scene has.
        """
        if scale == "percentiles":
            shape = (len(self.bands), *self.sample_shape(SAMPLE_PX))
            with self._told():
                values = self._raster().read(list(self.bands), out_shape=shape, masked=True)
            values = values.astype(np.float32).filled(np.nan).reshape(len(self.bands), -1)
            try:
                scale = percentile_ranges(np.where(np.isfinite(values), values, np.nan))
            except ValueError as error:
                raise ValueError(f"{self.source}: {error}") from error
        rule = ImageRule(self.bands, scale)
        rule.check(self.source, self.dtype, len(self.bands), self.held)
        return rule

    def held(self) -> str:
        """What the scene holds, band by band: number, name, type and range of values."""
        raster, lines = self._raster(), []
        shape = self.sample_shape(SAMPLE_PX)
        for number, kind, name, dtype in zip(
            raster.indexes, raster.colorinterp, raster.descriptions, raster.dtypes, strict=True
        ):
            with self._told():
                values = raster.read(number, out_shape=shape, masked=True)
            seen = values.compressed()[np.isfinite(values.compressed())]
            span = f"{seen.min():g} to {seen.max():g}" if len(seen) else "nothing but nodata"
            lines.append(f"\n  band {number} ({name or kind.name}): {dtype}, {span}")
        return "".join(lines)

    def read(self, rows: slice, columns: slice) -> tuple[np.ndarray, np.ndarray]:
        """A window of the grid.

        Returns:
            The bands' values (bands, height, width), and which pixels were seen, boolean (height, width).
        """
        (down, across), shape = self.step, (rows.stop - rows.start, columns.stop - columns.start)
        window = Window(columns.start * across, rows.start * down, shape[1] * across, shape[0] * down)
        return self._read(window, shape, Resampling.average if max(self.step) > 1 else Resampling.bilinear)

    def valid(self, rows: slice) -> np.ndarray:
        """Which pixels of some rows of the scene's own grid were seen, boolean (rows, width)."""
        shape = (rows.stop - rows.start, self.place.width)
        window = Window(0, rows.start, shape[1], shape[0])
        if self.dtype.kind == "f":
            return self._read(window, shape, Resampling.nearest)[1]
        return self._seen(window, shape, Resampling.nearest)

    def sample_shape(self, side_px: int) -> tuple[int, int]:
        """(height, width) of the whole scene with so many pixels along its longer side, if it has them."""
        factor = min(1.0, side_px / max(self.place.height, self.place.width))
        return max(1, round(self.place.height * factor)), max(1, round(self.place.width * factor))

    def sample(self, side_px: int) -> tuple[np.ndarray, np.ndarray]:
        """The whole scene, thinned out to so many pixels along its longer side; as `read` returns it."""
        return self._read(
            Window(0, 0, self.place.width, self.place.height), self.sample_shape(side_px), Resampling.nearest
        )

    def _read(self, window: Window, shape: tuple[int, int], resampling: Resampling) -> tuple[np.ndarray, np.ndarray]:
        how = {"window": window, "out_shape": (len(self.bands), *shape), "resampling": resampling}
        with self._told():
            values = self._raster().read(list(self.bands), **how)
        valid = self._seen(window, shape, resampling)
        if self.dtype.kind == "f":
            valid &= np.isfinite(values).all(axis=0)
        return values, valid

    def _seen(self, window: Window, shape: tuple[int, int], resampling: Resampling) -> np.ndarray:
        """What nodata, masks and transparency leave, boolean.

        A whole number that stands for nodata (0, 255) may also occur in a band of what was seen, so all bands must
        have it; one of floating point does not, so any band will do.
        """
        if not self._has_mask:
            return np.ones(shape, dtype=bool)
        how = {"window": window, "out_shape": (len(self.bands), *shape), "resampling": resampling}
        with self._told():
            masks = self._raster().read_masks(list(self.bands), **how) > 0
        return masks.all(axis=0) if self.dtype.kind == "f" else masks.any(axis=0)

    def _raster(self) -> rasterio.DatasetReader:
        """This thread's."""
        if not hasattr(self._local, "raster"):
            with self._told():
                self._local.raster = rasterio.open(self.source)
            with self._lock:
                self._opened.append(self._local.raster)
        return self._local.raster

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            with rasterio.Env(**GDAL_OPTIONS):  # in threads, too
                yield
        except (RasterioError, CPLE_BaseError) as error:
            reason = error.__cause__ or error
            raise UnreadableScene(f"{self.source} cannot be read: {reason}. Is it whole, and a raster?") from error

    def close(self):
        for raster in self._opened:
            raster.close()

    def __enter__(self) -> "SceneRaster":
        return self

    def __exit__(self, *error):
        self.close()
