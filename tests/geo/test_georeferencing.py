import math

import numpy as np
import pytest
from affine import Affine
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.rpc import RPC

from co2s_hf.geo.georeferencing import GeoGrid, GroundPixels, convert
from co2s_hf.utils.errors import UserValueError


def test_pixels_of_a_map_projection_are_larger_on_the_ground():
    """At the central meridian of UTM, lengths on the map are 0.9996 of those on the ground."""
    grid = GeoGrid(100, 80, Affine(0.5, 0, 500_000, 0, -0.5, 2_780_000), CRS.from_epsg(32640))
    assert grid.on_ground().pixel_size_m() == pytest.approx((0.5 / 0.9996, 0.5 / 0.9996), rel=1e-6)
    areas = grid.on_ground().areas_m2(slice(30, 95))
    assert areas.shape == (65, 80) and areas.sum() == pytest.approx(65 * 80 * 0.25 / 0.9996**2, rel=1e-6)


def test_rotated_pixels_and_pixels_in_feet():
    rotated = Affine.translation(500_000, 2_780_000) @ Affine.rotation(30) @ Affine.scale(2, -3)
    projection = GeoGrid(64, 64, rotated, CRS.from_epsg(32640)).on_ground()
    assert projection.pixel_size_m() == pytest.approx((3 / 0.9996, 2 / 0.9996), rel=1e-6)
    feet = GeoGrid(64, 64, Affine(10, 0, 6_561_667, 0, -10, 1_640_417), CRS.from_epsg(2229)).on_ground()
    assert feet.pixel_size_m() == pytest.approx((3.048, 3.048), rel=1e-3)


def test_areas_in_degrees_are_those_of_the_ellipsoid():
    """The area between two parallels of WGS 84 has a closed form."""
    a, e = 6378137.0, math.sqrt(0.00669437999014)

    def zone(latitude):  # area from the equator to the latitude, over all longitudes
        sine = math.sin(math.radians(latitude))
        return math.pi * a**2 * (1 - e**2) * (sine / (1 - (e * sine) ** 2) + math.atanh(e * sine) / e)

    grid = GeoGrid(1000, 2000, Affine(0.001, 0, 10, 0, -0.001, 61), CRS.from_epsg(4326))
    expected = (zone(61) - zone(60)) * 2 / 360
    assert grid.on_ground().areas_m2(slice(0, 1000)).sum() == pytest.approx(expected, rel=1e-5)
    top, bottom = (
        grid.on_ground().areas_m2(slice(0, 1)),
        grid.on_ground().areas_m2(slice(999, 1000)),
    )
    assert top.sum() < bottom.sum()  # the top is nearer to the pole

    wide = GeoGrid(120, 240, Affine(0.25, 0, 10, 0, -0.25, 61), CRS.from_epsg(4326))
    expected = (zone(61) - zone(31)) * 60 / 360
    assert wide.on_ground().areas_m2(slice(0, 120)).sum() == pytest.approx(expected, rel=1e-4)


def test_positions_outside_a_projection_are_nan_and_leave_the_others():
    """GDAL raises an error for the first 20 points outside, and none afterwards. The result is always the same."""
    disk, degrees = CRS.from_string("+proj=geos +h=35785831 +lon_0=-93 +sweep=x"), CRS.from_epsg(4326)
    x, y = np.array([0.0, 6e6, 1000.0, np.nan, 0.0]), np.array([0.0, 6e6, 0.0, 0.0, 1000.0])
    for _ in range(25):
        longitude, latitude = convert(disk, degrees, x, y)
        assert np.isnan(longitude).tolist() == np.isnan(latitude).tolist() == [False, True, False, True, False]
        assert longitude[[0, 2, 4]] == pytest.approx([-93, -93 + 1000 / 111_320, -93], abs=1e-5)
        assert latitude[[0, 2, 4]] == pytest.approx([0, 0, 1000 / 110_574], abs=1e-5)
    longitude, latitude = convert(degrees, CRS.from_epsg(4979), np.zeros(4), np.array([90.5, 90 + 1e-9, 90, -91]))
    assert np.isnan(longitude).tolist() == [True, False, False, True] and latitude[1:3].tolist() == [90, 90]


def test_areas_up_to_the_poles_and_on_the_other_side_of_the_earth():
    ground = GeoGrid(220, 360, Affine(1, 0, -180, 0, -1, 110), CRS.from_epsg(4326)).on_ground()
    areas = ground.areas_m2(slice(0, 220))
    assert np.isnan(areas[:20]).all() and np.isnan(areas[200:]).all() and np.isfinite(areas[20:200]).all()
    assert areas[20:200].sum() == pytest.approx(510_065_621_724_089, rel=1e-4)
    np.testing.assert_allclose(areas[20:200], areas[20:200, :1].repeat(360, axis=1), rtol=1e-9)
    with pytest.raises(UserValueError, match=r"A corner of the scene has no position on Earth"):
        ground.check_corners()
    GeoGrid(180, 360, Affine(1, 0, -180, 0, -1, 90), CRS.from_epsg(4326)).on_ground().check_corners()


def test_a_resized_grid_covers_the_same_area():
    points = (GroundControlPoint(0, 0, 10, 50), GroundControlPoint(0, 90, 11, 50), GroundControlPoint(60, 0, 10, 49))
    grid = GeoGrid(60, 90, Affine.identity(), CRS.from_epsg(4326), points)
    coarse = grid.resized(20, 45)
    assert [(p.row, p.col, p.x, p.y) for p in coarse.gcps] == [(0, 0, 10, 50), (0, 45, 11, 50), (20, 0, 10, 49)]
    fine, rough = (np.sum(grid.on_ground().areas_m2(slice(0, grid.height))) for grid in (grid, coarse))
    assert rough == pytest.approx(fine, rel=1e-4)
    camera = RPC(
        height_off=0, height_scale=1, lat_off=25, lat_scale=1, line_den_coeff=[1], line_num_coeff=[1], line_off=29.5,
        line_scale=30, long_off=55, long_scale=1, samp_den_coeff=[1], samp_num_coeff=[1], samp_off=44.5, samp_scale=45,
    )  # fmt: skip
    found = GeoGrid(60, 90, Affine.identity(), None, (), camera).resized(20, 45).rpcs
    assert (found.line_off, found.line_scale, found.samp_off, found.samp_scale) == (9.5, 10, 22, 22.5)
    assert camera.line_off == 29.5
    plain = GeoGrid(60, 90, Affine(1, 0, 5, 0, -1, 9), CRS.from_epsg(32640)).resized(20, 45)
    assert plain.transform == Affine(2, 0, 5, 0, -3, 9) and (plain.height, plain.width) == (20, 45)


def test_coordinates_that_cannot_be_converted_to_metres_are_refused():
    with pytest.raises(UserValueError, match=r"no transform from pixels to coordinates. Warp it first: `rio warp`"):
        GeoGrid(10, 10, Affine.identity(), CRS.from_epsg(32640)).on_ground()
    local = CRS.from_wkt('LOCAL_CS["site",UNIT["metre",1]]')
    message = "Coordinates of the coordinate system {} cannot be converted to metres: .*`rio edit-info`"
    with pytest.raises(UserValueError, match=message.format("LOCAL_CS.*")):
        GroundPixels(Affine(1, 0, 0, 0, -1, 0), local, 10, 10)
    for crs, far in ((4326, 900), (32640, 1e12)):
        with pytest.raises(UserValueError, match=message.format(f"EPSG:{crs}")):
            GroundPixels(Affine(1, 0, far, 0, -1, far), CRS.from_epsg(crs), 10, 10)
