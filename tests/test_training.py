import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import make_model
from PIL import Image

from co2s_hf import Co2SForSemanticSegmentation, Co2SImageProcessor
from co2s_hf.data import SegmentationFolder
from co2s_hf.metrics import ConfusionMatrix
from co2s_hf.training import (
    checkpoint_step,
    evaluate,
    find_checkpoint,
    largest_class_mean_iou,
    make_optimizer,
    polynomial_decay,
    results_dict,
    results_table,
    steps_per_epoch,
)


EXAMPLES = Path(__file__).parents[1] / "examples"


def test_optimizer_groups_are_the_papers():
    model = make_model().freeze_backbones()
    groups = {group["name"]: group for group in make_optimizer(model, learning_rate=1e-4).param_groups}
    assert {name: group["lr"] for name, group in groups.items()} == pytest.approx(
        {"encoder": 1e-6, "guidance": 1e-4, "decoder": 1e-3}
    )
    assert groups["guidance"]["params"] == [model.dinov3.guidance.queries]
    grouped = {id(p) for group in groups.values() for p in group["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}
    assert {group["weight_decay"] for group in groups.values()} == {0.01}


def test_polynomial_decay():
    optimizer = make_optimizer(make_model(), learning_rate=1.0)
    scheduler = polynomial_decay(optimizer, total_steps=10)
    rates = []
    for _ in range(11):
        rates.append(scheduler.get_last_lr()[-1] / 10)
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([(1 - n / 10) ** 0.9 for n in range(11)])


def test_an_epoch_walks_the_longer_list():
    assert (steps_per_epoch(8, 40, 4), steps_per_epoch(8, 41, 4), steps_per_epoch(9, 3, 2)) == (10, 11, 5)


def test_evaluation_measures_every_pixel_once(scenes_folder):
    data = SegmentationFolder.open(scenes_folder)
    model = make_model(id2label=data.id2label, palette=data.palette).train()
    processor = Co2SImageProcessor.from_model_config(model.config)
    matrices = evaluate(model, processor, data.validation, crop_size=32, accelerator=Accelerator(cpu=True))
    assert model.training and set(matrices) == {"clip", "dinov3", "fused"}
    for matrix in matrices.values():
        assert matrix.counts.sum() == 2 * 48 * 48
    truth = sum(torch.bincount(processor(s.load_image(), s.load_label(), return_tensors="pt")["labels"].flatten(),
                               minlength=6) for s in data.validation)  # fmt: skip
    assert torch.equal(matrices["clip"].counts.sum(1), truth)


def test_tables_show_absent_classes_as_such():
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([0, 0, 1, 0]), torch.tensor([0, 0, 1, 1]))
    table = results_table({"fused": matrix}, {0: "land", 1: "road", 2: "water"})
    rows = {line.split()[0]: line.split()[-1] for line in table.splitlines()[1:4]}
    assert rows == {"land": "66.7", "road": "50.0", "water": "-"}
    assert "58.3" in table and "38.9" in table  # the mean over what occurs, and the paper's
    results = results_dict({"fused": matrix}, {0: "land", 1: "road", 2: "water"})["fused"]
    assert results["iou"]["water"] is None and results["accuracy"] == 0.75
    json.dumps(results, allow_nan=False)
    assert largest_class_mean_iou(matrix) == pytest.approx(0.25)


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}


