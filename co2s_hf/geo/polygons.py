"""Outline the objects of a map, strip by strip, and write them as a vector file."""

import itertools
import json
import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyogrio
import shapely
from affine import Affine
from pyarrow import parquet
from pyogrio.errors import DataLayerError, DataSourceError
from rasterio.crs import CRS
from rasterio.features import rasterize, shapes

from ..utils.errors import UserOSError
from ..utils.files import written_file
from .georeferencing import LONG_LAT, GeoGrid, convert
from .maps import strips


GDAL_DRIVERS = {".gpkg": "GPKG", ".geojson": "GeoJSON"}
LAYER = "objects"
STRIP_ROWS = 256  # rows that are outlined at a time
BATCH = 2048  # objects that are written at a time
SCHEMA = pa.schema(
    [
        ("class", pa.int16()),
        ("name", pa.string()),
        ("area_m2", pa.float64()),
        ("confidence", pa.float32()),
        ("geometry", pa.binary()),
    ]
)

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class MapObject:
    """Connected pixels of one class. Neighbours share a side; a common corner does not connect them.

    Args:
        label: Class index.
        area_m2: Area on the ground in square metres. NaN: unknown.
        num_pixels: Number of pixels.
        confidence_sum: Sum of the confidence of its pixels.
        parts: One outline per strip that contains a part of it, in pixel coordinates (column, row).
        merged_into: The object that contains this one after [`absorb`] merged the two. None: it was not merged.
    """

    label: int
    area_m2: float
    num_pixels: int
    confidence_sum: float
    parts: list[shapely.Polygon]
    merged_into: "MapObject | None" = field(default=None, repr=False)

    def whole(self) -> "MapObject":
        """Return the object that contains this one after all merges."""
        found = self
        while found.merged_into is not None:
            found = found.merged_into
        return found

    def absorb(self, other: "MapObject"):
        """Merge another object into this one."""
        self.area_m2 += other.area_m2
        self.num_pixels += other.num_pixels
        self.confidence_sum += other.confidence_sum
        self.parts += other.parts
        other.parts, other.merged_into = [], self

    @property
    def confidence(self) -> float:
        """Mean confidence of the pixels, 0 to 1."""
        return self.confidence_sum / self.num_pixels

    def outline(self) -> shapely.Polygon:
        """Return the outline as one polygon, with holes and without vertices at the borders of strips."""
        if len(self.parts) == 1:
            return self.parts[0]
        return shapely.union_all(self.parts).simplify(0)


def map_objects(
    height: int, read: Callable[[slice], tuple[np.ndarray, np.ndarray, np.ndarray]], nodata: int
) -> Iterator[MapObject]:
    """Yield every object of a map as soon as it is complete.

    Only objects that touch the last row of the current strip are kept in memory.

    Args:
        height: Height of the map in pixels.
        read: Function from a slice of rows to their labels (uint8), confidence (0 to 1) and pixel areas (square
            metres, NaN if unknown), each (rows, width).
        nodata: Label of pixels that belong to no object.
    """
    above = None  # of the last row of the previous strip: labels, objects by number, object number of each pixel
    for rows in strips(height, STRIP_ROWS):
        labels, confidence, areas = read(rows)
        objects, numbers = _objects_of_strip(labels, confidence, areas, nodata, rows.start)
        candidates = list(objects.values())
        if above is not None:
            _merge_across(*above, labels[0], objects, numbers[0])
            candidates += above[1].values()
        last = {number: objects[number] for number in np.unique(numbers[-1]) if number}
        above = labels[-1], last, numbers[-1]
        yield from _complete(candidates, last.values())
    yield from _complete(above[1].values(), ())


def _complete(candidates: Iterable[MapObject], touching_last_row: Iterable[MapObject]) -> Iterator[MapObject]:
    """Yield each merged object of the candidates once, unless it touches the last row, where it may still grow."""
    wholes = {id(whole): whole for whole in (part.whole() for part in candidates)}
    for growing in {id(part.whole()) for part in touching_last_row}:
        del wholes[growing]
    yield from wholes.values()


def _objects_of_strip(labels, confidence, areas, nodata, start) -> tuple[dict[int, MapObject], np.ndarray]:
    """Return the objects of a strip by number, from 1, and the object number of each pixel (rows, width), 0 for none.

    `start` is the first row of the strip. The other arguments are as in [`map_objects`].
    """
    found = list(shapes(labels, mask=labels != nodata, connectivity=4, transform=Affine.translation(0, start)))
    numbers = np.zeros(labels.shape, dtype=np.int32)
    if found:
        outlines = ((outline, number) for number, (outline, _) in enumerate(found, start=1))
        rasterize(outlines, out=numbers, transform=Affine.translation(0, start))
    count, flat = len(found) + 1, numbers.ravel()
    pixels = np.bincount(flat, minlength=count)
    area = np.bincount(flat, weights=areas.ravel(), minlength=count)
    sums = np.bincount(flat, weights=confidence.ravel(), minlength=count)
    objects = {
        number: MapObject(
            int(label), float(area[number]), int(pixels[number]), float(sums[number]), [_polygon(outline)]
        )
        for number, (outline, label) in enumerate(found, start=1)
    }
    return objects, numbers


def _polygon(outline: dict) -> shapely.Polygon:
    shell, *holes = outline["coordinates"]
    return shapely.Polygon(shell, holes)


