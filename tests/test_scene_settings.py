import importlib.util
from pathlib import Path

import pytest
from conftest import EXAMPLES

from co2s_hf.scene_settings import SceneSettings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"windows_per_batch": 0}, "--windows_per_batch is 0; it is at least 1"),
        ({"num_readers": -1}, "--num_readers is -1; it is at least 1"),
        ({"min_area_m2": 5.0}, "--min_area_m2 is about polygons; say where they go: --vector"),
        ({"simplify_m": float("nan"), "vector": ".gpkg"}, "--simplify_m is nan; it is 0 or more"),
        ({"resample_to": 0.0}, "--resample_to is 0.0; it is a ground sampling distance"),
        ({"output_grid": "resampled"}, "goes with --resample_to METRES"),
        ({"output_grid": "map", "resample_to": 1.0}, "There is no --output_grid 'map'; choose scene or resampled"),
        ({"blend": "soft"}, "There is no --blend 'soft'; choose smooth or average"),
        (
            {"score_dtype": "uint16", "save_confidence": True},
            "There is no --score_dtype 'uint16'; choose uint8 or float32",
        ),
        ({"score_dtype": "float32"}, "--score_dtype float32 goes with --save_confidence"),
        ({"vector": "maps/.gpkg"}, "--vector is 'maps/.gpkg'; it ends in"),
        ({"vector": "map.shp"}, "--vector is 'map.shp'; it ends in .gpkg, .geojson or .parquet"),
    ],
)
def test_what_cannot_work_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SceneSettings(**settings)


def test_where_polygons_go():
    destination = Path("maps/north.tif")
    assert SceneSettings().vector_path(destination) is None
    assert SceneSettings(vector=".gpkg").vector_path(destination) == Path("maps/north.gpkg")
    assert SceneSettings(vector="a/b.parquet").vector_path(destination) == Path("a/b.parquet")


@pytest.fixture(scope="module")
def predict():
    spec = importlib.util.spec_from_file_location("predict", EXAMPLES / "predict.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "Say what to predict: scenes"),
        ({"scenes": ["a.tif"], "images": ["b.png"]}, "one of them"),
        ({"images": ["b.png"], "cog": True}, "--cog is about scenes"),
        ({"images": ["b.png"], "resume": True}, "--resume is about scenes"),
        ({"images": ["b.png"], "scale": ["percentiles"]}, "With --images pass --scale LOW HIGH"),
        ({"scenes": ["a.tif"], "report": "data.html"}, "--report is about data as in training"),
        ({"scenes": ["a.tif"], "windows_per_batch": 0}, "--windows_per_batch is 0"),
    ],
)
def test_what_predict_refuses(given, message, predict):
    with pytest.raises(ValueError, match=message):
        predict.Arguments(**given)
    predict.Arguments(scenes=["a.tif"], scale=["percentiles"], cog=True, resume=True)
    predict.Arguments(images=["b.png"], save_confidence=True)
