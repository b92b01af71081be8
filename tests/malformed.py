"""Malformed content for every kind of file that a user gives to a command. All of it is drawn from a seed.

A damage is a function of the path of a good file and a random generator. It puts something malformed in its place.
"""

import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import torch
from affine import Affine
from helpers import PLACE, write_raster
from hostile import mosaic, tiff
from PIL import Image
from safetensors.torch import load_file, save_file


Damage = Callable[[Path, Random], object]
SIDE = 48  # of the images
SERVER = b"http://server"  # stands for the address of a web server that must not be asked
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="file:///etc/passwd"/></svg>'


# --- any file


def content(data: bytes) -> Damage:
    """Replace the content."""

    def damage(path: Path, rng: Random):
        path.unlink()  # it may be a hard link
        path.write_bytes(data)

    return damage


def cut(least: float, most: float) -> Damage:
    """Keep a share of the bytes that is drawn between two shares."""

    def damage(path: Path, rng: Random):
        data = path.read_bytes()
        content(data[: int(rng.uniform(least, most) * len(data))])(path, rng)

    return damage


def noise(path: Path, rng: Random):
    content(rng.randbytes(rng.randrange(1, 4000)))(path, rng)


def missing(path: Path, rng: Random):
    path.unlink()


def folder(path: Path, rng: Random):
    path.unlink()
    path.mkdir()


def link_to_itself(path: Path, rng: Random):
    path.unlink()
    path.symlink_to(path)


def link_to_nothing(path: Path, rng: Random):
    path.unlink()
    path.symlink_to("nothing")


def pipe(path: Path, rng: Random):
    path.unlink()
    os.mkfifo(path)


ANY: dict[str, Damage] = {
    "empty": content(b""),
    "noise": noise,
    "zeros": content(bytes(1000)),
    "missing": missing,
    "folder": folder,
    "link to itself": link_to_itself,
    "link to nothing": link_to_nothing,
    "pipe": pipe,
}


# --- images and label maps


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def picture(rng: Random, mode: str = "RGB", size: int = SIDE) -> Image.Image:
    bands = {"RGB": 3, "RGBA": 4, "CMYK": 4, "LA": 2, "L": 1}[mode]
    return Image.frombytes(mode, (size, size), rng.randbytes(size * size * bands))


def saved(kind: str, mode: str = "RGB", **options) -> Damage:
    return lambda path, rng: content(encoded(picture(rng, mode), kind, **options))(path, rng)


def cut_image(kind: str, least: float, most: float) -> Damage:
    def damage(path: Path, rng: Random):
        content(encoded(picture(rng), kind))(path, rng)
        cut(least, most)(path, rng)

    return damage


def flipped(kind: str, start: int, stop: int) -> Damage:
    """Change four random bytes of the header."""

    def damage(path: Path, rng: Random):
        data = bytearray(encoded(picture(rng), kind))
        for place in rng.sample(range(start, stop), 4):
            data[place] ^= rng.randrange(1, 256)
        content(bytes(data))(path, rng)

    return damage


