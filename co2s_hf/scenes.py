"""Whole georeferenced scenes in, maps out: any size, on the machine at hand.

The scene is read window by window, the map is written as its rows become final, so memory grows with the width of the
scene a little and with its height not at all.
"""

import json
import logging
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from tqdm.auto import tqdm


try:
    import rasterio

    from .maps import FULL, NODATA, MapBand, quantized, strips, write_class_names, write_map
    from .polygons import map_objects, write_polygons
    from .rasters import GDAL_OPTIONS, SceneRaster, UnreadableScene
except ImportError as error:
    raise ImportError(f"Scenes need more libraries ({error}): pip install 'co2s_hf[scenes]'.") from error
from .figures import draw_scene_map, palette_or_default
from .image_processing_co2s import Co2SImageProcessor
from .inference import JoinedPiece, Window, WindowGrid, fused_logits, fused_students, joined_pieces, window_side
from .modeling_co2s import Co2SForSemanticSegmentation
from .reading import ImageRule
from .scene_files import is_address, scene_name
from .scene_settings import SceneSettings
from .unfinished import UnfinishedMap, name_place, unfinished_folder


T = TypeVar("T")
R = TypeVar("R")
QUICK_LOOK_PX = 900  # longer side of the pictures in the quick-look
STATISTICS_ROWS = 64  # rows whose areas are summed at a time

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SceneMap:
    """What was written for a scene.

    Args:
        paths: "map", "class_names", "quick_look" and, where asked for, "confidence", "probabilities", "vector".
        class_pixels: Pixels of every class.
        class_areas_m2: Square metres of every class; None where the scene's coordinates tell no metres.
        nodata_pixels: Pixels without a class.
    """

    paths: dict[str, Path]
    class_pixels: list[int]
    class_areas_m2: list[float] | None
    nodata_pixels: int


def segment_scene(
    model: Co2SForSemanticSegmentation,
    image_processor: Co2SImageProcessor,
    source: str | Path,
    destination: str | Path,
    *,
    crop_size: int | None = None,
    flip: bool = False,
    bands: tuple[int, int, int] | None = None,
    scale: tuple[float, float] | tuple[tuple[float, float], ...] | str | None = None,
    resume: bool = False,
    show_progress: bool = True,
    **settings,
) -> SceneMap | None:
    """Segment a georeferenced raster of any size into a map that geographic information systems open.

    Args:
        model: In evaluation mode, on its device and in its precision; its configuration says how the students are
            fused.
        image_processor: Of the model. Its resizing does not apply: a scene's pixels have a size on the ground.
        source: Whatever GDAL opens: a file, a mosaic (VRT), an address (https://, s3://, /vsizip/...).
        destination: GeoTIFF for the class map (uint8, 255 where nothing was seen). NAME.png, a quick-look, and
            NAME.tif.aux.xml, the class names, lie beside it; NAME_confidence.tif and NAME_probabilities.tif on
            request.
        crop_size: Side of the windows in pixels; the crops that the model was trained on when left out.
        flip: Average with the prediction for mirrored windows.
        bands: Numbers from 1 of the bands for red, green and blue. Left out: the checkpoint's; else all.
        scale: What becomes 0 and 255: (low, high) of all bands or a pair for each; "percentiles" for the 2nd and 98th
            of this scene. Left out: the checkpoint's.
        resume: Go on with the rows that an interrupted run has finished; a map that is complete stays as it is.
        show_progress: Show a bar with pixels per second and the time left.
        settings: See [`SceneSettings`].

    Returns:
        What was written; None for a map that was complete.

    Raises:
        UnreadableScene: The scene cannot be read, or is no raster with a place on Earth.
        ValueError: Its bands are not what the model takes, or settings do not fit.
        FileExistsError: There is a map already, or finished rows of one, and they are not to be continued.
        OSError: The destination cannot be written.
    """
    settings, source, destination = SceneSettings(**settings), str(source), Path(destination)
    crop_size = window_side(model, crop_size)
    paths = _output_paths(destination, settings)
    _check_destinations(source, paths, resume)
    scale = _pairs(scale)
    if model.config.num_labels > NODATA:
        raise ValueError(f"The model has {model.config.num_labels} classes; a map in 8 bits shows {NODATA} at most.")
    rule = ImageRule.of_config(model.config)
    with rasterio.Env(**GDAL_OPTIONS), SceneRaster(source, bands or rule.bands, settings.resample_to) as scene:
        rule = scene.image_rule(scale or rule.scale)
        prediction = _Prediction(model, image_processor, scene, rule, settings, crop_size, flip)
        if paths["map"].exists():
            _check_complete(paths, prediction.facts() | _output_facts(settings))
            shutil.rmtree(unfinished_folder(destination), ignore_errors=True)  # of a run killed at its very end
            return None
        unfinished = UnfinishedMap(
            destination, scene.grid.height, scene.grid.width, prediction.planes(), prediction.facts(), resume
        )
        with _kept_if_worth(unfinished, source):
            outputs = _Outputs(model.config, scene, rule, settings, unfinished)
            prediction.run(unfinished, show_progress)
            found = outputs.write(paths)
        unfinished.remove()
        return found


