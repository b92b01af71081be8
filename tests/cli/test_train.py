"""`co2s train`: its flags, the recipes of the paper, and errors before anything is written."""

from functools import partial
from pathlib import Path

import pytest
from helpers import open_folder, read_metrics, run_command

from co2s_hf.cli.command_line import recipe_names
from co2s_hf.cli.evaluate import EvaluateArguments, follow_paper
from co2s_hf.cli.train import COMMAND
from co2s_hf.data.benchmarks import BENCHMARKS
from co2s_hf.data.drawn_scenes import write_scenes
from co2s_hf.data.options import DataOptions
from co2s_hf.training.options import TrainingOptions, follow_protocol


def test_there_are_not_too_many_flags():
    flags = [name for group in COMMAND.groups for name in group.flags]
    assert len(set(flags)) == len(flags)
    assert len([*flags, "config"]) <= 65


def test_every_recipe_is_a_benchmark():
    assert set(recipe_names()) == set(BENCHMARKS)


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_each_run_of_the_paper_is_a_recipe(name):
    """The recipe has the backbones and the partition; its benchmark has the protocol."""
    found = COMMAND.parse(["--config", name])
    options, data, facts = found[TrainingOptions], found[DataOptions], BENCHMARKS[name]
    assert int(data.partition.removeprefix("1_")) in facts.partitions and data.dataset == name
    assert "/clip-" in options.clip_model and "/dinov3-" in options.dinov3_model
    assert options.output_dir == f"outputs/{name}-{data.partition}"
    follow_protocol(options, data)
    options.fill(options.defaults)
    assert (options.num_train_epochs, options.max_train_steps) == (facts.num_epochs, None)
    assert (options.crop_size, options.per_device_train_batch_size) == (facts.crop_size, facts.images_per_device)
    assert (options.eval_short_side, options.base_size) == (facts.eval_short_side, facts.base_size)
    assert (options.confidence_threshold, options.learning_rate, options.train_backbones) == (0.95, 1e-4, "attention")
    assert (options.method, options.recipe, options.students, options.lora) == ("co2s", "paper", "clip,dinov3", False)

    shorter = COMMAND.parse(["--config", name, "--max_train_steps", "5", "--partition", "1_8", "--crop_size", "64"])
    options, data = shorter[TrainingOptions], shorter[DataOptions]
    follow_protocol(options, data)
    assert (options.num_train_epochs, options.max_train_steps, options.crop_size) == (None, 5, 64)
    assert (data.partition, options.per_device_train_batch_size) == ("1_8", facts.images_per_device)

    measured = EvaluateArguments()
    follow_paper(measured, DataOptions(dataset=name))
    assert (measured.crop_size, measured.eval_short_side) == (facts.crop_size, facts.eval_short_side)
    own = EvaluateArguments(crop_size=64, eval_short_side=96)
    follow_paper(own, DataOptions(dataset=name))
    assert (own.crop_size, own.eval_short_side) == (64, 96)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--clip_model", "x"), "Give both --clip_model and --dinov3_model"),
        (("--max_train_steps", 5, "--num_train_epochs", 5), "Give either --max_train_steps or --num_train_epochs"),
        (("--eval_steps", 5, "--eval_epochs", 5), "Give either --eval_steps or --eval_epochs"),
        (("--lora", "--train_backbones", "all"), "Give either --lora or --train_backbones all"),
        (
            ("--overwrite_output_dir", "--resume_from_checkpoint", "last"),
            "Give either --overwrite_output_dir or --resume",
        ),
        (("--mixed_precision", "fp16"), "argument --mixed_precision: invalid choice: 'fp16'"),
        (("--stability", "on"), "unrecognized arguments: --stability on"),
        (("--stability_weight", -1), "--stability_weight is -1.0; it must be at least 0"),
        (("--confidence_threshold", 2), "--confidence_threshold is 2.0; a probability lies between 0 and 1"),
        (("--crop_size", 7), "--crop_size is 7; it must be at least 8"),
        (("--base_size", 512), "expected a long and a short side: --base_size 2048 512"),
        (("--report_to", "tensorbored"), "--report_to names tensorbored, which is not installed"),
        (
            ("--labeled_fraction", "few"),
            "argument --labeled_fraction: 'few' is not a fraction; write it as 1/8 or 0.125",
        ),
        (
            ("--data_dir", "a", "--labeled_fraction", 2),
            "--labeled_fraction is 2.0; expected a share above 0 and up to 1",
        ),
        (("--data_dir", "a", "--dataset_name", "b"), "Give one source: --data_dir, --dataset_name or --dataset."),
        (
            ("--data_dir", "a", "--partition", "1_8"),
            "--partition is 1_8; it goes with --dataset, not with --data_dir.",
        ),
        (("--dataset", "whdld", "--partition", "1_7"), "--partition is '1_7'; WHDLD has 1_32, 1_24, 1_16"),
        (("--bands", "4,3"), "argument --bands: '4,3' is not three band numbers"),
        (("--class_names", "a", "a"), "--class_names names a class twice: a a"),
        (("--hub_model_id", "user/x"), "--hub_model_id, --hub_private_repo and --hub_revision go with --push_to_hub"),
        (("--push_to_hub",), "--push_to_hub needs a repository: --hub_model_id user/name"),
        (("--card_samples", -1), "--card_samples is -1; it must be at least 0"),
        (("--config", "wdhld"), "--config is 'wdhld': neither a file nor a recipe"),
    ],
)
def test_wrong_words_stop_before_anything_is_written(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = run_command("train", "--output_dir", tmp_path / "run", *words)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("usage: co2s train [--flag value ...]\nco2s train: error: ")
    assert message in run.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--resume_from_checkpoint", "last"),
            "There is no checkpoint in '{run}/checkpoints' to resume from. Start with",
        ),
        (
            ("--resume_from_checkpoint", "{run}"),
            "'{run}' is not a checkpoint; give 'last' or a folder such as {run}/check",
        ),
        (("--data_dir", "/no/such/folder"), "--data_dir is '/no/such/folder', which does not exist"),
    ],
)
def test_missing_files_stop_before_anything_is_written(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "run"
    run = run_command("train", "--output_dir", output, *(word.format(run=output) for word in words))
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.startswith("error: " + message.format(run=output)) and run.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_only_the_folder_of_a_run_is_overwritten(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious").write_text("mine", encoding="utf-8")
    run = run_command("train", "--output_dir", tmp_path, "--overwrite_output_dir")
    assert run.returncode == 1 and "already exists and is not an empty folder" in run.stderr
    assert (tmp_path / "model" / "precious").read_text(encoding="utf-8") == "mine"
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "precious"]


def test_without_data_scenes_are_drawn_beside_the_output(tmp_path, monkeypatch):
    smaller = partial(write_scenes, size=32)  # evaluation is quicker
    monkeypatch.setattr("co2s_hf.training.run.write_scenes", smaller)
    words = ("--output_dir", tmp_path / "runs" / "first", "--seed", 4, "--max_train_steps", 1, "--crop_size", 32)
    words += ("--per_device_train_batch_size", 1, "--method", "supervised", "--card_samples", 0, "--use_cpu")
    run = run_command("train", *words)
    assert run.returncode == 0, run.stderr
    drawn = tmp_path / "runs" / "scenes-seed4"
    assert f"No data is named: drawing scenes into {drawn}." in run.stdout
    source = open_folder(drawn)
    assert [len(getattr(source, name)) for name in ("labeled", "unlabeled", "validation")] == [8, 120, 24]
    write_scenes(tmp_path / "same", num_labeled=8, num_unlabeled=0, num_validation=0, size=32, seed=4)
    for ours, theirs in zip(source.labeled.paths, sorted((tmp_path / "same" / "images").iterdir()), strict=True):
        assert Path(ours).read_bytes() == theirs.read_bytes()  # --seed is the scenes' seed, too
    metrics = read_metrics(tmp_path / "runs" / "first")
    assert metrics["data"] == "scenes-seed4" and metrics["num_images"] == 24
