"""Prepare geometries for burning: repair, divide, buffer in metres, convert to another coordinate system."""

from dataclasses import dataclass

import numpy as np
import shapely
from rasterio.crs import CRS

from .georeferencing import LONG_LAT, SEMI_MAJOR_M, convert


MAX_VERTICES = 1000  # of a polygon that is burned: every window that it touches converts all its vertices
MAX_ROUNDS = 40  # of halving a polygon with more vertices
BUFFER_SEGMENTS = 8  # in a quarter of a circle
BORDER_POINTS = 32  # per side of a raster


@dataclass(eq=False)
class Parts:
    """The parts of features. A part is a polygon, a line or a point.

    Args:
        geometries: Parts (number of parts,).
        owners: Index of the feature of each part, ascending (number of parts,).
    """

    geometries: np.ndarray
    owners: np.ndarray

    def select(self, chosen: np.ndarray) -> "Parts":
        """Return some parts, by a boolean mask or by indices."""
        return Parts(self.geometries[chosen], self.owners[chosen])

    @property
    def are_polygons(self) -> np.ndarray:
        """Which parts are polygons, boolean (number of parts,)."""
        return shapely.get_dimensions(self.geometries) == 2


def divide_into_parts(geometries: np.ndarray) -> tuple[Parts, np.ndarray, np.ndarray]:
    """Repair geometries, and divide multi-part geometries and collections into their parts.

    Args:
        geometries: Geometries (features,). None: the feature has no geometry.

    Returns:
        The parts; which features have no geometry, boolean (features,), also if it is empty, has coordinates that are
        not finite, or nothing of it remains after the repair; and which features were repaired, boolean (features,).
    """
    geometries = shapely.force_2d(geometries)
    usable = ~(shapely.is_missing(geometries) | shapely.is_empty(geometries))
    coordinates, owners = shapely.get_coordinates(geometries, return_index=True)
    usable[owners[~np.isfinite(coordinates).all(axis=1)]] = False
    invalid = usable & (shapely.get_dimensions(geometries) == 2) & ~shapely.is_valid(geometries)
    geometries[invalid] = shapely.make_valid(geometries[invalid], method="structure", keep_collapsed=False)
    usable &= ~shapely.is_empty(geometries)
    owners = np.flatnonzero(usable)
    parts = geometries[usable]
    while (shapely.get_type_id(parts) >= shapely.GeometryType.MULTIPOINT).any():  # collections contain others
        parts, indices = shapely.get_parts(parts, return_index=True)
        owners = owners[indices]
    filled = ~shapely.is_empty(parts)
    return Parts(parts[filled], owners[filled]), ~usable, invalid & usable


def border(transform, height: int, width: int, crs: CRS, target: CRS) -> shapely.Polygon | None:
    """Return the border of a raster in another coordinate system.

    Args:
        transform: From (column, row) to coordinates of `crs`.
        height, width: In pixels.
        crs: Coordinate system of the raster.
        target: Coordinate system of the result.

    Returns:
        The border. None if it has none there: a part of it has no coordinates, or it crosses the 180th meridian.
    """
    share = np.linspace(0, 1, BORDER_POINTS + 1)
    columns = np.concatenate([share, np.ones_like(share), share[::-1], np.zeros_like(share)]) * width
    rows = np.concatenate([np.zeros_like(share), share, np.ones_like(share), share[::-1]]) * height
    x, y = transform @ (columns, rows)
    if crs != target:
        x, y = convert(crs, target, x, y)
    if not np.isfinite(x).all() or (target.is_geographic and np.ptp(x) > 180):
        return None
    ring = shapely.Polygon(np.stack([x, y], axis=1))
    return ring if ring.is_valid else ring.convex_hull


def reprojected(geometries: np.ndarray, source: CRS, target: CRS, tolerance: float) -> np.ndarray:
    """Convert polygons, lines or points to another coordinate system.

    A straight edge is a curve in another coordinate system. Vertices are added to edges where the curve is further
    from the straight line than the tolerance.

    Args:
        geometries: Single-part geometries.
        source, target: Coordinate systems.
        tolerance: In units of `target`.

    Returns:
        The geometries. None: a vertex has no coordinates in `target`.
    """
    if source == target or not len(geometries):
        return geometries

    def to_target(points: np.ndarray) -> np.ndarray:
        return np.stack(convert(source, target, *points.T), axis=1)

    dense = shapely.segmentize(geometries, _longest_edges(geometries, to_target, tolerance))
    points, owners = shapely.get_coordinates(dense, return_index=True)
    points = to_target(points)
    placed = np.ones(len(dense), dtype=bool)
    placed[owners[np.isnan(points).any(axis=1)]] = False
    found = np.full(len(dense), None, dtype=object)
    found[placed] = shapely.set_coordinates(dense[placed], points[placed[owners]])
    return found


