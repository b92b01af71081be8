"""Optimizer, learning rates, class weights and the length of an epoch."""

import math

import numpy as np
import torch
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..model.modeling_co2s import STUDENTS, Co2SForSemanticSegmentation
from .options import PRETRAINED


# Devices on which the fused AdamW is used and tested. Elsewhere, PyTorch chooses an implementation.
FUSED_DEVICES = ("cpu", "cuda")


def make_optimizer(
    model: Co2SForSemanticSegmentation,
    learning_rate: float = PRETRAINED["learning_rate"],
    backbone_lr_scale: float = PRETRAINED["backbone_lr_scale"],
    decoder_lr_scale: float = PRETRAINED["decoder_lr_scale"],
    weight_decay: float = 0.01,
    device: torch.device | str = "cpu",
) -> Optimizer:
    """Make AdamW for the trainable parameters, with learning rates for backbones, queries and decoders.

    Args:
        model: The model. Only parameters that require gradients are trained.
        learning_rate: Base learning rate. The learnable queries use it unchanged.
        backbone_lr_scale: Factor on the base learning rate for both backbones.
        decoder_lr_scale: Factor on the base learning rate for both decoders.
        weight_decay: Weight decay of every parameter.
        device: Device of the training, to which the model may be moved later.
    """
    scales = {"encoder": backbone_lr_scale, "guidance": 1.0, "decoder": decoder_lr_scale}
    groups = []
    for part, scale in scales.items():
        modules = [getattr(getattr(model, student), part) for student in STUDENTS]
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        if parameters:
            groups.append({"params": parameters, "lr": learning_rate * scale, "name": part})
    is_fused = torch.device(device).type in FUSED_DEVICES or None  # None: the default of PyTorch
    return AdamW(groups, lr=learning_rate, weight_decay=weight_decay, fused=is_fused)


def polynomial_decay(optimizer: Optimizer, total_steps: int, power: float = 0.9) -> LambdaLR:
    """Decay the learning rates to 0 as (1 - step / total)^power, without warm-up."""
    return LambdaLR(optimizer, lambda step: max(0.0, 1 - step / total_steps) ** power)


def steps_per_epoch(num_labeled: int, num_unlabeled: int, global_batch_size: int) -> int:
    """Return the number of steps that use every image of the longer list at least once (the paper's epoch)."""
    return math.ceil(max(num_labeled, num_unlabeled) / global_batch_size)


def balanced_class_weights(pixel_counts: np.ndarray) -> torch.Tensor:
    """Return class weights that are inverse to the number of pixels: pixels / (classes * pixels of the class).

    Classes without labelled pixels are not counted. They get the weight 1, which has no effect.

    Args:
        pixel_counts: Number of labelled pixels (classes,).
    """
    counts = torch.as_tensor(pixel_counts, dtype=torch.float32)
    present = counts > 0
    weights = counts.sum() / (present.sum() * counts.clamp(min=1))
    return weights.where(present, 1.0)


def training_size(model: Co2SForSemanticSegmentation, optimizer: Optimizer) -> str:
    """Format the number of trained parameters and the memory of the optimizer's state in one line."""
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
    megabytes = sum(tensor.numel() * tensor.element_size() for tensor in state) / 1e6
    return f"Trained {trained / 1e6:.2f} M of {total / 1e6:.2f} M parameters; optimiser state {megabytes:.1f} MB."


__all__ = ["balanced_class_weights", "make_optimizer", "polynomial_decay", "steps_per_epoch", "training_size"]
