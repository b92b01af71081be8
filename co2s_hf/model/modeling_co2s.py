"""Co2S (arXiv 2512.23035): two students segment the same image, and a rule fuses their predictions.

    pixel_values -> CLIP backbone   -> feature maps -> decoder, guided by class text        -> logits -+
                                                                                                       +-> fused logits
    pixel_values -> DINOv3 backbone -> feature maps -> decoder, guided by learnable queries -> logits -+

This file defines the parts first, and then the model: backbones, class guidance, decoder, student, fusion, model. The
backbones are transformers' `CLIPVisionModel` and `DINOv3ViTModel`; this file extracts dense features from them. Both
students have the same decoder architecture, but separate weights.

Shapes: `height, width` is the size of an image in pixels, `h, w` the size of a feature map (one position per patch).
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionModel, CLIPVisionModelWithProjection, DINOv3ViTModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.utils import ModelOutput, logging
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils.generic import can_return_tuple

from .adapters_co2s import Co2SAdapterMixin
from .configuration_co2s import FUSIONS, SAT493M_MEAN, SAT493M_STD, SMALL_DECODER, SMALL_WIDTH, Co2SConfig
from .loading_co2s import Co2SStrictLoadingMixin
from .text_guidance_co2s import encode_class_concepts, load_pretrained


logger = logging.get_logger(__name__)

STUDENTS = ("clip", "dinov3")


@dataclass
class Co2SSemanticSegmenterOutput(ModelOutput):
    """Output of [`Co2SForSemanticSegmentation`].

    Args:
        loss (`torch.FloatTensor`, a scalar, *optional*, returned when `labels` is given):
            Sum of the students' cross-entropies, over the students that were computed.
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels, height, width)`):
            Fused logits at the input's size. Their softmax is the fused class probabilities. Each student's logits are
            divided by its temperature before the fusion.
        clip_logits (`torch.FloatTensor` of shape `(batch_size, num_labels, height, width)`, *optional*):
            Logits of the CLIP student, not divided by its temperature. `None` when the fusion does not compute it.
        dinov3_logits (`torch.FloatTensor` of shape `(batch_size, num_labels, height, width)`, *optional*):
            Logits of the DINOv3 student, not divided by its temperature. `None` when the fusion does not compute it.
        clip_hidden_states, dinov3_hidden_states (`tuple(torch.FloatTensor | None)`, *optional*):
            With `output_hidden_states=True`: the embeddings of the backbone, then the output of every layer, each of
            shape `(batch_size, tokens, hidden_size)`. With a list of indices, the others are `None`.
        clip_attentions, dinov3_attentions (`tuple(torch.FloatTensor)`, *optional*):
            With `output_attentions=True`: the attention weights of every layer, each of shape
            `(batch_size, num_heads, tokens, tokens)`.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    clip_logits: torch.FloatTensor | None = None
    dinov3_logits: torch.FloatTensor | None = None
    clip_hidden_states: tuple[torch.FloatTensor | None, ...] | None = None
    dinov3_hidden_states: tuple[torch.FloatTensor | None, ...] | None = None
    clip_attentions: tuple[torch.FloatTensor, ...] | None = None
    dinov3_attentions: tuple[torch.FloatTensor, ...] | None = None


# Backbones: from pixels to feature maps


class Co2SQuickGELU(nn.Module):
    """Compute CLIP's activation x * sigmoid(1.702 x) as one SiLU.

    transformers computes it in three steps. One step keeps half as many values for the backward pass.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.silu(1.702 * hidden_states) / 1.702


class Co2SClipBackbone(nn.Module):
    """CLIP's vision backbone, which returns the value-path features of its feature layers.

    On the value path (MaskCLIP, arXiv 2112.01071), a feature layer leaves out the attention between tokens. Unlike in
    MaskCLIP, the layer keeps its residual connections and its MLP.
    """

    def __init__(self, config: Co2SConfig):
        super().__init__()
        self.feature_layers = tuple(config.clip_feature_layers)
        self.patch_size = config.clip_config.patch_size
        self.vision_model = CLIPVisionModel._from_config(config.clip_config)
        if config.clip_config.hidden_act == "quick_gelu":
            for layer in self.layers:
                layer.mlp.activation_fn = Co2SQuickGELU()
        self.visual_projection = nn.Linear(
            config.clip_config.hidden_size, config.clip_config.projection_dim, bias=False
        )

    @property
    def layers(self) -> nn.ModuleList:
        return self.vision_model.encoder.layers

    def attention_modules(self) -> list[nn.Module]:
        """Return the attention modules of all layers. The paper trains only these parts of a backbone."""
        return [layer.self_attn for layer in self.layers]

    @property
    def state_indices(self) -> list[int]:
        """Indices of the inputs of the feature layers in the hidden states that transformers records."""
        return list(self.feature_layers)

    def tapped_states(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Run the layers below the last feature layer and return the hidden states that the features need.

        Args:
            pixel_values: (batch, channels, height, width); both sides are multiples of the patch size.

        Returns:
            Input of each feature layer, (batch, 1 + patches, hidden). The last feature layer is not computed.
        """
        hidden_states = self.vision_model.embeddings(pixel_values, interpolate_pos_encoding=True)
        hidden_states = self.vision_model.pre_layrnorm(hidden_states)
        states = []
        for index, layer in enumerate(self.layers[: self.feature_layers[-1]]):
            if index in self.feature_layers:
                states.append(hidden_states)
            hidden_states = layer(hidden_states, attention_mask=None)
        return [*states, hidden_states]

    def features(self, states: list[torch.Tensor], grid: tuple[int, int]) -> list[torch.Tensor]:
        """Compute the feature maps from the hidden states.

        Args:
            states: Hidden states from [`tapped_states`].
            grid: Height and width of the image in patches.

        Returns:
            Feature maps (batch, channels, *grid), lowest layer first. The last one contains image embeddings in the
            space of the class text, with length 1 at every position.
        """
        features = [self.value_path(self.layers[index], state) for index, state in zip(self.feature_layers, states)]
        embeddings = self.visual_projection(self.vision_model.post_layernorm(features[-1]))
        features[-1] = F.normalize(embeddings, dim=-1)
        # (batch, patches, channels) -> (batch, channels, h, w)
        return [feature.transpose(1, 2).unflatten(2, grid) for feature in features]

    @staticmethod
    def value_path(layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        """Compute a layer's output as if every token attended to itself alone, (batch, patches, hidden)."""
        patches = hidden_states[:, 1:]  # without the class token
        patches = patches + layer.self_attn.out_proj(layer.self_attn.v_proj(layer.layer_norm1(patches)))
        return patches + layer.mlp(layer.layer_norm2(patches))

    def record(self, pixel_values: torch.Tensor, **kwargs) -> ModelOutput:
        """Run the whole backbone with the forward of transformers, which can record hidden states and attentions."""
        return self.vision_model(pixel_values, interpolate_pos_encoding=True, **kwargs)


class Co2SDinov3Backbone(nn.Module):
    """DINOv3's backbone, which returns the outputs of its feature layers after the final layer norm."""

    def __init__(self, config: Co2SConfig):
        super().__init__()
        self.feature_layers = tuple(config.dinov3_feature_layers)
        self.patch_size = config.dinov3_config.patch_size
        self.vision_model = DINOv3ViTModel._from_config(config.dinov3_config)
        self.register_load_state_dict_pre_hook(_rename_layers_of_old_files)

    @property
    def layers(self) -> nn.ModuleList:
        return self.vision_model.model.layer

    def attention_modules(self) -> list[nn.Module]:
        """Return the attention modules of all layers. The paper trains only these parts of a backbone."""
        return [layer.attention for layer in self.layers]

    @property
    def state_indices(self) -> list[int]:
        """Indices of the outputs of the feature layers in the hidden states that transformers records."""
        return [index + 1 for index in self.feature_layers]

    def tapped_states(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Run the layers up to the last feature layer and return the hidden states that the features need.

        Args:
            pixel_values: (batch, channels, height, width); both sides are multiples of the patch size.

        Returns:
            Output of each feature layer, (batch, 1 + registers + patches, hidden).
        """
        pixel_values = pixel_values.to(self.vision_model.embeddings.patch_embeddings.weight.dtype)
        hidden_states = self.vision_model.embeddings(pixel_values)
        position_embeddings = self.vision_model.rope_embeddings(pixel_values)
        states = []
        for index, layer in enumerate(self.layers[: self.feature_layers[-1] + 1]):
            hidden_states = layer(hidden_states, position_embeddings=position_embeddings)
            if index in self.feature_layers:
                states.append(hidden_states)
        return states

    def features(self, states: list[torch.Tensor], grid: tuple[int, int]) -> list[torch.Tensor]:
        """Compute the feature maps from the hidden states.

        Args:
            states: Hidden states from [`tapped_states`].
            grid: Height and width of the image in patches.

        Returns:
            Feature maps (batch, hidden, *grid), lowest layer first.
        """
        num_prefix_tokens = 1 + self.vision_model.config.num_register_tokens  # class token and registers
        patches = [self.vision_model.norm(state)[:, num_prefix_tokens:] for state in states]
        # (batch, patches, hidden) -> (batch, hidden, h, w)
        return [feature.transpose(1, 2).unflatten(2, grid) for feature in patches]

    def record(self, pixel_values: torch.Tensor, **kwargs) -> ModelOutput:
        """Run the whole backbone with the forward of transformers, which can record hidden states and attentions."""
        return self.vision_model(pixel_values, **kwargs)


def _rename_layers_of_old_files(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *_):
    """Let `load_state_dict` accept the names of DINOv3's layers in files of earlier versions of this class.

    `from_pretrained` needs no help. But a `Trainer` that resumes calls `load_state_dict(..., strict=False)`, which
    leaves out names that it does not know.
    """
    old = f"{prefix}vision_model.layer."
    for name in [name for name in state_dict if name.startswith(old)]:
        state_dict[f"{prefix}vision_model.model.layer.{name.removeprefix(old)}"] = state_dict.pop(name)


# Class guidance: one vector per class, which the decoder compares with the top feature map


class Co2STextGuidance(nn.Module):
    """One frozen text embedding per class.

    The embeddings are a buffer: they are saved with the weights, but no optimizer trains them.
    """

    def __init__(self, config: Co2SConfig):
        super().__init__()
        self.register_buffer("embeddings", torch.zeros(config.num_labels, config.clip_config.projection_dim))

    def forward(self) -> torch.Tensor:
        return self.embeddings


class Co2SQueryGuidance(nn.Module):
    """One learnable query per class."""

    def __init__(self, config: Co2SConfig):
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(config.num_labels, config.dinov3_config.hidden_size))

    def forward(self) -> torch.Tensor:
        return self.queries


# Decoder: from feature maps and class guidance to logits


class Co2STrimmedConv2d(nn.Conv2d):
    """A convolution that keeps the size, and leaves out kernel taps that only read padding.

    If the dilation is at least as large as the map, the outer taps of a 3x3 kernel are outside the map at every
    position. For example, a dilation of 18 on a 16x16 map leaves only the centre tap, which is a ninth of the work.
    The result is the same.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        taps, padding = [], []
        for side, size, dilation, pad in zip(hidden_states.shape[-2:], self.kernel_size, self.dilation, self.padding):
            keep_all = size != 3 or dilation < side
            taps.append(slice(None) if keep_all else slice(1, 2))
            padding.append(pad if keep_all else 0)
        weight = self.weight[:, :, taps[0], taps[1]]
        return F.conv2d(hidden_states, weight, self.bias, padding=padding, dilation=self.dilation)


class Co2SSharedConv2d(nn.Conv2d):
    """A convolution of each class map concatenated with the features of the image.

    A convolution of concatenated maps is the sum of one convolution per map. Therefore the features, which are the
    same for all classes, are convolved only once.
    """

    def forward(self, class_maps: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Convolve maps (batch * classes, channels, h, w) with features (batch, channels, h, w)."""
        map_weight, feature_weight = self.weight.split([class_maps.shape[1], features.shape[1]], dim=1)
        output = F.conv2d(class_maps, map_weight, self.bias, padding=self.padding)
        # (batch * classes, channels, h, w) -> (batch, classes, channels, h, w), a view: the addition changes `output`
        per_image = output.unflatten(0, (features.shape[0], -1))
        per_image += F.conv2d(features, feature_weight, padding=self.padding).unsqueeze(1)
        return output


class Co2SConvNorm(nn.Sequential):
    """A convolution without bias that keeps the size, then group norm and ReLU."""

    def __init__(
        self,
        config: Co2SConfig,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        dilation: int = 1,
        convolution: type[nn.Conv2d] = Co2STrimmedConv2d,
    ):
        padding = dilation * (kernel_size // 2)
        super().__init__(
            convolution(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=False),
            nn.GroupNorm(out_channels // config.decoder_group_norm_channels, out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        convolution, norm, activation = self
        return activation(norm(convolution(*inputs)))


class Co2SSpatialPyramid(nn.Module):
    """ASPP (atrous spatial pyramid pooling) with a residual connection."""

    def __init__(self, config: Co2SConfig):
        super().__init__()
        channels = config.decoder_channels
        self.branches = nn.ModuleList(
            [
                Co2SConvNorm(config, channels, channels, kernel_size=1),
                *(Co2SConvNorm(config, channels, channels, 3, dilation) for dilation in config.decoder_dilations),
            ]
        )
        self.global_branch = Co2SConvNorm(config, channels, channels, kernel_size=1)
        self.projection = Co2SConvNorm(config, channels * (len(self.branches) + 1), channels, kernel_size=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # (batch * classes, channels, h, w) -> (batch * classes, channels, 1, 1) -> (batch * classes, channels, h, w)
        pooled = self.global_branch(hidden_states.mean(dim=(2, 3), keepdim=True)).expand_as(hidden_states)
        branches = [branch(hidden_states) for branch in self.branches]
        return hidden_states + self.projection(torch.cat([*branches, pooled], dim=1))


class Co2SSemanticLayer(nn.Module):
    """Attention between the classes at every (pooled) position.

    The token of a class is the value of its map at that position, concatenated with its guidance.

    The projections have other names than in the backbones (`q_proj`, ...), so that LoRA targets for backbones do not
    match them.
    """

    def __init__(self, config: Co2SConfig):
        super().__init__()
        self.pool_size = config.decoder_pool_size
        self.num_heads = config.decoder_num_attention_heads
        width = config.decoder_channels + config.decoder_guidance_channels
        mlp_width = config.decoder_mlp_ratio * config.decoder_channels
        self.norm1 = nn.LayerNorm(width, eps=config.decoder_layer_norm_eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=config.decoder_layer_norm_eps)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_width), nn.GELU(), nn.Linear(mlp_width, width))

    def forward(self, class_maps: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
        """Update class maps (batch, classes, channels, h, w) with guidance (classes, guidance channels)."""
        batch_size, num_labels, channels, height, width = class_maps.shape
        # A map that is smaller than the pooling window becomes one position.
        pool_size = (min(self.pool_size, height), min(self.pool_size, width))
        pooled = F.avg_pool2d(class_maps.flatten(0, 1), pool_size)
        grid = pooled.shape[-2:]
        # (batch * classes, channels, h, w) -> (batch * h * w, classes, channels)
        tokens = pooled.view(batch_size, num_labels, channels, -1).permute(0, 3, 1, 2).flatten(0, 1)
        # (batch * h * w, classes, channels + guidance channels)
        tokens = torch.cat([tokens, guidance.to(tokens.dtype).expand(tokens.shape[0], -1, -1)], dim=-1)
        tokens = tokens + self._attend(self.norm1(tokens))
        tokens = (tokens + self.mlp(self.norm2(tokens)))[..., :channels]
        # (batch * h * w, classes, channels) -> (batch * classes, channels, h, w)
        update = tokens.view(batch_size, -1, num_labels, channels).permute(0, 2, 3, 1)
        update = update.reshape(batch_size * num_labels, channels, *grid)
        update = F.interpolate(update, size=(height, width), mode="bilinear", align_corners=True)
        return class_maps + update.view_as(class_maps)

    def _attend(self, tokens: torch.Tensor) -> torch.Tensor:
        """Compute self-attention between the classes, (positions, classes, width)."""
        # (positions, classes, 3 * width) -> 3 x (positions, heads, classes, head width)
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        # (positions, heads, classes, head width) -> (positions, classes, width)
        return self.projection(attended.transpose(1, 2).flatten(2))


class Co2SUpsampling(nn.Module):
    """Double the size of every class map, and refine it with a lower feature map of the backbone."""

    def __init__(self, config: Co2SConfig, in_channels: int, skip_channels: int, out_channels: int, feature_size: int):
        super().__init__()
        self.upsample = nn.ConvTranspose2d(in_channels, in_channels - skip_channels, kernel_size=2, stride=2)
        self.skip = nn.Sequential(nn.Conv2d(feature_size, skip_channels, kernel_size=3, padding=1), nn.ReLU())
        self.join = Co2SConvNorm(config, in_channels, out_channels, kernel_size=3, convolution=Co2SSharedConv2d)
        self.refine = Co2SConvNorm(config, out_channels, out_channels, kernel_size=3)

    def forward(self, class_maps: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        """Upsample maps (batch, classes, in channels, h, w) to (batch, classes, out channels, 2 h, 2 w)."""
        # (batch, classes, channels, h, w) -> (batch * classes, channels, 2 h, 2 w)
        upsampled = self.upsample(class_maps.flatten(0, 1))
        skip = F.interpolate(self.skip(feature), size=upsampled.shape[-2:], mode="bilinear", align_corners=True)
        return self.refine(self.join(upsampled, skip)).unflatten(0, class_maps.shape[:2])


class Co2SDecoder(nn.Module):
    """Turn feature maps and class guidance into logits.

    Every class has its own map, and the same weights process all maps. Therefore no weight depends on the number of
    classes.
    """

    def __init__(self, config: Co2SConfig, feature_sizes: list[int], guidance_size: int):
        super().__init__()
        kernel_size = config.decoder_kernel_size
        self.similarity_projection = nn.Conv2d(1, config.decoder_channels, kernel_size, padding=kernel_size // 2)
        self.spatial_pyramid = Co2SSpatialPyramid(config)
        self.guidance_projection = nn.Sequential(nn.Linear(guidance_size, config.decoder_guidance_channels), nn.ReLU())
        self.semantic_layers = nn.ModuleList([Co2SSemanticLayer(config) for _ in range(config.decoder_num_layers)])
        in_channels = [config.decoder_channels, *config.decoder_up_channels]
        # The first step uses the feature map below the top one; the last step uses the lowest one.
        steps = zip(in_channels, config.decoder_skip_channels, config.decoder_up_channels, feature_sizes[-2::-1])
        self.upsampling_layers = nn.ModuleList([Co2SUpsampling(config, *sizes) for sizes in steps])
        self.head = nn.Conv2d(in_channels[-1], 1, kernel_size=3, padding=1)

    def forward(self, features: list[torch.Tensor], guidance: torch.Tensor) -> torch.Tensor:
        """Decode feature maps.

        Args:
            features: Feature maps (batch, channels, h, w), lowest layer first. The last one has `width` channels.
            guidance: Class guidance (classes, width).

        Returns:
            Logits (batch, classes, 4 h, 4 w) with the default of two upsampling steps.
        """
        # Cosine similarity of every position with every class, (batch, classes, h, w)
        guidance = F.normalize(guidance, dim=-1)
        similarity = torch.einsum("bdhw,nd->bnhw", F.normalize(features[-1], dim=1), guidance.to(features[-1].dtype))
        batch_size, num_labels = similarity.shape[:2]
        # Spatial reasoning, separately for each class: (batch, classes, h, w) -> (batch * classes, 1, h, w)
        class_maps = self.spatial_pyramid(self.similarity_projection(similarity.flatten(0, 1).unsqueeze(1)))
        # Semantic reasoning, between classes: (batch * classes, channels, h, w) -> (batch, classes, channels, h, w)
        class_maps = class_maps.unflatten(0, (batch_size, num_labels))
        guidance = self.guidance_projection(guidance)
        for layer in self.semantic_layers:
            class_maps = layer(class_maps, guidance)
        for layer, feature in zip(self.upsampling_layers, features[-2::-1]):
            class_maps = layer(class_maps, feature)
        # (batch, classes, channels, 4 h, 4 w) -> (batch * classes, 1, 4 h, 4 w) -> (batch, classes, 4 h, 4 w)
        return self.head(class_maps.flatten(0, 1)).view(batch_size, num_labels, *class_maps.shape[-2:])


# Student: backbone, guidance and decoder


class Co2SStudent(nn.Module):
    """One student: backbone, class guidance and decoder."""

    def __init__(self, config: Co2SConfig, name: str):
        super().__init__()
        if name == "clip":
            backbone_config, guidance_size = config.clip_config, config.clip_config.projection_dim
            self.encoder, self.guidance = Co2SClipBackbone(config), Co2STextGuidance(config)
        else:
            backbone_config, guidance_size = config.dinov3_config, config.dinov3_config.hidden_size
            self.encoder, self.guidance = Co2SDinov3Backbone(config), Co2SQueryGuidance(config)
        feature_sizes = [backbone_config.hidden_size] * len(config.decoder_up_channels) + [guidance_size]
        self.decoder = Co2SDecoder(config, feature_sizes, guidance_size)
        self.logits_size = getattr(config, f"{name}_logits_size")
        # The image processor computes x = (image - mean) / std. The backbone expects (image - own mean) / own std.
        # That is x * scale + shift, with one (scale, shift) per channel.
        own_means, own_stds = getattr(config, f"{name}_image_mean"), getattr(config, f"{name}_image_std")
        self.renormalization = [
            (std / own_std, (mean - own_mean) / own_std)
            for mean, std, own_mean, own_std in zip(config.image_mean, config.image_std, own_means, own_stds)
        ]

    def forward(
        self,
        pixel_values: torch.Tensor,
        perturbed_samples: torch.Tensor | slice | None = None,
        perturb: Callable[[torch.Tensor], torch.Tensor] = F.dropout2d,
        returned_states: list[int] | None = None,
        output_attentions: bool = False,
    ) -> SemanticSegmenterOutput:
        """Segment a batch; see [`Co2SForSemanticSegmentation.student_logits`] for the other arguments.

        Args:
            returned_states: Indices of the hidden states to return. None: return no hidden states.
            output_attentions: Also return the attention weights of all layers.

        Returns:
            `logits` (batch + perturbed samples, classes, height, width), `hidden_states` and `attentions`.
        """
        prepared = self._prepare(pixel_values)
        hidden_states = attentions = None
        if returned_states is not None or output_attentions:
            recorded = self.encoder.record(
                prepared,
                output_hidden_states=[*self.encoder.state_indices, *(returned_states or ())],
                output_attentions=output_attentions,
            )
            states = [recorded.hidden_states[index] for index in self.encoder.state_indices]
            attentions = recorded.attentions
            if returned_states is not None:
                count = len(recorded.hidden_states)
                kept = {index % count for index in returned_states if -count <= index < count}
                hidden_states = tuple(
                    state if index in kept else None for index, state in enumerate(recorded.hidden_states)
                )
        else:
            states = self.encoder.tapped_states(prepared)

        # (batch, tokens, hidden) -> (batch, channels, h, w)
        grid = tuple(side // self.encoder.patch_size for side in prepared.shape[-2:])
        features = self.encoder.features(states, grid)
        if perturbed_samples is not None:
            features = [torch.cat([feature, perturb(feature[perturbed_samples])]) for feature in features]

        # (batch, channels, h, w) -> (batch, classes, 4 h, 4 w) -> (batch, classes, height, width)
        logits = self.decoder(features, self.guidance())
        if self.logits_size is not None:
            logits = F.interpolate(logits, size=(self.logits_size, self.logits_size), mode="bilinear")
        logits = F.interpolate(logits, size=prepared.shape[-2:], mode="bilinear")
        height, width = pixel_values.shape[-2:]
        return SemanticSegmenterOutput(
            logits=logits[..., :height, :width], hidden_states=hidden_states, attentions=attentions
        )

    def _prepare(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Convert to the mean and std of the backbone, and pad to whole patches by repeating the border."""
        if any(coefficients != (1.0, 0.0) for coefficients in self.renormalization):
            channels = [pixel_values[:, c] * scale + shift for c, (scale, shift) in enumerate(self.renormalization)]
            pixel_values = torch.stack(channels, dim=1)
        height, width = pixel_values.shape[-2:]
        padding = (0, -width % self.encoder.patch_size, 0, -height % self.encoder.patch_size)
        return F.pad(pixel_values, padding, mode="replicate") if any(padding) else pixel_values


# Fusion and loss


def calibrate_and_fuse(
    student_logits: dict[str, torch.Tensor], config: Co2SConfig, fusion: str | None = None
) -> torch.Tensor:
    """Divide the logits of each student by its temperature (arXiv 1706.04599), and fuse them.

    The confidence of a student depends on the scale of its logits. With good temperatures, a student that is 80 %
    confident is right in 80 % of the pixels. Only then can the confidences of two students be compared.

    Args:
        student_logits: Name of each student that the fusion needs -> logits (batch, classes, height, width).
        config: Configuration with the temperatures.
        fusion: One of [`FUSIONS`]. None: `config.fusion`.

    Returns:
        Logits (batch, classes, height, width). If the fusion is one student: its logits, divided by its temperature.
        Else: see [`fuse_logits`]. A temperature of 1 does not change the logits.

    Raises:
        ValueError: `fusion` has another value.
    """
    fusion = config.fusion if fusion is None else fusion
    calibrated = {}
    for name in (fusion,) if fusion in STUDENTS else STUDENTS:
        temperature = getattr(config, f"{name}_temperature")
        calibrated[name] = student_logits[name] if temperature == 1 else student_logits[name] / temperature
    return calibrated[fusion] if fusion in STUDENTS else fuse_logits(calibrated["clip"], calibrated["dinov3"], fusion)


def fuse_logits(clip_logits: torch.Tensor, dinov3_logits: torch.Tensor, fusion: str = "confidence") -> torch.Tensor:
    """Fuse the logits of two students.

    Args:
        clip_logits: (batch, classes, height, width).
        dinov3_logits: The same shape.
        fusion: "confidence": for each pixel the logits of the student with the higher maximum probability (at a tie,
            of CLIP). "average": the logarithm of the mean of the probabilities.

    Returns:
        Logits (batch, classes, height, width). Their softmax is the fused probabilities. Gradients flow to both
        students with "average", and to the chosen student of each pixel with "confidence".

    Raises:
        ValueError: `fusion` has another value.
    """
    if fusion == "average":
        log_probabilities = [logits.float().log_softmax(dim=1) for logits in (clip_logits, dinov3_logits)]
        return (torch.logaddexp(*log_probabilities) - math.log(2)).to(clip_logits.dtype)
    if fusion != "confidence":
        raise ValueError(f"`fusion` is '{fusion}'; choose 'confidence' or 'average' to fuse two students.")
    take_clip = _log_odds(clip_logits) >= _log_odds(dinov3_logits)
    return torch.where(take_clip.unsqueeze(1), clip_logits, dinov3_logits)


def _log_odds(logits: torch.Tensor) -> torch.Tensor:
    """Compute the log-odds of the most probable class, (batch, height, width).

    Log-odds increase with the maximum probability, so comparing either of them gives the same result. Unlike
    probabilities, log-odds still differ where probabilities are rounded to 1, and they stay precise if the logits are
    in half precision.
    """
    highest, index = logits.float().max(dim=1, keepdim=True)
    others = logits.float().scatter(1, index, -torch.inf)
    return (highest - others.logsumexp(dim=1, keepdim=True)).squeeze(1)


def semantic_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Compute the mean cross-entropy over the pixels that are not ignored.

    Args:
        logits: (batch, classes, height, width).
        labels: (batch, height, width), integer class indices or `ignore_index`.
        ignore_index: Label of the pixels to leave out.

    Returns:
        A scalar with gradients to `logits`. It is 0, with zero gradients, when all pixels are ignored.
    """
    total = F.cross_entropy(logits.float(), labels, ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)


# Model: two students and their fusion


class Co2SPreTrainedModel(Co2SStrictLoadingMixin, PreTrainedModel):
    """Base class with weight initialisation and loading."""

    config: Co2SConfig
    base_model_prefix = "co2s"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    # A student calls submodules of backbone layers directly. Therefore a student must not be split over devices. The
    # two students may be on different devices, see `_run_students`.
    _no_split_modules = ["Co2SStudent"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False, so that `_init_weights` is called for every module.

        For classes outside transformers, transformers protects loaded weights by skipping modules whose own parameters
        are all loaded. This also skips modules without own parameters, such as CLIP's attention, which initialise the
        weights of their children. Here, no such protection is needed: the functions of `transformers.initialization`
        do not change loaded weights.
        """
        return False

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **kwargs):
        """Recompute the layers of the backbones in the backward pass, to save memory.

        Args:
            activation_checkpointing_kwargs: Arguments of `torch.utils.checkpoint.checkpoint`.
            kwargs: Passed to transformers' `activation_checkpointing_enable`.
        """
        super().activation_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)
        if (activation_checkpointing_kwargs or {}).get("use_reentrant"):
            # Reentrant checkpointing computes no gradients in a layer if its input needs none. The embeddings below
            # the first layer are frozen, see `freeze_backbones`.
            self.enable_input_require_grads()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Initialise the weights outside the backbones. Layers get PyTorch's default initialisation."""
        if isinstance(module, Co2SClipBackbone):
            init.normal_(module.visual_projection.weight, std=self.config.clip_config.hidden_size**-0.5)
        elif isinstance(module, Co2STextGuidance):
            # Orthogonal vectors distinguish the classes until text embeddings are set. They are computed in float32,
            # because PyTorch cannot orthogonalise in half precision. Loading a model must not draw random numbers.
            if not getattr(module.embeddings, "_is_hf_initialized", False):
                directions = torch.empty_like(module.embeddings, dtype=torch.float32)
                init.copy_(module.embeddings, nn.init.orthogonal_(directions))
        elif isinstance(module, Co2SQueryGuidance):
            init.normal_(module.queries, std=self.config.initializer_range)
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = nn.init._calculate_fan_in_and_fan_out(module.weight)[0] ** -0.5
                init.uniform_(module.bias, -bound, bound)
        else:
            super()._init_weights(module)


class Co2SForSemanticSegmentation(Co2SAdapterMixin, Co2SPreTrainedModel):
    """Semantic segmentation with two students and the fusion of their predictions.

    Example:

    ```python
    >>> from PIL import Image
    >>> from co2s_hf import Co2SForSemanticSegmentation, Co2SImageProcessor

    >>> model = Co2SForSemanticSegmentation.from_pretrained("path/to/model")
    >>> image_processor = Co2SImageProcessor.from_pretrained("path/to/model")
    >>> image = Image.open("tile.png")
    >>> outputs = model(**image_processor(image, return_tensors="pt"))
    >>> label_map = image_processor.post_process_semantic_segmentation(outputs, [(image.height, image.width)])[0]
    ```"""

    def __init__(self, config: Co2SConfig):
        super().__init__(config)
        self.clip = Co2SStudent(config, "clip")
        self.dinov3 = Co2SStudent(config, "dinov3")
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        labels: torch.LongTensor | None = None,
        fusion: str | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
    ) -> Co2SSemanticSegmenterOutput:
        """Segment a batch of images.

        Args:
            pixel_values: (batch, channels, height, width), normalised with `config.image_mean` and
                `config.image_std`. Any height and width of at least 1.
            labels: (batch, height, width), class indices. The loss leaves out pixels with the label
                `config.semantic_loss_ignore_index`.
            fusion: Fusion rule of this call. None: `config.fusion`.
            output_hidden_states: Also return the hidden states of the backbones. An index or a list of indices returns
                only these: 0 is the embeddings, n the output of the n-th layer, and -1 the last one. A backbone that
                has fewer layers leaves out indices that are too large. None: the value in the configuration.
            output_attentions: Also return the attention weights of the backbones, of all layers. Needs
                `attn_implementation="eager"`. None: the value in the configuration.

        Returns:
            A [`Co2SSemanticSegmenterOutput`] with logits at the input's size.

        Raises:
            ValueError: A shape, the name of the fusion rule, the attention implementation or an index of a hidden
                state is wrong.
        """
        fusion = self.config.fusion if fusion is None else fusion
        if fusion not in FUSIONS:
            raise ValueError(f"`fusion` is '{fusion}'; choose one of {', '.join(FUSIONS)}.")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states or False
        if output_attentions is None:
            output_attentions = self.config.output_attentions or False
        self._check_images(pixel_values)
        if labels is not None:
            self._check_labels(labels, pixel_values)
        names = (fusion,) if fusion in STUDENTS else STUDENTS
        returned_states = self._returned_states(output_hidden_states, names)
        self._check_attentions_are_kept(output_attentions, names)

        students = self._run_students(
            names, pixel_values, returned_states=returned_states, output_attentions=output_attentions
        )
        logits = calibrate_and_fuse({name: student.logits for name, student in students.items()}, self.config, fusion)
        loss = None
        if labels is not None:
            ignore_index = self.config.semantic_loss_ignore_index
            loss = sum(semantic_cross_entropy(student.logits, labels, ignore_index) for student in students.values())
        per_student = {f"{name}_{key}": value for name, student in students.items() for key, value in student.items()}
        return Co2SSemanticSegmenterOutput(loss=loss, logits=logits, **per_student)

    def student_logits(
        self,
        pixel_values: torch.Tensor,
        students: tuple[str, ...] = STUDENTS,
        perturbed_samples: torch.Tensor | slice | None = None,
        perturb: Callable[[torch.Tensor], torch.Tensor] = F.dropout2d,
    ) -> dict[str, torch.Tensor]:
        """Compute the logits of each student, without fusion.

        To compute several views in one pass through each backbone, concatenate them along the batch dimension.

        Args:
            pixel_values: (batch, channels, height, width), normalised as for [`forward`].
            students: Names of the students to compute.
            perturbed_samples: Indices or slice of the samples to decode a second time, from perturbed features
                (UniMatch, arXiv 2208.09910). Their logits follow the other logits along the batch dimension.
            perturb: Function that perturbs each feature map (samples, channels, h, w). The default drops whole
                channels with probability 0.5.

        Returns:
            Name of each student -> logits (batch + perturbed samples, classes, height, width), with gradients, on the
            device of `pixel_values`.

        Raises:
            ValueError: The shape or type of `pixel_values`, or the name of a student, is wrong.
        """
        self._check_images(pixel_values)
        if unknown := [name for name in students if name not in STUDENTS]:
            raise ValueError(f"`students` contains {unknown}; give a tuple of names out of {STUDENTS}.")
        outputs = self._run_students(students, pixel_values, perturbed_samples=perturbed_samples, perturb=perturb)
        return {name: output.logits for name, output in outputs.items()}

    def _run_students(
        self, names: tuple[str, ...], pixel_values: torch.Tensor, **kwargs
    ) -> dict[str, SemanticSegmenterOutput]:
        """Run students, and move their logits to the device of the images.

        With `device_map`, each student may be on its own device. Logits are combined on one device.
        """
        outputs = {name: getattr(self, name)(pixel_values, **kwargs) for name in names}
        for output in outputs.values():
            output.logits = output.logits.to(pixel_values.device)
        return outputs

    def _check_images(self, pixel_values: torch.Tensor):
        num_channels = self.config.clip_config.num_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != num_channels or 0 in pixel_values.shape:
            raise ValueError(
                f"`pixel_values` has the shape {tuple(pixel_values.shape)}; expected (batch, {num_channels}, height, "
                "width) with no size of 0."
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"`pixel_values` is {pixel_values.dtype}; expected normalised floating-point values, as "
                "`Co2SImageProcessor` returns them."
            )

    def _check_labels(self, labels: torch.Tensor, pixel_values: torch.Tensor):
        expected_shape = pixel_values.shape[:1] + pixel_values.shape[2:]
        if labels.shape != expected_shape:
            raise ValueError(
                f"`labels` has the shape {tuple(labels.shape)}; expected (batch, height, width) = "
                f"{tuple(expected_shape)}, as `pixel_values` has the shape {tuple(pixel_values.shape)}."
            )

    def _returned_states(
        self, output_hidden_states: bool | int | list[int], names: tuple[str, ...]
    ) -> list[int] | None:
        """Convert `output_hidden_states` to indices, for the students that are computed."""
        count = 1 + max(getattr(self, name).encoder.vision_model.config.num_hidden_layers for name in names)
        if isinstance(output_hidden_states, bool):
            return list(range(count)) if output_hidden_states else None
        indices = [output_hidden_states] if isinstance(output_hidden_states, int) else list(output_hidden_states)
        if wrong := [index for index in indices if not isinstance(index, int) or not -count <= index < count]:
            raise ValueError(
                f"`output_hidden_states` contains {wrong}; expected True, False, or indices from {-count} to "
                f"{count - 1}: 0 is the embeddings, n the output of the n-th layer."
            )
        return indices

    def _check_attentions_are_kept(self, output_attentions: bool, names: tuple[str, ...]):
        if not isinstance(output_attentions, bool):
            raise ValueError(
                f"`output_attentions` is {output_attentions!r}; expected True or False. All layers are returned."
            )
        implementations = {getattr(self, name).encoder.vision_model.config._attn_implementation for name in names}
        if output_attentions and (wrong := sorted(implementations - {"eager"})):
            raise ValueError(
                f"`attn_implementation='{wrong[0]}'` does not keep attention weights. Load the model with "
                "`attn_implementation='eager'`, or call `model.set_attn_implementation('eager')`."
            )

    def freeze_backbones(self, train: str = "attention") -> "Co2SForSemanticSegmentation":
        """Choose which parameters of the backbones are trainable. Decoders and queries are always trainable.

        Args:
            train: "attention" (query, key, value and output projections of every layer, as in the paper), "none" or
                "all".

        Returns:
            The model itself.

        Raises:
            ValueError: `train` has another value.

        Note:
            Some trainable parameters get no gradient: the query and key projections of CLIP's last feature layer,
            because its features come only from the value path; and all layers above the last feature layers. Set
            `find_unused_parameters=True` with DistributedDataParallel.
        """
        if train not in ("attention", "none", "all"):
            raise ValueError(f"`train` is '{train}'; choose attention, none or all.")
        for student in (self.clip, self.dinov3):
            student.requires_grad_(True)
            student.encoder.requires_grad_(train == "all")
            for module in student.encoder.attention_modules():
                module.requires_grad_(train != "none")
        self.dinov3.encoder.vision_model.embeddings.mask_token.requires_grad_(False)  # used in pre-training only
        return self

    def set_class_concepts(
        self,
        class_concepts: dict[str, list[str]],
        text_embeddings: torch.Tensor | None = None,
        text_encoder: str | None = None,
        palette: list[list[int]] | None = None,
        **load_kwargs,
    ) -> "Co2SForSemanticSegmentation":
        """Change the classes by their text. The CLIP student can segment new classes without training.

        Classes that keep their name keep their learnable query. New classes get random queries, which must be trained
        before the DINOv3 student can predict them. Therefore `config.fusion` becomes "clip" if there are new classes.
        The queries become a new parameter, so create optimizers afterwards.

        Args:
            class_concepts: Concepts of every class. The order of the classes is the new label order.
            text_embeddings: (classes, `config.clip_config.projection_dim`). None: encode the concepts.
            text_encoder: Hub name, shipped name or local folder of the CLIP model to encode with. None:
                `config.text_encoder`.
            palette: One RGB colour per class. None: keep the palette if the classes are the same as before, else drop
                it.
            load_kwargs: Arguments for `from_pretrained` of the text encoder (`token`, `revision`, ...).

        Returns:
            The model itself.

        Raises:
            ValueError: There are neither embeddings nor a text encoder, the embeddings have a wrong shape, or the
                model already has adapters.
            OSError: The text encoder cannot be loaded.
        """
        if getattr(self, "_hf_peft_config_loaded", False):
            raise ValueError(
                "This model has adapters, which have their own classes. Change the classes before adding an adapter."
            )
        old_labels = [self.config.id2label[index] for index in range(self.config.num_labels)]
        labels = list(class_concepts)
        new_labels = [label for label in labels if label not in old_labels]
        # Validate a copy, so that the model does not change if the validation fails.
        config = copy.deepcopy(self.config)
        config.text_encoder = text_encoder or config.text_encoder
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
        config.class_concepts = dict(class_concepts)
        config.palette = config.palette if palette is None and labels == old_labels else palette
        config.validate()
        if new_labels:
            config.fusion = "clip"
        if text_embeddings is None:
            text_embeddings = _encode_classes(config, **load_kwargs)
        _check_text_embeddings(text_embeddings, config)

        self._set_queries(old_labels, labels)
        self.clip.guidance.embeddings = text_embeddings.detach().to(self.clip.guidance.embeddings).clone()
        for name in ("text_encoder", "id2label", "label2id", "class_concepts", "palette", "fusion"):
            setattr(self.config, name, getattr(config, name))
        self._has_new_queries = labels != old_labels  # an adapter must then contain the queries
        if new_labels:
            logger.warning(
                f"The DINOv3 student is not yet trained on {new_labels}, so `config.fusion` is now 'clip'. Train the "
                "model on these classes before using another fusion."
            )
        return self

    def _set_queries(self, old_labels: list[str], labels: list[str]):
        """Replace the queries. Old classes keep their queries, at their new index; new classes get random ones."""
        old_queries = self.dinov3.guidance.queries
        queries = torch.randn(len(labels), old_queries.shape[1]) * self.config.initializer_range
        queries = queries.to(old_queries)
        for index, label in enumerate(labels):
            if label in old_labels:
                queries[index] = old_queries[old_labels.index(label)].detach()
        self.dinov3.guidance.queries = nn.Parameter(queries, requires_grad=old_queries.requires_grad)

    @classmethod
    def from_backbones(
        cls,
        clip: str = "openai/clip-vit-base-patch16",
        dinov3: str = "facebook/dinov3-vitb16-pretrain-lvd1689m",
        *,
        id2label: dict[int, str],
        class_concepts: dict[str, list[str]] | None = None,
        text_embeddings: torch.Tensor | Literal["random"] | None = None,
        clip_revision: str | None = None,
        dinov3_revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        **config_kwargs,
    ) -> "Co2SForSemanticSegmentation":
        """Build a model for training from pretrained backbones, with randomly initialised decoders and queries.

        Each backbone keeps its own activation, epsilon and image statistics. The default feature layers are those of
        the paper; in a backbone that does not have 12 layers, they have the same relative depth. The default decoders
        are those of the paper; if both backbones are narrow (hidden size up to 256), they are smaller. A saved model
        loads without the repositories of the backbones.

        Two small pretrained backbones ship with the package co2s_hf: "co2s-tiny-clip" and "co2s-tiny-dinov3".

        Args:
            clip: Hub name, shipped name or local folder of a complete CLIP model (vision and text, projections,
                tokenizer).
            dinov3: Hub name, shipped name or local folder of a DINOv3 ViT. If the name contains "sat493m", the image
                statistics of the satellite weights are used.
            id2label: Class names by index.
            class_concepts: Concepts of every class. None: the name of the class.
            text_embeddings: (classes, projection width), in label order. None: encode the concepts. "random": random
                orthogonal vectors, for classes without names. The configuration then has no text encoder.
            clip_revision: Commit, branch or tag of the CLIP repository.
            dinov3_revision: Commit, branch or tag of the DINOv3 repository.
            token: Access token for gated or private repositories.
            cache_dir: Folder for downloads.
            local_files_only: Use only files that are on this machine.
            config_kwargs: Further fields of [`Co2SConfig`].

        Returns:
            The model in evaluation mode, with the trainable parameters of the paper (see `freeze_backbones`).

        Raises:
            OSError: A backbone cannot be loaded. The message contains its name and the remedy.
            TypeError: A keyword is not a field of the configuration.
            ValueError: `text_embeddings` is another word than "random", or has a wrong shape.
            StrictDataclassError: The backbones and the other fields do not fit together.
        """
        if unknown := set(config_kwargs) - (set(cls.config_class.__dataclass_fields__) - {"dtype"}):
            raise TypeError(
                f"from_backbones() got {sorted(unknown)}, which are not fields of Co2SConfig. For another precision, "
                "call `model.to(dtype)` afterwards."
            )
        has_text = not isinstance(text_embeddings, str)
        if not has_text and text_embeddings != "random":
            raise ValueError(f"`text_embeddings` is '{text_embeddings}'; give a tensor, 'random' or None.")
        load_kwargs = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        clip_kwargs = {**load_kwargs, "revision": clip_revision}
        dinov3_kwargs = {**load_kwargs, "revision": dinov3_revision}
        clip_backbone = load_pretrained(CLIPVisionModelWithProjection, clip, "CLIP's vision backbone", **clip_kwargs)
        dinov3_backbone = load_pretrained(DINOv3ViTModel, dinov3, "DINOv3's backbone", **dinov3_kwargs)
        if has_text and class_concepts is None:
            class_concepts = {id2label[index]: [id2label[index].replace("_", " ")] for index in sorted(id2label)}
        is_satellite = "sat493m" in str(dinov3)
        defaults = {
            "clip_feature_layers": _scale_layers((0, 4, 11), clip_backbone.config.num_hidden_layers),
            "dinov3_feature_layers": _scale_layers((2, 7, 11), dinov3_backbone.config.num_hidden_layers),
            "dinov3_image_mean": SAT493M_MEAN if is_satellite else list(IMAGENET_DEFAULT_MEAN),
            "dinov3_image_std": SAT493M_STD if is_satellite else list(IMAGENET_DEFAULT_STD),
        }
        if max(clip_backbone.config.hidden_size, dinov3_backbone.config.hidden_size) <= SMALL_WIDTH:
            defaults |= SMALL_DECODER
        config = cls.config_class(
            clip_config=clip_backbone.config,
            dinov3_config=dinov3_backbone.config,
            id2label=id2label,
            class_concepts=class_concepts,
            text_encoder=str(clip) if has_text else None,
            **{**defaults, **config_kwargs},
        )
        model = cls(config)
        model.clip.encoder.vision_model.load_state_dict(clip_backbone.vision_model.state_dict())
        model.clip.encoder.visual_projection.load_state_dict(clip_backbone.visual_projection.state_dict())
        model.dinov3.encoder.vision_model.load_state_dict(dinov3_backbone.state_dict())
        if text_embeddings is None:
            text_embeddings = encode_class_concepts(config.class_concepts, clip, **clip_kwargs)
        if has_text:  # otherwise the class vectors stay as they are initialised: random and orthogonal
            model.set_class_concepts(config.class_concepts, text_embeddings, palette=config.palette)
        return model.freeze_backbones().eval()


def _encode_classes(config: Co2SConfig, **load_kwargs) -> torch.Tensor:
    """Encode the concepts of a configuration with its text encoder, (classes, projection width)."""
    if config.text_encoder is None:
        raise ValueError(
            "There is no CLIP model to encode the class text (`config.text_encoder` is None). Pass `text_encoder` "
            "(Hub name or local folder of the CLIP model that this model was built from) or `text_embeddings`."
        )
    return encode_class_concepts(config.class_concepts, config.text_encoder, **load_kwargs)


def _check_text_embeddings(text_embeddings: torch.Tensor, config: Co2SConfig):
    expected_shape = (config.num_labels, config.clip_config.projection_dim)
    if tuple(text_embeddings.shape) != expected_shape:
        raise ValueError(
            f"`text_embeddings` has the shape {tuple(text_embeddings.shape)}; expected {expected_shape}, the number "
            "of classes and `clip_config.projection_dim`."
        )


def _scale_layers(layers: tuple[int, ...], num_hidden_layers: int) -> list[int]:
    """Convert layers of a backbone of 12 layers to the same relative depth in another backbone."""
    return [round(layer * (num_hidden_layers - 1) / 11) for layer in layers]


__all__ = [
    "STUDENTS",
    "Co2SForSemanticSegmentation",
    "Co2SPreTrainedModel",
    "Co2SSemanticSegmenterOutput",
    "calibrate_and_fuse",
    "fuse_logits",
    "semantic_cross_entropy",
]
