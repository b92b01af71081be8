import json
import os

import pytest

from co2s_hf.utils.errors import UserFileExistsError, UserOSError
from co2s_hf.utils.files import check_new_folder, write_json, write_text, written_beside, written_file


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
        assert temporary.suffix == ".json" and temporary.parent == tmp_path / "deep"
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
