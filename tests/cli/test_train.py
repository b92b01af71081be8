"""`co2s train`: its flags, the recipes of the paper, and errors before anything is written."""

import json
import logging
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import open_folder, read_metrics, run_command
from transformers import DINOv3ViTModel

from co2s_hf import Co2SForSemanticSegmentation
from co2s_hf.cli.command_line import recipe_names
from co2s_hf.cli.evaluate import EvaluateArguments, follow_paper
from co2s_hf.cli.train import COMMAND
from co2s_hf.data.benchmarks import BENCHMARKS
from co2s_hf.data.drawn_scenes import write_scenes
from co2s_hf.data.options import DataOptions
from co2s_hf.data.sources import open_source
from co2s_hf.training.options import SHIPPED, TrainingOptions, follow_protocol


def test_there_are_not_too_many_flags():
    flags = [name for group in COMMAND.groups for name in group.flags]
    assert len(set(flags)) == len(flags)
    assert len([*flags, "config"]) <= 68


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
        (("--clip_model", "x"), "Give both --clip_model and --dinov3_model, or neither"),
        (
            ("--from_scratch", "--clip_model", "a", "--dinov3_model", "b"),
            "Give either --from_scratch, or --clip_model and --dinov3_model",
        ),
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
        (("--data", "real", "--data_dir", "a"), "Give one source: --data is real, and --data_dir is 'a'"),
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


def test_scenes_are_drawn_beside_the_output(tmp_path, monkeypatch):
    smaller = partial(write_scenes, size=32)  # evaluation is quicker
    monkeypatch.setattr("co2s_hf.training.run.write_scenes", smaller)
    words = ("--data", "drawn", "--from_scratch", "--output_dir", tmp_path / "runs" / "first", "--seed", 4)
    words += ("--max_train_steps", 1, "--crop_size", 32)
    words += ("--per_device_train_batch_size", 1, "--method", "supervised", "--card_samples", 0, "--use_cpu")
    run = run_command("train", *words)
    assert run.returncode == 0, run.stderr
    drawn = tmp_path / "runs" / "scenes-seed4"
    assert f"Drawing scenes into {drawn}." in run.stdout
    source = open_folder(drawn)
    assert [len(getattr(source, name)) for name in ("labeled", "unlabeled", "validation")] == [8, 120, 24]
    write_scenes(tmp_path / "same", num_labeled=8, num_unlabeled=0, num_validation=0, size=32, seed=4)
    for ours, theirs in zip(source.labeled.paths, sorted((tmp_path / "same" / "images").iterdir()), strict=True):
        assert Path(ours).read_bytes() == theirs.read_bytes()  # --seed is the scenes' seed, too
    metrics = read_metrics(tmp_path / "runs" / "first")
    assert metrics["data"] == "scenes-seed4" and metrics["num_images"] == 24


def test_the_real_images_are_used_if_no_data_is_named(few_real_images, tmp_path):
    words = ("--from_scratch", "--max_train_steps", 2, "--supervised_warmup_steps", 1, "--crop_size", 32)
    words += ("--per_device_train_batch_size", 2, "--card_samples", 0, "--seed", 3, "--use_cpu")
    run = run_command("train", *words, "--output_dir", tmp_path / "run")
    assert run.returncode == 0, run.stderr
    record = json.loads((tmp_path / "run" / "model" / "training.json").read_text(encoding="utf-8"))
    facts = {"name": "Dubai aerial imagery", "id": None, "partition": None, "is_drawn": False, "is_real": True}
    assert record["data"] == facts | {"num_labeled": 2, "num_unlabeled": 22, "num_validation": 2}
    arguments = {"data": "real", "data_dir": None, "labeled_fraction": 1 / 12}
    assert arguments.items() <= record["arguments"].items()
    assert record["data_hash"] == open_source(DataOptions(data="real"), seed=3).hash
    card = (tmp_path / "run" / "model" / "README.md").read_text(encoding="utf-8")
    assert "# Co2S trained on Dubai aerial imagery" in card and "CC0 1.0 (public\n  domain)." in card
    words += ("--data", "real", "--labeled_fraction", "1/12")
    again = run_command("train", *words, "--output_dir", tmp_path / "b")
    assert again.returncode == 0, again.stderr
    assert read_metrics(tmp_path / "run")["fused"] == read_metrics(tmp_path / "b")["fused"]


SHORT = ("--max_train_steps", 2, "--supervised_warmup_steps", 1, "--crop_size", 32)
SHORT += ("--per_device_train_batch_size", 1, "--card_samples", 0, "--use_cpu")


