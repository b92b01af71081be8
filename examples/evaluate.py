"""Evaluate a trained model on validation images: IoU and F1 per class, for both students and for their fusion.

The same as `co2s evaluate`.

    python examples/evaluate.py --checkpoint outputs/train_semi/model --data_dir outputs/scenes-seed0

    # A data set on the Hub; a benchmark of the paper, by the paper's protocol.
    python examples/evaluate.py --checkpoint outputs/train_semi/model --dataset_name user/fields
    python examples/evaluate.py --checkpoint outputs/train_semi/model --dataset whdld

    # Average with the mirrored image: twice the time, slightly better. Several processes share the images.
    accelerate launch examples/evaluate.py --checkpoint outputs/train_semi/model --data_dir path/to/folder --flip

    # Add the results to the card of a published model (`hf auth login` first). A local folder is published with them.
    python examples/evaluate.py --checkpoint user/name --data_dir path/to/folder --push_to_hub
    python examples/evaluate.py --data_dir path/to/folder --push_to_hub --hub_model_id user/name

Prints a table, and writes metrics.json, confusion.png (predicted against true classes) and predictions.png.
"""

from co2s_hf.cli.evaluate import main


if __name__ == "__main__":
    main()
