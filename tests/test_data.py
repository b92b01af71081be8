import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from co2s_hf.data import PairedViews, Sample, SegmentationFolder, check_hidden_labels, class_pixel_counts
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
    assert data.class_concepts == {facts.name: facts.concepts for facts in CLASSES}
    named = SegmentationFolder.open(scenes_folder, ["a_b", "c", "d", "e", "f", "g"])
    assert named.id2label[0] == "a_b" and named.class_concepts["a_b"] == ["a b"]


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
    assert data.class_concepts is None  # nothing to tell CLIP


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


def test_pairs_walk_each_list_evenly_in_new_orders(scenes_folder):
    data = SegmentationFolder.open(scenes_folder)
    pairs = PairedViews(data.labeled, data.unlabeled, 32, length=60, seed=3)
    orders = [tuple(pairs._position(0, n, 5) for n in range(start, start + 5)) for start in range(0, 60, 5)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders) and len(set(orders)) > 8
    other = PairedViews(data.labeled, data.unlabeled, 32, length=60, seed=4)
    assert [other._position(0, n, 5) for n in range(60)] != [n for order in orders for n in order]


def test_items_do_not_depend_on_the_number_of_workers(scenes_folder):
    data = SegmentationFolder.open(scenes_folder)
    pairs = PairedViews(data.labeled, data.unlabeled, 32, length=6, partner="another")
    batches = [next(iter(DataLoader(pairs, batch_size=6, num_workers=n))) for n in (0, 2)]
    for key, value in batches[0].items():
        if key.endswith("name"):
            assert value == batches[1][key]
        else:
            assert torch.equal(value, batches[1][key]), key


def test_warm_up_items_are_the_same_without_unlabelled_images(scenes_folder):
    data = SegmentationFolder.open(scenes_folder)
    plain = PairedViews(data.labeled, data.unlabeled, 32, length=6)
    warmed = PairedViews(data.labeled, data.unlabeled, 32, length=6, num_labeled_only=4)
    for index in range(4):
        assert set(warmed[index]) == {"labeled", "labels", "labeled_name"}
        assert torch.equal(warmed[index]["labeled"], plain[index]["labeled"])
    assert set(warmed[4]) == set(plain[4])
    assert len(list(plain)) == 6  # a plain loop ends
    batch = next(iter(DataLoader(warmed, batch_size=4)))
    assert make_views(batch, [0.5] * 3, [0.5] * 3).weak is None


def test_partner_is_another_image(tmp_path):
    samples = []
    for n in range(3):
        samples.append(Sample(tmp_path / f"{n}.png", tmp_path / "label.png"))
        Image.new("RGB", (40, 40), (50 * n + 50,) * 3).save(samples[-1].image)
    Image.new("L", (40, 40)).save(tmp_path / "label.png")
    pairs = PairedViews(tuple(samples), tuple(samples), 32, length=30, partner="another")
    for item in pairs:
        own, partner = item["weak"].max(), item["partner_weak"].max()  # a crop of one colour, perhaps padded
        assert own in (50, 100, 150) and partner in (50, 100, 150) and own != partner


def test_partner_may_be_another_crop_of_the_same_image(coordinates):
    other = Sample(coordinates.image.with_name("other.png"), None)
    Image.new("RGB", (90, 60), (250, 250, 250)).save(other.image)
    pairs = PairedViews((coordinates,), (coordinates, other), 32, length=8, partner="same")
    bright = [(item["weak"].max() == 250, item["partner_weak"].max() == 250) for item in pairs]
    assert all(own == partner for own, partner in bright) and len({bool(own) for own, _ in bright}) == 2
    assert any(not torch.equal(item["weak"], item["partner_weak"]) for item in pairs)


