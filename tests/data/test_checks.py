"""Break a folder in every way that the checks know. The message must name the file, the value and the remedy."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import open_folder
from PIL import Image

from co2s_hf.data import image_files
from co2s_hf.data.validation.checks import DataError
from co2s_hf.utils.errors import UserError


@pytest.fixture
def folder(scenes_folder, tmp_path):
    """A copy of the drawn folder (3 labelled, 5 unlabelled, 2 validation scenes of 48 px) that a test may change."""
    return Path(shutil.copytree(scenes_folder, tmp_path / "data"))


def write_image(folder, name, mode="RGB", size=(48, 48), color=0):
    Image.new(mode, size, color).save(folder / "images" / f"{name}.png")


def write_label(folder, name, values):
    values = np.full((48, 48), values, dtype=np.uint8) if np.isscalar(values) else values
    Image.fromarray(values).save(folder / "labels" / f"{name}.png")


def write_labels(folder, prefix, values):
    for path in (folder / "labels").glob(f"{prefix}*"):
        write_label(folder, path.stem, values)


def write_list(folder, name, text):
    (folder / "splits" / name).write_text(text, encoding="utf-8")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-400])


def count_from_1(folder):
    """Change all masks so that their classes start at 1."""
    for path in (folder / "labels").glob("*.png"):
        write_label(folder, path.stem, np.asarray(Image.open(path)) + 1)


def zeros_with(value, column, row):
    """A label map of zeros with another value in one pixel."""
    values = np.zeros((48, 48), dtype=np.uint8)
    values[row, column] = value
    return values


ERRORS = {
    "label outside": (
        lambda f: write_label(f, "validation_0001", zeros_with(9, 4, 5)),
        r"validation_0001.png has the label 9 \(1 px\), but 6 classes have the labels 0 to 5 and 255 means 'no class'"
        r". Name all classes with `class_names`, map the values to classes \(`label_map=\{7: 0, 9: 1\}`\), or correct",
    ),
    "off by one": (
        count_from_1,
        r"has the label 6 \(\d+ px\), but 6 classes .* counted from 1 and 0 means 'no class': `reduce_labels=True`",
    ),
    "colours for labels": (
        lambda f: Image.new("RGB", (48, 48)).save(f / "labels" / "labeled_0000.png"),
        r"labeled_0000.png has the PIL mode 'RGB'.*expected one band of class indices.*`label_colors='classes.json'`",
    ),
    "deep labels": (
        lambda f: Image.fromarray(np.full((48, 48), 300, np.uint16)).save(f / "labels" / "labeled_0000.png"),
        r"labeled_0000.png has the label 300 \(2304 px, the first at column 0, row 0\), which no rule covers. "
        r"Add it to `label_map` or `label_colors`, name it with `ignore_index`, or correct the file",
    ),
    "other size": (
        lambda f: Image.new("L", (47, 48)).save(f / "labels" / "labeled_0002.png"),
        r"labeled_0002.png is 47x48 px, but .*labeled_0002.png is 48x48 px. Each pixel of an image needs one label",
    ),
    "labelled and unlabelled": (
        lambda f: write_list(f, "unlabeled.txt", (f / "splits" / "labeled.txt").read_text("utf-8")),
        r"images in two places \(3\):\n  .*labeled_0000.png is in both labeled and unlabeled. Remove it from one list",
    ),
    "in validation": (
        lambda f: shutil.copy(f / "splits" / "val.txt", f / "splits" / "unlabeled.txt"),
        r"images in two places \(2\):\n  .*validation_0000.png is in both unlabeled and validation",
    ),
    "the same bytes": (
        lambda f: shutil.copy(f / "images" / "labeled_0001.png", f / "images" / "validation_0000.png"),
        r"validation_0000.png \(validation\) has the same bytes as .*labeled_0001.png \(labeled\). Keep one of them",
    ),
    "no validation label": (
        lambda f: [path.unlink() for path in (f / "labels").glob("validation_*")],
        r"unreadable files \(2\):\n  .*labels/validation_0000.png does not exist. Correct the list",
    ),
    "no validation list entry": (
        lambda f: write_list(f, "val.txt", "images/validation_0000.png\n"),
        r"val.txt, line 1: 'images/validation_0000.png' is not of the form 'images/NAME labels/NAME'",
    ),
    "empty list": (lambda f: write_list(f, "labeled.txt", "\n"), r"labeled.txt is empty"),
    "missing image": (
        lambda f: [(f / "images" / f"unlabeled_000{n}.png").unlink() for n in (1, 3)],
        r"2 errors.\nunreadable files \(2\):\n  .*unlabeled_0001.png does not exist.*\n  .*unlabeled_0003.png does",
    ),
    "truncated image": (
        lambda f: truncate(f / "images" / "unlabeled_0003.png"),
        r"unlabeled_0003.png cannot be read as an image: .*truncated.* Replace it, or remove it from its list",
    ),
    "unreadable image": (
        lambda f: (f / "images" / "validation_0000.png").write_bytes(b"broken"),
        r"validation_0000.png cannot be read as an image",
    ),
    "unreadable label": (
        lambda f: (f / "labels" / "labeled_0000.png").write_bytes(b"broken"),
        r"labels/labeled_0000.png cannot be read as an image",
    ),
    "four bands": (
        lambda f: write_image(f, "unlabeled_0002", "RGBA"),
        r"unlabeled_0002.png has the PIL mode 'RGBA' \(4 bands of uint8\); expected 8-bit RGB. .*`bands=\(1, 2, 3\)`",
    ),
    "all ignored": (
        lambda f: write_labels(f, "validation_", 255),
        r"No pixel of the 2 validation images has a class: all have the value 255, .*`ignore_index`",
    ),
    "classes that are no JSON": (
        lambda f: (f / "classes.json").write_text("{", encoding="utf-8"),
        r"classes.json cannot be read as JSON",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_file_and_the_remedy(folder, name):
    damage, message = ERRORS[name]
    damage(folder)
    with pytest.raises(UserError, match=message):
        open_folder(folder)


@pytest.mark.parametrize("is_named", [True, False])
def test_masks_of_0_and_255_are_recognized(folder, is_named):
    (folder / "classes.json").unlink()
    if is_named:
        (folder / "classes.json").write_text('[{"name": "land"}, {"name": "water"}]', encoding="utf-8")
    half = np.repeat(np.array([[0], [255]], dtype=np.uint8), 24, axis=0) * np.ones((1, 48), dtype=np.uint8)
    write_labels(folder, "", half)
    with pytest.raises(DataError, match=r"labeled label maps hold only 0 and 255.*`label_map=\{0: 0, 255: 1\}`"):
        open_folder(folder)
    data = open_folder(folder, label_map={0: 0, 255: 1}, ignore_index=254)
    assert data.labeled_pixels.tolist() == [3 * 24 * 48] * 2


def test_classes_json_may_give_another_ignore_index(folder):
    (folder / "classes.json").write_text('{"classes": [{"name": "land"}], "ignore_index": 7}', encoding="utf-8")
    write_labels(folder, "", zeros_with(7, 3, 3))
    assert open_folder(folder).labeled_pixels.tolist() == [3 * (48 * 48 - 1)]


def test_decompression_bombs_are_errors(folder, monkeypatch):
    write_image(folder, "unlabeled_0000", size=(200, 200))
    monkeypatch.setattr(image_files, "MAX_PIXELS", 4000)
    with pytest.raises(DataError, match=r"unlabeled_0000.png has 200 x 200 pixels; at most 4,000 are read at once"):
        open_folder(folder)


def test_colours_without_a_class_are_counted_and_located(folder):
    for path in (folder / "labels").glob("*.png"):
        Image.open(path).convert("RGB").save(path)
    colors = np.asarray(Image.open(folder / "labels" / "labeled_0001.png")).copy()
    colors[30, 7] = colors[31, 8] = (1, 2, 3)
    Image.fromarray(colors).save(folder / "labels" / "labeled_0001.png")
    message = r"labeled_0001.png has the label \(1, 2, 3\) \(2 px, the first at column 7, row 30\).*`label_colors`"
    with pytest.raises(DataError, match=message):
        open_folder(folder, label_colors=str(folder / "classes.json"))


def test_all_errors_are_listed_together(folder):
    write_label(folder, "labeled_0000", 8)
    write_label(folder, "labeled_0001", 9)
    truncate(folder / "images" / "unlabeled_0004.png")
    write_image(folder, "validation_0001", size=(20, 20))
    with pytest.raises(DataError) as caught:
        open_folder(folder)
    message = str(caught.value)
    assert message.startswith("The data cannot be used: 4 errors.")
    for part in ("labeled_0000.png has the label 8", "labeled_0001.png has the label 9", "unlabeled_0004.png",
                 "validation_0001.png is 48x48 px, but"):  # fmt: skip
        assert part in message


def test_at_most_twenty_errors_of_a_kind_are_listed(tmp_path):
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    for n in range(50):
        Image.new("RGB", (8, 8), (n, 0, 0)).save(tmp_path / "images" / f"{n}.png")
        Image.new("L", (8, 8), n % 2 * 7).save(tmp_path / "labels" / f"{n}.png")
    with pytest.raises(DataError) as caught:
        open_folder(tmp_path, class_names=["a", "b"], labeled_fraction=0.98)
    message = str(caught.value)
    found = int(re.search(r"labels outside the classes \((\d+)\)", message)[1])
    assert found > 20 and message.count("has the label 7") == 20 and f"... and {found - 20} more." in message


def warnings_of(folder, **options):
    return {finding.kind: finding.message for finding in open_folder(folder, **options).findings}


def test_oddities_are_warnings(folder):
    write_label(folder, "labeled_0002", (np.arange(48 * 48, dtype=np.uint8) % 6).reshape(48, 48))
    assert not open_folder(folder).findings
    write_labels(folder, "labeled_", 3)
    write_label(folder, "labeled_0001", 255)
    shutil.copy(folder / "images" / "unlabeled_0001.png", folder / "images" / "unlabeled_0004.png")
    found = warnings_of(folder)
    unlearnable = "the class 5, water, so a model cannot learn it. Label an image that contains it."
    assert unlearnable in found["classes never labelled"]
    empty = found["label maps without a class"]
    assert empty.startswith("All pixels of ")
    assert "labeled_0001.png have the value 255, which means 'no class'. The file is of no use" in empty
    assert "unlabeled_0004.png (unlabeled) has the same bytes as" in found["images in two places"]


def test_an_image_that_is_twice_in_one_list_is_a_warning(folder):
    lines = (folder / "splits" / "unlabeled.txt").read_text(encoding="utf-8")
    write_list(folder, "unlabeled.txt", lines + lines.splitlines()[0] + "\n")
    assert "unlabeled_0000.png is twice in unlabeled. Remove it" in warnings_of(folder)["images in two places"]
