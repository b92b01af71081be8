"""Measure what unlabelled images are worth: train several methods on the same labels, with several seeds.

    python examples/compare.py                                       # the real images of this package, three seeds
    python examples/compare.py --oracle                              # and with all labels, which is the ceiling
    python examples/compare.py --arms supervised co2s lora pool --seeds 0 1 2 3 4
    python examples/compare.py --output_dir outputs/compare_mine --data_dir path/to/folder --max_train_steps 800

The methods ("arms"):

    supervised  the labelled images alone: the baseline, which is always trained
    co2s        the labelled and the unlabelled images
    lora        the labelled images alone, with LoRA updates of the backbones
    pool        the labelled images alone, after `co2s pretrain dinov3` on all training images, without their labels
    oracle      the labels of all training images, also of those that are unlabelled for the other arms

The runs of a seed are paired: they have the same labels, the same first weights (except the pretrained backbone of
pool) and the same order of images. All other flags are passed on to `co2s train`. A second call skips complete runs,
resumes interrupted runs, and may add arms and seeds. The script prints tables, and writes comparison.json and
comparison.png into the output folder.
"""

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from co2s_hf.cli.train import COMMAND
from co2s_hf.data.listings import list_samples
from co2s_hf.data.options import DataOptions
from co2s_hf.data.sources import open_source
from co2s_hf.data.splits import write_lists
from co2s_hf.training.comparison import BASELINE, CEILING, Comparison
from co2s_hf.training.logbook import read_log
from co2s_hf.training.options import TrainingOptions, follow_protocol
from co2s_hf.utils.figures import draw_comparison
from co2s_hf.utils.files import write_json, written_beside


ARMS = {  # arm -> flags of `co2s train`
    BASELINE: ["--method", "supervised"],
    "co2s": ["--method", "co2s"],
    "lora": ["--method", "supervised", "--lora"],
    "pool": ["--method", "supervised"],  # and the flags of `pretrained_on_pool`
    CEILING: ["--method", "supervised"],  # and the flags of `all_labels`
}
REPLACED = {"--method": "--arms", "--seed": "--seeds"}  # flag of `co2s train` -> flag of this script


