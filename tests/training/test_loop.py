import itertools
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
from helpers import (
    RESUMABLE_RUN,
    SMALL_RUN,
    TWO_PROCESSES,
    environment,
    forget_accelerator,
    open_folder,
    read_metrics,
    run_command,
    run_subprocess,
)
from pictures import read_picture
from PIL import Image
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from co2s_hf import Co2SForSemanticSegmentation, Co2SImageProcessor
from co2s_hf.data.options import DataOptions
from co2s_hf.training import loop
from co2s_hf.training.evaluation import confusion_matrices
from co2s_hf.training.logbook import MEASURED, flatten
from co2s_hf.training.loop import setup, train, training_step
from co2s_hf.training.options import TrainingOptions
from co2s_hf.training.run import batches


def read_log(output: Path) -> list[dict]:
    """Read the log without the measurements of the machine."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def weights_and_log(output: Path) -> tuple[bytes, list[dict]]:
    return (output / "model" / "model.safetensors").read_bytes(), read_log(output)


def fused_mean_iou(output: Path, data: Path) -> float:
    """Evaluate the saved model again."""
    model = Co2SForSemanticSegmentation.from_pretrained(output / "model")
    processor = Co2SImageProcessor.from_pretrained(output / "model")
    matrices = confusion_matrices(model, processor, open_folder(data).validation, 32, Accelerator(cpu=True))
    return matrices["fused"].mean_iou()


def test_a_run_trains_saves_and_reports(small_run, scenes_folder):
    stdout = (small_run.parent / "stdout.txt").read_text()
    assert re.search(r"images +3 +5 +2\n", stdout)
    assert "mean IoU" in stdout and "predicting the largest class everywhere" in stdout
    assert "Pseudo-labels at step 4: share of the pixels of each class" in stdout
    log = [json.loads(line) for line in (small_run / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [2, 4]
    assert "clip/loss_stability" not in log[0] and "dinov3/loss_stability" in log[1]  # half the run is warm-up
    data = open_folder(scenes_folder)
    assert log[0]["images_per_second"] > 0 and set(log[1]["clip/coverage"]) == set(data.id2label.values())
    record = json.loads((small_run / "arguments.json").read_text())
    assert record["command"][:2] == ["train", "--data_dir"] and record["data_hash"] == data.hash
    assert (record["arguments"]["learning_rate"], record["arguments"]["supervised_warmup_steps"]) == (1e-3, 2)
    assert fused_mean_iou(small_run, scenes_folder) == pytest.approx(read_metrics(small_run)["fused"]["mean_iou"])
    assert Co2SForSemanticSegmentation.from_pretrained(small_run / "model").config.palette == data.palette


def test_figures_show_the_images_and_their_labels(small_run, scenes_folder):
    data = open_folder(scenes_folder)
    picture = read_picture(small_run / "predictions.png")
    labels = np.unique(np.stack([np.asarray(sample.load_label()) for sample in data.validation]))
    for index in set(labels.tolist()) - {255}:
        shown = (picture == data.palette[index]).all(axis=-1)
        assert shown.sum() > 50, f"no pixel has the colour of {data.id2label[index]}"
    curves = read_picture(small_run / "curves.png")
    for color in ((31, 119, 180), (255, 127, 14)):  # matplotlib's first two colours: one line per student
        assert (curves == color).all(axis=-1).sum() > 50


def test_python_runs_the_same_training(small_run, scenes_folder, tmp_path):
    forget_accelerator()
    options = TrainingOptions(
        supervised_warmup_steps=2,
        max_train_steps=4,
        crop_size=32,
        per_device_train_batch_size=2,
        logging_steps=2,
        from_scratch=True,
        recipe="paper",
        output_dir=str(tmp_path / "run"),
    )
    run = setup(options, DataOptions(data_dir=str(scenes_folder)))
    assert not (tmp_path / "run").exists()  # nothing is written before the training begins
    trained = train(run)
    forget_accelerator()
    assert weights_and_log(tmp_path / "run") == weights_and_log(small_run)  # bit for bit
    assert trained.folder == tmp_path / "run" / "model" and trained.best_folder is None
    assert trained.evaluation.to_dict() == read_metrics(small_run)


def test_the_objective_has_the_options_of_the_run(scenes_folder, tmp_path):
    forget_accelerator()
    options = TrainingOptions(
        from_scratch=True,
        recipe="released",
        strong_weight=0.1,
        feature_dropout_weight=0.2,
        confidence_mode="pixelavg",
        labeled_loss="ohem",
        class_weights=["1", "2", "3", "4", "5", "6"],
        output_dir=str(tmp_path / "run"),
    )
    objective = setup(options, DataOptions(data_dir=str(scenes_folder))).objective
    forget_accelerator()
    assert (objective.stability, objective.strong_weight, objective.feature_dropout_weight) == ("reference", 0.1, 0.2)
    assert (objective.confidence_mode, objective.labeled_loss, objective.threshold) == ("pixelavg", "ohem", 0.6)
    assert objective.class_weights.tolist() == [1, 2, 3, 4, 5, 6]


def test_one_class_is_not_enough(scenes_folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(scenes_folder, data)
    (data / "classes.json").unlink()
    for path in (data / "labels").glob("*.png"):
        Image.new("L", (48, 48)).save(path)
    run = run_command("train", "--data_dir", data, "--output_dir", tmp_path / "run", *SMALL_RUN)
    assert run.returncode == 1 and "The data has one class, class_0; at least two are needed" in run.stderr


def test_an_output_folder_with_content_is_refused(small_run, scenes_folder):
    again = run_command("train", "--data_dir", scenes_folder, "--output_dir", small_run, *SMALL_RUN)
    assert again.returncode == 1
    assert "already exists and is not an empty folder" in again.stderr
    assert "--resume_from_checkpoint last, or start again with --overwrite_output_dir." in again.stderr


def test_resuming_changes_nothing(uninterrupted, scenes_folder, tmp_path):
    assert sorted(path.name for path in (uninterrupted / "checkpoints").iterdir()) == ["step-0000003", "step-0000006"]
    output = tmp_path / "run"
    shutil.copytree(uninterrupted, output)
    shutil.rmtree(output / "model")
    shutil.rmtree(output / "checkpoints" / "step-0000006")
    words = ("--data_dir", scenes_folder, "--output_dir", output, *RESUMABLE_RUN)
    run = run_command("train", *words, "--resume_from_checkpoint", "last")
    assert run.returncode == 0, run.stderr
    assert "Resumed after step 3 " in run.stdout
    assert weights_and_log(output) == weights_and_log(uninterrupted)  # bit for bit

    other = run_command("train", *words, "--learning_rate", 0.5, "--resume_from_checkpoint", "last")
    assert other.returncode == 1 and "--learning_rate was 0.001, now 0.5" in other.stderr


def test_a_run_resumes_into_another_folder(uninterrupted, scenes_folder, tmp_path):
    checkpoint = uninterrupted / "checkpoints" / "step-0000006"
    words = ("--data_dir", scenes_folder, *RESUMABLE_RUN, "--resume_from_checkpoint")
    done = run_command("train", *words, checkpoint, "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    weights, log = weights_and_log(tmp_path / "run")
    expected, whole_log = weights_and_log(uninterrupted)
    assert weights == expected and log == [line for line in whole_log if line["step"] > 6]
    record = (tmp_path / "run" / "arguments.json").read_text()
    assert record == (uninterrupted / "arguments.json").read_text()

    full = run_command("train", *words, checkpoint, "--output_dir", tmp_path)
    assert full.returncode == 1 and "is not an empty folder" in full.stderr
    moved = tmp_path / "elsewhere" / "checkpoints" / "step-0000006"
    shutil.copytree(checkpoint, moved)
    lost = run_command("train", *words, moved, "--output_dir", tmp_path / "new")
    assert lost.returncode == 1 and "arguments.json' does not exist" in lost.stderr


def test_a_killed_run_is_resumed_without_a_difference(uninterrupted, scenes_folder, tmp_path):
    words = ["--data_dir", scenes_folder, "--output_dir", tmp_path / "run", *RESUMABLE_RUN]
    command = [sys.executable, "-m", "co2s_hf", "train", *map(str, words)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment()
    ) as run:
        for line in run.stdout:
            if "Saved a checkpoint after step 3" in line:
                run.kill()  # SIGKILL, during one of the next steps
                break
    assert run.wait() == -signal.SIGKILL and not (tmp_path / "run" / "model").exists()
    (tmp_path / "run" / "checkpoints" / ".unfinished-0000006").mkdir()  # as if it was killed while it saved
    resumed = run_command("train", *words, "--resume_from_checkpoint", "last")
    assert resumed.returncode == 0, resumed.stderr
    assert weights_and_log(tmp_path / "run") == weights_and_log(uninterrupted)


def test_a_resumed_run_shows_every_step_once_in_tensorboard(scenes_folder, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = ["train", "--data_dir", scenes_folder, *RESUMABLE_RUN, "--card_samples", 0]
    words += ["--report_to", "tensorboard", "--output_dir", tmp_path / "run"]
    step = loop.training_step

    def interrupt(run, batch, index):
        if index == 10:  # the sixth step, which has two batches
            raise KeyboardInterrupt
        return step(run, batch, index)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "training_step", interrupt)
        assert run_command(*words).returncode == 130
    assert read_log(tmp_path / "run")[-1]["step"] == 4  # one step after the checkpoint
    done = run_command(*words, "--resume_from_checkpoint", "last")
    assert done.returncode == 0, done.stderr
    events = EventAccumulator(str(tmp_path / "run" / "co2s_hf")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 3, 4, 6, 8]


@pytest.mark.parametrize("recipe", ["paper", "balanced"])
def test_two_processes_compute_what_one_does(recipe, scenes_folder, tmp_path):
    """The global batch is the same: CutMix partners, feature dropout and the losses' denominators, too."""
    words = ["--data_dir", scenes_folder, "--use_cpu", "--supervised_warmup_steps", 2, "--max_train_steps", 4]
    words += ["--crop_size", 32, "--logging_steps", 1, "--confidence_threshold", 0.2, "--measure_pseudo_labels"]
    # Adam divides each gradient by its own size, so rounding errors of tiny gradients grow: use small steps.
    words += ["--learning_rate", 1e-5, "--card_samples", 0, "--from_scratch", "--recipe", recipe]
    one, two = tmp_path / "one", tmp_path / "two"
    done = run_command("train", *words, "--output_dir", one, "--per_device_train_batch_size", 4)
    assert done.returncode == 0, done.stderr
    words = ["train", *words, "--output_dir", two, "--per_device_train_batch_size", 2]
    done = run_subprocess(*words, launcher=TWO_PROCESSES)
    assert done.returncode == 0, done.stderr
    assert json.loads((two / "arguments.json").read_text())["num_processes"] == 2
    logs = [[flatten(line) for line in read_log(output)] for output in (one, two)]
    assert len(logs[0]) == 4 and logs[0][2]["clip/loss_strong_1"] > 0
    assert recipe == "balanced" or logs[0][2]["dinov3/loss_stability"] > 0
    for one_line, two_line in zip(*logs, strict=True):
        assert two_line == pytest.approx(one_line, rel=1e-5, abs=1e-5)
    assert read_metrics(two)["fused"]["accuracy"] == pytest.approx(read_metrics(one)["fused"]["accuracy"], abs=1e-3)
    assert fused_mean_iou(two, scenes_folder) == pytest.approx(read_metrics(two)["fused"]["mean_iou"], abs=1e-4)


