"""Saved weights: their names, loading them with other libraries, and refused files."""

import json
import os
import shutil

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from helpers import make_model, save_checkpoint
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSemanticSegmentation, Trainer, TrainingArguments

from co2s_hf import Co2SForSemanticSegmentation
from co2s_hf.training.lora import co2s_lora_config, merged


def logits(model, images):
    with torch.no_grad():
        return model.eval()(images).logits


def assert_same_weights(model, expected):
    weights = model.state_dict()
    assert weights.keys() == expected.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.state_dict().items())


def make_trainer(model, folder, **settings):
    """A Trainer of four steps on two random images per step, with a checkpoint every second step."""
    generator = torch.Generator().manual_seed(0)
    data = [
        {
            "pixel_values": torch.randn(3, 8, 8, generator=generator),
            "labels": torch.randint(3, (8, 8), generator=generator),
        }
        for _ in range(4)
    ]
    arguments = TrainingArguments(
        str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=0.01, report_to=[],
        use_cpu=True, disable_tqdm=True, seed=0, **settings,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data)


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    """A folder with the checkpoints of a training, and its model at the end."""
    folder, model = tmp_path_factory.mktemp("training"), make_model()
    make_trainer(model, folder).train()
    return folder, model


@pytest.mark.parametrize("shard_size", ["50GB", "20KB"])
def test_files_have_the_names_of_the_state_dict(model, tmp_path, shard_size):
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    saved = {}
    for path in tmp_path.glob("*.safetensors"):
        saved |= load_file(path)
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    if shard_size == "20KB":
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
        assert index["weight_map"].keys() == saved.keys()


def test_a_resumed_trainer_equals_an_uninterrupted_one(trainings, tmp_path):
    folder, expected = trainings
    resumed = make_model(seed=1)  # other weights: all of them must come from the file
    make_trainer(resumed, tmp_path).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert_same_weights(resumed, expected)


