import subprocess
import sys
from pathlib import Path

import pytest

from co2s_hf.geo import options
from co2s_hf.geo.options import SceneOptions, VectorLabelOptions
from co2s_hf.utils.errors import UserValueError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"windows_per_batch": 0}, "`windows_per_batch` is 0; it must be at least 1"),
        ({"min_area_m2": 5.0}, r"`min_area_m2` is 5.0, but no polygons are written. .*`vector='map.gpkg'`"),
        (
            {"simplify_m": float("nan"), "vector": ".gpkg"},
            "`simplify_m` is nan; it must be a finite number of at least 0",
        ),
        ({"resample_to": 0.0}, "`resample_to` is 0.0; it must be a finite number above 0"),
        ({"resample_to": "own"}, "`resample_to` is 'own'; expected metres above 0, or 'none'"),
        ({"score_dtype": "uint16", "save_confidence": True}, "`score_dtype` is 'uint16'; expected uint8 or float32"),
        ({"score_dtype": "float32"}, "`score_dtype` is 'float32', but no scores are written. Add `save_confidence=Tr"),
        ({"vector": "maps/.gpkg"}, "`vector` is 'maps/.gpkg'; expected a file that ends in"),
        ({"vector": "map.shp"}, "`vector` is 'map.shp'; expected a file that ends in .gpkg, .geojson or .parquet"),
    ],
)
def test_values_that_are_out_of_range_or_have_no_effect_are_refused(given, message):
    with pytest.raises(UserValueError, match=message):
        SceneOptions(**given)


def test_polygons_go_beside_the_map_or_into_a_named_file():
    destination = Path("maps/north.tif")
    assert SceneOptions().vector_path(destination) is None
    assert SceneOptions(vector=".gpkg").vector_path(destination) == Path("maps/north.gpkg")
    assert SceneOptions(vector="a/b.parquet").vector_path(destination) == Path("a/b.parquet")
    assert SceneOptions(vector=Path("a/b.parquet")).vector == "a/b.parquet"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"class_column": "type"}, "`class_column` goes with `vector_labels`"),
        (
            {"vector_labels": ["a.gml"]},
            "`vector_labels` is 'a.gml'; expected a file that ends in .gpkg, .*or .parquet.",
        ),
        ({"vector_labels": ["a.zip"]}, "files in archives: `ogr2ogr OUT.gpkg IN`"),
        ({"vector_labels": ["a.shp"], "layer": "b"}, "`layer` is 'b', but no file of `vector_labels` is a GeoPackage"),
        ({"vector_labels": ["a.shp"], "labeled_area": "some"}, "`labeled_area` is 'some'; .*or .parquet, or 'all'"),
        (
            {"vector_labels": ["a.gpkg"], "labeled_area": "all", "labeled_area_layer": "b"},
            "`labeled_area_layer` is 'b', but no file of `labeled_area` is a GeoPackage",
        ),
        ({"vector_labels": ["a.shp"], "buffer_m": 0.0}, "`buffer_m` is 0.0; it must be a finite number above 0"),
        ({"vector_labels": ["a.shp"], "class_map": {}}, "`class_map` is empty"),
        ({"vector_labels": ["a.shp"], "class_map": {"a": " "}}, "`class_map` maps 'a' to ' '; neither may be empty"),
        ({"vector_labels": ["a.shp"], "priority": ["a", "b", "a"]}, "`priority` names the class 'a' twice"),
    ],
)
def test_wrong_options_of_polygons_as_labels_are_refused(given, message):
    with pytest.raises(UserValueError, match=message):
        VectorLabelOptions(**given)


def test_options_of_polygons_as_labels_take_paths():
    options = VectorLabelOptions(vector_labels=[Path("a/b.GPKG")], labeled_area=Path("c.shp"), layer="d")
    assert (options.vector_labels, options.labeled_area) == (["a/b.GPKG"], "c.shp")
    assert VectorLabelOptions().vector_labels is None


def test_options_import_neither_torch_nor_rasterio():
    """A command reads its options before it imports torch, so that its help and its usage errors are quick."""
    folder = Path(options.__file__).parents[2]
    code = f"""
import sys, types
for name in ("co2s_hf", "co2s_hf.geo", "co2s_hf.utils"):  # without their __init__.py
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [{str(folder)!r} + "/" + name.replace(".", "/")]
import co2s_hf.geo.options
assert not {{"torch", "rasterio", "numpy"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
