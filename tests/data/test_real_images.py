"""The real images in assets/dubai, the script that made them, and the draw of their labels."""

import importlib.util
import json
import sys

import numpy as np
import pytest
from helpers import EXAMPLES
from PIL import Image

from co2s_hf.data.listings import read_classes
from co2s_hf.data.options import REAL_FOLDER, DataOptions
from co2s_hf.data.sources import open_source


NAMES = ["building", "land", "road", "vegetation", "water"]
# Words that the text tower of the small CLIP backbone was trained on.
WORDS = "airplane, bare soil, buildings, cars, chaparral, court, dock, field, grass, mobile home, pavement, sand, "
WORDS += "sea, ship, tanks, trees, water"
VALIDATION = [f"tile{tile}_part{part}" for tile in range(1, 9) for part in (3, 7)]


def images() -> dict[str, Image.Image]:
    return {path.stem: Image.open(path) for path in sorted((REAL_FOLDER / "images").glob("*.jpg"))}


def labels_of(name: str) -> np.ndarray:
    with Image.open(REAL_FOLDER / "labels" / f"{name}.png") as mask:
        return np.asarray(mask)


def test_the_images_have_their_sizes_and_a_label_map_each():
    found = images()
    assert len(found) == 216 + 16
    assert sorted(path.stem for path in (REAL_FOLDER / "labels").iterdir()) == sorted(found)
    wholes = {name: image for name, image in found.items() if name in VALIDATION}
    assert len(wholes) == 16
    assert {min(image.size) for image in wholes.values()} == {509, 512}
    assert max(max(image.size) for image in wholes.values()) == 744
    assert {image.size for name, image in found.items() if name not in wholes} == {(256, 256)}
    assert {image.mode for image in found.values()} == {"RGB"}
    assert all(labels_of(name).shape[::-1] == image.size for name, image in found.items())
    assert sum(path.stat().st_size for path in REAL_FOLDER.rglob("*") if path.is_file()) < 8e6


def test_label_maps_hold_all_classes_and_their_colours():
    counts = np.zeros(256, dtype=int)
    palette = read_classes(REAL_FOLDER / "classes.json").palette
    for name in images():
        counts += np.bincount(labels_of(name).ravel(), minlength=256)
        with Image.open(REAL_FOLDER / "labels" / f"{name}.png") as mask:
            assert mask.mode == "P" and np.reshape(mask.getpalette(), (-1, 3))[:5].tolist() == palette
    assert set(np.flatnonzero(counts)) == {0, 1, 2, 3, 4, 255}
    shares = 100 * counts / counts.sum()
    assert shares[[0, 1, 2, 3, 4, 255]] == pytest.approx([13.9, 45.5, 9.3, 10.6, 19.5, 1.2], abs=0.1)


def test_concepts_are_words_of_the_text_tower():
    description = read_classes(REAL_FOLDER / "classes.json")
    assert description.names == NAMES and description.ignore_index == 255
    texts = [text for concepts in description.concepts.values() for text in concepts]
    assert set(texts) <= set(WORDS.split(", ")) and len(set(texts)) == len(texts)
    assert json.loads((REAL_FOLDER / "classes.json").read_text(encoding="utf-8"))[4]["concepts"] == ["water", "sea"]


def test_the_source_and_the_licence_are_named():
    text = (REAL_FOLDER / "README.md").read_text(encoding="utf-8")
    for words in ("Humans in the Loop", "Mohammed Bin Rashid Space Centre", "CC0 1.0", "Our changes"):
        assert words in text


def test_the_validation_images_are_fixed_and_no_tile_comes_from_them():
    source = open_source(DataOptions(), seed=0)
    assert [line[0] for line in source.lists["validation"]] == [f"images/{name}.jpg" for name in VALIDATION]
    assert source.lists["validation"] == open_source(DataOptions(), seed=1).lists["validation"]
    training = [image for name in ("labeled", "unlabeled") for image, _ in source.lists[name]]
    assert len(set(training)) == 216
    assert {name.split("_y")[0].removeprefix("images/") for name in training} == {
        f"tile{tile}_part{part}" for tile in range(1, 9) for part in (1, 2, 4, 5, 6, 8)
    }


