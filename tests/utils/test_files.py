import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kills import count_operations, kill

from co2s_hf.utils import files
from co2s_hf.utils.errors import UserFileExistsError, UserOSError
from co2s_hf.utils.files import (
    check_new_folder,
    clean,
    locked_folder,
    recover,
    remove_results,
    write_json,
    write_text,
    written_beside,
    written_file,
)


def test_a_complete_folder_replaces_the_old_one(tmp_path):
    target = tmp_path / "deep" / "result"
    for content in ("old", "new"):
        with written_beside(target) as folder:
            (folder / "file").write_text(content)
            (folder / f"only_{content}").touch()
        assert (target / "file").read_text() == content
    assert sorted(path.name for path in target.iterdir()) == ["file", "only_new"]
    assert [path.name for path in target.parent.iterdir()] == ["result"]


def test_a_failure_leaves_the_old_folder(tmp_path):
    target = tmp_path / "result"
    with written_beside(target) as folder:
        (folder / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), written_beside(target) as folder:
        (folder / "file").write_text("half")
        raise KeyboardInterrupt
    assert (target / "file").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_failed_rename_restores_the_old_folder(tmp_path, monkeypatch):
    target = tmp_path / "result"
    target.mkdir()
    (target / "file").write_text("old")
    renames = []

    def fail_at_the_second(source, destination):
        renames.append(destination)
        if len(renames) == 2:
            raise OSError("disk full")
        os.rename(source, destination)

    monkeypatch.setattr("co2s_hf.utils.files.os.replace", fail_at_the_second)
    with pytest.raises(OSError, match="disk full"), written_beside(target):
        pass
    assert (target / "file").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_symbolic_link_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with written_beside(tmp_path / "link") as folder:
        (folder / "file").touch()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "file").exists()


def test_a_failure_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "deep" / "a.json", "Größe\n")
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "deep" / "a.json", {"loss": float("nan")})
    with pytest.raises(KeyboardInterrupt), written_file(tmp_path / "deep" / "a.json") as temporary:
        assert temporary.name == "a.json" and temporary.is_relative_to(tmp_path / "deep")
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "deep" / "a.json").read_bytes() == "Größe\n".encode()
    write_json(tmp_path / "deep" / "a.json", {"loss": 1.5})
    assert json.loads((tmp_path / "deep" / "a.json").read_text()) == {"loss": 1.5}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.json"]


def test_folders_with_content_and_files_are_refused(tmp_path):
    assert check_new_folder(tmp_path / "new") == tmp_path / "new"
    assert check_new_folder(tmp_path) == tmp_path
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserFileExistsError, match=r"already exists and is not an empty folder. Choose another"):
            check_new_folder(path)
    with pytest.raises(FileExistsError, match=r"folder. Use `overwrite=True`."):
        check_new_folder(tmp_path, "Use `overwrite=True`.")


def test_a_folder_that_cannot_be_created_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserOSError, match=r"run' cannot be created: '.*file' is no folder that can be written to"):
        check_new_folder(tmp_path / "file" / "below" / "run")
    assert check_new_folder(tmp_path / "new" / "run") == tmp_path / "new" / "run"


