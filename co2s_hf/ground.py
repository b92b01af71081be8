"""Where a raster lies, and how large its pixels are on the ground, whatever its coordinate system."""

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


# Side of the cells whose pixels are taken to have the same area: coordinate systems bend slowly.
CELL_PX = 64
CELL_M = 10_000


@dataclass(frozen=True)
class Place:
    """Size and place of a raster, as GDAL tells them.

    Args:
        height, width: In pixels.
        transform: From (column, row) to coordinates; the identity where control points stand for it.
        crs: Of these coordinates, or of the control points.
        gcps: Ground control points.
        rpcs: Rational polynomial coefficients, where a satellite's camera model is all that is known.
    """

    height: int
    width: int
    transform: Affine
    crs: CRS | None
    gcps: Sequence[GroundControlPoint] = ()
    rpcs: RPC | None = None

    def on_grid(self, height: int, width: int) -> "Place":
        """The same place in coarser or finer pixels."""
        if (height, width) == (self.height, self.width):
            return self
        down, across = self.height / height, self.width / width
        gcps = [GroundControlPoint(p.row / down, p.col / across, p.x, p.y, p.z, p.id, p.info) for p in self.gcps]
        transform = self.transform if self.gcps else self.transform @ Affine.scale(across, down)
        rpcs = copy.copy(self.rpcs)
        if rpcs is not None:  # they count from the middle of the first pixel
            rpcs.line_off, rpcs.samp_off = (rpcs.line_off + 0.5) / down - 0.5, (rpcs.samp_off + 0.5) / across - 0.5
            rpcs.line_scale, rpcs.samp_scale = rpcs.line_scale / down, rpcs.samp_scale / across
        return Place(height, width, transform, self.crs, gcps, rpcs)

    @property
    def profile(self) -> dict:
        """What rasterio creates a file of this place with."""
        facts = {"height": self.height, "width": self.width, "crs": self.crs}
        if self.gcps:
            facts["gcps"] = list(self.gcps)
        elif self.transform != Affine.identity():
            facts["transform"] = self.transform
        if self.rpcs is not None:
            facts["rpcs"] = self.rpcs
        return facts

    def ground(self) -> "Ground":
        """The ground under it.

        Raises:
            ValueError: The coordinates tell no metres.
        """
        transform = from_gcps(self.gcps) if self.gcps else self.transform
        if self.crs is None or transform == Affine.identity():
            raise ValueError("There is no transform from pixels to coordinates. Warp the scene first: `rio warp`.")
        return Ground(transform, self.crs, self.height, self.width)


class Ground:
    """The ground under a raster, measured in an equal-area projection (Lambert's azimuthal) around its middle.

    Degrees are not metres, and even metres of a map projection are not quite those on the ground.

    Args:
        transform: From (column, row) to the raster's coordinates; it may be rotated.
        crs: The raster's coordinate system.
        height, width: In pixels.

    Raises:
        ValueError: The coordinate system has no known place on Earth.
    """

    def __init__(self, transform: Affine, crs: CRS, height: int, width: int):
        self.transform, self.crs, self.height, self.width = transform, crs, height, width
        try:
            (longitude,), (latitude,) = reproject(
                crs, CRS.from_epsg(4326), *self._coordinates([width / 2], [height / 2])
            )
            self.equal_area = CRS.from_dict(proj="laea", lat_0=latitude, lon_0=longitude, datum="WGS84", units="m")
        except (CRSError, RasterioError, CPLE_BaseError) as error:
            raise ValueError(
                f"No metres can be told from the coordinate system {crs.to_string()}: {error}."
            ) from error

    def pixel_size_m(self) -> tuple[float, float]:
        """Height and width of the middle pixel in metres."""
        row, column = self.height / 2, self.width / 2
        x, y = self._metres(np.array([column, column, column + 1]), np.array([row, row + 1, row]))
        return float(np.hypot(x[1] - x[0], y[1] - y[0])), float(np.hypot(x[2] - x[0], y[2] - y[0]))

    def areas_m2(self, rows: slice) -> np.ndarray:
        """Area of every pixel of some rows, (rows, width), in square metres."""
        cell_px = max(1, min(CELL_PX, int(CELL_M / max(self.pixel_size_m()))))
        down, across = np.arange(rows.start, rows.stop, cell_px), np.arange(0, self.width, cell_px)
        down, across = np.append(down, rows.stop), np.append(across, self.width)
        x, y = self._metres(*(values.ravel() for values in np.meshgrid(across, down)))
        x, y = x.reshape(len(down), -1), y.reshape(len(down), -1)
        # Half the cross product of a quadrangle's diagonals is its area.
        cells = (x[1:, 1:] - x[:-1, :-1]) * (y[1:, :-1] - y[:-1, 1:]) - (x[1:, :-1] - x[:-1, 1:]) * (
            y[1:, 1:] - y[:-1, :-1]
        )
        heights, widths = np.diff(down), np.diff(across)
        areas = np.abs(cells) / 2 / (heights[:, None] * widths)
        return np.repeat(np.repeat(areas, heights, axis=0), widths, axis=1)

    def _coordinates(self, columns, rows) -> tuple[list[float], list[float]]:
        x, y = self.transform @ (np.asarray(columns, dtype=float), np.asarray(rows, dtype=float))
        return x.tolist(), y.tolist()

    def _metres(self, columns: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x, y = reproject(self.crs, self.equal_area, *self._coordinates(columns, rows))
        return np.array(x), np.array(y)
