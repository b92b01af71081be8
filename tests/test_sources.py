"""Three ways in, and what is drawn from them."""

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import open_folder
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, concatenate_datasets
from datasets import Image as ImageColumn
from local_hub import TOKEN, Blob, LocalHub
from PIL import Image

from co2s_hf import benchmark_lists
from co2s_hf.catalog import BENCHMARKS
from co2s_hf.data_arguments import DataArguments, parse_bands, parse_label_map, parse_scale
from co2s_hf.reading import ImageRule, LabelRule
from co2s_hf.sources import open_source
from co2s_hf.splits import SPLITS, write_lists
from co2s_hf.synthetic import CLASSES, draw_scene, write_scenes


DUBAI = Path(__file__).parents[2] / "shared" / "data" / "dubai"


@pytest.fixture
def folder(scenes_folder, tmp_path):
    """A copy of the drawn folder that a test may break."""
    return Path(shutil.copytree(scenes_folder, tmp_path / "data"))


def names(samples):
    return [Path(name).name for name in samples.names]


def content(samples):
    """What training would see of the samples: images and label maps as arrays."""
    return [
        (np.asarray(sample.load_image()), None if sample.label is None else np.asarray(sample.load_label()))
        for sample in samples
    ]


def assert_same_content(source, other):
    for split in SPLITS:
        ours, theirs = content(getattr(source, split)), content(getattr(other, split))
        assert len(ours) == len(theirs)
        for (image, label), (other_image, other_label) in zip(ours, theirs):
            assert np.array_equal(image, other_image)
            assert (label is None) == (other_label is None)
            assert label is None or np.array_equal(label, other_label)
    assert source.id2label == other.id2label and source.palette == other.palette


# --- folders


def test_folder_gives_its_lists_and_classes(scenes_folder):
    data = open_folder(scenes_folder)
    assert [len(x) for x in (data.labeled, data.unlabeled, data.validation)] == [3, 5, 2]
    assert data.labeled[0].image.path == str(scenes_folder / "images" / "labeled_0000.png")
    assert data.id2label == {n: facts.name for n, facts in enumerate(CLASSES)}
    assert data.palette == [list(facts.color) for facts in CLASSES]
    assert data.class_concepts == {facts.name: facts.concepts for facts in CLASSES}
    named = open_folder(scenes_folder, class_names=["a_b", "c", "d", "e", "f", "water"])
    assert named.id2label[0] == "a_b" and named.class_concepts["a_b"] == ["a b"]
    assert named.class_concepts["water"] == CLASSES[5].concepts  # still known by its name


def test_class_names_may_come_from_a_file(scenes_folder, tmp_path):
    (tmp_path / "names.txt").write_text("a\nb\n\nc\nd\ne\nf\n")
    data = open_folder(scenes_folder, class_names=[str(tmp_path / "names.txt")])
    assert list(data.id2label.values()) == list("abcdef")
    with pytest.raises(ValueError, match="names a class twice: a a"):
        open_folder(scenes_folder, class_names=["a", "a"])


def test_scenes_are_drawn_the_same_from_the_same_seed(scenes_folder, tmp_path):
    again = write_scenes(tmp_path / "again", 3, 5, 2, size=48, seed=7)
    for path in sorted(scenes_folder.rglob("*.*")):
        assert path.read_bytes() == (again / path.relative_to(scenes_folder)).read_bytes()
    image, labels = draw_scene(np.random.default_rng(0), 64)
    assert image.shape == (64, 64, 3) and labels.shape == (64, 64) and image.std() > 10
    counts = sum(np.bincount(draw_scene(np.random.default_rng(n), 96)[1].ravel(), minlength=6) for n in range(20))
    assert (counts / counts.sum() > 0.02).all()  # every class is there to be learnt


def test_classes_are_counted_where_nothing_names_them(folder):
    (folder / "classes.json").unlink()
    data = open_folder(folder)
    assert data.id2label == {n: f"class_{n}" for n in range(6)}
    assert data.palette == [list(facts.color) for facts in CLASSES]  # from the label files
    assert data.class_concepts is None  # nothing to tell CLIP


def test_labels_of_unlabelled_images_are_read_on_request_alone(folder):
    for path in (folder / "labels").glob("unlabeled_*"):
        path.write_bytes(b"not an image")
    open_folder(folder)
    args = DataArguments(data_dir=str(folder))
    with pytest.raises(ValueError, match=r"5 findings.\nunreadable files \(5\)"):
        open_source(args, with_hidden_labels=True)


