"""The authors' checkpoints are converted to a model and back without changing a bit."""

import re
import shutil

import pytest
import torch
from helpers import make_config, make_model
from local_hub import Blob
from safetensors.torch import load_file

from co2s_hf import Co2SForSemanticSegmentation, Co2SImageProcessor
from co2s_hf.hub.convert_co2s_to_hf import (
    CHECKPOINT_NAMES,
    convert,
    convert_to_original,
    download_originals,
    load_original,
    verify,
)
from co2s_hf.utils.errors import UserError


def test_converted_model_has_the_authors_weights_and_the_benchmark_classes(converted_folder, original_checkpoints):
    assert verify(converted_folder, original_checkpoints["clip"], original_checkpoints["dinov3"]) == 465
    config = Co2SForSemanticSegmentation.from_pretrained(converted_folder).config
    assert list(config.id2label.values()) == ["building", "road", "pavement", "vegetation", "bare soil", "water"]
    assert config.class_concepts["water"][0] == "water" and len(config.class_concepts["water"]) == 7
    assert config.palette[1] == [255, 255, 0]
    assert config.clip_config.hidden_act == "gelu" and config.clip_image_mean == config.image_mean
    assert Co2SImageProcessor.from_pretrained(converted_folder).do_resize is False


def store(hub, name, files):
    """Put files into the main branch of a new repository."""
    repository = hub.create("model", name)
    repository.commit("main", {path: Blob(content, is_large=True) for path, content in files.items()}, "checkpoints")


def test_checkpoints_are_downloaded_from_a_folder_of_a_repository(hub, original_checkpoints):
    contents = {path.name: path.read_bytes() for path in original_checkpoints.values()}
    store(hub, "someone/models", {f"WHDLD/1_24/{name}": content for name, content in contents.items()})
    store(hub, "someone/whdld", contents)
    for name, folder in (("models", "WHDLD/1_24"), ("models", "/WHDLD/1_24/"), ("whdld", "")):
        paths = download_originals(f"someone/{name}", folder)
        assert paths.keys() == original_checkpoints.keys()
        for student, path in paths.items():
            assert path.name == CHECKPOINT_NAMES[student]
            assert path.read_bytes() == original_checkpoints[student].read_bytes()


def test_failed_downloads_name_the_file_and_the_repository(hub, original_checkpoints):
    store(hub, "someone/half", {"WHDLD/best_clip.pth": original_checkpoints["clip"].read_bytes()})
    with pytest.raises(UserError, match=r"'WHDLD/best_dinov3.pth' of the repository 'someone/half' could not be"):
        download_originals("someone/half", "WHDLD")
    with pytest.raises(UserError, match=r"'best_clip.pth' of the repository 'someone/nothing' could not be"):
        download_originals("someone/nothing")
    with pytest.raises(UserError, match=r"of the repository 'no/such/name' could not be downloaded"):
        download_originals("no/such/name")


def test_sizes_are_read_from_the_weights(converted_folder):
    config = Co2SForSemanticSegmentation.from_pretrained(converted_folder).config
    assert (config.clip_temperature, config.dinov3_temperature) == (1.0, 1.0)
    clip, dinov3 = config.clip_config, config.dinov3_config
    assert (clip.hidden_size, clip.intermediate_size, clip.num_hidden_layers, clip.patch_size) == (16, 64, 12, 16)
    assert (clip.image_size, clip.projection_dim, dinov3.num_register_tokens) == (64, 512, 4)
    assert (config.decoder_channels, config.decoder_guidance_channels, config.decoder_mlp_ratio) == (32, 32, 4)
    assert (config.decoder_skip_channels, config.decoder_up_channels) == ([16, 8], [32, 16])


def test_conversion_back_is_bit_equal(converted_folder, original_checkpoints, tmp_path):
    convert_to_original(converted_folder, tmp_path / "back")
    for student, source in original_checkpoints.items():
        file = tmp_path / "back" / CHECKPOINT_NAMES[student]
        assert all(key.startswith("module.") for key in torch.load(file, weights_only=True)["model"])
        expected, found = load_original(source, student), load_original(file, student)
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            if key.endswith("attn.qkv.bias"):  # the authors' code masks out key biases; they come back as zeros
                tensor = tensor * expected[key + "_mask"]
            assert torch.equal(tensor, found[key]), key