def _pairs(scale) -> tuple[tuple[float, float], ...] | str | None:
    """A scale as [`ImageRule`] has it, or "percentiles".

    Raises:
        ValueError: It is neither.
    """
    if scale is None or (isinstance(scale, str) and scale == "percentiles"):
        return scale
    pairs = () if isinstance(scale, str) else (tuple(scale),) if np.ndim(scale) == 1 else tuple(map(tuple, scale))
    if len(pairs) not in (1, 3) or not all(len(pair) == 2 and pair[0] < pair[1] for pair in pairs):
        raise ValueError(f"`scale` is {scale}; give (low, high), three of these, or 'percentiles'.")
    return pairs


def _output_paths(destination: Path, settings: SceneSettings) -> dict[str, Path]:
    if destination.suffix.lower() not in (".tif", ".tiff"):
        raise ValueError(f"The map is a GeoTIFF: '{destination}' should end in .tif.")

    def beside(ending: str) -> Path:
        return destination.with_name(destination.stem + ending)

    paths = {"quick_look": beside(".png"), "class_names": destination.with_name(f"{destination.name}.aux.xml")}
    if settings.save_confidence:
        paths["confidence"] = beside("_confidence.tif")
    if settings.save_probabilities:
        paths["probabilities"] = beside("_probabilities.tif")
    if settings.vector is not None:
        paths["vector"] = settings.vector_path(destination)
    return paths | {"map": destination}  # last: when it is there, so is all the rest


def _check_destinations(source: str, paths: dict[str, Path], resume: bool):
    """Refuse to write over the scene, or over what is there already and not of a run that goes on."""
    goes_on = resume and (paths["map"].exists() or unfinished_folder(paths["map"]).exists())
    for path in reversed(paths.values()):
        if _is_local(source) and path.resolve() == Path(source).resolve():
            raise ValueError(f"'{path}' is the scene itself. Choose another destination.")
        if path.is_dir():
            raise IsADirectoryError(f"'{path}' is a folder; name a file.")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):  # or it fails after hours
            raise PermissionError(f"'{path.parent}' cannot be written. Choose another destination.")
        if path.exists() and not goes_on:
            raise FileExistsError(f"'{path}' exists already. Choose another destination, or remove it.")


def _check_complete(paths: dict[str, Path], facts: dict):
    """A map that is there was made in the same way, and has all that is asked for."""
    path = paths["map"]
    if missing := [str(other) for other in paths.values() if not other.exists()]:
        raise FileExistsError(f"'{path}' is complete, without '{missing[0]}'. Remove it to have all of them made.")
    with rasterio.open(path) as raster:
        made = raster.tags()
    differing = [
        name.removeprefix("CO2S_").lower() for name, value in _as_tags(facts).items() if made.get(name) != value
    ]
    if differing:
        raise FileExistsError(
            f"'{path}' exists and was made with another {', '.join(differing)}. Remove it, or choose another "
            "destination."
        )


