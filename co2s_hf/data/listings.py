"""List the images of a folder, a `datasets` data set or a benchmark of the paper, and read its classes.json.

Images are not decoded here, and nothing is written to the user's data. Files that come with the data only name what
lies below its folder: the names of lists are checked by [`read_list`], and a classes.json names no files.

classes.json describes the classes. It is either a list in label order,
`[{"name": "water", "color": [0, 0, 255], "concepts": ["water", "lake"]}, ...]`, or an object
`{"classes": [...], "ignore_index": 255}`. An entry with `"ignore": true` is a colour that means "no class". The object
may also have facts about the images. `"ground_sampling_distance_m": 0.3` is the size of their pixels on the ground.
`"converted_from": {"bands": [4, 3, 2], "scale": [[0, 3000]]}` says that the images are RGB already, and how they were
made from raw files. A model that is trained on them reads raw files in the same way.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Value, concatenate_datasets, load_dataset, load_from_disk
from datasets import Image as ImageColumn
from datasets.exceptions import DatasetsError
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError

from ..utils.errors import UserFileNotFoundError, UserOSError, UserValueError
from .benchmark_lists import list_warnings, load_lists
from .benchmarks import BENCHMARKS, DATASETS_REPOSITORY
from .deepness import MASK_RULE, TILES_KIND, are_tiles, find_tiles
from .image_files import CONTROL_CHARACTERS
from .options import DataOptions
from .reading import IGNORE, IMAGE_SUFFIXES, ImageRule, LabelRule, find_images
from .samples import Samples
from .splits import SPLIT_FILES, SPLITS, Line, read_list
from .validation.checks import Finding


CLASSES_FILE = "classes.json"
LARGEST_CLASSES_FILE = 2**20  # bytes
LARGEST_BAND = 2**16  # larger numbers are mistakes: formats of rasters have at most 65535 bands
LARGEST_VALUE = 1e38  # of a band: about the largest value of float32
LARGEST_DISTANCE_M = 1e6  # largest ground sampling distance
OTHER_NAMES = {"val": "validation", "valid": "validation", "dev": "validation"}  # other names of a split


@dataclass(frozen=True)
class ClassDescription:
    """The content of a classes.json.

    Args:
        classes: One entry per class in label order, with a "name" and optionally a "color" and "concepts".
        ignore_colors: Colours that mean "no class".
        ignore_index: Value in label files that means "no class".
        ground_sampling_distance_m: Height and width of a pixel of the images on the ground, in metres. None: unknown.
        converted_from: Rule by which the images were made from raw files. The images themselves are read without a
            rule. None: they were not converted.
    """

    classes: tuple[dict, ...] = ()
    ignore_colors: tuple[tuple[int, int, int], ...] = ()
    ignore_index: int = IGNORE
    ground_sampling_distance_m: float | None = None
    converted_from: ImageRule | None = None

    @property
    def names(self) -> list[str]:
        """Names of the classes in label order."""
        return [entry["name"] for entry in self.classes]

    @property
    def palette(self) -> list[list[int]] | None:
        """RGB colours of the classes, or None if a class has no colour."""
        colors = [list(entry["color"]) for entry in self.classes if "color" in entry]
        return colors if colors and len(colors) == len(self.classes) else None

    @property
    def concepts(self) -> dict[str, list[str]] | None:
        """Texts of each class, by default its name. The mean of their text embeddings guides the CLIP student."""
        return {c["name"]: c.get("concepts") or [c["name"].replace("_", " ")] for c in self.classes} or None

    def renamed(self, names: Sequence[str]) -> "ClassDescription":
        """Return a description of other classes. A class that keeps its name keeps its colour and concepts."""
        known = {entry["name"]: entry for entry in self.classes}
        return replace(self, classes=tuple(known.get(name, {"name": name}) for name in names), ignore_colors=())


def read_classes(path: Path) -> ClassDescription:
    """Read a classes.json.

    Raises:
        UserFileNotFoundError: The file does not exist.
        UserValueError: The file does not describe classes.
    """
    content = _read_json(path)
    content = {"classes": content} if isinstance(content, list) else content
    entries = content.get("classes") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(_has_name(entry) for entry in entries):
        raise UserValueError(
            f'{path} must be a list in label order, with a name for every class: [{{"name": "water", "color": '
            "[0, 0, 255]}, ...]. A name is one line of text."
        )
    for entry in entries:
        _check_entry(path, entry)
    for key in ("name", "color"):
        values = [str(entry[key]) for entry in entries if key in entry]
        if repeated := [value for value, times in Counter(values).items() if times > 1]:
            raise UserValueError(f"{path} gives the {key} {min(repeated):.100} to two classes. Make them different.")
    ignore_index = content.get("ignore_index", IGNORE)
    if not _is_number(ignore_index) or not -(2**31) <= ignore_index < 2**31:
        raise UserValueError(f"{path} gives the ignore_index {_short(ignore_index)}; expected a number such as 255.")
    classes = tuple(entry for entry in entries if not entry.get("ignore"))
    if len(classes) > IGNORE:
        raise UserValueError(f"{path} has {len(classes)} classes; expected at most {IGNORE}. Remove some of them.")
    ignored = tuple(tuple(entry["color"]) for entry in entries if entry.get("ignore") and "color" in entry)
    return ClassDescription(
        classes,
        ignored,
        ignore_index,
        _read_distance(path, content.get("ground_sampling_distance_m")),
        _read_conversion(path, content.get("converted_from")),
    )


def _read_distance(path: Path, value: object) -> float | None:
    """Check the ground sampling distance in a classes.json."""
    if value is None:
        return None
    if not _is_real(value) or not 0 < value <= LARGEST_DISTANCE_M:
        raise UserValueError(
            f"{path} gives the ground_sampling_distance_m {_short(value)}; expected the size of a pixel in metres, "
            "above 0, such as 0.3."
        )
    return float(value)


def _read_conversion(path: Path, value: object) -> ImageRule | None:
    """Check the bands and the scale in a classes.json, and return them as a rule."""
    if value is None:
        return None
    bands, scale = (value.get(key) if isinstance(value, dict) else None for key in ("bands", "scale"))
    num_bands = 3 if bands is None else len(bands) if isinstance(bands, list) else 0
    fits = (bands, scale) != (None, None) and num_bands >= 3
    fits = fits and all(_is_number(band) and 1 <= band <= LARGEST_BAND for band in bands or ())
    if scale is not None:
        fits = fits and isinstance(scale, list) and len(scale) in (1, num_bands) and all(map(_is_interval, scale))
    if not fits:
        raise UserValueError(
            f"{path} gives converted_from {_short(value)}; expected how the images were made from raw files: the "
            'bands, and the values that became 0 and 255: {"bands": [4, 3, 2], "scale": [[0, 3000]]}.'
        )
    return ImageRule(bands and tuple(bands), scale and tuple((float(low), float(high)) for low, high in scale))


def _read_json(path: Path) -> object:
    if not path.is_file():
        raise UserFileNotFoundError(f"'{path}' does not exist; expected a JSON file that describes the classes.")
    try:
        if (size := path.stat().st_size) > LARGEST_CLASSES_FILE:
            raise UserValueError(
                f"{path} has {size} bytes; expected a description of classes of at most {LARGEST_CLASSES_FILE} bytes. "
                "Correct the file."
            )
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except UserValueError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserValueError(f"{path} cannot be read as JSON: {error}. Correct the file.") from error


def _has_name(entry: object) -> bool:
    """Return whether an entry has a name with visible characters and without control characters."""
    name = entry.get("name") if isinstance(entry, dict) else None
    return isinstance(name, str) and bool(name.strip()) and not CONTROL_CHARACTERS.search(name)


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # for Python, true is a number


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_interval(value: object) -> bool:
    """Return whether a value is a list of two finite numbers, the lower one first."""
    if not isinstance(value, list) or len(value) != 2 or not all(map(_is_real, value)):
        return False
    return -LARGEST_VALUE <= value[0] < value[1] <= LARGEST_VALUE


def _short(value: object) -> str:
    return f"{value!s:.100}"


def _check_entry(path: Path, entry: dict):
    name, color, concepts = _short(entry["name"]), entry.get("color", [0, 0, 0]), entry.get("concepts", [])
    if not isinstance(color, list) or len(color) != 3 or not all(_is_number(c) and 0 <= c <= 255 for c in color):
        raise UserValueError(
            f"{path} gives '{name}' the color {_short(color)}; expected three numbers from 0 to 255: [0, 0, 255]."
        )
    if not isinstance(concepts, list) or not all(isinstance(concept, str) for concept in concepts):
        raise UserValueError(
            f'{path} gives \'{name}\' the concepts {_short(concepts)}; expected a list of words: ["lake", "river"].'
        )


def _read_classes_if_any(path: Path | None) -> ClassDescription:
    return read_classes(path) if path is not None and os.path.lexists(path) else ClassDescription()


@dataclass(frozen=True)
class Listing:
    """The images of a source: its sets, and a pool from which the missing sets are drawn.

    Args:
        sets: "labeled", "unlabeled" or "validation" -> samples, for the sets that the source defines.
        pool: Samples from which the missing sets are drawn. None: no set is drawn.
        description: The classes. It is empty if the source does not describe them.
        label_rule: Rule for label values, unless the options have one.
        root: Folder that the names in lists are relative to; "" for rows of a data set.
        findings: Warnings about the files.
        is_tiled: The images are tiles that the QGIS plugin Deepness exported, and may overlap.
    """

    sets: dict[str, Samples]
    pool: Samples | None
    description: ClassDescription
    label_rule: LabelRule = LabelRule()
    root: str = ""
    findings: Sequence[Finding] = ()
    is_tiled: bool = False

    def with_rules(self, **rules) -> "Listing":
        """Return the same listing, with other rules (`image_rule` and `label_rule`) to read the samples."""
        sets = {name: replace(samples, **rules) for name, samples in self.sets.items()}
        return replace(self, sets=sets, pool=None if self.pool is None else replace(self.pool, **rules))


def list_samples(options: DataOptions) -> Listing:
    """List the images of the source that the options name.

    Args:
        options: Options of the data, after [`DataOptions.fill`].

    Raises:
        UserFileNotFoundError: A folder or a list is missing.
        UserOSError: Something cannot be downloaded.
        UserValueError: The options do not fit the source.
    """
    if options.dataset is not None:
        return _list_benchmark(options)
    if options.dataset_name is not None:
        return _list_dataset(options)
    if options.folder is None:
        raise UserValueError(
            "A training draws the scenes of `data='drawn'`, and chooses their folder. Name the folder of scenes that "
            "were drawn before: `data_dir='outputs/scenes-seed0'`."
        )
    return _list_folder(options)


# --- folders


def _list_folder(options: DataOptions) -> Listing:
    root = Path(options.folder)
    if not root.is_dir():
        raise UserFileNotFoundError(f"`data_dir` is '{root}', which does not exist or is not a folder.")
    splits_dir = Path(options.splits_dir) if options.splits_dir else root / "splits"
    if options.splits_dir and not splits_dir.is_dir():
        raise UserFileNotFoundError(f"`splits_dir` is '{splits_dir}', which does not exist or is not a folder.")
    description = _read_classes_if_any(root / CLASSES_FILE)
    rule = LabelRule(ignore_index=description.ignore_index)
    if options.labeled_fraction is None and splits_dir.is_dir():
        sets = {name: _read_set(root, splits_dir, name) for name in SPLITS}
        listing = Listing(sets, None, description, rule, str(root))
        return _tiled(listing, options) if all(map(are_tiles, sets.values())) else listing
    sets = {}
    tiles = find_tiles(root)
    pool, findings = tiles or _pair_files(root)
    if (splits_dir / SPLIT_FILES["validation"]).exists():
        sets["validation"] = _read_set(root, splits_dir, "validation")
        held_out = set(sets["validation"].names)
        pool = pool.select([place for place, name in enumerate(pool.names) if name not in held_out])
    listing = Listing(sets, pool, description, rule, str(root), findings)
    return listing if tiles is None else _tiled(listing, options)


def _tiled(listing: Listing, options: DataOptions) -> Listing:
    """Return the listing of an export of Deepness, with the rule of its masks and a warning that says so.

    The rule of the options or of classes.json comes first, if there is one.
    """
    message = f"'{listing.root}' is read as an export of the QGIS plugin Deepness."
    if listing.label_rule == LabelRule() and not options.has_label_rule:
        listing = replace(listing, label_rule=MASK_RULE)
        message += " The values 0 and 255 of its masks are the classes 0 and 1. For other values, give `label_map`."
    finding = Finding(TILES_KIND, message, is_warning=True)
    return replace(listing, findings=[*listing.findings, finding], is_tiled=True)


def _read_set(root: Path, splits_dir: Path, split: str) -> Samples:
    lines = read_list(splits_dir / SPLIT_FILES[split], label_needed=split != "unlabeled")
    return _samples_of_lines(root, split, lines)


def _samples_of_lines(root: Path, split: str, lines: list[Line]) -> Samples:
    if split == "unlabeled":  # the label files of unlabelled images may be missing
        lines = [(image, label if label is not None and (root / label).exists() else None) for image, label in lines]
    labels = [None if label is None else str(root / label) for _, label in lines]
    return Samples.of_files([str(root / image) for image, _ in lines], labels)


def _pair_files(root: Path) -> tuple[Samples, list[Finding]]:
    """Pair each image with the label file of the same name; the suffixes may differ.

    Returns:
        The samples, and a warning for each label file without an image.
    """
    images, labels = (_files_by_stem(root / name) for name in ("images", "labels"))
    if not images:
        raise UserValueError(f"'{root / 'images'}' holds no images. Expected files {', '.join(IMAGE_SUFFIXES)}.")
    unpaired = [path for stem, path in labels.items() if stem not in images]
    if unpaired and len(unpaired) == len(labels):
        wanted = root / "images" / unpaired[0].relative_to(root / "labels").with_suffix(".*")
        raise UserValueError(
            f"No label file has the name of an image: for '{unpaired[0]}', there is no '{wanted}'. Rename the files."
        )
    findings = [
        Finding("labels without an image", f"{path} has no image of this name. Rename one of them.", True, "no image")
        for path in unpaired
    ]
    paired = [str(labels[stem]) if stem in labels else None for stem in images]
    return Samples.of_files(list(map(str, images.values())), paired), findings


def _files_by_stem(folder: Path) -> dict[Path, Path]:
    """Find the image files of a folder: path below the folder, without suffix -> path."""
    files: dict[Path, Path] = {}
    for path in find_images(folder):
        stem = path.relative_to(folder).with_suffix("")
        if files.setdefault(stem, path) != path:
            raise UserValueError(
                f"'{files[stem]}' and '{path}' have the same name without the suffix. Images and labels are paired by "
                "this name. Rename one."
            )
    return files


# --- data sets


def _list_dataset(options: DataOptions) -> Listing:
    splits, classes_path = _load_splits(options)
    tables = {name: _standard_columns(table, options, name) for name, table in splits.items()}
    if options.split_column is not None:
        tables = _divide_by_column(tables, options.split_column)
    sets = {}
    for name, table in tables.items():
        split = OTHER_NAMES.get(name, name)
        if split not in (*SPLITS, "train", "test"):
            raise UserValueError(
                f"`dataset_name` is '{options.dataset_name}', which has a split '{name}'; expected "
                f"{', '.join((*SPLITS, 'train', 'test'))}. Rename the split. If a column has the set of each row, "
                "name it with `split_column` (on the command line, in `co2s prepare`)."
            )
        sets[split] = sets[split] + Samples(table) if split in sets else Samples(table)
    if "test" in sets:  # it becomes the validation set if there is no other one; otherwise it is not used
        sets.setdefault("validation", sets.pop("test"))
        sets.pop("test", None)
    description = _read_classes_if_any(classes_path)
    rule = LabelRule(ignore_index=description.ignore_index)
    if "train" not in sets and options.labeled_fraction is None:
        if set(sets) == {"labeled", "unlabeled"}:  # validation is drawn from the labelled rows
            return Listing({"unlabeled": sets["unlabeled"]}, sets["labeled"], description, rule)
        return Listing(sets, None, description, rule)
    settled = {"validation": sets.pop("validation")} if "validation" in sets else {}
    pool = None
    for samples in sets.values():
        pool = samples if pool is None else pool + samples
    return Listing(settled, pool, description, rule)


def _load_splits(options: DataOptions) -> tuple[dict[str, Dataset], Path | None]:
    """Load a data set, and return its splits and the path of its classes.json, which may not exist."""
    name, revision, folder = options.dataset_name, options.dataset_revision, Path(options.dataset_name)
    with _errors_name_the_data_set(name, "Check `dataset_name`, `dataset_config` and `dataset_revision`."):
        if (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists():
            loaded = load_from_disk(name)
        else:
            loaded = load_dataset(name, options.dataset_config, revision=revision)
        splits = dict(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded}
        if folder.is_dir():
            return splits, folder / CLASSES_FILE
        try:
            return splits, Path(hf_hub_download(name, CLASSES_FILE, repo_type="dataset", revision=revision))
        except EntryNotFoundError:  # the file is optional
            return splits, None


@contextmanager
def _errors_name_the_data_set(name: str, remedy: str) -> Iterator[None]:
    """Turn the errors of `datasets` and of the Hub's client into a UserOSError.

    Both raise errors of many types, for example RuntimeError for a data set with a loading script.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise UserOSError(f"The data set '{name}' cannot be loaded: {str(error).rstrip('.')}. {remedy}") from error
    except (AttributeError, IndexError, KeyError, TypeError) as error:  # such as a list in dataset_info.json
        reason = f"one of its files is damaged ({type(error).__name__}: {error})"
        raise UserOSError(f"The data set '{name}' cannot be loaded: {reason}. {remedy}") from error