def png(width: int, height: int, depth: int = 8, color: int = 2, data: bytes = b"", before: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = (b"IHDR", header), (b"iCCP", before), (b"IDAT", zlib.compress(data)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
        for name, part in parts
        if part or name != b"iCCP"
    )


def raster(dtype: str, bands: int = 3, value: float | None = None, side: int = SIDE, **profile) -> Damage:
    def damage(path: Path, rng: Random):
        values = np.random.default_rng(rng.getrandbits(32)).integers(0, 5, (bands, side, side)).astype(dtype)
        if value is not None:
            values[0, 3, 4] = value
        path.unlink(missing_ok=True)
        write_raster(path, values, **profile)

    return damage


def label(change: Callable[[np.ndarray, Random], np.ndarray]) -> Damage:
    """Change the array of a label map."""

    def damage(path: Path, rng: Random):
        with Image.open(path) as image:
            values = np.array(image)
        path.unlink()
        Image.fromarray(change(values, rng)).save(path)

    return damage


def outside(values: np.ndarray, rng: Random) -> np.ndarray:
    values = values.copy()
    values[rng.randrange(SIDE), rng.randrange(SIDE)] = rng.randrange(6, 255)
    return values


PICTURES: dict[str, Damage] = {
    "text": content(b"not an image\n" * 20),
    "html": content(b"<!DOCTYPE html><html><body>404</body></html>"),
    "svg": content(SVG),
    "vrt": content(mosaic("/etc/passwd").encode()),
    "vrt of an address": content(mosaic(f"/vsicurl/{SERVER.decode()}/x.tif").encode()),
    "svg of an address": content(SVG.replace(b"file:///etc/passwd", SERVER + b"/x.tif")),
    "gif": saved("GIF", "L"),
    "signature alone": content(b"\x89PNG\r\n\x1a\n"),
    "no pixels": content(png(0, 0)),
    "no height": content(png(SIDE, 0)),
    "no data": content(png(SIDE, SIDE)),
    "huge png": content(png(2**31 - 1, 2**31 - 1)),
    "huge tiff": content(tiff(2**20, 2**20, bits=8)),
    "bomb": content(png(40_000, 40_000, 1, 0, bytes(40_000 * 5001))),
    "bomb in profile": content(
        png(SIDE, SIDE, 8, 2, bytes(SIDE * (3 * SIDE + 1)), b"x\0\0" + zlib.compress(bytes(10**8)))
    ),
    "complex": raster("complex64", 1),
    **{
        f"{kind} cut in {part}": cut_image(kind, *shares)
        for kind in ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "JPEG2000")
        for part, shares in {"header": (0.001, 0.01), "pixels": (0.2, 0.9)}.items()
    },
    **{
        f"{kind} flipped": flipped(kind, start, stop)
        for kind, start, stop in (("PNG", 8, 33), ("TIFF", 2, 120), ("BMP", 2, 40), ("WEBP", 8, 40))
    },
}
IMAGES = PICTURES | {
    "16 bits": raster("uint16"),
    "float": raster("float32", value=np.nan),
    "cmyk": saved("JPEG", "CMYK"),
    "five bands": raster("uint8", 5),
}
LABELS = PICTURES | {
    "colours": saved("PNG"),
    "float": raster("float32", 1),
    "nan": raster("float32", 1, np.nan),
    "infinite": raster("float64", 1, np.inf),
    "negative": raster("int16", 1, -5),
    "two bands": saved("PNG", "LA"),
    "cmyk": saved("JPEG", "CMYK"),
    "value outside": label(outside),
    "value of 16 bits": label(lambda values, rng: values.astype(np.uint16) + rng.randrange(300, 60_000)),
    "too large": label(lambda values, rng: np.zeros((SIDE + rng.randrange(1, 99), SIDE), np.uint8)),
    "too small": label(lambda values, rng: np.zeros((SIDE, rng.randrange(1, SIDE)), np.uint8)),
    "transposed side": label(lambda values, rng: np.zeros((1, SIDE), np.uint8)),
}


# --- scenes


def scene(path: Path, rng: Random, bands: int = 3, dtype: str = "uint8", **profile):
    """Write a scene with small tiles, most of them incompressible."""
    values = np.frombuffer(rng.randbytes(bands * 64 * 64), np.uint8).reshape(bands, 64, 64)
    path.unlink(missing_ok=True)
    profile = PLACE | {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "deflate"} | profile
    write_raster(path, values.astype(dtype), **profile)


def scene_with(**profile) -> Damage:
    return lambda path, rng: scene(path, rng, **profile)


def broken_tiles(path: Path, rng: Random):
    """Overwrite bytes in the second half of the file, where tiles are."""
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 2, len(data) - 2000, 300):
        data[place : place + 60] = rng.randbytes(60)
    content(bytes(data))(path, rng)


