"""The flags that several commands share: data, training and the Hub.

A new training flag is a field in training/options.py and a [`Flag`] here. It then appears in `co2s train` and in `co2s
finetune` (unless the HELPS of finetune.py say None).
"""

import re
from dataclasses import dataclass
from pathlib import Path

from ..data.options import DataOptions
from ..training.options import TrainingOptions
from ..utils.errors import UserValueError
from .command_line import Flag, Group, own_group, parse_fraction, setting


DEFAULT_MODEL = "outputs/train_semi/model"  # what `co2s train` writes


def parse_bands(text: str) -> tuple[int, ...]:
    """Parse "4,3,2"."""
    numbers = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if len(numbers) != 3 or min(numbers) < 1:
        raise ValueError(f"'{text}' is not three band numbers from 1 for red, green and blue, such as 4,3,2")
    return tuple(numbers)


def parse_scale(words: list[str]) -> tuple[tuple[float, float], ...] | str:
    """Parse ["0", "3000"], six numbers for three bands, or ["percentiles"]."""
    if words == ["percentiles"]:
        return "percentiles"
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    pairs = tuple(zip(numbers[::2], numbers[1::2]))
    if len(numbers) not in (2, 6) or not all(low < high for low, high in pairs):
        raise ValueError(
            f"'{' '.join(words)}' is neither the values that become 0 and 255, low first, nor 'percentiles'"
        )
    return pairs


def parse_label_map(text: str) -> dict[int, int]:
    """Parse "7=0,9=1" into {7: 0, 9: 1}."""
    pairs = [re.fullmatch(r"\s*(\d+)\s*=\s*(\d+)\s*", part) for part in text.split(",")]
    if not all(pairs):
        raise ValueError(f"'{text}' is not VALUE=CLASS,VALUE=CLASS, such as 7=0,9=1")
    values = [int(pair[1]) for pair in pairs]
    if len(set(values)) != len(values):
        raise ValueError(f"'{text}' gives one value two classes")
    return {int(pair[1]): int(pair[2]) for pair in pairs}


def parse_class_names(words: list[str]) -> list[str]:
    """Return the names, or the lines of a file of names."""
    if len(words) == 1 and Path(words[0]).is_file():
        return [line.strip() for line in Path(words[0]).read_text(encoding="utf-8").splitlines() if line.strip()]
    return words


BANDS = Flag("Numbers, from 1, of the red, green and blue bands, such as 4,3,2.", parse_bands)
SCALE = Flag(
    "Values that become 0 and 255 in images of more than 8 bits: two numbers, or 'percentiles' (2nd and 98th).",
    parse_scale,
    many=True,
    name="LOW HIGH",
)
DATA = Group(
    "data",
    DataOptions,
    {
        "data_dir": Flag("Folder with images/ and labels/, and splits/ with lists unless the sets are drawn."),
        "dataset_name": Flag(
            "Data set on the Hub, or a folder from `co2s prepare`, save_to_disk or of parquet files."
        ),
        "dataset_config": Flag("Configuration of that data set, if it has several."),
        "dataset_revision": Flag("Branch, tag or commit of the data set on the Hub."),
        "dataset": Flag("Benchmark of the paper. Images come from the Hub, or from a copy in --data_dir."),
        "partition": Flag("Labelled share of that benchmark, such as 1_24. Default: the smallest."),
        "splits_dir": Flag("Folder with labeled.txt, unlabeled.txt and val.txt. Default: splits/ of --data_dir."),
        "image_column": Flag("Column of --dataset_name with the images."),
        "label_column": Flag("Column of --dataset_name with the label maps."),
        "labeled_fraction": Flag(
            "Draw the sets: this share of the images with labels, such as 1/8, keeps them.", parse_fraction
        ),
        "validation_fraction": Flag("Share to draw for validation, if no validation set exists.", parse_fraction),
        "group_regex": Flag(r"Part of a name that names its group, such as 'tile\d+'. Groups are drawn as a whole."),
        "class_names": Flag(
            "Class names in label order, or a file with one name per line. Default: classes.json.",
            parse_class_names,
            name="NAME",
        ),
        "ignore_index": Flag("Value in label files that means 'no class'."),
        "reduce_labels": Flag("0 in label files means 'no class', and the classes start at 1."),
        "label_map": Flag(
            "Classes of the values in label files, such as 7=0,9=1. Other values are errors.", parse_label_map
        ),
        "label_colors": Flag("JSON file with the classes' colours in coloured masks, in the form of classes.json."),
        "bands": BANDS,
        "scale": SCALE,
    },
)

