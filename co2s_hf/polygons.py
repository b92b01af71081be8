"""Outlines of a map's objects, found while the map streams by, and written as a vector file."""

import itertools
import json
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

from .files import written_file
from .ground import Place
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


@dataclass(eq=False)
class MapObject:
    """Connected pixels of one class (neighbours share a side, not only a corner).

    Args:
        label: Class index.
        area_m2: On the ground.
        num_pixels: How many.
        confidence_sum: Over its pixels.
        parts: Outlines in pixel coordinates (column, row), one for every strip of rows that it crosses.
    """

    label: int
    area_m2: float
    num_pixels: int
    confidence_sum: float
    parts: list[shapely.Polygon]
    merged_into: "MapObject | None" = field(default=None, repr=False)

    def whole(self) -> "MapObject":
        """The object that this one has become a part of."""
        found = self
        while found.merged_into is not None:
            found = found.merged_into
        return found

    def absorb(self, other: "MapObject"):
        self.area_m2 += other.area_m2
        self.num_pixels += other.num_pixels
        self.confidence_sum += other.confidence_sum
        self.parts += other.parts
        other.parts, other.merged_into = [], self

    @property
    def confidence(self) -> float:
        return self.confidence_sum / self.num_pixels

    def outline(self) -> shapely.Polygon:
        """One polygon, with holes; no vertices where strips met."""
        if len(self.parts) == 1:
            return self.parts[0]
        return shapely.union_all(self.parts).simplify(0)


def map_objects(
    height: int, read: Callable[[slice], tuple[np.ndarray, np.ndarray, np.ndarray]], nodata: int
) -> Iterator[MapObject]:
    """All objects of a map, each whole, as soon as the rows that have passed hold all of it.

    Only objects that reach the latest strip of rows are kept in memory.

    Args:
        height: Of the map in pixels.
        read: For some rows their labels (uint8), confidence (0 to 1) and pixel areas (square metres), (rows, width).
        nodata: Label of pixels that belong to no object.
    """
    above = None  # labels, objects and their numbers in the last row so far
    for rows in strips(height, STRIP_ROWS):
        labels, confidence, areas = read(rows)
        objects, numbers = _objects_of_strip(labels, confidence, areas, nodata, rows.start)
        passing = list(objects.values())
        if above is not None:
            _join(*above, labels[0], objects, numbers[0])
            passing += above[1].values()
        last = {number: objects[number] for number in np.unique(numbers[-1]) if number}
        above = labels[-1], last, numbers[-1]
        yield from _finished(passing, last.values())
    yield from _finished(above[1].values(), ())


def _finished(passing: Iterable[MapObject], reaching: Iterable[MapObject]) -> Iterator[MapObject]:
    """The objects, each once, that the rows to come cannot add to."""
    wholes = {id(whole): whole for whole in (part.whole() for part in passing)}
    for unfinished in {id(part.whole()) for part in reaching}:
        del wholes[unfinished]
    yield from wholes.values()


def _objects_of_strip(labels, confidence, areas, nodata, start) -> tuple[dict[int, MapObject], np.ndarray]:
    """Objects by number from 1, and the number of every pixel's, (rows, width); 0 for none."""
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


def _join(labels_above, objects_above, numbers_above, labels, objects, numbers):
    """Make objects one that touch across the line between two strips."""
    touching = (labels_above == labels) & (numbers_above > 0)
    pairs = np.unique(np.stack([numbers_above[touching], numbers[touching]]), axis=1)
    for upper, lower in pairs.T:
        first, second = objects_above[upper].whole(), objects[lower].whole()
        if first is not second:
            first.absorb(second)


def _on_ground(found: MapObject, transform: Affine, simplify_px: float) -> bytes:
    """The outline in the map's coordinates, as well-known binary."""
    outline = found.outline()
    if simplify_px:
        outline = outline.simplify(simplify_px)
    return shapely.to_wkb(shapely.transform(outline, lambda points: np.stack(transform @ tuple(points.T), axis=1)))


def write_polygons(
    path: Path, objects: Iterable[MapObject], place: Place, id2label: dict[int, str], simplify_px: float = 0.0
) -> int:
    """Write objects as they come: class, class name, area in square metres, mean confidence and outline of each.

    Args:
        path: Ends in .gpkg, .geojson (longitude and latitude, as RFC 7946 asks) or .parquet (GeoParquet).
        objects: See [`map_objects`].
        place: Of the map.
        id2label: Names of the classes.
        simplify_px: How far outlines may move, in pixels; each moves alone, so neighbours may part or overlap.

    Returns:
        How many there are.

    Raises:
        OSError: The file cannot be written.
    """
    count, failures, objects = 0, [], iter(objects)

    def next_objects() -> list[MapObject]:
        try:
            return list(itertools.islice(objects, BATCH))
        except Exception as error:  # which the writers would not tell
            failures.append(error)
            raise

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal count
        while chunk := next_objects():
            count += len(chunk)
            columns = {
                "class": [found.label for found in chunk],
                "name": [id2label[found.label] for found in chunk],
                "area_m2": [found.area_m2 for found in chunk],
                "confidence": [found.confidence for found in chunk],
                "geometry": [_on_ground(found, place.transform, simplify_px) for found in chunk],
            }
            yield pa.RecordBatch.from_pydict(columns, schema=SCHEMA)

    write = _write_parquet if path.suffix == ".parquet" else _write_with_gdal
    try:
        with written_file(path) as target:
            write(target, batches(), place.crs)
            if not _is_whole(target, count):
                raise OSError(f"'{path}' was not written whole. Is the disk full?")
    except (DataSourceError, DataLayerError, pa.ArrowException, RuntimeError, sqlite3.Error) as error:
        raise failures[0] if failures else OSError(f"'{path}' cannot be written: {error}") from error
    return count


def _is_whole(target: Path, count: int) -> bool:
    """Whether all is there: GDAL says nothing of some writes that fail when a file is closed."""
    if target.suffix == ".geojson":
        with target.open("rb") as file:
            file.seek(-min(16, target.stat().st_size), os.SEEK_END)
            return b"".join(file.read().split()).endswith(b"]}")
    if target.suffix == ".gpkg":
        with closing(sqlite3.connect(target)) as database:
            (found,) = database.execute(f"SELECT count(*) FROM {LAYER}").fetchone()
            extensions = database.execute("SELECT extension_name FROM gpkg_extensions").fetchall()
        return found == count and ("gpkg_rtree_index",) in extensions
    return True  # pyarrow does say


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
    facts = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": geometry}}
    with parquet.ParquetWriter(target, SCHEMA.with_metadata({"geo": json.dumps(facts)})) as writer:
        for batch in batches:
            writer.write_batch(batch)
