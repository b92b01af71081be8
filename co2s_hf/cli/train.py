"""Train both Co2S students on a few labelled and many unlabelled images.

  # Try everything out with the aerial images and the small pretrained backbones of this package: minutes on a CPU.
  co2s train

  # The same with small backbones that know nothing yet.
  co2s train --from_scratch --output_dir outputs/from_scratch

  # The same on artificial scenes.
  co2s train --data drawn --output_dir outputs/drawn

  # Your folder with images/ and labels/. Draw the sets: one training image in eight keeps its labels.
  co2s train --data_dir path/to/folder --labeled_fraction 1/8

  # A data set on the Hub or on disk. Rows without a label map are unlabelled images.
  co2s train --dataset_name user/fields --image_column photo --label_column mask

  # Several GPUs and the pretrained backbones of the paper. Accept the terms of DINOv3 on the Hub, and `hf auth login`.
  accelerate launch --multi_gpu --mixed_precision bf16 -m co2s_hf train --data_dir path/to/folder \\
      --clip_model openai/clip-vit-base-patch16 --dinov3_model facebook/dinov3-vitb16-pretrain-lvd1689m \\
      --crop_size 256 --per_device_train_batch_size 2 --num_train_epochs 80 --eval_epochs 5

  # A run of the paper.
  accelerate launch --multi_gpu --num_processes 4 -m co2s_hf train --config whdld

  # The baseline, which does not use the unlabelled images.
  co2s train --method supervised --output_dir outputs/supervised

  # Publish on the Hub with a model card (`hf auth login` first).
  co2s train --push_to_hub --hub_model_id user/name --hub_private_repo

  # Take options from a file, and change one of them.
  co2s train --config my_run.yaml --seed 1

  # First check everything, and estimate time and memory from a few steps. Nothing is written.
  co2s train --data_dir path/to/folder --dry_run

  # Continue after an interruption, with the same options.
  co2s train --resume_from_checkpoint last
"""

import sys
from collections.abc import Sequence

from ..data.options import DataOptions
from ..training.options import TrainingOptions
from .arguments import CARD, DATA, DRY_RUN, CardArguments, DryRunArguments, training_groups
from .command_line import Command, how_to_resume


COMMAND = Command(
    name="train",
    description=__doc__,
    groups=[DATA, *training_groups(), DRY_RUN, CARD],
    has_recipes=True,
    first=(
        "data",
        "data_dir",
        "dataset_name",
        "labeled_fraction",
        "class_names",
        "clip_model",
        "dinov3_model",
        "crop_size",
        "per_device_train_batch_size",
        "max_train_steps",
        "output_dir",
    ),
)


def main(words: Sequence[str] | None = None):
    """Run `co2s train` with these words, or those of this process."""
    words = list(sys.argv[1:] if words is None else words)
    arguments = COMMAND.parse(words)
    command = ["train", *words]
    with COMMAND.user_errors(lambda: how_to_resume(command, arguments[TrainingOptions].output_dir)):
        from ..training import loop  # these imports take seconds, and --help must be quick
        from .model_folders import claim, describe, publish_result

        hub, options, data_options = (arguments[kind] for kind in (CardArguments, TrainingOptions, DataOptions))
        if arguments[DryRunArguments].dry_run:
            try_training(options, data_options)
            return
        run = loop.setup(options, data_options, command=command)
        repository = claim(hub, run.accelerator)
        trained = loop.train(run)
        if run.accelerator.is_main_process:
            describe(trained, hub.card_samples, COMMAND, run.accelerator)
            publish_result(trained, repository, hub.hub_revision)


def try_training(options: TrainingOptions, data_options: DataOptions, *base, evaluate_first: bool = False):
    """Do the checks and a few steps of a training, and print what it needs. Nothing is written.

    Args:
        options: Options of the training.
        data_options: Options of the data.
        base: For the adaptation of a trained model: further arguments of [`setup`].
        evaluate_first: The training also evaluates before the first step.
    """
    from ..training import loop
    from ..training.dry_run import temporary_scenes, try_steps

    with temporary_scenes(options, data_options):
        run = loop.setup(options, data_options, *base)
        run.accelerator.print(try_steps(run, evaluate_first))
        run.objective, run.optimizer, run.loader = run.accelerator.free_memory(
            run.objective, run.optimizer, run.loader
        )
        run.accelerator.end_training()
