"""Which images are used, with which labels, and how do they become training batches?

- options: `DataOptions`, the options of everything that opens data
- image_files: open image files of a few formats with Pillow or rasterio, and nothing that such a file names
- bands: which bands are red, green and blue, and what to choose for a file that is not 8-bit RGB
- reading: files on disk or in data sets -> 8-bit RGB images and label maps, under explicit rules
- samples: lists of images with label maps, and the augmented items of a training run
- views: weak and strong views of images, and CutMix
- splits: the labelled, unlabelled and validation sets, drawn from a seed or kept as text files
- blocks: large images divided into blocks, which are drawn into the sets as a whole
- block_files: images and label maps cut into blocks, as new files; rasters of any size are read in windows
- block_sets: whether sets are drawn in blocks, and these sets
- benchmarks: classes and protocol of the paper's six benchmarks
- benchmark_lists: the authors' image lists of these benchmarks, and whether given lists are the same
- deepness: tiles and masks that the QGIS plugin Deepness exported
- listings: the images of a folder, a `datasets` data set or a benchmark, and its classes.json
- sources: `open_source`, which lists, draws and checks the three sets
- validation: reads every file once and reports everything that is wrong
- export: an opened source -> a `datasets.DatasetDict`
- drawn_scenes: an artificial data set for trials and tests

The package may import `model` (the configuration) and `utils`. Only the function that opens
rasters imports rasterio.
"""
