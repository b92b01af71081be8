"""Configuration of Co2S (arXiv 2512.23035): a CLIP student, a DINOv3 student and the rule that fuses them."""

import copy
import math
from itertools import pairwise

from huggingface_hub.dataclasses import strict
from transformers import CLIPVisionConfig, DINOv3ViTConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME
from transformers.utils.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)


FUSIONS = ("confidence", "average", "clip", "dinov3")

# The image statistics that DINOv3's satellite weights (`...-pretrain-sat493m`) were trained with.
SAT493M_MEAN = [0.430, 0.411, 0.296]
SAT493M_STD = [0.213, 0.156, 0.143]

# Limits for the files of strangers: larger sizes take all memory, before weights are looked for or in a prediction.
MOST_LAYERS, MOST_CHANNELS, MOST_CLASSES, LARGEST_SIDE = 1000, 2**16, 255, 2**13
MOST_IN_BACKBONE = {"hidden_size": MOST_CHANNELS, "intermediate_size": MOST_CHANNELS, "num_channels": MOST_CHANNELS}
MOST_IN_BACKBONE |= {"num_attention_heads": MOST_CHANNELS, "num_hidden_layers": MOST_LAYERS}

# Decoder sizes for backbones of a hidden size up to `SMALL_WIDTH`. The paper's decoders would need most of the time.
SMALL_WIDTH = 256
SMALL_DECODER = {
    "decoder_channels": 32,
    "decoder_guidance_channels": 32,
    "decoder_skip_channels": (8, 8),
    "decoder_up_channels": (16, 16),
}

# Entry of every saved config.json. It names the pipeline class in the code beside the weights, so that
# `pipeline(..., trust_remote_code=True)` works without this package.
CUSTOM_PIPELINES = {
    "image-segmentation": {
        "impl": "image_processing_co2s.Co2SImageSegmentationPipeline",
        "pt": ["AutoModelForSemanticSegmentation"],
        "type": "image",
    }
}