def test_another_process_may_clean_up_during_the_check(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        checks = pool.submit(lambda: [check_new_folder(tmp_path / "run") for _ in range(200)])
        while not checks.done():
            recover(tmp_path / "run")
    assert len(checks.result()) == 200 and not any(tmp_path.iterdir())


def content(folder: Path) -> dict[str, str]:
    """Return the names and texts of the files in a folder."""
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("old", [None, {"a": "old", "b": "old"}])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_folder(old, tmp_path):
    target, new = tmp_path / "model", {"a": "new", "c": "new"}

    def replace():
        with written_beside(target) as folder:
            for name, text in new.items():
                (folder / name).write_text(text)

    def restore():
        shutil.rmtree(target, ignore_errors=True)
        if old is not None:
            target.mkdir()
            for name, text in old.items():
                (target / name).write_text(text)

    found, was_missing = [], 0
    restore()
    for at in range(count_operations(replace, tmp_path)):
        restore()
        assert kill(replace, tmp_path, at)
        was_missing += not target.exists()
        recover(target)
        found.append(content(target) if target.exists() else None)
        assert [path.name for path in tmp_path.iterdir()] == ["model"] * target.exists()  # nothing else is left
    change = found.index(new)
    assert 0 < change < len(found) and found == [old] * change + [new] * (len(found) - change)
    assert was_missing == (1 if old else change)  # the moment between the two renames


def test_the_next_write_and_the_next_run_clean_up_too(tmp_path):
    def write(name):
        with written_beside(tmp_path / name) as folder:
            (folder / "file").write_text("new")

    for finish in (check_new_folder, lambda folder: write("b")):
        assert kill(lambda: write("a"), tmp_path, at=8)
        (left,) = tmp_path.iterdir()
        assert (left / "new" / "a").is_dir()
        finish(tmp_path)
        assert not left.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_file(tmp_path):
    path, found = tmp_path / "log.jsonl", []
    write_text(path, "old")
    for at in range(count_operations(lambda: write_text(path, "new"), tmp_path)):
        write_text(path, "old")
        assert kill(lambda: write_text(path, "new"), tmp_path, at)
        clean(tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]
        found.append(path.read_text())
    assert found == sorted(found, reverse=True) and set(found) == {"old", "new"}


def test_a_kill_at_any_moment_leaves_whole_results_or_none(tmp_path):
    def fill():
        (tmp_path / "model").mkdir(exist_ok=True)
        for name in ("model/a", "model/b", "log.jsonl", "mine"):
            (tmp_path / name).write_text(name)

    fill()
    names = ["model", "log.jsonl", "missing"]
    states = set()
    for at in range(count_operations(lambda: remove_results(tmp_path, names), tmp_path)):
        fill()
        assert kill(lambda: remove_results(tmp_path, names), tmp_path, at)
        clean(tmp_path)
        states.add(tuple(sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))))
    assert states == {
        ("log.jsonl", "mine", "model", "model/a", "model/b"),
        ("log.jsonl", "mine"),
        ("mine",),
    }


def test_folders_of_living_processes_and_of_others_are_kept(tmp_path):
    (tmp_path / ".notes.co2s").mkdir()  # not the name of a work folder
    with written_beside(tmp_path / "model") as folder:
        (folder / "file").write_text("new")
        recover(tmp_path / "model")
        clean(tmp_path)
        with written_beside(tmp_path / "model") as other:
            (other / "file").write_text("other")
    assert content(tmp_path / "model") == {"file": "new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".notes.co2s", "model"]


def test_content_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Otherwise a power cut may leave empty files under the final names."""
    flushed, fsync, replace = [], os.fsync, os.replace
    checked = []

    def note(descriptor):
        flushed.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def check(source, destination):
        for path in (Path(source), *Path(source).rglob("*")):
            checked.append(path.name)
            assert path.stat().st_ino in flushed, path
        replace(source, destination)

    monkeypatch.setattr(files.os, "fsync", note)
    monkeypatch.setattr(files.os, "replace", check)
    with written_beside(tmp_path / "model") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "weights").write_bytes(b"1")
        (folder / "link").symlink_to("deep")
    with written_file(tmp_path / "a.png") as path:
        path.write_bytes(b"2")
    assert sorted(checked) == ["a.png", "deep", "link", "model", "weights"]
    assert flushed[-2] == tmp_path.stat().st_ino  # the name of the folder, too


def test_a_folder_is_found_again_when_both_renames_failed(tmp_path, monkeypatch):
    target, rename = tmp_path / "model", os.rename
    target.mkdir()
    (target / "file").write_text("old")

    def fail_after_the_first(source, destination):
        if Path(destination) == target.resolve():
            raise OSError("disk failure")
        rename(source, destination)

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "replace", fail_after_the_first)
        with pytest.raises(OSError, match="disk failure"), written_beside(target) as folder:
            (folder / "file").write_text("new")
    assert not target.exists()
    recover(target)
    assert content(target) == {"file": "new"} and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_names_as_long_as_the_disk_allows_are_written(tmp_path):
    write_text(tmp_path / ("a" * 255), "text")
    with written_beside(tmp_path / ("b" * 255)) as folder:
        (folder / "file").touch()
    assert sorted(len(path.name) for path in tmp_path.iterdir()) == [255, 255]


def test_a_folder_is_locked_until_the_block_ends(tmp_path):
    with locked_folder(tmp_path / "run"):
        with (
            pytest.raises(UserOSError, match=r"Another run writes into '.*run'\. Wait until"),
            locked_folder(tmp_path / "run"),
        ):
            pass
        assert list((tmp_path / "run").iterdir()) == []
    with locked_folder(tmp_path / "run"):
        pass
