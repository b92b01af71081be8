import json

import numpy as np
import pytest

from co2s_hf.unfinished import UnfinishedMap


PLANES = {"labels": "uint8", "confidence": "float32"}


def rows_of(start, stop, width=5):
    values = np.arange(start * width, stop * width).reshape(-1, width)
    return {"labels": values.astype(np.uint8), "confidence": values.astype(np.float32) / 7}


def test_rows_are_kept_and_continued(tmp_path):
    first = UnfinishedMap(tmp_path / "map.tif", 7, 5, PLANES, {"crop": (3, 4)})
    first.write(slice(0, 3), rows_of(0, 3))
    again = UnfinishedMap(tmp_path / "map.tif", 7, 5, PLANES, {"crop": (3, 4)}, resume=True)
    assert again.rows_done == 3
    again.write(slice(3, 7), rows_of(3, 7))
    for name, values in rows_of(0, 7).items():
        assert np.array_equal(again.read(name, slice(0, 7)), values)
        assert np.array_equal(again.read(name, slice(2, 4)), values[2:4])
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_rows_of_another_kind_are_not_continued(tmp_path):
    UnfinishedMap(tmp_path / "map.tif", 7, 5, PLANES, {"crop": 64, "scale": None}).write(slice(0, 3), rows_of(0, 3))
    with pytest.raises(FileExistsError, match=r"finished rows in .*Go on with --resume"):
        UnfinishedMap(tmp_path / "map.tif", 7, 5, PLANES, {"crop": 64, "scale": None})
    with pytest.raises(ValueError, match=r"made otherwise: crop was 64, now 32; scale was None, now \[\[0, 1\]\]"):
        UnfinishedMap(tmp_path / "map.tif", 7, 5, PLANES, {"crop": 32, "scale": ((0, 1),)}, resume=True)


def test_nothing_finished_is_begun_anew_and_damage_is_told(tmp_path):
    UnfinishedMap(tmp_path / "map.tif", 7, 5, PLANES, {"crop": 64})
    begun = UnfinishedMap(tmp_path / "map.tif", 7, 5, PLANES, {"crop": 32})  # no row is lost
    (begun.folder / "progress.json").write_text("")
    with pytest.raises(ValueError, match=r"progress.json' is damaged .*Remove its folder to begin anew"):
        UnfinishedMap(tmp_path / "map.tif", 7, 5, PLANES, {"crop": 32}, resume=True)


def test_what_was_begun_without_a_count_of_rows_is_begun_anew(tmp_path):
    begun = UnfinishedMap(tmp_path / "map.tif", 7, 5, PLANES, {})
    begun.write(slice(0, 3), rows_of(0, 3))
    (begun.folder / "progress.json").unlink()
    assert UnfinishedMap(tmp_path / "map.tif", 7, 5, PLANES, {}).rows_done == 0


def test_rows_count_when_they_are_written_and_not_before(tmp_path):
    unfinished = UnfinishedMap(tmp_path / "map.tif", 7, 5, PLANES, {})
    unfinished.write(slice(0, 3), rows_of(0, 3))
    (unfinished.folder / "confidence").unlink()
    with pytest.raises(FileNotFoundError):
        unfinished.write(slice(3, 7), rows_of(3, 7))
    assert json.loads((unfinished.folder / "progress.json").read_text())["rows_done"] == 3


def test_a_disk_that_is_too_small_is_told_at_once(tmp_path):
    with pytest.raises(OSError, match=r"GB left; this map needs up to 20000000.00 GB"):
        UnfinishedMap(tmp_path / "maps" / "map.tif", 10**8, 10**8, {"labels": "uint8"}, {})
    assert list((tmp_path / "maps").iterdir()) == []
