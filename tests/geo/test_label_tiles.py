import io

import numpy as np
import pyogrio
import pytest
import shapely
from helpers import PLACE, write_raster
from PIL import Image

from co2s_hf.geo.label_tiles import TileCutter, choose_block_px
from co2s_hf.geo.options import TileOptions, VectorLabelOptions
from co2s_hf.geo.raster_group import open_rasters, part_of
from co2s_hf.geo.vector_labels import open_vector_labels


def box(left, upper, right, lower):
    (x0, x1), (y1, y0) = PLACE["transform"] @ (np.array([left, right]), np.array([upper, lower]))
    return shapely.box(x0, y0, x1, y1)


@pytest.fixture
def opened(tmp_path):
    """A raster of 120 x 100 px with labels in its left upper corner: class 0, and class 1 inside it."""
    rng = np.random.default_rng(0)
    image = rng.integers(1, 256, (3, 100, 120)).astype(np.uint8)
    image[:, :, 100:] = 7  # one colour
    image[:, 90:] = 0  # no data
    write_raster(tmp_path / "a.tif", image, **PLACE, nodata=0)
    wkb = shapely.to_wkb(np.array([box(0, 0, 24, 20), box(5, 5, 10, 10)]))
    values = [np.array(["land", "house"], dtype=object)]
    pyogrio.raw.write(tmp_path / "a.gpkg", wkb, values, ["type"], geometry_type="Polygon", crs=PLACE["crs"])
    options = VectorLabelOptions([str(tmp_path / "a.gpkg")], "type", background="ignore")
    with open_rasters([str(tmp_path / "a.tif")]) as group:
        yield group, open_vector_labels(options, group.grids), image


def test_tiles_have_the_pixels_and_the_labels_of_their_place(opened):
    group, labels, image = opened
    cutter = TileCutter(group, labels, TileOptions(tile_size=20))
    rows = list(cutter.rows(block_px=40))
    assert [tile.name for tile in cutter.facts] == [row["image"]["path"] for row in rows]
    truth = np.full((100, 120), 255)
    truth[:20, :24] = 1
    truth[5:10, 5:10] = 0
    for row, tile in zip(rows, cutter.facts):
        left, upper = map(int, tile.name.removesuffix(".png").split("_")[1:])
        part = np.s_[upper : upper + 20, left : left + 20]
        picture = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
        assert (picture == np.moveaxis(image, 0, -1)[part]).all()
        if (truth[part] == 255).all():
            assert row["label"] is None and tile.classes == frozenset() and tile.counts == {255: 400}
        else:
            assert (np.asarray(Image.open(io.BytesIO(row["label"]["bytes"]))) == truth[part]).all()
            assert tile.counts == {n: (truth[part] == n).sum() for n in np.unique(truth[part])}
        assert tile.grid == part_of(group.grids[tile.raster], (left, upper, left + 20, upper + 20))
    # 6 x 5 tiles. Those in the last column have one colour down to the rows without data, which 1 tile also has.
    assert (len(rows), cutter.num_plain, cutter.num_without_data) == (26, 4, 0)
    assert sorted({tile.block for tile in cutter.facts}) == list(range(9))
    assert sum(tile.classes != frozenset() for tile in cutter.facts) == 2


def test_blocks_are_as_large_as_the_labels_allow(opened):
    group, labels, _ = opened
    grids = list(group.grids.values())
    options = TileOptions(tile_size=5)
    assert choose_block_px(grids, labels, options, 2) == 20  # the labels are in 24 x 20 px: two blocks
    assert choose_block_px(grids, labels, options, 6) == 10
    assert choose_block_px(grids, labels, options, 7) == 5
    assert choose_block_px(grids, labels, TileOptions(tile_size=5, block_px=50), 7) == 50
