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


def test_a_run_without_finished_rows_is_replaced(tmp_path):
    ResumableRaster(tmp_path / "map.tif", 7, 5, PLANES, {"crop": 64})
    second = ResumableRaster(tmp_path / "map.tif", 7, 5, PLANES, {"crop": 32})  # no finished row is lost
    assert json.loads((second.folder / "progress.json").read_text())["settings"] == {"crop": 32}


def progress(**changes):
    """Return a function that changes the progress of an interrupted run."""

    def damage(folder):
        path = folder / "progress.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def change_rows(folder):
    content = bytearray((folder / "labels.rows").read_bytes())
    content[3] ^= 1
    (folder / "labels.rows").write_bytes(content)


DAMAGES = {
    "empty": (lambda folder: (folder / "progress.json").write_text(""), "progress.json"),
    "no UTF-8": (lambda folder: (folder / "progress.json").write_bytes(b"\xff"), "progress.json"),
    "a list": (lambda folder: (folder / "progress.json").write_text("[3]"), "progress.json"),
    "deep": (lambda folder: (folder / "progress.json").write_text("[" * 100_000), "progress.json"),
    "no fields": (lambda folder: (folder / "progress.json").write_text("{}"), "progress.json"),
    "wrong type": (progress(rows_done="3"), "progress.json"),
    "wrong runs": (progress(runs=[3]), "progress.json"),
    "too many rows": (progress(rows_done=8), "progress.json"),
    "negative": (progress(rows_done=-1), "progress.json"),
    "rows that were not written": (progress(rows_done=5), "labels.rows"),
    "no checksums": (progress(checksums={}), "labels.rows"),
    "truncated rows": (lambda folder: os.truncate(folder / "confidence.rows", 70), "confidence.rows"),
    "rows of another size": (lambda folder: (folder / "labels.rows").write_bytes(bytes(100)), "labels.rows"),
    "no rows": (lambda folder: (folder / "labels.rows").unlink(), "labels.rows"),
    "changed rows": (change_rows, "labels.rows"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_state_is_an_error_and_stays(name, tmp_path):
    raster = ResumableRaster(tmp_path / "map.tif", 7, 5, PLANES, {"crop": 32})
    raster.write(slice(0, 3), rows_of(0, 3))
    damage, named = DAMAGES[name]
    damage(raster.folder)
    before = {path.name: path.read_bytes() for path in raster.folder.iterdir()}
    message = rf"unfinished/{named}' is damaged \((.|\n)*\)\. Remove its folder to start from the first row"
    with pytest.raises(UserValueError, match=message):
        ResumableRaster(tmp_path / "map.tif", 7, 5, PLANES, {"crop": 32}, resume=True)
    assert {path.name: path.read_bytes() for path in raster.folder.iterdir()} == before


def place(path, kind, target):
    """Put a file, a folder or a link at a path."""
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(target)
    else:
        path.write_bytes(b"precious")


@pytest.mark.parametrize("num_rows", [0, 3])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("file", "notes.txt"),
        ("file", "labels"),
        ("folder", "deeper"),
        ("link", "labels.rows"),
        ("link", "progress.json"),
    ],
)
def test_files_folders_and_links_of_others_stay(kind, name, num_rows, tmp_path, caplog):
    raster = ResumableRaster(tmp_path / "map.tif", 7, 5, PLANES, {})
    if num_rows:
        raster.write(slice(0, num_rows), rows_of(0, num_rows))
    target = tmp_path / "precious"
    content = (raster.folder / name).read_bytes() if kind == "link" else b"precious"
    target.write_bytes(content)
    place(raster.folder / name, kind, target)
    before = sorted(raster.folder.iterdir())
    for resume in (False, True):
        with pytest.raises(UserOSError, match=rf"{name}' is a link, or a file that this version .* Move it away"):
            ResumableRaster(tmp_path / "map.tif", 7, 5, PLANES, {}, resume=resume)
    raster.remove()
    assert f"{name}' is a link" in caplog.text
    assert sorted(raster.folder.iterdir()) == before and target.read_bytes() == content


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / ".map.tif.unfinished").write_text("precious")
    with pytest.raises(UserOSError, match=r"\.map\.tif\.unfinished' is a link or a file; .* Remove it"):
        ResumableRaster(tmp_path / "map.tif", 7, 5, PLANES, {}, resume=True)
    assert (tmp_path / ".map.tif.unfinished").read_text() == "precious"


def test_what_changes_values_by_rounding_alone_may_differ_and_is_listed(tmp_path):
    def run(rounding, rows):
        raster = ResumableRaster(tmp_path / "map.tif", 7, 5, PLANES, {}, resume=True, rounding=rounding)
        raster.write(slice(*rows), rows_of(*rows))
        return raster.runs

    cpu, gpu = {"device": "cpu", "batch": 4}, {"device": "cuda", "batch": 4}
    assert run(gpu, (0, 2)) == run(gpu, (2, 3)) == [{"from_row": 0} | gpu]
    assert run(cpu, (3, 4)) == run(cpu, (4, 5)) == [{"from_row": 0} | gpu, {"from_row": 3} | cpu]
    small = {"device": "cpu", "batch": 1}
    assert run(small, (5, 7)) == [{"from_row": 0} | gpu, {"from_row": 3} | cpu, {"from_row": 5} | small]


def test_parts_must_not_change_but_may_be_found_later(tmp_path):
    def run(parts):
        return ResumableRaster(tmp_path / "map.tif", 7, 5, PLANES, {}, resume=True, parts=parts)

    run({"a.tif": {"bytes": 1}}).write(slice(0, 3), rows_of(0, 3))
    run({"a.tif": {"bytes": 1}, "b.tif": {"bytes": 2}}).write(slice(3, 4), rows_of(3, 4))  # b.tif was missing
    run({"b.tif": {"bytes": 2}})  # now a.tif is missing
    with pytest.raises(
        UserValueError, match=r"'b.tif' has changed since the rows in .* were made from it. Restore it"
    ):
        run({"a.tif": {"bytes": 1}, "b.tif": {"bytes": 3}})


def test_rows_without_a_count_are_replaced(tmp_path):
    first = ResumableRaster(tmp_path / "map.tif", 7, 5, PLANES, {})
    first.write(slice(0, 3), rows_of(0, 3))
    (first.folder / "progress.json").unlink()
    assert ResumableRaster(tmp_path / "map.tif", 7, 5, PLANES, {}).rows_done == 0


def test_rows_are_counted_after_they_are_written(tmp_path):
    raster = ResumableRaster(tmp_path / "map.tif", 7, 5, PLANES, {})
    raster.write(slice(0, 3), rows_of(0, 3))
    (raster.folder / "confidence.rows").unlink()
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
