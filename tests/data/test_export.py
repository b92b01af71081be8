import io
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from helpers import open_folder
from PIL import Image

from co2s_hf.data.export import check_tiles, description, prepared, tile_boxes
from co2s_hf.data.options import DataOptions
from co2s_hf.data.reading import LabelRule
from co2s_hf.data.samples import FEATURES, Samples
from co2s_hf.data.sources import open_source
from co2s_hf.utils.errors import UserError


def test_files_without_a_rule_keep_their_bytes(scenes_folder, tmp_path):
    source = open_folder(scenes_folder)
    splits = prepared(source, cache_dir=tmp_path)
    assert {name: len(table) for name, table in splits.items()} == {"labeled": 3, "unlabeled": 5, "validation": 2}
    raw = splits["labeled"].with_format("arrow")[:]
    for n, sample in enumerate(source.labeled):
        assert raw["image"][n]["bytes"].as_py() == sample.image.read_bytes()
        assert raw["label"][n]["bytes"].as_py() == sample.label.read_bytes()
    assert splits["validation"][0]["image"].size == (48, 48)
    facts = description(source)
    assert facts["ignore_index"] == 255 and facts["classes"][5]["name"] == "water"
    assert facts["classes"][5]["color"] == source.palette[5] and "lake" in facts["classes"][5]["concepts"]


def test_rules_are_applied_to_the_exported_files(scenes_folder, tmp_path):
    label_map = {0: 1, 1: 1, 2: 1, 3: 0, 4: 0, 5: 0}
    source = open_folder(scenes_folder, label_map=label_map, bands=(3, 2, 1), class_names=["soft", "hard"])
    splits = prepared(source, cache_dir=tmp_path / "cache")
    splits.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "classes.json").write_text(json.dumps(description(source)), encoding="utf-8")
    again = open_source(DataOptions(dataset_name=str(tmp_path / "saved")))
    assert again.id2label == {0: "soft", 1: "hard"}
    for ours, theirs in zip(source.validation, again.validation):
        assert np.array_equal(np.asarray(ours.load_image()), np.asarray(theirs.load_image()))
        assert np.array_equal(np.asarray(ours.load_label()), np.asarray(theirs.load_label()))


def test_the_description_says_how_raw_images_were_read(scenes_folder, tmp_path):
    source = open_folder(scenes_folder)
    assert description(source).keys() == {"classes", "ignore_index"}
    source = open_folder(scenes_folder, bands=(3, 2, 1), scale=((0, 128), (0, 255), (0, 255)))
    assert description(source).keys() == {"classes", "ignore_index", "converted_from"}
    source = replace(source, ground_sampling_distance_m=0.3)
    facts = description(source)
    assert facts["ground_sampling_distance_m"] == 0.3
    assert facts["converted_from"] == {"bands": [3, 2, 1], "scale": [[0, 128], [0, 255], [0, 255]]}
    prepared(source, cache_dir=tmp_path / "cache").save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "classes.json").write_text(json.dumps(facts), encoding="utf-8")
    again = open_source(DataOptions(dataset_name=str(tmp_path / "saved")))
    assert np.array_equal(np.asarray(again.labeled[0].load_image()), np.asarray(source.labeled[0].load_image()))
    assert description(again) == facts  # prepared a second time


def test_tiles_cover_the_image_and_overlap():
    boxes = tile_boxes((100, 40), 48, 8)
    assert boxes == [(0, 0, 48, 40), (40, 0, 88, 40), (52, 0, 100, 40)]
    assert tile_boxes((30, 30), 48, 8) == [(0, 0, 30, 30)]
    assert tile_boxes((96, 48), 48, 0) == [(0, 0, 48, 48), (48, 0, 96, 48)]


def test_images_are_cut_with_their_labels(scenes_folder, tmp_path):
    source = open_folder(scenes_folder)
    splits = prepared(source, tile_size=32, tile_overlap=8, cache_dir=tmp_path)
    assert len(splits["labeled"]) == 3 * 4
    whole = np.asarray(source.labeled[1].load_image())
    mask = np.asarray(source.labeled[1].load_label())
    for row, (upper, left) in zip(splits["labeled"].select(range(4, 8)), [(0, 0), (0, 16), (16, 0), (16, 16)]):
        assert np.array_equal(np.asarray(row["image"]), whole[upper : upper + 32, left : left + 32])
        assert np.array_equal(np.asarray(row["label"]), mask[upper : upper + 32, left : left + 32])
    with pytest.raises(UserError, match=r"`tile_overlap` is 32; expected .* less than `tile_size`, which is 32"):
        prepared(source, tile_size=32, tile_overlap=32)


def test_grey_images_stay_grey(tmp_path):
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    for n in range(4):
        Image.new("L", (16, 16), 50 * n).save(tmp_path / "images" / f"{n}.png")
        Image.new("L", (16, 16), n % 2).save(tmp_path / "labels" / f"{n}.png")
    source = open_folder(tmp_path, labeled_fraction=0.5, validation_fraction=0.25)
    splits = prepared(source, cache_dir=tmp_path / "cache")
    image = splits["labeled"][0]["image"]
    assert image.mode == "L"
    assert np.asarray(image).tolist() == np.asarray(Image.open(source.labeled[0].image.path)).tolist()


def test_an_overlap_needs_a_tile_size():
    with pytest.raises(ValueError, match="`tile_overlap` is 8; it goes with `tile_size`"):
        check_tiles(None, 8)


@pytest.mark.parametrize(
    ("original", "kept", "converted"),
    [
        (None, "", ""),
        ("../../a.tif", "a.tif", "a.png"),
        (r"..\..\a.tif", "a.tif", "a.png"),
        ("..", "", ""),
        ("a\nb\0.tif", "a_b_.tif", "a_b_.png"),
    ],
)
def test_names_of_rows_are_exported_without_folders(original, kept, converted, tmp_path):
    """The original names in a data set may come from anywhere. A later program may write files of these names."""
    stream = io.BytesIO()
    Image.new("L", (4, 4)).save(stream, format="PNG")
    cell = {"bytes": stream.getvalue(), "path": original}
    table = Dataset.from_dict({"image": [cell], "label": [cell], "row": ["train[0]"]}, features=FEATURES)
    samples = Samples(table, label_rule=LabelRule(label_map=((0, 0, 1),)))
    source = SimpleNamespace(labeled=samples, unlabeled=samples, validation=samples)
    (row,) = prepared(source, cache_dir=tmp_path)["labeled"].with_format("arrow")[:].to_pylist()
    assert (row["image"]["path"] or "", row["label"]["path"] or "") == (kept, converted)
    assert np.asarray(Image.open(io.BytesIO(row["label"]["bytes"]))).tolist() == [[1] * 4] * 4