def test_training_starts_from_the_shipped_backbones_without_a_network(
    stand_ins, no_network, scenes_folder, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("co2s_hf"), "propagate", True)
    run = run_command("train", "--data_dir", scenes_folder, *SHORT, "--output_dir", tmp_path / "run")
    assert run.returncode == 0, run.stderr
    record = json.loads((tmp_path / "run" / "model" / "training.json").read_text(encoding="utf-8"))["arguments"]
    names = {"clip_model": "co2s-tiny-clip", "dinov3_model": "co2s-tiny-dinov3", "from_scratch": False}
    assert names.items() <= record.items() and record["backbone_lr_scale"] == SHIPPED["backbone_lr_scale"]
    model = Co2SForSemanticSegmentation.from_pretrained(tmp_path / "run" / "model")
    assert model.config.text_encoder == "co2s-tiny-clip" and model.config.clip_config.hidden_size == 192
    first = DINOv3ViTModel.from_pretrained(stand_ins / "co2s-tiny-dinov3").model.layer[0].mlp.up_proj.weight.float()
    change = (model.dinov3.encoder.layers[0].mlp.up_proj.weight - first).abs().max()
    assert 0 < change < 3 * SHIPPED["learning_rate"] * SHIPPED["backbone_lr_scale"]  # two steps of AdamW
    card = (tmp_path / "run" / "model" / "README.md").read_text(encoding="utf-8")
    assert "- DINOv3 (co2s-tiny-dinov3): these weights ship with co2s_hf, under Apache-2.0.\n" in card
    assert "dinov3-license" not in card
    (warning,) = [message for message in caplog.messages if "does not know these words" in message]
    assert "vegetation" in warning and "It knows 14 words: a, bare" in warning


def test_data_without_class_names_trains_and_says_what_guides_clip(stand_ins, scenes_folder, tmp_path):
    shutil.copytree(scenes_folder, tmp_path / "data")
    (tmp_path / "data" / "classes.json").unlink()
    words = ("--data_dir", tmp_path / "data", *SHORT)
    line = "The classes have no names, so random vectors guide CLIP instead of text."
    run = run_command("train", *words, "--output_dir", tmp_path / "run")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(line) == 1 and "does not know these words" not in run.stderr
    model = Co2SForSemanticSegmentation.from_pretrained(tmp_path / "run" / "model")
    assert (model.config.text_encoder, model.config.class_concepts) == (None, None)
    assert model.config.clip_config.hidden_size == 192
    scratch = run_command("train", *words, "--from_scratch", "--output_dir", tmp_path / "scratch")
    assert scratch.returncode == 0 and line not in scratch.stdout


def test_lora_trains_the_shipped_backbones(stand_ins, scenes_folder, tmp_path):
    words = ("--data_dir", scenes_folder, *SHORT, "--lora", "--lora_rank", 2, "--output_dir", tmp_path / "run")
    run = run_command("train", *words)
    assert run.returncode == 0, run.stderr
    model = Co2SForSemanticSegmentation.from_pretrained(tmp_path / "run" / "model")
    first = DINOv3ViTModel.from_pretrained(stand_ins / "co2s-tiny-dinov3", dtype=torch.float32).model.layer[0]
    layer = model.dinov3.encoder.layers[0]
    assert torch.equal(layer.mlp.up_proj.weight, first.mlp.up_proj.weight)
    difference = (layer.attention.v_proj.weight - first.attention.v_proj.weight).detach()
    assert difference.abs().max() > 0 and torch.linalg.matrix_rank(difference, rtol=1e-3) <= 2


def test_with_all_labels_a_benchmark_is_trained_supervised(scenes_folder, tmp_path):
    """The upper bound of the paper's benchmarks: every training image is labelled."""
    lists = tmp_path / "splits"
    lists.mkdir()
    parts = [(scenes_folder / "splits" / f"{name}labeled.txt").read_text(encoding="utf-8") for name in ("", "un")]
    text = "".join("".join(parts).splitlines(keepends=True)[:5])
    (lists / "train.txt").write_text(text, encoding="utf-8")
    shutil.copy(scenes_folder / "splits" / "val.txt", lists)
    words = ("train", "--dataset", "loveda", "--partition", "all", "--data_dir", scenes_folder, "--splits_dir", lists)
    words += ("--from_scratch", "--num_train_epochs", 3, "--crop_size", 32, "--per_device_train_batch_size", 2)
    words += ("--eval_short_side", 32, "--card_samples", 0, "--use_cpu", "--output_dir", tmp_path / "run")
    run = run_command(*words)
    assert run.returncode == 1 and run.stderr == (
        "error: --partition is 'all' and --method is 'co2s'. With all labels there are no unlabelled images, which "
        "this method needs. Train on the labels alone: --method supervised. Or choose a share: --partition 1_40.\n"
    )
    assert not (tmp_path / "run").exists()
    run = run_command(*words, "--method", "supervised")
    assert run.returncode == 0, run.stderr
    record = json.loads((tmp_path / "run" / "model" / "training.json").read_text(encoding="utf-8"))
    assert record["data"]["partition"] == "all" and record["arguments"]["max_train_steps"] == 3 * 3
    assert (record["data"]["num_labeled"], record["data"]["num_unlabeled"]) == (5, 0)
    assert (tmp_path / "run" / "splits" / "labeled.txt").read_text(encoding="utf-8") == text
