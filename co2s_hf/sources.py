"""From what people have to labelled, unlabelled and validation samples: listed, drawn, checked."""

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .arguments import parse_fraction
from .checks import Finding, Scans, check, raise_errors
from .configuration_co2s import Co2SConfig
from .data import Samples
from .data_arguments import DataArguments, parse_label_map
from .listings import list_samples, read_classes
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
) -> Source:
    """List, draw and check what the arguments name.

    Every image is decoded once, and every label map of the labelled and validation sets; what was found is remembered.

    Args:
        args: What to read; one of its sources must be named.
        seed: Of what is drawn.
        progress: Show a bar while files are looked at.
        with_hidden_labels: Also check the label maps of unlabelled images, to measure pseudo-labels with them.
        config: Of the trained model that the data is for: it reads bands as in its training, unless told otherwise,
            and knows the classes where the data does not name them.

    Raises:
        FileNotFoundError: A folder or a list is missing.
        DataError: Files cannot be used; lists them all.
        ValueError: The arguments do not fit the data.
    """
    args.check_data()
    listing = list_samples(args)
    rules = {"image_rule": args.image_rule(config), "label_rule": _label_rule(args, listing.label_rule)}
    sets = {name: replace(samples, **rules) for name, samples in listing.sets.items()}
    if listing.pool is not None:
        pool = replace(listing.pool, **rules)
        sets = _draw(pool, [name.removeprefix(listing.root) for name in pool.names], sets, args, seed, progress)
    if args.scale == ["percentiles"]:
        sets = _with_percentiles(sets)
    scans = {
        name: Scans(
            scan_images(sets[name], progress),
            scan_labels(sets[name], progress) if name != "unlabeled" or with_hidden_labels else None,
        )
        for name in SPLITS
    }
    hidden = scans["unlabeled"].labels
    if hidden is not None and not any(hidden):
        raise ValueError(f"None of the {len(hidden)} unlabelled images has a label map to measure pseudo-labels with.")
    entries = _class_entries(args, listing.classes)
    names = [entry["name"] for entry in entries]
    if not names:
        names = _counted_classes(scans) if config is None else list(config.id2label.values())
    id2label = dict(enumerate(names))
    findings = [*listing.findings, *check(scans, id2label, args.ignore_index)]
    if args.dataset is not None:  # the paper's lists are what they are
        findings = [replace(f, is_warning=True) if f.kind == "images in two places" else f for f in findings]
    raise_errors(findings)
    palette = [list(entry["color"]) for entry in entries if "color" in entry]
    if len(palette) != len(names):
        palette = _embedded_palette(sets["labeled"], len(names))
    concepts = {entry["name"]: entry.get("concepts") or [entry["name"].replace("_", " ")] for entry in entries}
    lists = {name: _lines_of(sets[name], listing.root) for name in SPLITS}
    return Source(**sets, id2label=id2label, palette=palette, class_concepts=concepts or None, scans=scans,
                  findings=tuple(findings), lists=lists)  # fmt: skip


def _label_rule(args: DataArguments, default: LabelRule) -> LabelRule:
    """What the arguments say of label values, or else what the source itself does."""
    if args.ignore_index == IGNORE and not (args.reduce_labels or args.label_map or args.label_colors):
        return default
    colors = read_classes(Path(args.label_colors)) if args.label_colors else []
    if any("color" not in entry for entry in colors):
        raise ValueError(f"{args.label_colors} must give every class a color, such as [0, 0, 255].")
    return LabelRule(
        ignore_index=args.ignore_index,
        reduce_labels=args.reduce_labels,
        label_map=parse_label_map(args.label_map),
        colors=tuple(tuple(entry["color"]) for entry in colors if not entry.get("ignore")) or None,
        ignore_colors=tuple(tuple(entry["color"]) for entry in colors if entry.get("ignore")),
    )


def _with_percentiles(sets: dict[str, Samples]) -> dict[str, Samples]:
    """One range for all images, from those of training."""
    files = [*sets["labeled"].files("image"), *sets["unlabeled"].files("image")]
    some = [files[place] for place in np.linspace(0, len(files) - 1, min(len(files), NUM_SCALED)).astype(int)]
    rule = sets["labeled"].image_rule
    rule = replace(rule, scale=percentile_scale(some, rule.bands))
    return {name: replace(samples, image_rule=rule) for name, samples in sets.items()}


def _draw(
    pool: Samples, names: list[str], settled: dict[str, Samples], args: DataArguments, seed: int, progress: bool
) -> dict[str, Samples]:
    """Labelled, unlabelled and, unless it is settled, validation samples, drawn from a pool."""
    labels = scan_labels(pool, progress)
    known = [place for place, facts in enumerate(labels) if facts is not None]
    without = [place for place, facts in enumerate(labels) if facts is None]
    classes = [labels[place].classes for place in known]
    sets = dict(settled)
    if "validation" not in sets:
        groups = [_group(names[place], args.group_regex) for place in known]
        held_out, others = draw_validation(classes, groups, parse_fraction(args.validation_fraction), seed)
        sets["validation"] = pool.select([known[place] for place in held_out])
        if args.group_regex is not None:  # nor do neighbours without labels train
            taken = {groups[place] for place in held_out}
            without = [place for place in without if _group(names[place], args.group_regex) not in taken]
        known, classes = [known[place] for place in others], [classes[place] for place in others]
    if not known:
        raise ValueError(
            f"Of {len(pool)} images, {len(pool) - len(without)} have a label map: too few to train and to validate. "
            "Add labels (files of the same name below labels/)."
        )
    fraction = 1.0 if args.labeled_fraction is None else parse_fraction(args.labeled_fraction)
    labeled, others = draw_labeled(classes, fraction, seed)
    unlabeled = [*(known[place] for place in others), *without]
    if not unlabeled:
        raise ValueError(
            "Every training image would be labelled, none unlabelled. Add images without labels, or choose a smaller "
            "--labeled_fraction."
        )
    return sets | {"labeled": pool.select([known[place] for place in labeled]), "unlabeled": pool.select(unlabeled)}


def _group(name: str, regex: str | None) -> str:
    """What a name says of its neighbourhood; itself where it says nothing."""
    match = re.search(regex, name) if regex is not None else None
    return name if match is None else match[0]


def _class_entries(args: DataArguments, entries: list[dict]) -> list[dict]:
    """What is known of every class, in label order; nothing where nothing names them."""
    if args.label_colors is not None:
        entries = [entry for entry in read_classes(Path(args.label_colors)) if not entry.get("ignore")]
    if args.class_names is None:
        return entries
    names = args.class_names
    if len(names) == 1 and Path(names[0]).is_file():
        names = [line.strip() for line in Path(names[0]).read_text().splitlines() if line.strip()]
    if len(set(names)) != len(names):
        raise ValueError(f"--class_names names a class twice: {' '.join(names)}.")
    described = {entry["name"]: entry for entry in entries}
    return [described.get(name, {"name": name}) for name in names]


def _counted_classes(scans: dict[str, Scans]) -> list[str]:
    """Names for as many classes as the highest label asks for."""
    facts = [facts for name in ("labeled", "validation") for facts in scans[name].labels if facts is not None]
    highest = max((index for found in facts for index in found.classes), default=-1)
    return [f"class_{index}" for index in range(highest + 1)]


def _embedded_palette(labeled: Samples, num_labels: int) -> list[list[int]] | None:
    """The colours of a label file with a palette, which it carries for viewing."""
    rule = labeled.label_rule
    if rule != LabelRule():  # its indices are not the classes'
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