@strict
class Co2SConfig(PreTrainedConfig):
    r"""
    Configuration of a [`Co2SForSemanticSegmentation`].

    The defaults are the paper's sizes: two ViT-B/16 backbones, and decoders of 128 channels.

    Args:
        clip_config (`CLIPVisionConfig` or `dict`, *optional*):
            Vision backbone of the CLIP student. Defaults to ViT-B/16. Fields that are missing in a dictionary get the
            defaults of transformers' `CLIPVisionConfig`. `projection_dim` is the width of the class-text embeddings.
        dinov3_config (`DINOv3ViTConfig` or `dict`, *optional*):
            Backbone of the DINOv3 student. Defaults to ViT-B/16 with 4 register tokens. The random RoPE augmentation
            (`pos_embed_shift`, `pos_embed_jitter`, `pos_embed_rescale`) is always switched off, because a position
            must have the same embedding in every view of an image.
        clip_feature_layers (`list[int]`, *optional*, defaults to `(0, 4, 11)`):
            CLIP layers (counted from 0, lowest first) whose value-path features the decoder uses. The features of the
            last one become dense image embeddings, which the decoder compares with the class text.
        dinov3_feature_layers (`list[int]`, *optional*, defaults to `(2, 7, 11)`):
            DINOv3 layers (counted from 0, lowest first) whose outputs the decoder uses, after the final layer norm.
            The decoder compares the last output with the learnable queries.
        decoder_channels (`int`, *optional*, defaults to 128):
            Channels of a class map inside the decoder.
        decoder_guidance_channels (`int`, *optional*, defaults to 128):
            Channels of the class guidance after its projection, in the semantic layers.
        decoder_kernel_size (`int`, *optional*, defaults to 7):
            Kernel size of the convolution from a similarity map to `decoder_channels`. Must be odd.
        decoder_dilations (`list[int]`, *optional*, defaults to `(6, 12, 18)`):
            Dilations of the ASPP's 3x3 branches.
        decoder_num_layers (`int`, *optional*, defaults to 2):
            Number of semantic layers (attention between classes).
        decoder_num_attention_heads (`int`, *optional*, defaults to 4):
            Attention heads of a semantic layer. Must divide `decoder_channels + decoder_guidance_channels`.
        decoder_mlp_ratio (`int`, *optional*, defaults to 4):
            Width of a semantic layer's MLP, in multiples of `decoder_channels`.
        decoder_pool_size (`int`, *optional*, defaults to 4):
            Factor by which maps are average-pooled before the attention of a semantic layer.
        decoder_layer_norm_eps (`float`, *optional*, defaults to 1e-05):
            Epsilon of the semantic layers' layer norms.
        decoder_skip_channels (`list[int]`, *optional*, defaults to `(32, 16)`):
            Channels of the middle and the lowest feature map after their projection, one number per upsampling step.
        decoder_up_channels (`list[int]`, *optional*, defaults to `(64, 32)`):
            Output channels of each upsampling step. There must be one more feature layer than steps.
        decoder_group_norm_channels (`int`, *optional*, defaults to 16):
            Channels per group in the decoder's group norms. Must divide `decoder_channels` and every entry of
            `decoder_up_channels`.
        image_mean (`list[float]`, *optional*, defaults to ImageNet's):
            Mean with which the image processor normalises `pixel_values`.
        image_std (`list[float]`, *optional*, defaults to ImageNet's):
            Standard deviation with which the image processor normalises `pixel_values`.
        clip_image_mean (`list[float]`, *optional*, defaults to CLIP's):
            Mean that the CLIP backbone expects. The model converts `pixel_values` from `image_mean` to this mean. The
            authors' weights expect ImageNet's mean.
        clip_image_std (`list[float]`, *optional*, defaults to CLIP's):
            Standard deviation that the CLIP backbone expects.
        dinov3_image_mean (`list[float]`, *optional*, defaults to ImageNet's):
            Mean that the DINOv3 backbone expects. `0.430 0.411 0.296` for its satellite weights (`sat493m`).
        dinov3_image_std (`list[float]`, *optional*, defaults to ImageNet's):
            Standard deviation that the DINOv3 backbone expects. `0.213 0.156 0.143` for its satellite weights.
        clip_logits_size (`int`, *optional*):
            Side in pixels of a square. The CLIP student's logits are first resized to this square, then to the input's
            size. Models that are converted from the authors' code need it (224). `None`: resize only once.
        dinov3_logits_size (`int`, *optional*):
            The same for the DINOv3 student (256 in the authors' code).
        palette (`list[list[int]]`, *optional*):
            One RGB colour (0 to 255) per class, in label order.
        class_concepts (`dict[str, list[str]]`, *optional*):
            Concepts (words or phrases) of every class. A class's text embedding is the mean of its concepts'
            embeddings.
        text_encoder (`str`, *optional*):
            Hub name or local folder of the CLIP model that encodes class concepts.
        semantic_loss_ignore_index (`int`, *optional*, defaults to 255):
            Label of the pixels that the model's own loss leaves out, `model(pixel_values, labels=labels)`. Must not be
            a class. The data, training and evaluation of this package always use 255 for pixels without a class.
        fusion (`str`, *optional*, defaults to `"confidence"`):
            How to fuse the students' predictions: `"confidence"` (per pixel, the student with the higher maximum
            probability, as in the paper), `"average"` (mean of the probabilities), `"clip"` or `"dinov3"` (that
            student alone; the other one is not computed).
        clip_temperature (`float`, *optional*, defaults to 1.0):
            Temperature of the CLIP student. Its class probabilities are the softmax of its logits divided by this
            number, which does not change the predicted class. Above 1: the student is less confident. The fusion
            compares and returns these probabilities.
        dinov3_temperature (`float`, *optional*, defaults to 1.0):
            The same for the DINOv3 student.
        crop_size (`int`, *optional*):
            Side in pixels of the training crops. Larger images should be predicted in windows of this size.
        image_bands (`list[int]`, *optional*):
            Bands (counted from 1) of the training files that were used as red, green and blue. `None` if the files
            were RGB images.
        image_scale (`list[list[float]]`, *optional*):
            `[low, high]` for each of these bands, or one pair for all: the values that were mapped to 0 and 255.
        ground_sampling_distance_m (`float`, *optional*):
            Height and width on the ground, in metres, of a pixel of the training images as the model saw them: after
            `base_size`, before the random scale. `None`: unknown.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of newly initialised learnable queries.

    Raises:
        huggingface_hub.errors.StrictDataclassError: A value has the wrong type or is not allowed. The message names
            the field, the value and the allowed values.

    Example:

    ```python
    >>> from co2s_hf import Co2SConfig, Co2SForSemanticSegmentation

    >>> config = Co2SConfig(id2label={0: "building", 1: "road"})
    >>> model = Co2SForSemanticSegmentation(config)  # ViT-B/16 students with random weights
    ```"""

    model_type = "co2s"
    keys_to_ignore_at_inference = [
        "clip_logits",
        "dinov3_logits",
        "clip_hidden_states",
        "dinov3_hidden_states",
        "clip_attentions",
        "dinov3_attentions",
    ]
    sub_configs_defaults = {
        "clip_config": SubConfigSpec(CLIPVisionConfig, init_kwargs={"patch_size": 16}),
        "dinov3_config": SubConfigSpec(
            DINOv3ViTConfig,
            init_kwargs={
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_attention_heads": 12,
                "num_register_tokens": 4,
                "layer_norm_eps": 1e-6,
            },
        ),
    }

    clip_config: dict | CLIPVisionConfig | None = None
    dinov3_config: dict | DINOv3ViTConfig | None = None
    clip_feature_layers: list[int] | tuple[int, ...] = (0, 4, 11)
    dinov3_feature_layers: list[int] | tuple[int, ...] = (2, 7, 11)

    decoder_channels: int = 128
    decoder_guidance_channels: int = 128
    decoder_kernel_size: int = 7
    decoder_dilations: list[int] | tuple[int, ...] = (6, 12, 18)
    decoder_num_layers: int = 2
    decoder_num_attention_heads: int = 4
    decoder_mlp_ratio: int = 4
    decoder_pool_size: int = 4
    decoder_layer_norm_eps: float = 1e-5
    decoder_skip_channels: list[int] | tuple[int, ...] = (32, 16)
    decoder_up_channels: list[int] | tuple[int, ...] = (64, 32)
    decoder_group_norm_channels: int = 16

    image_mean: list[float | int] | tuple[float | int, ...] = tuple(IMAGENET_DEFAULT_MEAN)
    image_std: list[float | int] | tuple[float | int, ...] = tuple(IMAGENET_DEFAULT_STD)
    clip_image_mean: list[float | int] | tuple[float | int, ...] = tuple(OPENAI_CLIP_MEAN)
    clip_image_std: list[float | int] | tuple[float | int, ...] = tuple(OPENAI_CLIP_STD)
    dinov3_image_mean: list[float | int] | tuple[float | int, ...] = tuple(IMAGENET_DEFAULT_MEAN)
    dinov3_image_std: list[float | int] | tuple[float | int, ...] = tuple(IMAGENET_DEFAULT_STD)
    clip_logits_size: int | None = None
    dinov3_logits_size: int | None = None

    palette: list[list[int]] | list[tuple[int, ...]] | tuple[tuple[int, ...], ...] | None = None
    class_concepts: dict[str, list[str]] | dict[str, tuple[str, ...]] | None = None
    text_encoder: str | None = None
    semantic_loss_ignore_index: int = 255
    fusion: str = "confidence"
    clip_temperature: float | int = 1.0
    dinov3_temperature: float | int = 1.0
    crop_size: int | None = None
    image_bands: list[int] | tuple[int, ...] | None = None
    image_scale: list[list[float | int]] | list[tuple[float | int, ...]] | tuple[tuple[float, ...], ...] | None = None
    ground_sampling_distance_m: float | int | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if not __name__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME):
            # With this entry, `pipeline` would require `trust_remote_code=True`, although this package is installed.
            kwargs.pop("custom_pipelines", None)
        _check_number_of_classes(kwargs.get("num_labels"))  # the base class makes a name for each of them
        for name in ("clip_config", "dinov3_config"):
            if isinstance(getattr(self, name), dict):
                check_backbone(getattr(self, name), f"{name}.")
        super().__post_init__(**kwargs)
        if self.id2label is not None and self.label2id is None:
            self.label2id = {label: index for index, label in self.id2label.items()}
        if self.class_concepts is not None:
            # The keys of saved JSON are sorted by name: restore the label order. Unknown names go last;
            # `validate_labels` refuses them.
            rank = {label: index for index, label in self.id2label.items()}
            by_label = sorted(self.class_concepts.items(), key=lambda item: rank.get(item[0], len(rank)))
            self.class_concepts = dict(by_label)
        self.dinov3_config = copy.deepcopy(self.dinov3_config)  # do not change the caller's object
        self.dinov3_config.pos_embed_shift = None
        self.dinov3_config.pos_embed_jitter = None
        self.dinov3_config.pos_embed_rescale = None

    def to_dict(self) -> dict:
        """Return all fields, and the entry that names the pipeline class."""
        return super().to_dict() | {"custom_pipelines": copy.deepcopy(CUSTOM_PIPELINES)}

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> "Co2SConfig":
        """Build a configuration from a saved dictionary.

        Args:
            config_dict: Fields as [`to_dict`] returns them.
            kwargs: Fields that override saved ones. All fields are set first and validated then. If other classes are
                given (`id2label` or `num_labels`), the saved palette and class concepts are dropped.

        Returns:
            The configuration. With `return_unused_kwargs=True`, also a dictionary of unused keywords.
        """
        # The caller chooses the code that computes attention, not a file: its name may be that of a kernel on the Hub.
        # Saved configurations do not contain this field.
        config_dict = {key: value for key, value in config_dict.items() if key != "attn_implementation"}
        # The base class handles sub-configurations and `dtype`. Set the other fields here.
        left_to_base = {"dtype", *cls.sub_configs_defaults}
        overrides = {
            key: kwargs.pop(key) for key in list(kwargs) if key in cls.__dataclass_fields__ and key not in left_to_base
        }
        num_labels = kwargs.pop("num_labels", None)
        _check_number_of_classes(num_labels)
        if num_labels is not None and num_labels != len(config_dict.get("id2label") or range(2)):
            overrides.setdefault("id2label", {index: f"LABEL_{index}" for index in range(num_labels)})
        if "id2label" in overrides:
            saved = {int(index): label for index, label in (config_dict.get("id2label") or {}).items()}
            if {int(index): label for index, label in overrides["id2label"].items()} != saved:
                config_dict = {**config_dict, "palette": None, "class_concepts": None, "label2id": None}
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    # `strict` calls every method named `validate_...` after initialisation.

    def validate_labels(self):
        """Check that labels, palette, concepts and ignore index fit together."""
        _check_number_of_classes(self.num_labels)
        expected = list(range(self.num_labels))
        if len(expected) < 2:
            raise ValueError(f"`id2label` is {self.id2label}; a segmentation model needs at least two classes.")
        if sorted(self.id2label) != expected:
            raise ValueError(
                f"`id2label` has the keys {sorted(self.id2label)}; {self.num_labels} classes need the keys 0 to "
                f"{self.num_labels - 1}."
            )
        inverse = {label: index for index, label in self.id2label.items()}
        if len(inverse) != self.num_labels:
            raise ValueError(f"`id2label` names a class twice: {list(self.id2label.values())}.")
        if {label: int(index) for label, index in self.label2id.items()} != inverse:
            raise ValueError(
                f"`label2id` ({self.label2id}) is not the inverse of `id2label` ({self.id2label}). Leave `label2id` "
                "out: it is then derived from `id2label`."
            )
        if 0 <= self.semantic_loss_ignore_index < self.num_labels:
            raise ValueError(
                f"`semantic_loss_ignore_index` is {self.semantic_loss_ignore_index}, which is also the class "
                f"'{self.id2label[self.semantic_loss_ignore_index]}'. Use a number that is not a class, such as -100."
            )
        self._check_palette()
        self._check_class_concepts()

    def _check_palette(self):
        if self.palette is None:
            return
        if len(self.palette) != self.num_labels:
            raise ValueError(
                f"`palette` has {len(self.palette)} colours for {self.num_labels} classes. Give one RGB colour per "
                "class, or None."
            )
        for colour in self.palette:
            if len(colour) != 3 or not all(0 <= value <= 255 for value in colour):
                raise ValueError(f"`palette` contains {colour}; a colour is three integers from 0 to 255.")

    def _check_class_concepts(self):
        if self.class_concepts is None:
            return
        if set(self.class_concepts) != set(self.id2label.values()):
            raise ValueError(
                f"`class_concepts` describes {list(self.class_concepts)}, but the classes are "
                f"{list(self.id2label.values())}. Give concepts for every class."
            )
        empty = [label for label, concepts in self.class_concepts.items() if not concepts]
        if empty:
            raise ValueError(f"`class_concepts` has no concept for {empty}. Give at least the class's own name.")

    def validate_backbones(self):
        """Check the sizes of the two backbones."""
        for name in ("clip_config", "dinov3_config"):
            backbone = getattr(self, name)
            _check_range(backbone, MOST_IN_BACKBONE, f"{name}.")
            if not isinstance(backbone.patch_size, int) or backbone.patch_size < 1:
                raise ValueError(
                    f"`{name}.patch_size` is {backbone.patch_size}; patches are square: give one integer >= 1."
                )
            if backbone.hidden_size % backbone.num_attention_heads:
                raise ValueError(
                    f"`{name}.hidden_size` ({backbone.hidden_size}) is not divisible by its `num_attention_heads` "
                    f"({backbone.num_attention_heads})."
                )
        clip, dinov3 = self.clip_config, self.dinov3_config
        _check_range(dinov3, {"num_register_tokens": MOST_CHANNELS}, "dinov3_config.", least=0)
        has_image_size = isinstance(clip.image_size, int) and clip.patch_size <= clip.image_size <= LARGEST_SIDE
        if not has_image_size or not 1 <= clip.projection_dim <= MOST_CHANNELS:
            raise ValueError(
                f"`clip_config` has `image_size` {clip.image_size} and `projection_dim` {clip.projection_dim}. "
                f"`image_size` must be one integer from the patch size ({clip.patch_size}) to {LARGEST_SIDE}, "
                f"`projection_dim` from 1 to {MOST_CHANNELS}."
            )
        if clip.num_channels != dinov3.num_channels:
            raise ValueError(
                f"`clip_config.num_channels` ({clip.num_channels}) and `dinov3_config.num_channels` "
                f"({dinov3.num_channels}) differ, but both students get the same image."
            )
        head_size = dinov3.hidden_size // dinov3.num_attention_heads
        if head_size % 4:
            raise ValueError(
                f"`dinov3_config` has attention heads of {head_size} channels (`hidden_size` / "
                "`num_attention_heads`); its rotary embedding needs a multiple of 4."
            )

    def validate_feature_layers(self):
        """Check that the feature layers exist, and that their number fits the decoder."""
        num_features = len(self.decoder_up_channels) + 1
        for name in ("clip", "dinov3"):
            layers = list(getattr(self, f"{name}_feature_layers"))
            num_layers = getattr(self, f"{name}_config").num_hidden_layers
            if len(layers) != num_features:
                raise ValueError(
                    f"`{name}_feature_layers` is {layers}: the decoder takes {num_features} feature layers, one more "
                    f"than `decoder_up_channels` ({list(self.decoder_up_channels)}) has entries."
                )
            if layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= num_layers:
                raise ValueError(
                    f"`{name}_feature_layers` is {layers}: give each layer once, in ascending order, from 0 to "
                    f"{num_layers - 1} (`{name}_config.num_hidden_layers` is {num_layers})."
                )

    def validate_sizes(self):
        """Check the sizes in pixels."""
        for name in ("clip_logits_size", "dinov3_logits_size", "crop_size"):
            if (size := getattr(self, name)) is None:
                continue
            if size < 1:
                raise ValueError(f"`{name}` is {size}; it must be at least 1, or None.")
            if size > LARGEST_SIDE:
                raise ValueError(f"`{name}` is {size}; it must be at most {LARGEST_SIDE}, or None.")

    def validate_decoder(self):
        """Check the sizes of the decoder, and that its channels are divisible by heads and groups."""
        positive = ("channels", "guidance_channels", "num_attention_heads", "mlp_ratio", "group_norm_channels")
        most = {f"decoder_{name}": MOST_CHANNELS for name in positive} | {"decoder_num_layers": MOST_LAYERS}
        _check_range(self, most | dict.fromkeys(("decoder_kernel_size", "decoder_pool_size"), LARGEST_SIDE))
        if not self.decoder_layer_norm_eps > 0:
            raise ValueError(f"`decoder_layer_norm_eps` is {self.decoder_layer_norm_eps}; it must be above 0.")
        if self.decoder_kernel_size % 2 == 0:
            raise ValueError(f"`decoder_kernel_size` is {self.decoder_kernel_size}; it must be odd.")
        dilations = self.decoder_dilations
        if not 1 <= len(dilations) <= MOST_LAYERS or not all(1 <= dilation <= LARGEST_SIDE for dilation in dilations):
            raise ValueError(f"`decoder_dilations` is {dilations}; give one or more, each from 1 to {LARGEST_SIDE}.")
        width = self.decoder_channels + self.decoder_guidance_channels
        if width % self.decoder_num_attention_heads:
            raise ValueError(
                f"`decoder_channels` + `decoder_guidance_channels` = {width} is not divisible by "
                f"`decoder_num_attention_heads` ({self.decoder_num_attention_heads})."
            )
        group = self.decoder_group_norm_channels
        normed = [("channels", self.decoder_channels), *(("up_channels", value) for value in self.decoder_up_channels)]
        for name, value in normed:
            if value < group or value % group:
                raise ValueError(
                    f"`decoder_{name}` contains {value}, which group norm cannot split into groups of "
                    f"`decoder_group_norm_channels` = {group}. Use a multiple of {group}."
                )
        if len(self.decoder_skip_channels) != len(self.decoder_up_channels):
            raise ValueError(
                f"`decoder_skip_channels` ({list(self.decoder_skip_channels)}) and `decoder_up_channels` "
                f"({list(self.decoder_up_channels)}) need one entry each per upsampling step."
            )
        inputs = [self.decoder_channels, *self.decoder_up_channels]
        for (channels, _), skip in zip(pairwise(inputs), self.decoder_skip_channels):
            if not 0 < skip < channels:
                raise ValueError(
                    f"`decoder_skip_channels` contains {skip}, but this is a part of the {channels} input channels "
                    f"of its upsampling step. Use 1 to {channels - 1}."
                )

    def validate_fusion(self):
        """Check the name of the fusion rule."""
        if self.fusion not in FUSIONS:
            raise ValueError(f"`fusion` is '{self.fusion}'; choose one of {', '.join(FUSIONS)}.")

    def validate_temperatures(self):
        """Check that the temperatures are finite and above 0."""
        for name in ("clip_temperature", "dinov3_temperature"):
            if not 0 < (temperature := getattr(self, name)) < math.inf:  # false for NaN, too
                raise ValueError(f"`{name}` is {temperature}; it must be a finite number above 0.")

    def validate_normalization(self):
        """Check that every mean and standard deviation has one usable value per image channel."""
        num_channels = self.clip_config.num_channels
        for name in ("image", "clip_image", "dinov3_image"):
            for statistic in ("mean", "std"):
                values = getattr(self, f"{name}_{statistic}")
                if len(values) != num_channels:
                    raise ValueError(
                        f"`{name}_{statistic}` is {list(values)}; images have {num_channels} channels. Give one "
                        "number per channel."
                    )
            mean, std = list(getattr(self, f"{name}_mean")), list(getattr(self, f"{name}_std"))
            if not all(math.isfinite(value) for value in mean):
                raise ValueError(f"`{name}_mean` is {mean}; every value must be a finite number.")
            if not all(0 < value < math.inf for value in std):  # false for NaN, too
                raise ValueError(f"`{name}_std` is {std}; every value must be a finite number above 0.")

    def validate_inputs(self):
        """Check the bands, the scale and the ground sampling distance with which files are read for prediction."""
        distance_m = self.ground_sampling_distance_m
        if distance_m is not None and not 0 < distance_m < math.inf:  # false for NaN, too
            raise ValueError(
                f"`ground_sampling_distance_m` is {distance_m}; it must be a finite number above 0, or None."
            )
        if self.image_bands is not None and not (self.image_bands and min(self.image_bands) >= 1):
            raise ValueError(f"`image_bands` is {list(self.image_bands)}; bands are counted from 1, or None.")
        if self.image_scale is None:
            return
        is_pair = [len(pair) == 2 and -math.inf < pair[0] < pair[1] < math.inf for pair in self.image_scale]
        if not is_pair or not all(is_pair):  # also refuses NaN
            raise ValueError(
                f"`image_scale` is {self.image_scale}; expected pairs of two finite numbers, the lower one first, or "
                "None."
            )


