"""Open a data source: list its images, draw the missing sets, check all files."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..model.configuration_co2s import Co2SConfig
from ..utils.errors import UserValueError
from .block_sets import BlockCut, BlockSets, choose_block_px, draw_block_sets
from .deepness import TILES_KIND, TileGrid, without_overlap
from .listings import CLASSES_FILE, ClassDescription, Listing, list_samples, read_classes
from .options import PERCENTILES_SCALE, DataOptions, label_ranges
from .reading import ImageRule, LabelRule, open_image
from .samples import Samples
from .splits import SPLITS, Line, draw_labeled, draw_validation, hash_labels, hash_lists
from .validation.checks import (
    MOST_UNNAMED,
    Finding,
    Scans,
    check,
    merge_findings,
    raise_errors,
    remedy_for_soft_masks,
)
from .validation.scan import LabelFacts, scan_images, scan_labels


@dataclass(frozen=True)
class Source:
    """The three sets of a data source, the meaning of their labels, and the result of the checks.

    Args:
        labeled: Training images with labels.
        unlabeled: Training images without labels. They may have label files, but these are never trained on.
        validation: Images with labels for evaluation.
        id2label: Class index -> name.
        palette: RGB colour of each class, or None if they are not known.
        class_concepts: Texts for the text embedding of each class, or None if the classes have no names.
        scans: "labeled", "unlabeled" and "validation" -> facts about their files.
        findings: Warnings. Errors are raised by [`open_source`].
        lists: The sets as lists that `splits_dir` can read.
        read_rule: Rule by which raw image files are read. The samples have the same one, unless they are blocks, or
            were converted before: see `converted_from` of [`ClassDescription`].
        block_px: Side in pixels of the blocks, if the samples are blocks of the original images. None: they are
            images.
        ground_sampling_distance_m: Height and width of a pixel on the ground, in metres. None: unknown.
    """

    labeled: Samples
    unlabeled: Samples
    validation: Samples
    id2label: dict[int, str]
    palette: list[list[int]] | None
    class_concepts: dict[str, list[str]] | None
    scans: dict[str, Scans]
    findings: tuple[Finding, ...]
    lists: dict[str, list[Line]]
    read_rule: ImageRule
    block_px: int | None = None
    ground_sampling_distance_m: float | None = None

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits that identify the three sets."""
        return hash_lists(self.lists)

    @property
    def label_hash(self) -> str:
        """Twelve hexadecimal digits that identify the names of the label files of labelled and validation images."""
        return hash_labels(self.lists)

    @property
    def labeled_pixels(self) -> np.ndarray:
        """Number of pixels of each class in the labelled images, (classes,)."""
        counts = Counter()
        for facts in self.scans["labeled"].labels:
            counts.update(facts.counts)
        return np.array([counts[index] for index in self.id2label])

    @property
    def labeled_share(self) -> np.ndarray:
        """Share of each class in the labelled pixels, (classes,), 0 to 1."""
        pixels = self.labeled_pixels
        return pixels / max(pixels.sum(), 1)


