import numpy as np
import pytest
from helpers import PLACE, write_raster

from co2s_hf.data.listings import read_classes
from co2s_hf.geo.prepared_rasters import distinct_palette
from co2s_hf.geo.raster_group import open_rasters
from co2s_hf.utils.errors import UserValueError
from co2s_hf.utils.figures import palette_or_default
from co2s_hf.utils.files import write_json


def test_each_of_255_classes_has_its_own_color(tmp_path):
    colors = distinct_palette(255)
    assert len(set(map(tuple, colors))) == 255 and [0, 0, 0] not in colors
    assert colors[:6] == palette_or_default(None, 6).tolist() == distinct_palette(6)
    classes = [{"name": f"class {n}", "color": color} for n, color in enumerate(colors)]
    write_json(tmp_path / "classes.json", {"classes": classes})
    assert read_classes(tmp_path / "classes.json").palette == colors


def test_percentiles_are_those_of_all_rasters(tmp_path):
    """Each raster alone would get another range: the same ground would have other colours in each of them."""
    low = np.arange(3 * 40 * 40, dtype=np.uint16).reshape(3, 40, 40) % 1600
    paths = [str(write_raster(tmp_path / f"{n}.tif", low + 1600 * n, **PLACE)) for n in range(2)]
    with open_rasters(paths, (1, 2, 3), "percentiles") as group:
        scale = np.array(group.rule.scale)
    assert scale == pytest.approx(np.array([[0.02 * 3200, 0.98 * 3200]] * 3), abs=10)
    write_raster(tmp_path / "grey.tif", low[:1], **PLACE)
    with pytest.raises(UserValueError, match=r"different numbers of bands.*grey.tif' has 1 and '.*0.tif' has 3"):
        open_rasters([paths[0], str(tmp_path / "grey.tif")], None, "percentiles")


def test_distances_may_differ_by_a_tenth(tmp_path):
    values = np.zeros((3, 20, 20), dtype=np.uint8)
    transform = PLACE["transform"]
    for name, factor in (("a", 1), ("b", 1.08), ("c", 1.15)):
        write_raster(tmp_path / f"{name}.tif", values, crs=PLACE["crs"], transform=transform @ transform.scale(factor))
    paths = {name: str(tmp_path / f"{name}.tif") for name in "abc"}
    with open_rasters([paths["a"], paths["b"]]) as group:
        assert group.distance_m == pytest.approx(0.5402, abs=1e-4)
        assert [grid.width for grid in group.grids.values()] == [20, 20]
    with pytest.raises(UserValueError, match=r"a.tif' is 0.5 m on the ground, but .*c.tif' is 0.575 m"):
        open_rasters(list(paths.values()))
    with open_rasters(list(paths.values()), resample_to_m=1) as group:
        assert group.distance_m == 1 and [grid.width for grid in group.grids.values()] == [10, 11, 12]