def _longest_edges(geometries: np.ndarray, to_target, tolerance: float) -> np.ndarray:
    """Return the length to which the edges of each geometry must be divided, (geometries,). Infinite: no division."""
    lines, owners = geometries, np.arange(len(geometries))
    if (shapely.get_dimensions(geometries) == 2).any():
        lines, owners = shapely.get_rings(geometries, return_index=True)
    points, lines_of_points = shapely.get_coordinates(lines, return_index=True)
    longest = np.full(len(geometries), np.inf)
    starts = np.flatnonzero(lines_of_points[:-1] == lines_of_points[1:])
    if not len(starts):
        return longest
    middles = to_target((points[starts] + points[starts + 1]) / 2)
    ends = to_target(points)
    # For a curve of constant curvature, the distance to the chord falls with the square of the length.
    distances = np.linalg.norm(middles - (ends[starts] + ends[starts + 1]) / 2, axis=1)
    curved = distances > tolerance
    lengths = np.linalg.norm(points[starts + 1] - points[starts], axis=1)[curved]
    lengths /= np.ceil(np.sqrt(distances[curved] / tolerance))
    np.minimum.at(longest, owners[lines_of_points[starts[curved]]], lengths)
    return longest


def buffered(geometries: np.ndarray, crs: CRS, buffer_m: float) -> np.ndarray:
    """Make polygons of lines and points: everything that is not further from them than a distance on the ground.

    Args:
        geometries: Lines and points.
        crs: Their coordinate system, and that of the result.
        buffer_m: The distance in metres.

    Returns:
        The polygons. None: a vertex has no position on Earth.
    """
    found = np.full(len(geometries), None, dtype=object)
    centroids = shapely.get_coordinates(shapely.centroid(geometries))
    places = np.floor(np.stack(convert(crs, LONG_LAT, *centroids.T), axis=1))
    tolerance_m = buffer_m / 50
    tolerance = tolerance_m / (crs.units_factor[1] * (SEMI_MAJOR_M if crs.is_geographic else 1))
    for longitude, latitude in np.unique(places[np.isfinite(places).all(axis=1)], axis=0):
        # Lengths near the centre of this projection are metres on the ground, in all directions.
        local = CRS.from_dict(proj="aeqd", lon_0=longitude + 0.5, lat_0=min(latitude + 0.5, 90), datum="WGS84")
        here = np.flatnonzero((places == (longitude, latitude)).all(axis=1))
        in_metres = reprojected(geometries[here], crs, local, tolerance_m)
        placed = ~shapely.is_missing(in_metres)
        circles = shapely.buffer(in_metres[placed], buffer_m, quad_segs=BUFFER_SEGMENTS)
        found[here[placed]] = reprojected(circles, local, crs, tolerance)
    return found


def subdivided(polygons: np.ndarray) -> Parts:
    """Divide large polygons into pieces of at most `MAX_VERTICES` that together cover the same area.

    Args:
        polygons: Polygons (number of polygons,).

    Returns:
        The pieces, ordered by the polygon to which they belong.
    """
    waiting, done = Parts(polygons, np.arange(len(polygons))), []
    for _ in range(MAX_ROUNDS):
        large = shapely.get_num_coordinates(waiting.geometries) > MAX_VERTICES
        done.append(waiting.select(~large))
        waiting = waiting.select(large)
        if not len(waiting.geometries):
            break
        waiting = _halves(waiting)
    done.append(waiting)
    found = Parts(*(np.concatenate([getattr(one, name) for one in done]) for name in ("geometries", "owners")))
    return found.select(np.argsort(found.owners, kind="stable"))


def _halves(parts: Parts) -> Parts:
    """Cut polygons in the middle of their longer side."""
    shapes = parts.geometries.copy()
    invalid = ~shapely.is_valid(shapes)  # conversion of coordinates may move an edge across a vertex
    shapes[invalid] = shapely.make_valid(shapes[invalid], method="structure", keep_collapsed=False)
    left, low, right, high = shapely.bounds(shapes).T
    is_wide = right - left > high - low
    x, y = np.where(is_wide, (left + right) / 2, right), np.where(is_wide, high, (low + high) / 2)
    first = shapely.intersection(shapes, shapely.box(left, low, x, y))
    second = shapely.intersection(
        shapes, shapely.box(np.where(is_wide, x, left), np.where(is_wide, low, y), right, high)
    )
    return polygon_parts(np.concatenate([first, second]), np.concatenate([parts.owners, parts.owners]))


def polygon_parts(geometries: np.ndarray, owners: np.ndarray) -> Parts:
    """Return the polygons of what an overlay returned. Lines and points, where shapes only touch, are left out."""
    pieces, indices = shapely.get_parts(geometries, return_index=True)
    pieces, inner = shapely.get_parts(pieces, return_index=True)  # of collections
    found = Parts(pieces, owners[indices][inner])
    return found.select(found.are_polygons & ~shapely.is_empty(pieces))
