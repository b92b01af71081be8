"""`examples/compare.py`: several methods on the same labels, with several seeds."""

import importlib.util
import json
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from datasets import Image as ImageColumn
from helpers import EXAMPLES, Result, open_folder, read_metrics, run_command
from PIL import Image

from co2s_hf.data.drawn_scenes import write_scenes
from co2s_hf.data.options import DataOptions
from co2s_hf.data.sources import open_source
from co2s_hf.data.splits import SPLITS
from co2s_hf.training.comparison import Comparison
from co2s_hf.training.logbook import read_log


SHORT = ("--supervised_warmup_steps", 1, "--max_train_steps", 2, "--crop_size", 48, "--logging_steps", 1)
SHORT += ("--per_device_train_batch_size", 1, "--card_samples", 0, "--checkpointing_steps", 1, "--use_cpu")
PRETRAINING = "--tile_size 32 --crop_size 32 --per_device_train_batch_size 2 --use_cpu"


@pytest.fixture
def compare(monkeypatch):
    """The script as a module, and the commands that it started; these run in this process."""
    spec = importlib.util.spec_from_file_location("compare", EXAMPLES / "compare.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    commands = []

    def run(command):
        assert command[:3] == [sys.executable, "-m", "co2s_hf"]
        commands.append(command[3:])
        done = run_command(*command[3:])
        print(done.stderr, file=sys.stderr)
        return done

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=run))
    return script, commands


