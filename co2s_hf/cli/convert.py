"""Convert the authors' checkpoints to a model of this package, and back.

  # From the authors' repository on the Hub.
  co2s convert --hub_repo XavierJiezou/co2s-models --hub_folder POTSDAM/1_32-74.30 --dataset potsdam \\
      --output_dir co2s-potsdam --verify

  # From local files.
  co2s convert --clip_checkpoint best_clip.pth --dinov3_checkpoint best_dinov3.pth --dataset whdld \\
      --output_dir co2s-whdld --verify

  # And back.
  co2s convert --to_original co2s-whdld --output_dir original

A converted model computes the same logits as the authors' code, up to rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from ..data.benchmarks import BENCHMARKS
from ..utils.errors import UserValueError
from ..utils.ranges import check_ranges
from .command_line import Command, own_group, setting


@dataclass
class ConvertArguments:
    """What to convert."""

    clip_checkpoint: str | None = setting(None, "The authors' best_clip.pth.")
    dinov3_checkpoint: str | None = setting(None, "The authors' best_dinov3.pth.")
    hub_repo: str | None = setting(None, "Hub repository with both files, instead of local files.")
    hub_folder: str = setting("", "Folder in --hub_repo.")
    dataset: Literal[tuple(BENCHMARKS)] | None = setting(None, "Benchmark of the training. It gives the class names.")
    to_original: str | None = setting(None, "Folder or Hub name of a model of co2s_hf: convert it back instead.")
    output_dir: str | None = setting(None, "New folder for the result.")
    verify: bool = setting(False, "Load the result and compare all its tensors with the source.")

    def __post_init__(self):
        if self.output_dir is None:
            raise UserValueError("Name a new folder for the result: `output_dir`.")
        if self.to_original is not None:
            if self.verify or self.clip_checkpoint or self.dinov3_checkpoint or self.hub_repo:
                raise UserValueError("`to_original` goes with `output_dir` alone.")
            return
        if self.dataset is None:
            raise UserValueError("Name the benchmark that the checkpoints were trained on: `dataset`.")
        if self.hub_repo is None and None in (self.clip_checkpoint, self.dinov3_checkpoint):
            raise UserValueError("Give both `clip_checkpoint` and `dinov3_checkpoint`, or `hub_repo`.")


@dataclass
class SizeArguments:
    """Sizes that the authors' files do not contain. The defaults are the authors'."""

    num_attention_heads: int = setting(12, "Attention heads of both backbones.")
    decoder_num_attention_heads: int = setting(4, "Attention heads of the decoders' semantic layers.")
    decoder_pool_size: int = setting(4, "Factor of the average pooling before the semantic layers.")
    clip_logits_size: int = setting(224, "Fixed side of the CLIP student's logits, in pixels.")
    dinov3_logits_size: int = setting(256, "Fixed side of the DINOv3 student's logits, in pixels.")

    def __post_init__(self):
        check_ranges(self, {f.name: 1 for f in fields(self)})


COMMAND = Command(
    name="convert",
    description=__doc__,
    groups=[own_group("conversion", ConvertArguments), own_group("sizes (the authors' by default)", SizeArguments)],
)


def main(words: Sequence[str] | None = None):
    """Run `co2s convert` with these words, or those of this process."""
    arguments = COMMAND.parse(words)
    args, sizes = arguments[ConvertArguments], arguments[SizeArguments]
    with COMMAND.user_errors():
        from ..hub.convert_co2s_to_hf import (
            CHECKPOINT_NAMES,
            convert,
            convert_to_original,
            download_originals,
            verify,
        )

        if args.to_original is not None:
            convert_to_original(args.to_original, args.output_dir)
            print(f"Wrote {' and '.join(CHECKPOINT_NAMES.values())} to {args.output_dir}.")
            return
        paths = {"clip": args.clip_checkpoint, "dinov3": args.dinov3_checkpoint}
        if args.hub_repo is not None:
            paths = download_originals(args.hub_repo, args.hub_folder)
        convert(paths["clip"], paths["dinov3"], args.output_dir, args.dataset, **vars(sizes))
        print(
            f"Wrote {args.output_dir}. Load it with Co2SForSemanticSegmentation.from_pretrained('{args.output_dir}')."
        )
        if args.verify:
            count = verify(args.output_dir, paths["clip"], paths["dinov3"])
            print(f"Verified: {count} tensors reload bit-equal to the authors' files.")