def unknown_compression(path: Path, rng: Random):
    """Change the value of the tag 259, compression."""
    data = bytearray(path.read_bytes())
    place = data.index(struct.pack("<HHI", 259, 3, 1)) + 8
    data[place : place + 2] = struct.pack("<H", rng.randrange(40_000, 50_000))
    content(bytes(data))(path, rng)


def with_geotransform(*numbers: float) -> Damage:
    return scene_with(transform=Affine(*numbers))


SCENES: dict[str, Damage] = {
    name: damage for name, damage in PICTURES.items() if name not in ("complex", "PNG flipped")
} | {
    "missing": missing,
    "folder": folder,
    "link to itself": link_to_itself,
    "link to nothing": link_to_nothing,
    "pipe": pipe,
    "empty": content(b""),
    "noise": noise,
    "header cut": cut(0.001, 0.01),
    "directory cut": cut(0.01, 0.02),
    "tiles cut": cut(0.3, 0.9),
    "last tile cut": cut(0.95, 0.99),
    "tiles broken": broken_tiles,
    "unknown compression": unknown_compression,
    "no georeference": scene_with(crs=None, transform=None),
    "no reference system": scene_with(crs=None),
    "singular": with_geotransform(0.5, 0.5, 500_000, 0.5, 0.5, 2_780_000),
    "no pixel size": with_geotransform(0.0, 0, 500_000, 0, 0.0, 2_780_000),
    "pixel size not a number": with_geotransform(float("nan"), 0, 500_000, 0, -0.5, 2_780_000),
    "infinite place": with_geotransform(0.5, 0, float("inf"), 0, -0.5, 2_780_000),
    "16 bits": scene_with(dtype="uint16"),
    "float": scene_with(dtype="float32", nodata=float("nan")),
    "complex": scene_with(dtype="complex64"),
    "two bands": scene_with(bands=2),
    "five bands": scene_with(bands=5),
    "mosaic of nothing": content(mosaic("nothing.tif").encode()),
    "mosaic of itself": content(mosaic("scene.tif").encode()),
    "mosaic of no size": content(b'<VRTDataset rasterXSize="0" rasterYSize="0"></VRTDataset>'),
    "mosaic without bands": content(b'<VRTDataset rasterXSize="8" rasterYSize="8"></VRTDataset>'),
    "mosaic cut": content(mosaic("scene.tif").encode()[:300]),
}


# --- text


TEXTS: dict[str, Damage] = {
    "utf-16": lambda path, rng: content(path.read_text("utf-8").encode("utf-16"))(path, rng),
    "latin-1": lambda path, rng: content(path.read_bytes() + "\nStraße.png Grün.png\n".encode("latin-1"))(path, rng),
    "bytes of images": content(png(SIDE, SIDE)),
    "NUL": lambda path, rng: content(path.read_bytes()[:3] + b"\0" + path.read_bytes()[3:])(path, rng),
}


def lines(*text: str) -> Damage:
    return content(("\n".join(text) + "\n").encode())


