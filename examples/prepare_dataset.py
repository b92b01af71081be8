"""Check any data source, and convert it to one data set that contains everything: `co2s prepare` as a script.

    python examples/prepare_dataset.py --data_dir path/to/folder --labeled_fraction 1/8 --output_dir prepared/fields

    # Only check the data, and draw its samples and class shares.
    python examples/prepare_dataset.py --data_dir path/to/folder --report report.html

`--help` shows more commands and lists every flag.
"""

from co2s_hf.cli.prepare import main


if __name__ == "__main__":
    main()
