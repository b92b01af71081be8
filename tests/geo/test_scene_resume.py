"""What a resumed scene may have different, what it may not, and that nothing of others is overwritten."""

import json
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pyogrio
import pytest
import rasterio
import torch
from helpers import PLACE, Pixelwise, make_model, no_file_larger_than, write_raster
from kills import count_operations

from co2s_hf import Co2SImageProcessor
from co2s_hf.geo.rasters import UnreadableScene
from co2s_hf.geo.scenes import segment_scene
from co2s_hf.utils.errors import UserFileExistsError, UserFileNotFoundError, UserOSError, UserValueError


TESTS = Path(__file__).parents[1]
IMAGE_PROCESSOR = Co2SImageProcessor()
SCORES = {"save_probabilities": True, "score_dtype": "float32"}


def random_image(height, width):
    return np.random.default_rng(height * width).integers(1, 256, (3, height, width)).astype("uint8")


def read(path):
    with rasterio.open(path) as raster:
        return raster.read()


def runs_of(path):
    """Return the tag of a map that says which rows were made on which device and in which batches."""
    with rasterio.open(path) as raster:
        return json.loads(raster.tags()["CO2S_RUNS"])


def failing_at(model, call, act):
    """Let a model do something at the given forward pass, counted from 1."""
    predict, calls = model.student_logits, []

    def student_logits(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            act()
        return predict(*args, **kwargs)

    model.student_logits = student_logits
    return model


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.fixture
def scene(tmp_path):
    """A scene of 90 x 70 px, which has 7 rows of 6 windows."""
    return write_raster(tmp_path / "scene.tif", random_image(90, 70), **PLACE)


@pytest.fixture
def segment(scene):
    return partial(segment_scene, image_processor=IMAGE_PROCESSOR, source=scene, show_progress=False)


@pytest.fixture
def interrupted(tmp_path, segment):
    """A map with some finished rows. The device ran out of memory in the third row of windows."""
    with pytest.raises(torch.OutOfMemoryError):
        segment(failing_at(make_model(crop_size=16), 8, out_of_memory), destination=tmp_path / "map.tif", **SCORES)
    return tmp_path / "map.tif"


def progress_of(destination):
    return destination.with_name(f".{destination.name}.unfinished") / "progress.json"


def test_rows_are_continued_with_smaller_batches(interrupted, segment, tmp_path, caplog):
    """On a CPU, too, the values of two batch sizes differ by rounding. Rows from before the interruption stay."""
    assert "resume=True` and fewer `windows_per_batch`" in caplog.get_records("setup")[-1].getMessage()
    segment(make_model(crop_size=16), destination=tmp_path / "whole.tif", **SCORES)
    segment(make_model(crop_size=16), destination=interrupted, resume=True, windows_per_batch=1, **SCORES)
    assert "rows of" in caplog.text and "made with device cpu, windows_per_batch 4, the others" in caplog.text
    first, second = runs_of(interrupted)
    assert first == {"from_row": 0, "device": "cpu", "windows_per_batch": 4}
    assert second == {"from_row": second["from_row"], "device": "cpu", "windows_per_batch": 1}
    done = second["from_row"]
    assert 0 < done < 90 and runs_of(tmp_path / "whole.tif") == [first]
    found, expected = read(tmp_path / "map_probabilities.tif"), read(tmp_path / "whole_probabilities.tif")
    assert np.array_equal(found[:, :done], expected[:, :done])
    np.testing.assert_allclose(found, expected, atol=2e-6)
    second_best, best = np.sort(expected, axis=0)[1:]
    is_clear = best - second_best > 1e-5  # no tie, which rounding could decide
    labels, expected = read(interrupted)[0], read(tmp_path / "whole.tif")[0]
    assert is_clear.mean() > 0.99 and np.array_equal(labels[is_clear], expected[is_clear])
    assert len(np.unique(expected)) > 1


def test_a_map_lists_the_devices_of_its_rows(interrupted, segment, caplog):
    path = progress_of(interrupted)
    progress = json.loads(path.read_text())
    progress["runs"][0]["device"] = "cuda"
    path.write_text(json.dumps(progress))
    segment(make_model(crop_size=16), destination=interrupted, resume=True, **SCORES)
    assert "made with device cuda, windows_per_batch 4, the others are made with device cpu, windows_p" in caplog.text
    assert [(run["from_row"], run["device"]) for run in runs_of(interrupted)] == [
        (0, "cuda"),
        (progress["rows_done"], "cpu"),
    ]


def test_a_complete_map_of_another_device_or_batch_size_stays(segment, tmp_path):
    destination = tmp_path / "map.tif"
    segment(make_model(crop_size=16), destination=destination)
    with rasterio.open(destination, "r+") as raster:  # as an earlier version wrote them
        model = json.loads(raster.tags()["CO2S_MODEL"]) | {"device": "cuda"}
        raster.update_tags(CO2S_MODEL=json.dumps(model), CO2S_WINDOWS_PER_BATCH="4")
    content = destination.read_bytes()
    assert segment(make_model(crop_size=16), destination=destination, resume=True, windows_per_batch=1) is None
    assert destination.read_bytes() == content


def test_another_precision_or_another_model_is_refused(interrupted, segment):
    with pytest.raises(UserValueError, match=r"model\.dtype was torch\.float32, now torch\.bfloat16"):
        segment(make_model(crop_size=16).bfloat16(), destination=interrupted, resume=True, **SCORES)
    message = (
        r"model\.dtype was torch\.float32, now torch\.float32 with autocast to torch\.bfloat16\. Use the previous"
    )
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UserValueError, match=message):
        segment(make_model(crop_size=16), destination=interrupted, resume=True, **SCORES)
    with pytest.raises(UserValueError, match=r"other settings: model\.weights was \w+, now \w+\. Use the previous"):
        segment(make_model(seed=1, crop_size=16), destination=interrupted, resume=True, **SCORES)


