"""Load the features of vector files that lie in rasters, as polygons, and count what was left out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import shapely
from rasterio.crs import CRS

from ..utils.errors import UserValueError
from .burning import PolygonSet
from .georeferencing import LONG_LAT, GeoGrid, convert
from .vector_classes import text_of
from .vector_files import VectorFile
from .vector_geometry import Parts, border, buffered, divide_into_parts


UNKNOWN = (np.nan,) * 4  # extent of something without coordinates


@dataclass
class Counts:
    """What was found in vector files.

    Args:
        features: Features of all files.
        empty: Features without a geometry, or without anything that could be repaired. They are left out.
        repaired: Features whose polygons were invalid, such as polygons that intersect themselves.
        outside: Features outside all rasters. They are left out.
        unplaced: Lines and points that have no buffer, because they have no position on Earth. They are left out.
        values: Number of features of each value of the class column, as text. None: no value. Without empty features.
    """

    features: int = 0
    empty: int = 0
    repaired: int = 0
    outside: int = 0
    unplaced: int = 0
    values: Counter = field(default_factory=Counter)


class FeatureLoader:
    """Reads features, and keeps those that lie in a raster, as polygons.

    Args:
        rasters: Name -> pixel grid.
        buffer_m: Points and lines become polygons with all places up to this distance in metres. None: they are an
            error.

    Attributes:
        counts: What was found.
        codes: Value of the class column as text -> number that its kept polygons have.
        hit: Names of rasters that a feature touches.
    """

    def __init__(self, rasters: Mapping[str, GeoGrid], buffer_m: float | None = None):
        self.rasters, self.buffer_m, self.counts = rasters, buffer_m, Counts()
        self.codes: dict[str | None, int] = {}
        self.hit: set[str] = set()
        self._kept: list[tuple[CRS, np.ndarray, np.ndarray]] = []
        self._extents: list[tuple[float, ...]] = []  # of each file, in degrees
        self._has_lines = False

    def load(self, file: VectorFile):
        """Read a file.

        Raises:
            UserValueError: It cannot be read, has no geometries, or has lines or points without a buffer.
        """
        borders = [border(one.transform, one.height, one.width, one.crs, file.crs) for one in self.rasters.values()]
        extents, is_empty = [], True
        for geometries, values in file.chunks():
            parts, empty, repaired = divide_into_parts(geometries)
            texts = [text_of(value) for value in values]
            codes = np.array([self.codes.setdefault(text, len(self.codes)) for text in texts], dtype=np.int64)
            extents.append(_union(shapely.bounds(parts.geometries)))
            parts = self._as_polygons(parts, file)
            kept = self._in_rasters(parts, borders)
            self._kept.append((file.crs, kept.geometries, codes[kept.owners]))
            num_placed = len(np.unique(parts.owners))
            self.counts.features += len(geometries)
            self.counts.empty += int(empty.sum())
            self.counts.repaired += int(repaired.sum())
            self.counts.outside += num_placed - len(np.unique(kept.owners))
            self.counts.unplaced += int((~empty).sum()) - num_placed
            self.counts.values.update(text for text, left_out in zip(texts, empty) if not left_out)
            is_empty = is_empty and bool(empty.all())
        if is_empty:
            raise UserValueError(f"No feature of '{file.path}' has a geometry. Name a file with polygons.")
        self._extents.append(_in_degrees(_union(extents), file.crs))

    def _as_polygons(self, parts: Parts, file: VectorFile) -> Parts:
        """Replace lines and points by the polygons around them."""
        thin = ~parts.are_polygons
        if not thin.any():
            return parts
        if self.buffer_m is None:
            kinds = Counter("point" if one.geom_type == "Point" else "line" for one in parts.geometries[thin])
            found = " and ".join(f"{number} {kind}{'s' * (number > 1)}" for kind, number in sorted(kinds.items()))
            raise UserValueError(
                f"'{file.path}' has {found}, but only polygons have an area. Give the distance in metres up to which "
                "pixels belong to lines and points, such as half the width of a road: `buffer_m=3`. Or remove them "
                "from the file."
            )
        self._has_lines = True
        geometries = parts.geometries.copy()
        geometries[thin] = buffered(geometries[thin], file.crs, self.buffer_m)
        return Parts(geometries, parts.owners).select(~shapely.is_missing(geometries))

    def _in_rasters(self, parts: Parts, borders: list[shapely.Polygon | None]) -> Parts:
        """Return the parts that touch a raster."""
        if any(one is None for one in borders):  # the place of a raster is unknown in this coordinate system
            self.hit.update(self.rasters)
            return parts
        touched, found = shapely.STRtree(parts.geometries).query(borders, predicate="intersects")
        names = list(self.rasters)
        self.hit.update(names[index] for index in np.unique(touched))
        return parts.select(np.unique(found))

    def check(self, files: str):
        """Check that features lie in a raster, and that a buffer has an effect.

        Args:
            files: The files, for messages.

        Raises:
            UserValueError: All features lie elsewhere, or there are only polygons, but a buffer is given.
        """
        if not any(len(polygons) for _, polygons, _ in self._kept):
            ours = _union([_extent_of_raster(grid) for grid in self.rasters.values()])
            raise UserValueError(
                f"No feature of {files} lies in a raster. The features have {_named(_union(self._extents))}; the "
                f"rasters have {_named(ours)}. Name files of the same place, or correct a wrong coordinate system."
            )
        if self.buffer_m is not None and not self._has_lines:
            raise UserValueError(
                f"`buffer_m` is {self.buffer_m}, but {files} has only polygons, which get no buffer. Leave it out."
            )

    def polygon_set(self, labels: list[int]) -> PolygonSet:
        """Return the kept polygons. `labels` has the label of each number in `codes`."""
        found, lookup = PolygonSet(list(self.rasters.values())), np.array(labels, dtype=np.uint8)
        for crs, polygons, codes in self._kept:
            found.add(polygons, lookup[codes], crs)
        return found


def _union(extents: Sequence) -> tuple[float, ...]:
    """Return the smallest extent (left, low, right, high) that contains others. NaN: all of them are unknown."""
    known = np.array(extents)
    known = known[np.isfinite(known).all(axis=1)]
    if not len(known):
        return UNKNOWN
    return *known[:, :2].min(axis=0), *known[:, 2:].max(axis=0)


def _in_degrees(extent: tuple[float, ...], crs: CRS) -> tuple[float, ...]:
    """Convert an extent (left, low, right, high) to degrees: west, south, east, north."""
    left, low, right, high = extent
    x, y = convert(crs, LONG_LAT, np.array([left, right, right, left]), np.array([low, low, high, high]))
    return UNKNOWN if np.isnan(x).any() else (x.min(), y.min(), x.max(), y.max())


def _extent_of_raster(grid: GeoGrid) -> tuple[float, ...]:
    x, y = grid.transform @ (np.array([0, grid.width, 0, grid.width]), np.array([0, 0, grid.height, grid.height]))
    return _in_degrees((x.min(), y.min(), x.max(), y.max()), grid.crs)


def _named(extent: tuple[float, ...]) -> str:
    if np.isnan(extent).any():
        return "coordinates that are no longitudes and latitudes"
    west, south, east, north = extent
    return f"longitudes {west:.5g} to {east:.5g} and latitudes {south:.5g} to {north:.5g}"
