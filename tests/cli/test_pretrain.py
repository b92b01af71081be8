"""`co2s pretrain`: its flags, errors, and its results as backbones of `co2s train`."""

import csv
import json
from dataclasses import fields

import pytest
from helpers import TWO_PROCESSES, run_command, run_subprocess
from transformers import CLIPModel, Dinov2Config, Dinov2Model

from co2s_hf import Co2SForSemanticSegmentation
from co2s_hf.cli.pretrain import COMMANDS
from co2s_hf.training.logbook import read_log
from co2s_hf.training.pretraining.options import ClipOptions, Dinov3Options


SMALL = ("--hidden_size", 16, "--num_hidden_layers", 4, "--num_attention_heads", 2, "--tile_size", 32)
SMALL += ("--crop_size", 16, "--per_device_train_batch_size", 2, "--max_train_steps", 2, "--logging_steps", 1)
SMALL += ("--use_cpu",)
TEXT = ("--projection_dim", 8, "--text_hidden_size", 32, "--text_num_hidden_layers", 1)


@pytest.fixture
def labels_file(scenes_folder, tmp_path):
    """Tags of all drawn scenes."""
    with (tmp_path / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "tags"])
        for place, image in enumerate(sorted((scenes_folder / "images").iterdir())):
            rows.writerow([image, ("land road", "water", "land water")[place % 3]])
    return tmp_path / "labels.csv"


def test_all_options_have_flags():
    for kind, options in {"dinov3": Dinov3Options, "clip": ClipOptions}.items():
        flags = {name for group in COMMANDS[kind].groups for name in group.flags}
        assert flags == {field.name for field in fields(options)}


def test_both_results_are_backbones_of_a_training(scenes_folder, labels_file, no_network, tmp_path):
    images = ("--images", scenes_folder / "images")
    dinov3 = run_command("pretrain", "dinov3", *images, *SMALL, "--output_dir", tmp_path / "dinov3")
    assert dinov3.returncode == 0, dinov3.stderr
    assert "10 images make 40 tiles of 32 px.\n" in dinov3.stdout
    assert f"Saved {tmp_path / 'dinov3' / 'model'}. Look at {tmp_path / 'dinov3' / 'curves.png'}.\n" in dinov3.stdout
    words = ("--image_labels", labels_file, *TEXT, "--output_dir", tmp_path / "clip", "--held_out_fraction", 0.3)
    clip = run_command("pretrain", "clip", *images, *SMALL, *words)
    assert clip.returncode == 0, clip.stderr
    assert "held-out tiles: mean average precision of the tags " in clip.stdout

    words = ("--clip_model", tmp_path / "clip" / "model", "--dinov3_model", tmp_path / "dinov3" / "model")
    words += ("--data_dir", scenes_folder, "--supervised_warmup_steps", 1, "--max_train_steps", 2, "--crop_size", 32)
    words += ("--per_device_train_batch_size", 1, "--card_samples", 0, "--use_cpu", "--output_dir", tmp_path / "run")
    run = run_command("train", *words)
    assert run.returncode == 0, run.stderr
    model = Co2SForSemanticSegmentation.from_pretrained(tmp_path / "run" / "model")
    assert (model.config.clip_config.hidden_size, model.config.dinov3_config.hidden_size) == (16, 16)
    first = CLIPModel.from_pretrained(tmp_path / "clip" / "model").vision_model.embeddings.patch_embedding.weight
    assert (model.clip.encoder.vision_model.embeddings.patch_embedding.weight - first).abs().max() < 0.01


