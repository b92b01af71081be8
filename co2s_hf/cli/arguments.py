"""The flags that several commands share: data, training and the Hub.

To add a training flag, add a field in training/options.py and a [`Flag`] here. The flag then appears in `co2s train`
and in `co2s finetune` (unless its entry in HELPS of finetune.py is None).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..data.bands import PRESETS
from ..data.options import REAL_NAME, DataOptions
from ..model.configuration_co2s import FUSIONS
from ..training.options import TrainingOptions
from ..utils.errors import UserValueError
from ..utils.ranges import check_ranges
from .command_line import Flag, Group, own_group, parse_fraction, setting


DEFAULT_MODEL = "outputs/train_semi/model"  # what `co2s train` writes


def parse_bands(text: str) -> tuple[int, ...] | str:
    """Parse "4,3,2" into (4, 3, 2). The name of a preset is returned unchanged."""
    if text in PRESETS:
        return text
    numbers = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if len(numbers) != 3 or min(numbers) < 1:
        raise ValueError(
            f"'{text}' is not three band numbers from 1 for red, green and blue, such as 4,3,2, or one of "
            f"{', '.join(PRESETS)}"
        )
    return tuple(numbers)


def parse_scale(words: list[str]) -> tuple[tuple[float, float], ...] | str:
    """Parse two numbers (for all bands), six numbers (two per band), or ["percentiles"]."""
    if words == ["percentiles"]:
        return "percentiles"
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    pairs = tuple(zip(numbers[::2], numbers[1::2]))
    if len(numbers) not in (2, 6) or not all(low < high for low, high in pairs):
        raise ValueError(
            f"'{' '.join(words)}' is not a scale; give the values that become 0 and 255 (0 3000), or 'percentiles'"
        )
    return pairs


def parse_label_map(text: str) -> dict[int | str, int]:
    """Parse "7=0,128-255=1" into {7: 0, "128-255": 1}."""
    pairs = [re.fullmatch(r"\s*(\d+(?:\s*-\s*\d+)?)\s*=\s*(\d+)\s*", part) for part in text.split(",")]
    if not all(pairs):
        raise ValueError(f"'{text}' is not VALUE=CLASS,VALUE=CLASS, such as 7=0,9=1 or 0-127=0,128-255=1")
    values = [int(pair[1]) if pair[1].isdecimal() else re.sub(r"\s", "", pair[1]) for pair in pairs]
    if len(set(values)) != len(values):
        raise ValueError(f"'{text}' maps one value to two classes")
    return {value: int(pair[2]) for value, pair in zip(values, pairs)}


def parse_class_names(words: list[str]) -> list[str]:
    """Return the words as names; if the only word is a file, return the lines of the file."""
    if len(words) == 1 and Path(words[0]).is_file():
        try:
            text = Path(words[0]).read_text(encoding="utf-8-sig")
        except ValueError as error:
            raise ValueError(f"'{words[0]}' is not a UTF-8 text file with one name per line ({error})") from error
        return [line.strip() for line in text.splitlines() if line.strip()]
    return words


BANDS = Flag(
    "Band numbers, from 1, of red, green and blue, such as 4,3,2. Or a preset: sentinel-2 (12 or 13 bands), "
    "planetscope-4 or planetscope-8, for reflectance: they also set --scale 0 3000 (Sentinel-2 values of processing "
    "baseline 04.00 and later are shifted: add --scale 1000 4000); rgbn (red, green, blue, near infrared).",
    parse_bands,
)
SCALE = Flag(
    "Values that become 0 and 255: two numbers, two per band, or 'percentiles' (2nd and 98th). Needed for images of "
    "more than 8 bits.",
    parse_scale,
    many=True,
    name="LOW HIGH",
)
DATA = Group(
    "data",
    DataOptions,
    {
        "data": Flag(
            "Images without a download. real: aerial images of Dubai in this package; drawn: artificial scenes. "
            "Default: real, unless other data is named."
        ),
        "data_dir": Flag(
            "Folder with images/ and labels/, or an export of the QGIS plugin Deepness. Unless the sets are drawn, "
            "splits/ has their lists."
        ),
        "dataset_name": Flag(
            "Data set on the Hub, or a local folder: from `co2s prepare`, from save_to_disk, or with parquet files."
        ),
        "dataset_config": Flag("Configuration of --dataset_name, if it has several."),
        "dataset_revision": Flag("Branch, tag or commit of the data set on the Hub."),
        "dataset": Flag("Benchmark of the paper. The images come from the Hub, or from a copy in --data_dir."),
        "partition": Flag("Labelled share of the benchmark, such as 1_24; all: every label. Default: the smallest."),
        "splits_dir": Flag(
            "Folder with labeled.txt, unlabeled.txt and val.txt. Default: splits/ of --data_dir; for --dataset the "
            "authors' lists."
        ),
        "image_column": Flag("Column of --dataset_name with the images."),
        "label_column": Flag("Column of --dataset_name with the label maps."),
        "labeled_fraction": Flag(
            "Draw the sets. This share of the training images, such as 1/8, keeps its labels.", parse_fraction
        ),
        "validation_fraction": Flag(
            "Share of the images with labels to draw for validation, if there is no validation set.", parse_fraction
        ),
        "group_regex": Flag(
            r"Regular expression for the part of a name that identifies its group, such as 'tile\d+'. Groups are "
            "drawn as a whole."
        ),
        "class_names": Flag(
            "Class names in label order, or a file with one name per line. Default: classes.json.",
            parse_class_names,
            name="NAME",
        ),
        "ignore_index": Flag("Value in label files that means 'no class'."),
        "reduce_labels": Flag("0 in label files also means 'no class', and the classes start at 1."),
        "label_map": Flag(
            "VALUE=CLASS pairs for label files, such as 7=0,9=1 or 0-127=0,128-255=1. Other values are errors.",
            parse_label_map,
        ),
        "label_colors": Flag("JSON file like classes.json with the colour of each class, for masks with colours."),
        "bands": BANDS,
        "scale": SCALE,
    },
)

MODEL = {
    "clip_model": Flag(
        "Pretrained CLIP (Hub name or folder). Default: co2s-tiny-clip, which ships with this package."
    ),
    "dinov3_model": Flag(
        "Pretrained DINOv3 (Hub name or folder). Give it together with --clip_model. Default: co2s-tiny-dinov3, which "
        "ships with this package."
    ),
    "from_scratch": Flag("Train small backbones from random weights, instead of pretrained ones."),
    "students": Flag("Students to train."),
    "train_backbones": Flag("Backbone parameters to train. Default: all; own backbones: attention."),
    "lora": Flag("Train LoRA updates of the backbones instead of --train_backbones. They are merged at the end."),
    "lora_rank": Flag("Rank of the LoRA updates."),
}
METHOD = {
    "method": Flag("co2s uses labelled and unlabelled images, supervised only the labelled ones."),
    "recipe": Flag(
        "balanced: averaged weights make the pseudo-labels, which keep every class and teach both students. paper: "
        "the method of the paper. released: the authors' code where it differs from the paper."
    ),
    "supervised_warmup_steps": Flag(
        "Steps on labelled images alone, before unlabelled images are used. Default: with --recipe balanced it "
        "ends by itself; else a third of all steps; own backbones: 0; from scratch: three fifths."
    ),
    "confidence_threshold": Flag(
        "Lowest confidence of the pseudo-labels that are used, 0 to 1. Default: 0.9; own backbones: 0.95; from "
        "scratch: 0.6."
    ),
    "confidence_mode": Flag(
        "Weights of pseudo-labels. pixelwise: 1 for confident pixels, else 0; pixelratio: the share of confident "
        "pixels in the image; pixelavg: the mean confidence of the image."
    ),
    "strong_weight": Flag("Weight of the loss on each strong view."),
    "feature_dropout_weight": Flag("Weight of the loss on perturbed features."),
    "stability_weight": Flag(
        "Final weight of the loss between the students; 0 turns it off. With --recipe paper and released."
    ),
    "labeled_loss": Flag("Loss on labels. ohem uses hard pixels only (probability of the true class below 0.7)."),
    "class_weights": Flag("Loss weight of each class: one number per class, or 'balanced' (inverse to frequency)."),
    "measure_pseudo_labels": Flag("Report the accuracy of pseudo-labels on unlabelled images that have label files."),
}
SCHEDULE = {
    "crop_size": Flag(
        "Side of training crops and evaluation windows, in pixels. Default: 128; own backbones: 256; from scratch: 64."
    ),
    "base_size": Flag(
        "Long and short side in pixels that training images are resized to fit into, before random scaling."
    ),
    "per_device_train_batch_size": Flag(
        "Labelled images per batch and device, and as many unlabelled ones. Default: 4; own backbones: 2; from "
        "scratch: 16."
    ),
    "gradient_accumulation_steps": Flag("Batches per optimizer step."),
    "max_train_steps": Flag("Length of the training in steps. Default: 450; own backbones or from scratch: 550."),
    "num_train_epochs": Flag("Length of the training in epochs instead: passes over the longer list of images."),
    "learning_rate": Flag("Base learning rate. Default: 4e-3; own backbones: 1e-4; from scratch: 1e-3."),
    "backbone_lr_scale": Flag(
        "Factor on the base learning rate for the backbones. Default: 0.04; own backbones: 0.01; from scratch: 1."
    ),
    "decoder_lr_scale": Flag("Factor on the base learning rate for the decoders. Default: 1; own backbones: 10."),
    "gradient_checkpointing": Flag("Recompute backbone layers in the backward pass: 1/3 less memory, 1/4 more time."),
    "mixed_precision": Flag(
        "Precision of the training and its evaluations. bf16: autocast; the weights stay in float32. Default: the "
        "choice of `accelerate launch`."
    ),
    "dataloader_num_workers": Flag(
        "Processes that read and crop images, per device. Default: 0 on a CPU; on a GPU one per CPU core, at most 8."
    ),
    "use_cpu": Flag("Use the CPU even if there is a GPU."),
    "seed": Flag("Seed of all random numbers: weights, order of the images, views, drawn sets and scenes."),
}
EVALUATION = {
    "eval_steps": Flag("Evaluate every N steps, and keep the best model in best_model/."),
    "eval_epochs": Flag("Evaluate every N epochs instead."),
    "eval_short_side": Flag("Short side in pixels that images are resized to for prediction; saved with the model."),
}
OUTPUT = {
    "output_dir": Flag("New folder for the model, checkpoints, metrics, logs and figures."),
    "overwrite_output_dir": Flag("Remove the results of an earlier run in --output_dir first."),
    "resume_from_checkpoint": Flag(
        "Continue a run exactly: from the 'last' checkpoint, or from a folder in checkpoints/.", name="CHECKPOINT"
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
        helps: Option -> help text that replaces the usual one. None leaves the flag out.
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


def choose_data(options: DataOptions, seed: int, print_once: Callable[[str], None]):
    """Choose the real images if no data is named, and the folder into which `co2s train` draws scenes, in place."""
    if not options.has_source:
        print_once(f"No data is named: using the validation images of {REAL_NAME} in this package.")
    options.fill()
    if options.data == "drawn":
        options.data, options.data_dir = None, f"outputs/scenes-seed{seed}"


@dataclass
class DryRunArguments:
    """Whether a training is only tried."""

    dry_run: bool = setting(
        False,
        "Make all checks, do a few steps, and print the expected time and memory. Write nothing.",
    )


DRY_RUN = own_group("dry run", DryRunArguments)


@dataclass
class InferenceArguments:
    """Which model predicts, and how."""

    checkpoint: str = setting(DEFAULT_MODEL, "Folder or Hub name of a trained model.")
    crop_size: int | None = setting(None, "Side of the windows in pixels. Default: the side of the crops in training.")
    fusion: Literal[FUSIONS] | None = setting(None, "How to fuse the students. Default: the model's own fusion.")
    flip: bool = setting(False, "Average with the predictions for the mirrored images.")
    seed: int = setting(0, "Seed of the drawn sets. Give the seed of the training.")
    use_cpu: bool = setting(False, "Use the CPU even if there is a GPU.")
    mixed_precision: Literal["no", "bf16"] | None = setting(
        None,
        "Precision. bf16: autocast, as in the training; weights and fusion stay in float32. A CPU without bfloat16 "
        "instructions uses no. Default: the choice of `accelerate launch`.",
    )

    def __post_init__(self):
        check_ranges(self, {"crop_size": 1, "seed": 0})


@dataclass
class HubTarget:
    """A repository to publish in. The fields are named as in transformers' TrainingArguments."""

    hub_model_id: str | None = setting(None, "Repository to publish in.", "user/name")
    hub_private_repo: bool = setting(False, "Create the repository as private; refuse an existing public one.")
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
        check_ranges(self, {"card_samples": 0})


CARD = own_group("Hub", CardArguments)


__all__ = [
    "BANDS",
    "CARD",
    "DATA",
    "DEFAULT_MODEL",
    "DRY_RUN",
    "MODEL",
    "SCALE",
    "CardArguments",
    "DryRunArguments",
    "HubArguments",
    "HubTarget",
    "InferenceArguments",
    "choose_data",
    "parse_bands",
    "parse_class_names",
    "parse_label_map",
    "parse_scale",
    "training_groups",
]
