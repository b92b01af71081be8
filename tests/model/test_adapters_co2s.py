"""Adapters: the file that is saved with them, and the model after a failed load or add.

`tests/training/test_lora.py` tests training, loading, switching and merging.
"""

import json
import shutil

import pytest
import torch
from helpers import make_model, save_checkpoint
from peft import LoraConfig

from co2s_hf import Co2SForSemanticSegmentation


CLASSES = {"Feld": ["field"], "Wald": ["forest"], "Fluß": ["river"], "Weg": ["track"]}


def lora_config(**kwargs):
    settings = {
        "r": 2,
        "target_modules": ["self_attn.v_proj", "attention.v_proj"],
        "modules_to_save": ["clip.guidance", "dinov3.guidance"],
        "init_lora_weights": False,  # so that the adapter changes the logits
    }
    return LoraConfig(**{**settings, **kwargs})


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    save_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory, base_folder):
    """An adapter for four classes; the base has three."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model = Co2SForSemanticSegmentation.from_pretrained(base_folder)
    torch.manual_seed(1)
    model.set_class_concepts(CLASSES, torch.randn(4, 12))
    model.add_adapter(lora_config())
    model.save_pretrained(folder)
    return folder


def predict(model, images):
    with torch.no_grad():
        return model.eval()(images).logits


def load(base_folder, adapter_folder):
    model = Co2SForSemanticSegmentation.from_pretrained(base_folder)
    model.load_adapter(adapter_folder, adapter_name="four")
    return model


def wrong_adapter(adapter_folder, folder):
    """Copy the adapter, with weights that fit no layer."""
    folder.mkdir()
    for name in ("adapter_config.json", "co2s_adapter.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((adapter_folder / name).read_bytes())
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text(encoding="utf-8")) | {"r": 3}  # the weights have rank 2
    path.write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_adapter_file_has_the_classes_and_the_sizes_of_the_base(adapter_folder):
    content = json.loads((adapter_folder / "co2s_adapter.json").read_text(encoding="utf-8"))
    assert content["config"]["id2label"] == {str(n): label for n, label in enumerate(CLASSES)}
    assert content["config"]["class_concepts"] == CLASSES and content["config"]["fusion"] == "clip"
    assert content["base"]["clip_config.patch_size"] == 4 and content["base"]["dinov3_config.patch_size"] == 8
    assert content["base"]["decoder_up_channels"] == [8, 8]


@pytest.mark.parametrize("is_active", [True, False], ids=["active", "disabled"])
@pytest.mark.parametrize("failure", ["load", "other base", "add"])
def test_failed_adapter_leaves_an_earlier_one_as_it_was(
    is_active, failure, base_folder, adapter_folder, images, tmp_path
):
    model = load(base_folder, adapter_folder)
    if not is_active:
        model.disable_adapters()
    expected, labels, names = predict(model, images), model.config.id2label, set(model.state_dict())
    assert expected.shape[1] == (4 if is_active else 3)
    folder = wrong_adapter(adapter_folder, tmp_path / "wrong")
    if failure == "other base":
        content = json.loads((folder / "co2s_adapter.json").read_text(encoding="utf-8"))
        content["base"]["decoder_channels"] = 32
        (folder / "co2s_adapter.json").write_text(json.dumps(content), encoding="utf-8")
    message = {
        "load": "size mismatch",
        "other base": "`decoder_channels` is 32 there and 16 here",
        "add": "No modules",
    }
    with pytest.raises(ValueError, match=message[failure]):
        if failure == "add":
            model.add_adapter(lora_config(target_modules=["no_layer"]), adapter_name="new")
        else:
            model.load_adapter(folder, adapter_name="new")
    assert torch.equal(predict(model, images), expected)
    assert model.config.id2label == labels and set(model.state_dict()) == names
    assert set(model.peft_config) == {"four"} and model.active_adapters() == ["four"]
    model.enable_adapters()
    assert predict(model, images).shape[1] == 4
    model.load_adapter(adapter_folder, adapter_name="new")  # the name is free
    assert torch.equal(predict(model, images), predict(load(base_folder, adapter_folder), images))


def test_failed_first_adapter_leaves_a_plain_model(adapter_folder, images, tmp_path):
    model = make_model()
    expected, names = predict(model, images), set(model.state_dict())
    with pytest.raises(ValueError, match=r"does not fit this model: .*size mismatch"):
        model.load_adapter(wrong_adapter(adapter_folder, tmp_path / "wrong"))
    assert torch.equal(predict(model, images), expected) and set(model.state_dict()) == names
    assert not hasattr(model, "peft_config") and model.config.id2label == make_model().config.id2label


def test_an_adapter_has_its_own_temperatures(base_folder, tmp_path):
    model = Co2SForSemanticSegmentation.from_pretrained(base_folder)
    model.add_adapter(lora_config())
    model.config.clip_temperature = 1.7
    model.save_pretrained(tmp_path / "adapter")
    model = load(base_folder, tmp_path / "adapter")
    assert (model.config.clip_temperature, model.config.dinov3_temperature) == (1.7, 1.0)
    model.disable_adapters()
    assert model.config.clip_temperature == 1.0


def test_an_adapter_of_an_earlier_version_has_temperatures_of_1(base_folder, adapter_folder, tmp_path):
    shutil.copytree(adapter_folder, tmp_path / "old")
    path = tmp_path / "old" / "co2s_adapter.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["config"]["clip_temperature"], content["config"]["dinov3_temperature"]
    path.write_text(json.dumps(content), encoding="utf-8")
    base = Co2SForSemanticSegmentation.from_pretrained(base_folder, dinov3_temperature=3.0)
    base.load_adapter(tmp_path / "old")
    assert (base.config.clip_temperature, base.config.dinov3_temperature) == (1.0, 1.0)


def test_unknown_names_are_refused(base_folder, adapter_folder):
    model = load(base_folder, adapter_folder)
    with pytest.raises(ValueError, match="There is no adapter 'five'; loaded: four"):
        model.set_adapter("five")
    with pytest.raises(ValueError, match="There is no adapter 'five' to delete; loaded: four"):
        model.delete_adapter("five")
