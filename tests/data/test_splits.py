import os
import re

import pytest

from co2s_hf.data.splits import draw_labeled, draw_validation, hash_labels, hash_lists, read_list, write_lists
from co2s_hf.utils.errors import UserError, UserValueError


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


def test_samples_that_overlap_validation_samples_are_in_no_set():
    """A group is skipped if a class would only be left in samples that overlap it."""
    classes = sets({0}, {0}, {0}, {0}, {1}, {0}, {1})
    neighbours = [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 6], [5, 6]]
    held_out, others = draw_validation(
        classes, "aabbccd", 0.25, seed=0, order=[0, 1, 2, 3], overlapping=neighbours.__getitem__
    )
    assert (held_out, others) == ([0, 1], [3, 4, 5, 6])
    held_out, others = draw_validation(
        classes, "aabbccd", 0.4, seed=0, order=[2, 1, 0, 3], overlapping=neighbours.__getitem__
    )
    assert (held_out, others) == ([2, 3, 0, 1], [5, 6])


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
    assert hash_lists(lists) == "4e7842a1ff26"  # as in the records of earlier runs


def test_the_hash_of_labels_depends_on_the_label_files_that_are_used():
    lists = {
        "labeled": [("images/a.png", "labels/a.png"), ("images/b.png", "labels/b.png")],
        "unlabeled": [("images/c.png", None)],
        "validation": [("images/d.png", "labels/d.png")],
    }
    expected = hash_labels(lists)
    same = lists | {"labeled": lists["labeled"][::-1], "unlabeled": [("images/c.png", "labels/c.png")]}
    assert hash_labels(same) == expected and re.fullmatch("[0-9a-f]{12}", expected)
    for split in ("labeled", "validation"):
        other = lists | {split: [(image, f"corrected/{label}") for image, label in lists[split]]}
        assert hash_labels(other) != expected and hash_lists(other) == hash_lists(lists)
    exchanged = [("images/a.png", "labels/b.png"), ("images/b.png", "labels/a.png")]
    assert hash_labels(lists | {"labeled": exchanged}) != expected


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


ABSOLUTE, PARENT = "is an absolute path or an address", "has '..', which leads to another folder"
HOME = "begins with '~', which stands for a home folder"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("/etc/a.png", ABSOLUTE),
        (r"C:\images\a.png", ABSOLUTE),
        ("c:a.png", ABSOLUTE),
        (r"\\server\share\a.png", ABSOLUTE),
        ("https://example.org/a.png", ABSOLUTE),
        ("images/../../a.png", PARENT),
        (r"images\..\a.png", PARENT),
        ("..", PARENT),
        ("~/a.png", HOME),
        ("~root/a.png", HOME),
    ],
)
@pytest.mark.parametrize("column", ["image", "label"])
def test_names_that_leave_the_data_folder_are_refused(tmp_path, name, problem, column):
    line = f"{name} labels/a.png" if column == "image" else f"images/a.png {name}"
    (tmp_path / "list.txt").write_text(f"images/b.png labels/b.png\n{line}", encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_list(tmp_path / "list.txt", label_needed=True)
    assert str(error.value) == (
        f"{tmp_path / 'list.txt'}, line 2: '{name}' {problem}. Expected a name below the data folder, such as "
        "'images/a.png'. Correct the line."
    )


@pytest.mark.parametrize(
    "character", ["\0", "\x1b", "\x0b", "\x85", "\u2028"]
)  # str.splitlines divides at some of these
def test_control_characters_are_refused_and_not_printed(tmp_path, character):
    line = f"images/a{character}.png labels/a.png"
    (tmp_path / "list.txt").write_text(f"images/b.png labels/b.png\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_list(tmp_path / "list.txt", label_needed=True)
    assert f"list.txt, line 2: {line!a} contains a control character. Correct the name" in str(error.value)
    assert character not in str(error.value)


def test_a_list_from_windows_means_the_same_files(tmp_path):
    (tmp_path / "list.txt").write_bytes(
        "\ufeffimages\\a.png labels\\a.png\r\nimages\\deep\\b c.png\tlabels/b.png\r\n\r\n".encode()
    )
    assert read_list(tmp_path / "list.txt", label_needed=True) == [
        ("images/a.png", "labels/a.png"), ("images/deep/b c.png", "labels/b.png"),
    ]  # fmt: skip


def test_unusual_names_below_the_data_folder_are_read(tmp_path):
    names = [
        "images/..a.png",
        "images/a..png",
        "images/a~b.png",
        "images/~a.png",
        "images/10:30.png",
        "./images/ä.png",
    ]
    (tmp_path / "list.txt").write_text("\n".join(names), encoding="utf-8")
    assert read_list(tmp_path / "list.txt", label_needed=False) == [(name, None) for name in names]


def test_written_lists_are_read_back(tmp_path):
    """Names with spaces of any kind, with and without a label file."""
    lines = [("images/a b.png", None), ("images/c\xa0d.png", "labels/c.png"), ("images/e.png", "labels/e f.png")]
    write_lists(tmp_path, {"unlabeled": lines}, {})
    assert read_list(tmp_path / "unlabeled.txt", label_needed=False) == lines
    with pytest.raises(UserError, match=r"unlabeled.txt, line 1: 'images/a b.png\t' is not of the form"):
        read_list(tmp_path / "unlabeled.txt", label_needed=True)


def test_a_name_in_a_data_set_cannot_add_a_line(tmp_path):
    """The original name of a row may contain the end of a line."""
    lines = [("train[0] a.png\nimages/x.png labels/x.png", None), ("train[1] b\t.png", None)]
    write_lists(tmp_path, {"validation": lines}, {})
    assert (tmp_path / "val.txt").read_text(encoding="utf-8").split("\n") == [
        "train[0] a.png\\nimages/x.png labels/x.png\t", "train[1] b\\t.png\t", "",
    ]  # fmt: skip


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


def test_names_longer_than_those_of_files_are_refused_and_not_printed(tmp_path):
    (tmp_path / "val.txt").write_text(f"images/a.png labels/{'b' * 5000}.png\n", encoding="utf-8")
    with pytest.raises(UserValueError, match=r"val.txt, line 1: 'labels/b+\.\.\.' has 5011 characters") as error:
        read_list(tmp_path / "val.txt", label_needed=True)
    assert len(str(error.value)) < 500


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "val.txt")
    with pytest.raises(UserValueError, match=r"val.txt is no file, but a folder or a device"):
        read_list(tmp_path / "val.txt", label_needed=True)
