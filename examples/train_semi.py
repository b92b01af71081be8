"""Train both Co2S students on a few labelled and many unlabelled images.

    # Drawn scenes, a tiny model from scratch: shows everything in minutes on a CPU.
    accelerate launch examples/train_semi.py

    # Your folder: images/ and labels/, with lists in splits/, or drawn: one image in eight keeps its labels.
    accelerate launch examples/train_semi.py --data_dir path/to/folder --labeled_fraction 1/8

    # A data set of the Hub, or of your disk, whose rows without a label map are unlabelled.
    accelerate launch examples/train_semi.py --dataset_name user/fields --image_column photo --label_column mask

    # Pretrained towers, as in the paper (DINOv3's are gated: accept the terms on the Hub, `hf auth login`).
    accelerate launch --multi_gpu --mixed_precision bf16 examples/train_semi.py --data_dir path/to/folder \\
        --clip_model openai/clip-vit-base-patch16 --dinov3_model facebook/dinov3-vitb16-pretrain-lvd1689m \\
        --crop_size 256 --per_device_train_batch_size 2 --num_train_epochs 80 --eval_epochs 5

    # A run of the paper, as its authors made it.
    accelerate launch --multi_gpu --num_processes 4 examples/train_semi.py --config examples/configs/whdld.yaml

    # What the unlabelled images are worth: the same run without them.
    accelerate launch examples/train_semi.py --method supervised --output_dir outputs/supervised

    # Published on the Hub with its card (`hf auth login` first).
    accelerate launch examples/train_semi.py --push_to_hub --hub_model_id user/name --hub_private_repo

    # Settings from a file; the command line wins.
    accelerate launch examples/train_semi.py --config my_run.yaml --seed 1

    # Go on after an interruption, with the same arguments.
    accelerate launch examples/train_semi.py --resume_from_checkpoint last

Plain `python examples/train_semi.py` does the same on one device.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal

import accelerate
import kornia
import torch
import transformers
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

import co2s_hf
from co2s_hf import Co2SConfig, Co2SForSemanticSegmentation, Co2SImageProcessor
from co2s_hf.arguments import parse_arguments, setting, told_plainly
from co2s_hf.catalog import BENCHMARKS, Benchmark
from co2s_hf.data import PairedViews
from co2s_hf.data_arguments import DataArguments
from co2s_hf.figures import draw_curves, draw_predictions, palette_or_default
from co2s_hf.files import check_new_folder, write_json, write_text
from co2s_hf.hub import HubArguments, claim_repository, publish
from co2s_hf.logbook import Logbook, NonFiniteGuard, read_log
from co2s_hf.lora import LoraArguments, has_adapter, merged
from co2s_hf.model_card import (
    CURVES,
    PREDICTIONS,
    SAMPLES,
    TRAINING_FILE,
    data_facts,
    evaluation_facts,
    without_secrets,
    write_card,
)
from co2s_hf.modeling_co2s import STUDENTS
from co2s_hf.objective import Co2SObjective, stability_weight
from co2s_hf.report import announce
from co2s_hf.sources import Source, open_source
from co2s_hf.splits import SPLITS, write_lists
from co2s_hf.synthetic import write_scenes
from co2s_hf.training import (
    PATIENCE,
    balanced_class_weights,
    check_precision,
    checkpoint_step,
    evaluate,
    examples_to_show,
    find_checkpoint,
    largest_class_mean_iou,
    make_optimizer,
    polynomial_decay,
    repeat_released_quirks,
    results_dict,
    results_table,
    save_checkpoint,
    save_model,
    steps_per_epoch,
    tiny_model,
    training_size,
    use_all_cores,
)
from co2s_hf.views import make_views


NUM_SHOWN = 5  # validation images in the figure
SAMPLE_PX = 1024  # longest side of the widget's examples
WRITTEN = ("checkpoints", "model", "best_model", "log.jsonl", "metrics.json", "predictions.png", "curves.png")
WRITTEN += ("adapter", "best_adapter", "merged", "metrics_before.json")
WRITTEN += ("splits", "co2s_hf", "arguments.json")  # co2s_hf/ is TensorBoard's


@dataclass
class Arguments(HubArguments, LoraArguments, DataArguments):
    """What a run can be told. None stands for a value that depends on others, and is filled in."""

    saved_as: ClassVar[str] = "model"  # the folder's name

    output_dir: str = setting(
        "outputs/train_semi", "New folder for model/, metrics.json, log.jsonl, arguments.json and figures."
    )
    overwrite_output_dir: bool = setting(False, "Remove what an earlier run wrote into output_dir, and start anew.")
    clip_model: str | None = setting(None, "Pretrained CLIP (Hub name or folder). Left out: tiny, from scratch.")
    dinov3_model: str | None = setting(None, "Pretrained DINOv3 (Hub name or folder); with --clip_model.")

    method: Literal["co2s", "supervised"] = setting("co2s", "supervised leaves the unlabelled images out.")
    recipe: Literal["paper", "released"] = setting(
        "paper", "released repeats the authors' code where it differs from the paper: see the README."
    )
    students: Literal["clip,dinov3", "clip", "dinov3"] = setting("clip,dinov3", "Which students are trained.")
    confidence_threshold: float | None = setting(
        None, "tau: probability from which pseudo-labels and teaching count. Pretrained: 0.95; from scratch: 0.6."
    )
    confidence_mode: Literal["pixelwise", "pixelratio", "pixelavg"] = setting(
        "pixelwise",
        "What counts of pseudo-labels: confident pixels; all, weighted by the image's share of confident ones; all, "
        "weighted by the image's mean confidence.",
    )
    strong_weight: float = setting(0.25, "Weight of the loss of each strong view.")
    feature_dropout_weight: float = setting(0.5, "Weight of the loss of the perturbed features.")
    stability: Literal["paper", "reference", "off"] | None = setting(
        None,
        "Loss between the students; reference has no gradient. Left out: paper; with --recipe released: reference.",
    )
    stability_weight: float = setting(0.5, "lambda, the weight that the loss between the students rises to.")
    labeled_loss: Literal["cross_entropy", "ohem"] = setting(
        "cross_entropy", "ohem: only hard labelled pixels, of probability below 0.7."
    )
    class_weights: list[str] | None = setting(
        None, "Weights of labelled pixels by class: one number per class, or 'balanced' (inverse to their frequency)."
    )
    supervised_warmup_steps: int | None = setting(
        None,
        "Steps on labels alone before unlabelled images join. Pretrained: 0; from scratch: three fifths of the steps.",
    )

    crop_size: int | None = setting(
        None, "Side of training crops and of evaluation windows, in pixels. Pretrained: 256; from scratch: 64."
    )
    base_size: list[int] | None = setting(
        None, "Long and short side that training images are scaled to fit into before the random scale."
    )
    eval_short_side: int | None = setting(
        None, "Short side that images are scaled to before they are predicted; saved with the model."
    )
    per_device_train_batch_size: int | None = setting(
        None, "Labelled images per step and device, and as many unlabelled ones. Pretrained: 2; from scratch: 16."
    )
    gradient_accumulation_steps: int = setting(1, "Batches whose gradients make one step.")
    max_train_steps: int | None = setting(None, "Length of the training in steps. Left out: 550.")
    num_train_epochs: int | None = setting(None, "Length of the training in walks through the longer list, instead.")
    learning_rate: float | None = setting(None, "Base learning rate. Pretrained: 1e-4; from scratch: 1e-3.")
    weight_decay: float = setting(0.01, "AdamW's weight decay.")
    lora: bool = setting(
        False, "In the towers train low-rank updates instead of what --train_backbones says; merged in the end."
    )
    train_backbones: Literal["attention", "all", "none"] | None = setting(
        None, "What trains in the towers. Pretrained: attention; from scratch: all."
    )
    backbone_lr_scale: float | None = setting(
        None, "Towers' learning rate, relative to the base. Pretrained: 0.01; from scratch: 1."
    )
    decoder_lr_scale: float | None = setting(
        None, "Decoders' learning rate, relative to the base. Pretrained: 10; from scratch: 1."
    )

    eval_steps: int | None = setting(None, "Evaluate every so many steps and keep the best as best_model/.")
    eval_epochs: int | None = setting(None, "The same, counted in walks through the longer list.")
    measure_pseudo_labels: bool = setting(
        False, "Report how often pseudo-labels are right, where unlabelled images have label files. Not trained on."
    )
    logging_steps: int = setting(50, "Print and log the mean losses every so many steps.")
    report_to: list[str] | None = setting(None, "Trackers to log to, too: tensorboard, wandb, trackio ...")
    checkpointing_steps: int = setting(200, "Save what resuming needs every so many steps.")
    save_total_limit: int = setting(2, "How many of those are kept.")
    resume_from_checkpoint: str | None = setting(
        None, "'last', or a folder of checkpoints/: go on from there, exactly, with the other arguments as they were."
    )
    card_samples: int = setting(
        3, "Validation images in the model's card and widget, and what it makes of them; 0 where nobody may see them."
    )
    dataloader_num_workers: int = setting(0, "Worker processes that read and crop images, per device.")
    use_cpu: bool = setting(False, "Stay on the CPU even where there is a GPU.")
    gradient_checkpointing: bool = setting(
        False, "Compute the towers' layers again for the gradients: a third less memory, a quarter more time."
    )
    mixed_precision: Literal["no", "bf16"] | None = setting(
        None, "Left out: what `accelerate launch` says. fp16 overflows inside DINOv3."
    )
    seed: int = setting(0, "Seed of weights, order, views, drawn sets and drawn scenes.")

    def __post_init__(self):
        self.check()
        if self.dataset is not None:
            self.follow_protocol(BENCHMARKS[self.dataset])
        from_scratch = self.clip_model is None
        defaults = {
            "crop_size": 64 if from_scratch else 256,
            "per_device_train_batch_size": 16 if from_scratch else 2,
            # Tiny towers that have seen little are seldom as sure as pretrained ones.
            "confidence_threshold": 0.6 if from_scratch else 0.95,
            "learning_rate": 1e-3 if from_scratch else 1e-4,
            "train_backbones": "none" if self.lora else "all" if from_scratch else "attention",
            "backbone_lr_scale": 1.0 if from_scratch or self.lora else 0.01,
            "decoder_lr_scale": 1.0 if from_scratch else 10.0,
            "stability": "reference" if self.recipe == "released" else "paper",
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def follow_protocol(self, benchmark: Benchmark):
        """Take from the paper's protocol what is not given."""
        protocol = {
            "partition": f"1_{benchmark.partitions[0]}",
            "crop_size": benchmark.crop_size,
            "per_device_train_batch_size": benchmark.images_per_device,
            "base_size": benchmark.base_size,
            "eval_short_side": benchmark.eval_short_side,
        }
        if self.max_train_steps is None:
            protocol["num_train_epochs"] = benchmark.num_epochs
        for name, value in protocol.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def check(self):
        """Refuse values that cannot work, before anything is read."""
        self.check_data()
        self.check_hub()
        if (self.clip_model is None) != (self.dinov3_model is None):
            raise ValueError("Give both --clip_model and --dinov3_model, or neither for a tiny model from scratch.")
        if self.lora and self.train_backbones not in (None, "none"):
            raise ValueError(f"Give either --lora or --train_backbones {self.train_backbones}.")
        for one, other in (("max_train_steps", "num_train_epochs"), ("eval_steps", "eval_epochs")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(f"Give either --{one} or --{other}.")
        least = {"crop_size": 8, "eval_short_side": 8, "supervised_warmup_steps": 0, "dataloader_num_workers": 0}
        least["card_samples"] = 0
        least |= dict.fromkeys(("strong_weight", "feature_dropout_weight", "stability_weight"), 0)
        least |= dict.fromkeys(("max_train_steps", "num_train_epochs", "eval_steps", "eval_epochs"), 1)
        least |= dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps"), 1)
        least |= dict.fromkeys(("checkpointing_steps", "save_total_limit"), 1)
        for name, minimum in least.items():
            if (value := getattr(self, name)) is not None and value < minimum:
                raise ValueError(f"--{name} is {value}; it must be at least {minimum}.")
        if self.confidence_threshold is not None and not 0 <= self.confidence_threshold <= 1:
            raise ValueError(f"--confidence_threshold is {self.confidence_threshold}; a probability is 0 to 1.")
        if self.base_size is not None and (len(self.base_size) != 2 or min(self.base_size) < 8):
            raise ValueError(f"--base_size is {self.base_size}; give a long and a short side, such as 2048 512.")
        if self.overwrite_output_dir and self.resume_from_checkpoint:
            raise ValueError("Give either --overwrite_output_dir or --resume_from_checkpoint.")
        if unknown := set(self.report_to or ()) - {str(tracker) for tracker in get_available_trackers()}:
            raise ValueError(
                f"--report_to names {', '.join(sorted(unknown))}, which is not installed (pip install it) or unknown "
                "to Accelerate."
            )

    def resolve_steps(self, epoch_steps: int):
        """Fill in what depends on the length of the data's epoch."""
        if self.max_train_steps is None:
            self.max_train_steps = self.num_train_epochs * epoch_steps if self.num_train_epochs else 550
        if self.eval_epochs is not None:
            self.eval_steps = self.eval_epochs * epoch_steps
        if self.method == "supervised":
            self.supervised_warmup_steps = self.max_train_steps
        elif self.supervised_warmup_steps is None:
            # Pseudo-labels of a network that has learnt nothing yet cost more than they give.
            self.supervised_warmup_steps = 3 * self.max_train_steps // 5 if self.clip_model is None else 0
        if self.method == "co2s" and self.supervised_warmup_steps >= self.max_train_steps:
            raise ValueError(
                f"--supervised_warmup_steps is {self.supervised_warmup_steps} of {self.max_train_steps} steps: no "
                "unlabelled image would be used. Lower it, or train longer."
            )


def main():
    train(parse_arguments(Arguments, __doc__), build_model)


def train(
    args: Arguments,
    build_model: Callable[[Arguments, Source], Co2SForSemanticSegmentation],
    config: Co2SConfig | None = None,
    evaluate_first: bool = False,
):
    """Run a training from its arguments to what it leaves behind; finetune_lora.py does, too.

    Args:
        args: Checked, and filled in but for what depends on the data.
        build_model: Makes the model for the data, in training mode, with what trains unfrozen.
        config: Of the model that is trained further, if any: how it reads images, and its classes.
        evaluate_first: Also measure before the first step.
    """
    output_dir = Path(args.output_dir)
    folder, best_folder = output_dir / args.saved_as, output_dir / f"best_{args.saved_as}"
    accelerator = Accelerator(
        cpu=args.use_cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to,
        project_dir=output_dir,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        kwargs_handlers=[
            # The last CLIP layer's query and key projections train in name only (see `freeze_backbones`).
            DistributedDataParallelKwargs(find_unused_parameters=True),
            PATIENCE,
        ],
    )
    check_precision(accelerator)
    args.mixed_precision = accelerator.mixed_precision  # for arguments.json: the launcher may have chosen it
    use_all_cores(accelerator)

    # 1. The data, checked before anything expensive starts.
    checkpoint = find_checkpoint(output_dir / "checkpoints", args.resume_from_checkpoint)
    is_earlier_run = (output_dir / "arguments.json").exists()
    if checkpoint is None and not (args.overwrite_output_dir and is_earlier_run) and accelerator.is_main_process:
        check_new_folder(
            output_dir,
            "Choose another --output_dir, go on with --resume_from_checkpoint last, or start anew with "
            "--overwrite_output_dir.",
        )
    is_drawn = not args.names_data
    data = open_data(args, accelerator, config)
    if len(data.labeled) < args.per_device_train_batch_size:
        accelerator.print(
            f"{len(data.labeled)} labelled images make batches of {args.per_device_train_batch_size}: a batch shows "
            "some of them more than once, in different views."
        )
    batch_size, steps_per_update = args.per_device_train_batch_size, args.gradient_accumulation_steps
    images_per_update = batch_size * steps_per_update * accelerator.num_processes
    args.resolve_steps(steps_per_epoch(len(data.labeled), len(data.unlabeled), images_per_update))
    if checkpoint is not None:
        check_same_run(args, accelerator, checkpoint, data)
    class_weights = read_class_weights(args, data)
    repository = None
    if args.push_to_hub and accelerator.is_main_process:
        with told_plainly():
            repository = claim_repository(args.hub_model_id, args.hub_private_repo, args.hub_revision)

    # 2. The model.
    set_seed(args.seed)
    model = build_model(args, data)
    resize = {"do_resize": True, "size": {"shortest_edge": args.eval_short_side}} if args.eval_short_side else {}
    image_processor = Co2SImageProcessor.from_model_config(model.config, **resize)

    # 3. The objective is what gets distributed, since its forward is the whole step; and one stream of items.
    objective = Co2SObjective(
        model,
        students=tuple(args.students.split(",")),
        threshold=args.confidence_threshold,
        strong_weight=args.strong_weight,
        feature_dropout_weight=args.feature_dropout_weight,
        stability=args.stability,
        confidence_mode=args.confidence_mode,
        labeled_loss=args.labeled_loss,
        class_weights=class_weights,
        accelerator=accelerator,
    )
    optimizer = make_optimizer(
        model, args.learning_rate, args.weight_decay, args.backbone_lr_scale, args.decoder_lr_scale
    )
    scheduler = polynomial_decay(optimizer, args.max_train_steps)  # stays unprepared: it counts steps, not processes
    items = PairedViews(
        data.labeled,
        data.unlabeled,
        args.crop_size,
        length=args.max_train_steps * images_per_update,
        num_labeled_only=args.supervised_warmup_steps * images_per_update,
        seed=args.seed,
        ignore_index=model.config.semantic_loss_ignore_index,
        partner="same" if args.recipe == "released" else "another" if batch_size == 1 else None,
        with_hidden_labels=args.measure_pseudo_labels,
        base_size=args.base_size,
    )
    start = checkpoint_step(checkpoint) if checkpoint else 0
    items = Subset(items, range(start * images_per_update, len(items)))
    on_gpu = accelerator.device.type == "cuda"
    loader = DataLoader(items, batch_size=batch_size, num_workers=args.dataloader_num_workers, pin_memory=on_gpu)
    objective, optimizer, loader = accelerator.prepare(objective, optimizer, loader)
    accelerator.register_for_checkpointing(scheduler)
    if checkpoint is not None:
        accelerator.load_state(checkpoint)
        accelerator.print(f"Going on after step {start} from {checkpoint}.")
    facts = facts_of_run(args, accelerator, data, is_drawn)
    if checkpoint is not None:
        facts = json.loads((checkpoint.parent.parent / "arguments.json").read_text())
    elif accelerator.is_main_process:
        start_output(args, facts, output_dir, data)
    accelerator.wait_for_everyone()
    if args.report_to:
        shown = {name: value for name, value in asdict(args).items() if isinstance(value, int | float | str)}
        accelerator.init_trackers("co2s_hf", config=shown)

    def measure(step: int) -> dict:
        bar = tqdm(data.validation, desc="evaluating", leave=False, disable=not accelerator.is_main_process)
        matrices = evaluate(model, image_processor, bar, args.crop_size, accelerator)
        accelerator.print(results_table(matrices, data.id2label))
        results = {"step": step} | evaluation_facts(args, data, args.crop_size, model.config.fusion)
        results["largest_class_mean_iou"] = largest_class_mean_iou(matrices["fused"])
        results |= results_dict(matrices, data.id2label)
        accelerator.log({f"validation/{name}/mean_iou": results[name]["mean_iou"] for name in matrices}, step=step)
        if args.eval_steps and step and accelerator.is_main_process and is_best(results, best_folder):
            save_model(savable(model, args), image_processor, best_folder, results)
            print(f"The best so far: {best_folder}.")
        return results

    if evaluate_first and checkpoint is None:
        accelerator.print("Before the first step:")
        before = measure(0)
        if accelerator.is_main_process:
            write_json(output_dir / "metrics_before.json", before)

    # 4. The loop.
    logbook, guard = Logbook(accelerator, output_dir / "log.jsonl", data.id2label), NonFiniteGuard(accelerator)
    bar = tqdm(desc="training", initial=start, total=args.max_train_steps, disable=not accelerator.is_main_process)
    skip = False
    for index, batch in enumerate(loader, start=start * steps_per_update):
        step = index // steps_per_update
        # Feature dropout, too, depends on the seed and the batch alone; all processes draw the same.
        torch.manual_seed(args.seed * args.max_train_steps * steps_per_update + index)
        # lambda rises once there is something to learn from.
        semi_step, semi_steps = (n - args.supervised_warmup_steps for n in (step, args.max_train_steps))
        with accelerator.accumulate(objective):
            views = make_views(batch, model.config.image_mean, model.config.image_std)
            losses = objective(views, stability_weight(max(semi_step, 0), semi_steps, args.stability_weight))
            names = [*batch["labeled_name"], *batch.get("unlabeled_name", [])]
            if guard.must_skip(losses["loss"], names, step):
                skip = True
            else:
                logbook.add(losses, len(names) * accelerator.num_processes)
                accelerator.backward(losses["loss"])
            if accelerator.sync_gradients and skip:  # one broken batch takes its whole step with it
                optimizer.zero_grad()
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        done, skipped, skip = step + 1, skip, False
        bar.update()
        is_last = done == args.max_train_steps
        at_checkpoint = done % args.checkpointing_steps == 0 and not is_last
        if done % args.logging_steps == 0 or at_checkpoint or is_last:
            logbook.write(done, {group["name"]: group["lr"] for group in optimizer.param_groups})
        scheduler.step()
        with logbook.paused():
            if at_checkpoint and not skipped:  # what comes of a step that had to be skipped shows at the next one
                save_checkpoint(accelerator, output_dir / "checkpoints", done, args.save_total_limit)
                accelerator.print(f"Saved a checkpoint after step {done}.", flush=True)
            if args.eval_steps and done % args.eval_steps == 0 and not is_last:
                measure(done)
    bar.close()
    accelerator.print(training_size(model, optimizer))

    # 5. What came of it.
    if accelerator.is_main_process:
        save_model(savable(model, args), image_processor, folder)
        print(f"Saved {folder}: Co2SForSemanticSegmentation.from_pretrained('{folder}')")
    results = measure(args.max_train_steps)
    accelerator.print(
        f"(predicting the largest class everywhere: mean IoU {100 * results['largest_class_mean_iou']:.1f})"
    )
    if accelerator.is_main_process:
        write_json(output_dir / "metrics.json", results)
        write_json(folder / "metrics.json", results)
        draw_curves(read_log(output_dir / "log.jsonl"), output_dir / "curves.png")
        palette = palette_or_default(data.palette, len(data.id2label))
        shown = examples_to_show(model, image_processor, data.validation[:NUM_SHOWN], args.crop_size)
        draw_predictions(shown, data.id2label, palette, output_dir / "predictions.png")
        print(f"Look at {output_dir / 'predictions.png'} and {output_dir / 'curves.png'}.")
        kept = [folder, best_folder] if best_folder.exists() else [folder]
        for path in kept:
            describe(path, facts, args, data, model.config)
    # The process group has to outlive the wrapper that reduces gradients through it: with gloo, PyTorch may otherwise
    # hang at exit, waiting for a thread that waits for the interpreter.
    objective, optimizer, loader = accelerator.free_memory(objective, optimizer, loader)
    accelerator.end_training()
    if repository is not None:
        with told_plainly():
            print(f"Published {kept[-1]}: {publish(kept[-1], repository, args.hub_revision)}")


def open_data(args: Arguments, accelerator: Accelerator, config: Co2SConfig | None) -> Source:
    """The data, checked, with scenes drawn where none is given; says what is in it."""
    is_main = accelerator.is_main_process
    if args.data_dir is None and args.dataset_name is None and args.dataset is None:
        args.data_dir = str(Path(args.output_dir).parent / f"scenes-seed{args.seed}")
        if is_main and not Path(args.data_dir).exists():
            print(f"No data is named: drawing scenes into {args.data_dir}.")
            write_scenes(args.data_dir, num_labeled=8, num_unlabeled=120, num_validation=24, seed=args.seed)
    needed = SPLITS if args.method == "co2s" else ("labeled", "validation")
    hidden = args.measure_pseudo_labels
    with told_plainly(), accelerator.main_process_first():  # the others find what it found
        data = open_source(args, args.seed, progress=is_main, with_hidden_labels=hidden, config=config, needed=needed)
        if hidden and not any(data.scans["unlabeled"].labels):
            raise ValueError("None of the unlabelled images has a label map to measure pseudo-labels with.")
    if is_main:
        announce(data, args.report)
    return data


def read_class_weights(args: Arguments, data: Source) -> torch.Tensor | None:
    """The weights that --class_weights asks for, (classes,)."""
    if args.class_weights is None:
        return None
    if args.class_weights == ["balanced"]:
        return balanced_class_weights(data.labeled_pixels)
    if len(args.class_weights) != len(data.id2label):
        raise ValueError(
            f"--class_weights gives {len(args.class_weights)} weights for {len(data.id2label)} classes: "
            f"{', '.join(data.id2label.values())}. Give one number each, or 'balanced'."
        )
    return torch.tensor([float(weight) for weight in args.class_weights])


def build_model(args: Arguments, data: Source) -> Co2SForSemanticSegmentation:
    """The model in training mode, with what trains unfrozen."""
    classes = {"id2label": data.id2label, "palette": data.palette, "class_concepts": data.class_concepts}
    if args.clip_model is None:
        model = tiny_model(**classes)
    elif data.class_concepts is None:
        raise ValueError(
            "CLIP is guided by the classes' names, and this data has none. Pass --class_names, or write "
            "classes.json (which may also give several concepts per class)."
        )
    else:
        model = Co2SForSemanticSegmentation.from_backbones(args.clip_model, args.dinov3_model, **classes)
    if args.recipe == "released":
        model = repeat_released_quirks(model)
    rule = data.labeled.image_rule
    model.config.crop_size, model.config.image_bands, model.config.image_scale = args.crop_size, rule.bands, rule.scale
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    model.freeze_backbones(args.train_backbones)
    if args.lora:
        model.add_adapter(args.lora_config(model))
    train_only(model, args.students)
    return model.train()


def train_only(model: Co2SForSemanticSegmentation, students: str):
    """Freeze the student that is not named, if any; the prediction is then the other one's alone."""
    for student in set(STUDENTS) - set(students.split(",")):
        getattr(model, student).requires_grad_(False)
        model.config.fusion = students


def start_output(args: Arguments, run: dict, output_dir: Path, data: Source):
    """Make the output folder, empty of an earlier run, and write down what it takes to repeat this one."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for path in (output_dir / name for name in WRITTEN):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    write_json(output_dir / "arguments.json", run)
    facts = {"hash": data.hash, "seed": args.seed, "labeled_fraction": args.labeled_fraction}
    write_lists(output_dir / "splits", data.lists, facts | {"validation_fraction": args.validation_fraction})


def savable(model: Co2SForSemanticSegmentation, args: Arguments) -> Co2SForSemanticSegmentation:
    """What is written of a model: an adapter as such, or everything, with low-rank updates merged."""
    return merged(model) if has_adapter(model) and args.saved_as == "model" else model


def is_best(results: dict, folder: Path) -> bool:
    """Whether the fused mean IoU is above that of the model in the folder."""
    path = folder / "metrics.json"
    return not path.exists() or results["fused"]["mean_iou"] > json.loads(path.read_text())["fused"]["mean_iou"]


def describe(folder: Path, facts: dict, args: Arguments, data: Source, config: Co2SConfig):
    """Make a saved model's folder one that can be published: with its card, the run's facts, figures and samples."""
    write_text(folder / TRAINING_FILE, without_secrets(json.dumps(facts, indent=1)))
    for pictures in (folder / CURVES).parent, folder / SAMPLES:  # of an earlier end of the run
        shutil.rmtree(pictures, ignore_errors=True)
        pictures.mkdir()
    shutil.copyfile(folder.parent / "curves.png", folder / CURVES)
    if samples := data.validation[: args.card_samples]:
        model = Co2SForSemanticSegmentation.from_pretrained(folder)
        shown = examples_to_show(model, Co2SImageProcessor.from_pretrained(folder), samples, args.crop_size)
        palette = palette_or_default(data.palette, len(data.id2label))
        draw_predictions(shown, data.id2label, palette, folder / PREDICTIONS)
        for number, example in enumerate(shown):
            example.image.thumbnail((SAMPLE_PX, SAMPLE_PX))
            example.image.save(folder / SAMPLES / f"validation_{number}.png")
    results = json.loads((folder / "metrics.json").read_text())
    write_card(folder, results | {"is_best": folder.name.startswith("best_")}, config)


def check_same_run(args: Arguments, accelerator: Accelerator, checkpoint: Path, data: Source):
    """Refuse to resume with what would make another run of it."""
    output_dir = checkpoint.parent.parent
    saved = json.loads((output_dir / "arguments.json").read_text())
    may_differ = {"resume_from_checkpoint", "dataloader_num_workers", "output_dir", "eval_steps", "eval_epochs"}
    may_differ |= {"report_to", "save_total_limit", "overwrite_output_dir", "measure_pseudo_labels", "report"}
    may_differ |= {"card_samples", "merge", *(field.name for field in fields(HubArguments))}
    facts = {"num_processes": accelerator.num_processes, "data_hash": data.hash}
    now = {**asdict(args), **facts}
    before = {**saved["arguments"], **{name: saved.get(name) for name in facts}}
    differing = [
        f"{k} was {before.get(k)}, now {now[k]}" for k in now if k not in may_differ and now[k] != before.get(k)
    ]
    if differing:
        raise ValueError(f"This is not the run in {output_dir}: {'; '.join(differing)}. Resume with its arguments.")


def facts_of_run(args: Arguments, accelerator: Accelerator, data: Source, is_drawn: bool) -> dict:
    """What it takes to repeat a run."""
    return {
        "command": sys.argv,
        "arguments": asdict(args),
        "num_processes": accelerator.num_processes,
        "data": data_facts(args, data, is_drawn),
        "data_hash": data.hash,
        "device": str(accelerator.device),
        "mixed_precision": accelerator.mixed_precision,
        "versions": {m.__name__: m.__version__ for m in (co2s_hf, torch, transformers, accelerate, kornia)},
        "git_revision": git_revision(),
    }


def git_revision() -> str | None:
    """The commit of this file, "-dirty" where files differ from it; None without a repository or without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return (
            subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip() or None
        )
    except OSError:
        return None


if __name__ == "__main__":
    main()
