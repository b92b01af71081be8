"""Recognize label maps, and the maps that this package writes, among the rasters of a folder of scenes."""

from pathlib import Path

import numpy as np
import rasterio
from rasterio._err import CPLE_BaseError
from rasterio.errors import RasterioError

from ..utils.errors import UserError
from .rasters import GDAL_OPTIONS, open_scene


SAMPLE_PX = 512  # side of the sample of a raster whose values are looked at
NO_CLASS = 255
# A band of 8 bits holds class indices if it has at most so many values, all of them this small. Grey images have more.
MAX_CLASSES, MAX_INDEX = 32, 63


def why_label_map(path: Path) -> str | None:
    """Return why a raster is a label map or a map of this package, for messages. None: it is a scene.

    A raster that cannot be read counts as a scene, so that its error is reported when it is mapped.
    """
    try:
        with rasterio.Env(**GDAL_OPTIONS), open_scene(str(path)) as raster:
            if any(name.startswith("CO2S_") for name in raster.tags()):
                return "is a map of this package (tags CO2S_...)"
            if raster.dtypes != ("uint8",):
                return None
            shape = min(raster.height, SAMPLE_PX), min(raster.width, SAMPLE_PX)
            values = np.unique(raster.read(1, out_shape=shape))
    except (RasterioError, CPLE_BaseError, UserError, OSError):
        return None
    classes = values[values != NO_CLASS].tolist()
    if len(classes) > MAX_CLASSES or max(classes, default=0) > MAX_INDEX:
        return None
    return f"looks like a label map: its only band holds {len(values)} values from {values[0]} to {values[-1]}"
