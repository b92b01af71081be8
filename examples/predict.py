"""Predict scenes and images: `co2s predict` as a script.

    # A georeferenced raster of any size becomes a map that QGIS opens (map.tif), and a picture of it (map.png).
    python examples/predict.py scene.tif --checkpoint outputs/train_semi/model --output map.tif

    # Many scenes: folders, patterns, mosaics (VRT), web addresses. --resume continues an interrupted run.
    python examples/predict.py scenes/ 'more/*.jp2' https://example.org/scene.tif --output maps/ --resume

    # Other bands or more than 8 bits; the ground sampling distance of the training; polygons, too.
    python examples/predict.py scene.tif --output map.tif --bands 4,3,2 --scale percentiles
    python examples/predict.py scene.tif --output map.tif --resample_to 0.3 --vector map.gpkg --min_area_m2 20

    # Images without georeference: for each an index PNG in the classes' colours, and an overlay.
    python examples/predict.py --images photo.jpg more_photos/ --save_confidence

    # The unlabelled images of a data source.
    python examples/predict.py --data_dir path/to/folder

Scenes come first, before any flag. For images the command writes labels/NAME.png, overlay/NAME.png and
confidence/NAME.png in the image's size. Images that are done already are skipped, so an interrupted run continues;
predictions.json records the options of the folder. `accelerate launch -m co2s_hf predict` shares scenes and images
among processes and machines.
"""

from co2s_hf.cli.predict import main


if __name__ == "__main__":
    main()