def check_backbone(values: dict, prefix: str = ""):
    """Refuse sizes with which a damaged `config.json` of a backbone would take all time or memory.

    A configuration is an object only after this check, because that of DINOv3 makes a name for each layer.

    Args:
        values: Content of the `config.json`. Its text and vision parts are checked, too.
        prefix: What stands in front of the names in a message.

    Raises:
        ValueError: A size is out of range.
    """
    for name, value in values.items():
        if name in ("text_config", "vision_config") and isinstance(value, dict):
            check_backbone(value, f"{prefix}{name}.")
        elif name in MOST_IN_BACKBONE and isinstance(value, int):
            _check_size(f"{prefix}{name}", value, MOST_IN_BACKBONE[name])


def _check_range(config: PreTrainedConfig, most: dict[str, int], prefix: str = "", least: int = 1):
    """Check sizes: name of the field -> largest value that is allowed. `prefix` stands in front of the names."""
    for name, largest in most.items():
        _check_size(f"{prefix}{name}", getattr(config, name), largest, least)


def _check_size(name: str, value: int, most: int, least: int = 1):
    if value < least:
        raise ValueError(f"`{name}` is {value}; it must be at least {least}.")
    if value > most:
        raise ValueError(f"`{name}` is {value}; it must be at most {most}.")


def _check_number_of_classes(number: int | None):
    if number is not None and number > MOST_CLASSES:  # label maps have 8 bits, and 255 means "no class"
        raise ValueError(f"`num_labels` is {number}; it must be at most {MOST_CLASSES}.")


__all__ = ["FUSIONS", "SAT493M_MEAN", "SAT493M_STD", "SMALL_DECODER", "SMALL_WIDTH", "Co2SConfig", "check_backbone"]
