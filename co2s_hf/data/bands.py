"""Find red, green and blue among the bands of a raster, and say what to choose if a raster is not 8-bit RGB.

One error names everything that is needed: the bands, and the values that become 0 and 255. It never names a band that
the raster does not have.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ..utils.errors import UserValueError
from ..utils.redaction import redact
from .image_files import CONTROL_CHARACTERS


Bands = tuple[int, ...]
Scale = tuple[tuple[float, float], ...]

PERCENTILES = (2, 98)  # with `scale="percentiles"`, these percentiles of a band become 0 and 255
RGB = ("red", "green", "blue")
WAVELENGTHS_NM = {"red": (620, 665, 690), "green": (525, 560, 600), "blue": (450, 490, 520)}  # lowest, usual, highest
NEAR_INFRARED = ("nir", "near infrared", "infrared", "ir", "near ir")
PLAIN_FORMATS = "PNG, JPEG, TIFF, BMP or WebP"  # read without a choice of bands
LISTED_BANDS, NAME_LENGTH = 16, 24  # an error shows so many names of bands, and so many characters of a name
SENTINEL_2 = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")


@dataclass(frozen=True)
class Preset:
    """The bands of a product whose files have a fixed order of bands.

    Args:
        bands: Numbers of red, green and blue.
        scale: Values of 16 bits that become 0 and 255. None: they differ from product to product.
        orders: Names of the bands in order, for each number of bands that the product may have.
    """

    bands: tuple[int, int, int]
    scale: Scale | None
    orders: tuple[tuple[str, ...], ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of bands that the product may have."""
        return tuple(map(len, self.orders))


REFLECTANCE = ((0, 3000),)  # surface reflectance times 10000; only clouds, snow and bright roofs exceed 0.3
PRESETS = {
    "sentinel-2": Preset((4, 3, 2), REFLECTANCE, (SENTINEL_2, (*SENTINEL_2[:10], "B10", *SENTINEL_2[10:]))),
    "planetscope-4": Preset((3, 2, 1), REFLECTANCE, (("blue", "green", "red", "nir"),)),
    "planetscope-8": Preset(
        (6, 4, 2), REFLECTANCE, (("coastal blue", "blue", "green I", "green", "yellow", "red", "red edge", "nir"),)
    ),
    "rgbn": Preset((1, 2, 3), None, (("red", "green", "blue", "nir"),)),
}


class BandsError(UserValueError):
    """A raster is not 8-bit RGB, and no choice of bands and scale makes it so yet.

    Attributes:
        problem: The message without its advice, which names options.
    """

    problem: str = ""


