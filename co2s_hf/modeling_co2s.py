"""Co2S (arXiv 2512.23035): a CLIP student guided by class text, a DINOv3 student guided by learnable queries, fused.

The towers are transformers' own; only how dense features are tapped from them, the decoder that both students share in
architecture, and the fusion are written here.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

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
from .configuration_co2s import FUSIONS, SAT493M_MEAN, SAT493M_STD, Co2SConfig
from .text_guidance import encode_class_concepts, load_tower


logger = logging.get_logger(__name__)

STUDENTS = ("clip", "dinov3")


@dataclass
class Co2SSemanticSegmenterOutput(ModelOutput):
    """Output of [`Co2SForSemanticSegmentation`].

    Args:
        loss (`torch.FloatTensor`, a scalar, *optional*, returned when `labels` is given):
            Sum of the computed students' cross-entropies.
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels, height, width)`):
            Fused logits at the input's size: their softmax is the fused class probabilities.
        clip_logits (`torch.FloatTensor` of shape `(batch_size, num_labels, height, width)`, *optional*):
            The CLIP student's logits; `None` when the fusion does not compute it.
        dinov3_logits (`torch.FloatTensor` of shape `(batch_size, num_labels, height, width)`, *optional*):
            The DINOv3 student's logits; `None` when the fusion does not compute it.
        clip_hidden_states, dinov3_hidden_states (`tuple(torch.FloatTensor)`, *optional*):
            With `output_hidden_states=True`: a tower's embeddings, then every layer's output, each of shape
            `(batch_size, tokens, hidden_size)`.
        clip_attentions, dinov3_attentions (`tuple(torch.FloatTensor)`, *optional*):
            With `output_attentions=True`: every layer's attention weights, each of shape
            `(batch_size, num_heads, tokens, tokens)`.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    clip_logits: torch.FloatTensor | None = None
    dinov3_logits: torch.FloatTensor | None = None
    clip_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    dinov3_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    clip_attentions: tuple[torch.FloatTensor, ...] | None = None
    dinov3_attentions: tuple[torch.FloatTensor, ...] | None = None


def fuse_logits(clip_logits: torch.Tensor, dinov3_logits: torch.Tensor, fusion: str = "confidence") -> torch.Tensor:
    """Fuse two students' logits into logits whose softmax is the fused probabilities.

    Args:
        clip_logits: (batch, classes, height, width).
        dinov3_logits: The same shape.
        fusion: "confidence" takes, per pixel, the student with the higher maximum probability (CLIP at a tie);
            "average" takes the mean of the probabilities.

    Returns:
        Tensor (batch, classes, height, width); gradients flow to what was taken.

    Raises:
        ValueError: Another fusion is asked for.
    """
    if fusion == "average":
        log_probabilities = [logits.float().log_softmax(dim=1) for logits in (clip_logits, dinov3_logits)]
        return (torch.logaddexp(*log_probabilities) - math.log(2)).to(clip_logits.dtype)
    if fusion != "confidence":
        raise ValueError(f"`fusion` is '{fusion}'; two students fuse by 'confidence' or 'average'.")
    surer = _log_odds(clip_logits) >= _log_odds(dinov3_logits)
    return torch.where(surer.unsqueeze(1), clip_logits, dinov3_logits)


def _log_odds(logits: torch.Tensor) -> torch.Tensor:
    """Log-odds of the most probable class, (batch, height, width).

    They order pixels as the maximum probability does, but neither saturate where it rounds to 1 nor cancel in half
    precision.
    """
    highest, index = logits.float().max(dim=1, keepdim=True)
    others = logits.float().scatter(1, index, -torch.inf)
    return (highest - others.logsumexp(dim=1, keepdim=True)).squeeze(1)


def semantic_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Cross-entropy averaged over the pixels that are not ignored; 0, connected to the graph, when all are.

    Args:
        logits: (batch, classes, height, width).
        labels: (batch, height, width), integer class indices or `ignore_index`.
        ignore_index: Label of the pixels to leave out.
    """
    total = F.cross_entropy(logits.float(), labels, ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)


class Co2SQuickGELU(nn.Module):
    """CLIP's x * sigmoid(1.702 x), as one fused SiLU instead of three steps: half the memory kept for gradients."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.silu(1.702 * hidden_states) / 1.702


class Co2SClipEncoder(nn.Module):
    """CLIP's vision tower, tapped on its value path.

    As in MaskCLIP (arXiv 2112.01071) the tapped layers skip the mixing of tokens, but keep their residuals and MLP.
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
        """The modules that the paper trains."""
        return [layer.self_attn for layer in self.layers]

    @property
    def state_indices(self) -> list[int]:
        """Which of transformers' recorded hidden states the features are made of: the tapped layers' inputs."""
        return list(self.feature_layers)

    def tapped_states(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Inputs of the tapped layers, (batch, 1 + patches, hidden) each; the last of these layers is never run."""
        hidden_states = self.vision_model.embeddings(pixel_values, interpolate_pos_encoding=True)
        hidden_states = self.vision_model.pre_layrnorm(hidden_states)
        states = []
        for index, layer in enumerate(self.layers[: self.feature_layers[-1]]):
            if index in self.feature_layers:
                states.append(hidden_states)
            hidden_states = layer(hidden_states, attention_mask=None)
        return [*states, hidden_states]

    def features(self, states: list[torch.Tensor], grid: tuple[int, int]) -> list[torch.Tensor]:
        """Feature maps (batch, channels, *grid), lowest layer first; the last at unit length per pixel."""
        features = [self._value_path(self.layers[index], state) for index, state in zip(self.feature_layers, states)]
        embeddings = self.visual_projection(self.vision_model.post_layernorm(features[-1]))
        features[-1] = F.normalize(embeddings, dim=-1)
        # (batch, patches, channels) -> (batch, channels, height, width)
        return [feature.transpose(1, 2).unflatten(2, grid) for feature in features]

    @staticmethod
    def _value_path(layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        """A layer's output for the patches if every token attended to itself alone, (batch, patches, hidden)."""
        patches = hidden_states[:, 1:]  # without the class token
        patches = patches + layer.self_attn.out_proj(layer.self_attn.v_proj(layer.layer_norm1(patches)))
        return patches + layer.mlp(layer.layer_norm2(patches))

    def record(self, pixel_values: torch.Tensor, **kwargs) -> ModelOutput:
        """Run the whole tower as transformers does, recording what the keywords ask for."""
        return self.vision_model(pixel_values, interpolate_pos_encoding=True, **kwargs)


class Co2SDinov3Encoder(nn.Module):
    """DINOv3's tower, tapped after its layers, through its final layer norm."""

    def __init__(self, config: Co2SConfig):
        super().__init__()
        self.feature_layers = tuple(config.dinov3_feature_layers)
        self.patch_size = config.dinov3_config.patch_size
        self.vision_model = DINOv3ViTModel._from_config(config.dinov3_config)

    @property
    def layers(self) -> nn.ModuleList:
        return self.vision_model.model.layer

    def attention_modules(self) -> list[nn.Module]:
        """The modules that the paper trains."""
        return [layer.attention for layer in self.layers]

    @property
    def state_indices(self) -> list[int]:
        """Which of transformers' recorded hidden states the features are made of: the tapped layers' outputs."""
        return [index + 1 for index in self.feature_layers]

    def tapped_states(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Outputs of the tapped layers, (batch, 1 + registers + patches, hidden) each."""
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
        """Feature maps (batch, hidden, *grid), lowest layer first."""
        num_prefix_tokens = 1 + self.vision_model.config.num_register_tokens
        # (batch, tokens, hidden) -> (batch, hidden, height, width)
        return [
            self.vision_model.norm(state)[:, num_prefix_tokens:].transpose(1, 2).unflatten(2, grid) for state in states
        ]

    def record(self, pixel_values: torch.Tensor, **kwargs) -> ModelOutput:
        """Run the whole tower as transformers does, recording what the keywords ask for."""
        return self.vision_model(pixel_values, **kwargs)


class Co2STextGuidance(nn.Module):
    """One frozen text embedding per class. A buffer: saved with the weights, never an optimiser's business."""

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


class Co2STrimmedConv2d(nn.Conv2d):
    """A convolution that keeps the size, without the taps that reach beyond the map from every position.

    They only ever see padding: on a 16x16 map a 3x3 kernel of dilation 18 keeps its centre, a ninth of the work.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        taps, padding = [], []
        for side, size, dilation, pad in zip(hidden_states.shape[-2:], self.kernel_size, self.dilation, self.padding):
            reaches = size != 3 or dilation < side
            taps.append(slice(None) if reaches else slice(1, 2))
            padding.append(pad if reaches else 0)
        weight = self.weight[:, :, taps[0], taps[1]]
        return F.conv2d(hidden_states, weight, self.bias, padding=padding, dilation=self.dilation)


class Co2SSharedConv2d(nn.Conv2d):
    """A convolution of every class's map joined by the image's features, which are convolved once for all classes.

    Convolving [map, features] is the sum of convolving each.
    """

    def forward(self, class_maps: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Convolve maps (batch * classes, channels, h, w) with features (batch, channels, h, w)."""
        own_weight, shared_weight = self.weight.split([class_maps.shape[1], features.shape[1]], dim=1)
        joined = F.conv2d(class_maps, own_weight, self.bias, padding=self.padding)
        own = joined.unflatten(0, (features.shape[0], -1))
        own += F.conv2d(features, shared_weight, padding=self.padding).unsqueeze(1)
        return joined


class Co2SConvNorm(nn.Sequential):
    """Convolution without bias that keeps the size, group norm, ReLU."""

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
        pooled = self.global_branch(hidden_states.mean(dim=(2, 3), keepdim=True)).expand_as(hidden_states)
        return hidden_states + self.projection(
            torch.cat([*(branch(hidden_states) for branch in self.branches), pooled], dim=1)
        )


class Co2SSemanticLayer(nn.Module):
    """Attention between the classes at every (pooled) position, each class joined by its guidance.

    The projections are named unlike the towers' (`q_proj`, ...), so that LoRA targets for those never match here.
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
        batch_size, num_labels, channels, height, width = class_maps.shape
        pool_size = (min(self.pool_size, height), min(self.pool_size, width))  # maps smaller than the pool: one cell
        pooled = F.avg_pool2d(class_maps.flatten(0, 1), pool_size)
        grid = pooled.shape[-2:]
        # (batch * classes, channels, h, w) -> (batch * h * w, classes, channels)
        tokens = pooled.view(batch_size, num_labels, channels, -1).permute(0, 3, 1, 2).flatten(0, 1)
        tokens = torch.cat([tokens, guidance.to(tokens.dtype).expand(tokens.shape[0], -1, -1)], dim=-1)
        tokens = tokens + self._attend(self.norm1(tokens))
        tokens = (tokens + self.mlp(self.norm2(tokens)))[..., :channels]
        # (batch * h * w, classes, channels) -> (batch * classes, channels, h, w)
        update = tokens.view(batch_size, -1, num_labels, channels).permute(0, 2, 3, 1)
        update = update.reshape(batch_size * num_labels, channels, *grid)
        update = F.interpolate(update, size=(height, width), mode="bilinear", align_corners=True)
        return class_maps + update.view_as(class_maps)

    def _attend(self, tokens: torch.Tensor) -> torch.Tensor:
        # (sequences, classes, 3 * width) -> 3 x (sequences, heads, classes, head width)
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.projection(attended.transpose(1, 2).flatten(2))


class Co2SUpsampling(nn.Module):
    """Double the size of every class's map and refine it with a feature map of the tower."""

    def __init__(self, config: Co2SConfig, in_channels: int, skip_channels: int, out_channels: int, feature_size: int):
        super().__init__()
        self.upsample = nn.ConvTranspose2d(in_channels, in_channels - skip_channels, kernel_size=2, stride=2)
        self.skip = nn.Sequential(nn.Conv2d(feature_size, skip_channels, kernel_size=3, padding=1), nn.ReLU())
        self.join = Co2SConvNorm(config, in_channels, out_channels, kernel_size=3, convolution=Co2SSharedConv2d)
        self.refine = Co2SConvNorm(config, out_channels, out_channels, kernel_size=3)

    def forward(self, class_maps: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        upsampled = self.upsample(class_maps.flatten(0, 1))
        skip = F.interpolate(self.skip(feature), size=upsampled.shape[-2:], mode="bilinear", align_corners=True)
        return self.refine(self.join(upsampled, skip)).unflatten(0, class_maps.shape[:2])


class Co2SDecoder(nn.Module):
    """From a tower's feature maps and the class guidance to logits.

    Every class is a map of its own that passes through the same weights, so nothing here depends on their number.
    """

    def __init__(self, config: Co2SConfig, feature_sizes: list[int], guidance_size: int):
        super().__init__()
        kernel_size = config.decoder_kernel_size
        self.similarity_projection = nn.Conv2d(1, config.decoder_channels, kernel_size, padding=kernel_size // 2)
        self.spatial_pyramid = Co2SSpatialPyramid(config)
        self.guidance_projection = nn.Sequential(nn.Linear(guidance_size, config.decoder_guidance_channels), nn.ReLU())
        self.semantic_layers = nn.ModuleList([Co2SSemanticLayer(config) for _ in range(config.decoder_num_layers)])
        in_channels = [config.decoder_channels, *config.decoder_up_channels]
        # The first step takes the feature map below the top one, the last step the lowest.
        self.upsampling_layers = nn.ModuleList(
            [
                Co2SUpsampling(config, *channels)
                for channels in zip(
                    in_channels, config.decoder_skip_channels, config.decoder_up_channels, feature_sizes[-2::-1]
                )
            ]
        )
        self.head = nn.Conv2d(in_channels[-1], 1, kernel_size=3, padding=1)

    def forward(self, features: list[torch.Tensor], guidance: torch.Tensor) -> torch.Tensor:
        """Decode feature maps (batch, channels, h, w), lowest first, under guidance (classes, width).

        Returns:
            Logits (batch, classes, 4 h, 4 w) with the default two upsampling steps.
        """
        guidance = F.normalize(guidance, dim=-1)
        similarity = torch.einsum("bdhw,nd->bnhw", F.normalize(features[-1], dim=1), guidance.to(features[-1].dtype))
        batch_size, num_labels = similarity.shape[:2]
        # (batch, classes, h, w) -> (batch * classes, 1, h, w): each class's similarity is an image of one channel
        class_maps = self.spatial_pyramid(self.similarity_projection(similarity.flatten(0, 1).unsqueeze(1)))
        class_maps = class_maps.unflatten(0, (batch_size, num_labels))
        guidance = self.guidance_projection(guidance)
        for layer in self.semantic_layers:
            class_maps = layer(class_maps, guidance)
        for layer, feature in zip(self.upsampling_layers, features[-2::-1]):
            class_maps = layer(class_maps, feature)
        return self.head(class_maps.flatten(0, 1)).view(batch_size, num_labels, *class_maps.shape[-2:])


class Co2SStudent(nn.Module):
    """One student: a tower with its tapped features, the guidance of its classes, and a decoder."""

    def __init__(self, config: Co2SConfig, name: str):
        super().__init__()
        if name == "clip":
            tower_config, guidance_size = config.clip_config, config.clip_config.projection_dim
            self.encoder, self.guidance = Co2SClipEncoder(config), Co2STextGuidance(config)
        else:
            tower_config, guidance_size = config.dinov3_config, config.dinov3_config.hidden_size
            self.encoder, self.guidance = Co2SDinov3Encoder(config), Co2SQueryGuidance(config)
        feature_sizes = [tower_config.hidden_size] * len(config.decoder_up_channels) + [guidance_size]
        self.decoder = Co2SDecoder(config, feature_sizes, guidance_size)
        self.logits_size = getattr(config, f"{name}_logits_size")
        # (image - mean) / std, as the processor delivers it, becomes (image - own mean) / own std = x * scale + shift.
        own = zip(getattr(config, f"{name}_image_mean"), getattr(config, f"{name}_image_std"))
        self.renormalization = [
            (std / own_std, (mean - own_mean) / own_std)
            for mean, std, (own_mean, own_std) in zip(config.image_mean, config.image_std, own)
        ]

    def forward(
        self,
        pixel_values: torch.Tensor,
        perturbed_samples: torch.Tensor | slice | None = None,
        perturb: Callable[[torch.Tensor], torch.Tensor] = F.dropout2d,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> SemanticSegmenterOutput:
        """Segment a batch; see [`Co2SForSemanticSegmentation.student_logits`] for the arguments."""
        prepared = self._prepare(pixel_values)
        hidden_states = attentions = None
        if output_hidden_states or output_attentions:
            recorded = self.encoder.record(prepared, output_hidden_states=True, output_attentions=output_attentions)
            states = [recorded.hidden_states[index] for index in self.encoder.state_indices]
            hidden_states = recorded.hidden_states if output_hidden_states else None
            attentions = recorded.attentions
        else:
            states = self.encoder.tapped_states(prepared)

        grid = tuple(side // self.encoder.patch_size for side in prepared.shape[-2:])
        features = self.encoder.features(states, grid)
        if perturbed_samples is not None:
            features = [torch.cat([f, perturb(f[perturbed_samples])]) for f in features]

        logits = self.decoder(features, self.guidance())
        if self.logits_size is not None:
            logits = F.interpolate(logits, size=(self.logits_size, self.logits_size), mode="bilinear")
        logits = F.interpolate(logits, size=prepared.shape[-2:], mode="bilinear")
        height, width = pixel_values.shape[-2:]
        return SemanticSegmenterOutput(
            logits=logits[..., :height, :width], hidden_states=hidden_states, attentions=attentions
        )

    def _prepare(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Re-normalise to the tower's own statistics and pad (repeating the border) to whole patches."""
        if any(coefficients != (1.0, 0.0) for coefficients in self.renormalization):
            channels = [pixel_values[:, c] * scale + shift for c, (scale, shift) in enumerate(self.renormalization)]
            pixel_values = torch.stack(channels, dim=1)
        height, width = pixel_values.shape[-2:]
        padding = (0, -width % self.encoder.patch_size, 0, -height % self.encoder.patch_size)
        return F.pad(pixel_values, padding, mode="replicate") if any(padding) else pixel_values


class Co2SPreTrainedModel(PreTrainedModel):
    """Weight initialisation and loading of Co2S models."""

    config: Co2SConfig
    base_model_prefix = "co2s"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    # A student taps the inside of its tower's layers, so it is the smallest unit that may be sharded or placed.
    _no_split_modules = ["Co2SStudent"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Initialise what the towers (which initialise themselves) do not hold; PyTorch's defaults for layers."""
        if isinstance(module, Co2SClipEncoder):
            init.normal_(module.visual_projection.weight, std=self.config.clip_config.hidden_size**-0.5)
        elif isinstance(module, Co2STextGuidance):
            # Without text every class still gets a direction of its own, as far from the others as can be. (float32:
            # half precision cannot be orthogonalised.)
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
    """Two students and their fusion.

    Example:

    ```python
    >>> from PIL import Image
    >>> from co2s_hf import Co2SForSemanticSegmentation, Co2SImageProcessor

    >>> model = Co2SForSemanticSegmentation.from_pretrained("path/to/checkpoint")
    >>> image_processor = Co2SImageProcessor.from_pretrained("path/to/checkpoint")
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
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> Co2SSemanticSegmenterOutput:
        """Segment a batch of images.

        Args:
            pixel_values: (batch, channels, height, width), normalised with `config.image_mean` and
                `config.image_std`; any height and width from 1 on.
            labels: (batch, height, width), class indices; pixels with `config.semantic_loss_ignore_index` do not
                count.
            fusion: Overrides `config.fusion` for this call.
            output_hidden_states: Also return the towers' hidden states.
            output_attentions: Also return the towers' attention weights; needs `attn_implementation="eager"`.

        Returns:
            A [`Co2SSemanticSegmenterOutput`], logits at the input's size.

        Raises:
            ValueError: A shape, the fusion's name or the attention implementation does not fit.
        """
        fusion = self.config.fusion if fusion is None else fusion
        if fusion not in FUSIONS:
            raise ValueError(f"`fusion` is '{fusion}'; choose one of {', '.join(FUSIONS)}.")
        self._check_images(pixel_values)
        if labels is not None and labels.shape != pixel_values.shape[:1] + pixel_values.shape[2:]:
            raise ValueError(
                f"`labels` has the shape {tuple(labels.shape)}, but `pixel_values` {tuple(pixel_values.shape)} asks "
                f"for {(*pixel_values.shape[:1], *pixel_values.shape[2:])} (batch, height, width)."
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                f"Attention weights are not kept by `attn_implementation='{self.config._attn_implementation}'`. Load "
                "the model with `attn_implementation='eager'`, or call `model.set_attn_implementation('eager')`."
            )

        students = {
            name: getattr(self, name)(
                pixel_values, output_hidden_states=output_hidden_states, output_attentions=output_attentions
            )
            for name in ((fusion,) if fusion in STUDENTS else STUDENTS)
        }
        loss = None
        if labels is not None:
            ignore_index = self.config.semantic_loss_ignore_index
            loss = sum(semantic_cross_entropy(student.logits, labels, ignore_index) for student in students.values())
        if fusion in STUDENTS:
            logits = students[fusion].logits
        else:
            logits = fuse_logits(students["clip"].logits, students["dinov3"].logits, fusion)
        per_student = {f"{name}_{key}": value for name, student in students.items() for key, value in student.items()}
        return Co2SSemanticSegmenterOutput(loss=loss, logits=logits, **per_student)

    def student_logits(
        self,
        pixel_values: torch.Tensor,
        students: tuple[str, ...] = STUDENTS,
        perturbed_samples: torch.Tensor | slice | None = None,
        perturb: Callable[[torch.Tensor], torch.Tensor] = F.dropout2d,
    ) -> dict[str, torch.Tensor]:
        """Each student's own logits, for several views of images in one pass through its tower.

        Args:
            pixel_values: (batch, channels, height, width), normalised as for `forward`; concatenate views along the
                batch.
            students: Names of the students to compute.
            perturbed_samples: Indices or slice of the samples to decode a second time, from the same features
                perturbed (UniMatch, arXiv 2208.09910). Their logits follow the others along the batch.
            perturb: What is done to such features (samples, channels, h, w); by default whole channels are dropped
                with probability 0.5.

        Returns:
            For every student, logits (batch + perturbed samples, classes, height, width).
        """
        self._check_images(pixel_values)
        if unknown := [name for name in students if name not in STUDENTS]:
            raise ValueError(f"`students` holds {unknown}; give a tuple of names out of {STUDENTS}.")
        return {name: getattr(self, name)(pixel_values, perturbed_samples, perturb).logits for name in students}

    def _check_images(self, pixel_values: torch.Tensor):
        num_channels = self.config.clip_config.num_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != num_channels or 0 in pixel_values.shape:
            raise ValueError(
                f"`pixel_values` has the shape {tuple(pixel_values.shape)}; expected (batch, {num_channels}, height, "
                "width), nothing empty."
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"`pixel_values` is {pixel_values.dtype}; expected normalised floating-point values, as "
                "`Co2SImageProcessor` makes them."
            )

    def freeze_backbones(self, train: str = "attention") -> "Co2SForSemanticSegmentation":
        """Choose which parameters of the two towers train; decoders and queries always do.

        Args:
            train: "attention" (the paper: query, key, value and output projections of every layer), "none", or
                "all".

        Returns:
            The model itself.

        Note:
            The tapped features of CLIP's last layer use its value path alone, so that layer's query and key
            projections, though trainable as in the paper, receive no gradient, nor does anything above the last
            tapped layers: under DistributedDataParallel set `find_unused_parameters=True`.
        """
        if train not in ("attention", "none", "all"):
            raise ValueError(f"`train` is '{train}'; choose attention, none or all.")
        for student in (self.clip, self.dinov3):
            student.requires_grad_(True)
            student.encoder.requires_grad_(train == "all")
            for module in student.encoder.attention_modules():
                module.requires_grad_(train != "none")
        self.dinov3.encoder.vision_model.embeddings.mask_token.requires_grad_(False)  # only for pre-training
        return self

    def set_class_concepts(
        self,
        class_concepts: dict[str, list[str]],
        text_embeddings: torch.Tensor | None = None,
        text_encoder: str | None = None,
        palette: list[list[int]] | None = None,
        **load_kwargs,
    ) -> "Co2SForSemanticSegmentation":
        """Change the classes by changing their text; the CLIP student then segments classes it never saw.

        Learnable queries of classes that keep their name are kept. New classes get fresh queries, which mean nothing
        until trained, so `config.fusion` becomes "clip" when there are any. The queries are a new parameter: make
        optimisers afterwards.

        Args:
            class_concepts: For every class its concepts; their order is the new label order.
            text_embeddings: (classes, `config.clip_config.projection_dim`). Left out, the concepts are encoded.
            text_encoder: Hub name or local folder of the CLIP checkpoint to encode with; `config.text_encoder` when
                left out.
            palette: One RGB colour per class; none when left out, unless the classes are the same as before.
            load_kwargs: Passed to the text encoder's `from_pretrained` (`token`, `revision`, ...).

        Returns:
            The model itself.

        Raises:
            ValueError: Neither embeddings nor a text encoder are known, the embeddings do not fit, or the model has
                adapters already.
            OSError: The text encoder cannot be loaded.
        """
        if getattr(self, "_hf_peft_config_loaded", False):
            raise ValueError(
                "This model has adapters, which have their own classes. Change the classes before adding one."
            )
        old_labels = [self.config.id2label[index] for index in range(self.config.num_labels)]
        labels = list(class_concepts)
        config = copy.deepcopy(self.config)
        config.text_encoder = text_encoder or config.text_encoder
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
        config.class_concepts = dict(class_concepts)
        config.palette = config.palette if palette is None and labels == old_labels else palette
        config.validate()
        new_labels = [label for label in labels if label not in old_labels]
        if new_labels:
            config.fusion = "clip"

        if text_embeddings is None:
            if config.text_encoder is None:
                raise ValueError(
                    "This model does not know which CLIP checkpoint its class text came from (`config.text_encoder` "
                    "is None). Pass `text_encoder` (Hub name or folder of that CLIP checkpoint) or `text_embeddings`."
                )
            text_embeddings = encode_class_concepts(config.class_concepts, config.text_encoder, **load_kwargs)
        expected_shape = (len(labels), config.clip_config.projection_dim)
        if tuple(text_embeddings.shape) != expected_shape:
            raise ValueError(
                f"`text_embeddings` has the shape {tuple(text_embeddings.shape)}; {len(labels)} classes and "
                f"`clip_config.projection_dim` ask for {expected_shape}."
            )

        old_queries = self.dinov3.guidance.queries
        queries = torch.randn(len(labels), old_queries.shape[1]) * config.initializer_range
        queries = queries.to(old_queries)
        for index, label in enumerate(labels):
            if label in old_labels:
                queries[index] = old_queries[old_labels.index(label)].detach()
        self.dinov3.guidance.queries = nn.Parameter(queries, requires_grad=old_queries.requires_grad)
        self.clip.guidance.embeddings = text_embeddings.detach().to(self.clip.guidance.embeddings).clone()
        for name in ("text_encoder", "id2label", "label2id", "class_concepts", "palette", "fusion"):
            setattr(self.config, name, getattr(config, name))
        self._has_new_queries = labels != old_labels  # which an adapter must carry, then
        if new_labels:
            logger.warning(
                f"The DINOv3 student has never seen {new_labels}; `config.fusion` is now 'clip'. Train the model on "
                "these classes before using it with another fusion."
            )
        return self

    @classmethod
    def from_backbones(
        cls,
        clip: str = "openai/clip-vit-base-patch16",
        dinov3: str = "facebook/dinov3-vitb16-pretrain-lvd1689m",
        *,
        id2label: dict[int, str],
        class_concepts: dict[str, list[str]] | None = None,
        text_embeddings: torch.Tensor | None = None,
        clip_revision: str | None = None,
        dinov3_revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        **config_kwargs,
    ) -> "Co2SForSemanticSegmentation":
        """Build a model for training from pretrained towers; decoders and queries are fresh.

        Each tower keeps its own activation, epsilon and normalisation. Feature layers default to the paper's, at the
        same relative depth for towers that are not 12 layers deep. A model saved from here loads without the towers'
        repositories.

        Args:
            clip: Hub name or local folder of a whole CLIP checkpoint (both towers, projections, tokenizer).
            dinov3: Hub name or local folder of a DINOv3 ViT. Names containing "sat493m" select the satellite
                statistics.
            id2label: Class names by index.
            class_concepts: For every class the words whose prompts make its text embedding; each class's own name
                when left out.
            text_embeddings: (classes, projection width), in label order, instead of encoding text.
            clip_revision: Commit, branch or tag of the CLIP repository.
            dinov3_revision: The same of the DINOv3 repository.
            token: Access token for gated or private repositories.
            cache_dir: Where downloads are kept.
            local_files_only: Do not look on the Hub.
            config_kwargs: Further fields of [`Co2SConfig`].

        Returns:
            The model in evaluation mode, the paper's default of parameters trainable (`freeze_backbones`).

        Raises:
            OSError: A tower cannot be loaded; the message names it and says what to do.
            TypeError: A keyword is no field of the configuration.
            StrictDataclassError: The towers and the other fields do not fit together.
        """
        if unknown := set(config_kwargs) - (set(cls.config_class.__dataclass_fields__) - {"dtype"}):
            raise TypeError(
                f"from_backbones() got {sorted(unknown)}, which Co2SConfig has no field for. (For another precision "
                "call `model.to(dtype)` afterwards.)"
            )
        load_kwargs = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        clip_kwargs = {**load_kwargs, "revision": clip_revision}
        clip_tower = load_tower(CLIPVisionModelWithProjection, clip, "CLIP's vision tower", **clip_kwargs)
        dinov3_tower = load_tower(DINOv3ViTModel, dinov3, "DINOv3's tower", **load_kwargs, revision=dinov3_revision)
        satellite = "sat493m" in str(dinov3)
        if class_concepts is None:
            class_concepts = {id2label[index]: [id2label[index].replace("_", " ")] for index in sorted(id2label)}
        defaults = {
            "clip_feature_layers": _scale_layers((0, 4, 11), clip_tower.config.num_hidden_layers),
            "dinov3_feature_layers": _scale_layers((2, 7, 11), dinov3_tower.config.num_hidden_layers),
            "dinov3_image_mean": SAT493M_MEAN if satellite else list(IMAGENET_DEFAULT_MEAN),
            "dinov3_image_std": SAT493M_STD if satellite else list(IMAGENET_DEFAULT_STD),
        }
        config = cls.config_class(
            clip_config=clip_tower.config,
            dinov3_config=dinov3_tower.config,
            id2label=id2label,
            class_concepts=class_concepts,
            text_encoder=str(clip),
            **{**defaults, **config_kwargs},
        )
        model = cls(config)
        model.clip.encoder.vision_model.load_state_dict(clip_tower.vision_model.state_dict())
        model.clip.encoder.visual_projection.load_state_dict(clip_tower.visual_projection.state_dict())
        model.dinov3.encoder.vision_model.load_state_dict(dinov3_tower.state_dict())
        if text_embeddings is None:
            text_embeddings = encode_class_concepts(config.class_concepts, clip, **clip_kwargs)
        model.set_class_concepts(config.class_concepts, text_embeddings, palette=config.palette)
        return model.freeze_backbones().eval()


def _scale_layers(layers: tuple[int, ...], num_hidden_layers: int) -> list[int]:
    """Layers of a 12-layer tower at the same relative depth in another one."""
    return [round(layer * (num_hidden_layers - 1) / 11) for layer in layers]


__all__ = [
    "STUDENTS",
    "Co2SForSemanticSegmentation",
    "Co2SPreTrainedModel",
    "Co2SSemanticSegmenterOutput",
    "fuse_logits",
    "semantic_cross_entropy",
]
