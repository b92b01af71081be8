import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from co2s_hf.data import PairedViews, Sample, SegmentationFolder
from co2s_hf.synthetic import CLASSES, draw_scene, write_scenes
from co2s_hf.views import make_views


DUBAI = Path(__file__).parents[2] / "shared" / "data" / "dubai"


@pytest.fixture
def folder(scenes_folder, tmp_path):
    """A copy of the drawn folder that a test may break."""
    return Path(shutil.copytree(scenes_folder, tmp_path / "data"))


def test_folder_gives_its_lists_and_classes(scenes_folder):
    data = SegmentationFolder.open(scenes_folder)
    assert [len(x) for x in (data.labeled, data.unlabeled, data.validation)] == [3, 5, 2]
    assert data.labeled[0].image == scenes_folder / "images" / "labeled_0000.png"
    assert data.id2label == {n: facts.name for n, facts in enumerate(CLASSES)}
    assert data.palette == [list(facts.color) for facts in CLASSES]


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
    data = SegmentationFolder.open(folder)
    assert data.id2label == {n: f"class_{n}" for n in range(6)}
    assert data.palette == [list(facts.color) for facts in CLASSES]  # from the label files


def test_labels_of_unlabelled_images_are_never_read(folder):
    for path in (folder / "labels").glob("unlabeled_*"):
        path.write_bytes(b"not an image")
    data = SegmentationFolder.open(folder)
    batch = next(iter(DataLoader(PairedViews(data.labeled, data.unlabeled, 32, 8), batch_size=8)))
    assert batch["weak"].shape == (8, 3, 32, 32)


def test_dubai_opens_as_it_is():
    if not DUBAI.exists():
        pytest.skip("the Dubai images are not here")
    data = SegmentationFolder.open(DUBAI)
    assert [len(x) for x in (data.labeled, data.unlabeled, data.validation)] == [8, 40, 16]
    assert len(data.id2label) == 5 and data.palette is not None
    label = data.labeled[0].load_label()
    assert label.size == data.labeled[0].load_image().size
    assert set(np.unique(np.asarray(label))) <= {0, 1, 2, 3, 4, 255}


def test_pairs_walk_each_list_evenly_in_a_new_order_each_epoch(scenes_folder):
    data = SegmentationFolder.open(scenes_folder)
    pairs = PairedViews(data.labeled, data.unlabeled, 32, length=15, seed=3)
    labeled = [pairs._position(0, n, 3) for n in range(15)]
    unlabeled = [pairs._position(1, n, 5) for n in range(15)]
    for lap in range(5):
        assert sorted(labeled[3 * lap : 3 * lap + 3]) == [0, 1, 2]
    for lap in range(3):
        assert sorted(unlabeled[5 * lap : 5 * lap + 5]) == [0, 1, 2, 3, 4]
    assert unlabeled[:5] != unlabeled[5:10] or unlabeled[:5] != unlabeled[10:]
    pairs.set_epoch(1)
    assert [pairs._position(1, n, 5) for n in range(15)] != unlabeled


def test_items_do_not_depend_on_the_number_of_workers(scenes_folder):
    data = SegmentationFolder.open(scenes_folder)
    pairs = PairedViews(data.labeled, data.unlabeled, 32, length=6, with_partner=True)
    pairs.set_epoch(2)
    batches = [next(iter(DataLoader(pairs, batch_size=6, num_workers=n))) for n in (0, 2)]
    for key, value in batches[0].items():
        assert torch.equal(value, batches[1][key]), key
    pairs.set_epoch(3)
    assert not torch.equal(pairs[0]["weak"], batches[0]["weak"][0])


