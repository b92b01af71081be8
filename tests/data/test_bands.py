"""The one error about bands and scale: its whole message for many rasters, and the presets."""

import numpy as np
import pytest
import rasterio
from helpers import make_config, write_raster
from PIL import Image
from rasterio.enums import ColorInterp
from unusual_rasters import RASTERS, SENTINEL_2, make

from co2s_hf.data.bands import PRESETS, BandsError, RasterBands, resolve_bands
from co2s_hf.data.options import DataOptions
from co2s_hf.data.reading import ImageRule, StoredFile
from co2s_hf.data.sources import image_rule
from co2s_hf.utils.errors import UserValueError


DATA_SET = " For a data set, `scale='percentiles'` computes one range from all images."


def message_of(rule: ImageRule, path) -> str:
    with pytest.raises(BandsError) as caught:
        rule.read(StoredFile(str(path)))
    return str(caught.value).removeprefix(f"{path} has ")


@pytest.mark.parametrize("name", RASTERS)
def test_one_message_names_everything_that_an_image_needs(name, tmp_path):
    arguments, problem, advice = RASTERS[name]
    path = make(tmp_path / "image.tif", **arguments)
    if problem is None:
        assert ImageRule().read(StoredFile(str(path))).size == (30, 20)
        return
    # 2nd and 98th percentile: 13 and 588 of 1 to 600; 0.02 and 0.98 of floats
    scale = "`scale=((0.02, 0.98),)`" if "float" in arguments["dtype"] else "`scale=((10, 590),)`"
    is_deep = arguments["dtype"] != "uint8"
    expected = f"{problem} {advice.replace('SCALE', scale)}" + (DATA_SET if is_deep else "")
    assert message_of(ImageRule(), path) == expected


def test_the_values_that_were_chosen_are_named_again(tmp_path):
    """A choice of bands alone would replace bands and scale of a model."""
    path = make(tmp_path / "image.tif", 3, "uint16", colors=(ColorInterp.red, ColorInterp.green, ColorInterp.blue))
    assert message_of(ImageRule((4, 3, 2), ((0, 3000),)), path) == (
        "3 bands of uint16 (red, green, blue), values 1 to 600; there is no band 4. Bands 1, 2 and 3 are red, green "
        "and blue. Use `bands=(1, 2, 3)` and `scale=((0, 3000),)`."
    )
    path = make(tmp_path / "eight.tif", 3, "uint8")
    assert message_of(ImageRule((4, 3, 2), ((0.0, 3000.0),)), path).endswith(
        "Use `bands=(1, 2, 3)` and `scale=((0, 255),)`."
    )
    path = make(tmp_path / "one.tif", 1, "uint8")
    assert message_of(ImageRule((4, 3, 2)), path).endswith("there is no band 4. " + RASTERS["two bands"][2])


def test_a_scale_for_16_bits_does_not_darken_an_image_of_8_bits(tmp_path):
    path = make(tmp_path / "eight.tif", 3, "uint8")
    assert message_of(ImageRule(scale=((0.0, 3000.0),)), path).endswith(
        "; `scale=((0, 3000),)` is for values above 255. Use `scale=((0, 255),)`."
    )
    values = np.asarray(Image.open(path))
    image = ImageRule(scale=((0.0, 255.0),)).read(StoredFile(str(path)))
    np.testing.assert_array_equal(np.asarray(image), values)


def test_constant_and_empty_bands_have_a_scale_that_can_be_used(tmp_path):
    for values, expected in ((7, "((0, 8),)"), (0, "((0, 1),)")):
        path = write_raster(tmp_path / "flat.tif", np.full((1, 9, 9), values, dtype=np.uint16))
        assert message_of(ImageRule(), path).endswith(f"Use `scale={expected}`.{DATA_SET}")
    path = write_raster(tmp_path / "empty.tif", np.full((3, 9, 9), np.nan, dtype=np.float32))
    assert message_of(ImageRule(), path) == (
        f"3 bands of float32, no valid pixels; expected 8-bit RGB. Use `scale=((0, 1),)`.{DATA_SET}"
    )