GOOD_LINE = "images/validation_0001.png labels/validation_0001.png"
NAMES = {  # of images to leave out: one path per line is enough
    "noise": noise,
    "missing": missing,
    "folder": folder,
    "link to itself": link_to_itself,
    "pipe": pipe,
    "path to a parent": lines("../../../../etc/passwd"),
    "absolute path": lines("/etc/passwd"),
    "address": lines("http://server/x.tif"),
    "missing image": lines("images/nothing.png"),
    "folder as image": lines("images"),
    "long line": lines("x" * 10_000_000),
    "long name": lines("images/" + "y" * 5000 + ".png"),
    "NUL in a name": lines("images/a\0.png"),
    "json": lines('["images/validation_0000.png"]'),
    **{name: TEXTS[name] for name in ("utf-16", "latin-1", "bytes of images")},
}
LISTS = TEXTS | {
    "empty": content(b""),
    "noise": noise,
    "missing": missing,
    "folder": folder,
    "link to itself": link_to_itself,
    "pipe": pipe,
    "blank": lines("", "   ", "\t"),
    "path to a parent": lines("../../../../etc/passwd ../../../../etc/passwd"),
    "absolute path": lines("/etc/passwd /etc/passwd"),
    "address": lines("http://server/a.png http://server/b.png"),
    "address of GDAL": lines("/vsicurl/http://server/x.tif labels/validation_0000.png"),
    "three columns": lines("images/validation_0000.png labels/validation_0000.png more words"),
    "no label": lines("images/validation_0000.png"),
    "missing image": lines("images/nothing.png labels/validation_0000.png"),
    "folder as image": lines("images labels"),
    "long line": lines("x" * 10_000_000),
    "long name": lines("images/" + "y" * 5000 + ".png labels/validation_0000.png"),
    "json": lines('["images/validation_0000.png"]'),
}
JSON: dict[str, Damage] = {
    "cut": cut(0.1, 0.9),
    "list": content(b"[1, 2]"),
    "number": content(b"3"),
    "null": content(b"null"),
    "text": content(b'"text"'),
    "object without names": content(b"{}"),
    "nested": content(b"[" * 100_000),
    "nested and closed": content(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "long number": content(b'{"a": ' + b"9" * 10_000 + b"}"),
}


def change(**changes) -> Damage:
    """Change entries of a JSON object. Names with "__" are those of an object inside it; ... removes an entry."""

    def damage(path: Path, rng: Random):
        saved = json.loads(path.read_text("utf-8"))
        for name, value in changes.items():
            *parents, last = name.split("__")
            place = saved
            for parent in parents:
                place = place[parent]
            if value is ...:
                del place[last]
            else:
                place[last] = value
        content(json.dumps(saved).encode())(path, rng)

    return damage


def classes(*entries: object) -> Damage:
    return content(json.dumps(entries).encode())


CLASSES = (
    TEXTS
    | JSON
    | {
        "empty": content(b""),
        "noise": noise,
        "folder": folder,
        "link to itself": link_to_itself,
        "pipe": pipe,
        "large": lambda path, rng: content(b" " * 2**21 + path.read_bytes())(path, rng),
        "no name": classes({"color": [1, 2, 3]}, {"name": "b"}),
        "name is a number": classes({"name": 3}, {"name": "b"}),
        "name with control characters": classes({"name": "a\x1b[2J"}, {"name": "b"}),
        "name twice": classes({"name": "a"}, {"name": "a"}),
        "colour outside": classes({"name": "a", "color": [0, 0, 256]}, {"name": "b"}),
        "colour not a number": content(b'[{"name": "a", "color": [0, NaN, 0]}, {"name": "b"}]'),
        "concepts are numbers": classes({"name": "a", "concepts": [1]}, {"name": "b"}),
        "one class": classes({"name": "a"}),
        "too many": classes(*({"name": f"class {n}"} for n in range(300))),
        "infinite index": content(b'{"classes": [{"name": "a"}, {"name": "b"}], "ignore_index": Infinity}'),
        "name twice in an entry": content(b'[{"name": "a", "name": "c"}, {"name": "b"}]'),
    }
)
COLORS = {name: damage for name, damage in CLASSES.items() if name not in ("large", "one class", "too many")} | {
    "missing": missing,
    "no colours": classes({"name": "a"}, {"name": "b"}),
}
CONFIGS = TEXTS | {
    "empty": content(b""),
    "noise": noise,
    "missing": missing,
    "folder": folder,
    "link to itself": link_to_itself,
    "pipe": pipe,
    "list": lines("- seed: 1"),
    "number": lines("3"),
    "nested": content(b"[" * 20_000),
    "nested in values": content(b"seed: " + b"[" * 3000 + b"]" * 3000),
    "unbalanced": lines("seed: [1, 2"),
    "twice": lines("seed: 1", "seed: 2"),
    "unknown": lines("sede: 1"),
    "tag of Python": lines("seed: !!python/object/apply:os.system ['touch hacked']"),
    "billion laughs": lines(
        "a: &a [x, x, x, x, x, x, x, x, x]",
        *(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi")),
    ),
    "object as value": lines("seed: {a: 1}"),
    "list as value": lines("seed: [1, 2]"),
    "not a number": lines("seed: .nan"),
    "long": lines("seed: " + "9" * 10_000_000),
    "alias without anchor": lines("seed: *nothing"),
    "two documents": lines("seed: 1", "---", "seed: 2"),
}
TABLES = TEXTS | {
    "empty": content(b""),
    "noise": noise,
    "missing": missing,
    "folder": folder,
    "link to itself": link_to_itself,
    "pipe": pipe,
    "header alone": lines("image,tags"),
    "other columns": lines("a,b", "1,2"),
    "column twice": lines("image,image,tags", "a,b,c"),
    "unknown image": lines("image,tags", "data/images/nothing.png,water"),
    "twice": lines("image,tags", *["data/images/labeled_0000.png,water"] * 2),
    "no tags": lines("image,tags", "data/images/labeled_0000.png,"),
    "too few fields": lines("image,tags", "data/images/labeled_0000.png"),
    "open quotation": lines("image,tags", '"data/images/labeled_0000.png,water'),
    "long field": lines("image,tags", "data/images/labeled_0000.png," + "w" * 1_000_000),
    "folder as image": lines("image,tags", "data/images,water"),
    "long name": lines("image,tags", "n" * 5000 + ".png,water"),
    "json": lines('[{"image": "a.png", "tags": "water"}]'),
}


# --- models


def weights(change_tensors: Callable[[dict[str, torch.Tensor], Random], object]) -> Damage:
    """Change the tensors of a safetensors file."""

    def damage(path: Path, rng: Random):
        tensors = load_file(path)
        change_tensors(tensors, rng)
        path.unlink()
        save_file(tensors, path, {"format": "pt"})

    return damage


def some(tensors: dict[str, torch.Tensor], rng: Random) -> str:
    return rng.choice(sorted(name for name in tensors if tensors[name].ndim == 2))


def without_one(tensors: dict[str, torch.Tensor], rng: Random):
    del tensors[some(tensors, rng)]


def one_more(tensors: dict[str, torch.Tensor], rng: Random):
    tensors["a.weight"] = torch.zeros(2)


def with_shape(tensors: dict[str, torch.Tensor], rng: Random):
    tensors[some(tensors, rng)] = torch.zeros(3, 5)


def not_finite(tensors: dict[str, torch.Tensor], rng: Random):
    tensors[some(tensors, rng)][0, 0] = rng.choice([float("nan"), float("inf")])


def header(length: int | None = None, **entry) -> Damage:
    """Write a safetensors file of one tensor whose header is hostile."""
    text = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry}).encode()
    return content(struct.pack("<Q", len(text) if length is None else length) + text + bytes(8))


