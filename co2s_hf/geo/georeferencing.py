"""Pixel grids on the ground: position of a raster, and size of its pixels in metres."""

import copy
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

    def equal_area_projection(self) -> "EqualAreaProjection":
        """Return the projection in which the pixels of the grid are measured.

        Raises:
            UserValueError: The grid has no transform or coordinate system, or its coordinates cannot be converted to
                metres.
        """
        transform = from_gcps(self.gcps) if self.gcps else self.transform
        if self.crs is None or transform == Affine.identity():
            raise UserValueError("The scene has no transform from pixels to coordinates. Warp it first: `rio warp`.")
        return EqualAreaProjection(transform, self.crs, self.height, self.width)


class EqualAreaProjection:
    """Lambert's azimuthal equal-area projection around the centre of the raster, to measure pixels on the ground.

    A projection is needed because degrees are not metres, and because the metres of most map projections differ from
    metres on the ground.

    Args:
        transform: From (column, row) to the coordinates of the raster. It may contain a rotation.
        crs: Coordinate system of the raster.
        height, width: Size of the raster in pixels.

    Raises:
        UserValueError: The coordinates cannot be converted to positions on Earth.
    """

    def __init__(self, transform: Affine, crs: CRS, height: int, width: int):
        self.transform, self.crs, self.height, self.width = transform, crs, height, width
        try:
            (longitude,), (latitude,) = reproject(
                crs, CRS.from_epsg(4326), *self._coordinates([width / 2], [height / 2])
            )
            self.equal_area = CRS.from_dict(proj="laea", lat_0=latitude, lon_0=longitude, datum="WGS84", units="m")
        except (CRSError, RasterioError, CPLE_BaseError) as error:
            raise UserValueError(
                f"Coordinates of the coordinate system {crs.to_string()} cannot be converted to metres: {error}. "
                "Correct the coordinate system or the transform of the scene: `rio edit-info`."
            ) from error

    def pixel_size_m(self) -> tuple[float, float]:
        """Return the height and the width of the central pixel in metres."""
        row, column = self.height / 2, self.width / 2
        x, y = self._metres(np.array([column, column, column + 1]), np.array([row, row + 1, row]))
        return float(np.hypot(x[1] - x[0], y[1] - y[0])), float(np.hypot(x[2] - x[0], y[2] - y[0]))

    def areas_m2(self, rows: slice) -> np.ndarray:
        """Return the area of every pixel of some rows in square metres, (rows, width)."""
        cell_px = max(1, min(CELL_PX, int(CELL_M / max(self.pixel_size_m()))))
        down, across = np.arange(rows.start, rows.stop, cell_px), np.arange(0, self.width, cell_px)
        down, across = np.append(down, rows.stop), np.append(across, self.width)
        x, y = self._metres(*(values.ravel() for values in np.meshgrid(across, down)))
        x, y = x.reshape(len(down), -1), y.reshape(len(down), -1)
        # The area of a quadrangle is half the cross product of its diagonals.
        cells = (x[1:, 1:] - x[:-1, :-1]) * (y[1:, :-1] - y[:-1, 1:]) - (x[1:, :-1] - x[:-1, 1:]) * (
            y[1:, 1:] - y[:-1, :-1]
        )
        heights, widths = np.diff(down), np.diff(across)
        areas = np.abs(cells) / 2 / (heights[:, None] * widths)
        return np.repeat(np.repeat(areas, heights, axis=0), widths, axis=1)

    def _coordinates(self, columns, rows) -> tuple[list[float], list[float]]:
        """Convert pixel positions to coordinates of the raster."""
        x, y = self.transform @ (np.asarray(columns, dtype=float), np.asarray(rows, dtype=float))
        return x.tolist(), y.tolist()

    def _metres(self, columns: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Convert pixel positions to metres in the equal-area projection."""
        x, y = reproject(self.crs, self.equal_area, *self._coordinates(columns, rows))
        return np.array(x), np.array(y)
