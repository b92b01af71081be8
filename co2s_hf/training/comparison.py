"""Compare methods over several seeds: tables, paired gains with their intervals, and scores per class."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass


BASELINE, CEILING = "supervised", "oracle"
# 97.5 % quantiles of Student's t distribution for 1, 2 ... 29 degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
T_QUANTILES += (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)
T_QUANTILES += (2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045)


@dataclass(frozen=True)
class Gain:
    """What a method gains over the baseline, as a difference of the fused mean IoU, -1 to 1.

    Args:
        mean: Mean of the seeds' gains.
        interval: 95 % interval of the mean, see [`paired_interval`]. None for one seed.
        smallest: Smallest gain of a seed.
        share: `mean` divided by the gain of all labels. None if that was not measured, or is not positive.
    """

    mean: float
    interval: tuple[float, float] | None
    smallest: float
    share: float | None


@dataclass(frozen=True)
class Comparison:
    """The results of several methods. The runs of a seed are paired: same labels, same first weights, same order.

    Args:
        runs: Method -> seed -> content of metrics.json, see [`Evaluation`]. "supervised" is the baseline; "oracle"
            used all labels. All methods have the same seeds.
        seconds: Method -> seed -> duration of the training in seconds; None if it is not known.
    """

    runs: dict[str, dict[int, dict]]
    seconds: dict[str, dict[int, float | None]]

    @property
    def seeds(self) -> list[int]:
        """The seeds in the order of the runs."""
        return list(self.runs[BASELINE])

    @property
    def predictors(self) -> list[str]:
        """The columns of the tables: the students, if the model has both, and their fusion."""
        first = self.runs[BASELINE][self.seeds[0]]
        return [name for name in ("clip", "dinov3", "fused") if name in first]

    def mean_iou(self, method: str, predictor: str = "fused") -> list[float]:
        """Return the mean IoU of each seed, 0 to 1."""
        return [metrics[predictor]["mean_iou"] for metrics in self.runs[method].values()]

    def class_iou(self, method: str) -> dict[str, float | None]:
        """Return class name -> mean over the seeds of the fused IoU, 0 to 1; None if the class occurs nowhere."""
        by_seed = [metrics["fused"]["iou"] for metrics in self.runs[method].values()]
        found = {name: [iou[name] for iou in by_seed if iou[name] is not None] for name in by_seed[0]}
        return {name: statistics.mean(values) if values else None for name, values in found.items()}

    def gain(self, method: str) -> Gain:
        """Compute what a method gains over the baseline on the same seeds."""
        gains, ceiling = self._gains(method), None
        if CEILING in self.runs:
            ceiling = statistics.mean(self._gains(CEILING))
        mean = statistics.mean(gains)
        share = mean / ceiling if ceiling is not None and ceiling > 0 else None
        return Gain(mean, paired_interval(gains), min(gains), share)

    def mean_seconds(self, method: str) -> float | None:
        """Return the mean duration of a training in seconds, or None if one is not known."""
        values = list(self.seconds[method].values())
        return None if None in values else statistics.mean(values)

    def _gains(self, method: str) -> list[float]:
        return [other - base for base, other in zip(self.mean_iou(BASELINE), self.mean_iou(method))]

    def tables(self) -> str:
        """Format all results as Markdown tables, in per cent."""
        parts = ["Mean IoU of the validation images in per cent"]
        for method in self.runs:
            parts += [f"{method}:", self._seeds_table(method)]
        parts += [self._about_gains(), self._summary_table()]
        parts += ["IoU of each class, fused prediction, mean over the seeds:", self._classes_table()]
        return "\n\n".join(parts)

    def _seeds_table(self, method: str) -> str:
        columns = [self.mean_iou(method, predictor) for predictor in self.predictors]
        rows = [[str(seed), *map(_percent, values)] for seed, values in zip(self.seeds, zip(*columns))]
        rows.append(["mean ± sd", *map(_mean_and_deviation, columns)])
        return _markdown(["seed", *self.predictors], rows)

    def _about_gains(self) -> str:
        text = f"Fused prediction, and its gain over {BASELINE} on the same seed."
        if (number := len(self.seeds)) == 1:
            return f"{text} One seed does not show how much the gain varies."
        return (
            f"{text} The 95 % interval is a paired t interval: mean ± {half_width(number):.2f} standard deviations of "
            f"the gains. Few seeds make it wide: ± {half_width(3):.2f} with 3 seeds, ± {half_width(10):.2f} with 10."
        )

    def _summary_table(self) -> str:
        has_ceiling, rows = CEILING in self.runs, []
        header = ["method", "fused", "gain", "95 % interval", "smallest gain"]
        header += [*([f"share of the {CEILING}'s gain"] if has_ceiling else []), "training (s)"]
        for method in self.runs:
            gain, seconds = self.gain(method), self.mean_seconds(method)
            row = [method, _mean_and_deviation(self.mean_iou(method))]
            if method == BASELINE:
                row += ["", "", ""]
            else:
                interval = "-" if gain.interval is None else " to ".join(map(_signed, gain.interval))
                row += [_signed(gain.mean), interval, _signed(gain.smallest)]
            if has_ceiling:
                row.append("-" if gain.share is None else f"{100 * gain.share:.0f} %")
            rows.append([*row, "-" if seconds is None else f"{seconds:.0f}"])
        return _markdown(header, rows)

    def _classes_table(self) -> str:
        columns = [self.class_iou(method) for method in self.runs]
        rows = [[name, *(_percent(column[name]) for column in columns)] for name in columns[0]]
        return _markdown(["class", *self.runs], rows)

    def bars(self) -> tuple[dict[str, dict[str, list[float]]], dict[str, dict[str, float | None]]]:
        """Return the scores and the classes for [`draw_comparison`], in per cent."""
        scores = {
            method: {name: [100 * value for value in self.mean_iou(method, name)] for name in self.predictors}
            for method in self.runs
        }
        classes = {
            method: {name: None if value is None else 100 * value for name, value in self.class_iou(method).items()}
            for method in self.runs
        }
        return scores, classes

    def to_dict(self) -> dict:
        """Return the content of comparison.json: a summary and the results of every run. Scores are 0 to 1."""
        summary = {}
        for method in self.runs:
            values = self.mean_iou(method)
            summary[method] = {
                "mean_iou": statistics.mean(values),
                "standard_deviation": statistics.stdev(values) if len(values) > 1 else None,
                "gain": asdict(self.gain(method)),
                "class_iou": self.class_iou(method),
                "seconds": self.mean_seconds(method),
            }
        return {"seeds": self.seeds, "summary": summary, "runs": self.runs, "seconds": self.seconds}


def half_width(number: int) -> float:
    """Return half the width of the 95 % interval of a mean, in standard deviations of the values.

    Args:
        number: Number of values, at least 2. From 31 values on, the quantile for 30 makes the interval slightly wider.
    """
    return T_QUANTILES[min(number, len(T_QUANTILES) + 1) - 2] / math.sqrt(number)


def paired_interval(gains: Sequence[float]) -> tuple[float, float] | None:
    """Compute the 95 % interval of the mean gain: a paired t interval with n - 1 degrees of freedom.

    Args:
        gains: One difference per seed.

    Returns:
        The ends of the interval, or None for one seed.
    """
    if len(gains) == 1:
        return None
    mean, width = statistics.mean(gains), half_width(len(gains)) * statistics.stdev(gains)
    return mean - width, mean + width


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}"


def _mean_and_deviation(values: Sequence[float]) -> str:
    mean = _percent(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ± {_percent(statistics.stdev(values))}"


def _markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    lines.insert(1, "|---" * len(list(header)) + "|")
    return "\n".join(lines)


__all__ = ["BASELINE", "CEILING", "Comparison", "Gain", "half_width", "paired_interval"]
