"""Check any data source, and convert it to one data set that contains images, label maps, sets and classes.

  # Draw the sets of a folder. To train on the result: `co2s train --dataset_name prepared/fields`.
  co2s prepare --data_dir path/to/folder --labeled_fraction 1/8 --output_dir prepared/fields

  # Only check the data, and draw its samples and class shares.
  co2s prepare --data_dir path/to/folder --report report.html

  # Cut large images into overlapping tiles of 512 px, convert 16-bit bands to RGB and colours of masks to classes.
  co2s prepare --data_dir path/to/folder --output_dir prepared/tiles --tile_size 512 --tile_overlap 64 \\
      --bands 4,3,2 --scale percentiles --label_colors classes.json

  # Write to the Hub (`hf auth login` first). To train on the result: `co2s train --dataset_name user/fields`.
  co2s prepare --data_dir path/to/folder --push_to_hub user/fields --private

The data set has the splits labeled, unlabeled and validation, and classes.json with the names, colours and concepts of
the classes. Files are copied byte by byte, unless they are cut into tiles or a flag such as --bands or --label_map
changes their values; the result is then stored as PNG. Your own files are not changed.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from ..data.options import DataOptions
from ..utils.errors import UserValueError
from ..utils.ranges import check_ranges
from .arguments import DATA
from .command_line import Command, Flag, Group, own_group, setting


@dataclass
class PrepareArguments:
    """Where to write the data set, and how to cut images."""

    output_dir: str | None = setting(None, "New folder for the data set.")
    push_to_hub: str | None = setting(None, "Repository on the Hub to write the data set to.", "user/name")
    private: bool = setting(False, "Create the repository as private; refuse an existing public one.")
    tile_size: int | None = setting(None, "Cut larger images into square tiles of this side, in pixels.")
    tile_overlap: int = setting(0, "Least number of pixels that neighbouring tiles share.")
    report: str | None = setting(None, "Draw samples, class shares and sizes into this file (.html or .png).")
    seed: int = setting(0, "Seed of the drawn sets.")

    def __post_init__(self):
        if self.report is not None and not self.report.lower().endswith((".html", ".png")):
            raise UserValueError(f"`report` is '{self.report}'; name a file that ends in .html or .png.")
        if self.output_dir is None and self.push_to_hub is None and self.report is None:
            raise UserValueError("Name the result: `output_dir`, `push_to_hub` or `report`.")
        if self.private and self.push_to_hub is None:
            raise UserValueError("`private` goes with `push_to_hub`.")
        check_ranges(self, {"tile_size": 1, "tile_overlap": 0, "seed": 0})


SPLIT_COLUMN = Flag(
    "Column with labeled, unlabeled or validation for each row. Default: the names of the splits; rows without a "
    "label map are unlabelled."
)
COMMAND = Command(
    name="prepare",
    description=__doc__,
    groups=[
        own_group("result", PrepareArguments),
        Group(DATA.title, DATA.options, DATA.flags | {"split_column": SPLIT_COLUMN}),
    ],
    first=("data_dir", "dataset_name", "labeled_fraction", "tile_size", "output_dir", "push_to_hub", "report"),
)


def main(words: Sequence[str] | None = None):
    """Run `co2s prepare` with these words, or those of this process."""
    arguments = COMMAND.parse(words)
    with COMMAND.user_errors():
        run(arguments[PrepareArguments], arguments[DataOptions])


def run(args: PrepareArguments, data_options: DataOptions):
    """Check the data, and write the data set."""
    import tempfile

    from ..data.export import check_tiles
    from ..data.reading import ImageRule
    from ..data.sources import open_source
    from ..data.validation.report import announce
    from ..hub.publishing import claim_repository
    from ..utils.files import check_new_folder

    if not data_options.has_source:
        raise UserValueError("Name the data to prepare: `data_dir`, `dataset_name` or `dataset`.")
    check_tiles(args.tile_size, args.tile_overlap)
    if args.output_dir is not None:
        check_new_folder(args.output_dir)
    repository = None
    if args.push_to_hub is not None:  # before the images are read, which may take hours
        repository = claim_repository(args.push_to_hub, args.private, kind="dataset")
    source = open_source(data_options, args.seed, progress=True, with_hidden_labels=True)
    announce(source, args.report)
    rule = source.labeled.image_rule
    if rule != ImageRule():
        print(
            f"The images are written as RGB, from bands {rule.bands or 'in file order'} with scale {rule.scale}. To "
            "predict raw files with a model trained on them, give the same --bands and --scale."
        )
    if args.output_dir is not None or repository is not None:
        with tempfile.TemporaryDirectory() as temporary:
            write_data_set(args, source, repository, temporary)


def write_data_set(args: PrepareArguments, source, repository: str | None, temporary: str):
    """Write the data set into the output folder, to the claimed repository, or both."""
    from pathlib import Path

    from ..data.export import description, prepared
    from ..data.listings import CLASSES_FILE
    from ..hub.publishing import publish_data_set
    from ..utils.files import write_json, written_beside

    splits = prepared(source, args.tile_size, args.tile_overlap, temporary)
    counts = ", ".join(f"{len(table)} {name}" for name, table in splits.items())
    if args.output_dir is not None:
        with written_beside(args.output_dir) as target:
            splits.save_to_disk(target)
            write_json(target / CLASSES_FILE, description(source))
        print(f"Wrote {counts} images: co2s train --dataset_name {args.output_dir}")
    if repository is not None:
        classes = Path(temporary) / CLASSES_FILE
        write_json(classes, description(source))
        publish_data_set(splits, repository, classes, args.private, how_to_retry(args, repository))
        print(f"Pushed {counts} images: co2s train --dataset_name {repository}")


def how_to_retry(args: PrepareArguments, repository: str) -> str:
    """Return the last sentence of the error message of a failed upload."""
    if args.output_dir is None:
        return "Run the same command again."
    words = ["co2s", "prepare", "--dataset_name", args.output_dir, "--push_to_hub", repository]
    words += ["--private"] if args.private else []
    return f"The data set in {args.output_dir} is complete; retry with: {shlex.join(words)}"
