"""Temperatures of the students: from labels, from agreement, at the end of a training and during it."""

import pytest
import torch
from accelerate import Accelerator
from helpers import make_model, open_folder, save_checkpoint

from co2s_hf.data.options import DataOptions
from co2s_hf.model.modeling_co2s import Co2SForSemanticSegmentation, calibrate_and_fuse
from co2s_hf.training.calibration import (
    RunningCalibration,
    agreement_temperature,
    calibrate,
    expected_calibration_error,
    fit_temperature,
    sample_logits,
)
from co2s_hf.training.loop import setup, train
from co2s_hf.training.models import build_adapted_model, open_base
from co2s_hf.training.options import AdaptationOptions, TrainingOptions


def drawn_logits(num_pixels: int, temperature: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw logits (pixels, 4), and labels from their probabilities; then multiply the logits by a temperature."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_pixels, 4, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return temperature * logits, labels


def options(folder, **kwargs) -> TrainingOptions:
    kwargs = {"crop_size": 32, "per_device_train_batch_size": 8, "use_cpu": True, **kwargs}
    return TrainingOptions(output_dir=str(folder / "run"), **kwargs)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_known_temperature_of_logits_is_found(temperature):
    logits, labels = drawn_logits(40_000, temperature)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.02)
    # It is the best of all temperatures.
    losses = [torch.nn.functional.cross_entropy(logits / t, labels) for t in (found / 1.02, found, found * 1.02)]
    assert losses[1] < losses[0] and losses[1] < losses[2]
    assert expected_calibration_error(logits, labels, found) < 0.01


def test_temperatures_stay_in_a_sane_range():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert fit_temperature(logits, torch.tensor([0, 1])) == pytest.approx(0.25)  # always right
    assert fit_temperature(logits, torch.tensor([1, 0])) == pytest.approx(8)  # always wrong
    assert fit_temperature(logits, torch.tensor([255, 255])) == 1.0
    assert agreement_temperature(logits[:0], logits[:0]) == 1.0


def test_ignored_pixels_do_not_change_a_temperature():
    logits, labels = drawn_logits(2_000, 2.0)
    noisy = torch.cat([logits, torch.tensor([[90.0, 0, 0, 0]])])
    assert fit_temperature(noisy, torch.cat([labels, torch.tensor([255])])) == fit_temperature(logits, labels)
    with_error = expected_calibration_error(noisy, torch.cat([labels, torch.tensor([255])]))
    assert with_error == expected_calibration_error(logits, labels)


def test_agreement_makes_the_mean_confidence_the_rate_of_equal_predictions():
    logits, _ = drawn_logits(5_000, 4.0)
    other = logits.roll(1, dims=1)  # predicts another class in every pixel
    other[:4_000] = logits[:4_000]  # and the same class in four fifths of them
    found = agreement_temperature(logits, other)
    assert (logits / found).softmax(1).amax(1).mean().item() == pytest.approx(0.8, abs=1e-5)
    assert 1 < found < 8


def test_calibration_error_is_the_weighted_gap_of_the_bins():
    # Two pixels at 90 % confidence, one of them right; two at 60 %, both right. Errors of one bin cancel.
    logits = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]]).log()
    labels = torch.tensor([0, 1, 1, 1])
    assert expected_calibration_error(logits, labels) == pytest.approx((abs(0.9 * 2 - 1) + abs(0.6 * 2 - 2)) / 4)
    # At a very high temperature, all pixels have a confidence of 50 % and fall into one bin; three of four are right.
    assert expected_calibration_error(logits, labels, temperature=1e6) == pytest.approx(0.25, abs=1e-5)


def test_an_overconfident_student_wins_the_fusion_only_without_calibration():
    clip, labels = drawn_logits(20_000, 10.0, seed=1)
    clip[:10_000] = clip[:10_000].roll(1, dims=1)  # wrong in half of the pixels
    dinov3 = torch.nn.functional.one_hot(labels, 4) * 4.0
    model = make_model(id2label=dict(enumerate("abcd")), palette=None)
    maps = {name: logits.T[None, :, :, None] for name, logits in (("clip", clip), ("dinov3", dinov3))}

    def accuracy() -> float:
        return (calibrate_and_fuse(maps, model.config).argmax(1).flatten() == labels).double().mean().item()

    before = accuracy()
    model.config.clip_temperature, model.config.dinov3_temperature = (
        fit_temperature(logits, labels) for logits in (clip, dinov3)
    )
    assert model.config.clip_temperature > 8 - 1e-6 and model.config.dinov3_temperature == pytest.approx(0.25)
    assert before < 0.6 and accuracy() > 0.99


