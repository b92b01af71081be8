"""Tables, paired gains and intervals of several methods over several seeds, from results made by hand."""

import json
import statistics

import numpy as np
import pytest

from co2s_hf.training.comparison import T_QUANTILES, Comparison, half_width, paired_interval


def metrics(clip: float, dinov3: float, fused: float, road: float | None = 0.5) -> dict:
    """Return the parts of a metrics.json that a comparison reads."""
    return {
        "clip": {"mean_iou": clip},
        "dinov3": {"mean_iou": dinov3},
        "fused": {"mean_iou": fused, "iou": {"land": fused, "road": road}},
        "num_images": 24,
    }


def comparison(seeds: int = 3, with_oracle: bool = True) -> Comparison:
    """Compare up to three methods over up to three seeds. The gains of co2s are 2, 4 and 3 points."""
    runs = {
        "supervised": [metrics(0.4, 0.45, 0.46, None), metrics(0.5, 0.55, 0.56, 0), metrics(0.45, 0.5, 0.51, None)],
        "co2s": [metrics(0.42, 0.47, 0.48), metrics(0.54, 0.59, 0.6), metrics(0.48, 0.5, 0.54)],
        "oracle": [metrics(0.5, 0.5, 0.58, 0.9), metrics(0.5, 0.5, 0.68, 0.8), metrics(0.5, 0.5, 0.63, 0.7)],
    }
    runs = {method: values for method, values in runs.items() if with_oracle or method != "oracle"}
    names = list(range(5, 5 + seeds))
    seconds = {"supervised": [100, 101, 102], "co2s": [200, None, 200], "oracle": [10, 10, 10]}
    return Comparison(
        runs={method: dict(zip(names, values)) for method, values in runs.items()},
        seconds={method: dict(zip(names, seconds[method])) for method in runs},
    )


EXPECTED = """\
Mean IoU of the validation images in per cent

supervised:

| seed | clip | dinov3 | fused |
|---|---|---|---|
| 5 | 40.0 | 45.0 | 46.0 |
| 6 | 50.0 | 55.0 | 56.0 |
| 7 | 45.0 | 50.0 | 51.0 |
| mean ± sd | 45.0 ± 5.0 | 50.0 ± 5.0 | 51.0 ± 5.0 |

co2s:

| seed | clip | dinov3 | fused |
|---|---|---|---|
| 5 | 42.0 | 47.0 | 48.0 |
| 6 | 54.0 | 59.0 | 60.0 |
| 7 | 48.0 | 50.0 | 54.0 |
| mean ± sd | 48.0 ± 6.0 | 52.0 ± 6.2 | 54.0 ± 6.0 |

oracle:

| seed | clip | dinov3 | fused |
|---|---|---|---|
| 5 | 50.0 | 50.0 | 58.0 |
| 6 | 50.0 | 50.0 | 68.0 |
| 7 | 50.0 | 50.0 | 63.0 |
| mean ± sd | 50.0 ± 0.0 | 50.0 ± 0.0 | 63.0 ± 5.0 |

Fused prediction, and its gain over supervised on the same seed. The 95 % interval is a paired t interval: \
mean ± 2.48 standard deviations of the gains. Few seeds make it wide: ± 2.48 with 3 seeds, ± 0.72 with 10.

| method | fused | gain | 95 % interval | smallest gain | share of the oracle's gain | training (s) |
|---|---|---|---|---|---|---|
| supervised | 51.0 ± 5.0 |  |  |  | 0 % | 101 |
| co2s | 54.0 ± 6.0 | +3.0 | +0.5 to +5.5 | +2.0 | 25 % | - |
| oracle | 63.0 ± 5.0 | +12.0 | +12.0 to +12.0 | +12.0 | 100 % | 10 |

IoU of each class, fused prediction, mean over the seeds:

| class | supervised | co2s | oracle |
|---|---|---|---|
| land | 51.0 | 54.0 | 63.0 |
| road | 0.0 | 50.0 | 80.0 |"""


def test_the_tables_of_three_seeds():
    assert comparison().tables() == EXPECTED


