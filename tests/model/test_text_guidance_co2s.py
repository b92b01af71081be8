"""Text embeddings of classes, and building a model from pretrained backbones."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPModel, CLIPTokenizer, CLIPVisionModel, CLIPVisionModelWithProjection, DINOv3ViTModel

from co2s_hf import Co2SForSemanticSegmentation
from co2s_hf.model.text_guidance_co2s import encode_class_concepts


LABELS = {0: "bare_soil", 1: "water"}
CONCEPTS = {"bare_soil": ["bare soil", "sand"], "water": ["water", "lake", "river"]}


def expected_embeddings(folder, concepts=CONCEPTS):
    """Compute the embeddings one prompt at a time: padding within a batch must not change them."""
    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
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

    monkeypatch.setattr(CLIPVisionModelWithProjection, "from_pretrained", refuse)
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
