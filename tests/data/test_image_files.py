"""Hostile files: what a data set from strangers may contain."""

import io
import os
import struct
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
import rasterio
from helpers import write_raster
from hostile import SECRET, mosaic, tiff
from PIL import EpsImagePlugin, Image

from co2s_hf.data import image_files
from co2s_hf.data.image_files import StoredFile, TooLargeError, open_pillow, open_raster
from co2s_hf.data.reading import ImageRule, LabelRule
from co2s_hf.data.samples import Samples
from co2s_hf.data.validation.scan import scan_images, scan_labels
from co2s_hf.utils.errors import UserValueError


def read_bands(file: StoredFile, bands: tuple[int, ...] | None = None) -> np.ndarray:
    with open_raster(file, bands) as raster:
        return raster.read(bands)


RULES = (ImageRule(), ImageRule(bands=(1, 2, 3), scale=((0, 9000),)), ImageRule(scale=((0, 9000),)), LabelRule())


@pytest.fixture
def private(tmp_path):
    """A raster of the user that is no part of the data."""
    (tmp_path / "home").mkdir()
    return write_raster(tmp_path / "home" / "private.tif", np.full((3, 8, 8), SECRET, dtype=np.uint16))


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def errors(file: StoredFile) -> str:
    """Return the errors of reading a file by every rule."""
    messages = []
    for rule in RULES:
        with pytest.raises(UserValueError) as error:
            rule.read(file)
        messages.append(str(error.value))
    return "\n".join(messages)


# --- formats that name other files


@pytest.mark.parametrize("where", ["row", "scene.tif", "photo.png", "mosaic.vrt", "drawing.svg"])
def test_a_mosaic_is_never_opened_as_an_image(where, server, private, data):
    """A mosaic names files and addresses, whose values an error would show."""
    for source in (str(private), f"/vsicurl/{server.url}/x.tif"):
        content = mosaic(source).encode()
        if where == "row":
            file = StoredFile("a.png", content, "train[0]")
        else:
            (data / where).write_bytes(content)
            file = StoredFile(str(data / where))
        found = errors(file)
        assert str(SECRET) not in found and found.count("expected PNG, JPEG, TIFF, BMP, WebP or JPEG 2000") == 4
    assert server.requests() == []


@pytest.mark.parametrize(
    "path",
    [
        "/vsicurl/{url}/x.tif",
        "{url}/x.tif",
        "vrt://{private}?bands=1,2,3",
        "GTIFF_DIR:1:{private}",
        "GTIFF_DIR:1:/vsicurl/{url}/x.tif",
        "file://{private}",
        "<VRTDataset",
    ],
)
def test_the_path_of_a_row_is_the_path_of_a_file_and_nothing_else(path, server, private):
    path = mosaic(str(private)) if path == "<VRTDataset" else path.format(url=server.url, private=private)
    found = errors(StoredFile(path, row="train[0]"))
    assert str(SECRET) not in found and server.requests() == []


@pytest.mark.parametrize("stored", ["row", "file"])
def test_a_tiff_cannot_name_a_file_with_overviews(stored, server, data):
    """GDAL opens the file that a tag of a GeoTIFF names, when it reads a smaller version of the image."""
    path = write_raster(data / "a.tif", np.ones((4, 700, 700), dtype=np.uint16))
    with rasterio.open(path, "r+") as raster:
        raster.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=f"/vsicurl/{server.url}/x.tif")
    file = StoredFile(str(path)) if stored == "file" else StoredFile("a.tif", path.read_bytes())
    errors(file)
    with pytest.raises(UserValueError, match=r"a.tif names another file with its overviews"):
        read_bands(file)
    assert server.requests() == []


