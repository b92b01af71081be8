import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import EXAMPLES, example_environment, make_model, open_folder, run_example
from PIL import Image
from safetensors.torch import load_file

from co2s_hf import Co2SForSemanticSegmentation, Co2SImageProcessor
from co2s_hf.confusion import ConfusionMatrix
from co2s_hf.inference import predict_logits
from co2s_hf.logbook import MEASURED, flatten
from co2s_hf.training import (
    balanced_class_weights,
    checkpoint_step,
    evaluate,
    find_checkpoint,
    largest_class_mean_iou,
    make_optimizer,
    polynomial_decay,
    predictors,
    repeat_released_quirks,
    results_dict,
    results_table,
    steps_per_epoch,
    tiny_model,
)


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


def test_balanced_weights_make_classes_equal():
    counts = np.array([600, 200, 0, 100])
    weights = balanced_class_weights(counts)
    assert weights.tolist() == pytest.approx([0.5, 1.5, 1.0, 3.0])
    assert (weights * torch.tensor(counts)).tolist() == pytest.approx([300, 300, 0, 300])


def test_released_quirks_keep_the_weights():
    model = make_model()
    released = repeat_released_quirks(model)
    assert (released.config.clip_logits_size, released.config.dinov3_logits_size) == (224, 256)
    assert released.config.clip_config.hidden_act == "gelu" and released.config.clip_image_mean[0] == 0.485
    for name, value in model.state_dict().items():
        assert torch.equal(released.state_dict()[name], value), name
    pixel_values = torch.randn(1, 3, 16, 16)
    difference = released(pixel_values).clip_logits - model(pixel_values).clip_logits
    assert difference.abs().max() > 1e-4