def test_hidden_labels_may_be_missing(folder):
    for path in (folder / "labels").glob("unlabeled_*"):
        path.unlink()
    data = open_source(DataArguments(data_dir=str(folder)), with_hidden_labels=True)
    assert data.scans["unlabeled"].labels == [None] * 5


def test_lists_may_lie_elsewhere(scenes_folder, folder, tmp_path):
    shutil.move(folder / "splits", tmp_path / "lists")
    data = open_folder(folder, splits_dir=str(tmp_path / "lists"))
    assert names(data.labeled) == names(open_folder(scenes_folder).labeled)
    with pytest.raises(FileNotFoundError, match="gone' does not exist"):
        open_folder(folder, splits_dir=str(tmp_path / "gone"))


@pytest.fixture
def plain_folder(tmp_path):
    """12 images in two folders, 10 of them with labels of another suffix, no lists; class 3 on one image alone."""
    for n in range(12):
        for kind in ("images", "labels"):
            (tmp_path / kind / f"area{n % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (n, n, n)).save(tmp_path / "images" / f"area{n % 2}" / f"{n}.jpg")
        if n < 10:
            Image.new("L", (20, 20), 3 if n == 7 else n % 3).save(tmp_path / "labels" / f"area{n % 2}" / f"{n}.png")
    return tmp_path


def test_sets_are_drawn_where_there_are_no_lists(plain_folder):
    settings = {"labeled_fraction": "1/2", "validation_fraction": "0.2"}
    args = DataArguments(data_dir=str(plain_folder), **settings)
    data, again, other = (open_source(args, seed) for seed in (1, 1, 2))
    assert [len(part) for part in (data.labeled, data.unlabeled, data.validation)] == [4, 6, 2]
    everything = [*data.labeled, *data.unlabeled, *data.validation]
    assert len({sample.image for sample in everything}) == 12
    for sample in everything:  # label files match by name, below the same folder
        n = int(Path(sample.image.path).stem)
        expected = str(plain_folder / "labels" / f"area{n % 2}" / f"{n}.png") if n < 10 else None
        assert (sample.label and sample.label.path) == expected
    assert again.hash == data.hash != other.hash and again.lists == data.lists
    assert "7.jpg" in names(data.labeled)  # every class is labelled where possible

    everything_labeled = open_folder(plain_folder)
    assert [len(x) for x in (everything_labeled.labeled, everything_labeled.unlabeled)] == [8, 2]


def test_neighbours_are_not_on_both_sides(plain_folder):
    shutil.move(plain_folder / "labels" / "area1" / "7.png", plain_folder / "labels" / "area1" / "11.png")
    data = open_folder(plain_folder, labeled_fraction="1/2", group_regex=r"area\d", validation_fraction="1/10")
    sides = [{re.search(r"area\d", name)[0] for name in part.names} for part in (data.validation, data.labeled)]
    assert len(sides[0]) == 1 and not sides[0] & sides[1]
    assert not sides[0] & {re.search(r"area\d", name)[0] for name in data.unlabeled.names}


def test_groups_are_told_by_the_name_alone(plain_folder):
    with pytest.raises(ValueError, match=r"--group_regex 'tile\\d' matches no image's name, such as 'area0/0.jpg'"):
        open_folder(plain_folder, labeled_fraction="1/2", group_regex=r"tile\d")
    data = open_folder(plain_folder, labeled_fraction="1/2", group_regex=r"^(area\d)/\d+")  # what the brackets hold
    assert len({Path(name).parent.name for name in data.validation.names}) == 1


def test_folders_are_searched_as_people_expect(plain_folder):
    """Through links, past hidden files; labels without an image are told, two images of one name refused."""
    outside = plain_folder / "elsewhere"
    shutil.move(plain_folder / "images" / "area1", outside)
    (plain_folder / "images" / "area1").symlink_to(outside)
    (plain_folder / "images" / "area0" / "._0.png").write_bytes(b"no image")
    (plain_folder / "images" / ".cache").mkdir()
    shutil.copy(outside / "1.jpg", plain_folder / "images" / ".cache" / "1.jpg")
    Image.new("L", (20, 20)).save(plain_folder / "labels" / "area0" / "renamed.png")
    data = open_folder(plain_folder, labeled_fraction="1/2")
    assert len(data.labeled) + len(data.unlabeled) + len(data.validation) == 12
    assert [f.message for f in data.findings if "renamed.png has no image of its name" in f.message]
    shutil.copy(outside / "1.jpg", outside / "1.png")
    with pytest.raises(ValueError, match=r"1.jpg' and '.*1.png' have one name"):
        open_folder(plain_folder)


def test_labels_of_other_names_are_pointed_out(plain_folder):
    for path in list((plain_folder / "labels").rglob("*.png")):
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    with pytest.raises(ValueError, match=r"No label file has the name of an image: '.*_mask.png' would belong to"):
        open_folder(plain_folder)


def test_lists_with_spaces_in_names_survive(plain_folder, tmp_path):
    for kind, suffix in (("images", "jpg"), ("labels", "png")):
        (plain_folder / kind / "area0" / f"0.{suffix}").rename(plain_folder / kind / "area0" / f"a b.{suffix}")
    data = open_folder(plain_folder, labeled_fraction="1/2")
    write_lists(tmp_path / "lists", data.lists, {})
    again = open_folder(plain_folder, splits_dir=str(tmp_path / "lists"))
    assert again.hash == data.hash and again.lists["validation"] == data.lists["validation"]


def test_what_is_not_needed_need_not_be_there(plain_folder):
    args = DataArguments(data_dir=str(plain_folder))
    shutil.rmtree(plain_folder / "images")
    shutil.copytree(plain_folder / "labels", plain_folder / "images")  # everything has a label
    for n, path in enumerate((plain_folder / "images").rglob("*.png")):
        Image.new("RGB", (20, 20), (n, 0, 0)).save(path)
    assert len(open_source(args, needed=("labeled", "validation")).unlabeled) == 0
    data = open_source(args, needed=("validation",))
    assert not data.scans["labeled"].images and len(data.scans["validation"].images) == 2
    with pytest.raises(ValueError, match="There is no unlabeled image"):
        open_source(args)


def test_a_validation_list_is_kept_when_the_rest_is_drawn(plain_folder):
    (plain_folder / "splits").mkdir()
    (plain_folder / "splits" / "val.txt").write_text("images/area1/3.jpg labels/area1/3.png\n")
    data = open_folder(plain_folder, labeled_fraction="1/3")
    assert names(data.validation) == ["3.jpg"] and len(data.labeled) == 3 and len(data.unlabeled) == 8
    assert "3.jpg" not in names(data.labeled) + names(data.unlabeled)


def test_what_cannot_be_drawn_is_said(plain_folder):
    with pytest.raises(ValueError, match="'2' is no share"):
        open_folder(plain_folder, labeled_fraction="2")
    with pytest.raises(ValueError, match=r"--group_regex '\(' is no regular expression"):
        open_folder(plain_folder, group_regex="(")
    for path in (plain_folder / "images").rglob("1?.jpg"):
        path.unlink()
    with pytest.raises(ValueError, match=r"There is no unlabeled image. Add images without labels"):
        open_folder(plain_folder)
    (plain_folder / "labels" / "area0" / "0.tif").write_bytes(b"")
    with pytest.raises(ValueError, match=r"0.png' and .*0.tif' have one name"):
        open_folder(plain_folder)
    shutil.rmtree(plain_folder / "labels")
    with pytest.raises(FileNotFoundError, match="labels' does not exist"):
        open_folder(plain_folder)


def test_nothing_is_written_beside_the_data(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    open_folder(folder)
    open_folder(folder, labeled_fraction="1/2")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_rules_reach_every_set(folder):
    """Masks counted from 1 in colours of their own, and images of sixteen bits."""
    for path in (folder / "labels").glob("*.png"):
        Image.fromarray(np.asarray(Image.open(path)) + 1).save(path)
    data = open_folder(folder, reduce_labels=True, bands="3,2,1")
    assert data.labeled.label_rule == LabelRule(reduce_labels=True)
    assert data.validation.image_rule == ImageRule(bands=(3, 2, 1))
    plain = open_folder(folder, label_map="1=0,2=1,3=2,4=3,5=4,6=5")
    assert [a[1].tolist() for a in content(data.validation)] == [a[1].tolist() for a in content(plain.validation)]
    assert np.array_equal(content(data.labeled)[0][0], content(plain.labeled)[0][0][..., ::-1])


def test_colours_of_masks_name_the_classes(folder, tmp_path):
    for path in (folder / "labels").glob("*.png"):
        Image.open(path).convert("RGB").save(path)
    shutil.move(folder / "classes.json", tmp_path / "colors.json")
    data = open_folder(folder, label_colors=str(tmp_path / "colors.json"))
    assert data.id2label == {n: facts.name for n, facts in enumerate(CLASSES)}
    assert data.labeled_pixels.sum() == 3 * 48 * 48


def test_percentiles_are_one_range_for_all_sets(folder):
    for n, path in enumerate(sorted((folder / "images").glob("*.png"))):
        values = np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 16 + n
        Image.fromarray(values).save(path.with_suffix(".tif"))
        path.unlink()
    for path in (folder / "splits").glob("*.txt"):
        path.write_text(re.sub(r"(images/\S+)\.png", r"\1.tif", path.read_text()))
    with pytest.raises(ValueError, match=r"uint16, values .* --scale percentiles"):
        open_folder(folder)
    data = open_folder(folder, scale=["percentiles"])
    ((low, high),) = data.labeled.image_rule.scale
    assert 0 < low < high < 4096 and data.validation.image_rule == data.labeled.image_rule
    assert np.asarray(data.validation[0].load_image()).std() > 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "Name the data: --data_dir, --dataset_name or --dataset"),
        ({"data_dir": "a", "dataset_name": "b"}, "Give one source"),
        ({"data_dir": "a", "partition": "1_8"}, "--partition 1_8 goes with --dataset, not with --data_dir"),
        (
            {"dataset": "whdld", "labeled_fraction": "1/2"},
            "--labeled_fraction 1/2 goes with --data_dir or --dataset_name",
        ),
        ({"dataset_name": "a", "splits_dir": "b"}, "--splits_dir b goes with --data_dir or --dataset, not with"),
        ({"dataset_name": ".", "dataset_revision": "v1"}, "--dataset_revision v1: the folder . has none"),
        ({"data_dir": "a", "label_colors": "gone.json"}, "--label_colors 'gone.json' does not exist"),
        ({"data_dir": "a", "label_map": "1=0,1=2"}, "gives one value two classes"),
        ({"data_dir": "a", "reduce_labels": True, "label_map": "1=0"}, "Give one of --reduce_labels, --label_map"),
        ({"data_dir": "a", "report": "report.pdf"}, "--report is 'report.pdf'; name a file that ends in .html or"),
        ({"data_dir": "a", "bands": "4,3"}, "--bands is '4,3'; give three band numbers"),
        ({"data_dir": "a", "scale": ["3", "1"]}, "--scale is '3 1'; give the values that become 0 and 255"),
        ({"data_dir": "a", "label_map": "a=b"}, "--label_map is 'a=b'; write VALUE=CLASS"),
        ({"dataset": "whdld", "partition": "1_7"}, "--partition is '1_7'; whdld has 1_32, 1_24, 1_16, 1_8, 1_4"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        open_source(DataArguments(**settings))


def test_settings_are_read():
    assert parse_bands("4,3,2") == (4, 3, 2) and parse_bands(None) is None
    assert parse_scale(["0", "3000"]) == ((0.0, 3000.0),) and parse_scale(["percentiles"]) is None
    assert parse_label_map("7=0, 9=1") == ((7, 0), (9, 1))


# --- data sets


@pytest.fixture
def tables(scenes_folder):
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


def test_a_column_says_which_set_a_row_is_in(tables, tmp_path, scenes_folder):
    tables.save_to_disk(tmp_path / "saved")
    args = DataArguments(dataset_name=str(tmp_path / "saved"), split_column="part", **COLUMNS)
    data, folder = open_source(args), open_folder(scenes_folder)
    assert [len(x) for x in (data.labeled, data.unlabeled, data.validation)] == [3, 5, 2]
    assert [a[0].tolist() for a in content(data.labeled)] == [a[0].tolist() for a in content(folder.labeled)]
    assert str(data.unlabeled[2].image) == "train[5] unlabeled_0002.png"
    wrong = tables.map(lambda row: {"part": "holdout" if row["part"] == "validation" else row["part"]})
    wrong.save_to_disk(tmp_path / "wrong")
    with pytest.raises(
        ValueError, match="has a split 'holdout'; expected labeled, unlabeled, validation, train, test"
    ):
        open_source(DataArguments(dataset_name=str(tmp_path / "wrong"), split_column="part", **COLUMNS))


def test_rows_without_a_label_are_unlabelled(tables, tmp_path):
    validation = tables.filter(lambda row: row["part"] == "validation")
    train = tables.filter(lambda row: row["part"] != "validation").shuffle(seed=0)
    DatasetDict({"train": train, "validation": validation}).save_to_disk(tmp_path / "saved")
    data = open_source(DataArguments(dataset_name=str(tmp_path / "saved"), **COLUMNS))
    assert [len(x) for x in (data.labeled, data.unlabeled, data.validation)] == [3, 5, 2]
    assert all("unlabeled" in name and name.startswith("train[") for name in data.unlabeled.names)
    assert data.id2label[5] == "class_5" and data.labeled[0].load_label().size == (48, 48)
    alone = tables.remove_columns("part")
    alone.to_parquet(tmp_path / "files" / "train.parquet")
    drawn = open_source(DataArguments(dataset_name=str(tmp_path / "files"), validation_fraction="2/5", **COLUMNS))
    assert [len(x) for x in (drawn.labeled, drawn.unlabeled, drawn.validation)] == [3, 5, 2]
    assert len(set(drawn.labeled.names + drawn.unlabeled.names + drawn.validation.names)) == 10


def test_nothing_is_written_into_a_data_set(tables, tmp_path):
    tables.shuffle(seed=1).save_to_disk(tmp_path / "saved")
    before = sorted(path.name for path in (tmp_path / "saved").iterdir())
    data = open_source(DataArguments(dataset_name=str(tmp_path / "saved"), split_column="part", **COLUMNS))
    assert [len(x) for x in (data.labeled, data.unlabeled, data.validation)] == [3, 5, 2]
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == before


def test_splits_mean_what_their_names_say(tables, tmp_path):
    parts = {name: tables.filter(lambda row, name=name: row["part"] == name).remove_columns("part") for name in SPLITS}

    def opened(splits, **settings):
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        DatasetDict(splits).save_to_disk(tmp_path / "saved")
        data = open_source(DataArguments(dataset_name=str(tmp_path / "saved"), **COLUMNS, **settings))
        return [len(part) for part in (data.labeled, data.unlabeled, data.validation)]

    rows = {"train": concatenate_datasets([parts["labeled"], parts["unlabeled"]])}
    assert opened(rows | {"val": parts["validation"]}) == [3, 5, 2]
    assert opened(rows | {"test": parts["validation"]}) == [3, 5, 2]
    both = {name: parts[name] for name in ("labeled", "unlabeled")}
    assert opened(both, validation_fraction="1/3") == [2, 5, 1]  # validation comes from what has labels
    assert opened(both | {"test": parts["validation"]}) == [3, 5, 2]
    empty = Dataset.from_dict({"photo": parts["unlabeled"]["photo"][:], "mask": [None] * 5},
                              features=Features({"photo": ImageColumn(), "mask": Value("null")}))  # fmt: skip
    assert opened(parts | {"unlabeled": empty}) == [3, 5, 2]
    with pytest.raises(
        ValueError, match=r"has a split 'holdout'; expected labeled, unlabeled, validation, train, test"
    ):
        opened(rows | {"holdout": parts["validation"]})


def test_class_labels_may_say_the_set_and_rows_without_an_image_are_named(tables, tmp_path):
    features = tables.features | {"part": ClassLabel(names=list(SPLITS))}
    tables.cast(Features(features)).save_to_disk(tmp_path / "saved")
    args = {"split_column": "part", **COLUMNS}
    assert len(open_source(DataArguments(dataset_name=str(tmp_path / "saved"), **args)).unlabeled) == 5
    broken = tables.map(lambda row, n: {"photo": None if n == 4 else row["photo"]}, with_indices=True)
    broken.save_to_disk(tmp_path / "broken")
    with pytest.raises(ValueError, match=r"Row 1 of the set has no image. Remove it"):
        open_source(DataArguments(dataset_name=str(tmp_path / "broken"), **args))


def test_validation_rows_need_labels(tables, tmp_path):
    moved = tables.map(lambda row, n: {"part": "validation" if n == 5 else row["part"]}, with_indices=True)
    moved.save_to_disk(tmp_path / "saved")
    message = r"images without labels \(1\):\n  train\[5\] unlabeled_0002.png is a validation image and has no label"
    with pytest.raises(ValueError, match=message):
        open_source(DataArguments(dataset_name=str(tmp_path / "saved"), split_column="part", **COLUMNS))


def test_columns_that_are_missing_are_named(tables, tmp_path):
    tables.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"has no column 'image', but photo, mask, part. Name it with --image_column"):
        open_source(DataArguments(dataset_name=str(tmp_path / "saved")))
    with pytest.raises(ValueError, match=r"column of labels .* expected images"):
        args = {"image_column": "photo", "label_column": "part"}
        open_source(DataArguments(dataset_name=str(tmp_path / "saved"), **args))


HUB_SCRIPT = """
import sys
from co2s_hf.data_arguments import DataArguments
from co2s_hf.sources import open_source
source = open_source(DataArguments(**eval(sys.argv[1])))
for split in ("labeled", "unlabeled", "validation"):
    for sample in getattr(source, split):
        image, label = sample.load_image(), sample.label and sample.load_label()
        print(split, image.size, hash(image.tobytes()), label and hash(label.tobytes()))
print(source.id2label, source.palette)
"""


def in_fresh_process(settings: dict, cache: Path, **environment) -> str:
    """What a process of its own sees of a source, its content as hashes."""
    variables = os.environ | {"HF_HOME": str(cache), "PYTHONHASHSEED": "0"} | environment
    command = [sys.executable, "-c", HUB_SCRIPT, repr(settings)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def prepare(cache: Path, *words: str, **environment) -> str:
    script = Path(__file__).parents[1] / "examples" / "prepare_dataset.py"
    variables = os.environ | {"HF_HOME": str(cache)} | environment
    done = subprocess.run([sys.executable, script, *words], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("origin", ["scenes", "dubai"])
def test_a_folder_a_prepared_data_set_and_one_of_the_hub_are_the_same(origin, scenes_folder, tmp_path):
    root = scenes_folder if origin == "scenes" else DUBAI
    if not root.exists():
        pytest.skip("the Dubai images are not here")
    hub = LocalHub().start()
    online = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    naming = [] if origin == "scenes" else ["--class_names", "building", "land", "road", "vegetation", "water"]
    settings = {"class_names": naming[1:]} if naming else {}
    printed = prepare(tmp_path / "one", "--data_dir", str(root), "--output_dir", str(tmp_path / "prepared"),
                      "--push_to_hub", "user/fields", *naming, **online)  # fmt: skip
    assert "Pushed" in printed and "--dataset_name user/fields" in printed
    from_folder = in_fresh_process({"data_dir": str(root)} | settings, tmp_path / "two")
    from_disk = in_fresh_process({"dataset_name": str(tmp_path / "prepared")}, tmp_path / "three")
    from_hub = in_fresh_process({"dataset_name": "user/fields"}, tmp_path / "four", **online)
    assert from_folder == from_disk == from_hub
    assert from_folder.count("(48, 48)" if origin == "scenes" else "validation (") in (10, 16)


# --- benchmarks


@pytest.fixture
def small_benchmark(monkeypatch):
    """Sizes of tiny copies: 8 training and 2 validation images."""

    def shrink(name):
        facts = BENCHMARKS[name]
        small = facts.__class__(**{**vars(facts), "num_training": 8, "num_validation": 2})
        monkeypatch.setitem(BENCHMARKS, name, small)
        return small

    return shrink


def benchmark_files(name: str) -> dict[str, bytes]:
    """A tiny copy laid out like the real one: every class and the ignore value on each mask."""
    facts, files = BENCHMARKS[name], {}
    ignore, first = (0, 1) if facts.reduce_labels else (255, 0)
    for n in range(10):
        values = np.array([[ignore, *range(first, first + len(facts.classes))]], dtype=np.uint8).repeat(16, axis=0)
        for kind, picture in (("images", Image.new("RGB", values.shape[::-1], (n, 9, 9))), ("labels", values)):
            picture = Image.fromarray(picture) if kind == "labels" else picture
            stream = io.BytesIO()
            picture.save(stream, format="PNG")
            files[f"{facts.folder}/{kind}/{n}.png"] = stream.getvalue()
    return files


def benchmark_splits(denominator: int) -> dict[str, str]:
    lines = [f"images/{n}.png labels/{n}.png\n" for n in range(10)]
    labeled = 8 // denominator or 1
    parts = {f"1_{denominator}/labeled.txt": lines[:labeled], f"1_{denominator}/unlabeled.txt": lines[labeled:8]}
    return {name: "".join(part) for name, part in (parts | {"val.txt": lines[8:]}).items()}


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_benchmarks_are_read_by_their_rules(name, tmp_path, small_benchmark):
    facts = small_benchmark(name)
    for path, data in benchmark_files(name).items():
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    for path, text in benchmark_splits(8).items():
        (tmp_path / "splits" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "splits" / path).write_text(text)
    data = open_source(
        DataArguments(
            dataset=name,
            partition="1_8",
            data_dir=str(tmp_path / facts.folder),
            splits_dir=str(tmp_path / "splits"),
        )
    )
    assert [len(part) for part in (data.labeled, data.unlabeled, data.validation)] == [1, 7, 2]
    assert list(data.id2label.values()) == [c.name for c in facts.classes]
    assert data.class_concepts[facts.classes[0].name] == facts.classes[0].concepts
    row = np.asarray(data.labeled[0].load_label())[0].tolist()
    assert row == [255, *range(len(facts.classes))]  # whatever stands on disk
    assert not data.findings


def test_a_benchmark_comes_from_the_hub_and_its_lists_from_their_place_once(tmp_path, monkeypatch):
    hub = LocalHub().start()
    repository = hub.create("dataset", "XavierJiezou/co2s-datasets")
    tree = {path: Blob(data) for path, data in benchmark_files("whdld").items()}
    repository.commit("main", tree | {"LOVEDA/images/big.png": Blob(b"not wanted")}, "data")
    lists = hub.create("dataset", "lists/splits")
    lists.commit("main", {f"whdld/{k}": Blob(v.encode()) for k, v in benchmark_splits(8).items()}, "lists")
    url = f"{hub.url}/datasets/lists/splits/resolve/main"
    settings = {"dataset": "whdld", "partition": "1/8", "splits_url": url}
    online = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    printed = in_fresh_process(settings, tmp_path / "cache", **online)
    assert printed.count("(9, 16)") == 0 and printed.count("(7, 16)") == 10 and "'bare soil'" in printed
    assert not any("LOVEDA/images/big.png" in request for request in hub.requests)
    asked = [request for request in hub.requests if request.endswith(".txt")]
    assert len(asked) == 3
    hub.requests.clear()
    assert in_fresh_process(settings, tmp_path / "cache", **online) == printed
    assert not [request for request in hub.requests if request.endswith(".txt")]
    hub.shutdown()
    monkeypatch.setattr(benchmark_lists, "CACHE", tmp_path / "other")
    with pytest.raises(ConnectionError, match=r"1_8/labeled.txt cannot be fetched: .* pass it as --splits_dir"):
        hub.server_close()
        benchmark_lists.fetch_lists("whdld", 8, url)


def test_lists_unlike_the_papers_are_warned_of():
    sizes = {"labeled": 138, "unlabeled": 4308, "validation": 494}
    assert benchmark_lists.unexpected_sizes("whdld", 32, sizes) == []
    (warning,) = benchmark_lists.unexpected_sizes("whdld", 32, sizes | {"validation": 400})
    assert warning.startswith("The validation list of whdld at 1/32 has 400 images; the paper's has 494.")


@pytest.mark.parametrize(
    ("name", "partition", "labeled", "unlabeled", "validation"),
    [
        ("whdld", 32, 138, 4308, 494),
        ("loveda", 40, 94, 3677, 420),
        ("potsdam", 32, 153, 4771, 548),
        ("gid", 8, 342, 2394, 684),
        ("mer", 8, 106, 745, 213),
        ("msl", 8, 392, 2749, 786),
    ],
)
def test_the_catalogue_holds_the_papers_sizes(name, partition, labeled, unlabeled, validation):
    facts = BENCHMARKS[name]
    assert facts.partitions[0] == partition and facts.num_labeled(partition) == labeled
    assert facts.num_training - labeled == unlabeled and facts.num_validation == validation