class Hostile:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("hacked",)


def pickled(path: Path, rng: Random):
    path.unlink()
    torch.save({"model": Hostile()}, path)


FILES = {name: ANY[name] for name in ("empty", "noise", "folder", "link to itself", "pipe")}
WEIGHTS = (
    FILES
    | {"missing": missing, "cut": cut(0.05, 0.9), "cut in the header": cut(0.0001, 0.001), "pickle": pickled}
    | {
        "huge header": header(2**62),
        "header of all memory": header(2**33),
        "wrong offsets": header(data_offsets=[0, 2**40]),
        "negative offsets": header(data_offsets=[-8, 0]),
        "huge shape": header(shape=[2**40, 2**40]),
        "unknown type": header(dtype="X9"),
        "other tensors": header(),
        "one is missing": weights(without_one),
        "one more": weights(one_more),
        "other shape": weights(with_shape),
        "not finite": weights(not_finite),
    }
)
OBJECTS = FILES | JSON | {"utf-16": TEXTS["utf-16"], "bytes of images": TEXTS["bytes of images"]}
MODEL_CONFIGS = (
    {name: damage for name, damage in OBJECTS.items() if name != "pipe"}
    | {"missing": missing}
    | {
        "other type": change(model_type="bert"),
        "type is a list": change(model_type=["co2s"]),
        "no backbone": change(clip_config=...),
        "backbone is a number": change(clip_config=3),
        "backbone of another type": change(clip_config={"model_type": "bert"}),
        "negative width": change(clip_config__hidden_size=-16),
        "width is text": change(dinov3_config__hidden_size="16"),
        "width is a fraction": change(clip_config__hidden_size=16.5),
        "other width": change(dinov3_config__hidden_size=32),
        "huge width": change(clip_config__hidden_size=2**30, clip_config__intermediate_size=2**30),
        "huge middle": change(dinov3_config__intermediate_size=2**40),
        "huge image": change(clip_config__image_size=2**30),
        "many layers": change(clip_config__num_hidden_layers=10**9),
        "huge projection": change(clip_config__projection_dim=2**40),
        "many registers": change(dinov3_config__num_register_tokens=2**40),
        "many channels": change(decoder_channels=2**30, decoder_guidance_channels=2**30),
        "many decoder layers": change(decoder_num_layers=10**6),
        "negative heads": change(decoder_num_attention_heads=-2),
        "no classes": change(id2label={}),
        "classes are text": change(id2label="abc"),
        "more classes": change(id2label={str(n): f"class {n}" for n in range(9)}, label2id=..., palette=None),
        "huge number of classes": change(num_labels=2**40, id2label=..., label2id=..., palette=None),
        "huge size of logits": change(clip_logits_size=2**24),
        "huge crops": change(crop_size=2**30),
        "no crops": change(crop_size=0),
        "temperature not a number": change(clip_temperature=float("nan")),
        "temperature is zero": change(dinov3_temperature=0.0),
        "unknown fusion": change(fusion="best"),
        "palette of text": change(palette=[["a", "b", "c"]] * 6),
        "palette outside": change(palette=[[0, 0, 999]] * 6),
        "std is zero": change(image_std=[0.0, 1.0, 1.0]),
        "mean not a number": change(image_mean=[float("nan"), 0.5, 0.5]),
        "feature layers outside": change(clip_feature_layers=[0, 1, 99]),
        "bands are negative": change(image_bands=[-1, 0, 2]),
        "unknown activation": change(clip_config__hidden_act="nothing"),
        "huge dilation": change(decoder_dilations=[2**40, 1]),
        "huge pooling": change(decoder_pool_size=2**40),
        "unknown type of numbers": change(dtype="float99"),
    }
)
PROCESSORS = (
    {name: damage for name, damage in OBJECTS.items() if name not in ("object without names",)}
    | {"missing": missing}
    | {
        "std is zero": change(image_std=[0.0, 0.0, 0.0]),
        "std not a number": change(image_std=[float("nan")] * 3),
        "mean infinite": change(image_mean=[float("inf")] * 3),
        "mean is text": change(image_mean="abc"),
        "two means": change(image_mean=[0.5, 0.5]),
        "factor not a number": change(rescale_factor=float("nan")),
        "factor is text": change(rescale_factor="1/255"),
        "size is text": change(do_resize=True, size="large"),
        "size is huge": change(do_resize=True, size={"shortest_edge": 2**40}),
        "size is zero": change(do_resize=True, size={"shortest_edge": 0}),
        "size is negative": change(do_resize=True, size={"shortest_edge": -8}),
        "size of nothing": change(do_resize=True, size={"depth": 3}),
        "unknown resampling": change(do_resize=True, resample=99),
    }
)
BACKBONE_WEIGHTS = {name: damage for name, damage in WEIGHTS.items() if name != "one more"}  # others are ignored
BACKBONE_CONFIGS = {
    name: MODEL_CONFIGS[name]
    for name in ("empty", "noise", "folder", "link to itself", "cut", "list", "nested", "utf-16", "missing")
}
CLIP_CONFIGS = BACKBONE_CONFIGS | {
    "no vision": change(vision_config=...),
    "vision is a number": change(vision_config=3),
    "negative width": change(vision_config__hidden_size=-16),
    "width is text": change(vision_config__hidden_size="16"),
    "other width": change(vision_config__hidden_size=32),
    "huge width": change(vision_config__hidden_size=2**30),
    "huge vocabulary": change(text_config__vocab_size=2**40),
    "many layers": change(vision_config__num_hidden_layers=10**9),
    "patch of zero": change(vision_config__patch_size=0),
    "huge image": change(vision_config__image_size=2**30),
}
DINOV3_CONFIGS = BACKBONE_CONFIGS | {
    "negative width": change(hidden_size=-16),
    "width is text": change(hidden_size="16"),
    "other width": change(hidden_size=32),
    "huge width": change(hidden_size=2**30),
    "many layers": change(num_hidden_layers=10**9),
    "patch of zero": change(patch_size=0),
    "heads of zero": change(num_attention_heads=0),
}
TOKENIZERS = FILES | {"cut": cut(0.1, 0.9), "list": JSON["list"], "utf-16": TEXTS["utf-16"], "missing": missing}
STATES = {name: ANY[name] for name in ("empty", "noise", "missing")} | {"cut": cut(0.1, 0.9)}
PICKLES = STATES | {"code": pickled}
LOGS = {name: ANY[name] for name in ("noise", "zeros", "folder")} | {"cut": cut(0.3, 0.7), "list": content(b"[1]\n")}
RECORDS = STATES | {name: JSON[name] for name in ("list", "null", "object without names", "nested")}