def _merge_across(labels_above, objects_above, numbers_above, labels, objects, numbers):
    """Merge objects of the same class that touch across the border between two strips."""
    touching = (labels_above == labels) & (numbers_above > 0)
    pairs = np.unique(np.stack([numbers_above[touching], numbers[touching]]), axis=1)
    for upper, lower in pairs.T:
        first, second = objects_above[upper].whole(), objects[lower].whole()
        if first is not second:
            first.absorb(second)


def write_polygons(
    path: Path, objects: Iterable[MapObject], grid: GeoGrid, id2label: dict[int, str], simplify_px: float = 0.0
) -> int:
    """Write objects into a vector file in batches: class, class name, area, mean confidence and outline of each.

    Args:
        path: File to write: .gpkg, .geojson (longitude and latitude, as RFC 7946 requires) or .parquet (GeoParquet).
            Objects with a corner that has no longitude and latitude are left out of .geojson; a warning has their
            number.
        objects: The objects, from [`map_objects`].
        grid: Pixel grid of the map. It has a transform.
        id2label: Class index -> class name.
        simplify_px: Largest shift of an outline when it is simplified, in pixels. Each outline is simplified alone, so
            neighbouring outlines may overlap or leave gaps. 0: no simplification.

    Returns:
        The number of objects in the file. An unknown area is null there.

    Raises:
        UserOSError: The file could not be written completely.
    """
    count, left_out, failures, objects = 0, 0, [], iter(objects)

    def next_objects() -> list[MapObject]:
        try:
            return list(itertools.islice(objects, BATCH))
        except Exception as error:  # kept, because the writers raise an error of their own instead
            failures.append(error)
            raise

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal count, left_out
        while chunk := next_objects():
            outlines = np.array([_outline(found, grid.transform, simplify_px) for found in chunk])
            if path.suffix == ".geojson":
                inside = _on_earth(outlines, grid.crs)
                chunk, outlines = list(itertools.compress(chunk, inside)), outlines[inside]
                left_out += np.count_nonzero(~inside)
            count += len(chunk)
            columns = {
                "class": [found.label for found in chunk],
                "name": [id2label[found.label] for found in chunk],
                "area_m2": [None if np.isnan(found.area_m2) else found.area_m2 for found in chunk],
                "confidence": [found.confidence for found in chunk],
                "geometry": shapely.to_wkb(outlines).tolist(),
            }
            yield pa.RecordBatch.from_pydict(columns, schema=SCHEMA)

    write = _write_parquet if path.suffix == ".parquet" else _write_with_gdal
    try:
        with written_file(path) as target:
            write(target, batches(), grid.crs)
            if not _is_complete(target, count):
                raise UserOSError(f"'{path.name}' was not written completely. Is the disk full?")
    except (DataSourceError, DataLayerError, pa.ArrowException, RuntimeError, sqlite3.Error) as error:
        if failures:
            raise failures[0] from error
        raise UserOSError(f"'{path.name}' cannot be written: {error}. Is the disk full?") from error
    if left_out:
        logger.warning(
            f"'{path.name}' has no polygons for {left_out} objects with a corner that has no longitude and latitude. "
            "Files that end in .gpkg or .parquet have them, in the coordinates of the scene."
        )
    return count


def _on_earth(outlines: np.ndarray, crs: CRS) -> np.ndarray:
    """Return which of the outlines, in a coordinate system, have a longitude and latitude for every vertex."""
    points, owners = shapely.get_coordinates(outlines, return_index=True)
    longitude, _ = convert(crs, LONG_LAT, *points.T)
    inside = np.ones(len(outlines), dtype=bool)
    inside[owners[np.isnan(longitude)]] = False
    return inside


def _outline(found: MapObject, transform: Affine, simplify_px: float) -> shapely.Polygon:
    """Return the outline in the coordinates of the map."""
    outline = found.outline()
    if simplify_px:
        outline = outline.simplify(simplify_px)
    return shapely.transform(outline, lambda points: np.stack(transform @ tuple(points.T), axis=1))


def _is_complete(target: Path, count: int) -> bool:
    """Check that the file is complete: GDAL does not report all writes that fail when a file is closed."""
    if target.suffix == ".geojson":
        with target.open("rb") as file:
            file.seek(-min(16, target.stat().st_size), os.SEEK_END)
            return b"".join(file.read().split()).endswith(b"]}")
    if target.suffix == ".gpkg":
        with closing(sqlite3.connect(target)) as database:
            (found,) = database.execute(f"SELECT count(*) FROM {LAYER}").fetchone()
            extensions = database.execute("SELECT extension_name FROM gpkg_extensions").fetchall()
        return found == count and ("gpkg_rtree_index",) in extensions
    return True  # pyarrow reports every failed write


def _write_with_gdal(target: Path, batches: Iterator[pa.RecordBatch], crs: CRS):
    driver = GDAL_DRIVERS[target.suffix]
    pyogrio.write_arrow(
        pa.RecordBatchReader.from_batches(SCHEMA, batches),
        target,
        layer=LAYER,
        driver=driver,
        geometry_name="geometry",
        geometry_type="Polygon",
        crs=crs.to_wkt(),
        **({"RFC7946": "YES"} if driver == "GeoJSON" else {}),
    )


def _write_parquet(target: Path, batches: Iterator[pa.RecordBatch], crs: CRS):
    geometry = {"encoding": "WKB", "geometry_types": ["Polygon"], "crs": crs.to_dict(projjson=True)}
    metadata = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": geometry}}
    with parquet.ParquetWriter(target, SCHEMA.with_metadata({"geo": json.dumps(metadata)})) as writer:
        for batch in batches:
            writer.write_batch(batch)
