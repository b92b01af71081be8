"""How do georeferenced rasters of any size become maps and polygons?

- scenes: `segment_scene`, which converts a raster to its map.
- dry_run: check scenes without mapping them, and estimate time, memory and disk space.
- scene_outputs: write the files of a finished map: GeoTIFFs, class names, quick-look, polygons.
- scene_identity: what identifies a scene, so that a resumed run notices that the scene has changed.
- scene_files: find scenes by file, folder, pattern or address, and choose the paths of their maps.
- label_maps: recognize label maps among the rasters of a folder of scenes.
- mosaics: check that a mosaic (VRT) in a folder names no raster outside it.
- options: `SceneOptions`: how a scene is read, predicted and written; `VectorLabelOptions` and
  `TileOptions`: polygons as labels, and tiles of rasters.
- rasters: read rasters window by window, with their masks.
- resolution: read scenes at the ground sampling distance of the training images.
- georeferencing: pixel grids on the ground: transform, coordinate system, pixel sizes and areas in metres.
- resumable_raster: keep finished rows on disk, so that an interrupted run can continue.
- maps: write GeoTIFFs.
- polygons: outline the objects of a map and write them as a vector file.
- vector_labels: `open_vector_labels`, which converts polygons to the label maps of windows of rasters.
- vector_features: load the features that lie in rasters, and count what was left out.
- vector_classes: choose the classes of features.
- vector_files: read vector files safely.
- vector_geometry: repair, divide, buffer and reproject geometries.
- burning: burn polygons into the pixels of a window.
- prepared_rasters: `labeled_rasters` and `prepare_rasters`, which make a data set from rasters and polygons.
- raster_group: open the rasters of one data set: one scale, one ground sampling distance.
- label_tiles: cut rasters and their labels into tiles.
- tile_sets: draw the sets of tiles.

It may import inference, data, model and utils. All modules except options, scene_files and resumable_raster need the
libraries of `pip install 'co2s_hf[scenes]'`, among them rasterio.
"""
