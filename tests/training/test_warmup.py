import json
import shutil

import pytest
import torch
from helpers import forget_accelerator, make_model
from safetensors.torch import load_file

from co2s_hf.data.options import DataOptions
from co2s_hf.training import warmup
from co2s_hf.training.loop import setup, train
from co2s_hf.training.objective import Co2SObjective
from co2s_hf.training.options import TrainingOptions
from co2s_hf.training.warmup import WarmUp


NAMES = ["land", "road"]


def coverage(*values):
    return {"clip": torch.tensor(values), "dinov3": torch.tensor([1.0, 1.0])}


def test_the_warm_up_ends_when_every_class_is_covered():
    warm_up = WarmUp(longest=60, check_steps=20)
    assert [done for done in range(1, 70) if warm_up.must_check(done)] == [20, 40, 60]
    assert warm_up.end_if_covered(20, coverage(0.9, 0.19), NAMES) is None and warm_up.end is None
    assert "ends after step 40: every class" in warm_up.end_if_covered(40, coverage(0.9, 0.2), NAMES)
    assert (warm_up.end, warm_up.steps) == (40, 40) and not warm_up.must_check(60)


def test_the_warm_up_ends_at_its_bound_and_names_the_classes_that_are_not_covered():
    warm_up = WarmUp(longest=50, check_steps=20)
    assert warm_up.must_check(50) and warm_up.steps == 50
    line = warm_up.end_if_covered(50, coverage(0.9, 0.01), NAMES)
    assert "upper bound" in line and line.endswith("road (clip 0.01).") and warm_up.end == 50


def test_classes_without_labels_do_not_keep_the_warm_up_open():
    warm_up = WarmUp(longest=50, check_steps=10)
    assert "every class" in warm_up.end_if_covered(10, coverage(0.5, torch.nan), NAMES)


def test_the_decision_is_saved():
    warm_up, other = WarmUp(50, 10, end=20), WarmUp(50, 10)
    other.load_state_dict(warm_up.state_dict())
    assert other == warm_up


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, WarmUp(180, 11)),
        ({"from_scratch": True}, WarmUp(330, 13)),
        ({"max_train_steps": 4000}, WarmUp(1600, 100)),
        ({"max_train_steps": 10}, WarmUp(4, 10)),
        ({"supervised_warmup_steps": 7}, WarmUp(7, end=7)),
        ({"recipe": "paper", "from_scratch": True}, WarmUp(330, end=330)),
        ({"method": "supervised"}, WarmUp(450, end=450)),
        ({"max_train_steps": 1}, WarmUp(0, end=0)),
    ],
)
def test_only_balanced_without_a_number_ends_by_itself(settings, expected):
    options = TrainingOptions(**settings)
    options.resolve_steps(10)
    assert WarmUp.for_options(options) == expected


def run_of(folder, scenes_folder, **settings):
    """Set up a run of 6 steps that looks every 2 steps whether the warm-up may end."""
    forget_accelerator()
    options = TrainingOptions(
        from_scratch=True,
        crop_size=32,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_train_steps=8,
        logging_steps=2,
        seed=5,
        output_dir=str(folder),
        **settings,
    )
    run = setup(options, DataOptions(data_dir=str(scenes_folder)))
    if run.warm_up.check_steps:
        run.warm_up.check_steps = 2
    return run


def result_of(folder):
    """Return the weights and the log without measurements of the machine."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [{k: v for k, v in line.items() if "second" not in k and "memory" not in k} for line in lines]
    return (folder / "model" / "model.safetensors").read_bytes(), kept


def test_a_warm_up_that_ends_by_itself_is_the_same_run_as_a_given_one(scenes_folder, tmp_path, monkeypatch, capsys):
    """... also with worker processes, which read ahead."""
    monkeypatch.setattr(warmup, "FLOOR", 0.0)  # the first check ends the warm-up
    run = run_of(tmp_path / "own", scenes_folder, dataloader_num_workers=2)
    assert run.warm_up.end is None and run.items.num_labeled_only == 4 * 4
    train(run)
    assert run.warm_up.end == 2 and "The warm-up ends after step 2: every class" in capsys.readouterr().out
    weights, log = result_of(tmp_path / "own")
    assert "clip/coverage" not in log[0] and "clip/coverage" in log[1]

    train(run_of(tmp_path / "given", scenes_folder, supervised_warmup_steps=2))
    forget_accelerator()
    assert result_of(tmp_path / "given") == (weights, log)


@pytest.mark.parametrize(("floor", "end", "resumed_end"), [(0.0, 2, 2), (1e9, 4, None)])
def test_a_run_resumes_before_and_after_the_end_of_its_warm_up(
    floor, end, resumed_end, scenes_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(warmup, "FLOOR", floor)
    settings = {"checkpointing_steps": 3}
    run = run_of(tmp_path / "run", scenes_folder, **settings)
    train(run)
    assert run.warm_up.end == end
    expected = result_of(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-0000006")
    resumed = run_of(tmp_path / "run", scenes_folder, **settings, resume_from_checkpoint="last")
    assert (resumed.steps_done, resumed.warm_up.end) == (3, resumed_end)
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-0000003" / "model.safetensors")
    statistics = [value for name, value in saved.items() if "statistics" in name]
    assert statistics and any(value.any() for value in statistics) == (end < 3)
    train(resumed)
    forget_accelerator()
    assert resumed.warm_up.end == end and result_of(tmp_path / "run") == expected


def test_measuring_does_not_change_the_model_or_its_statistics(scenes_folder, tmp_path):
    run = run_of(tmp_path / "run", scenes_folder, confidence_threshold=0.0)
    before = {name: value.clone() for name, value in run.objective.state_dict().items()}
    state = torch.get_rng_state()
    found = [warmup.relative_coverage(run.objective, run.items, check, 3) for check in (1, 1, 2)]
    forget_accelerator()
    assert all(torch.equal(run.objective.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("clip", "dinov3"):
        torch.testing.assert_close(found[0][name], found[1][name], equal_nan=True)
        assert found[0][name].isnan().tolist() == (run.data.labeled_share == 0).tolist()
        assert not torch.equal(found[0][name].nan_to_num(), found[2][name].nan_to_num())


def test_both_students_are_measured_with_their_thresholds(scenes_folder, tmp_path):
    """With threshold 0 every pixel is confident, so the coverage is the share of each predicted class."""
    run = run_of(tmp_path / "run", scenes_folder, recipe="paper", confidence_threshold=0.0)
    found = warmup.relative_coverage(run.objective, run.items, 0, 4)
    forget_accelerator()
    share = torch.tensor(run.data.labeled_share)
    for values in found.values():
        covered = (values * share).nansum().item()
        assert 0 < covered <= 1 + 1e-6
        if not values.isnan().any():
            assert covered == pytest.approx(1)


def test_a_model_that_has_learned_nothing_covers_no_class(scenes_folder, tmp_path):
    """Thresholds per class would call a share of every predicted class confident."""
    run = run_of(tmp_path / "run", scenes_folder)
    found = warmup.relative_coverage(run.objective, run.items, 0, 4)
    forget_accelerator()
    assert all(values.nan_to_num().eq(0).all() for values in found.values())


def test_an_objective_without_labelled_shares_still_trains():
    assert Co2SObjective(make_model()).labeled_share is None
