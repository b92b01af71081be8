"""Attention maps of the backbones: attention from the class token to the patches, by layer and head."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from ..model.modeling_co2s import STUDENTS, Co2SForSemanticSegmentation
from ..utils.errors import UserValueError
from ..utils.figures import CELL_INCHES


@torch.no_grad()
def class_token_attention(
    model: Co2SForSemanticSegmentation, pixel_values: torch.Tensor, student: str, layers: list[int]
) -> list[torch.Tensor]:
    """Compute the attention weights of the class token in some layers of one backbone.

    Args:
        model: Model in evaluation mode. Load it with `attn_implementation="eager"`: no other implementation returns
            the weights.
        pixel_values: One image (1, channels, height, width), from the image processor.
        student: Student that has the backbone: "clip" or "dinov3".
        layers: Layer numbers from 0. Negative numbers count from the last layer.

    Returns:
        Weights of the patches (heads, rows, columns) for each layer, 0 to 1. Their sum per head is below 1, because
        the class token also attends to itself and to the registers.

    Raises:
        UserValueError: `student` is not the name of a student, or the backbone lacks one of `layers`.
        ValueError: The attention implementation of the model returns no weights.
    """
    if student not in STUDENTS:
        raise UserValueError(f"`student` is '{student}'; expected one of {', '.join(STUDENTS)}.")
    encoder = getattr(model, student).encoder
    depth = len(encoder.layers)
    if missing := [layer for layer in layers if not -depth <= layer < depth]:
        raise UserValueError(
            f"`layers` contains {missing[0]}, but there is no layer {missing[0]} in the {student} backbone; expected "
            f"0 to {depth - 1}, or -{depth} to -1."
        )
    output = model(pixel_values.to(model.device), fusion=student, output_attentions=True)
    attentions = output[f"{student}_attentions"]
    # The backbones pad images to whole patches.
    rows, columns = (-(-side // encoder.patch_size) for side in pixel_values.shape[-2:])
    # (1, heads, tokens, tokens) -> (heads, patches). The patches are last, after the class token and the registers.
    return [attentions[layer][0, :, 0, -rows * columns :].unflatten(1, (rows, columns)) for layer in layers]


def draw_attention(image: Image.Image, maps: dict[str, np.ndarray], path: str | Path, kind: str = "png"):
    """Draw attention maps over an image: for each layer the image, every head, and their mean and maximum.

    Args:
        image: The input image of the backbones.
        maps: Title -> attention weights (heads, rows, columns). The colours of each panel range from the lowest to the
            highest value of that panel.
        path: File to write.
        kind: "png" or "pdf".
    """
    columns = min(8, max(map(len, maps.values())) + 3)
    rows = {title: -(-(len(heads) + 3) // columns) for title, heads in maps.items()}
    figure = Figure(figsize=(CELL_INCHES * columns, (CELL_INCHES + 0.3) * sum(rows.values())), layout="constrained")
    parts = figure.subfigures(len(maps), 1, squeeze=False, height_ratios=list(rows.values()))[:, 0]
    extent = (0, image.width, image.height, 0)
    for part, (title, heads) in zip(parts, maps.items()):
        part.suptitle(title)
        panels = {f"head {number}": head for number, head in enumerate(heads)}
        panels |= {"mean": heads.mean(axis=0), "maximum": heads.max(axis=0)}
        axes = part.subplots(rows[title], columns, squeeze=False).ravel()
        for axis in axes:
            axis.set_axis_off()
        axes[0].imshow(image)
        axes[0].set_title("image")
        for axis, (name, values) in zip(axes[1:], panels.items()):
            axis.imshow(image.convert("L"), cmap="gray", extent=extent)
            axis.imshow(values, cmap="inferno", alpha=0.6, extent=extent, interpolation="bilinear")
            axis.set_title(name)
    figure.savefig(path, dpi=100, format=kind)
