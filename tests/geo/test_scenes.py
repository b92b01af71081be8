"""Maps of rasters, by a tiny model and by a stand-in ([`Pixelwise`]) with a known label for every pixel."""

import json
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import pyogrio
import pytest
import rasterio
import shapely
import torch
from affine import Affine
from helpers import (
    PLACE,
    TWO_PROCESSES,
    Pixelwise,
    environment,
    make_model,
    no_file_larger_than,
    run_command,
    run_subprocess,
    save_checkpoint,
    write_raster,
)
from pictures import color_runs, middle_row, read_picture
from pyarrow import parquet
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.windows import Window
from rio_cogeo import cog_validate

from co2s_hf import Co2SImageProcessor
from co2s_hf.geo import rasters, scene_outputs
from co2s_hf.geo.georeferencing import GeoGrid, GroundPixels
from co2s_hf.geo.rasters import UnreadableScene
from co2s_hf.geo.scene_outputs import IncompleteMap
from co2s_hf.geo.scenes import segment_scene
from co2s_hf.inference.images import segment_image
from co2s_hf.utils.errors import UserFileExistsError, UserOSError, UserValueError


TESTS = Path(__file__).parents[1]
IMAGE_PROCESSOR = Co2SImageProcessor()


def random_image(height, width, dtype="uint8", bands=3):
    """Return random values from 1 to 255, (bands, height, width)."""
    return np.random.default_rng(height * width).integers(1, 256, (bands, height, width)).astype(dtype)


def truth(image):
    """Return the labels and the confidence that the stand-in predicts for an 8-bit image."""
    pixel_values = IMAGE_PROCESSOR(np.moveaxis(image, 0, -1), return_tensors="pt")["pixel_values"][0]
    confidence, labels = (2 * pixel_values).softmax(dim=0).max(dim=0)  # of the more confident student
    return labels.numpy(), confidence.numpy()


def read(path):
    with rasterio.open(path) as raster:
        return raster.read()


def segment(source, destination, model=None, **options):
    """Segment a scene with the stand-in, or with a model."""
    options = {"show_progress": False} | options
    return segment_scene(model or Pixelwise(), IMAGE_PROCESSOR, source, destination, **options)


def write_mosaic(path, height, width, parts):
    """Write a VRT at [`PLACE`].

    Args:
        path: The VRT.
        height, width: Its size in pixels.
        parts: File name -> (left, top, width, height) of the part of the file, (left, top) of that part in the VRT.
    """
    sources = "".join(
        f"""<SimpleSource><SourceFilename relativeToVRT="1">{name}</SourceFilename><SourceBand>BAND</SourceBand>
        <SrcRect xOff="{x}" yOff="{y}" xSize="{w}" ySize="{h}"/>
        <DstRect xOff="{left}" yOff="{top}" xSize="{w}" ySize="{h}"/></SimpleSource>"""
        for name, ((x, y, w, h), (left, top)) in parts.items()
    )
    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{n}">{sources.replace("BAND", str(n))}</VRTRasterBand>'
        for n in (1, 2, 3)
    )
    path.write_text(
        f"""<VRTDataset rasterXSize="{width}" rasterYSize="{height}"><SRS>EPSG:32640</SRS>
        <GeoTransform>500000, 0.5, 0, 2780000, 0, -0.5</GeoTransform>{bands}</VRTDataset>""",
        encoding="utf-8",
    )


@pytest.mark.parametrize("size", [(31, 45), (9, 70), (8, 8), (130, 67)])
@pytest.mark.parametrize("options", [{}, {"overlap_px": 11, "windows_per_batch": 3}, {"blend": "average"}])
def test_a_map_equals_the_prediction_of_the_whole_image(size, options, tmp_path):
    image = random_image(*size)
    write_raster(tmp_path / "scene.tif", image, **PLACE)
    segment(
        tmp_path / "scene.tif", tmp_path / "out" / "map.tif", score_dtype="float32", save_confidence=True, **options
    )
    labels, confidence = truth(image)
    assert np.array_equal(read(tmp_path / "out" / "map.tif")[0], labels)
    np.testing.assert_allclose(read(tmp_path / "out" / "map_confidence.tif")[0], confidence, rtol=1e-5)


def test_scenes_and_images_have_the_same_prediction(tmp_path):
    model = make_model(crop_size=16, clip_temperature=0.5, dinov3_temperature=2.0)
    image_processor = Co2SImageProcessor.from_model_config(model.config)
    image = random_image(40, 52)
    write_raster(tmp_path / "scene.tif", image, **PLACE)
    options = {"score_dtype": "float32", "save_probabilities": True, "show_progress": False}
    segment_scene(model, image_processor, tmp_path / "scene.tif", tmp_path / "map.tif", **options)
    found = segment_image(model, image_processor, np.moveaxis(image, 0, -1), windows_per_batch=4)
    assert np.array_equal(read(tmp_path / "map.tif")[0], found.labels)
    np.testing.assert_allclose(read(tmp_path / "map_probabilities.tif"), found.probabilities, rtol=1e-5)
    model.config.clip_temperature = 0.6
    with pytest.raises(UserFileExistsError, match="made with another model"):
        segment_scene(model, image_processor, tmp_path / "scene.tif", tmp_path / "map.tif", resume=True, **options)