@pytest.mark.parametrize("method", ["labels", "agreement"])
def test_calibrating_a_model_stores_temperatures_in_its_configuration(method, scenes_folder, tmp_path):
    data, model = open_folder(scenes_folder), make_model(id2label=open_folder(scenes_folder).id2label, palette=None)
    settings, accelerator = options(tmp_path), Accelerator(cpu=True)
    model.train()
    found = calibrate(model, data, settings, accelerator, method)
    assert model.training and list(found) == ["clip", "dinov3"]
    assert (model.config.clip_temperature, model.config.dinov3_temperature) == tuple(found.values())
    from_labeled = method == "labels"
    logits, labels = sample_logits(model, data, settings, accelerator, from_labeled=from_labeled)
    if from_labeled:
        assert found["clip"] == round(fit_temperature(logits["clip"], labels), 4)
        assert labels.max() < len(data.id2label)
    else:
        assert labels is None
        assert found["clip"] == round(agreement_temperature(logits["clip"], logits["dinov3"]), 4)
        assert found["dinov3"] == round(agreement_temperature(logits["dinov3"], logits["clip"]), 4)
    assert calibrate(model, data, settings, accelerator, method) == found  # the logits are not calibrated twice


def test_calibrating_a_single_student_leaves_the_other_one_as_it_is(scenes_folder, tmp_path):
    data = open_folder(scenes_folder)
    model = make_model(id2label=data.id2label, palette=None)
    settings = options(tmp_path, students="dinov3")
    found = calibrate(model, data, settings, Accelerator(cpu=True))
    assert list(found) == ["dinov3"] and model.config.clip_temperature == 1.0
    for method, message in (
        ("agreement", "needs two students"),
        ("platt", "`method` is 'platt'; choose one of labels"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(model, data, settings, Accelerator(cpu=True), method)


@pytest.mark.parametrize("recipe", ["balanced", "paper"])
def test_a_training_calibrates_its_model_only_with_the_balanced_recipe(recipe, scenes_folder, tmp_path, capsys):
    settings = TrainingOptions(
        output_dir=str(tmp_path / "run"),
        recipe=recipe,
        from_scratch=True,
        max_train_steps=2,
        supervised_warmup_steps=1,
        crop_size=32,
        per_device_train_batch_size=2,
        use_cpu=True,
    )
    trained = train(setup(settings, DataOptions(data_dir=str(scenes_folder))))
    model = Co2SForSemanticSegmentation.from_pretrained(trained.folder)
    found = {"clip": model.config.clip_temperature, "dinov3": model.config.dinov3_temperature}
    line = f"Temperatures of the students: clip {found['clip']:.2f}, dinov3 {found['dinov3']:.2f}."
    assert (line in capsys.readouterr().out) == (recipe == "balanced")
    # A new calibration of the saved model gives the same; the other recipes keep 1.
    fitted = calibrate(model, open_folder(scenes_folder), settings, Accelerator(cpu=True))
    assert found == (fitted if recipe == "balanced" else {"clip": 1.0, "dinov3": 1.0})


def test_adapting_a_calibrated_model_starts_with_temperatures_of_1(scenes_folder, tmp_path):
    data = open_folder(scenes_folder)
    save_checkpoint(tmp_path / "base", id2label=data.id2label, palette=None, crop_size=32, clip_temperature=2.0)
    settings = AdaptationOptions(checkpoint=str(tmp_path / "base"))
    assert open_base(settings).clip_temperature == 2.0
    assert build_adapted_model(settings, data).config.clip_temperature == 1.0


def labeled_batch(step: int, temperature: float) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Draw a batch of two images of 32 px. The logits of CLIP are calibrated, those of DINOv3 too large."""
    logits, labels = drawn_logits(2 * 32 * 32, 1.0, seed=step)
    maps = logits.view(2, 32, 32, 4).movedim(3, 1)
    return {"clip": maps, "dinov3": temperature * maps}, labels.view(2, 32, 32)


def test_running_temperatures_approach_the_true_ones():
    running = RunningCalibration(num_labels=4)
    assert [t.item() for t in running.temperatures.values()] == [1.0, 1.0]
    for step in range(300):
        running.update(*labeled_batch(step, temperature=2.5))
    assert running.temperatures["clip"].item() == pytest.approx(1, rel=0.05)
    assert running.temperatures["dinov3"].item() == pytest.approx(2.5, rel=0.05)


def test_a_running_temperature_follows_the_gradient_of_the_likelihood():
    running = RunningCalibration(num_labels=4)
    logits, labels = labeled_batch(0, temperature=2.5)
    labels[0] = 255
    log_t = torch.zeros(2, requires_grad=True)
    pixels = [maps[1, :, ::2, ::2] for maps in logits.values()]  # 16 pixels per side
    losses = [
        torch.nn.functional.cross_entropy(maps[None] / t, labels[1:, ::2, ::2]) for maps, t in zip(pixels, log_t.exp())
    ]
    expected = -0.05 * torch.autograd.grad(sum(losses), log_t)[0]
    running.update(logits, labels)
    assert expected[1] > 0.02
    torch.testing.assert_close(running.log_temperatures, expected)


def test_broken_and_unlabelled_batches_do_not_change_the_temperatures():
    running = RunningCalibration(num_labels=4)
    logits, labels = labeled_batch(0, temperature=2.5)
    running.update(logits, torch.full_like(labels, 255))
    running.update({name: torch.full_like(maps, torch.nan) for name, maps in logits.items()}, labels)
    assert running.log_temperatures.tolist() == [0.0, 0.0]
    assert running.confusion.isfinite().all()


def test_a_running_mean_iou_is_that_of_the_labelled_pixels():
    running = RunningCalibration(num_labels=3)
    labels = torch.tensor([[[0, 0, 1, 255]]])
    right = torch.nn.functional.one_hot(labels.where(labels < 255, 2), 3).movedim(3, 1).float()
    always_0 = torch.zeros_like(right).index_fill_(1, torch.tensor([0]), 1.0)
    running.update({"clip": right, "dinov3": always_0}, labels)
    found = {name: value.item() for name, value in running.mean_iou.items()}
    assert found == pytest.approx({"clip": 1.0, "dinov3": (2 / 3 + 0) / 2})  # class 2 occurs nowhere


@pytest.mark.parametrize(
    ("lags", "teaches"), [("clip", [False, True]), ("dinov3", [True, False]), (None, [True, True])]
)
def test_a_student_that_is_far_behind_does_not_teach(lags, teaches):
    running = RunningCalibration(num_labels=4)
    assert [flag.item() for flag in running.may_teach.values()] == [True, True]  # nothing is known yet
    logits, labels = labeled_batch(0, temperature=1.0)
    if lags:
        logits[lags] = logits[lags].roll(1, dims=1)
    running.update(logits, labels)
    assert [flag.item() for flag in running.may_teach.values()] == teaches


def test_a_student_with_little_coverage_does_not_teach():
    running = RunningCalibration(num_labels=4)
    running.update(*labeled_batch(0, temperature=1.0), {"clip": torch.tensor(0.5), "dinov3": torch.tensor(0.2)})
    assert [flag.item() for flag in running.may_teach.values()] == [True, False]
    coverage = running.coverage.clone()
    running.update(*labeled_batch(1, temperature=1.0))  # a supervised step
    assert torch.equal(running.coverage, coverage)
    for step in range(2, 100):
        running.update(*labeled_batch(step, 1.0), {"clip": torch.tensor(0.5), "dinov3": torch.tensor(0.4)})
    assert [flag.item() for flag in running.may_teach.values()] == [True, True]


def test_a_restored_calibration_continues_bit_by_bit():
    batches = [
        (*labeled_batch(n, 2.0), {"clip": torch.tensor(0.3), "dinov3": torch.tensor(0.1 * n)}) for n in range(6)
    ]
    whole = RunningCalibration(num_labels=4)
    for batch in batches:
        whole.update(*batch)
    first, second = RunningCalibration(num_labels=4), RunningCalibration(num_labels=4)
    for batch in batches[:3]:
        first.update(*batch)
    second.load_state_dict(first.state_dict())
    for batch in batches[3:]:
        second.update(*batch)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in whole.state_dict().items())


def test_losses_that_use_running_temperatures_keep_their_gradients_after_an_update():
    running = RunningCalibration(num_labels=4)
    logits, labels = labeled_batch(0, temperature=2.0)
    logits = {name: maps.requires_grad_() for name, maps in logits.items()}
    loss = sum((maps / running.temperatures[name]).softmax(1)[:, 0].sum() for name, maps in logits.items())
    running.update(logits, labels)
    loss.backward()
    assert logits["clip"].grad.abs().sum() > 0
