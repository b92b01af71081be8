"""Check any data source, and turn it into one data set with all images, label maps, sets and classes inside.

The same as `co2s prepare`.

    # A folder whose sets are drawn, for `co2s train --dataset_name prepared/fields`.
    python examples/prepare_dataset.py --data_dir path/to/folder --labeled_fraction 1/8 --output_dir prepared/fields

    # Only check the data and draw what it contains.
    python examples/prepare_dataset.py --data_dir path/to/folder --report report.html

    # Cut large images into overlapping tiles of 512 px; 16-bit bands as RGB; coloured masks as classes.
    python examples/prepare_dataset.py --data_dir path/to/folder --output_dir prepared/tiles --tile_size 512 --tile_overlap 64 \\
        --bands 4,3,2 --scale percentiles --label_colors classes.json

    # To the Hub (`hf auth login` first), for `co2s train --dataset_name user/fields`.
    python examples/prepare_dataset.py --data_dir path/to/folder --push_to_hub user/fields --private

The data set has the splits labeled, unlabeled and validation with the bytes of all files, and classes.json (names,
colours, concepts, ignore value). Files keep their bytes unless a rule changes them. Your files are only read.
"""

from co2s_hf.cli.prepare import main


if __name__ == "__main__":
    main()