def test_conversion_back_and_again_is_bit_equal(converted_folder, parity_sizes, tmp_path):
    convert_to_original(converted_folder, tmp_path / "back")
    paths = [tmp_path / "back" / name for name in CHECKPOINT_NAMES.values()]
    again = convert(*paths, tmp_path / "again", "whdld", **parity_sizes)
    for name, tensor in Co2SForSemanticSegmentation.from_pretrained(converted_folder).state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def write_changed(source, target, change):
    """Write a copy of a checkpoint after a change to its weights."""
    checkpoint = torch.load(source, weights_only=True)
    change(checkpoint["model"])
    torch.save(checkpoint, target)
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("module.decode_head.head.bias"), "Missing (1): ['decode_head.head.bias']"),
        (lambda weights: weights.update({"module.extra": torch.zeros(1)}), "Unexpected (1): ['extra']"),
        (lambda weights: weights.pop("module.backbone.pos_embed"), "has no 'backbone.pos_embed'"),
        (
            lambda weights: weights.update({"module._cached_text": torch.zeros(5, 512)}),
            "'_cached_text' has the shape (5, 512), which does not give (6, 512)",
        ),
    ],
)
def test_wrong_keys_and_shapes_are_listed(change, message, original_checkpoints, parity_sizes, tmp_path):
    broken = write_changed(original_checkpoints["clip"], tmp_path / "best_clip.pth", change)
    with pytest.raises(UserError, match=re.escape(message)):
        convert(broken, original_checkpoints["dinov3"], tmp_path / "model", "whdld", **parity_sizes)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w["module.backbone.rope_embed.periods"].mul_(3),
            "'backbone.rope_embed.periods' differs from the constant",
        ),
        (
            lambda w: w["module.backbone.blocks.3.attn.qkv.bias_mask"].fill_(1),
            "'backbone.blocks.3.attn.qkv.bias_mask' differs from the constant",
        ),
        (
            lambda w: w.update({"module.decode_head.text_proj.0.weight": torch.zeros(16, 32)}),
            "'decode_head.text_proj.0.weight' has the shape (16, 32)",
        ),
    ],
)
def test_dropped_constants_and_shapes_are_checked(change, message, original_checkpoints, parity_sizes, tmp_path):
    broken = write_changed(original_checkpoints["dinov3"], tmp_path / "best_dinov3.pth", change)
    with pytest.raises(UserError, match=re.escape(message)):
        convert(original_checkpoints["clip"], broken, tmp_path / "model", "whdld", **parity_sizes)


