"""Labelled, unlabelled and validation sets: drawn from a seed, read from lists, written as lists."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .files import write_json, write_text
from .streams import SPLIT_STREAM, sample_generator


SPLITS = ("labeled", "unlabeled", "validation")
SPLIT_FILES = {"labeled": "labeled.txt", "unlabeled": "unlabeled.txt", "validation": "val.txt"}

Line = tuple[str, str | None]  # image and label file


def read_list(path: Path, label_needed: bool) -> list[Line]:
    """The lines of a list in the authors' format, `images/NAME labels/NAME`; with a tab where names have spaces.

    Raises:
        FileNotFoundError: The list is missing.
        ValueError: It is empty, or a line is malformed.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"'{path}' is missing: a list of images, one 'images/NAME labels/NAME' a line. Write it, or draw the sets "
            "with --labeled_fraction 1/8."
        )
    lines = []
    for number, line in enumerate(path.read_text("utf-8-sig").splitlines(), start=1):
        parts = [part.strip() for part in line.split("\t")] if "\t" in line else line.split()
        if not parts:
            continue
        if len(parts) > 2 or (len(parts) == 1 and label_needed):
            raise ValueError(f"{path}, line {number}: '{line}' is not 'images/NAME labels/NAME'.")
        lines.append((parts[0], parts[1] if len(parts) == 2 else None))
    if not lines:
        raise ValueError(f"{path} is empty; it must list at least one image.")
    return lines


def write_lists(folder: Path, names: dict[str, list[Line]], facts: dict):
    """Write drawn sets as lists that training takes with --splits_dir, and how they were drawn as splits.json."""
    for split, lines in names.items():
        write_text(folder / SPLIT_FILES[split], "".join(f"{_written(*line)}\n" for line in lines))
    write_json(folder / "splits.json", facts)


def _written(image: str, label: str | None) -> str:
    separator = "\t" if " " in f"{image}{label or ''}" else " "
    return f"{image}{separator}{label or ''}".rstrip(" ")


def hash_of(names: dict[str, list[Line]]) -> str:
    """Twelve digits that two runs share if, and only if, they have the same sets."""
    digest = hashlib.sha256()
    for split in SPLITS:
        digest.update("\n".join([split, *sorted(name for name, _ in names[split])]).encode() + b"\n\n")
    return digest.hexdigest()[:12]


def draw_validation(
    classes: Sequence[frozenset[int]], groups: Sequence[str], fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Hold out whole groups of samples until there are enough.

    Args:
        classes: Which classes each sample's label map shows.
        groups: The group of each sample: neighbours, which must not end up on both sides.
        fraction: Share of the samples to hold out.
        seed: Of the draw.

    Returns:
        Indices of the samples for validation and of the others. The others keep a sample of every class where that
        leaves anything to hold out.
    """
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    names = list(members)
    order = [names[place] for place in sample_generator(seed, SPLIT_STREAM, 0).permutation(len(names))]
    remaining = Counter(index for shown in classes for index in shown)
    wanted = max(1, round(fraction * len(classes)))
    held_out, postponed = [], []
    for group in order:
        if len(held_out) >= wanted:
            break
        taken = Counter(index for member in members[group] for index in classes[member])
        if any(taken[index] == remaining[index] for index in taken):  # the last one to learn a class from
            postponed.append(group)
            continue
        held_out += members[group]
        remaining -= taken
    if not held_out and postponed:
        held_out = members[postponed[0]]
    chosen = set(held_out)
    return held_out, [index for index in range(len(classes)) if index not in chosen]


def draw_labeled(classes: Sequence[frozenset[int]], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Choose which samples keep their labels, so that every class is labelled where possible.

    Args:
        classes: Which classes each sample's label map shows.
        fraction: Share of the samples that keep them.
        seed: Of the draw.

    Returns:
        Indices of the labelled samples and of the others.
    """
    order = sample_generator(seed, SPLIT_STREAM, 1).permutation(len(classes)).tolist()
    wanted = max(1, round(fraction * len(classes)))
    frequency = Counter(index for shown in classes for index in shown)
    chosen: dict[int, None] = {}
    covered: set[int] = set()
    for rare in sorted(frequency, key=lambda index: (frequency[index], index)):
        if rare not in covered and len(chosen) < wanted:
            place = next(place for place in order if rare in classes[place])
            chosen[place] = None
            covered |= classes[place]
    for place in order:
        if len(chosen) >= wanted:
            break
        chosen[place] = None
    return list(chosen), [place for place in order if place not in chosen]
