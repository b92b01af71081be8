"""LoRA adapters: trained parameters, saving, loading, merging, several adapters on one base."""

import json
import re

import numpy as np
import pytest
import torch
from helpers import make_model, open_folder, save_checkpoint
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForSemanticSegmentation, pipeline
from transformers.quantizers.quantizers_utils import should_convert_module

from co2s_hf import Co2SForSemanticSegmentation, Co2SImageProcessor
from co2s_hf.data.drawn_scenes import write_scenes
from co2s_hf.data.options import DataOptions
from co2s_hf.hub.publishing import add_handler, check_publishable
from co2s_hf.model.modeling_co2s import semantic_cross_entropy
from co2s_hf.training.loop import setup, train
from co2s_hf.training.lora import co2s_lora_config, lora_config, merged
from co2s_hf.training.models import build_adapted_model, open_base, quantization
from co2s_hf.training.options import AdaptationOptions, LoraOptions
from co2s_hf.utils.errors import UserOSError


NEW = {"field": ["field"], "water": ["water"], "roof": ["roof"], "track": ["track"], "wood": ["wood"]}


def load(folder):
    return Co2SForSemanticSegmentation.from_pretrained(folder)


def logits(model, images, **kwargs):
    with torch.no_grad():
        return model(pixel_values=images, **kwargs).logits


