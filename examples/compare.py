"""Measure the gain from unlabelled images: train with and without them, on the same labels and with several seeds.

    python examples/compare.py                                      # drawn scenes, three seeds
    python examples/compare.py --output_dir outputs/compare_mine --data_dir path/to/folder --max_train_steps 800

All other flags are passed on to `co2s train`. A second call skips complete runs, and resumes an interrupted run. The
script prints a table of the validation mean IoU in per cent, and writes comparison.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from co2s_hf.utils.files import write_json


METHODS = ("supervised", "co2s")


def train(method: str, seed: int, folder: Path, further: list[str]) -> dict:
    """Return the results of one run. Train first, unless the results exist."""
    if not (folder / "metrics.json").exists():
        command = [sys.executable, "-m", "co2s_hf", "train", *further]
        command += ["--method", method, "--seed", str(seed), "--output_dir", str(folder)]
        if any((folder / "checkpoints").glob("step-*")):
            command += ["--resume_from_checkpoint", "last"]
        elif folder.exists():
            command += ["--overwrite_output_dir"]
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True)
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def table(results: dict[int, dict[str, dict]]) -> str:
    """Format one row per seed and one row of means. The last column has the gain of the fused prediction."""
    predictors = [name for name in ("clip", "dinov3", "fused") if name in results[min(results)]["co2s"]]
    columns = [(method, name) for method in METHODS for name in predictors]
    rows = {
        str(seed): [100 * by_method[method][name]["mean_iou"] for method, name in columns]
        for seed, by_method in results.items()
    }
    rows["mean"] = [statistics.mean(values) for values in zip(*rows.values())]
    lines = ["| seed | " + " | ".join(f"{method} {name}" for method, name in columns) + " | gain, fused |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for seed, values in rows.items():
        gain = values[-1] - values[len(predictors) - 1]
        lines.append(f"| {seed} | " + " | ".join(f"{value:.1f}" for value in values) + f" | {gain:+.1f} |")
    return "\n".join(lines)


def main():
    # No abbreviations: `--seed` is a flag of `co2s train`, and not `--seeds`.
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the runs (default: 0 1 2)")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("outputs/compare"), help="folder for all runs (default: %(default)s)"
    )
    args, further = parser.parse_known_args()
    settings = args.output_dir / "train_semi.json"  # results of other settings must not be mixed with these
    if settings.exists() and json.loads(settings.read_text(encoding="utf-8")) != further:
        before = " ".join(json.loads(settings.read_text(encoding="utf-8"))) or "the defaults"
        parser.error(
            f"{args.output_dir} holds runs with {before}. Choose another --output_dir, or give the same flags."
        )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(settings, further)
    results = {
        seed: {method: train(method, seed, args.output_dir / f"{method}-seed{seed}", further) for method in METHODS}
        for seed in args.seeds
    }
    print(table(results))
    write_json(args.output_dir / "comparison.json", results)


if __name__ == "__main__":
    main()
