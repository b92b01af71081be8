"""From a folder of images to labelled, unlabelled and validation samples, and to the batches that training takes.

A folder holds `images/` and `labels/` and the lists `splits/labeled.txt`, `splits/unlabeled.txt` and
`splits/val.txt` in the authors' format (`images/NAME labels/NAME` a line). An optional `classes.json`,
`[{"name": "water", "color": [0, 0, 255]}, ...]` in label order, names the classes.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from .views import Geometry, draw_appearance, draw_cutmix_box, sample_generator


SPLIT_FILES = {"labeled": "labeled.txt", "unlabeled": "unlabeled.txt", "validation": "val.txt"}


@dataclass(frozen=True)
class Sample:
    """An image file and the file with its label map; `None` for an image without one."""

    image: Path
    label: Path | None

    @property
    def name(self) -> str:
        """What messages and outputs call it: the image's stem."""
        return self.image.stem

    def load_image(self) -> Image.Image:
        """Read the image as 8-bit RGB.

        Raises:
            ValueError: It cannot be read or is not 8-bit RGB or grey.
        """
        image = _open(self.image)
        if image.mode not in ("RGB", "L", "P", "1"):
            raise ValueError(
                f"{self.image} has the PIL mode '{image.mode}'; expected 8-bit RGB. Save its red, green and blue "
                "bands, scaled to 0..255, as RGB."
            )
        return image.convert("RGB")

    def load_label(self) -> Image.Image:
        """Read the label map as a one-band image of class indices.

        Raises:
            ValueError: It cannot be read, or has several bands.
        """
        label = _open(self.label)
        if label.mode not in ("L", "P", "I", "I;16", "1"):
            raise ValueError(
                f"{self.label} has the PIL mode '{label.mode}'; expected one band of class indices. Turn its colours "
                "into indices first."
            )
        # A palette is for viewing; the indices behind it are the labels.
        return Image.fromarray(np.asarray(label).astype(np.uint8))


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path} cannot be read as an image: {error}. Replace it, or take it off its list."
        ) from error
    return image


@dataclass(frozen=True)
class SegmentationFolder:
    """The samples of one data folder and what its labels mean."""

    labeled: tuple[Sample, ...]
    unlabeled: tuple[Sample, ...]  # their labels, where files exist, are never read
    validation: tuple[Sample, ...]
    id2label: dict[int, str]
    palette: list[list[int]] | None

    @classmethod
    def open(
        cls, data_dir: str | Path, class_names: list[str] | None = None, ignore_index: int = 255
    ) -> "SegmentationFolder":
        """Read the lists of a folder and check them.

        Args:
            data_dir: The folder.
            class_names: Names in label order. Left out: those of `classes.json`, or `class_0`, `class_1` ... up to the
                highest label of the labelled images.
            ignore_index: Label of pixels without a class.

        Raises:
            FileNotFoundError: The folder, a list, or a listed file is missing; all missing files are counted.
            ValueError: A list is empty or malformed, or labels exceed the classes.
        """
        root = Path(data_dir)
        if not root.is_dir():
            raise FileNotFoundError(f"The data folder '{root}' does not exist.")
        splits = {name: _read_split(root, name, file) for name, file in SPLIT_FILES.items()}
        _check_files(splits)
        palette = None
        classes_file = root / "classes.json"
        if class_names is None and classes_file.exists():
            classes = json.loads(classes_file.read_text())
            class_names = [entry["name"] for entry in classes]
            palette = [entry["color"] for entry in classes]
        class_names = _check_labels([*splits["labeled"], *splits["validation"]], class_names, ignore_index)
        if palette is None:
            palette = _embedded_palette(splits["labeled"][0], len(class_names))
        return cls(**splits, id2label=dict(enumerate(class_names)), palette=palette)


def _read_split(root: Path, name: str, file: str) -> tuple[Sample, ...]:
    path = root / "splits" / file
    if not path.exists():
        raise FileNotFoundError(
            f"'{path}' is missing: the list of {name} images, one 'images/NAME labels/NAME' a line, below {root}."
        )
    samples = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        parts = line.split()
        if not parts:
            continue
        if len(parts) > 2 or (len(parts) == 1 and name != "unlabeled"):
            raise ValueError(f"{path}, line {number}: '{line}' is not 'images/NAME labels/NAME'.")
        samples.append(Sample(root / parts[0], root / parts[1] if len(parts) == 2 else None))
    if not samples:
        raise ValueError(f"{path} is empty; it must list at least one image.")
    return tuple(samples)


def _check_files(splits: dict[str, tuple[Sample, ...]]):
    missing = [sample.image for samples in splits.values() for sample in samples if not sample.image.exists()]
    missing += [
        sample.label for name in ("labeled", "validation") for sample in splits[name] if not sample.label.exists()
    ]
    if missing:
        listed = ", ".join(str(path) for path in missing[:5])
        raise FileNotFoundError(f"{len(missing)} listed files do not exist, among them: {listed}. Correct the lists.")
    for name in ("labeled", "unlabeled"):
        both = {sample.image for sample in splits[name]} & {sample.image for sample in splits["validation"]}
        if both:
            raise ValueError(
                f"{len(both)} images are both {name} and in validation, such as {min(both)}. Validation would measure "
                "what training saw; take them off one list."
            )


