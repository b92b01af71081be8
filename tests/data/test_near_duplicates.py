"""Reduced and re-encoded copies of images are found between the sets. Other images are no copies."""

import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from helpers import open_folder
from PIL import Image, ImageDraw

from co2s_hf.data.drawn_scenes import write_scenes
from co2s_hf.data.options import REAL_FOLDER
from co2s_hf.data.validation import near_duplicates
from co2s_hf.data.validation.near_duplicates import MIN_SIMILARITY, find_copies, thumbnail


KIND = "near-duplicates between sets"


def read(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


@pytest.fixture(scope="module")
def tiles() -> dict[str, Image.Image]:
    """Real images: name -> image."""
    return {path.stem: read(path) for path in sorted((REAL_FOLDER / "images").glob("*.jpg"))}


def reduced(image: Image.Image, factor: int, kind: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    return image.resize((image.width // factor, image.height // factor), kind)


def reencoded(image: Image.Image, folder: Path, quality: int) -> Image.Image:
    image.save(folder / "again.jpg", quality=quality)
    return read(folder / "again.jpg")


def test_real_images_are_no_copies_of_each_other(tiles):
    """Neighbouring tiles overlap by up to 52 px. Some show only water or sand."""
    validation = [thumbnail(image) for name, image in tiles.items() if "_y" not in name]
    training = [thumbnail(image) for name, image in tiles.items() if "_y" in name]
    assert len(validation) == 16 and find_copies(validation, training) == [None] * 16
    assert find_copies(training[1::2], training[::2]) == [None] * 108


def test_copies_of_real_images_are_found(tiles, tmp_path):
    images = list(tiles.values())[::4]
    originals = [thumbnail(image) for image in images]
    changes = {
        "a half": lambda image: reduced(image, 2),
        "a third": lambda image: reduced(image, 3),
        "a quarter": lambda image: reduced(image, 4, Image.Resampling.BILINEAR),
        "recompressed": lambda image: reencoded(image, tmp_path, 50),
        "both": lambda image: reencoded(reduced(image, 2), tmp_path, 60),
    }
    for name, change in changes.items():
        found = find_copies([thumbnail(change(image)) for image in images], originals)
        right = [place for place, copy in enumerate(found) if copy == place]
        wrong = [place for place, copy in enumerate(found) if copy not in (place, None)]
        # Images of water or sand have too little structure: they are not compared.
        assert not wrong and len(right) > 0.75 * len(images), name


def test_images_without_structure_are_no_copies():
    plain = [thumbnail(Image.new("RGB", (64, 64), (value, value, value))) for value in (0, 90, 90)]
    assert find_copies(plain, plain) == [None] * 3
    noise = np.random.default_rng(0).normal(120, 4, (2, 256, 256, 3)).clip(0, 255).astype(np.uint8)  # like water
    assert find_copies([thumbnail(Image.fromarray(noise[0]))], [thumbnail(Image.fromarray(noise[1]))]) == [None]
    assert find_copies(["", plain[0]], [""]) == [None, None]


def test_images_with_the_same_border_of_pixels_without_data_are_no_copies(tiles):
    for image in (padded := [tile.copy() for tile in list(tiles.values())[::3]]):
        ImageDraw.Draw(image).rectangle((0, 0, 0.4 * image.width, image.height), (0, 0, 0))
    thumbnails = [thumbnail(image) for image in padded]
    assert find_copies(thumbnails[1::2], thumbnails[::2]) == [None] * len(thumbnails[1::2])


@pytest.mark.parametrize("part", [slice(0, 3), slice(1, 20, 4)])
def test_the_position_of_the_copy_is_that_in_the_whole_list(tiles, part):
    thumbnails = ["", *(thumbnail(image) for image in list(tiles.values())[:20]), ""]
    wanted = thumbnails[part]
    places = list(range(len(thumbnails)))[part]
    assert find_copies(wanted, thumbnails) == [place if thumbnails[place] else None for place in places]


def test_pairs_of_different_images_are_far_below_the_limit(tiles):
    """The most similar of these images must not come near the limit, so that new images are no false alarms."""
    _, vectors = near_duplicates._vectors([thumbnail(image) for image in tiles.values()])
    similarities = [float(one @ other) for one, other in combinations(vectors, 2)]
    assert 0.3 < max(similarities) < 0.5 < MIN_SIMILARITY


# --- findings about a folder


@pytest.fixture(scope="module")
def large_scenes(tmp_path_factory) -> Path:
    """3 labelled, 5 unlabelled and 2 validation scenes of 128 px."""
    folder = tmp_path_factory.mktemp("large") / "scenes"
    write_scenes(folder, 3, 5, 2, size=128, seed=7)
    return folder


@pytest.fixture
def folder(large_scenes, tmp_path) -> Path:
    """A copy of the scenes that a test may change."""
    return Path(shutil.copytree(large_scenes, tmp_path / "data"))


def add_copies(folder: Path, source: str, target: str):
    """Add reduced copies of the scenes of one set, with labels, to the list of another set."""
    (folder / "images" / "downsampled").mkdir(exist_ok=True)
    with (folder / "splits" / target).open("a", encoding="utf-8") as lines:
        for path in sorted((folder / "images").glob(f"{source}_*.png")):
            copy = reduced(read(path), 2)
            copy.save(folder / "images" / "downsampled" / path.name)
            Image.new("L", copy.size, 1).save(folder / "labels" / f"small_{path.name}")
            lines.write(f"images/downsampled/{path.name} labels/small_{path.name}\n")


def messages(folder: Path) -> list[str]:
    return [finding.message for finding in open_folder(folder).findings if finding.kind == KIND]


def test_drawn_scenes_are_no_copies(folder):
    assert messages(folder) == []


def test_copies_of_training_images_in_the_validation_set_are_one_warning(folder):
    add_copies(folder, "unlabeled", "val.txt")
    (message,) = messages(folder)
    assert message.startswith("5 of the 7 validation images seem to show the same as training images, in another size")
    assert "images/downsampled/unlabeled_0000.png and " in message
    assert message.count("downsampled/") == 3 and "unlabeled_0003" not in message and "`group_regex`" in message


def test_copies_of_labelled_images_in_the_unlabelled_set_are_one_warning(folder):
    add_copies(folder, "labeled", "unlabeled.txt")
    (message,) = messages(folder)
    assert message.startswith("3 of the 8 unlabeled images seem to show the same as labeled images")
    assert f"labeled_0002.png and {folder}/images/labeled_0002.png. The training will learn little" in message


def test_copies_within_a_set_and_equal_files_are_not_reported_twice(folder):
    add_copies(folder, "validation", "val.txt")
    assert messages(folder) == []
    shutil.copy(folder / "images" / "labeled_0001.png", folder / "images" / "unlabeled_0001.png")
    kinds = [finding.kind for finding in open_folder(folder).findings]
    assert kinds.count("images in two places") == 1 and KIND not in kinds
