"""What the examples can be told about data: where it is, what its labels and bands mean, how sets are drawn."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .arguments import parse_fraction, setting
from .catalog import BENCHMARKS, DATASETS_REPOSITORY, SPLITS_URL
from .configuration_co2s import Co2SConfig
from .reading import IGNORE, ImageRule


FOR_SOURCES = {  # which source a setting is for, where it is not for all
    "partition": ("dataset",),
    "splits_dir": ("data_dir", "dataset"),
    "dataset_config": ("dataset_name",),
    "dataset_revision": ("dataset_name", "dataset"),
    "split_column": ("dataset_name",),
    "labeled_fraction": ("data_dir", "dataset_name"),
    "group_regex": ("data_dir", "dataset_name"),
}


@dataclass
class DataArguments:
    """What is read, and what it means. The examples' arguments begin with these."""

    data_dir: str | None = setting(
        None, "Folder with images/ and labels/, and lists in splits/ unless they are drawn; with --dataset: its copy."
    )
    dataset_name: str | None = setting(
        None, "Data set of the Hub, or a folder made by save_to_disk, prepare_dataset.py or of parquet files."
    )
    dataset_config: str | None = setting(None, "Configuration of that data set, where it has several.")
    dataset_revision: str | None = setting(None, "Branch, tag or commit of a data set of the Hub.")
    dataset: Literal[tuple(BENCHMARKS)] | None = setting(
        None, "Benchmark of the paper: images from the Hub (or --data_dir), lists from the authors' repository."
    )
    partition: str | None = setting(None, "Labelled share of that benchmark, such as 1_24. Left out: the smallest.")
    splits_url: str = setting(SPLITS_URL, "Where its lists are fetched from, once.")
    splits_dir: str | None = setting(
        None,
        "Folder with labeled.txt, unlabeled.txt and val.txt; of a benchmark also the authors' folder of lists. Left "
        "out: splits/ of --data_dir.",
    )

    image_column: str = setting("image", "Column of --dataset_name with the images.")
    label_column: str = setting("label", "Column of --dataset_name with the label maps.")
    split_column: str | None = setting(
        None, "Column that says labeled, unlabeled or validation. Left out: splits of these names, or of train and "
        "validation, whose rows without a label are unlabelled."
    )  # fmt: skip

    labeled_fraction: str | None = setting(
        None, "Draw the sets: so much of the training images with labels (1/8) keeps them, the rest is unlabelled."
    )
    validation_fraction: str = setting("1/5", "Where nothing is set apart for validation: share drawn for it.")
    group_regex: str | None = setting(
        None, r"What of a name tells its group, such as 'tile\d+': groups are drawn for validation whole."
    )

    class_names: list[str] | None = setting(
        None, "Class names in label order, or a file with one a line. Left out: classes.json, or class_0, class_1 ..."
    )
    ignore_index: int = setting(IGNORE, "Value in label files that means 'no class'.")
    reduce_labels: bool = setting(False, "In label files 0 means 'no class', too, and the classes start at 1.")
    label_map: str | None = setting(None, "Classes of the values in label files, such as '7=0,9=1'; no others.")
    label_colors: str | None = setting(
        None, 'JSON file with the colours of masks, in label order: [{"name": "water", "color": [0, 0, 255]}, ...]; '
        '"ignore": true marks one that means no class.'
    )  # fmt: skip
    bands: str | None = setting(None, "Bands that are red, green and blue, from 1, such as 4,3,2.")
    scale: list[str] | None = setting(
        None, "What becomes 0 and 255 in images of more than 8 bits: two numbers, or 'percentiles' (2nd and 98th)."
    )

    report: str | None = setting(None, "Also draw what is in the data: a file that ends in .html or .png.")

    def check_data(self):
        """Refuse values that cannot work, before anything is read."""
        if self.dataset_name is not None and (self.data_dir or self.dataset):
            raise ValueError("Give one source: --data_dir, --dataset_name or --dataset.")
        self._check_source()
        if sum((self.reduce_labels, self.label_map is not None, self.label_colors is not None)) > 1:
            raise ValueError(
                "Give one of --reduce_labels, --label_map and --label_colors: each says what labels mean."
            )
        for fraction in (self.labeled_fraction, self.validation_fraction):
            if fraction is not None and not 0 < parse_fraction(fraction) <= 1:
                raise ValueError(f"'{fraction}' is no share; write it as 1/8 or 0.125.")
        if self.group_regex is not None:
            try:
                re.compile(self.group_regex)
            except re.error as error:
                raise ValueError(f"--group_regex '{self.group_regex}' is no regular expression: {error}.") from error
        if self.report is not None and not self.report.lower().endswith((".html", ".png")):
            raise ValueError(f"--report is '{self.report}'; name a file that ends in .html or .png.")
        if self.label_colors is not None and not Path(self.label_colors).is_file():
            raise ValueError(f"--label_colors '{self.label_colors}' does not exist.")
        self.image_rule()
        parse_label_map(self.label_map)

    def _check_source(self):
        """Refuse settings of other ways in than the one that is taken: they would be ignored."""
        source = "dataset" if self.dataset else "dataset_name" if self.dataset_name else "data_dir"
        for name, sources in FOR_SOURCES.items():
            if getattr(self, name) is not None and source not in sources:
                taken = " or ".join(f"--{other}" for other in sources)
                raise ValueError(f"--{name} {getattr(self, name)} goes with {taken}, not with --{source}.")
        is_local = self.dataset_name is not None and Path(self.dataset_name).is_dir()
        if self.dataset_revision is not None and is_local:
            raise ValueError(f"--dataset_revision {self.dataset_revision}: the folder {self.dataset_name} has none.")

    def image_rule(self, config: Co2SConfig | None = None) -> ImageRule:
        """The rule for images, of a trained model unless it is given; percentiles are left to the images to tell."""
        if config is not None and self.bands is None and self.scale is None:
            return ImageRule.of_config(config)
        return ImageRule(parse_bands(self.bands), parse_scale(self.scale))

    @property
    def dataset_id(self) -> str | None:
        """The data set's name on the Hub, if it comes from there."""
        if self.dataset is not None:
            return DATASETS_REPOSITORY
        is_local = self.dataset_name is None or Path(self.dataset_name).exists()
        return None if is_local else self.dataset_name

    @property
    def data_name(self) -> str:
        """What to call the data: a benchmark's or a data set's name, or the folder's."""
        if self.dataset is not None:
            return BENCHMARKS[self.dataset].folder
        return self.dataset_id or Path(self.dataset_name or self.data_dir).resolve().name

    @property
    def names_data(self) -> bool:
        """Whether any source is named."""
        return any(source is not None for source in (self.data_dir, self.dataset_name, self.dataset))


