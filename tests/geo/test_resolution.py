"""Scenes whose resolution differs from that of the training images."""

import json

import numpy as np
import pytest
import rasterio
from affine import Affine
from helpers import PLACE, Pixelwise, make_model, write_raster
from rasterio.rpc import RPC

from co2s_hf import Co2SImageProcessor
from co2s_hf.geo.dry_run import Speed, check_scene
from co2s_hf.geo.resolution import differs
from co2s_hf.geo.scenes import segment_scene
from co2s_hf.utils.errors import UserError


IMAGE_PROCESSOR = Co2SImageProcessor()
OWN_M = 0.5 / 0.9996  # ground sampling distance of scenes at [`PLACE`]


@pytest.fixture
def scene(tmp_path):
    """A raster of 64 x 96 pixels with areas of one colour."""
    areas = np.random.default_rng(0).integers(1, 256, (3, 16, 24), dtype=np.uint8)
    return write_raster(tmp_path / "scene.tif", np.kron(areas, np.ones((1, 4, 4), dtype=np.uint8)), **PLACE)


def trained_at(distance_m, model=None):
    """Return a model that knows the ground sampling distance of its training images."""
    model = model or Pixelwise()
    model.config.ground_sampling_distance_m = distance_m
    return model


def segment(model, scene, destination, **options):
    options = {"show_progress": False, "save_confidence": True} | options
    return segment_scene(model, IMAGE_PROCESSOR, scene, destination, **options)


def read_map(path):
    """Return labels, confidence and the (height, width) at which the scene was read."""
    values = []
    for file in (path, path.with_name(f"{path.stem}_confidence.tif")):
        with rasterio.open(file) as raster:
            values.append(raster.read(1).tolist())
            grid = json.loads(raster.tags()["CO2S_GRID"])
    return *values, grid


def test_a_scene_is_read_at_the_distance_of_the_training_images(scene, tmp_path):
    """The stored distance, the same distance as an option, and the scene's own pixels."""
    for name, distance_m, options in (
        ("stored", 2.0, {}),
        ("given", None, {"resample_to": 2.0}),
        ("both", 3.0, {"resample_to": 2.0}),
        ("kept", 2.0, {"resample_to": "none"}),
        ("unknown", None, {}),
    ):
        model = trained_at(distance_m, make_model(crop_size=16))
        segment(model, scene, tmp_path / f"{name}.tif", **options)
    found = {name: read_map(tmp_path / f"{name}.tif") for name in ("stored", "given", "both", "kept", "unknown")}
    assert found["stored"] == found["given"] == found["both"] and found["stored"][2] == [16, 24]
    assert found["kept"] == found["unknown"] and found["kept"][2] == [64, 96]
    assert found["stored"][1] != found["kept"][1]
    with rasterio.open(tmp_path / "stored.tif") as raster:
        assert (raster.shape, raster.transform) == ((64, 96), PLACE["transform"])  # the pixels of the scene


@pytest.mark.parametrize(
    ("trained_m", "grid"),
    [
        (0.46, [64, 96]),
        (0.55, [64, 96]),
        (0.45, [71, 107]),
        (0.56, [57, 86]),
    ],
)
def test_a_difference_of_up_to_10_percent_changes_nothing(trained_m, grid, scene, tmp_path):
    segment(trained_at(trained_m), scene, tmp_path / "map.tif")
    assert read_map(tmp_path / "map.tif")[2] == grid
    if grid == [64, 96]:
        segment(Pixelwise(), scene, tmp_path / "plain.tif")
        assert (tmp_path / "map.tif").read_bytes() == (tmp_path / "plain.tif").read_bytes()


def test_the_limit_is_a_share_of_the_distance_of_the_training_images():
    assert not differs((1.0999, 0.9001), 1.0)
    assert differs((1.0, 1.1001), 1.0) and differs((0.8999, 1.0), 1.0)


