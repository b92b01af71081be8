"""Find everything that is wrong with a data set before training starts, and name the remedies."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from ...utils.errors import UserValueError
from ..reading import IGNORE
from ..splits import SPLITS
from .near_duplicates import find_copies
from .scan import ImageFacts, LabelFacts


MOST_OF_A_KIND = 20
MOST_VALUES = 5  # of a file in a message
MOST_UNNAMED = 40  # classes without names; more are probably values of a soft mask or of an image
RESAVE = "Save the label maps as PNG with the values of the classes"
NUM_EXAMPLES = 3  # files or pairs of files in a message
_REMEDY_FOR_EMPTY = {
    "labeled": "Label some images.",
    "unlabeled": "Add images without labels, choose a smaller `labeled_fraction`, or train on labels alone: "
    "`method='supervised'`.",
    "validation": "List some labelled images as validation images, or draw them with `labeled_fraction` and "
    "`validation_fraction`.",
}


@dataclass(frozen=True)
class Finding:
    """One error or warning about the data.

    Args:
        kind: Heading of the finding in the report.
        message: The file, the value and the remedy. If several files have the same cause: the messages of the first
            three, one per line, and the number of the others.
        is_warning: Whether the data can be used nevertheless.
        cause: Findings of one kind and one cause become one finding, see [`merge_findings`]. "": the message is the
            cause.
        num_files: Number of files, or pairs of files, that the finding is about.
    """

    kind: str
    message: str
    is_warning: bool = False
    cause: str = ""
    num_files: int = 1


class DataError(UserValueError):
    """A data set cannot be used. The message lists all errors."""


@dataclass(frozen=True)
class Scans:
    """Facts about the files of one set.

    Args:
        images: One entry per image; empty if the set was not checked.
        labels: One entry per image, None for an image without a label map. None if the label maps were not checked.
    """

    images: list[ImageFacts]
    labels: list[LabelFacts | None] | None


def check(
    scans: dict[str, Scans], id2label: dict[int, str], ignore_index: int = IGNORE, needed: Iterable[str] = SPLITS
) -> list[Finding]:
    """Find the errors and warnings of the three sets. There is one finding per file, see [`merge_findings`].

    Args:
        scans: "labeled", "unlabeled" and "validation" -> facts about their files.
        id2label: Class index -> name.
        ignore_index: Value in label files that means "no class", for the messages.
        needed: Sets that must not be empty.
    """
    findings = []
    for split, scan in scans.items():
        if not scan.images and split in needed:
            findings.append(Finding("empty lists", f"There is no {split} image. {_REMEDY_FOR_EMPTY[split]}"))
        findings += _unreadable(scan)
        if scan.labels is not None:
            findings += _missing_labels(split, scan)
            findings += _other_sizes(scan)
            findings += _values(split, scan, id2label, ignore_index)
    findings += _in_two_sets(scans)
    findings += _near_duplicates(scans)
    findings += never_labeled(scans["labeled"], id2label)
    return findings


def merge_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Merge the findings of one kind and one cause into one finding with three examples."""
    groups: dict[tuple, list[Finding]] = {}
    for finding in findings:
        key = (finding.kind, finding.is_warning, finding.cause or finding.message)
        groups.setdefault(key, []).append(finding)
    merged = []
    for first, *others in groups.values():
        lines = [finding.message for finding in (first, *others)[:NUM_EXAMPLES]]
        if len(others) >= NUM_EXAMPLES:
            lines.append(f"... and {len(others) + 1 - NUM_EXAMPLES} more.")
        merged.append(replace(first, message="\n".join(lines), num_files=len(others) + 1) if others else first)
    return merged


def report_findings(findings: Iterable[Finding]) -> str:
    """Return the findings as text, ordered by kind, with at most twenty of each kind."""
    kinds: dict[str, list[Finding]] = {}
    for finding in findings:
        kinds.setdefault(finding.kind, []).append(finding)
    lines = []
    for kind, found in kinds.items():
        lines.append(f"{kind} ({sum(finding.num_files for finding in found)}):")
        lines += [f"  {line}" for finding in found[:MOST_OF_A_KIND] for line in finding.message.split("\n")]
        if len(found) > MOST_OF_A_KIND:
            lines.append(f"  ... and {len(found) - MOST_OF_A_KIND} more.")
    return "\n".join(lines)


def raise_errors(findings: list[Finding]):
    """Raise an error if a finding is not a warning.

    Raises:
        DataError: At least one finding is an error. The message lists all errors.
    """
    errors = [finding for finding in findings if not finding.is_warning]
    if errors:
        number = sum(finding.num_files for finding in errors)
        count = "1 error" if number == 1 else f"{number} errors"
        raise DataError(f"The data cannot be used: {count}.\n{report_findings(errors)}")


def _unreadable(scan: Scans) -> Iterator[Finding]:
    for facts in [*scan.images, *(scan.labels or [])]:
        if facts is not None and facts.error is not None:
            yield unreadable(facts.name, facts.error)


