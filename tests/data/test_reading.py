import sys

import numpy as np
import pytest
from helpers import write_raster
from PIL import Image

from co2s_hf.data.reading import (
    ImageRule,
    LabelRule,
    StoredFile,
    base_scale,
    find_images,
    percentile_ranges,
    percentile_scale,
)
from co2s_hf.utils.errors import UserError, UserValueError


def stored_raster(path, values, **profile) -> StoredFile:
    return StoredFile(str(write_raster(path, values, **profile)))


@pytest.fixture
def sixteen_bit(tmp_path) -> StoredFile:
    """Four bands of uint16: band b holds 1000 b + column."""
    columns = np.tile(np.arange(12, dtype=np.uint16), (8, 1))
    return stored_raster(tmp_path / "field.tif", np.stack([1000 * band + columns for band in (1, 2, 3, 4)]))


def test_bands_and_scale_make_rgb(sixteen_bit):
    rule = ImageRule(bands=(4, 3, 2), scale=((2000, 4020),))
    image = np.asarray(rule.read(sixteen_bit)).astype(int)
    assert image.shape == (8, 12, 3)
    expected = [round((1000 * band + 5 - 2000) * 255 / 2020) for band in (4, 3, 2)]
    assert image[3, 5].tolist() == expected
    own = ImageRule(bands=(4, 3, 2), scale=((4000, 4255), (3000, 3255), (1000, 2000)))
    assert np.asarray(own.read(sixteen_bit))[0, 7].tolist() == [7, 7, 255]  # clipped
    from_bytes = StoredFile("field.tif", sixteen_bit.read_bytes(), row="train[0]")
    assert np.array_equal(np.asarray(rule.read(from_bytes)), image)


def test_eight_bit_bands_are_not_scaled(tmp_path):
    values = np.arange(4 * 6 * 5, dtype=np.uint8).reshape(4, 6, 5)
    file = stored_raster(tmp_path / "four.tif", values)
    assert np.array_equal(np.asarray(ImageRule(bands=(3, 2, 1)).read(file)), np.moveaxis(values[[2, 1, 0]], 0, -1))
    rgba = Image.fromarray(np.moveaxis(values, 0, -1), mode="RGBA")
    rgba.save(tmp_path / "rgba.png")
    read = ImageRule(bands=(1, 2, 3)).read(StoredFile(str(tmp_path / "rgba.png")))
    assert np.array_equal(np.asarray(read), np.asarray(rgba)[..., :3])


def test_nodata_and_nan_become_black(tmp_path):
    values = np.full((1, 4, 4), 100.0, dtype=np.float32)
    values[0, 0, 0], values[0, 1, 1] = np.nan, -9999
    file = stored_raster(tmp_path / "float.tif", values, nodata=-9999)
    image = np.asarray(ImageRule(scale=((0, 200),)).read(file))
    assert image[0, 0].tolist() == [0] * 3 and image[1, 1].tolist() == [0] * 3
    assert image[2, 2].tolist() == [128] * 3  # one band stands for all three


def test_huge_values_are_clipped_without_a_warning(recwarn):
    values = np.array([[[-3.4e38, 0.5, 3.4e38]]], dtype=np.float32)
    assert ImageRule(scale=((0, 1),)).to_8_bit(values)[0, :, 0].tolist() == [0, 128, 255]
    assert not recwarn.list


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            ImageRule(bands=(1, 2, 3)),
            r"field.tif has 4 bands of uint16, values 1000 to 3011; expected 8-bit RGB. Use `bands=\(1, 2, 3\)` and "
            r"`scale=\(\(1000, 3100\),\)`.",
        ),
        (
            ImageRule(scale=((0, 1),)),
            r"field.tif has 4 bands of uint16, .* use `bands=\(3, 2, 1\)` and `scale=\(\(0, 1\),\)`.$",
        ),
        (
            ImageRule(bands=(1, 2, 5)),
            r"field.tif has 4 bands of uint16, values 1000 to 3011; there is no band 5. If .* use "
            r"`bands='planetscope-4'`",
        ),
    ],
)
def test_files_that_no_rule_covers_are_described_in_the_error(sixteen_bit, rule, message):
    with pytest.raises(UserError, match=message):
        rule.read(sixteen_bit)


