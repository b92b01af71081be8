import os

import numpy as np
import pytest
import rasterio
from affine import Affine
from helpers import PLACE, write_raster
from hostile import SECRET, mosaic, tiff
from rasterio.control import GroundControlPoint
from rasterio.rpc import RPC

from co2s_hf.data.bands import BandsError
from co2s_hf.geo.rasters import SceneRaster, UnreadableScene
from co2s_hf.utils.errors import UserValueError


@pytest.mark.parametrize("resample_to", [None, 1.3, 0.37])
def test_windows_are_parts_of_the_whole_scene(resample_to, tmp_path):
    values = np.random.default_rng(0).integers(1, 4000, (3, 70, 90)).astype(np.uint16)
    values[:, 20:30, 20:40] = 0
    write_raster(tmp_path / "scene.tif", values, **PLACE, nodata=0)
    with SceneRaster(str(tmp_path / "scene.tif"), resample_to_m=resample_to) as scene:
        height, width = scene.read_grid.height, scene.read_grid.width
        whole, valid = scene.read(slice(0, height), slice(0, width))
        assert whole.shape == (3, height, width) and 0 < (~valid).sum() < 0.1 * valid.size
        rows, columns = slice(height // 3, height // 3 + 11), slice(width // 4, width // 4 + 17)
        part, part_valid = scene.read(rows, columns)
        assert np.array_equal(part_valid, valid[rows, columns])
        assert abs(part.astype(int) - whole[:, rows, columns]).max() <= (0 if resample_to is None else 1)
        if resample_to is None:
            assert np.array_equal(whole, values) and np.array_equal(valid, values[0] > 0)
        else:
            assert (height, width) == (round(35 / 0.9996 / resample_to), round(45 / 0.9996 / resample_to))


def test_a_chosen_band_is_not_transparency_even_if_gdal_calls_it_so(tmp_path):
    """GDAL takes a fourth band of 8 bits for transparency. It may be near infrared."""
    values = np.random.default_rng(0).integers(0, 256, (4, 10, 12), dtype=np.uint8)
    write_raster(tmp_path / "scene.tif", values, **PLACE, photometric="rgb", alpha="yes")
    with SceneRaster(str(tmp_path / "scene.tif"), bands=(4, 1, 2)) as scene:
        found, valid = scene.read(slice(0, 10), slice(0, 12))
        assert np.array_equal(found, values[[3, 0, 1]]) and valid.all()
    with rasterio.open(tmp_path / "scene.tif", "r+") as raster:
        raster.nodata = 255
    with SceneRaster(str(tmp_path / "scene.tif"), bands=(4, 1, 2)) as scene:  # but a nodata value counts
        assert np.array_equal(scene.valid(slice(0, 10)), (values[[3, 0, 1]] != 255).any(axis=0))
    write_raster(tmp_path / "scene.tif", values, **PLACE, photometric="rgb", alpha="yes")
    with SceneRaster(str(tmp_path / "scene.tif")) as scene:
        assert scene.bands == (1, 2, 3) and np.array_equal(scene.valid(slice(2, 7)), values[3, 2:7] > 0)


def test_percentiles_ignore_the_pixels_without_data_of_each_band(tmp_path):
    values = np.random.default_rng(0).uniform(50, 2500, (3, 40, 50)).astype(np.float32)
    values[0, :8], values[1, 20:, :10] = -9999, np.inf
    write_raster(tmp_path / "scene.tif", values, **PLACE, nodata=-9999)
    with SceneRaster(str(tmp_path / "scene.tif"), scale="percentiles") as scene:
        found = scene.image_rule().scale
    for (low, high), band in zip(found, values):
        valid = band[np.isfinite(band) & (band != -9999)]
        assert (low, high) == pytest.approx(tuple(np.percentile(valid, (2, 98))), rel=1e-5)


def test_scenes_without_metres_and_missing_bands_are_refused(tmp_path):
    write_raster(tmp_path / "scene.tif", np.ones((3, 9, 9), dtype=np.uint8), crs='LOCAL_CS["site",UNIT["metre",1]]',
                 transform=PLACE["transform"])  # fmt: skip
    with pytest.raises(UserValueError, match="cannot be converted to metres"):
        SceneRaster(str(tmp_path / "scene.tif"), resample_to_m=2.0)
    expected = (
        r"scene.tif has 3 bands of uint8 \(red, green, blue\), values 1 to 1; there is no band 7. Bands 1, 2 and 3 "
        r"are red, green and blue. Use `bands=\(1, 2, 3\)`.$"
    )
    with pytest.raises(BandsError, match=expected):
        SceneRaster(str(tmp_path / "scene.tif"), bands=(1, 2, 7))


@pytest.mark.parametrize("name", ["a.tif", "a.TIFF", "a.jp2", "a.img", "a.png", "a.jpg", "a.webp", "a.bmp"])
def test_a_file_is_opened_as_what_its_name_says(name, server, tmp_path):
    write_raster(tmp_path / "private.tif", np.full((3, 8, 8), SECRET, dtype=np.uint16), **PLACE)
    for source in (str(tmp_path / "private.tif"), f"/vsicurl/{server.url}/x.tif"):
        (tmp_path / name).write_text(mosaic(source))
        with pytest.raises(UnreadableScene, match=rf"{name} cannot be read: .*not recognized") as error:
            SceneRaster(str(tmp_path / name))
        assert str(SECRET) not in str(error.value)
    (tmp_path / "web" / "false.tif").write_text(mosaic(str(tmp_path / "private.tif")))
    with pytest.raises(UnreadableScene, match=r"false.tif.* cannot be read"):
        SceneRaster(f"{server.url}/false.tif")
    assert all("x.tif" not in request for request in server.requests())


def test_scenes_of_other_formats_are_opened(tmp_path):
    values = np.random.default_rng(0).integers(1, 4000, (3, 8, 8)).astype(np.uint16)
    for name, driver in (("a.img", "HFA"), ("b.img", "ENVI"), ("c.pix", "PCIDSK"), ("d:1.tif", "GTiff")):
        write_raster(tmp_path / name, values, **PLACE, driver=driver)
        with SceneRaster(str(tmp_path / name)) as scene:
            assert np.array_equal(scene.read(slice(0, 8), slice(0, 8))[0], values)
    with SceneRaster(f"GTIFF_DIR:1:{tmp_path / 'd:1.tif'}") as scene:  # GDAL's own name of a part of a file
        assert np.array_equal(scene.read(slice(0, 8), slice(0, 8))[0], values)


@pytest.mark.parametrize("place", ["tag", "a.tif.aux.xml", "a.tif.ovr", "a.tif.msk"])
def test_a_scene_cannot_name_a_file_with_overviews(place, server, tmp_path):
    path = write_raster(tmp_path / "a.tif", np.ones((3, 600, 600), dtype=np.uint16), **PLACE)
    address = f"/vsicurl/{server.url}/x.tif"
    if place == "tag":
        with rasterio.open(path, "r+") as raster:
            raster.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=address)
    elif place == "a.tif.aux.xml":
        tag = f'<Metadata domain="OVERVIEWS"><MDI key="OVERVIEW_FILE">{address}</MDI></Metadata>'
        (tmp_path / place).write_text(f"<PAMDataset>{tag}</PAMDataset>")
    else:
        (tmp_path / place).write_text(mosaic(address))
    with pytest.raises(UnreadableScene, match=r"a.tif names another file|a.tif.(ovr|msk) is no GeoTIFF"):
        SceneRaster(str(path)).sample(60)
    assert server.requests() == []