def unreadable(name: str, error: str) -> Finding:
    """Return the finding about a file that cannot be used. The cause is the error without the name and the numbers."""
    return Finding("unreadable files", error, cause=re.sub(r"\d+", "", error.replace(name, "")))


def _missing_labels(split: str, scan: Scans) -> Iterator[Finding]:
    if split == "unlabeled":
        return
    for image, label in zip(scan.images, scan.labels):
        if label is None:
            yield Finding(
                "images without labels",
                f"{image.name} is a {split} image and has no label file. Add one, or remove the image from the list.",
                cause=split,
            )


def _other_sizes(scan: Scans) -> Iterator[Finding]:
    for image, label in zip(scan.images, scan.labels):
        if label is None or image.error or label.error or image.size == label.size:
            continue
        yield Finding(
            "sizes that differ",
            f"{label.name} is {label.size[0]}x{label.size[1]} px, but {image.name} is "
            f"{image.size[0]}x{image.size[1]} px. Each pixel of an image needs one label.",
            cause="sizes",
        )


def _values(split: str, scan: Scans, id2label: dict[int, str], ignore_index: int) -> Iterator[Finding]:
    """Find label values that are not classes, and label maps without any class."""
    present = Counter()
    readable = [facts for facts in scan.labels if facts is not None and facts.error is None]
    for facts in readable:
        present.update(facts.counts)
    outside = {index for index in present if index != IGNORE and index >= len(id2label)}
    remedy = _remedy_for_values(set(present), len(id2label))
    unknown = [value for facts in readable for value, *_ in facts.unknown]
    highest_unknown = max((int(value) for value in unknown if not value.startswith("(")), default=0)  # ( of a colour
    for facts in readable:
        yield from _values_of_file(facts, outside, remedy, len(id2label), ignore_index, highest_unknown)
        if facts.is_lossy:
            message = f"{facts.name} is a JPEG file, and JPEG changes values at the borders of classes. {RESAVE}."
            yield Finding("label maps stored as JPEG", message, is_warning=True, cause="JPEG")
    if split != "unlabeled" and readable and not set(present) - {IGNORE} and not any(f.unknown for f in readable):
        yield Finding(
            "label maps without a class",
            f"No pixel of the {len(readable)} {split} images has a class: all have the value {ignore_index}, which "
            "means 'no class'. Choose another `ignore_index` if the value stands for a class.",
        )
    if ignore_index == IGNORE and len(id2label) <= 2 and set(present) == {0, IGNORE}:
        yield Finding(
            "labels outside the classes",
            f"The {split} label maps hold only 0 and 255, and 255 means 'no class', so there is only one class. If "
            "255 stands for the second class: `label_map={0: 0, 255: 1}` `ignore_index=254`.",
        )


def _values_of_file(
    facts: LabelFacts, outside: set[int], remedy: str, num_labels: int, ignore_index: int, highest_unknown: int
) -> Iterator[Finding]:
    """Find the wrong values of one label map.

    Args:
        facts: Facts about the label map.
        outside: Class indices that are too high.
        remedy: Remedy for these indices, for the message.
        num_labels: Number of classes.
        ignore_index: Value in label files that means "no class".
        highest_unknown: Highest value without a rule in all label maps of the set.
    """
    wrong = sorted(outside & set(facts.counts))
    if wrong:
        listed = ", ".join(f"{index} ({facts.counts[index]} px)" for index in wrong[:MOST_VALUES])
        if len(wrong) > MOST_VALUES:
            listed += f" and {len(wrong) - MOST_VALUES} more"
        remedy = remedy_for_soft_masks([facts], max(outside) if num_labels <= 2 else 0) or remedy
        yield Finding(
            "labels outside the classes",
            f"{facts.name} has the label {listed}, but {num_labels} classes have the labels 0 to {num_labels - 1} and "
            f"{ignore_index} means 'no class'. {remedy}",
            cause=remedy,
        )
    if facts.unknown:
        yield _without_rule(facts, highest_unknown)
    if set(facts.counts) == {IGNORE} and not facts.unknown:
        yield Finding(
            "label maps without a class",
            f"All pixels of {facts.name} have the value {ignore_index}, which means 'no class'. The file is of no use "
            "for training or validation.",
            is_warning=True,
            cause="no class",
        )


def _without_rule(facts: LabelFacts, highest: int) -> Finding:
    """Return the finding about the values of a label map that no rule covers.

    Args:
        facts: Facts about the label map.
        highest: Highest value without a rule in all label maps of the set. 0: they are colours.
    """
    value, pixels, column, row = facts.unknown[0]
    found = f"{value} ({pixels} px, the first at column {column}, row {row})"
    remedy = "Add it to `label_map` or `label_colors`, name it with `ignore_index`, or correct the file."
    if facts.num_unknown > 1:
        found += f" and {facts.num_unknown - 1} other value{'s' * (facts.num_unknown > 2)}"
        remedy = "Add them to `label_map` or `label_colors`, or correct the file."
    remedy = remedy_for_soft_masks([facts], highest) or remedy
    message = f"{facts.name} has the label {found}, which no rule covers. {remedy}"
    return Finding("labels without a rule", message, cause=remedy)


