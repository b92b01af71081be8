"""Train both Co2S students on a few labelled and many unlabelled images.

    # Drawn scenes, a tiny model from scratch: shows everything in minutes on a CPU.
    accelerate launch examples/train_semi.py

    # Your folder (images/, labels/, splits/labeled.txt, splits/unlabeled.txt, splits/val.txt), the same tiny model.
    accelerate launch examples/train_semi.py --data_dir path/to/folder --class_names building land road

    # The paper's training: pretrained towers (DINOv3's are gated: accept the terms on the Hub, `hf auth login`).
    accelerate launch --multi_gpu --mixed_precision bf16 examples/train_semi.py --data_dir path/to/folder \
        --clip_model openai/clip-vit-base-patch16 --dinov3_model facebook/dinov3-vitb16-pretrain-lvd1689m \
        --crop_size 256 --num_train_epochs 80

Plain `python examples/train_semi.py` does the same on one device.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import HfArgumentParser

import co2s_hf
from co2s_hf import Co2SForSemanticSegmentation, Co2SImageProcessor
from co2s_hf.data import PairedViews, SegmentationFolder
from co2s_hf.files import check_new_folder
from co2s_hf.objective import Co2SObjective, stability_weight
from co2s_hf.synthetic import write_scenes
from co2s_hf.training import (
    evaluate,
    largest_class_mean_iou,
    make_optimizer,
    polynomial_decay,
    results_dict,
    results_table,
    save_model,
    steps_per_epoch,
    tiny_config,
    use_all_cores,
)
from co2s_hf.views import make_views


def setting(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class Arguments:
    """Settings marked "(paper)" default to the paper's value for pretrained towers and to another from scratch."""

    output_dir: str = setting(
        "outputs/train_semi", "New folder for model/, metrics.json, log.jsonl and arguments.json."
    )
    data_dir: str | None = setting(None, "Folder with images/, labels/ and splits/. Left out: scenes are drawn.")
    class_names: list[str] | None = setting(
        None, "Class names in label order. Left out: classes.json of the folder, or class_0, class_1 ..."
    )
    clip_model: str | None = setting(None, "Pretrained CLIP (Hub name or folder). Left out: tiny, from scratch.")
    dinov3_model: str | None = setting(None, "Pretrained DINOv3 (Hub name or folder); with --clip_model.")

    crop_size: int = setting(128, "Side of training crops and of evaluation windows, in pixels.")
    per_device_train_batch_size: int = setting(4, "Labelled images per step and device, and as many unlabelled ones.")
    max_train_steps: int | None = setting(None, "Length of the training in steps; 400 if nothing is given.")
    num_train_epochs: int | None = setting(None, "Length of the training in walks through the longer list, instead.")
    learning_rate: float | None = setting(None, "Base learning rate: 1e-4 (paper), 1e-3 from scratch.")
    weight_decay: float = setting(0.01, "AdamW's weight decay (the paper's).")
    train_backbones: str | None = setting(None, "attention (paper), all (from scratch) or none.")
    backbone_lr_scale: float | None = setting(None, "Towers' learning rate, relative: 0.01 (paper), 1 from scratch.")
    decoder_lr_scale: float | None = setting(None, "Decoders' learning rate, relative: 10 (paper), 1 from scratch.")
    confidence_threshold: float = setting(0.95, "tau: probability from which pseudo-labels and teaching count.")
    stability: str = setting("paper", "Loss between the students: paper, reference (no gradient, as released) or off.")
    supervised_warmup_steps: int | None = setting(
        None, "Steps on labels alone before unlabelled images join: 0 (paper), half of the steps from scratch."
    )

    eval_steps: int | None = setting(None, "Evaluate every so many steps. Left out: at the end.")
    logging_steps: int = setting(50, "Print and log the mean losses every so many steps.")
    dataloader_num_workers: int = setting(0, "Worker processes that read and crop images, per device.")
    use_cpu: bool = setting(False, "Stay on the CPU even where there is a GPU.")
    mixed_precision: str | None = setting(None, "no or bf16. Left out: what `accelerate launch` says.")
    seed: int = setting(0, "Seed of weights, order, views and drawn scenes.")

    def __post_init__(self):
        if (self.clip_model is None) != (self.dinov3_model is None):
            raise ValueError("Give both --clip_model and --dinov3_model, or neither for a tiny model from scratch.")
        if self.max_train_steps is not None and self.num_train_epochs is not None:
            raise ValueError("Give either --max_train_steps or --num_train_epochs.")
        if self.mixed_precision == "fp16":
            raise ValueError("fp16 overflows inside DINOv3. Use --mixed_precision bf16.")
        for name in (
            "crop_size",
            "per_device_train_batch_size",
            "max_train_steps",
            "num_train_epochs",
            "logging_steps",
        ):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} is {value}; it must be at least 1.")
        from_scratch = self.clip_model is None
        presets = {
            "learning_rate": 1e-3 if from_scratch else 1e-4,
            "train_backbones": "all" if from_scratch else "attention",
            "backbone_lr_scale": 1.0 if from_scratch else 0.01,
            "decoder_lr_scale": 1.0 if from_scratch else 10.0,
        }
        for name, value in presets.items():
            if getattr(self, name) is None:
                setattr(self, name, value)