def disturb(model, seed=3):
    """Change the trainable parameters, in place of a training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def adapted(base_folder, folder, seed=3, classes=None, **settings):
    """Save an adapter with changed weights, and return the model."""
    model = load(base_folder)
    if classes is not None:
        text = torch.randn(len(classes), 12, generator=torch.Generator().manual_seed(seed))
        model.set_class_concepts(classes, text)
        model.config.fusion = "confidence"
    model.add_adapter(co2s_lora_config(model, **{"rank": 4} | settings))
    disturb(model, seed).save_pretrained(folder)
    return model


PARTS = {
    r"clip\.encoder\.vision_model\.encoder\.layers\.\d\.self_attn\.(q|k|v|out)_proj\.lora_[AB]\.default\.weight",
    r"dinov3\.encoder\.vision_model\.model\.layer\.\d\.attention\.(q|k|v|o)_proj\.lora_[AB]\.default\.weight",
}
MLP = {
    r"clip\.encoder\.vision_model\.encoder\.layers\.\d\.mlp\.fc[12]\.lora_[AB]\.default\.weight",
    r"dinov3\.encoder\.vision_model\.model\.layer\.\d\.mlp\.(up|down)_proj\.lora_[AB]\.default\.weight",
}
DECODERS = {r"(clip|dinov3)\.decoder\.modules_to_save\.default\..*"}
QUERIES = {r"dinov3\.guidance\.modules_to_save\.default\.queries"}
MAGNITUDES = {part.replace(r"lora_[AB]\.default", r"lora_magnitude_vector\.default") for part in PARTS}


@pytest.mark.parametrize(
    ("settings", "patterns", "layers"),
    [
        ({}, PARTS | DECODERS | QUERIES, 24),
        ({"train_decoders": False, "train_queries": False, "rank": 2}, PARTS, 24),
        ({"train_decoders": False, "targets": "attention+mlp", "use_rslora": True}, PARTS | MLP | QUERIES, 36),
        ({"train_decoders": False, "use_dora": True}, PARTS | MAGNITUDES | QUERIES, 24),
        (
            {"train_decoders": False, "train_queries": False, "targets": r"clip\..*\.layers\.0\.self_attn\.q_proj"},
            {r"clip\.encoder\.vision_model\.encoder\.layers\.0\.self_attn\.q_proj\.lora_[AB]\.default\.weight"},
            1,
        ),
    ],
)
def test_the_named_parameters_train_and_no_others(settings, patterns, layers, images):
    model = make_model()
    model.add_adapter(co2s_lora_config(model, **settings))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {name for name, _ in model.named_parameters() if any(re.fullmatch(p, name) for p in patterns)}
    assert trainable == expected and all(any(re.fullmatch(p, name) for name in trainable) for p in patterns)
    assert sum(name.endswith("lora_A.default.weight") for name in trainable) == layers
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # the first step changes B alone: B is zero, so A has no gradient
        optimizer.zero_grad()
        outputs = model.train()(images, labels=torch.randint(0, 3, (2, 16, 24)))
        outputs.loss.backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    # Queries and keys may stay: CLIP's last layer is used without attention, and those of untrained backbones have
    # tiny gradients. The head's bias is the same for all classes, so softmax ignores it: only rounding changes it.
    still = {name for name in trainable - changed if not re.search(r"(q|k)_proj\.lora_|head\.bias$", name)}
    assert changed <= trainable and not still


def test_ranks_and_scales_reach_peft(base_folder):
    config = co2s_lora_config(load(base_folder), rank=5)
    assert isinstance(config, LoraConfig) and (config.r, config.lora_alpha) == (5, 10) and config.task_type is None
    config = co2s_lora_config(load(base_folder), rank=5, lora_alpha=7, lora_dropout=0.25, use_dora=True)
    assert (config.lora_alpha, config.lora_dropout, config.use_dora) == (7, 0.25, True)
    options = LoraOptions(lora_rank=3, lora_dropout=0.5, freeze_decoders=True, freeze_queries=True)
    config = lora_config(load(base_folder), options)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 6, 0.5)
    assert config.modules_to_save == ["clip.guidance"]
    with pytest.raises(ValueError, match="`lora_targets` is 'everything'"):
        lora_config(load(base_folder), LoraOptions(lora_targets="everything"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"`rank` is 0"),
        ({"targets": "everything"}, r"`targets` is 'everything', which matches no layer"),
        ({"targets": "("}, r"nor a regular expression"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        co2s_lora_config(make_model(), **settings)


def test_a_fresh_adapter_changes_nothing(base_folder, images):
    model = load(base_folder)
    before = logits(model, images)
    model.add_adapter(co2s_lora_config(model, use_dora=True))
    torch.testing.assert_close(logits(model, images), before, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"use_rslora": True, "targets": "attention+mlp"}, {"classes": NEW, "use_dora": True}],
    ids=["plain", "dora", "rslora", "new classes"],
)
def test_an_adapter_is_the_same_after_saving_loading_and_merging(settings, base_folder, images, tmp_path):
    model = adapted(base_folder, tmp_path / "adapter", **settings)
    expected = logits(model, images)
    assert not torch.allclose(expected[:, :3], logits(load(base_folder), images), atol=1e-2)
    reloaded = load(tmp_path / "adapter")
    torch.testing.assert_close(logits(reloaded, images), expected, atol=1e-6, rtol=1e-5)
    labels = list(settings.get("classes", {"land": 0, "road": 0, "water": 0}))
    assert list(reloaded.config.id2label.values()) == labels
    assert reloaded.config.fusion == "confidence" and not reloaded.training

    plain = merged(model)
    torch.testing.assert_close(logits(plain, images), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(model, images), expected, atol=0, rtol=0)  # a copy was merged
    plain.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged")
    assert torch.equal(logits(again, images), logits(plain, images))
    assert again.config.id2label == dict(enumerate(labels))
    assert not [name for name in again.state_dict() if "lora" in name or "modules_to_save" in name]


def test_several_adapters_on_one_base_have_classes_of_their_own(base_folder, images, tmp_path):
    settings = {"one": {}, "two": {"classes": NEW, "seed": 4}, "three": {"train_decoders": False, "seed": 5}}
    expected = {n: logits(adapted(base_folder, tmp_path / n, **s), images) for n, s in settings.items()}
    model = load(base_folder)
    before = logits(model, images)
    for name in settings:
        model.load_adapter(tmp_path / name, adapter_name=name)
        assert model.active_adapters() == [name]
        assert torch.equal(logits(model, images), expected[name])
    for name in ("two", "one", "three", "two"):
        model.set_adapter(name)
        assert torch.equal(logits(model, images), expected[name])
        assert model.config.num_labels == expected[name].shape[1]
    model.disable_adapters()
    assert torch.equal(logits(model, images), before) and model.config.id2label[0] == "land"
    model.enable_adapters()
    assert torch.equal(logits(model, images), expected["two"]) and list(model.config.id2label.values()) == list(NEW)
    with pytest.raises(ValueError, match=r"There is an adapter 'two' already"):
        model.load_adapter(tmp_path / "one", adapter_name="two")
    with pytest.raises(ValueError, match=r"There is an adapter 'two' already"):
        model.add_adapter(co2s_lora_config(model), adapter_name="two")
    model.set_adapter("two")
    assert torch.equal(logits(model, images), expected["two"])
    with pytest.raises(ValueError, match=r"no adapter 'four'; loaded: one, two, three"):
        model.set_adapter("four")
    with pytest.raises(ValueError, match=r"adapters, which have their own classes"):
        model.set_class_concepts({"a": ["a"], "b": ["b"]}, torch.zeros(2, 12))


def test_a_disabled_adapter_and_its_base_stay_separate(base_folder, images, tmp_path):
    expected = logits(adapted(base_folder, tmp_path / "new", classes=NEW), images)
    model = load(base_folder)
    before = logits(model, images)
    model.load_adapter(tmp_path / "new", adapter_name="new")
    model.disable_adapters()
    plain = merged(model)  # with the adapter and its classes, although it is disabled
    torch.testing.assert_close(logits(plain, images), expected, atol=1e-5, rtol=1e-5)
    assert plain.config.num_labels == 5 and model.config.num_labels == 3
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again"), images), expected)
    assert torch.equal(logits(model, images), before)  # still disabled
    model.set_adapter("new")  # enables it
    assert torch.equal(logits(model, images), expected) and model.config.num_labels == 5
    model.config.crop_size = 99  # now a field of the adapter
    model.disable_adapters()
    assert model.config.crop_size == 16
    model.enable_adapters()
    assert model.config.crop_size == 99


def test_deleted_adapters_leave_the_others_and_the_base(base_folder, images, tmp_path):
    expected = logits(adapted(base_folder, tmp_path / "one"), images)
    adapted(base_folder, tmp_path / "two", classes=NEW)
    model = load(base_folder)
    before, names = logits(model, images), set(model.state_dict())
    model.load_adapter(tmp_path / "one", adapter_name="one")
    model.load_adapter(tmp_path / "two", adapter_name="two")
    model.delete_adapter("two")
    assert torch.equal(logits(model, images), expected) and model.config.num_labels == 3
    model.delete_adapter("one")
    assert torch.equal(logits(model, images), before) and set(model.state_dict()) == names
    model.set_class_concepts(NEW, torch.randn(5, 12))  # a plain model has no adapter to protect
    model.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(load(tmp_path / "plain"), images), logits(model, images))


def test_a_second_adapter_is_for_the_bases_classes(base_folder, images, tmp_path):
    adapted(base_folder, tmp_path / "new", classes=NEW)
    model = load(base_folder)
    before = logits(model, images)
    model.load_adapter(tmp_path / "new", adapter_name="new")
    model.add_adapter(co2s_lora_config(model, train_decoders=False), adapter_name="fresh")
    assert torch.equal(logits(model, images), before) and model.config.id2label[0] == "land"
    disturb(model).save_pretrained(tmp_path / "fresh")
    expected = logits(model, images)
    assert torch.equal(logits(load(tmp_path / "fresh"), images), expected)
    torch.testing.assert_close(logits(merged(model), images), expected, atol=1e-5, rtol=1e-5)


def test_a_failed_load_leaves_the_model_unchanged(base_folder, images, tmp_path):
    adapted(base_folder, tmp_path / "new", classes=NEW)
    (tmp_path / "new" / "co2s_adapter.json").unlink()  # as if peft alone had saved it
    model = load(base_folder)
    before, names = logits(model, images), set(model.state_dict())
    with pytest.raises(ValueError, match=r"is for 5 classes and this model has 3, but it lacks co2s_adapter.json"):
        model.load_adapter(tmp_path / "new")
    adapted(base_folder, tmp_path / "wide")
    (tmp_path / "wide" / "co2s_adapter.json").unlink()
    other = make_model(decoder_channels=32)
    keys = set(other.state_dict())
    with pytest.raises(ValueError, match=r"does not fit this model: .*size mismatch"):
        other.load_adapter(tmp_path / "wide")
    assert set(other.state_dict()) == keys
    with pytest.raises(ValueError, match=r"nothing_such"):
        model.add_adapter(LoraConfig(target_modules=["nothing_such"]))
    assert set(model.state_dict()) == names and torch.equal(logits(model, images), before)
    model.add_adapter(co2s_lora_config(model))  # this still works


def test_changed_classes_need_their_queries():
    model = make_model()
    model.set_class_concepts({"water": ["water"], "land": ["land"]}, torch.randn(2, 12))
    with pytest.raises(ValueError, match=r"has new classes"):
        co2s_lora_config(model, train_queries=False)


def test_quantization_converts_the_backbones_alone():
    kept = quantization("8bit")["quantization_config"].llm_int8_skip_modules
    linear = [name for name, module in make_model().named_modules() if isinstance(module, torch.nn.Linear)]
    converted = {name for name in linear if should_convert_module(name, kept)}
    assert converted == {n for n in linear if re.fullmatch(r"(clip|dinov3)\.encoder\.vision_model\..*", n)}


def test_adapters_go_through_peft_too(base_folder, images, tmp_path):
    model = adapted(base_folder, tmp_path / "adapter")
    wrapped = PeftModel.from_pretrained(load(base_folder), tmp_path / "adapter")
    assert torch.equal(logits(wrapped, images), logits(model, images))
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        base_folder
    )
    wrapped.save_pretrained(tmp_path / "by_peft")  # without the file that names the classes
    assert torch.equal(logits(load(tmp_path / "by_peft"), images), logits(model, images))
    adapted(base_folder, tmp_path / "new", classes=NEW)
    with pytest.raises(RuntimeError, match=r"size mismatch.*\[5, 16\].*\[3, 16\]"):
        PeftModel.from_pretrained(load(base_folder), tmp_path / "new")


def test_a_base_of_other_sizes_is_refused_with_both_sizes(base_folder, tmp_path):
    adapted(base_folder, tmp_path / "adapter")
    other = make_model(decoder_channels=32)
    with pytest.raises(ValueError, match=r"`decoder_channels` is 16 there and 32 here"):
        other.load_adapter(tmp_path / "adapter")
    assert not hasattr(other, "peft_config")  # the model is unchanged


def test_a_model_without_an_adapter_cannot_be_merged():
    with pytest.raises(ValueError, match=r"no adapter to merge"):
        merged(make_model())


def test_adapters_on_the_hub_by_name(hub, base_folder, images, tmp_path):
    load(base_folder).push_to_hub("user/base-model")
    Co2SImageProcessor.from_pretrained(base_folder).push_to_hub("user/base-model")
    model = adapted("user/base-model", tmp_path / "adapter", classes=NEW)
    model.push_to_hub("user/one-way")
    model.save_pretrained(tmp_path / "other", push_to_hub=True, repo_id="user/other-way")
    for name in ("user/one-way", "user/other-way"):
        repository = hub.repositories["model", name]
        files = {"co2s_adapter.json", "adapter_config.json", "adapter_model.safetensors"}
        assert files <= set(repository.trees[repository.refs["main"]])
        for pulled in (load(name), AutoModelForSemanticSegmentation.from_pretrained(name)):
            assert torch.equal(logits(pulled, images), logits(model, images))
        assert pipeline("image-segmentation", model=name).model.config.id2label == dict(enumerate(NEW))


def test_an_adapter_is_not_published_without_its_base(hub, base_folder, tmp_path):
    adapted(base_folder, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"needs its base model '.*', which is not on the Hub. Publish the base"):
        check_publishable(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "user/base"}))
    with pytest.raises(ValueError, match=r"its base model 'user/base', which is not on the Hub"):
        check_publishable(tmp_path / "adapter")
    hub.create("model", "user/base")
    check_publishable(tmp_path / "adapter")
    add_handler(tmp_path / "adapter")
    assert "peft" in (tmp_path / "adapter" / "requirements.txt").read_text()


def test_gradients_are_those_of_the_loss(base_folder, images):
    """The adapter's copy of a decoder has the gradients that the plain model's decoder has."""
    labels = torch.randint(0, 3, (2, 16, 24), generator=torch.Generator().manual_seed(0))
    plain, model = load(base_folder), load(base_folder)
    model.add_adapter(co2s_lora_config(model))
    for each in (plain, model):
        semantic_cross_entropy(each.eval()(images, fusion="dinov3").logits, labels, 255).backward()
    own = plain.dinov3.decoder.head.weight.grad
    torch.testing.assert_close(model.dinov3.decoder.modules_to_save["default"].head.weight.grad, own)
    assert model.dinov3.decoder.original_module.head.weight.grad is None


@pytest.fixture(scope="module")
def partly_labeled(tmp_path_factory):
    """Drawn scenes in which a strip of every label map has no class."""
    folder = tmp_path_factory.mktemp("partly") / "scenes"
    write_scenes(folder, 3, 5, 2, size=48, seed=7)
    for path in (folder / "labels").rglob("*.png"):
        labels = np.array(Image.open(path))
        labels[:10] = 255
        Image.fromarray(labels).save(path)
    return folder


def adapt(data_folder, folder, ignore_index, recipe):
    """Adapt a base with another `semantic_loss_ignore_index`, and return what the training did."""
    classes = open_folder(data_folder).id2label
    save_checkpoint(
        folder / "base", id2label=classes, palette=None, crop_size=32, semantic_loss_ignore_index=ignore_index
    )
    options = AdaptationOptions(
        checkpoint=str(folder / "base"), output_dir=str(folder / "run"), method="co2s", recipe=recipe,
        max_train_steps=2, supervised_warmup_steps=0, per_device_train_batch_size=2, lora_rank=2, crop_size=32,
        measure_pseudo_labels=True, use_cpu=True, seed=1,
    )  # fmt: skip
    config = open_base(options)
    return train(setup(options, DataOptions(data_dir=str(data_folder)), build_adapted_model, config))


@pytest.mark.parametrize(("recipe", "ignore_index"), [("paper", 100), ("balanced", -100)])
def test_a_base_with_another_ignored_label_trains_the_same(partly_labeled, recipe, ignore_index, tmp_path):
    """Label maps have 255 where there is no class. The label that the base's own loss ignores changes nothing."""
    expected = adapt(partly_labeled, tmp_path / "255", 255, recipe)
    counted = expected.evaluation.confusion.counts.sum()
    assert counted == 2 * 48 * 38
    found = adapt(partly_labeled, tmp_path / "other", ignore_index, recipe)
    assert torch.equal(found.evaluation.confusion.counts, expected.evaluation.confusion.counts)
    weights, other = (load_file(run.folder / "adapter_model.safetensors") for run in (expected, found))
    assert weights.keys() == other.keys() and all(torch.equal(weights[name], other[name]) for name in weights)
    contents = [json.loads((run.folder / "co2s_adapter.json").read_text()) for run in (expected, found)]
    assert contents[0] == contents[1]  # with the fitted temperatures
    assert load(found.folder).config.semantic_loss_ignore_index == ignore_index


def test_classes_that_include_the_ignored_label_are_refused(partly_labeled, tmp_path):
    save_checkpoint(tmp_path / "base", crop_size=32, semantic_loss_ignore_index=4)  # three classes
    options = AdaptationOptions(checkpoint=str(tmp_path / "base"))
    open_base(options)
    with pytest.raises(UserOSError, match=r"is 4, which is also the class .* Use a number that is not a class"):
        build_adapted_model(options, open_folder(partly_labeled))  # six classes
    model = make_model(semantic_loss_ignore_index=4)
    with pytest.raises(StrictDataclassError, match=r"is 4, which is also the class 'wood'"):
        model.set_class_concepts(NEW, torch.randn(5, 12))
    assert model.config.num_labels == 3
    adapted_model = make_model()
    adapted_model.set_class_concepts(NEW, torch.randn(5, 12))
    adapted_model.add_adapter(co2s_lora_config(adapted_model, rank=2))
    adapted_model.save_pretrained(tmp_path / "five")
    with pytest.raises(ValueError, match=r"does not fit this model(.|\n)*is 4, which is also the class 'wood'"):
        make_model(semantic_loss_ignore_index=4).load_adapter(tmp_path / "five")
