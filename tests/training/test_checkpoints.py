import subprocess

import pytest

from co2s_hf.training import checkpoints
from co2s_hf.training.checkpoints import check_output_dir, checkpoint_step, find_checkpoint
from co2s_hf.training.options import TrainingOptions


def test_missing_checkpoints_are_named(tmp_path):
    assert find_checkpoint(tmp_path, None) is None
    with pytest.raises(FileNotFoundError, match="There is no checkpoint in"):
        find_checkpoint(tmp_path, "last")
    with pytest.raises(FileNotFoundError, match="is not a checkpoint; give 'last' or a folder such as"):
        find_checkpoint(tmp_path, str(tmp_path))
    for step in (3, 20, 100):
        (tmp_path / f"step-{step:07d}").mkdir()
    assert checkpoint_step(find_checkpoint(tmp_path, "last")) == 100
    assert checkpoint_step(find_checkpoint(tmp_path, str(tmp_path / "step-0000020"))) == 20


def test_only_the_folder_of_a_run_is_overwritten(tmp_path):
    (tmp_path / "model").mkdir()
    options = TrainingOptions(output_dir=str(tmp_path), overwrite_output_dir=True)
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        check_output_dir(options)
    (tmp_path / "arguments.json").write_text("{}")
    check_output_dir(options)
    with pytest.raises(FileExistsError, match=r"`resume_from_checkpoint='last'`"):
        check_output_dir(TrainingOptions(output_dir=str(tmp_path)))


def test_the_revision_is_that_of_a_repository_that_tracks_this_package(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "__file__", str(tmp_path / "checkpoints.py"))
    (tmp_path / "checkpoints.py").touch()
    assert checkpoints._git_revision() is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "of somebody else"], check=True)
    assert checkpoints._git_revision() is None  # as in a virtual environment inside another project
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "with the package"], check=True)
    revision = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert checkpoints._git_revision() == revision
    (tmp_path / "checkpoints.py").write_text("# changed")
    assert checkpoints._git_revision() == f"{revision}-dirty"
