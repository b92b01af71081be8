"""Open the rasters of one data set: the same bands and scale, and the same ground sampling distance."""

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from affine import Affine

from ..data.bands import Scale
from ..data.blocks import Box
from ..data.options import PERCENTILES_SCALE
from ..data.reading import ImageRule
from ..utils.errors import UserValueError
from ..utils.redaction import redact
from .georeferencing import GeoGrid
from .rasters import SceneRaster
from .scene_files import search_scenes
from .vector_labels import check_raster


LARGEST_RATIO = 1.1  # of ground sampling distances that a network may see as one


@dataclass(frozen=True, eq=False)
class RasterGroup:
    """The opened rasters of one data set.

    Args:
        rasters: Name of the raster for messages -> raster.
        names: Name of the raster for messages -> unique start of the names of its tiles.
        rule: Rule by which all of them become 8-bit RGB.
        distance_m: Ground sampling distance at which they are read, in metres.
    """

    rasters: Mapping[str, SceneRaster]
    names: Mapping[str, str]
    rule: ImageRule
    distance_m: float

    @property
    def grids(self) -> dict[str, GeoGrid]:
        """Name of each raster -> the pixel grid in which it is read."""
        return {name: raster.read_grid for name, raster in self.rasters.items()}

    def close(self):
        """Close all files."""
        for raster in self.rasters.values():
            raster.close()

    def __enter__(self) -> "RasterGroup":
        return self

    def __exit__(self, *error):
        self.close()


def open_rasters(
    words: Sequence[str],
    bands: tuple[int, ...] | str | None = None,
    scale: Scale | str | None = None,
    resample_to_m: float | None = None,
) -> RasterGroup:
    """Open all rasters of a data set, and check that they fit each other.

    Args:
        words: Files, folders, patterns and addresses, as in [`find_scenes`].
        bands, scale: As in [`SceneRaster`]. Percentiles are those of all rasters together.
        resample_to_m: Ground sampling distance to read at, in metres. None: that of the rasters.

    Raises:
        UserFileNotFoundError: There is no raster for a word.
        UserValueError: A raster cannot be read or has no place on Earth, or the rasters do not fit each other.
    """
    with ExitStack() as opened:
        found = search_scenes(list(words))
        rasters = {}
        for scene, name in zip(found, _unique([redact(scene) for scene in found])):
            rasters[name] = opened.enter_context(SceneRaster(scene, bands, resample_to_m, scale))
            check_raster(name, rasters[name].grid)
        distances = {name: _distance_m(raster) for name, raster in rasters.items()}
        if resample_to_m is None:
            _check_distances(distances)
        first, *others = rasters.values()
        _check_bands(rasters, scale)
        rule = first.image_rule(others)
        opened.pop_all()
    middle = sorted(distances.values())[len(distances) // 2]
    names = dict(zip(rasters, _unique(["_".join(place.parts) for place in found.values()])))
    return RasterGroup(rasters, names, rule, resample_to_m or float(f"{middle:.4g}"))


def _distance_m(raster: SceneRaster) -> float:
    """Return the ground sampling distance of a raster in metres: the side of a square with the area of a pixel."""
    return math.sqrt(math.prod(raster.pixel_size_m()))


def _check_distances(distances: Mapping[str, float]):
    """Check that all rasters show objects in nearly the same size."""
    fine, coarse = min(distances, key=distances.get), max(distances, key=distances.get)
    if distances[coarse] <= LARGEST_RATIO * distances[fine]:
        return
    advised = float(f"{distances[coarse]:.2g}")
    raise UserValueError(
        f"A pixel of '{fine}' is {distances[fine]:.3g} m on the ground, but a pixel of '{coarse}' is "
        f"{distances[coarse]:.3g} m. A network learns objects in one size. Read all rasters at one distance: "
        f"`resample_to={advised}`. Or prepare them separately."
    )


def _check_bands(rasters: Mapping[str, SceneRaster], scale: Scale | str | None):
    """Check that all rasters have as many bands, if one scale is computed for each band of all rasters."""
    names = {len(raster.bands): name for name, raster in rasters.items()}
    if scale == PERCENTILES_SCALE and len(names) > 1:
        found = " and ".join(f"'{name}' has {number}" for number, name in sorted(names.items()))
        raise UserValueError(
            f"The rasters have different numbers of bands, so `scale='percentiles'` gives no common range: {found}. "
            "Choose bands that all of them have: `bands=(1, 2, 3)`."
        )


def _unique(names: Sequence[str]) -> list[str]:
    """Add a number to each name that occurred before."""
    found: dict[str, None] = {}
    for name in names:
        numbers = itertools.count(2)
        unique = name
        while unique in found:
            unique = f"{name}-{next(numbers)}"
        found[unique] = None
    return list(found)


def part_of(grid: GeoGrid, box: Box) -> GeoGrid:
    """Return the grid of a part of a raster.

    Args:
        grid: Pixel grid of the raster, with a transform.
        box: Left, upper, right and lower border of the part in pixels.
    """
    left, upper, right, lower = box
    return GeoGrid(lower - upper, right - left, grid.transform @ Affine.translation(left, upper), grid.crs)