def main():
    args: Arguments = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    # The last CLIP layer's query and key projections train in name only (see `freeze_backbones`).
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=args.use_cpu, mixed_precision=args.mixed_precision, kwargs_handlers=[ddp])
    use_all_cores(accelerator)
    output_dir = Path(args.output_dir)

    # 1. Everything that can be wrong is looked at before anything expensive starts.
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            check_new_folder(output_dir)
            if args.data_dir is None:
                accelerator.print("No --data_dir: drawing scenes.")
                write_scenes(
                    output_dir / "scenes", num_labeled=8, num_unlabeled=120, num_validation=24, seed=args.seed
                )
        folder = SegmentationFolder.open(args.data_dir or output_dir / "scenes", args.class_names)
    counts = [len(folder.labeled), len(folder.unlabeled), len(folder.validation)]
    accelerator.print("{} labelled, {} unlabelled, {} validation images; ".format(*counts), end="")
    accelerator.print(f"{len(folder.id2label)} classes: {', '.join(folder.id2label.values())}")

    # 2. The model.
    set_seed(args.seed)
    if args.clip_model is None:
        model = Co2SForSemanticSegmentation(tiny_config(id2label=folder.id2label, palette=folder.palette))
    else:
        model = Co2SForSemanticSegmentation.from_backbones(
            args.clip_model, args.dinov3_model, id2label=folder.id2label, palette=folder.palette
        )
    model.freeze_backbones(args.train_backbones).train()
    image_processor = Co2SImageProcessor.from_model_config(model.config)

    # 3. Its data, in epochs of whole batches.
    batch_size = args.per_device_train_batch_size
    global_batch_size = batch_size * accelerator.num_processes
    epoch_steps = steps_per_epoch(len(folder.labeled), len(folder.unlabeled), global_batch_size)
    total_steps = args.max_train_steps or (args.num_train_epochs * epoch_steps if args.num_train_epochs else 400)
    warmup_steps = args.supervised_warmup_steps
    if warmup_steps is None:
        warmup_steps = total_steps // 2 if args.clip_model is None else 0
    views = PairedViews(
        folder.labeled,
        folder.unlabeled,
        args.crop_size,
        length=epoch_steps * global_batch_size,
        seed=args.seed,
        ignore_index=model.config.semantic_loss_ignore_index,
        with_partner=batch_size == 1,
    )
    loader = DataLoader(views, batch_size=batch_size, num_workers=args.dataloader_num_workers, pin_memory=True)

    # 4. Objective and optimiser; the objective is what gets distributed, since its forward is the whole step.
    objective = Co2SObjective(model, threshold=args.confidence_threshold, stability=args.stability)
    optimizer = make_optimizer(
        model, args.learning_rate, args.weight_decay, args.backbone_lr_scale, args.decoder_lr_scale
    )
    scheduler = polynomial_decay(optimizer, total_steps)  # stays unprepared: it counts steps, not processes
    objective, optimizer, loader = accelerator.prepare(objective, optimizer, loader)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        facts = {
            "command": sys.argv,
            "arguments": asdict(args) | {"max_train_steps": total_steps, "supervised_warmup_steps": warmup_steps},
            "num_processes": accelerator.num_processes,
            "versions": {module.__name__: module.__version__ for module in (co2s_hf, torch, transformers)},
        }
        (output_dir / "arguments.json").write_text(json.dumps(facts, indent=1) + "\n")

    def measure() -> dict:
        bar = tqdm(folder.validation, desc="evaluating", leave=False, disable=not accelerator.is_main_process)
        matrices = evaluate(model, image_processor, bar, args.crop_size, accelerator)
        accelerator.print(results_table(matrices, folder.id2label))
        return matrices

    # 5. The loop.
    bar = tqdm(total=total_steps, desc="training", disable=not accelerator.is_main_process)
    step, epoch, logged = 0, 0, []
    while step < total_steps:
        loader.set_epoch(epoch)
        for batch in loader:
            losses = objective(
                make_views(batch, model.config.image_mean, model.config.image_std),
                stability_weight(step, total_steps),
                unlabeled_weight=float(step >= warmup_steps),
            )
            accelerator.backward(losses["loss"])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            bar.update()
            logged.append({name: value.detach() for name, value in losses.items()})
            if step % args.logging_steps == 0 or step == total_steps:
                log(accelerator, output_dir, step, logged, scheduler.get_last_lr()[0])
                logged = []
            if args.eval_steps and step % args.eval_steps == 0 and step < total_steps:
                measure()
            if step == total_steps:
                break
        epoch += 1
    bar.close()

    # 6. What came of it.
    matrices = measure()
    baseline = largest_class_mean_iou(matrices["fused"])
    accelerator.print(f"(predicting the largest class everywhere: mean IoU {100 * baseline:.1f})")
    if accelerator.is_main_process:
        save_model(model, image_processor, output_dir / "model")
        results = {"step": step, "largest_class_mean_iou": baseline, **results_dict(matrices, folder.id2label)}
        (output_dir / "metrics.json").write_text(json.dumps(results, indent=1) + "\n")
        print(f"Saved {output_dir / 'model'}: Co2SForSemanticSegmentation.from_pretrained('{output_dir / 'model'}')")
    accelerator.end_training()


def log(accelerator: Accelerator, output_dir: Path, step: int, losses: list[dict], learning_rate: float):
    """Print and write the mean of each loss since the last time; stop at one that is not finite."""
    names = losses[-1]
    means = {name: torch.stack([entry[name] for entry in losses if name in entry]).float().mean() for name in names}
    means = {name: value.item() for name, value in accelerator.reduce(means, reduction="mean").items()}
    if not math.isfinite(means["loss"]):
        raise FloatingPointError(f"The loss is {means['loss']} around step {step}. Lower --learning_rate.")
    if accelerator.is_main_process:
        shown = "  ".join(f"{name} {means[name]:.3f}" for name in ("loss", "clip/loss", "dinov3/loss"))
        tqdm.write(f"step {step:5d}  {shown}  learning rate {learning_rate:.2e}")
        with (output_dir / "log.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "learning_rate": learning_rate, **means}) + "\n")


if __name__ == "__main__":
    main()
