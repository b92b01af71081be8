import numpy as np
import pytest
import rasterio
from affine import Affine
from helpers import no_file_larger_than
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, MaskFlags

from co2s_hf.geo.georeferencing import GeoGrid
from co2s_hf.geo.maps import MapBand, quantized, strips, write_class_names, write_map
from co2s_hf.utils.errors import UserOSError


GRID = GeoGrid(600, 530, Affine(1, 0, 5, 0, -1, 9), CRS.from_epsg(32640))
PALETTE = np.array([[1, 2, 3], [40, 50, 60]], dtype=np.uint8)


def test_a_map_has_labels_overviews_colours_tags_and_class_names(tmp_path):
    labels = np.zeros((600, 530), dtype=np.uint8)
    labels[:, 100:], labels[:20] = 1, 255
    write_map(tmp_path / "map.tif", [MapBand("class", lambda rows: labels[rows])], "uint8", GRID, {"a": "b"}, PALETTE)
    write_class_names(tmp_path / "map.tif.aux.xml", ["land", "<road> & rail"])
    with rasterio.open(tmp_path / "map.tif") as raster:
        assert np.array_equal(raster.read(1), labels) and raster.overviews(1) == [2]
        half = raster.read(1, out_shape=(300, 265))
        assert np.array_equal(half, labels[::2, ::2])  # the most frequent class, never a mean
        assert raster.tags()["a"] == "b" and raster.colormap(1)[1] == (40, 50, 60, 255)
    assert "<Category>&lt;road&gt; &amp; rail</Category>" in (tmp_path / "map.tif.aux.xml").read_text(encoding="utf-8")


def test_scores_can_be_floating_point(tmp_path):
    scores = np.random.default_rng(0).random((2, 600, 530)).astype(np.float32)
    scores[:, :5] = np.nan
    bands = [MapBand(name, lambda rows, n=n: scores[n, rows]) for n, name in enumerate(("land", "road"))]
    write_map(tmp_path / "map.tif", bands, "float32", GRID, {})
    with rasterio.open(tmp_path / "map.tif") as raster:
        assert np.array_equal(raster.read(), scores, equal_nan=True) and np.isnan(raster.nodata)
        assert raster.descriptions == ("land", "road") and raster.scales == (1, 1)


def test_gdal_does_not_take_four_scores_for_colours(tmp_path):
    scores = np.zeros((600, 530), dtype=np.uint8)
    bands = [MapBand(name, lambda rows: scores[rows]) for name in "abcd"]
    for cog in (False, True):
        write_map(tmp_path / "map.tif", bands, "uint8", GRID, {}, cog=cog)
        with rasterio.open(tmp_path / "map.tif") as raster:
            assert not {ColorInterp.red, ColorInterp.alpha} & set(raster.colorinterp)
            assert not any(MaskFlags.alpha in flags for flags in raster.mask_flag_enums)


@pytest.mark.parametrize("missing_bytes", [1, 2_000, 10_000, 60_000])
@pytest.mark.parametrize("cog", [False, True])
def test_a_file_that_is_cut_short_is_an_error(missing_bytes, cog, tmp_path):
    """Pixels, overviews or the list of tiles may be cut off. GDAL does not report all of these cases."""
    labels = np.random.default_rng(0).integers(0, 2, (600, 530), dtype=np.uint8)
    bands = [MapBand("class", lambda rows: labels[rows])]
    write_map(tmp_path / "map.tif", bands, "uint8", GRID, {}, PALETTE, cog)
    size = (tmp_path / "map.tif").stat().st_size
    with (
        no_file_larger_than(size - missing_bytes),
        pytest.raises(UserOSError, match=r"'map.tif' .* Is the disk full\?"),
    ):
        write_map(tmp_path / "map.tif", bands, "uint8", GRID, {}, PALETTE, cog)


def test_a_file_that_reads_back_differently_is_an_error(tmp_path):
    values = iter(range(10))
    changing = MapBand("class", lambda rows: np.full((rows.stop - rows.start, 530), next(values), dtype=np.uint8))
    with pytest.raises(UserOSError, match=r"'map.tif' was not written completely. Is the disk full\?"):
        write_map(tmp_path / "map.tif", [changing], "uint8", GRID, {}, PALETTE)


def test_strips_cover_all_rows_and_probabilities_become_bytes():
    assert strips(1030) == [slice(0, 512), slice(512, 1024), slice(1024, 1030)]
    assert strips(7, 3) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert quantized(np.array([0, 0.5, 1])).tolist() == [0, 127, 254]
