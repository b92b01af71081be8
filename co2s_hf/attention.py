"""Where the towers look: attention from the class token to the patches, by layer and head."""

import torch

from .modeling_co2s import STUDENTS, Co2SForSemanticSegmentation


@torch.no_grad()
def class_token_attention(
    model: Co2SForSemanticSegmentation, pixel_values: torch.Tensor, student: str, layers: list[int]
) -> list[torch.Tensor]:
    """Attention weights of the class token in some layers of one tower.

    Args:
        model: In evaluation mode, loaded with `attn_implementation="eager"`, which alone keeps the weights.
        pixel_values: (1, channels, height, width), as the image processor makes it.
        student: "clip" or "dinov3".
        layers: Counted from 0, or from the end with negative numbers.

    Returns:
        Per layer (heads, rows, columns) of patches, 0 to 1. They sum to less than 1 over the patches: what is missing
        went to the class token itself and to registers.

    Raises:
        ValueError: There is no such student or layer, or the model keeps no attention weights.
    """
    if student not in STUDENTS:
        raise ValueError(f"`student` is '{student}'; choose one of {', '.join(STUDENTS)}.")
    encoder = getattr(model, student).encoder
    depth = len(encoder.layers)
    if beyond := [layer for layer in layers if not -depth <= layer < depth]:
        raise ValueError(f"The {student} tower has the layers 0 to {depth - 1}; there is no layer {beyond[0]}.")
    output = model(pixel_values.to(model.device), fusion=student, output_attentions=True)
    attentions = output[f"{student}_attentions"]
    rows, columns = (-(-side // encoder.patch_size) for side in pixel_values.shape[-2:])  # padded to whole patches
    # (1, heads, tokens, tokens) -> (heads, patches); patches come last, after the class token and registers
    return [attentions[layer][0, :, 0, -rows * columns :].unflatten(1, (rows, columns)) for layer in layers]