def test_two_processes_train_one_model(scenes_folder, labels_file, tmp_path):
    """The captions name half of the images: one process may have a batch without texts."""
    rows = labels_file.read_text(encoding="utf-8").splitlines()
    labels_file.write_text("\n".join(rows[:4]) + "\n", encoding="utf-8")
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7)
    Dinov2Model(config).save_pretrained(tmp_path / "teacher")
    words = ("pretrain", "clip", "--images", scenes_folder / "images", "--image_labels", labels_file, *SMALL, *TEXT)
    words += ("--teacher", tmp_path / "teacher", "--held_out_fraction", 0, "--output_dir", tmp_path / "run")
    words += ("--checkpointing_steps", 1, "--per_device_train_batch_size", 1, "--max_train_steps", 6)
    run = run_subprocess(*words, launcher=TWO_PROCESSES)
    assert run.returncode == 0, run.stderr
    for line in ("10 images make 40 tiles of 32 px.", "Caching the teacher's features", "step     6  loss", "Saved "):
        assert run.stdout.count(line) == 1, line
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    assert all("loss_teacher" in line for line in log) and any("loss_presence" in line for line in log)
    CLIPModel.from_pretrained(tmp_path / "run" / "model")
    alone = run_command(*words, "--resume")
    assert alone.returncode == 1
    assert alone.stderr == (
        f"error: '{tmp_path / 'run' / 'checkpoints' / 'step-0000005'}' was saved by 2 processes, but this pretraining "
        "has 1. Continue with as many processes as before.\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("dinov3",), "Name at least one folder of images: --images my_images"),
        (("dinov3", "--images", "no"), "--images names 'no', which is not a folder"),
        (("dinov3", "--images", ".", "--exclude", "val.txt"), "--exclude is 'val.txt', which does not exist"),
        (
            ("dinov3", "--images", ".", "--crop_size", 100),
            "--crop_size is 100; it must be a multiple of the backbone's",
        ),
        (
            ("dinov3", "--images", ".", "--patch_size", 7),
            "--tile_size is 256; it must be a multiple of the backbone's",
        ),
        (
            ("dinov3", "--images", ".", "--crop_size", 512),
            "--crop_size is 512; it must not be larger than --tile_size",
        ),
        (("dinov3", "--images", ".", "--hidden_size", 18), "--hidden_size is 18; it must be a multiple of 4 for each"),
        (("dinov3", "--images", ".", "--max_train_steps", 0), "--max_train_steps is 0; it must be at least 1"),
        (("dinov3", "--images", ".", "--seed", -1), "--seed is -1; it must be at least 0"),
        (
            ("dinov3", "--images", ".", "--teacher_layer", 3),
            "--teacher_layer is 3; it has no effect without a --teacher",
        ),
        (("dinov3", "--images", ".", "--cache_dir", "x"), "--cache_dir is x; it has no effect without a --teacher"),
        (
            ("dinov3", "--images", ".", "--teacher", "t", "--cache_features", "false", "--cache_dir", "x"),
            "--cache_dir is 'x'; it has no effect with --cache_features false",
        ),
        (
            ("dinov3", "--images", ".", "--teacher", "t", "--cache_features", "false", "--dataloader_num_workers", 2),
            "Give --dataloader_num_workers 0 together with --cache_features false",
        ),
        (
            ("dinov3", "--images", ".", "--init", "x", "--hidden_size", 40),
            "--hidden_size is 40; it has no effect with --init, whose sizes are kept",
        ),
        (
            ("clip", "--images", ".", "--image_labels", "setup.cfg", "--init", "x", "--projection_dim", 8),
            "--projection_",
        ),
        (("dinov3", "--images", ".", "--resume", "--overwrite_output_dir"), "Give either --overwrite_output_dir or"),
        (("dinov3", "--images", ".", "--image_labels", "x"), "unrecognized arguments: --image_labels x"),
        (("clip", "--images", "."), "Name the tags or captions of the images: --image_labels labels.csv"),
        (("clip", "--images", ".", "--image_labels", "no.csv"), "--image_labels is 'no.csv', which does not exist"),
        (
            ("clip", "--images", ".", "--image_labels", "setup.cfg", "--held_out_fraction", 1),
            "--held_out_fraction is 1.0; expected a share from 0 to below 1",
        ),
        (
            ("clip", "--images", ".", "--image_labels", "setup.cfg", "--text_hidden_size", 100),
            "--text_hidden_size is 100; it must be a multiple of 32, or below 64",
        ),
        (
            ("clip", "--images", ".", "--image_labels", "setup.cfg", "--text_num_hidden_layers", 0),
            "--text_num_hidden_layers is 0; it must be at least 1",
        ),
    ],
)
def test_wrong_words_stop_before_anything_is_written(words, message, tmp_path, monkeypatch):
    (tmp_path / "setup.cfg").touch()
    monkeypatch.chdir(tmp_path)
    run = run_command("pretrain", *words)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith(
        f"usage: co2s pretrain {words[0]} [--flag value ...]\nco2s pretrain {words[0]}: error: "
    )
    assert message in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["setup.cfg"]


def test_a_folder_without_images_is_an_error(tmp_path):
    (tmp_path / "images").mkdir()
    run = run_command("pretrain", "dinov3", "--images", tmp_path / "images", "--output_dir", tmp_path / "run")
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == f"error: --images is {tmp_path / 'images'}, where no image is found. Name other folders.\n"
    assert not (tmp_path / "run").exists()


def test_the_kind_comes_first():
    for words in ((), ("dinov4",), ("--images", ".")):
        run = run_command("pretrain", *words)
        assert (run.returncode, run.stdout) == (1, "")
        assert run.stderr.startswith("usage: co2s pretrain {dinov3,clip} [--flag value ...]\n")
        assert run.stderr.endswith("error: name the kind of the backbone first: dinov3 or clip.\n")
    shown = run_command("pretrain", "--help")
    assert (shown.returncode, shown.stderr) == (0, "") and "co2s pretrain clip --images" in shown.stdout


def test_options_come_from_a_file(scenes_folder, tmp_path):
    settings = {
        "images": [str(scenes_folder / "images")],
        "hidden_size": 16,
        "num_attention_heads": 2,
        "use_cpu": True,
    }
    settings |= {"num_hidden_layers": 1, "tile_size": 32, "crop_size": 16, "max_train_steps": 9, "logging_steps": 1}
    (tmp_path / "run.json").write_text(json.dumps(settings), encoding="utf-8")
    words = ("--config", tmp_path / "run.json", "--max_train_steps", 1, "--output_dir", tmp_path / "run")
    run = run_command("pretrain", "dinov3", *words)
    assert run.returncode == 0, run.stderr
    assert len(read_log(tmp_path / "run" / "log.jsonl")) == 1
