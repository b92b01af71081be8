"""Turn any data source into a data set that carries everything: images, label maps, sets, classes.

    # A folder with drawn sets, for train_semi.py --dataset_name prepared/fields
    python examples/prepare_dataset.py --data_dir path/to/folder --labeled_fraction 1/8 --output_dir prepared/fields

    # Large images as tiles of 512 px that overlap; sixteen-bit bands as RGB; colours of masks as classes.
    python examples/prepare_dataset.py --data_dir path/to/folder --output_dir prepared/tiles --tile_size 512 \\
        --tile_overlap 64 --bands 4,3,2 --scale percentiles --label_colors classes.json

    # To the Hub (`hf auth login` first), where train_semi.py --dataset_name user/fields finds it.
    python examples/prepare_dataset.py --data_dir path/to/folder --push_to_hub user/fields --private

Writes the splits labeled, unlabeled and validation with the bytes of all files inside, and classes.json (names,
colours, concepts, ignore value). Files that need no rule keep their bytes. What you have is only read.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import upload_file

from co2s_hf.arguments import parse_arguments, setting, told_plainly
from co2s_hf.class_files import CLASSES_FILE
from co2s_hf.data_arguments import DataArguments
from co2s_hf.files import check_new_folder, write_json, written_beside
from co2s_hf.preparation import check_tiles, description, prepared
from co2s_hf.reading import ImageRule
from co2s_hf.report import announce
from co2s_hf.sources import open_source


@dataclass
class Arguments(DataArguments):
    output_dir: str | None = setting(None, "New folder for the data set.")
    push_to_hub: str | None = setting(None, "Name of a data set repository of the Hub to write to.")
    private: bool = setting(False, "Make that repository private, if it is new.")
    tile_size: int | None = setting(None, "Cut larger images into tiles of this side in pixels.")
    tile_overlap: int = setting(0, "Pixels that neighbouring tiles share.")
    seed: int = setting(0, "Seed of the drawn sets.")

    def __post_init__(self):
        self.check_data()
        if not self.names_data:
            raise ValueError("Name what to prepare: --data_dir, --dataset_name or --dataset.")
        if self.output_dir is None and self.push_to_hub is None:
            raise ValueError("Say where to: --output_dir, --push_to_hub or both.")
        check_tiles(self.tile_size, self.tile_overlap)


def main():
    args = parse_arguments(Arguments, __doc__)
    with told_plainly():
        if args.output_dir is not None:
            check_new_folder(args.output_dir)
        source = open_source(args, args.seed, progress=True, with_hidden_labels=True)
    announce(source, args.report)
    rule = source.labeled.image_rule
    if rule != ImageRule():
        print(f"Bands {rule.bands or 'as they are'}, scale {rule.scale}: a model of this data will need to be told.")
    with tempfile.TemporaryDirectory() as temporary:
        splits = prepared(source, args.tile_size, args.tile_overlap, temporary)
        counts = ", ".join(f"{len(table)} {name}" for name, table in splits.items())
        if args.output_dir is not None:
            with written_beside(args.output_dir) as target:
                splits.save_to_disk(target)
                write_json(target / CLASSES_FILE, description(source))
            print(f"Wrote {counts} images: train_semi.py --dataset_name {args.output_dir}")
        if args.push_to_hub is not None:
            splits.push_to_hub(args.push_to_hub, private=args.private or None)
            path = Path(temporary) / CLASSES_FILE
            write_json(path, description(source))
            upload_file(path_or_fileobj=path, path_in_repo=CLASSES_FILE, repo_id=args.push_to_hub, repo_type="dataset")
            print(f"Pushed {counts} images: train_semi.py --dataset_name {args.push_to_hub}")


if __name__ == "__main__":
    main()
