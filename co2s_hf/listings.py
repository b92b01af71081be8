"""Three ways in: a folder, a `datasets` data set, a benchmark of the paper. Each lists samples; nothing is decoded.

Nothing is written into, or removed from, what people have.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset, load_from_disk
from datasets import Image as ImageColumn
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from .benchmark_lists import fetch_lists, unexpected_sizes
from .catalog import BENCHMARKS, DATASETS_REPOSITORY
from .checks import Finding
from .data import Samples
from .data_arguments import DataArguments
from .reading import IGNORE, IMAGE_SUFFIXES, LabelRule
from .splits import SPLIT_FILES, SPLITS, Line, read_list


CLASSES_FILE = "classes.json"


@dataclass(frozen=True)
class Listing:
    """What a way in finds: lists that are settled, or a pool to draw them from."""

    sets: dict[str, Samples]  # those that are settled
    pool: Samples | None  # what the others are drawn from
    classes: list[dict]  # entries of classes.json; none where nothing describes them
    label_rule: LabelRule
    root: str = ""  # what names in lists are relative to
    findings: Sequence[Finding] = ()


def list_samples(args: DataArguments) -> Listing:
    """List what the arguments name.

    Raises:
        FileNotFoundError: A folder or a list is missing.
        ValueError: No source is named, or the arguments do not fit it.
    """
    if args.dataset is not None:
        return _list_benchmark(args)
    if args.dataset_name is not None:
        return _list_dataset(args)
    if args.data_dir is not None:
        return _list_folder(args)
    raise ValueError("Name the data: --data_dir, --dataset_name or --dataset.")


def _list_folder(args: DataArguments) -> Listing:
    root = Path(args.data_dir)
    if not root.is_dir():
        raise FileNotFoundError(f"The data folder '{root}' does not exist.")
    splits_dir = Path(args.splits_dir) if args.splits_dir else root / "splits"
    if args.splits_dir and not splits_dir.is_dir():
        raise FileNotFoundError(f"The folder of lists '{splits_dir}' does not exist.")
    classes = read_classes(root / CLASSES_FILE)
    rule = LabelRule()
    if args.labeled_fraction is None and splits_dir.is_dir():
        sets = {name: _read_set(root, splits_dir, name) for name in SPLITS}
        return Listing(sets, None, classes, rule, str(root))
    sets = {}
    pool = _pair_files(root)
    if (splits_dir / SPLIT_FILES["validation"]).exists():
        sets["validation"] = _read_set(root, splits_dir, "validation")
        held_out = set(sets["validation"].names)
        pool = pool.select([place for place, name in enumerate(pool.names) if name not in held_out])
    return Listing(sets, pool, classes, rule, str(root))


def _read_set(root: Path, splits_dir: Path, name: str) -> Samples:
    lines = read_list(splits_dir / SPLIT_FILES[name], label_needed=name != "unlabeled")
    if name == "unlabeled":  # their masks need not be there
        lines = [(image, label if label is not None and (root / label).exists() else None) for image, label in lines]
    return _of_lines(root, lines)


def _of_lines(root: Path, lines: list[Line]) -> Samples:
    labels = [None if label is None else str(root / label) for _, label in lines]
    return Samples.of_files([str(root / image) for image, _ in lines], labels)


def find_images(folder: Path) -> list[Path]:
    """Every image file in a folder and those below it, sorted.

    Raises:
        FileNotFoundError: The folder does not exist.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"The folder '{folder}' does not exist.")
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def _pair_files(root: Path) -> Samples:
    """Every image of a folder, with the label file of the same name, whatever the suffix."""
    labels: dict[Path, Path] = {}
    for path in find_images(root / "labels"):
        key = path.relative_to(root / "labels").with_suffix("")
        if key in labels:
            raise ValueError(f"'{path}' and '{labels[key]}' are both labels of the image {key}. Keep one of them.")
        labels[key] = path
    images = find_images(root / "images")
    if not images:
        raise ValueError(f"'{root / 'images'}' holds no images ({', '.join(IMAGE_SUFFIXES)}).")
    paired = [labels.get(path.relative_to(root / "images").with_suffix("")) for path in images]
    return Samples.of_files(list(map(str, images)), [None if path is None else str(path) for path in paired])


def _list_dataset(args: DataArguments) -> Listing:
    splits, classes_path = _load_splits(args.dataset_name, args.dataset_revision)
    for name, table in splits.items():
        for column in (args.image_column, args.label_column, args.split_column):
            if (
                column is not None
                and column not in table.column_names
                and not (name == "unlabeled" and column == args.label_column)
            ):
                raise ValueError(
                    f"The split '{name}' of {args.dataset_name} has no column '{column}', but "
                    f"{', '.join(table.column_names)}. Name it with --image_column, --label_column or --split_column."
                )  # fmt: skip
    if args.split_column is not None:
        splits = _by_column(splits, args.split_column)
    sets = {name: _samples_of(table, args, name) for name, table in splits.items()}
    description = _read_description(classes_path)
    rule = LabelRule(ignore_index=description.get("ignore_index", IGNORE))
    classes = description.get("classes", [])
    if set(SPLITS) <= set(sets) and args.labeled_fraction is None:
        return Listing({name: sets[name] for name in SPLITS}, None, classes, rule)
    held_out = [name for name in ("validation", "test") if name in sets]
    settled = {"validation": sets[held_out[0]]} if held_out else {}
    pool = [samples for name, samples in sets.items() if name not in held_out]
    if not pool:
        raise ValueError(f"{args.dataset_name} has the splits {', '.join(sets)}; none is for training.")
    joined = pool[0]
    for samples in pool[1:]:
        joined = joined + samples
    return Listing(settled, joined, classes, rule)


