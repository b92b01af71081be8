"""The flags of `co2s prepare` for rasters with polygons as labels."""

from dataclasses import fields

from ..data.options import DataOptions
from ..geo.options import VectorLabelOptions
from ..utils.errors import UserValueError
from .command_line import Flag, Group


OF_LABEL_FILES = ("image_column", "label_column", "ignore_index", "reduce_labels", "label_map", "label_colors")


def parse_class_map(text: str) -> dict[str, str]:
    """Parse "Haus=building,Weg=road" into {"Haus": "building", "Weg": "road"}."""
    found: dict[str, str] = {}
    for part in text.split(","):
        value, sign, name = (word.strip() for word in part.rpartition("="))
        if not (value and sign and name):
            raise ValueError(f"'{text}' is not VALUE=CLASS,VALUE=CLASS, such as Haus=building,Weg=road")
        if found.setdefault(value, name) != name:
            raise ValueError(f"'{text}' maps the value '{value}' to two classes")
    return found


VECTOR = Group(
    "labels from polygons",
    VectorLabelOptions,
    {
        "vector_labels": Flag(
            "Vector files with the labels of rasters: GeoPackage, GeoJSON, shapefile, GeoParquet, FlatGeobuf.",
            name="FILE",
        ),
        "class_column": Flag("Column with the class of each polygon."),
        "layer": Flag("Layer of --vector_labels, if a GeoPackage has several."),
        "class_map": Flag(
            "Classes of the values in the column, such as 'Haus=building,Weg=road'. The class ignore is 'no class'.",
            parse_class_map,
            name="VALUE=CLASS,...",
        ),
        "background": Flag("Class of pixels that no polygon covers, or ignore: they have no class.", name="CLASS"),
        "labeled_area": Flag(
            "Polygons of the area in which everything was labelled, or all. Pixels in it that no polygon covers are "
            "--background (default: a class background). Pixels outside have no class.",
            name="FILE",
        ),
        "labeled_area_layer": Flag("Layer of --labeled_area, if a GeoPackage has several."),
        "validation_area": Flag(
            "Polygons of the area for validation. Default: blocks are drawn, see --validation_fraction.", name="FILE"
        ),
        "validation_area_layer": Flag("Layer of --validation_area, if a GeoPackage has several."),
        "priority": Flag(
            "Classes, the most important one first, for places where polygons overlap. Default: the order of the "
            "classes.",
            name="CLASS",
        ),
        "all_touched": Flag("Label all pixels that a polygon touches. Default: those whose centre it covers."),
        "buffer_m": Flag(
            "Lines and points label all pixels up to this distance, in metres. For roads: half their width.",
            name="METRES",
        ),
    },
)


def check_rasters(rasters: list[str] | None, vector_options: VectorLabelOptions, data_options: DataOptions):
    """Check that rasters and polygons are given together, and without options of other sources.

    Raises:
        UserValueError: One of them is missing, or an option has no effect.
    """
    files = vector_options.vector_labels
    if not (rasters or files):
        return
    if not files:
        raise UserValueError(
            f"'{rasters[0]}' is a raster, and needs the file with its polygons and the column with their classes: "
            "`vector_labels='parcels.gpkg'` `class_column='type'`. Images whose labels are image files are in a "
            "folder: `data_dir`."
        )
    if not rasters:
        raise UserValueError(
            f"`vector_labels` is {' '.join(files)}, but there is no raster. Name it first: `co2s prepare ortho.tif`. "
            "If rasters stand after a flag that takes several words, put them before it."
        )
    if data_options.has_source:
        source = next(name for name in ("data", "data_dir", "dataset_name", "dataset") if getattr(data_options, name))
        raise UserValueError(f"Give one source: rasters with `vector_labels`, or `{source}`. Leave one of them out.")
    if vector_options.class_column is None:
        raise UserValueError("`vector_labels` needs the column with the class of each polygon: `class_column='type'`.")
    defaults = {field.name: field.default for field in fields(DataOptions)}
    for name in OF_LABEL_FILES:
        if getattr(data_options, name) != defaults[name]:
            raise UserValueError(
                f"`{name}` is for label maps in image files. Leave it out: with `vector_labels`, the classes are "
                "those of `class_column` and `class_map`."
            )


__all__ = ["VECTOR", "check_rasters", "parse_class_map"]