def open_source(
    options: DataOptions,
    seed: int = 0,
    progress: bool = False,
    with_hidden_labels: bool = False,
    config: Co2SConfig | None = None,
    needed: Sequence[str] = SPLITS,
    with_labels: bool = True,
    may_be_empty: Collection[str] = (),
    listing: Listing | None = None,
    cut: BlockCut | None = None,
) -> Source:
    """List, draw and check the sets of a data source.

    Every image of the needed sets is decoded once. Label maps are also decoded, except those of unlabelled images. The
    results are cached.

    Args:
        options: Options of the data. If they name no source, the real images of this package are opened.
        seed: Seed for drawing the sets.
        progress: Show a progress bar while files are checked.
        with_hidden_labels: Also check the label maps of unlabelled images, if there are any.
        config: Configuration of the trained model that will read the data. Its bands and scale are used unless
            `options` has some, or the images were converted already. Its class names are used if the data has none,
            and a warning says so. See [`_names_of_model`].
        needed: Sets that must not be empty. Only files of these sets are checked.
        with_labels: Check the label maps of labelled and validation images. False: the images are only predicted.
        may_be_empty: Needed sets that may be empty nevertheless.
        listing: What [`list_samples`] returned, if it was called before.
        cut: How to cut images into blocks when sets are drawn. The samples are then blocks. None: an image is in one
            set as a whole.

    Raises:
        UserFileNotFoundError: A folder or a list is missing.
        UserOSError: Something cannot be downloaded.
        DataError: Files cannot be used. The message lists all of them.
        UserValueError: The options do not fit the data.
    """
    options = replace(options)
    options.fill()
    listing = list_samples(options) if listing is None else listing
    facts = listing.description
    description = facts if options.label_colors is None else read_classes(Path(options.label_colors))
    rules = {
        "image_rule": _image_rule(options, config, facts.converted_from),
        "label_rule": _label_rule(options, listing.label_rule, description),
    }
    listing = listing.with_rules(**rules)
    blocks = _block_sets(listing, options, seed, progress, cut)
    if blocks is None:
        sets, root = _sets_of_images(listing, options, seed, progress, rules), listing.root
    else:
        sets, root = blocks.sets, str(cut.folder)
    label_sets = ["labeled", "validation"] if with_labels else []
    label_sets += ["unlabeled"] if with_hidden_labels else []
    scans = _scan(sets, needed, label_sets, progress, {} if blocks is None else blocks.origins)
    if options.class_names:
        description = description.renamed(options.class_names)
    names, doubts = description.names, []
    if not names:
        names, doubts = (_count_classes(scans), []) if config is None else _names_of_model(config, sets, scans)
    id2label = dict(enumerate(names))
    required = [name for name in needed if name not in may_be_empty]
    doubts = [*_left_out(listing, sets), *doubts] if blocks is None else doubts
    findings = [*listing.findings, *doubts, *check(scans, id2label, rules["label_rule"].ignore_index, required)]
    findings = merge_findings(findings)
    if options.dataset is not None:  # the paper's lists are used as they are
        findings = [replace(f, is_warning=True) if f.kind == "images in two places" else f for f in findings]
    raise_errors(findings)
    return Source(
        **sets,
        id2label=id2label,
        palette=description.palette or _embedded_palette(sets, scans, len(id2label)),
        class_concepts=description.concepts,
        scans=scans,
        findings=tuple(findings),
        lists={name: _lines_of(sets[name], root) for name in SPLITS},
        read_rule=facts.converted_from or (sets["labeled"].image_rule if blocks is None else blocks.read_rule),
        block_px=None if blocks is None else blocks.block_px,
        ground_sampling_distance_m=facts.ground_sampling_distance_m,
    )


def _block_sets(
    listing: Listing, options: DataOptions, seed: int, progress: bool, cut: BlockCut | None
) -> BlockSets | None:
    """Return the sets if they are drawn in blocks."""
    if cut is not None and listing.is_tiled:
        if cut.block_px is not None:
            raise UserValueError(
                f"`block_px` is {cut.block_px}, but '{listing.root}' has tiles of Deepness, which may overlap. Their "
                "sets are drawn in blocks of neighbouring tiles. Leave `block_px` out."
            )
        return None
    block_px = None if cut is None else choose_block_px(cut, listing.pool, listing.sets, options)
    if block_px is None:
        return None
    return draw_block_sets(cut, block_px, listing.pool, listing.sets, options, seed, progress)


def _sets_of_images(
    listing: Listing, options: DataOptions, seed: int, progress: bool, rules: dict
) -> dict[str, Samples]:
    """Return the sets of whole images. Missing sets are drawn; they are empty if nothing can be drawn."""
    sets = listing.sets
    if listing.pool is not None:
        sets = _draw(listing, options, seed, progress)
    sets = {name: sets.get(name, Samples.of_files([], [], **rules)) for name in SPLITS}
    if options.scale == PERCENTILES_SCALE:
        rule = (sets["labeled"] + sets["unlabeled"]).percentile_rule()
        sets = {name: replace(samples, image_rule=rule) for name, samples in sets.items()}
    return sets


