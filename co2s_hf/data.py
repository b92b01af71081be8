"""From a folder of images to labelled, unlabelled and validation samples, and to the batches that training takes.

A folder holds `images/` and `labels/` and either the lists `splits/labeled.txt`, `splits/unlabeled.txt` and
`splits/val.txt` in the authors' format (`images/NAME labels/NAME` a line), or no lists: then sets are drawn from a
seed, and images without a label file are unlabelled. An optional `classes.json`, in label order,
`[{"name": "water", "color": [0, 0, 255], "concepts": ["water", "lake"]}, ...]`, describes the classes; colour and
concepts may be left out.
"""

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from .views import Geometry, draw_appearance, draw_cutmix_box, sample_generator


# What random numbers are for, so that no two purposes share them.
VIEWS_STREAM, LABELED_STREAM, UNLABELED_STREAM, SPLIT_STREAM = range(4)

SPLIT_FILES = {"labeled": "labeled.txt", "unlabeled": "unlabeled.txt", "validation": "val.txt"}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")


@dataclass(frozen=True)
class Sample:
    """An image file and the file with its label map; `None` for an image without one."""

    image: Path
    label: Path | None

    def load_image(self) -> Image.Image:
        """Read the image as 8-bit RGB.

        Raises:
            ValueError: It cannot be read or is not 8-bit RGB or grey.
        """
        with _reading(self.image), Image.open(self.image) as image:
            _check_image_mode(self.image, image)
            return image.convert("RGB")

    def load_label(self) -> Image.Image:
        """Read the label map as a one-band image of class indices.

        Raises:
            ValueError: It cannot be read, has several bands, or values outside 0..255.
        """
        with _reading(self.label), Image.open(self.label) as label:
            if label.mode not in ("L", "P", "I", "I;16", "1"):
                raise ValueError(
                    f"{self.label} has the PIL mode '{label.mode}'; expected one band of class indices. Turn its "
                    "colours into indices first."
                )
            indices = np.asarray(label)  # a palette is for viewing: the indices behind it are the labels
        if indices.min() < 0 or indices.max() > 255:
            raise ValueError(
                f"{self.label} has values from {indices.min()} to {indices.max()}; class indices lie between 0 and "
                "255. Renumber the classes from 0."
            )
        return Image.fromarray(indices.astype(np.uint8))


