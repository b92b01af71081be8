"""The options of [`segment_scene`], and of polygons as labels. This module needs no rasterio."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from ..utils.errors import UserValueError
from ..utils.ranges import check_above_zero, check_ranges


VECTOR_SUFFIXES = (".gpkg", ".geojson", ".parquet")
LABEL_SUFFIXES = (".gpkg", ".geojson", ".json", ".shp", ".fgb", ".parquet")  # of polygons that are labels
IGNORE_CLASS = "ignore"  # name for pixels without a class, in `background` and `class_map`
WHOLE_AREA = "all"  # `labeled_area` if all rasters were labelled completely
NOT_RESAMPLED = "none"  # `resample_to`: a scene is read at its own ground sampling distance
SCORE_DTYPES = ("uint8", "float32")


@dataclass
class SceneOptions:
    """How a scene is read, predicted and written.

    Args:
        overlap_px: Pixels that neighbouring windows share. None: a sixth of their side.
        blend: Weights where windows overlap: "smooth" (lower towards the edges of a window) or "average" (equal, as in
            the paper). [`WindowGrid`] checks the value.
        windows_per_batch: Windows per forward pass.
        resample_to: Ground sampling distance in metres at which the scene is read. "none": that of the scene. None:
            that of the training images if the model knows it and the scene differs by more than 10 %, else that of
            the scene. The map always has the pixels of the scene.
        save_confidence: Also write the confidence of every pixel.
        save_probabilities: Also write the probability of every class.
        score_dtype: Type of confidence and probabilities in the files: "uint8" (0 to 254 for 0 to 1) or "float32".
        cog: Write Cloud Optimized GeoTIFFs.
        vector: Also write polygons into this file (.gpkg, .geojson or .parquet). If this is only a suffix, such as
            ".gpkg", the file is beside the map and has the name of the map.
        min_area_m2: Leave out polygons with a smaller area, in square metres.
        simplify_m: Simplify the outlines of polygons by at most this shift, in metres. 0: do not simplify.

    Raises:
        UserValueError: A value is out of range or has no effect.
    """

    overlap_px: int | None = None
    blend: Literal["smooth", "average"] = "smooth"
    windows_per_batch: int = 4
    resample_to: float | Literal["none"] | None = None
    save_confidence: bool = False
    save_probabilities: bool = False
    score_dtype: Literal["uint8", "float32"] = "uint8"
    cog: bool = False
    vector: str | None = None
    min_area_m2: float = 0.0
    simplify_m: float = 0.0

    def __post_init__(self):
        self.vector = None if self.vector is None else str(self.vector)
        check_ranges(self, {"windows_per_batch": 1, "overlap_px": 0, "min_area_m2": 0, "simplify_m": 0})
        if isinstance(self.resample_to, str) and self.resample_to != NOT_RESAMPLED:
            raise UserValueError(f"`resample_to` is '{self.resample_to}'; expected metres above 0, or 'none'.")
        if self.resample_to != NOT_RESAMPLED:
            check_above_zero(self, "resample_to")
        for name in ("min_area_m2", "simplify_m"):
            value = getattr(self, name)
            if value and self.vector is None:
                raise UserValueError(
                    f"`{name}` is {value}, but no polygons are written. Name a file for them: `vector='map.gpkg'`."
                )
        if self.score_dtype not in SCORE_DTYPES:
            raise UserValueError(f"`score_dtype` is '{self.score_dtype}'; expected {' or '.join(SCORE_DTYPES)}.")
        if self.score_dtype != "uint8" and not (self.save_confidence or self.save_probabilities):
            raise UserValueError(
                f"`score_dtype` is '{self.score_dtype}', but no scores are written. Add `save_confidence=True` or "
                "`save_probabilities=True`."
            )
        if self.vector is not None and self.vector_path(Path("map")).suffix not in VECTOR_SUFFIXES:
            raise UserValueError(
                f"`vector` is '{self.vector}'; expected a file that ends in .gpkg, .geojson or .parquet."
            )

    def vector_path(self, destination: Path) -> Path | None:
        """Return the file for the polygons of the map at `destination`. None if no polygons are written."""
        if self.vector in VECTOR_SUFFIXES:
            return destination.with_suffix(self.vector)
        return None if self.vector is None else Path(self.vector)


@dataclass
class VectorLabelOptions:
    """Which polygons are the labels of rasters, and what the pixels between them are.

    Args:
        vector_labels: Vector files with the features (.gpkg, .geojson, .json, .shp, .fgb or .parquet).
        class_column: Column with the class of each feature.
        layer: Layer of each GeoPackage. None: its only layer with geometries.
        class_map: Value of the column -> class. Several values may be one class. The class "ignore" marks features
            whose pixels have no class. None: each value is a class.
        priority: Classes, the most important one first. Where polygons overlap, the first of their classes wins. The
            classes that are left out follow in their own order, the background as the last one. None: no class is
            named.
        all_touched: Label all pixels that a polygon touches, instead of those whose centre it covers.
        buffer_m: Points and lines label all pixels up to this distance on the ground, in metres. Lines are therefore
            twice as wide.
        labeled_area: Vector file with polygons of the area in which everything was labelled: pixels there that no
            feature covers are `background`, and pixels outside have no class. "all": the whole rasters.
        labeled_area_layer: Layer of `labeled_area`, if it is a GeoPackage with several layers.
        background: Class of pixels in the labelled area that no feature covers. "ignore": they have no class. None:
            "background" if `labeled_area` is given; else the features must cover the rasters.
        validation_area: Vector file with polygons of the area that is used for validation. None: it is drawn.
        validation_area_layer: Layer of `validation_area`, if it is a GeoPackage with several layers.

    Raises:
        UserValueError: A value is not allowed, or has no effect.
    """

    vector_labels: list[str] | None = None
    class_column: str | None = None
    layer: str | None = None
    class_map: dict[str, str] | None = None
    priority: list[str] | None = None
    all_touched: bool = False
    buffer_m: float | None = None
    labeled_area: str | None = None
    labeled_area_layer: str | None = None
    background: str | None = None
    validation_area: str | None = None
    validation_area_layer: str | None = None

    def __post_init__(self):
        check_above_zero(self, "buffer_m")
        self._check_files()
        if self.class_map is not None and not self.class_map:
            raise UserValueError("`class_map` is empty. Map every value: `class_map={'Haus': 'building'}`.")
        for value, name in (self.class_map or {}).items():
            if not (value.strip() and name.strip()):
                raise UserValueError(f"`class_map` maps '{value}' to '{name}'; neither may be empty.")
        for name in self.priority or ():
            if self.priority.count(name) > 1:
                raise UserValueError(f"`priority` names the class '{name}' twice. Keep one of them.")

    def _check_files(self):
        """Check the names of the files, and convert paths to text."""
        for name in ("labeled_area", "validation_area"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else str(value))
        self.vector_labels = [str(path) for path in self.vector_labels or ()] or None
        if self.vector_labels is None:
            given = [f.name for f in fields(self) if getattr(self, f.name) not in (None, False)]
            if given:
                raise UserValueError(f"`{given[0]}` goes with `vector_labels`, which names the files of the polygons.")
            return
        area = [] if self.labeled_area in (None, WHOLE_AREA) else [self.labeled_area]
        for option, files, layer in (
            ("vector_labels", self.vector_labels, "layer"),
            ("labeled_area", area, "labeled_area_layer"),
            ("validation_area", [self.validation_area] if self.validation_area else [], "validation_area_layer"),
        ):
            suffixes = [Path(path).suffix.lower() for path in files]
            for path, suffix in zip(files, suffixes):
                if suffix not in LABEL_SUFFIXES:
                    expected = f"{', '.join(LABEL_SUFFIXES[:-1])} or {LABEL_SUFFIXES[-1]}"
                    or_all = ", or 'all'" if option == "labeled_area" else ""
                    raise UserValueError(
                        f"`{option}` is '{path}'; expected a file that ends in {expected}{or_all}. Other formats, and "
                        "files in archives: `ogr2ogr OUT.gpkg IN`."
                    )
            if getattr(self, layer) is not None and ".gpkg" not in suffixes:
                raise UserValueError(
                    f"`{layer}` is '{getattr(self, layer)}', but no file of `{option}` is a GeoPackage. Leave "
                    f"`{layer}` out: the other formats have one layer."
                )


@dataclass
class TileOptions:
    """How large rasters are cut into the tiles of a data set.

    Args:
        tile_size: Side of a tile in pixels.
        tile_overlap: Least number of pixels that neighbouring tiles share, less than `tile_size`.
        block_px: Side in pixels of the blocks in which the sets are drawn, at least `tile_size`. None: four tiles, or
            fewer if there would be too few blocks with labels.
        resample_to: Ground sampling distance in metres at which tiles are cut. None: that of the rasters.

    Raises:
        UserValueError: A value is out of range.
    """

    tile_size: int = 512
    tile_overlap: int = 0
    block_px: int | None = None
    resample_to: float | None = None

    def __post_init__(self):
        check_ranges(self, {"tile_size": 1, "tile_overlap": 0, "block_px": 1})
        check_above_zero(self, "resample_to")