def test_overviews_and_masks_beside_a_scene_are_used(tmp_path):
    path = write_raster(tmp_path / "a.tif", np.ones((3, 600, 600), dtype=np.uint16), **PLACE)
    write_raster(tmp_path / "a.tif.ovr", np.full((3, 300, 300), 7, dtype=np.uint16))
    mask = np.zeros((1, 600, 600), dtype=np.uint8)
    mask[:, :, 300:] = 255
    with rasterio.open(
        tmp_path / "a.tif.msk", "w", driver="GTiff", dtype="uint8", width=600, height=600, count=1
    ) as file:
        file.write(mask)
        file.update_tags(INTERNAL_MASK_FLAGS_1="2", INTERNAL_MASK_FLAGS_2="2", INTERNAL_MASK_FLAGS_3="2")
    with SceneRaster(str(path)) as scene:
        values, valid = scene.sample(300)
        assert (values == 7).all() and not valid[:, :150].any() and valid[:, 150:].all()


def test_scenes_with_huge_blocks_or_many_bands_are_refused(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(16, 16, tile=60_000))
    with pytest.raises(UnreadableScene, match=r"a.tif has blocks of 60000 x 60000 pixels, 6.7 GiB; .*smaller blocks"):
        SceneRaster(str(tmp_path / "a.tif"))
    write_raster(tmp_path / "b.tif", np.ones((400, 4, 4), dtype=np.uint16), **PLACE)
    with SceneRaster(str(tmp_path / "b.tif")) as scene, pytest.raises(BandsError, match="has 400 bands of uint16"):
        scene.image_rule()