def _check_image_mode(path: Path, image: Image.Image):
    if image.mode not in ("RGB", "L", "P", "1"):
        raise ValueError(
            f"{path} has the PIL mode '{image.mode}'; expected 8-bit RGB. Save its red, green and blue bands, scaled "
            "to 0..255, as RGB."
        )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what Pillow says of a broken file into an error that names it."""
    try:
        yield
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path} cannot be read as an image: {error}. Replace it, or take it off its list."
        ) from error


@dataclass(frozen=True)
class SegmentationFolder:
    """The samples of one data folder and what its labels mean."""

    labeled: tuple[Sample, ...]
    unlabeled: tuple[Sample, ...]  # their labels, where files exist, are never trained on
    validation: tuple[Sample, ...]
    id2label: dict[int, str]
    palette: list[list[int]] | None
    class_concepts: dict[str, list[str]] | None  # None when nothing names the classes

    @classmethod
    def open(
        cls,
        data_dir: str | Path,
        class_names: list[str] | None = None,
        ignore_index: int = 255,
        labeled_fraction: float | None = None,
        validation_fraction: float = 0.2,
        seed: int = 0,
    ) -> "SegmentationFolder":
        """Read the lists of a folder, or draw them, and check them.

        Every label map of the labelled and validation lists is read, and the header of every image.

        Args:
            data_dir: The folder.
            class_names: Names in label order. Left out: those of `classes.json`, or `class_0`, `class_1` ... up to the
                highest label that occurs.
            ignore_index: Label of pixels without a class.
            labeled_fraction: Draw the sets instead of reading lists (`splits/val.txt`, if there is one, is kept): so
                much of the training images with labels stays labelled, the others are unlabelled. Left out, the lists
                are read; in a folder without `splits/` every image with a label file is labelled.
            validation_fraction: Share of the images with labels that is drawn for validation.
            seed: Of what is drawn.

        Raises:
            FileNotFoundError: The folder, a list, or a listed file is missing; all missing files are counted.
            ValueError: A list is empty or malformed, a file cannot be used, or labels exceed the classes.
        """
        root = Path(data_dir)
        if not root.is_dir():
            raise FileNotFoundError(f"The data folder '{root}' does not exist.")
        if labeled_fraction is None and (root / "splits").is_dir():
            splits = {name: _read_split(root, name, file) for name, file in SPLIT_FILES.items()}
        else:
            splits = _draw_splits(
                root, 1.0 if labeled_fraction is None else labeled_fraction, validation_fraction, seed
            )
        _check_files(splits)
        classes = _read_classes(root / "classes.json")
        if class_names is not None:
            classes = [{"name": name} for name in class_names]
        num_labels = len(classes) if classes else None
        found = [_check_labels(name, splits[name], num_labels, ignore_index) for name in ("labeled", "validation")]
        if classes:
            names = [entry["name"] for entry in classes]
            concepts = {entry["name"]: entry.get("concepts", [entry["name"].replace("_", " ")]) for entry in classes}
        else:
            names, concepts = [f"class_{index}" for index in range(max(found) + 1)], None
        palette = [entry["color"] for entry in classes if "color" in entry]
        if len(palette) != len(names):
            palette = _embedded_palette(splits["labeled"][0], len(names))
        return cls(**splits, id2label=dict(enumerate(names)), palette=palette, class_concepts=concepts)


def _read_classes(path: Path) -> list[dict]:
    """The entries of `classes.json`; none where there is no such file."""
    if not path.exists():
        return []
    try:
        classes = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON file: {error}.") from error
    if not isinstance(classes, list) or not all(
        isinstance(c, dict) and isinstance(c.get("name"), str) for c in classes
    ):
        raise ValueError(
            f'{path} must be a list in label order, with a name for every class: [{{"name": "water", "color": '
            "[0, 0, 255]}, ...]."
        )
    return classes


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


def _draw_splits(
    root: Path, labeled_fraction: float, validation_fraction: float, seed: int
) -> dict[str, tuple[Sample, ...]]:
    """Draw labelled, unlabelled and validation samples from the files themselves."""
    for name, fraction in (("labeled_fraction", labeled_fraction), ("validation_fraction", validation_fraction)):
        if not 0 < fraction <= 1:
            raise ValueError(f"`{name}` is {fraction}; give a share above 0 and up to 1, such as 1/8.")
    labels = {path.relative_to(root / "labels").with_suffix(""): path for path in find_images(root / "labels")}
    samples = [
        Sample(path, labels.get(path.relative_to(root / "images").with_suffix("")))
        for path in find_images(root / "images")
    ]
    known = [sample for sample in samples if sample.label is not None]
    known = [known[index] for index in sample_generator(seed, SPLIT_STREAM, 0).permutation(len(known))]
    if (root / "splits" / SPLIT_FILES["validation"]).exists():
        validation = _read_split(root, "validation", SPLIT_FILES["validation"])
        held_out = {sample.image for sample in validation}
        samples, known = ([s for s in some if s.image not in held_out] for some in (samples, known))
    else:
        count = max(1, round(validation_fraction * len(known)))
        validation, known = tuple(known[:count]), known[count:]
    if not known:
        raise ValueError(
            f"'{root}' has {len(samples)} images below images/, of which {len(labels)} have a file of the same name "
            "below labels/: too few to train and to validate. Add labels."
        )
    count = max(1, round(labeled_fraction * len(known)))
    unlabeled = (*known[count:], *(sample for sample in samples if sample.label is None))
    if not unlabeled:
        raise ValueError(
            f"Every image of '{root}' would be labelled, none unlabelled. Add images without labels, or choose a "
            "labelled fraction below 1."
        )
    return {"labeled": tuple(known[:count]), "unlabeled": unlabeled, "validation": validation}


def find_images(folder: Path) -> list[Path]:
    """Every image file in a folder and those below it, sorted.

    Raises:
        FileNotFoundError: The folder does not exist.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"The folder '{folder}' does not exist.")
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def class_pixel_counts(samples: tuple[Sample, ...], num_labels: int, ignore_index: int = 255) -> np.ndarray:
    """How many pixels each class has in the samples' labels, (classes,)."""
    counts = np.zeros(num_labels, dtype=np.int64)
    for sample in samples:
        values = np.asarray(sample.load_label())
        counts += np.bincount(values[values != ignore_index], minlength=num_labels)
    return counts