def original(change_model: Callable[[dict[str, torch.Tensor], Random], object]) -> Damage:
    """Change the weights in a checkpoint of the authors."""

    def damage(path: Path, rng: Random):
        found = torch.load(path, weights_only=True)
        change_model(found["model"], rng)
        path.unlink()
        torch.save(found, path)

    return damage


def torch_file(value: object) -> Damage:
    def damage(path: Path, rng: Random):
        path.unlink()
        torch.save(value, path)

    return damage


ORIGINALS = (
    ANY
    | {"cut": cut(0.05, 0.9), "text": content(b"not weights"), "code": pickled}
    | {
        "list": torch_file([1, 2]),
        "number": torch_file(3),
        "no model": torch_file({"epoch": 3}),
        "model is a list": torch_file({"model": [1]}),
        "model is empty": torch_file({"model": {}}),
        "texts as weights": torch_file({"model": {"module.a": "b"}}),
        "one is missing": original(without_one),
        "one more": original(one_more),
        "other shape": original(with_shape),
        "not finite": original(not_finite),
        "model of numbers": torch_file({"model": {3: torch.zeros(2)}}),
    }
)


# --- folders of data sets


DATA_SETS = {name: ANY[name] for name in ("empty", "noise", "folder", "link to itself")} | {
    "missing": missing,
    "cut": cut(0.1, 0.9),
    "text": content(b"text"),
}
DATA_SET_RECORDS = STATES | {name: JSON[name] for name in ("list", "null", "nested")}


def copy_of(source: Path, target: Path):
    """Copy a file, or a folder with everything in it."""
    shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)


__all__ = [name for name in dict(globals()) if name.isupper()] + ["Damage", "copy_of", "scene"]
