"""See where both towers look: attention of the class token to every patch of one image, for every head.

    python examples/visualize_attention.py --checkpoint outputs/train_semi/model --image photo.jpg

    # Other layers (from 0, or from the end: -1), as a PDF.
    python examples/visualize_attention.py --checkpoint outputs/train_semi/model --image photo.jpg \\
        --layers 0 2 -1 --output attention.pdf

The sheet shows every head, their mean and their maximum over the image. What CLIP's decoder taps skips attention (the
value path); the attention shown is that of the ordinary pass, which feeds the next layer.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from co2s_hf import Co2SForSemanticSegmentation, Co2SImageProcessor
from co2s_hf.cli.command_line import parse_arguments, setting, told_plainly
from co2s_hf.data.reading import ImageRule, StoredFile
from co2s_hf.inference.attention import class_token_attention
from co2s_hf.model.modeling_co2s import STUDENTS
from co2s_hf.utils.figures import draw_attention
from co2s_hf.utils.files import written_file


SUFFIXES = (".png", ".pdf")


@dataclass
class Arguments:
    image: str = setting(None, "Image file.")
    checkpoint: str = setting("outputs/train_semi/model", "Folder or Hub name of a trained model.")
    layers: list[int] = field(default_factory=lambda: [-1], metadata={"help": "Layers, from 0, or from the end (-1)."})
    max_side: int = setting(512, "Longer side in pixels that larger images are scaled down to.")
    output: str = setting("outputs/attention.png", "File to write, .png or .pdf.")

    def __post_init__(self):
        if self.image is None or not Path(self.image).is_file():
            raise ValueError(f"--image '{self.image}' is no file; name an image.")
        if Path(self.output).suffix.lower() not in SUFFIXES:
            raise ValueError(f"--output is '{self.output}'; name a file that ends in .png or .pdf.")
        if self.max_side < 8:
            raise ValueError(f"--max_side is {self.max_side}; it must be at least 8.")


def main():
    args = parse_arguments(Arguments, __doc__)
    with told_plainly():
        model = Co2SForSemanticSegmentation.from_pretrained(args.checkpoint, attn_implementation="eager").eval()
        # Bands and scale as in the model's training.
        image = ImageRule.of_config(model.config).read(StoredFile(args.image))
        image.thumbnail((args.max_side, args.max_side))
        image_processor = Co2SImageProcessor.from_pretrained(args.checkpoint)
        # Whole patches of both towers, so that every patch of a map lies where it was looked at.
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
