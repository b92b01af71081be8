"""Three ways in: a folder, a `datasets` data set, a benchmark of the paper. Each lists samples; nothing is decoded.

Nothing is written into, or removed from, what people have.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Value, concatenate_datasets, load_dataset, load_from_disk
from datasets import Image as ImageColumn
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError

from .benchmark_lists import fetch_lists, unexpected_sizes
from .catalog import BENCHMARKS, DATASETS_REPOSITORY
from .checks import Finding
from .class_files import CLASSES_FILE, ClassDescription, read_classes
from .data import Samples
from .data_arguments import DataArguments
from .reading import IMAGE_SUFFIXES, LabelRule, find_images
from .splits import SPLIT_FILES, SPLITS, Line, read_list


OTHER_NAMES = {"val": "validation", "valid": "validation", "dev": "validation"}


@dataclass(frozen=True)
class Listing:
    """What a way in finds: lists that are settled, or a pool to draw them from."""

    sets: dict[str, Samples]  # those that are settled
    pool: Samples | None  # what the others are drawn from
    description: ClassDescription  # empty where nothing describes the classes
    label_rule: LabelRule = LabelRule()
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
    description = _description_at(root / CLASSES_FILE)
    rule = LabelRule(ignore_index=description.ignore_index)
    if args.labeled_fraction is None and splits_dir.is_dir():
        sets = {name: _read_set(root, splits_dir, name) for name in SPLITS}
        return Listing(sets, None, description, rule, str(root))
    sets = {}
    pool, findings = _pair_files(root)
    if (splits_dir / SPLIT_FILES["validation"]).exists():
        sets["validation"] = _read_set(root, splits_dir, "validation")
        held_out = set(sets["validation"].names)
        pool = pool.select([place for place, name in enumerate(pool.names) if name not in held_out])
    return Listing(sets, pool, description, rule, str(root), findings)


def _description_at(path: Path | None) -> ClassDescription:
    return read_classes(path) if path is not None and path.exists() else ClassDescription()


def _read_set(root: Path, splits_dir: Path, name: str) -> Samples:
    return _of_lines(root, name, read_list(splits_dir / SPLIT_FILES[name], label_needed=name != "unlabeled"))


def _of_lines(root: Path, split: str, lines: list[Line]) -> Samples:
    if split == "unlabeled":  # their masks need not be there
        lines = [(image, label if label is not None and (root / label).exists() else None) for image, label in lines]
    labels = [None if label is None else str(root / label) for _, label in lines]
    return Samples.of_files([str(root / image) for image, _ in lines], labels)


def _pair_files(root: Path) -> tuple[Samples, list[Finding]]:
    """Every image of a folder, with the label file of the same name, whatever the suffix; labels without an image."""
    images, labels = (_by_stem(root / name) for name in ("images", "labels"))
    if not images:
        raise ValueError(f"'{root / 'images'}' holds no images ({', '.join(IMAGE_SUFFIXES)}).")
    lonely = [path for stem, path in labels.items() if stem not in images]
    if lonely and len(lonely) == len(labels):
        raise ValueError(
            f"No label file has the name of an image: '{lonely[0]}' would belong to "
            f"'{root / 'images' / lonely[0].relative_to(root / 'labels').with_suffix('.*')}'. Rename the files."
        )
    findings = [
        Finding("labels without an image", f"{path} has no image of its name. Rename one of them.", is_warning=True)
        for path in lonely
    ]
    paired = [str(labels[stem]) if stem in labels else None for stem in images]
    return Samples.of_files(list(map(str, images.values())), paired), findings


def _by_stem(folder: Path) -> dict[Path, Path]:
    """Image files by their place and name below a folder, without the suffix."""
    files: dict[Path, Path] = {}
    for path in find_images(folder):
        stem = path.relative_to(folder).with_suffix("")
        if files.setdefault(stem, path) != path:
            raise ValueError(
                f"'{files[stem]}' and '{path}' have one name: labels could not tell them apart. Rename one."
            )
    return files


def _list_dataset(args: DataArguments) -> Listing:
    splits, classes_path = _load_splits(args)
    tables = {name: _two_columns(table, args, name) for name, table in splits.items()}
    if args.split_column is not None:
        tables = _by_column(tables, args.split_column)
    sets = {}
    for name, table in tables.items():
        split = OTHER_NAMES.get(name, name)
        if split not in (*SPLITS, "train", "test"):
            raise ValueError(
                f"{args.dataset_name} has a split '{name}'; expected {', '.join((*SPLITS, 'train', 'test'))}. Say "
                "what its rows are for in a column, and name that: --split_column."
            )
        sets[split] = sets[split] + Samples(table) if split in sets else Samples(table)
    if "test" in sets:  # a set of its own to measure on, unless there is a better one
        sets.setdefault("validation", sets.pop("test"))
        sets.pop("test", None)
    description = _description_at(classes_path)
    rule = LabelRule(ignore_index=description.ignore_index)
    if "train" not in sets and args.labeled_fraction is None:
        if set(sets) == {"labeled", "unlabeled"}:  # validation is drawn from what has labels
            return Listing({"unlabeled": sets["unlabeled"]}, sets["labeled"], description, rule)
        return Listing(sets, None, description, rule)
    settled = {"validation": sets.pop("validation")} if "validation" in sets else {}
    pool = None
    for samples in sets.values():
        pool = samples if pool is None else pool + samples
    return Listing(settled, pool, description, rule)


def _load_splits(args: DataArguments) -> tuple[dict[str, Dataset], Path | None]:
    """The splits of a data set, and its classes.json where it has one."""
    name, revision, folder = args.dataset_name, args.dataset_revision, Path(args.dataset_name)
    if (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists():
        loaded = load_from_disk(name)
    else:
        loaded = load_dataset(name, args.dataset_config, revision=revision)
    splits = dict(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded}
    if folder.is_dir():
        return splits, folder / CLASSES_FILE
    try:
        return splits, Path(hf_hub_download(name, CLASSES_FILE, repo_type="dataset", revision=revision))
    except EntryNotFoundError:  # it need not have one
        return splits, None


def _two_columns(table: Dataset, args: DataArguments, split: str) -> Dataset:
    """The columns that matter, undecoded, with every row's place.

    Columns are added before rows are selected: afterwards `datasets` would write a copy beside the data.
    """
    needed = [args.image_column, args.label_column, args.split_column]
    for name in needed:
        if name not in (None, *table.column_names) and (split, name) != ("unlabeled", args.label_column):
            raise ValueError(
                f"The split '{split}' of {args.dataset_name} has no column '{name}', but "
                f"{', '.join(table.column_names)}. Name it with --image_column, --label_column or --split_column."
            )
    kept = [name for name in needed if name in table.column_names and table.features[name] != Value("null")]
    table = table.select_columns(kept)
    if args.label_column not in kept:
        table = table.add_column(args.label_column, [None] * len(table), feature=ImageColumn(decode=False))
    for column, name in (("image", args.image_column), ("label", args.label_column)):
        if not isinstance(table.features[name], ImageColumn):
            raise ValueError(
                f"The column of {column}s of {args.dataset_name} is {table.features[name]}; expected images. A folder "
                "with images/ and labels/ opens with --data_dir."
            )
        table = table.cast_column(name, ImageColumn(decode=False))
        table = table if name == column else table.rename_column(name, column)
    return table.add_column("row", [f"{split}[{place}]" for place in range(len(table))])


def _by_column(tables: dict[str, Dataset], column: str) -> dict[str, Dataset]:
    """Every row in the split that its own column names."""
    rows: dict[str, Dataset] = {}
    for table in tables.values():
        values, feature = table[column][:], table.features[column]
        if isinstance(feature, ClassLabel):
            values = [None if value is None else feature.int2str(value) for value in values]
        if None in values:
            raise ValueError(f"The column '{column}' says nothing of {table['row'][values.index(None)]}.")
        for value in dict.fromkeys(values):
            part = table.select([place for place, other in enumerate(values) if other == value])
            rows[value] = concatenate_datasets([rows[value], part]) if value in rows else part
    return {name: table.remove_columns(column) for name, table in rows.items()}


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
    sets = {name: _of_lines(root, name, lines) for name, lines in lists.items()}
    sizes = unexpected_sizes(args.dataset, denominator, {name: len(lines) for name, lines in lists.items()})
    entries = tuple({"name": c.name, "color": list(c.color), "concepts": c.concepts} for c in facts.classes)
    oddities = [Finding("lists unlike the paper's", message, is_warning=True) for message in sizes]
    return Listing(
        sets, None, ClassDescription(entries), LabelRule(reduce_labels=facts.reduce_labels), str(root), oddities
    )


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
