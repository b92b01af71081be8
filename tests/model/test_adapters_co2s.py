"""Adapters: the file that is saved with them, and the model after a failed load or add.

`tests/training/test_lora.py` tests training, loading, switching and merging.
"""

import json
import shutil

import pytest
import torch
from helpers import make_model, save_checkpoint
from peft import LoraConfig
from safetensors.torch import load_file, save_file

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


def test_an_adapter_has_its_own_temperatures_and_distance(base_folder, tmp_path):
    model = Co2SForSemanticSegmentation.from_pretrained(base_folder)
    model.add_adapter(lora_config())
    model.config.clip_temperature, model.config.ground_sampling_distance_m = 1.7, 0.3
    model.save_pretrained(tmp_path / "adapter")
    model = load(base_folder, tmp_path / "adapter")
    assert (model.config.clip_temperature, model.config.dinov3_temperature) == (1.7, 1.0)
    assert model.config.ground_sampling_distance_m == 0.3
    model.disable_adapters()
    assert model.config.clip_temperature == 1.0 and model.config.ground_sampling_distance_m is None


def test_an_adapter_of_an_earlier_version_has_temperatures_of_1_and_no_distance(base_folder, adapter_folder, tmp_path):
    shutil.copytree(adapter_folder, tmp_path / "old")
    path = tmp_path / "old" / "co2s_adapter.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for name in ("clip_temperature", "dinov3_temperature", "ground_sampling_distance_m"):
        del content["config"][name]
    path.write_text(json.dumps(content), encoding="utf-8")
    own = {"dinov3_temperature": 3.0, "ground_sampling_distance_m": 0.3}
    base = Co2SForSemanticSegmentation.from_pretrained(base_folder, **own)
    base.load_adapter(tmp_path / "old")
    assert (base.config.clip_temperature, base.config.dinov3_temperature) == (1.0, 1.0)
    assert base.config.ground_sampling_distance_m is None


def test_unknown_names_are_refused(base_folder, adapter_folder):
    model = load(base_folder, adapter_folder)
    with pytest.raises(ValueError, match="There is no adapter 'five'; loaded: four"):
        model.set_adapter("five")
    with pytest.raises(ValueError, match="There is no adapter 'five' to delete; loaded: four"):
        model.delete_adapter("five")


def changed_adapter(adapter_folder, folder, name, change):
    """Copy the adapter, and change the content of one of its JSON files."""
    shutil.copytree(adapter_folder, folder)
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    change(content)
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def assert_refused(base_folder, folder, message, images):
    """Check that an adapter is refused, and that the model is then as before."""
    model = Co2SForSemanticSegmentation.from_pretrained(base_folder)
    expected, names, config = predict(model, images), set(model.state_dict()), model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        model.load_adapter(folder)
    assert torch.equal(predict(model, images), expected) and set(model.state_dict()) == names
    assert model.config.to_dict() == config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("palette", [[1, 2, 3]], r"co2s_adapter.json of the adapter .* `palette` has 1 colours for 4 classes"),
        ("clip_temperature", 0.0, r"`clip_temperature` is 0.0; it must be a finite number above 0"),
        ("fusion", "best", r"`fusion` is 'best'; choose one of"),
        ("image_scale", [[0, float("nan")]], r"`image_scale` is \[\[0, nan\]\]; expected pairs"),
        ("crop_size", "large", r"Field 'crop_size'.*large"),
        ("class_concepts", {"Feld": ["field"]}, r"`class_concepts` describes \['Feld'\]"),
        ("id2label", {"0": "a", "1": "a", "2": "b", "3": "c"}, r"`id2label` names a class twice"),
        ("id2label", "Feld", r"co2s_adapter.json of the adapter .* is damaged"),
    ],
)
def test_fields_of_an_adapter_are_validated(base_folder, adapter_folder, tmp_path, images, field, value, message):
    def change(content):
        content["config"][field] = value

    folder = changed_adapter(adapter_folder, tmp_path / "changed", "co2s_adapter.json", change)
    assert_refused(base_folder, folder, f"(?s){message}", images)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"config": {}, "base": {}}', '{"config": 1, "base": {}}', "{"], ids=str
)
def test_damaged_adapter_files_are_refused(base_folder, adapter_folder, tmp_path, images, text):
    shutil.copytree(adapter_folder, tmp_path / "damaged")
    (tmp_path / "damaged" / "co2s_adapter.json").write_text(text, encoding="utf-8")
    assert_refused(base_folder, tmp_path / "damaged", r"co2s_adapter.json of the adapter .* is damaged \(", images)