def test_degrees_are_compared_in_metres_at_the_middle_of_the_scene(tmp_path):
    """At 60 degrees north, a pixel of 0.00001 degrees is 1.11 m high and 0.56 m wide."""
    values = np.random.default_rng(0).integers(1, 256, (3, 40, 60), dtype=np.uint8)
    place = {"crs": "EPSG:4326", "transform": Affine(1e-5, 0, 25.0, 0, -1e-5, 60.0)}
    write_raster(tmp_path / "scene.tif", values, **place)
    segment(trained_at(1.114), tmp_path / "scene.tif", tmp_path / "map.tif")
    assert read_map(tmp_path / "map.tif")[2] == [40, 30]


def test_a_finished_map_is_the_same_for_the_stored_and_the_given_distance(scene, tmp_path):
    segment(trained_at(2.0), scene, tmp_path / "map.tif")
    for model, options in ((trained_at(2.0), {}), (trained_at(2.0), {"resample_to": 2.0})):
        assert segment(model, scene, tmp_path / "map.tif", resume=True, **options) is None
    with pytest.raises(UserError, match="made with another grid"):
        segment(trained_at(2.0), scene, tmp_path / "map.tif", resume=True, resample_to="none")


def test_the_line_about_a_scene_says_how_it_is_read(scene, tmp_path, capsys, caplog):
    def line(distance_m, **options):
        destination = tmp_path / f"map{len(list(tmp_path.iterdir()))}.tif"
        segment(trained_at(distance_m), scene, destination, show_progress=True, **options)
        return next(text for text in capsys.readouterr().out.splitlines() if text.startswith("scene.tif: "))

    own, read = "of 0.5 m, bands 1, 2, 3 of 3 (uint8); ", "read as 24 x 16 pixels (0.0 megapixels) of 2 m; "
    trained = "the ground sampling distance of the training images is 2 m"
    assert f"{own}{read}{trained} (`resample_to='none'` keeps that of the scene); 2 windows" in line(2.0)
    assert f"{own}{trained}; " in line(2.0, resample_to="none")
    assert f"{own}{read}2 windows" in line(None, resample_to=2.0)
    assert "training" not in line(0.5)
    assert not caplog.messages
    segment(trained_at(2.0), scene, tmp_path / "map.tif")  # without progress
    assert [read in text for text in caplog.messages] == [True]


def test_a_dry_run_counts_the_windows_of_the_resampled_scene(scene, tmp_path):
    found = check_scene(trained_at(2.0), IMAGE_PROCESSOR, scene, tmp_path / "map.tif", speed=Speed(1.0, "others"))
    assert found.windows == 2 and "is 2 m (`resample_to='none'` keeps" in found.facts[0]
    model = trained_at(2.0)
    segment(model, scene, tmp_path / "map.tif")
    assert model.num_windows == 2


def test_a_scene_of_unknown_distance_is_read_as_it_is(tmp_path, capsys):
    """A raster with a camera model instead of a transform; and one whose corners lie beyond the Earth."""
    values = np.random.default_rng(0).integers(1, 256, (3, 20, 30), dtype=np.uint8)
    camera = dict.fromkeys(("line_den_coeff", "line_num_coeff", "samp_den_coeff", "samp_num_coeff"), [1.0] * 20)
    names = [f"{name}_{kind}" for name in ("height", "lat", "line", "long", "samp") for kind in ("off", "scale")]
    camera = {"rpcs": RPC(**camera, **dict.fromkeys(names, 1))}
    beyond = {"crs": "+proj=geos +h=35785831 +sweep=y", "transform": Affine(6e5, 0, -9e6, 0, -6e5, 6e6)}
    for name, place in (("camera", camera), ("disk", beyond)):
        write_raster(tmp_path / f"{name}.tif", values, **place)
        segment(trained_at(2.0), tmp_path / f"{name}.tif", tmp_path / f"{name}_map.tif", show_progress=True)
        assert read_map(tmp_path / f"{name}_map.tif")[2] == [20, 30]
        assert "training images is 2 m, that of the scene is unknown; " in capsys.readouterr().out
