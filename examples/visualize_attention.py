"""Draw the attention of the class token to the patches of an image, for every head of both backbones.

    python examples/visualize_attention.py --checkpoint outputs/train_semi/model --image photo.jpg

    # Draw other layers, into a PDF. Layers count from 0, and negative numbers from the last layer.
    python examples/visualize_attention.py --checkpoint outputs/train_semi/model --image photo.jpg \\
        --layers 0 2 -1 --output attention.pdf

The sheet shows the attention of every head, the mean of the heads and their maximum, each drawn over the image. The
decoder of the CLIP student uses features of the value path, which has no attention. The sheet shows the attention of
the ordinary forward pass.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from co2s_hf.cli.command_line import Command, own_group, setting
from co2s_hf.data.reading import ImageRule, StoredFile
from co2s_hf.inference.attention import class_token_attention, draw_attention
from co2s_hf.inference.images import load_model
from co2s_hf.model.modeling_co2s import STUDENTS
from co2s_hf.utils.errors import UserValueError
from co2s_hf.utils.files import written_file


@dataclass
class Arguments:
    image: str | None = setting(None, "Image file.")
    checkpoint: str = setting("outputs/train_semi/model", "Folder or Hub name of a trained model.")
    layers: list[int] = setting([-1], "Layers to draw, from 0. Negative numbers count from the last layer.")
    max_side: int = setting(512, "Larger images are scaled down to this longer side, in pixels.")
    output: str = setting("outputs/attention.png", "File to write, .png or .pdf.")

    def __post_init__(self):
        if self.image is None or not Path(self.image).is_file():
            raise UserValueError(f"`image` is '{self.image}'; name an image file.")
        if Path(self.output).suffix.lower() not in (".png", ".pdf"):
            raise UserValueError(f"`output` is '{self.output}'; name a file that ends in .png or .pdf.")
        if self.max_side < 8:
            raise UserValueError(f"`max_side` is {self.max_side}; it must be at least 8.")


COMMAND = Command(
    name="examples/visualize_attention.py",
    description=__doc__,
    groups=[own_group("sheet", Arguments)],
    program="python",
)


def main():
    args = COMMAND.parse()[Arguments]
    with COMMAND.user_errors():
        model, image_processor = load_model(args.checkpoint, attn_implementation="eager")
        image = ImageRule.of_config(model.config).read(StoredFile(args.image))
        image.thumbnail((args.max_side, args.max_side))
        # Crop to whole patches of both backbones, so that the maps and the image have the same extent.
        patch = math.lcm(*(getattr(model, student).encoder.patch_size for student in STUDENTS))
        image = image.crop((0, 0, *(max(side - side % patch, patch) for side in image.size)))
        pixel_values = image_processor(image, do_resize=False, return_tensors="pt")["pixel_values"]
        maps = {}
        for student in STUDENTS:
            depth = len(getattr(model, student).encoder.layers)
            for layer, heads in zip(args.layers, class_token_attention(model, pixel_values, student, args.layers)):
                maps[f"{student}, layer {layer % depth} of 0 to {depth - 1}"] = heads.float().cpu().numpy()
        with written_file(args.output) as target:
            draw_attention(image, maps, target, Path(args.output).suffix[1:].lower())
    print(f"Wrote {args.output}.")


if __name__ == "__main__":
    main()
