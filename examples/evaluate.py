"""Evaluate a trained model on validation images: `co2s evaluate` as a script.

    python examples/evaluate.py --checkpoint outputs/train_semi/model --data_dir outputs/scenes-seed0

    # Several processes share the images.
    accelerate launch examples/evaluate.py --checkpoint user/name --dataset whdld --flip

`--help` shows more commands and lists every flag.
"""

from co2s_hf.cli.evaluate import main


if __name__ == "__main__":
    main()