def test_files_that_are_made_from_the_rows_may_be_requested_later(interrupted, segment, tmp_path):
    options = SCORES | {"save_confidence": True, "vector": ".gpkg", "min_area_m2": 2.0, "cog": True}
    segment(make_model(crop_size=16), destination=interrupted, resume=True, **options)
    segment(make_model(crop_size=16), destination=tmp_path / "whole.tif", **options)
    for ending in (".tif", "_confidence.tif", "_probabilities.tif", ".png", ".tif.aux.xml"):
        assert (tmp_path / f"map{ending}").read_bytes() == (tmp_path / f"whole{ending}").read_bytes()
    found, expected = (pyogrio.raw.read(tmp_path / f"{name}.gpkg") for name in ("map", "whole"))
    assert list(found[2]) == list(expected[2])
    assert [list(column) for column in found[3]] == [list(column) for column in expected[3]]


def test_a_complete_map_has_the_requested_files(segment, tmp_path):
    destination, model = tmp_path / "map.tif", Pixelwise()
    segment(model, destination=destination, save_probabilities=True, vector=".gpkg", min_area_m2=2.0)
    assert segment(model, destination=destination, resume=True) is None  # fewer files are requested
    with pytest.raises(UserFileExistsError, match=r"made with another min_area_m2 \(2.0, now 0.0\)"):
        segment(model, destination=destination, resume=True, vector=".gpkg")
    with pytest.raises(UserFileExistsError, match=r"map_confidence.tif' is missing. The finished rows.* are gone"):
        segment(model, destination=destination, resume=True, save_confidence=True)
    model.config.id2label = {0: "land", 1: "path", 2: "water"}
    with pytest.raises(UserFileExistsError, match="made with another class_names"):
        segment(model, destination=destination, resume=True)