def test_a_map_has_georeferencing_colours_names_tags_and_statistics(tmp_path):
    rotated = Affine.translation(500_000, 2_780_000) @ Affine.rotation(15) @ Affine.scale(0.5, -0.5)
    write_raster(tmp_path / "scene.tif", random_image(1100, 1050), **(PLACE | {"transform": rotated}))
    with rasterio.open(tmp_path / "scene.tif", "r+") as raster:
        raster.update_tags(TIFFTAG_DATETIME="2024:05:01 10:00:00", sensor="camera", STATISTICS_MEAN="128")
    found = segment(
        tmp_path / "scene.tif", tmp_path / "map.tif", save_confidence=True, save_probabilities=True, crop_size=256
    )
    with rasterio.open(tmp_path / "map.tif") as raster:
        assert raster.crs == "EPSG:32640" and raster.transform.almost_equals(rotated)
        assert raster.dtypes == ("uint8",) and raster.nodata == 255 and raster.block_shapes == [(512, 512)]
        assert raster.compression.name == "deflate" and raster.overviews(1) == [2, 4]
        colormap, tags = raster.colormap(1), raster.tags()
    assert [colormap[n][:3] for n in range(3)] == [(128, 128, 128), (255, 255, 0), (0, 0, 255)]
    assert [tags[f"CLASS_{n}"] for n in range(3)] == ["land", "road", "water"]
    assert tags["TIFFTAG_DATETIME"] == "2024:05:01 10:00:00" and tags["sensor"] == "camera"
    assert json.loads(tags["CO2S_CROP_SIZE"]) == 256 and "STATISTICS_MEAN" not in tags
    assert "<Category>land</Category>" in (tmp_path / "map.tif.aux.xml").read_text(encoding="utf-8")
    with rasterio.open(tmp_path / "map_confidence.tif") as raster:
        assert raster.nodata == 255 and raster.scales == (1 / 254,) and raster.overviews(1) == [2, 4]
        confidence = raster.read(1)
    with rasterio.open(tmp_path / "map_probabilities.tif") as raster:
        assert raster.descriptions == ("land", "road", "water") and raster.transform.almost_equals(rotated)
        probabilities = raster.read()
    labels = read(tmp_path / "map.tif")[0]
    assert np.array_equal(probabilities.max(axis=0), confidence)
    assert (np.take_along_axis(probabilities, labels[None].astype(int), axis=0)[0] == confidence).all()
    assert abs(probabilities.sum(axis=0, dtype=int) - 254).max() <= 2
    assert found.class_pixels == np.bincount(labels.ravel(), minlength=3).tolist() and found.nodata_pixels == 0
    assert sum(found.class_areas_m2) == pytest.approx(labels.size * 0.25 / 0.9996**2, rel=1e-5)
    assert set(found.paths) == {"map", "quick_look", "class_names", "confidence", "probabilities"}


def test_the_quick_look_has_the_scene_its_map_and_the_confidence(tmp_path):
    """The left half of the scene is red (land), the right half is green (road), the lower half has no data."""
    image = np.zeros((3, 60, 60), dtype=np.uint8)
    image[:] = np.array([10, 250, 10])[:, None, None]
    image[:2, :, :30] = np.array([250, 10])[:, None, None]
    image[:, 30:] = 0
    write_raster(tmp_path / "scene.tif", image, **PLACE, nodata=0)
    segment(tmp_path / "scene.tif", tmp_path / "map.tif")
    picture = read_picture(tmp_path / "map.png")
    red, green, land, road, certain = (250, 10, 10), (10, 250, 10), (128, 128, 128), (255, 255, 0), (253, 231, 36)
    row = middle_row(picture, red)
    assert color_runs(picture[row]) == [red, green, land, road, certain]
    panel_rows = np.flatnonzero((picture == red).all(axis=-1).any(axis=1))
    assert color_runs(picture[row + len(panel_rows)]) == []  # all white


def test_control_points_and_the_pixel_convention_are_kept(tmp_path):
    points = [
        GroundControlPoint(0, 0, 55, 25),
        GroundControlPoint(0, 40, 55.1, 25),
        GroundControlPoint(30, 0, 55, 24.9),
    ]
    write_raster(tmp_path / "scene.tif", random_image(30, 40), gcps=points, crs="EPSG:4326")
    found = segment(tmp_path / "scene.tif", tmp_path / "map.tif")
    with rasterio.open(tmp_path / "map.tif") as raster:
        gcps, crs = raster.gcps
        assert [(p.row, p.col, p.x, p.y) for p in gcps] == [(p.row, p.col, p.x, p.y) for p in points]
        assert crs == "EPSG:4326" and sum(found.class_areas_m2) > 0
    with pytest.raises(UserValueError, match=r"Polygons \(`vector`\) need a scene with a transform.*rio warp"):
        segment(tmp_path / "scene.tif", tmp_path / "other.tif", vector=".gpkg")
    write_raster(tmp_path / "point.tif", random_image(30, 40), **PLACE)
    with rasterio.open(tmp_path / "point.tif", "r+") as raster:
        raster.update_tags(AREA_OR_POINT="Point")
    segment(tmp_path / "point.tif", tmp_path / "points.tif")
    with rasterio.open(tmp_path / "point.tif") as scene, rasterio.open(tmp_path / "points.tif") as found:
        assert found.transform == scene.transform and found.tags()["AREA_OR_POINT"] == "Point"


