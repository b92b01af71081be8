"""Pretrain a small backbone on images without label maps.

Examples:

  # Distil a teacher into a small DINOv3 backbone. The teacher's features are computed once and cached.
  co2s pretrain dinov3 --images my_images --teacher facebook/dinov2-small --output_dir outputs/my_dinov3

  # Without a teacher: predict masked parts of the images. Start from the backbone that this package ships.
  co2s pretrain dinov3 --images my_images --init co2s-tiny-dinov3 --output_dir outputs/my_dinov3

  # A CLIP model from tags or captions. labels.csv has the columns image and tags (or caption).
  co2s pretrain clip --images my_images --image_labels labels.csv --output_dir outputs/my_clip

  # Leave the validation images out.
  co2s pretrain dinov3 --images my_data/images --exclude my_data/splits/val.txt

  # Continue after an interruption, with the same options.
  co2s pretrain dinov3 --images my_images --output_dir outputs/my_dinov3 --resume

  # Train with the results.
  co2s train --clip_model outputs/my_clip/model --dinov3_model outputs/my_dinov3/model --data_dir my_data
"""

import sys
from collections.abc import Sequence

from ..training.pretraining.options import ClipOptions, Dinov3Options
from .command_line import Command, Flag, Group


SHARED = {
    "images": Flag("Folders of images; subfolders are searched, too.", many=True, name="DIR"),
    "exclude": Flag("Text file that names images to leave out, such as splits/val.txt."),
    "teacher": Flag("Vision transformer to learn from (Hub name or folder), such as facebook/dinov2-small."),
    "teacher_layer": Flag("Layer of the teacher to learn from, counted from 1. Default: the last one."),
    "cache_features": Flag(
        "Compute the teacher's features once and keep them on the disk. false: compute them in every step."
    ),
    "cache_dir": Flag("Folder of the cached features. Default: teacher_features in --output_dir."),
    "init": Flag("Backbone to start from (Hub name or folder). Default: a new one of the sizes below."),
}
SIZES = {
    "hidden_size": Flag("Width of a new backbone."),
    "num_hidden_layers": Flag("Layers of a new backbone."),
    "num_attention_heads": Flag("Attention heads of a new backbone."),
    "patch_size": Flag("Side of the patches of a new backbone, in pixels."),
}
TRAINING = {
    "tile_size": Flag("Images are cut into tiles of this side, in pixels."),
    "crop_size": Flag("Side of training crops in pixels."),
    "per_device_train_batch_size": Flag("Crops per step and device."),
    "max_train_steps": Flag("Number of steps."),
    "learning_rate": Flag("Highest learning rate."),
    "mixed_precision": Flag(
        "Precision of the training. bf16: autocast; the weights stay in float32. Default: the choice of `accelerate "
        "launch`."
    ),
    "dataloader_num_workers": Flag("Worker processes that read images, per device."),
    "use_cpu": Flag("Use the CPU even if there is a GPU."),
    "seed": Flag("Seed of the weights, the order of the tiles and the crops."),
}
OUTPUT = {
    "output_dir": Flag("Folder of the run. The backbone is written to its subfolder model/."),
    "overwrite_output_dir": Flag("Remove the results of an earlier pretraining in --output_dir."),
    "logging_steps": Flag("Log the mean losses every N steps."),
    "checkpointing_steps": Flag("Save a checkpoint every N steps; the last two are kept."),
    "resume": Flag("Continue from the last checkpoint in --output_dir."),
}
LABELS = {
    "image_labels": Flag("CSV file with the columns image (relative to the file) and tags or caption."),
    "held_out_fraction": Flag("Share of the tagged images that measures the tags and is not trained on."),
}
TEXT_SIZES = {
    "projection_dim": Flag("Width of the common space of images and text."),
    "text_hidden_size": Flag("Width of a new text encoder."),
    "text_num_hidden_layers": Flag("Layers of a new text encoder."),
}


def _command(kind: str, options: type, first: dict, sizes: dict) -> Command:
    groups = {"data and teacher": first, "sizes": sizes, "training": TRAINING, "output": OUTPUT}
    return Command(
        name=f"pretrain {kind}",
        description=__doc__,
        groups=[Group(title, options, flags) for title, flags in groups.items()],
    )


COMMANDS = {
    "dinov3": _command("dinov3", Dinov3Options, SHARED, SIZES),
    "clip": _command("clip", ClipOptions, SHARED | LABELS, SIZES | TEXT_SIZES),
}


def main(words: Sequence[str] | None = None):
    """Run `co2s pretrain KIND ...` with these words, or those of this process."""
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0] not in COMMANDS:
        usage = f"usage: co2s pretrain {{{','.join(COMMANDS)}}} [--flag value ...]\n\n{__doc__}"
        if words and words[0] in ("-h", "--help"):
            print(usage)
            return
        sys.exit(f"{usage}\nerror: name the kind of the backbone first: dinov3 or clip.")
    command = COMMANDS[words[0]]
    options = next(iter(command.parse(words[1:]).values()))
    with command.user_errors():
        from ..training.pretraining import loop  # this import takes seconds, and --help must be quick

        {"dinov3": loop.pretrain_dinov3, "clip": loop.pretrain_clip}[words[0]](options)