@dataclass(frozen=True)
class RasterBands:
    """What a raster tells about its bands.

    Args:
        dtypes: Type of each band.
        names: Name of each band for messages, "" if it has none.
        colors: "red", "green", "blue", "alpha", another meaning, or None for each band.
        sample: Function from band numbers to a sample of their values, (bands, pixels), float32, NaN for no data.
        tagged_alpha: Numbers of the bands that GDAL marks as transparency.
        wavelengths_nm: Wavelength of each band, or None.
    """

    dtypes: tuple[str, ...]
    names: tuple[str, ...]
    colors: tuple[str | None, ...]
    sample: Callable[[Bands], np.ndarray]
    tagged_alpha: Bands = ()
    wavelengths_nm: tuple[float | None, ...] = ()

    @classmethod
    def of(cls, raster, sample: Callable[[Bands], np.ndarray]) -> "RasterBands":
        """Read what an open `rasterio.DatasetReader` tells.

        A description ("red", "B04") counts more than a colour tag: GDAL tags the first bands of any 8-bit file as red,
        green, blue and alpha.
        """
        tags = tuple(kind.name for kind in raster.colorinterp)
        texts = tuple(_clean(text or "") for text in raster.descriptions)
        colors = tuple(
            meaning or (None if tag in ("undefined", "gray") else tag) for meaning, tag in zip(_meanings(texts), tags)
        )
        return cls(
            dtypes=tuple(raster.dtypes),
            names=tuple(text or color or "" for text, color in zip(texts, colors)),
            colors=colors,
            sample=sample,
            tagged_alpha=tuple(number for number, tag in enumerate(tags, start=1) if tag == "alpha"),
            wavelengths_nm=tuple(_wavelength_nm(raster, number) for number in raster.indexes),
        )

    @property
    def count(self) -> int:
        """Number of all bands."""
        return len(self.dtypes)

    @property
    def image_bands(self) -> Bands:
        """Numbers of all bands except transparency."""
        return tuple(number for number, color in enumerate(self.colors, start=1) if color != "alpha")

    @property
    def rgb(self) -> Bands | None:
        """Numbers of red, green and blue. None: the raster does not tell all of them."""
        if set(RGB) <= set(self.colors):
            return tuple(self.colors.index(color) + 1 for color in RGB)
        found = []
        known = [(number, nm) for number, nm in enumerate(self.wavelengths_nm, start=1) if nm is not None]
        for low, usual, high in (WAVELENGTHS_NM[color] for color in RGB):
            inside = sorted((abs(nm - usual), number) for number, nm in known if low <= nm <= high)
            found += [number for _, number in inside[:1]]
        return tuple(found) if len(found) == 3 else None

    def is_8_bit(self, bands: Bands) -> bool:
        """Return whether bands have the type uint8."""
        return all(self.dtypes[number - 1] == "uint8" for number in bands)

    def lacks(self, bands: Bands | None, preset: str | None) -> bool:
        """Return whether some of the chosen bands are missing, or a preset is for another number of bands."""
        is_other = preset is not None and self.count not in PRESETS[preset].counts
        return is_other or not set(bands or ()) <= set(range(1, self.count + 1))

    def alpha_is_mask(self, bands: Bands, preset: str | None) -> bool:
        """Return whether the band that GDAL marks as transparency, if there is one, really is transparency.

        GDAL marks the fourth of four bands of 8 bits, also if it is near infrared. A band that is chosen as a colour,
        has another name, or belongs to the order of a preset is not transparency.
        """
        is_colour = any(number in bands or self.colors[number - 1] != "alpha" for number in self.tagged_alpha)
        return preset is None and not is_colour

    def describe(self, values: np.ndarray) -> str:
        """Return number, type, names and range of the bands as words.

        Args:
            values: Sample of the bands that matter, NaN for no data.
        """
        text = f"{self.count} band{'s' * (self.count > 1)} of {' and '.join(sorted(set(self.dtypes)))}"
        if any(self.names):
            more = ["..."] if self.count > LISTED_BANDS else []
            text += f" ({', '.join([name or 'unnamed' for name in self.names[:LISTED_BANDS]] + more)})"
        if np.isnan(values).all():
            return f"{text}, no valid pixels"
        return f"{text}, values {np.nanmin(values):g} to {np.nanmax(values):g}"


def resolve_bands(bands: Bands | str | None, scale: Scale | str | None):
    """Return (band numbers, scale, name of the preset or None) for `bands`, which may name a preset.

    Raises:
        UserValueError: There is no such preset.
    """
    if not isinstance(bands, str):
        return bands, scale, None
    if bands not in PRESETS:
        raise UserValueError(
            f"`bands` is '{bands}'; expected three band numbers from 1 for red, green and blue: `bands=(4, 3, 2)`; or "
            f"one of {', '.join(PRESETS)}."
        )
    return PRESETS[bands].bands, scale or PRESETS[bands].scale, bands


