import numpy as np
import pytest
import torch
from helpers import open_folder
from PIL import Image
from torch.utils.data import DataLoader

from co2s_hf.data.reading import StoredFile
from co2s_hf.data.samples import PairedViews, RareClasses, Sample, Samples, WeakViews
from co2s_hf.data.views import make_views


def stored(image, label=None) -> Sample:
    return Sample(StoredFile(str(image)), None if label is None else StoredFile(str(label)))


def test_samples_can_be_indexed_selected_and_joined():
    samples = Samples.of_files(["a.png", "b.png", "c.png"], ["1.png", None, "3.png"])
    assert samples[-1] == stored("c.png", "3.png") and samples[1].label is None
    assert samples.names == ["a.png", "b.png", "c.png"]
    assert samples.select([2, 0]).names == ["c.png", "a.png"] and samples[1:].names == ["b.png", "c.png"]
    assert (samples[:1] + samples[2:]).names == ["a.png", "c.png"] and len(list(samples)) == 3
    assert [file and str(file) for file in samples.files("label")] == ["1.png", None, "3.png"]
    with pytest.raises(IndexError):
        samples[3]


def test_each_pass_takes_every_sample_once_in_a_new_order(scenes_folder):
    data = open_folder(scenes_folder)
    pairs = PairedViews(data.labeled, data.unlabeled, 32, length=60, seed=3)
    orders = [tuple(pairs._position(0, n, 5) for n in range(start, start + 5)) for start in range(0, 60, 5)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders) and len(set(orders)) > 8
    other = PairedViews(data.labeled, data.unlabeled, 32, length=60, seed=4)
    assert [other._position(0, n, 5) for n in range(60)] != [n for order in orders for n in order]


def test_items_do_not_depend_on_the_number_of_workers(scenes_folder):
    data = open_folder(scenes_folder)
    pairs = PairedViews(data.labeled, data.unlabeled, 32, length=6, partner="another")
    batches = [next(iter(DataLoader(pairs, batch_size=6, num_workers=n))) for n in (0, 2)]
    for key, value in batches[0].items():
        if key.endswith("name"):
            assert value == batches[1][key]
        else:
            assert torch.equal(value, batches[1][key]), key


def test_items_of_the_warm_up_have_the_same_labelled_views(scenes_folder):
    data = open_folder(scenes_folder)
    plain = PairedViews(data.labeled, data.unlabeled, 32, length=6)
    warmed = PairedViews(data.labeled, data.unlabeled, 32, length=6, num_labeled_only=4)
    for index in range(4):
        assert set(warmed[index]) == {"labeled", "labels", "labeled_name"}
        assert torch.equal(warmed[index]["labeled"], plain[index]["labeled"])
    assert set(warmed[4]) == set(plain[4])
    assert len(list(plain)) == 6  # a plain loop ends
    batch = next(iter(DataLoader(warmed, batch_size=4)))
    assert make_views(batch, [0.5] * 3, [0.5] * 3).weak is None


def test_the_partner_is_another_image(tmp_path):
    samples = []
    for n in range(3):
        Image.new("RGB", (40, 40), (50 * n + 50,) * 3).save(tmp_path / f"{n}.png")
        samples.append(stored(tmp_path / f"{n}.png", tmp_path / "label.png"))
    Image.new("L", (40, 40)).save(tmp_path / "label.png")
    pairs = PairedViews(tuple(samples), tuple(samples), 32, length=30, partner="another")
    for item in pairs:
        own, partner = item["weak"].max(), item["partner_weak"].max()  # a crop of one colour, perhaps padded
        assert own in (50, 100, 150) and partner in (50, 100, 150) and own != partner


def test_the_partner_may_be_another_crop_of_the_same_image(coordinates, tmp_path):
    Image.new("RGB", (90, 60), (250, 250, 250)).save(tmp_path / "other.png")
    other = stored(tmp_path / "other.png")
    pairs = PairedViews((coordinates,), (coordinates, other), 32, length=8, partner="same")
    bright = [(item["weak"].max() == 250, item["partner_weak"].max() == 250) for item in pairs]
    assert all(own == partner for own, partner in bright) and len({bool(own) for own, _ in bright}) == 2
    assert any(not torch.equal(item["weak"], item["partner_weak"]) for item in pairs)


