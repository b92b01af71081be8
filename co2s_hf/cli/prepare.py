"""Check any data source, and convert it to one data set that contains images, label maps, sets and classes.

  # Draw the sets of a folder. To train on the result: `co2s train --dataset_name prepared/fields`.
  co2s prepare --data_dir path/to/folder --labeled_fraction 1/8 --output_dir prepared/fields

  # Only check the data, and draw its samples and class shares.
  co2s prepare --data_dir path/to/folder --report report.html

  # Cut large images into overlapping tiles of 512 px, convert 16-bit bands to RGB and colours of masks to classes.
  co2s prepare --data_dir path/to/folder --output_dir prepared/tiles --tile_size 512 --tile_overlap 64 \\
      --bands 4,3,2 --scale percentiles --label_colors classes.json

  # Cut one large labelled image, or a few, into tiles, and draw the sets in blocks of 2048 px. All labels are kept.
  co2s prepare --data_dir path/to/folder --output_dir prepared/ortho --tile_size 512 --block_px 2048

  # Write to the Hub (`hf auth login` first). To train on the result: `co2s train --dataset_name user/fields`.
  co2s prepare --data_dir path/to/folder --push_to_hub user/fields --private

The data set has the splits labeled, unlabeled and validation, and classes.json with the names, colours and concepts of
the classes. Files are copied byte by byte, unless they are cut into tiles or a flag such as --bands or --label_map
changes their values; the result is then stored as PNG. Your own files are not changed.

If all images have labels and no --labeled_fraction is given, there is no split unlabeled. Train on the result with
`co2s finetune` or `co2s train --method supervised`.

With --block_px, images are first cut into square blocks, and a block is in one set as a whole. Tiles are cut within a
block, also with --tile_overlap, so no pixel of a validation tile is in a training tile. A block at the right or lower
border is smaller, or up to half a block larger. Without --block_px, an image is in one set as a whole if enough images
have labels; fewer images are cut into blocks. With --tile_size, tiles in which no pixel has a label become unlabelled.
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
    block_px: int | None = setting(
        None,
        "Draw the sets in square blocks of this side in pixels, at least --tile_size. Default: whole images; if fewer "
        "images than sets have labels, blocks of up to 4 tiles.",
    )
    report: str | None = setting(None, "Draw samples, class shares and sizes into this file (.html or .png).")
    seed: int = setting(0, "Seed of the drawn sets.")

    def __post_init__(self):
        if self.report is not None and not self.report.lower().endswith((".html", ".png")):
            raise UserValueError(f"`report` is '{self.report}'; name a file that ends in .html or .png.")
        if self.output_dir is None and self.push_to_hub is None and self.report is None:
            raise UserValueError("Name the result: `output_dir`, `push_to_hub` or `report`.")
        if self.private and self.push_to_hub is None:
            raise UserValueError("`private` goes with `push_to_hub`.")
        check_ranges(self, {"tile_size": 1, "tile_overlap": 0, "block_px": 1, "seed": 0})
        if self.block_px is not None and self.tile_size is None:
            raise UserValueError(f"`block_px` is {self.block_px}; it goes with `tile_size`.")


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
    first=(
        "data_dir",
        "dataset_name",
        "labeled_fraction",
        "tile_size",
        "block_px",
        "output_dir",
        "push_to_hub",
        "report",
    ),
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
    from ..data.listings import list_samples
    from ..hub.publishing import claim_repository
    from ..utils.files import check_new_folder

    if not data_options.has_source:
        raise UserValueError("Name the data to prepare: `data_dir`, `dataset_name` or `dataset`.")
    check_tiles(args.tile_size, args.tile_overlap)
    if args.output_dir is not None:
        check_new_folder(args.output_dir)
    data_options.fill()
    listing = list_samples(data_options)
    repository = None
    if args.push_to_hub is not None:  # before the images are read, which may take hours
        repository = claim_repository(args.push_to_hub, args.private, kind="dataset")
    with tempfile.TemporaryDirectory() as temporary:
        prepare(args, data_options, listing, repository, temporary)


def prepare(args: PrepareArguments, data_options: DataOptions, listing, repository: str | None, temporary: str):
    """Check the listed data, and write the data set into the output folder, to the claimed repository, or both."""
    from pathlib import Path

    from ..data.block_sets import BlockCut
    from ..data.export import prepared
    from ..data.reading import ImageRule
    from ..data.sources import open_source
    from ..data.validation.report import announce

    cut = None
    if args.tile_size is not None:
        cut = BlockCut(Path(temporary, "blocks"), args.tile_size, args.block_px)
    keeps_labels = (data_options.labeled_fraction or 1) == 1
    source = open_source(
        data_options,
        args.seed,
        progress=True,
        with_hidden_labels=True,
        may_be_empty=("unlabeled",) if keeps_labels else (),
        listing=listing,
        cut=cut,
    )
    if source.block_px is not None:
        print(f"The sets are drawn in blocks of {source.block_px} px.")
    splits = num_tiles = None
    if args.tile_size is not None or args.output_dir is not None or repository is not None:
        splits = prepared(source, args.tile_size, args.tile_overlap, temporary)
    if args.tile_size is not None:
        num_tiles = {name: len(table) for name, table in splits.items()}
    announce(source, args.report, num_tiles)
    if (rule := source.read_rule) != ImageRule():
        print(
            f"The images are written as RGB, from bands {rule.bands or 'in file order'} with scale {rule.scale}. To "
            "predict raw files with a model trained on them, give the same --bands and --scale."
        )
    if args.output_dir is not None or repository is not None:
        write_data_set(args, source, splits, repository, temporary)


def write_data_set(args: PrepareArguments, source, splits, repository: str | None, temporary: str):
    """Write the splits into the output folder, to the claimed repository, or both."""
    from pathlib import Path

    from ..data.export import description
    from ..data.listings import CLASSES_FILE
    from ..hub.publishing import publish_data_set
    from ..utils.files import write_json, written_beside

    counts = ", ".join(f"{len(table)} {name}" for name, table in splits.items())
    command = "co2s train --dataset_name"
    if "unlabeled" not in splits:
        command = "co2s finetune --checkpoint MODEL --dataset_name"
    if args.output_dir is not None:
        with written_beside(args.output_dir) as target:
            splits.save_to_disk(target)
            write_json(target / CLASSES_FILE, description(source))
        print(f"Wrote {counts} images: {command} {args.output_dir}")
    if repository is not None:
        classes = Path(temporary) / CLASSES_FILE
        write_json(classes, description(source))
        publish_data_set(splits, repository, classes, args.private, how_to_retry(args, repository))
        print(f"Pushed {counts} images: {command} {repository}")


def how_to_retry(args: PrepareArguments, repository: str) -> str:
    """Return the last sentence of the error message of a failed upload."""
    if args.output_dir is None:
        return "Run the same command again."
    words = ["co2s", "prepare", "--dataset_name", args.output_dir, "--push_to_hub", repository]
    words += ["--private"] if args.private else []
    return f"The data set in {args.output_dir} is complete; retry with: {shlex.join(words)}"
