import errno
import json
import os

import numpy as np
import pytest

from co2s_hf.geo.resumable_raster import ResumableRaster
from co2s_hf.utils.errors import UserFileExistsError, UserOSError, UserValueError


PLANES = {"labels": "uint8", "confidence": "float32"}


def rows_of(start, stop, width=5):
    """Return values of both planes that differ in every pixel."""
    values = np.arange(start * width, stop * width).reshape(-1, width)
    return {"labels": values.astype(np.uint8), "confidence": values.astype(np.float32) / 7}


def test_finished_rows_are_kept_and_continued(tmp_path):
    first = ResumableRaster(tmp_path / "map.tif", 7, 5, PLANES, {"crop": (3, 4)})
    first.write(slice(0, 3), rows_of(0, 3))
    again = ResumableRaster(tmp_path / "map.tif", 7, 5, PLANES, {"crop": (3, 4)}, resume=True)
    assert again.rows_done == 3
    again.write(slice(3, 7), rows_of(3, 7))
    for name, values in rows_of(0, 7).items():
        assert np.array_equal(again.read(name, slice(0, 7)), values)
        assert np.array_equal(again.read(name, slice(2, 4)), values[2:4])
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_rows_of_other_settings_are_not_continued(tmp_path):
    settings = {"crop": 64, "scale": None}
    ResumableRaster(tmp_path / "map.tif", 7, 5, PLANES, settings).write(slice(0, 3), rows_of(0, 3))
    with pytest.raises(UserFileExistsError, match=r"has finished rows .*Continue them with `resume=True`"):
        ResumableRaster(tmp_path / "map.tif", 7, 5, PLANES, settings)
    message = r"with other settings: crop was 64, now 32; scale was None, now \[\[0, 1\]\]"
    with pytest.raises(UserValueError, match=message):
        ResumableRaster(tmp_path / "map.tif", 7, 5, PLANES, {"crop": 32, "scale": ((0, 1),)}, resume=True)


def test_a_run_without_finished_rows_is_replaced_and_a_damaged_count_is_an_error(tmp_path):
    ResumableRaster(tmp_path / "map.tif", 7, 5, PLANES, {"crop": 64})
    second = ResumableRaster(tmp_path / "map.tif", 7, 5, PLANES, {"crop": 32})  # no finished row is lost
    (second.folder / "progress.json").write_text("")
    with pytest.raises(UserValueError, match=r"progress.json' is damaged .*Remove its folder to start from the first"):
        ResumableRaster(tmp_path / "map.tif", 7, 5, PLANES, {"crop": 32}, resume=True)


def test_rows_without_a_count_are_replaced(tmp_path):
    first = ResumableRaster(tmp_path / "map.tif", 7, 5, PLANES, {})
    first.write(slice(0, 3), rows_of(0, 3))
    (first.folder / "progress.json").unlink()
    assert ResumableRaster(tmp_path / "map.tif", 7, 5, PLANES, {}).rows_done == 0


def test_rows_are_counted_after_they_are_written(tmp_path):
    raster = ResumableRaster(tmp_path / "map.tif", 7, 5, PLANES, {})
    raster.write(slice(0, 3), rows_of(0, 3))
    (raster.folder / "confidence").unlink()
    with pytest.raises(FileNotFoundError):
        raster.write(slice(3, 7), rows_of(3, 7))
    assert json.loads((raster.folder / "progress.json").read_text())["rows_done"] == 3


def test_a_disk_that_is_too_small_is_an_error_at_the_start(tmp_path, monkeypatch):
    with pytest.raises(UserOSError, match=r"GB left; this map needs up to 20000000.00 GB"):
        ResumableRaster(tmp_path / "maps" / "map.tif", 10**8, 10**8, {"labels": "uint8"}, {})
    assert list((tmp_path / "maps").iterdir()) == []

    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    with pytest.raises(
        UserOSError, match=r"'.*\.map\.tif\.unfinished' cannot be read or written: No space left on device"
    ):
        ResumableRaster(tmp_path / "maps" / "map.tif", 7, 5, PLANES, {})
    assert list((tmp_path / "maps").iterdir()) == []
