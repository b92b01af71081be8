import shutil
from dataclasses import replace

import pytest
import torch
from helpers import make_model, open_folder
from safetensors.torch import load_file

from co2s_hf.data.reading import ImageRule
from co2s_hf.model.text_guidance_co2s import encode_class_concepts
from co2s_hf.training.models import build_model, repeat_released_quirks, seen_distance_m, tiny_model, train_only
from co2s_hf.training.options import TrainingOptions


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


def filled(**settings) -> TrainingOptions:
    options = TrainingOptions(**settings)
    options.fill(options.defaults)
    return options


def test_training_starts_from_the_shipped_backbones(stand_ins, scenes_folder):
    options, data = filled(), open_folder(scenes_folder)
    torch.manual_seed(0)
    model = build_model(options, data)
    weights = load_file(stand_ins / "co2s-tiny-dinov3" / "model.safetensors")
    expected = weights["embeddings.patch_embeddings.weight"].float()
    assert torch.equal(model.dinov3.encoder.vision_model.embeddings.patch_embeddings.weight, expected)
    expected = encode_class_concepts(data.class_concepts, "co2s-tiny-clip")
    assert torch.equal(model.clip.guidance.embeddings, expected)
    assert (model.config.text_encoder, model.config.class_concepts) == ("co2s-tiny-clip", data.class_concepts)
    assert (model.config.crop_size, model.config.palette, model.training) == (128, data.palette, True)
    # PyTorch draws the weights of the 7x7 convolution from -1/7 to 1/7. Those of DINOv3 start 8 times larger.
    largest = [s.decoder.similarity_projection.weight.abs().max() for s in (model.clip, model.dinov3)]
    assert 0.9 / 7 < largest[0] <= 1 / 7 and 7.2 / 7 < largest[1] <= 8 / 7
    assert model.clip.decoder.upsampling_layers[0].refine[0].weight.is_contiguous(memory_format=torch.channels_last)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["dinov3.encoder.vision_model.embeddings.mask_token"]


def test_a_model_from_scratch_is_the_tiny_model(scenes_folder):
    data = open_folder(scenes_folder)
    torch.manual_seed(3)
    model = build_model(filled(from_scratch=True), data)
    torch.manual_seed(3)
    tiny = tiny_model(id2label=data.id2label, palette=data.palette, class_concepts=data.class_concepts)
    assert model.config.text_encoder is None and model.config.crop_size == 64
    for name, value in tiny.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_classes_without_names_get_random_text_and_pretrained_backbones(stand_ins, scenes_folder, tmp_path):
    shutil.copytree(scenes_folder, tmp_path / "data")
    (tmp_path / "data" / "classes.json").unlink()
    data = open_folder(tmp_path / "data")
    assert data.class_concepts is None
    torch.manual_seed(0)
    model = build_model(filled(), data)
    embeddings = model.clip.guidance.embeddings
    torch.testing.assert_close(embeddings @ embeddings.T, torch.eye(len(data.id2label)), atol=1e-5, rtol=0)
    assert (model.config.text_encoder, model.config.class_concepts) == (None, None)
    weights = load_file(stand_ins / "co2s-tiny-clip" / "model.safetensors")
    expected = weights["visual_projection.weight"].float()
    assert torch.equal(model.clip.encoder.visual_projection.weight, expected)


def test_lora_updates_the_shipped_backbones(stand_ins, scenes_folder):
    model = build_model(filled(lora=True, lora_rank=2), open_folder(scenes_folder))
    trained = [name for name, p in model.named_parameters() if p.requires_grad and ".encoder." in name]
    assert trained and all("lora_" in name for name in trained)
    rank = model.clip.encoder.vision_model.encoder.layers[0].self_attn.q_proj.lora_A["default"].weight.shape[0]
    assert rank == 2


def test_the_distance_that_the_model_saw_is_that_after_base_size(scenes_folder):
    """The scenes have 48 x 48 pixels."""
    data = open_folder(scenes_folder)
    assert seen_distance_m(filled(), data) is None
    data = replace(data, ground_sampling_distance_m=0.3)
    assert seen_distance_m(filled(), data) == 0.3
    assert seen_distance_m(filled(base_size=[48, 24]), data) == pytest.approx(0.6)
    assert seen_distance_m(filled(base_size=[96, 96]), data) == pytest.approx(0.15)
    first, *others = data.scans["labeled"].images
    images = [replace(first, size=(480, 480)), *others]  # the median of three factors
    data = replace(data, scans=data.scans | {"labeled": replace(data.scans["labeled"], images=images)})
    assert seen_distance_m(filled(base_size=[48, 24]), data) == pytest.approx(0.6)


def test_the_model_stores_how_raw_images_are_read(scenes_folder):
    rule = ImageRule((4, 3, 2), ((0.0, 3000.0),))
    data = replace(open_folder(scenes_folder), ground_sampling_distance_m=0.3, read_rule=rule)
    config = build_model(filled(from_scratch=True, base_size=[48, 24]), data).config
    assert ImageRule.of_config(config) == rule and config.ground_sampling_distance_m == pytest.approx(0.6)