def test_two_processes_have_the_gradients_of_the_whole_batch(scenes_folder, tmp_path):
    """Gradients are compared, since Adam would hide a constant factor such as a sum instead of a mean."""
    script = str(Path(__file__).with_name("gradients_of_a_step.py"))
    one, two = tmp_path / "one", tmp_path / "two"
    done = run_subprocess(scenes_folder, 4, one, launcher=(script,))
    assert done.returncode == 0, done.stderr
    done = run_subprocess(scenes_folder, 2, two, launcher=(*TWO_PROCESSES[:-2], script))
    assert done.returncode == 0, done.stderr
    expected, found = load_file(one), load_file(two)
    assert expected.keys() == found.keys() and len(expected) > 100
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-3, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_the_ablations_run(scenes_folder, tmp_path):
    words = ("--data_dir", scenes_folder, *SMALL_RUN, "--eval_steps", 2, "--recipe", "released")
    words += ("--labeled_loss", "ohem", "--class_weights", "balanced", "--confidence_mode", "pixelratio")
    words += ("--gradient_accumulation_steps", 2, "--output_dir", tmp_path / "run")
    run = run_command("train", *words)
    assert run.returncode == 0, run.stderr
    model = Co2SForSemanticSegmentation.from_pretrained(tmp_path / "run" / "model")
    assert (model.config.clip_logits_size, model.config.crop_size) == (224, 32)
    best, last = read_metrics(tmp_path / "run" / "best_model"), read_metrics(tmp_path / "run")
    assert best["fused"]["mean_iou"] >= last["fused"]["mean_iou"] and best["step"] in (2, 4) and best["is_best"]
    assert Co2SForSemanticSegmentation.from_pretrained(tmp_path / "run" / "best_model").config.num_labels == 6
    card = (tmp_path / "run" / "best_model" / "README.md").read_text()
    assert "selected by its result on these images" in card
    assert "selected by its result" not in (tmp_path / "run" / "model" / "README.md").read_text()


