"""The paths of the pictures of images, and the record of a folder of pictures."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from helpers import run_command
from PIL import Image

from co2s_hf.data.reading import ImageRule
from co2s_hf.data.samples import FEATURES, Samples
from co2s_hf.inference.folders import (
    PictureOptions,
    check_names,
    picture_names,
    picture_path,
    samples_of_files,
    start_folder,
)
from co2s_hf.utils.errors import UserError


def files(*paths: str) -> Samples:
    return Samples.of_files(list(paths), [None] * len(paths))


def rows(*names: str | None) -> Samples:
    """Rows of a data set with these original file names."""
    images = [{"bytes": b"", "path": name} for name in names]
    columns = {"image": images, "label": [None] * len(names), "row": [f"train[{n}]" for n in range(len(names))]}
    return Samples(Dataset.from_dict(columns, features=FEATURES))


# --- paths


def test_pictures_have_the_paths_of_their_images():
    samples = files("data/images/deep/a.jpg", "data/images/b.tif", "data/more/c.jpg")
    assert picture_names(samples, "data") == ["deep/a.png", "b.png", "000002_c.png"]


@pytest.mark.parametrize("name", ["data/images/../../x.png", "data/images/deep/../../../../x.png"])
def test_names_that_leave_the_output_folder_are_refused(name):
    """Lists cannot have such names. If another reader of names lets one pass, no file elsewhere is overwritten."""
    picture = name.removeprefix("data/images/")
    message = f"The picture '{picture}' would lie outside the output folder; expected a path below it"
    with pytest.raises(UserError, match=message):
        picture_names(files("data/images/a.png", name), "data")
    with pytest.raises(UserError, match=message):
        check_names([picture], files(name))
    with pytest.raises(UserError, match=message):
        picture_path(Path("out"), picture)


@pytest.mark.parametrize("picture", ["/x.png", "..", "a/../../x.png", "", "."])
def test_no_path_leaves_its_folder(picture):
    with pytest.raises(UserError, match="would lie outside the output folder"):
        picture_path(Path("out"), picture)


def test_paths_below_the_folder_are_joined():
    assert picture_path(Path("out"), "deep/..a.png") == Path("out/deep/..a.png")


@pytest.mark.parametrize(
    ("name", "picture"),
    [
        (None, "000000_.png"),
        ("a.b.tif", "000000_a.b.png"),
        ("../../x.png", "000000_x.png"),
        (r"..\..\x.png", "000000_x.png"),
        ("/etc/x.png", "000000_x.png"),
        ("x\0\n.png", "000000_x__.png"),
        ("..", "000000_.png"),
        ("ä" * 300 + ".png", f"000000_{'ä' * 75}.png"),  # 150 bytes: longer names cannot be written
    ],
)
def test_names_of_rows_become_names_of_files(name, picture):
    """The original names in a data set may come from any system, and from anybody."""
    assert picture_names(rows(name), None) == [picture]


def test_links_in_a_folder_of_images_are_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").touch()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    samples, pictures = samples_of_files([str(tmp_path / "images")], tmp_path / "out", ImageRule())
    assert pictures == ["linked/a.png"] and samples.paths == [str(tmp_path / "images" / "linked" / "a.png")]


def test_a_hostile_list_overwrites_nothing(base_folder, tmp_path):
    """`co2s predict` of a folder whose list names a file of the user, which then is the name of a picture, too."""
    for name in ("images", "labels", "splits"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for path in ("data/images/a.png", "data/labels/a.png", "mine.png"):
        Image.new("L", (16, 16)).save(tmp_path / path)
    before = (tmp_path / "mine.png").read_bytes()
    (tmp_path / "data" / "splits" / "val.txt").write_text("images/../../mine.png labels/a.png\n", encoding="utf-8")
    for name in ("labeled", "unlabeled"):
        (tmp_path / "data" / "splits" / f"{name}.txt").write_text("images/a.png labels/a.png\n", encoding="utf-8")
    words = ("--checkpoint", base_folder, "--data_dir", tmp_path / "data", "--split", "validation", "--use_cpu")
    run = run_command("predict", *words, "--output_dir", tmp_path / "out")
    assert run.returncode == 1
    assert "val.txt, line 1: 'images/../../mine.png' has '..', which leads to another folder" in run.stderr
    assert (tmp_path / "mine.png").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"data", "mine.png"}


# --- predictions.json


OPTIONS = PictureOptions("model", crop_size=32)


def test_a_folder_is_continued_with_the_same_options(tmp_path):
    start_folder(tmp_path / "out", OPTIONS, {"a.png": "images/a.jpg"})
    start_folder(tmp_path / "out", OPTIONS, {"b.png": "images/b.jpg"})
    facts = json.loads((tmp_path / "out" / "predictions.json").read_text(encoding="utf-8"))
    assert facts["sources"] == {"a.png": "images/a.jpg", "b.png": "images/b.jpg"} and facts["crop_size"] == 32
    with pytest.raises(UserError, match=r"out holds other predictions: `crop_size` was 32. Choose another"):
        start_folder(tmp_path / "out", PictureOptions("model", crop_size=64), {})


INTACT = {"checkpoint": "model", "fusion": None, "crop_size": 32, "flip": False, "opacity": 0.5, "sources": {}}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (json.dumps(INTACT)[:40], "cannot be read as JSON: "),
        ("", "cannot be read as JSON: "),
        ("\0" * 100, "cannot be read as JSON: "),
        ("[" * 100_000, "cannot be read as JSON: .*recursion"),
        ("[]", "has no valid `checkpoint`, `fusion`, `crop_size`, `flip`, `opacity`, `sources`"),
        ("null", "has no valid `checkpoint`, `fusion`"),
        (json.dumps({key: value for key, value in INTACT.items() if key != "opacity"}), "has no valid `opacity`"),
        (json.dumps({key: value for key, value in INTACT.items() if key != "sources"}), "has no valid `sources`"),
        (json.dumps(INTACT | {"sources": ["a.png"]}), "has no valid `sources`"),
    ],
    ids=lambda value: value[:40],
)
def test_a_damaged_record_is_named(tmp_path, text, problem):
    (tmp_path / "predictions.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=rf"predictions.json {problem}.*Choose another `output_dir`, or remove this"):
        start_folder(tmp_path, OPTIONS, {"a.png": "images/a.jpg"})
    assert (tmp_path / "predictions.json").read_text(encoding="utf-8") == text


def test_label_maps_beside_images_are_left_out(tmp_path):
    for name in ("images/a.png", "labels/a.png", "more/labels/b.png"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / "data" / name)
    samples, pictures = samples_of_files([str(tmp_path / "data")], tmp_path / "out", ImageRule())
    assert pictures == ["images/a.png", "more/labels/b.png"] and len(samples) == 2
