import json
from dataclasses import asdict
from pathlib import Path

import pytest

from co2s_hf.data.options import REAL_FOLDER, DataOptions, label_ranges
from co2s_hf.utils.errors import UserError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_dir": "a", "dataset_name": "b"}, "Give one source: `data_dir`, `dataset_name` or `dataset`"),
        ({"dataset": "vaihingen"}, "`dataset` is 'vaihingen'; expected whdld, loveda, potsdam, gid, mer, msl"),
        ({"data_dir": "a", "partition": "1_8"}, "`partition` is 1_8; it goes with `dataset`, not with `data_dir`"),
        (
            {"dataset": "whdld", "labeled_fraction": 0.5},
            "`labeled_fraction` is 0.5; it goes with `data_dir` or `dataset_name` or `data`, not with `dataset`",
        ),
        ({"data": "dubai"}, "`data` is 'dubai'; expected real or drawn"),
        ({"data": "real", "data_dir": "a"}, "Give one source: `data` is real, and `data_dir` is 'a'. Leave one out"),
        ({"data": "drawn", "dataset_name": "a"}, "Give one source: `data` is drawn, and `dataset_name` is 'a'"),
        ({"data": "real", "dataset": "whdld"}, "Give one source: `data` is real, and `dataset` is 'whdld'"),
        ({"data": "real", "splits_dir": "a"}, "`splits_dir` is a; it goes with `data_dir` or `dataset`, not with `da"),
        ({"group_regex": "a"}, "`group_regex` is a; it goes with `data_dir` or `dataset_name`, not with `data`"),
        (
            {"dataset_name": "a", "splits_dir": "b"},
            "`splits_dir` is b; it goes with `data_dir` or `dataset`, not with `dataset_name`",
        ),
        (
            {"dataset_name": ".", "dataset_revision": "v1"},
            r"`dataset_revision` is v1, but `dataset_name` is the local folder '.', which has no revisions",
        ),
        ({"dataset": "whdld", "partition": "1_7"}, "`partition` is '1_7'; WHDLD has 1_32, 1_24, 1_16, 1_8, 1_4"),
        ({"data_dir": "a", "labeled_fraction": 2}, "`labeled_fraction` is 2; expected a share above 0 and up to 1"),
        ({"data_dir": "a", "validation_fraction": 0.0}, "`validation_fraction` is 0.0; expected a share above 0"),
        ({"data_dir": "a", "group_regex": "("}, r"`group_regex` is '\(', which is not a regular expression"),
        ({"data_dir": "a", "class_names": ["a", "a"]}, "`class_names` names a class twice: a a"),
        ({"data_dir": "a", "label_colors": "gone.json"}, "`label_colors` is 'gone.json', which does not exist"),
        (
            {"data_dir": "a", "reduce_labels": True, "label_map": {1: 0}},
            "Give only one of `reduce_labels`, `label_map` and `label_colors`",
        ),
        ({"data_dir": "a", "label_map": {1: 255}}, "`label_map` maps 1 to 255; classes are 0 to 254"),
        ({"data_dir": "a", "label_map": {}}, "`label_map` is empty. Map every value to a class"),
        (
            {"data_dir": "a", "label_map": {"0-127": 0, "100-200": 1}},
            r"`label_map` maps the value 100 twice, by 0-127 and by 100-200. Give ranges that do not overlap: `label_",
        ),
        ({"data_dir": "a", "label_map": {"0-127": 0, 127: 1}}, "maps the value 127 twice, by 0-127 and by 127"),
        ({"data_dir": "a", "label_map": {7: 0, "7": 1}}, "maps the value 7 twice, by 7 and by 7"),
        (
            {"data_dir": "a", "label_map": {"200-100": 3}},
            r"`label_map` has the range 200-100, which is reversed. .*: `label_map=\{'100-200': 3\}`",
        ),
        (
            {"data_dir": "a", "label_map": {"low": 0}},
            "`label_map` has the value 'low'; expected a whole number or a r",
        ),
        (
            {"data_dir": "a", "label_map": {1.5: 0}},
            "`label_map` has the value '1.5'; expected a whole number or a ran",
        ),
        (
            {"data_dir": "a", "label_map": {"0-127": 0}, "ignore_index": 9},
            "`label_map` maps the value 9 to a class, but `ignore_index` says that this value means 'no class'",
        ),
        ({"data_dir": "a", "bands": (4, 3)}, r"`bands` is \(4, 3\); expected three band numbers .*bands=\(4, 3, 2\)"),
        ({"data_dir": "a", "bands": (4, 3, 0)}, r"`bands` is \(4, 3, 0\); expected three band numbers from 1"),
        (
            {"data_dir": "a", "scale": ((3, 1),)},
            r"`scale` is \(\(3, 1\),\); expected the values that become 0 and 255, .*`scale=\(\(0, 3000\),\)`",
        ),
        ({"data_dir": "a", "scale": (0, 3000)}, r"`scale` is \(0, 3000\); expected the values that become 0 and 255"),
        ({"data_dir": "a", "scale": "minmax"}, r"`scale` is 'minmax'; expected .* or `scale='percentiles'`"),
    ],
)
def test_values_that_do_not_fit_are_named(options, message):
    with pytest.raises(UserError, match=message):
        DataOptions(**options)


