import numpy as np
import pytest
import torch
from helpers import make_model

from co2s_hf.training.optimization import (
    balanced_class_weights,
    make_optimizer,
    polynomial_decay,
    steps_per_epoch,
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


@pytest.mark.parametrize(
    ("device", "expected"), [("cpu", True), ("cuda:1", True), ("mps", None), ("xpu", None), ("meta", None)]
)
def test_the_optimizer_is_fused_where_that_is_tested(device, expected):
    assert make_optimizer(make_model(), device=device).defaults["fused"] is expected


def test_the_optimizer_works_on_a_device_without_a_fused_kernel():
    model = make_model().to("meta")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    make_optimizer(model, device="meta").step()


def test_balanced_weights_give_each_class_the_same_sum():
    counts = np.array([600, 200, 0, 100])
    weights = balanced_class_weights(counts)
    assert weights.tolist() == pytest.approx([0.5, 1.5, 1.0, 3.0])
    assert (weights * torch.tensor(counts)).tolist() == pytest.approx([300, 300, 0, 300])


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