def test_what_stands_at_the_place_of_a_map_must_be_a_map(scene, segment, tmp_path):
    for name in ("map.png", "map.tif.aux.xml"):
        (tmp_path / name).touch()
    (tmp_path / "map.tif").write_bytes(scene.read_bytes())
    with pytest.raises(UserFileExistsError, match=r"map.tif' exists, and is no map of this package. Remove it"):
        segment(Pixelwise(), destination=tmp_path / "map.tif", resume=True)
    (tmp_path / "map.tif").write_bytes(b"II*")
    with pytest.raises(UserOSError, match=r"map.tif' exists, but cannot be read"):
        segment(Pixelwise(), destination=tmp_path / "map.tif", resume=True)


def test_a_resumed_run_overwrites_no_file_of_others(interrupted, segment, tmp_path):
    run = partial(segment, make_model(crop_size=16), destination=interrupted, resume=True, **SCORES)
    for name in ("mine.gpkg", "map.png"):
        (tmp_path / name).write_text("precious")
        with pytest.raises(UserFileExistsError, match=f"{name}' exists already"):
            run(vector=tmp_path / "mine.gpkg")
        assert (tmp_path / name).read_text() == "precious"
        (tmp_path / name).unlink()
    run(vector=tmp_path / "mine.gpkg")
    assert read(interrupted).shape == (1, 90, 70) and (tmp_path / "mine.gpkg").exists()


def test_a_file_that_appears_during_the_prediction_is_not_overwritten(segment, tmp_path):
    picture, destination = tmp_path / "map.png", tmp_path / "map.tif"
    model = failing_at(Pixelwise(), 3, lambda: picture.write_text("precious"))
    with pytest.raises(UserFileExistsError, match=r"map.png' exists already"):
        segment(model, destination=destination, vector=".gpkg")
    assert picture.read_text() == "precious"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".map.tif.unfinished", "map.png", "scene.tif"]
    picture.unlink()
    segment(Pixelwise(), destination=destination, vector=".gpkg", resume=True)
    assert destination.exists()


def write_mosaic(path, *parts):
    """Write a VRT of parts, one below the other. Each is (file name, height)."""
    height, bands = sum(rows for _, rows in parts), ""
    for band in (1, 2, 3):
        top, bands = 0, bands + f'<VRTRasterBand dataType="Byte" band="{band}">'
        for name, rows in parts:
            bands += f"""<SimpleSource><SourceFilename relativeToVRT="1">{name}</SourceFilename>
                <SourceBand>{band}</SourceBand><SrcRect xOff="0" yOff="0" xSize="40" ySize="{rows}"/>
                <DstRect xOff="0" yOff="{top}" xSize="40" ySize="{rows}"/></SimpleSource>"""
            top += rows
        bands += "</VRTRasterBand>"
    path.write_text(
        f"""<VRTDataset rasterXSize="40" rasterYSize="{height}"><SRS>EPSG:32640</SRS>
        <GeoTransform>500000, 0.5, 0, 2780000, 0, -0.5</GeoTransform>{bands}</VRTDataset>""",
        encoding="utf-8",
    )
    return path


