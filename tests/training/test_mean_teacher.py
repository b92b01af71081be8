from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import make_model, make_views

from co2s_hf.training.class_balance import Balance
from co2s_hf.training.mean_teacher import MeanTeacher, TaughtObjective


def objective(**kwargs):
    balance = kwargs.pop("balance", Balance(teacher_decay=0.5))
    model = make_model().train()
    return TaughtObjective(model, balance=balance, threshold=kwargs.pop("threshold", 0.0), **kwargs)


def test_the_teacher_averages_the_weights():
    model = make_model()
    weight = model.clip.decoder.head.weight
    first = weight.detach().clone()
    teacher = MeanTeacher(model, decay=0.6)
    own = teacher.model.clip.decoder.head.weight
    with torch.no_grad():
        weight += 1
    teacher.update(model)  # the first update has the decay 1/2
    torch.testing.assert_close(own, first + 0.5)
    teacher.update(model)  # the second one has 0.6, as it is less than 2/3
    torch.testing.assert_close(own, first + 0.7)
    assert not own.requires_grad and own is not weight


def test_frozen_weights_are_not_averaged():
    model = make_model()
    model.clip.encoder.requires_grad_(False)
    teacher = MeanTeacher(model, decay=0.5)
    frozen = model.clip.encoder.visual_projection.weight
    before = teacher.model.clip.encoder.visual_projection.weight.clone()
    with torch.no_grad():
        frozen += 1
    teacher.update(model)
    assert teacher.model.clip.encoder.visual_projection.weight.equal(before)


def test_both_students_learn_the_fused_prediction_of_the_teacher():
    taught = objective(balance=Balance(teacher_decay=0.5, exchange="average"))
    views = make_views(batch_size=2)
    views = replace(views, cutmix_boxes_1=torch.zeros_like(views.cutmix_boxes_1))
    losses = taught(views)
    with torch.no_grad():
        weak = taught.teacher.model.student_logits(views.weak)
        labels = sum(weak[name].softmax(dim=1) for name in ("clip", "dinov3")).argmax(dim=1)
        strong = taught.model.student_logits(views.strong_1)
    for name in ("clip", "dinov3"):
        per_pixel = F.cross_entropy(strong[name], labels, reduction="none")
        expected = per_pixel[~views.padding].mean()
        torch.testing.assert_close(losses[f"{name}/loss_strong_1"], expected)
        # The strong view has the weight of the paper's three losses on unlabelled images: 2 * 0.25 + 0.5.
        total = 0.5 * (losses[f"{name}/loss_supervised"] + expected)
        torch.testing.assert_close(losses[f"{name}/loss"], total)


def test_a_student_that_is_far_behind_does_not_teach():
    taught = objective()
    logits = {name: torch.randn(1, 3, 4, 4, generator=torch.manual_seed(0)) for name in ("clip", "dinov3")}
    logits["clip"] = 10 * logits["clip"].flip(1)  # sure, and wrong
    assert taught._fused(logits).equal(logits["clip"])
    taught.calibration.confusion[0] = torch.tensor([[0.0, 1, 1], [1, 0, 1], [1, 1, 0]])
    taught.calibration.confusion[1] = torch.eye(3)
    assert taught._fused(logits).equal(logits["dinov3"])


def test_an_overconfident_student_does_not_win_after_calibration():
    taught = objective()
    clip, dinov3 = torch.tensor([4.0, 0, 0]), torch.tensor([0.0, 3, 0])
    logits = {"clip": clip.view(1, 3, 1, 1), "dinov3": dinov3.view(1, 3, 1, 1)}
    assert taught._fused(logits).argmax() == 0
    taught.calibration.log_temperatures[0] = torch.tensor(2.0).log()
    assert taught._fused(logits).argmax() == 1


def test_the_state_of_the_teacher_is_saved_with_the_objective():
    taught, views = objective(), make_views()
    taught(views)
    other = objective()
    other.load_state_dict(taught.state_dict())
    assert other.teacher.updates == 1
    for name in ("clip", "dinov3"):
        torch.testing.assert_close(taught(views)[f"{name}/loss"], other(views)[f"{name}/loss"], rtol=0, atol=0)


@pytest.mark.parametrize("student", ["clip", "dinov3"])
def test_a_single_student_learns_from_its_own_average(student):
    taught = objective(students=(student,))
    losses = taught(make_views())
    other = {"clip": "dinov3", "dinov3": "clip"}[student]
    assert f"{student}/loss_strong_1" in losses and f"{other}/loss" not in losses
    losses["loss"].backward()
    assert getattr(taught.model, student).decoder.head.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in taught.teacher.parameters())
