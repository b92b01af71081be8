"""What is wrong with a data set, found before training starts, all of it at once, with the remedy."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .reading import IGNORE
from .scan import ImageFacts, LabelFacts
from .splits import SPLITS


MOST_OF_A_KIND = 20
_REMEDY_FOR_EMPTY = {
    "labeled": "Label some images.",
    "unlabeled": "Add images without labels, choose a smaller --labeled_fraction, or train with --method supervised.",
    "validation": "Set some labelled images apart, or draw them with --labeled_fraction and --validation_fraction.",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (or, as a warning, odd): its kind, and a message with file, value and remedy."""

    kind: str
    message: str
    is_warning: bool = False


class DataError(ValueError):
    """A data set cannot be trained on; the message lists every finding."""


@dataclass(frozen=True)
class Scans:
    """What was found in the files of one set. Labels are None where they were not looked at."""

    images: list[ImageFacts]
    labels: list[LabelFacts | None] | None


def check(
    scans: dict[str, Scans], id2label: dict[int, str], ignore_index: int = IGNORE, needed: Iterable[str] = SPLITS
) -> list[Finding]:
    """Everything that is wrong with the sets.

    Args:
        scans: "labeled", "unlabeled" and "validation" -> what is in their files.
        id2label: The classes.
        ignore_index: Value in the files that means "no class", for the messages.
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
    findings += _never_labeled(scans["labeled"], id2label)
    return findings


def report_findings(findings: Iterable[Finding]) -> str:
    """The findings by kind, at most twenty of each."""
    kinds: dict[str, list[Finding]] = {}
    for finding in findings:
        kinds.setdefault(finding.kind, []).append(finding)
    lines = []
    for kind, found in kinds.items():
        lines.append(f"{kind} ({len(found)}):")
        lines += [f"  {finding.message}" for finding in found[:MOST_OF_A_KIND]]
        if len(found) > MOST_OF_A_KIND:
            lines.append(f"  ... and {len(found) - MOST_OF_A_KIND} more.")
    return "\n".join(lines)


def raise_errors(findings: list[Finding]):
    """Stop if any finding is more than a warning.

    Raises:
        DataError: With all of them.
    """
    errors = [finding for finding in findings if not finding.is_warning]
    if errors:
        raise DataError(f"The data cannot be used: {len(errors)} findings.\n{report_findings(errors)}")


def _unreadable(scan: Scans) -> Iterator[Finding]:
    for facts in [*scan.images, *(scan.labels or [])]:
        if facts is not None and facts.error is not None:
            yield Finding("unreadable files", facts.error)


def _missing_labels(split: str, scan: Scans) -> Iterator[Finding]:
    if split == "unlabeled":
        return
    for image, label in zip(scan.images, scan.labels):
        if label is None:
            yield Finding(
                "images without labels",
                f"{image.name} is a {split} image and has no label file. Add one, or take it off the list.",
            )


def _other_sizes(scan: Scans) -> Iterator[Finding]:
    for image, label in zip(scan.images, scan.labels):
        if label is None or image.error or label.error or image.size == label.size:
            continue
        yield Finding(
            "sizes that differ",
            f"{label.name} is {label.size[0]}x{label.size[1]} px, but {image.name} is "
            f"{image.size[0]}x{image.size[1]} px. Each pixel of an image needs one label.",
        )


def _values(split: str, scan: Scans, id2label: dict[int, str], ignore_index: int) -> Iterator[Finding]:
    """Label values that are no class, and maps without any."""
    present = Counter()
    readable = [facts for facts in scan.labels if facts is not None and facts.error is None]
    for facts in readable:
        present.update(facts.counts)
    beyond = {index for index in present if index != IGNORE and index >= len(id2label)}
    remedy = _remedy_for_values(set(present), len(id2label))
    for facts in readable:
        wrong = {str(index): facts.counts[index] for index in sorted(beyond & set(facts.counts))}
        if wrong:
            listed = ", ".join(f"{index} ({pixels} px)" for index, pixels in wrong.items())
            yield Finding(
                "labels outside the classes",
                f"{facts.name} has the label {listed}, but {len(id2label)} classes have the labels 0 to "
                f"{len(id2label) - 1} and {ignore_index} means 'no class'. {remedy}",
            )
        for value, pixels, column, row in facts.unknown:
            yield Finding(
                "labels without a rule",
                f"{facts.name} has the label {value} ({pixels} px, the first at column {column}, row {row}), which no "
                "rule covers. Add it to --label_map or --label_colors, pass it as --ignore_index, or correct it.",
            )
        if set(facts.counts) == {IGNORE} and not facts.unknown:
            yield Finding(
                "label maps without a class",
                f"{facts.name} says 'no class' ({ignore_index}) everywhere: nothing to learn or to measure there.",
                is_warning=True,
            )
    if split != "unlabeled" and readable and not set(present) - {IGNORE} and not any(f.unknown for f in readable):
        yield Finding(
            "label maps without a class",
            f"No pixel of the {len(readable)} {split} images has a class: all are {ignore_index}, the ignore value. "
            "Pass another --ignore_index if it stands for a class.",
        )
    if ignore_index == IGNORE and len(id2label) <= 2 and set(present) == {0, IGNORE}:
        yield Finding(
            "labels outside the classes",
            f"The {split} label maps hold 0 and 255 alone, and 255 means 'no class': there is one class to learn. If "
            "255 stands for the second, pass --label_map 0=0,255=1 --ignore_index 254.",
        )


def _remedy_for_values(present: set[int], num_labels: int) -> str:
    if max(present - {IGNORE}, default=0) == num_labels:
        return "If the classes are counted from 1 and 0 means 'no class', pass --reduce_labels."
    return "Name all classes (--class_names), translate values (--label_map 7=0,9=1), or correct the file."


def _in_two_sets(scans: dict[str, Scans]) -> Iterator[Finding]:
    """Images in more than one set, by name or by content, and those that come twice in one."""
    names: dict[str, str] = {}
    contents: dict[str, tuple[str, str]] = {}
    for split in SPLITS:
        for facts in scans[split].images:
            if (other := names.get(facts.name)) is not None:
                where = f"twice in {split}" if other == split else f"both {other} and {split}"
                message = f"{facts.name} is {where}. Take it off one list."
                yield Finding("images in two places", message, is_warning=other == split)
            elif facts.digest and facts.digest in contents:
                other, twin = contents[facts.digest]
                message = f"{facts.name} ({split}) has the same bytes as {twin} ({other}). Keep one of them."
                leaks = split == "validation" and other != "validation"
                yield Finding("images in two places", message, is_warning=not leaks)
            names.setdefault(facts.name, split)
            contents.setdefault(facts.digest, (split, facts.name))


def _never_labeled(scan: Scans, id2label: dict[int, str]) -> Iterator[Finding]:
    present = {index for facts in scan.labels or () if facts is not None for index in facts.classes}
    for index, name in id2label.items():
        if index not in present and present:
            yield Finding(
                "classes never labelled",
                f"No labelled image shows the class {index}, {name}: it cannot be learnt. Label an image with it.",
                is_warning=True,
            )