def test_one_seed_has_no_spread_and_no_interval():
    text = comparison(seeds=1, with_oracle=False).tables()
    assert "| mean ± sd | 42.0 | 47.0 | 48.0 |" in text and "One seed does not show how much the gain varies." in text
    assert "| method | fused | gain | 95 % interval | smallest gain | training (s) |" in text
    assert "| co2s | 48.0 | +2.0 | - | +2.0 | 200 |" in text
    assert "| road | - | 50.0 |" in text  # the class occurs nowhere in the baseline's only seed
    summary = comparison(seeds=1).to_dict()["summary"]["co2s"]
    assert summary["standard_deviation"] is None and summary["gain"]["interval"] is None


def test_a_model_of_one_student_has_one_column_less():
    found = comparison(seeds=1)
    for runs in found.runs.values():
        del runs[5]["dinov3"]
    assert "| seed | clip | fused |" in found.tables() and "| 5 | 40.0 | 46.0 |" in found.tables()


def test_without_a_gain_of_the_oracle_there_is_no_share():
    found = comparison(seeds=1)
    found.runs["oracle"][5]["fused"]["mean_iou"] = 0.46
    assert found.gain("oracle").mean == 0 and found.gain("co2s").share is None
    assert "| co2s | 48.0 | +2.0 | - | +2.0 | - | 200 |" in found.tables()
    assert comparison(with_oracle=False).gain("co2s").share is None


def test_the_summary_and_all_runs_are_written():
    found = comparison()
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["seeds"] == [5, 6, 7] and content["runs"]["co2s"]["6"] == found.runs["co2s"][6]
    assert content["seconds"]["co2s"] == {"5": 200, "6": None, "7": 200}
    summary = content["summary"]["co2s"]
    assert summary["mean_iou"] == pytest.approx(0.54) and summary["standard_deviation"] == pytest.approx(0.06)
    assert summary["class_iou"] == {"land": pytest.approx(0.54), "road": 0.5} and summary["seconds"] is None
    width = 4.303 * 0.01 / 3**0.5
    interval = [pytest.approx(0.03 - width), pytest.approx(0.03 + width)]
    gain = {"mean": pytest.approx(0.03), "smallest": pytest.approx(0.02), "share": pytest.approx(0.25)}
    assert summary["gain"] == gain | {"interval": interval}


def test_the_bars_are_in_per_cent():
    scores, classes = comparison().bars()
    assert scores["co2s"]["dinov3"] == pytest.approx([47, 59, 50]) and list(scores["oracle"]) == [
        "clip",
        "dinov3",
        "fused",
    ]
    assert classes["oracle"] == pytest.approx({"land": 63, "road": 80})
    assert comparison(seeds=1).bars()[1]["supervised"]["road"] is None


def share_within(quantile: float, degrees: int) -> float:
    """Integrate the density of Student's t distribution from minus to plus a quantile, by the trapezium rule."""
    t = np.linspace(-quantile, quantile, 200_001)
    density = (1 + t**2 / degrees) ** (-(degrees + 1) / 2)
    # The whole integral, with t = tan(angle) * sqrt(degrees), in which the integrand is smooth and bounded.
    angle = np.linspace(-np.pi / 2, np.pi / 2, 200_001)
    whole = np.trapezoid(np.cos(angle) ** (degrees - 1), angle) * degrees**0.5
    return np.trapezoid(density, t) / whole


def test_the_quantiles_are_those_of_the_t_distribution():
    assert len(T_QUANTILES) == 29
    for degrees, quantile in enumerate(T_QUANTILES, start=1):
        assert share_within(quantile - 0.0006, degrees) < 0.95 < share_within(quantile + 0.0006, degrees)


def test_known_intervals():
    # Student's own data ("The probable error of a mean", 1908): the additional sleep of ten patients by two drugs.
    gains = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    low, high = paired_interval(gains)  # R: t.test(extra ~ group, sleep, paired = TRUE) says 0.7001142 to 2.4598858
    assert (low, high) == (pytest.approx(0.7001142, abs=2e-4), pytest.approx(2.4598858, abs=2e-4))
    assert paired_interval([0.5]) is None
    assert paired_interval([1.0, 3.0]) == (pytest.approx(2 - 12.706), pytest.approx(2 + 12.706))
    many = [float(n % 2) for n in range(100)]
    low, high = paired_interval(many)  # more than 30 values: the quantile of 30 values
    assert (high - low) / 2 == pytest.approx(2.045 * statistics.stdev(many) / 10) and half_width(100) == 0.2045