MODEL = {
    "clip_model": Flag("Pretrained CLIP (Hub name or folder). Default: a small backbone, from scratch."),
    "dinov3_model": Flag("Pretrained DINOv3 (Hub name or folder); goes with --clip_model."),
    "students": Flag("Students to train."),
    "train_backbones": Flag("Backbone parameters to train. Default: attention; from scratch: all."),
    "lora": Flag("Train LoRA updates of the backbones; overrides --train_backbones. They are merged at the end."),
    "lora_rank": Flag("Rank of the LoRA updates."),
}
METHOD = {
    "method": Flag("supervised trains on the labelled images alone."),
    "recipe": Flag("released follows the authors' code where it differs from the paper; see the README."),
    "supervised_warmup_steps": Flag(
        "Steps on labels alone before unlabelled images are used. Default: 0; from scratch: three fifths of the steps."
    ),
    "confidence_threshold": Flag(
        "Confidence from which pseudo-labels are used, 0 to 1. Default: 0.95; from scratch: 0.6."
    ),
    "confidence_mode": Flag(
        "Weights of pseudo-labels: 1 for confident pixels, else 0; or the image's share of confident pixels; or its "
        "mean confidence."
    ),
    "strong_weight": Flag("Weight of the loss of each strong view."),
    "feature_dropout_weight": Flag("Weight of the loss of the perturbed features."),
    "stability_weight": Flag("Final weight of the loss between the students; 0 turns it off."),
    "labeled_loss": Flag("Loss on labels; ohem uses hard pixels only (probability below 0.7)."),
    "class_weights": Flag("Loss weight of each class: one number per class, or 'balanced' (inverse to frequency)."),
    "measure_pseudo_labels": Flag("Report the accuracy of pseudo-labels, where unlabelled images have label files."),
}
SCHEDULE = {
    "crop_size": Flag("Side of training crops and evaluation windows, in pixels. Default: 256; from scratch: 64."),
    "base_size": Flag("Long and short side that training images are scaled to fit into, before the random scale."),
    "per_device_train_batch_size": Flag(
        "Labelled images per step and device, and as many unlabelled ones. Default: 2; from scratch: 16."
    ),
    "gradient_accumulation_steps": Flag("Batches per step."),
    "max_train_steps": Flag("Length of the training in steps. Default: 550."),
    "num_train_epochs": Flag("Length of the training in epochs of the longer list, instead."),
    "learning_rate": Flag("Base learning rate. Default: 1e-4; from scratch: 1e-3."),
    "backbone_lr_scale": Flag("Learning rate of the backbones, relative to the base. Default: 0.01; from scratch: 1."),
    "decoder_lr_scale": Flag("Learning rate of the decoders, relative to the base. Default: 10; from scratch: 1."),
    "gradient_checkpointing": Flag("Recompute backbone layers in the backward pass: 1/3 less memory, 1/4 more time."),
    "mixed_precision": Flag("Precision of the training. Default: the choice of `accelerate launch`."),
    "dataloader_num_workers": Flag("Processes that read and crop images, per device."),
    "use_cpu": Flag("Use the CPU even if there is a GPU."),
    "seed": Flag("Seed of weights, order, views, drawn sets and drawn scenes."),
}
EVALUATION = {
    "eval_steps": Flag("Evaluate every N steps, and keep the best model in best_model/."),
    "eval_epochs": Flag("Evaluate every N epochs, instead."),
    "eval_short_side": Flag("Short side that images are scaled to for prediction; saved with the model."),
}
OUTPUT = {
    "output_dir": Flag("New folder for the model, checkpoints, metrics, logs and figures."),
    "overwrite_output_dir": Flag("Remove the results of an earlier run in --output_dir first."),
    "resume_from_checkpoint": Flag(
        "Continue a run exactly: 'last', or a folder of its checkpoints/.", name="CHECKPOINT"
    ),
    "checkpointing_steps": Flag("Save a checkpoint every N steps; the last two are kept."),
    "logging_steps": Flag("Print and log mean losses every N steps."),
    "report_to": Flag("Trackers to log to: tensorboard, wandb, trackio ...", name="TRACKER"),
}


def training_groups(
    options: type = TrainingOptions, model: dict[str, Flag] = MODEL, **helps: str
) -> tuple[Group, ...]:
    """Make the groups of a command that trains.

    Args:
        options: Options class of the command.
        model: Flags of the model.
        helps: Option -> help text that differs from the usual one. None leaves the flag out.
    """
    groups = {"model": model, "method": METHOD, "schedule": SCHEDULE, "evaluation": EVALUATION, "output": OUTPUT}
    return tuple(
        Group(
            title,
            options,
            {
                name: Flag(helps[name], flag.parse, flag.many, flag.name) if name in helps else flag
                for name, flag in flags.items()
                if helps.get(name, flag) is not None
            },
        )
        for title, flags in groups.items()
    )


@dataclass
class HubTarget:
    """A repository to publish in; the names are those of transformers' TrainingArguments."""

    hub_model_id: str | None = setting(None, "Repository to publish in.", "user/name")
    hub_private_repo: bool = setting(False, "Make a new repository private, and refuse a public one.")
    hub_revision: str | None = setting(None, "Branch to publish on; it is created if necessary. Default: main.")


@dataclass
class HubArguments(HubTarget):
    """Whether and where a command publishes its result."""

    push_to_hub: bool = setting(False, "Publish the model with its card on the Hub (`hf auth login` first).")

    def __post_init__(self):
        if self.push_to_hub and self.hub_model_id is None:
            raise UserValueError("`push_to_hub` needs a repository: `hub_model_id='user/name'`.")
        if not self.push_to_hub and (self.hub_model_id or self.hub_private_repo or self.hub_revision):
            raise UserValueError("`hub_model_id`, `hub_private_repo` and `hub_revision` go with `push_to_hub`.")


@dataclass
class CardArguments(HubArguments):
    """What a training's model card contains, and where it is published."""

    card_samples: int = setting(3, "Validation images in the model's card and widget; 0 keeps them private.")

    def __post_init__(self):
        super().__post_init__()
        if self.card_samples < 0:
            raise UserValueError(f"`card_samples` is {self.card_samples}; it must be at least 0.")


HUB = own_group("Hub", HubArguments)
CARD = own_group("Hub", CardArguments)


def only(group: Group, *names: str) -> Group:
    """Return the group with some of its flags."""
    return Group(group.title, group.options, {name: group.flags[name] for name in names}, group.defaults)


__all__ = ["BANDS", "CARD", "DATA", "DEFAULT_MODEL", "HUB", "SCALE", "CardArguments", "HubArguments", "HubTarget"]
__all__ += ["MODEL", "only", "own_group", "parse_bands", "parse_class_names", "parse_label_map", "parse_scale"]
__all__ += ["training_groups"]
