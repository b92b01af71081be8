"""Predict scenes and images: `co2s predict` as a script.

    # Turn a georeferenced raster of any size into a map for QGIS.
    python examples/predict.py scene.tif --checkpoint outputs/train_semi/model --output map.tif

    # Images without georeference: write a label map and an overlay for each of them.
    python examples/predict.py --images photo.jpg more_photos/ --save_confidence

    # Several processes share scenes and images.
    accelerate launch examples/predict.py scenes/ --checkpoint user/name --output maps/ --resume

`--help` shows more commands and lists every flag.
"""

from co2s_hf.cli.predict import main


if __name__ == "__main__":
    main()
