"""How do georeferenced rasters of any size become maps and polygons?

- scenes: `segment_scene`, from a raster to its map.
- scene_outputs: the files of a finished map: GeoTIFFs, class names, quick-look, polygons.
- scene_files: the scenes that files, folders, patterns and addresses name, and the paths of their maps.
- options: `SceneOptions`, how a scene is read, predicted and written. It imports neither torch nor rasterio.
- rasters: read rasters window by window, with their masks.
- georeferencing: pixel grids on the ground: transform, coordinate system, pixel sizes and areas in metres.
- resumable_raster: finished rows on disk, which an interrupted run continues.
- maps: write GeoTIFFs.
- polygons: outline the objects of a map and write them as a vector file.

It may import inference, data, model and utils. Its modules (all but options and scene_files) need the libraries of
`pip install 'co2s_hf[scenes]'`, among them rasterio.
"""
