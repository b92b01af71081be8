"""Write the files of a finished map: GeoTIFFs, class names, quick-look and polygons.

The files are first written to temporary paths and then renamed, the map last. A map that exists is therefore complete.
If a file that is made from the map fails, such as the quick-look, the map and the other files are still written.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from rasterio.errors import RasterioError

from ..data.reading import ImageRule
from ..model.configuration_co2s import Co2SConfig
from ..utils.errors import UserError, UserFileExistsError, UserOSError, UserValueError
from ..utils.figures import draw_scene_map, palette_or_default
from ..utils.files import check_writable, clean, flush, written_file
from .georeferencing import GroundPixels
from .maps import FULL, NODATA, MapBand, strips, write_class_names, write_map
from .options import SceneOptions
from .polygons import MapObject, map_objects, write_polygons
from .rasters import SceneRaster
from .resumable_raster import ResumableRaster, differences, file_error, was_replacing
from .scene_files import is_local, scene_name
from .scene_identity import SceneIdentity


QUICK_LOOK_PX = 900  # longer side of the pictures in the quick-look
STATISTICS_ROWS = 64  # rows whose areas are summed at a time
TAG = "CO2S_"  # prefix of the tags with the settings of a map
# Prefixes of tags of the scene that do not hold for its map.
SCENE_TAGS = ("STATISTICS_", "TIFFTAG_MINSAMPLEVALUE", "TIFFTAG_MAXSAMPLEVALUE", TAG, "CLASS_")

logger = logging.getLogger(__name__)


class IncompleteMap(UserOSError):
    """The map is complete, but a file that is made from it is missing."""


@dataclass(frozen=True)
class SceneMap:
    """The files and the statistics of a finished map.

    Args:
        paths: "map", "class_names", "quick_look" and, if requested, "confidence", "probabilities", "vector" -> path.
        class_pixels: Number of pixels of every class.
        class_areas_m2: Area of every class in square metres, without `unmeasured_pixels`. None if the coordinates of
            the scene cannot be converted to metres.
        nodata_pixels: Number of pixels without data.
        unmeasured_pixels: Number of pixels of every class whose area is unknown, because they or their neighbours have
            no position on Earth. With `class_areas_m2` of None, these are all pixels.
    """

    paths: dict[str, Path]
    class_pixels: list[int]
    class_areas_m2: list[float] | None
    nodata_pixels: int
    unmeasured_pixels: list[int]


def output_paths(destination: Path, options: SceneOptions) -> dict[str, Path]:
    """Return the path of every file of a map, by the names of [`SceneMap`]. The map is the last one.

    Raises:
        UserValueError: `destination` does not end in .tif.
    """
    if destination.suffix.lower() not in (".tif", ".tiff"):
        raise UserValueError(f"The map is written to '{destination}'; expected a name that ends in .tif.")

    def beside(ending: str) -> Path:
        return destination.with_name(destination.stem + ending)

    paths = {"quick_look": beside(".png"), "class_names": destination.with_name(f"{destination.name}.aux.xml")}
    if options.save_confidence:
        paths["confidence"] = beside("_confidence.tif")
    if options.save_probabilities:
        paths["probabilities"] = beside("_probabilities.tif")
    if options.vector is not None:
        paths["vector"] = options.vector_path(destination)
    return paths | {"map": destination}


def check_no_shared_files(maps: dict[str, Path], options: SceneOptions):
    """Check that no file belongs to the maps of two scenes, such as a_confidence.tif, a map and the confidence of a.

    Args:
        maps: Scene -> path of its map.
        options: Which files are written.

    Raises:
        UserValueError: Two maps have a file of the same name, or a name does not end in .tif.
    """
    owners: dict[Path, str] = {}
    for scene, destination in maps.items():
        for path in output_paths(destination, options).values():
            if owners.setdefault(path.resolve(), scene) != scene:
                raise UserValueError(
                    f"'{scene}' and '{owners[path.resolve()]}' would both write '{path}'. Map them in separate runs, "
                    "into two folders."
                )


def check_destinations(source: str, paths: dict[str, Path], resume: bool, is_dry_run: bool = False):
    """Create the folders of the files, and check that nothing would be overwritten.

    Args:
        source: The scene.
        paths: The files of its map, from [`output_paths`].
        resume: The files may exist if the map also exists, or if a run was killed while it moved them there.
        is_dry_run: Only check: create no folder, and leave what killed runs left.

    Raises:
        UserValueError: A file is the scene itself.
        UserFileExistsError: A file exists already.
        UserOSError: A file is a folder, or its folder cannot be created or written.
        UserOSError, UserValueError: The folder of the finished rows cannot be used; see [`Progress.read`].
    """
    is_complete = resume and paths["map"].exists()
    for path in reversed(paths.values()):
        if is_local(source) and path.resolve() == Path(source).resolve():
            raise UserValueError(f"'{path}' is the scene itself. Choose another destination.")
        if path.is_dir():
            raise UserOSError(f"'{path}' is a folder; expected the name of a file.")
        if is_dry_run:
            check_writable(path.parent, "Choose another folder.")
        else:
            _make_folder(path.parent)
        if not is_complete:
            _check_free(path, paths["map"], resume)


def _make_folder(folder: Path):
    """Create a folder for files of a map, check that it can be written, and clean up what killed runs left there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise file_error(error, folder) from error
    if not os.access(folder, os.W_OK):  # checked now, because writing begins after the prediction
        raise UserOSError(f"'{folder}' cannot be written. Change its permissions, or choose another folder.")
    clean(folder)


