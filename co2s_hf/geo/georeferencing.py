"""Pixel grids on the ground: position of a raster, and size of its pixels in metres.

A raster may have pixels without a position on Earth: the corners of a full-disk image of a weather satellite, or rows
beyond the poles. Their coordinates and areas are NaN.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from affine import Affine
from rasterio._err import CPLE_BaseError
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.errors import CRSError, RasterioError
from rasterio.rpc import RPC
from rasterio.transform import from_gcps
from rasterio.warp import transform as reproject

from ..utils.errors import UserValueError


# Areas are computed per cell: within a cell, all pixels get the same area, because the distortion of map projections
# changes slowly. The side of a cell is at most this many pixels and metres.
CELL_PX = 64
CELL_M = 10_000
LONG_LAT = CRS.from_epsg(4326)
# The ellipsoid of WGS 84: half its longer axis in metres, and the square of its eccentricity.
SEMI_MAJOR_M, ECCENTRICITY_2 = 6_378_137.0, 0.0066943799901413165


@dataclass(frozen=True)
class GeoGrid:
    """The pixel grid of a raster and its georeferencing, as GDAL describes them.

    Args:
        height, width: Size in pixels.
        transform: From (column, row) to coordinates. It is the identity if the raster has control points instead.
        crs: Coordinate system of the coordinates or of the control points.
        gcps: Ground control points.
        rpcs: Rational polynomial coefficients: the camera model of a satellite image that has no transform.
    """

    height: int
    width: int
    transform: Affine
    crs: CRS | None
    gcps: Sequence[GroundControlPoint] = ()
    rpcs: RPC | None = None

    def resized(self, height: int, width: int) -> "GeoGrid":
        """Return a grid of larger or smaller pixels that covers the same area.

        Args:
            height, width: Size in the new pixels.
        """
        if (height, width) == (self.height, self.width):
            return self
        down, across = self.height / height, self.width / width
        gcps = [GroundControlPoint(p.row / down, p.col / across, p.x, p.y, p.z, p.id, p.info) for p in self.gcps]
        transform = self.transform if self.gcps else self.transform @ Affine.scale(across, down)
        rpcs = copy.copy(self.rpcs)
        if rpcs is not None:  # their origin is the centre of the first pixel
            rpcs.line_off, rpcs.samp_off = (rpcs.line_off + 0.5) / down - 0.5, (rpcs.samp_off + 0.5) / across - 0.5
            rpcs.line_scale, rpcs.samp_scale = rpcs.line_scale / down, rpcs.samp_scale / across
        return GeoGrid(height, width, transform, self.crs, gcps, rpcs)

    @property
    def profile(self) -> dict:
        """Keyword arguments with which rasterio creates a file with this grid."""
        profile = {"height": self.height, "width": self.width, "crs": self.crs}
        if self.gcps:
            profile["gcps"] = list(self.gcps)
        elif self.transform != Affine.identity():
            profile["transform"] = self.transform
        if self.rpcs is not None:
            profile["rpcs"] = self.rpcs
        return profile

    def on_ground(self) -> "GroundPixels":
        """Return the pixels of the grid on the ground, to measure them.

        Raises:
            UserValueError: The grid has no transform or coordinate system, or its coordinates cannot be converted to
                metres.
        """
        transform = from_gcps(self.gcps) if self.gcps else self.transform
        if self.crs is None or transform == Affine.identity():
            raise UserValueError("The scene has no transform from pixels to coordinates. Warp it first: `rio warp`.")
        return GroundPixels(transform, self.crs, self.height, self.width)


class GroundPixels:
    """The pixels of a raster on the ellipsoid of the Earth, to measure them in metres.

    They are measured in three dimensions. Degrees are not metres, and the metres of most map projections differ from
    metres on the ground. A projection that keeps areas also has places where it fails, such as the other side of the
    Earth in a raster of the whole world.

    Args:
        transform: From (column, row) to the coordinates of the raster. It may contain a rotation.
        crs: Coordinate system of the raster.
        height, width: Size of the raster in pixels.

    Raises:
        UserValueError: The coordinates of the centre cannot be converted to positions on Earth.
    """

    def __init__(self, transform: Affine, crs: CRS, height: int, width: int):
        self.transform, self.crs, self.height, self.width = transform, crs, height, width
        try:
            if not all(0 < size < math.inf for size in self.pixel_size_m()):
                raise UserValueError("the central pixel has no position on Earth")
        except (CRSError, RasterioError, UserValueError) as error:
            raise UserValueError(
                f"Coordinates of the coordinate system {crs.to_string()} cannot be converted to metres: {error}. "
                "Correct the coordinate system or the transform of the scene: `rio edit-info`."
            ) from error

    def check_corners(self):
        """Check that the four corners of the raster have a position on Earth.

        Raises:
            UserValueError: A corner has none, so the size of the central pixel does not hold for all pixels.
        """
        columns, rows = np.array([0, self.width, 0, self.width]), np.array([0, 0, self.height, self.height])
        if np.isnan(self._positions(columns, rows)).any():
            raise UserValueError(
                "A corner of the scene has no position on Earth, so its pixels have no common ground sampling "
                "distance. Leave `resample_to` out, or cut the scene to the area that you need: `rio clip`."
            )

    def pixel_size_m(self) -> tuple[float, float]:
        """Return the height and the width of the central pixel in metres."""
        row, column = self.height / 2, self.width / 2
        centre, below, right = self._positions(np.array([column, column, column + 1]), np.array([row, row + 1, row]))
        return float(np.linalg.norm(below - centre)), float(np.linalg.norm(right - centre))

    def areas_m2(self, rows: slice) -> np.ndarray:
        """Return the area of every pixel of some rows in square metres, (rows, width).

        It is NaN for the pixels of a cell with a corner that has no position on Earth.
        """
        cell_px = max(1, min(CELL_PX, int(CELL_M / max(self.pixel_size_m()))))
        down, across = np.arange(rows.start, rows.stop, cell_px), np.arange(0, self.width, cell_px)
        down, across = np.append(down, rows.stop), np.append(across, self.width)
        corners = self._positions(*(values.ravel() for values in np.meshgrid(across, down)))
        corners = corners.reshape(len(down), len(across), 3)
        # The area of a quadrangle is half the cross product of its diagonals.
        cells = np.cross(corners[1:, 1:] - corners[:-1, :-1], corners[1:, :-1] - corners[:-1, 1:])
        heights, widths = np.diff(down), np.diff(across)
        areas = np.linalg.norm(cells, axis=-1) / 2 / (heights[:, None] * widths)
        return np.repeat(np.repeat(areas, heights, axis=0), widths, axis=1)

    def _positions(self, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Convert pixel positions to metres from the centre of the Earth, (positions, 3).

        A position that is not on Earth becomes NaN.
        """
        coordinates = self.transform @ (columns.astype(float), rows.astype(float))
        longitude, latitude = np.radians(convert(self.crs, LONG_LAT, *coordinates))
        radius = SEMI_MAJOR_M / np.sqrt(1 - ECCENTRICITY_2 * np.sin(latitude) ** 2)  # of curvature, east to west
        x, y = np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude)
        return radius[:, None] * np.stack([x, y, (1 - ECCENTRICITY_2) * np.sin(latitude)], axis=1)


