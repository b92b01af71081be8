"""From what people have to labelled, unlabelled and validation samples: listed, drawn, checked."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .arguments import parse_fraction
from .checks import Finding, Scans, check, raise_errors
from .class_files import ClassDescription, read_classes
from .configuration_co2s import Co2SConfig
from .data import Samples
from .data_arguments import DataArguments, parse_label_map
from .listings import list_samples
from .reading import IGNORE, LabelRule, opened, percentile_scale
from .scan import scan_images, scan_labels
from .splits import SPLITS, Line, draw_labeled, draw_validation, hash_of


NUM_SCALED = 200  # images that percentiles are taken from


@dataclass(frozen=True)
class Source:
    """Labelled, unlabelled and validation samples, what their labels mean, and what was odd about them."""

    labeled: Samples
    unlabeled: Samples  # their labels, where files exist, are never trained on
    validation: Samples
    id2label: dict[int, str]
    palette: list[list[int]] | None
    class_concepts: dict[str, list[str]] | None  # None when nothing names the classes
    scans: dict[str, Scans]
    findings: tuple[Finding, ...]  # warnings; anything worse is raised
    lists: dict[str, list[Line]]  # what --splits_dir would read

    @property
    def hash(self) -> str:
        """Twelve digits that tell the sets apart."""
        return hash_of(self.lists)

    @property
    def labeled_pixels(self) -> np.ndarray:
        """How many pixels each class has in the labelled images, (classes,)."""
        counts = Counter()
        for facts in self.scans["labeled"].labels:
            counts.update(facts.counts)
        return np.array([counts[index] for index in self.id2label])


def open_source(
    args: DataArguments,
    seed: int = 0,
    progress: bool = False,
    with_hidden_labels: bool = False,
    config: Co2SConfig | None = None,
    needed: Sequence[str] = SPLITS,
) -> Source:
    """List, draw and check what the arguments name.

    Every image of the sets that are needed is decoded once, and every label map of the labelled and validation ones;
    what was found is remembered.

    Args:
        args: What to read; one of its sources must be named.
        seed: Of what is drawn.
        progress: Show a bar while files are looked at.
        with_hidden_labels: Also check the label maps of unlabelled images, where they have any.
        config: Of the trained model that the data is for: it reads bands as in its training, unless told otherwise,
            and knows the classes where the data does not name them.
        needed: Sets that must not be empty, and are looked into.

    Raises:
        FileNotFoundError: A folder or a list is missing.
        DataError: Files cannot be used; lists them all.
        ValueError: The arguments do not fit the data.
    """
    args.check_data()
    listing = list_samples(args)
    description = listing.description if args.label_colors is None else read_classes(Path(args.label_colors))
    rules = {"image_rule": args.image_rule(config), "label_rule": _label_rule(args, listing.label_rule, description)}
    sets = {name: replace(samples, **rules) for name, samples in listing.sets.items()}
    if listing.pool is not None:
        sets = _draw(replace(listing.pool, **rules), listing.root, sets, args, seed, progress)
    sets = {name: sets.get(name, Samples.of_files([], [], **rules)) for name in SPLITS}
    if args.scale == ["percentiles"]:
        sets = _with_percentiles(sets)
    labels_read = {"labeled", "validation", *(["unlabeled"] if with_hidden_labels else [])}
    scans = {
        name: Scans(
            scan_images(samples, progress) if name in needed else [],
            scan_labels(samples, progress) if name in labels_read.intersection(needed) else None,
        )
        for name, samples in sets.items()
    }
    if names := _given_names(args):
        description = description.renamed(names)
    if not description.classes:
        names = _counted_classes(scans) if config is None else list(config.id2label.values())
    id2label = dict(enumerate(description.names or names))
    findings = [*listing.findings, *check(scans, id2label, rules["label_rule"].ignore_index, needed)]
    if args.dataset is not None:  # the paper's lists are what they are
        findings = [replace(f, is_warning=True) if f.kind == "images in two places" else f for f in findings]
    raise_errors(findings)
    return Source(
        **sets,
        id2label=id2label,
        palette=description.palette or _embedded_palette(sets["labeled"], len(id2label)),
        class_concepts=description.concepts,
        scans=scans,
        findings=tuple(findings),
        lists={name: _lines_of(sets[name], listing.root) for name in SPLITS},
    )


def _label_rule(args: DataArguments, default: LabelRule, description: ClassDescription) -> LabelRule:
    """What the arguments say of label values, or else what the source itself does."""
    if args.ignore_index == IGNORE and not (args.reduce_labels or args.label_map or args.label_colors):
        return default
    colors = None
    if args.label_colors is not None:
        if description.palette is None:
            raise ValueError(f"{args.label_colors} must give every class a color, such as [0, 0, 255].")
        colors = tuple(map(tuple, description.palette))
    return LabelRule(
        ignore_index=args.ignore_index,
        reduce_labels=args.reduce_labels,
        label_map=parse_label_map(args.label_map),
        colors=colors,
        ignore_colors=description.ignore_colors if colors else (),
    )


def _with_percentiles(sets: dict[str, Samples]) -> dict[str, Samples]:
    """One range for all images, from those of training."""
    training = sets["labeled"] + sets["unlabeled"]
    places = np.linspace(0, len(training) - 1, min(len(training), NUM_SCALED)).astype(int).tolist()
    rule = training.image_rule
    rule = replace(rule, scale=percentile_scale((training[place].image for place in places), rule.bands))
    return {name: replace(samples, image_rule=rule) for name, samples in sets.items()}


def _draw(
    pool: Samples, root: str, settled: dict[str, Samples], args: DataArguments, seed: int, progress: bool
) -> dict[str, Samples]:
    """The sets that are not settled, drawn from a pool."""
    labels = scan_labels(pool, progress)
    known = [place for place, facts in enumerate(labels) if facts is not None]
    without = [place for place, facts in enumerate(labels) if facts is None]
    classes = [labels[place].classes for place in known]
    sets = dict(settled)
    if "validation" not in sets and known:
        groups = _groups(pool, root, args.group_regex)
        mine = [groups[place] for place in known]
        held_out, others = draw_validation(classes, mine, parse_fraction(args.validation_fraction), seed)
        sets["validation"] = pool.select([known[place] for place in held_out])
        taken = {mine[place] for place in held_out}
        without = [place for place in without if groups[place] not in taken]  # nor do neighbours without labels train
        known, classes = [known[place] for place in others], [classes[place] for place in others]
    if not known:
        raise ValueError(
            f"Of {len(pool)} images, {len(pool) - len(without)} have a label map: too few to train and to validate. "
            "Add labels (files of the same name below labels/)."
        )
    fraction = 1.0 if args.labeled_fraction is None else parse_fraction(args.labeled_fraction)
    labeled, others = draw_labeled(classes, fraction, seed)
    unlabeled = pool.select([*(known[place] for place in others), *without])
    sets["labeled"] = pool.select([known[place] for place in labeled])
    sets["unlabeled"] = sets["unlabeled"] + unlabeled if "unlabeled" in sets else unlabeled
    return sets


def _groups(pool: Samples, root: str, regex: str | None) -> list[str]:
    """What each image's name, below images/, says of its neighbourhood; the name itself where it says nothing.

    Raises:
        ValueError: It says something of none.
    """
    paths = [path.removeprefix(root).lstrip("/").removeprefix("images/") for path in pool.paths]
    names = [path or str(place) for place, path in enumerate(paths)]
    if regex is None:
        return names
    matches = [re.search(regex, path) for path in paths]
    if not any(matches):
        raise ValueError(f"--group_regex '{regex}' matches no image's name, such as '{names[0]}'.")
    return [name if match is None else match[match.lastindex or 0] for name, match in zip(names, matches)]


def _given_names(args: DataArguments) -> list[str]:
    """The names of --class_names, perhaps from a file; none where it is left out."""
    names = args.class_names or []
    if len(names) == 1 and Path(names[0]).is_file():
        names = [line.strip() for line in Path(names[0]).read_text().splitlines() if line.strip()]
    if len(set(names)) != len(names):
        raise ValueError(f"--class_names names a class twice: {' '.join(names)}.")
    return names


def _counted_classes(scans: dict[str, Scans]) -> list[str]:
    """Names for as many classes as the highest label asks for.

    Raises:
        ValueError: Most labels in between occur nowhere, so they hardly count classes.
    """
    facts = [facts for name in ("labeled", "validation") for facts in scans[name].labels or () if facts is not None]
    present = {index for found in facts for index in found.classes}
    highest = max(present, default=-1)
    missing = sorted(set(range(highest)) - present)
    if len(missing) > len(present):
        held, gaps = (", ".join(map(str, indices)) for indices in (sorted(present), missing[:5]))
        raise ValueError(
            f"The label maps hold {held}, but not {gaps}. If they count classes, name all of them with --class_names; "
            f"else say what they mean with --label_map {highest}=1."
        )
    return [f"class_{index}" for index in range(highest + 1)]


def _embedded_palette(labeled: Samples, num_labels: int) -> list[list[int]] | None:
    """The colours of a label file with a palette, which it carries for viewing."""
    if not labeled or labeled.label_rule != LabelRule():  # with another rule its indices are not the classes'
        return None
    with opened(labeled[0].label) as label:
        colors = label.getpalette()
    if colors is None or len(colors) < 3 * num_labels:
        return None
    return [colors[3 * index : 3 * index + 3] for index in range(num_labels)]


def _lines_of(samples: Samples, root: str) -> list[Line]:
    """What a list of these samples says; rows of a data set have names only."""
    if not root:
        return [(name, None) for name in samples.names]
    images, labels = samples.files("image"), samples.files("label")
    return [tuple(file and file.path.removeprefix(f"{root}/") for file in pair) for pair in zip(images, labels)]
