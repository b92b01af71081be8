"""Read vector files: GeoPackage, GeoJSON, shapefile, FlatGeobuf and GeoParquet.

GDAL opens more than seventy vector formats. Some of them name other files or web addresses, or run programs. A file is
therefore opened only as the format of its suffix, after a check of its first bytes. GDAL opens the binary formats. Its
checks for text formats, such as virtual layers, end at the first zero byte, so the zero bytes of these headers exclude
text formats. GeoJSON is read without GDAL: many formats of GDAL are JSON.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyogrio
import shapely
from pyarrow import parquet
from pyogrio.errors import DataLayerError, DataSourceError
from rasterio.crs import CRS
from rasterio.errors import CRSError
from shapely.errors import ShapelyError

from ..utils.errors import UserFileNotFoundError, UserValueError
from .georeferencing import LONG_LAT
from .options import LABEL_SUFFIXES


CHUNK = 2**16  # features that are read at a time
MAX_JSON_BYTES = 2**30  # of a GeoJSON file: its text is in memory as a whole
GEOPACKAGE_IDS = (b"GPKG", b"GP10", b"GP11")
GEOMETRY_TYPES = {
    "Point", "MultiPoint", "LineString", "MultiLineString", "Polygon", "MultiPolygon", "GeometryCollection",
}  # fmt: skip
# Errors of the libraries for damaged files. UnboundLocalError: pyogrio's, for an unknown coordinate system.
READ_ERRORS = (
    DataSourceError, DataLayerError, pa.ArrowException, ShapelyError, OSError, ValueError, RecursionError,
    UnboundLocalError,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class VectorFile:
    """The features of a file, or of a layer of it.

    Args:
        path: The file.
        crs: Coordinate system of the geometries.
        read: Function that yields the features in chunks: geometries (features,), None for a feature without one, and
            the values of the chosen column (None for each feature if no column is chosen).
    """

    path: str
    crs: CRS
    read: Callable[[], Iterator[tuple[np.ndarray, list]]]

    def chunks(self) -> Iterator[tuple[np.ndarray, list]]:
        """Yield the features in chunks, as `read` does.

        Raises:
            UserValueError: There are no features, or the file is damaged.
        """
        is_empty = True
        try:
            for geometries, values in self.read():
                is_empty = is_empty and not len(geometries)
                yield geometries, values
        except READ_ERRORS as error:
            raise _unreadable(self.path, error) from error
        if is_empty:
            raise UserValueError(f"'{self.path}' has no features. Expected at least one polygon. Name another file.")


def open_vector_file(path: str, column: str | None = None, layer: str | None = None, option: str = "") -> VectorFile:
    """Open a vector file, after a check of its format.

    Args:
        path: The file. Its suffix is one of `LABEL_SUFFIXES`.
        column: Column whose values are read. None: no column.
        layer: Layer of a GeoPackage. None: its only layer with geometries. The other formats have one layer.
        option: Name of the parameter that gives the layer, for messages.

    Raises:
        UserFileNotFoundError: The file does not exist.
        UserValueError: It is damaged or of another format, or has no such column or layer, or no coordinate system.
    """
    if not os.path.isfile(path):
        raise UserFileNotFoundError(f"'{path}' does not exist. Name a vector file ({', '.join(LABEL_SUFFIXES)}).")
    suffix = os.path.splitext(path)[1].lower()
    openers = {".geojson": _open_geojson, ".json": _open_geojson, ".parquet": _open_parquet}
    try:
        crs, columns, read = openers.get(suffix, _open_with_gdal)(path, column, layer, option)
    except UserValueError:
        raise
    except READ_ERRORS as error:
        raise _unreadable(path, error) from error
    if column is not None and column not in columns:
        found = ", ".join(columns) or "none"
        raise UserValueError(
            f"'{path}' has no column '{column}'. Its columns are: {found}. Name the one with the classes: "
            f"`class_column='{columns[0] if columns else 'type'}'`."
        )
    if not (crs and (crs.is_geographic or crs.is_projected)):
        raise UserValueError(
            f"'{path}' has no coordinate system, so its place on the ground is unknown. Set the coordinate system in "
            "which it was drawn, and save it as GeoPackage: `ogr2ogr -a_srs EPSG:25832 OUT.gpkg IN`."
        )
    return VectorFile(path, crs, read)


def _unreadable(path: str, reason: Exception | str) -> UserValueError:
    return UserValueError(
        f"'{path}' cannot be read: {reason}. Expected a complete vector file of the format that its suffix names "
        f"({', '.join(LABEL_SUFFIXES)}). Save it again as GeoPackage, for example with QGIS."
    )


def _open_with_gdal(path: str, column: str | None, layer: str | None, option: str):
    """Return the coordinate system, the columns and the reader of a GeoPackage, a shapefile or a FlatGeobuf file."""
    suffix = os.path.splitext(path)[1].lower()
    with open(path, "rb") as stream:
        head = stream.read(100)
    if not _has_format(head, suffix):
        raise _unreadable(path, f"it does not begin as a {suffix} file does")
    # An absolute path is none of GDAL's own names, and no address for pyogrio.
    source = os.path.abspath(path)
    layer = _choose_layer(path, layer, option) if suffix == ".gpkg" else 0
    info = pyogrio.read_info(source, layer=layer)

    def read() -> Iterator[tuple[np.ndarray, list]]:
        columns, start = [] if column is None else [column], 0
        while True:
            _, _, geometries, fields = pyogrio.raw.read(
                source, layer=layer, columns=columns, skip_features=start, max_features=CHUNK, force_2d=True
            )
            values = [None] * len(geometries) if column is None else fields[0].tolist()
            yield _from_wkb(geometries), values
            start += len(geometries)
            if len(geometries) == CHUNK:
                continue
            if suffix == ".fgb" and start < info["features"]:  # GDAL does not report that the file ends too early
                raise ValueError(f"it ends after {start} of {info['features']} features")
            return

    return None if info["crs"] is None else _crs(path, info["crs"]), list(info["fields"]), read


def _from_wkb(geometries: np.ndarray) -> np.ndarray:
    """Return the geometries of WKB. None: there is none, or it is damaged."""
    with np.errstate(invalid="ignore"):  # coordinates that are not finite: their features are left out later
        return shapely.from_wkb(geometries, on_invalid="ignore")


def _has_format(head: bytes, suffix: str) -> bool:
    """Return whether the first 100 bytes of a file are those of the format of its suffix."""
    if suffix == ".gpkg":
        return head.startswith(b"SQLite format 3\0") and head[68:72] in GEOPACKAGE_IDS
    if suffix == ".shp":
        return head.startswith(b"\0\0\x27\x0a")
    # The size of the header follows the signature. Its highest byte is zero, because GDAL reads at most 10 MB.
    return head.startswith(b"fgb\3fgb") and head[11:12] == b"\0"


def _choose_layer(path: str, layer: str | None, option: str) -> str:
    """Return the chosen layer of a GeoPackage, or its only one with geometries."""
    layers = [str(name) for name, kind in pyogrio.list_layers(os.path.abspath(path)) if kind is not None]
    if not layers:
        raise UserValueError(f"'{path}' has no layer with geometries. Name a file with polygons.")
    if layer is None and len(layers) > 1:
        raise UserValueError(
            f"'{path}' has {len(layers)} layers: {', '.join(layers)}. Choose one: `{option}='{layers[0]}'`."
        )
    if layer is not None and layer not in layers:
        raise UserValueError(f"`{option}` is '{layer}', but the layers of '{path}' are: {', '.join(layers)}.")
    return layer or layers[0]


def _crs(path: str, text: str) -> CRS:
    try:
        return CRS.from_user_input(text)
    except CRSError as error:
        raise _unreadable(path, f"its coordinate system is unknown ({error})") from error


def _open_parquet(path: str, column: str | None, layer: str | None, option: str):
    """Return the coordinate system, the columns and the reader of a GeoParquet file."""
    file = parquet.ParquetFile(path)
    try:
        facts = json.loads((file.schema_arrow.metadata or {})[b"geo"])
        name = facts["primary_column"]
        geometry = facts["columns"][name]
    except (KeyError, TypeError) as error:
        raise _unreadable(path, "it is no GeoParquet: it has no metadata 'geo'") from error
    if geometry.get("encoding") != "WKB":
        raise _unreadable(path, f"its geometries have the encoding {geometry.get('encoding')}; expected WKB")
    crs = LONG_LAT  # what the format says if a file does not name a coordinate system
    if "crs" in geometry:
        crs = None if geometry["crs"] is None else _crs(path, json.dumps(geometry["crs"]))

    def read() -> Iterator[tuple[np.ndarray, list]]:
        for batch in file.iter_batches(CHUNK, columns=[name] if column is None else [name, column]):
            geometries = np.array(batch[name].to_pylist(), dtype=object)
            values = [None] * len(geometries) if column is None else batch[column].to_pylist()
            yield _from_wkb(geometries), values

    return crs, [other for other in file.schema_arrow.names if other not in facts["columns"]], read


@dataclass(frozen=True)
class _Feature:
    geometry: shapely.Geometry | None
    value: Any


def _open_geojson(path: str, column: str | None, layer: str | None, option: str):
    """Return the coordinate system, the columns and the reader of a GeoJSON file.

    Each geometry is converted as soon as its text is parsed. So the nested lists of all coordinates are never in
    memory together.
    """
    if os.path.getsize(path) > MAX_JSON_BYTES:
        raise UserValueError(
            f"'{path}' has {os.path.getsize(path) / 2**30:.1f} GiB; GeoJSON files are read up to "
            f"{MAX_JSON_BYTES / 2**30:.0f} GiB. Save it as GeoPackage: `ogr2ogr OUT.gpkg IN.geojson`."
        )
    columns: dict[str, None] = {}  # in the order of the file

    def convert(found: dict) -> Any:
        if found.get("type") == "Feature":
            properties = found.get("properties") or {}
            columns.update(dict.fromkeys(properties))
            return _Feature(found.get("geometry"), properties.get(column))
        if found.get("type") in GEOMETRY_TYPES and ("coordinates" in found or "geometries" in found):
            return _geometry(found)
        return found

    content = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_hook=convert)
    crs = _geojson_crs(path, content)
    features = content.get("features") if isinstance(content, dict) else [content]
    if not isinstance(features, list):
        raise ValueError("it is no FeatureCollection")
    features = [_Feature(one, None) if isinstance(one, shapely.Geometry) else one for one in features]
    if not all(isinstance(one, _Feature) and isinstance(one.geometry, shapely.Geometry | None) for one in features):
        raise ValueError("it has a feature that is none, or with a geometry that is none")

    def read() -> Iterator[tuple[np.ndarray, list]]:
        geometries = np.array([one.geometry for one in features], dtype=object)
        yield geometries, [one.value for one in features]

    return crs, list(columns), read


def _geometry(found: dict) -> shapely.Geometry:
    """Convert the object of a geometry. The parts of a collection are converted already."""
    if found["type"] == "GeometryCollection":
        return shapely.GeometryCollection(found["geometries"])
    try:
        return shapely.geometry.shape(found)
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"a {found['type']} has damaged coordinates ({error})") from error


def _geojson_crs(path: str, content: Any) -> CRS | None:
    """Return the coordinate system: longitude and latitude, unless an older file names another one.

    Only names are read: the older format also allows an address of a file.
    """
    if not (isinstance(content, dict) and "crs" in content):
        return LONG_LAT
    if content["crs"] is None:
        return None
    try:
        name = str(content["crs"]["properties"]["name"])
    except (KeyError, TypeError):
        name = ""
    if re.fullmatch(r"urn:ogc:def:crs:OGC:.*:CRS84|OGC:CRS84", name):
        return LONG_LAT
    code = re.fullmatch(r"(?:urn:ogc:def:crs:)?EPSG:(?:[\d.]*:)?(\d+)", name)
    if code is None:
        raise _unreadable(path, f"its 'crs' is '{name}'; expected a name such as urn:ogc:def:crs:EPSG::25832")
    return _crs(path, f"EPSG:{code[1]}")