def test_files_that_pillow_can_open_are_described_without_rasterio(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rasterio", None)
    Image.fromarray(np.array([[7, 3000]], dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match=r"deep.png has 1 band of uint16, values 7 to 3000; .*co2s_hf\[scenes\]"):
        ImageRule().read(StoredFile(str(tmp_path / "deep.png")))
    Image.new("RGBA", (4, 4), (7, 8, 9, 1)).save(tmp_path / "four.png")
    assert ImageRule().read(StoredFile(str(tmp_path / "four.png"))).getpixel((1, 1)) == (7, 8, 9)


def test_missing_rasterio_is_named(sixteen_bit, monkeypatch):
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(ImportError, match=r"field.tif needs rasterio: pip install 'co2s_hf\[scenes\]'"):
        ImageRule((4, 3, 2), ((0, 4000),)).read(sixteen_bit)


def test_percentiles_are_computed_from_all_files_together(tmp_path):
    values = np.arange(100, dtype=np.float32).reshape(1, 10, 10)
    files = [stored_raster(tmp_path / f"{n}.tif", values + 100 * n) for n in range(2)]
    (low, high), *rest = percentile_scale(files, ImageRule())
    assert (low, high) == pytest.approx(tuple(np.percentile(np.arange(200), (2, 98)))) and not rest
    flat = stored_raster(tmp_path / "flat.tif", np.full((1, 4, 4), 5, dtype=np.uint16))
    with pytest.raises(UserError, match=r"the value 5 almost everywhere.*`scale=\(\(0, 255\),\)`"):
        percentile_scale([flat], ImageRule())
    with pytest.raises(UserError, match=r"None of the images can be read.*gone.tif does not exist"):
        percentile_scale([StoredFile(str(tmp_path / "gone.tif"))], ImageRule())
    deep = stored_raster(tmp_path / "deep.tif", np.zeros((3, 4, 4), dtype=np.uint16))
    with pytest.raises(UserError, match=r"different numbers of bands: \[1, 3\]. .*`bands=\(1, 1, 1\)`"):
        percentile_scale([flat, deep], ImageRule())
    two = stored_raster(tmp_path / "two.tif", np.zeros((2, 4, 4), dtype=np.uint16))
    with pytest.raises(UserError, match=r"None of .* 2 bands .* use `bands=\(1, 1, 1\)` and `scale='percentiles'`"):
        percentile_scale([two], ImageRule())
    with pytest.raises(UserError, match=r"only pixels without data"):
        percentile_ranges(np.array([[1.0, 2.0], [np.nan, np.nan]]))


def test_broken_files_are_named_with_the_remedy(tmp_path):
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "whole.jpg")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    with pytest.raises(UserError, match=r"cut.jpg cannot be read as an image: .*truncated.*remove it from its list"):
        ImageRule().read(StoredFile(str(cut)))
    (tmp_path / "text.png").write_text("no image", encoding="utf-8")
    with pytest.raises(UserError, match=r"text.png cannot be read as an image"):
        ImageRule().read(StoredFile(str(tmp_path / "text.png")))
    with pytest.raises(UserError, match=r"gone.png does not exist"):
        ImageRule().read(StoredFile(str(tmp_path / "gone.png")))


def label_file(tmp_path, values, mode=None) -> StoredFile:
    Image.fromarray(np.array(values, dtype=np.uint8), mode=mode).save(tmp_path / "label.png")
    return StoredFile(str(tmp_path / "label.png"))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (LabelRule(), [[0, 1, 7, 255]]),
        (LabelRule(reduce_labels=True), [[255, 0, 6, 255]]),
        (LabelRule(label_map=((0, 0, 2), (1, 1, 2), (7, 7, 0))), [[2, 2, 0, 255]]),
        (LabelRule(label_map=((0, 0, 2), (1, 1, 2), (7, 7, 0), (255, 255, 1)), ignore_index=254), [[2, 2, 0, 1]]),
    ],
)
def test_label_values_become_class_indices(tmp_path, rule, expected):
    file = label_file(tmp_path, [[0, 1, 7, 255]])
    assert np.asarray(rule.read(file)).tolist() == expected


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_ranges_of_values_become_class_indices(tmp_path, dtype):
    rule = LabelRule(label_map=((100, 200, 0), (0, 9, 2), (50, 50, 1)))
    Image.fromarray(np.array([[0, 9, 50, 100, 200, 255]], dtype=dtype)).save(tmp_path / "label.png")
    assert np.asarray(rule.read(StoredFile(str(tmp_path / "label.png")))).tolist() == [[2, 2, 1, 0, 0, 255]]
    values = np.array([-1, 0, 9, 10, 49, 50, 51, 99, 100, 200, 201, 254, 255, 256, 70000])
    assert rule.indices(values).tolist() == [-1, 2, 2, -1, -1, 1, -1, -1, 0, 0, -1, -1, 255, -1, -1]
    Image.fromarray(np.array([[0, 10]], dtype=dtype)).save(tmp_path / "label.png")
    with pytest.raises(UserError, match=r"label.png has the label 10, which no rule covers"):
        rule.read(StoredFile(str(tmp_path / "label.png")))


def test_a_range_over_all_16_bits_is_not_a_list_of_values(tmp_path):
    rule = LabelRule(label_map=((0, 32767, 0), (32768, 65535, 1)))
    values = np.array([[0, 255, 32767, 32768, 65535]], dtype=np.uint16)  # 255 belongs to its range
    Image.fromarray(values).save(tmp_path / "label.png")
    assert np.asarray(rule.read(StoredFile(str(tmp_path / "label.png")))).tolist() == [[0, 0, 0, 1, 1]]
    assert [len(numbers) for numbers in rule._ranges] == [2, 2, 2] and rule.has_ranges
    assert not LabelRule(label_map=((7, 7, 0),)).has_ranges and not LabelRule().has_ranges


