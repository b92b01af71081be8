"""Rasters that are not 8-bit RGB, and what a person has to choose for each."""

from pathlib import Path

import numpy as np
import rasterio
from helpers import PLACE, write_raster
from rasterio.enums import ColorInterp


SENTINEL_2 = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
ORDER_S2 = ", ".join(SENTINEL_2)
ORDER_PS = "coastal blue, blue, green I, green, yellow, red, red edge, nir"
GREY = "To show band 1 in grey, which a model of colour images will predict poorly, use `bands=(1, 1, 1)`."
RED_GREEN_BLUE = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)


def make(path: Path, count: int, dtype: str, descriptions=None, colors=None, **profile) -> Path:
    """Write a raster of 20 x 30 pixels. Every band has the values 1 to 600 (uint8: 1 to 250; floats: 0 to 1)."""
    values = np.arange(600).reshape(1, 20, 30)
    values = {"uint8": values % 250 + 1, "float32": values / 599}.get(dtype, values + 1)
    write_raster(path, np.repeat(values, count, axis=0).astype(dtype), **PLACE, **profile)
    with rasterio.open(path, "r+") as raster:
        if descriptions is not None:
            raster.descriptions = descriptions
        if colors is not None:
            raster.colorinterp = colors
    return path


# name -> arguments of `make`, the problem in the message, the advice (SCALE: of the percentiles). None: no error.
RASTERS = {
    "two bands": (
        {"count": 2, "dtype": "uint8"},
        "2 bands of uint8, values 1 to 250; expected 8-bit RGB.",
        GREY,
    ),
    "two bands, uint16": (
        {"count": 2, "dtype": "uint16"},
        "2 bands of uint16, values 1 to 600; expected 8-bit RGB.",
        GREY.replace(".", " and SCALE."),
    ),
    "three bands, uint16": (
        {"count": 3, "dtype": "uint16"},
        "3 bands of uint16, values 1 to 600; expected 8-bit RGB.",
        "Use SCALE.",
    ),
    "three bands tagged RGB, uint16": (
        {"count": 3, "dtype": "uint16", "photometric": "rgb"},
        "3 bands of uint16 (red, green, blue), values 1 to 600; expected 8-bit RGB.",
        "Use SCALE.",
    ),
    "four bands tagged RGB and NIR": (
        {"count": 4, "dtype": "uint16", "colors": (*RED_GREEN_BLUE, ColorInterp.nir)},
        "4 bands of uint16 (red, green, blue, nir), values 1 to 600; expected 8-bit RGB.",
        "Bands 1, 2 and 3 are red, green and blue. Use `bands=(1, 2, 3)` and SCALE.",
    ),
    "four bands": (
        {"count": 4, "dtype": "uint16"},
        "4 bands of uint16, values 1 to 600; expected 8-bit RGB.",
        "If the bands are in the order blue, green, red, nir, use `bands='planetscope-4'`. If their order is red, "
        "green, blue, nir, use `bands='rgbn'` and SCALE.",
    ),
    "four bands, uint8": (
        {"count": 4, "dtype": "uint8", "photometric": "minisblack"},
        "4 bands of uint8, values 1 to 250; expected 8-bit RGB.",
        "If the bands are in the order red, green, blue, use `bands=(1, 2, 3)`.",
    ),
    "described bands count more than tags": (
        {"count": 4, "dtype": "uint8", "descriptions": ("Blue", "green", "RED", "Near-Infrared")},
        "4 bands of uint8 (Blue, green, RED, Near-Infrared), values 1 to 250; expected 8-bit RGB.",
        "Bands 3, 2 and 1 are red, green and blue. Use `bands=(3, 2, 1)`.",
    ),
    "RGBA": ({"count": 4, "dtype": "uint8"}, None, None),
    "RGBA, uint16": (
        {"count": 4, "dtype": "uint16", "photometric": "rgb", "alpha": "yes"},
        "4 bands of uint16 (red, green, blue, alpha), values 1 to 600; expected 8-bit RGB.",
        "Use SCALE.",
    ),
    "eight bands": (
        {"count": 8, "dtype": "uint16"},
        "8 bands of uint16, values 1 to 600; expected 8-bit RGB.",
        f"If the bands are in the order {ORDER_PS}, use `bands='planetscope-8'`.",
    ),
    "eight bands, float": (
        {"count": 8, "dtype": "float32"},
        "8 bands of float32, values 0 to 1; expected 8-bit RGB.",
        f"If the bands are in the order {ORDER_PS}, use `bands=(6, 4, 2)` and SCALE.",
    ),
    "Sentinel-2, described": (
        {"count": 12, "dtype": "uint16", "descriptions": SENTINEL_2},
        f"12 bands of uint16 ({ORDER_S2}), values 1 to 600; expected 8-bit RGB.",
        "Bands 4, 3 and 2 are red, green and blue. Use `bands=(4, 3, 2)` and SCALE.",
    ),
    "Sentinel-2, 10 m": (
        {"count": 4, "dtype": "uint16", "descriptions": ("B2", "B3", "B4", "B8")},
        "4 bands of uint16 (B2, B3, B4, B8), values 1 to 600; expected 8-bit RGB.",
        "Bands 3, 2 and 1 are red, green and blue. Use `bands=(3, 2, 1)` and SCALE.",
    ),
    "twelve bands": (
        {"count": 12, "dtype": "uint16"},
        "12 bands of uint16, values 1 to 600; expected 8-bit RGB.",
        f"If the bands are in the order {ORDER_S2}, use `bands='sentinel-2'`.",
    ),
    "one band": ({"count": 1, "dtype": "uint8"}, None, None),
    "one band, uint16": (
        {"count": 1, "dtype": "uint16"},
        "1 band of uint16, values 1 to 600; expected 8-bit RGB.",
        "Use SCALE.",
    ),
    "floats": (
        {"count": 3, "dtype": "float32"},
        "3 bands of float32, values 0 to 1; expected 8-bit RGB.",
        "Use SCALE.",
    ),
    "BGR": (
        {"count": 3, "dtype": "uint8", "colors": RED_GREEN_BLUE[::-1]},
        "3 bands of uint8 (blue, green, red), values 1 to 250; expected the order red, green, blue.",
        "Bands 3, 2 and 1 are red, green and blue. Use `bands=(3, 2, 1)`.",
    ),
    "BGR, uint16": (
        {"count": 3, "dtype": "uint16", "colors": RED_GREEN_BLUE[::-1]},
        "3 bands of uint16 (blue, green, red), values 1 to 600; expected the order red, green, blue.",
        "Bands 3, 2 and 1 are red, green and blue. Use `bands=(3, 2, 1)` and SCALE.",
    ),
    "five bands": (
        {"count": 5, "dtype": "int16"},
        "5 bands of int16, values 1 to 600; expected 8-bit RGB.",
        "If the bands are in the order blue, green, red, use `bands=(3, 2, 1)` and SCALE.",
    ),
}
