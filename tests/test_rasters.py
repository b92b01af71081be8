import numpy as np
import pytest
import rasterio
from conftest import PLACE, write_raster

from co2s_hf.rasters import SceneRaster, UnreadableScene


@pytest.mark.parametrize("resample_to", [None, 1.3, 0.37])
def test_windows_are_parts_of_the_whole(resample_to, tmp_path):
    values = np.random.default_rng(0).integers(1, 4000, (3, 70, 90)).astype(np.uint16)
    values[:, 20:30, 20:40] = 0
    write_raster(tmp_path / "scene.tif", values, **PLACE, nodata=0)
    with SceneRaster(str(tmp_path / "scene.tif"), resample_to_m=resample_to) as scene:
        height, width = scene.grid.height, scene.grid.width
        whole, seen = scene.read(slice(0, height), slice(0, width))
        assert whole.shape == (3, height, width) and 0 < (~seen).sum() < 0.1 * seen.size
        rows, columns = slice(height // 3, height // 3 + 11), slice(width // 4, width // 4 + 17)
        part, part_seen = scene.read(rows, columns)
        assert np.array_equal(part_seen, seen[rows, columns])
        assert abs(part.astype(int) - whole[:, rows, columns]).max() <= (0 if resample_to is None else 1)
        if resample_to is None:
            assert np.array_equal(whole, values) and np.array_equal(seen, values[0] > 0)
        else:
            assert (height, width) == (round(35 / 0.9996 / resample_to), round(45 / 0.9996 / resample_to))


def test_bands_that_are_asked_for_are_data_even_where_they_are_called_transparency(tmp_path):
    """GDAL takes a fourth band of 8 bits for transparency; it may be near infrared."""
    values = np.random.default_rng(0).integers(0, 256, (4, 10, 12), dtype=np.uint8)
    write_raster(tmp_path / "scene.tif", values, **PLACE, photometric="rgb", alpha="yes")
    with SceneRaster(str(tmp_path / "scene.tif"), bands=(4, 1, 2)) as scene:
        found, seen = scene.read(slice(0, 10), slice(0, 12))
        assert np.array_equal(found, values[[3, 0, 1]]) and seen.all()
    with rasterio.open(tmp_path / "scene.tif", "r+") as raster:
        raster.nodata = 255
    with SceneRaster(str(tmp_path / "scene.tif"), bands=(4, 1, 2)) as scene:  # other masks hold, though
        assert np.array_equal(scene.valid(slice(0, 10)), (values[[3, 0, 1]] != 255).any(axis=0))
    write_raster(tmp_path / "scene.tif", values, **PLACE, photometric="rgb", alpha="yes")
    with SceneRaster(str(tmp_path / "scene.tif")) as scene:
        assert scene.bands == (1, 2, 3) and np.array_equal(scene.valid(slice(2, 7)), values[3, 2:7] > 0)


def test_percentiles_leave_each_bands_nodata_out(tmp_path):
    values = np.random.default_rng(0).uniform(50, 2500, (3, 40, 50)).astype(np.float32)
    values[0, :8], values[1, 20:, :10] = -9999, np.inf
    write_raster(tmp_path / "scene.tif", values, **PLACE, nodata=-9999)
    with SceneRaster(str(tmp_path / "scene.tif")) as scene:
        found = scene.image_rule("percentiles").scale
    for (low, high), band in zip(found, values):
        seen = band[np.isfinite(band) & (band != -9999)]
        assert (low, high) == pytest.approx(tuple(np.percentile(seen, (2, 98))), rel=1e-5)


def test_scenes_that_tell_no_metres_are_not_resampled(tmp_path):
    write_raster(tmp_path / "scene.tif", np.ones((3, 9, 9), dtype=np.uint8), crs='LOCAL_CS["site",UNIT["metre",1]]',
                 transform=PLACE["transform"])  # fmt: skip
    with pytest.raises(ValueError, match="No metres can be told"):
        SceneRaster(str(tmp_path / "scene.tif"), resample_to_m=2.0)
    with pytest.raises(UnreadableScene, match="There is no band 7"):
        SceneRaster(str(tmp_path / "scene.tif"), bands=(1, 2, 7))
