"""Labelled, unlabelled and validation sets: draw them from a seed, read and write them as text files."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..utils.errors import UserFileNotFoundError, UserValueError
from ..utils.files import write_json, write_text
from ..utils.seeding import SPLIT_STREAM, random_generator


SPLITS = ("labeled", "unlabeled", "validation")
SPLIT_FILES = {"labeled": "labeled.txt", "unlabeled": "unlabeled.txt", "validation": "val.txt"}

Line = tuple[str, str | None]  # image file, and label file if there is one


def read_list(path: Path, label_needed: bool) -> list[Line]:
    """Read a list in the authors' format: one `images/NAME labels/NAME` per line.

    Spaces or a tab separate the two names. If a name contains spaces, a tab must separate them.

    Args:
        path: The list.
        label_needed: Refuse lines without a label file.

    Raises:
        UserFileNotFoundError: The list does not exist.
        UserValueError: The list is not UTF-8 text, is empty, or has a malformed line.
    """
    if not path.exists():
        raise UserFileNotFoundError(
            f"'{path}' is missing. Write one 'images/NAME labels/NAME' per line into it, or draw the sets: "
            "`labeled_fraction=0.125`."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserValueError(f"{path} cannot be read as UTF-8 text: {error}. Replace the list.") from error
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        parts = [part.strip() for part in line.split("\t")] if "\t" in line else line.split()
        if not parts:
            continue
        if len(parts) > 2 or (len(parts) == 1 and label_needed):
            raise UserValueError(f"{path}, line {number}: '{line}' is not of the form 'images/NAME labels/NAME'.")
        lines.append((parts[0], parts[1] if len(parts) == 2 else None))
    if not lines:
        raise UserValueError(f"{path} is empty; it must list at least one image.")
    return lines


def write_lists(folder: Path, lists: dict[str, list[Line]], facts: dict):
    """Write the sets as lists for `splits_dir`, and facts about them as splits.json.

    Args:
        folder: Folder for labeled.txt, unlabeled.txt, val.txt and splits.json.
        lists: "labeled", "unlabeled" and "validation" -> lines.
        facts: Content of splits.json.
    """
    for split, lines in lists.items():
        write_text(folder / SPLIT_FILES[split], "".join(f"{_format_line(*line)}\n" for line in lines))
    write_json(folder / "splits.json", facts)


def _format_line(image: str, label: str | None) -> str:
    separator = "\t" if " " in f"{image}{label or ''}" else " "
    return f"{image}{separator}{label or ''}".rstrip(" ")


def hash_lists(lists: dict[str, list[Line]]) -> str:
    """Hash three sets to twelve hexadecimal digits, independent of the order within a set and of the label files."""
    digest = hashlib.sha256()
    for split in SPLITS:
        digest.update("\n".join([split, *sorted(name for name, _ in lists[split])]).encode() + b"\n\n")
    return digest.hexdigest()[:12]


def draw_validation(
    classes: Sequence[frozenset[int]], groups: Sequence[str], fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Draw whole groups for validation until they contain enough samples.

    A group is skipped if a class would then have no training sample. If all groups are skipped, the first one is drawn
    nevertheless.

    Args:
        classes: Class indices in the label map of each sample.
        groups: Group of each sample, such as neighbouring images. A group is drawn as a whole or not at all.
        fraction: Share of the samples to draw, above 0 and up to 1.
        seed: Seed of the draw.

    Returns:
        Indices of the validation samples, and indices of the other samples.
    """
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    names = list(members)
    order = [names[place] for place in random_generator(seed, SPLIT_STREAM, 0).permutation(len(names))]
    remaining = Counter(index for present in classes for index in present)
    wanted = max(1, round(fraction * len(classes)))
    held_out, skipped = [], []
    for group in order:
        if len(held_out) >= wanted:
            break
        taken = Counter(index for member in members[group] for index in classes[member])
        if any(taken[index] == remaining[index] for index in taken):
            skipped.append(group)
            continue
        held_out += members[group]
        remaining -= taken
    if not held_out and skipped:
        held_out = members[skipped[0]]
    chosen = set(held_out)
    return held_out, [index for index in range(len(classes)) if index not in chosen]


def draw_labeled(classes: Sequence[frozenset[int]], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Draw the samples that keep their labels.

    Samples of the rarest classes are drawn first, so that every class is labelled if enough samples are drawn.

    Args:
        classes: Class indices in the label map of each sample.
        fraction: Share of the samples to draw, above 0 and up to 1.
        seed: Seed of the draw.

    Returns:
        Indices of the labelled samples, and indices of the other samples.
    """
    order = random_generator(seed, SPLIT_STREAM, 1).permutation(len(classes)).tolist()
    wanted = max(1, round(fraction * len(classes)))
    frequency = Counter(index for present in classes for index in present)
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
