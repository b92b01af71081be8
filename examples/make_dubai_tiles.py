"""Make the real images that this package ships: 64 aerial images of Dubai, reduced and partly cut into tiles.

    python examples/make_dubai_tiles.py path/to/dubai                         # writes co2s_hf/assets/dubai
    python examples/make_dubai_tiles.py path/to/dubai --output_dir elsewhere

The source folder has images/, labels/ and splits/, with one `images/NAME labels/NAME` per line of labeled.txt,
unlabeled.txt and val.txt. co2s_hf/assets/dubai/README.md says where it comes from. Every image is reduced until its
short side has at most 512 px. The images of val.txt stay whole. The others are cut into tiles of 256 px. There are no
random numbers: the same source gives the same files.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from co2s_hf.data.options import IGNORE
from co2s_hf.data.splits import SPLIT_FILES, read_list


SHORT_SIDE, TILE = 512, 256  # pixels
JPEG_QUALITY = 85
# Classes in label order. The concepts are words that the text tower of the small CLIP backbone was trained on.
CLASSES = (
    {"name": "building", "color": [255, 0, 0], "concepts": ["buildings", "mobile home"]},
    {"name": "land", "color": [159, 129, 183], "concepts": ["bare soil", "sand"]},
    {"name": "road", "color": [255, 255, 0], "concepts": ["pavement"]},
    {"name": "vegetation", "color": [0, 255, 0], "concepts": ["trees", "grass", "chaparral"]},
    {"name": "water", "color": [0, 0, 255], "concepts": ["water", "sea"]},
)


def reduce(image: Image.Image, labels: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    """Reduce an image and its label map (height, width) until the short side has at most `SHORT_SIDE` pixels.

    A reduced label is the class, or "no class", that covers the largest part of the pixel.
    """
    factor = SHORT_SIDE / min(image.size)
    if factor >= 1:
        return image, labels
    size = tuple(round(side * factor) for side in image.size)
    values = np.unique(labels)
    masks = [Image.fromarray((labels == value).astype(np.float32)) for value in values]
    shares = np.stack([np.asarray(mask.resize(size, Image.Resampling.BOX)) for mask in masks])
    return image.resize(size, Image.Resampling.LANCZOS), values[shares.argmax(axis=0)]


def starts(side: int) -> list[int]:
    """Return where the tiles along one side of an image start.

    The tiles are spread evenly from edge to edge, as many as fit best. In these images, neighbours overlap by at most
    52 px, or leave at most 122 px between them.
    """
    return np.linspace(0, side - TILE, max(1, round(side / TILE))).round().astype(int).tolist()


def tiles(image: Image.Image, labels: np.ndarray, name: str) -> Iterator[tuple[Image.Image, np.ndarray, str]]:
    """Cut an image and its label map into tiles. Their names end with the position of the top left pixel."""
    for y in starts(image.height):
        for x in starts(image.width):
            tile = image.crop((x, y, x + TILE, y + TILE))
            yield tile, labels[y : y + TILE, x : x + TILE], f"{name}_y{y:03d}_x{x:03d}"


def save(image: Image.Image, labels: np.ndarray, name: str, folder: Path) -> str:
    """Write an image and its label map, and return their line for a list."""
    image.save(folder / "images" / f"{name}.jpg", quality=JPEG_QUALITY, optimize=True)
    mask = Image.fromarray(labels)
    mask.putpalette([value for entry in CLASSES for value in entry["color"]] + [0] * 3 * (IGNORE + 1 - len(CLASSES)))
    mask.save(folder / "labels" / f"{name}.png", optimize=True)
    return f"images/{name}.jpg labels/{name}.png\n"


def main():
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("source", type=Path, help="folder with images/, labels/ and splits/")
    parser.add_argument("--output_dir", type=Path, default=Path("co2s_hf/assets/dubai"), help="default: %(default)s")
    args = parser.parse_args()
    for name in ("images", "labels", "splits"):
        (args.output_dir / name).mkdir(parents=True, exist_ok=True)
    lines = []
    for split, file in SPLIT_FILES.items():
        for image_path, label_path in read_list(args.source / "splits" / file, label_needed=True):
            image = Image.open(args.source / image_path).convert("RGB")
            labels = np.asarray(Image.open(args.source / label_path))
            image, labels = reduce(image, labels)
            name = Path(image_path).stem
            if split == "validation":
                lines.append(save(image, labels, name, args.output_dir))
            else:
                for tile in tiles(image, labels, name):
                    save(*tile, args.output_dir)
    (args.output_dir / "splits" / SPLIT_FILES["validation"]).write_text("".join(lines), encoding="utf-8")
    classes = ",\n ".join(json.dumps(entry) for entry in CLASSES)
    (args.output_dir / "classes.json").write_text(f"[{classes}]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
