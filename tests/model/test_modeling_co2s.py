"""The model: parity with the authors' code, fusion, loss, loading, training, classes, and refused inputs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import load_parity, make_config, make_model, save_checkpoint
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model
from pretended_devices import PretendedDevices, place
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSemanticSegmentation, CLIPVisionModel, DINOv3ViTModel, Trainer, TrainingArguments

from co2s_hf import Co2SConfig, Co2SForSemanticSegmentation
from co2s_hf.model.modeling_co2s import (
    Co2SSharedConv2d,
    Co2STrimmedConv2d,
    calibrate_and_fuse,
    fuse_logits,
    semantic_cross_entropy,
)


@pytest.mark.parametrize("student", ["clip", "dinov3"])
def test_converted_students_have_the_authors_features_and_logits(student, converted_folder):
    expected = load_parity(f"{student}_student")
    model = Co2SForSemanticSegmentation.from_pretrained(converted_folder)
    encoder = getattr(model, student).encoder
    with torch.no_grad():
        features = encoder.features(encoder.tapped_states(expected["input"]), grid=(4, 4))
        logits = model(expected["input"], fusion=student).logits
    for index, feature in enumerate(features):
        torch.testing.assert_close(feature, expected[f"features.{index}"], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)


def test_parameter_counts_are_those_of_the_paper():
    with torch.device("meta"):
        model = Co2SForSemanticSegmentation(Co2SConfig(num_labels=6)).freeze_backbones()
    millions = {}
    for name in ("clip", "dinov3"):
        parameters = list(getattr(model, name).parameters())
        trainable = [p for p in parameters if p.requires_grad]
        millions[name] = tuple(round(sum(p.numel() for p in group) / 1e6, 1) for group in (parameters, trainable))
    assert millions == {"clip": (88.4, 30.6), "dinov3": (87.9, 30.6)}


def test_backbones_are_classes_of_transformers(model):
    assert type(model.clip.encoder.vision_model) is CLIPVisionModel
    assert type(model.dinov3.encoder.vision_model) is DINOv3ViTModel


def test_fusion_rules(model, images):
    with torch.no_grad():
        outputs = {fusion: model(images, fusion=fusion) for fusion in ("confidence", "average", "clip", "dinov3")}
    clip, dinov3 = outputs["confidence"].clip_logits, outputs["confidence"].dinov3_logits
    p_clip, p_dinov3 = clip.softmax(1), dinov3.softmax(1)
    take_clip = (p_clip.amax(1) >= p_dinov3.amax(1)).unsqueeze(1)
    assert take_clip.any() and not take_clip.all()
    assert torch.equal(outputs["confidence"].logits, torch.where(take_clip, clip, dinov3))
    torch.testing.assert_close(outputs["average"].logits.softmax(1), (p_clip + p_dinov3) / 2)
    assert torch.equal(outputs["clip"].logits, clip) and outputs["clip"].dinov3_logits is None
    assert torch.equal(outputs["dinov3"].logits, dinov3) and outputs["dinov3"].clip_logits is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_confidence_fusion_is_exact_for_large_and_for_close_logits(dtype):
    # In each pair the second student is more confident. In the first two, both probabilities round to 1. In the last,
    # they nearly agree.
    pairs = [((30, 0), (0, 80)), ((100, 86), (85, 100)), ((0.5, -3), (-3.25, 0.5))]
    for clip, dinov3 in pairs:
        clip, dinov3 = (torch.tensor(x, dtype=dtype).view(1, 2, 1, 1) for x in (clip, dinov3))
        assert torch.equal(fuse_logits(clip, dinov3), dinov3)
    tie = torch.tensor([1.0, 0.0], dtype=dtype).view(1, 2, 1, 1)
    assert torch.equal(fuse_logits(tie, tie.flip(1)), tie)  # CLIP at a tie
    with pytest.raises(ValueError, match="`fusion` is 'clip'; choose 'confidence' or 'average'"):
        fuse_logits(tie, tie, "clip")


def test_the_fusion_divides_logits_by_temperatures(images):
    model = make_model(clip_temperature=0.25, dinov3_temperature=3)
    with torch.no_grad():
        outputs = {fusion: model(images, fusion=fusion) for fusion in ("confidence", "average", "clip", "dinov3")}
        raw = model.student_logits(images)
    assert torch.equal(outputs["confidence"].clip_logits, raw["clip"])
    assert torch.equal(outputs["confidence"].dinov3_logits, raw["dinov3"])
    clip, dinov3 = raw["clip"] / 0.25, raw["dinov3"] / 3
    p_clip, p_dinov3 = clip.softmax(1), dinov3.softmax(1)
    take_clip = (p_clip.amax(1) >= p_dinov3.amax(1)).unsqueeze(1)
    before = raw["clip"].softmax(1).amax(1) >= raw["dinov3"].softmax(1).amax(1)
    assert take_clip.sum() > before.sum()  # CLIP is now more confident, DINOv3 less
    assert torch.equal(outputs["confidence"].logits, torch.where(take_clip, clip, dinov3))
    torch.testing.assert_close(outputs["average"].logits.softmax(1), (p_clip + p_dinov3) / 2)
    assert torch.equal(outputs["clip"].logits, clip) and torch.equal(outputs["dinov3"].logits, dinov3)
    # The loss does not use temperatures.
    labels = torch.zeros(2, 16, 24, dtype=torch.long)
    assert torch.equal(model(images, labels=labels).loss, make_model()(images, labels=labels).loss)


@pytest.mark.parametrize("fusion", ["confidence", "average", "clip", "dinov3"])
def test_temperatures_of_one_add_no_operation(fusion):
    raw = {name: torch.randn(1, 3, 4, 4, dtype=torch.bfloat16) for name in ("clip", "dinov3")}
    found = calibrate_and_fuse(raw, make_config(fusion=fusion))
    if fusion in raw:
        assert found is raw[fusion]
    else:
        assert torch.equal(found, fuse_logits(raw["clip"], raw["dinov3"], fusion))


def test_a_saved_model_keeps_its_temperatures(images, tmp_path):
    model = make_model(clip_temperature=1.7, dinov3_temperature=0.8)
    model.save_pretrained(tmp_path)
    loaded = Co2SForSemanticSegmentation.from_pretrained(tmp_path)
    assert (loaded.config.clip_temperature, loaded.config.dinov3_temperature) == (1.7, 0.8)
    assert torch.equal(loaded(images).logits, model(images).logits)
    loaded.config.clip_temperature = loaded.config.dinov3_temperature = 1.0
    assert torch.equal(loaded(images).logits, make_model()(images).logits)


def test_fusion_of_the_config_is_the_default_and_skips_the_other_student(images):
    model = make_model(fusion="clip")
    model.dinov3.forward = None  # a call would fail
    assert torch.equal(model(images).logits, model(images, fusion="clip").clip_logits)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 5), (16, 24), (33, 17)])
def test_images_of_any_size_are_padded_and_the_logits_cropped(model, size):
    image = torch.randn(1, 3, *size)
    for student, patch in (("clip", 4), ("dinov3", 8)):
        padded = F.pad(image, (0, -size[1] % patch, 0, -size[0] % patch), mode="replicate")  # whole patches
        with torch.no_grad():
            found, expected = (model(pixels, fusion=student).logits for pixels in (image, padded))
        assert found.shape == (1, 3, *size) and found.isfinite().all()
        assert torch.equal(found, expected[..., : size[0], : size[1]])


def test_loss_is_the_sum_of_both_cross_entropies_over_pixels_that_count(model, images):
    labels = torch.randint(3, (2, 16, 24))
    labels[:, :8] = 255
    outputs = model(images, labels=labels)
    expected = sum(F.cross_entropy(x[:, :, 8:], labels[:, 8:]) for x in (outputs.clip_logits, outputs.dinov3_logits))
    torch.testing.assert_close(outputs.loss, expected)
    single = model(images, labels=labels, fusion="clip")
    torch.testing.assert_close(single.loss, F.cross_entropy(single.logits[:, :, 8:], labels[:, 8:]))
    assert torch.equal(model(images, labels=labels, return_dict=False)[0], outputs.loss)


@pytest.mark.parametrize("ignore_index", [255, -100, 3, 1000])
def test_the_loss_leaves_out_the_label_of_the_configuration(images, ignore_index):
    labels = torch.randint(3, (2, 16, 24), generator=torch.Generator().manual_seed(2))
    left_out = torch.rand(2, 16, 24, generator=torch.Generator().manual_seed(3)) < 0.3
    model = make_model(semantic_loss_ignore_index=ignore_index)
    outputs = model(images, labels=labels.where(~left_out, ignore_index))
    students = (outputs.clip_logits, outputs.dinov3_logits)
    expected = sum(F.cross_entropy(x.movedim(1, -1)[~left_out], labels[~left_out]) for x in students)
    torch.testing.assert_close(outputs.loss, expected)


def test_loss_of_ignored_pixels_alone_is_zero_with_zero_gradients():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = semantic_cross_entropy(logits, torch.full((1, 4, 4), 255), ignore_index=255)
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_each_backbone_gets_images_with_its_own_statistics(model):
    raw = torch.rand(1, 3, 8, 8)

    def normalized(mean, std):
        return (raw - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)

    config = model.config
    pixel_values = normalized(config.image_mean, config.image_std)
    expected = normalized(config.clip_image_mean, config.clip_image_std)
    torch.testing.assert_close(model.clip._prepare(pixel_values), expected, atol=1e-6, rtol=1e-5)
    assert model.dinov3._prepare(pixel_values) is pixel_values  # the same statistics: nothing to compute
    satellite = make_model(dinov3_image_mean=[0.430, 0.411, 0.296], dinov3_image_std=[0.213, 0.156, 0.143])
    expected = normalized([0.430, 0.411, 0.296], [0.213, 0.156, 0.143])
    torch.testing.assert_close(satellite.dinov3._prepare(pixel_values), expected, atol=1e-6, rtol=1e-5)


def test_one_pass_computes_several_views_and_perturbed_features(model, images):
    with torch.no_grad():
        alone = model.student_logits(images)
        together = model.student_logits(torch.cat([images, images.flip(-1)]), perturbed_samples=slice(0, 2))
        undropped = model.student_logits(images, perturbed_samples=torch.tensor([1]), perturb=torch.clone)
        all_dropped = model.student_logits(images, perturbed_samples=slice(0, 2), perturb=torch.zeros_like)
    for name in ("clip", "dinov3"):
        torch.testing.assert_close(together[name][:2], alone[name])
        assert not torch.allclose(together[name][4:], alone[name], atol=1e-3)
        torch.testing.assert_close(undropped[name][2:], alone[name][1:])
        # Without features all images have the same logits.
        torch.testing.assert_close(all_dropped[name][2], all_dropped[name][3])


def test_unknown_students_are_refused(model, images):
    with pytest.raises(ValueError, match="`students` contains \\['c', 'l', 'i', 'p'\\]"):
        model.student_logits(images, students="clip")


def test_trimmed_convolution_equals_the_whole_one():
    layer = Co2STrimmedConv2d(4, 4, kernel_size=3, padding=6, dilation=6)
    for height, width in ((6, 20), (20, 5), (3, 3), (7, 7)):
        maps = torch.randn(1, 4, height, width)
        torch.testing.assert_close(layer(maps), torch.nn.Conv2d.forward(layer, maps))


def test_shared_convolution_equals_that_of_concatenated_maps():
    layer = Co2SSharedConv2d(6, 5, kernel_size=3, padding=1)
    maps, features = torch.randn(2 * 3, 4, 8, 8), torch.randn(2, 2, 8, 8)
    concatenated = torch.cat([maps, features.repeat_interleave(3, dim=0)], dim=1)
    expected = torch.nn.Conv2d.forward(layer, concatenated)
    torch.testing.assert_close(layer(maps, features), expected, atol=1e-5, rtol=1e-5)


def test_students_may_differ_in_width_depth_and_patch():
    clip = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 3}
    model = make_model(
        clip_config={**clip, "patch_size": 7, "image_size": 14, "projection_dim": 10}, clip_feature_layers=(1, 3, 5)
    )
    image = torch.randn(1, 3, 23, 30)
    padded = F.pad(image, (0, 5, 0, 5), mode="replicate")  # whole patches of 7 px
    with torch.no_grad():
        found, expected = (model(x, fusion="clip").logits for x in (image, padded))
        both = model(image)
    assert torch.equal(found, expected[..., :23, :30]) and found.isfinite().all()
    assert torch.equal(both.clip_logits, found)
    assert torch.equal(both.logits, fuse_logits(both.clip_logits, both.dinov3_logits))


def test_model_with_weights_offloaded_to_disk_agrees(model, images, tmp_path):
    model.save_pretrained(tmp_path / "model")
    offloaded = Co2SForSemanticSegmentation.from_pretrained(
        tmp_path / "model", device_map={"clip": "cpu", "dinov3": "disk"}, offload_folder=tmp_path / "offload"
    )
    torch.testing.assert_close(offloaded(images).logits, model(images).logits)


@pytest.mark.parametrize("fusion", ["confidence", "average"])
@pytest.mark.parametrize("devices", [("cuda:0", "cuda:1"), ("cuda:1", "cuda:0")])
def test_students_on_two_devices_are_fused_on_that_of_the_images(devices, fusion, model, images):
    labels = torch.arange(2 * 16 * 24).view(2, 16, 24) % 3
    changes = {"fusion": fusion, "clip_temperature": 2.0}
    expected = make_model(**changes)(images, labels=labels)
    with PretendedDevices():
        model = place(make_model(**changes), dict(zip(("clip", "dinov3"), devices)))
        found = model(images.to("cuda:0"), labels=labels.to("cuda:0"))
        alone = model.student_logits(images.to("cuda:0"))
        for name, value in expected.items():
            assert found[name].device == torch.device("cuda:0") and torch.equal(found[name], value)
        for name, value in alone.items():
            assert value.device == torch.device("cuda:0") and torch.equal(value, expected[f"{name}_logits"])


def test_lora_adapts_the_convolutions_of_the_decoder(model, images):
    targets = ["decoder.spatial_pyramid.branches.1.0", "decoder.upsampling_layers.0.refine.0"]
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    assert not torch.allclose(adapted(images).logits, model(images).logits, atol=1e-4)


def test_autocast_agrees(model, images):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model(images, fusion="average").logits
    with torch.no_grad():
        expected = model(images, fusion="average").logits
    assert (found.float().softmax(1) - expected.softmax(1)).abs().max() < 0.05


@pytest.mark.parametrize("shard_size", ["50GB", "20KB"])
def test_saved_and_loaded_model_is_bit_equal(model, images, tmp_path, shard_size):
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "20KB")
    expected = model(images).logits
    for loader in (Co2SForSemanticSegmentation, AutoModelForSemanticSegmentation):
        loaded, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        # The copy aligns the weights in memory as those of `model` are. Alignment changes the last bits of the logits.
        assert not loaded.training and torch.equal(copy.deepcopy(loaded)(images).logits, expected)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_loading_with_another_number_of_classes_changes_only_the_guidance(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, info = Co2SForSemanticSegmentation.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    changed = {key for key, *_ in info["mismatched_keys"]}
    assert changed == {"clip.guidance.embeddings", "dinov3.guidance.queries"}
    assert torch.equal(loaded.clip.decoder.head.weight, model.clip.decoder.head.weight)
    embeddings = loaded.clip.guidance.embeddings
    torch.testing.assert_close(embeddings @ embeddings.T, torch.eye(5), atol=1e-5, rtol=0)
    # 80 draws of N(0, 0.02): the mean and the standard deviation lie well within these limits.
    queries = loaded.dinov3.guidance.queries
    assert 0.01 < queries.std() < 0.04 and queries.mean().abs() < 0.01 and queries.unique().numel() == queries.numel()
    logits = loaded(torch.randn(1, 3, 8, 8)).logits
    assert logits.shape == (1, 5, 8, 8) and logits.isfinite().all()


def test_loading_with_another_number_of_classes_works_in_half_precision(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = Co2SForSemanticSegmentation.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True, dtype=torch.bfloat16
    )
    embeddings = loaded.clip.guidance.embeddings
    assert embeddings.dtype == torch.bfloat16
    torch.testing.assert_close(embeddings.float() @ embeddings.float().T, torch.eye(5), atol=0.02, rtol=0)


def test_half_precision_agrees(model, images, tmp_path):
    model.save_pretrained(tmp_path)
    half = Co2SForSemanticSegmentation.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        found, expected = half(images, fusion="average").logits, model(images, fusion="average").logits
    assert found.dtype == torch.bfloat16
    assert (found.float().softmax(1) - expected.softmax(1)).abs().max() < 0.05


def test_attention_implementations_agree(model, images, tmp_path):
    model.save_pretrained(tmp_path)
    eager = Co2SForSemanticSegmentation.from_pretrained(tmp_path, attn_implementation="eager")
    sdpa = Co2SForSemanticSegmentation.from_pretrained(tmp_path, attn_implementation="sdpa")
    for name, loaded in (("eager", eager), ("sdpa", sdpa)):
        for student in (loaded.clip, loaded.dinov3):
            assert student.encoder.vision_model.config._attn_implementation == name
    torch.testing.assert_close(eager(images).logits, sdpa(images).logits, atol=1e-5, rtol=1e-5)


def test_hidden_states_and_attentions_are_those_of_transformers(model, images):
    with pytest.raises(ValueError, match="set_attn_implementation"):
        model(images, output_attentions=True)
    model.set_attn_implementation("eager")
    plain = model(images)
    outputs = model(images, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(outputs.logits, plain.logits)  # recording uses the forward of transformers
    assert plain.clip_hidden_states is None and plain.clip_attentions is None
    assert [s.shape for s in outputs.clip_hidden_states] == [(2, 1 + 24, 16)] * 4
    assert [s.shape for s in outputs.dinov3_hidden_states] == [(2, 1 + 2 + 6, 16)] * 4
    for attentions, tokens in ((outputs.clip_attentions, 25), (outputs.dinov3_attentions, 9)):
        assert [a.shape for a in attentions] == [(2, 4, tokens, tokens)] * 3
        torch.testing.assert_close(attentions[-1].sum(-1), torch.ones(2, 4, tokens))
    # CLIP's features are made of the inputs of layers 0, 1 and 2, DINOv3's of their outputs.
    clip_states = model.clip.encoder.tapped_states(model.clip._prepare(images))
    dinov3_states = model.dinov3.encoder.tapped_states(model.dinov3._prepare(images))
    pairs = [(outputs.clip_hidden_states[:3], clip_states), (outputs.dinov3_hidden_states[1:], dinov3_states)]
    for found, expected in pairs:
        assert len(found) == len(expected) == 3
        for state, expected_state in zip(found, expected):
            torch.testing.assert_close(state, expected_state)
    only_attentions = model(images, output_attentions=True)
    assert only_attentions.clip_hidden_states is None and only_attentions.clip_attentions is not None


@pytest.mark.parametrize(("selection", "kept"), [([0, 2], {0, 2}), (1, {1}), (0, {0}), ([-1, 2], {2, 3}), ([], set())])
def test_hidden_states_are_selected_by_index(model, images, selection, kept):
    with torch.no_grad():
        everything = model(images, output_hidden_states=True)
        found = model(images, output_hidden_states=selection)
        alone = model(images, fusion="dinov3", output_hidden_states=selection)
    assert torch.equal(found.logits, everything.logits) and alone.clip_hidden_states is None
    for outputs, name in ((found, "clip"), (found, "dinov3"), (alone, "dinov3")):
        states, expected = outputs[f"{name}_hidden_states"], everything[f"{name}_hidden_states"]
        assert len(states) == len(expected) == 4
        assert {index for index, state in enumerate(states) if state is not None} == kept
        assert all(torch.equal(states[index], expected[index]) for index in kept)


def test_a_backbone_leaves_out_hidden_states_that_it_does_not_have(images):
    config = make_config()
    model = make_model(dinov3_config={**config.dinov3_config.to_dict(), "num_hidden_layers": 5})
    with torch.no_grad():
        everything = model(images, output_hidden_states=True)
        found = model(images, output_hidden_states=[1, 5, -6])
    assert (len(everything.clip_hidden_states), len(everything.dinov3_hidden_states)) == (4, 6)
    assert [state is None for state in found.clip_hidden_states] == [True, False, True, True]
    assert torch.equal(found.clip_hidden_states[1], everything.clip_hidden_states[1])
    assert [state is None for state in found.dinov3_hidden_states] == [False, False, True, True, True, False]
    for index in (0, 1, 5):
        assert torch.equal(found.dinov3_hidden_states[index], everything.dinov3_hidden_states[index])
    with pytest.raises(ValueError, match=r"contains \[5, -6\]; expected True, False, or indices from -4 to 3"):
        model(images, fusion="clip", output_hidden_states=[1, 5, -6])


def test_every_computed_backbone_must_keep_its_attentions(model, images):
    model.set_attn_implementation({"": "eager"})  # the backbones still have sdpa, which keeps no attention weights
    with pytest.raises(ValueError, match="`attn_implementation='sdpa'` does not keep"):
        model(images, output_attentions=True)
    model.set_attn_implementation({"": "sdpa", "clip_config": "eager"})
    found = model(images, fusion="clip", output_attentions=True).clip_attentions
    with pytest.raises(ValueError, match="`attn_implementation='sdpa'` does not keep"):
        model(images, output_attentions=True)
    model.set_attn_implementation("eager")
    expected = model(images, output_attentions=True).clip_attentions
    assert len(found) == 3 and all(torch.equal(weights, other) for weights, other in zip(found, expected))


def _gradients(model, images):
    model.zero_grad()
    model(images, labels=torch.ones(2, 16, 24, dtype=torch.long)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_no_gradient(model, images):
    model.freeze_backbones("all").train()
    calls = []
    for student in (model.clip, model.dinov3):
        student.encoder.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(None))
    plain = _gradients(model, images)
    plain_calls = len(calls)
    model.activation_checkpointing_enable()
    checkpointed = _gradients(model, images)
    # The first layer of each backbone runs once more, in the backward pass.
    assert len(calls) - plain_calls == plain_calls + 2
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        assert torch.equal(plain[name], checkpointed[name]), name


def test_reentrant_checkpointing_above_frozen_embeddings_changes_no_gradient(model, images):
    model.freeze_backbones().train()
    plain = _gradients(model, images)
    model.activation_checkpointing_enable({"use_reentrant": True})
    checkpointed = _gradients(model, images)
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name], atol=1e-7, rtol=1e-4)


def test_all_trainable_parameters_get_gradients_except_two_projections(model, images):
    model.freeze_backbones("all").train()
    learning = {name for name, gradient in _gradients(model, images).items() if gradient.abs().sum() > 0}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    last = "clip.encoder.vision_model.encoder.layers.2."
    # CLIP's last feature layer uses only the value path, although the paper trains queries and keys, too.
    unused = {f"{last}self_attn.{part}_proj.{kind}" for part in "qk" for kind in ("weight", "bias")}
    assert trainable - learning == unused


def test_freeze_backbones_selects_parameters_by_name(model):
    def trainable():
        return {name for name, p in model.named_parameters() if p.requires_grad}

    everything = {name for name, _ in model.named_parameters()}
    encoders = {name for name in everything if ".encoder.vision_model." in name or ".visual_projection." in name}
    attention = {name for name in encoders if ".self_attn." in name or ".attention." in name}
    model.freeze_backbones()
    assert trainable() == (everything - encoders) | attention
    assert "dinov3.guidance.queries" in trainable() and len(attention) == 3 * (8 + 7)
    model.freeze_backbones("none")
    assert trainable() == everything - encoders
    model.freeze_backbones("all")
    assert everything - trainable() == {"dinov3.encoder.vision_model.embeddings.mask_token"}
    with pytest.raises(ValueError, match="`train` is 'some'"):
        model.freeze_backbones("some")


def test_training_mode_is_deterministic(model, images):
    model.train()  # with RoPE augmentation, two passes would differ
    assert torch.equal(model(images).logits, model(images).logits)


def test_compiled_model_agrees_and_has_no_graph_breaks(model, images):
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images).logits, model(images).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_exported_model_agrees_for_every_batch_size(model, images):
    batch_size = torch.export.Dim("batch_size", min=1, max=8)
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes={"pixel_values": {0: batch_size}}, strict=False)
        for batch in (images, images[:1], torch.randn(5, 3, 16, 24)):
            torch.testing.assert_close(program.module()(batch).logits, model(batch).logits, atol=1e-5, rtol=1e-5)


def test_trainer_of_transformers_trains_the_model(model, tmp_path):
    generator = torch.Generator().manual_seed(0)
    data = []
    for _ in range(8):
        labels = torch.randint(3, (1, 4, 4), generator=generator).repeat_interleave(4, 1).repeat_interleave(4, 2)[0]
        data.append({"pixel_values": F.one_hot(labels, 3).permute(2, 0, 1).float() * 4, "labels": labels})
    settings = TrainingArguments(
        str(tmp_path), max_steps=40, per_device_train_batch_size=8, learning_rate=5e-3, report_to=[], use_cpu=True,
        logging_steps=1, disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=data, eval_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.6 * losses[0]
    predictions = torch.from_numpy(trainer.predict(data).predictions)  # the fused logits alone
    with torch.no_grad():
        expected = model.eval()(torch.stack([sample["pixel_values"] for sample in data])).logits
    torch.testing.assert_close(predictions, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("pixel_values", "kwargs", "message"),
    [
        (torch.rand(3, 8, 8), {}, "expected \\(batch, 3, height, width\\)"),
        (torch.rand(1, 4, 8, 8), {}, "\\(1, 4, 8, 8\\)"),
        (torch.rand(1, 3, 0, 8), {}, "with no size of 0"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), {}, "torch.uint8; expected normalised"),
        (torch.rand(1, 3, 8, 8), {"fusion": "max"}, "`fusion` is 'max'"),
        (torch.rand(1, 3, 8, 8), {"labels": torch.zeros(1, 8, 9).long()}, "\\(1, 8, 9\\).*\\(1, 8, 8\\)"),
        (torch.rand(1, 3, 8, 8), {"output_hidden_states": [0, 4]}, "contains \\[4\\]; .*from -4 to 3"),
        (torch.rand(1, 3, 8, 8), {"output_hidden_states": ["last"]}, "contains \\['last'\\]; .*from -4 to 3"),
        (torch.rand(1, 3, 8, 8), {"output_attentions": [0, 2]}, "`output_attentions` is \\[0, 2\\]; expected True"),
    ],
)
def test_errors_name_the_wrong_input(model, pixel_values, kwargs, message):
    with pytest.raises(ValueError, match=message):
        model(pixel_values, **kwargs)


def test_changed_classes_keep_the_queries_of_known_names(model, images):
    before = copy.deepcopy(model)
    embeddings = F.normalize(torch.randn(2, 12), dim=-1)
    model.set_class_concepts({"water": ["water"], "roof": ["roof", "tiles"]}, text_embeddings=embeddings)
    assert model.config.id2label == {0: "water", 1: "roof"} and model.config.palette is None
    assert model.config.fusion == "clip"  # the query of "roof" is not trained
    assert torch.equal(model.dinov3.guidance.queries[0], before.dinov3.guidance.queries[2])
    assert torch.equal(model.clip.guidance.embeddings, embeddings)
    with torch.no_grad():
        logits = model(images).logits
        before.clip.guidance.embeddings = embeddings  # the only part of the CLIP student that should change
        expected = before(images, fusion="clip").logits
    assert logits.shape == (2, 2, 16, 24) and torch.equal(logits, expected)
    with pytest.raises(StrictDataclassError, match="class_concepts"):
        model.set_class_concepts({"a": "road", "b": "house"}, text_embeddings=embeddings)  # not lists of strings
    with pytest.raises(ValueError, match="text_encoder"):
        model.set_class_concepts({"a": ["a"], "b": ["b"]})
    with pytest.raises(ValueError, match=r"\(3, 12\).*\(2, 12\)"):
        model.set_class_concepts({"a": ["a"], "b": ["b"]}, text_embeddings=torch.randn(3, 12))
    assert model.config.id2label == {0: "water", 1: "roof"}  # refused changes leave the model as it was


def test_reordered_classes_reorder_the_logits_of_the_clip_student(images):
    model = make_model(fusion="clip")
    expected = model(images).logits
    order = [2, 0, 1]
    labels = [model.config.id2label[n] for n in order]
    model.set_class_concepts({label: [label] for label in labels}, model.clip.guidance.embeddings[order])
    torch.testing.assert_close(model(images).logits, expected[:, order], atol=1e-5, rtol=1e-5)


def spread(tensor: torch.Tensor) -> float:
    """Return the standard deviation of all values."""
    return tensor.detach().float().std().item()


def clips_own_spread(config) -> dict[str, float]:
    """Return the standard deviations that CLIP's initialisation has in transformers, by the end of the name."""
    width, depth = config.hidden_size, config.num_hidden_layers
    inner = width**-0.5 * (2 * depth) ** -0.5
    attention = {f"self_attn.{name}_proj.weight": inner for name in "qkv"}
    mlp = {"mlp.fc1.weight": (2 * width) ** -0.5, "mlp.fc2.weight": inner}
    embeddings = {"patch_embedding.weight": 0.02, "position_embedding.weight": 0.02}
    return {**attention, "self_attn.out_proj.weight": width**-0.5, **mlp, **embeddings}


WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
WIDE_CLIP = {"clip_config": {**WIDE, "patch_size": 4, "image_size": 32, "projection_dim": 48}}


def test_new_weights_have_the_spread_of_their_part():
    model = make_model(**WIDE_CLIP)
    expected = clips_own_spread(model.config.clip_config)
    for name, weight in model.clip.encoder.vision_model.named_parameters():
        for end in (end for end in expected if name.endswith(end)):
            assert spread(weight) == pytest.approx(expected[end], rel=0.05), name
    assert spread(model.clip.encoder.visual_projection.weight) == pytest.approx(64**-0.5, rel=0.05)
    # PyTorch's default is uniform up to 1 / sqrt(inputs), so its deviation is 1 / sqrt(3 inputs).
    projection = model.clip.decoder.spatial_pyramid.projection[0].weight
    assert spread(projection) == pytest.approx((3 * projection[0].numel()) ** -0.5, rel=0.1)
    assert spread(model.dinov3.encoder.layers[0].mlp.up_proj.weight) == pytest.approx(0.02, rel=0.1)


def test_missing_weights_of_clip_get_clips_own_initialisation(tmp_path):
    model = make_model(**WIDE_CLIP)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    layer = "clip.encoder.vision_model.encoder.layers.1."
    kept = {name: value for name, value in weights.items() if not name.startswith(layer) and "visual_proj" not in name}
    assert 10 < len(weights) - len(kept) < 20
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    torch.manual_seed(1)
    loaded, info = Co2SForSemanticSegmentation.from_pretrained(
        tmp_path, output_loading_info=True, ignore_mismatched_sizes=True
    )
    assert set(info["missing_keys"]) == set(weights) - set(kept)
    state = loaded.state_dict()
    assert all(torch.equal(state[name], value) for name, value in kept.items() if name in state)
    for end, expected in clips_own_spread(loaded.config.clip_config).items():
        if layer + end in weights:
            assert spread(state[layer + end]) == pytest.approx(expected, rel=0.05), end
    assert spread(loaded.clip.encoder.visual_projection.weight) == pytest.approx(64**-0.5, rel=0.05)


def test_loading_a_whole_model_draws_no_random_numbers(tmp_path):
    save_checkpoint(tmp_path)
    before = torch.manual_seed(3).get_state()
    Co2SForSemanticSegmentation.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
