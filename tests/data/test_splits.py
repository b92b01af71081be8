import pytest

from co2s_hf.data.splits import draw_labeled, draw_validation, hash_lists, read_list, write_lists
from co2s_hf.utils.errors import UserError


def sets(*classes):
    return [frozenset(present) for present in classes]


def test_every_class_is_labelled_if_there_is_room():
    """Class 2 is on one image of twenty, class 1 on two: both are among the three that keep their labels."""
    classes = sets(*[{0}] * 17, {0, 1}, {0, 1}, {2})
    for seed in range(20):
        labeled, others = draw_labeled(classes, 3 / 20, seed)
        assert len(labeled) == 3 and sorted([*labeled, *others]) == list(range(20))
        assert frozenset().union(*(classes[place] for place in labeled)) == {0, 1, 2}
    assert len({tuple(draw_labeled(classes, 3 / 20, seed)[0]) for seed in range(20)}) > 5
    assert draw_labeled(classes, 3 / 20, 4) == draw_labeled(classes, 3 / 20, 4)


def test_validation_has_whole_groups_and_training_keeps_every_class():
    groups = [f"tile{n // 4}" for n in range(20)]
    classes = sets(*[{0}] * 16, *[{0, 1}] * 4)  # class 1 is in the last group only
    for seed in range(20):
        validation, others = draw_validation(classes, groups, 0.2, seed)
        assert len(validation) == 4 and sorted([*validation, *others]) == list(range(20))
        assert len({groups[place] for place in validation}) == 1
        assert not {groups[place] for place in validation} & {groups[place] for place in others}
        assert any(1 in classes[place] for place in others)


def test_validation_is_drawn_even_if_each_image_is_the_last_of_its_class():
    validation, others = draw_validation(sets({0}, {1}), ["a", "b"], 0.5, 0)
    assert len(validation) == 1 and len(others) == 1


def test_lists_are_read_as_written_and_have_different_hashes(tmp_path):
    lists = {
        "labeled": [("images/a.png", "labels/a.png")],
        "unlabeled": [("images/b.png", None), ("images/c.png", "labels/c.png")],
        "validation": [("images/d.png", "labels/d.png")],
    }
    write_lists(tmp_path / "splits", lists, {"hash": hash_lists(lists)})
    for split, file in (("labeled", "labeled.txt"), ("unlabeled", "unlabeled.txt"), ("validation", "val.txt")):
        assert read_list(tmp_path / "splits" / file, label_needed=False) == lists[split]
    shuffled = lists | {"unlabeled": lists["unlabeled"][::-1]}
    moved = lists | {"labeled": [*lists["labeled"], lists["unlabeled"][0]], "unlabeled": lists["unlabeled"][1:]}
    assert hash_lists(shuffled) == hash_lists(lists) != hash_lists(moved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n", "list.txt is empty"),
        ("a b c\n", "list.txt, line 1: 'a b c' is not of the form 'images/NAME labels/NAME'"),
        ("a b\n\nc\n", "list.txt, line 3: 'c' is not"),
    ],
)
def test_malformed_lists_are_named_with_the_line(tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_list(tmp_path / "list.txt", label_needed=True)


def test_missing_and_binary_lists_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone.txt' is missing.*`labeled_fraction=0.125`"):
        read_list(tmp_path / "gone.txt", label_needed=True)
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"list.txt cannot be read as UTF-8 text"):
        read_list(tmp_path / "list.txt", label_needed=True)


def test_draws_are_those_of_earlier_runs():
    classes = sets({0}, {1}, {0, 2}, {0}, {1}, {0}, {2}, {0, 1})
    assert draw_labeled(classes, 0.5, 3) == ([6, 7, 0, 3], [4, 1, 5, 2])
    assert draw_validation(classes, list("aabbccdd"), 0.25, 3) == ([2, 3], [0, 1, 4, 5, 6, 7])
