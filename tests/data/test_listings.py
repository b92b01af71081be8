import shutil
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, concatenate_datasets
from datasets import Image as ImageColumn
from helpers import open_folder
from PIL import Image

from co2s_hf.data.listings import ClassDescription, read_classes
from co2s_hf.data.options import DataOptions
from co2s_hf.data.reading import ImageRule
from co2s_hf.data.sources import Source, open_source
from co2s_hf.data.splits import SPLITS
from co2s_hf.utils.errors import UserError


def sizes(source: Source) -> list[int]:
    return [len(part) for part in (source.labeled, source.unlabeled, source.validation)]


def test_scenes_must_have_been_drawn():
    with pytest.raises(UserError, match="Name the folder of scenes that were drawn before: `data_dir='outputs/sc"):
        open_source(DataOptions(data="drawn"))


# --- classes.json


def test_classes_are_read_with_what_belongs_to_them(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text(
        '{"ignore_index": 9, "classes": [{"name": "sea_ice", "color": [1, 2, 3]}, '
        '{"name": "cloud", "color": [4, 4, 4], "ignore": true}, '
        '{"name": "été", "color": [7, 8, 9], "concepts": ["été", "summer"]}]}',
        encoding="utf-8",
    )
    found = read_classes(path)
    assert found.names == ["sea_ice", "été"] and found.palette == [[1, 2, 3], [7, 8, 9]]
    assert found.concepts == {"sea_ice": ["sea ice"], "été": ["été", "summer"]}
    assert found.ignore_colors == ((4, 4, 4),) and found.ignore_index == 9
    renamed = found.renamed(["été", "new"])
    assert renamed.concepts == {"été": ["été", "summer"], "new": ["new"]} and renamed.palette is None
    assert ClassDescription().concepts is None


def test_facts_about_the_images_are_read(tmp_path):
    path = tmp_path / "classes.json"
    facts = '"ground_sampling_distance_m": 2, "converted_from": {"bands": [4, 3, 2], "scale": [[0, 3000]]}, "by": 1'
    path.write_text(f'{{"classes": [{{"name": "a"}}, {{"name": "b"}}], {facts}}}', encoding="utf-8")
    found = read_classes(path)
    assert found.ground_sampling_distance_m == 2 and found.converted_from == ImageRule((4, 3, 2), ((0, 3000),))
    renamed = found.renamed(["c", "a"])
    assert renamed.names == ["c", "a"] and renamed.converted_from == found.converted_from
    assert renamed.ground_sampling_distance_m == 2
    for text, rule in (
        ('{"bands": [3, 2, 1]}', ImageRule((3, 2, 1))),
        ('{"scale": [[0, 9], [1, 9], [2, 9]]}', ImageRule(None, ((0, 9), (1, 9), (2, 9)))),
    ):
        path.write_text(f'{{"classes": [], "converted_from": {text}}}', encoding="utf-8")
        assert read_classes(path).converted_from == rule
    path.write_text('[{"name": "a"}]', encoding="utf-8")
    assert (read_classes(path).converted_from, read_classes(path).ground_sampling_distance_m) == (None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"color": [0, 0, 0]}]', r"classes.json must be a list in label order, with a name for every class"),
        ('[{"name": "water", "color": "#00f"}]', r"classes.json gives 'water' the color #00f; expected three numbers"),
        ('[{"name": "water"}, {"name": "water"}]', r"classes.json gives the name water to two classes"),
        ('[{"name": "a", "color": [1, 1, 1]}, {"name": "b", "color": [1, 1, 1]}]', r"gives the color \[1, 1, 1\] to"),
        ('[{"name": "water", "concepts": "lake"}]', r"gives 'water' the concepts lake; expected a list of words"),
        ('{"classes": [{"name": "a"}], "ignore_index": "none"}', r"gives the ignore_index none; expected a number"),
        ("{", r"classes.json cannot be read as JSON"),
        ('"water"', "classes.json must be a list in label order"),
        ('{"classes": {"water": [0, 0, 255]}}', "classes.json must be a list in label order"),
        ('{"names": ["water"]}', "classes.json must be a list in label order"),
        ('["water"]', "classes.json must be a list in label order"),
        ('[{"name": 1}]', "classes.json must be a list in label order"),
        ('[{"name": " "}]', "with a name for every class.*A name is one line of text"),
        ('[{"name": "water\\u001b[2J"}]', "with a name for every class.*A name is one line of text"),
        ('[{"name": "water", "color": [0, 0, 256]}]', r"gives 'water' the color \[0, 0, 256\]; expected three"),
        ('[{"name": "water", "color": [0, 0]}]', r"gives 'water' the color \[0, 0\]; expected three numbers"),
        ('[{"name": "water", "color": [true, 0, 0]}]', r"gives 'water' the color \[True, 0, 0\]; expected three"),
        ('[{"name": "water", "color": [0.5, NaN, 0]}]', r"gives 'water' the color \[0.5, nan, 0\]; expected three"),
        ('[{"name": "water", "color": null}]', "gives 'water' the color None; expected three numbers"),
        ('[{"name": "water", "concepts": ["lake", 3]}]', r"the concepts \['lake', 3\]; expected a list of words"),
        ('{"classes": [{"name": "a"}], "ignore_index": true}', "gives the ignore_index True; expected a number"),
        ('{"classes": [{"name": "a"}], "ignore_index": 1e400}', "gives the ignore_index inf; expected a number"),
        ('{"classes": [{"name": "a"}], "ignore_index": 4294967296}', "gives the ignore_index 4294967296; expected"),
        ('{"classes": [], "ground_sampling_distance_m": 0}', "the ground_sampling_distance_m 0; expected the size"),
        ('{"classes": [], "ground_sampling_distance_m": true}', "gives the ground_sampling_distance_m True; expected"),
        ('{"classes": [], "ground_sampling_distance_m": NaN}', "gives the ground_sampling_distance_m nan; expected"),
        ('{"classes": [], "ground_sampling_distance_m": 1e400}', "gives the ground_sampling_distance_m inf; expected"),
        ('{"classes": [], "ground_sampling_distance_m": "1 m"}', "gives the ground_sampling_distance_m 1 m; expected"),
        ('{"classes": [], "converted_from": {}}', r"gives converted_from {}; expected how the images were made"),
        ('{"classes": [], "converted_from": [4, 3, 2]}', r"gives converted_from \[4, 3, 2\]; expected"),
        ('{"classes": [], "converted_from": {"bands": [4, 3]}}', r"from {'bands': \[4, 3\]}; expected"),
        ('{"classes": [], "converted_from": {"bands": [0, 1, 2]}}', r"from {'bands': \[0, 1, 2\]}; expected"),
        ('{"classes": [], "converted_from": {"bands": "4,3,2"}}', r"from {'bands': '4,3,2'}; expected"),
        ('{"classes": [], "converted_from": {"scale": [0, 3000]}}', r"from {'scale': \[0, 3000\]}; expected"),
        ('{"classes": [], "converted_from": {"scale": [[9, 9]]}}', r"from {'scale': \[\[9, 9\]\]}; expected"),
        ('{"classes": [], "converted_from": {"scale": [[0, Infinity]]}}', r"converted_from .*inf.*; expected"),
        ('{"classes": [], "converted_from": {"scale": [[0, 9], [0, 9]]}}', "converted_from .*; expected"),
        ("[" * 100_000, "classes.json cannot be read as JSON: .*recursion"),
        ("[" + "9" * 5000 + "]", "classes.json cannot be read as JSON: Exceeds the limit"),
        (str([{"name": f"c{n}"} for n in range(256)]).replace("'", '"'), "has 256 classes; expected at most 255"),
        (" " * 2**20 + "[]", "classes.json has 1048578 bytes; expected .* at most 1048576 bytes"),
    ],
    ids=lambda value: value[:40] if len(value) > 40 else None,
)
def test_malformed_classes_are_refused(tmp_path, text, message):
    (tmp_path / "classes.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_classes(tmp_path / "classes.json")


def test_a_long_value_does_not_fill_the_message(tmp_path):
    (tmp_path / "classes.json").write_text(f'[{{"name": "{"w" * 5000}", "color": {[1] * 5000}}}]', encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_classes(tmp_path / "classes.json")
    assert len(str(error.value)) < 400 + len(str(tmp_path))


def test_classes_of_a_windows_editor_are_read(tmp_path):
    """Notepad begins a UTF-8 file with a byte order mark."""
    (tmp_path / "classes.json").write_text('\ufeff[{"name": "water"}]', encoding="utf-8")
    assert read_classes(tmp_path / "classes.json").names == ["water"]


def test_missing_and_binary_class_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"classes.json' does not exist; expected a JSON file"):
        read_classes(tmp_path / "classes.json")
    (tmp_path / "classes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"classes.json cannot be read as JSON: .*codec"):
        read_classes(tmp_path / "classes.json")


# --- folders


def test_lists_may_be_in_another_folder(scenes_folder, tmp_path):
    folder = Path(shutil.copytree(scenes_folder, tmp_path / "data"))
    shutil.move(folder / "splits", tmp_path / "lists")
    data = open_folder(folder, splits_dir=str(tmp_path / "lists"))
    assert [Path(name).name for name in data.labeled.names] == [f"labeled_000{n}.png" for n in range(3)]
    with pytest.raises(FileNotFoundError, match=r"`splits_dir` is '.*gone', which does not exist"):
        open_folder(folder, splits_dir=str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match=r"`data_dir` is '.*gone', which does not exist"):
        open_folder(tmp_path / "gone")


@pytest.fixture
def paired_folder(tmp_path):
    """12 images in two folders, all with labels of another suffix."""
    for n in range(12):
        for kind, mode, suffix in (("images", "RGB", "jpg"), ("labels", "L", "png")):
            path = tmp_path / kind / f"area{n % 2}" / f"{n}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new(mode, (20, 20), n % 3 if mode == "L" else (n, n, n)).save(path)
    return tmp_path


def test_links_are_followed_and_hidden_files_skipped(paired_folder):
    outside = paired_folder / "elsewhere"
    shutil.move(paired_folder / "images" / "area1", outside)
    (paired_folder / "images" / "area1").symlink_to(outside)
    (paired_folder / "images" / "area0" / "._0.png").write_bytes(b"no image")
    (paired_folder / "images" / ".cache").mkdir()
    shutil.copy(outside / "1.jpg", paired_folder / "images" / ".cache" / "1.jpg")
    assert sum(sizes(open_folder(paired_folder, labeled_fraction=0.5))) == 12


def test_labels_without_an_image_give_a_warning(paired_folder):
    Image.new("L", (20, 20)).save(paired_folder / "labels" / "area0" / "renamed.png")
    data = open_folder(paired_folder, labeled_fraction=0.5)
    assert sum(sizes(data)) == 12
    (message,) = [f.message for f in data.findings if f.kind == "labels without an image"]
    assert message.endswith("renamed.png has no image of this name. Rename one of them.")


def test_two_files_of_one_name_are_refused(paired_folder):
    shutil.copy(paired_folder / "images" / "area1" / "1.jpg", paired_folder / "images" / "area1" / "1.png")
    with pytest.raises(UserError, match=r"1.jpg' and '.*1.png' have the same name without the suffix"):
        open_folder(paired_folder)
    (paired_folder / "images" / "area1" / "1.png").unlink()
    (paired_folder / "labels" / "area0" / "0.tif").write_bytes(b"")
    with pytest.raises(UserError, match=r"0.png' and .*0.tif' have the same name without the suffix"):
        open_folder(paired_folder)


def test_labels_of_other_names_than_the_images_are_refused(paired_folder):
    for path in list((paired_folder / "labels").rglob("*.png")):
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    message = r"No label file has the name of an image: for '.*0_mask.png', there is no '.*images/area0/0_mask\.\*'"
    with pytest.raises(UserError, match=message):
        open_folder(paired_folder)


def test_folders_without_images_or_labels_are_refused(paired_folder):
    shutil.move(paired_folder / "labels", paired_folder / "masks")
    with pytest.raises(FileNotFoundError, match="labels' does not exist"):
        open_folder(paired_folder)
    (paired_folder / "labels").mkdir()
    shutil.rmtree(paired_folder / "images")
    (paired_folder / "images").mkdir()
    with pytest.raises(UserError, match=r"images' holds no images. Expected files .png, .jpg"):
        open_folder(paired_folder)


# --- data sets


@pytest.fixture
def table(scenes_folder):
    """The drawn folder as one table: image, label (missing for unlabelled rows), and the set of each row."""
    rows = {"photo": [], "mask": [], "part": []}
    source = open_folder(scenes_folder)
    for split in SPLITS:
        for sample in getattr(source, split):
            rows["photo"].append({"bytes": sample.image.read_bytes(), "path": Path(sample.image.path).name})
            label = None if split == "unlabeled" else {"bytes": sample.label.read_bytes(), "path": None}
            rows["mask"].append(label)
            rows["part"].append(split)
    features = Features({"photo": ImageColumn(), "mask": ImageColumn(), "part": Value("string")})
    return Dataset.from_dict(rows, features=features)


COLUMNS = {"image_column": "photo", "label_column": "mask"}


def test_a_column_names_the_set_of_each_row(table, tmp_path, scenes_folder):
    table.save_to_disk(tmp_path / "saved")
    data = open_source(DataOptions(dataset_name=str(tmp_path / "saved"), split_column="part", **COLUMNS))
    assert sizes(data) == [3, 5, 2]
    for row, file in zip(data.labeled, open_folder(scenes_folder).labeled):
        assert row.load_image().tobytes() == file.load_image().tobytes()
        assert row.load_label().tobytes() == file.load_label().tobytes()
    assert str(data.unlabeled[2].image) == "train[5] unlabeled_0002.png"
    wrong = table.map(lambda row: {"part": "holdout" if row["part"] == "validation" else row["part"]})
    wrong.save_to_disk(tmp_path / "wrong")
    message = "has a split 'holdout'; expected labeled, unlabeled, validation, train, test.*`split_column`"
    with pytest.raises(UserError, match=message):
        open_source(DataOptions(dataset_name=str(tmp_path / "wrong"), split_column="part", **COLUMNS))
    empty = table.map(lambda row, n: {"part": None if n == 4 else row["part"]}, with_indices=True)
    empty.save_to_disk(tmp_path / "empty")
    with pytest.raises(UserError, match=r"`split_column` is 'part', which is empty for train\[4\]"):
        open_source(DataOptions(dataset_name=str(tmp_path / "empty"), split_column="part", **COLUMNS))


def test_rows_without_a_label_are_unlabelled(table, tmp_path):
    validation = table.filter(lambda row: row["part"] == "validation")
    train = table.filter(lambda row: row["part"] != "validation").shuffle(seed=0)
    DatasetDict({"train": train, "validation": validation}).save_to_disk(tmp_path / "saved")
    data = open_source(DataOptions(dataset_name=str(tmp_path / "saved"), **COLUMNS))
    assert sizes(data) == [3, 5, 2]
    assert all("unlabeled" in name and name.startswith("train[") for name in data.unlabeled.names)
    assert data.id2label[5] == "class_5" and data.labeled[0].load_label().size == (48, 48)


def test_sets_are_drawn_from_a_parquet_file(table, tmp_path):
    table.remove_columns("part").to_parquet(tmp_path / "files" / "train.parquet")
    drawn = open_source(DataOptions(dataset_name=str(tmp_path / "files"), validation_fraction=0.4, **COLUMNS))
    assert sizes(drawn) == [3, 5, 2]
    assert len(set(drawn.labeled.names + drawn.unlabeled.names + drawn.validation.names)) == 10


def test_nothing_is_written_into_a_data_set(table, tmp_path):
    table.shuffle(seed=1).save_to_disk(tmp_path / "saved")
    before = sorted(path.name for path in (tmp_path / "saved").iterdir())
    data = open_source(DataOptions(dataset_name=str(tmp_path / "saved"), split_column="part", **COLUMNS))
    assert sizes(data) == [3, 5, 2]
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == before


def test_names_of_splits_give_the_sets(table, tmp_path):
    parts = {name: table.filter(lambda row, name=name: row["part"] == name).remove_columns("part") for name in SPLITS}

    def sizes_of(splits, **options):
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        DatasetDict(splits).save_to_disk(tmp_path / "saved")
        return sizes(open_source(DataOptions(dataset_name=str(tmp_path / "saved"), **COLUMNS, **options)))

    rows = {"train": concatenate_datasets([parts["labeled"], parts["unlabeled"]])}
    assert sizes_of(rows | {"val": parts["validation"]}) == [3, 5, 2]
    assert sizes_of(rows | {"test": parts["validation"]}) == [3, 5, 2]
    both = {name: parts[name] for name in ("labeled", "unlabeled")}
    assert sizes_of(both, validation_fraction=1 / 3) == [2, 5, 1]  # drawn from the labelled rows
    assert sizes_of(both | {"test": parts["validation"]}) == [3, 5, 2]
    empty = Dataset.from_dict({"photo": parts["unlabeled"]["photo"][:], "mask": [None] * 5},
                              features=Features({"photo": ImageColumn(), "mask": Value("null")}))  # fmt: skip
    assert sizes_of(parts | {"unlabeled": empty}) == [3, 5, 2]
    with pytest.raises(
        UserError, match=r"has a split 'holdout'; expected labeled, unlabeled, validation, train, test"
    ):
        sizes_of(rows | {"holdout": parts["validation"]})


def test_the_split_column_may_hold_class_labels(table, tmp_path):
    features = table.features | {"part": ClassLabel(names=list(SPLITS))}
    table.cast(Features(features)).save_to_disk(tmp_path / "saved")
    options = DataOptions(dataset_name=str(tmp_path / "saved"), split_column="part", **COLUMNS)
    assert sizes(open_source(options)) == [3, 5, 2]


def test_rows_without_an_image_are_named(table, tmp_path):
    broken = table.map(lambda row, n: {"photo": None if n == 4 else row["photo"]}, with_indices=True)
    broken.save_to_disk(tmp_path / "broken")
    with pytest.raises(UserError, match=r"Row 1 of the set has no image. Remove it"):
        open_source(DataOptions(dataset_name=str(tmp_path / "broken"), split_column="part", **COLUMNS))


def test_validation_rows_need_labels(table, tmp_path):
    moved = table.map(lambda row, n: {"part": "validation" if n == 5 else row["part"]}, with_indices=True)
    moved.save_to_disk(tmp_path / "saved")
    message = r"images without labels \(1\):\n  train\[5\] unlabeled_0002.png is a validation image and has no label"
    with pytest.raises(UserError, match=message):
        open_source(DataOptions(dataset_name=str(tmp_path / "saved"), split_column="part", **COLUMNS))


def test_missing_columns_are_named(table, tmp_path):
    table.save_to_disk(tmp_path / "saved")
    name = str(tmp_path / "saved")
    message = r"has no column 'image'. It has the columns photo, mask, part. Name .* `image_column`"
    with pytest.raises(UserError, match=message):
        open_source(DataOptions(dataset_name=name))
    with pytest.raises(UserError, match=r"The label column 'part' of .* expected images. Name .*`label_column`"):
        open_source(DataOptions(dataset_name=name, image_column="photo", label_column="part"))


@pytest.mark.parametrize(
    "options", [{"dataset_name": "user/gone"}, {"dataset_name": "user/fields", "dataset_config": "x"}]
)
def test_data_sets_that_cannot_be_loaded_are_named(hub, options, tmp_path):
    hub.create("dataset", "user/fields")
    message = rf"The data set '{options['dataset_name']}' cannot be loaded: .*[^.]\. Check `dataset_name`"
    with pytest.raises(UserError, match=message):
        open_source(DataOptions(**options))