def test_hidden_labels_fit_the_weak_view_and_are_read_only_on_request(coordinates, tmp_path):
    bare = stored(coordinates.image)
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
    item = PairedViews((coordinates,), (stored(coordinates.image, unreadable),), 64, length=1)[0]
    assert "hidden_labels" not in item


@pytest.fixture
def coordinates(tmp_path):
    """A sample of 90x60 px. Red is 20 + column, the label is red // 16."""
    columns, rows = np.meshgrid(np.arange(20, 110, dtype=np.uint8), np.arange(60, dtype=np.uint8))
    Image.fromarray(np.stack([columns, rows, rows + 1], axis=-1)).save(tmp_path / "image.png")
    Image.fromarray(columns // 16).save(tmp_path / "label.png")
    return stored(tmp_path / "image.png", tmp_path / "label.png")


def test_labels_and_padding_fit_the_image(coordinates):
    pairs = PairedViews((coordinates,), (coordinates,), 64, length=40)
    padded = 0
    for item in pairs:
        empty = item["labels"] == 255
        assert torch.equal(empty, (item["labeled"] == 0).all(dim=0))  # red is never 0 in the image
        assert torch.equal(item["padding"], (item["weak"] == 0).all(dim=0))
        red, labels = item["labeled"][0].int(), item["labels"].int()
        # Within two columns of the border between two labels either label is right, because of the resampling.
        near = [(red + shift) // 16 == labels for shift in (-2, 0, 2)]
        assert (near[0] | near[1] | near[2] | empty).all()
        assert set(labels[~empty].unique().tolist()) <= set(range(1, 7))  # labels are not interpolated
        padded += empty.any().item() + item["padding"].any().item()
    assert padded > 10


def test_views_have_the_same_geometry_and_are_normalised(coordinates):
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
    # With neutral appearances the strong views are equal to the weak view, pixel by pixel.
    neutral = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0, 0.01]] * 4)
    batch |= {key: neutral for key in batch if "appearance" in key}
    views = make_views(batch, mean, std)
    for prefix in ("", "partner_"):
        for n in (1, 2):
            strong, weak = getattr(views, f"{prefix}strong_{n}"), getattr(views, f"{prefix}weak")
            torch.testing.assert_close(strong, weak, atol=1e-4, rtol=1e-4)


