"""Blocks of an image, and the sets that are drawn from them."""

from collections import Counter

import numpy as np
import pytest

from co2s_hf.data.blocks import block_boxes, default_block_px, draw_blocks
from co2s_hf.utils.errors import UserValueError


A, B = frozenset({0}), frozenset({0, 1})


def test_blocks_have_the_side_and_follow_each_other_in_z_order():
    assert block_boxes((40, 30), 10)[:6] == [
        (0, 0, 10, 10), (10, 0, 20, 10), (0, 10, 10, 20), (10, 10, 20, 20), (20, 0, 30, 10), (30, 0, 40, 10),
    ]  # fmt: skip
    assert block_boxes((7, 5), 10) == [(0, 0, 7, 5)]  # a small image is one block


@pytest.mark.parametrize(
    ("width", "least", "edges"),
    [
        (34, 1, [0, 10, 20, 34]),  # a rest of less than half a block belongs to the last block
        (35, 1, [0, 10, 20, 30, 35]),
        (35, 6, [0, 10, 20, 35]),  # narrower than a tile
        (14, 1, [0, 14]),
    ],
)
def test_a_rest_at_the_border(width, least, edges):
    boxes = block_boxes((width, 10), 10, least)
    assert sorted({box[0] for box in boxes} | {box[2] for box in boxes}) == edges


@pytest.mark.parametrize("size", [(100, 83), (51, 200), (64, 64), (9, 300)])
def test_blocks_cover_every_pixel_once(size):
    covered = np.zeros(size[::-1], dtype=int)
    for left, upper, right, lower in block_boxes(size, 16, 12):
        covered[upper:lower, left:right] += 1
    assert (covered == 1).all()


def test_the_shares_are_those_of_the_fractions_and_the_seed_decides():
    draws = [draw_blocks([A] * 64, 0.25, 0.25, seed) for seed in range(10)]
    assert all(Counter(draw) == {"validation": 16, "labeled": 12, "unlabeled": 36} for draw in draws)
    assert draw_blocks([A] * 64, 0.25, 0.25, 3) == draws[3]
    assert len({tuple(draw) for draw in draws}) == 10
    assert Counter(draw_blocks([A] * 64, 1, 0.25, 0)) == {"validation": 16, "labeled": 48}
    assert Counter(draw_blocks([A] * 64, 0.5, None, 0)) == {"labeled": 32, "unlabeled": 32}


@pytest.mark.parametrize("seed", range(5))
def test_validation_blocks_are_spread_evenly(seed):
    """Each square of 2 x 2 blocks has one of them."""
    boxes = block_boxes((80, 80), 10)
    drawn = draw_blocks([A] * 64, 1, 0.25, seed)
    squares = Counter((box[0] // 20, box[1] // 20) for box, name in zip(boxes, drawn) if name == "validation")
    assert squares == {(column, row): 1 for column in range(4) for row in range(4)}


@pytest.mark.parametrize("seed", range(20))
def test_every_class_keeps_a_labelled_block(seed):
    """One block alone contains class 1."""
    for place in (0, 5, 15):
        classes = [B if n == place else A for n in range(16)]
        assert draw_blocks(classes, 0.1, 0.5, seed)[place] == "labeled"


def test_blocks_without_labels_are_unlabelled():
    classes = [frozenset() if n % 2 else A for n in range(20)]
    drawn = draw_blocks(classes, 1, 0.2, 0)
    assert set(drawn[1::2]) == {"unlabeled"}
    assert Counter(drawn[::2]) == {"validation": 2, "labeled": 8}


def test_no_set_is_empty():
    assert Counter(draw_blocks([A] * 3, 0.99, 0.99, 0)) == {"validation": 1, "labeled": 1, "unlabeled": 1}
    assert Counter(draw_blocks([A] * 2, 1, 1, 0)) == {"validation": 1, "labeled": 1}
    with pytest.raises(UserValueError) as error:
        draw_blocks([A] * 2, 0.5, 0.2, 0)
    assert str(error.value) == (
        "The images have 2 blocks with labels, but 3 sets are drawn (validation, labeled, unlabeled). Choose smaller "
        "blocks with `block_px`. They must not be smaller than the tiles, so choose a smaller `tile_size`, too, if "
        "needed."
    )


def test_the_default_side_gives_enough_blocks():
    assert default_block_px([(3000, 3000)], 512, 4) == 1024  # the rest of 952 px belongs to a block of 2048 px
    assert default_block_px([(8000, 8000)], 512, 16) == 2048
    assert default_block_px([(3000, 3000)], 512, 10) == 512
    assert default_block_px([(3000, 3000)] * 2, 512, 10) == 1024