def run_example(name, *arguments, launcher=(sys.executable,)):
    command = [*launcher, str(EXAMPLES / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)


SMALL_RUN = ("--max_train_steps", 4, "--crop_size", 32, "--per_device_train_batch_size", 2, "--logging_steps", 2)


def test_training_script_trains_saves_and_reports(scenes_folder, tmp_path):
    output = tmp_path / "run"
    run = run_example("train_semi.py", "--data_dir", scenes_folder, "--output_dir", output, *SMALL_RUN)
    assert run.returncode == 0, run.stderr
    assert "3 labelled, 5 unlabelled, 2 validation images; 6 classes: building" in run.stdout
    assert "mean IoU" in run.stdout and "predicting the largest class everywhere" in run.stdout
    metrics = json.loads((output / "metrics.json").read_text())
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [2, 4]
    assert "clip/loss_stability" not in log[0] and "dinov3/loss_stability" in log[1]  # half the run is warm-up
    arguments = json.loads((output / "arguments.json").read_text())["arguments"]
    assert (arguments["learning_rate"], arguments["supervised_warmup_steps"]) == (1e-3, 2)

    for name, least in (("predictions.png", (1000, 400)), ("curves.png", (1000, 400))):
        with Image.open(output / name) as figure:
            assert figure.width >= least[0] and figure.height >= least[1]
            assert np.asarray(figure.convert("L")).std() > 10  # something is drawn

    model = Co2SForSemanticSegmentation.from_pretrained(output / "model")
    processor = Co2SImageProcessor.from_pretrained(output / "model")
    data = SegmentationFolder.open(scenes_folder)
    again = evaluate(model, processor, data.validation, crop_size=32, accelerator=Accelerator(cpu=True))
    assert again["fused"].mean_iou() == pytest.approx(metrics["fused"]["mean_iou"], abs=1e-4)
    assert model.config.palette == data.palette

    again = run_example("train_semi.py", "--data_dir", scenes_folder, "--output_dir", output, *SMALL_RUN)
    assert again.returncode != 0 and "already exists and is not an empty folder" in again.stderr


RESUMABLE_RUN = (*SMALL_RUN[2:], "--max_train_steps", 8, "--checkpointing_steps", 3, "--seed", 5)


def weights_and_log(output):
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return (output / "model" / "model.safetensors").read_bytes(), log


@pytest.fixture(scope="module")
def uninterrupted(scenes_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    run = run_example("train_semi.py", "--data_dir", scenes_folder, "--output_dir", output, *RESUMABLE_RUN)
    assert run.returncode == 0, run.stderr
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step-0000003", "step-0000006"]
    return output


def test_resuming_changes_nothing(uninterrupted, scenes_folder, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(uninterrupted, output)
    shutil.rmtree(output / "model")
    shutil.rmtree(output / "checkpoints" / "step-0000006")
    arguments = ("--data_dir", scenes_folder, "--output_dir", output, *RESUMABLE_RUN)
    run = run_example("train_semi.py", *arguments, "--resume_from_checkpoint", "last")
    assert run.returncode == 0, run.stderr
    assert "Going on after step 3 " in run.stdout
    assert weights_and_log(output) == weights_and_log(uninterrupted)  # bit for bit

    other = run_example("train_semi.py", *arguments, "--learning_rate", 0.5, "--resume_from_checkpoint", "last")
    assert other.returncode != 0 and "learning_rate was 0.001, now 0.5" in other.stderr


def test_a_killed_run_goes_on_as_if_nothing_had_happened(uninterrupted, scenes_folder, tmp_path):
    arguments = ["--data_dir", str(scenes_folder), "--output_dir", str(tmp_path / "run"), *map(str, RESUMABLE_RUN)]
    command = [sys.executable, str(EXAMPLES / "train_semi.py"), *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=ENVIRONMENT
    ) as run:
        for line in run.stdout:
            if "Saved a checkpoint after step 3" in line:
                run.kill()  # SIGKILL, somewhere in the steps after it
                break
    assert run.wait() == -signal.SIGKILL and not (tmp_path / "run" / "model").exists()
    (tmp_path / "run" / "checkpoints" / ".unfinished-0000006").mkdir()  # as if killed while saving
    resumed = run_example("train_semi.py", *arguments, "--resume_from_checkpoint", "last")
    assert resumed.returncode == 0, resumed.stderr
    assert weights_and_log(tmp_path / "run") == weights_and_log(uninterrupted)


def test_missing_checkpoints_are_named(tmp_path):
    assert find_checkpoint(tmp_path, None) is None
    with pytest.raises(FileNotFoundError, match="There is no checkpoint in"):
        find_checkpoint(tmp_path, "last")
    with pytest.raises(FileNotFoundError, match="is no checkpoint; give 'last' or a folder such as"):
        find_checkpoint(tmp_path, str(tmp_path))
    for step in (3, 20, 100):
        (tmp_path / f"step-{step:07d}").mkdir()
    assert checkpoint_step(find_checkpoint(tmp_path, "last")) == 100
    assert checkpoint_step(find_checkpoint(tmp_path, str(tmp_path / "step-0000020"))) == 20


def test_two_processes_share_the_work(scenes_folder, tmp_path):
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    launcher += ("--main_process_port", "0")
    arguments = ("--data_dir", scenes_folder, "--output_dir", tmp_path / "run", "--use_cpu", *SMALL_RUN)
    run = run_example("train_semi.py", *arguments, launcher=launcher)
    assert run.returncode == 0, run.stderr
    facts = json.loads((tmp_path / "run" / "arguments.json").read_text())
    assert facts["num_processes"] == 2
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    model = Co2SForSemanticSegmentation.from_pretrained(tmp_path / "run" / "model")
    processor = Co2SImageProcessor.from_pretrained(tmp_path / "run" / "model")
    samples = SegmentationFolder.open(scenes_folder).validation
    alone = evaluate(model, processor, samples, crop_size=32, accelerator=Accelerator(cpu=True))
    assert alone["fused"].mean_iou() == pytest.approx(metrics["fused"]["mean_iou"], abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--clip_model", "x"), "Give both --clip_model and --dinov3_model"),
        (("--max_train_steps", 5, "--num_train_epochs", 5), "either --max_train_steps or --num_train_epochs"),
        (("--mixed_precision", "fp16"), "invalid choice: 'fp16'"),
        (("--stability", "on"), "invalid choice: 'on'"),
        (("--confidence_threshold", 2), "--confidence_threshold is 2"),
        (("--crop_size", 7), "--crop_size is 7; it must be at least 8"),
        (("--data_dir", "/no/such/folder"), "The data folder '/no/such/folder' does not exist"),
    ],
)
def test_wrong_settings_stop_before_anything_is_written(arguments, message, tmp_path):
    run = run_example("train_semi.py", "--output_dir", tmp_path / "run", *arguments)
    assert run.returncode != 0 and message in run.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--supervised_warmup_steps", 4), "--supervised_warmup_steps is 4 of 4 steps: no unlabelled image"),
        (
            ("--clip_model", "/no/clip", "--dinov3_model", "/no/dinov3"),
            "Cannot load CLIP's vision tower from '/no/clip'",
        ),
    ],
)
def test_what_only_the_data_shows_stops_before_training(arguments, message, scenes_folder, tmp_path):
    output = tmp_path / "run"
    run = run_example("train_semi.py", "--data_dir", scenes_folder, "--output_dir", output, *SMALL_RUN, *arguments)
    assert run.returncode != 0 and message in run.stderr and not output.exists()


def test_fp16_from_the_launcher_is_refused(scenes_folder, tmp_path):
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "fp16")
    arguments = ("--data_dir", scenes_folder, "--output_dir", tmp_path / "run")
    run = run_example("train_semi.py", *arguments, launcher=launcher)
    assert run.returncode != 0 and "fp16 overflows inside DINOv3" in run.stderr