def image_rule(options: DataOptions, config: Co2SConfig | None = None) -> ImageRule:
    """Return the rule for images: that of the options, or that of a trained model if the options have none.

    `scale="percentiles"` gives a rule without a scale. [`open_source`] computes the scale from the images.
    """
    if config is not None and options.bands is None and options.scale is None:
        return ImageRule.of_config(config)
    rule = ImageRule.of_options(options.bands, options.scale)
    return replace(rule, scale=None) if options.scale == PERCENTILES_SCALE else rule


def _image_rule(options: DataOptions, config: Co2SConfig | None, converted: ImageRule | None) -> ImageRule:
    """Return the rule for the images of a source. Images that were converted already are read without a rule.

    Raises:
        UserValueError: The images were converted already, and the options have bands or a scale.
    """
    if converted is None:
        return image_rule(options, config)
    for name in ("bands", "scale"):
        if getattr(options, name) is not None:
            raise UserValueError(
                f"`{name}` is {getattr(options, name)}, but {options.dataset_name or options.folder} has images that "
                f"were converted to RGB already, says {CLASSES_FILE}. Leave `{name}` out. A model that is trained on "
                "these images reads raw files by the bands and the scale of that conversion."
            )
    return ImageRule()


def _label_rule(options: DataOptions, default: LabelRule, description: ClassDescription) -> LabelRule:
    """Return the rule for label values: that of the options, or that of the source if the options have none."""
    if not options.has_label_rule:
        return default
    colors = None
    if options.label_colors is not None:
        if description.palette is None:
            raise UserValueError(
                f"`label_colors` is '{options.label_colors}', which does not give a color to every class. Add the "
                "missing colors, such as [0, 0, 255]."
            )
        colors = tuple(map(tuple, description.palette))
    return LabelRule(
        ignore_index=options.ignore_index,
        reduce_labels=options.reduce_labels,
        label_map=None if options.label_map is None else tuple(label_ranges(options.label_map)),
        colors=colors,
        ignore_colors=description.ignore_colors if colors else (),
    )


def _scan(
    sets: dict[str, Samples],
    needed: Collection[str],
    label_sets: Collection[str],
    progress: bool,
    origins: dict[str, str],
) -> dict[str, Scans]:
    """Decode the images of the needed sets, and the label maps of those that are also in `label_sets`.

    `origins` has the names of files for messages, if they are not the names of the files themselves.
    """

    def named(scanned: list) -> list:
        return [facts and replace(facts, name=origins.get(facts.name, facts.name)) for facts in scanned]

    return {
        name: Scans(
            named(scan_images(samples, progress)) if name in needed else [],
            named(scan_labels(samples, progress)) if name in needed and name in label_sets else None,
        )
        for name, samples in sets.items()
    }