def test_wavelengths_are_used_if_nothing_else_names_the_colours(tmp_path):
    path = make(tmp_path / "image.tif", 6, "uint16")
    with rasterio.open(path, "r+") as raster:
        for number, micrometres in enumerate((0.48, 0.56, 0.60, 0.655, 0.665, 0.84), start=1):
            raster.update_tags(number, ns="IMAGERY", CENTRAL_WAVELENGTH_UM=str(micrometres))
    assert "Bands 5, 2 and 1 are red, green and blue. Use `bands=(5, 2, 1)`" in message_of(ImageRule(), path)
    with rasterio.open(path, "r+") as raster:
        for number, nanometres in enumerate((840, 665, 560, 490, 700, 1610), start=1):
            raster.update_tags(number, ns="IMAGERY", CENTRAL_WAVELENGTH_UM="")
            raster.update_tags(number, wavelength=str(nanometres))
    assert "Bands 2, 3 and 4 are red, green and blue. Use `bands=(2, 3, 4)`" in message_of(ImageRule(), path)


@pytest.mark.parametrize(
    ("names", "rgb"),
    [
        (SENTINEL_2, (4, 3, 2)),
        (("B4", "B3", "B2", "B8"), (1, 2, 3)),
        (("b02", "b03", "b04"), (3, 2, 1)),
        (("B1", "B2", "B3", "B4"), None),  # Landsat 7: blue, green, red, near infrared
        (("coastal_blue", "blue", "green_i", "green", "yellow", "red", "rededge", "nir"), (6, 4, 2)),
        (("red", "green", "nir"), None),
        (("RED", "Green", "bLUe"), (1, 2, 3)),
    ],
)
def test_colours_are_found_by_the_usual_names(names, rgb, tmp_path):
    path = make(tmp_path / "image.tif", len(names), "uint16", descriptions=names)
    with rasterio.open(path) as raster:
        assert RasterBands.of(raster, raster.read).rgb == rgb


def test_names_of_strangers_are_shortened(tmp_path):
    path = make(tmp_path / "image.tif", 2, "uint8", descriptions=("a\n`bands=(9, 9, 9)`", "x" * 1000))
    assert message_of(ImageRule(), path).startswith(f"2 bands of uint8 (a 'bands=(9, 9, 9)', {'x' * 24}), values")
    path = make(tmp_path / "many.tif", 40, "uint8", descriptions=[f"n{number}" for number in range(40)])
    assert "(n0, n1, n2, n3, n4, n5, n6, n7, n8, n9, n10, n11, n12, n13, n14, n15, ...)" in message_of(
        ImageRule(), path
    )


# --- presets


@pytest.mark.parametrize(
    ("preset", "count", "bands", "scale"),
    [
        ("sentinel-2", 12, (4, 3, 2), ((0, 3000),)),
        ("sentinel-2", 13, (4, 3, 2), ((0, 3000),)),
        ("planetscope-4", 4, (3, 2, 1), ((0, 3000),)),
        ("planetscope-8", 8, (6, 4, 2), ((0, 3000),)),
        ("rgbn", 4, (1, 2, 3), None),
    ],
)
def test_a_preset_reads_its_bands_and_refuses_another_number(preset, count, bands, scale, tmp_path):
    names = PRESETS[preset].orders[PRESETS[preset].counts.index(count)]
    assert [names[number - 1] for number in bands] in (["red", "green", "blue"], ["B04", "B03", "B02"])
    dtype = np.uint8 if scale is None else np.uint16
    values = np.stack([np.full((4, 5), 10 * number) for number in range(1, count + 1)]).astype(dtype)
    path = write_raster(tmp_path / "image.tif", values)
    rule = ImageRule.of_options(preset, None)
    assert rule == ImageRule(bands, scale, preset)
    factor = 1 if scale is None else 255 / 3000
    assert np.asarray(rule.read(StoredFile(str(path))))[0, 0].tolist() == [round(10 * band * factor) for band in bands]
    write_raster(path, np.concatenate([values, values]))
    counts = " or ".join(map(str, PRESETS[preset].counts))
    order = ", ".join(PRESETS[preset].orders[-1])
    assert f"; `bands='{preset}'` is for {counts} bands: {order}. If the bands" in message_of(rule, path)


