"""The options of [`segment_scene`]: how a scene is read, predicted and written. This module needs no rasterio."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..utils.errors import UserValueError
from ..utils.ranges import check_above_zero, check_ranges


VECTOR_SUFFIXES = (".gpkg", ".geojson", ".parquet")
SCORE_DTYPES = ("uint8", "float32")


@dataclass
class SceneOptions:
    """How a scene is read, predicted and written.

    Args:
        overlap_px: Pixels that neighbouring windows share. None: a sixth of their side.
        blend: Weights where windows overlap: "smooth" (lower towards the edges of a window) or "average" (equal, as in
            the paper). [`WindowGrid`] checks the value.
        windows_per_batch: Windows per forward pass.
        resample_to: Ground sampling distance in metres at which the scene is read. Choose that of the training images.
            None: that of the scene. The map has the pixels of the scene in both cases.
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
    resample_to: float | None = None
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