def check_bands(
    found: RasterBands,
    name: str,
    bands: Bands | None = None,
    scale: Scale | str | None = None,
    preset: str | None = None,
    *,
    advise_percentiles: bool = False,
    must_choose: bool = False,
) -> Bands:
    """Check that the chosen bands of a raster can become 8-bit RGB.

    Args:
        found: The bands of the raster.
        name: Name of the raster, for the message.
        bands: The chosen bands. None: all bands except transparency.
        scale: The chosen scale, or that of the preset.
        preset: Name of the preset that gave `bands`.
        advise_percentiles: Advise `scale="percentiles"` where this works. False: advise numbers.
        must_choose: The raster can be read only if `bands` or `scale` is given, and both are None.

    Returns:
        The numbers of one or three bands.

    Raises:
        BandsError: They cannot become 8-bit RGB. The message names everything that must be chosen.
    """
    problem = _problem(found, bands, scale, preset)
    if problem is None and not must_choose:
        return bands or found.image_bands
    if preset is not None and scale == PRESETS[preset].scale:
        scale = None  # a choice of bands does not include the scale of the preset
    keep = problem is not None and not found.lacks(bands, preset) and (bands is not None or _is_usual(found))
    shown = bands or found.image_bands if keep else _choice(found)[0]
    values = found.sample(shown)
    advised = _advised_scale(found, shown, scale, values, advise_percentiles)
    if not keep:
        advice = _advice(found, scale, advised)
    elif preset is not None:  # without a scale, that of the preset would be used again
        advice = f"Use {_flags(preset, advised or ((0, 255),))}."
    else:
        advice = f"Use {_flags(bands, advised)}."
    if isinstance(advised, tuple) and scale is None and not advise_percentiles and not found.is_8_bit(shown):
        advice += " For a data set, `scale='percentiles'` computes one range from all images."
    text = f"{name} has {found.describe(values)}; {problem or 'expected 8-bit RGB as ' + PLAIN_FORMATS}."
    error = BandsError(f"{text} {advice}")
    error.problem = redact(text)
    raise error


def _problem(found: RasterBands, bands: Bands | None, scale: Scale | str | None, preset: str | None) -> str | None:
    """Return why the chosen bands cannot become 8-bit RGB. None: they can."""
    if found.lacks(bands, preset):
        if preset is not None:
            counts = " or ".join(map(str, PRESETS[preset].counts))
            return f"`bands='{preset}'` is for {counts} bands: {', '.join(PRESETS[preset].orders[-1])}"
        return f"there is no band {next(number for number in bands if not 1 <= number <= found.count)}"
    used = bands or found.image_bands
    if len(used) not in (1, 3):
        return "expected 8-bit RGB"
    if bands is None and not _is_usual(found):
        return "expected the order red, green, blue"
    is_16_bit = all(found.dtypes[number - 1] in ("uint16", "int16") for number in used)
    if preset is not None and scale is not None and scale == PRESETS[preset].scale and not is_16_bit:
        return f"the values that `bands='{preset}'` scales are integers of 16 bits"
    if found.is_8_bit(used) and _exceeds_8_bit(scale):
        return f"`scale={_numbers(scale)!r}` is for values above 255"
    return "expected 8-bit RGB" if scale is None and not found.is_8_bit(used) else None


def _is_usual(found: RasterBands) -> bool:
    """Return whether there is one band, or three in an order that does not contradict red, green, blue."""
    used = found.image_bands
    is_other_order = found.rgb is not None and set(found.rgb) == set(used) and found.rgb != used
    return len(used) in (1, 3) and not is_other_order


def _choice(found: RasterBands) -> tuple[Bands, str]:
    """Return the bands to advise, and the beginning of a sentence that says what this choice assumes."""
    used, order = found.image_bands or (1,), "If the bands are in the order {}, use"
    if found.rgb is not None:
        return found.rgb, "Bands {}, {} and {} are red, green and blue. Use".format(*found.rgb)
    if len(used) < 3:
        grey = f"To show band {used[0]} in grey, which a model of colour images will predict poorly, use"
        return (used[0],) * 3, grey
    if len(used) == 3 or (len(used) == 4 and found.is_8_bit(used)):
        return used[:3], order.format("red, green, blue")
    for preset in (one for one in PRESETS.values() if len(used) == found.count and found.count in one.counts):
        names = ", ".join(preset.orders[preset.counts.index(found.count)])
        return preset.bands, order.format(names)
    return used[2::-1], order.format("blue, green, red")


def _advice(found: RasterBands, scale: Scale | str | None, advised: Scale | str | None) -> str:
    """Return the sentences that say which bands and which scale to choose."""
    bands, assumed = _choice(found)
    if found.rgb is None and scale is None and set(found.dtypes) <= {"uint16", "int16"}:
        for name, preset in PRESETS.items():
            if preset.bands != bands or preset.scale is None or found.count not in preset.counts:
                continue
            text = f"{assumed} {_flags(name, None)}."
            if found.count == 4:  # orthophotos have another order than satellite images
                text += f" If their order is red, green, blue, nir, use {_flags('rgbn', advised)}."
            return text
    return f"{assumed} {_flags(bands, advised)}."