def test_a_trainer_resumes_from_a_file_of_an_earlier_version(trainings, tmp_path):
    folder, expected = trainings
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    old = Co2SForSemanticSegmentation.from_pretrained(tmp_path / "checkpoint-2")
    old.save_pretrained(tmp_path / "checkpoint-2", save_original_format=True)
    resumed = make_model(seed=1)
    make_trainer(resumed, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_weights(resumed, expected)


def test_a_trainer_reloads_its_best_model(tmp_path):
    model = make_model()
    # "Best" is here the larger loss, which is that of the earlier checkpoint.
    trainer = make_trainer(
        model, tmp_path, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
        eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert_same_weights(model, Co2SForSemanticSegmentation.from_pretrained(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("device_map", [{"": "cpu"}, {"clip": "cpu", "dinov3": "disk"}], ids=["cpu", "disk"])
def test_accelerate_loads_an_empty_model(model, images, tmp_path, device_map):
    model.save_pretrained(tmp_path / "model")
    with init_empty_weights():
        empty = Co2SForSemanticSegmentation(model.config)
    loaded = load_checkpoint_and_dispatch(
        empty, tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload", strict=True
    )
    torch.testing.assert_close(logits(loaded, images), logits(model, images))


def test_a_trainer_of_a_peft_model_resumes(trainings, tmp_path):
    def adapted():
        base = Co2SForSemanticSegmentation.from_pretrained(trainings[0] / "checkpoint-4")
        torch.manual_seed(2)
        return get_peft_model(base, co2s_lora_config(base, rank=2))

    whole, resumed = adapted(), adapted()
    make_trainer(whole, tmp_path / "whole").train()
    make_trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert_same_weights(resumed, whole)
    base = Co2SForSemanticSegmentation.from_pretrained(trainings[0] / "checkpoint-4")
    assert_same_weights(PeftModel.from_pretrained(base, tmp_path / "whole/checkpoint-4"), whole)


# Files of earlier versions: transformers renamed the weights of DINOv3's layers


@pytest.fixture
def old_folder(model, tmp_path):
    model.save_pretrained(tmp_path / "old", save_original_format=True, max_shard_size="20KB")
    names = [name for path in (tmp_path / "old").glob("*.safetensors") for name in load_file(path)]
    assert sum(".vision_model.layer." in name for name in names) == sum(
        ".model.layer." in n for n in model.state_dict()
    )
    return tmp_path / "old"


def test_old_files_load_completely(model, images, old_folder, tmp_path):
    for loader in (Co2SForSemanticSegmentation, AutoModelForSemanticSegmentation):
        loaded, info = loader.from_pretrained(old_folder, output_loading_info=True)
        assert not any(info.values())
        assert_same_weights(loaded, model)
    weights = {}
    for path in old_folder.glob("*.safetensors"):
        weights |= load_file(path)
    assert_same_weights(
        Co2SForSemanticSegmentation.from_pretrained(None, config=model.config, state_dict=dict(weights)), model
    )
    plain = make_model(seed=1)
    plain.load_state_dict(weights, strict=True)
    assert_same_weights(plain, model)
    offloaded = Co2SForSemanticSegmentation.from_pretrained(
        old_folder, device_map={"clip": "cpu", "dinov3": "disk"}, offload_folder=tmp_path / "offload"
    )
    torch.testing.assert_close(logits(offloaded, images), logits(model, images))
    half = Co2SForSemanticSegmentation.from_pretrained(old_folder, dtype=torch.float16)
    assert_same_weights(half, model.half())


def test_an_adapter_on_an_old_base_is_the_same_on_the_new_one(model, images, old_folder, tmp_path):
    base = Co2SForSemanticSegmentation.from_pretrained(old_folder)
    torch.manual_seed(3)
    base.add_adapter(co2s_lora_config(base, rank=2, init_lora_weights=False))
    base.save_pretrained(tmp_path / "adapter")
    expected = logits(base, images)
    base = Co2SForSemanticSegmentation.from_pretrained(old_folder)
    base.save_pretrained(tmp_path / "new")
    assert load_file(tmp_path / "new" / "model.safetensors").keys() == model.state_dict().keys()
    new = Co2SForSemanticSegmentation.from_pretrained(tmp_path / "new")
    new.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(new, images), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter"), images), expected)
    merged(new).save_pretrained(tmp_path / "merged")
    assert_same_weights(Co2SForSemanticSegmentation.from_pretrained(tmp_path / "merged"), merged(new))


def test_pushed_models_have_the_new_names_and_old_repositories_load(hub, model, old_folder):
    for name in ("user/new", "user/old"):
        loaded = Co2SForSemanticSegmentation.from_pretrained(old_folder)
        if name == "user/new":
            loaded.push_to_hub(name)
        else:
            loaded.save_pretrained(old_folder, save_original_format=True, push_to_hub=True, repo_id=name)
        assert_same_weights(Co2SForSemanticSegmentation.from_pretrained(name), model)


# Refused files


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(tmp_path / "model")
    return tmp_path / "model"


def change_weights(folder, change):
    """Change the dictionary of the weights in a folder."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


BIAS = "dinov3.decoder.head.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(BIAS), rf"do not fit its configuration: 1 missing \(such as '{BIAS}'\)"),
        (lambda w: w.update(x=torch.ones(1)), r"do not fit its configuration: 1 unknown \(such as 'x'\)"),
        (lambda w: w.update({BIAS: torch.ones(2)}), rf"'{BIAS}' has the shape \(2,\), expected \(1,\)"),
        (lambda w: w[BIAS].fill_(torch.nan), rf"'{BIAS}' of .* contains NaN or infinite values"),
        (lambda w: w["clip.guidance.embeddings"][1, 2].fill_(-torch.inf), r"'clip.guidance.embeddings' of .* NaN"),
    ],
    ids=["missing", "unknown", "shape", "nan", "infinite"],
)
def test_weights_that_do_not_fit_are_refused(folder, change, message):
    change_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        Co2SForSemanticSegmentation.from_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        AutoModelForSemanticSegmentation.from_pretrained(folder)


def test_a_base_that_does_not_fit_is_refused_with_its_adapter(folder, tmp_path):
    model = Co2SForSemanticSegmentation.from_pretrained(folder)
    model.add_adapter(co2s_lora_config(model, rank=2))
    model.save_pretrained(tmp_path / "adapter")
    change_weights(folder, lambda weights: weights.pop("clip.encoder.vision_model.post_layernorm.bias"))
    with pytest.raises(ValueError, match=r"model' do not fit its configuration: 1 missing"):
        Co2SForSemanticSegmentation.from_pretrained(tmp_path / "adapter")


def test_fewer_layers_than_in_the_file_are_refused(folder):
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8")) | {"decoder_num_layers": 1}  # the file has 2
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"24 unknown \(such as 'clip.decoder.semantic_layers.1.mlp.0.bias'\)"):
        Co2SForSemanticSegmentation.from_pretrained(folder)


def test_weights_too_large_for_a_number_format_are_refused(folder):
    change_weights(folder, lambda weights: weights[BIAS].fill_(1e6))
    assert Co2SForSemanticSegmentation.from_pretrained(folder).dinov3.decoder.head.bias.item() == 1e6
    with pytest.raises(ValueError, match=r"the weights are too large for the number format \(`dtype`\)"):
        Co2SForSemanticSegmentation.from_pretrained(folder, dtype=torch.float16)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_truncated_files_are_refused(folder, share):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: int(len(content) * share)])
    with pytest.raises((SafetensorError, OSError)):
        Co2SForSemanticSegmentation.from_pretrained(folder)


class Payload:
    """An object of a hostile file: unpickling it creates another file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickled_weights_are_not_read(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    os.remove(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"no file named model.safetensors"):
        Co2SForSemanticSegmentation.from_pretrained(folder)
    model = Co2SForSemanticSegmentation.from_pretrained(folder, use_safetensors=False)  # the user's own choice
    assert torch.equal(model.dinov3.guidance.queries, weights["dinov3.guidance.queries"])
    torch.save({"x": Payload(str(tmp_path / "harm"))}, folder / "pytorch_model.bin")
    for choice in ({}, {"use_safetensors": False}):
        with pytest.raises(Exception, match=r"no file named model.safetensors|Weights only load failed"):
            Co2SForSemanticSegmentation.from_pretrained(folder, **choice)
    assert not (tmp_path / "harm").exists()


def test_the_configuration_of_a_stranger_makes_nothing_else_load(hub, folder, images, tmp_path):
    """Foreign code, a foreign text encoder and a foreign attention kernel: none is looked for."""
    (tmp_path / "harm.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')\nclass Evil: pass\n", encoding="utf-8")
    expected = logits(Co2SForSemanticSegmentation.from_pretrained(folder), images)
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    foreign = {
        "AutoConfig": "stranger/code--harm.Evil",
        "AutoModelForSemanticSegmentation": "stranger/code--harm.Evil",
    }
    content |= {"auto_map": foreign, "text_encoder": str(tmp_path), "attn_implementation": "stranger/kernel"}
    content["clip_config"] |= {"attn_implementation": "stranger/kernel", "auto_map": foreign}
    path.write_text(json.dumps(content), encoding="utf-8")
    shutil.copy(tmp_path / "harm.py", folder)
    for loader in (Co2SForSemanticSegmentation, AutoModelForSemanticSegmentation):
        loaded = loader.from_pretrained(folder)
        assert type(loaded) is Co2SForSemanticSegmentation
        assert torch.equal(logits(loaded, images), expected)
    assert not (tmp_path / "harm").exists()
    assert not [request for request in hub.requests if "stranger" in str(request)]