def _standard_columns(table: Dataset, options: DataOptions, split: str) -> Dataset:
    """Reduce a table to the columns `image`, `label`, `row` and the split column, without decoding images.

    Columns are added before rows are selected. In the reverse order, `datasets` would write a copy beside the data.
    """
    needed = [options.image_column, options.label_column, options.split_column]
    for name in needed:
        if name not in (None, *table.column_names) and (split, name) != ("unlabeled", options.label_column):
            raise UserValueError(
                f"The split '{split}' of {options.dataset_name} has no column '{name}'. It has the columns "
                f"{', '.join(table.column_names)}. Name the right ones with `image_column`, `label_column` or "
                "`split_column`."
            )
    kept = [name for name in needed if name in table.column_names and table.features[name] != Value("null")]
    table = table.select_columns(kept)
    if options.label_column not in kept:
        table = table.add_column(options.label_column, [None] * len(table), feature=ImageColumn(decode=False))
    for column, name in (("image", options.image_column), ("label", options.label_column)):
        if not isinstance(table.features[name], ImageColumn):
            raise UserValueError(
                f"The {column} column '{name}' of {options.dataset_name} holds {table.features[name]}; expected "
                f"images. Name the right one with `{column}_column`. A folder with images/ and labels/ is opened with "
                "`data_dir`."
            )
        table = table.cast_column(name, ImageColumn(decode=False))
        table = table if name == column else table.rename_column(name, column)
    return table.add_column("row", [f"{split}[{place}]" for place in range(len(table))])


