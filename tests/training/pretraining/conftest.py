"""Fixtures of the tests of the pretraining: a tiny teacher, tags, and a function that pretrains."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import forget_accelerator
from transformers import Dinov2Config, Dinov2Model

from co2s_hf.training.pretraining.loop import pretrain_clip, pretrain_dinov3
from co2s_hf.training.pretraining.options import ClipOptions, Dinov3Options, PretrainingOptions


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "tile_size": 32}
SMALL |= {"crop_size": 16, "per_device_train_batch_size": 4, "use_cpu": True, "mixed_precision": "no", "seed": 3}
SMALL_TEXT = {"projection_dim": 8, "text_hidden_size": 32, "text_num_hidden_layers": 1}
TAGS = ("field trees", "sea", "mobile-homes cars trees")


@pytest.fixture(autouse=True)
def own_accelerator():
    """Each test has an Accelerator of its own."""
    yield
    forget_accelerator()


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory) -> Path:
    """A DINOv2 with random weights: 3 layers of width 16, patches of 7 px."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=7
    )
    folder = tmp_path_factory.mktemp("teacher") / "dinov2"
    Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def labels_file(scenes_folder, tmp_path_factory) -> Path:
    """Tags of 8 of the 10 drawn scenes. With a share of 0.72, two of them are held out."""
    path = tmp_path_factory.mktemp("labels") / "labels.csv"
    images = sorted((scenes_folder / "images").iterdir())[:8]
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "tags"])
        rows.writerows([image, TAGS[place % len(TAGS)]] for place, image in enumerate(images))
    return path


@pytest.fixture(scope="session")
def make_options(scenes_folder, teacher_folder, labels_file) -> Callable[..., PretrainingOptions]:
    """A function that makes the options of a small pretraining: "distillation", "masked" or "clip"."""

    def make(kind: str, output_dir: Path, **changes) -> PretrainingOptions:
        settings = {"images": [str(scenes_folder / "images")], "output_dir": str(output_dir), **SMALL}
        if kind != "masked":
            settings |= {"teacher": str(teacher_folder), "teacher_layer": 2}
        if kind == "clip":
            settings |= {"image_labels": str(labels_file), "held_out_fraction": 0.72, **SMALL_TEXT}
        return (ClipOptions if kind == "clip" else Dinov3Options)(**settings | changes)

    return make


@pytest.fixture(scope="session")
def pretrain(make_options) -> Callable[..., Path]:
    """A function that runs a small pretraining and returns the backbone's folder."""

    def run(kind: str, output_dir: Path, **changes) -> Path:
        options = make_options(kind, output_dir, **changes)
        try:
            return (pretrain_clip if kind == "clip" else pretrain_dinov3)(options)
        finally:
            forget_accelerator()

    return run
