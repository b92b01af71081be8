import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import EXAMPLES, make_config, open_folder, run_command
from PIL import Image

from co2s_hf.data.drawn_scenes import CLASSES
from co2s_hf.data.options import DataOptions
from co2s_hf.data.reading import ImageRule, LabelRule
from co2s_hf.data.samples import Samples
from co2s_hf.data.sources import image_rule, open_source
from co2s_hf.data.splits import SPLITS, write_lists
from co2s_hf.utils.errors import UserError


DUBAI = EXAMPLES.parents[1] / "shared" / "data" / "dubai"


@pytest.fixture
def folder(scenes_folder, tmp_path):
    """A copy of the drawn folder that a test may change."""
    return Path(shutil.copytree(scenes_folder, tmp_path / "data"))


@pytest.fixture
def plain_folder(tmp_path):
    """12 images in two folders, 10 of them with labels of another suffix; no lists. Class 3 is in one image only."""
    for n in range(12):
        for kind in ("images", "labels"):
            (tmp_path / kind / f"area{n % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (n, n, n)).save(tmp_path / "images" / f"area{n % 2}" / f"{n}.jpg")
        if n < 10:
            Image.new("L", (20, 20), 3 if n == 7 else n % 3).save(tmp_path / "labels" / f"area{n % 2}" / f"{n}.png")
    return tmp_path


def file_names(samples: Samples) -> list[str]:
    return [Path(name).name for name in samples.names]


def arrays(samples: Samples) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images and label maps."""
    return [(np.asarray(sample.load_image()), np.asarray(sample.load_label())) for sample in samples]


# --- lists and classes


def test_a_folder_gives_its_lists_and_classes(scenes_folder):
    data = open_folder(scenes_folder)
    assert [len(x) for x in (data.labeled, data.unlabeled, data.validation)] == [3, 5, 2]
    assert data.labeled[0].image.path == str(scenes_folder / "images" / "labeled_0000.png")
    assert data.id2label == {n: facts.name for n, facts in enumerate(CLASSES)}
    assert data.palette == [list(facts.color) for facts in CLASSES]
    assert data.class_concepts == {facts.name: facts.concepts for facts in CLASSES}
    assert data.lists["validation"] == [
        (f"images/validation_000{n}.png", f"labels/validation_000{n}.png") for n in (0, 1)
    ]


def test_class_names_replace_those_of_the_file(scenes_folder):
    data = open_folder(scenes_folder, class_names=["a_b", "c", "d", "e", "f", "water"])
    assert data.id2label[0] == "a_b" and data.class_concepts["a_b"] == ["a b"]
    assert data.class_concepts["water"] == CLASSES[5].concepts  # found by its name


def test_classes_are_counted_if_nothing_names_them(folder):
    (folder / "classes.json").unlink()
    data = open_folder(folder)
    assert data.id2label == {n: f"class_{n}" for n in range(6)}
    assert data.palette == [list(facts.color) for facts in CLASSES]  # from the label files
    assert data.class_concepts is None


@pytest.fixture
def unnamed(folder) -> Path:
    """The drawn folder without class names; its labels are 0, 1 and 2."""
    (folder / "classes.json").unlink()
    change_labels(folder, lambda values: values // 2)
    return folder


def change_labels(folder, change, prefix=""):
    for path in (folder / "labels").glob(f"{prefix}*.png"):
        Image.fromarray(change(np.asarray(Image.open(path)))).save(path)


def open_for_model(folder, needed=("validation",), config=None, class_names=None, **settings):
    options = DataOptions(data_dir=str(folder), class_names=class_names)
    return open_source(options, config=config or make_config(), needed=needed, **settings)


def doubts(data) -> list[str]:
    """Messages about classes without names."""
    return [finding.message for finding in data.findings if finding.kind == "classes without names"]


@pytest.mark.parametrize("needed", [("validation",), SPLITS])
def test_labels_without_names_are_taken_as_the_classes_of_a_model_with_a_warning(unnamed, needed):
    data = open_for_model(unnamed, needed)
    assert data.id2label == {0: "land", 1: "road", 2: "water"}
    (message,) = doubts(data)
    assert "taken as the classes of the model: 0 = land, 1 = road, 2 = water. If this is right, say so: " in message
    assert "`class_names=['land', 'road', 'water']`. Otherwise name the classes of the data" in message


def test_named_classes_are_not_doubted(unnamed, scenes_folder):
    named = open_for_model(unnamed, class_names=["land", "road", "water"])
    assert named.id2label == {0: "land", 1: "road", 2: "water"} and not doubts(named)
    other = open_for_model(unnamed, class_names=["roof", "lawn", "lake"])
    assert other.id2label == {0: "roof", 1: "lawn", 2: "lake"} and not doubts(other)
    assert not doubts(open_for_model(scenes_folder))  # by its classes.json


@pytest.mark.parametrize("highest", [0, 1])
def test_fewer_labels_than_classes_of_a_model_need_names(unnamed, highest):
    change_labels(unnamed, lambda values: np.minimum(values, highest).astype(np.uint8))
    message = (
        rf"The model has 3 classes \(0 = land, 1 = road, 2 = water\), but the highest label of the data is {highest}, "
        r".* say so: `class_names=\['land', 'road', 'water'\]`. Otherwise name the classes of the data"
    )
    for needed in (("validation",), SPLITS):
        with pytest.raises(UserError, match=message):
            open_for_model(unnamed, needed)
    data = open_for_model(unnamed, class_names=["land", "road", "water"])
    assert data.id2label == {0: "land", 1: "road", 2: "water"} and not doubts(data)


def test_a_class_may_be_missing_in_the_validation_set(unnamed):
    """The labels of the training images show that the data has as many classes as the model."""
    change_labels(unnamed, lambda values: np.minimum(values, 1).astype(np.uint8), "validation_")
    assert len(doubts(open_for_model(unnamed))) == 1
    change_labels(unnamed, lambda values: np.where(values == 1, 0, values).astype(np.uint8))
    assert len(doubts(open_for_model(unnamed, SPLITS))) == 1  # a lower class may be missing everywhere


def test_more_labels_than_classes_of_a_model_are_errors(unnamed):
    change_labels(unnamed, lambda values: values + 1)
    with pytest.raises(UserError, match=r"has the label 3 .* but 3 classes have the labels 0 to 2"):
        open_for_model(unnamed)


def test_a_model_without_class_names_fits_its_own_data(unnamed):
    config = make_config(id2label={index: f"class_{index}" for index in range(3)})
    change_labels(unnamed, lambda values: np.minimum(values, 1).astype(np.uint8))
    data = open_for_model(unnamed, config=config)
    assert list(data.id2label.values()) == ["class_0", "class_1", "class_2"] and not doubts(data)


def test_images_to_predict_need_no_label_maps(unnamed):
    for path in (unnamed / "labels").glob("validation_*"):
        path.write_bytes(b"no label map")
    data = open_for_model(unnamed, with_labels=False)
    assert data.scans["validation"].labels is None and len(data.scans["validation"].images) == 2
    assert data.id2label == {0: "land", 1: "road", 2: "water"} and not data.findings
    with pytest.raises(UserError, match=r"2 errors\.\nunreadable files"):
        open_for_model(unnamed)


def test_a_trained_model_gives_the_rule_for_images():
    config = make_config(image_bands=[3, 2, 1], image_scale=[[0, 255]])
    assert image_rule(DataOptions(), config) == ImageRule((3, 2, 1), ((0, 255),))
    assert image_rule(DataOptions(bands=(1, 2, 3)), config) == ImageRule((1, 2, 3))
    assert image_rule(DataOptions(scale="percentiles"), config) == ImageRule()
    assert image_rule(DataOptions()) == ImageRule()


def test_values_that_are_probably_not_class_indices_are_refused(folder):
    (folder / "classes.json").unlink()
    for path in (folder / "labels").glob("*.png"):
        Image.new("L", (48, 48), 200).save(path)
    message = r"The label maps hold 200, but not 0, 1, 2, 3, 4. .*`class_names`. .*`label_map=\{200: 1\}`"
    with pytest.raises(UserError, match=message):
        open_folder(folder)


# --- labels of unlabelled images


def test_labels_of_unlabelled_images_are_read_only_on_request(folder):
    for path in (folder / "labels").glob("unlabeled_*"):
        path.write_bytes(b"not an image")
    open_folder(folder)
    with pytest.raises(UserError, match=r"5 errors.\nunreadable files \(5\)"):
        open_source(DataOptions(data_dir=str(folder)), with_hidden_labels=True)


def test_labels_of_unlabelled_images_may_be_missing(folder):
    for path in (folder / "labels").glob("unlabeled_*"):
        path.unlink()
    data = open_source(DataOptions(data_dir=str(folder)), with_hidden_labels=True)
    assert data.scans["unlabeled"].labels == [None] * 5


# --- drawn sets


def test_sets_are_drawn_if_there_are_no_lists(plain_folder):
    options = DataOptions(data_dir=str(plain_folder), labeled_fraction=0.5, validation_fraction=0.2)
    data, again, other = (open_source(options, seed) for seed in (1, 1, 2))
    assert [len(part) for part in (data.labeled, data.unlabeled, data.validation)] == [4, 6, 2]
    everything = [*data.labeled, *data.unlabeled, *data.validation]
    assert len({sample.image for sample in everything}) == 12
    for sample in everything:  # a label file has the name and the subfolder of its image
        n = int(Path(sample.image.path).stem)
        expected = str(plain_folder / "labels" / f"area{n % 2}" / f"{n}.png") if n < 10 else None
        assert (sample.label and sample.label.path) == expected
    assert again.hash == data.hash != other.hash and again.lists == data.lists
    assert "7.jpg" in file_names(data.labeled)  # the only image of class 3

    everything_labeled = open_folder(plain_folder)
    assert [len(x) for x in (everything_labeled.labeled, everything_labeled.unlabeled)] == [8, 2]


def test_drawn_sets_are_those_of_earlier_runs(plain_folder):
    options = DataOptions(data_dir=str(plain_folder), labeled_fraction=0.5)
    assert open_source(options, 1).hash == "ec45b44f8ee1"


def test_groups_are_not_divided_between_training_and_validation(plain_folder):
    shutil.move(plain_folder / "labels" / "area1" / "7.png", plain_folder / "labels" / "area1" / "11.png")
    data = open_folder(plain_folder, labeled_fraction=0.5, group_regex=r"area\d", validation_fraction=0.1)
    sides = [{re.search(r"area\d", name)[0] for name in part.names} for part in (data.validation, data.labeled)]
    assert len(sides[0]) == 1 and not sides[0] & sides[1]
    assert not sides[0] & {re.search(r"area\d", name)[0] for name in data.unlabeled.names}


def test_groups_are_found_in_the_path_below_images(plain_folder):
    message = r"`group_regex` is 'tile\\d', which matches no image name, such as 'area0/0.jpg'"
    with pytest.raises(UserError, match=message):
        open_folder(plain_folder, labeled_fraction=0.5, group_regex=r"tile\d")
    data = open_folder(plain_folder, labeled_fraction=0.5, group_regex=r"^(area\d)/\d+")  # the group in brackets
    assert len({Path(name).parent.name for name in data.validation.names}) == 1


def test_drawn_lists_can_be_read_again(plain_folder, tmp_path):
    for kind, suffix in (("images", "jpg"), ("labels", "png")):  # also with a space in a name
        (plain_folder / kind / "area0" / f"0.{suffix}").rename(plain_folder / kind / "area0" / f"a b.{suffix}")
    data = open_folder(plain_folder, labeled_fraction=0.5)
    write_lists(tmp_path / "lists", data.lists, {})
    again = open_folder(plain_folder, splits_dir=str(tmp_path / "lists"))
    assert again.hash == data.hash and again.lists["validation"] == data.lists["validation"]


def test_a_validation_list_is_kept_when_the_other_sets_are_drawn(plain_folder):
    (plain_folder / "splits").mkdir()
    (plain_folder / "splits" / "val.txt").write_text("images/area1/3.jpg labels/area1/3.png\n", encoding="utf-8")
    data = open_folder(plain_folder, labeled_fraction=1 / 3)
    assert file_names(data.validation) == ["3.jpg"] and len(data.labeled) == 3 and len(data.unlabeled) == 8
    assert "3.jpg" not in file_names(data.labeled) + file_names(data.unlabeled)


def test_sets_that_are_not_needed_may_be_empty_and_are_not_checked(plain_folder):
    options = DataOptions(data_dir=str(plain_folder))
    shutil.rmtree(plain_folder / "images")
    shutil.copytree(plain_folder / "labels", plain_folder / "images")  # every image has a label
    for n, path in enumerate((plain_folder / "images").rglob("*.png")):
        Image.new("RGB", (20, 20), (n, 0, 0)).save(path)
    assert len(open_source(options, needed=("labeled", "validation")).unlabeled) == 0
    data = open_source(options, needed=("validation",))
    assert not data.scans["labeled"].images and len(data.scans["validation"].images) == 2
    message = r"There is no unlabeled image. Add images without labels, .*`labeled_fraction`, .*`method='supervised'`"
    with pytest.raises(UserError, match=message):
        open_source(options)


def test_too_few_labels_to_draw_from_are_refused(plain_folder):
    for path in sorted((plain_folder / "labels").rglob("*.png"))[1:]:
        path.unlink()
    with pytest.raises(UserError, match="Of 12 images, 1 have a label map: too few to train and to validate"):
        open_folder(plain_folder)


def test_nothing_is_written_beside_the_data(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    open_folder(folder)
    open_folder(folder, labeled_fraction=0.5)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


# --- rules


def test_rules_are_used_for_every_set(folder):
    """The masks are counted from 1, and red and blue are exchanged."""
    for path in (folder / "labels").glob("*.png"):
        Image.fromarray(np.asarray(Image.open(path)) + 1).save(path)
    data = open_folder(folder, reduce_labels=True, bands=(3, 2, 1))
    assert data.labeled.label_rule == data.unlabeled.label_rule == LabelRule(reduce_labels=True)
    assert data.validation.image_rule == ImageRule(bands=(3, 2, 1))
    plain = open_folder(folder, label_map={1: 0, 2: 1, 3: 2, 4: 3, 5: 4, 6: 5})
    assert [a[1].tolist() for a in arrays(data.validation)] == [a[1].tolist() for a in arrays(plain.validation)]
    assert np.array_equal(arrays(data.labeled)[0][0], arrays(plain.labeled)[0][0][..., ::-1])


def test_images_that_were_converted_before_are_read_without_a_rule(folder):
    """Neither the bands of a trained model nor those of the options apply to them."""
    before = arrays(open_folder(folder).validation)
    content = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
    content = {"classes": content} if isinstance(content, list) else content
    content |= {"converted_from": {"bands": [5, 3, 1], "scale": [[0, 3000]]}, "ground_sampling_distance_m": 0.3}
    (folder / "classes.json").write_text(json.dumps(content), encoding="utf-8")
    config = make_config(image_bands=[3, 2, 1], image_scale=[[0, 10]])
    data = open_source(DataOptions(data_dir=str(folder), class_names=list("abcdef")), config=config)
    for found, expected in zip(arrays(data.validation), before, strict=True):
        assert np.array_equal(found[0], expected[0])
    assert data.read_rule == ImageRule((5, 3, 1), ((0, 3000),)) and data.labeled.image_rule == ImageRule()
    assert data.ground_sampling_distance_m == 0.3
    for options in ({"bands": (5, 3, 1)}, {"scale": "percentiles"}):
        message = rf"`{min(options)}` is .*, but {folder} has images that were converted to RGB already"
        with pytest.raises(UserError, match=message):
            open_folder(folder, **options)


def test_a_colour_file_names_the_classes(folder, tmp_path):
    before = [values.tolist() for _, values in arrays(open_folder(folder).labeled)]
    for path in (folder / "labels").glob("*.png"):
        Image.open(path).convert("RGB").save(path)
    shutil.move(folder / "classes.json", tmp_path / "colors.json")
    data = open_folder(folder, label_colors=str(tmp_path / "colors.json"))
    assert data.id2label == {n: facts.name for n, facts in enumerate(CLASSES)}
    assert [values.tolist() for _, values in arrays(data.labeled)] == before
    assert data.labeled_pixels.tolist() == np.bincount(np.ravel(before), minlength=6).tolist()
    (tmp_path / "names.json").write_text('[{"name": "a"}]', encoding="utf-8")
    with pytest.raises(UserError, match=r"`label_colors` is '.*names.json', which does not give a color to every"):
        open_folder(folder, label_colors=str(tmp_path / "names.json"))


def test_percentiles_give_one_scale_for_all_sets(folder):
    values = {}
    for n, path in enumerate(sorted((folder / "images").glob("*.png"))):
        values[path.stem] = np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 16 + n
        Image.fromarray(values[path.stem]).save(path.with_suffix(".tif"))
        path.unlink()
    for path in (folder / "splits").glob("*.txt"):
        path.write_text(re.sub(r"(images/\S+)\.png", r"\1.tif", path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(UserError, match=r"uint16, values .*`scale='percentiles'` computes one range"):
        open_folder(folder)
    data = open_folder(folder, scale="percentiles")
    training = np.stack([array for name, array in values.items() if not name.startswith("validation")])
    ((low, high),) = data.labeled.image_rule.scale
    assert (low, high) == pytest.approx(tuple(np.percentile(training, (2, 98))))
    assert data.validation.image_rule == data.unlabeled.image_rule == data.labeled.image_rule
    expected = ((values["validation_0000"] - low) * 255 / (high - low)).clip(0, 255).round().astype(int)
    image = np.asarray(data.validation[0].load_image()).astype(int)
    assert np.abs(image - expected[..., None]).max() <= 1  # float32 may round the other way


# --- what evaluation needs


def test_validation_needs_no_label_files_of_training(plain_folder):
    lists = {
        "labeled": [("images/area0/0.jpg", "labels/area0/missing.png")],
        "unlabeled": [("images/area1/1.jpg", None)],
    }
    lists["validation"] = [(f"images/area{n % 2}/{n}.jpg", f"labels/area{n % 2}/{n}.png") for n in (2, 3, 4)]
    write_lists(plain_folder / "splits", lists, {})
    source = open_source(DataOptions(data_dir=str(plain_folder)), needed=("validation",))
    assert len(source.validation) == 3 and len(source.id2label) == 3


# --- the same data as a folder, as a saved data set and on the Hub


def contents(**options) -> dict:
    """Open a source; return size and pixels of its images and label maps by set, and its classes."""
    source = open_source(DataOptions(**options))
    found = {"id2label": source.id2label, "palette": source.palette}
    for split in SPLITS:
        pairs = ((s.load_image(), s.label and s.load_label()) for s in getattr(source, split))
        found[split] = [(image.size, image.tobytes(), label and label.tobytes()) for image, label in pairs]
    return found


@pytest.mark.parametrize("origin", ["scenes", "dubai"])
def test_a_folder_a_prepared_data_set_and_one_on_the_hub_are_the_same(origin, hub, scenes_folder, tmp_path):
    root = scenes_folder if origin == "scenes" else DUBAI
    if not root.exists():
        pytest.skip("the Dubai images are not here")
    names = [] if origin == "scenes" else ["building", "land", "road", "vegetation", "water"]
    words = ("--data_dir", root, "--output_dir", tmp_path / "prepared", "--push_to_hub", f"user/{origin}")
    done = run_command("prepare", *words, *(["--class_names", *names] if names else []))
    assert done.returncode == 0, done.stderr
    assert "Pushed" in done.stdout and f"--dataset_name user/{origin}" in done.stdout
    from_folder = contents(data_dir=str(root), class_names=names or None)
    assert contents(dataset_name=str(tmp_path / "prepared")) == from_folder
    assert contents(dataset_name=f"user/{origin}") == from_folder
    counts = [len(from_folder[split]) for split in SPLITS]
    assert counts == ([3, 5, 2] if origin == "scenes" else [8, 40, 16])
