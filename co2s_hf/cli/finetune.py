"""Adapt a trained model to a new area or to new classes by LoRA, with few labelled images.

  # Train on the labelled images alone.
  co2s finetune --checkpoint user/name --data_dir path/to/folder

  # Train on the unlabelled images, too.
  co2s finetune --checkpoint user/name --data_dir path/to/folder --method co2s

  # A smaller adapter (without the decoders), and a larger one.
  co2s finetune --checkpoint user/name --data_dir path/to/folder --freeze_decoders
  co2s finetune --checkpoint user/name --data_dir path/to/folder --lora_rank 32 --lora_targets attention+mlp

  # Also write base and adapter as one plain model, into merged/.
  co2s finetune --checkpoint user/name --data_dir path/to/folder --merge

  # Publish the adapter.
  co2s finetune --checkpoint user/name --data_dir path/to/folder --push_to_hub --hub_model_id user/name-valley

The command evaluates before and after the training. It writes the same files as `co2s train`, with adapter/ instead of
model/. `co2s evaluate`, `predict`, `demo`, `from_pretrained` and `pipeline` load the adapter like a model, as long as
its base is not moved or renamed.

The data may have other classes than the base. The query of a new class starts from random values. The text encoder of
the base encodes the text of the class. The decoders start from the weights of the base.

Data without class names must have as many classes as the base. It is then taken to have the same classes, with a
warning. Name its classes if this is wrong.
"""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.options import DataOptions
from ..training.options import AdaptationOptions
from ..utils.errors import UserValueError
from .arguments import CARD, DATA, DRY_RUN, CardArguments, DryRunArguments, training_groups
from .command_line import Command, Flag, how_to_resume, own_group, setting
from .train import try_training


MODEL = {
    "checkpoint": Flag("Folder or Hub name of the trained model to adapt."),
    "text_encoder": Flag("CLIP model that encodes the text of the classes. Default: that of the base."),
    "quantize": Flag("Load the backbones of the base in 8 or 4 bits (needs bitsandbytes)."),
    "lora_rank": Flag("Rank of the LoRA updates."),
    "lora_targets": Flag("Layers to update: attention, attention+mlp, or a regular expression for layer names."),
    "lora_alpha": Flag("The updates are scaled by alpha / rank. Default: twice the rank."),
    "lora_dropout": Flag("Dropout probability before the updates."),
    "freeze_decoders": Flag("Do not train the decoders; the adapter is much smaller then."),
    "freeze_queries": Flag("Do not train DINOv3's learnable queries."),
}
HELPS = {
    "recipe": None,
    "stability_weight": None,  # has no effect with the recipe "balanced"
    "method": "supervised uses the labelled images only, co2s also the unlabelled ones.",
    "crop_size": "Side of training crops and evaluation windows, in pixels. Default: that of the base.",
    "per_device_train_batch_size": "Labelled images per batch and device; co2s adds as many unlabelled. Default: 4.",
    "max_train_steps": "Length of the training in steps. Default: 200.",
    "learning_rate": "Base learning rate. The queries use it unchanged. Default: 1e-3.",
    "backbone_lr_scale": "Factor on the base learning rate for the LoRA updates. Default: 1.",
    "decoder_lr_scale": "Factor on the base learning rate for the decoders. Default: 0.1.",
    "confidence_threshold": "With --method co2s: lowest confidence of the pseudo-labels that are used. Default: 0.95.",
    "supervised_warmup_steps": "With --method co2s: steps on labelled images alone at first. Default: 0.",
    "eval_steps": "Evaluate every N steps, and keep the best adapter in best_adapter/.",
    "output_dir": "New folder for the adapter, checkpoints, metrics, logs and figures.",
}


@dataclass
class MergeArguments:
    """Whether to merge the adapter."""

    merge: bool = setting(False, "Also write base and adapter as one plain model, into merged/.")


COMMAND = Command(
    name="finetune",
    description=__doc__,
    groups=[
        DATA,
        *training_groups(AdaptationOptions, MODEL, **HELPS),
        own_group("merging", MergeArguments),
        DRY_RUN,
        CARD,
    ],
    first=(
        "checkpoint",
        "data_dir",
        "dataset_name",
        "class_names",
        "method",
        "lora_rank",
        "crop_size",
        "max_train_steps",
        "merge",
        "output_dir",
    ),
)


def main(words: Sequence[str] | None = None):
    """Run `co2s finetune` with these words, or those of this process."""
    words = list(sys.argv[1:] if words is None else words)
    arguments = COMMAND.parse(words)
    command = ["finetune", *words]
    with COMMAND.user_errors(lambda: how_to_resume(command, arguments[AdaptationOptions].output_dir)):
        options, data_options, hub = (arguments[kind] for kind in (AdaptationOptions, DataOptions, CardArguments))
        check(options, data_options, hub)

        from ..training import loop
        from ..training.models import build_adapted_model, open_base
        from .model_folders import claim, describe, publish_result

        config = open_base(options)
        if arguments[DryRunArguments].dry_run:
            try_training(options, data_options, build_adapted_model, config, evaluate_first=True)
            return
        run = loop.setup(options, data_options, build_adapted_model, config, command)
        repository = claim(hub, run.accelerator)
        trained = loop.train(run, evaluate_first=True)
        if run.accelerator.is_main_process:
            describe(trained, hub.card_samples, COMMAND, run.accelerator)
            if arguments[MergeArguments].merge:
                write_merged(trained.best_folder or trained.folder, is_measured=options.quantize is None)
            publish_result(trained, repository, hub.hub_revision)


def check(options: AdaptationOptions, data_options: DataOptions, hub: CardArguments):
    """Refuse a run without data, and a run that would publish an adapter of a base that is only on this machine."""
    if not data_options.has_source:
        raise UserValueError("Name the data to adapt to: `data_dir`, `dataset_name` or `dataset`.")
    if hub.push_to_hub and Path(options.checkpoint).is_dir():
        raise UserValueError(
            f"An adapter on the Hub needs its base there, but {options.checkpoint} is a local folder. Publish the "
            f"base first (co2s push --checkpoint {options.checkpoint} --hub_model_id user/name), and then pass "
            "`checkpoint='user/name'`."
        )


def write_merged(folder: Path, is_measured: bool):
    """Write base and adapter as one plain model, merged/, beside the adapter's folder.

    Args:
        folder: Folder of the adapter.
        is_measured: The adapter was evaluated on the base without quantization, so its results hold for the merged
            model.
    """
    from ..hub.cards import TRAINING_FILE, write_card
    from ..model.image_processing_co2s import Co2SImageProcessor
    from ..model.modeling_co2s import Co2SForSemanticSegmentation
    from ..training.checkpoints import save_model
    from ..training.evaluation import Evaluation
    from ..training.lora import merged

    model = merged(Co2SForSemanticSegmentation.from_pretrained(folder))
    target = folder.with_name("merged")
    evaluation = Evaluation.read(folder / "metrics.json") if is_measured else None
    save_model(model, Co2SImageProcessor.from_pretrained(folder), target, evaluation)
    shutil.copyfile(folder / TRAINING_FILE, target / TRAINING_FILE)
    write_card(target, evaluation)
    print(f"Saved {target}: {folder.name} merged into its base.")
