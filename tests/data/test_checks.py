"""Break a folder in every way that the checks know. The message must name the file, the value and the remedy."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import open_folder
from PIL import Image, ImageFilter

from co2s_hf.data import image_files
from co2s_hf.data.validation.checks import DataError, Finding, merge_findings, report_findings
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
    "more than 8 bits": (
        lambda f: write_image(f, "unlabeled_0002", "I"),
        r"unlabeled_0002.png has 1 band of uint16, values 0 to 0; expected 8-bit RGB. Use `scale=\(\(0, 1\),\)`",
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


def test_errors_of_one_cause_are_one_entry_with_three_examples(tmp_path):
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    for n in range(50):
        Image.new("RGB", (8, 8), (n, 0, 0)).save(tmp_path / "images" / f"{n}.png")
        Image.new("L", (8, 8), n % 2 * 7).save(tmp_path / "labels" / f"{n}.png")
    with pytest.raises(DataError) as caught:
        open_folder(tmp_path, class_names=["a", "b"], labeled_fraction=0.98)
    message = str(caught.value)
    found = int(re.search(r"labels outside the classes \((\d+)\)", message)[1])
    assert found > 20 and message.count("has the label 7") == 3
    assert message.startswith(f"The data cannot be used: {found} errors.") and message.endswith(
        f"and {found - 3} more."
    )


def test_findings_are_merged_by_kind_and_cause():
    found = [Finding("sizes", f"{n}.png", cause="a") for n in range(5)]
    found += [Finding("sizes", "6.png", cause="b"), Finding("sizes", "7.png", is_warning=True, cause="a")]
    found += [Finding("names", "8.png"), Finding("names", "9.png")]  # without a cause, each message is one
    merged = merge_findings(found)
    assert [(finding.message, finding.num_files) for finding in merged] == [
        ("0.png\n1.png\n2.png\n... and 2 more.", 5),
        *[(f"{n}.png", 1) for n in (6, 7, 8, 9)],
    ]
    assert report_findings(merged[:2]) == "sizes (6):\n  0.png\n  1.png\n  2.png\n  ... and 2 more.\n  6.png"


def test_causes_of_unreadable_files_are_separate(folder):
    for n in range(4):
        (folder / "images" / f"unlabeled_000{n}.png").unlink()
    write_image(folder, "unlabeled_0004", "I")
    with pytest.raises(DataError) as caught:
        open_folder(folder)
    lines = str(caught.value).splitlines()
    assert lines[:2] == ["The data cannot be used: 5 errors.", "unreadable files (5):"]
    assert [line.split("unlabeled_")[-1][:4] for line in lines[2:5]] == ["0000", "0001", "0002"]
    assert lines[5] == "  ... and 1 more." and "unlabeled_0004.png has 1 band of uint16" in lines[6]
    assert len(lines) == 7


# --- soft and lossy masks


SOFT = r"The values change gradually at borders, as in a soft mask .*`label_map=\{'0-127': 0, '128-255': 1\}`"
JPEG = r"JPEG files do not keep the values at the borders of classes. .*`label_map=\{'0-127': 0, '128-255': 1\}`"


def square() -> Image.Image:
    """A mask of 0 and 237, with a square of 24 px in the middle."""
    mask = np.zeros((48, 48), dtype=np.uint8)
    mask[12:36, 12:36] = 237
    return Image.fromarray(mask)


@pytest.fixture
def soft_folder(folder):
    """All label maps are one blurred mask. The classes have no names."""
    (folder / "classes.json").unlink()
    for path in (folder / "labels").glob("*.png"):
        square().filter(ImageFilter.GaussianBlur(4)).save(path)
    return folder


def store_as_jpeg(folder, masks):
    """Replace all label maps by JPEG files of these masks."""
    for path in list((folder / "labels").glob("*.png")):
        masks.save(path.with_suffix(".jpg"))
        path.unlink()
    for path in (folder / "splits").glob("*.txt"):
        path.write_text(re.sub(r"(labels/\S+)\.png", r"\1.jpg", path.read_text(encoding="utf-8")), encoding="utf-8")


def test_soft_masks_are_not_hundreds_of_classes(soft_folder):
    values = np.unique(np.asarray(Image.open(soft_folder / "labels" / "labeled_0000.png")))
    assert len(values) > 40
    message = (
        rf"The label maps hold {len(values)} classes without names. The highest one is {values.max()}, in "
        rf"\S*labels/labeled_0000.png. More than 40 classes need names. {SOFT}.*`class_names`"
    )
    with pytest.raises(UserError, match=message):
        open_folder(soft_folder)
    data = open_folder(soft_folder, class_names=[f"level {n}" for n in range(256)])  # their names are given
    assert len(data.id2label) == 256


def test_ranges_make_classes_of_soft_masks(soft_folder):
    hard = np.asarray(Image.open(soft_folder / "labels" / "labeled_0000.png")) > 127
    data = open_folder(soft_folder, label_map={"0-127": 0, "128-255": 1})
    assert data.labeled_pixels.tolist() == [3 * (~hard).sum(), 3 * hard.sum()] and not data.findings
    assert np.array_equal(np.asarray(data.validation[0].load_label()), hard.astype(np.uint8))


def test_values_of_soft_masks_without_a_rule_are_one_entry(soft_folder):
    values = np.unique(np.asarray(Image.open(soft_folder / "labels" / "labeled_0000.png")))
    unknown = sorted(set(values.tolist()) - {0, 237})
    with pytest.raises(DataError, match=SOFT) as caught:
        open_folder(soft_folder, label_map={0: 0, 237: 1})
    lines = str(caught.value).splitlines()
    assert lines[:2] == ["The data cannot be used: 5 errors.", "labels without a rule (5):"]
    assert len(lines) == 6 and lines[5] == "  ... and 2 more."  # one cause in labelled and validation images
    assert re.search(rf"labeled_0000.png has the label {unknown[0]} \(\d+ px, the first at column", lines[2])
    assert f"and {len(unknown) - 1} other values, which no rule covers" in lines[2]


def test_values_of_soft_masks_outside_two_classes_are_shortened(soft_folder):
    with pytest.raises(
        DataError, match=r"has the label 2 \(\d+ px\), .* and \d+ more, but 2 classes .*" + SOFT
    ) as caught:
        open_folder(soft_folder, class_names=["land", "house"])
    assert str(caught.value).splitlines()[2].count(" px)") == 5


def test_jpeg_masks_are_recognized(folder):
    (folder / "classes.json").unlink()
    store_as_jpeg(folder, square())
    with pytest.raises(UserError, match=JPEG):
        open_folder(folder)
    with pytest.raises(DataError, match=r"labels without a rule \(5\):\n.*" + JPEG):
        open_folder(folder, label_map={0: 0, 237: 1})
    data = open_folder(folder, label_map={"0-127": 0, "128-255": 1})
    assert data.labeled_pixels.tolist() == [3 * (48 * 48 - 24 * 24), 3 * 24 * 24] and not data.findings


def test_jpeg_masks_with_few_values_are_a_warning(folder):
    mask = Image.fromarray((np.asarray(square()) > 0).astype(np.uint8) * 4)
    store_as_jpeg(folder, mask)
    names = [f"class {n}" for n in range(30)]
    (finding,) = [f for f in open_folder(folder, class_names=names).findings if f.kind == "label maps stored as JPEG"]
    assert finding.is_warning and finding.num_files == 5 and finding.message.endswith("\n... and 2 more.")
    assert "labeled_0000.jpg is a JPEG file, and JPEG changes values at the borders" in finding.message
    assert "Save the label maps as PNG with the values of the classes." in finding.message
    for path in (folder / "labels").glob("*.jpg"):
        Image.new("L", (48, 48), 4).save(path)  # JPEG keeps a single value
    assert "label maps stored as JPEG" not in warnings_of(folder, class_names=names)


@pytest.mark.parametrize("num_classes", [40, 41])
def test_more_than_forty_classes_need_names(folder, num_classes):
    (folder / "classes.json").unlink()
    write_labels(folder, "", np.arange(48 * 48, dtype=np.uint16).reshape(48, 48) // 48 % num_classes)
    if num_classes == 40:
        assert len(open_folder(folder).id2label) == 40
        return
    message = (
        r"hold 41 classes without names. The highest one is 40, in \S*labeled_0000.png. .* If these are class indices"
    )
    with pytest.raises(UserError, match=message):
        open_folder(folder)
    assert len(open_folder(folder, class_names=[f"name {n}" for n in range(41)]).id2label) == 41


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