@contextmanager
def _kept_if_worth(unfinished: UnfinishedMap, source: str) -> Iterator[None]:
    """Where it fails, keep the finished rows to go on from; not of a file that is broken itself."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError):
            name_place(error, unfinished.folder)
        # A mosaic's parts may be elsewhere, and come back.
        broken = isinstance(error, UnreadableScene) and _is_local(source) and not source.lower().endswith(".vrt")
        if broken or not unfinished.rows_done:
            unfinished.remove()
        else:
            logger.warning(f"Finished rows are kept in '{unfinished.folder}': go on with --resume (resume=True).")
        raise


class _Prediction:
    """Labels and scores of a scene, row by row into an unfinished map."""

    def __init__(self, model, image_processor, scene, rule, settings, crop_size, flip):
        self.model, self.image_processor, self.scene, self.rule = model, image_processor, scene, rule
        self.settings, self.flip = settings, flip
        self.students = fused_students(model.config)
        self.grid = WindowGrid(scene.grid.height, scene.grid.width, crop_size, settings.overlap_px, settings.blend)

    def planes(self) -> dict[str, str]:
        """The type of each plane that is kept."""
        names = ["confidence"]
        if self.settings.save_probabilities:
            names += [f"probability_{index}" for index in range(self.model.config.num_labels)]
        return {"labels": "uint8"} | dict.fromkeys(names, self.settings.score_dtype)

    def facts(self) -> dict:
        """All that the pixels depend on."""
        source, config, settings = self.scene.source, self.model.config, self.settings
        file = Path(source).stat() if _is_local(source) else None
        return {
            "scene": {"name": scene_name(source)}
            | ({"bytes": file.st_size, "modified": file.st_mtime} if file else {}),
            "model": {
                "weights": _fingerprint(self.model),
                "dtype": str(self.model.dtype),
                "device": self.model.device.type,
                "fusion": config.fusion,
            },
            "normalization": (self.image_processor.image_mean, self.image_processor.image_std),
            "crop_size": self.grid.crop_size,
            "overlap_px": self.grid.overlap,
            "blend": settings.blend,
            "flip": self.flip,
            "windows_per_batch": settings.windows_per_batch,
            "bands": self.rule.bands,
            "scale": self.rule.scale,
            "grid": (self.grid.height, self.grid.width),
            "planes": self.planes(),
        }

    def run(self, unfinished: UnfinishedMap, show_progress: bool):
        """Predict what is not there yet."""
        done, total = unfinished.rows_done, self.grid.height
        if done == total:
            return
        row, batch = self.grid.tops.index(done), self.settings.windows_per_batch
        first = self.grid.restart_row(row, batch)
        bar = tqdm(
            total=total * self.grid.width,
            initial=done * self.grid.width,
            unit="px",
            unit_scale=True,
            desc=scene_name(self.scene.source),
            disable=not show_progress,
        )
        # Closed here and now if anything fails: no thread may read on from a scene that is closed.
        with (
            bar,
            closing(read_ahead(self._read, self.grid.windows(first), self.settings.num_readers, 2 * batch)) as windows,
        ):
            for piece in joined_pieces(self.model, self.grid, windows, self.students, batch, self.flip, first):
                if piece.row < row:  # predicted again for what it says about the rows below
                    continue
                if piece.columns.start == 0:
                    shape = piece.rows.stop - piece.rows.start, self.grid.width
                    strip = {name: np.empty(shape, dtype) for name, dtype in unfinished.planes.items()}
                for name, values in self._values(piece).items():
                    strip[name][:, piece.columns] = values
                if piece.columns.stop == self.grid.width:
                    unfinished.write(piece.rows, strip)
                bar.update(piece.weights.numel())

    def _read(self, place: tuple[slice, slice]) -> Window | None:
        """A window as the model takes it; None where nothing was seen."""
        values, valid = self.scene.read(*place)
        if not valid.any():
            return None
        image = np.array(self.rule.to_8_bit(values))
        if not valid.all():  # the mean of what was seen, so that no value that stands for nothing reaches the model
            image[~valid] = image[valid].mean(axis=0).round()
        inputs = self.image_processor(image, do_resize=False, input_data_format="channels_last", return_tensors="pt")[
            "pixel_values"
        ]
        return Window(inputs[0], None if valid.all() else torch.from_numpy(valid))

    def _values(self, piece: JoinedPiece) -> dict[str, np.ndarray]:
        """What is kept of a finished piece, by plane."""
        valid = piece.weights > 0
        logits = (piece.sums / torch.where(valid, piece.weights, 1)).chunk(len(self.students))
        logits = {name: part[None] for name, part in zip(self.students, logits)}
        probabilities = fused_logits(logits, self.model.config.fusion, tuple(valid.shape)).softmax(dim=0)
        if not probabilities.isfinite().all():
            raise ValueError(
                "The model's logits are not finite (NaN or infinite): its weights or precision are wrong."
            )
        confidence, labels = probabilities.max(dim=0)
        scores = {"confidence": confidence}
        if self.settings.save_probabilities:
            scores |= {f"probability_{index}": plane for index, plane in enumerate(probabilities)}
        seen = valid.cpu().numpy()
        found = {"labels": np.where(seen, labels.cpu().numpy(), NODATA)}
        for name, plane in scores.items():
            plane = plane.cpu().numpy()
            found[name] = (
                np.where(seen, quantized(plane), NODATA)
                if self.settings.score_dtype == "uint8"
                else np.where(seen, plane, np.nan)
            )
        return found


class _Outputs:
    """Turns finished rows into files."""

    def __init__(self, config, scene, rule, settings, unfinished):
        self.config, self.scene, self.rule, self.settings = config, scene, rule, settings
        self.unfinished = unfinished
        on_scene = settings.output_grid == "scene"
        self.place = scene.place if on_scene else scene.grid
        self.palette = palette_or_default(config.palette, config.num_labels)
        self.names = [config.id2label[index] for index in range(config.num_labels)]
        if settings.vector is not None and self.place.gcps:
            raise ValueError(f"Polygons need a transform, {scene.source} has control points. Warp it: `rio warp`.")
        try:
            self.ground = self.place.ground()
        except ValueError:
            if settings.vector is not None:
                raise
            self.ground = None  # shares instead of areas

    def write(self, paths: dict[str, Path]) -> SceneMap:
        """Write every file beside the unfinished rows, then move all of them into place."""
        folder = self.unfinished.folder / "outputs"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        folder.mkdir()
        try:
            made = {name: folder / path.name for name, path in paths.items()}
            self._write_raster(made["map"], {"labels": "class"}, self.palette)
            if "confidence" in made:
                self._write_raster(made["confidence"], {"confidence": "confidence"})
            if "probabilities" in made:
                planes = {f"probability_{index}": name for index, name in enumerate(self.names)}
                self._write_raster(made["probabilities"], planes)
            write_class_names(made["class_names"], self.names)
            found = self._measured(paths)
            self._draw(made["quick_look"], found)
            if "vector" in paths:  # perhaps on another disk, so it is written beside its own place
                self._write_polygons(paths["vector"])
            for name in paths.keys() - {"vector", "map"}:
                os.replace(made[name], paths[name])
            os.replace(made["map"], paths["map"])
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return found

    def rows(self, name: str, is_masked: bool = True) -> Callable[[slice], np.ndarray]:
        """A function that reads rows of a plane in the pixels of the output: the nearest where they are others.

        What was seen is then read from the scene again, for the output's pixels, unless it is not to be masked.
        """
        grid, nodata = self.scene.grid, _nodata_of(self.unfinished.planes[name])
        if self.place is grid:
            return lambda rows: self.unfinished.read(name, rows)
        down, across = self.scene.step
        columns = ((np.arange(self.place.width) + 0.5) / across).astype(int)

        def read(rows: slice) -> np.ndarray:
            nearest = ((np.arange(rows.start, rows.stop) + 0.5) / down).astype(int)
            values = self.unfinished.read(name, slice(nearest[0], nearest[-1] + 1))
            values = values[nearest - nearest[0]][:, columns]
            if is_masked:
                values[~self.scene.valid(rows)] = nodata
            return values

        return read

    def _write_raster(self, path: Path, planes: dict[str, str], palette: np.ndarray | None = None):
        """A file with one band for each plane, called as is said."""
        bands = [MapBand(name, self.rows(plane)) for plane, name in planes.items()]
        dtype = self.unfinished.planes[next(iter(planes))].name
        write_map(path, bands, dtype, self.place, self._tags(), palette, self.settings.cog)

    def _tags(self) -> dict[str, str]:
        """The scene's own, what the map was made with, and the classes' names."""
        own = ("STATISTICS_", "TIFFTAG_MINSAMPLEVALUE", "TIFFTAG_MAXSAMPLEVALUE", "CO2S_", "CLASS_")  # not the map's
        tags = {name: value for name, value in self.scene.tags.items() if not name.startswith(own)}
        tags |= _as_tags(self.unfinished.settings | _output_facts(self.settings))
        return tags | {f"CLASS_{index}": name for index, name in enumerate(self.names)}

    def _measured(self, paths: dict[str, Path]) -> SceneMap:
        read, count = self.rows("labels"), self.config.num_labels
        pixels, areas = np.zeros(NODATA + 1, dtype=np.int64), np.zeros(NODATA + 1)
        for rows in strips(self.place.height, STATISTICS_ROWS):
            labels = read(rows).ravel()
            pixels += np.bincount(labels, minlength=NODATA + 1)
            if self.ground is not None:
                areas += np.bincount(labels, self.ground.areas_m2(rows).ravel(), minlength=NODATA + 1)
        areas = None if self.ground is None else areas[:count].tolist()
        return SceneMap(paths, pixels[:count].tolist(), areas, int(pixels[NODATA]))

    def _draw(self, path: Path, found: SceneMap):
        height, width = self.scene.sample_shape(QUICK_LOOK_PX)
        values, valid = self.scene.sample(QUICK_LOOK_PX)
        image = np.array(self.rule.to_8_bit(values))
        image[~valid] = 255
        rows = ((np.arange(height) + 0.5) * self.place.height / height).astype(int)
        columns = ((np.arange(width) + 0.5) * self.place.width / width).astype(int)

        def thinned(name: str) -> np.ndarray:
            read = self.rows(name, is_masked=False)
            return np.stack([read(slice(row, row + 1))[0, columns] for row in rows])

        labels, confidence = np.where(valid, thinned("labels"), NODATA), _probabilities(thinned("confidence"))
        confidence = np.where(labels == NODATA, np.nan, confidence)
        draw_scene_map(image, labels, confidence, self._legend(found), self.palette, path)

    def _legend(self, found: SceneMap) -> dict[int, str]:
        """Name, share and area of every class in the map, by class index."""
        seen = max(sum(found.class_pixels), 1)
        legend = {}
        for index, pixels in enumerate(found.class_pixels):
            if pixels:
                area = "" if found.class_areas_m2 is None else f", {_area(found.class_areas_m2[index])}"
                legend[index] = f"{self.names[index]}: {100 * pixels / seen:.1f} %{area}"
        return legend

    def _write_polygons(self, path: Path):
        labels, confidence = self.rows("labels"), self.rows("confidence")

        def read(rows: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            return labels(rows), _probabilities(confidence(rows)), self.ground.areas_m2(rows)

        objects = map_objects(self.place.height, read, NODATA)
        objects = (found for found in objects if found.area_m2 >= self.settings.min_area_m2)
        simplify_px = self.settings.simplify_m / float(np.mean(self.ground.pixel_size_m()))
        write_polygons(path, objects, self.place, dict(enumerate(self.names)), simplify_px)


def read_ahead(read: Callable[[T], R], places: Iterable[T], num_threads: int, ahead: int) -> Iterator[R]:
    """What `read` returns for every place, in order, some of them read before they are asked for."""
    pool, waiting = ThreadPoolExecutor(num_threads), deque()
    try:
        for place in places:
            waiting.append(pool.submit(read, place))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _is_local(source: str) -> bool:
    return not is_address(source) and Path(source).exists()


def _fingerprint(model: torch.nn.Module) -> str:
    """Tells models apart by a part of each of their tensors, which any training changes."""
    checksum = 0
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().flatten()[:1024].cpu().contiguous().view(torch.uint8)
        checksum = zlib.crc32(values.numpy().tobytes(), zlib.crc32(name.encode(), checksum))
    return f"{checksum:08x}"


def _output_facts(settings: SceneSettings) -> dict:
    """All else that the finished files depend on."""
    names = ("output_grid", "cog", "min_area_m2", "simplify_m")
    return {name: getattr(settings, name) for name in names}


def _as_tags(facts: dict) -> dict[str, str]:
    return {f"CO2S_{name.upper()}": json.dumps(value) for name, value in facts.items()}


def _nodata_of(dtype: np.dtype) -> float:
    return NODATA if dtype == np.uint8 else np.nan


def _probabilities(values: np.ndarray) -> np.ndarray:
    """Stored scores as float32, 0 to 1."""
    return values.astype(np.float32) / FULL if values.dtype == np.uint8 else values


def _area(square_metres: float) -> str:
    return f"{square_metres / 1e6:,.2f} km²" if square_metres >= 1e6 else f"{square_metres / 1e4:,.2f} ha"