def _check_free(path: Path, destination: Path, resume: bool = True):
    """Check that a file of the map at `destination` is new, or was put there by a run that was killed at its end.

    Raises:
        UserFileExistsError: It exists already.
    """
    if path.exists() and not (resume and was_replacing(destination, path)):
        raise UserFileExistsError(f"'{path}' exists already. Choose another destination, or remove it.")


def can_be_completed(paths: dict[str, Path]) -> bool:
    """Return whether files of an existing map are missing that can be made from its finished rows."""
    is_missing = any(not path.exists() for path in paths.values())
    return is_missing and was_replacing(paths["map"], paths["map"])


def check_complete(paths: dict[str, Path], facts: dict):
    """Check that an existing map was made with the same settings and that all files exist.

    Settings of files that are not requested are not compared. Neither are tags that the map does not have: earlier
    versions wrote fewer tags.

    Args:
        paths: The files of the map, from [`output_paths`].
        facts: The settings of this run: those of the predicted values, and [`output_facts`].

    Raises:
        UserFileExistsError: A file is missing, or the settings differ.
        UserOSError: The map cannot be read.
    """
    path = paths["map"]
    if missing := [str(other) for other in paths.values() if not other.exists()]:
        raise UserFileExistsError(
            f"'{path}' is complete, but '{missing[0]}' is missing. The finished rows, from which it could be made, "
            "are gone. Remove the map to make all files again, or choose another destination."
        )
    try:
        with rasterio.open(path, driver="GTiff") as raster:
            found = _from_tags(raster.tags())
    except RasterioError as error:
        raise UserOSError(
            f"'{path}' exists, but cannot be read: {error}. Remove it, or choose another destination."
        ) from error
    if not isinstance(found.get("model"), dict):
        raise UserFileExistsError(
            f"'{path}' exists, and is no map of this package. Remove it, or choose another destination."
        )
    found["model"].pop("device", None)  # in maps of earlier versions; now in the tag CO2S_RUNS
    expected = {name: value for name, value in _requested(facts, paths).items() if name in found}
    if differing := differences(_requested(found, paths), json.loads(json.dumps(expected))):
        listed = ", ".join(f"{name} ({old}, now {new})" for name, (old, new) in differing.items())
        raise UserFileExistsError(
            f"'{path}' exists and was made with another {listed}. Remove it, or choose another destination."
        )


def _requested(facts: dict, paths: dict[str, Path]) -> dict:
    """Return the facts without those of planes and polygons that are not among the requested files."""
    unused = set() if "vector" in paths else {"min_area_m2", "simplify_m"}
    planes = {"labels"} | ({"confidence"} if {"confidence", "vector"} & paths.keys() else set())
    if "probabilities" in paths:
        planes |= {name for name in facts["planes"] if name.startswith("probability_")}
    return {name: value for name, value in facts.items() if name not in unused} | {
        "planes": {name: dtype for name, dtype in facts["planes"].items() if name in planes}
    }


