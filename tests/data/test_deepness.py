"""Exports of the QGIS plugin Deepness. They are cut from one drawn raster, as the plugin does it."""

from pathlib import Path

import numpy as np
import pytest
from datasets import load_from_disk
from helpers import run_command
from PIL import Image

from co2s_hf.data.deepness import TileGrid, find_tiles, measure_reach
from co2s_hf.data.image_files import StoredFile
from co2s_hf.data.options import DataOptions
from co2s_hf.data.samples import Samples
from co2s_hf.data.sources import Source, open_source
from co2s_hf.data.splits import write_lists
from co2s_hf.utils.errors import UserError


TILE = 32  # side in pixels
NEEDED = ("labeled", "validation")


def draw_raster(num_tiles: int, stride: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise, and a mask of discs: 255 inside, 0 elsewhere."""
    side = stride * (num_tiles - 1) + TILE
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side]
    mask = np.zeros((side, side), dtype=np.uint8)
    for _ in range(num_tiles**2):
        row, column = rng.integers(0, side, 2)
        mask[(rows - row) ** 2 + (columns - column) ** 2 < rng.integers(4, 12) ** 2] = 255
    return rng.integers(0, 256, (side, side, 3), dtype=np.uint8), mask


def write_export(folder: Path, num_tiles: int = 6, overlap: int = 5, seed: int = 0) -> Path:
    """Write an export of num_tiles x num_tiles tiles."""
    folder.mkdir(parents=True)
    stride = TILE - overlap
    for kind, raster in zip(("img", "mask"), draw_raster(num_tiles, stride, seed)):
        for y in range(num_tiles):
            for x in range(num_tiles):
                tile = raster[y * stride : y * stride + TILE, x * stride : x * stride + TILE]
                Image.fromarray(tile).save(folder / f"tile_{kind}_{x}_{y}.png")
    return folder


@pytest.fixture
def export(tmp_path) -> Path:
    return write_export(tmp_path / "21032025_101500")


def places(samples: Samples) -> list[tuple[int, int]]:
    return [tuple(map(int, Path(path).stem.split("_")[2:])) for path in samples.paths]


def tile_findings(source: Source) -> str:
    return "\n".join(finding.message for finding in source.findings if finding.kind == "tiles of Deepness")


def values_of(source: Source) -> set[int]:
    """The values of all label maps, after the rule."""
    samples = [*source.labeled, *source.validation]
    return {value for sample in samples for value in np.unique(np.asarray(sample.load_label())).tolist()}


def test_masks_of_0_and_255_become_two_classes(export):
    source = open_source(DataOptions(data_dir=str(export), class_names=["other", "field"]), needed=("labeled",))
    assert source.id2label == {0: "other", 1: "field"}
    for sample, (x, y) in zip(source.labeled, places(source.labeled), strict=True):
        mask = np.asarray(Image.open(export / f"tile_mask_{x}_{y}.png"))
        assert np.array_equal(np.asarray(sample.load_label()), mask // 255)
        assert np.array_equal(np.asarray(sample.load_image()), Image.open(export / f"tile_img_{x}_{y}.png"))
    assert tile_findings(source).startswith(
        f"'{export}' is read as an export of the QGIS plugin Deepness. The values 0 and 255 of its masks are the "
        "classes 0 and 1. For other values, give `label_map`."
    )
    assert all(finding.is_warning for finding in source.findings)


def test_classes_have_numbers_if_nothing_names_them(export):
    assert open_source(DataOptions(data_dir=str(export)), needed=("labeled",)).id2label == {0: "class_0", 1: "class_1"}


@pytest.mark.parametrize("overlap", [0, 5, 16, 20])
@pytest.mark.parametrize("seed", range(4))
def test_no_validation_tile_has_a_pixel_of_a_training_tile(tmp_path, overlap, seed):
    export = write_export(tmp_path / "export", num_tiles=8, overlap=overlap)
    source = open_source(DataOptions(data_dir=str(export), labeled_fraction=0.25), seed)
    covered = {}
    for name in ("labeled", "unlabeled", "validation"):
        covered[name] = np.zeros((8 * TILE, 8 * TILE), dtype=bool)
        for x, y in places(getattr(source, name)):
            left, upper = x * (TILE - overlap), y * (TILE - overlap)
            covered[name][upper : upper + TILE, left : left + TILE] = True
    assert not (covered["validation"] & (covered["labeled"] | covered["unlabeled"])).any()
    used = len(source.labeled) + len(source.unlabeled) + len(source.validation)
    assert len(source.validation) >= 0.2 * 64 and len(source.labeled) >= 4 and len(source.unlabeled) >= 10
    assert (f"{64 - used} tiles are in no set: they overlap validation tiles." in tile_findings(source)) == (used < 64)
    assert (used == 64) == (overlap == 0)


@pytest.mark.parametrize(("overlap", "reach"), [(0, 0), (1, 1), (5, 1), (16, 1), (17, 2), (24, 3)])
def test_the_reach_is_that_of_the_overlap(tmp_path, overlap, reach):
    """Tiles of 32 px overlap at a distance of d places if d strides are shorter than 32 px."""
    pool, _ = find_tiles(write_export(tmp_path / "export", overlap=overlap))
    grid = TileGrid(pool)
    middle = places(pool).index((3, 2))
    near = {places(pool)[index] for index in grid.overlapping(middle)}
    assert near == {(x, y) for x in range(6) for y in range(6) if abs(x - 3) <= reach and abs(y - 2) <= reach}


def test_blank_masks_do_not_show_the_overlap(tmp_path):
    files = {}
    for x in range(3):
        files[x, 0] = StoredFile(str(tmp_path / f"tile_mask_{x}_0.png"))
        Image.new("L", (TILE, TILE)).save(files[x, 0].path)
    assert measure_reach(files) == 1  # up to half a tile
    assert measure_reach({}) == 1
    (tmp_path / "tile_mask_1_0.png").write_bytes(b"damaged")
    assert measure_reach(files) == 1
    Image.new("L", (TILE, TILE), 255).save(tmp_path / "tile_mask_1_0.png")
    assert measure_reach(files) == 0


def test_tiles_are_drawn_in_square_blocks(tmp_path):
    """Of 100 tiles that overlap, 20 are drawn: one block of 5 x 5 tiles loses the fewest others."""
    pool, _ = find_tiles(write_export(tmp_path / "export", num_tiles=10))
    blocks = dict(zip(places(pool), TileGrid(pool).blocks(0.2), strict=True))
    assert blocks == {(x, y): (0, x // 5, y // 5) for x in range(10) for y in range(10)}
    blocks = dict(zip(places(pool), TileGrid(pool).blocks(0.12), strict=True))  # blocks of 4; a rest of 2 is one, too
    assert blocks == {(x, y): (0, x // 4, y // 4) for x in range(10) for y in range(10)}
    source = open_source(DataOptions(data_dir=str(tmp_path / "export")), seed=1, needed=NEEDED)
    columns, rows = (sorted(set(values)) for values in zip(*places(source.validation)))
    assert len(source.validation) == 25 and columns[-1] - columns[0] == rows[-1] - rows[0] == 4


def test_tiles_that_do_not_overlap_are_drawn_in_more_blocks(tmp_path):
    pool, _ = find_tiles(write_export(tmp_path / "export", num_tiles=10, overlap=0))
    blocks = dict(zip(places(pool), TileGrid(pool).blocks(0.2), strict=True))
    assert blocks == {(x, y): (0, x // 2, y // 2) for x in range(10) for y in range(10)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"label_map": {0: 1, 255: 0}}, {0: 1, 255: 0}),
        ({"label_map": {255: 0}, "ignore_index": 0}, {0: 255, 255: 0}),
    ],
)
def test_the_rule_of_the_user_comes_first(export, options, expected):
    source = open_source(DataOptions(data_dir=str(export), **options), needed=NEEDED)
    for sample in (source.labeled[0], source.validation[0]):
        mask = np.asarray(Image.open(sample.label.path))
        assert np.array_equal(np.asarray(sample.load_label()), np.where(mask == 0, expected[0], expected[255]))
    assert "The values 0 and 255" not in tile_findings(source)


def test_the_ignore_value_of_classes_json_comes_first(export):
    (export / "classes.json").write_text('{"classes": [{"name": "a"}], "ignore_index": 0}', encoding="utf-8")
    with pytest.raises(UserError, match=r"has the label 255 .*, which no rule covers"):
        open_source(DataOptions(data_dir=str(export)), needed=NEEDED)


def test_other_values_are_errors_with_a_remedy(export):
    Image.new("L", (TILE, TILE), 3).save(export / "tile_mask_0_0.png")
    with pytest.raises(UserError, match=r"tile_mask_0_0.png has the label 3 .*, which no rule covers. .*`label_map`"):
        open_source(DataOptions(data_dir=str(export)))


def test_lists_of_a_run_are_read_with_the_same_rule(export, tmp_path):
    drawn = open_source(DataOptions(data_dir=str(export), labeled_fraction=1 / 4))
    write_lists(tmp_path / "splits", drawn.lists, {})
    assert "tile_img_" in (tmp_path / "splits" / "val.txt").read_text(encoding="utf-8")
    listed = open_source(DataOptions(data_dir=str(export), splits_dir=str(tmp_path / "splits")))
    assert listed.hash == drawn.hash and values_of(listed) == {0, 1} and listed.id2label == drawn.id2label
    assert "The values 0 and 255 of its masks" in tile_findings(listed) and "in no set" not in tile_findings(listed)


def test_a_validation_list_is_kept_and_no_training_tile_overlaps_it(export):
    (export / "splits").mkdir()
    (export / "splits" / "val.txt").write_text("tile_img_0_1.png tile_mask_0_1.png\n", encoding="utf-8")
    source = open_source(DataOptions(data_dir=str(export), labeled_fraction=0.5))
    assert places(source.validation) == [(0, 1)]
    used = {*places(source.labeled), *places(source.unlabeled)}
    assert used == {(x, y) for x in range(6) for y in range(6) if x > 1 or y > 2}


def test_tiles_without_a_mask_are_unlabelled_and_do_not_overlap_validation_tiles(export):
    for x in range(6):
        (export / f"tile_mask_{x}_2.png").unlink()
    (export / "tile_mask_9_9.png").write_bytes((export / "tile_mask_0_0.png").read_bytes())
    source = open_source(DataOptions(data_dir=str(export)), seed=2)
    assert source.unlabeled and {y for _, y in places(source.unlabeled)} == {2}
    training = [*places(source.labeled), *places(source.unlabeled)]
    for x, y in places(source.validation):
        assert not any(abs(x - other_x) <= 1 and abs(y - other_y) <= 1 for other_x, other_y in training)
    (doubt,) = (finding.message for finding in source.findings if finding.kind == "labels without an image")
    assert doubt == f"{export / 'tile_mask_9_9.png'} has no tile of the same place."


def test_exports_in_subfolders_are_read_together_and_do_not_overlap(tmp_path):
    for seed, name in enumerate("ab"):
        write_export(tmp_path / "exports" / name, num_tiles=3, seed=seed)
    pool, _ = find_tiles(tmp_path / "exports")
    assert len(pool) == 18
    grid = TileGrid(pool)
    assert all(len(grid.overlapping(index)) <= 9 for index in range(18))
    assert {Path(pool.paths[index]).parent.name for index in grid.overlapping(0)} == {"a"}
    assert {block[0] for block in grid.blocks(0.2)} == {0, 1}
    source = open_source(DataOptions(data_dir=str(tmp_path / "exports")), needed=NEEDED)
    assert len(source.labeled) + len(source.validation) > 9


def test_groups_of_the_user_are_kept_apart_too(export):
    source = open_source(DataOptions(data_dir=str(export), group_regex=r"img_(\d+)"), seed=1, needed=NEEDED)
    columns = {x for x, _ in places(source.validation)}
    assert len(source.validation) == 6 * len(columns)
    assert {x for x, _ in places(source.labeled)} == {
        x for x in range(6) if all(abs(x - held) > 1 for held in columns)
    }


def test_prepared_tiles_hold_the_classes(export, tmp_path):
    words = ("prepare", "--data_dir", export, "--tile_size", 16, "--class_names", "other", "field")
    run = run_command(*words, "--output_dir", tmp_path / "out")
    assert run.returncode == 0, run.stderr
    assert f"'{export}' is read as an export of the QGIS plugin Deepness. The values 0 and 255 of its" in run.stdout
    assert "tiles are in no set: they overlap validation tiles." in run.stdout
    splits = load_from_disk(tmp_path / "out")
    values = {v for name in splits for row in splits[name] for v in np.unique(np.asarray(row["label"])).tolist()}
    assert values == {0, 1}
    tiles = {name: {row["image"].tobytes() for row in splits[name]} for name in splits}
    assert not tiles["labeled"] & tiles["validation"]
    run = run_command(*words, "--block_px", 16, "--output_dir", tmp_path / "other")
    assert run.returncode == 1 and run.stderr == (
        f"error: --block_px is 16, but '{export}' has tiles of Deepness, which may overlap. Their sets are drawn in "
        "blocks of neighbouring tiles. Leave --block_px out.\n"
    )


def test_too_few_tiles_are_refused(tmp_path):
    export = write_export(tmp_path / "export", num_tiles=2)
    message = "Of 4 images, 4 have a label map: too few to train and to validate. Tiles that overlap validation tiles"
    with pytest.raises(UserError, match=message):
        open_source(DataOptions(data_dir=str(export)))


def test_masks_alone_are_refused(export):
    for path in export.glob("tile_img_*"):
        path.unlink()
    message = r"has masks of Deepness, such as '.*tile_mask_0_0.png', but no tiles tile_img_X_Y.png. Export the image"
    with pytest.raises(UserError, match=message):
        open_source(DataOptions(data_dir=str(export)))


def test_a_folder_with_images_is_no_export(export):
    for kind, source in (("images", "img"), ("labels", "mask")):
        (export / kind).mkdir()
        for y in range(6):
            name = f"tile_{source}_0_{y}.png"
            (export / kind / f"{y}.png").write_bytes((export / name).read_bytes())
    assert find_tiles(export) is None
    with pytest.raises(UserError, match="hold only 0 and 255, and 255 means 'no class'"):
        open_source(DataOptions(data_dir=str(export)))
