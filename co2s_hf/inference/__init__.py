"""How does a trained model become predictions for images of any size?

- windows: cut an image into overlapping windows, predict them in batches, and join their logits.
- images: load a model, predict one image in memory, fuse the students, and draw the pictures of a prediction.
- folders: predict many image files into a folder, and continue after an interruption.
- dry_run: read many image files without predicting them, and estimate what the predictions need.
- attention: compute the attention maps of the backbones, and draw them.

It may import data, model and utils. [`co2s_hf.geo`] uses it for whole georeferenced scenes.
"""
