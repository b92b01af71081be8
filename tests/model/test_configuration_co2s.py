"""The configuration: defaults, round trips, and refused values."""

import json
import re

import pytest
from helpers import make_config
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, DINOv3ViTConfig

from co2s_hf import Co2SConfig


BACKBONE = {"num_attention_heads": 4, "num_hidden_layers": 3}


def test_default_sizes_are_those_of_the_paper():
    config = Co2SConfig()
    for backbone in (config.clip_config, config.dinov3_config):
        assert (backbone.hidden_size, backbone.num_hidden_layers) == (768, 12)
        assert (backbone.num_attention_heads, backbone.patch_size) == (12, 16)
    assert config.clip_config.projection_dim == 512
    assert config.dinov3_config.num_register_tokens == 4 and not config.dinov3_config.key_bias
    assert tuple(config.clip_feature_layers) == (0, 4, 11) and tuple(config.dinov3_feature_layers) == (2, 7, 11)


def test_round_trip_keeps_every_field(tmp_path):
    concepts = {"water": ["water", "lake"], "land": ["land", "soil"], "road": ["road"]}
    config = make_config(class_concepts=concepts, fusion="average", clip_logits_size=224, dinov3_temperature=1.7)
    config.save_pretrained(tmp_path)
    for loaded in (Co2SConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
        assert list(loaded.class_concepts) == ["land", "road", "water"]  # in label order


def test_old_configurations_have_no_temperatures_and_get_1():
    content = make_config().to_dict()
    del content["clip_temperature"], content["dinov3_temperature"]
    config = Co2SConfig.from_dict(content)
    assert (config.clip_temperature, config.dinov3_temperature) == (1.0, 1.0)


def test_label2id_is_derived_from_id2label():
    assert make_config().label2id == {"land": 0, "road": 1, "water": 2}


def test_new_labels_drop_the_palette_of_the_old_ones(tmp_path):
    make_config().save_pretrained(tmp_path)
    config = Co2SConfig.from_pretrained(tmp_path, id2label={0: "roof", 1: "tree"})
    assert (config.num_labels, config.label2id, config.palette) == (2, {"roof": 0, "tree": 1}, None)
    assert Co2SConfig.from_pretrained(tmp_path, num_labels=5).num_labels == 5
    assert Co2SConfig.from_pretrained(tmp_path, num_labels=3).palette == make_config().palette
    same = {"id2label": make_config().id2label, "label2id": make_config().label2id}
    assert Co2SConfig.from_pretrained(tmp_path, **same).palette == make_config().palette


def test_rope_augmentation_is_off_and_the_given_config_is_unchanged():
    backbone = DINOv3ViTConfig(hidden_size=16, num_attention_heads=4, num_hidden_layers=3, intermediate_size=32)
    assert backbone.pos_embed_rescale == 2.0
    assert make_config(dinov3_config=backbone).dinov3_config.pos_embed_rescale is None
    assert backbone.pos_embed_rescale == 2.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fusion": "best"}, "`fusion` is 'best'; choose one of confidence, average, clip, dinov3"),
        ({"clip_feature_layers": (0, 1, 3)}, "[0, 1, 3]: give each layer once, in ascending order, from 0 to 2"),
        ({"dinov3_feature_layers": (2, 1, 0)}, "`dinov3_feature_layers` is [2, 1, 0]"),
        ({"dinov3_feature_layers": (0, 2)}, "takes 3 feature layers"),
        ({"decoder_channels": 18, "decoder_guidance_channels": 14}, "channels` contains 18, which group norm"),
        ({"decoder_up_channels": (8, 6)}, "`decoder_up_channels` contains 6"),
        ({"decoder_skip_channels": (16, 4)}, "`decoder_skip_channels` contains 16"),
        ({"decoder_skip_channels": (8,)}, "need one entry each"),
        ({"decoder_num_attention_heads": 5}, "= 32 is not divisible by `decoder_num_attention_heads` (5)"),
        ({"decoder_pool_size": 0}, "`decoder_pool_size` is 0; it must be at least 1"),
        ({"decoder_kernel_size": 4}, "`decoder_kernel_size` is 4; it must be odd"),
        ({"decoder_dilations": ()}, "`decoder_dilations` is ()"),
        ({"palette": [[0, 0, 0]]}, "`palette` has 1 colours for 3 classes"),
        ({"palette": [[0, 0, 256]] * 3}, "`palette` contains [0, 0, 256]"),
        ({"id2label": {0: "a", 2: "b"}, "palette": None}, "`id2label` has the keys [0, 2]"),
        ({"id2label": {0: "a", 1: "a"}, "palette": None}, "names a class twice"),
        ({"label2id": {"land": 1, "road": 0, "water": 2}}, "is not the inverse of `id2label`"),
        ({"class_concepts": {"land": ["land"]}}, "`class_concepts` describes ['land']"),
        ({"class_concepts": {"land": [], "road": ["r"], "water": ["w"]}}, "no concept for ['land']"),
        ({"semantic_loss_ignore_index": 1}, "which is also the class 'road'"),
        ({"image_mean": [0.5]}, "`image_mean` is [0.5]; images have 3 channels"),
        ({"clip_image_std": [1.0, 0.0, 1.0]}, "`clip_image_std` is [1.0, 0.0, 1.0]; every value must be a finite"),
        ({"clip_logits_size": 0}, "`clip_logits_size` is 0; it must be at least 1, or None"),
        ({"clip_temperature": 0.0}, "`clip_temperature` is 0.0; it must be a finite number above 0"),
        ({"dinov3_temperature": -1}, "`dinov3_temperature` is -1; it must be a finite number above 0"),
        ({"clip_temperature": float("nan")}, "`clip_temperature` is nan; it must be a finite number above 0"),
        ({"dinov3_temperature": float("inf")}, "`dinov3_temperature` is inf; it must be a finite number above 0"),
        ({"dinov3_logits_size": -1}, "`dinov3_logits_size` is -1; it must be at least 1, or None"),
        ({"crop_size": 0}, "`crop_size` is 0; it must be at least 1, or None"),
        ({"dinov3_config": {**BACKBONE, "hidden_size": 18}}, "`dinov3_config.hidden_size` (18)"),
        ({"dinov3_config": {**BACKBONE, "hidden_size": 24}}, "heads of 6 channels"),
        ({"clip_config": {**BACKBONE, "hidden_size": 18}}, "18"),  # refused by transformers' own class
        ({"clip_config": {**BACKBONE, "hidden_size": 16, "patch_size": 0}}, "`clip_config.patch_size` is 0"),
        ({"clip_config": {**BACKBONE, "hidden_size": 16, "image_size": 8}}, "`clip_config` has `image_size` 8"),
        ({"clip_config": {**BACKBONE, "hidden_size": 16, "projection_dim": 0}}, "`projection_dim` 0"),
        ({"dinov3_image_std": [1.0, float("nan"), 1.0]}, "`dinov3_image_std` is [1.0, nan, 1.0]; every value must be"),
        ({"image_mean": [0.5, float("nan"), 0.5]}, "`image_mean` is [0.5, nan, 0.5]; every value must be"),
        ({"clip_image_std": [1.0, float("inf"), 1.0]}, "`clip_image_std` is [1.0, inf, 1.0]; every value must be"),
        ({"image_bands": [3, 0, 1]}, "`image_bands` is [3, 0, 1]; bands are counted from 1"),
        ({"image_bands": []}, "`image_bands` is []"),
        ({"image_scale": [[0, 9], [0, float("nan")]]}, "`image_scale` is [[0, 9], [0, nan]]; expected pairs"),
        ({"image_scale": [[5, 5]]}, "`image_scale` is [[5, 5]]"),
        ({"image_scale": [[0, 5, 9]]}, "`image_scale` is [[0, 5, 9]]"),
        ({"image_scale": []}, "`image_scale` is []"),
        ({"ground_sampling_distance_m": 0}, "`ground_sampling_distance_m` is 0; it must be a finite number above 0"),
        ({"ground_sampling_distance_m": float("nan")}, "`ground_sampling_distance_m` is nan; it must be a finite"),
        ({"ground_sampling_distance_m": float("inf")}, "`ground_sampling_distance_m` is inf; it must be a finite"),
        ({"ground_sampling_distance_m": "0.3"}, "ground_sampling_distance_m"),
        ({"clip_config": {**BACKBONE, "num_hidden_layers": 10**9, "hidden_size": 16}}, "it must be at most 1000"),
        ({"decoder_num_layers": 10**9}, "`decoder_num_layers` is 1000000000; it must be at most 1000"),
        ({"decoder_layer_norm_eps": -1.0}, "`decoder_layer_norm_eps` is -1.0"),
        ({"id2label": {0: "all"}, "palette": None}, "a segmentation model needs at least two classes"),
        ({"decoder_channels": "many"}, "decoder_channels"),
        ({"decoder_channels": 2**20}, "`decoder_channels` is 1048576; it must be at most 65536"),
        ({"decoder_pool_size": 2**20}, "`decoder_pool_size` is 1048576; it must be at most 8192"),
        ({"decoder_dilations": (1, 2**20)}, "(1, 1048576); give one or more, each from 1 to 8192"),
        ({"clip_logits_size": 2**20}, "`clip_logits_size` is 1048576; it must be at most 8192, or None"),
        ({"crop_size": 2**20}, "`crop_size` is 1048576; it must be at most 8192, or None"),
        ({"dinov3_config": {**BACKBONE, "hidden_size": 2**20}}, "`dinov3_config.hidden_size` is 1048576; it must"),
        ({"clip_config": {**BACKBONE, "hidden_size": 16, "image_size": 2**20}}, "patch size (32) to 8192"),
        ({"num_labels": 2**40, "id2label": None, "palette": None}, "is 1099511627776; it must be at most 255"),
        ({"id2label": dict(enumerate(map(str, range(256)))), "palette": None}, "is 256; it must be at most 255"),
    ],
)  # fmt: skip
def test_errors_name_the_value_and_what_is_allowed(fields, message):
    with pytest.raises((StrictDataclassError, ValueError), match=re.escape(message)):
        make_config(**fields)


def test_a_file_does_not_choose_the_code_of_the_attention(tmp_path):
    make_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    assert "attn_implementation" not in content
    path.write_text(json.dumps(content | {"attn_implementation": "stranger/kernel"}), encoding="utf-8")
    assert Co2SConfig.from_pretrained(tmp_path)._attn_implementation is None
    assert Co2SConfig.from_pretrained(tmp_path, attn_implementation="eager")._attn_implementation == "eager"