def test_images_are_scaled_to_the_base_size_first(tmp_path):
    """An image of 40x20 px is first scaled to 160x80 px, so a crop of 32 px shows only a small part of it."""
    columns = np.tile(np.arange(40, dtype=np.uint8) * 6, (20, 1))
    Image.fromarray(np.stack([columns] * 3, axis=-1)).save(tmp_path / "image.png")
    Image.fromarray(columns // 6).save(tmp_path / "label.png")
    sample = stored(tmp_path / "image.png", tmp_path / "label.png")
    pairs = PairedViews((sample,), (sample,), 32, length=20, base_size=(160, 80))
    for item in pairs:
        assert (item["labels"] != 255).all()  # even at the smallest random scale, 80x40 px fill the crop
        shown = item["labels"].unique()
        assert 4 <= len(shown) <= 17  # 32 px of four to eight times the size, at a scale of 0.5 to 2


def test_a_jpeg_that_is_decoded_smaller_gives_the_same_views(tmp_path):
    """Compare with a PNG of the same content. The base size makes the JPEG be decoded at an eighth of its size."""
    rows, columns = np.mgrid[:640, :960]
    content = Image.fromarray(np.stack([columns // 4, rows // 3, (rows + columns) // 8], axis=-1).astype(np.uint8))
    content.save(tmp_path / "a.jpg", quality=95)
    content.save(tmp_path / "a.png")
    Image.fromarray((columns // 4).astype(np.uint8)).save(tmp_path / "label.png")
    views = []
    for name in ("a.jpg", "a.png"):
        sample = stored(tmp_path / name, tmp_path / "label.png")
        views.append(PairedViews((sample,), (sample,), 48, length=10, base_size=(96, 64)))
    assert stored(tmp_path / "a.jpg").load_image((96, 64), 1.0).size == (120, 80)
    for from_jpeg, from_png in zip(*views):
        assert torch.equal(from_jpeg["labels"], from_png["labels"])
        assert (from_jpeg["labeled"].int() - from_png["labeled"].int()).abs().float().mean() < 2


def test_rare_classes_are_drawn_more_often_with_an_image_that_has_them():
    counts = [{0: 90, 255: 50}, {0: 70, 1: 20}, {1: 10, 2: 10}]  # shares 0.8, 0.15, 0.05; class 3 has no label
    rare = RareClasses(counts, num_labels=4, temperature=0.5)
    expected = np.exp((1 - np.array([0.8, 0.15, 0.05])) / 0.5)
    assert rare.probabilities == pytest.approx([*(expected / expected.sum()), 0.0])
    rng = np.random.default_rng(0)
    drawn = [rare.draw(rng) for _ in range(2000)]
    found = np.bincount([label for label, _ in drawn], minlength=4) / 2000
    assert found == pytest.approx(rare.probabilities, abs=0.03)
    images = {label: {image for drawn_label, image in drawn if drawn_label == label} for label in range(3)}
    assert images == {0: {0, 1}, 1: {1, 2}, 2: {2}}
    cold = RareClasses(counts, num_labels=4, temperature=1e-4)  # no overflow
    assert cold.probabilities == pytest.approx([0, 0, 1, 0])


@pytest.fixture
def with_a_corner(tmp_path):
    """Two samples of 256 px: class 0 alone, and class 0 with class 1 in the upper left 96 px."""
    for n in range(2):
        Image.new("RGB", (256, 256), (100 + n, 0, 0)).save(tmp_path / f"{n}.png")
        label = np.zeros((256, 256), dtype=np.uint8)
        label[: 96 * n, : 96 * n] = 1
        Image.fromarray(label).save(tmp_path / f"label{n}.png")
    return tuple(stored(tmp_path / f"{n}.png", tmp_path / f"label{n}.png") for n in range(2))


def test_crops_are_drawn_again_until_they_hold_the_rare_class(with_a_corner):
    rare = RareClasses([{0: 65536}, {0: 56320, 1: 9216}], num_labels=2, temperature=0.01)  # always class 1
    settings = {"crop_size": 64, "length": 40, "seed": 1}
    plain = PairedViews(with_a_corner, with_a_corner, **settings)
    sampled = PairedViews(with_a_corner, with_a_corner, **settings, rare_classes=rare)
    shares = [[(item["labels"] == 1).float().mean().item() for item in items] for items in (plain, sampled)]
    assert all(item["labeled_name"].endswith("1.png") for item in sampled)
    usual, redrawn = (np.mean(np.array(values) >= 0.01) for values in shares)
    assert usual < 0.35 and redrawn > 0.85
    assert all(item["labeled"].max() == 101 for item in sampled)  # the image fits the labels

    # Item n is the same with worker processes and after a new start.
    loader = DataLoader(PairedViews(with_a_corner, with_a_corner, **settings, rare_classes=rare), 5, num_workers=2)
    labels = torch.cat([batch["labels"] for batch in loader])
    assert all(torch.equal(labels[n], sampled[n]["labels"]) for n in (39, 7, 23))


def test_views_of_the_warm_up_depend_on_their_number_alone(scenes_folder):
    data = open_folder(scenes_folder)
    items = PairedViews(data.labeled, data.unlabeled, 32, length=6, seed=3)
    views = WeakViews(items, range(8))
    some = WeakViews(items, range(1, 8, 3))
    assert len(some) == 3 and set(some[0]) == {"weak", "padding"}
    for index, number in enumerate((1, 4, 7)):
        assert torch.equal(some[index]["weak"], views[number]["weak"])
    assert not torch.equal(views[0]["weak"], views[5]["weak"])  # five images, so it is the same one in another view