def test_a_preset_scales_integers_of_16_bits_alone(tmp_path):
    rule = ImageRule.of_options("sentinel-2", None)
    path = make(tmp_path / "image.tif", 12, "float32")
    assert message_of(rule, path) == (
        "12 bands of float32, values 0 to 1; the values that `bands='sentinel-2'` scales are integers of 16 bits. Use "
        f"`bands='sentinel-2'` and `scale=((0.02, 0.98),)`.{DATA_SET}"
    )
    path = make(tmp_path / "image.tif", 12, "uint8")
    assert message_of(rule, path).endswith("Use `bands='sentinel-2'` and `scale=((0, 255),)`.")
    own = ImageRule.of_options("sentinel-2", ((0, 255),))
    assert own.scale == ((0, 255),) and own.read(StoredFile(str(path))).getpixel((4, 0)) == (5, 5, 5)


def test_the_fourth_band_of_an_orthophoto_is_not_transparency(tmp_path):
    """GDAL tags the fourth of four bands of 8 bits as transparency. Here it is near infrared, 0 in water."""
    values = np.full((4, 2, 2), 9, dtype=np.uint8)
    values[3, 0] = 0
    path = write_raster(tmp_path / "image.tif", values)
    file = StoredFile(str(path))
    assert np.asarray(ImageRule.of_options("rgbn", None).read(file)).min() == 9
    assert np.asarray(ImageRule((1, 2, 3)).read(file))[..., 0].tolist() == [[0, 0], [9, 9]]
    with rasterio.open(path, "r+") as raster:
        raster.descriptions = ("red", "green", "blue", "nir")
    assert np.asarray(ImageRule((1, 2, 3)).read(file)).min() == 9


def test_a_wrong_preset_is_an_error():
    with pytest.raises(
        UserValueError, match=r"`bands` is 'landsat'; .* sentinel-2, planetscope-4, planetscope-8, rgbn"
    ):
        resolve_bands("landsat", None)


def test_data_options_take_a_preset(tmp_path):
    options = DataOptions(data_dir=tmp_path, bands="planetscope-8")
    assert image_rule(options, make_config(image_scale=[[0, 9]])) == ImageRule(
        (6, 4, 2), ((0, 3000),), "planetscope-8"
    )
    options = DataOptions(data_dir=tmp_path, bands="rgbn", scale="percentiles")
    assert image_rule(options) == ImageRule((1, 2, 3), None, "rgbn")
    with pytest.raises(UserValueError, match="`bands` is 'landsat'"):
        DataOptions(data_dir=tmp_path, bands="landsat")


# --- transparency


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_transparent_images_are_read_as_with_three_bands(suffix, tmp_path):
    values = np.random.default_rng(0).integers(1, 256, (8, 9, 4), dtype=np.uint8)
    values[:3, :, 3], values[3:5, :, 3] = 0, 7
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(values, "RGBA").save(path, **({"lossless": True, "exact": True} if suffix == "webp" else {}))
    found = np.asarray(ImageRule().read(StoredFile(str(path))))
    assert np.array_equal(found[3:], values[3:, :, :3]) and not found[:3].any()
    assert np.array_equal(found, np.asarray(ImageRule((1, 2, 3)).read(StoredFile(str(path)))))


def test_grey_with_transparency_is_read(tmp_path):
    Image.fromarray(np.array([[[50, 255], [60, 0]]], dtype=np.uint8), "LA").save(tmp_path / "image.png")
    assert np.asarray(ImageRule().read(StoredFile(str(tmp_path / "image.png")))).tolist() == [[[50] * 3, [0] * 3]]


def test_colours_of_print_are_refused(tmp_path):
    Image.new("CMYK", (4, 4)).save(tmp_path / "image.jpg")
    with pytest.raises(
        UserValueError, match=r"image.jpg has the PIL mode 'CMYK' \(4 bands of uint8\); .* Save it as RGB"
    ):
        ImageRule().read(StoredFile(str(tmp_path / "image.jpg")))