def test_label_maps_keep_their_meaning_as_json():
    options = DataOptions(data_dir="a", label_map={" 0 - 99": 0, "100-100": 2, 128: 1, "129-255": 3, -1: 4})
    assert options.label_map == {"0-99": 0, 100: 2, 128: 1, "129-255": 3, -1: 4}
    again = DataOptions(**json.loads(json.dumps(asdict(options))))
    assert again == options
    ranges = [(0, 99, 0), (100, 100, 2), (128, 128, 1), (129, 255, 3), (-1, -1, 4)]
    assert label_ranges(again.label_map) == ranges


def test_values_are_converted_to_the_types_of_the_rules():
    options = DataOptions(data_dir=Path("a"), bands=[4, 3, 2], scale=[[0, 3000]])
    assert options.data_dir == "a" and options.bands == (4, 3, 2)
    assert repr(options.scale) == "((0.0, 3000.0),)"
    assert DataOptions(scale="percentiles").scale == "percentiles"


def test_the_real_images_are_used_if_no_data_is_named():
    options, real, drawn = DataOptions(), DataOptions(data="real", labeled_fraction=0.5), DataOptions(data="drawn")
    own = DataOptions(data_dir="a")
    assert (options.has_source, options.is_real, own.is_real, drawn.is_real) == (False, True, False, False)
    for filled in (options, real, drawn, own):
        filled.fill()
    assert (options.data, options.labeled_fraction, options.folder) == ("real", 1 / 12, str(REAL_FOLDER))
    assert (options.data_name, options.dataset_id) == ("Dubai aerial imagery", None)
    assert (real.labeled_fraction, real.folder) == (0.5, str(REAL_FOLDER))
    assert (drawn.data, drawn.labeled_fraction, drawn.folder) == ("drawn", None, None)
    assert (own.data, own.labeled_fraction, own.folder) == (None, None, "a")


def test_data_has_a_name_and_perhaps_a_place_on_the_hub(tmp_path):
    assert not DataOptions().has_source
    folder = DataOptions(data_dir=str(tmp_path / "fields"))
    assert folder.has_source and folder.data_name == "fields" and folder.dataset_id is None
    hub = DataOptions(dataset_name="user/fields")
    assert hub.data_name == hub.dataset_id == "user/fields"
    (tmp_path / "saved").mkdir()
    local = DataOptions(dataset_name=str(tmp_path / "saved"))
    assert local.data_name == "saved" and local.dataset_id is None
    benchmark = DataOptions(dataset="loveda", partition="1/40")
    assert benchmark.data_name == "LOVEDA" and benchmark.dataset_id == "XavierJiezou/co2s-datasets"