def test_hidden_labels_follow_the_weak_view_and_are_read_on_request_alone(coordinates, tmp_path):
    bare = Sample(coordinates.image, None)
    truth = PairedViews((coordinates,), (coordinates,), 64, length=20, with_hidden_labels=True)
    for item in truth:
        empty = item["hidden_labels"] == 255
        assert torch.equal(empty, item["padding"])
        red, labels = item["weak"][0].int(), item["hidden_labels"].int()
        assert all((((red + s) // 16 == labels) | empty).float().mean() > 0.7 for s in (-2, 0, 2))
    assert (
        PairedViews((coordinates,), (bare,), 64, length=1, with_hidden_labels=True)[0]["hidden_labels"] == 255
    ).all()
    unreadable = tmp_path / "broken.png"
    unreadable.write_bytes(b"no image")
    item = PairedViews((coordinates,), (Sample(coordinates.image, unreadable),), 64, length=1)[0]
    assert "hidden_labels" not in item


def test_hidden_labels_are_checked_before_they_are_used(coordinates, tmp_path):
    check_hidden_labels((coordinates, Sample(coordinates.image, None)), num_labels=7)
    with pytest.raises(ValueError, match="None of the 1 unlabelled images has a label file"):
        check_hidden_labels((Sample(coordinates.image, tmp_path / "missing.png"),), num_labels=7)
    Image.new("L", (9, 9)).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match=r"small.png is 9x9 px, but .*image.png is 90x60 px"):
        check_hidden_labels((Sample(coordinates.image, tmp_path / "small.png"),), num_labels=7)


@pytest.fixture
def plain_folder(tmp_path):
    """12 images in two folders, 10 of them with labels of another suffix, no lists."""
    for n in range(12):
        for kind in ("images", "labels"):
            (tmp_path / kind / f"area{n % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (n, n, n)).save(tmp_path / "images" / f"area{n % 2}" / f"{n}.jpg")
        if n < 10:
            Image.new("L", (20, 20), n % 3).save(tmp_path / "labels" / f"area{n % 2}" / f"{n}.png")
    return tmp_path


def test_sets_are_drawn_where_there_are_no_lists(plain_folder):
    data = SegmentationFolder.open(plain_folder, labeled_fraction=1 / 4, validation_fraction=0.2, seed=1)
    assert [len(part) for part in (data.labeled, data.unlabeled, data.validation)] == [2, 8, 2]
    everything = [*data.labeled, *data.unlabeled, *data.validation]
    assert len({sample.image for sample in everything}) == 12
    for sample in everything:  # label files match by name, below the same folder
        n = int(sample.image.stem)
        expected = plain_folder / "labels" / f"area{n % 2}" / f"{n}.png" if n < 10 else None
        assert sample.label == expected
    again = SegmentationFolder.open(plain_folder, labeled_fraction=1 / 4, validation_fraction=0.2, seed=1)
    other = SegmentationFolder.open(plain_folder, labeled_fraction=1 / 4, validation_fraction=0.2, seed=2)
    assert again == data and other.labeled != data.labeled

    everything_labeled = SegmentationFolder.open(plain_folder)
    assert [len(x) for x in (everything_labeled.labeled, everything_labeled.unlabeled)] == [8, 2]


def test_a_validation_list_is_kept_when_the_rest_is_drawn(plain_folder):
    (plain_folder / "splits").mkdir()
    (plain_folder / "splits" / "val.txt").write_text("images/area1/3.jpg labels/area1/3.png\n")
    data = SegmentationFolder.open(plain_folder, labeled_fraction=1 / 3)
    assert [sample.image.name for sample in data.validation] == ["3.jpg"]
    assert len(data.labeled) == 3 and len(data.unlabeled) == 8
    assert data.validation[0].image not in {sample.image for sample in (*data.labeled, *data.unlabeled)}


def test_what_cannot_be_drawn_is_said(plain_folder):
    with pytest.raises(ValueError, match="`labeled_fraction` is 2; give a share above 0 and up to 1"):
        SegmentationFolder.open(plain_folder, labeled_fraction=2)
    for path in (plain_folder / "images").rglob("1?.jpg"):
        path.unlink()
    with pytest.raises(ValueError, match="would be labelled, none unlabelled"):
        SegmentationFolder.open(plain_folder)
    shutil.rmtree(plain_folder / "labels")
    with pytest.raises(FileNotFoundError, match="labels' does not exist"):
        SegmentationFolder.open(plain_folder)


def test_class_pixels_are_counted(tmp_path):
    Image.fromarray(np.array([[0, 0, 2], [255, 2, 2]], dtype=np.uint8)).save(tmp_path / "a.png")
    sample = Sample(tmp_path / "a.png", tmp_path / "a.png")
    assert class_pixel_counts((sample, sample), num_labels=4).tolist() == [4, 0, 6, 0]


@pytest.fixture
def coordinates(tmp_path):
    """A sample of 90x60 px whose red is the column and whose label is that column's red / 16."""
    columns, rows = np.meshgrid(np.arange(20, 110, dtype=np.uint8), np.arange(60, dtype=np.uint8))
    Image.fromarray(np.stack([columns, rows, rows + 1], axis=-1)).save(tmp_path / "image.png")
    Image.fromarray(columns // 16).save(tmp_path / "label.png")
    return Sample(tmp_path / "image.png", tmp_path / "label.png")


def test_labels_and_padding_follow_the_image(coordinates):
    pairs = PairedViews((coordinates,), (coordinates,), 64, length=40)
    padded = 0
    for item in pairs:
        empty = item["labels"] == 255
        assert torch.equal(empty, (item["labeled"] == 0).all(dim=0))  # red is never 0 where there is an image
        assert torch.equal(item["padding"], (item["weak"] == 0).all(dim=0))
        red, labels = item["labeled"][0].int(), item["labels"].int()
        # Within two columns (the resampling) of the border between two labels either one is right.
        near = [(red + shift) // 16 == labels for shift in (-2, 0, 2)]
        assert (near[0] | near[1] | near[2] | empty).all()
        assert set(labels[~empty].unique().tolist()) <= set(range(1, 7))  # no label in between
        padded += empty.any().item() + item["padding"].any().item()
    assert padded > 10


def test_views_are_of_one_geometry_and_normalised(coordinates):
    pairs = PairedViews((coordinates,), (coordinates,), 32, length=4, partner="another")
    batch = next(iter(DataLoader(pairs, batch_size=4)))
    mean, std = [0.5, 0.4, 0.3], [0.25, 0.5, 0.75]

    def normalized(images):
        return (images.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    views = make_views(batch, mean, std)
    torch.testing.assert_close(views.weak, normalized(batch["weak"]))
    torch.testing.assert_close(views.labeled, normalized(batch["labeled"]))
    assert torch.equal(views.padding, batch["padding"]) and torch.equal(views.labels, batch["labels"].long())
    assert torch.equal(views.partner_padding, batch["partner_padding"])
    assert torch.equal(views.cutmix_boxes_2, batch["cutmix_boxes_2"])
    assert not torch.allclose(views.strong_1, views.strong_2)
    # With appearances that change nothing the strong views are the weak one, pixel by pixel.
    neutral = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0, 0.01]] * 4)
    batch |= {key: neutral for key in batch if "appearance" in key}
    views = make_views(batch, mean, std)
    for prefix in ("", "partner_"):
        for n in (1, 2):
            strong, weak = getattr(views, f"{prefix}strong_{n}"), getattr(views, f"{prefix}weak")
            torch.testing.assert_close(strong, weak, atol=1e-4, rtol=1e-4)


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
        (lambda f: (f / "classes.json").write_text("{"), ValueError, "classes.json is no JSON file"),
        (
            lambda f: (f / "classes.json").write_text('[{"color": [0, 0, 0]}]'),
            ValueError,
            "with a name for every class",
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
            lambda f: Image.fromarray(np.full((48, 48), 300, np.uint16)).save(f / "labels" / "labeled_0000.png"),
            ValueError,
            "labeled_0000.png has values from 300 to 300; class indices lie between 0 and 255",
        ),
        (
            lambda f: [Image.new("L", (48, 48), 255).save(path) for path in (f / "labels").glob("validation_*")],
            ValueError,
            "No pixel of the 2 validation images has a class",
        ),
        (
            lambda f: Image.new("RGBA", (48, 48)).save(f / "images" / "unlabeled_0002.png"),
            ValueError,
            "unlabeled_0002.png has the PIL mode 'RGBA'; expected 8-bit RGB",
        ),
        (
            lambda f: (f / "images" / "validation_0000.png").write_bytes(b"broken"),
            ValueError,
            "validation_0000.png cannot be read as an image",
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