@pytest.mark.parametrize("kind", ["nodata", "alpha", "mask", "nan", "float"])
def test_pixels_without_data_are_nodata_in_the_map_and_change_no_other_pixel(kind, tmp_path):
    image, valid = random_image(50, 60), np.ones((50, 60), dtype=bool)
    valid[:17, :40], valid[30, 31] = False, False  # whole windows, and one pixel
    values, profile, scale = image * valid, dict(PLACE), None
    if kind == "nodata":
        profile["nodata"] = 0
    elif kind == "alpha":
        values = np.concatenate([image, 255 * valid[None].astype(np.uint8)])
    elif kind == "float":  # in one band only: a valid value of floating point is never the nodata value
        values, scale, profile["nodata"] = image.astype(np.float32), (0, 255), -9999
        values[1][~valid] = -9999
    elif kind == "nan":
        values, scale = np.where(valid, image, np.nan).astype(np.float32), (0, 255)
    write_raster(tmp_path / "scene.tif", values, **profile)
    with rasterio.open(tmp_path / "scene.tif", "r+") as raster:
        if kind == "alpha":
            raster.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
        elif kind == "mask":
            raster.write_mask(valid)
    model = Pixelwise()
    found = segment(tmp_path / "scene.tif", tmp_path / "map.tif", model, scale=scale, save_confidence=True)
    labels, confidence = truth(image)
    assert np.array_equal(read(tmp_path / "map.tif")[0], np.where(valid, labels, 255))
    assert np.array_equal(read(tmp_path / "map_confidence.tif")[0] == 255, ~valid)
    np.testing.assert_allclose(read(tmp_path / "map_confidence.tif")[0][valid] / 254, confidence[valid], atol=0.002)
    assert model.num_windows == 4 * 5 - 2 and found.nodata_pixels == (~valid).sum()


def test_the_value_of_nodata_does_not_reach_the_model(tmp_path):
    model, image, maps = make_model(crop_size=16), random_image(40, 40).clip(1, 254), []
    for value in (0, 255):
        image[:, 10:20, 10:30] = value
        write_raster(tmp_path / f"{value}.tif", image, **PLACE, nodata=value)
        segment(tmp_path / f"{value}.tif", tmp_path / f"map{value}.tif", model, save_confidence=True)
        maps.append(read(tmp_path / f"map{value}_confidence.tif"))
    assert np.array_equal(*maps) and (maps[0] == 255).sum() == 200


def test_the_map_of_a_scene_without_data_is_nodata(tmp_path):
    write_raster(tmp_path / "scene.tif", np.zeros((3, 20, 20), dtype=np.uint8), **PLACE, nodata=0)
    model = Pixelwise()
    found = segment(tmp_path / "scene.tif", tmp_path / "map.tif", model, vector=".geojson")
    assert (read(tmp_path / "map.tif") == 255).all() and found.nodata_pixels == 400 and model.num_windows == 0
    assert json.loads((tmp_path / "map.geojson").read_text())["features"] == []


@pytest.mark.parametrize(("dtype", "scale"), [("uint8", None), ("uint8", "percentiles"), ("uint16", "percentiles")])
def test_a_scene_without_data_is_not_an_error_with_any_scale(dtype, scale, tmp_path, caplog):
    write_raster(tmp_path / "scene.tif", np.zeros((3, 20, 20), dtype=dtype), **PLACE, nodata=0)
    found = segment(tmp_path / "scene.tif", tmp_path / "map.tif", scale=scale)
    assert (read(tmp_path / "map.tif") == 255).all() and found.class_pixels == [0, 0, 0]
    assert "'scene.tif' has no pixels with data. Its map has the value 255 everywhere." in caplog.text


@pytest.mark.parametrize("size", [(70, 80), (71, 79)])  # the sample has one pixel of the corner, or none
def test_percentiles_of_a_scene_with_data_in_a_corner_that_a_sample_misses(size, tmp_path, monkeypatch):
    monkeypatch.setattr(rasters, "SAMPLE_PX", 16)
    corner, image = 10 * random_image(2, 3).astype(np.uint16), np.zeros((3, *size), dtype=np.uint16)
    image[:, -2:, -3:] = corner
    write_raster(tmp_path / "scene.tif", image, **PLACE, nodata=0)
    found = segment(tmp_path / "scene.tif", tmp_path / "map.tif", scale="percentiles")
    with rasterio.open(tmp_path / "map.tif") as raster:
        scale, labels = json.loads(raster.tags()["CO2S_SCALE"]), raster.read(1)
    assert scale == np.percentile(corner.reshape(3, -1), (2, 98), axis=1).T.tolist()
    assert found.nodata_pixels == image[0].size - 6 and np.array_equal(labels != 255, image[0] > 0)


FULL_DISK = {  # of the satellite GOES East
    "crs": "+proj=geos +h=35785831 +lon_0=-75 +sweep=x",
    "transform": Affine(200_000, 0, -6_000_000, 0, -200_000, 6_000_000),
}
BEYOND_THE_POLES = {"crs": "EPSG:4326", "transform": Affine(5, 0, -180, 0, -5, 110)}