def remedy_for_soft_masks(labels: Iterable[LabelFacts | None], highest: int) -> str:
    """Return why label maps seem to be soft masks or lossy, and how to correct them; "" if none of them seems so.

    Args:
        labels: Facts about label maps. None is skipped.
        highest: Highest value in them. Up to `MOST_UNNAMED`, the values may be class indices, so two ranges of values
            are no remedy.
    """
    labels = [facts for facts in labels if facts is not None]
    if any(facts.is_lossy for facts in labels):
        reason = "JPEG files do not keep the values at the borders of classes."
    elif any(facts.is_soft for facts in labels):
        reason = "The values change gradually at borders, as in a soft mask or in a mask that was stored as JPEG."
    else:
        return ""
    if highest <= MOST_UNNAMED:
        return f"{reason} {RESAVE}."
    top = next((top for top in (255, 65535) if top // 2 < highest <= top), highest)
    middle = top // 2
    return (
        f"{reason} Map ranges of values to classes: `label_map={{'0-{middle}': 0, '{middle + 1}-{top}': 1}}`. Or "
        f"{RESAVE[0].lower()}{RESAVE[1:]}."
    )


def _remedy_for_values(present: set[int], num_labels: int) -> str:
    if max(present - {IGNORE}, default=0) == num_labels:
        return "If the classes are counted from 1 and 0 means 'no class': `reduce_labels=True`."
    return (
        "Name all classes with `class_names`, map the values to classes (`label_map={7: 0, 9: 1}`), or correct the "
        "file."
    )


def _in_two_sets(scans: dict[str, Scans]) -> Iterator[Finding]:
    """Find images that are listed twice, by name or by content, in two sets or in one.

    It is an error if a name is in two sets, or if a validation image has the same bytes as a training image. Other
    cases are warnings.
    """
    names: dict[str, str] = {}
    contents: dict[str, tuple[str, str]] = {}
    for split in SPLITS:
        for facts in scans[split].images:
            if (other := names.get(facts.name)) is not None:
                where = f"twice in {split}" if other == split else f"in both {other} and {split}"
                message = f"{facts.name} is {where}. Remove it from one list."
                yield Finding("images in two places", message, other == split, cause=f"{other} {split}")
            elif facts.digest and facts.digest in contents:
                other, twin = contents[facts.digest]
                message = f"{facts.name} ({split}) has the same bytes as {twin} ({other}). Keep one of them."
                leaks = split == "validation" and other != "validation"
                yield Finding("images in two places", message, not leaks, cause=f"bytes {other} {split}")
            names.setdefault(facts.name, split)
            contents.setdefault(facts.digest, (split, facts.name))


def _near_duplicates(scans: dict[str, Scans]) -> Iterator[Finding]:
    """Find images that are reduced or re-encoded copies of images in another set. There is one finding per cause."""
    labeled, unlabeled, validation = (scans[split].images for split in SPLITS)
    if pairs := _copies(validation, [*labeled, *unlabeled]):
        yield Finding(
            "near-duplicates between sets",
            f"{len(pairs)} of the {len(validation)} validation images seem to show the same as training images, in "
            f"another size or compression: {_examples(pairs)}. The scores of the validation will be too high. Keep "
            "only one file of each image, or keep copies in one set by their common name: `group_regex`.",
            is_warning=True,
        )
    if pairs := _copies(unlabeled, labeled):
        yield Finding(
            "near-duplicates between sets",
            f"{len(pairs)} of the {len(unlabeled)} unlabeled images seem to show the same as labeled images, in "
            f"another size or compression: {_examples(pairs)}. The training will learn little from them. Keep only "
            "one file of each image.",
            is_warning=True,
        )


def _copies(images: list[ImageFacts], others: list[ImageFacts]) -> list[tuple[ImageFacts, ImageFacts]]:
    """Return the images that show the same as another one, with this other one. [`_in_two_sets`] finds equal files."""
    places = find_copies([facts.thumbnail for facts in images], [facts.thumbnail for facts in others])
    pairs = [(facts, others[place]) for facts, place in zip(images, places) if place is not None]
    return [(one, other) for one, other in pairs if one.name != other.name and one.digest != other.digest]


def _examples(pairs: list[tuple[ImageFacts, ImageFacts]]) -> str:
    shown = [f"{one.name} and {other.name}" for one, other in pairs[:NUM_EXAMPLES]]
    return "; ".join([*shown, "..."] if len(pairs) > NUM_EXAMPLES else shown)


def never_labeled(scan: Scans, id2label: dict[int, str]) -> Iterator[Finding]:
    """Find classes that no label map of a set contains."""
    present = {index for facts in scan.labels or () if facts is not None for index in facts.classes}
    for index, name in id2label.items():
        if index not in present and present:
            yield Finding(
                "classes never labelled",
                f"No labelled image contains the class {index}, {name}, so a model cannot learn it. Label an image "
                "that contains it.",
                is_warning=True,
            )