def _check_labels(samples: list[Sample], class_names: list[str] | None, ignore_index: int) -> list[str]:
    """Read every label map once: sizes match the images, values match the classes. Returns the class names."""
    highest = -1
    for sample in samples:
        label = sample.load_label()
        with Image.open(sample.image) as image:
            if image.size != label.size:
                raise ValueError(
                    f"{sample.label} is {label.width}x{label.height} px, but {sample.image} is "
                    f"{image.width}x{image.height} px. Each pixel of an image needs one label."
                )
        values = np.unique(np.asarray(label)).astype(int)
        values = values[values != ignore_index]
        if class_names is not None and values.size and values.max() >= len(class_names):
            raise ValueError(
                f"{sample.label} has the label {values.max()}, but {len(class_names)} classes have the labels 0 to "
                f"{len(class_names) - 1} and {ignore_index} means 'no class'. Name all classes, or correct the file."
            )
        highest = max(highest, int(values.max(initial=-1)))
    if highest < 0:
        raise ValueError(
            "No pixel of the labelled and validation images has a class: all labels are the ignore value."
        )
    return class_names or [f"class_{index}" for index in range(highest + 1)]


def _embedded_palette(sample: Sample, num_labels: int) -> list[list[int]] | None:
    """The colours of a label file with a palette, which it carries for viewing."""
    with Image.open(sample.label) as label:
        colors = label.getpalette()
    if colors is None or len(colors) < 3 * num_labels:
        return None
    return [colors[3 * index : 3 * index + 3] for index in range(num_labels)]


class PairedViews(Dataset):
    """Labelled and unlabelled samples walked together, augmented, as one map-style data set.

    Item `n` of an epoch is the n-th of a fresh permutation of either list, the shorter one repeated. Order and views
    depend on seed, epoch and n alone, so a run can be resumed anywhere and read by any number of workers.

    Args:
        labeled: Samples with labels.
        unlabeled: Samples whose labels are never read.
        crop_size: Side of the square views, in pixels.
        length: Items of one epoch.
        seed: Of every random number here.
        ignore_index: Label of padding.
        with_partner: Also give another unlabelled image for CutMix: for batches of one.
    """

    def __init__(
        self,
        labeled: tuple[Sample, ...],
        unlabeled: tuple[Sample, ...],
        crop_size: int,
        length: int,
        seed: int = 0,
        ignore_index: int = 255,
        with_partner: bool = False,
    ):
        self.labeled, self.unlabeled = labeled, unlabeled
        self.crop_size, self.length, self.seed, self.ignore_index = crop_size, length, seed, ignore_index
        self.with_partner = with_partner
        self.epoch = 0

    def set_epoch(self, epoch: int):
        """Choose the epoch whose order and views are given; accelerate's loaders call this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(f"Item {index} of {self.length}.")  # what ends a plain `for` over the data set
        rng = sample_generator(self.seed, self.epoch, index)
        labeled = self.labeled[self._position(0, index, len(self.labeled))]
        position = self._position(1, index, len(self.unlabeled))
        item = self._labeled_item(labeled, rng) | self._unlabeled_item(self.unlabeled[position], rng)
        item |= {f"cutmix_boxes_{n}": torch.from_numpy(draw_cutmix_box(rng, self.crop_size)) for n in (1, 2)}
        if self.with_partner:
            others = len(self.unlabeled) - 1
            partner = (position + 1 + int(rng.integers(others))) % len(self.unlabeled) if others else position
            views = self._unlabeled_item(self.unlabeled[partner], rng)
            item |= {f"partner_{key}": value for key, value in views.items()}
        return item

    def _position(self, stream: int, index: int, size: int) -> int:
        """Where item `index` of the epoch lies in a list that is permuted anew each time it is walked."""
        lap, place = divmod(index, size)
        return int(np.random.default_rng([self.seed, self.epoch, stream, lap]).permutation(size)[place])

    def _labeled_item(self, sample: Sample, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        image = sample.load_image()
        geometry = Geometry.draw(rng, image.size, self.crop_size)
        labels = geometry.apply(sample.load_label(), self.ignore_index, Image.Resampling.NEAREST)
        return {"labeled": _to_tensor(geometry, image), "labels": torch.from_numpy(labels).long()}

    def _unlabeled_item(self, sample: Sample, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        image = sample.load_image()
        geometry = Geometry.draw(rng, image.size, self.crop_size)
        return {
            "weak": _to_tensor(geometry, image),
            "padding": torch.from_numpy(geometry.padding()),
            "appearance_1": torch.from_numpy(draw_appearance(rng)),
            "appearance_2": torch.from_numpy(draw_appearance(rng)),
        }


def _to_tensor(geometry: Geometry, image: Image.Image) -> torch.Tensor:
    """The weak view, (channels, crop, crop), uint8: a quarter of the bytes on their way to the device."""
    return torch.from_numpy(geometry.apply(image, 0, Image.Resampling.BILINEAR)).permute(2, 0, 1)
