"""Check any data source, and convert it to one data set that contains images, label maps, sets and classes.

  # Draw the sets of a folder. To train on the result: `co2s train --dataset_name prepared/fields`.
  co2s prepare --data_dir path/to/folder --labeled_fraction 1/8 --output_dir prepared/fields

  # Use polygons as labels of orthophotos. Here, pixels between polygons have no class.
  co2s prepare ortho.tif more/*.tif --vector_labels parcels.gpkg --class_column type --background ignore \\
      --output_dir prepared/valley

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

With --vector_labels, rasters come first, before any flag: files, folders, patterns, mosaics (VRT), web addresses. They
are read window by window, so they may have any size. Pixels without data have no class, and tiles without data are
left out. The sets are drawn in blocks, unless there is a --validation_area: all tiles that touch it are then
validation tiles, and their pixels outside it have no class. So no pixel of the area is in a training tile, and the
scores are those of the area.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from ..data.options import DataOptions
from ..geo.options import TileOptions, VectorLabelOptions
from ..utils.errors import UserValueError
from ..utils.ranges import check_above_zero, check_ranges
from .arguments import DATA
from .command_line import Command, Flag, Group, own_group, setting
from .vector_flags import VECTOR, check_rasters


@dataclass
class PrepareArguments:
    """Where to write the data set, and how to cut images."""

    rasters: list[str] | None = setting(
        None,
        "Georeferenced rasters that --vector_labels labels: files, folders, file patterns, web addresses.",
        "RASTER",
    )
    output_dir: str | None = setting(None, "New folder for the data set.")
    push_to_hub: str | None = setting(None, "Repository on the Hub to write the data set to.", "user/name")
    private: bool = setting(False, "Create the repository as private; refuse an existing public one.")
    tile_size: int | None = setting(
        None,
        f"Cut larger images into square tiles of this side, in pixels. Default for rasters: {TileOptions.tile_size}.",
    )
    tile_overlap: int = setting(0, "Least number of pixels that neighbouring tiles share.")
    block_px: int | None = setting(
        None,
        "Draw the sets in square blocks of this side in pixels, at least --tile_size. Default: whole images; if fewer "
        "images than sets have labels, and for rasters, blocks of up to 4 tiles.",
    )
    resample_to: float | None = setting(
        None, "Ground sampling distance in metres at which rasters are cut. Default: their own.", "METRES"
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
        check_above_zero(self, "resample_to")
        if self.rasters:
            self.tile_size = self.tile_size or TileOptions.tile_size
        if self.block_px is not None and self.tile_size is None:
            raise UserValueError(f"`block_px` is {self.block_px}; it goes with `tile_size`.")
        if self.resample_to is not None and not self.rasters:
            raise UserValueError(
                f"`resample_to` is {self.resample_to}; it goes with rasters: `co2s prepare ortho.tif` with "
                "`vector_labels` and `class_column`."
            )


SPLIT_COLUMN = Flag(
    "Column with labeled, unlabeled or validation for each row. Default: the names of the splits; rows without a "
    "label map are unlabelled."
)
COMMAND = Command(
    name="prepare",
    description=__doc__,
    groups=[
        own_group("result", PrepareArguments),
        VECTOR,
        Group(DATA.title, DATA.options, DATA.flags | {"split_column": SPLIT_COLUMN}),
    ],
    positional="rasters",
    first=(
        "data_dir",
        "dataset_name",
        "vector_labels",
        "class_column",
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
        run(arguments[PrepareArguments], arguments[DataOptions], arguments[VectorLabelOptions])


def run(args: PrepareArguments, data_options: DataOptions, vector_options: VectorLabelOptions):
    """Check the data, and write the data set."""
    import tempfile

    from ..data.export import check_tiles
    from ..data.listings import list_samples
    from ..utils.files import check_new_folder

    check_rasters(args.rasters, vector_options, data_options)
    if not (args.rasters or data_options.has_source):
        raise UserValueError(
            "Name the data to prepare: `data_dir`, `dataset_name` or `dataset`; or rasters, with polygons as labels: "
            "`co2s prepare ortho.tif`, `vector_labels` and `class_column`."
        )
    check_tiles(args.tile_size, args.tile_overlap)
    if args.output_dir is not None:
        check_new_folder(args.output_dir)
    with tempfile.TemporaryDirectory() as temporary:
        if args.rasters:
            prepare_labels(args, data_options, vector_options, temporary)
            return
        data_options.fill()
        listing = list_samples(data_options)
        prepare(args, data_options, listing, claim(args), temporary)


def claim(args: PrepareArguments) -> str | None:
    """Claim the repository on the Hub, if there is one, before images are read, which may take hours."""
    from ..hub.publishing import claim_repository

    return None if args.push_to_hub is None else claim_repository(args.push_to_hub, args.private, kind="dataset")


def prepare(args: PrepareArguments, data_options: DataOptions, listing, repository: str | None, temporary: str):
    """Check the listed data, and write the data set into the output folder, to the claimed repository, or both."""
    from pathlib import Path

    from ..data.block_sets import BlockCut
    from ..data.export import prepared
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
    finish(args, source, splits, repository, temporary)


def prepare_labels(
    args: PrepareArguments, data_options: DataOptions, vector_options: VectorLabelOptions, temporary: str
):
    """Cut rasters into tiles with the labels of polygons, and write the data set."""
    from ..data.validation.report import announce
    from ..geo.prepared_rasters import labeled_rasters, prepare_rasters

    tiles = TileOptions(args.tile_size, args.tile_overlap, args.block_px, args.resample_to)
    with labeled_rasters(args.rasters, vector_options, data_options, tiles) as cutter:
        repository = claim(args)
        found = prepare_rasters(cutter, data_options, temporary, args.seed, progress=True)
    print("\n".join(found.summary))
    announce(found.source, args.report)
    finish(args, found.source, found.splits, repository, temporary)


def finish(args: PrepareArguments, source, splits, repository: str | None, temporary: str):
    """Say how raw files are read, and write the data set if there is a place for it."""
    from ..data.reading import ImageRule

    if (rule := source.read_rule) != ImageRule():
        print(
            f"The images are written as RGB, from bands {rule.bands or 'in file order'} with scale {rule.scale}. A "
            "model that is trained on them reads raw files in the same way."
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
