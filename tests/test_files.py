import os

import pytest

from co2s_hf.files import check_new_folder, written_beside


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path):
    target = tmp_path / "deep" / "result"
    for content in ("old", "new"):
        with written_beside(target) as folder:
            (folder / "file").write_text(content)
            (folder / f"only_{content}").touch()
        assert (target / "file").read_text() == content
    assert sorted(path.name for path in target.iterdir()) == ["file", "only_new"]
    assert [path.name for path in target.parent.iterdir()] == ["result"]


def test_a_failure_leaves_what_was_there(tmp_path):
    target = tmp_path / "result"
    with written_beside(target) as folder:
        (folder / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), written_beside(target) as folder:
        (folder / "file").write_text("half")
        raise KeyboardInterrupt
    assert (target / "file").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_failing_move_restores_what_was_there(tmp_path, monkeypatch):
    target = tmp_path / "result"
    target.mkdir()
    (target / "file").write_text("old")
    moves = []

    def fail_at_the_second(source, destination):
        moves.append(destination)
        if len(moves) == 2:
            raise OSError("disk full")
        os.rename(source, destination)

    monkeypatch.setattr("co2s_hf.files.os.replace", fail_at_the_second)
    with pytest.raises(OSError, match="disk full"), written_beside(target):
        pass
    assert (target / "file").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with written_beside(tmp_path / "link") as folder:
        (folder / "file").touch()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "file").exists()


def test_only_new_or_empty_folders_pass(tmp_path):
    assert check_new_folder(tmp_path / "new") == tmp_path / "new"
    assert check_new_folder(tmp_path) == tmp_path
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(FileExistsError, match="already exists and is not an empty folder"):
            check_new_folder(path)