def output_facts(config: Co2SConfig, identity: SceneIdentity, options: SceneOptions) -> dict:
    """Return the settings that change the files of a map but not the predicted values, and the parts of the scene."""
    facts = {name: getattr(options, name) for name in ("cog", "min_area_m2", "simplify_m")}
    facts["class_names"] = [config.id2label[index] for index in range(config.num_labels)]
    return facts | ({"scene_parts": identity.parts_checksum()} if identity.parts else {})


class SceneOutputs:
    """The files of a map, which are written from its finished rows.

    Args:
        config: Configuration of the model: class names and palette.
        scene: The scene. The map has its pixel grid.
        rule: Conversion of the scene to 8-bit RGB, for the quick-look.
        options: Which files to write, and how.
        planes: The finished rows: labels, confidence and probabilities, in pixels of `scene.read_grid`.
        facts: From [`output_facts`], for the tags of the files.

    Raises:
        UserValueError: Polygons are requested, but the scene has no transform that can be converted to metres.
    """

    def __init__(
        self,
        config: Co2SConfig,
        scene: SceneRaster,
        rule: ImageRule,
        options: SceneOptions,
        planes: ResumableRaster,
        facts: dict,
    ):
        self.config, self.scene, self.rule, self.options, self.planes = config, scene, rule, options, planes
        self.grid, self.facts, self.names = scene.grid, facts, facts["class_names"]
        self.palette = palette_or_default(config.palette, config.num_labels)
        if options.vector is not None and self.grid.gcps:
            raise UserValueError(
                f"Polygons (`vector`) need a scene with a transform; {scene.source} has ground control points. Warp "
                "it first: `rio warp`."
            )
        try:
            self.ground = self.grid.on_ground()
        except UserValueError:
            if options.vector is not None:
                raise
            self.ground = None  # the legend then shows shares without areas

    def write(self, paths: dict[str, Path]) -> SceneMap:
        """Write all files to temporary paths, then move them to their paths, the map last.

        Raises:
            IncompleteMap: A file that is made from the map could not be made. All others are written.
            UserOSError: The map could not be written, for example because the disk is full. No file is written.
        """
        failures: dict[Path, Exception] = {}
        with ExitStack() as stack:  # it ends the contexts in reverse order
            for name in ("map", "confidence", "probabilities"):
                if name in paths:
                    self._write_raster(stack.enter_context(written_file(paths[name])), name)
            result = self._measured(paths)
            derived = {
                "vector": self._write_polygons,
                "quick_look": lambda path: self._draw_quick_look(path, result),
                "class_names": lambda path: write_class_names(path, self.names),
            }
            for name, write in derived.items():
                if name in paths:
                    _write_derived(paths[name], write, stack, failures)
            for path in paths.values():  # the prediction may have taken hours
                _check_free(path, paths["map"])
            self.planes.note_outputs(list(paths.values()))
        for folder in {path.parent for path in paths.values()}:
            flush(folder)  # before the finished rows are removed
        _say_what_is_unknown(self.scene.source, result)
        if failures:
            listed = ", ".join(f"'{path}' ({type(error).__name__}: {error})" for path, error in failures.items())
            raise IncompleteMap(
                f"The map '{paths['map']}' is complete, but a file is missing: {listed}. To make it from the finished "
                "rows, correct the cause and use `resume=True`. To keep the map without it, remove "
                f"'{self.planes.folder}'."
            ) from next(iter(failures.values()))
        return result

    def _plane_reader(self, name: str, masked: bool = True) -> Callable[[slice], np.ndarray]:
        """Return a function that reads rows of a plane in pixels of the scene.

        If the scene was read at another ground sampling distance, the function takes the nearest pixels of the plane.

        Args:
            name: Name of the plane.
            masked: After such a resampling, set the pixels of the scene without data to the nodata value.
        """
        read_grid, nodata = self.scene.read_grid, _nodata_of(self.planes.planes[name])
        if self.grid is read_grid:
            return lambda rows: self.planes.read(name, rows)
        down, across = self.scene.step
        columns = ((np.arange(self.grid.width) + 0.5) / across).astype(int)

        def read(rows: slice) -> np.ndarray:
            nearest = ((np.arange(rows.start, rows.stop) + 0.5) / down).astype(int)
            values = self.planes.read(name, slice(nearest[0], nearest[-1] + 1))
            values = values[nearest - nearest[0]][:, columns]
            if masked:
                values[~self.scene.valid(rows)] = nodata
            return values

        return read

    def _write_raster(self, path: Path, output: str):
        """Write the GeoTIFF of one output: "map", "confidence" or "probabilities"."""
        planes, palette = {"confidence": "confidence"}, None  # name of each plane -> name of its band
        if output == "map":
            planes, palette = {"labels": "class"}, self.palette
        elif output == "probabilities":
            planes = {f"probability_{index}": name for index, name in enumerate(self.names)}
        bands = [MapBand(name, self._plane_reader(plane)) for plane, name in planes.items()]
        dtype = self.planes.planes[next(iter(planes))].name
        write_map(path, bands, dtype, self.grid, self._tags(), palette, self.options.cog)

    def _tags(self) -> dict[str, str]:
        """Return the tags of the map: those of the scene, the settings (CO2S_...) and the class names (CLASS_...)."""
        tags = {name: value for name, value in self.scene.tags.items() if not name.startswith(SCENE_TAGS)}
        tags |= _as_tags(self.planes.settings | self.facts | {"runs": self.planes.runs})
        return tags | {f"CLASS_{index}": name for index, name in enumerate(self.names)}

    def _measured(self, paths: dict[str, Path]) -> SceneMap:
        """Count the pixels of every class and sum their areas. If the areas fail, return the numbers without them."""
        try:
            return self._measure(paths, self.ground)
        except Exception as error:  # an error must not lose the map
            logger.warning("The areas of the classes cannot be computed.", exc_info=error)
            return self._measure(paths, None)

    def _measure(self, paths: dict[str, Path], ground: GroundPixels | None) -> SceneMap:
        """Count the pixels of every class and sum their areas, unless `ground` is None."""
        read, num_classes = self._plane_reader("labels"), self.config.num_labels
        pixels, unmeasured = np.zeros((2, NODATA + 1), dtype=np.int64)
        areas = np.zeros(NODATA + 1)
        for rows in strips(self.grid.height, STATISTICS_ROWS):
            labels = read(rows).ravel()
            pixels += np.bincount(labels, minlength=NODATA + 1)
            if ground is None:
                unmeasured += np.bincount(labels, minlength=NODATA + 1)
                continue
            of_rows = ground.areas_m2(rows).ravel()
            areas += np.bincount(labels, np.nan_to_num(of_rows), minlength=NODATA + 1)
            unmeasured += np.bincount(labels[np.isnan(of_rows)], minlength=NODATA + 1)
        pixels, unmeasured, nodata = pixels[:num_classes].tolist(), unmeasured[:num_classes].tolist(), pixels[NODATA]
        areas = None if ground is None else areas[:num_classes].tolist()
        return SceneMap(paths, pixels, areas, int(nodata), unmeasured)

    def _draw_quick_look(self, path: Path, result: SceneMap):
        """Draw the scene, its map and the confidence, each reduced in size by nearest neighbour."""
        height, width = self.scene.sample_shape(QUICK_LOOK_PX)
        values, valid = self.scene.sample(QUICK_LOOK_PX)
        image = np.array(self.rule.to_8_bit(values))
        image[~valid] = 255
        rows = ((np.arange(height) + 0.5) * self.grid.height / height).astype(int)
        columns = ((np.arange(width) + 0.5) * self.grid.width / width).astype(int)

        def reduced(name: str) -> np.ndarray:
            read = self._plane_reader(name, masked=False)
            return np.stack([read(slice(row, row + 1))[0, columns] for row in rows])

        labels, confidence = np.where(valid, reduced("labels"), NODATA), _as_probabilities(reduced("confidence"))
        confidence = np.where(labels == NODATA, np.nan, confidence)
        draw_scene_map(image, labels, confidence, self._legend(result), self.palette, path)

    def _legend(self, result: SceneMap) -> dict[int, str]:
        """Return the legend: class index -> name, share and area of each class that is in the map."""
        num_valid = max(sum(result.class_pixels), 1)
        legend = {}
        for index, pixels in enumerate(result.class_pixels):
            if pixels:
                unmeasured, area = result.unmeasured_pixels[index], ""
                if unmeasured < pixels:
                    area = f", {'at least ' * (unmeasured > 0)}{_format_area(result.class_areas_m2[index])}"
                legend[index] = f"{self.names[index]}: {100 * pixels / num_valid:.1f} %{area}"
        return legend

    def _write_polygons(self, path: Path):
        """Write the objects of the map that are large enough."""
        labels, confidence = self._plane_reader("labels"), self._plane_reader("confidence")

        def read(rows: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            return labels(rows), _as_probabilities(confidence(rows)), self.ground.areas_m2(rows)

        def kept() -> Iterator[MapObject]:
            nonlocal left_out
            for found in map_objects(self.grid.height, read, NODATA):
                if np.isnan(found.area_m2) and least:
                    left_out += 1
                elif not found.area_m2 < least:
                    yield found

        least, left_out = self.options.min_area_m2, 0
        simplify_px = self.options.simplify_m / float(np.mean(self.ground.pixel_size_m()))
        write_polygons(path, kept(), self.grid, dict(enumerate(self.names)), simplify_px)
        if left_out:
            logger.warning(
                f"'{path.name}' has no polygons for {left_out} objects of unknown area, because `min_area_m2` is "
                f"{least}."
            )


def _write_derived(path: Path, write: Callable[[Path], None], stack: ExitStack, failures: dict[Path, Exception]):
    """Write a temporary file that becomes `path` at the end of `stack`. An error goes into `failures`."""

    def failed(error: Exception):
        if isinstance(error, OSError) and not isinstance(error, UserError):
            error = file_error(error, path)
        if not isinstance(error, UserError):
            logger.warning(f"'{path}' cannot be made.", exc_info=error)
        failures[path] = error

    try:
        with ExitStack() as own:
            write(own.enter_context(written_file(path)))
            finished = own.pop_all()
    except Exception as error:  # an error must not lose the map
        failed(error)
        return

    def move(*of_stack):  # the error that ends `stack`: type, error, traceback
        try:
            finished.__exit__(*of_stack)
        except Exception as error:
            failed(error)

    stack.push(move)


def _say_what_is_unknown(source: str, result: SceneMap):
    """Say that the scene has no data, or that areas are unknown."""
    if not any(result.class_pixels):
        logger.warning(f"'{scene_name(source)}' has no pixels with data. Its map has the value {NODATA} everywhere.")
    if result.class_areas_m2 is not None and (unmeasured := sum(result.unmeasured_pixels)):
        logger.warning(
            f"{unmeasured} pixels of '{scene_name(source)}', or their neighbours, have no position on Earth. Their "
            "area is unknown. The areas of the classes do not contain them."
        )


def _as_tags(facts: dict) -> dict[str, str]:
    return {f"{TAG}{name.upper()}": json.dumps(value) for name, value in facts.items()}


def _from_tags(tags: dict[str, str]) -> dict:
    """Return the facts in the tags of a map. Tags that [`_as_tags`] has not made are left out."""
    facts = {}
    for name, value in tags.items():
        if name.startswith(TAG):
            with suppress(ValueError):
                facts[name.removeprefix(TAG).lower()] = json.loads(value)
    return facts


def _nodata_of(dtype: np.dtype) -> float:
    return NODATA if dtype == np.uint8 else np.nan


def _as_probabilities(values: np.ndarray) -> np.ndarray:
    """Convert stored scores (0 to 254 as uint8, or float32) to 0 to 1, float32."""
    return values.astype(np.float32) / FULL if values.dtype == np.uint8 else values


def _format_area(square_metres: float) -> str:
    return f"{square_metres / 1e6:,.2f} km²" if square_metres >= 1e6 else f"{square_metres / 1e4:,.2f} ha"
