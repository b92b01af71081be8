import pytest
import torch
from helpers import make_model

from co2s_hf.training.models import repeat_released_quirks, tiny_model, train_only


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
        # PyTorch draws the weights of the 7x7 convolution from -1/7 to 1/7.
        assert 7 / 7 < student.decoder.similarity_projection.weight.abs().max() <= 8 / 7
    assert model.clip.decoder.upsampling_layers[0].refine[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("students", "frozen"), [("clip", "dinov3"), ("dinov3", "clip")])
def test_the_other_student_is_frozen_and_not_used(students, frozen):
    model = make_model().requires_grad_(True)
    train_only(model, students)
    assert model.config.fusion == students
    trainable = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {students} and frozen not in trainable


def test_both_students_train_by_default():
    model = make_model().requires_grad_(True)
    train_only(model, "clip,dinov3")
    assert model.config.fusion == "confidence" and all(p.requires_grad for p in model.parameters())
