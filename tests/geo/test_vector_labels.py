import json
import shutil
from collections import Counter

import numpy as np
import pyogrio
import pytest
import rasterio.warp
import shapely
from affine import Affine
from pyarrow import Table, parquet
from rasterio.crs import CRS
from rasterio.features import shapes

from co2s_hf.geo import vector_files, vector_geometry
from co2s_hf.geo.georeferencing import LONG_LAT, GeoGrid, convert
from co2s_hf.geo.options import VectorLabelOptions
from co2s_hf.geo.vector_geometry import reprojected
from co2s_hf.geo.vector_labels import open_vector_labels
from co2s_hf.utils.errors import UserError, UserFileNotFoundError, UserValueError


UTM = CRS.from_epsg(32632)
EUROPE = CRS.from_epsg(3035)  # an equal-area projection of Europe, turned by several degrees against UTM
X, Y = 690_000, 5_330_000  # near Munich
IGNORE = 255


def grid(height=100, width=120, pixel=0.5, x=X, y=Y, crs=UTM):
    return GeoGrid(height, width, Affine(pixel, 0, x, 0, -pixel, y), crs)


def scene(height, width, seed=0):
    """Return labels of four classes: fields with oblique borders, a road and round ponds. Class 0 is everywhere."""
    rows, columns = np.mgrid[:height, :width]
    labels = ((rows + 0.4 * columns) // 60 % 2).astype(np.uint8)
    labels[abs(rows - 0.7 * columns - 10) < 6] = 2
    rng = np.random.default_rng(seed)
    for row, column in zip(rng.integers(0, height, 6), rng.integers(0, width, 6)):
        labels[(rows - row) ** 2 + (columns - column) ** 2 < 200] = 3
    return labels


def box(left, top, right, bottom, of=None):
    """Return a rectangle by columns and rows of a raster, as a polygon in its coordinates."""
    of = of or grid()
    (x0, x1), (y1, y0) = of.transform @ (np.array([left, right]), np.array([top, bottom]))
    return shapely.box(x0, y0, x1, y1)


def write(path, geometries, crs=UTM, layer=None, **columns):
    """Write a vector file. `path` decides the format."""
    columns = columns or {"type": ["house"] * len(geometries)}
    wkb = np.array([None if one is None else shapely.to_wkb(one) for one in geometries], dtype=object)
    if path.suffix == ".parquet":
        facts = {"encoding": "WKB", "crs": None if crs is None else json.loads(json.dumps(crs.to_dict(projjson=True)))}
        table = Table.from_pydict({**columns, "geometry": list(wkb)})
        geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": facts}}
        parquet.write_table(table.replace_schema_metadata({"geo": json.dumps(geo)}), path)
        return path
    values = [
        np.array(column, dtype=object if not len(column) or isinstance(column[0], str) else None)
        for column in columns.values()
    ]
    kinds = {one.geom_type for one in geometries if one is not None}
    pyogrio.raw.write(
        path,
        wkb,
        values,
        list(columns),
        geometry_type=kinds.pop() if len(kinds) == 1 else "Unknown",
        crs=crs and crs.to_wkt(),
        layer=layer,
        append=layer is not None and path.exists(),
        driver="GeoJSON" if path.suffix == ".json" else None,
    )
    return path


def read(path, of=None, class_names=None, **options):
    """Open one file as labels of one raster, and return the label map of the raster and the labels."""
    of = of or grid()
    options = {"class_column": "type", "background": "ignore"} | options
    paths = path if isinstance(path, list) else [path]
    labels = open_vector_labels(VectorLabelOptions(vector_labels=paths, **options), {"north.tif": of}, class_names)
    return labels.read(of), labels


def boundary(labels):
    """Return the pixels with a neighbour of another class."""
    edge = np.zeros(labels.shape, dtype=bool)
    edge[1:] |= labels[1:] != labels[:-1]
    edge[:-1] |= labels[1:] != labels[:-1]
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edge[:, :-1] |= labels[:, 1:] != labels[:, :-1]
    return edge


@pytest.mark.parametrize("suffix", [".gpkg", ".geojson", ".shp", ".fgb", ".parquet"])
def test_classes_that_are_drawn_in_another_coordinate_system_come_back(suffix, tmp_path):
    names, of, truth = ["field", "meadow", "road", "water"], grid(300, 400), scene(300, 400)
    found = list(shapes(truth, transform=of.transform))
    crs = LONG_LAT if suffix == ".geojson" else EUROPE
    outlines = [shapely.geometry.shape(rasterio.warp.transform_geom(UTM, crs, outline)) for outline, _ in found]
    path = write(tmp_path / f"all{suffix}", outlines, crs, type=[names[int(label)] for _, label in found])
    options = VectorLabelOptions(vector_labels=[path], class_column="type")  # the polygons cover everything
    labels = open_vector_labels(options, {"north.tif": of})
    assert labels.class_names == names
    assert labels.counts.values == Counter(names[int(label)] for _, label in found)
    together = np.full_like(truth, 254)
    for top in range(0, 300, 128):
        for left in range(0, 400, 128):
            part = np.s_[top : top + 128, left : left + 128]
            height, width = truth[part].shape
            window = GeoGrid(height, width, of.transform @ Affine.translation(left, top), UTM)
            together[part] = labels.read(window)
    wrong = together != truth
    assert wrong.mean() < 0.02 and not (wrong & ~boundary(truth)).any()
    assert (together == labels.read(of)).all()  # windows make no difference


def test_large_polygons_are_divided_without_gaps(tmp_path, monkeypatch):
    monkeypatch.setattr(vector_geometry, "MAX_VERTICES", 50)
    truth, of = scene(300, 400), grid(300, 400)
    found = list(shapes(truth, transform=of.transform))
    path = write(
        tmp_path / "all.gpkg",
        [shapely.geometry.shape(outline) for outline, _ in found],
        type=[str(int(label)) for _, label in found],
    )
    assert max(shapely.get_num_coordinates(shapely.geometry.shape(outline)) for outline, _ in found) > 200
    labels, opened = read(path, of)
    assert (labels == truth).all() and opened.class_names == ["0", "1", "2", "3"]
    assert shapely.get_num_coordinates(next(iter(opened.features._indices.values())).polygons).max() <= 50


def test_long_edges_follow_the_curve_of_the_other_coordinate_system(tmp_path):
    """A parallel of 100 km is a curve in UTM: 70 m from the chord."""
    of = grid(400, 400, pixel=2, x=605_000, y=5_317_500)  # the 48th parallel crosses it
    middle = convert(UTM, LONG_LAT, *(np.array([value]) for value in of.transform @ (200, 200)))
    west, south, latitude = middle[0][0] - 0.7, middle[1][0] - 0.5, middle[1][0]
    path = write(tmp_path / "half.geojson", [shapely.box(west, south, west + 1.4, latitude)], LONG_LAT)
    columns, rows = np.meshgrid(np.arange(400) + 0.5, np.arange(400) + 0.5)
    x, y = of.transform @ (columns.ravel(), rows.ravel())
    truth = (convert(UTM, LONG_LAT, x, y)[1] < latitude).reshape(400, 400)
    labels, _ = read(path, of)
    assert ((labels == 0) != truth).mean() < 2e-3  # 0.1 px along 400 px
    square = np.array([shapely.box(west, south, west + 1.4, latitude)])
    coarse = shapely.transform(square, lambda points: np.stack(convert(LONG_LAT, UTM, *points.T), axis=1))
    assert shapely.hausdorff_distance(coarse, reprojected(square, LONG_LAT, UTM, 0.2))[0] > 50


def test_only_geometries_without_coordinates_in_the_target_are_lost():
    corners = np.array([shapely.box(11, 48, 12, 49), shapely.box(11, 48, 12, 95), shapely.box(11, 95, 12, 96)])
    found = reprojected(corners, LONG_LAT, UTM, 0.1)
    assert shapely.is_missing(found).tolist() == [False, True, True]
    x, y = convert(LONG_LAT, UTM, np.array([11.5]), np.array([48.5]))
    assert shapely.contains_xy(found[0], x, y)[0]


def test_polygons_of_the_whole_world_are_burned(tmp_path):
    world = shapely.box(-180, -90, 180, 90)
    path = write(tmp_path / "world.geojson", [world, shapely.box(-180, -90, 180, 0)], LONG_LAT)
    labels, opened = read(path)
    assert (labels == 0).all() and opened.counts.outside == 1 and opened.features.num_unplaced == 0


def test_features_on_both_sides_of_the_180th_meridian(tmp_path):
    crs = CRS.from_epsg(32760)
    x, y = convert(LONG_LAT, crs, np.array([180.0]), np.array([-17.0]))
    of = grid(x=x[0] - 30, y=y[0] + 25, crs=crs)  # the meridian is in its middle
    outlines = [shapely.box(west, -17.0001, west + 1e-4, -16.9999) for west in (179.9999, -180)]
    path = write(tmp_path / "a.geojson", outlines, LONG_LAT, type=["west", "east"])
    labels, opened = read(path, of)
    (east, width), (west, _) = (
        (columns.mean(), np.ptp(columns) + 1) for columns in (np.nonzero(labels == n)[1] for n in (0, 1))
    )
    assert opened.class_names == ["east", "west"] and 58 < east < 82 and 38 < west < 62
    assert 20 <= width <= 24  # 1e-4 degrees are 10.6 m
    assert (labels == 0).sum() == pytest.approx((labels == 1).sum(), rel=0.02) == pytest.approx(935, rel=0.02)


def test_rasters_of_two_coordinate_systems(tmp_path):
    other = CRS.from_epsg(32633)
    x, y = convert(UTM, other, np.array([X + 30.0]), np.array([Y - 25.0]))
    rasters = {"a.tif": grid(), "b.tif": grid(x=x[0] - 30, y=y[0] + 25, crs=other), "far.tif": grid(x=X + 5000)}
    path = write(tmp_path / "a.gpkg", [box(50, 40, 70, 60)])
    options = VectorLabelOptions(vector_labels=[path], class_column="type", background="ignore")
    labels = open_vector_labels(options, rasters)
    counts = {name: (labels.read(of) == 0).sum() for name, of in rasters.items()}
    assert counts["a.tif"] == 400 and counts["b.tif"] == pytest.approx(400, abs=25) and counts["far.tif"] == 0
    assert "Rasters without a feature (1): far.tif." in labels.summary()


@pytest.mark.parametrize(
    ("priority", "winners"), [(None, "abc"), (["c"], "cab"), (["b", "c", "a"], "bca"), (["c", "a"], "cab")]
)
def test_the_first_class_wins_where_features_overlap(priority, winners, tmp_path):
    outlines = [box(10, 10, 50, 50), box(30, 30, 70, 70), box(40, 0, 60, 100)]
    for order in ((0, 1, 2), (2, 1, 0)):  # the order in the file has no effect
        path = write(tmp_path / f"{order[0]}.gpkg", [outlines[n] for n in order], type=["abc"[n] for n in order])
        labels, opened = read(path, priority=priority)
        truth = np.full((100, 120), IGNORE)
        for name in reversed(winners):
            left, top, right, bottom = [(10, 10, 50, 50), (30, 30, 70, 70), (40, 0, 60, 100)]["abc".index(name)]
            truth[top:bottom, left:right] = "abc".index(name)
        assert (labels == truth).all()
        assert f"Where features overlap, the first of these classes wins: {', '.join(winners)}." in opened.summary()


def test_a_drawn_background_wins_over_no_class(tmp_path):
    path = write(tmp_path / "a.gpkg", [box(10, 10, 90, 90), box(20, 20, 30, 30)], type=["all", "house"])
    labels, opened = read(path, background="all")
    assert opened.class_names == ["all", "house"] and (labels == 1).sum() == 100 and (labels == 0).sum() == 11_900
    assert (read(path, background="all", priority=["all"])[0] == 0).all()


def test_all_touched_pixels(tmp_path):
    path = write(tmp_path / "a.gpkg", [box(10.7, 10.7, 12.3, 12.3)])
    assert (read(path)[0] == 0).sum() == 1
    labels = read(path, all_touched=True)[0]
    assert (labels[10:13, 10:13] == 0).all() and (labels == 0).sum() == 9


@pytest.mark.parametrize("crs", [UTM, LONG_LAT, CRS.from_epsg(3857), CRS.from_epsg(2263)], ids=str)
def test_lines_and_points_get_a_width_in_metres_on_the_ground(crs, tmp_path):
    """In Web Mercator, a unit is 0.67 m there; in degrees, west to east is shorter than south to north."""
    of = grid(200, 200, pixel=0.5)
    x, y = of.transform @ (100, 100)
    if crs.to_epsg() == 2263:  # feet, around New York
        of = grid(200, 200, 0.5, 585_000, 4_511_000, CRS.from_epsg(32618))
        x, y = of.transform @ (100, 100)
    line = shapely.LineString([(x - 200, y - 20), (x + 200, y - 20)])
    shapes_of = np.array([line, shapely.Point(x, y + 20), shapely.box(x - 5, y - 3, x + 5, y + 3)])
    moved = reprojected(shapes_of, of.crs, crs, 1e-7 if crs.is_geographic else 0.01)
    path = write(tmp_path / "a.gpkg", list(moved), crs, type=["road", "tree", "box"])
    labels, opened = read(path, of, buffer_m=6)
    assert opened.class_names == ["box", "road", "tree"]
    columns = (labels == 1).sum(axis=0)
    assert abs(columns - 24).max() <= 1  # 12 m
    assert (labels == 2).sum() == pytest.approx(np.pi * 12**2, rel=0.03)
    assert (labels == 0).sum() == pytest.approx(20 * 12, abs=16)  # polygons get no buffer


def test_collections_have_areas_and_lines(tmp_path):
    mixed = shapely.GeometryCollection([box(10, 10, 20, 20), shapely.LineString([(X, Y - 40), (X + 60, Y - 40)])])
    nested = shapely.GeometryCollection([shapely.MultiPolygon([box(30, 0, 40, 10), box(50, 0, 60, 10)])])
    path = write(tmp_path / "a.gpkg", [mixed, nested, shapely.MultiPoint([(X + 5, Y - 45), (X + 50, Y - 45)])])
    labels, _ = read(path, buffer_m=1)
    truth = np.full((100, 120), IGNORE)
    truth[10:20, 10:20] = truth[0:10, 30:40] = truth[0:10, 50:60] = truth[78:82] = 0
    assert (labels[:85] == truth[:85]).all() and 16 <= (labels[85:] == 0).sum() <= 32
    with pytest.raises(UserValueError, match=r"a.gpkg' has 1 line and 2 points, but only polygons.*`buffer_m=3`"):
        read(path)
    path = write(tmp_path / "b.gpkg", [box(10, 10, 20, 20)])
    with pytest.raises(UserValueError, match=r"`buffer_m` is 2.0, but '.*b.gpkg' has only polygons"):
        read(path, buffer_m=2.0)


def test_invalid_and_empty_geometries_are_counted(tmp_path):
    corners = shapely.get_coordinates(box(10, 10, 30, 30))[:4]
    bow_tie = shapely.Polygon([corners[0], corners[2], corners[1], corners[3]])
    twice = shapely.MultiPolygon([box(40, 40, 60, 60), box(50, 50, 70, 70)])  # its parts overlap
    flat = shapely.Polygon([(X + 1, Y - 1), (X + 9, Y - 9), (X + 5, Y - 5), (X + 1, Y - 1)])
    outside = box(500, 500, 510, 510)
    with np.errstate(invalid="ignore"):
        nan = shapely.Polygon([(X, Y), (X + 9, Y), (X, np.nan)])
    found = [bow_tie, twice, None, shapely.Polygon(), flat, outside, nan, box(80, 80, 90, 90)]
    assert not shapely.is_valid([bow_tie, twice]).any()
    path = write(tmp_path / "a.parquet", found, type=["a"] * 7 + ["b"])
    labels, opened = read(path)
    counts = opened.counts
    assert (counts.features, counts.repaired, counts.empty, counts.outside) == (8, 2, 4, 1)
    assert (labels == 0).sum() == pytest.approx(200 + 700, abs=20) and (labels == 1).sum() == 100
    assert (labels[50:60, 50:60] == 0).all()
    summary = opened.summary()
    assert summary[0] == "Features: 8. Per class: a 3, b 1."
    assert "Features with invalid polygons, which were repaired: 2." in summary
    assert "Features without a geometry, which were left out: 4." in summary
    assert "Features outside the rasters, which were left out: 1." in summary


def test_several_files_have_common_classes(tmp_path):
    west = write(tmp_path / "west.gpkg", [box(0, 0, 10, 10)], type=["wood"])
    east = write(tmp_path / "east.shp", [box(50, 0, 60, 10), box(50, 20, 60, 30)], type=["road", "wood"])
    labels, opened = read([west, east])
    assert opened.class_names == ["road", "wood"]
    assert (labels[0:10, 0:10] == 1).all() and (labels[0:10, 50:60] == 0).all() and (labels[20:30, 50:60] == 1).all()


def test_values_become_classes_in_a_stable_order(tmp_path):
    outlines = [box(left, 0, left + 10, 10) for left in range(0, 50, 10)]
    path = write(tmp_path / "a.gpkg", outlines, type=["Weg", "Haus", "Wiese", "", " Haus "], code=[10, 2, 9, 2, 10])
    labels, opened = read(path)
    assert opened.class_names == ["Haus", "Weg", "Wiese"]
    assert labels[5, 5::10].tolist()[:5] == [1, 0, 2, IGNORE, 0]
    assert "Features without a value in 'type', whose pixels have no class: 1." in opened.summary()
    given = {"Haus": "building", "Weg": "road", "Wiese": "ignore"}
    labels, opened = read(path, class_map=given)
    assert opened.class_names == ["building", "road"]
    assert labels[5, 5::10].tolist()[:5] == [1, 0, IGNORE, IGNORE, 0]
    assert "Features of the class 'ignore', whose pixels have no class: 1." in opened.summary()
    labels, opened = read(path, class_map=given, class_names=["water", "road", "building"])
    assert opened.class_names == ["water", "road", "building"] and labels[5, 5::10].tolist()[:2] == [1, 2]
    labels, opened = read(path, class_column="code")
    assert opened.class_names == ["2", "9", "10"] and labels[5, 5::10].tolist()[:5] == [2, 0, 1, 0, 2]
    assert read(path, class_column="code", class_map={"2": "a", "9": "b", "10": "a"})[1].class_names == ["a", "b"]
    path = write(tmp_path / "b.gpkg", outlines[:2], type=[1.0, np.nan])  # whole numbers with a missing value
    labels, opened = read(path)
    assert opened.class_names == ["1"] and labels[5, 5:16:10].tolist() == [0, IGNORE]


def test_features_without_a_class_hide_the_background_only(tmp_path):
    path = write(tmp_path / "a.gpkg", [box(0, 0, 50, 50), box(40, 40, 60, 60)], type=["", "house"])
    labels, opened = read(path, background="land")
    assert opened.class_names == ["land", "house"]
    truth = np.zeros((100, 120))
    truth[0:50, 0:50] = IGNORE
    truth[40:60, 40:60] = 1
    assert (labels == truth).all()


def test_pixels_outside_the_labelled_area_have_no_class(tmp_path):
    path = write(tmp_path / "a.gpkg", [box(10, 10, 20, 20), box(70, 70, 80, 80)])
    area = write(
        tmp_path / "area.geojson", list(reprojected(np.array([box(0, 0, 40, 50)]), UTM, LONG_LAT, 1e-8)), LONG_LAT
    )
    labels, opened = read(path, background=None, labeled_area=area)
    assert opened.class_names == ["background", "house"]
    truth = np.full((100, 120), IGNORE)
    truth[0:50, 0:40] = 0
    truth[10:20, 10:20] = 1
    assert (labels != truth).sum() <= 1 and (labels[60:] == IGNORE).all()  # also where a polygon lies

    def window(left, top, size=20):
        return GeoGrid(size, size, grid().transform @ Affine.translation(left, top), UTM)

    places = {(0, 0): "inside", (30, 40): "partly", (70, 70): "outside", (100, 0): "outside"}
    assert {place: opened.coverage(window(*place)) for place in places} == places
    _, ignored = read(path, labeled_area=area)
    assert ignored.class_names == ["house"]
    assert [ignored.coverage(window(*at)) for at in ((5, 5), (10, 10), (30, 30), (70, 70))] == ["partly"] * 2 + [
        "outside"
    ] * 2
    assert ignored.coverage(window(10, 10, 10)) == "inside"


@pytest.mark.parametrize(
    ("options", "expected", "names"),
    [
        ({"background": "ignore"}, IGNORE, ["house"]),
        ({"background": "land"}, 0, ["land", "house"]),
        ({"background": "house"}, 0, ["house"]),
        ({"background": None, "labeled_area": "all"}, 0, ["background", "house"]),
        ({"background": "land", "labeled_area": "all"}, 0, ["land", "house"]),
        ({"background": "ignore", "labeled_area": "all"}, IGNORE, ["house"]),
    ],
)
def test_what_pixels_without_a_feature_are(options, expected, names, tmp_path):
    path = write(tmp_path / "a.gpkg", [box(10, 10, 20, 20)])
    labels, opened = read(path, **options)
    assert opened.class_names == names and labels[0, 0] == expected
    assert (labels == names.index("house")).sum() == (12_000 if options["background"] == "house" else 100)


def test_a_choice_is_required_where_features_do_not_cover_everything(tmp_path):
    path = write(tmp_path / "a.gpkg", [box(0, 0, 60, 100)])
    with pytest.raises(UserValueError) as error:
        read(path, background=None)
    text = str(error.value)
    assert text.startswith("The features cover 50.0 % of 'north.tif'. Say what the other pixels are.")
    assert all(
        f"`{name}`" in text for name in ("background='ignore'", "background='other'", "labeled_area='area.gpkg'")
    )
    whole = write(tmp_path / "b.gpkg", [box(0, 0, 60, 100), box(60, 0, 120, 100)], type=["a", "b"])
    labels, opened = read(whole, background=None)
    assert (labels[:, :60] == 0).all() and (labels[:, 60:] == 1).all() and opened.class_names == ["a", "b"]


def test_layers_of_a_geopackage(tmp_path):
    path = write(tmp_path / "a.gpkg", [box(0, 0, 10, 10)], layer="houses")
    write(path, [box(0, 0, 60, 60)], layer="district")
    with pytest.raises(UserValueError, match=r"a.gpkg' has 2 layers: houses, district. Choose one: `layer='houses'`"):
        read(path)
    with pytest.raises(UserValueError, match=r"`layer` is 'house', but the layers of '.*' are: houses, district"):
        read(path, layer="house")
    assert (read(path, layer="houses")[0] == 0).sum() == 100
    with pytest.raises(UserValueError, match="Choose one: `labeled_area_layer='houses'`"):
        read(path, layer="houses", labeled_area=path)
    labels, _ = read(path, layer="houses", background="land", labeled_area=path, labeled_area_layer="district")
    assert Counter(labels.ravel().tolist()) == {IGNORE: 12_000 - 3600, 0: 3500, 1: 100}


def test_geojson_of_other_coordinate_systems_and_forms(tmp_path):
    feature = in_metres()
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32632"}}
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "crs": crs, "features": [feature]}), encoding="utf-8-sig")
    assert (read(path)[0] == 0).sum() == 81
    path.write_text(json.dumps(feature | {"crs": crs}), encoding="utf-8")
    with pytest.raises(UserValueError, match="longitudes and latitudes"):  # a feature has no coordinate system
        read(path)
    for wrong, message in (
        ({"type": "link", "properties": {"href": "http://localhost/crs"}}, "its 'crs' is ''; expected a name"),
        (None, "has no coordinate system"),
    ):
        path.write_text(json.dumps({"type": "FeatureCollection", "crs": wrong, "features": [feature]}))
        with pytest.raises(UserValueError, match=message):
            read(path)