def _check_files(splits: dict[str, tuple[Sample, ...]]):
    missing = [sample.image for samples in splits.values() for sample in samples if not sample.image.exists()]
    missing += [
        sample.label for name in ("labeled", "validation") for sample in splits[name] if not sample.label.exists()
    ]
    if missing:
        listed = ", ".join(str(path) for path in missing[:5])
        raise FileNotFoundError(f"{len(missing)} listed files do not exist, among them: {listed}. Correct the lists.")
    for sample in itertools.chain.from_iterable(splits.values()):
        with _reading(sample.image), Image.open(sample.image) as image:
            _check_image_mode(sample.image, image)
    for name in ("labeled", "unlabeled"):
        both = {sample.image for sample in splits[name]} & {sample.image for sample in splits["validation"]}
        if both:
            raise ValueError(
                f"{len(both)} images are both {name} and in validation, such as {min(both)}. Validation would measure "
                "what training saw; take them off one list."
            )


def check_hidden_labels(samples: tuple[Sample, ...], num_labels: int, ignore_index: int = 255):
    """Check the labels of unlabelled samples that pseudo-labels are going to be measured with.

    Raises:
        ValueError: No sample has a label file, or one does not fit.
    """
    known = tuple(sample for sample in samples if sample.label is not None and sample.label.exists())
    if not known:
        raise ValueError(
            f"None of the {len(samples)} unlabelled images has a label file to measure pseudo-labels with."
        )
    _check_labels("unlabeled", known, num_labels, ignore_index)


def _check_labels(name: str, samples: tuple[Sample, ...], num_labels: int | None, ignore_index: int) -> int:
    """Read every label map of a list: sizes match the images, values match the classes. Returns the highest label."""
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
        if num_labels is not None and values.size and values.max() >= num_labels:
            raise ValueError(
                f"{sample.label} has the label {values.max()}, but {num_labels} classes have the labels 0 to "
                f"{num_labels - 1} and {ignore_index} means 'no class'. Name all classes, or correct the file."
            )
        highest = max(highest, int(values.max(initial=-1)))
    if highest < 0:
        raise ValueError(
            f"No pixel of the {len(samples)} {name} images has a class: all their labels are {ignore_index}, the "
            "ignore value."
        )
    return highest


def _embedded_palette(sample: Sample, num_labels: int) -> list[list[int]] | None:
    """The colours of a label file with a palette, which it carries for viewing."""
    with Image.open(sample.label) as label:
        colors = label.getpalette()
    if colors is None or len(colors) < 3 * num_labels:
        return None
    return [colors[3 * index : 3 * index + 3] for index in range(num_labels)]


