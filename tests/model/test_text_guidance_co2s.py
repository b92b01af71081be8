"""Text embeddings of classes, and building a model from pretrained backbones."""

import copy
import hashlib
import logging
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

import co2s_hf
from co2s_hf import Co2SConfig, Co2SForSemanticSegmentation
from co2s_hf.model import text_guidance_co2s
from co2s_hf.model.configuration_co2s import SMALL_DECODER
from co2s_hf.model.text_guidance_co2s import (
    SHIPPED_BACKBONES,
    assets_folder,
    encode_class_concepts,
    find_backbone,
    unknown_words,
)


LABELS = {0: "bare_soil", 1: "water"}
CONCEPTS = {"bare_soil": ["bare soil", "sand"], "water": ["water", "lake", "river"]}


def expected_embeddings(folder, concepts=CONCEPTS):
    """Compute the embeddings one prompt at a time: padding within a batch must not change them."""
    model, tokenizer = CLIPModel.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    rows = []
    for words in concepts.values():
        encoded = [tokenizer(f"a photo of a {word}", return_tensors="pt") for word in words]
        features = torch.cat([model.get_text_features(**inputs).pooler_output for inputs in encoded])
        rows.append(F.normalize(features.mean(0), dim=0))
    return torch.stack(rows).detach()


def test_class_embedding_is_the_normalised_mean_of_its_prompts(backbones):
    found = encode_class_concepts(CONCEPTS, str(backbones[0]))
    torch.testing.assert_close(found, expected_embeddings(backbones[0]), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"`class_concepts` has no concept for \['a'\]"):
        encode_class_concepts({"a": []}, str(backbones[0]))


def test_model_from_backbones_has_their_weights_and_text(backbones, tmp_path, monkeypatch):
    clip, dinov3 = backbones
    decoder = {"decoder_channels": 16, "decoder_up_channels": (16, 16), "decoder_skip_channels": (8, 4)}
    model = Co2SForSemanticSegmentation.from_backbones(
        str(clip), str(dinov3), id2label=LABELS, class_concepts=CONCEPTS, palette=[[9, 9, 9], [0, 0, 9]], **decoder
    )
    source = CLIPModel.from_pretrained(clip)
    assert torch.equal(model.clip.encoder.visual_projection.weight, source.visual_projection.weight)
    for name, tensor in source.vision_model.state_dict().items():
        assert torch.equal(model.clip.encoder.vision_model.state_dict()[name], tensor), name
    for name, tensor in DINOv3ViTModel.from_pretrained(dinov3).state_dict().items():
        assert torch.equal(model.dinov3.encoder.vision_model.state_dict()[name], tensor), name
    torch.testing.assert_close(model.clip.guidance.embeddings, expected_embeddings(clip), atol=1e-5, rtol=1e-5)
    config = model.config
    assert (config.clip_config.hidden_act, config.clip_config.layer_norm_eps) == ("quick_gelu", 1e-5)
    assert (list(config.clip_feature_layers), list(config.dinov3_feature_layers)) == ([0, 1, 4], [1, 3, 4])
    assert config.palette == [[9, 9, 9], [0, 0, 9]] and config.id2label == LABELS and config.fusion == "confidence"
    assert not model.training and not model.clip.encoder.visual_projection.weight.requires_grad

    # Once saved, the model loads without the folders of the backbones.
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(CLIPVisionModel, "from_pretrained", None)
    monkeypatch.setattr(DINOv3ViTModel, "from_pretrained", None)
    image = torch.randn(1, 3, 9, 9)
    # The copy aligns the weights in memory as those of `model` are. Alignment changes the last bits of the logits.
    loaded = copy.deepcopy(Co2SForSemanticSegmentation.from_pretrained(tmp_path))
    assert torch.equal(loaded(image).logits, model(image).logits)