def _divide_by_column(tables: dict[str, Dataset], column: str) -> dict[str, Dataset]:
    """Put each row into the set that is named in its split column."""
    rows: dict[str, Dataset] = {}
    for table in tables.values():
        values, feature = table[column][:], table.features[column]
        if isinstance(feature, ClassLabel):
            values = [None if value is None else feature.int2str(value) for value in values]
        if None in values:
            raise UserValueError(
                f"`split_column` is '{column}', which is empty for {table['row'][values.index(None)]}. Fill it with "
                f"{', '.join(SPLITS)}."
            )
        for value in dict.fromkeys(values):
            part = table.select([place for place, other in enumerate(values) if other == value])
            rows[value] = concatenate_datasets([rows[value], part]) if value in rows else part
    return {name: table.remove_columns(column) for name, table in rows.items()}


# --- benchmarks


def _list_benchmark(options: DataOptions) -> Listing:
    facts = BENCHMARKS[options.dataset]
    denominator = facts.denominator(options.partition)
    lists = load_lists(options.dataset, denominator, Path(options.splits_dir) if options.splits_dir else None)
    if options.data_dir is not None:
        root = Path(options.data_dir)
        if not (root / "images").is_dir():
            raise UserFileNotFoundError(
                f"`data_dir` is '{root}', which has no folder images/. Expected a copy of the folder {facts.folder} "
                f"of {DATASETS_REPOSITORY}."
            )
    else:
        with _errors_name_the_data_set(DATASETS_REPOSITORY, "Try again, or name a local copy with `data_dir`."):
            snapshot = snapshot_download(
                DATASETS_REPOSITORY,
                repo_type="dataset",
                revision=options.dataset_revision,
                allow_patterns=f"{facts.folder}/*",
            )
        root = Path(snapshot) / facts.folder
    sets = {name: _samples_of_lines(root, name, lines) for name, lines in lists.items()}
    messages = list_warnings(options.dataset, denominator, lists)
    return Listing(
        sets,
        pool=None,
        description=ClassDescription(tuple(entry.to_dict() for entry in facts.classes)),
        label_rule=LabelRule(reduce_labels=facts.reduce_labels),
        root=str(root),
        findings=[Finding("lists unlike the paper's", message, is_warning=True) for message in messages],
    )