def test_partner_is_another_image(tmp_path):
    samples = []
    for n in range(3):
        samples.append(Sample(tmp_path / f"{n}.png", tmp_path / "label.png"))
        Image.new("RGB", (40, 40), (50 * n + 50,) * 3).save(samples[-1].image)
    Image.new("L", (40, 40)).save(tmp_path / "label.png")
    pairs = PairedViews(tuple(samples), tuple(samples), 32, length=30, with_partner=True)
    for item in pairs:
        own, partner = item["weak"].max(), item["partner_weak"].max()  # a crop of one colour, perhaps padded
        assert own in (50, 100, 150) and partner in (50, 100, 150) and own != partner


def test_views_share_geometry_and_are_normalised(scenes_folder):
    data = SegmentationFolder.open(scenes_folder)
    pairs = PairedViews(data.labeled, data.unlabeled, 32, length=4, with_partner=True)
    batch = next(iter(DataLoader(pairs, batch_size=4)))
    views = make_views(batch, mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25])
    torch.testing.assert_close(views.weak, (batch["weak"].float() / 255 - 0.5) / 0.25)
    torch.testing.assert_close(views.labeled, (batch["labeled"].float() / 255 - 0.5) / 0.25)
    for strong in (views.strong_1, views.strong_2, views.partner_strong_1):
        assert strong.shape == views.weak.shape and not torch.allclose(strong, views.weak)
    assert torch.equal(views.partner_padding, batch["partner_padding"]) and torch.equal(views.labels, batch["labels"])


def write_list(folder, name, text):
    (folder / "splits" / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: shutil.rmtree(f), FileNotFoundError, "data' does not exist"),
        (
            lambda f: (f / "splits" / "val.txt").unlink(),
            FileNotFoundError,
            "val.txt' is missing: the list of validation",
        ),
        (lambda f: write_list(f, "labeled.txt", "\n"), ValueError, "labeled.txt is empty"),
        (lambda f: write_list(f, "labeled.txt", "a b c\n"), ValueError, "labeled.txt, line 1: 'a b c' is not"),
        (lambda f: write_list(f, "val.txt", "images/x.png\n"), ValueError, "line 1: 'images/x.png' is not"),
        (
            lambda f: [(f / "images" / f"unlabeled_000{n}.png").unlink() for n in (1, 3)],
            FileNotFoundError,
            "2 listed files do not exist, among them",
        ),
        (lambda f: (f / "labels" / "labeled_0001.png").unlink(), FileNotFoundError, "labels/labeled_0001.png"),
        (
            lambda f: shutil.copy(f / "splits" / "val.txt", f / "splits" / "unlabeled.txt"),
            ValueError,
            "2 images are both unlabeled and in validation, such as",
        ),
        (
            lambda f: Image.new("L", (47, 48)).save(f / "labels" / "labeled_0002.png"),
            ValueError,
            "labeled_0002.png is 47x48 px, but",
        ),
        (
            lambda f: Image.new("L", (48, 48), 9).save(f / "labels" / "validation_0001.png"),
            ValueError,
            "validation_0001.png has the label 9, but 6 classes",
        ),
        (
            lambda f: Image.new("RGB", (48, 48)).save(f / "labels" / "labeled_0000.png"),
            ValueError,
            "labeled_0000.png has the PIL mode 'RGB'; expected one band",
        ),
        (
            lambda f: (f / "labels" / "labeled_0000.png").write_bytes(b"broken"),
            ValueError,
            "labeled_0000.png cannot be read as an image",
        ),
    ],
)
def test_broken_folders_are_named_with_the_remedy(folder, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=re.escape(message)):
        SegmentationFolder.open(folder)


def test_unfit_images_are_named_when_read(tmp_path):
    Image.new("RGBA", (4, 4)).save(tmp_path / "four.png")
    with pytest.raises(ValueError, match=r"four.png has the PIL mode 'RGBA'"):
        Sample(tmp_path / "four.png", None).load_image()
    (tmp_path / "cut.png").write_bytes((tmp_path / "four.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"cut.png cannot be read as an image"):
        Sample(tmp_path / "cut.png", None).load_image()
