"""Write a map as GeoTIFF: tiles, compression, palette, class names, overviews, tags and georeferencing."""

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

from ..utils.errors import UserOSError
from .georeferencing import GeoGrid


TILE_PX = 512
STRIP_ROWS = 512  # rows in memory at a time
NODATA = 255  # value of pixels without data in maps of 8 bits
FULL = 254  # value of the probability 1 in maps of 8 bits


@dataclass(frozen=True)
class MapBand:
    """One band of a map.

    Args:
        name: Description of the band in the file.
        read: Function from a slice of rows to their values (rows, width). It is called several times per row.
    """

    name: str
    read: Callable[[slice], np.ndarray]


def write_map(
    path: Path,
    bands: Sequence[MapBand],
    dtype: str,
    grid: GeoGrid,
    tags: dict[str, str],
    palette: np.ndarray | None = None,
    cog: bool = False,
):
    """Write a tiled, compressed GeoTIFF with overviews, some rows at a time, and read it again to check it.

    Args:
        path: File to write.
        bands: The bands. With a palette their values are class indices. Otherwise they are probabilities: 0 to 254 for
            0 to 1 as uint8 (the file contains the scale 1/254), or 0 to 1 as float32.
        dtype: "uint8", with the nodata value 255, or "float32", with the nodata value NaN.
        grid: Pixel grid and georeferencing.
        tags: Metadata to write into the file.
        palette: RGB colours of the classes (classes, 3), uint8.
        cog: Write a Cloud Optimized GeoTIFF.

    Raises:
        UserOSError: The file could not be written completely.
    """
    plain = path.with_name(f"plain-{path.name}") if cog else path
    overview = Resampling.average if palette is None else Resampling.mode
    nodata = NODATA if dtype == "uint8" else float("nan")
    packing = {"compress": "deflate", "bigtiff": "IF_SAFER"}
    colors = {}
    if palette is None:
        packing["predictor"] = 2 if dtype == "uint8" else 3
        # Without these options, GDAL marks three bands as RGB and a fourth band as transparency.
        colors = {"photometric": "minisblack", "alpha": "no"}
    layout = {"tiled": True, "blockxsize": TILE_PX, "blockysize": TILE_PX, "interleave": "band"}
    kind = {"driver": "GTiff", "count": len(bands), "dtype": dtype, "nodata": nodata}
    try:
        with rasterio.open(plain, "w", **kind, **layout, **packing, **colors, **grid.profile) as raster:
            raster.update_tags(**tags)
            for number, band in enumerate(bands, start=1):
                raster.set_band_description(number, band.name)
                if palette is not None:
                    raster.write_colormap(number, {n: (*map(int, color), 255) for n, color in enumerate(palette)})
                for rows in strips(grid.height):
                    raster.write(band.read(rows), number, window=_window(rows, grid.width))
            if palette is None and dtype == "uint8":
                raster.scales = [1 / FULL] * len(bands)
        with rasterio.open(plain, "r+") as raster:
            raster.build_overviews(_overview_factors(grid), overview)
        if cog:
            copy(plain, path, driver="COG", blocksize=TILE_PX, **packing)
            plain.unlink()
        _check_file(path, bands, grid)
    except (RasterioError, CPLE_BaseError) as error:
        raise UserOSError(
            f"'{path.name}' could not be written: {error.__cause__ or error}. Is the disk full?"
        ) from error


def write_class_names(path: Path, names: Sequence[str]):
    """Write the class names into NAME.tif.aux.xml, from which GDAL and QGIS read them.

    Args:
        path: File to write.
        names: Class names, in the order of the class indices.
    """
    categories = "".join(f"\n      <Category>{escape(name)}</Category>" for name in names)
    path.write_text(
        f'<PAMDataset>\n  <PAMRasterBand band="1">\n    <CategoryNames>{categories}\n    </CategoryNames>\n'
        "  </PAMRasterBand>\n</PAMDataset>\n",
        encoding="utf-8",
    )


def strips(height: int, num_rows: int = STRIP_ROWS) -> list[slice]:
    """Divide the rows of a map into strips of at most `num_rows` rows."""
    return [slice(start, min(start + num_rows, height)) for start in range(0, height, num_rows)]


def quantized(probabilities: np.ndarray) -> np.ndarray:
    """Convert probabilities 0 to 1 to 0 to 254, uint8."""
    return np.round(probabilities * FULL).astype(np.uint8)


def _overview_factors(grid: GeoGrid) -> list[int]:
    """Return the factors of the overviews: 2, 4, ... until the map fits into one tile."""
    factors = []
    while max(grid.height, grid.width) > TILE_PX * 2 ** len(factors):
        factors.append(2 ** (len(factors) + 1))
    return factors


def _check_file(path: Path, bands: Sequence[MapBand], grid: GeoGrid):
    """Compare the file with the bands: GDAL does not report all writes that fail when a file is closed."""
    incomplete = UserOSError(f"'{path.name}' was not written completely. Is the disk full?")
    with rasterio.open(path) as raster:
        if any(raster.overviews(number) != _overview_factors(grid) for number in raster.indexes):
            raise incomplete
        for number, band in enumerate(bands, start=1):
            for rows in strips(grid.height):
                found = raster.read(number, window=_window(rows, grid.width))
                if not np.array_equal(found, band.read(rows), equal_nan=found.dtype.kind == "f"):
                    raise incomplete
    for level in range(len(_overview_factors(grid))):
        with rasterio.open(path, overview_level=level) as overview:
            for number in overview.indexes:
                for rows in strips(overview.height):
                    overview.read(number, window=_window(rows, overview.width))


def _window(rows: slice, width: int) -> Window:
    return Window(0, rows.start, width, rows.stop - rows.start)
