"""Everything that opens the folder of a model finds it after a kill in the middle of its replacement."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import forget_accelerator, open_folder, run_command, save_checkpoint
from kills import kill

from co2s_hf.hub.convert_co2s_to_hf import convert_to_original
from co2s_hf.hub.publishing import check_publishable
from co2s_hf.inference.images import load_model
from co2s_hf.training.models import build_model, open_base
from co2s_hf.training.options import AdaptationOptions, TrainingOptions
from co2s_hf.training.pretraining.loop import start
from co2s_hf.training.pretraining.options import Dinov3Options
from co2s_hf.utils import files
from co2s_hf.utils.files import written_beside


def kill_between_the_renames(folder: Path):
    """Replace a folder by its copy, and kill the process when the old one is renamed and the new one is not."""

    def replace():
        rename = os.replace

        def rename_once(source, destination):
            rename(source, destination)
            os.kill(os.getpid(), signal.SIGKILL)

        with written_beside(folder) as copy:
            shutil.copytree(folder, copy, dirs_exist_ok=True)
            files.os.replace = rename_once

    assert kill(replace, folder.parent, at=10**9)
    assert not folder.exists()


def adapt(folder: Path):
    open_base(AdaptationOptions(checkpoint=str(folder)))


@pytest.mark.parametrize("open_model", [lambda folder: load_model(str(folder)), adapt, check_publishable])
def test_a_trained_model_is_found(open_model, tmp_path):
    saved = save_checkpoint(tmp_path / "model", crop_size=16)
    kill_between_the_renames(tmp_path / "model")
    open_model(tmp_path / "model")
    found, _ = load_model(str(tmp_path / "model"))
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in found.state_dict().items())


def test_a_model_to_evaluate_is_not_taken_for_a_name_on_the_hub(tmp_path):
    save_checkpoint(tmp_path / "model")
    kill_between_the_renames(tmp_path / "model")
    words = ("--checkpoint", tmp_path / "model", "--output_dir", tmp_path, "--push_to_hub", "--hub_model_id", "a/b")
    run = run_command("evaluate", *words)  # another name would be refused for a model of the Hub
    assert run.returncode == 1 and f"'{tmp_path}' already exists and is not an empty folder" in run.stderr


def test_a_converted_model_is_found(converted_folder, tmp_path):
    shutil.copytree(converted_folder, tmp_path / "model")
    kill_between_the_renames(tmp_path / "model")
    convert_to_original(tmp_path / "model", tmp_path / "original")
    assert len(list((tmp_path / "original").iterdir())) == 2


def test_backbones_are_found(backbones, scenes_folder, tmp_path):
    clip, dinov3 = (shutil.copytree(folder, tmp_path / folder.name / "model") for folder in backbones)
    for folder in (clip, dinov3):
        kill_between_the_renames(folder)
    options = TrainingOptions(clip_model=str(clip), dinov3_model=str(dinov3))
    options.fill(options.defaults)
    build_model(options, open_folder(scenes_folder))
    kill_between_the_renames(dinov3)
    forget_accelerator()
    settings = {"images": [str(scenes_folder)], "init": str(dinov3), "tile_size": 32, "crop_size": 16}
    start(Dinov3Options(**settings, use_cpu=True, output_dir=str(tmp_path / "out")), "dinov3_vit")
    forget_accelerator()
    assert dinov3.is_dir()
