"""Tiles of images, and crops that agree with the features of the same place."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset

from co2s_hf.data.validation.checks import DataError
from co2s_hf.training.pretraining.tiles import CropGeometry, Tile, TileCrops, list_tiles
from co2s_hf.utils.errors import UserFileNotFoundError, UserValueError


def write_image(path: Path, width: int, height: int) -> np.ndarray:
    """Write an image whose colours grow linearly: red to the right, green downwards, blue to the upper left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    values = np.stack([x, y, 255 - (x + y) / 2], axis=-1).round().astype(np.uint8)
    Image.fromarray(values).save(path)
    return values


def pooled(image: np.ndarray, patch: int) -> np.ndarray:
    """Return the mean colours of the patches, (rows, columns, 3)."""
    rows, columns = image.shape[0] // patch, image.shape[1] // patch
    return image.astype(np.float32).reshape(rows, patch, columns, patch, -1).mean(axis=(1, 3))


@pytest.mark.parametrize(
    ("width", "height", "boxes"),
    [
        (32, 32, [(0, 0, 32, 32)]),
        (64, 32, [(0, 0, 32, 32), (32, 0, 64, 32)]),
        (48, 40, [(0, 0, 32, 32), (16, 0, 48, 32), (0, 8, 32, 40), (16, 8, 48, 40)]),  # they overlap
        (36, 32, [(0, 0, 32, 32)]),  # an eighth of a tile is left out
        (37, 32, [(0, 0, 32, 32), (5, 0, 37, 32)]),
        (20, 51, [(0, 15, 20, 35)]),  # the largest square in the middle
        (51, 20, [(15, 0, 35, 20)]),
        (7, 7, [(0, 0, 7, 7)]),
    ],
)
def test_images_are_cut_into_tiles(width, height, boxes, tmp_path):
    values = write_image(tmp_path / "a.png", width, height)
    tiles = list_tiles([str(tmp_path)], None, tile_size=32)
    assert [tile.box for tile in tiles] == boxes
    for tile in tiles:
        left, upper, right, lower = tile.box
        content = values[upper:lower, left:right]
        read = np.asarray(tile.read(right - left))
        assert np.array_equal(read, content)
        assert tile.read(32).size == (32, 32)


def test_tiles_know_the_content_of_their_file(tmp_path):
    write_image(tmp_path / "a.png", 32, 32)
    write_image(tmp_path / "deep" / "b.png", 32, 32)
    write_image(tmp_path / "deep" / "c.png", 40, 32)
    a, b, *others = list_tiles([str(tmp_path)], None, 32)
    assert [Path(tile.path).name for tile in (a, b, *others)] == ["a.png", "b.png", "c.png", "c.png"]
    assert a.digest == b.digest != others[0].digest == others[1].digest


def test_label_maps_beside_images_are_left_out(tmp_path):
    for name in ("images/a.png", "labels/a.png", "more/labels/b.png"):
        write_image(tmp_path / name, 32, 32)
    found = [str(Path(tile.path).relative_to(tmp_path)) for tile in list_tiles([str(tmp_path)], None, 32)]
    assert found == ["images/a.png", "more/labels/b.png"]


def test_images_of_a_list_are_left_out(tmp_path):
    for name in ("a.png", "sub/b.png", "c.png", "my d.png"):
        write_image(tmp_path / "images" / name, 32, 32)
    write_image(tmp_path / "more" / "a.png", 32, 32)
    folders, listed = [str(tmp_path / "images"), str(tmp_path / "more")], tmp_path / "val.txt"

    def names() -> list[str]:
        return [str(Path(tile.path).relative_to(tmp_path)) for tile in list_tiles(folders, str(listed), 32)]

    listed.write_text("images/a.png labels/a.png\n\nsub/b.png\nimages/my d.png\tlabels/d.png\n", encoding="utf-8")
    # Below the folders' parent; the third line below a folder itself. more/a.png is another image.
    assert names() == ["images/c.png", "more/a.png"]
    listed.write_text("a.png\n", encoding="utf-8")  # below both folders
    assert names() == ["images/c.png", "images/my d.png", "images/sub/b.png"]
    listed.write_text("images/a.png\nimages/z.png labels/z.png\n", encoding="utf-8")
    with pytest.raises(UserValueError, match=r"val\.txt names 'images/z\.png', which is not below .*images, .*more"):
        names()
    listed.write_text("a.png\nc.png\nmy d.png\tx\nsub/b.png\n", encoding="utf-8")
    with pytest.raises(UserFileNotFoundError, match="where no image is found"):
        names()
    listed.unlink()
    with pytest.raises(UserFileNotFoundError, match=r"`exclude` is '.*val\.txt', which does not exist"):
        names()


def test_folders_without_readable_images_are_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserFileNotFoundError, match=r"`images` is .*empty, where no image is found"):
        list_tiles([str(tmp_path / "empty")], None, 32)
    with pytest.raises(UserFileNotFoundError, match=r"'.*missing' does not exist"):
        list_tiles([str(tmp_path / "missing")], None, 32)
    write_image(tmp_path / "images" / "a.png", 32, 32)
    (tmp_path / "images" / "bad.png").write_bytes((tmp_path / "images" / "a.png").read_bytes()[:60])
    (tmp_path / "images" / "worse.jpg").write_text("no image", encoding="utf-8")
    with pytest.raises(DataError) as error:
        list_tiles([str(tmp_path / "images")], None, 32)
    assert "bad.png" in str(error.value) and "worse.jpg" in str(error.value) and "a.png" not in str(error.value)