VALUE_UPDATE = "base_model.model.dinov3.encoder.vision_model.model.layer.0.attention.v_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(VALUE_UPDATE), r"1 missing \(such as 'dinov3.*layer.0.attention.v_proj.lora_B.weight'\)"),
        (lambda w: w.update(x=torch.ones(1)), r"1 unknown \(such as 'x'\)"),
        (lambda w: w.update({VALUE_UPDATE: torch.ones(3, 3)}), r"size mismatch for dinov3.*v_proj.lora_B"),
        (lambda w: w[VALUE_UPDATE].fill_(torch.nan), r"v_proj.lora_B.weight' of the adapter .* contains NaN"),
    ],
    ids=["missing", "unknown", "shape", "nan"],
)
def test_weights_of_an_adapter_that_do_not_fit_are_refused(
    base_folder, adapter_folder, tmp_path, images, change, message
):
    shutil.copytree(adapter_folder, tmp_path / "changed")
    path = tmp_path / "changed" / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})
    assert_refused(base_folder, tmp_path / "changed", message, images)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "XLORA", "adapters": {"0": "stranger/adapter"}, "hidden_size": 16}, r"has the type X-LoRA"),
        ({"peft_type": "unknown"}, r"adapter_config.json of the adapter .* cannot be read \(KeyError"),
        ({"r": "many"}, r"does not fit .*'str' and 'int'"),
        (
            {"peft_type": "PROMPT_TUNING", "tokenizer_name_or_path": "stranger/words"},
            r"does not fit .*prompt learning",
        ),
    ],
    ids=["xlora", "unknown", "rank", "prompt"],
)
def test_an_adapter_does_not_make_other_repositories_load(
    hub, base_folder, adapter_folder, tmp_path, images, fields, message
):
    folder = changed_adapter(adapter_folder, tmp_path / "changed", "adapter_config.json", lambda c: c.update(fields))
    assert_refused(base_folder, folder, message, images)
    assert not [request for request in hub.requests if "stranger" in str(request)]


def test_pickled_weights_of_an_adapter_are_not_read(base_folder, adapter_folder, tmp_path):
    shutil.copytree(adapter_folder, tmp_path / "pickled")
    weights = load_file(tmp_path / "pickled" / "adapter_model.safetensors")
    (tmp_path / "pickled" / "adapter_model.safetensors").unlink()
    torch.save(weights, tmp_path / "pickled" / "adapter_model.bin")
    with pytest.raises(OSError, match=r"adapter_model.safetensors"):
        load(base_folder, tmp_path / "pickled")


def test_an_adapter_loads_the_base_that_it_names(hub, base_folder, adapter_folder, tmp_path, images):
    """`from_pretrained` of an adapter loads the base in its adapter_config.json, and nothing else."""
    expected = predict(load(base_folder, adapter_folder), images)
    Co2SForSemanticSegmentation.from_pretrained(base_folder).push_to_hub("stranger/base")
    hub.requests.clear()
    name = {"base_model_name_or_path": "stranger/base"}
    folder = changed_adapter(adapter_folder, tmp_path / "named", "adapter_config.json", lambda c: c.update(name))
    assert torch.equal(predict(Co2SForSemanticSegmentation.from_pretrained(folder), images), expected)
    asked = [request for request in hub.requests if "/resolve/" in str(request)]
    assert asked and all("/stranger/base/resolve/" in str(request) for request in asked)
    name["base_model_name_or_path"] = str(tmp_path / "nowhere")
    folder = changed_adapter(adapter_folder, tmp_path / "lost", "adapter_config.json", lambda c: c.update(name))
    with pytest.raises(OSError, match=r"nowhere"):
        Co2SForSemanticSegmentation.from_pretrained(folder)