def test_the_rules_for_images_are_saved_with_the_model(scenes_folder, tmp_path):
    """16-bit images, drawn sets, another size for validation: evaluation and prediction read them from the model."""
    shutil.copytree(scenes_folder / "labels", tmp_path / "data" / "labels")
    (tmp_path / "data" / "images").mkdir()
    for path in (scenes_folder / "images").glob("*.png"):
        deep = np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 16
        Image.fromarray(deep).save(tmp_path / "data" / "images" / f"{path.stem}.tif")
    data = ("--data_dir", tmp_path / "data", "--labeled_fraction", "1/3", "--seed", 3)
    rules = ("--scale", "percentiles", "--base_size", 96, 96, "--eval_short_side", 64)
    output = tmp_path / "run"
    run = run_command("train", *data, *rules, *SMALL_RUN, "--output_dir", output)
    assert run.returncode == 0, run.stderr
    model = Co2SForSemanticSegmentation.from_pretrained(output / "model")
    ((low, high),) = model.config.image_scale
    assert 0 < low < high < 4096
    assert dict(Co2SImageProcessor.from_pretrained(output / "model").size) == {"shortest_edge": 64}
    drawn = json.loads((output / "splits" / "splits.json").read_text())
    assert len((output / "splits" / "labeled.txt").read_text().splitlines()) == 3 and drawn["seed"] == 3

    checkpoint = ("--checkpoint", output / "model")
    run = run_command("evaluate", *checkpoint, *data, "--output_dir", tmp_path / "evaluation", "--num_shown", 1)
    assert run.returncode == 0, run.stderr
    found, trained = read_metrics(tmp_path / "evaluation"), read_metrics(output)
    assert found["fused"] == trained["fused"] and found["data_hash"] == drawn["hash"]
    lists = ("--data_dir", tmp_path / "data", "--splits_dir", output / "splits", "--split", "validation")
    run = run_command("predict", *checkpoint, *lists, "--output_dir", tmp_path / "out")
    assert run.returncode == 0, run.stderr
    written = sorted(path.stem for path in (tmp_path / "out" / "labels").glob("*.png"))
    listed = (output / "splits" / "val.txt").read_text().split()[::2]
    assert written == sorted(Path(name).stem for name in listed)
    assert all(Image.open(path).size == (48, 48) for path in (tmp_path / "out" / "labels").glob("*.png"))


