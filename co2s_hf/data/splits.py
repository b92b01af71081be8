"""Labelled, unlabelled and validation sets: draw them from a seed, read and write them as text files."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path

from ..utils.errors import UserFileNotFoundError, UserValueError
from ..utils.files import write_json, write_text
from ..utils.seeding import SPLIT_STREAM, random_generator
from .image_files import CONTROL_CHARACTERS, LONGEST_NAME, StoredFile


SPLITS = ("labeled", "unlabeled", "validation")
SPLIT_FILES = {"labeled": "labeled.txt", "unlabeled": "unlabeled.txt", "validation": "val.txt"}

Line = tuple[str, str | None]  # image file, and label file if there is one


def read_list(path: Path, label_needed: bool) -> list[Line]:
    """Read a list in the authors' format: one `images/NAME labels/NAME` per line.

    Spaces or a tab separate the two names. If a name contains spaces, a tab must separate them. A backslash separates
    folders, as in lists that were written on Windows.

    A list may come from elsewhere, so its names must stay below the data folder. Names that leave it are refused.
    Symbolic links in the data folder are followed: whoever made that folder chose them, and a list cannot make any.

    Args:
        path: The list.
        label_needed: Refuse lines without a label file.

    Returns:
        The lines. Their names are relative to the data folder, with slashes.

    Raises:
        UserFileNotFoundError: The list does not exist.
        UserValueError: The list is not UTF-8 text, is empty, has a malformed line, or has a name that is not below the
            data folder.
    """
    if not os.path.lexists(path):
        raise UserFileNotFoundError(
            f"'{path}' is missing. Write one 'images/NAME labels/NAME' per line into it, or draw the sets: "
            "`labeled_fraction=0.125`."
        )
    try:
        text = StoredFile(str(path)).read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserValueError(f"{path} cannot be read as UTF-8 text: {error}. Replace the list.") from error
    lines = []
    for number, line in enumerate(text.split("\n"), start=1):  # str.splitlines would also split at control characters
        if not line.strip():
            continue
        if problem := _line_problem(line, label_needed):
            raise UserValueError(f"{path}, line {number}: {problem}")
        image, *labels = (name.replace("\\", "/") for name in _names_of(line))
        lines.append((image, labels[0] if labels else None))
    if not lines:
        raise UserValueError(f"{path} is empty; it must list at least one image.")
    return lines


def _names_of(line: str) -> list[str]:
    """Divide a line into its names. A tab at the end of the line, after a name with spaces, begins no name."""
    return [name.strip() for name in line.rstrip().split("\t")] if "\t" in line else line.split()


def _line_problem(line: str, label_needed: bool) -> str | None:
    """Describe what is wrong with a line of a list, if anything is."""
    if CONTROL_CHARACTERS.search(line.replace("\t", "")):
        return f"{line[:200]!a} contains a control character. Correct the name, or save the list as text."
    names = _names_of(line)
    if len(names) > 2 or "" in names or (len(names) == 1 and label_needed):
        return f"'{line:.200}' is not of the form 'images/NAME labels/NAME'."
    expected = "Expected a name below the data folder, such as 'images/a.png'. Correct the line."
    for name in names:
        parts = name.replace("\\", "/").split("/")
        if not parts[0] or ":" in parts[0]:  # /a.png, //server/a.png, C:/a.png, and addresses such as https://a/b.png
            return f"'{name:.200}' is an absolute path or an address. {expected}"
        if any(len(os.fsencode(part)) > LONGEST_NAME for part in parts):
            return f"'{name:.200}...' has {len(name)} characters, more than the name of a file can have. {expected}"
        if parts[0].startswith("~"):
            return f"'{name:.200}' begins with '~', which stands for a home folder. {expected}"
        if ".." in (part.strip() for part in parts):  # Windows ignores spaces at the end of a part
            return f"'{name:.200}' has '..', which leads to another folder. {expected}"
    return None


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
    # The original names of rows of a data set may have any characters. A new line in a name must not start a line.
    names = [CONTROL_CHARACTERS.sub(lambda found: ascii(found[0])[1:-1], name or "") for name in (image, label)]
    separator = "\t" if re.search(r"\s", "".join(names)) else " "
    return separator.join(names).rstrip(" ")


def hash_lists(lists: dict[str, list[Line]]) -> str:
    """Hash three sets to twelve hexadecimal digits, independent of the order within a set and of the label files."""
    return _hash({split: [image for image, _ in lists[split]] for split in SPLITS})


def hash_labels(lists: dict[str, list[Line]]) -> str:
    """Hash the names of the label files of labelled and validation images to twelve hexadecimal digits.

    The names are hashed, not the content. Rows of a data set have no label files: their hash is that of their images.
    Label files of unlabelled images are not trained on, and may be added while a run is interrupted.
    """
    return _hash({split: [f"{image} {label}" for image, label in lists[split]] for split in ("labeled", "validation")})


def _hash(names: dict[str, list[str]]) -> str:
    text = "".join("\n".join([split, *sorted(found)]) + "\n\n" for split, found in names.items())
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def draw_validation(
    classes: Sequence[frozenset[int]],
    groups: Sequence[Hashable],
    fraction: float,
    seed: int,
    order: Sequence[int] | None = None,
    overlapping: Callable[[int], Iterable[int]] | None = None,
) -> tuple[list[int], list[int]]:
    """Draw whole groups for validation until they contain enough samples.

    A group is skipped if a class would then have no training sample. If all groups are skipped, the first one is drawn
    nevertheless.

    Args:
        classes: Class indices in the label map of each sample.
        groups: Group of each sample, such as neighbouring images. A group is drawn as a whole or not at all.
        fraction: Share of the samples to draw, above 0 and up to 1.
        seed: Seed of the draw.
        order: Order in which the groups are drawn, as indices of the groups. None: a random order.
        overlapping: Function that returns the indices of the samples that show pixels of a sample. Samples that
            overlap a validation sample are in no set. None: no samples overlap.

    Returns:
        Indices of the validation samples, and indices of the training samples.
    """
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    names = list(members)
    if order is None:
        order = random_generator(seed, SPLIT_STREAM, 0).permutation(len(names))
    remaining = Counter(index for present in classes for index in present)
    wanted = max(1, round(fraction * len(classes)))
    held_out, skipped, gone = [], [], set()

    def lost_with(group: Hashable) -> set[int]:
        found = {index for member in members[group] for index in (overlapping or _itself)(member)}
        return found.union(members[group]) - gone

    for group in (names[place] for place in order):
        if len(held_out) >= wanted:
            break
        lost = lost_with(group)
        taken = Counter(index for member in lost for index in classes[member])
        if any(taken[index] == remaining[index] for index in taken):
            skipped.append(group)
            continue
        held_out += members[group]
        remaining -= taken
        gone |= lost
    if not held_out and skipped:
        held_out = members[skipped[0]]
        gone = lost_with(skipped[0])
    return held_out, [index for index in range(len(classes)) if index not in gone]


def _itself(index: int) -> tuple[int]:
    return (index,)


def draw_labeled(
    classes: Sequence[frozenset[int]], fraction: float, seed: int, order: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """Draw the samples that keep their labels.

    Samples of the rarest classes are drawn first, so that every class is labelled if enough samples are drawn.

    Args:
        classes: Class indices in the label map of each sample.
        fraction: Share of the samples to draw, above 0 and up to 1.
        seed: Seed of the draw.
        order: Order in which the samples are drawn, as indices. None: a random order.

    Returns:
        Indices of the labelled samples, and indices of the other samples.
    """
    if order is None:
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
