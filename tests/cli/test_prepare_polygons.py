"""`co2s prepare ortho.tif --vector_labels parcels.gpkg`: tiles, areas, blocks, sets and counts, by value."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyogrio
import pytest
import shapely
from affine import Affine
from helpers import PLACE, SMALL_RUN, environment, run_command, write_raster
from rasterio.crs import CRS
from rasterio.features import shapes

from co2s_hf.data.drawn_scenes import CLASSES, draw_scene
from co2s_hf.data.options import DataOptions
from co2s_hf.data.sources import open_source
from co2s_hf.data.splits import SPLITS
from co2s_hf.geo.vector_geometry import reprojected


UTM, OTHER = CRS.from_epsg(32640), CRS.from_epsg(32639)  # the other zone is turned against this one
NAMES = [facts.name for facts in CLASSES]
SIDE = 256


def box(left, upper, right, lower):
    """Return a rectangle of pixels as a polygon in the coordinates of [`PLACE`]."""
    (x0, x1), (y1, y0) = PLACE["transform"] @ (np.array([left, right]), np.array([upper, lower]))
    return shapely.box(x0, y0, x1, y1)


def write_polygons(path, polygons, classes=None, crs=OTHER, column="type"):
    """Write polygons in the coordinates of [`PLACE`], in another coordinate system."""
    moved = reprojected(np.array(polygons, dtype=object), UTM, crs, 0.01)
    fields = [np.array(classes, dtype=object)] if classes else []
    kinds = {one.geom_type for one in polygons}
    pyogrio.raw.write(
        path,
        shapely.to_wkb(moved),
        fields,
        [column] if classes else [],
        geometry_type=kinds.pop() if len(kinds) == 1 else "Unknown",
        crs=crs.to_wkt(),
    )
    return path


@pytest.fixture
def scene(tmp_path, monkeypatch):
    """A drawn scene ortho.tif, and its classes as polygons in parcels.gpkg. Returns image and labels."""
    monkeypatch.chdir(tmp_path)
    image, labels = draw_scene(np.random.default_rng(5), SIDE)
    write_raster(tmp_path / "ortho.tif", np.moveaxis(image, -1, 0), **PLACE)
    found = list(shapes(labels, transform=PLACE["transform"]))
    outlines = [shapely.geometry.shape(outline) for outline, _ in found]
    write_polygons(tmp_path / "parcels.gpkg", outlines, [NAMES[int(label)] for _, label in found])
    return image, labels


WORDS = ("prepare", "ortho.tif", "--vector_labels", "parcels.gpkg", "--class_column", "type")
WORDS += ("--output_dir", "prepared", "--tile_size", 32)


def prepare(*more, words=WORDS):
    done = run_command(*words, *more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tiles(name="prepared"):
    """Return set -> (raster, column, row) -> (image, labels or None) of each tile, and the opened data set."""
    source = open_source(DataOptions(dataset_name=name), with_hidden_labels=True, may_be_empty=SPLITS)
    found = {split: {} for split in SPLITS}
    for split in SPLITS:
        for sample in getattr(source, split):
            raster, left, upper = re.fullmatch(r"(.*)_(\d+)_(\d+)\.png", sample.image.path).groups()
            label = None if sample.label is None else np.asarray(sample.load_label())
            found[split][raster, int(left), int(upper)] = (np.asarray(sample.load_image()), label)
    return found, source


def joined(found, splits=SPLITS, side=SIDE):
    """Return the image, the labels (254 without a tile, 255 without a label), and the number of tiles per pixel."""
    image, labels = np.zeros((side, side, 3), np.uint8), np.full((side, side), 254, np.uint8)
    number = np.zeros((side, side), int)
    for split in splits:
        for (_, left, upper), (picture, label) in found[split].items():
            place = np.s_[upper : upper + len(picture), left : left + picture.shape[1]]
            image[place], number[place] = picture, number[place] + 1
            labels[place] = 255 if label is None else label
    return image, labels, number


def boundary(labels):
    """Return the pixels with a neighbour of another class."""
    edge = np.zeros(labels.shape, dtype=bool)
    for axis in (0, 1):
        differs = np.diff(labels.astype(int), axis=axis) != 0
        before, after = [(0, 0), (0, 0)], [(0, 0), (0, 0)]
        before[axis], after[axis] = (0, 1), (1, 0)
        edge |= np.pad(differs, before) | np.pad(differs, after)
    return edge


def test_a_drawn_scene_comes_back_from_its_polygons(scene):
    image, truth = scene
    printed = prepare()
    found, source = tiles()
    names = [source.id2label[index] for index in sorted(source.id2label)]
    assert names == sorted(NAMES[index] for index in np.unique(truth)) and len(names) > 3
    truth = np.array([names.index(name) if name in names else 255 for name in NAMES])[truth]
    picture, labels, number = joined(found)
    assert (number == 1).all() and (picture == image).all()
    wrong = labels != truth
    assert wrong.mean() < 0.02 and not (wrong & ~boundary(truth)).any()
    facts = json.loads(Path("prepared/classes.json").read_text(encoding="utf-8"))
    colors = [tuple(entry["color"]) for entry in facts["classes"]]
    assert len(set(colors)) == len(names) and facts["classes"][0]["concepts"] == [names[0].replace("_", " ")]
    assert facts["ground_sampling_distance_m"] == pytest.approx(0.5, abs=1e-3) and "converted_from" not in facts
    # 4 blocks of 128 px would not be enough for a fifth, so they have 64 px: 16, of which 3 are drawn.
    assert "Cut 'ortho.tif' into tiles of 32 px at 0.5 m per pixel, in blocks of 64 px." in printed
    assert "Blocks with tiles in each set: 13 labeled, 0 unlabeled, 3 validation." in printed
    assert (
        "Wrote 52 labeled, 12 validation images: co2s finetune --checkpoint MODEL --dataset_name prepared" in printed
    )
    rows = {row[0]: row[1:] for row in (re.split(r"  +", line) for line in printed.splitlines())}
    assert rows["images"] == ["52", "0", "12"]
    share = float(rows[names[0]][0].removesuffix(" %"))
    assert share == pytest.approx(100 * (joined(found, ["labeled"])[1] == 0).sum() / (52 * 32 * 32), abs=0.05)


def test_whole_blocks_are_drawn_and_a_fraction_keeps_its_labels(scene):
    prepare("--block_px", 64, "--labeled_fraction", "1/2", "--seed", 3)
    found, _ = tiles()
    blocks = {split: {(left // 64, upper // 64) for _, left, upper in found[split]} for split in SPLITS}
    assert {split: len(part) for split, part in blocks.items()} == {"labeled": 6, "unlabeled": 7, "validation": 3}
    assert len(set.union(*blocks.values())) == 16
    assert {split: len(part) for split, part in found.items()} == {"labeled": 24, "unlabeled": 28, "validation": 12}
    assert all(label is not None for _, label in found["unlabeled"].values())  # to measure pseudo-labels
    prepare("--block_px", 64, "--labeled_fraction", "1/2", "--seed", 3, words=(*WORDS[:7], "again", *WORDS[8:]))
    again, _ = tiles("again")
    assert {split: list(part) for split, part in again.items()} == {split: list(part) for split, part in found.items()}


def test_overlapping_tiles_stay_in_their_block(scene):
    prepare("--block_px", 64, "--tile_overlap", 16)
    found, _ = tiles()
    assert len(found["labeled"]) + len(found["validation"]) == 16 * 9
    seen = {split: joined(found, [split])[2] > 0 for split in ("labeled", "validation")}
    assert not (seen["labeled"] & seen["validation"]).any() and (seen["labeled"] | seen["validation"]).all()


def test_a_labelled_area_divides_background_from_no_label(scene):
    """Houses were drawn in the left 100 columns alone. Tiles on the right are unlabelled images."""
    image, _ = scene
    houses = [box(10, 10, 20, 30), box(60, 200, 90, 220), box(40, 100, 70, 110), box(98, 60, 110, 70)]
    write_polygons(Path("houses.geojson"), houses, ["house"] * 4)
    write_polygons(Path("area.fgb"), [box(0, 0, 100, SIDE)])
    words = ("prepare", "ortho.tif", "--vector_labels", "houses.geojson", *WORDS[4:])
    printed = prepare("--labeled_area", "area.fgb", "--block_px", 64, words=words)
    found, source = tiles()
    assert source.id2label == {0: "background", 1: "house"}
    truth = np.full((SIDE, SIDE), 255)
    truth[:, :100] = 0
    for left, upper, right, lower in ((10, 10, 20, 30), (60, 200, 90, 220), (40, 100, 70, 110), (98, 60, 100, 70)):
        truth[upper:lower, left:right] = 1
    picture, labels, number = joined(found)
    kept = number == 1
    wrong = (labels != truth) & kept
    assert wrong.sum() < 100 and not (wrong & ~boundary(truth)).any()
    assert (picture[kept] == image[kept]).all() and not (number > 1).any()
    labelled = {place for split in ("labeled", "validation") for place in found[split]}
    assert all(left < 100 for _, left, _ in labelled) and len(labelled) == 4 * 8  # columns 0, 32, 64 and 96
    assert {left for _, left, _ in found["unlabeled"]} == {128, 160, 192, 224} and len(found["unlabeled"]) == 32
    assert all(label is None for _, label in found["unlabeled"].values())
    assert "Features: 4. Per class: background 0, house 4." in printed
    assert "co2s train --dataset_name prepared" in printed
    assert not Path("other").exists()
    other = (*words[:7], "other", *words[8:])
    prepare("--background", "ground", "--labeled_area", "all", words=other)
    found, source = tiles("other")
    assert source.id2label == {0: "ground", 1: "house"} and not found["unlabeled"]
    assert (joined(found)[1] == 0).sum() == pytest.approx(SIDE**2 - 200 - 600 - 300 - 120, abs=60)


def test_pixels_without_data_have_no_label_and_empty_tiles_are_left_out(scene):
    image, _ = scene
    image = image.clip(1, 255)
    image[:80, :64] = 0
    write_raster(Path("ortho.tif"), np.moveaxis(image, -1, 0), **PLACE, nodata=0)
    printed = prepare()
    found, _ = tiles()
    picture, labels, number = joined(found)
    assert "Tiles without data, which were left out: 4." in printed
    assert (number[:64, :64] == 0).all() and number.sum() == SIDE**2 - 4 * 32 * 32
    assert (labels[64:80, :64] == 255).all() and (labels[80:] < 254).all() and (picture == image).all()


def test_a_validation_area_shares_no_pixel_with_the_training(scene):
    write_polygons(Path("east.geojson"), [box(150, 0, SIDE, SIDE), box(0, 0, 20, 20)], crs=CRS.from_epsg(4326))
    printed = prepare("--validation_area", "east.geojson", "--labeled_fraction", "1/2", "--block_px", 64)
    found, _ = tiles()
    validation = {(left, upper) for _, left, upper in found["validation"]}
    columns = [128, 160, 192, 224]  # those at 128 straddle the border
    assert validation == {(left, upper) for left in columns for upper in range(0, SIDE, 32)} | {(0, 0)}
    area = np.zeros((SIDE, SIDE), dtype=bool)
    area[:, 150:] = area[:20, :20] = True
    labels = joined(found, ["validation"])[1]
    differs = ((labels < 254) != area) & (labels != 254)
    assert not (differs & ~boundary(area)).any() and ((labels < 254) != area).sum() < 60
    trained = joined(found, ["labeled", "unlabeled"])[2]
    assert (trained[:, 128:] == 0).all() and trained.sum() == 31 * 32 * 32
    assert len(found["labeled"]) in (15, 16) and len(found["unlabeled"]) in (15, 16)
    assert "Validation tiles are those that touch the validation area." in printed


def test_rasters_are_cut_at_one_distance(scene):
    image, _ = scene
    coarse = image.reshape(128, 2, 128, 2, 3).mean(axis=(1, 3)).round().astype(np.uint8)
    place = {"crs": UTM, "transform": PLACE["transform"] @ Affine.translation(SIDE, 0) @ Affine.scale(2)}
    Path("more").mkdir()
    write_raster(Path("more/ortho.tif"), np.moveaxis(coarse, -1, 0), **place)
    polygons = [box(0, 0, 100, SIDE), box(100, 0, 3 * SIDE, SIDE), box(0, SIDE, 3 * SIDE, 2 * SIDE)]
    write_polygons(Path("parcels.gpkg"), polygons, ["west", "east", "east"])
    words = ("prepare", "ortho.tif", "more/*.tif", *WORDS[2:])
    done = run_command(*words)
    assert (
        done.returncode == 1
        and (
            "A pixel of 'ortho.tif' is 0.5 m on the ground, but a pixel of 'more/ortho.tif' is 1 m. A network learns "
            "objects in one size. Read all rasters at one distance: --resample_to 1.0. Or prepare them separately."
        )
        in done.stderr
    )
    prepare("--resample_to", 1, words=words)
    found, source = tiles()
    assert source.ground_sampling_distance_m == 1
    places = [place for split in SPLITS for place in found[split]]
    assert sorted({raster for raster, *_ in places}) == ["ortho", "ortho-2"] and len(places) == 2 * 16
    for raster, expected in (("ortho", coarse), ("ortho-2", coarse)):
        own = {split: {p: t for p, t in part.items() if p[0] == raster} for split, part in found.items()}
        assert abs(joined(own, side=128)[0].astype(int) - expected).max() <= 1
    labels = joined({s: {p: t for p, t in part.items() if p[0] == "ortho"} for s, part in found.items()}, side=128)[1]
    assert source.id2label == {0: "east", 1: "west"} and (labels[:, :49] == 1).all() and (labels[:, 51:] == 0).all()


def test_bands_and_scale_are_applied_and_remembered(scene):
    rng = np.random.default_rng(0)
    values = rng.integers(500, 3500, (4, SIDE, SIDE)).astype(np.uint16)
    write_raster(Path("ortho.tif"), values, **PLACE)
    done = run_command(*WORDS)
    assert done.returncode == 1 and "4 bands of uint16" in done.stderr and "--bands" in done.stderr
    prepare("--bands", "3,2,1", "--scale", 0, 3000)
    picture = joined(tiles()[0])[0]
    expected = (np.moveaxis(values[2::-1], 0, -1) * (255 / 3000)).clip(0, 255).round()
    assert abs(picture - expected).max() <= 1
    facts = json.loads(Path("prepared/classes.json").read_text(encoding="utf-8"))
    assert facts["converted_from"] == {"bands": [3, 2, 1], "scale": [[0, 3000]]}


def test_no_training_tile_lies_on_a_validation_tile_of_another_raster(scene):
    """Two orthophotos of the same place, shifted by 16 px: tiles of one show parts of tiles of the other."""
    image, _ = scene
    place = {"crs": UTM, "transform": PLACE["transform"] @ Affine.translation(16, 16)}
    write_raster(Path("later.tif"), np.moveaxis(255 - image, -1, 0), **place)
    write_polygons(Path("parcels.gpkg"), [box(-9, -9, 130, 300), box(130, -9, 300, 300)], ["a", "b"])
    printed = prepare("--block_px", 64, words=("prepare", "ortho.tif", "later.tif", *WORDS[2:]))
    found, _ = tiles()
    seen = {split: np.zeros((SIDE + 16, SIDE + 16), dtype=bool) for split in SPLITS}
    for split in SPLITS:
        for raster, left, upper in found[split]:
            shift = 16 * (raster == "later")
            seen[split][upper + shift : upper + shift + 32, left + shift : left + shift + 32] = True
    assert seen["validation"].sum() >= 6 * 32 * 32 and seen["labeled"].sum() > 20 * 32 * 32
    assert not (seen["validation"] & seen["labeled"]).any()
    (left_out,) = re.findall(r"that show the same as validation tiles, which were left out: (\d+)", printed)
    assert int(left_out) + sum(map(len, found.values())) == 2 * 64


def test_features_are_mapped_repaired_and_counted(scene):
    corners = [PLACE["transform"] @ place for place in ((40, 40), (60, 60), (60, 40), (40, 52))]
    bow_tie = shapely.Polygon(corners)  # two triangles
    line = shapely.LineString(shapely.get_coordinates(box(0, 128, SIDE, 128.001))[[0, 3]])
    polygons = [box(0, 0, 256, 30), bow_tie, box(9000, 0, 9010, 10), box(0, 200, 256, 256), line]
    write_polygons(Path("mixed.gpkg"), polygons, ["Haus", "Haus", "Weg", "?", "Weg"], UTM)
    words = ("prepare", "ortho.tif", "--vector_labels", "mixed.gpkg", *WORDS[4:])
    more = ("--class_map", "Haus=building,Weg=road,?=ignore", "--background", "other", "--buffer_m", 2)
    printed = prepare(*more, "--report", "report.html", words=words)
    found, source = tiles()
    labels = joined(found)[1]
    assert source.id2label == {0: "other", 1: "building", 2: "road"}
    assert (labels == 1).sum() == pytest.approx(256 * 30 + 170, abs=60)
    assert (labels == 2).sum() == pytest.approx(256 * 8, abs=300)
    assert "Features: 5. Per class: other 0, building 2, road 2." in printed
    for line in (
        "Features with invalid polygons, which were repaired: 1.",
        "Features outside the rasters, which were left out: 1.",
        "Features of the class 'ignore', whose pixels have no class: 1.",
        "Where features overlap, the first of these classes wins: building, road, other.",
    ):
        assert line in printed.splitlines()
    assert "data:image/png;base64," in Path("report.html").read_text(encoding="utf-8")


def test_a_web_address_is_read_in_windows_and_pushed(scene, tmp_path, hub):
    Path("web").mkdir()
    Path("ortho.tif").rename("web/ortho.tif")
    server = subprocess.Popen(  # GDAL holds Python's lock while it opens an address, so it is another process
        [sys.executable, str(Path(__file__).parents[1] / "range_server.py"), "web"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        address = f"http://127.0.0.1:{int(server.stdout.readline())}/ortho.tif"
        words = ("prepare", address, *WORDS[2:6], "--tile_size", 32, "--push_to_hub", "user/valley")
        printed = prepare(words=words)
    finally:
        server.kill()
        server.wait()
    assert "Pushed 52 labeled, 12 validation images" in printed
    repository = hub.repositories["dataset", "user/valley"]
    files = repository.trees[repository.refs["main"]]
    assert json.loads(files["classes.json"].data)["ground_sampling_distance_m"] == pytest.approx(0.5, abs=1e-3)
    assert {f"data/{split}-00000-of-00001.parquet" for split in ("labeled", "validation")} <= set(files)


def test_no_repository_is_made_for_polygons_that_do_not_fit(scene, hub):
    words = (*WORDS[:5], "kind", "--push_to_hub", "user/valley")
    done = run_command(*words)
    assert done.returncode == 1 and "has no column 'kind'" in done.stderr and not hub.repositories


def test_the_data_set_can_be_trained_on(scene):
    prepare("--labeled_fraction", "1/2")
    words = ("--dataset_name", "prepared", "--output_dir", "trained", *SMALL_RUN)
    done = run_command("train", *words, "--supervised_warmup_steps", 1, "--max_train_steps", 2)
    assert done.returncode == 0, done.stderr
    config = json.loads(Path("trained/model/config.json").read_text(encoding="utf-8"))
    assert config["ground_sampling_distance_m"] == pytest.approx(0.5, abs=1e-3)


GIVEN = ("prepare", "ortho.tif", "--vector_labels", "parcels.gpkg", "--class_column", "type")
ERRORS = {
    "raster alone": (("prepare", "ortho.tif"), "'ortho.tif' is a raster, and needs the file with its polygons"),
    "polygons alone": (("prepare", *GIVEN[2:]), "--vector_labels is parcels.gpkg, but there is no raster."),
    "no column": (GIVEN[:4], "--vector_labels needs the column with the class of each polygon: --class_column type"),
    "two sources": ((*GIVEN, "--data_dir", "x"), "Give one source: rasters with --vector_labels, or --data_dir."),
    "label map": ((*GIVEN, "--label_map", "7=1"), "--label_map is for label maps in image files. Leave it out"),
    "no raster": (("prepare", "none.tif", *GIVEN[2:]), "'none.tif' matches no file"),
    "no file": ((*GIVEN[:3], "none.gpkg", *GIVEN[4:]), "'none.gpkg' does not exist. Name a vector file"),
    "no such column": ((*GIVEN[:5], "kind"), "'parcels.gpkg' has no column 'kind'. Its columns are: type."),
    "no crs": (("prepare", "plain.tif", *GIVEN[2:]), "plain.tif has no coordinate system"),
    "elsewhere": (("prepare", "far.tif", *GIVEN[2:]), "No feature of 'parcels.gpkg' lies in a raster."),
    "partly": ((*GIVEN[:3], "some.gpkg", *GIVEN[4:]), "Say what the other pixels are. They have no class and are"),
    "one class": ((*GIVEN[:3], "some.gpkg", *GIVEN[4:], "--background", "ignore"), "There is only one class, 'house'"),
    "map": ((*GIVEN, "--class_map", "x=y"), "--class_map leaves out values of 'type'"),
    "not a map": ((*GIVEN, "--class_map", "x"), "'x' is not VALUE=CLASS,VALUE=CLASS, such as Haus=building"),
    "area outside": ((*GIVEN, "--validation_area", "far.gpkg"), "No feature of 'far.gpkg' (--validation_area) lies"),
    "area everywhere": ((*GIVEN, "--validation_area", "parcels.gpkg"), "The validation area touches all 64 tiles"),
    "small blocks": ((*GIVEN, "--block_px", 16), "--block_px is 16, but --tile_size is 32."),
    "large blocks": ((*GIVEN, "--block_px", 256), "The images have 1 block with labels, but 2 sets are drawn"),
    "empty": (("prepare", "empty.tif", *GIVEN[2:]), "The rasters have no tile: their pixels have no data"),
    "area without polygons": (("prepare", "ortho.tif", "--labeled_area", "all"), "--labeled_area goes with --vector"),
    "resample": (("prepare", "--data_dir", "x", "--resample_to", 1), "--resample_to is 1.0; it goes with rasters"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_every_wrong_input_gives_one_clear_error(case, scene):
    image, _ = scene
    words, expected = ERRORS[case]
    bands = np.moveaxis(image, -1, 0)
    if case == "no crs":
        write_raster(Path("plain.tif"), bands)
    if case == "elsewhere":
        write_raster(Path("far.tif"), bands, crs=UTM, transform=Affine(0.5, 0, 400_000, 0, -0.5, 2_700_000))
    if case == "empty":
        write_raster(Path("empty.tif"), np.zeros_like(bands), **PLACE, nodata=0)
    write_polygons(Path("some.gpkg"), [box(10, 10, 100, 100)], ["house"])
    write_polygons(Path("far.gpkg"), [box(9000, 9000, 9100, 9100)])
    done = run_command(*words, "--output_dir", "new", *(() if case == "resample" else ("--tile_size", 32)))
    assert done.returncode in (1, 2) and expected in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not Path("new").exists()
    assert done.stderr.count("error:") == 1