def test_one_student_trains_alone_on_labels_alone(scenes_folder, tmp_path):
    words = ("--data_dir", scenes_folder, *SMALL_RUN[2:], "--method", "supervised", "--students", "dinov3")
    words += ("--measure_pseudo_labels",)  # there are none
    output = tmp_path / "run"
    run = run_command("train", *words, "--output_dir", output)
    assert run.returncode == 0, run.stderr
    assert "--measure_pseudo_labels has no effect: --method supervised makes no pseudo-labels." in run.stdout
    assert "Pseudo-labels at step" not in run.stdout
    model = Co2SForSemanticSegmentation.from_pretrained(output / "model")
    assert model.config.fusion == "dinov3"
    assert {"dinov3", "fused"} <= set(read_metrics(output)) and "clip" not in read_metrics(output)
    assert not any("clip/" in name or "strong" in name for line in read_log(output) for name in line)

    # --overwrite_output_dir removes what the run wrote, and nothing else.
    (output / "notes.txt").write_text("mine")
    (output / "best_model").mkdir()
    words += ("--per_device_train_batch_size", 4)
    again = run_command("train", *words, "--output_dir", output, "--seed", 1, "--overwrite_output_dir")
    assert again.returncode == 0, again.stderr
    assert "3 labelled images make batches of 4: a batch contains some images more than once" in again.stdout
    assert (output / "notes.txt").read_text() == "mine" and not (output / "best_model").exists()
    assert json.loads((output / "arguments.json").read_text())["arguments"]["seed"] == 1