def elsewhere(folder):
    return write(folder / "a.gpkg", [shapely.box(500_000, 5_200_000, 500_100, 5_200_100)])


def with_many_values(folder):
    outlines = [box(n, n, n + 1, n + 1) for n in range(41)]
    return write(folder / "a.gpkg", outlines, type=[str(n) for n in range(41)], kind=["a"] * 41)


def damaged(folder):
    path = write(folder / "a.fgb", [box(n, n, n + 1, n + 1) for n in range(30)])
    path.write_bytes(path.read_bytes()[:1500])
    return path


def parquet_of_something(folder):
    parquet.write_table(Table.from_pydict({"type": ["a"]}), folder / "a.parquet")
    return folder / "a.parquet"


def text(folder, content, name="a.geojson"):
    (folder / name).write_text(content)
    return folder / name


def in_metres():
    return {"type": "Feature", "geometry": shapely.geometry.mapping(box(0, 0, 9, 9)), "properties": {"type": "a"}}


WRONG_FILES = {
    "no file": (lambda f: f / "a.gpkg", {}, r"a.gpkg' does not exist. Name a vector file"),
    "a folder": (lambda f: (f / "a.gpkg").mkdir() or f / "a.gpkg", {}, r"a.gpkg' does not exist"),
    "elsewhere": (
        elsewhere,
        {},
        r"No feature of '.*a.gpkg' lies in a raster. The features have longitudes 9 to 9.0013 and latitudes 46.954 to "
        r"46.954; the rasters have longitudes 11.552 to 11.553 and latitudes 48.094 to 48.095. Name files of the same",
    ),
    "metres in GeoJSON": (
        lambda f: text(f, json.dumps(in_metres())),
        {},
        "The features have coordinates that are no longitudes and latitudes; the rasters have longitudes 11",
    ),
    "no column": (
        lambda f: write(f / "a.gpkg", [box(0, 0, 9, 9)]),
        {"class_column": None},
        "`class_column` is missing",
    ),
    "missing column": (
        lambda f: write(f / "a.gpkg", [box(0, 0, 9, 9)], kind=["a"], size=[3]),
        {},
        r"a.gpkg' has no column 'type'. Its columns are: kind, size. Name the one with the classes: "
        "`class_column='kind'`",
    ),
    "no values": (lambda f: write(f / "a.gpkg", [box(0, 0, 9, 9)], type=[""]), {}, "The column 'type' has no values"),
    "not in the map": (
        lambda f: write(f / "a.gpkg", [box(0, 0, 9, 9)] * 3, type=["Haus", "Hof", "Hof"]),
        {"class_map": {"Haus": "building"}},
        r"`class_map` leaves out values of 'type': 'Hof' \(2\). Add them, each with a class or with 'ignore'",
    ),
    "not in the names": (
        lambda f: write(f / "a.gpkg", [box(0, 0, 9, 9)] * 2, type=[1, 2]),
        {"class_names": ["road", "house"]},
        r"Values of 'type' are none of the classes road, house: '1' \(1\), '2' \(1\). Say which class they are: "
        r"`class_map=\{'1': 'road', '2': 'road'\}`",
    ),
    "class of the map not in the names": (
        lambda f: write(f / "a.gpkg", [box(0, 0, 9, 9)]),
        {"class_names": ["road"], "class_map": {"house": "building"}},
        "`class_map` has the class 'building', which is none of `class_names`: road",
    ),
    "background not in the names": (
        lambda f: write(f / "a.gpkg", [box(0, 0, 9, 9)]),
        {"class_names": ["house"], "background": "land"},
        "The background is 'land', which is none of the classes house. Add it to `class_names`",
    ),
    "unknown priority": (
        lambda f: write(f / "a.gpkg", [box(0, 0, 9, 9)]),
        {"priority": ["road"]},
        "`priority` names 'road', but the classes are: house",
    ),
    "all ignored": (
        lambda f: write(f / "a.gpkg", [box(0, 0, 9, 9)]),
        {"class_map": {"house": "ignore"}},
        "All features are of the class 'ignore'",
    ),
    "too many values": (
        with_many_values,
        {},
        r"The column 'type' has 41 different values: '0' \(1\), '1' \(1\), .* and 31 more. Name the column with",
    ),
    "empty layer": (lambda f: write(f / "a.gpkg", []), {}, r"a.gpkg' has no features. Expected at least one polygon"),
    "empty GeoJSON": (lambda f: text(f, '{"type": "FeatureCollection", "features": []}'), {}, "has no column 'type'"),
    "only empty geometries": (lambda f: write(f / "a.parquet", [None]), {}, r"No feature of '.*a.parquet' has a geom"),
    "damaged": (damaged, {}, r"a.fgb' cannot be read: .*. Expected a complete vector file"),
    "no shape index": (
        lambda f: write(f / "a.shp", [box(0, 0, 9, 9)]).with_suffix(".shx").unlink() or f / "a.shp",
        {},
        r"a.shp' cannot be read: ",
    ),
    "damaged coordinate system": (
        lambda f: write(f / "a.shp", [box(0, 0, 9, 9)]).with_suffix(".prj").write_text("PROJCS[") and f / "a.shp",
        {},
        r"a.shp' ",
    ),
    "damaged GeoJSON": (
        lambda f: text(f, '{"type": "FeatureCollection", "features": ['),
        {},
        r"cannot be read: Expec",
    ),
    "other JSON": (lambda f: text(f, '{"a": 1}'), {}, "cannot be read: it is no FeatureCollection"),
    "damaged coordinates": (
        lambda f: text(f, '{"type": "Polygon", "coordinates": [[[1, 2], ["a"]]]}'),
        {},
        "a.geojson' cannot be read: ",
    ),
    "no GeoParquet": (parquet_of_something, {}, "a.parquet' cannot be read: it is no GeoParquet"),
    "text as Parquet": (lambda f: text(f, "type", "a.parquet"), {}, "a.parquet' cannot be read: "),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_files_are_one_clear_error(name, tmp_path):
    make, options, message = WRONG_FILES[name]
    with pytest.raises(UserError, match=message):
        read(make(tmp_path), **options)


@pytest.mark.parametrize("suffix", [".gpkg", ".shp", ".fgb", ".parquet"])
@pytest.mark.filterwarnings("ignore:'crs' was not provided")
def test_a_file_without_a_coordinate_system_is_refused(suffix, tmp_path):
    path = write(tmp_path / f"a{suffix}", [box(0, 0, 9, 9)], crs=None)
    with pytest.raises(UserValueError, match=f"a{suffix}' has no coordinate system.*`ogr2ogr -a_srs"):
        read(path)


VRT = '<OGRVRTDataSource><OGRVRTLayer name="target"><SrcDataSource>{}</SrcDataSource></OGRVRTLayer></OGRVRTDataSource>'


@pytest.mark.parametrize("suffix", [".gpkg", ".shp", ".fgb", ".json", ".parquet"])
@pytest.mark.parametrize("start", ["", "signature"])
def test_a_virtual_layer_is_opened_under_no_name(suffix, start, tmp_path):
    """GDAL opens a text that contains the XML of a virtual layer as one, also after the signature of FlatGeobuf."""
    target = write(tmp_path / "target.fgb", [box(0, 0, 9, 9)])
    signatures = {".fgb": b"fgb\3fgb\1", ".gpkg": b"SQLite format 3 ", ".shp": b"\0\0\x27\x0a"}
    head = signatures.get(suffix, b"{}") if start else b""
    path = tmp_path / f"a{suffix}"
    path.write_bytes(head + VRT.format(target).encode() + b" " * 200)
    with pytest.raises(UserValueError, match=f"a{suffix}' cannot be read"):
        read(path, class_column="type")
    if suffix in (".fgb", ".gpkg") and not start:
        assert pyogrio.read_info(path)["driver"] == "OGR_VRT"  # what would have happened


def test_the_geometries_of_large_files_are_read_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(vector_files, "CHUNK", 7)
    outlines = [box(n, n, n + 1, n + 1) for n in range(30)]
    for suffix in (".gpkg", ".parquet", ".fgb"):
        path = write(tmp_path / f"a{suffix}", outlines, type=["ab"[n % 2] for n in range(30)])
        labels, opened = read(path)
        assert opened.counts.features == 30 and opened.counts.values == {"a": 15, "b": 15}
        assert np.diag(labels)[:30].tolist() == [0, 1] * 15 and (labels != IGNORE).sum() == 30


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (grid(crs=None), "'north.tif' has no coordinate system"),
        (GeoGrid(10, 10, Affine.identity(), UTM), "'north.tif' has no transform"),
    ],
)
def test_a_raster_without_georeference_is_refused(of, message, tmp_path):
    with pytest.raises(UserValueError, match=message):
        read(write(tmp_path / "a.gpkg", [box(0, 0, 9, 9)]), of)


def test_labels_can_be_pickled(tmp_path):
    """`datasets` hashes what a generator of rows gets."""
    import pickle

    labels, opened = read(write(tmp_path / "a.gpkg", [box(3, 4, 9, 9)]))
    shutil.rmtree(tmp_path)
    assert (pickle.loads(pickle.dumps(opened)).read(grid()) == labels).all()


def test_missing_file_of_the_area(tmp_path):
    path = write(tmp_path / "a.gpkg", [box(3, 4, 9, 9)])
    with pytest.raises(UserFileNotFoundError, match=r"area.gpkg' does not exist"):
        read(path, labeled_area=tmp_path / "area.gpkg")
    far = write(tmp_path / "far.gpkg", [box(900, 900, 990, 990)])
    with pytest.raises(UserValueError, match=r"No feature of '.*far.gpkg' \(`labeled_area`\) lies in a raster"):
        read(path, labeled_area=far)
