"""Finished maps as GeoTIFF: tiles, palette, class names, overviews, and all that says where the scene lies."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import rasterio
from rasterio._err import CPLE_BaseError
from rasterio.enums import Resampling
from rasterio.errors import RasterioError
from rasterio.shutil import copy
from rasterio.windows import Window

from .ground import Place


TILE_PX = 512
STRIP_ROWS = 512  # rows that are in memory at a time
NODATA = 255
FULL = 254  # what a probability of 1 becomes in 8 bits; 255 is nodata


@dataclass(frozen=True)
class MapBand:
    """One band of a map.

    Args:
        name: What it shows.
        read: Its values for some rows, (rows, width).
    """

    name: str
    read: Callable[[slice], np.ndarray]


def write_map(
    path: Path,
    bands: Sequence[MapBand],
    dtype: str,
    place: Place,
    tags: dict[str, str],
    palette: np.ndarray | None = None,
    cog: bool = False,
):
    """Write a tiled, compressed GeoTIFF with overviews, some rows at a time, and read it back.

    Args:
        path: File to write.
        bands: What it shows. With a palette, class indices; else probabilities, in 8 bits 0 to 254 (the file says by
            what to multiply them), as they are in float32.
        dtype: uint8, with the nodata value 255, or float32, with NaN.
        place: Where it is.
        tags: Written into the file.
        palette: Colours of the classes, (classes, 3).
        cog: Write a Cloud Optimized GeoTIFF, which is read over the web piece by piece.

    Raises:
        OSError: It could not be written whole.
    """
    plain = path.with_name(f"plain-{path.name}") if cog else path
    overview = Resampling.average if palette is None else Resampling.mode
    nodata = NODATA if dtype == "uint8" else float("nan")
    packing = {"compress": "deflate", "bigtiff": "IF_SAFER"}
    colors = {}
    if palette is None:
        packing["predictor"] = 2 if dtype == "uint8" else 3
        colors = {"photometric": "minisblack", "alpha": "no"}  # no colours, though there may be three or four bands
    layout = {"tiled": True, "blockxsize": TILE_PX, "blockysize": TILE_PX, "interleave": "band"}
    kind = {"driver": "GTiff", "count": len(bands), "dtype": dtype, "nodata": nodata}
    try:
        with rasterio.open(plain, "w", **kind, **layout, **packing, **colors, **place.profile) as raster:
            raster.update_tags(**tags)
            for number, band in enumerate(bands, start=1):
                raster.set_band_description(number, band.name)
                if palette is not None:
                    raster.write_colormap(number, {n: (*map(int, color), 255) for n, color in enumerate(palette)})
                for rows in strips(place.height):
                    raster.write(band.read(rows), number, window=Window(0, rows.start, place.width, _length(rows)))
            if palette is None and dtype == "uint8":
                raster.scales = [1 / FULL] * len(bands)
        with rasterio.open(plain, "r+") as raster:
            raster.build_overviews(_overview_factors(place), overview)
        if cog:
            copy(plain, path, driver="COG", blocksize=TILE_PX, **packing)
            plain.unlink()
        _check(path, bands, place)
    except (RasterioError, CPLE_BaseError) as error:
        raise OSError(f"'{path.name}' could not be written: {error.__cause__ or error}. Is the disk full?") from error


def write_class_names(path: Path, names: Sequence[str]):
    """Write the classes' names beside a map, where GDAL and QGIS look for them (NAME.tif.aux.xml)."""
    categories = "".join(f"\n      <Category>{escape(name)}</Category>" for name in names)
    path.write_text(
        f'<PAMDataset>\n  <PAMRasterBand band="1">\n    <CategoryNames>{categories}\n    </CategoryNames>\n'
        "  </PAMRasterBand>\n</PAMDataset>\n",
        encoding="utf-8",
    )


def strips(height: int, num_rows: int = STRIP_ROWS) -> list[slice]:
    """All rows of a map, some at a time."""
    return [slice(start, min(start + num_rows, height)) for start in range(0, height, num_rows)]


def quantized(probabilities: np.ndarray) -> np.ndarray:
    """Probabilities as 0 to 254, uint8."""
    return np.round(probabilities * FULL).astype(np.uint8)


def _overview_factors(place: Place) -> list[int]:
    factors = []
    while max(place.height, place.width) > TILE_PX * 2 ** len(factors):
        factors.append(2 ** (len(factors) + 1))
    return factors


def _check(path: Path, bands: Sequence[MapBand], place: Place):
    """Compare the file with what it should hold: GDAL says nothing of some writes that fail when a file is closed."""
    not_whole = OSError(f"'{path.name}' was not written whole. Is the disk full?")
    with rasterio.open(path) as raster:
        if any(raster.overviews(number) != _overview_factors(place) for number in raster.indexes):
            raise not_whole
        for number, band in enumerate(bands, start=1):
            for rows in strips(place.height):
                found = raster.read(number, window=Window(0, rows.start, place.width, _length(rows)))
                if not np.array_equal(found, band.read(rows), equal_nan=found.dtype.kind == "f"):
                    raise not_whole
    for level in range(len(_overview_factors(place))):
        with rasterio.open(path, overview_level=level) as overview:
            for number in overview.indexes:
                for rows in strips(overview.height):
                    overview.read(number, window=Window(0, rows.start, overview.width, _length(rows)))


def _length(rows: slice) -> int:
    return rows.stop - rows.start
