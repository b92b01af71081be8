"""Adapt a trained model to a new area or to new classes, with a handful of labels, by LoRA.

  # On the labelled images alone.
  co2s finetune --checkpoint user/name --data_dir path/to/folder

  # On the unlabelled images, too.
  co2s finetune --checkpoint user/name --data_dir path/to/folder --method co2s

  # The smallest adapter, and a larger one.
  co2s finetune --checkpoint user/name --data_dir path/to/folder --freeze_decoders
  co2s finetune --checkpoint user/name --data_dir path/to/folder --lora_rank 32 --lora_targets attention+mlp

  # Also one plain model of base and adapter, in merged/. Publish the adapter.
  co2s finetune --checkpoint user/name --data_dir path/to/folder --merge
  co2s finetune --checkpoint user/name --data_dir path/to/folder --push_to_hub --hub_model_id user/name-valley

The command evaluates before and after, and writes what `co2s train` writes, with adapter/ instead of model/. `co2s
evaluate`, `predict`, `demo`, `from_pretrained` and `pipeline` take the adapter like a model, as long as its base stays
where it was. The data may have other classes than the base: their queries start from random values, their text is
encoded by the base's own text encoder, and the decoders keep their weights.
"""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.options import DataOptions
from ..training.options import AdaptationOptions
from ..utils.errors import UserValueError
from .arguments import CARD, DATA, CardArguments, training_groups
from .command_line import Command, Flag, own_group, setting


MODEL = {
    "checkpoint": Flag("Folder or Hub name of the trained model to adapt."),
    "text_encoder": Flag("CLIP that encodes the text of new classes. Default: the base's own."),
    "quantize": Flag("Load the base's backbones in fewer bits (needs bitsandbytes)."),
    "lora_rank": Flag("Rank of the updates."),
    "lora_targets": Flag("Layers to update: attention, attention+mlp, or a regular expression for their names."),
    "lora_alpha": Flag("Updates are scaled by alpha / rank. Default: twice the rank."),
    "lora_dropout": Flag("Dropout probability before the updates."),
    "freeze_decoders": Flag("Do not train the decoders; the adapter is much smaller then."),
    "freeze_queries": Flag("Do not train DINOv3's learnable queries."),
}
HELPS = {
    "recipe": None,
    "method": "co2s also uses the unlabelled images.",
    "crop_size": "Side of training crops and evaluation windows, in pixels. Default: the base's.",
    "per_device_train_batch_size": "Labelled images per step and device. Default: 4.",
    "max_train_steps": "Length of the training in steps. Default: 200.",
    "learning_rate": "Base learning rate, that of the queries. Default: 1e-3.",
    "backbone_lr_scale": "Learning rate of the updates, relative to the base. Default: 1.",
    "decoder_lr_scale": "Learning rate of the decoders, relative to the base. Default: 0.1.",
    "confidence_threshold": "Confidence from which pseudo-labels are used, with --method co2s. Default: 0.95.",
    "supervised_warmup_steps": "Steps on labels alone, with --method co2s. Default: 0.",
    "eval_steps": "Evaluate every N steps, and keep the best adapter in best_adapter/.",
    "output_dir": "New folder for the adapter, checkpoints, metrics, logs and figures.",
}


@dataclass
class MergeArguments:
    """Whether to merge the adapter."""

    merge: bool = setting(False, "Also write base and adapter as one plain model, in merged/.")


COMMAND = Command(
    name="finetune",
    description=__doc__,
    groups=[DATA, *training_groups(AdaptationOptions, MODEL, **HELPS), own_group("merging", MergeArguments), CARD],
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
    with COMMAND.user_errors():
        options, data_options, hub = (arguments[kind] for kind in (AdaptationOptions, DataOptions, CardArguments))
        check(options, data_options, hub)

        from ..training import loop
        from ..training.models import build_adapted_model, open_base
        from .model_folders import claim, describe, publish_result

        config = open_base(options)
        command = ["finetune", *words]
        run = loop.setup(options, data_options, build_adapted_model, config, command)
        repository = claim(hub, run.accelerator)
        trained = loop.train(run, evaluate_first=True)
        if run.accelerator.is_main_process:
            describe(trained, hub.card_samples, COMMAND)
            if arguments[MergeArguments].merge:
                write_merged(trained.best_folder or trained.folder, is_measured=options.quantize is None)
            publish_result(trained, repository, hub.hub_revision)


def check(options: AdaptationOptions, data_options: DataOptions, hub: CardArguments):
    """Refuse a call without data, or one that would publish an adapter without its base."""
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
        folder: Of the adapter.
        is_measured: The adapter was evaluated on the unquantized base, so its results hold for the merged model.
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
