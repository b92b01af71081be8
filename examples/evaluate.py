"""Measure a checkpoint on validation images: IoU and F1 per class, for both students and fused.

    python examples/evaluate.py --checkpoint outputs/train_semi/model --data_dir outputs/scenes-seed0

    # A data set of the Hub; a benchmark of the paper.
    python examples/evaluate.py --checkpoint outputs/train_semi/model --dataset_name user/fields
    python examples/evaluate.py --checkpoint outputs/train_semi/model --dataset whdld

    # Slower and a little better: average with the mirrored image. Several processes share the images.
    accelerate launch examples/evaluate.py --checkpoint outputs/train_semi/model --data_dir path/to/folder --flip

    # The results on the card of a published model, too (`hf auth login` first); a folder is published with them.
    python examples/evaluate.py --checkpoint user/name --data_dir path/to/folder --push_to_hub
    python examples/evaluate.py --data_dir path/to/folder --push_to_hub --hub_model_id user/name

Prints a table and writes metrics.json, confusion.png (what each class was taken for) and predictions.png.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from accelerate import Accelerator
from tqdm.auto import tqdm

from co2s_hf.arguments import parse_arguments, setting, told_plainly
from co2s_hf.catalog import BENCHMARKS
from co2s_hf.configuration_co2s import FUSIONS
from co2s_hf.data_arguments import DataArguments
from co2s_hf.figures import draw_confusion, draw_predictions, palette_or_default
from co2s_hf.files import check_new_folder, write_json
from co2s_hf.hub import HubArguments, check_publishable, claim_repository, publish, publish_evaluation
from co2s_hf.inference import load_for_prediction
from co2s_hf.model_card import add_evaluation, evaluation_facts
from co2s_hf.report import announce
from co2s_hf.sources import open_source
from co2s_hf.training import (
    PATIENCE,
    check_precision,
    evaluate,
    examples_to_show,
    largest_class_mean_iou,
    results_dict,
    results_table,
    use_all_cores,
)


@dataclass
class Arguments(HubArguments, DataArguments):
    checkpoint: str = setting("outputs/train_semi/model", "Folder or Hub name of a trained model.")
    seed: int = setting(0, "As in training: seed of the drawn sets.")
    output_dir: str = setting("outputs/evaluation", "New folder for metrics.json and the figures.")
    crop_size: int | None = setting(None, "Side of the windows in pixels. Left out: the model's training crops.")
    eval_short_side: int | None = setting(
        None, "Short side that images are scaled to first. Left out: as in the model's training."
    )
    fusion: Literal[FUSIONS] | None = setting(None, "How the students are fused. Left out: as the model says.")
    flip: bool = setting(False, "Average with the prediction for the mirrored image.")
    num_shown: int = setting(5, "Images in predictions.png.")
    use_cpu: bool = setting(False, "Stay on the CPU even where there is a GPU.")
    mixed_precision: Literal["no", "bf16"] | None = setting(None, "Left out: what `accelerate launch` says.")

    def __post_init__(self):
        if not self.names_data:
            self.data_dir = "outputs/scenes-seed0"  # what training draws
        self.check_data()
        is_published = not Path(self.checkpoint).is_dir()
        if self.push_to_hub and is_published:
            self.hub_model_id = self.hub_model_id or self.checkpoint
        self.check_hub()
        if self.push_to_hub and not is_published:
            check_publishable(self.checkpoint)
        if is_published and self.hub_model_id not in (None, self.checkpoint):
            raise ValueError(
                f"The results go on the card of {self.checkpoint}; leave out --hub_model_id {self.hub_model_id}."
            )
        if self.dataset is not None:  # measured by the paper's protocol, whatever the model was trained on
            self.crop_size = self.crop_size or BENCHMARKS[self.dataset].crop_size
            self.eval_short_side = self.eval_short_side or BENCHMARKS[self.dataset].eval_short_side
        if self.num_shown < 1:
            raise ValueError(f"--num_shown is {self.num_shown}; show at least one image.")


def main():
    args = parse_arguments(Arguments, __doc__)
    accelerator = Accelerator(cpu=args.use_cpu, mixed_precision=args.mixed_precision, kwargs_handlers=[PATIENCE])
    check_precision(accelerator)
    use_all_cores(accelerator)
    output_dir = Path(args.output_dir)
    if accelerator.is_main_process:
        check_new_folder(output_dir)
    revision = None if Path(args.checkpoint).is_dir() else args.hub_revision
    with told_plainly():
        model, image_processor, crop_size = load_for_prediction(args.checkpoint, args.fusion, args.crop_size, revision)
        repository = None
        if args.push_to_hub and accelerator.is_main_process:
            repository = claim_repository(args.hub_model_id, args.hub_private_repo, args.hub_revision)
    model.to(accelerator.device)
    if args.eval_short_side is not None:
        image_processor.do_resize, image_processor.size = True, {"shortest_edge": args.eval_short_side}
    id2label = model.config.id2label
    is_main = accelerator.is_main_process
    with told_plainly(), accelerator.main_process_first():
        data = open_source(args, args.seed, progress=is_main, config=model.config, needed=("validation",))
    if data.id2label != id2label:
        raise ValueError(
            f"{args.checkpoint} predicts {', '.join(id2label.values())}, but the data is labelled with "
            f"{', '.join(data.id2label.values())}. Evaluate a model of these classes."
        )
    if is_main:
        announce(data, args.report)
    bar = tqdm(data.validation, desc="evaluating", disable=not accelerator.is_main_process)
    matrices = evaluate(model, image_processor, bar, crop_size, accelerator, args.flip)
    if accelerator.is_main_process:
        print(results_table(matrices, id2label))
        output_dir.mkdir(parents=True, exist_ok=True)
        results = {"checkpoint": args.checkpoint}
        results |= evaluation_facts(args, data, crop_size, model.config.fusion, args.flip)
        results["largest_class_mean_iou"] = largest_class_mean_iou(matrices["fused"])
        results |= results_dict(matrices, id2label)
        write_json(output_dir / "metrics.json", results)
        draw_confusion(matrices["fused"].counts.numpy(), id2label, output_dir / "confusion.png")
        shown = examples_to_show(model, image_processor, data.validation[: args.num_shown], crop_size)
        palette = palette_or_default(model.config.palette, len(id2label))
        draw_predictions(shown, id2label, palette, output_dir / "predictions.png")
        print(f"Wrote metrics.json, confusion.png and predictions.png into {output_dir}.")
    accelerator.end_training()
    if repository is not None:
        with told_plainly():
            if Path(args.checkpoint).is_dir():
                add_evaluation(args.checkpoint, results, output_dir / "confusion.png")
                url = publish(args.checkpoint, repository, args.hub_revision)
            else:
                url = publish_evaluation(repository, results, output_dir / "confusion.png", args.hub_revision)
        print(f"The results are on the card of {url}")


if __name__ == "__main__":
    main()
