"""The options of data: where it is, what its values mean, and how its sets are drawn."""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..utils.errors import UserFileNotFoundError, UserValueError
from .bands import resolve_bands
from .benchmarks import BENCHMARKS, DATASETS_REPOSITORY


IGNORE = 255  # label of pixels without a class, in every label map that this package returns
PERCENTILES_SCALE = "percentiles"
REAL_FOLDER = Path(__file__).parents[1] / "assets" / "dubai"  # the real images that the package ships
REAL_NAME = "Dubai aerial imagery"
REAL_LABELED_FRACTION = 1 / 12  # share of their training tiles that keeps its labels, if no other share is given
OPTION_SOURCES = {  # option that has an effect on some sources only -> these sources
    "partition": ("dataset",),
    "splits_dir": ("data_dir", "dataset"),
    "dataset_config": ("dataset_name",),
    "dataset_revision": ("dataset_name", "dataset"),
    "split_column": ("dataset_name",),
    "labeled_fraction": ("data_dir", "dataset_name", "data"),
    "group_regex": ("data_dir", "dataset_name"),
}


@dataclass
class DataOptions:
    """Which data to read, what its labels and bands mean, and how the sets are drawn.

    Args:
        data: Images without a download. "real": the aerial images of Dubai in assets/dubai, with a fixed validation
            set. "drawn": scenes that a training draws into a folder. None: "real", unless `data_dir`, `dataset_name`
            or `dataset` names other images.
        data_dir: Folder with `images/` and `labels/`, and lists in `splits/` unless the sets are drawn. Or a folder
            of tiles and masks that the QGIS plugin Deepness exported. With `dataset`: a local copy of that benchmark.
        dataset_name: Data set on the Hub, or a local folder from `save_to_disk` or with parquet files.
        dataset_config: Configuration of `dataset_name`, if it has several.
        dataset_revision: Branch, tag or commit on the Hub.
        dataset: Benchmark of the paper, a key of [`BENCHMARKS`].
        partition: Labelled share of that benchmark, such as "1_24". "all": every training image is labelled, and
            there are no unlabelled images. None: the smallest share.
        splits_dir: Folder with labeled.txt, unlabeled.txt and val.txt, or the authors' folder of lists. None:
            `splits/` of `data_dir`; for a benchmark, the lists in the authors' repository.
        image_column, label_column: Columns of `dataset_name`.
        split_column: Column that holds "labeled", "unlabeled" or "validation". None: the names of the splits.
        labeled_fraction: Draw the sets. This share (above 0, up to 1) of the training images with labels keeps its
            labels; the other images become unlabelled. None: `REAL_LABELED_FRACTION` of the real images; of other
            images, no sets are drawn if there are lists.
        validation_fraction: Share (above 0, up to 1) of the images with labels to draw for validation, if the data has
            no validation set.
        group_regex: Regular expression for the part of an image's name that identifies its group. A group is drawn for
            validation as a whole.
        class_names: Class names in label order. None: those of classes.json, or class_0, class_1 ...
        ignore_index: Value in label files that means "no class".
        reduce_labels: The value 0 in label files also means "no class", and the classes start at 1.
        label_map: Value, or range of values as text, in label files -> class index, 0 to 254: {7: 0, "128-255": 1}.
            Both ends belong to a range. Other values are errors.
        label_colors: JSON file with the colours of the classes, for label files that hold RGB colours.
        bands: Numbers, from 1, of the bands for red, green and blue; or a preset of data/bands.py, such as
            "sentinel-2", which also has a scale.
        scale: (low, high) values that become 0 and 255, one pair for all bands or one pair per band. "percentiles":
            the 2nd and 98th percentile of the training images.

    Raises:
        UserValueError: A value is not allowed, or an option has no effect on the source.
        UserFileNotFoundError: `label_colors` does not exist.
    """

    data: Literal["real", "drawn"] | None = None
    data_dir: str | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_revision: str | None = None
    dataset: Literal[tuple(BENCHMARKS)] | None = None
    partition: str | None = None
    splits_dir: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    split_column: str | None = None
    labeled_fraction: float | None = None
    validation_fraction: float = 0.2
    group_regex: str | None = None
    class_names: list[str] | None = None
    ignore_index: int = IGNORE
    reduce_labels: bool = False
    label_map: dict[int | str, int] | None = None
    label_colors: str | None = None
    bands: tuple[int, int, int] | str | None = None
    scale: tuple[tuple[float, float], ...] | Literal["percentiles"] | None = None

    def __post_init__(self):
        for name in ("data_dir", "dataset_name", "splits_dir", "label_colors"):
            if isinstance(getattr(self, name), Path):
                setattr(self, name, str(getattr(self, name)))
        self._check_source()
        self._check_draw()
        self._check_labels()
        self._check_image_rule()

    def _check_source(self):
        """Refuse two sources, and options that have no effect on the chosen source."""
        if self.data not in (None, "real", "drawn"):
            raise UserValueError(f"`data` is '{self.data}'; expected real or drawn.")
        if self.data is not None and (self.data_dir or self.dataset_name or self.dataset):
            other = next(name for name in ("data_dir", "dataset_name", "dataset") if getattr(self, name))
            raise UserValueError(
                f"Give one source: `data` is {self.data}, and `{other}` is '{getattr(self, other)}'. Leave one out."
            )
        if self.dataset_name is not None and (self.data_dir or self.dataset):
            raise UserValueError("Give one source: `data_dir`, `dataset_name` or `dataset`.")
        if self.dataset is not None and self.dataset not in BENCHMARKS:
            raise UserValueError(f"`dataset` is '{self.dataset}'; expected {', '.join(BENCHMARKS)}.")
        source = next((name for name in ("dataset", "dataset_name", "data_dir") if getattr(self, name)), "data")
        for name, sources in OPTION_SOURCES.items():
            if getattr(self, name) is not None and source not in sources:
                needed = " or ".join(f"`{other}`" for other in sources)
                raise UserValueError(f"`{name}` is {getattr(self, name)}; it goes with {needed}, not with `{source}`.")
        if self.dataset is not None:
            BENCHMARKS[self.dataset].denominator(self.partition)
        is_local = self.dataset_name is not None and Path(self.dataset_name).is_dir()
        if self.dataset_revision is not None and is_local:
            raise UserValueError(
                f"`dataset_revision` is {self.dataset_revision}, but `dataset_name` is the local folder "
                f"'{self.dataset_name}', which has no revisions. Leave `dataset_revision` out."
            )

    def _check_draw(self):
        for name in ("labeled_fraction", "validation_fraction"):
            fraction = getattr(self, name)
            if fraction is not None and not 0 < fraction <= 1:
                raise UserValueError(f"`{name}` is {fraction}; expected a share above 0 and up to 1, such as 0.125.")
        if self.group_regex is not None:
            try:
                re.compile(self.group_regex)
            except re.error as error:
                raise UserValueError(
                    f"`group_regex` is '{self.group_regex}', which is not a regular expression: {error}."
                ) from error

    def _check_labels(self):
        if sum((self.reduce_labels, self.label_map is not None, self.label_colors is not None)) > 1:
            raise UserValueError("Give only one of `reduce_labels`, `label_map` and `label_colors`.")
        names = self.class_names or []
        if len(set(names)) != len(names):
            raise UserValueError(f"`class_names` names a class twice: {' '.join(names)}. Each name must be different.")
        if self.label_map is not None:
            self._check_label_map()
        if self.label_colors is not None and not Path(self.label_colors).is_file():
            raise UserFileNotFoundError(
                f"`label_colors` is '{self.label_colors}', which does not exist. Name a JSON file with the classes "
                "and their colours."
            )

    def _check_label_map(self):
        """Check `label_map`, and convert its keys to integers and texts such as "128-255".

        The keys are texts if the options were saved as JSON.
        """
        if not self.label_map:
            raise UserValueError("`label_map` is empty. Map every value to a class: `label_map={7: 0, 9: 1}`.")
        for value, index in self.label_map.items():
            if not 0 <= index < IGNORE:
                raise UserValueError(f"`label_map` maps {value} to {index}; classes are 0 to {IGNORE - 1}.")
        ranges = sorted(label_ranges(self.label_map))
        for (low, high, _), (next_low, next_high, _) in itertools.pairwise(ranges):
            if next_low <= high:
                one, other = _key_of_range(low, high), _key_of_range(next_low, next_high)
                raise UserValueError(
                    f"`label_map` maps the value {next_low} twice, by {one} and by {other}. Give ranges that do not "
                    "overlap: `label_map={'0-127': 0, '128-255': 1}`."
                )
        if self.ignore_index != IGNORE and any(low <= self.ignore_index <= high for low, high, _ in ranges):
            raise UserValueError(
                f"`label_map` maps the value {self.ignore_index} to a class, but `ignore_index` says that this value "
                "means 'no class'. Leave it out of `label_map`, or leave `ignore_index` out."
            )
        self.label_map = {_key_of_range(low, high): index for low, high, index in label_ranges(self.label_map)}

    def _check_image_rule(self):
        """Check `bands` and `scale`, and convert them to the tuples of [`ImageRule`]."""
        if isinstance(self.bands, str):
            resolve_bands(self.bands, None)  # check its name
        elif self.bands is not None:
            self.bands = tuple(self.bands)
            if len(self.bands) != 3 or not all(isinstance(band, int) and band >= 1 for band in self.bands):
                raise UserValueError(
                    f"`bands` is {self.bands}; expected three band numbers from 1 for red, green and blue: "
                    "`bands=(4, 3, 2)`."
                )
        if self.scale is None or self.scale == PERCENTILES_SCALE:
            return
        try:
            pairs = tuple((float(low), float(high)) for low, high in self.scale)
        except (TypeError, ValueError):
            pairs = ()
        if len(pairs) not in (1, 3) or not all(low < high for low, high in pairs):
            raise UserValueError(
                f"`scale` is {self.scale!r}; expected the values that become 0 and 255, the lower one first: "
                "`scale=((0, 3000),)`, or `scale='percentiles'`."
            )
        self.scale = pairs

    def fill(self):
        """Choose the real images if no source is named, and the share of them that keeps its labels. In place."""
        if self.is_real:
            self.data = "real"
            self.labeled_fraction = self.labeled_fraction or REAL_LABELED_FRACTION

    @property
    def has_label_rule(self) -> bool:
        """Whether the options say what the values of label files mean."""
        return self.ignore_index != IGNORE or bool(self.reduce_labels or self.label_map or self.label_colors)

    @property
    def is_real(self) -> bool:
        """Whether the images are the real ones of this package."""
        return self.data == "real" or not self.has_source

    @property
    def folder(self) -> str | None:
        """Folder of the images; None if they come from a data set or from the Hub, or are not drawn yet."""
        return str(REAL_FOLDER) if self.is_real else self.data_dir

    @property
    def dataset_id(self) -> str | None:
        """Name of the data set on the Hub; None for local data."""
        if self.dataset is not None:
            return DATASETS_REPOSITORY
        is_local = self.dataset_name is None or Path(self.dataset_name).exists()
        return None if is_local else self.dataset_name

    @property
    def data_name(self) -> str:
        """Name of the data for tables and cards: that of the benchmark, the data set or the folder."""
        if self.dataset is not None:
            return BENCHMARKS[self.dataset].folder
        if self.is_real:
            return REAL_NAME
        return self.dataset_id or Path(self.dataset_name or self.data_dir).resolve().name

    @property
    def has_source(self) -> bool:
        """Whether `data`, `data_dir`, `dataset_name` or `dataset` is given."""
        return any(source is not None for source in (self.data, self.data_dir, self.dataset_name, self.dataset))


def label_ranges(label_map: dict[int | str, int]) -> list[tuple[int, int, int]]:
    """Return the lowest value, the highest value and the class index of each entry of `label_map`.

    Raises:
        UserValueError: A key is neither a whole number nor a range such as "128-255".
    """
    ranges = []
    for key, index in label_map.items():
        ends = re.fullmatch(r"\s*(-?\d+)\s*(?:-\s*(-?\d+)\s*)?", str(key))
        if ends is None:
            raise UserValueError(
                f"`label_map` has the value '{key}'; expected a whole number or a range: "
                "`label_map={7: 0, '128-255': 1}`."
            )
        low, high = int(ends[1]), int(ends[2] or ends[1])
        if low > high:
            raise UserValueError(
                f"`label_map` has the range {key}, which is reversed. Give the lower value first: "
                f"`label_map={{'{high}-{low}': {index}}}`."
            )
        ranges.append((low, high, index))
    return ranges


def _key_of_range(low: int, high: int) -> int | str:
    return low if low == high else f"{low}-{high}"