def test_only_narrow_backbones_get_small_decoders(backbones, tmp_path):
    embeddings = {"text_embeddings": torch.randn(2, 12)}
    small = Co2SForSemanticSegmentation.from_backbones(*map(str, backbones), id2label=LABELS, **embeddings)
    assert {name: getattr(small.config, name) for name in SMALL_DECODER} == SMALL_DECODER
    sizes = {"hidden_size": 272, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
    DINOv3ViTModel(DINOv3ViTConfig(**sizes, patch_size=8)).save_pretrained(tmp_path)
    wide = Co2SForSemanticSegmentation.from_backbones(
        str(backbones[0]), str(tmp_path), id2label=LABELS, decoder_skip_channels=(8, 8), **embeddings
    )
    paper = Co2SConfig(decoder_skip_channels=(8, 8))
    assert all(getattr(wide.config, name) == getattr(paper, name) for name in SMALL_DECODER)
    given = Co2SForSemanticSegmentation.from_backbones(
        *map(str, backbones), id2label=LABELS, decoder_channels=64, **embeddings
    )
    assert (given.config.decoder_channels, given.config.decoder_guidance_channels) == (64, 32)


def test_class_names_are_the_default_concepts(backbones):
    model = Co2SForSemanticSegmentation.from_backbones(*map(str, backbones), id2label=LABELS)
    assert model.config.class_concepts == {"bare_soil": ["bare soil"], "water": ["water"]}
    torch.testing.assert_close(
        model.clip.guidance.embeddings, expected_embeddings(backbones[0], model.config.class_concepts),
        atol=1e-5, rtol=1e-5,
    )  # fmt: skip


def test_concepts_in_another_order_keep_the_order_of_classes(backbones):
    backwards = dict(reversed(CONCEPTS.items()))
    model = Co2SForSemanticSegmentation.from_backbones(
        *map(str, backbones), id2label=LABELS, class_concepts=backwards, palette=[[9, 9, 9], [0, 0, 9]]
    )
    assert model.config.id2label == LABELS and list(model.config.class_concepts) == ["bare_soil", "water"]
    torch.testing.assert_close(model.clip.guidance.embeddings, expected_embeddings(backbones[0]), atol=1e-5, rtol=1e-5)


def test_unknown_keywords_are_refused_before_loading():
    for keyword in ("pallete", "dtype"):
        with pytest.raises(TypeError, match=keyword):
            Co2SForSemanticSegmentation.from_backbones("/no/clip", "/no/dinov3", id2label=LABELS, **{keyword: None})


def test_error_for_a_gated_repository_names_it_and_the_remedy(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("You are trying to access a gated repo. 403 Client Error.")

    monkeypatch.setattr(CLIPVisionModelWithProjection.config_class, "get_config_dict", refuse)
    with pytest.raises(OSError, match=r"'someone/gated'.*https://huggingface.co/someone/gated.*gated repo"):
        Co2SForSemanticSegmentation.from_backbones("someone/gated", "x", id2label=LABELS)


def test_satellite_weights_select_their_image_statistics(backbones, tmp_path):
    satellite = tmp_path / "dinov3-vits16-pretrain-sat493m"
    satellite.symlink_to(backbones[1])
    embeddings = torch.randn(2, 12)
    model = Co2SForSemanticSegmentation.from_backbones(
        str(backbones[0]), str(satellite), id2label=LABELS, text_embeddings=embeddings
    )
    assert list(model.config.dinov3_image_mean) == [0.430, 0.411, 0.296]
    assert list(model.config.dinov3_image_std) == [0.213, 0.156, 0.143]
    assert torch.equal(model.clip.guidance.embeddings, embeddings)


def test_new_classes_are_encoded_with_the_text_encoder_of_the_config(backbones):
    model = Co2SForSemanticSegmentation.from_backbones(*map(str, backbones), id2label=LABELS)
    model.set_class_concepts({**CONCEPTS, "forest": ["forest"]})
    expected = expected_embeddings(backbones[0], {**CONCEPTS, "forest": ["forest"]})
    torch.testing.assert_close(model.clip.guidance.embeddings, expected, atol=1e-5, rtol=1e-5)
    assert model.config.fusion == "clip" and list(model.config.id2label.values()) == [*CONCEPTS, "forest"]
    logits = model(torch.randn(1, 3, 8, 8)).logits
    assert logits.shape == (1, 3, 8, 8) and logits.isfinite().all()


def test_errors_name_what_cannot_be_loaded_and_the_remedy(backbones, tmp_path):
    missing = str(tmp_path / "no-such-model")
    for arguments, role in (((missing, str(backbones[1])), "CLIP"), ((str(backbones[0]), missing), "DINOv3")):
        with pytest.raises(OSError, match=f"Cannot load {role}.*{re.escape(missing)}.*hf auth login.*local folder"):
            Co2SForSemanticSegmentation.from_backbones(*arguments, id2label=LABELS)
    CLIPModel.from_pretrained(backbones[0]).save_pretrained(tmp_path / "no-tokenizer")
    with pytest.raises(OSError, match=r"tokenizer in .* has 2 tokens, but the text encoder has 54"):
        encode_class_concepts(CONCEPTS, str(tmp_path / "no-tokenizer"))
    CLIPVisionModel(CLIPModel.from_pretrained(backbones[0]).config.vision_config).save_pretrained(tmp_path / "half")
    with pytest.raises(OSError, match=r"lacks .* weights of CLIP's vision backbone .*visual_projection"):
        Co2SForSemanticSegmentation.from_backbones(str(tmp_path / "half"), str(backbones[1]), id2label=LABELS)


# --- the backbones that ship with the package; most tests replace them by stand-ins with random weights


@pytest.fixture
def warnings(caplog, monkeypatch):
    """The warnings of a test."""
    monkeypatch.setattr(logging.getLogger("co2s_hf"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_shipped_names_load_from_the_package_without_a_network(stand_ins, no_network, tmp_path):
    model = Co2SForSemanticSegmentation.from_backbones(*SHIPPED_BACKBONES, id2label=LABELS, class_concepts=CONCEPTS)
    sources = {
        "clip": CLIPModel.from_pretrained(stand_ins / "co2s-tiny-clip").vision_model,
        "dinov3": DINOv3ViTModel.from_pretrained(stand_ins / "co2s-tiny-dinov3"),
    }
    for student, source in sources.items():
        loaded = getattr(model, student).encoder.vision_model.state_dict()
        for name, tensor in source.state_dict().items():
            assert tensor.dtype == torch.float16 or not tensor.is_floating_point()
            assert loaded[name].dtype != torch.float16 and torch.equal(loaded[name], tensor.to(loaded[name])), name
    clip = stand_ins / "co2s-tiny-clip"
    torch.testing.assert_close(model.clip.guidance.embeddings, expected_embeddings(clip), atol=1e-5, rtol=1e-5)
    config = model.config
    assert (list(config.clip_feature_layers), list(config.dinov3_feature_layers)) == ([0, 2, 5], [1, 3, 5])
    assert {name: getattr(config, name) for name in SMALL_DECODER} == SMALL_DECODER
    assert (config.clip_image_mean[0], config.dinov3_image_mean[0]) == (0.48145466, 0.485)

    # The classes of the saved model change with the text encoder of the package, which has no path in the model.
    model.save_pretrained(tmp_path)
    assert str(stand_ins) not in (tmp_path / "config.json").read_text(encoding="utf-8")
    loaded = Co2SForSemanticSegmentation.from_pretrained(tmp_path)
    assert loaded.config.text_encoder == "co2s-tiny-clip"
    changed = {"land": ["land", "bare soil"], "water": ["river"]}
    loaded.set_class_concepts(changed)
    torch.testing.assert_close(
        loaded.clip.guidance.embeddings, expected_embeddings(clip, changed), atol=1e-5, rtol=1e-5
    )
    loaded.set_class_concepts(CONCEPTS, text_encoder="co2s-tiny-clip")
    assert loaded.config.text_encoder == "co2s-tiny-clip"


def test_a_shipped_name_means_the_package_and_not_the_working_directory(stand_ins, tmp_path, monkeypatch):
    (tmp_path / "co2s-tiny-clip").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_backbone("co2s-tiny-clip") == str(stand_ins / "co2s-tiny-clip")
    assert find_backbone("./co2s-tiny-clip") == "./co2s-tiny-clip"
    assert find_backbone("openai/clip-vit-base-patch16") == "openai/clip-vit-base-patch16"


def test_the_package_is_found_wherever_this_module_lies(tmp_path, monkeypatch):
    assert assets_folder() == Path(co2s_hf.__file__).parent / "assets"
    monkeypatch.setattr(text_guidance_co2s, "find_spec", lambda name: None)
    with pytest.raises(OSError, match=r"'co2s-tiny-dinov3' ships with the package co2s_hf, .* pip install co2s_hf$"):
        find_backbone("co2s-tiny-dinov3")
    monkeypatch.setattr(text_guidance_co2s, "assets_folder", lambda: tmp_path)
    expected = f"this installation has no {re.escape(str(tmp_path / 'co2s-tiny-clip'))}.* pip install co2s_hf"
    with pytest.raises(OSError, match=expected):
        encode_class_concepts(CONCEPTS, "co2s-tiny-clip")


def test_unknown_words_bring_one_warning_with_the_known_words(stand_ins, warnings):
    concepts = {"roof": ["red roof", "a roof"], "road": ["road", "Asphalt road"], "water": ["lake"]}
    embeddings = encode_class_concepts(concepts, "co2s-tiny-clip")
    expected = expected_embeddings(stand_ins / "co2s-tiny-clip", concepts)
    torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=1e-5)
    (warning,) = warnings()
    assert "'co2s-tiny-clip' does not know these words" in warning and "roof: red, roof; road: Asphalt." in warning
    known = "a, bare, building, lake, land, of, photo, river, road, sand, soil, trees, vehicles, water"
    assert warning.endswith(f"It knows 14 words: {known}.")


def test_known_words_bring_no_warning(stand_ins, backbones, warnings):
    encode_class_concepts({"land": ["Bare soil", "land"], "water": ["water"]}, "co2s-tiny-clip")
    encode_class_concepts(CONCEPTS, str(backbones[0]))
    assert not warnings()


def test_long_vocabularies_are_not_listed(stand_ins, warnings, monkeypatch):
    monkeypatch.setattr(text_guidance_co2s, "LONGEST_WORD_LIST", 5)
    encode_class_concepts({"roof": ["roof"], "water": ["water"]}, "co2s-tiny-clip")
    (warning,) = warnings()
    assert "roof: roof" in warning and "It knows" not in warning


def test_a_tokenizer_without_unknown_token_knows_all_words(stand_ins):
    tokenizer = AutoTokenizer.from_pretrained(stand_ins / "co2s-tiny-clip")
    assert unknown_words({"roof": ["roof", "roof"]}, tokenizer) == {"roof": ["roof"]}
    tokenizer.unk_token = None
    assert unknown_words({"roof": ["roof"]}, tokenizer) == {}


def test_classes_without_names_get_random_orthogonal_vectors(stand_ins):
    torch.manual_seed(4)
    model = Co2SForSemanticSegmentation.from_backbones(
        *SHIPPED_BACKBONES, id2label=LABELS, palette=[[9, 9, 9], [0, 0, 9]], text_embeddings="random"
    )
    embeddings = model.clip.guidance.embeddings
    torch.testing.assert_close(embeddings @ embeddings.T, torch.eye(2), atol=1e-5, rtol=0)
    assert (model.config.class_concepts, model.config.text_encoder) == (None, None)
    assert model.config.palette == [[9, 9, 9], [0, 0, 9]] and model.config.id2label == LABELS
    with pytest.raises(ValueError, match="`text_embeddings` is 'Random'; give a tensor, 'random' or None"):
        Co2SForSemanticSegmentation.from_backbones("/no", "/no", id2label=LABELS, text_embeddings="Random")


@pytest.mark.parametrize("name", SHIPPED_BACKBONES)
def test_the_card_of_a_shipped_backbone_has_the_hash_of_its_weights(name):
    folder = assets_folder() / name
    if not (folder / "model.safetensors").exists():
        pytest.skip(f"{folder} has no weights yet")
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    card = ModelCard.load(folder / "README.md")
    assert re.findall(r"\b[0-9a-f]{64}\b", card.text) == [found]
    assert card.data.license == "apache-2.0" and "TO FILL IN" not in card.text
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.float16}


def test_the_shipped_backbones_load_without_a_network(no_network):
    folders = [assets_folder() / name for name in SHIPPED_BACKBONES]
    if not all((folder / "model.safetensors").exists() for folder in folders):
        pytest.skip("the shipped backbones have no weights yet")
    model = Co2SForSemanticSegmentation.from_backbones(*SHIPPED_BACKBONES, id2label=LABELS, class_concepts=CONCEPTS)
    for student, folder in zip(("clip", "dinov3"), folders, strict=True):
        weights = load_file(folder / "model.safetensors")
        name = "encoder.layers.0.mlp.fc1.weight" if student == "clip" else "layer.0.mlp.up_proj.weight"
        (saved,) = (value for key, value in weights.items() if key.endswith(name) and "text_model" not in key)
        (loaded,) = (p for key, p in getattr(model, student).encoder.named_parameters() if key.endswith(name))
        assert torch.equal(loaded, saved.float())
    expected = expected_embeddings(folders[0])
    torch.testing.assert_close(model.clip.guidance.embeddings, expected, atol=1e-5, rtol=1e-5)
    assert sum(path.stat().st_size for folder in folders for path in folder.iterdir()) <= 14_000_000
