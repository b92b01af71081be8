"""Model and objectives of a DINOv3 backbone: distillation of patch features, and masked images.

The masked images are SimMIM (arXiv 2111.09886).
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ...data.views import normalize, strong_view
from ...model.text_guidance_co2s import load_pretrained
from ...utils.errors import loading
from .options import Dinov3Options


CLASS_TOKEN_WEIGHT = 0.2
MASKED_SHARE, MASK_CELL_PX = 0.6, 32


def build_dinov3(options: Dinov3Options) -> DINOv3ViTModel:
    """Make a small DINOv3 backbone, or load it from `init`.

    Raises:
        UserOSError: `init` cannot be loaded.
    """
    if options.init is not None:
        with loading(f"`init` {options.init}", name=options.init):
            return load_pretrained(DINOv3ViTModel, options.init, "DINOv3's backbone").train()
    return DINOv3ViTModel(
        DINOv3ViTConfig(
            hidden_size=options.hidden_size,
            intermediate_size=4 * options.hidden_size,
            num_hidden_layers=options.num_hidden_layers,
            num_attention_heads=options.num_attention_heads,
            patch_size=options.patch_size,
            image_size=options.crop_size,
            num_register_tokens=4,
            layer_norm_eps=1e-6,
            pos_embed_rescale=None,  # Co2S switches this augmentation off, too
        )
    )


class FeatureHead(nn.Module):
    """A linear layer from a backbone's features to standardised features of the teacher, with the loss between both.

    Args:
        hidden_size: Width of the backbone.
        mean, std: Statistics of the teacher's features, (channels,).
    """

    def __init__(self, hidden_size: int, mean: torch.Tensor, std: torch.Tensor):
        super().__init__()
        self.projection = nn.Linear(hidden_size, len(mean))
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compute the cosine distance plus the smooth L1 distance, a scalar with gradients.

        Args:
            features: Features of the backbone, (..., hidden).
            target: Features of the teacher, (..., channels), not standardised.
        """
        target = (target.to(features.device).float() - self.mean) / self.std
        predicted = self.projection(features).float()
        return (1 - F.cosine_similarity(predicted, target, dim=-1)).mean() + F.smooth_l1_loss(predicted, target)


class DistillationObjective(nn.Module):
    """Learn a teacher's features of the patches, and its class token, from crops with changed colours.

    Args:
        model: The backbone to train.
        mean, std: Statistics of the teacher's features, (channels,).
    """

    def __init__(self, model: DINOv3ViTModel, mean: torch.Tensor, std: torch.Tensor):
        super().__init__()
        self.model = model
        self.patch_head = FeatureHead(model.config.hidden_size, mean, std)
        self.class_head = FeatureHead(model.config.hidden_size, mean, std)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Compute the losses of a batch of [`TileCrops`].

        Returns:
            `loss`, with gradients; `loss_patches` and `loss_class_token` without. All are scalars.
        """
        pixels = normalize(changed_colors(batch), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        tokens = self.model(pixels).last_hidden_state
        patches = tokens[:, 1 + self.model.config.num_register_tokens :]
        loss_patches = self.patch_head(patches, batch["features"].flatten(2).transpose(1, 2))
        loss_class = self.class_head(tokens[:, 0], batch["class_token"])
        return {
            "loss": loss_patches + CLASS_TOKEN_WEIGHT * loss_class,
            "loss_patches": loss_patches.detach(),
            "loss_class_token": loss_class.detach(),
        }


class MaskedImageObjective(nn.Module):
    """Learn the pixels of masked patches (SimMIM): no teacher is needed.

    Args:
        model: The backbone to train.
    """

    def __init__(self, model: DINOv3ViTModel):
        super().__init__()
        self.model, self.patch_size = model, model.config.patch_size
        self.head = nn.Linear(model.config.hidden_size, 3 * self.patch_size**2)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Compute the mean absolute error of the masked pixels (normalised), a scalar `loss` with gradients.

        Random numbers come from torch's global generator.
        """
        pixels = normalize(changed_colors(batch), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        mask = self._draw_mask(*pixels.shape[:1], pixels.shape[-1] // self.patch_size).to(pixels.device)
        tokens = self.model(pixels, bool_masked_pos=mask).last_hidden_state
        predicted = self.head(tokens[:, 1 + self.model.config.num_register_tokens :]).float()
        # (batch, 3, h * patch, w * patch) -> (batch, h * w, 3 * patch * patch)
        target = F.unfold(pixels, self.patch_size, stride=self.patch_size).transpose(1, 2)
        return {"loss": (predicted - target).abs()[mask].mean()}

    def _draw_mask(self, batch_size: int, grid: int) -> torch.Tensor:
        """Draw masked cells of about 32 px, (batch, grid * grid), boolean."""
        cell = max(1, MASK_CELL_PX // self.patch_size)
        cells = -(-grid // cell)
        order = torch.rand(batch_size, cells * cells).argsort(dim=1)
        mask = (order < round(MASKED_SHARE * cells * cells)).view(batch_size, cells, cells)
        mask = mask.repeat_interleave(cell, dim=1).repeat_interleave(cell, dim=2)
        return mask[:, :grid, :grid].flatten(1)


def changed_colors(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the images of a batch with random colours and blur, (batch, 3, crop, crop), float, 0 to 1."""
    return strong_view(batch["image"].float() / 255, batch["appearance"]).clamp(0, 1)


__all__ = ["DistillationObjective", "FeatureHead", "MaskedImageObjective", "build_dinov3", "changed_colors"]