def test_files_beside_an_image_are_not_read(server, private, data):
    values = np.arange(3 * 700 * 700, dtype=np.uint32).astype(np.uint16).reshape(3, 700, 700)
    path = write_raster(data / "a.tif", values)
    address = f"/vsicurl/{server.url}/x.tif"
    metadata = f'<Metadata domain="OVERVIEWS"><MDI key="OVERVIEW_FILE">{address}</MDI></Metadata>'
    nodata = '<PAMRasterBand band="1"><NoDataValue>1234</NoDataValue></PAMRasterBand>'
    path.with_name("a.tif.aux.xml").write_text(f"<PAMDataset>{metadata}{nodata}</PAMDataset>")
    path.with_name("a.tif.ovr").write_text(mosaic(str(private)))
    path.with_name("a.tif.msk").write_text(mosaic(address))
    assert np.array_equal(read_bands(StoredFile(str(path))), values) and (values[0] == 1234).any()
    with pytest.raises(UserValueError, match=r"a.tif has 3 bands of uint16, values 0 to 65[0-9]{3}; expected 8-bit"):
        ImageRule().read(StoredFile(str(path)))  # from a smaller version
    assert server.requests() == []


def test_pillow_starts_no_program(data, monkeypatch):
    """Pillow gives EPS files to Ghostscript."""
    script = data / "gs"
    script.write_text(f'#!{sys.executable}\nopen("{data}/started", "w")\n', encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{data}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow searches only once
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n"
    assert "holds" not in errors(StoredFile("a.png", content))
    assert not (data / "started").exists()


@pytest.mark.parametrize("driver", ["GTiff", "PNG", "JPEG", "JP2OpenJPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("stored", ["row", "file"])
def test_images_of_six_formats_are_read(driver, stored, data):
    values = np.random.default_rng(0).integers(0, 256, (3, 40, 30), dtype=np.uint8)
    lossless = {"WEBP": {"LOSSLESS": "YES"}, "JP2OpenJPEG": {"REVERSIBLE": "YES", "QUALITY": "100"}}.get(driver, {})
    path = write_raster(data / "image", values, driver=driver, **lossless)
    file = StoredFile(str(path)) if stored == "file" else StoredFile("image", path.read_bytes())
    with rasterio.open(path) as raster:
        expected = np.moveaxis(raster.read(), 0, -1)
    assert driver == "JPEG" or np.array_equal(expected, np.moveaxis(values, 0, -1))
    assert np.array_equal(np.asarray(ImageRule(bands=(1, 2, 3)).read(file)), expected)
    if driver == "JP2OpenJPEG":
        with pytest.raises(UserValueError, match=r"image has 3 bands of uint8, .* use `bands=\(1, 2, 3\)`.$"):
            ImageRule().read(file)
    else:
        with file.open() as stream, Image.open(stream) as image:  # Pillow and GDAL decode JPEG files differently
            assert np.array_equal(np.asarray(ImageRule().read(file)), np.asarray(image))


def test_folders_and_devices_are_no_files(data):
    (data / "zero.png").symlink_to("/dev/zero")
    (data / "folder.png").mkdir()
    for name in ("zero.png", "folder.png"):
        assert errors(StoredFile(str(data / name))).count(f"{name} is no file") == len(RULES)
    assert "zero byte" in errors(StoredFile("zero byte\0.png"))


# --- images that are too large


def test_a_small_file_that_claims_to_be_large_is_refused_by_name(data):
    """Four bands of 16 bits are described with rasterio, which would reserve 745 GiB."""
    file = StoredFile("a.tif", tiff(400_000, 250_000, bands=4), "train[7]")
    assert errors(file).count("train[7] a.tif has 400000 x 250000 pixels; at most 268,435,456 are read at once.") == 4
    (data / "bomb.tif").write_bytes(tiff(400_000, 250_000, bands=4))
    Image.new("L", (8, 8)).save(data / "good.png")
    paths = [str(data / "bomb.tif"), str(data / "good.png")]
    for scan in (scan_images, scan_labels):
        bomb, good = scan(Samples.of_files(paths, paths))
        assert good.error is None and good.size == (8, 8)
        assert bomb.error.startswith(f"{data / 'bomb.tif'} has 400000 x 250000 pixels")


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 64) + b"IDAT" + bytes(68)


def large_files() -> dict[str, bytes]:
    """Return the headers of images of 20000 x 15000 pixels."""
    files = {"a.png": png_header(20_000, 15_000), "a.tif": tiff(20_000, 15_000, bits=8)}
    for name in ("JPEG", "BMP"):
        stream = io.BytesIO()
        Image.new("RGB", (3, 5)).save(stream, name)
        files[f"a.{name}"] = stream.getvalue()
    files["a.JPEG"] = files["a.JPEG"].replace(struct.pack(">HH", 5, 3), struct.pack(">HH", 15_000, 20_000))
    files["a.BMP"] = files["a.BMP"].replace(struct.pack("<II", 3, 5), struct.pack("<II", 20_000, 15_000))
    return files


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.JPEG", "a.BMP"])
def test_every_format_has_the_same_limit_from_its_header(name):
    file = StoredFile(name, large_files()[name])
    for rule in (ImageRule(), ImageRule(bands=(1, 1, 1)), LabelRule()):
        with pytest.raises(TooLargeError, match=f"^{name} has 20000 x 15000 pixels; at most 268,435,456 are read"):
            rule.read(file)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "webp"])
