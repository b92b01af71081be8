"""Samples (an image with or without a label map) and the augmented batches that training takes."""

from collections.abc import Iterator, Sequence
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

from .reading import IGNORE, ImageRule, LabelRule, StoredFile, base_scale
from .streams import LABELED_STREAM, UNLABELED_STREAM, VIEWS_STREAM, sample_generator
from .views import SCALE_RANGE, Geometry, draw_appearance, draw_cutmix_box


AT_ONCE = 64  # rows that are taken from a table together: ten times as fast as one by one
FEATURES = Features({"image": ImageColumn(decode=False), "label": ImageColumn(decode=False), "row": Value("string")})


@dataclass(frozen=True)
class Sample:
    """An image, its label map (`None` where it has none), and the rules to read them."""

    image: StoredFile
    label: StoredFile | None
    image_rule: ImageRule = ImageRule()
    label_rule: LabelRule = LabelRule()

    def load_image(self, base_size: tuple[int, int] | None = None, scale: float = 1.0) -> Image.Image:
        """The image as 8-bit RGB.

        Args:
            base_size: (long, short) side in pixels that the image is going to be scaled to fit into.
            scale: And by how much more. A JPEG file that ends up far smaller than it is may come smaller already.
        """
        return self.image_rule.read(self.image, base_size, scale)

    def load_label(self) -> Image.Image:
        """The label map as a one-band image of class indices, 255 for no class, see [`LabelRule.read`]."""
        return self.label_rule.read(self.label)


@dataclass(frozen=True, eq=False)
class Samples(Sequence):
    """A list of samples. Arrow holds the entries, so a hundred thousand take megabytes and loader workers share them.

    Args:
        table: With the columns of `FEATURES`: image and label undecoded, and for rows of a data set their place.
        image_rule, label_rule: How all of them are read.
    """

    table: Table
    image_rule: ImageRule = ImageRule()
    label_rule: LabelRule = LabelRule()

    @classmethod
    def of_files(cls, images: Sequence[str], labels: Sequence[str | None], **rules) -> "Samples":
        """Samples of files on disk, by their paths."""
        columns = {"image": list(images), "label": list(labels), "row": [""] * len(images)}
        return cls(Table.from_dict(columns, features=FEATURES), **rules)

    @property
    def paths(self) -> list[str]:
        """What the image files are (or, inside a data set, were) called; nothing where that is not known."""
        paths = []
        for batch in self.table.select_columns("image").with_format("arrow").iter(1000):
            paths += pc.struct_field(batch["image"], "path").to_pylist()  # without the bytes beside them
        return [path or "" for path in paths]

    @property
    def names(self) -> list[str]:
        """What tells the images apart: their paths, after their place in a data set."""
        return [str(StoredFile(path, row=row)) for path, row in zip(self.paths, self.table["row"][:])]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int | slice) -> "Sample | Samples":
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        row = self.table[range(len(self))[index]]  # IndexError beyond the end, negative ones counted from there
        return Sample(_stored(row, "image"), _stored(row, "label"), self.image_rule, self.label_rule)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __add__(self, other: "Samples") -> "Samples":
        return replace(self, table=concatenate_datasets([self.table, other.table]))

    def select(self, indices: Sequence[int]) -> "Samples":
        """Those samples, in that order."""
        return replace(self, table=self.table.select(indices))

    def files(self, column: Literal["image", "label"]) -> Iterator[StoredFile | None]:
        """The files of one column, one after the other, without touching the other column."""
        for batch in self.table.select_columns([column, "row"]).iter(AT_ONCE):
            for cell, row in zip(batch[column], batch["row"]):
                yield _stored({column: cell, "row": row}, column)


def _stored(row: dict, column: str) -> StoredFile | None:
    cell = row[column]
    if cell is None:
        return None
    where = row["row"] and (row["row"] if column == "image" else f"label of {row['row']}")
    return StoredFile(cell["path"] or "", cell["bytes"], where)


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
        base_size: (long, short) side in pixels that images are scaled to fit into before the random scale; None
            leaves them as they are.
    """

    def __init__(
        self,
        labeled: Sequence[Sample],
        unlabeled: Sequence[Sample],
        crop_size: int,
        length: int,
        num_labeled_only: int = 0,
        seed: int = 0,
        ignore_index: int = IGNORE,
        partner: Literal["another", "same"] | None = None,
        with_hidden_labels: bool = False,
        base_size: tuple[int, int] | None = None,
    ):
        self.labeled, self.unlabeled = labeled, unlabeled
        self.crop_size, self.length, self.num_labeled_only = crop_size, length, num_labeled_only
        self.seed, self.ignore_index = seed, ignore_index
        self.partner, self.with_hidden_labels = partner, with_hidden_labels
        self.base_size = base_size

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

    def _draw(self, sample: Sample, rng: np.random.Generator) -> tuple[Geometry, Image.Image]:
        """A random geometry for a sample, and its image."""
        scale = rng.uniform(*SCALE_RANGE)
        image = sample.load_image(self.base_size, scale)
        scale *= base_scale(image.size, self.base_size)
        return Geometry.draw(rng, image.size, self.crop_size, scale), image

    def _labeled_item(self, sample: Sample, rng: np.random.Generator) -> dict[str, torch.Tensor | str]:
        geometry, image = self._draw(sample, rng)
        labels = geometry.apply(sample.load_label(), self.ignore_index, Image.Resampling.NEAREST)
        labels = torch.from_numpy(labels)
        return {"labeled": _to_tensor(geometry, image), "labels": labels, "labeled_name": str(sample.image)}

    def _unlabeled_item(self, sample: Sample, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        geometry, image = self._draw(sample, rng)
        item = {
            "weak": _to_tensor(geometry, image),
            "padding": torch.from_numpy(geometry.padding()),
            "appearance_1": torch.from_numpy(draw_appearance(rng)),
            "appearance_2": torch.from_numpy(draw_appearance(rng)),
        }
        if self.with_hidden_labels:
            unknown = Image.new("L", image.size, self.ignore_index)
            labels = unknown if sample.label is None else sample.load_label()
            labels = geometry.apply(labels, self.ignore_index, Image.Resampling.NEAREST)
            item["hidden_labels"] = torch.from_numpy(labels)
        return item


@lru_cache(maxsize=4)  # the current lap of both lists; drawing a whole permutation for every item takes long
def _permutation(seed: int, stream: int, lap: int, size: int) -> np.ndarray:
    return sample_generator(seed, stream, lap).permutation(size)


def _to_tensor(geometry: Geometry, image: Image.Image) -> torch.Tensor:
    """The weak view, (channels, crop, crop), uint8: a quarter of the bytes on their way to the device."""
    return torch.from_numpy(geometry.apply(image, 0, Image.Resampling.BILINEAR)).permute(2, 0, 1)