def test_models_with_other_settings_than_the_authors_are_not_converted_back(converted_folder, tmp_path):
    model = Co2SForSemanticSegmentation.from_pretrained(converted_folder)
    model.config.clip_config.hidden_act = "quick_gelu"
    model.config.dinov3_logits_size = None
    model.save_pretrained(tmp_path / "model")
    differing = "dinov3_logits_size is None (authors: 256); clip_config.hidden_act is quick_gelu (authors: gelu)"
    with pytest.raises(UserError, match=re.escape(f": {differing}. Only models")):
        convert_to_original(tmp_path / "model", tmp_path / "back")
    make_model(dinov3_config={**make_config().dinov3_config.to_dict(), "key_bias": True}).save_pretrained(
        tmp_path / "own"
    )
    with pytest.raises(UserError, match=r"no place for 3 weights of this model, such as .*k_proj.bias"):
        convert_to_original(tmp_path / "own", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_exchanged_files_are_refused(original_checkpoints, parity_sizes, tmp_path):
    with pytest.raises(UserError, match=r"The clip checkpoint has no .* Expected the authors' best_clip.pth\."):
        convert(original_checkpoints["dinov3"], original_checkpoints["clip"], tmp_path / "m", "whdld", **parity_sizes)


class Payload:
    """An object of a hostile checkpoint: unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_files_that_would_run_code_are_refused(tmp_path):
    torch.save({"model": {"module.x": Payload(str(tmp_path / "harm"))}}, tmp_path / "best_clip.pth")
    with pytest.raises(UserError, match=r"best_clip.pth' \(.* is not a PyTorch checkpoint of plain tensors"):
        load_original(tmp_path / "best_clip.pth", "clip")
    assert not (tmp_path / "harm").exists()
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1", encoding="utf-8")
    with pytest.raises(UserError, match=r"starting with b'version https://git-lfs.*a Git LFS pointer"):
        load_original(tmp_path / "pointer.pth", "clip")
    torch.save({"weights": {}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other.pth' holds \['weights'\]. Expected the authors' best_clip.pth"):
        load_original(tmp_path / "other.pth", "clip")


def test_missing_files_and_unknown_benchmarks_are_refused(original_checkpoints, tmp_path):
    clip, dinov3 = original_checkpoints["clip"], original_checkpoints["dinov3"]
    with pytest.raises(UserError, match=r"nowhere.pth' is not a file. Expected the authors' best_dinov3.pth"):
        convert(clip, tmp_path / "nowhere.pth", tmp_path / "model", "whdld")
    with pytest.raises(UserError, match=r"`dataset` is 'WHDLD'; expected one of gid, loveda, .*whdld"):
        convert(clip, dinov3, tmp_path / "model", "WHDLD")


def test_verify_finds_a_changed_weight(converted_folder, original_checkpoints, tmp_path):
    def change(weights):
        weights["module.decode_head.head.bias"] += 1e-6

    changed = write_changed(original_checkpoints["dinov3"], tmp_path / "best_dinov3.pth", change)
    with pytest.raises(UserError, match=r"'decode_head.head.bias' of .*best_dinov3.pth differs"):
        verify(converted_folder, original_checkpoints["clip"], changed)


def test_existing_output_is_not_overwritten(converted_folder, original_checkpoints, parity_sizes):
    before = (converted_folder / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="already exists"):
        convert(
            original_checkpoints["clip"], original_checkpoints["dinov3"], converted_folder, "whdld", **parity_sizes
        )
    assert (converted_folder / "model.safetensors").read_bytes() == before


def test_a_model_of_an_earlier_version_is_converted_back(converted_folder, original_checkpoints, tmp_path):
    """Its file has other names for the weights of DINOv3's layers."""
    model = Co2SForSemanticSegmentation.from_pretrained(converted_folder)
    model.save_pretrained(tmp_path / "old", save_original_format=True)
    assert any(".vision_model.layer." in name for name in load_file(tmp_path / "old" / "model.safetensors"))
    convert_to_original(tmp_path / "old", tmp_path / "back")
    for student, name in CHECKPOINT_NAMES.items():
        expected, found = (
            load_original(path, student) for path in (original_checkpoints[student], tmp_path / "back" / name)
        )
        same = [torch.equal(found[key], value) for key, value in expected.items() if not key.endswith("qkv.bias")]
        assert found.keys() >= expected.keys() - {"backbone.rope_embed.periods"} and all(same) and len(same) > 50


def test_damaged_files_are_refused_at_every_place(tmp_path):
    """Each damage makes torch raise another type of error."""
    torch.save({"model": {f"module.{n}": torch.ones(2) for n in range(3)}}, tmp_path / "good.pth")
    content = (tmp_path / "good.pth").read_bytes()
    refused = set()
    for place in range(0, len(content), 7):
        for damaged in (content[:place], content[:place] + bytes([content[place] ^ 0x86]) + content[place + 1 :]):
            (tmp_path / "bad.pth").write_bytes(damaged)
            try:
                load_original(tmp_path / "bad.pth", "clip")
            except UserError as error:
                refused.add(type(error.__cause__).__name__)
    assert {"RuntimeError", "UnpicklingError", "UnicodeDecodeError"} <= refused


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"module.x": 5}, r"holds 'module.x' under 'model', which is not a name with a tensor"),
        ({7: torch.ones(1)}, r"holds '7' under 'model', which is not a name with a tensor"),
        (
            {"module.x": torch.tensor([1.0, torch.nan])},
            r"'module.x' of .*best_clip.pth' contains NaN or infinite values",
        ),
    ],
)
def test_files_with_other_values_than_finite_tensors_are_refused(weights, message, tmp_path):
    torch.save({"model": weights}, tmp_path / "best_clip.pth")
    with pytest.raises(UserError, match=message):
        load_original(tmp_path / "best_clip.pth", "clip")


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("module.backbone.patch_embed.projection.weight", (4,)),
        ("module.backbone.pos_embed", (3,)),
        ("module.decode_head.conv1.weight", (0, 1, 7, 7)),
    ],
)
def test_shapes_of_other_models_are_refused(key, shape, original_checkpoints, parity_sizes, tmp_path):
    def change(weights):
        weights[key] = torch.zeros(shape)

    broken = write_changed(original_checkpoints["clip"], tmp_path / "best_clip.pth", change)
    with pytest.raises(UserError, match=r"The shapes of the weights are not those of the authors' models: "):
        convert(broken, original_checkpoints["dinov3"], tmp_path / "model", "whdld", **parity_sizes)
    assert not (tmp_path / "model").exists()


def test_models_that_do_not_load_are_not_converted_back(converted_folder, tmp_path):
    shutil.copytree(converted_folder, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model' cannot be loaded; expected the folder of a model of this package"):
        convert_to_original(tmp_path / "model", tmp_path / "back")
    assert not (tmp_path / "back").exists()