def main():
    """Train what is missing, and print and write the comparison."""
    args, further = parse_arguments()
    arms = [arm for arm in ARMS if arm in (BASELINE, *args.arms) or (arm == CEILING and args.oracle)]
    with COMMAND.user_errors():
        for arm in arms:  # refuse wrong flags before the first training
            options = COMMAND.parse([*further, *ARMS[arm]])[TrainingOptions]
            if arm == "pool" and options.from_scratch:
                sys.exit("error: The arm pool needs a pretrained backbone. Leave out --from_scratch, or pool.")
        flags = {arm: [*further, *ARMS[arm]] for arm in arms}
        if args.oracle:
            flags[CEILING] += all_labels(further, args.output_dir)
        runs, seconds = {arm: {} for arm in arms}, {arm: {} for arm in arms}
        for seed in args.seeds:
            for arm in arms:
                words, folder = list(flags[arm]), args.output_dir / f"{arm}-seed{seed}"
                if arm == "pool" and not (folder / "metrics.json").exists():
                    words += pretrained_on_pool(further, seed, args.output_dir, shlex.split(args.pretrain))
                words = ["train", *words, "--seed", str(seed)]
                run(words, folder, folder / "metrics.json", resume=("--resume_from_checkpoint", "last"))
                runs[arm][seed] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
                seconds[arm][seed] = training_seconds(read_log(folder / "log.jsonl"))
    comparison = Comparison(runs, seconds)
    print(comparison.tables())
    write_json(args.output_dir / "comparison.json", comparison.to_dict())
    draw_comparison(*comparison.bars(), args.output_dir / "comparison.png")
    print(f"\nLook at {args.output_dir / 'comparison.png'}.")


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Return the script's own arguments, and the further words, which are flags of `co2s train`.

    Flags other than those of earlier runs in the output folder are refused: their results must not be mixed.
    """
    # No abbreviations: `--seed` is a flag of `co2s train`, and not `--seeds`.
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind, allow_abbrev=False)
    optional = [arm for arm in ARMS if arm != CEILING]
    parser.add_argument("--arms", nargs="+", choices=optional, default=[BASELINE, "co2s"], help="default: %(default)s")
    parser.add_argument("--oracle", action="store_true", help="also train with the labels of all training images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the runs (default: 0 1 2)")
    parser.add_argument(
        "--pretrain", default="", metavar="FLAGS", help="flags for `co2s pretrain`: --pretrain '--max_train_steps 500'"
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("outputs/compare"), help="folder for all runs (default: %(default)s)"
    )
    args, further = parser.parse_known_args()
    for word in further:
        if (own := REPLACED.get(word.partition("=")[0])) is not None:
            parser.error(f"{word.partition('=')[0]} belongs to single runs. Give {own}.")
    path = args.output_dir / "settings.json"
    settings = {"train": further} | ({"pretrain": args.pretrain} if "pool" in args.arms else {})
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for command, words in settings.items():
        if earlier.get(command, words) != words:
            before = earlier[command] if command == "pretrain" else shlex.join(earlier[command])
            parser.error(
                f"{args.output_dir} holds runs with {before or 'the defaults'} of `co2s {command}`. Choose another "
                "--output_dir, or give the same flags."
            )
    write_json(path, earlier | settings)
    return args, further


def run(words: list[str], folder: Path, result: Path, resume: tuple[str, ...]):
    """Run a command of `co2s` that writes into a folder, unless its result exists.

    Args:
        words: The command and its flags.
        folder: Its output folder.
        result: File or folder that exists only after a complete run.
        resume: Flags that continue an interrupted run from its last checkpoint.
    """
    if result.exists():
        return
    command = [sys.executable, "-m", "co2s_hf", *words, "--output_dir", str(folder)]
    if any((folder / "checkpoints").glob("step-*")):
        command += resume
    elif folder.exists():
        command += ["--overwrite_output_dir"]
    print(shlex.join(command), flush=True)
    if subprocess.run(command).returncode:
        sys.exit("error: The command above failed. Correct the cause, and run this script again: it continues.")


def training_seconds(log: list[dict]) -> float | None:
    """Return the duration of the steps, without evaluations. None if the log does not hold it."""
    seconds = [line.get("seconds") for line in log]
    return None if not seconds or None in seconds else sum(seconds)


def all_labels(further: list[str], output_dir: Path) -> list[str]:
    """Return the flags that also give the unlabelled training images their labels. The validation images stay."""
    options = COMMAND.parse(further)[DataOptions]
    options.fill()
    all_drawn = ["--labeled_fraction", "1"]
    if options.data == "drawn" or options.labeled_fraction is not None:
        return all_drawn
    listing = list_samples(options)
    if listing.pool is not None or not any(listing.sets["unlabeled"].files("label")):
        sys.exit(
            "error: --oracle needs unlabelled images that have label maps. If all images have one, draw the sets: "
            "--labeled_fraction 1/8"
        )
    if options.dataset_name is not None:
        return all_drawn
    # The sets come from lists. An image that is in no list may be kept for a test, so it is not used here either.
    lists = open_source(options, needed=("labeled", "validation")).lists
    labeled = [*lists["labeled"], *(line for line in lists["unlabeled"] if line[1] is not None)]
    write_lists(output_dir / "all-labels", lists | {"labeled": labeled}, {"content": "all labels, for --oracle"})
    return ["--splits_dir", str(output_dir / "all-labels")]


def pretrained_on_pool(further: list[str], seed: int, output_dir: Path, words: list[str]) -> list[str]:
    """Pretrain the DINOv3 backbone on the training images of a seed, and return the flags that use it.

    Seeds with the same training images share one backbone.
    """
    parsed = COMMAND.parse([*further, *ARMS[BASELINE]])
    options, data_options = parsed[TrainingOptions], parsed[DataOptions]
    follow_protocol(options, data_options)
    defaults = options.defaults
    options.fill(defaults)
    if data_options.data == "drawn":  # the baseline has drawn the scenes of this seed
        data_options = replace(data_options, data=None, data_dir=str(output_dir / f"scenes-seed{seed}"))
    data = open_source(data_options, seed, progress=True)
    pool = data.labeled + data.unlabeled
    places = {name: place for place, name in enumerate(pool.names)}
    names = sorted(places)  # the order in `pool` depends on the seed
    folder = output_dir / f"pool-{hashlib.sha256(chr(10).join(names).encode()).hexdigest()[:12]}"
    if not (folder / "images").exists():
        with written_beside(folder / "images") as images:
            for number, name in enumerate(names):
                pool[places[name]].load_image().save(images / f"{number:06d}.png")
    command = ["pretrain", "dinov3", "--images", str(folder / "images"), "--init", options.dinov3_model, *words]
    run([*command, "--seed", "0"], folder / "dinov3", folder / "dinov3" / "model", resume=("--resume",))
    backbones = {"clip_model": options.clip_model, "dinov3_model": str(folder / "dinov3" / "model")}
    # The defaults depend on the names of the backbones. The settings must be those of the baseline.
    settings = {name: getattr(options, name) for name in defaults} | backbones
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


if __name__ == "__main__":
    main()
