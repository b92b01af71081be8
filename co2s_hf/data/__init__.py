"""Which images are used, with which labels, and how do they become training batches?

- options: `DataOptions`, the options of everything that opens data
- reading: files on disk or in data sets -> 8-bit RGB images and label maps, under explicit rules
- samples: lists of images with label maps, and the augmented items of a training run
- views: weak and strong views of images, and CutMix
- splits: the labelled, unlabelled and validation sets, drawn from a seed or kept as text files
- benchmarks: classes, protocol and image lists of the paper's six benchmarks
- listings: the images of a folder, a `datasets` data set or a benchmark, and its classes.json
- sources: `open_source`, which lists, draws and checks the three sets
- validation: reads every file once and reports everything that is wrong
- export: an opened source -> a `datasets.DatasetDict`
- drawn_scenes: an artificial data set for trials and tests

The package may import `model` (the configuration) and `utils`. Only the function that reads bands imports rasterio.
"""