def _draw(listing: Listing, options: DataOptions, seed: int, progress: bool) -> dict[str, Samples]:
    """Draw the missing sets from the pool of a listing.

    Samples without a label map become unlabelled images. They are dropped if their group is in the validation set, and
    if they are tiles that overlap a validation tile.

    Args:
        listing: The pool, and the sets that already exist.
        options: Options of the data.
        seed: Seed of the draw.
        progress: Show a progress bar while label maps are read.
    """
    pool, settled = listing.pool, listing.sets
    if listing.is_tiled and "validation" in settled:
        pool = without_overlap(pool, settled["validation"])
    labels = scan_labels(pool, progress)
    known = [place for place, facts in enumerate(labels) if facts is not None]
    without = [place for place, facts in enumerate(labels) if facts is None]
    classes = [labels[place].classes for place in known]
    sets = dict(settled)
    if "validation" not in sets and known:
        grid = TileGrid(pool) if listing.is_tiled else None
        if grid is None or options.group_regex is not None:
            groups = _groups(pool, listing.root, options.group_regex)
        else:
            groups = grid.blocks(options.validation_fraction)
        known_groups = [groups[place] for place in known]
        overlapping = None if grid is None else grid.overlapping_among(known)
        fraction = options.validation_fraction
        held_out, others = draw_validation(classes, known_groups, fraction, seed, overlapping=overlapping)
        sets["validation"] = pool.select([known[place] for place in held_out])
        taken = {known_groups[place] for place in held_out}
        without = [place for place in without if groups[place] not in taken]
        if grid is not None:
            lost = {other for place in held_out for other in grid.overlapping(known[place])}
            without = [place for place in without if place not in lost]
        known, classes = [known[place] for place in others], [classes[place] for place in others]
    if not known:
        remedy = "Add label maps: files of the same name in labels/, or cells of the label column."
        if listing.is_tiled:
            remedy = "Tiles that overlap validation tiles cannot be used. Export a larger area, or with less overlap."
        raise UserValueError(
            f"Of {len(pool)} images, {len(pool) - labels.count(None)} have a label map: too few to train and to "
            f"validate. {remedy}"
        )
    fraction = 1.0 if options.labeled_fraction is None else options.labeled_fraction
    labeled, others = draw_labeled(classes, fraction, seed)
    unlabeled = pool.select([*(known[place] for place in others), *without])
    sets["labeled"] = pool.select([known[place] for place in labeled])
    sets["unlabeled"] = sets["unlabeled"] + unlabeled if "unlabeled" in sets else unlabeled
    return sets


def _left_out(listing: Listing, sets: dict[str, Samples]) -> list[Finding]:
    """Return a warning if tiles of a pool are in no set."""
    number = sum(map(len, listing.sets.values())) - sum(map(len, sets.values()))
    number += 0 if listing.pool is None else len(listing.pool)
    if not listing.is_tiled or not number:
        return []
    found = "1 tile is in no set: it overlaps" if number == 1 else f"{number} tiles are in no set: they overlap"
    message = f"{found} validation tiles."
    return [Finding(TILES_KIND, message, is_warning=True)]


def _groups(pool: Samples, root: str, regex: str | None) -> list[str]:
    """Return the group of each image.

    The group is the part of the path below images/ that the regular expression matches. If the regular expression has
    capturing groups, the last one that took part in the match is used. An image that does not match is a group of its
    own. Without a regular expression, every image is a group of its own.

    Raises:
        UserValueError: The regular expression matches no image.
    """
    paths = [path.removeprefix(root).lstrip("/").removeprefix("images/") for path in pool.paths]
    names = [path or str(place) for place, path in enumerate(paths)]
    if regex is None:
        return names
    matches = [re.search(regex, path) for path in paths]
    if not any(matches):
        raise UserValueError(f"`group_regex` is '{regex}', which matches no image name, such as '{names[0]}'.")
    return [name if match is None else match[match.lastindex or 0] for name, match in zip(names, matches)]


def _count_classes(scans: dict[str, Scans]) -> list[str]:
    """Return the names class_0, class_1 ... up to the highest label.

    Raises:
        UserValueError: More labels are missing than present, or there are more than `MOST_UNNAMED` classes. So the
            values are probably not class indices.
    """
    labels = [facts for name in ("labeled", "validation") for facts in scans[name].labels or () if facts is not None]
    present = _present(labels)
    highest = max(present, default=-1)
    missing = sorted(set(range(highest)) - present)
    name_them = "If these are class indices, name all classes in classes.json or with `class_names`."
    map_them = f"Otherwise map every value to a class: `label_map={{{highest}: 1}}`."
    if len(missing) > len(present) and len(present) <= MOST_UNNAMED:
        held, gaps = (_listed(indices) for indices in (sorted(present), missing[:5]))
        remedy = remedy_for_soft_masks(labels, highest) or f"{name_them} {map_them}"
        raise UserValueError(f"The label maps hold {held}, but not {gaps}. {remedy}")
    if highest >= MOST_UNNAMED:
        file = next(facts.name for facts in labels if highest in facts.classes)
        remedy = remedy_for_soft_masks(labels, highest)
        remedy = f"{remedy} {name_them}" if remedy else f"{name_them} {map_them}"
        raise UserValueError(
            f"The label maps hold {len(present)} classes without names. The highest one is {highest}, in {file}. More "
            f"than {MOST_UNNAMED} classes need names. {remedy}"
        )
    return [f"class_{index}" for index in range(highest + 1)]


