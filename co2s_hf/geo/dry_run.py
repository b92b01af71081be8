"""Check scenes without mapping them, and estimate the time, the memory and the disk space of their maps.

A dry run makes the same checks as [`segment_scene`], predicts a few windows to measure the time, and writes nothing.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..inference.images import window_side
from ..inference.windows import Window, WindowGrid, joined_pieces
from ..model.image_processing_co2s import Co2SImageProcessor
from ..model.modeling_co2s import Co2SForSemanticSegmentation
from ..utils.measuring import format_duration, peak_memory_gb
from .options import SceneOptions
from .scene_outputs import check_destinations, output_paths
from .scenes import NUM_READERS, ScenePrediction, opened_rows, prepared_prediction


BATCHES = 2  # batches that are timed, after one that is not
MOST_TRIED = 64  # windows that are read, at most, to find windows with data


@dataclass(frozen=True)
class Speed:
    """How long windows take.

    Args:
        seconds: Seconds per window.
        batches: Description of the batches that were timed.
    """

    seconds: float
    batches: str


@dataclass(frozen=True)
class SceneEstimate:
    """What the map of a scene needs.

    Args:
        facts: Lines about the scene: size, bands, windows; scale and value of pixels without data.
        windows: Number of windows that are still to predict. 0: the map is complete already.
        speed: Time of a window. None: no window with data was found.
        share: Share of the windows that have data, 0 to 1, from a sample.
        memory_gb: Peak memory: that of this process until now, and the rows of the scene that are in memory at a time.
            On a GPU: GPU memory.
        disk_gb: Space on disk that the run needs at most.
    """

    facts: list[str]
    windows: int
    speed: Speed | None
    share: float
    memory_gb: float
    disk_gb: float

    @property
    def seconds(self) -> float:
        """Expected time of the prediction in seconds."""
        return 0.0 if self.speed is None else self.windows * self.share * self.speed.seconds

    def describe(self) -> str:
        """Return several lines with all facts."""
        if not self.windows:
            needs = "the map is complete already, or only its files are to be written"
        elif self.speed is None:
            needs = "no data was found"
        else:
            part = "" if self.share == 1 else f"; about {100 * self.share:.0f} % of the windows have data"
            needs = (
                f"about {format_duration(self.seconds)} (from {self.speed.batches}{part}); "
                f"memory about {self.memory_gb:.1f} GB; disk at most {self.disk_gb:.2f} GB"
            )
        return "\n  ".join([*self.facts, needs])


def check_scene(
    model: Co2SForSemanticSegmentation,
    image_processor: Co2SImageProcessor,
    source: str | Path,
    destination: str | Path,
    *,
    crop_size: int | None = None,
    flip: bool = False,
    bands: tuple[int, int, int] | str | None = None,
    scale: tuple[float, float] | tuple[tuple[float, float], ...] | str | None = None,
    resume: bool = False,
    speed: Speed | None = None,
    **options,
) -> SceneEstimate:
    """Make the checks of [`segment_scene`] and estimate what the map needs. Nothing is written.

    Args:
        model, image_processor, source, destination, crop_size, flip, bands, scale, resume, options: As in
            [`segment_scene`].
        speed: Time of a window, from another scene. None: measure it on this scene.

    Raises:
        The errors of [`segment_scene`] before the prediction.
    """
    options, source, crop_size = SceneOptions(**options), str(source), window_side(model, crop_size)
    paths = output_paths(Path(destination), options)
    check_destinations(source, paths, resume, is_dry_run=True)
    prepared = prepared_prediction(model, image_processor, source, options, crop_size, flip, bands, scale)
    with prepared as (prediction, identity):
        opened, facts = opened_rows(prediction, identity, paths, resume, is_dry_run=True), _facts(prediction)
        if opened is None:
            return SceneEstimate(facts, 0, speed, 1.0, 0.0, 0.0)
        rows, grid = opened[0], prediction.grid
        rows_left = 0 if rows.rows_done == grid.height else len(grid.tops) - grid.tops.index(rows.rows_done)
        windows, share, seconds = _sample_windows(prediction, (1 + BATCHES) * options.windows_per_batch)
        if speed is None and windows:
            speed = _measure(prediction, windows, seconds)
        memory_gb = peak_memory_gb(model.device) + _strip_bytes(prediction) / 1e9
        return SceneEstimate(facts, rows_left * len(grid.lefts), speed, share, memory_gb, rows.needed_bytes / 1e9)


def _facts(prediction: ScenePrediction) -> list[str]:
    """Return lines about a scene: size, bands and windows; scale; value of pixels without data."""
    scale, nodata = prediction.rule.scale, prediction.scene.nodata
    if scale is None:
        scale = "8 bits, no scale"
    else:
        scale = "scale " + ", ".join(f"{low:g} to {high:g}" for low, high in scale)
    return [prediction.summary(), f"{scale}; " + ("no nodata value" if nodata is None else f"nodata value {nodata:g}")]


def _sample_windows(prediction: ScenePrediction, wanted: int) -> tuple[list[Window], float, float]:
    """Read windows at random places until `wanted` of them have data.

    Returns:
        The windows with data, the share of the places with data, and the mean seconds per place.
    """
    places = list(prediction.grid.windows())
    order = np.random.default_rng(0).permutation(len(places))[:MOST_TRIED]
    found, tried, start = [], 0, time.perf_counter()
    for place in order.tolist():
        window, tried = prediction.read_window(places[place]), tried + 1
        found += [] if window is None else [window]
        if len(found) == wanted:
            break
    return found, len(found) / tried, (time.perf_counter() - start) / tried


def _measure(prediction: ScenePrediction, windows: list[Window], reading_seconds: float) -> Speed:
    """Measure the time of a window. The first batch is not timed, because it prepares libraries and the device."""
    batch = prediction.options.windows_per_batch
    _predict(prediction, windows[:batch])
    timed = windows[batch:] or windows
    start = time.perf_counter()
    _predict(prediction, timed)
    seconds = (time.perf_counter() - start) / len(timed)
    batches = f"{-(-len(timed) // batch)} batches of {min(batch, len(timed))} windows"
    return Speed(
        max(seconds, reading_seconds / NUM_READERS), batches
    )  # threads read windows while others are predicted


def _predict(prediction: ScenePrediction, windows: list[Window]):
    """Predict windows as if they were neighbours without overlap, and compute their values."""
    grid, options = prediction.grid, prediction.options
    height, width = grid.window
    shape = (height * len(windows), width) if width < grid.crop_size else (height, width * len(windows))
    grid = WindowGrid(*shape, grid.crop_size, 0, options.blend)
    students, batch = prediction.students, options.windows_per_batch
    for piece in joined_pieces(prediction.model, grid, windows, students, batch, prediction.flip):
        prediction.plane_values(piece)


def _strip_bytes(prediction: ScenePrediction) -> int:
    """Return the bytes of the rows that are in memory at a time.

    These are the sums of the logits where two rows of windows overlap, and on a CPU also the finished values.
    """
    grid, model = prediction.grid, prediction.model
    channels = len(prediction.students) * model.config.num_labels + 1
    pixel_bytes = sum(np.dtype(dtype).itemsize for dtype in prediction.planes().values())
    sums = 2 * 4 * channels * grid.overlap * grid.width  # before and after a row of windows, float32
    return sums + (grid.window[0] * grid.width * pixel_bytes if model.device.type == "cpu" else 0)


def describe(estimates: list[list[SceneEstimate]]) -> str:
    """Return lines about all scenes, and one about all of them together.

    Args:
        estimates: Estimates of the scenes of every process. The processes work at the same time.
    """
    every = [estimate for of_process in estimates for estimate in of_process]
    windows = sum(estimate.windows for estimate in every)
    seconds = max(sum(estimate.seconds for estimate in of_process) for of_process in estimates)
    count = "1 scene" if len(every) == 1 else f"{len(every)} scenes"
    total = f"Dry run: {count} can be mapped, {windows} windows, about {format_duration(seconds)}"
    lines = [*(estimate.describe() for estimate in every), f"{total} without writing the files. Nothing was written."]
    return "\n".join(lines)


__all__ = ["SceneEstimate", "Speed", "check_scene", "describe"]
