import json

import numpy as np
import pyogrio
import pytest
import shapely
from affine import Affine
from helpers import no_file_larger_than
from pyarrow import parquet
from rasterio.crs import CRS
from rasterio.features import shapes

from co2s_hf.geo import polygons
from co2s_hf.geo.georeferencing import GeoGrid
from co2s_hf.geo.polygons import map_objects, write_polygons


NODATA = 255
NAMES = {0: "land", 1: "road", 2: "water"}


def blobs(height, width, seed=0):
    """Return labels with objects of all sizes, some of them across many strips, and with a quarter without data."""
    rng = np.random.default_rng(seed)
    labels = np.kron(rng.integers(0, 3, (height // 4 + 1, width // 4 + 1)), np.ones((4, 4)))[:height, :width]
    labels[rng.random(labels.shape) < 0.1] = 1
    labels[: height // 3, : width // 4] = NODATA
    return labels.astype(np.uint8)


def reader(labels):
    """Return a function that reads rows of labels, confidence and areas, then all confidences and all areas."""
    confidence = np.random.default_rng(1).random(labels.shape).astype(np.float32)
    areas = np.tile(np.linspace(0.2, 0.3, labels.shape[1]), (len(labels), 1))
    return lambda rows: (labels[rows], confidence[rows], areas[rows]), confidence, areas


@pytest.mark.parametrize("strip_rows", [1, 7, 1000])
def test_strips_give_the_objects_of_the_whole_map(strip_rows, monkeypatch):
    monkeypatch.setattr(polygons, "STRIP_ROWS", strip_rows)
    labels = blobs(50, 61)
    read, confidence, areas = reader(labels)
    found = list(map_objects(50, read, NODATA))
    whole = {}
    for outline, label in shapes(labels, mask=labels != NODATA, connectivity=4):
        polygon = shapely.geometry.shape(outline)
        whole[int(label), polygon.normalize().wkb] = polygon
    assert len(found) == len(whole) > 50
    for one in found:
        polygon = whole.pop((one.label, one.outline().normalize().wkb))  # also the same vertices
        assert one.num_pixels == polygon.area
    found = {label: [one for one in found if one.label == label] for label in NAMES}
    for label in NAMES:
        inside = labels == label
        assert sum(one.num_pixels for one in found[label]) == inside.sum()
        assert sum(one.area_m2 for one in found[label]) == pytest.approx(areas[inside].sum())
        mean = sum(one.confidence * one.num_pixels for one in found[label]) / inside.sum()
        assert mean == pytest.approx(confidence[inside].mean(), rel=1e-5)


def test_parts_that_meet_in_a_lower_strip_are_one_object(monkeypatch):
    monkeypatch.setattr(polygons, "STRIP_ROWS", 2)
    labels = np.full((8, 9), NODATA, dtype=np.uint8)
    labels[1:6, [1, 7]] = 2  # the shape of a U, with a smaller U inside
    labels[6, 1:8] = 2
    labels[0:4, [3, 5]] = 1
    labels[4, 3:6] = 1
    found = sorted(map_objects(8, reader(labels)[0], NODATA), key=lambda one: one.label)
    assert [(one.label, one.num_pixels) for one in found] == [(1, 11), (2, 17)]
    assert all(one.outline().geom_type == "Polygon" for one in found)


def test_a_map_without_data_has_no_objects():
    assert list(map_objects(5, reader(np.full((5, 6), NODATA, dtype=np.uint8))[0], NODATA)) == []


def read_back(path):
    """Return the coordinate system, the columns and the geometries of a vector file."""
    if path.suffix == ".parquet":
        table = parquet.read_table(path)
        facts = json.loads(table.schema.metadata[b"geo"])["columns"]["geometry"]
        columns = {name: table[name].to_pylist() for name in table.column_names if name != "geometry"}
        return CRS.from_user_input(json.dumps(facts["crs"])), columns, shapely.from_wkb(table["geometry"].to_pylist())
    facts, _, geometries, values = pyogrio.raw.read(path)
    columns = {name: list(column) for name, column in zip(facts["fields"], values)}
    return CRS.from_user_input(facts["crs"]), columns, shapely.from_wkb(geometries)


@pytest.mark.parametrize("suffix", [".gpkg", ".geojson", ".parquet"])
def test_files_have_every_object(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(polygons, "BATCH", 10)
    labels = blobs(40, 40)
    transform = Affine.translation(500_000, 2_780_000) @ Affine.rotation(20) @ Affine.scale(0.5, -0.5)
    grid = GeoGrid(40, 40, transform, CRS.from_epsg(32640))
    objects = list(map_objects(40, reader(labels)[0], NODATA))
    path = tmp_path / f"objects{suffix}"
    assert write_polygons(path, iter(objects), grid, NAMES) == len(objects) > 20
    crs, columns, geometries = read_back(path)
    assert crs == CRS.from_epsg(4326 if suffix == ".geojson" else 32640)  # RFC 7946 allows degrees only
    assert columns["name"] == [NAMES[one.label] for one in objects] and columns["class"] == [o.label for o in objects]
    assert columns["area_m2"] == pytest.approx([one.area_m2 for one in objects])
    assert columns["confidence"] == pytest.approx([one.confidence for one in objects])
    assert shapely.is_valid(geometries).all() and [path.name for path in tmp_path.iterdir()] == [path.name]
    if suffix != ".geojson":
        assert shapely.area(geometries) == pytest.approx([one.num_pixels / 4 for one in objects])
    x, y = geometries[0].exterior.coords[0][:2]
    assert (54 < x < 60 and 25 < y < 26) if suffix == ".geojson" else (499_900 < x < 500_100)


def test_simplified_outlines_have_fewer_vertices(tmp_path):
    labels = np.tril(np.ones((30, 30), dtype=np.uint8))
    grid = GeoGrid(30, 30, Affine(1, 0, 0, 0, -1, 0), CRS.from_epsg(32640))
    vertices = []
    for tolerance in (0, 2):
        path = tmp_path / f"{tolerance}.gpkg"
        write_polygons(path, map_objects(30, reader(labels)[0], NODATA), grid, NAMES, simplify_px=tolerance)
        geometries = read_back(path)[2]
        vertices.append(shapely.get_num_coordinates(geometries).sum())
        assert shapely.area(geometries).sum() == pytest.approx(900, rel=0.05)
    assert vertices[0] > 100 > 20 > vertices[1]


@pytest.mark.parametrize("suffix", [".gpkg", ".geojson", ".parquet"])
@pytest.mark.parametrize("missing_bytes", [3, 5_000])
def test_a_file_that_is_cut_short_is_an_error(suffix, missing_bytes, tmp_path):
    labels = blobs(100, 100)
    grid = GeoGrid(100, 100, Affine(1, 0, 500_000, 0, -1, 2_780_000), CRS.from_epsg(32640))
    path = tmp_path / f"objects{suffix}"
    write_polygons(path, map_objects(100, reader(labels)[0], NODATA), grid, NAMES)
    size = path.stat().st_size
    path.unlink()
    with no_file_larger_than(size - missing_bytes), pytest.raises(OSError, match=r"written|too large|space"):
        write_polygons(path, map_objects(100, reader(labels)[0], NODATA), grid, NAMES)
    assert not path.exists()


def test_an_error_of_the_objects_is_raised_and_leaves_no_file(tmp_path):
    def broken():
        yield from ()
        raise OSError("the scene went away")

    grid = GeoGrid(30, 30, Affine(1, 0, 0, 0, -1, 0), CRS.from_epsg(32640))
    with pytest.raises(OSError, match="the scene went away"):
        write_polygons(tmp_path / "objects.gpkg", broken(), grid, NAMES)
    assert list(tmp_path.iterdir()) == []