@pytest.mark.parametrize("numbers", [(0.5, 0.5, 9, 0.5, 0.5, 9), (0, 0, 9, 0, 0, 9), (np.nan, 0, 9, 0, -1, 9)])
def test_transforms_that_give_pixels_no_area_are_refused(numbers, tmp_path):
    path = write_raster(tmp_path / "a.tif", np.ones((3, 8, 8), np.uint8), **PLACE | {"transform": Affine(*numbers)})
    with pytest.raises(UnreadableScene, match=r"a.tif has the transform \(.*\), which gives its pixels no area"):
        SceneRaster(str(path))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.tif")
    with pytest.raises(UserValueError, match=r"a.tif is no file, but a pipe or a device"):
        SceneRaster(str(tmp_path / "a.tif"))


def test_a_scene_without_a_position_gives_one_error_and_no_warning_of_rasterio(tmp_path, recwarn):
    values = np.ones((3, 20, 20), dtype=np.uint8)
    for name, crs, missing in (("a", PLACE["crs"], "no transform, control points or RPCs"), ("b", None, "no coordi")):
        path = write_raster(tmp_path / f"{name}.tif", values, **({} if crs is None else {"crs": crs}))
        recwarn.clear()
        with pytest.raises(UnreadableScene, match=rf"{name}\.tif has .*{missing}"):
            SceneRaster(str(path))
        assert not recwarn.list


def test_control_points_or_rpcs_give_a_scene_its_position(tmp_path):
    values = np.ones((3, 20, 20), dtype=np.uint8)
    points = [GroundControlPoint(row, col, 500_000 + col, 2_780_000 - row) for row, col in ((0, 0), (0, 20), (20, 0))]
    write_raster(tmp_path / "points.tif", values, gcps=points, crs=PLACE["crs"])
    camera = dict.fromkeys(("line_den_coeff", "line_num_coeff", "samp_den_coeff", "samp_num_coeff"), [1.0] * 20)
    camera |= {f"{name}_off": 1 for name in ("height", "lat", "line", "long", "samp")}
    camera = RPC(**camera, **{f"{name}_scale": 1 for name in ("height", "lat", "line", "long", "samp")})
    write_raster(tmp_path / "camera.tif", values, rpcs=camera, crs="EPSG:4326")
    for name in ("points", "camera"):
        with SceneRaster(str(tmp_path / f"{name}.tif")) as scene:
            assert scene.grid.transform == Affine.identity() and scene.grid.height == 20


def test_the_reason_of_gdal_ends_with_one_full_stop(tmp_path):
    """GDAL's own reason may end with a full stop."""
    path = write_raster(tmp_path / "scene.tif", np.ones((3, 64, 64), dtype=np.uint8), **PLACE)
    path.write_bytes(path.read_bytes()[:6000])
    with pytest.raises(UnreadableScene) as error, SceneRaster(str(path)) as scene:
        scene.read(slice(0, 64), slice(0, 64))
    assert ". Expected a complete raster file" in str(error.value) and ".." not in str(error.value)