def test_a_run_that_diverges_stops_and_keeps_its_checkpoint(scenes_folder, tmp_path):
    words = ("--data_dir", scenes_folder, *SMALL_RUN, "--checkpointing_steps", 1, "--learning_rate", 1e30)
    run = run_command("train", *words, "--output_dir", tmp_path / "run")
    assert run.returncode == 1
    assert "The loss of step 2 is not finite. Its images: " in run.stderr and "The step is skipped" in run.stderr
    assert "The loss of step 3 is not finite" in run.stderr and "a lower --learning_rate" in run.stderr
    assert "labeled_0" in run.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000001"]  # not of step 2
    weights = load_file(tmp_path / "run" / "checkpoints" / "step-0000001" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    assert not (tmp_path / "run" / "model").exists()


class CountReads(TorchDispatchMode):
    """Count the tensors whose value is read as a number of Python. On a GPU, such a read waits for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_with_one_broken_batch_is_skipped_as_a_whole(scenes_folder, tmp_path, capsys):
    forget_accelerator()
    options = TrainingOptions(
        from_scratch=True,
        recipe="paper",
        crop_size=32,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_train_steps=3,
        supervised_warmup_steps=1,
        use_cpu=True,
        output_dir=str(tmp_path / "run"),
    )
    run = setup(options, DataOptions(data_dir=str(scenes_folder)))
    calls = itertools.count()

    def break_the_first_batch_of_the_second_step(module, args, losses):
        return losses | {"loss": losses["loss"] * torch.nan} if next(calls) == 2 else losses

    run.objective.register_forward_hook(break_the_first_batch_of_the_second_step)
    are_skipped, weights, names, num_reads = [], [], [], []
    for index, batch in enumerate(batches(run)):
        with CountReads() as reads:
            are_skipped.append(training_step(run, batch, index))
        num_reads.append(reads.count)
        names.append([*batch["labeled_name"], *batch.get("unlabeled_name", [])])
        weights.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
    forget_accelerator()
    assert are_skipped == [False, False, False, True, False, False]
    changed = [not torch.equal(after, before) for before, after in itertools.pairwise(weights)]
    assert changed == [True, False, False, False, True]  # by the last batches of steps 1 and 3
    assert all(tensor.isfinite().all() for tensor in weights)
    # The good batch of the skipped step is in the log, the broken one is not.
    losses = [entry["loss"] for entry in run.logbook.entries]
    assert len(losses) == 5 and all(loss.isfinite() for loss in losses) and not run.step_batches
    assert f"The loss of step 2 is not finite. Its images: {', '.join(names[2])}. The" in capsys.readouterr().err
    assert num_reads[::2] == [0, 0, 0]  # the first batches of the steps


def test_fp16_from_the_launcher_is_refused(scenes_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    run = run_command("train", "--data_dir", scenes_folder, "--output_dir", tmp_path / "run")
    assert run.returncode == 1 and "fp16 overflows inside DINOv3. Use --mixed_precision bf16" in run.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--class_weights", 1, 2), "--class_weights has 2 weights for 6 classes: building"),
        (("--supervised_warmup_steps", 4), "--supervised_warmup_steps is 4 of 4 steps: no unlabelled image"),
        (
            ("--from_scratch", "false", "--clip_model", "/no/clip", "--dinov3_model", "/no/dinov3"),
            "--clip_model /no/clip cannot be loaded. '/no/clip' does not exist.",
        ),
        (("--data_dir", "/no/such/folder"), "--data_dir is '/no/such/folder', which does not exist"),
    ],
)
def test_errors_that_the_data_shows_stop_before_anything_is_written(words, message, scenes_folder, tmp_path):
    output = tmp_path / "run"
    run = run_command("train", "--data_dir", scenes_folder, "--output_dir", output, *SMALL_RUN, *words)
    assert run.returncode == 1 and message in run.stderr and run.stderr.count("error: ") == 1
    assert not output.exists()
