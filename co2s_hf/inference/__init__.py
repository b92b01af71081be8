"""How does a trained model become predictions for images of any size?

- windows: overlapping windows over an image, their prediction in batches, and the join of their logits.
- images: load a model, predict one image in memory, fuse the students, and make the pictures of a prediction.
- folders: predict many image files into a folder, which an interrupted run continues.
- attention: the attention maps of the backbones, and a sheet that shows them.

It may import data, model and utils. [`co2s_hf.geo`] uses it for whole georeferenced scenes.
"""
