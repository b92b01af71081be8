"""Burn polygons into the pixels of a raster, window by window."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import shapely
from rasterio.crs import CRS
from rasterio.features import rasterize

from .georeferencing import GeoGrid
from .vector_geometry import Parts, border, polygon_parts, reprojected, subdivided


CHUNK = 2**14  # polygons that are converted at a time
TOLERANCE_PX = 0.1  # largest distance between a converted edge and its true curve


@dataclass(eq=False)
class _Index:
    """Polygons in the coordinate system of rasters, with their spatial index."""

    tree: shapely.STRtree
    polygons: np.ndarray
    values: np.ndarray


class PolygonSet:
    """Polygons with a value each, from files of one or more coordinate systems.

    They are converted to the coordinate system of a raster when its first window is burned.

    Args:
        rasters: Pixel grids of all rasters. Polygons are only kept where these are.

    Attributes:
        num_unplaced: Number of polygons, up to now, without coordinates in the coordinate system of a raster.
    """

    def __init__(self, rasters: Sequence[GeoGrid]):
        self.rasters, self.num_unplaced = list(rasters), 0
        self._layers: list[tuple[CRS, np.ndarray, np.ndarray]] = []
        self._indices: dict[str, _Index] = {}

    def add(self, polygons: np.ndarray, values: np.ndarray, crs: CRS):
        """Add single-part polygons, with their values (uint8) and their coordinate system."""
        self._layers.append((crs, polygons, values.astype(np.uint8)))
        self._indices = {}

    def burn(self, grid: GeoGrid, fill: int, order: Sequence[int] = (), all_touched: bool = False) -> np.ndarray:
        """Return the value of each pixel of a window.

        Args:
            grid: Pixel grid of the window. Its coordinate system is that of one of the rasters.
            fill: Value of pixels that no polygon covers.
            order: Values, ascending in priority: a later one wins where polygons overlap.
            all_touched: Burn all pixels that a polygon touches. False: only those whose centre it covers.

        Returns:
            The values, uint8 (height, width).
        """
        labels = np.full((grid.height, grid.width), fill, dtype=np.uint8)
        index = self._index(grid.crs)
        found = self._touching(index, grid)
        if len(found):
            ranks = np.zeros(256, dtype=int)
            ranks[list(order)] = np.arange(1, len(order) + 1)
            values = index.values[found]
            last = np.argsort(ranks[values], kind="stable")  # a later polygon replaces earlier ones
            shapes = zip(index.polygons[found][last], values[last].tolist())
            rasterize(shapes, out=labels, transform=grid.transform, all_touched=all_touched)
        return labels

    def covers(self, grid: GeoGrid) -> np.ndarray:
        """Return which pixels of a window have their centre in a polygon, boolean (height, width)."""
        covered = np.zeros((grid.height, grid.width), dtype=np.uint8)
        index = self._index(grid.crs)
        if len(found := self._touching(index, grid)):
            rasterize(index.polygons[found], out=covered, transform=grid.transform, default_value=1)
        return covered > 0

    def touches(self, grid: GeoGrid) -> bool:
        """Return whether a polygon touches a window."""
        return len(self._touching(self._index(grid.crs), grid)) > 0

    def _touching(self, index: _Index, grid: GeoGrid) -> np.ndarray:
        """Return the indices of the polygons that touch a window, in the order of the files."""
        corners = grid.transform @ (
            np.array([0, grid.width, grid.width, 0]),
            np.array([0, 0, grid.height, grid.height]),
        )
        window = shapely.Polygon(np.stack(corners, axis=1))
        return np.sort(index.tree.query(window, predicate="intersects"))

    def _index(self, crs: CRS) -> _Index:
        key = crs.to_wkt()
        if key not in self._indices:
            self._indices[key] = self._convert(crs)
        return self._indices[key]

    def _convert(self, crs: CRS) -> _Index:
        """Convert all polygons to a coordinate system of the rasters."""
        rasters = [raster for raster in self.rasters if raster.crs == crs]
        if not rasters:
            raise ValueError(f"no raster has the coordinate system {crs.to_string()}")
        tolerance = TOLERANCE_PX * min(abs(raster.transform.determinant) ** 0.5 for raster in rasters)
        polygons, values = [np.empty(0, dtype=object)], [np.empty(0, dtype=np.uint8)]
        for source, shapes, numbers in self._layers:
            for start in range(0, len(shapes), CHUNK):
                part = slice(start, start + CHUNK)
                pieces = self._converted(shapes[part], source, crs, rasters, tolerance)
                polygons.append(pieces.geometries)
                values.append(numbers[part][pieces.owners])
        polygons = np.concatenate(polygons)
        return _Index(shapely.STRtree(polygons), polygons, np.concatenate(values))

    def _converted(self, shapes, source: CRS, crs: CRS, rasters: list[GeoGrid], tolerance: float) -> Parts:
        parts = _clipped(shapes, bounds_of(rasters, source))
        found = reprojected(parts.geometries, source, crs, tolerance)
        placed = ~shapely.is_missing(found)
        self.num_unplaced += len(np.unique(parts.owners[~placed]))
        pieces = subdivided(found[placed])
        return Parts(pieces.geometries, parts.owners[placed][pieces.owners])


def bounds_of(rasters: Sequence[GeoGrid], crs: CRS) -> shapely.Polygon | None:
    """Return a box, in a coordinate system, around all rasters, and some space around them. None: it is unknown."""
    borders = [border(one.transform, one.height, one.width, one.crs, crs) for one in rasters]
    if any(one is None for one in borders):
        return None
    left, low, right, high = shapely.total_bounds(borders)
    across, up = 0.05 * (right - left), 0.05 * (high - low)
    return shapely.box(left - across, low - up, right + across, high + up)


def _clipped(polygons: np.ndarray, box: shapely.Polygon | None) -> Parts:
    """Return what lies in a box, so that polygons of whole countries are not converted."""
    owners = np.arange(len(polygons))
    if box is None:
        return Parts(polygons, owners)
    shapely.prepare(box)
    inside = shapely.covers(box, polygons)
    crossing = ~inside & shapely.intersects(box, polygons)
    cut = polygon_parts(shapely.intersection(polygons[crossing], box), owners[crossing])
    geometries, owners = (
        np.concatenate([polygons[inside], cut.geometries]),
        np.concatenate([owners[inside], cut.owners]),
    )
    order = np.argsort(owners, kind="stable")
    return Parts(geometries[order], owners[order])