def test_only_our_limit_counts(suffix, tmp_path, monkeypatch, recwarn):
    """An image above Pillow's limit and below ours is opened, without a warning of Pillow."""
    image = Image.effect_noise((100, 100), 50).convert("RGB")
    image.save(tmp_path / f"a.{suffix}")
    file = StoredFile(str(tmp_path / f"a.{suffix}"))
    expected = np.asarray(Image.open(file.path).convert("RGB"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    assert np.array_equal(np.asarray(ImageRule().read(file)), expected)
    assert Image.MAX_IMAGE_PIXELS == 4000 and not recwarn.list
    monkeypatch.setattr(image_files, "MAX_PIXELS", 100 * 100)
    assert np.array_equal(np.asarray(ImageRule().read(file)), expected)
    monkeypatch.setattr(image_files, "MAX_PIXELS", 100 * 100 - 1)
    for rule in (ImageRule(), ImageRule(bands=(1, 2, 3))):
        with pytest.raises(TooLargeError, match=f"a.{suffix} has 100 x 100 pixels; at most 9,999 are read at once"):
            rule.read(file)


def test_the_limit_of_pillow_is_the_same_after_an_error(tmp_path, monkeypatch):
    Image.new("RGB", (100, 100)).save(tmp_path / "a.tif")
    (tmp_path / "a.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:9000])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)
    with pytest.raises(OSError), open_pillow(StoredFile(str(tmp_path / "a.tif"))) as image:
        image.load()
    assert Image.MAX_IMAGE_PIXELS == 6000


def test_the_bands_that_are_read_count(tmp_path):
    with pytest.raises(TooLargeError, match=r"a.tif has 100 bands of 5000 x 5000 pixels, 4.7 GiB; .*`bands=\(3, 2, 1"):
        read_bands(StoredFile("a.tif", tiff(5000, 5000, bands=100)))
    path = tmp_path / "sparse.tif"
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        width=5000,
        height=5000,
        count=100,
        dtype="uint16",
        interleave="band",
        sparse_ok=True,
    ):
        pass
    assert read_bands(StoredFile(str(path)), (7,)).shape == (1, 5000, 5000)
    with pytest.raises(TooLargeError, match=r"sparse.tif has 100 bands"):
        read_bands(StoredFile(str(path)))


def test_a_small_image_with_a_huge_block_is_refused():
    """GDAL would decode the whole block of 7 GB for its 16 x 16 pixels."""
    with pytest.raises(TooLargeError, match=r"a.tif has blocks of 60000 x 60000 pixels, 6.7 GiB; .*smaller blocks"):
        read_bands(StoredFile("a.tif", tiff(16, 16, tile=60_000)))
    with pytest.raises(UserValueError, match=r"a.tif cannot be read as a raster"):
        read_bands(StoredFile("a.tif", tiff(16, 16, tile=64)))


def test_a_description_takes_a_sample(tmp_path):
    path = tmp_path / "a.tif"
    size = {"width": 4096, "height": 4096, "count": 4}
    with rasterio.open(path, "w", driver="GTiff", dtype="uint16", tiled=True, sparse_ok=True, **size) as raster:
        raster.write(np.full((4, 4096, 256), 77, dtype=np.uint16), window=((0, 4096), (0, 256)))
    tracemalloc.start()
    try:
        with pytest.raises(UserValueError, match=r"a.tif has 4 bands of uint16, values 0 to 77; expected"):
            ImageRule().read(StoredFile(str(path)))
        assert tracemalloc.get_traced_memory()[1] < 20e6  # bytes; the whole file has 134 MB
    finally:
        tracemalloc.stop()
