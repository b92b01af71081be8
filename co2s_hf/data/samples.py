"""Samples (an image with or without a label map), and the augmented items of a training run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset as Table
from datasets import Features, Value, concatenate_datasets
from datasets import Image as ImageColumn
from PIL import Image
from torch.utils.data import Dataset

from ..utils.files import check_decoded
from ..utils.seeding import (
    LABELED_STREAM,
    RARE_CLASS_STREAM,
    UNLABELED_STREAM,
    VIEWS_STREAM,
    WARM_UP_STREAM,
    random_generator,
)
from .reading import IGNORE, ImageRule, LabelRule, StoredFile, base_scale, percentile_scale
from .views import SCALE_RANGE, Geometry, draw_appearance, draw_cutmix_box


ROWS_PER_READ = 64  # rows that are read from a table together, which is ten times as fast as row by row
NUM_SCALED = 200  # largest number of images that percentiles are computed from
RARE_CLASS_CROPS, RARE_CLASS_SHARE = 10, 0.01  # crops to try; share of the view that the class should cover
FEATURES = Features({"image": ImageColumn(decode=False), "label": ImageColumn(decode=False), "row": Value("string")})


@dataclass(frozen=True)
class Sample:
    """One image and its label map, and the rules to read them.

    Args:
        image: The image file.
        label: The file of its label map, or None.
        image_rule: Converts the image to 8-bit RGB.
        label_rule: Converts the values of the label file to class indices.
    """

    image: StoredFile
    label: StoredFile | None
    image_rule: ImageRule = ImageRule()
    label_rule: LabelRule = LabelRule()

    def load_image(self, base_size: tuple[int, int] | None = None, scale: float = 1.0) -> Image.Image:
        """Read the image as 8-bit RGB. If `base_size` is given, a JPEG may be decoded smaller: see [`ImageRule.read`].

        Args:
            base_size: (long, short) side in pixels. The caller will scale the image to fit into it.
            scale: Factor by which the caller will then scale the image.
        """
        return self.image_rule.read(self.image, base_size, scale)

    def load_label(self) -> Image.Image:
        """Read the label map: one band of class indices, 255 for pixels without a class."""
        return self.label_rule.read(self.label)


@dataclass(frozen=True, eq=False)
class Samples(Sequence):
    """A list of samples.

    The entries are in an Arrow table. A hundred thousand of them take a few megabytes, and the worker processes of a
    data loader share them.

    Args:
        table: The columns of `FEATURES`: image and label, not decoded. For rows of a data set, the column `row` has
            their split and number.
        image_rule: Rule to read all images.
        label_rule: Rule to read all label maps.
    """

    table: Table
    image_rule: ImageRule = ImageRule()
    label_rule: LabelRule = LabelRule()

    @classmethod
    def of_files(cls, images: Sequence[str], labels: Sequence[str | None], **rules) -> "Samples":
        """Create samples from files on disk.

        Args:
            images: Paths of the images.
            labels: Path of the label map of each image, or None.
            rules: `image_rule` and `label_rule`.

        Raises:
            UserValueError: A path cannot be decoded, see [`check_decoded`].
        """
        check_decoded(path for path in (*images, *labels) if path is not None)
        columns = {"image": list(images), "label": list(labels), "row": [""] * len(images)}
        return cls(Table.from_dict(columns, features=FEATURES), **rules)

    @property
    def paths(self) -> list[str]:
        """Paths of the image files. A row of a data set has its original file name instead, or "" if it has none."""
        paths = []
        for batch in self.table.select_columns("image").with_format("arrow").iter(1000):
            paths += pc.struct_field(batch["image"], "path").to_pylist()  # without reading the bytes
        return [path or "" for path in paths]

    @property
    def names(self) -> list[str]:
        """Unique names of the images: the path, or for a row of a data set "SPLIT[NUMBER] ORIGINAL_NAME"."""
        return [str(StoredFile(path, row=row)) for path, row in zip(self.paths, self.table["row"][:])]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int | slice) -> "Sample | Samples":
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        row = self.table[range(len(self))[index]]  # the range handles negative indices and raises IndexError
        return Sample(_stored_file(row, "image"), _stored_file(row, "label"), self.image_rule, self.label_rule)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __add__(self, other: "Samples") -> "Samples":
        return replace(self, table=concatenate_datasets([self.table, other.table]))

    def select(self, indices: Sequence[int]) -> "Samples":
        """Return the samples at these indices, in this order."""
        return replace(self, table=self.table.select(indices))

    def percentile_rule(self) -> ImageRule:
        """Return the rule of the images with a scale from their percentiles, see [`percentile_scale`]."""
        places = np.linspace(0, len(self) - 1, min(len(self), NUM_SCALED)).astype(int).tolist()
        rule = self.image_rule
        return replace(rule, scale=percentile_scale((self[place].image for place in places), rule))

    def files(self, column: Literal["image", "label"]) -> Iterator[StoredFile | None]:
        """Iterate over the files of one column without reading the other column."""
        for batch in self.table.select_columns([column, "row"]).iter(ROWS_PER_READ):
            for cell, row in zip(batch[column], batch["row"]):
                yield _stored_file({column: cell, "row": row}, column)


def _stored_file(row: dict, column: str) -> StoredFile | None:
    cell = row[column]
    if cell is None:
        return None
    name = row["row"] and (row["row"] if column == "image" else f"label of {row['row']}")
    return StoredFile(cell["path"] or "", cell["bytes"], name)


class RareClasses:
    """Rare-class sampling (DAFormer, arXiv 2111.14887): draw a class, and then an image that contains it.

    P(class) is proportional to exp((1 - its share of the labelled pixels) / temperature).

    Args:
        counts: For each labelled image: class index -> number of pixels. Other keys than classes are left out.
        num_labels: Number of classes.
        temperature: A low temperature draws rare classes more often. 0.01 for many classes, 0.1 to 0.5 for few.
    """

    def __init__(self, counts: Sequence[Mapping[int, int]], num_labels: int, temperature: float):
        pixels = np.array([[image.get(label, 0) for label in range(num_labels)] for image in counts], dtype=float)
        share = pixels.sum(axis=0) / pixels.sum()
        weights = np.exp((share[share > 0].min() - share) / temperature) * (share > 0)  # at most 1: no overflow
        self.probabilities = weights / weights.sum()
        self.images = [np.flatnonzero(pixels[:, label]) for label in range(num_labels)]

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """Draw a class and an image, and return their indices."""
        label = int(rng.choice(len(self.probabilities), p=self.probabilities))
        return label, int(rng.choice(self.images[label]))


class PairedViews(Dataset):
    """The items of a whole training run. An item contains one labelled and one unlabelled sample, both augmented.

    Each pass through a list of samples has a new random order. The number of passes is not limited. The order and the
    views depend only on the seed and the index of the item. A run can therefore continue from any item, and the items
    do not depend on the number of worker processes.

    Each item is a dictionary:

    - `labeled` (3, crop, crop), uint8, `labels` (crop, crop), uint8, and `labeled_name`
    - `weak` (3, crop, crop), uint8, `padding` (crop, crop), bool, true for pixels without data, and `unlabeled_name`
    - `appearance_1`, `appearance_2`: (6,), float32, from [`draw_appearance`]
    - `cutmix_boxes_1`, `cutmix_boxes_2`: (crop, crop), bool, true where the partner is pasted
    - with `with_hidden_labels`: `hidden_labels` (crop, crop), uint8
    - with `partner`: `partner_weak`, `partner_padding`, `partner_appearance_1`, `partner_appearance_2`

    Args:
        labeled: Samples with labels.
        unlabeled: Samples without labels. Label files are not read, unless `with_hidden_labels`.
        crop_size: Side of the square views in pixels.
        length: Number of items: the steps of the run times its global batch.
        num_labeled_only: Number of items at the start that have no unlabelled sample.
        seed: Seed of all random numbers of the items.
        partner: Source of additional views to paste with CutMix. "another": another unlabelled image, for batches of
            one. "same": another crop of the same image, as in the authors' released code. None: no additional views;
            other items of the batch are pasted.
        with_hidden_labels: Also return the labels of unlabelled images, to measure pseudo-labels. An image without a
            label file has 255 (no class) everywhere.
        base_size: (long, short) side in pixels. Images are scaled to fit into it before the random scale. None: no
            scaling.
        rare_classes: Draws the labelled image of an item, and a class that its crop should contain. None: every pass
            takes each labelled image once.
    """

    def __init__(
        self,
        labeled: Sequence[Sample],
        unlabeled: Sequence[Sample],
        crop_size: int,
        length: int,
        num_labeled_only: int = 0,
        seed: int = 0,
        partner: Literal["another", "same"] | None = None,
        with_hidden_labels: bool = False,
        base_size: tuple[int, int] | None = None,
        rare_classes: RareClasses | None = None,
    ):
        self.labeled, self.unlabeled = labeled, unlabeled
        self.crop_size, self.length, self.num_labeled_only = crop_size, length, num_labeled_only
        self.seed, self.partner, self.with_hidden_labels = seed, partner, with_hidden_labels
        self.base_size, self.rare_classes = base_size, rare_classes

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | str]:
        if not 0 <= index < self.length:
            raise IndexError(f"Item {index} of {self.length}.")  # this ends a plain `for` loop over the items
        rng = random_generator(self.seed, VIEWS_STREAM, index)
        if self.rare_classes is None:
            position = self._position(LABELED_STREAM, index, len(self.labeled))
            item = self._labeled_item(self.labeled[position], rng)
        else:
            own_rng = random_generator(self.seed, RARE_CLASS_STREAM, index)
            label, position = self.rare_classes.draw(own_rng)
            item = self._labeled_item(self.labeled[position], own_rng, label)
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
        """Return which of `size` samples belongs to an item. Each pass has its own permutation."""
        lap, place = divmod(index, size)
        return int(_permutation(self.seed, stream, lap, size)[place])

    def _draw_scale(self, sample: Sample, rng: np.random.Generator) -> tuple[Image.Image, float]:
        """Draw a random scale for a sample, and return the image and the factor to scale it by."""
        scale = rng.uniform(*SCALE_RANGE)
        image = sample.load_image(self.base_size, scale)
        return image, scale * base_scale(image.size, self.base_size)

    def _labeled_item(
        self, sample: Sample, rng: np.random.Generator, wanted: int | None = None
    ) -> dict[str, torch.Tensor | str]:
        """Return the labelled part of an item.

        Args:
            sample: The labelled sample.
            rng: Random generator.
            wanted: Class that the crop should contain. If it covers less than a hundredth of the view, the crop is
                drawn again, up to ten times in all. The crop with most of the class is used.
        """
        image, scale = self._draw_scale(sample, rng)
        label_map = sample.load_label()
        best, most = None, -1
        for _ in range(1 if wanted is None else RARE_CLASS_CROPS):
            geometry = Geometry.draw(rng, image.size, self.crop_size, scale)
            labels = geometry.apply(label_map, IGNORE, Image.Resampling.NEAREST)
            found = int((labels == wanted).sum())
            if found > most:
                best, most = (geometry, labels), found
            if found >= RARE_CLASS_SHARE * labels.size:
                break
        geometry, labels = best
        return {
            "labeled": _weak_view(geometry, image),
            "labels": torch.from_numpy(labels),
            "labeled_name": str(sample.image),
        }

    def _unlabeled_item(self, sample: Sample, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        image, scale = self._draw_scale(sample, rng)
        geometry = Geometry.draw(rng, image.size, self.crop_size, scale)
        item = {
            "weak": _weak_view(geometry, image),
            "padding": torch.from_numpy(geometry.padding()),
            "appearance_1": torch.from_numpy(draw_appearance(rng)),
            "appearance_2": torch.from_numpy(draw_appearance(rng)),
        }
        if self.with_hidden_labels:
            unknown = Image.new("L", image.size, IGNORE)
            labels = unknown if sample.label is None else sample.load_label()
            labels = geometry.apply(labels, IGNORE, Image.Resampling.NEAREST)
            item["hidden_labels"] = torch.from_numpy(labels)
        return item


class WeakViews(Dataset):
    """Weak views of unlabelled images that are not part of the training. They have no labelled sample.

    Each item is a dictionary with `weak` and `padding`, see [`PairedViews`].

    Args:
        items: Items of the training, with the unlabelled samples.
        numbers: Numbers of the views, from 0. A view depends only on its number and the seed.
    """

    def __init__(self, items: PairedViews, numbers: Sequence[int]):
        self.items, self.numbers = items, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number, items = self.numbers[index], self.items
        sample = items.unlabeled[items._position(UNLABELED_STREAM, number, len(items.unlabeled))]
        item = items._unlabeled_item(sample, random_generator(items.seed, WARM_UP_STREAM, number))
        return {key: item[key] for key in ("weak", "padding")}


# Drawing the permutation again for every item would be slow. Each list needs one entry for its current pass.
@lru_cache(maxsize=4)
def _permutation(seed: int, stream: int, lap: int, size: int) -> np.ndarray:
    return random_generator(seed, stream, lap).permutation(size)


def _weak_view(geometry: Geometry, image: Image.Image) -> torch.Tensor:
    """Return the weak view (3, crop, crop), uint8. A copy to the device takes a quarter of the bytes of float32."""
    return torch.from_numpy(geometry.apply(image, 0, Image.Resampling.BILINEAR)).permute(2, 0, 1)