def _listed(indices: Sequence[int]) -> str:
    """List at most ten numbers."""
    return ", ".join([*map(str, indices[:10]), *(["..."] if len(indices) > 10 else [])])


def _present(labels: Iterable[LabelFacts | None] | None) -> set[int]:
    """Return the indices of the classes in label maps."""
    return {index for facts in labels or () if facts is not None for index in facts.classes}


def _names_of_model(
    config: Co2SConfig, sets: dict[str, Samples], scans: dict[str, Scans]
) -> tuple[list[str], list[Finding]]:
    """Return the class names of a trained model, for data without class names, and a warning.

    Only the number of classes can be compared. The data has as many classes as its highest label says, also if some
    lower labels occur nowhere. If the labels that were checked are too few, the labels of the training images are
    counted, too, because a rare class may be missing in the validation set. More classes than those of the model are
    errors that [`check`] finds.

    A model without class names (class_0, class_1 ...) says nothing about its labels, so there is no warning.

    Raises:
        UserValueError: The data has fewer classes than the model.
    """
    names = list(config.id2label.values())
    present = _present(scans["labeled"].labels) | _present(scans["validation"].labels)
    if not present or names == [f"class_{index}" for index in range(len(names))]:
        return names, []
    if max(present) + 1 < len(names) and scans["labeled"].labels is None:
        present |= _present(scan_labels(sets["labeled"]))
    mapping = ", ".join(f"{index} = {name}" for index, name in enumerate(names))
    remedy = f"`class_names={names}`"
    if max(present) + 1 < len(names):
        raise UserValueError(
            f"The model has {len(names)} classes ({mapping}), but the highest label of the data is {max(present)}, "
            "and the data does not name its classes. If the labels have the meaning of the model's classes, say so: "
            f"{remedy}. Otherwise name the classes of the data with `class_names` or in classes.json."
        )
    warning = (
        f"The data does not name its classes. Its labels are taken as the classes of the model: {mapping}. If this is "
        f"right, say so: {remedy}. Otherwise name the classes of the data with `class_names` or in classes.json."
    )
    return names, [Finding("classes without names", warning, is_warning=True)]


def _embedded_palette(sets: dict[str, Samples], scans: dict[str, Scans], num_labels: int) -> list[list[int]] | None:
    """Return the colours in the palette of the first label file that was checked, if it has enough of them."""
    checked = next((sets[name] for name in ("labeled", "validation") if scans[name].labels), None)
    if checked is None or checked.label_rule != LabelRule():  # under other rules, the values are not class indices
        return None
    with open_image(checked[0].label) as label:
        colors = label.getpalette()
    if colors is None or len(colors) < 3 * num_labels:
        return None
    return [colors[3 * index : 3 * index + 3] for index in range(num_labels)]


def _lines_of(samples: Samples, root: str) -> list[Line]:
    """Return the lines of a list of these samples. For a row of a data set, a line has a name but no label file."""
    if not root:
        return [(name, None) for name in samples.names]
    pairs = zip(samples.files("image"), samples.files("label"))
    return [tuple(file and Path(file.path).relative_to(root).as_posix() for file in pair) for pair in pairs]