def _load_splits(name: str, revision: str | None) -> tuple[dict[str, Dataset], Path | None]:
    """The splits of a data set, and its classes.json where it has one."""
    folder = Path(name)
    if (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists():
        loaded = load_from_disk(name)
    else:
        loaded = load_dataset(name, revision=None if folder.is_dir() else revision)
    splits = dict(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded}
    if folder.is_dir():
        return splits, folder / CLASSES_FILE
    try:
        return splits, Path(hf_hub_download(name, CLASSES_FILE, repo_type="dataset", revision=revision))
    except HfHubHTTPError:  # it need not have one
        return splits, None


def _by_column(splits: dict[str, Dataset], column: str) -> dict[str, Dataset]:
    """Every row in the split that its own column names."""
    rows: dict[str, Dataset] = {}
    for table in splits.values():
        values = np.array(table[column])
        for value in np.unique(values):
            if value not in SPLITS:
                raise ValueError(f"The column '{column}' holds '{value}'; expected one of {', '.join(SPLITS)}.")
            part = table.select(np.flatnonzero(values == value))
            rows[value] = concatenate_datasets([rows[value], part]) if value in rows else part
    return rows


def _samples_of(table: Dataset, args: DataArguments, split: str) -> Samples:
    """The two columns that matter, undecoded, and every row's place."""
    if args.label_column not in table.column_names:
        table = table.add_column(args.label_column, [None] * len(table), feature=ImageColumn(decode=False))
    table = table.select_columns([args.image_column, args.label_column])
    table = table.rename_columns({args.image_column: "image", args.label_column: "label"})
    for column in ("image", "label"):
        if not isinstance(table.features[column], ImageColumn):
            raise ValueError(
                f"The column of {column}s of {args.dataset_name} is {table.features[column]}; expected images."
            )
        table = table.cast_column(column, ImageColumn(decode=False))
    return Samples(table.add_column("row", [f"{split}[{place}]" for place in range(len(table))]))


def _list_benchmark(args: DataArguments) -> Listing:
    facts = BENCHMARKS[args.dataset]
    denominator = _parse_partition(args.partition, args.dataset)
    splits_dir = Path(args.splits_dir) if args.splits_dir else None
    lists = fetch_lists(args.dataset, denominator, args.splits_url, splits_dir)
    if args.data_dir is not None:
        root = Path(args.data_dir)
        if not (root / "images").is_dir():
            raise FileNotFoundError(f"'{root}' has no folder images/: it is no copy of {args.dataset}.")
    else:
        snapshot = snapshot_download(
            DATASETS_REPOSITORY,
            repo_type="dataset",
            revision=args.dataset_revision,
            allow_patterns=f"{facts.folder}/*",
        )
        root = Path(snapshot) / facts.folder
    sets = {name: _of_lines(root, lines) for name, lines in lists.items()}
    sizes = unexpected_sizes(args.dataset, denominator, {name: len(lines) for name, lines in lists.items()})
    entries = [{"name": c.name, "color": list(c.color), "concepts": c.concepts} for c in facts.classes]
    oddities = [Finding("lists unlike the paper's", message, is_warning=True) for message in sizes]
    return Listing(sets, None, entries, LabelRule(reduce_labels=facts.reduce_labels), str(root), oddities)


def _parse_partition(text: str | None, dataset: str) -> int:
    known = BENCHMARKS[dataset].partitions
    if text is None:
        return known[0]
    match = re.fullmatch(r"1[_/](\d+)", text)
    if match is None or int(match[1]) not in known:
        raise ValueError(
            f"--partition is '{text}'; {dataset} has {', '.join(f'1_{denominator}' for denominator in known)}."
        )
    return int(match[1])


def read_classes(path: Path) -> list[dict]:
    """The entries of a `classes.json`; none where there is no such file.

    Raises:
        ValueError: The file does not describe classes.
    """
    return _read_description(path).get("classes", [])


def _read_description(path: Path | None) -> dict:
    """`classes`, and `ignore_index` where the file gives it. A bare list stands for the classes."""
    if path is None or not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON file: {error}.") from error
    description = {"classes": content} if isinstance(content, list) else content
    classes = description.get("classes") if isinstance(description, dict) else None
    if not isinstance(classes, list) or not all(
        isinstance(c, dict) and isinstance(c.get("name"), str) for c in classes
    ):
        raise ValueError(
            f'{path} must be a list in label order, with a name for every class: [{{"name": "water", "color": '
            "[0, 0, 255]}, ...]."
        )
    return description