@pytest.mark.parametrize(("side", "size"), [(4, 4), (2, 2), (4, 2), (2, 3), (3, 4)])
def test_crops_of_images_and_features_show_the_same_place(side, size):
    """The features are the mean colours of the patches. So are those of the crop, wherever it lies."""
    x, y = np.meshgrid(np.linspace(0, 255, 48), np.linspace(0, 255, 48))
    image = np.stack([x, y, 255 - (x + y) / 2], axis=-1).round().astype(np.uint8)
    features, patch = pooled(image, 8), 8
    for left, upper in {(0, 0), (6 - side, 0), (1, 6 - side)}:
        for flip in (False, True):
            for turns in range(4):
                geometry = CropGeometry(left, upper, side, flip, turns)
                crop = geometry.of_image(Image.fromarray(image), 6, size * patch)
                found = geometry.of_features(features, size).permute(1, 2, 0).numpy()
                # Interpolation differs at the borders, by less than a quarter of a patch; a patch has 43 grey levels.
                tolerance = 1e-3 if side == size else 12
                np.testing.assert_allclose(found, pooled(crop, patch), atol=tolerance)
                assert crop.shape == (size * patch, size * patch, 3) and found.shape == (size, size, 3)


def test_a_crop_is_cut_then_mirrored_then_turned():
    values = np.arange(16, dtype=np.float32).reshape(4, 4, 1)
    inner = values[1:3, 2:4, 0]
    assert CropGeometry(2, 1, 2, False, 0).of_features(values, 2)[0].tolist() == inner.tolist()
    assert CropGeometry(2, 1, 2, True, 0).of_features(values, 2)[0].tolist() == inner[:, ::-1].tolist()
    # A turn is counter-clockwise.
    assert CropGeometry(2, 1, 2, False, 1).of_features(values, 2)[0].tolist() == [[7, 11], [6, 10]]
    assert CropGeometry(2, 1, 2, True, 1).of_features(values, 2)[0].tolist() == [[6, 10], [7, 11]]


def colors_of_patches(tile: Tile, image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """A teacher substitute: its features are the mean colours of patches of 8 px; its class token is that of all."""
    features = pooled(np.asarray(image), 8)
    return features, features.mean(axis=(0, 1))


@pytest.fixture
def crops(tmp_path) -> TileCrops:
    """40 crops of 2 x 2 patches of 5 tiles of 4 x 4 patches."""
    for index in range(5):
        write_image(tmp_path / "images" / f"{index}.png", 32 + index, 32)
    tiles = [Tile(str(tmp_path / "images" / f"{index}.png"), (0, 0, 32, 32)) for index in range(5)]
    return TileCrops(tiles, 32, 16, 8, (0.5, 4 / 3), length=40, seed=1, teacher=colors_of_patches)


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(torch.as_tensor(one[k]), torch.as_tensor(other[k])) for k in one
    )


def test_items_hold_a_crop_and_the_features_of_the_same_place(crops):
    assert list(crops.sides) == [2, 3, 4] and len(crops) == 40
    for index in range(12):
        item = crops[index]
        assert item["image"].shape == (3, 16, 16) and item["image"].dtype == torch.uint8
        assert item["appearance"].shape == (6,) and item["appearance"].dtype == torch.float32
        own = pooled(item["image"].permute(1, 2, 0).numpy(), 8)
        np.testing.assert_allclose(item["features"].permute(1, 2, 0).numpy(), own, atol=16)  # a patch has 64 levels
        expected = colors_of_patches(None, crops.tiles[item["tile"]].read(32))[1]
        np.testing.assert_array_equal(item["class_token"].numpy(), expected)


def test_each_pass_has_every_tile_once_in_a_new_order(crops):
    numbers = [crops[index]["tile"] for index in range(15)]
    passes = [numbers[:5], numbers[5:10], numbers[10:]]
    assert all(sorted(part) == [0, 1, 2, 3, 4] for part in passes)
    assert len({tuple(part) for part in passes}) > 1
    assert not same(crops[0], crops[1])


def test_items_depend_on_the_seed_and_their_index_alone(crops):
    items = [crops[index] for index in range(8)]
    assert all(same(crops[index], items[index]) for index in (7, 3, 0))  # in any order
    other = TileCrops(crops.tiles, 32, 16, 8, (0.5, 4 / 3), length=40, seed=2, teacher=colors_of_patches)
    assert not all(same(other[index], items[index]) for index in range(8))
    whole = list(DataLoader(Subset(crops, range(8)), batch_size=2, num_workers=2))
    rest = list(DataLoader(Subset(crops, range(4, 8)), batch_size=2))
    assert all(same(batch, again) for batch, again in zip(whole[2:], rest, strict=True))
    for number, batch in enumerate(whole):
        for place in range(2):
            assert same({name: values[place] for name, values in batch.items()}, items[2 * number + place])


def test_crops_are_never_larger_than_the_tile(tmp_path):
    tile = Tile("unused.png", (0, 0, 32, 32))
    assert list(TileCrops([tile], 32, 32, 8, (0.5, 4 / 3), 1).sides) == [3, 4]
    assert list(TileCrops([tile], 32, 8, 8, (0.5, 4 / 3), 1).sides) == [1, 2]
