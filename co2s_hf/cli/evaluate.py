"""Evaluate a trained model on validation images: IoU and F1 per class, for both students and for their fusion.

  # The model of `co2s train`, on the validation images of this package.
  co2s evaluate

  # The scenes that `co2s train --data drawn` draws.
  co2s evaluate --checkpoint outputs/train_semi/model --data drawn

  # A data set on the Hub; a benchmark of the paper, with the paper's protocol.
  co2s evaluate --checkpoint outputs/train_semi/model --dataset_name user/fields
  co2s evaluate --checkpoint outputs/train_semi/model --dataset whdld

  # Several processes share the images. --flip averages with the mirrored image: twice the time, slightly better.
  accelerate launch -m co2s_hf evaluate --checkpoint outputs/train_semi/model --data_dir path/to/folder --flip

  # Add the results to the card of a published model (`hf auth login` first). With --hub_revision, the model is also
  # loaded from that branch. A local model is published together with the results.
  co2s evaluate --checkpoint user/name --data_dir path/to/folder --push_to_hub
  co2s evaluate --data_dir path/to/folder --push_to_hub --hub_model_id user/name

The command prints a table, and writes metrics.json, confusion.png (predicted against true classes) and
predictions.png. The data must have the classes of the model. If it does not name its classes, confirm them with
--class_names: without names, only their number can be checked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.benchmarks import BENCHMARKS
from ..data.options import DataOptions
from ..utils.errors import UserValueError
from ..utils.ranges import check_ranges
from .arguments import DATA, HubArguments, HubTarget, InferenceArguments, choose_data
from .command_line import Command, own_group, setting


@dataclass
class EvaluateArguments(InferenceArguments):
    """What to evaluate and how."""

    output_dir: str = setting("outputs/evaluation", "New folder for metrics.json and the figures.")
    eval_short_side: int | None = setting(
        None, "Short side in pixels that images are resized to first. Default: that of the image processor."
    )
    num_shown: int = setting(5, "Number of images in predictions.png.")

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, {"num_shown": 1, "eval_short_side": 8})


@dataclass
class PublishArguments(HubTarget):
    """Whether and where to publish the results. For a published model the repository is its own."""

    push_to_hub: bool = setting(False, "Add the results to the model's card on the Hub (`hf auth login` first).")


COMMAND = Command(
    name="evaluate",
    description=__doc__,
    groups=[own_group("evaluation", EvaluateArguments), DATA, own_group("Hub", PublishArguments)],
    first=("checkpoint", "data", "data_dir", "dataset_name", "output_dir", "flip"),
)


def main(words: Sequence[str] | None = None):
    """Run `co2s evaluate` with these words, or those of this process."""
    arguments = COMMAND.parse(words)
    with COMMAND.user_errors():
        run(arguments[EvaluateArguments], arguments[DataOptions], arguments[PublishArguments])


def run(args: EvaluateArguments, data_options: DataOptions, hub: PublishArguments):
    """Evaluate, write the results, and publish them if asked to."""
    from ..data.sources import open_source
    from ..data.validation.report import announce
    from ..hub.publishing import check_publishable, find_branch
    from ..inference.images import load_for_prediction
    from ..training.evaluation import evaluate, predict_examples, write_evaluation
    from ..utils.devices import make_accelerator
    from ..utils.files import check_new_folder, recover
    from .model_folders import claim, publish_evaluation

    recover(args.checkpoint)
    follow_paper(args, data_options)
    complete_hub(args, hub)
    is_folder = Path(args.checkpoint).is_dir()
    if hub.push_to_hub and is_folder:
        check_publishable(args.checkpoint)
    accelerator = make_accelerator(args.use_cpu, args.mixed_precision)
    is_main = accelerator.is_main_process
    choose_data(data_options, args.seed, accelerator.print)
    if is_main:
        check_new_folder(args.output_dir)
    revision = None if is_folder else find_branch(args.checkpoint, hub.hub_revision)
    if not is_folder and revision != hub.hub_revision:
        accelerator.print(f"{args.checkpoint} has no branch {hub.hub_revision}. It is made from main, and evaluated.")
    model, image_processor, crop_size = load_for_prediction(args.checkpoint, args.fusion, args.crop_size, revision)
    repository = claim(hub, accelerator)
    model.to(accelerator.device)
    if args.eval_short_side is not None:
        image_processor.do_resize, image_processor.size = True, {"shortest_edge": args.eval_short_side}
    with accelerator.main_process_first():  # the other processes find its results in the cache
        data = open_source(data_options, args.seed, progress=is_main, config=model.config, needed=("validation",))
    if is_main:
        announce(data)
    found = evaluate(
        model, image_processor, data, data_options, crop_size, accelerator, args.flip, checkpoint=args.checkpoint
    )
    if is_main:
        print(found.table())
        examples = predict_examples(
            model, image_processor, data.validation[: args.num_shown], crop_size, accelerator, args.flip
        )
        write_evaluation(args.output_dir, found, examples, model.config)
        print(f"Wrote metrics.json, confusion.png and predictions.png into {args.output_dir}.")
    accelerator.end_training()
    if repository is not None:
        confusion = Path(args.output_dir) / "confusion.png"
        url = publish_evaluation(args.checkpoint, repository, found, confusion, hub.hub_revision)
        print(f"Added the results to the card of {url}")


def follow_paper(args: EvaluateArguments, data_options: DataOptions):
    """Use the paper's protocol for its benchmarks."""
    if data_options.dataset is not None:
        benchmark = BENCHMARKS[data_options.dataset]
        args.crop_size = args.crop_size or benchmark.crop_size
        args.eval_short_side = args.eval_short_side or benchmark.eval_short_side


def complete_hub(args: EvaluateArguments, hub: PublishArguments):
    """Publish the results of a published model in its own repository; refuse any other repository."""
    is_published = not Path(args.checkpoint).is_dir()
    if hub.push_to_hub and is_published:
        hub.hub_model_id = hub.hub_model_id or args.checkpoint
    HubArguments(**vars(hub))  # checks the values
    if is_published and hub.hub_model_id not in (None, args.checkpoint):
        raise UserValueError(
            f"The results go to the card of {args.checkpoint}. Leave out `hub_model_id='{hub.hub_model_id}'`."
        )