@pytest.mark.parametrize(
    ("place", "shape"), [(FULL_DISK, (60, 60)), (BEYOND_THE_POLES, (44, 72))], ids=["full disk", "beyond the poles"]
)
def test_pixels_without_a_position_on_earth_have_labels_and_no_area(place, shape, tmp_path, caplog):
    image = np.repeat(np.repeat(random_image(shape[0] // 2, shape[1] // 2), 2, axis=1), 2, axis=2)
    write_raster(tmp_path / "scene.tif", image, **place)
    found = {
        kind: segment(tmp_path / "scene.tif", tmp_path / kind / "map.tif", vector=f".{kind}")
        for kind in ("gpkg", "geojson", "parquet")
    }
    labels = read(tmp_path / "gpkg" / "map.tif")[0]
    assert np.array_equal(labels, truth(image)[0])
    with rasterio.open(tmp_path / "scene.tif") as raster:
        areas = GeoGrid(*shape, raster.transform, raster.crs).on_ground().areas_m2(slice(0, shape[0]))
    unknown = np.isnan(areas)
    assert unknown[0, 0] and not unknown[shape[0] // 2, shape[1] // 2]
    for result in found.values():
        assert result.class_pixels == np.bincount(labels.ravel(), minlength=3).tolist()
        assert result.unmeasured_pixels == np.bincount(labels[unknown], minlength=3).tolist()
        sums = [areas[~unknown & (labels == index)].sum() for index in range(3)]
        assert result.class_areas_m2 == pytest.approx(sums)
    assert f"{unknown.sum()} pixels of 'scene.tif', or their neighbours, have no position on Earth" in caplog.text
    everything = parquet.read_table(tmp_path / "parquet" / "map.parquet").to_pydict()
    outlines = shapely.from_wkb(everything["geometry"])
    pixel = abs(place["transform"].a * place["transform"].e)
    assert shapely.area(outlines).sum() == pytest.approx(labels.size * pixel)  # objects without an area are there
    has_area = np.array([area is not None for area in everything["area_m2"]])
    assert 0 < has_area.sum() < len(outlines)
    assert len(pyogrio.raw.read(tmp_path / "gpkg" / "map.gpkg")[2]) == len(outlines)
    written = shapely.from_wkb(pyogrio.raw.read(tmp_path / "geojson" / "map.geojson")[2])
    assert 0 < len(written) < len(outlines) and np.abs(shapely.get_coordinates(written)[:, 1]).max() <= 90
    left_out = len(outlines) - len(written)
    assert f"'map.geojson' has no polygons for {left_out} objects with a corner that has no longitude" in caplog.text
    segment(tmp_path / "scene.tif", tmp_path / "large.tif", vector=".parquet", min_area_m2=1)
    assert parquet.read_table(tmp_path / "large.parquet").num_rows == has_area.sum()
    assert f"'large.parquet' has no polygons for {(~has_area).sum()} objects of unknown area" in caplog.text
    with pytest.raises(UserValueError, match=r"A corner of the scene has no position on Earth.*`resample_to`"):
        segment(tmp_path / "scene.tif", tmp_path / "other.tif", model := Pixelwise(), resample_to=300_000)
    assert model.num_windows == 0


def test_a_map_of_the_whole_world_has_the_area_of_the_earth(tmp_path):
    world = {"crs": "EPSG:4326", "transform": Affine(1, 0, -180, 0, -1, 90)}
    write_raster(tmp_path / "scene.tif", random_image(180, 360), **world)
    found = segment(tmp_path / "scene.tif", tmp_path / "map.tif", crop_size=128)
    assert sum(found.class_areas_m2) == pytest.approx(510_065_621_724_089, rel=1e-4)
    assert found.unmeasured_pixels == [0, 0, 0]


@pytest.mark.parametrize(
    ("broken", "missing"),
    [
        ("draw_scene_map", "map.png"),
        ("write_class_names", "map.tif.aux.xml"),
        ("write_polygons", "map.gpkg"),
    ],
)
def test_an_error_after_the_prediction_does_not_lose_the_map(broken, missing, tmp_path, monkeypatch, caplog):
    source, model = write_raster(tmp_path / "scene.tif", random_image(40, 30), **PLACE), Pixelwise()
    run = partial(segment, source, tmp_path / "out" / "map.tif", model, vector=".gpkg", save_confidence=True)

    def fail(*args, **kwargs):
        raise RuntimeError("a bug")

    names = {"map.tif", "map.png", "map.tif.aux.xml", "map.gpkg", "map_confidence.tif"}
    with monkeypatch.context() as patch:
        patch.setattr(scene_outputs, broken, fail)
        message = rf"map.tif' is complete, but a file is missing: '.*{missing}' \(RuntimeError: a bug\).*`resume=True`"
        with pytest.raises(IncompleteMap, match=message):
            run()
        left = {path.name for path in (tmp_path / "out").iterdir()}
        assert left == names - {missing} | {".map.tif.unfinished"} and "Traceback" in caplog.text
        with pytest.raises(IncompleteMap, match="a bug"):
            run(resume=True)
    assert np.array_equal(read(tmp_path / "out" / "map.tif")[0], truth(random_image(40, 30))[0])
    windows = model.num_windows
    found = run(resume=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == names and model.num_windows == windows
    assert sum(found.class_areas_m2) == pytest.approx(300 / 0.9996**2, rel=1e-5)
    assert run(resume=True) is None


def test_an_error_of_the_areas_does_not_lose_the_map(tmp_path, monkeypatch, caplog):
    def fail(*args):
        raise RuntimeError("a bug")

    monkeypatch.setattr(GroundPixels, "areas_m2", fail)
    found = segment(write_raster(tmp_path / "scene.tif", random_image(40, 30), **PLACE), tmp_path / "map.tif")
    assert np.array_equal(read(tmp_path / "map.tif")[0], truth(random_image(40, 30))[0])
    assert found.class_areas_m2 is None and found.unmeasured_pixels == found.class_pixels
    assert "The areas of the classes cannot be computed" in caplog.text and "a bug" in caplog.text


def test_a_broken_overview_costs_the_quick_look_but_not_the_map(tmp_path, monkeypatch):
    monkeypatch.setattr(scene_outputs, "QUICK_LOOK_PX", 300)
    image = random_image(600, 600)
    source = write_raster(tmp_path / "scene.tif", image, **PLACE)
    with rasterio.Env(TIFF_USE_OVR=True), rasterio.open(source, "r+") as raster:
        raster.build_overviews([2])
    overviews = Path(f"{source}.ovr")
    with overviews.open("r+b") as file:
        file.truncate(overviews.stat().st_size // 2)
    with pytest.raises(IncompleteMap, match=r"map.png' \(UnreadableScene: .*cannot be read"):
        segment(source, tmp_path / "map.tif", crop_size=512)
    assert np.array_equal(read(tmp_path / "map.tif")[0], truth(image)[0])


def test_bands_and_values_of_16_bits(tmp_path):
    image = random_image(20, 30)
    sixteen = np.stack([image[0] * 0, image[2], image[1], image[0]]).astype(np.uint16) * 10
    write_raster(tmp_path / "scene.tif", sixteen, **PLACE)
    segment(tmp_path / "scene.tif", tmp_path / "map.tif", bands=(4, 3, 2), scale=(0, 2550))
    assert np.array_equal(read(tmp_path / "map.tif")[0], truth(image)[0])
    own = Pixelwise()
    own.config.image_bands, own.config.image_scale = [4, 3, 2], [[0, 2550]]
    segment(tmp_path / "scene.tif", tmp_path / "own.tif", own)  # bands and scale from the configuration of the model
    assert np.array_equal(read(tmp_path / "own.tif"), read(tmp_path / "map.tif"))
    segment(tmp_path / "scene.tif", tmp_path / "percent.tif", bands=(4, 3, 2), scale="percentiles")
    with rasterio.open(tmp_path / "percent.tif") as raster:
        scale = json.loads(raster.tags()["CO2S_SCALE"])
    assert scale == np.percentile(sixteen[[3, 2, 1]].reshape(3, -1), (2, 98), axis=1).T.tolist()
    with pytest.raises(ValueError) as error:
        segment(tmp_path / "scene.tif", tmp_path / "no.tif", bands=(4, 3, 2))
    span = f"{sixteen[1:].min()} to {sixteen[1:].max()}"
    assert f"scene.tif has 4 bands of uint16, values {span}; expected 8-bit RGB." in str(error.value)
    assert str(error.value).endswith("Use `bands=(4, 3, 2)` and `scale='percentiles'`.")


def test_a_scene_read_at_another_ground_sampling_distance_has_a_map_in_its_own_pixels(tmp_path):
    coarse = random_image(20, 30)
    fine = np.kron(coarse, np.ones((1, 4, 4), dtype=np.uint8))  # of 0.5 / 0.9996 m on the ground
    fine[:, :9, :9] = 0
    write_raster(tmp_path / "scene.tif", fine, **PLACE, nodata=0)
    labels = truth(coarse)[0]
    segment(tmp_path / "scene.tif", tmp_path / "fine.tif", resample_to=2.0, vector=".gpkg")
    found = read(tmp_path / "fine.tif")[0]
    assert np.array_equal(found == 255, (fine == 0).all(axis=0))  # exactly, in the pixels of the scene
    assert np.array_equal(found[12:, 12:], np.kron(labels[3:, 3:], np.ones((4, 4))))
    areas = pyogrio.raw.read(tmp_path / "fine.gpkg")[3][2]
    assert areas.sum() == pytest.approx((found != 255).sum() * 0.25 / 0.9996**2, rel=1e-5)
    with rasterio.open(tmp_path / "fine.tif") as raster:
        assert raster.transform == PLACE["transform"] and json.loads(raster.tags()["CO2S_GRID"]) == [20, 30]
    segment(tmp_path / "scene.tif", tmp_path / "finer.tif", resample_to=0.25)
    found = read(tmp_path / "finer.tif")[0]
    assert np.array_equal(found == 255, (fine == 0).all(axis=0))
    inner = np.zeros((4, 4), dtype=bool)
    inner[1:3, 1:3] = True  # pixels whose neighbours have the same values: bilinear resampling does not change them
    inner = np.kron(np.ones((17, 27), dtype=bool), inner)
    assert np.array_equal(found[12:, 12:][inner], np.kron(labels[3:, 3:], np.ones((4, 4)))[inner])
    with rasterio.open(tmp_path / "finer.tif") as raster:
        assert json.loads(raster.tags()["CO2S_GRID"]) == [160, 240]


def test_polygons_have_the_position_class_and_area_of_their_pixels(tmp_path):
    image = np.repeat(np.repeat(random_image(40, 30), 4, axis=1), 4, axis=2)
    write_raster(tmp_path / "scene.tif", image, **PLACE)
    found = segment(tmp_path / "scene.tif", tmp_path / "map.tif", vector=str(tmp_path / "objects.parquet"))
    labels = read(tmp_path / "map.tif")[0]
    segment(tmp_path / "scene.tif", tmp_path / "large.tif", vector=".gpkg", min_area_m2=20)
    large = pyogrio.raw.read(tmp_path / "large.gpkg")[3][2]
    table = parquet.read_table(tmp_path / "objects.parquet").to_pydict()
    areas = np.array(table["area_m2"])
    assert sorted(large) == pytest.approx(sorted(areas[areas >= 20])) and 0 < len(large) < len(areas)
    assert set(zip(table["class"], table["name"])) == {(0, "land"), (1, "road"), (2, "water")}
    for index in range(3):
        own = areas[np.array(table["class"]) == index].sum()
        assert own == pytest.approx(found.class_areas_m2[index])
        assert own == pytest.approx((labels == index).sum() * 0.25, rel=1e-3)
    middle = shapely.from_wkb(table["geometry"][0]).representative_point()
    with rasterio.open(tmp_path / "map.tif") as raster:
        assert next(raster.sample([(middle.x, middle.y)]))[0] == table["class"][0]


def test_maps_can_be_cloud_optimized(tmp_path):
    write_raster(tmp_path / "scene.tif", random_image(700, 600), **PLACE)
    segment(tmp_path / "scene.tif", tmp_path / "map.tif", crop_size=256, cog=True, save_confidence=True)
    for name in ("map.tif", "map_confidence.tif"):
        valid, errors, warnings = cog_validate(tmp_path / name)
        assert valid and not errors and not warnings
    with rasterio.open(tmp_path / "map.tif") as raster:
        assert raster.colormap(1)[1] == (255, 255, 0, 255) and raster.tags()["CLASS_1"] == "road"
        assert raster.nodata == 255 and np.array_equal(raster.read(1), truth(random_image(700, 600))[0])


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from helpers import make_model
from co2s_hf import Co2SImageProcessor
from co2s_hf.geo.scenes import segment_scene

model = make_model(crop_size=16)
predict, calls = model.student_logits, []

def student_logits(*args, **kwargs):
    calls.append(1)
    if len(calls) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return predict(*args, **kwargs)

model.student_logits = student_logits
image_processor = Co2SImageProcessor.from_model_config(model.config)
segment_scene(model, image_processor, {source!r}, {destination!r}, save_confidence=True, show_progress=False)
"""


@pytest.fixture
def one_thread():
    """Use one thread, as the killed process: with several threads, sums may differ in the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_killed_run_is_continued_and_its_files_are_the_same_byte_by_byte(tmp_path, one_thread):
    write_raster(tmp_path / "scene.tif", random_image(90, 70), **PLACE)
    model, destination = make_model(crop_size=16), tmp_path / "map.tif"
    image_processor = Co2SImageProcessor.from_model_config(model.config)
    arguments = {"tests": str(TESTS), "source": str(tmp_path / "scene.tif")}
    code = KILLED.format(**arguments, destination=str(destination))
    killed = subprocess.run([sys.executable, "-c", code], env=environment() | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert killed.returncode == -signal.SIGKILL and not destination.exists()
    rows = json.loads((tmp_path / ".map.tif.unfinished" / "progress.json").read_text())["rows_done"]
    assert 0 < rows < 90
    run = partial(
        segment_scene, model, image_processor, tmp_path / "scene.tif", save_confidence=True, show_progress=False
    )
    with pytest.raises(UserFileExistsError, match="Continue them with `resume=True`"):
        run(destination)
    with pytest.raises(
        UserValueError, match=r"made with other settings: crop_size was 16, now 32; overlap_px was 3, now 6\."
    ):
        run(destination, resume=True, crop_size=32)
    run(destination, resume=True)
    run(tmp_path / "whole" / "map.tif")
    names = ["map.png", "map.tif", "map.tif.aux.xml", "map_confidence.tif"]
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / ".map.tif.unfinished").exists()
    with pytest.raises(UserFileExistsError, match=r"map.tif' exists already"):
        run(destination)
    assert run(destination, resume=True) is None  # complete
    with pytest.raises(UserFileExistsError, match="made with another blend"):
        run(destination, resume=True, blend="average")


def test_a_complete_map_must_have_all_requested_files(tmp_path):
    write_raster(tmp_path / "scene.tif", random_image(20, 20), **PLACE)
    run = partial(segment, tmp_path / "scene.tif", tmp_path / "map.tif", resume=True)
    run()
    (tmp_path / ".map.tif.unfinished").mkdir()  # of a run that was killed after the last rename
    assert run() is None and not (tmp_path / ".map.tif.unfinished").exists()
    with pytest.raises(UserFileExistsError, match=r"map.tif' is complete, but '.*map.gpkg' is missing"):
        run(vector=".gpkg")
    with pytest.raises(UserFileExistsError, match="made with another cog"):
        run(cog=True)
    (tmp_path / "mine.gpkg").write_text("precious")
    with pytest.raises(UserFileExistsError, match=r"mine.gpkg' exists already"):
        segment(tmp_path / "scene.tif", tmp_path / "new.tif", resume=True, vector=tmp_path / "mine.gpkg")
    assert (tmp_path / "mine.gpkg").read_text() == "precious"


def test_logits_that_are_not_finite_are_an_error(tmp_path):
    write_raster(tmp_path / "scene.tif", random_image(20, 20), **PLACE)
    broken = Pixelwise()
    broken.student_logits = lambda pixel_values, students: dict.fromkeys(students, pixel_values * np.nan)
    with pytest.raises(UserValueError, match="logits of the model are not finite"):
        segment(tmp_path / "scene.tif", tmp_path / "map.tif", broken)
    assert [path.name for path in tmp_path.iterdir()] == ["scene.tif"]


def truncated(folder):
    path = write_raster(
        folder / "scene.tif", random_image(300, 300), **PLACE, tiled=True, blockxsize=64, blockysize=64
    )
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def no_bands(folder):
    path = folder / "scene.pix"
    with rasterio.open(path, "w", driver="PCIDSK", count=0, dtype="uint8", height=4, width=5):
        return path


def text(folder):
    path = folder / "scene.tif"
    path.write_text("no raster")
    return path


BROKEN = {
    "truncated": (truncated, {}, UnreadableScene, r"scene.tif cannot be read: .*Expected a complete raster file"),
    "no raster": (text, {}, UnreadableScene, r"scene.tif cannot be read: .*not recognized"),
    "no bands": (no_bands, {}, UnreadableScene, r"scene.pix has no bands. Replace it"),
    "no crs": (
        lambda folder: write_raster(folder / "scene.tif", random_image(20, 20), transform=PLACE["transform"]),
        {}, UnreadableScene, r"scene.tif has no coordinate system.*rio edit-info --crs.*`images`",
    ),
    "no transform": (
        lambda folder: write_raster(folder / "scene.tif", random_image(20, 20), crs=PLACE["crs"]),
        {}, UnreadableScene, r"scene.tif has a coordinate system, but no transform, .*rio edit-info --transform",
    ),
    "four bands": (
        lambda folder: write_raster(folder / "scene.tif", random_image(20, 20, bands=5), **PLACE),
        {},
        UserValueError,
        r"scene.tif has 5 bands of uint8, .*expected 8-bit RGB. If .* use `bands=\(3, 2, 1\)`.$",
    ),
    "missing band": (
        lambda folder: write_raster(folder / "scene.tif", random_image(20, 20), **PLACE),
        {"bands": (4, 3, 2)}, UserValueError, r"\(red, green, blue\), .*there is no band 4. .*`bands=\(1, 2, 3\)`",
    ),
    "palette": (
        lambda folder: write_raster(folder / "scene.tif", random_image(9, 9, bands=1), **PLACE, photometric="palette"),
        {}, UnreadableScene, r"palette indices.*gdal_translate -expand rgb",
    ),
    "complex": (
        lambda folder: write_raster(folder / "scene.tif", random_image(20, 20, "complex64"), **PLACE),
        {}, UnreadableScene, r"complex numbers \(complex64\)",
    ),
    "no range": (
        lambda folder: write_raster(folder / "scene.tif", np.ones((3, 20, 20), dtype=np.uint16), **PLACE),
        {"scale": "percentiles"}, UserValueError, r"scene.tif: A band holds the value 1 almost everywhere",
    ),
    "missing": (lambda folder: folder / "scene.tif", {}, UnreadableScene, r"scene.tif cannot be read: .*No such file"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_scene_is_an_error_and_leaves_no_files(name, tmp_path):
    make, options, kind, message = BROKEN[name]
    (tmp_path / "in").mkdir()
    source = make(tmp_path / "in")
    with pytest.raises(kind, match=message):
        segment(source, tmp_path / "out" / "map.tif", save_confidence=True, **options)
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_wrong_destinations_and_options_are_refused_and_leave_no_files(tmp_path):
    source = write_raster(tmp_path / "scene.tif", random_image(20, 20), **PLACE)
    content = source.read_bytes()
    (tmp_path / "link.tif").symlink_to(source)
    for destination in (source, tmp_path / "link.tif"):
        with pytest.raises(UserValueError, match="is the scene itself"):
            segment(source, destination, resume=True)
    with pytest.raises(UserOSError, match=r"'/proc/maps"):
        segment(source, "/proc/maps/map.tif")
    with pytest.raises(UserValueError, match=r"'.*map.png'; expected a name that ends in .tif"):
        segment(source, tmp_path / "map.png")
    (tmp_path / "folder.tif").mkdir()
    with pytest.raises(UserOSError, match=r"folder.tif' is a folder; expected the name of a file"):
        segment(source, tmp_path / "folder.tif")
    with pytest.raises(UserValueError, match=r"`vector` is 'map.shp'; expected a file that ends in .gpkg, .geojson"):
        segment(source, tmp_path / "map.tif", vector="map.shp")
    wrong = {
        "`overlap_px` is 16; expected 0 to 15": {"overlap_px": 16},
        "`blend` is 'soft'; expected smooth or average": {"blend": "soft"},
        "`crop_size` is 0": {"crop_size": 0},
        r"`scale` is \(\(5, 5\),\); expected .*one \(low, high\) pair": {"scale": ((5, 5),)},
        r"`scale` is 'percentile'; .* or `scale='percentiles'`": {"scale": "percentile"},
        r"there is no band 0. .* Use `bands=\(1, 2, 3\)`": {"bands": (0, 1, 2)},
    }
    for message, options in wrong.items():
        with pytest.raises(UserValueError, match=message):
            segment(source, tmp_path / "map.tif", **options)
    assert source.read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.tif", "link.tif", "scene.tif"]


@pytest.mark.parametrize(("limit", "rows_are_kept"), [(3_000, False), (20_000, True)])
def test_a_full_disk_is_an_error_and_finished_rows_are_kept(limit, rows_are_kept, tmp_path, caplog):
    """Without space for the rows, the run fails at the start. Without space for the picture, the rows are kept."""
    source, destination = tmp_path / "scene.tif", tmp_path / "out" / "map.tif"
    write_raster(source, random_image(100, 100), **PLACE)
    with no_file_larger_than(limit), pytest.raises(UserOSError, match=r"map\.(tif|png)"):
        segment(source, destination)
    left = sorted(path.name for path in destination.parent.iterdir())
    assert left == ([".map.tif.unfinished", "map.tif", "map.tif.aux.xml"] if rows_are_kept else [])
    assert ("finished rows are kept in" in caplog.text) == rows_are_kept
    segment(source, destination, resume=True)
    assert sorted(path.name for path in destination.parent.iterdir()) == ["map.png", "map.tif", "map.tif.aux.xml"]
    assert np.array_equal(read(destination)[0], truth(random_image(100, 100))[0])


def test_memory_does_not_grow_with_the_height(tmp_path):
    peaks = []
    for height in (512, 12_288):
        profile = {"driver": "GTiff", "count": 3, "height": height, "width": 2048, "dtype": "uint8", "tiled": True}
        with rasterio.open(tmp_path / "scene.tif", "w", **profile, **PLACE) as raster:
            for top in range(0, height, 512):
                raster.write(random_image(512, 2048), window=Window(0, top, 2048, 512))
        code = f"""
            import sys, torch
            sys.path.insert(0, {str(TESTS)!r})
            from helpers import Pixelwise
            from co2s_hf import Co2SImageProcessor
            from co2s_hf.geo.rasters import GDAL_OPTIONS
            from co2s_hf.geo.scenes import segment_scene
            from co2s_hf.utils.measuring import peak_memory_gb
            GDAL_OPTIONS["GDAL_CACHEMAX"] = 8 * 2**20  # the tall scene would fill the cache, the low one would not
            segment_scene(
                Pixelwise(), Co2SImageProcessor(), {str(tmp_path / "scene.tif")!r},
                {str(tmp_path / f"{height}.tif")!r}, crop_size=256, show_progress=False,
            )
            print(peak_memory_gb(torch.device("cpu")))
        """
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert run.returncode == 0, run.stderr
        peaks.append(float(run.stdout))
    assert peaks[1] - peaks[0] < 0.04  # GB, less than half of the tall scene


def test_web_addresses_and_mosaics_are_scenes(tmp_path):
    image = random_image(60, 80)
    (tmp_path / "web").mkdir()
    write_raster(tmp_path / "web" / "scene.tif", image, **PLACE)
    command = [sys.executable, str(TESTS / "range_server.py"), str(tmp_path / "web")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            segment(f"http://127.0.0.1:{int(server.stdout.readline())}/scene.tif", tmp_path / "map.tif")
        finally:
            server.kill()
    assert np.array_equal(read(tmp_path / "map.tif")[0], truth(image)[0])
    write_mosaic(tmp_path / "mosaic.vrt", 80, 60, {"web/scene.tif": ((20, 0, 60, 60), (0, 0))})
    segment(tmp_path / "mosaic.vrt", tmp_path / "mosaic.tif")
    assert np.array_equal(read(tmp_path / "mosaic.tif")[0, :60], truth(image[:, :, 20:])[0])


@pytest.fixture
def three_scenes(tmp_path):
    """Make a folder with scenes of three sizes, one of them without georeferencing, and a trained model."""
    save_checkpoint(tmp_path / "model", crop_size=16)
    (tmp_path / "scenes" / "north").mkdir(parents=True)
    write_raster(tmp_path / "scenes" / "a.tif", random_image(20, 33), **PLACE)
    write_raster(tmp_path / "scenes" / "north" / "b.tif", random_image(30, 24), **PLACE)
    write_raster(tmp_path / "scenes" / "c.tif", random_image(18, 18))
    return tmp_path


def test_processes_share_scenes_and_a_scene_that_fails_does_not_stop_the_others(three_scenes):
    words = ("predict", three_scenes / "scenes", "--checkpoint", three_scenes / "model")
    words += ("--output", three_scenes / "maps", "--use_cpu", "--resume", "--vector", ".gpkg")
    run = run_subprocess(*words, launcher=TWO_PROCESSES)
    assert run.returncode != 0 and "2 of 3 maps are in" in run.stdout
    assert run.stderr.count("c.tif has no coordinate system") == 1
    maps = sorted(str(path.relative_to(three_scenes / "maps")) for path in (three_scenes / "maps").rglob("*.*"))
    endings = (".gpkg", ".png", ".tif", ".tif.aux.xml")
    assert maps == [*(f"a{ending}" for ending in endings), *(f"north/b{ending}" for ending in endings)]
    before = (three_scenes / "maps" / "a.tif").stat().st_mtime_ns
    write_raster(three_scenes / "scenes" / "c.tif", random_image(18, 18), **PLACE)
    again = run_command(*words)
    assert again.returncode == 0 and "3 of 3 maps are in" in again.stdout
    assert (three_scenes / "maps" / "a.tif").stat().st_mtime_ns == before  # not made again
    whole = run_command(
        "predict", three_scenes / "scenes" / "a.tif", *words[2:4], "--output", three_scenes / "one.tif"
    )
    assert whole.returncode == 0, whole.stderr
    assert np.array_equal(read(three_scenes / "one.tif"), read(three_scenes / "maps" / "a.tif"))