def test_each_seed_draws_other_labels_of_all_classes():
    before = {path: path.stat().st_mtime_ns for path in REAL_FOLDER.rglob("*")}
    drawn = {seed: open_source(DataOptions(), seed) for seed in range(6)}
    for source in drawn.values():
        assert (len(source.labeled), len(source.unlabeled), len(source.validation)) == (18, 198, 16)
        assert list(source.id2label.values()) == NAMES and (source.labeled_pixels > 5000).all()
    assert len({source.hash for source in drawn.values()}) == 6
    assert drawn[0].hash == "3fa354c9fce5"  # results in the documentation depend on this draw
    assert {path: path.stat().st_mtime_ns for path in REAL_FOLDER.rglob("*")} == before  # nothing is written there


@pytest.mark.parametrize(("fraction", "sizes"), [(1 / 24, (9, 207)), (0.5, (108, 108)), (1, (216, 0))])
def test_another_share_of_the_tiles_can_be_labelled(fraction, sizes):
    options = DataOptions(data="real", labeled_fraction=fraction)
    source = open_source(options, needed=("labeled", "validation"))
    assert (len(source.labeled), len(source.unlabeled)) == sizes
    assert options == DataOptions(data="real", labeled_fraction=fraction)  # the caller's options stay as they are


# --- examples/make_dubai_tiles.py


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_dubai_tiles", EXAMPLES / "make_dubai_tiles.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tiles_reach_from_edge_to_edge(script):
    assert script.starts(256) == [0] and script.starts(200) == [0]
    assert script.starts(512) == [0, 256] and script.starts(634) == [0, 378]
    assert script.starts(665) == [0, 204, 409] and script.starts(744) == [0, 244, 488]


def test_a_reduced_label_covers_most_of_the_pixel(script):
    labels = np.full((1024, 2048), 1, dtype=np.uint8)
    labels[:, 1:1024:2] = 4  # columns 1, 3, 5 ...
    labels[1::2, 0:1024:2] = 4  # three quarters of every reduced pixel on the left
    labels[0::2, 1024:] = 255
    labels[1::4, 1024:] = 255  # three quarters of every second reduced row
    image, reduced = script.reduce(Image.new("RGB", (2048, 1024), (10, 200, 30)), labels)
    assert image.size == (1024, 512) and image.getpixel((5, 5)) == (10, 200, 30)
    assert (reduced[:, :512] == 4).all()
    assert (reduced[0::2, 512:] == 255).all() and reduced.dtype == np.uint8
    same = script.reduce(Image.new("RGB", (600, 500)), labels[:500, :600])
    assert same[0].size == (600, 500) and same[1] is not None and (same[1] == labels[:500, :600]).all()


def test_training_images_become_tiles_and_validation_images_stay_whole(script, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    source, output = tmp_path / "source", tmp_path / "output"
    for name in ("images", "labels", "splits"):
        (source / name).mkdir(parents=True)
    masks = {}
    for name, file in (("a", "labeled.txt"), ("b", "unlabeled.txt"), ("c", "val.txt")):
        masks[name] = rng.integers(0, 5, size=(512, 600), dtype=np.uint8)
        Image.fromarray(rng.integers(0, 256, size=(512, 600, 3), dtype=np.uint8)).save(source / f"images/{name}.png")
        Image.fromarray(masks[name]).save(source / f"labels/{name}.png")
        (source / "splits" / file).write_text(f"images/{name}.png labels/{name}.png\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["make_dubai_tiles.py", str(source), "--output_dir", str(output)])
    script.main()
    corners = [f"y{y:03d}_x{x:03d}" for y in (0, 256) for x in (0, 344)]
    names = [f"{name}_{corner}" for name in "ab" for corner in corners] + ["c"]
    assert sorted(path.name for path in (output / "images").iterdir()) == sorted(f"{name}.jpg" for name in names)
    assert (output / "splits" / "val.txt").read_text(encoding="utf-8") == "images/c.jpg labels/c.png\n"
    with Image.open(output / "labels" / "c.png") as whole, Image.open(output / "labels" / "b_y256_x344.png") as tile:
        assert np.array_equal(np.asarray(whole), masks["c"])
        assert np.array_equal(np.asarray(tile), masks["b"][256:, 344:])
    files = {path.relative_to(output): path.read_bytes() for path in output.rglob("*") if path.is_file()}
    script.main()  # a second time: the same bytes
    assert {path: (output / path).read_bytes() for path in files} == files
    assert (output / "classes.json").read_bytes() == (REAL_FOLDER / "classes.json").read_bytes()
