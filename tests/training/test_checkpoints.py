import pytest

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