def convert(source: CRS, target: CRS, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Convert coordinates to another coordinate system.

    Args:
        source: Coordinate system of `x` and `y`.
        target: Coordinate system of the result.
        x, y: Coordinates (number of points,). In degrees, `x` is the longitude.

    Returns:
        The converted coordinates. Both are NaN for a point outside the domain of one of the coordinate systems, such
        as a latitude above 90 degrees.

    Raises:
        CRSError, RasterioError: The coordinate systems cannot be converted to each other.
    """
    inside = np.isfinite(x) & np.isfinite(y)
    if source.is_geographic:
        pole = math.pi / 2 / source.units_factor[1]
        inside &= np.abs(y) <= pole * (1 + 1e-9)  # a transform that is rounded may be slightly above
        y = y.clip(-pole, pole)
    found = np.full((2, len(x)), np.nan)
    if inside.any():
        found[:, inside] = _convert_parts(source, target, x[inside], y[inside])
    found[:, ~np.isfinite(found).all(axis=0)] = np.nan
    return found[0], found[1]


def _convert_parts(source: CRS, target: CRS, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Convert coordinates, (2, points). NaN or infinite: the point cannot be converted.

    GDAL marks such points. But for the first ones of a coordinate system, rasterio raises an error instead, and the
    result of the other points is lost. The points are then divided until those that cause the error are alone.
    """
    try:
        return np.array(reproject(source, target, x.tolist(), y.tolist()))
    except CPLE_BaseError:
        if len(x) == 1:
            return np.full((2, 1), np.nan)
    middle = len(x) // 2
    halves = [_convert_parts(source, target, x[part], y[part]) for part in (slice(middle), slice(middle, None))]
    return np.concatenate(halves, axis=1)