def parse_bands(text: str | None) -> tuple[int, ...] | None:
    """Band numbers from "4,3,2".

    Raises:
        ValueError: Not three numbers from 1.
    """
    if text is None:
        return None
    numbers = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if len(numbers) != 3 or min(numbers) < 1:
        raise ValueError(
            f"--bands is '{text}'; give three band numbers from 1 for red, green and blue, such as 4,3,2."
        )
    return tuple(numbers)


def parse_scale(words: Sequence[str] | None) -> tuple[tuple[float, float], ...] | None:
    """A range from ["0", "3000"]; None for none or for "percentiles".

    Raises:
        ValueError: Neither.
    """
    if words is None or list(words) == ["percentiles"]:
        return None
    try:
        low, high = map(float, words)
    except ValueError:
        low, high = 0.0, 0.0
    if not low < high:
        raise ValueError(f"--scale is '{' '.join(words)}'; give the values that become 0 and 255, or 'percentiles'.")
    return ((low, high),)


def parse_label_map(text: str | None) -> tuple[tuple[int, int], ...] | None:
    """(value, class index) pairs from "7=0,9=1".

    Raises:
        ValueError: Not such pairs.
    """
    if text is None:
        return None
    pairs = [re.fullmatch(r"\s*(\d+)\s*=\s*(\d+)\s*", part) for part in text.split(",")]
    if not all(pairs) or any(int(pair[2]) >= IGNORE for pair in pairs):
        raise ValueError(f"--label_map is '{text}'; write VALUE=CLASS,VALUE=CLASS with classes from 0 to 254.")
    values = [int(pair[1]) for pair in pairs]
    if len(set(values)) != len(values):
        raise ValueError(f"--label_map is '{text}'; it gives one value two classes.")
    return tuple((int(pair[1]), int(pair[2])) for pair in pairs)
