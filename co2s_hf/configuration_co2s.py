"""Configuration of Co2S (arXiv 2512.23035): two segmentation students, CLIP and DINOv3, and how they are fused."""

import copy
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

# Statistics that DINOv3's satellite checkpoints (`...-pretrain-sat493m`) were trained with.
SAT493M_MEAN = [0.430, 0.411, 0.296]
SAT493M_STD = [0.213, 0.156, 0.143]

# Where the code that is saved with a checkpoint has its pipeline, for those who load it without this package.
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
    Holds every size of a [`Co2SForSemanticSegmentation`]. The defaults are the paper's: two ViT-B/16 towers and a
    decoder of 128 channels.

    Args:
        clip_config (`CLIPVisionConfig` or `dict`, *optional*):
            CLIP student's vision tower. Defaults to ViT-B/16; what a dictionary leaves out has transformers' own
            default instead. `projection_dim` is the width of the class-text
            embeddings.
        dinov3_config (`DINOv3ViTConfig` or `dict`, *optional*):
            DINOv3 student's tower. Defaults to ViT-B/16 with 4 register tokens. Its random RoPE augmentation
            (`pos_embed_shift`, `pos_embed_jitter`, `pos_embed_rescale`) is always switched off: a position must mean
            the same in every view of an image.
        clip_feature_layers (`list[int]`, *optional*, defaults to `(0, 4, 11)`):
            CLIP layers (counted from 0, lowest first) whose value-path features feed the decoder. The last one gives
            the dense image embeddings that are compared with the class text.
        dinov3_feature_layers (`list[int]`, *optional*, defaults to `(2, 7, 11)`):
            DINOv3 layers (counted from 0, lowest first) whose layer-normed outputs feed the decoder. The last one is
            compared with the learnable queries.
        decoder_channels (`int`, *optional*, defaults to 128):
            Channels of a class map inside the decoder.
        decoder_guidance_channels (`int`, *optional*, defaults to 128):
            Channels the class guidance is projected to before the semantic layers.
        decoder_kernel_size (`int`, *optional*, defaults to 7):
            Kernel of the convolution that lifts a similarity map to `decoder_channels`. Odd.
        decoder_dilations (`list[int]`, *optional*, defaults to `(6, 12, 18)`):
            Dilations of the ASPP's 3x3 branches.
        decoder_num_layers (`int`, *optional*, defaults to 2):
            Number of semantic layers (attention between classes).
        decoder_num_attention_heads (`int`, *optional*, defaults to 4):
            Heads of a semantic layer. Must divide `decoder_channels + decoder_guidance_channels`.
        decoder_mlp_ratio (`int`, *optional*, defaults to 4):
            Width of a semantic layer's MLP, in multiples of `decoder_channels`.
        decoder_pool_size (`int`, *optional*, defaults to 4):
            Semantic layers attend on maps average-pooled by this factor.
        decoder_layer_norm_eps (`float`, *optional*, defaults to 1e-05):
            Epsilon of the semantic layers' layer norms.
        decoder_skip_channels (`list[int]`, *optional*, defaults to `(32, 16)`):
            Channels that the middle and the low feature map are projected to, one per upsampling step.
        decoder_up_channels (`list[int]`, *optional*, defaults to `(64, 32)`):
            Output channels of each upsampling step. There is one feature layer more than there are steps.
        decoder_group_norm_channels (`int`, *optional*, defaults to 16):
            Channels per group in the decoder's group norms. Must divide `decoder_channels` and every entry of
            `decoder_up_channels`.
        image_mean (`list[float]`, *optional*, defaults to ImageNet's):
            Mean that `pixel_values` were normalised with: what the image processor uses.
        image_std (`list[float]`, *optional*, defaults to ImageNet's):
            Standard deviation that `pixel_values` were normalised with.
        clip_image_mean (`list[float]`, *optional*, defaults to CLIP's):
            Mean the CLIP tower expects; the model re-normalises. ImageNet's for the authors' checkpoints.
        clip_image_std (`list[float]`, *optional*, defaults to CLIP's):
            Standard deviation the CLIP tower expects.
        dinov3_image_mean (`list[float]`, *optional*, defaults to ImageNet's):
            Mean the DINOv3 tower expects. `0.430 0.411 0.296` for its satellite weights (`sat493m`).
        dinov3_image_std (`list[float]`, *optional*, defaults to ImageNet's):
            Standard deviation the DINOv3 tower expects. `0.213 0.156 0.143` for its satellite weights.
        clip_logits_size (`int`, *optional*):
            Side of the square that the CLIP student's logits are first resized to. Only for checkpoints converted
            from the authors' code (224 there); `None` goes straight to the input size.
        dinov3_logits_size (`int`, *optional*):
            The same for the DINOv3 student (256 in the authors' code).
        palette (`list[list[int]]`, *optional*):
            One RGB colour (0 to 255) per label, in label order.
        class_concepts (`dict[str, list[str]]`, *optional*):
            For every label the words its text embedding is the mean of.
        text_encoder (`str`, *optional*):
            Hub name or local folder of the CLIP checkpoint whose text tower encodes class concepts.
        semantic_loss_ignore_index (`int`, *optional*, defaults to 255):
            Label of pixels that no loss and no metric looks at. Must not be a class.
        fusion (`str`, *optional*, defaults to `"confidence"`):
            How the students' predictions become one: `"confidence"` (per pixel the surer student, the paper's rule),
            `"average"` (mean of the probabilities), `"clip"` or `"dinov3"` (that student alone; the other is not
            computed).
        crop_size (`int`, *optional*):
            Side in pixels of the crops that the model was trained on, and so of the windows in which larger images
            are best predicted.
        image_bands (`list[int]`, *optional*):
            Bands (from 1) of the training files that were red, green and blue, where they were not plain RGB.
        image_scale (`list[list[float]]`, *optional*):
            `[low, high]` of those bands, or one pair for all: the values that became 0 and 255.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the learnable queries' initialisation.

    Raises:
        huggingface_hub.errors.StrictDataclassError: a value that cannot work, or of the wrong type. The message names
            the field, the value and what is allowed.

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
    crop_size: int | None = None
    image_bands: list[int] | tuple[int, ...] | None = None
    image_scale: list[list[float | int]] | list[tuple[float | int, ...]] | tuple[tuple[float, ...], ...] | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if not __name__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME):
            # transformers would ask to trust the checkpoint's code; whoever has this package need not.
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)
        if self.id2label is not None and self.label2id is None:
            self.label2id = {label: index for index, label in self.id2label.items()}
        if self.class_concepts is not None:
            # Saved JSON has sorted keys; the concepts' order is the labels' (unknown names, refused below, go last).
            rank = {label: index for index, label in self.id2label.items()}
            by_label = sorted(self.class_concepts.items(), key=lambda item: rank.get(item[0], len(rank)))
            self.class_concepts = dict(by_label)
        # On a copy: the caller's config object is theirs.
        self.dinov3_config = copy.deepcopy(self.dinov3_config)
        self.dinov3_config.pos_embed_shift = None
        self.dinov3_config.pos_embed_jitter = None
        self.dinov3_config.pos_embed_rescale = None

    def to_dict(self):
        """All fields, and where a checkpoint's own pipeline is."""
        return super().to_dict() | {"custom_pipelines": copy.deepcopy(CUSTOM_PIPELINES)}

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Build from a saved dictionary; keywords override it.

        New labels (`id2label` or `num_labels`) drop the palette and the concepts of the old ones, and all overrides
        are validated together.
        """
        # The base class merges dictionaries into sub-configs and converts `dtype`; every other field is set here.
        left = {"dtype", *cls.sub_configs_defaults}
        overrides = {
            key: kwargs.pop(key) for key in list(kwargs) if key in cls.__dataclass_fields__ and key not in left
        }
        num_labels = kwargs.pop("num_labels", None)
        if num_labels is not None and num_labels != len(config_dict.get("id2label") or range(2)):
            overrides.setdefault("id2label", {index: f"LABEL_{index}" for index in range(num_labels)})
        if "id2label" in overrides:
            saved = {int(index): label for index, label in (config_dict.get("id2label") or {}).items()}
            if {int(index): label for index, label in overrides["id2label"].items()} != saved:
                config_dict = {**config_dict, "palette": None, "class_concepts": None, "label2id": None}
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    def validate_labels(self):
        """Check that labels, palette, concepts and ignore index describe the same classes."""
        expected = list(range(self.num_labels))
        if len(expected) < 2:
            raise ValueError(f"`id2label` is {self.id2label}; a segmentation needs two classes or more.")
        if sorted(self.id2label) != expected:
            raise ValueError(
                f"`id2label` has the keys {sorted(self.id2label)}, but the labels of {self.num_labels} classes are "
                f"0 to {self.num_labels - 1}."
            )
        inverse = {label: index for index, label in self.id2label.items()}
        if len(inverse) != self.num_labels:
            raise ValueError(f"`id2label` names a class twice: {list(self.id2label.values())}.")
        if {label: int(index) for label, index in self.label2id.items()} != inverse:
            raise ValueError(
                f"`label2id` ({self.label2id}) is not the inverse of `id2label` ({self.id2label}). Leave it out to "
                "have it derived."
            )
        if 0 <= self.semantic_loss_ignore_index < self.num_labels:
            raise ValueError(
                f"`semantic_loss_ignore_index` is {self.semantic_loss_ignore_index}, which is also the class "
                f"'{self.id2label[self.semantic_loss_ignore_index]}'. Use 255 or a negative number."
            )
        if self.palette is not None:
            if len(self.palette) != self.num_labels:
                raise ValueError(
                    f"`palette` has {len(self.palette)} colours for {self.num_labels} labels. Give one RGB colour per "
                    "label, or None."
                )
            for colour in self.palette:
                if len(colour) != 3 or not all(0 <= value <= 255 for value in colour):
                    raise ValueError(f"`palette` holds {colour}; a colour is three integers from 0 to 255.")
        if self.class_concepts is not None:
            if set(self.class_concepts) != set(inverse):
                raise ValueError(
                    f"`class_concepts` describes {list(self.class_concepts)}, but the labels are {list(inverse)}. "
                    "Give concepts for every label."
                )
            empty = [label for label, concepts in self.class_concepts.items() if not concepts]
            if empty:
                raise ValueError(f"`class_concepts` has no concept for {empty}. Give at least the class's own name.")

    def validate_towers(self):
        """Check what the model asks of the two backbones, and the layers that are tapped."""
        num_features = len(self.decoder_up_channels) + 1
        for name in ("clip", "dinov3"):
            tower = getattr(self, f"{name}_config")
            for field in ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"):
                if getattr(tower, field) < 1:
                    raise ValueError(f"`{name}_config.{field}` is {getattr(tower, field)}; it must be at least 1.")
            if not isinstance(tower.patch_size, int) or tower.patch_size < 1:
                raise ValueError(
                    f"`{name}_config.patch_size` is {tower.patch_size}; square patches are supported, given as one "
                    "integer of at least 1."
                )
            layers = list(getattr(self, f"{name}_feature_layers"))
            last = tower.num_hidden_layers - 1
            if len(layers) != num_features:
                raise ValueError(
                    f"`{name}_feature_layers` is {layers}: the decoder takes {num_features} feature layers, one more "
                    f"than `decoder_up_channels` ({list(self.decoder_up_channels)}) has entries."
                )
            if layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] > last:
                raise ValueError(
                    f"`{name}_feature_layers` is {layers}: layers must rise and lie between 0 and {last}, since "
                    f"`{name}_config.num_hidden_layers` is {tower.num_hidden_layers}."
                )
            if tower.hidden_size % tower.num_attention_heads:
                raise ValueError(
                    f"`{name}_config.hidden_size` ({tower.hidden_size}) is not divisible by its "
                    f"`num_attention_heads` ({tower.num_attention_heads})."
                )
            logits_size = getattr(self, f"{name}_logits_size")
            if logits_size is not None and logits_size < 1:
                raise ValueError(f"`{name}_logits_size` is {logits_size}; it must be at least 1, or None.")
        if self.crop_size is not None and self.crop_size < 1:
            raise ValueError(f"`crop_size` is {self.crop_size}; it must be at least 1, or None.")
        clip = self.clip_config
        if not isinstance(clip.image_size, int) or clip.image_size < clip.patch_size or clip.projection_dim < 1:
            raise ValueError(
                f"`clip_config` has `image_size` {clip.image_size} and `projection_dim` {clip.projection_dim}; the "
                f"first must be one integer of at least the patch size ({clip.patch_size}), the second at least 1."
            )
        if clip.num_channels != self.dinov3_config.num_channels:
            raise ValueError(
                f"`clip_config.num_channels` ({clip.num_channels}) and `dinov3_config.num_channels` "
                f"({self.dinov3_config.num_channels}) differ, but both students see the same image."
            )
        head_size = self.dinov3_config.hidden_size // self.dinov3_config.num_attention_heads
        if head_size % 4:
            raise ValueError(
                f"`dinov3_config` has heads of {head_size} channels (`hidden_size` / `num_attention_heads`); its "
                "rotary embedding needs a multiple of 4."
            )

    def validate_decoder(self):
        """Check the decoder's channel arithmetic."""
        positive = ("channels", "guidance_channels", "kernel_size", "num_layers", "num_attention_heads", "mlp_ratio")
        for name in (*positive, "pool_size", "group_norm_channels"):
            if (value := getattr(self, f"decoder_{name}")) < 1:
                raise ValueError(f"`decoder_{name}` is {value}; it must be at least 1.")
        if not self.decoder_layer_norm_eps > 0:
            raise ValueError(f"`decoder_layer_norm_eps` is {self.decoder_layer_norm_eps}; it must be above 0.")
        if self.decoder_kernel_size % 2 == 0:
            raise ValueError(f"`decoder_kernel_size` is {self.decoder_kernel_size}; it must be odd.")
        if not self.decoder_dilations or min(self.decoder_dilations) < 1:
            raise ValueError(f"`decoder_dilations` is {self.decoder_dilations}; give one or more, each at least 1.")
        width = self.decoder_channels + self.decoder_guidance_channels
        if width % self.decoder_num_attention_heads:
            raise ValueError(
                f"`decoder_channels` + `decoder_guidance_channels` = {width} is not divisible by "
                f"`decoder_num_attention_heads` ({self.decoder_num_attention_heads})."
            )
        group = self.decoder_group_norm_channels
        for name, value in [
            ("channels", self.decoder_channels),
            *(("up_channels", c) for c in self.decoder_up_channels),
        ]:
            if value < group or value % group:
                raise ValueError(
                    f"`decoder_{name}` holds {value}, which group norm cannot split into groups of "
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
                    f"`decoder_skip_channels` holds {skip}, but its upsampling step has {channels} input channels to "
                    f"share with it. Use 1 to {channels - 1}."
                )

    def validate_fusion(self):
        """Check the fusion rule's name."""
        if self.fusion not in FUSIONS:
            raise ValueError(f"`fusion` is '{self.fusion}'; choose one of {', '.join(FUSIONS)}.")

    def validate_normalization(self):
        """Check that every mean and standard deviation fits the image's channels."""
        num_channels = self.clip_config.num_channels
        for name in ("image", "clip_image", "dinov3_image"):
            for statistic in ("mean", "std"):
                values = getattr(self, f"{name}_{statistic}")
                if len(values) != num_channels:
                    raise ValueError(
                        f"`{name}_{statistic}` is {list(values)}; images have {num_channels} channels, give one "
                        "number for each."
                    )
            if not all(value > 0 for value in getattr(self, f"{name}_std")):  # NaN is not above 0 either
                raise ValueError(f"`{name}_std` is {list(getattr(self, f'{name}_std'))}; it must be above 0.")


__all__ = ["FUSIONS", "SAT493M_MEAN", "SAT493M_STD", "Co2SConfig"]