def test_another_ignore_index_is_possible(tmp_path):
    file = label_file(tmp_path, [[0, 9]])
    assert np.asarray(LabelRule(ignore_index=9).read(file)).tolist() == [[0, 255]]
    with pytest.raises(UserError, match=r"label.png has the label 255, which no rule covers"):
        LabelRule(ignore_index=9).read(label_file(tmp_path, [[0, 255]]))


def test_colours_become_classes(tmp_path):
    colors = [[[255, 0, 0], [0, 0, 255], [0, 0, 0]]]
    file = label_file(tmp_path, colors, "RGB")
    rule = LabelRule(colors=((0, 0, 255), (255, 0, 0)), ignore_colors=((0, 0, 0),))
    assert np.asarray(rule.read(file)).tolist() == [[1, 0, 255]]
    with pytest.raises(UserError, match=r"label.png has the label \(0, 0, 0\), which no rule covers"):
        LabelRule(colors=((0, 0, 255), (255, 0, 0))).read(file)
    with pytest.raises(UserError, match=r"label.png has the PIL mode 'RGB'.*`label_colors='classes.json'`"):
        LabelRule().read(file)


def test_the_palette_of_a_mask_is_ignored(tmp_path):
    mask = Image.fromarray(np.array([[0, 2]], dtype=np.uint8))
    mask.putpalette([9] * 768)
    mask.save(tmp_path / "mask.png")
    assert np.asarray(LabelRule().read(StoredFile(str(tmp_path / "mask.png")))).tolist() == [[0, 2]]


def test_base_scale_works_for_landscape_and_portrait():
    assert base_scale((1000, 400), None) == 1
    assert base_scale((256, 256), (2048, 512)) == 2  # tiles of 256 px become 512
    assert base_scale((4096, 256), (2048, 512)) == base_scale((256, 4096), (2048, 512)) == 0.5


def test_images_are_found_below_a_folder(tmp_path):
    for name in ("b/2.PNG", "a/1.tif", ".hidden/3.png", "a/.4.png", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert find_images(tmp_path) == [tmp_path / "a/1.tif", tmp_path / "b/2.PNG"]
    assert find_images(tmp_path, (".txt",)) == [tmp_path / "a/notes.txt"]
    with pytest.raises(FileNotFoundError, match="gone' does not exist"):
        find_images(tmp_path / "gone")


@pytest.mark.parametrize(
    ("link", "target", "found"),
    [
        ("a/up", "images", ["a/deep/2.png", "b/1.png"]),
        ("a/deep/up", "images/a", ["a/deep/2.png", "b/1.png"]),
        ("b/far_up", ".", ["a/deep/2.png", "b/1.png", "b/far_up/other/3.png"]),
    ],
)
def test_a_link_to_a_folder_above_is_followed_once(link, target, found, tmp_path):
    images = tmp_path / "images"
    for path in (images / "b" / "1.png", images / "a" / "deep" / "2.png", tmp_path / "other" / "3.png"):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
    (images / link).symlink_to(tmp_path / target)
    assert [str(path.relative_to(images)) for path in find_images(images)] == found


def test_a_folder_has_its_own_name_although_a_link_comes_first(tmp_path):
    for name in ("set/z/1.png", "elsewhere/2.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "set" / "a").symlink_to("z")
    (tmp_path / "set" / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "b").symlink_to(tmp_path / "elsewhere")  # the first of two links is followed
    (tmp_path / "set" / "3.png").symlink_to("z/1.png")  # files are found under all their names
    found = [str(path.relative_to(tmp_path / "set")) for path in find_images(tmp_path / "set")]
    assert found == ["3.png", "b/2.png", "z/1.png"]


def test_label_folders_beside_images_are_left_out_on_request(tmp_path, caplog):
    for name in ("images/1.png", "labels/1.png", "labels/deep/2.png", "alone/labels/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert len(find_images(tmp_path)) == 4 and not caplog.records
    found = find_images(tmp_path, leave_out_labels=True)
    assert [str(path.relative_to(tmp_path)) for path in found] == ["alone/labels/3.png", "images/1.png"]
    (record,) = caplog.records
    assert record.getMessage().startswith(f"'{tmp_path / 'labels'}' is left out, because label maps are expected")


def test_damaged_content_of_any_kind_names_the_file(tmp_path):
    """Pillow raises a plain ValueError for some damaged BMP files while it decodes them."""
    path = tmp_path / "damaged.bmp"
    Image.new("RGB", (8, 8)).save(path)
    content = bytearray(path.read_bytes())
    content[28] = 2  # bits per pixel, a value that Pillow has no decoder for
    path.write_bytes(content)
    with pytest.raises(UserValueError, match=r"damaged.bmp cannot be read as an image: "):
        ImageRule().read(StoredFile(str(path)))
