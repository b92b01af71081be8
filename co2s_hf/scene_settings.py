"""What can be chosen when whole scenes are segmented: settings of Python's `segment_scene` and of predict.py alike."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .arguments import setting
from .inference import BLENDS


VECTOR_SUFFIXES = (".gpkg", ".geojson", ".parquet")
OUTPUT_GRIDS = ("scene", "resampled")
SCORE_DTYPES = ("uint8", "float32")


@dataclass
class SceneSettings:
    """How a scene is read, predicted and written."""

    overlap_px: int | None = setting(None, "Pixels that neighbouring windows share. Left out: a sixth of their side.")
    blend: Literal[BLENDS] = setting(
        "smooth", "Where windows overlap: less and less towards their edges, or all alike (the paper's average)."
    )
    windows_per_batch: int = setting(4, "Windows that pass through the model together.")
    num_readers: int = setting(2, "Threads that read ahead of the model.")
    resample_to: float | None = setting(
        None, "Read the scene at this ground sampling distance in metres, that of the training images."
    )
    output_grid: Literal[OUTPUT_GRIDS] = setting(
        "scene", "With --resample_to: pixels of the map are the scene's own, or those that were read."
    )
    save_confidence: bool = setting(False, "Also write how sure the fused prediction is of every pixel.")
    save_probabilities: bool = setting(False, "Also write the probability of every class.")
    score_dtype: Literal[SCORE_DTYPES] = setting(
        "uint8", "Confidence and probabilities in steps of 1/254, or as they are."
    )
    cog: bool = setting(False, "Write Cloud Optimized GeoTIFFs, to be read over the web piece by piece.")
    vector: str | None = setting(
        None, "Also write polygons: a file that ends in .gpkg, .geojson or .parquet, or that ending alone for a file "
        "beside the map."
    )  # fmt: skip
    min_area_m2: float = setting(0.0, "Leave out polygons that are smaller, in square metres.")
    simplify_m: float = setting(0.0, "How far a polygon's outline may move to have fewer corners, in metres.")

    def __post_init__(self):
        self.check_scene()

    def check_scene(self):
        """Refuse values that cannot work, before anything is read."""
        self.vector = None if self.vector is None else str(self.vector)
        for name in ("windows_per_batch", "num_readers"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it is at least 1.")
        for name in ("min_area_m2", "simplify_m"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name} is {getattr(self, name)}; it is 0 or more.")
            if getattr(self, name) and self.vector is None:
                raise ValueError(f"--{name} is about polygons; say where they go: --vector map.gpkg.")
        if self.resample_to is not None and not self.resample_to > 0:
            raise ValueError(f"--resample_to is {self.resample_to}; it is a ground sampling distance in metres.")
        if self.output_grid == "resampled" and self.resample_to is None:
            raise ValueError("--output_grid resampled goes with --resample_to METRES.")
        for name, choices in (("blend", BLENDS), ("output_grid", OUTPUT_GRIDS), ("score_dtype", SCORE_DTYPES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"There is no --{name} '{getattr(self, name)}'; choose {' or '.join(choices)}.")
        if self.score_dtype != "uint8" and not (self.save_confidence or self.save_probabilities):
            raise ValueError(f"--score_dtype {self.score_dtype} goes with --save_confidence or --save_probabilities.")
        if self.vector is not None and (self.vector_path(Path("map")).suffix not in VECTOR_SUFFIXES):
            raise ValueError(f"--vector is '{self.vector}'; it ends in .gpkg, .geojson or .parquet.")

    def vector_path(self, destination: Path) -> Path | None:
        """Where a map's polygons go."""
        if self.vector in VECTOR_SUFFIXES:
            return destination.with_suffix(self.vector)
        return None if self.vector is None else Path(self.vector)
