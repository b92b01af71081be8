import json

import pytest
import torch
from accelerate import Accelerator

from co2s_hf.training.logbook import Logbook, NonFiniteGuard, flatten, read_log


@pytest.fixture
def logbook(tmp_path):
    return Logbook(Accelerator(cpu=True), tmp_path / "log.jsonl", {0: "land", 1: "road"})


def report(loss, *coverage, without_labels=0.0):
    losses = {"loss": torch.tensor(loss), "without_labels": torch.tensor(without_labels)}
    if coverage:
        losses |= {"clip/coverage": torch.tensor(coverage), "clip/confident_fraction": torch.tensor(sum(coverage))}
        losses["clip/known_fraction"] = torch.tensor(sum(coverage) / 2)
        losses["clip/right_fraction"] = torch.tensor(sum(coverage) / 8)
    return losses


def test_lines_hold_means_by_class_and_counts(logbook):
    logbook.add(report(1.0, without_labels=1.0), images=4)
    logbook.add(report(2.0, 0.25, 0.5), images=8)
    logbook.write(2, {"decoder": 1e-3})
    (line,) = read_log(logbook.path)
    assert line["loss"] == 1.5 and line["batches_without_labels"] == 1
    assert line["clip/coverage"] == {"land": 0.25, "road": 0.5}  # mean over the steps that have it
    assert line["clip/pseudo_label_accuracy"] == 0.25 and "clip/right_fraction" not in line
    assert line["learning_rates"] == {"decoder": 1e-3}
    assert line["images_per_second"] > 0 and 0.05 < line["peak_memory_gb"] < 500


def test_no_confident_pixel_means_no_accuracy(logbook):
    logbook.add(report(1.0, 0.0, 0.0), images=4)
    logbook.write(1, {})
    (line,) = read_log(logbook.path)
    assert "clip/pseudo_label_accuracy" not in line and line["clip/confident_fraction"] == 0


def test_a_resumed_run_replaces_later_lines(logbook):
    logbook.path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (2, 4, 6)))
    logbook.add(report(1.0), images=1)
    logbook.write(4, {})
    assert [line["step"] for line in read_log(logbook.path)] == [2, 4]


def test_a_class_that_vanishes_is_named_once(logbook, capsys):
    for step, coverage in enumerate([(0.5, 0.0), (0.4, 0.1), (0.6, 0.0), (0.6, 0.0)], start=1):
        logbook.add(report(1.0, *coverage), images=1)
        logbook.write(step, {})
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Warning")]
    assert len(warnings) == 1
    assert "'road' has vanished from the clip student's confident pseudo-labels by step 3" in warnings[0]


def test_trackers_get_flat_numbers():
    assert flatten({"a": 1.0, "b": {"c": 2.0, "d": 3.0}}) == {"a": 1.0, "b/c": 2.0, "b/d": 3.0}


def test_one_broken_loss_is_skipped_and_two_in_a_row_stop_the_run(capsys):
    guard = NonFiniteGuard(Accelerator(cpu=True))
    good, nan, infinite = (torch.tensor(value) for value in (1.0, float("nan"), float("inf")))
    steps = [(0, good), (1, nan), (1, nan), (2, good), (3, infinite)]  # two batches make step 1
    assert [guard.must_skip(loss, ["a.png"], step) for step, loss in steps] == [False, True, True, False, True]
    shown = capsys.readouterr().err
    assert shown.count("The loss of step 2 is not finite. Its images: a.png. The step is skipped.") == 2
    assert shown.count("The loss of step 4 is not finite.") == 1
    with pytest.raises(FloatingPointError, match=r"step 5 is not finite. Its images: b.png, c.png. The step before"):
        guard.must_skip(nan, ["b.png", "c.png"], 4)


def test_pauses_do_not_count_as_training_time(logbook, monkeypatch):
    now = iter([0.0, 1.0, 91.0, 92.0, 92.0])  # start; the pause from 1 to 91; the line at 92
    monkeypatch.setattr("co2s_hf.training.logbook.time.perf_counter", lambda: next(now))
    logbook.started = next(now)
    with logbook.paused():
        pass
    logbook.add(report(1.0), images=10)
    logbook.write(1, {})
    assert read_log(logbook.path)[0]["images_per_second"] == 5.0
