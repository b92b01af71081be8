"""`examples/compare.py`: the same labels with and without the unlabelled images."""

import importlib.util
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from types import SimpleNamespace

import pytest
from helpers import EXAMPLES, Result, read_metrics, run_command

from co2s_hf.training.logbook import read_log


SHORT = ("--supervised_warmup_steps", 1, "--max_train_steps", 2, "--crop_size", 48, "--logging_steps", 1)
SHORT += ("--per_device_train_batch_size", 1, "--card_samples", 0, "--use_cpu")


@pytest.fixture
def compare(monkeypatch):
    """The script as a module, and the trainings that it started; these run in this process."""
    spec = importlib.util.spec_from_file_location("compare", EXAMPLES / "compare.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    trainings = []

    def run(command, check):
        assert command[:4] == [sys.executable, "-m", "co2s_hf", "train"] and check
        trainings.append(command[4:])
        done = run_command("train", *command[4:])
        assert done.returncode == 0, done.stderr

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=run))
    return script, trainings


def run_script(script, monkeypatch, *words) -> Result:
    """Run a script to its end."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, words)])
    stdout, stderr, code = StringIO(), StringIO(), 0
    with redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            script.main()
        except SystemExit as end:
            code = end.code
    return Result(code, stdout.getvalue(), stderr.getvalue())


def row_of(printed: str, name: str) -> list[str]:
    """Return the numbers of a row of the table."""
    (row,) = (line for line in printed.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def test_methods_are_compared_on_the_same_labels(compare, scenes_folder, tmp_path, monkeypatch):
    script, trainings = compare
    words = ("--output_dir", tmp_path / "runs", "--data_dir", scenes_folder, *SHORT)
    compared = run_script(script, monkeypatch, "--seeds", 3, *words)
    assert compared.returncode == 0 and len(trainings) == 2, compared.stderr
    results = json.loads((tmp_path / "runs" / "comparison.json").read_text(encoding="utf-8"))
    means = []
    for method in ("supervised", "co2s"):
        folder = tmp_path / "runs" / f"{method}-seed3"
        assert results["3"][method] == read_metrics(folder)
        means += [100 * results["3"][method][name]["mean_iou"] for name in ("clip", "dinov3", "fused")]
        record = json.loads((folder / "arguments.json").read_text(encoding="utf-8"))
        assert (record["arguments"]["seed"], record["arguments"]["method"]) == (3, method)
        uses_unlabeled = any("strong" in name for line in read_log(folder / "log.jsonl") for name in line)
        assert uses_unlabeled == (method == "co2s")
    row = [*(f"{mean:.1f}" for mean in means), f"{means[5] - means[2]:+.1f}"]
    assert row_of(compared.stdout, "3") == row_of(compared.stdout, "mean") == row

    # Complete runs are not repeated. These two of seed 4 are as if they were trained.
    for method, mean_iou in (("supervised", 0.25), ("co2s", 0.5)):
        (tmp_path / "runs" / f"{method}-seed4").mkdir()
        metrics = {name: {"mean_iou": mean_iou} for name in ("clip", "dinov3", "fused")}
        (tmp_path / "runs" / f"{method}-seed4" / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    both = run_script(script, monkeypatch, "--seeds", 3, 4, *words)
    assert both.returncode == 0 and len(trainings) == 2, both.stderr
    assert row_of(both.stdout, "3") == row and row_of(both.stdout, "4") == [*["25.0"] * 3, *["50.0"] * 3, "+25.0"]
    expected = [(mean + other) / 2 for mean, other in zip(means, [25] * 3 + [50] * 3)]
    assert row_of(both.stdout, "mean") == [*(f"{m:.1f}" for m in expected), f"{expected[5] - expected[2]:+.1f}"]

    # A run without results starts again, and its results are the same.
    (tmp_path / "runs" / "co2s-seed3" / "metrics.json").unlink()
    again = run_script(script, monkeypatch, "--seeds", 3, *words)
    assert again.returncode == 0 and len(trainings) == 3 and trainings[2][-1] == "--overwrite_output_dir"
    assert json.loads((tmp_path / "runs" / "comparison.json").read_text(encoding="utf-8")) == results
    other = run_script(script, monkeypatch, "--seeds", 3, *words, "--learning_rate", 1)
    assert other.returncode == 2 and "holds runs with --data_dir" in other.stderr and len(trainings) == 3