def test_a_tiny_model_starts_with_strong_similarities():
    model = tiny_model(id2label={0: "land", 1: "water"})
    for student in (model.clip, model.dinov3):
        # PyTorch draws the 7x7 convolution's weights from -1/7 to 1/7.
        assert 7 / 7 < student.decoder.similarity_projection.weight.abs().max() <= 8 / 7
    assert model.clip.decoder.upsampling_layers[0].refine[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_predictors_follow_the_fusion():
    assert predictors(make_model().config) == ("clip", "dinov3", "fused")
    assert predictors(make_model(fusion="clip").config) == ("clip", "fused")


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
    data = open_folder(scenes_folder)
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


def data_labels(folder):
    return open_folder(folder).id2label.values()


SMALL_RUN = (
    "--supervised_warmup_steps",
    2,
    "--max_train_steps",
    4,
    "--crop_size",
    32,
    "--per_device_train_batch_size",
    2,
    "--logging_steps",
    2,
)


def test_training_script_trains_saves_and_reports(scenes_folder, tmp_path):
    output = tmp_path / "run"
    run = run_example("train_semi.py", "--data_dir", scenes_folder, "--output_dir", output, *SMALL_RUN)
    assert run.returncode == 0, run.stderr
    assert re.search(r"images +3 +5 +2\n", run.stdout)
    assert "mean IoU" in run.stdout and "predicting the largest class everywhere" in run.stdout
    metrics = json.loads((output / "metrics.json").read_text())
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [2, 4]
    assert "clip/loss_stability" not in log[0] and "dinov3/loss_stability" in log[1]  # half the run is warm-up
    assert log[0]["images_per_second"] > 0 and set(log[1]["clip/coverage"]) == set(data_labels(scenes_folder))
    arguments = json.loads((output / "arguments.json").read_text())["arguments"]
    assert (arguments["learning_rate"], arguments["supervised_warmup_steps"]) == (1e-3, 2)

    for name, least in (("predictions.png", (1000, 400)), ("curves.png", (1000, 400))):
        with Image.open(output / name) as figure:
            assert figure.width >= least[0] and figure.height >= least[1]
            assert np.asarray(figure.convert("L")).std() > 10  # something is drawn

    model = Co2SForSemanticSegmentation.from_pretrained(output / "model")
    processor = Co2SImageProcessor.from_pretrained(output / "model")
    data = open_folder(scenes_folder)
    again = evaluate(model, processor, data.validation, crop_size=32, accelerator=Accelerator(cpu=True))
    assert again["fused"].mean_iou() == pytest.approx(metrics["fused"]["mean_iou"], abs=1e-4)
    assert model.config.palette == data.palette

    again = run_example("train_semi.py", "--data_dir", scenes_folder, "--output_dir", output, *SMALL_RUN)
    assert again.returncode != 0 and "already exists and is not an empty folder" in again.stderr


RESUMABLE_RUN = (
    *SMALL_RUN[:2],
    *SMALL_RUN[4:],
    "--max_train_steps",
    8,
    "--gradient_accumulation_steps",
    2,
    "--checkpointing_steps",
    3,
    "--seed",
    5,
)


def read_log(output):
    """The log without what the machine's speed and memory decide."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def weights_and_log(output):
    log = read_log(output)
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
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=example_environment()
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
    samples = open_folder(scenes_folder).validation
    alone = evaluate(model, processor, samples, crop_size=32, accelerator=Accelerator(cpu=True))
    assert alone["fused"].mean_iou() == pytest.approx(metrics["fused"]["mean_iou"], abs=1e-4)


def test_two_processes_compute_what_one_does(scenes_folder, tmp_path):
    """The same global batch: CutMix partners, feature dropout, denominators and gradients are the whole batch's."""
    arguments = ["--data_dir", scenes_folder, "--use_cpu", *SMALL_RUN[:6], "--logging_steps", 1]
    arguments += ["--confidence_threshold", 0.2, "--measure_pseudo_labels"]
    # Adam divides each gradient by its own size, so that rounding grows where it is next to nothing: small steps.
    arguments += ["--learning_rate", 1e-5]
    one = run_example(
        "train_semi.py", *arguments, "--output_dir", tmp_path / "one", "--per_device_train_batch_size", 4
    )
    assert one.returncode == 0, one.stderr
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    launcher += ("--main_process_port", "0")
    arguments += ["--output_dir", tmp_path / "two", "--per_device_train_batch_size", 2]
    two = run_example("train_semi.py", *arguments, launcher=launcher)
    assert two.returncode == 0, two.stderr
    logs = [[flatten(line) for line in read_log(tmp_path / name)] for name in ("one", "two")]
    assert len(logs[0]) == 4 and logs[0][2]["clip/loss_strong_1"] > 0 and logs[0][2]["dinov3/loss_stability"] > 0
    for one_line, two_line in zip(*logs, strict=True):
        assert two_line == pytest.approx(one_line, rel=1e-5, abs=1e-5)
    counts = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert counts[1]["fused"]["accuracy"] == pytest.approx(counts[0]["fused"]["accuracy"], abs=1e-3)


def test_the_ablations_run(scenes_folder, tmp_path):
    arguments = ("--data_dir", scenes_folder, *SMALL_RUN, "--eval_steps", 2)
    arguments += ("--recipe", "released", "--labeled_loss", "ohem", "--class_weights", "balanced")
    arguments += ("--confidence_mode", "pixelratio", "--gradient_accumulation_steps", 2)
    run = run_example("train_semi.py", *arguments, "--output_dir", tmp_path / "released")
    assert run.returncode == 0, run.stderr
    settings = json.loads((tmp_path / "released" / "arguments.json").read_text())["arguments"]
    assert settings["stability"] == "reference"
    model = Co2SForSemanticSegmentation.from_pretrained(tmp_path / "released" / "model")
    assert (model.config.clip_logits_size, model.config.crop_size) == (224, 32)
    best = json.loads((tmp_path / "released" / "best_model" / "metrics.json").read_text())
    last = json.loads((tmp_path / "released" / "metrics.json").read_text())
    assert best["fused"]["mean_iou"] >= last["fused"]["mean_iou"] and best["step"] in (2, 4)
    assert Co2SForSemanticSegmentation.from_pretrained(tmp_path / "released" / "best_model").config.num_labels == 6


def test_what_was_said_of_the_data_travels_with_the_model(scenes_folder, tmp_path):
    """Sixteen bits, drawn sets, another scale for validation: evaluation and prediction need not be told again."""
    shutil.copytree(scenes_folder / "labels", tmp_path / "data" / "labels")
    (tmp_path / "data" / "images").mkdir()
    for path in (scenes_folder / "images").glob("*.png"):
        deep = np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 16
        Image.fromarray(deep).save(tmp_path / "data" / "images" / f"{path.stem}.tif")
    data = ("--data_dir", tmp_path / "data", "--labeled_fraction", "1/3", "--seed", 3)
    rules = ("--scale", "percentiles", "--base_size", 96, 96, "--eval_short_side", 64)
    output = tmp_path / "run"
    report = ("--report", tmp_path / "report.html")
    run = run_example("train_semi.py", *data, *rules, *report, *SMALL_RUN, "--output_dir", output)
    assert run.returncode == 0, run.stderr
    assert "Data report" in (tmp_path / "report.html").read_text()
    model = Co2SForSemanticSegmentation.from_pretrained(output / "model")
    ((low, high),) = model.config.image_scale
    assert 0 < low < high < 4096
    assert dict(Co2SImageProcessor.from_pretrained(output / "model").size) == {"shortest_edge": 64}
    drawn = json.loads((output / "splits" / "splits.json").read_text())
    assert len((output / "splits" / "labeled.txt").read_text().splitlines()) == 3 and drawn["seed"] == 3

    checkpoint = ("--checkpoint", output / "model")
    run = run_example("evaluate.py", *checkpoint, *data, "--output_dir", tmp_path / "evaluation", "--num_shown", 1)
    assert run.returncode == 0, run.stderr
    found, trained = (json.loads((path / "metrics.json").read_text()) for path in (tmp_path / "evaluation", output))
    assert found["fused"] == trained["fused"] and found["data_hash"] == drawn["hash"]
    lists = ("--data_dir", tmp_path / "data", "--splits_dir", output / "splits", "--split", "validation")
    run = run_example("predict.py", *checkpoint, *lists, "--output_dir", tmp_path / "out")
    assert run.returncode == 0, run.stderr
    written = sorted(path.stem for path in (tmp_path / "out" / "labels").glob("*.png"))
    listed = (output / "splits" / "val.txt").read_text().split()[::2]
    assert written == sorted(Path(name).stem for name in listed)
    assert all(Image.open(path).size == (48, 48) for path in (tmp_path / "out" / "labels").glob("*.png"))


def test_one_student_trains_alone_and_without_unlabelled_images(scenes_folder, tmp_path):
    arguments = ("--data_dir", scenes_folder, *SMALL_RUN[2:], "--method", "supervised", "--students", "dinov3")
    output = tmp_path / "run"
    run = run_example("train_semi.py", *arguments, "--output_dir", output)
    assert run.returncode == 0, run.stderr
    model = Co2SForSemanticSegmentation.from_pretrained(output / "model")
    assert model.config.fusion == "dinov3"
    assert set(json.loads((output / "metrics.json").read_text())) >= {"dinov3", "fused"}
    assert not any("clip/" in name or "strong" in name for line in read_log(output) for name in line)

    # Starting anew removes what the run wrote, and nothing else.
    assert "best_model" not in {path.name for path in output.iterdir()}
    (output / "notes.txt").write_text("mine")
    arguments += ("--per_device_train_batch_size", 4)
    again = run_example("train_semi.py", *arguments, "--output_dir", output, "--seed", 1, "--overwrite_output_dir")
    assert again.returncode == 0, again.stderr
    assert "3 labelled images make batches of 4: a batch shows some of them more than once" in again.stdout
    assert (output / "notes.txt").read_text() == "mine"
    assert json.loads((output / "arguments.json").read_text())["arguments"]["seed"] == 1


def test_a_run_that_diverges_stops_and_keeps_its_checkpoint(scenes_folder, tmp_path):
    arguments = ("--data_dir", scenes_folder, *SMALL_RUN, "--checkpointing_steps", 1, "--learning_rate", 1e30)
    run = run_example("train_semi.py", *arguments, "--output_dir", tmp_path / "run")
    assert run.returncode != 0
    assert "The loss of step 2 is not finite. Its images: " in run.stderr and "The step is skipped" in run.stderr
    assert "The loss of step 3 is not finite" in run.stderr and "a lower --learning_rate" in run.stderr
    assert "labeled_0" in run.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000001"]  # not of step 2
    weights = load_file(tmp_path / "run" / "checkpoints" / "step-0000001" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    assert not (tmp_path / "run" / "model").exists()


def test_only_a_runs_folder_is_overwritten(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious").write_text("mine")
    run = run_example("train_semi.py", "--output_dir", tmp_path, "--overwrite_output_dir")
    assert run.returncode != 0 and "is not an empty folder" in run.stderr
    assert (tmp_path / "model" / "precious").read_text() == "mine"


def test_methods_are_compared_on_the_same_labels(scenes_folder, tmp_path):
    arguments = ("compare.py", "--seeds", 3, "--output_dir", tmp_path / "runs", "--data_dir", scenes_folder)
    run = run_example(*arguments, *SMALL_RUN)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "runs" / "comparison.json").read_text())["3"]
    supervised, co2s = (100 * results[method]["fused"]["mean_iou"] for method in ("supervised", "co2s"))
    row = next(line for line in run.stdout.splitlines() if line.startswith("| 3 |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert (cells[3], cells[6], cells[7]) == (f"{supervised:.1f}", f"{co2s:.1f}", f"{co2s - supervised:+.1f}")
    log = read_log(tmp_path / "runs" / "supervised-seed3")
    assert not any("strong" in name for line in log for name in line)

    again = run_example(*arguments, *SMALL_RUN)  # nothing is trained twice
    assert again.returncode == 0 and "train_semi.py" not in again.stdout and row in again.stdout
    other = run_example(*arguments, *SMALL_RUN[:-1], 1)
    assert other.returncode != 0 and "holds runs with --data_dir" in other.stderr


def test_evaluate_and_predict_take_what_training_saved(scenes_folder, tmp_path):
    model = make_model(id2label=dict(enumerate(data_labels(scenes_folder))), palette=None, crop_size=32)
    model.save_pretrained(tmp_path / "model")
    Co2SImageProcessor.from_model_config(model.config).save_pretrained(tmp_path / "model")
    run = run_example(
        *("evaluate.py", "--checkpoint", tmp_path / "model", "--data_dir", scenes_folder),
        *("--output_dir", tmp_path / "evaluation", "--num_shown", 1),
    )
    assert run.returncode == 0, run.stderr
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    samples = open_folder(scenes_folder).validation
    processor = Co2SImageProcessor.from_pretrained(tmp_path / "model")
    expected = evaluate(model, processor, samples, crop_size=32, accelerator=Accelerator(cpu=True))["fused"]
    assert metrics["fused"]["mean_f1"] == pytest.approx(expected.mean_f1()) and metrics["num_images"] == 2
    assert (tmp_path / "evaluation" / "confusion.png").exists()

    (tmp_path / "photos" / "deep").mkdir(parents=True)
    shutil.copy(samples[0].image.path, tmp_path / "photos" / "deep" / "one.png")
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no image")
    arguments = ("predict.py", "--checkpoint", tmp_path / "model", "--output_dir", tmp_path / "out")
    run = run_example(*arguments, "--images", tmp_path / "photos", samples[1].image.path, "--save_confidence")
    assert run.returncode == 1 and "2 of 3 images are in" in run.stdout and "broken.jpg cannot be read" in run.stderr
    logits = predict_logits(
        model, processor(samples[0].load_image(), return_tensors="pt")["pixel_values"], 32, (48, 48)
    )
    confidence, labels = logits["fused"].softmax(0).max(0)
    with Image.open(tmp_path / "out" / "labels" / "deep" / "one.png") as found:
        assert found.mode == "P" and np.array_equal(np.asarray(found), labels.numpy())
    found = np.asarray(Image.open(tmp_path / "out" / "confidence" / "deep" / "one.png"))
    assert np.abs(found / 255 - confidence.numpy()).max() <= 0.5 / 255 + 1e-4
    assert Image.open(tmp_path / "out" / "overlay" / f"{Path(samples[1].image.path).stem}.png").size == (48, 48)

    run = run_example(*arguments, "--images", samples[1].image.path, "--flip")
    assert run.returncode != 0 and "holds other predictions: --flip was False" in run.stderr
    elsewhere = run_example(*arguments[:-1], tmp_path / "model", "--images", samples[1].image.path)
    assert elsewhere.returncode != 0 and "nothing there shall be overwritten" in elsewhere.stderr
    inside = run_example(*arguments[:-1], tmp_path / "photos" / "out", "--images", tmp_path / "photos")
    assert inside.returncode != 0 and "lies inside" in inside.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--clip_model", "x"), "Give both --clip_model and --dinov3_model"),
        (("--max_train_steps", 5, "--num_train_epochs", 5), "either --max_train_steps or --num_train_epochs"),
        (("--mixed_precision", "fp16"), "invalid choice: 'fp16'"),
        (("--stability", "on"), "invalid choice: 'on'"),
        (("--confidence_threshold", 2), "--confidence_threshold is 2"),
        (("--crop_size", 7), "--crop_size is 7; it must be at least 8"),
        (("--report_to", "tensorbored"), "--report_to names tensorbored, which is not installed"),
        (("--labeled_fraction", "few"), "'few' is no fraction; write it as 1/8"),
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
        (("--class_weights", 1, 2), "gives 2 weights for 6 classes: building"),
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