def _advised_scale(
    found: RasterBands, bands: Bands, scale: Scale | str | None, values: np.ndarray, advise_percentiles: bool
) -> Scale | str | None:
    """Return the scale to advise for some bands. A scale that was chosen is named again, if it fits their type."""
    if scale is not None:
        return ((0, 255),) if found.is_8_bit(bands) and _exceeds_8_bit(scale) else scale
    if found.is_8_bit(bands):
        return None
    if np.isnan(values).all(axis=1).any():
        return ((0, 1),) if np.dtype(found.dtypes[bands[0] - 1]).kind == "f" else ((0, 3000),)
    lows, highs = np.nanpercentile(values, PERCENTILES, axis=1)
    if advise_percentiles and (lows < highs).all():
        return "percentiles"
    return (_rounded(float(lows.min()), float(highs.max())),)


def _rounded(low: float, high: float) -> tuple[float, float]:
    """Return a slightly wider range whose limits have about two digits."""
    if low == high:
        low, high = min(low, 0.0), max(high, low + 1)
    digits = 1 - math.floor(math.log10(high - low))
    unit = 10.0**-digits
    # The small numbers keep 0.98 as it is, which float32 stores as 0.98000002.
    return round(math.floor(low / unit + 1e-4) * unit, digits), round(math.ceil(high / unit - 1e-4) * unit, digits)


def _flags(bands: Bands | str | None, scale: Scale | str | None) -> str:
    """Return `bands` and `scale` as they are passed to functions. The command line turns them into flags."""
    chosen = (("bands", bands), ("scale", _numbers(scale)))
    return " and ".join(f"`{name}={value!r}`" for name, value in chosen if value is not None)


def _numbers(scale: Scale | str | None) -> Scale | str | None:
    """Return a scale with whole numbers as integers, which are shorter in messages."""
    if not isinstance(scale, tuple):
        return scale
    return tuple(tuple(int(value) if value == int(value) else value for value in pair) for pair in scale)


def _exceeds_8_bit(scale: Scale | str | None) -> bool:
    """Return whether a scale is for values that 8 bits cannot have. It would make an 8-bit image almost black."""
    return isinstance(scale, tuple) and max(high for _, high in scale) > 255


def _clean(text: str) -> str:
    """Return the name of a band, which may come from a stranger, for a message."""
    return " ".join(CONTROL_CHARACTERS.sub(" ", text).replace("`", "'").split())[:NAME_LENGTH]


def _meanings(texts: tuple[str, ...]) -> Iterator[str | None]:
    """Return "red", "green", "blue" or another meaning of each description; None for one that is not known."""
    words = [" ".join(re.split(r"[\s_\-]+", text.lower())) for text in texts]
    numbers = [re.fullmatch(r"b0?(\d\d?a?)", word) for word in words]
    # Sentinel-2 writes B02, B2 or b02. Older Landsat satellites also have a B2, but other bands beside it.
    names = {match[1] for match in numbers if match}
    padded = any(re.fullmatch(r"b0\d", word) for word in words)
    is_sentinel = padded or bool(names & {"8a", "9", "11", "12"}) or {"2", "3", "4", "8"} == names
    for word, match in zip(words, numbers):
        if match and is_sentinel:
            yield {"2": "blue", "3": "green", "4": "red"}.get(match[1], word)
        elif word in RGB:
            yield word
        else:
            yield "nir" if word in NEAR_INFRARED else None


def _wavelength_nm(raster, number: int) -> float | None:
    """Return the central wavelength of a band in nanometres, from the tags that GDAL or ENVI write."""
    tags = {name.lower(): value for name, value in raster.tags(number).items()}
    tags |= {name.lower(): value for name, value in raster.tags(number, ns="IMAGERY").items()}
    try:
        value = float(tags.get("central_wavelength_um") or tags.get("wavelength") or "nan")
    except ValueError:
        return None
    if not 0 < value < math.inf:
        return None
    return value if value > 100 else 1000 * value  # smaller numbers are micrometres


__all__ = ["PERCENTILES", "PRESETS", "BandsError", "RasterBands", "check_bands", "resolve_bands"]