def test_a_part_of_a_mosaic_that_was_replaced_is_noticed(tmp_path):
    for name in ("upper.tif", "lower.tif"):
        write_raster(tmp_path / name, random_image(40, 40), **PLACE)
    write_mosaic(tmp_path / "inner.vrt", ("upper.tif", 40), ("lower.tif", 40))
    source = write_mosaic(tmp_path / "scene.vrt", ("inner.vrt", 80))
    run = partial(segment_scene, image_processor=IMAGE_PROCESSOR, source=source, show_progress=False)
    with pytest.raises(torch.OutOfMemoryError):
        run(failing_at(Pixelwise(), 5, out_of_memory), destination=tmp_path / "map.tif")
    run(Pixelwise(), destination=tmp_path / "whole.tif")
    write_raster(tmp_path / "lower.tif", random_image(40, 40) // 2, **PLACE)
    with pytest.raises(UserValueError, match=r"'lower.tif' has changed since the rows in .* were made"):
        run(Pixelwise(), destination=tmp_path / "map.tif", resume=True)
    with pytest.raises(UserFileExistsError, match=r"whole.tif' exists and was made with another scene_parts"):
        run(Pixelwise(), destination=tmp_path / "whole.tif", resume=True)


@pytest.fixture
def mosaic(tmp_path):
    """A mosaic of upper.tif and lower.tif, while another mosaic is open in this process.

    GDAL then remembers files that it could not open, and reads zeros from them without an error.
    """
    for name in ("upper.tif", "lower.tif"):
        write_raster(tmp_path / name, random_image(100, 40), **PLACE)
    with rasterio.open(write_mosaic(tmp_path / "other.vrt", ("upper.tif", 100))) as other:
        other.read()
        yield write_mosaic(tmp_path / "scene.vrt", ("upper.tif", 100), ("lower.tif", 100))


def test_a_mosaic_with_a_missing_file_is_refused_at_the_start(mosaic, tmp_path):
    run = partial(segment_scene, Pixelwise(), IMAGE_PROCESSOR, mosaic, tmp_path / "map.tif", show_progress=False)
    (tmp_path / "lower.tif").rename(tmp_path / "away.tif")
    for _ in range(2):
        with pytest.raises(UserFileNotFoundError, match=r"cannot be read: its part '.*lower.tif' is missing"):
            run()
    assert not (tmp_path / ".map.tif.unfinished").exists()
    (tmp_path / "away.tif").rename(tmp_path / "lower.tif")
    run()
    labels = read(tmp_path / "map.tif")[0]
    assert np.array_equal(labels[:100], labels[100:]) and len(np.unique(labels)) == 3


def test_a_mosaic_that_loses_a_file_keeps_its_rows_and_is_not_read_again_in_the_same_process(mosaic, tmp_path):
    lower, away = tmp_path / "lower.tif", tmp_path / "away.tif"
    options = {"source": mosaic, "image_processor": IMAGE_PROCESSOR, "show_progress": False, "windows_per_batch": 1}
    run, destination = partial(segment_scene, **options), tmp_path / "map.tif"
    with pytest.raises(AssertionError, match=r"UnreadableScene: .*scene.vrt cannot be read: .*lower.tif: No such"):
        count_operations(  # in a child
            lambda: run(failing_at(Pixelwise(), 1, lambda: lower.rename(away)), destination=destination), tmp_path
        )
    assert 0 < json.loads(progress_of(destination).read_text())["rows_done"] < 200
    away.rename(lower)
    run(Pixelwise(), destination=destination, resume=True)
    labels = read(destination)[0]
    assert np.array_equal(labels[:100], labels[100:]) and len(np.unique(labels)) == 3
    other = tmp_path / "other.tif"
    with pytest.raises(UnreadableScene, match=r"lower.tif: No such file"):
        run(failing_at(Pixelwise(), 1, lambda: lower.rename(away)), destination=other)
    away.rename(lower)
    for source in (mosaic, write_mosaic(tmp_path / "another.vrt", ("lower.tif", 100))):
        with pytest.raises(UnreadableScene, match=r"could not be read before, and GDAL may read zeros .* Start a new"):
            run(Pixelwise(), source=source, destination=other, resume=True)
    with pytest.raises(UserFileExistsError):  # upper.tif could be read
        run(Pixelwise(), source=tmp_path / "other.vrt", destination=destination)


def test_an_address_with_a_new_signature_is_the_same_scene_and_one_with_other_pixels_is_not(tmp_path):
    (tmp_path / "web").mkdir()
    source = write_raster(tmp_path / "web" / "scene.tif", random_image(90, 70), **PLACE)
    run = partial(
        segment_scene, image_processor=IMAGE_PROCESSOR, destination=tmp_path / "map.tif", show_progress=False
    )
    command = [sys.executable, str(TESTS / "range_server.py"), str(tmp_path / "web")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            address = f"http://127.0.0.1:{int(server.stdout.readline())}/scene.tif?signature="
            with pytest.raises(torch.OutOfMemoryError):
                run(failing_at(Pixelwise(), 5, out_of_memory), source=f"{address}1")
            run(Pixelwise(), source=f"{address}2", resume=True)
            assert run(Pixelwise(), source=f"{address}3", resume=True) is None
            write_raster(source, 255 - random_image(90, 70), **PLACE)
            with pytest.raises(UserFileExistsError, match="made with another scene_sample"):
                run(Pixelwise(), source=f"{address}4", resume=True)
        finally:
            server.kill()
    with rasterio.open(tmp_path / "map.tif") as raster:
        assert json.loads(raster.tags()["CO2S_SCENE"]) == {"name": "scene.tif"}


def test_a_link_in_place_of_the_folder_of_the_rows_is_not_followed(interrupted, segment, tmp_path):
    """Whoever sends a folder with maps may have put links into it."""
    folder, elsewhere = progress_of(interrupted).parent, tmp_path / "elsewhere"
    folder.rename(elsewhere)
    (elsewhere / "precious.txt").write_text("precious")
    folder.symlink_to(elsewhere)
    (tmp_path / ".abcd1234.co2s").symlink_to(elsewhere)  # the name of a folder that killed runs leave
    before = {path.name: path.read_bytes() for path in elsewhere.iterdir()}
    for resume in (False, True):
        with pytest.raises(UserOSError, match=r"\.map\.tif\.unfinished' is a link or a file; .*Remove it"):
            segment(make_model(crop_size=16), destination=interrupted, resume=resume, **SCORES)
    folder.unlink()
    segment(make_model(crop_size=16), destination=interrupted, **SCORES)
    folder.symlink_to(elsewhere)
    assert segment(make_model(crop_size=16), destination=interrupted, resume=True, **SCORES) is None
    assert folder.is_symlink() and {path.name: path.read_bytes() for path in elsewhere.iterdir()} == before


def test_a_disk_that_gets_full_keeps_the_rows_and_the_maps_before(segment, tmp_path):
    """First the polygons do not fit, then the rows. No half of a file is left, and resuming completes the map."""
    run = partial(segment, Pixelwise(), vector=".gpkg", save_confidence=True)
    run(destination=tmp_path / "first.tif")
    before = {path: path.read_bytes() for path in tmp_path.glob("first*")}
    limit = (tmp_path / "first.gpkg").stat().st_size // 2
    assert all(limit > len(content) for path, content in before.items() if path.suffix == ".tif")
    with no_file_larger_than(limit), pytest.raises(UserOSError, match=r"map.gpkg' .*Is the disk full\?"):
        run(destination=tmp_path / "map.tif")
    left = {path.name for path in tmp_path.iterdir()} - {path.name for path in before}
    maps = {"map.tif", "map.png", "map.tif.aux.xml", "map_confidence.tif"}
    assert left == {".map.tif.unfinished", "scene.tif"} | maps
    run(destination=tmp_path / "map.tif", resume=True)
    with ExitStack() as stack:
        full = failing_at(Pixelwise(), 8, lambda: stack.enter_context(no_file_larger_than(100)))
        with pytest.raises(UserOSError, match=r"cannot be read or written: File too large. Free some space"):
            segment(full, destination=tmp_path / "rows.tif", vector=".gpkg", save_confidence=True)
    assert 0 < json.loads(progress_of(tmp_path / "rows.tif").read_text())["rows_done"] < 90
    run(destination=tmp_path / "rows.tif", resume=True)
    for name in ("map", "rows"):
        for ending in (".tif", "_confidence.tif", ".png", ".tif.aux.xml"):
            assert (tmp_path / f"{name}{ending}").read_bytes() == before[tmp_path / f"first{ending}"]
    assert {path: path.read_bytes() for path in tmp_path.glob("first*")} == before