class PairedViews(Dataset):
    """Labelled and unlabelled samples walked together, augmented: one map-style data set for a whole run.

    Each list is walked in a fresh permutation as often as needed. Order and views depend on the seed and the item's
    index alone, so a run can be resumed at any item and read by any number of workers.

    Args:
        labeled: Samples with labels.
        unlabeled: Samples whose labels are never read, unless `with_hidden_labels`.
        crop_size: Side of the square views, in pixels.
        length: Items of the run: its steps times its global batch.
        num_labeled_only: So many items at the beginning come without an unlabelled sample.
        seed: Of every random number here.
        ignore_index: Label of padding.
        partner: Also give explicit views to paste by CutMix: of "another" unlabelled image, for batches of one; of
            the "same" image, as the authors' released code does. None leaves it to the batch.
        with_hidden_labels: Also give the unlabelled images' labels, where they have a file, to measure pseudo-labels.
    """

    def __init__(
        self,
        labeled: tuple[Sample, ...],
        unlabeled: tuple[Sample, ...],
        crop_size: int,
        length: int,
        num_labeled_only: int = 0,
        seed: int = 0,
        ignore_index: int = 255,
        partner: Literal["another", "same"] | None = None,
        with_hidden_labels: bool = False,
    ):
        self.labeled, self.unlabeled = labeled, unlabeled
        self.crop_size, self.length, self.num_labeled_only = crop_size, length, num_labeled_only
        self.seed, self.ignore_index = seed, ignore_index
        self.partner, self.with_hidden_labels = partner, with_hidden_labels

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | str]:
        if not 0 <= index < self.length:
            raise IndexError(f"Item {index} of {self.length}.")  # what ends a plain `for` over the data set
        rng = sample_generator(self.seed, VIEWS_STREAM, index)
        labeled = self.labeled[self._position(LABELED_STREAM, index, len(self.labeled))]
        item = self._labeled_item(labeled, rng)
        if index < self.num_labeled_only:
            return item
        position = self._position(UNLABELED_STREAM, index - self.num_labeled_only, len(self.unlabeled))
        unlabeled = self.unlabeled[position]
        item |= self._unlabeled_item(unlabeled, rng) | {"unlabeled_name": str(unlabeled.image)}
        item |= {f"cutmix_boxes_{n}": torch.from_numpy(draw_cutmix_box(rng, self.crop_size)) for n in (1, 2)}
        if self.partner is not None:
            others = len(self.unlabeled) - 1
            if self.partner == "another" and others:
                position = (position + 1 + int(rng.integers(others))) % len(self.unlabeled)
            views = self._unlabeled_item(self.unlabeled[position], rng)
            item |= {f"partner_{key}": value for key, value in views.items() if key != "hidden_labels"}
        return item

    def _position(self, stream: int, index: int, size: int) -> int:
        """Where the index-th item lies in a list that is permuted anew each time it is walked."""
        lap, place = divmod(index, size)
        return int(_permutation(self.seed, stream, lap, size)[place])

    def _labeled_item(self, sample: Sample, rng: np.random.Generator) -> dict[str, torch.Tensor | str]:
        image = sample.load_image()
        geometry = Geometry.draw(rng, image.size, self.crop_size)
        labels = geometry.apply(sample.load_label(), self.ignore_index, Image.Resampling.NEAREST)
        labels = torch.from_numpy(labels)
        return {"labeled": _to_tensor(geometry, image), "labels": labels, "labeled_name": str(sample.image)}

    def _unlabeled_item(self, sample: Sample, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        image = sample.load_image()
        geometry = Geometry.draw(rng, image.size, self.crop_size)
        item = {
            "weak": _to_tensor(geometry, image),
            "padding": torch.from_numpy(geometry.padding()),
            "appearance_1": torch.from_numpy(draw_appearance(rng)),
            "appearance_2": torch.from_numpy(draw_appearance(rng)),
        }
        if self.with_hidden_labels:
            if sample.label is not None and sample.label.exists():
                labels = sample.load_label()
            else:
                labels = Image.new("L", image.size, self.ignore_index)
            labels = geometry.apply(labels, self.ignore_index, Image.Resampling.NEAREST)
            item["hidden_labels"] = torch.from_numpy(labels)
        return item


@lru_cache(maxsize=4)  # the current lap of both lists; drawing a whole permutation for every item takes long
def _permutation(seed: int, stream: int, lap: int, size: int) -> np.ndarray:
    return sample_generator(seed, stream, lap).permutation(size)


def _to_tensor(geometry: Geometry, image: Image.Image) -> torch.Tensor:
    """The weak view, (channels, crop, crop), uint8: a quarter of the bytes on their way to the device."""
    return torch.from_numpy(geometry.apply(image, 0, Image.Resampling.BILINEAR)).permute(2, 0, 1)
