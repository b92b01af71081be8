import json

import pytest
import torch
from accelerate import Accelerator

from co2s_hf.training.logbook import Logbook, NonFiniteGuard, flatten, pseudo_label_table, read_log


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


def warnings_of(coverages, tmp_path, capsys):
    """Write one line per coverage of road, with 20 % of the labelled pixels, and return the warnings."""
    logbook = Logbook(
        Accelerator(cpu=True), tmp_path / "log.jsonl", {0: "land", 1: "road", 2: "snow"}, (0.8, 0.2, 0.0)
    )
    for step, road in enumerate(coverages, start=1):
        logbook.add(report(1.0) if road is None else report(1.0, 0.5, road, 0.0), images=1)
        logbook.write(step, {})
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("Warning")]


def test_a_class_that_vanishes_is_named_once(tmp_path, capsys):
    (warning,) = warnings_of([None, 0.3, 0.001, 0.0015, 0.001, 0.001, 0.001], tmp_path, capsys)
    assert "'road' has vanished from the clip student's confident pseudo-labels" in warning
    assert "cover 0.10 % of the pixels at step 5, but 20.0 % of the labelled pixels are 'road'" in warning
    assert "`recipe='balanced'`" in warning


@pytest.mark.parametrize(
    ("coverages", "expected"),
    [
        ([0.0, 0.0], 0),  # two lines are not enough
        ([0.0, 0.0, 0.0], 1),  # it never was there
        ([0.0, 0.0, 0.0021, 0.0, 0.0], 0),  # a hundredth of its share of the labels is 0.002
        ([0.0, 0.0, 0.0, 0.3, 0.0, 0.0, 0.0, 0.0], 2),  # it returned and vanished again
    ],
)
def test_a_class_has_vanished_after_three_lines(coverages, expected, tmp_path, capsys):
    assert len(warnings_of(coverages, tmp_path, capsys)) == expected


def test_accuracy_is_logged_by_class(logbook):
    for right in (0.1, 0.3):
        losses = report(1.0, 0.5, 0.25)
        losses |= {"clip/right_coverage": torch.tensor([right, 0.0]), "clip/known_coverage": torch.tensor([0.4, 0.0])}
        logbook.add(losses, images=1)
    logbook.write(1, {})
    (line,) = read_log(logbook.path)
    assert line["clip/accuracy_by_class"] == {"land": pytest.approx(0.5)}  # nothing is known about road
    assert not any("right" in name or "known" in name for name in line)


def test_the_last_pseudo_labels_are_a_table():
    log = [
        {"step": 2, "clip/coverage": {"land": 0.9, "road": 0.0}},
        {"step": 4, "clip/coverage": {"land": 0.5, "road": 0.025}, "clip/accuracy_by_class": {"land": 0.75}},
    ]
    heading, titles, *rows = pseudo_label_table(log, {"land": 0.8, "road": 0.2}).splitlines()
    assert "step 4" in heading and titles.split() == ["labels", "clip", "right", "(clip)"]
    assert [row.split() for row in rows] == [["land", "80.0", "50.0", "75.0"], ["road", "20.0", "2.5", "-"]]
    assert pseudo_label_table([{"step": 2, "loss": 1.0}], {"land": 1.0}) is None  # warm-up or supervised


def test_trackers_get_flat_numbers():
    assert flatten({"a": 1.0, "b": {"c": 2.0, "d": 3.0}}) == {"a": 1.0, "b/c": 2.0, "b/d": 3.0}


def test_one_broken_step_is_skipped_and_two_in_a_row_stop_the_run(capsys):
    guard = NonFiniteGuard(Accelerator(cpu=True))
    good, nan, infinite = (torch.tensor(value) for value in (1.0, float("nan"), float("inf")))
    names = [["a.png", "b.png"], ["c.png"]]  # two batches make a step
    steps = [(good, good), (nan, nan), (good, good), (good, infinite)]
    found = [guard.broken_batches([*losses], names, step) for step, losses in enumerate(steps)]
    assert found == [[False, False], [True, True], [False, False], [False, True]]
    assert capsys.readouterr().err.splitlines() == [
        "Warning: The loss of step 2 is not finite. Its images: a.png, b.png, c.png. The step is skipped.",
        "Warning: The loss of step 4 is not finite. Its images: c.png. The step is skipped.",
    ]
    with pytest.raises(FloatingPointError, match=r"step 5 is not finite. Its images: a.png, b.png. The step before"):
        guard.broken_batches([nan, good], names, 4)


def test_pauses_do_not_count_as_training_time(logbook, monkeypatch):
    now = iter([0.0, 1.0, 91.0, 92.0, 92.0])  # start; the pause from 1 to 91; the line at 92
    monkeypatch.setattr("co2s_hf.training.logbook.time.perf_counter", lambda: next(now))
    logbook.started = next(now)
    with logbook.paused():
        pass
    logbook.add(report(1.0), images=10)
    logbook.write(1, {})
    (line,) = read_log(logbook.path)
    assert line["seconds"] == 2.0 and line["images_per_second"] == 5.0