def run_script(script, monkeypatch, *words) -> Result:
    """Run a script to its end."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, words)])
    stdout, stderr, code = StringIO(), StringIO(), 0
    with redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            script.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            print(end.code, file=stderr)
    return Result(code, stdout.getvalue(), stderr.getvalue())


def read_comparison(folder: Path) -> dict:
    return json.loads((folder / "comparison.json").read_text(encoding="utf-8"))


def read_record(folder: Path) -> dict:
    return json.loads((folder / "arguments.json").read_text(encoding="utf-8"))


def pretend_run(folder: Path, metrics: dict, mean_iou: float):
    """Write the results of a complete run: those of another run, with another fused mean IoU."""
    folder.mkdir(parents=True)
    metrics = metrics | {"fused": metrics["fused"] | {"mean_iou": mean_iou}}
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")


def test_arms_are_compared_on_the_same_labels(compare, scenes_folder, tmp_path, monkeypatch):
    script, commands = compare
    runs = tmp_path / "runs"
    words = ("--output_dir", runs, "--data_dir", scenes_folder, "--from_scratch", *SHORT)
    compared = run_script(script, monkeypatch, "--seeds", 3, "--arms", "co2s", "lora", "--oracle", *words)
    assert compared.returncode == 0, compared.stderr
    arms = ["supervised", "co2s", "lora", "oracle"]
    assert [Path(command[-1]).name for command in commands] == [f"{arm}-seed3" for arm in arms]
    content = read_comparison(runs)
    assert content["seeds"] == [3] and list(content["runs"]) == list(content["summary"]) == arms
    logs, results = {}, {}
    for arm in arms:
        folder = runs / f"{arm}-seed3"
        results[arm] = {3: read_metrics(folder)}
        assert content["runs"][arm]["3"] == results[arm][3]
        arguments = read_record(folder)["arguments"]
        logs[arm] = read_log(folder / "log.jsonl")
        assert content["seconds"][arm]["3"] == sum(line["seconds"] for line in logs[arm]) > 0
        assert (arguments["seed"], arguments["lora"]) == (3, arm == "lora")
        assert arguments["method"] == ("co2s" if arm == "co2s" else "supervised")
        assert any("strong" in name for line in logs[arm] for name in line) == (arm == "co2s")
        assert read_record(folder)["data"]["num_labeled"] == (8 if arm == "oracle" else 3)
    # The first step of both methods is on labels alone: the same weights, images and views have the same loss.
    losses = [logs[arm][0]["loss"] for arm in arms]
    assert losses[0] == losses[1] and losses[3] not in losses[:3]
    seconds = {arm: {3: content["seconds"][arm]["3"]} for arm in arms}
    assert Comparison(results, seconds).tables() in compared.stdout
    assert np.asarray(Image.open(runs / "comparison.png")).shape[0] == 440


def test_complete_runs_are_skipped_and_others_continue(compare, scenes_folder, tmp_path, monkeypatch):
    script, commands = compare
    runs = tmp_path / "runs"
    words = ("--output_dir", runs, "--data_dir", scenes_folder, "--from_scratch", *SHORT)
    first = run_script(script, monkeypatch, "--seeds", 3, *words)
    assert first.returncode == 0 and len(commands) == 2, first.stderr
    results = read_comparison(runs)["runs"]

    # Seeds may be added. These two runs are as if they were trained.
    for arm, mean_iou in (("supervised", 0.25), ("co2s", 0.5)):
        pretend_run(runs / f"{arm}-seed4", results["supervised"]["3"], mean_iou)
    both = run_script(script, monkeypatch, "--seeds", 4, 3, *words)
    assert both.returncode == 0 and len(commands) == 2, both.stderr
    gain = read_comparison(runs)["summary"]["co2s"]["gain"]
    mean = 0.25 / 2 + (results["co2s"]["3"]["fused"]["mean_iou"] - results["supervised"]["3"]["fused"]["mean_iou"]) / 2
    assert gain["mean"] == pytest.approx(mean)
    assert f"| co2s | {100 * read_comparison(runs)['summary']['co2s']['mean_iou']:.1f} ± " in both.stdout

    # An interrupted run continues after its last checkpoint. Without a checkpoint, it starts again.
    co2s = runs / "co2s-seed3"
    (co2s / "metrics.json").unlink()
    assert run_script(script, monkeypatch, "--seeds", 3, *words).returncode == 0
    assert commands[2][-2:] == ["--resume_from_checkpoint", "last"] and read_metrics(co2s) == results["co2s"]["3"]
    (co2s / "metrics.json").unlink()
    shutil.rmtree(co2s / "checkpoints")
    assert run_script(script, monkeypatch, "--seeds", 3, *words).returncode == 0
    assert commands[3][-1] == "--overwrite_output_dir" and read_metrics(co2s) == results["co2s"]["3"]

    other = run_script(script, monkeypatch, "--seeds", 3, *words, "--learning_rate", 1)
    assert other.returncode == 2 and len(commands) == 4
    assert f"{runs} holds runs with --data_dir {scenes_folder} --from_scratch" in other.stderr


def test_the_pool_arm_pretrains_once_on_training_images_alone(
    compare, scenes_folder, backbones, tmp_path, monkeypatch
):
    script, commands = compare
    runs = tmp_path / "runs"
    words = ("--output_dir", runs, "--data_dir", scenes_folder, *SHORT, "--clip_model", backbones[0])
    words += ("--dinov3_model", backbones[1], "--crop_size", 32, "--pretrain", f"{PRETRAINING} --max_train_steps 2")
    compared = run_script(script, monkeypatch, "--seeds", 1, 2, "--arms", "pool", *words)
    assert compared.returncode == 0, compared.stderr
    assert [command[0] for command in commands] == ["train", "pretrain", "train", "train", "train"]
    (pool,) = runs.glob("pool-????????????")
    data = open_folder(scenes_folder)
    expected = {np.asarray(sample.load_image()).tobytes() for sample in data.labeled + data.unlabeled}
    found = [np.asarray(Image.open(path)).tobytes() for path in (pool / "images").iterdir()]
    assert set(found) == expected and len(found) == 8
    for seed in (1, 2):
        base, pretrained = (read_record(runs / f"{arm}-seed{seed}")["arguments"] for arm in ("supervised", "pool"))
        assert {name for name in base if base[name] != pretrained[name]} == {"dinov3_model", "output_dir"}
        assert pretrained["dinov3_model"] == str(pool / "dinov3" / "model")
        metrics = [read_metrics(runs / f"{arm}-seed{seed}") for arm in ("supervised", "pool")]
        assert metrics[0]["dinov3"] != metrics[1]["dinov3"]

    other = run_script(script, monkeypatch, "--seeds", 1, "--arms", "pool", *words[:-1], "--max_train_steps 3")
    assert other.returncode == 2 and f"holds runs with {PRETRAINING} --max_train_steps 2 of" in other.stderr
    words = (*words[:-1], "--max_train_steps 3", "--arms", "supervised")  # without the pool, these flags do not matter
    assert run_script(script, monkeypatch, "--seeds", 1, *words).returncode == 0 and len(commands) == 5


def test_the_pool_arm_has_the_defaults_of_the_shipped_backbones(compare, few_real_images, tmp_path, monkeypatch):
    """The defaults depend on the names of the backbones, and the pretrained one has another name."""
    script, commands = compare
    monkeypatch.setattr(script, "run", lambda words, *_, **__: commands.append(words))
    flags = script.pretrained_on_pool(["--learning_rate", "0.5"], 0, tmp_path, ["--max_train_steps", "7"])
    parsed = script.COMMAND.parse([*flags, "--method", "supervised"])[script.TrainingOptions]
    baseline = script.COMMAND.parse(["--learning_rate", "0.5"])[script.TrainingOptions]
    baseline.fill(baseline.defaults)
    different = {name for name in baseline.defaults if getattr(parsed, name) != getattr(baseline, name)}
    assert different == {"dinov3_model"} and parsed.learning_rate == 0.5
    (pool,) = tmp_path.glob("pool-*")
    assert len(list((pool / "images").iterdir())) == 24
    words = ["--images", str(pool / "images"), "--init", "co2s-tiny-dinov3", "--max_train_steps", "7", "--seed", "0"]
    assert commands == [["pretrain", "dinov3", *words]]

    write_scenes(tmp_path / "scenes-seed3", 1, 2, 4, size=16)  # as the baseline of seed 3 has drawn them
    flags = script.pretrained_on_pool(["--data", "drawn"], 3, tmp_path, [])
    drawn = Path(flags[flags.index("--dinov3_model") + 1]).parents[1]
    assert drawn != pool and len(list((drawn / "images").iterdir())) == 3


@pytest.mark.parametrize(
    "words", [(), ("--data", "drawn"), ("--data_dir", "a", "--labeled_fraction", "1/8"), ("--data", "real")]
)
def test_the_oracle_draws_all_labels(words, compare, tmp_path):
    assert compare[0].all_labels(list(words), tmp_path) == ["--labeled_fraction", "1"]
    assert not any(tmp_path.iterdir())


def test_the_oracle_has_all_labels_of_the_lists(compare, scenes_folder, tmp_path):
    folder = shutil.copytree(scenes_folder, tmp_path / "data")
    shutil.copy(folder / "images" / "labeled_0000.png", folder / "images" / "spare.png")  # an image in no list
    shutil.copy(folder / "labels" / "labeled_0000.png", folder / "labels" / "spare.png")
    (folder / "labels" / "unlabeled_0002.png").unlink()
    flags = compare[0].all_labels(["--data_dir", str(folder)], tmp_path)
    assert flags == ["--splits_dir", str(tmp_path / "all-labels")]
    options = DataOptions(data_dir=str(folder), splits_dir=flags[1])
    data = open_source(options, needed=("labeled", "validation"))
    names = [f"labeled_{n:04d}.png" for n in range(3)] + [f"unlabeled_{n:04d}.png" for n in (0, 1, 3, 4)]
    assert sorted(Path(name).name for name in data.labeled.names) == names
    assert data.lists["validation"] == open_folder(folder).lists["validation"]


def test_the_oracle_has_all_labels_of_a_data_set(compare, scenes_folder, tmp_path):
    files = {name: sorted((scenes_folder / "images").glob(f"{name}_*")) for name in SPLITS}
    tables = {
        name: Dataset.from_dict(
            {"image": [*map(str, paths)], "label": [str(scenes_folder / "labels" / path.name) for path in paths]}
        )
        .cast_column("image", ImageColumn())
        .cast_column("label", ImageColumn())
        for name, paths in files.items()
    }
    DatasetDict(tables).save_to_disk(tmp_path / "saved")
    words = ["--dataset_name", str(tmp_path / "saved")]
    assert compare[0].all_labels(words, tmp_path) == ["--labeled_fraction", "1"]
    data = open_source(DataOptions(dataset_name=words[1], labeled_fraction=1.0), needed=("labeled", "validation"))
    assert (len(data.labeled), len(data.validation)) == (8, 2)


def test_wrong_flags_are_refused_before_the_first_training(compare, scenes_folder, tmp_path, monkeypatch):
    script, commands = compare
    folder = shutil.copytree(scenes_folder, tmp_path / "data")
    for path in (folder / "labels").glob("unlabeled_*"):
        path.unlink()
    refused = [
        (("--seed", 1), "--seed belongs to single runs. Give --seeds."),
        (("--method=co2s",), "--method belongs to single runs. Give --arms."),
        (("--crop_sise", 64), "did you mean --crop_size?"),
        (("--arms", "co2s", "lora", "--train_backbones", "all"), "Give either --lora or --train_backbones all"),
        (("--arms", "pool", "--from_scratch"), "The arm pool needs a pretrained backbone."),
        (("--oracle", "--data_dir", folder), "--oracle needs unlabelled images that have label maps."),
    ]
    for number, (flags, message) in enumerate(refused):
        done = run_script(script, monkeypatch, "--output_dir", tmp_path / f"runs{number}", "--seeds", 0, *flags)
        assert done.returncode and message in done.stderr, done.stderr
    assert not commands


def test_a_run_that_fails_ends_the_script(compare, tmp_path, monkeypatch):
    words = ("--output_dir", tmp_path / "runs", "--data_dir", tmp_path / "missing", *SHORT)
    done = run_script(compare[0], monkeypatch, *words)
    assert done.returncode == 1 and "missing', which does not exist" in done.stderr and len(compare[1]) == 1
    assert "error: The command above failed. Correct the cause, and run this script again" in done.stderr
