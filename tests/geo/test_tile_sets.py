import numpy as np
import pytest
from affine import Affine
from rasterio.crs import CRS

from co2s_hf.geo.georeferencing import GeoGrid
from co2s_hf.geo.label_tiles import TileFacts
from co2s_hf.geo.tile_sets import draw_tile_sets, num_blocks_needed
from co2s_hf.utils.errors import UserValueError


UTM = CRS.from_epsg(32632)


def tile(block, classes=(0,), raster="a", column=None, digest=None, in_area=False):
    """Return a tile of 10 px. Those of a raster lie beside each other, block after block."""
    place = block if column is None else column
    grid = GeoGrid(10, 10, Affine(1, 0, 690_000 + 10 * place, 0, -1, 5_330_000), UTM)
    counts = dict.fromkeys(classes, 50) | ({255: 50} if not classes else {})
    return TileFacts(f"{raster}_{place}.png", block, raster, grid, counts, digest or str(place).encode(), in_area)


def sets_of(found, facts):
    return {split: {facts[place].block for place in places} for split, places in found.tiles.items()}


def test_a_block_is_in_one_set_and_tiles_without_labels_are_unlabelled():
    facts = [
        tile(block, classes, column=2 * block + n) for block in range(10) for n, classes in enumerate(((0, 1), ()))
    ]
    found = draw_tile_sets(facts, 1.0, 0.2, seed=0)
    blocks = sets_of(found, facts)
    assert len(blocks["labeled"]) == 8 and len(blocks["validation"]) == 2
    assert blocks["unlabeled"] == blocks["labeled"] and found.num_useless == 2
    assert all(facts[place].classes for place in found.tiles["labeled"] + found.tiles["validation"])
    assert not any(facts[place].classes for place in found.tiles["unlabeled"])
    assert found.num_blocks == {"labeled": 8, "unlabeled": 8, "validation": 2}
    again = draw_tile_sets(facts, 1.0, 0.2, seed=0)
    assert again == found and draw_tile_sets(facts, 1.0, 0.2, seed=1) != found


def test_every_class_keeps_a_training_block():
    facts = [tile(block, (0, 1) if block == 4 else (0,)) for block in range(6)]
    for seed in range(10):
        found = draw_tile_sets(facts, 0.5, 0.5, seed)
        assert 4 in sets_of(found, facts)["labeled"]


def test_the_area_decides_instead_of_the_draw():
    facts = [tile(block, in_area=block in (2, 5)) for block in range(8)]
    found = draw_tile_sets(facts, 0.5, None, seed=0)
    blocks = sets_of(found, facts)
    assert blocks["validation"] == {2, 5} and len(blocks["labeled"]) == 3 and len(blocks["unlabeled"]) == 3
    with pytest.raises(UserValueError, match="The validation area touches all 2 tiles with labels"):
        draw_tile_sets([tile(block, in_area=True) for block in range(2)], 1.0, None, seed=0)
    with pytest.raises(UserValueError, match="No tile has a label in the validation area"):
        draw_tile_sets([tile(block) for block in range(2)], 1.0, None, seed=0)
    with pytest.raises(UserValueError, match="None of the 2 tiles has a label"):
        draw_tile_sets([tile(block, ()) for block in range(2)], 1.0, 0.2, seed=0)


def test_training_tiles_with_the_pixels_of_validation_tiles_are_left_out():
    facts = [tile(block, digest=b"sea" if block % 2 else None) for block in range(20)]
    found = draw_tile_sets(facts, 1.0, 0.3, seed=0)
    held_out = sets_of(found, facts)["validation"]
    has_sea = any(block % 2 for block in held_out)
    assert has_sea and found.num_copies == 10 - sum(block % 2 for block in held_out) > 0
    assert not any(block % 2 for block in sets_of(found, facts)["labeled"])
    with pytest.raises(UserValueError, match="All labelled training tiles show the same as validation tiles"):
        draw_tile_sets([tile(block, digest=b"sea") for block in range(4)], 1.0, 0.3, seed=0)


def test_tiles_of_another_raster_that_lie_on_validation_tiles_are_left_out():
    """The second raster shows the same places, half a tile further. Both have another neighbour at a border."""
    first = [tile(block, digest=f"a{block}".encode()) for block in range(10)]
    second = [tile(10 + n, raster="b", column=n + 0.5, digest=f"b{n}".encode()) for n in range(10)]
    facts = first + second
    found = draw_tile_sets(facts, 1.0, 0.2, seed=0)
    left = {split: np.array([facts[place].grid.transform.c for place in found.tiles[split]]) for split in found.tiles}
    distances = abs(left["labeled"][:, None] - left["validation"])
    assert len(left["validation"]) == 4 and 0 < found.num_copies <= 8
    assert distances.min() >= 10 and len(left["labeled"]) == 16 - found.num_copies


def test_enough_blocks_for_the_shares():
    assert num_blocks_needed(1.0, 0.2) == 5
    assert num_blocks_needed(0.125, 0.2) == 8
    assert num_blocks_needed(0.9, 1.0) == 3
    assert num_blocks_needed(1.0, None) == 1
