"""Train both Co2S students on a few labelled and many unlabelled images.

    # Drawn scenes, a tiny model from scratch: shows everything in minutes on a CPU.
    accelerate launch examples/train_semi.py

    # Your folder (images/, labels/, splits/labeled.txt, splits/unlabeled.txt, splits/val.txt), the same tiny model.
    accelerate launch examples/train_semi.py --data_dir path/to/folder --class_names building land road

    # Pretrained towers, as in the paper (DINOv3's are gated: accept the terms on the Hub, `hf auth login`).
    accelerate launch --multi_gpu --mixed_precision bf16 examples/train_semi.py --data_dir path/to/folder \\
        --clip_model openai/clip-vit-base-patch16 --dinov3_model facebook/dinov3-vitb16-pretrain-lvd1689m \\
        --crop_size 256 --per_device_train_batch_size 2 --num_train_epochs 80

    # Go on after an interruption, with the same arguments.
    accelerate launch examples/train_semi.py --resume_from_checkpoint last

Plain `python examples/train_semi.py` does the same on one device.
"""

import argparse
import json
import math
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import accelerate
import kornia
import torch
import transformers
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import HfArgumentParser

import co2s_hf
from co2s_hf import Co2SForSemanticSegmentation, Co2SImageProcessor
from co2s_hf.data import PairedViews, SegmentationFolder
from co2s_hf.figures import draw_curves, draw_predictions, palette_or_default
from co2s_hf.files import check_new_folder, write_text
from co2s_hf.objective import Co2SObjective, stability_weight
from co2s_hf.synthetic import write_scenes
from co2s_hf.training import (
    checkpoint_step,
    evaluate,
    examples_to_show,
    find_checkpoint,
    largest_class_mean_iou,
    make_optimizer,
    polynomial_decay,
    results_dict,
    results_table,
    save_checkpoint,
    save_model,
    steps_per_epoch,
    tiny_config,
    use_all_cores,
)
from co2s_hf.views import make_views


NUM_SHOWN = 5  # validation images in the figure


def setting(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class Arguments:
    """What a run can be told. None stands for a value that depends on others; `resolve` fills it in."""

    output_dir: str = setting(
        "outputs/train_semi", "New folder for model/, metrics.json, log.jsonl, arguments.json and figures."
    )
    data_dir: str | None = setting(None, "Folder with images/, labels/ and splits/. Left out: scenes are drawn.")
    class_names: list[str] | None = setting(
        None, "Class names in label order. Left out: classes.json of the folder, or class_0, class_1 ..."
    )
    clip_model: str | None = setting(None, "Pretrained CLIP (Hub name or folder). Left out: tiny, from scratch.")
    dinov3_model: str | None = setting(None, "Pretrained DINOv3 (Hub name or folder); with --clip_model.")

    crop_size: int = setting(128, "Side of training crops and of evaluation windows, in pixels.")
    per_device_train_batch_size: int = setting(4, "Labelled images per step and device, and as many unlabelled ones.")
    max_train_steps: int | None = setting(None, "Length of the training in steps. Left out: 400.")
    num_train_epochs: int | None = setting(None, "Length of the training in walks through the longer list, instead.")
    learning_rate: float | None = setting(None, "Base learning rate. Pretrained: 1e-4; from scratch: 1e-3.")
    weight_decay: float = setting(0.01, "AdamW's weight decay.")
    train_backbones: Literal["attention", "all", "none"] | None = setting(
        None, "What trains in the towers. Pretrained: attention; from scratch: all."
    )
    backbone_lr_scale: float | None = setting(
        None, "Towers' learning rate, relative to the base. Pretrained: 0.01; from scratch: 1."
    )
    decoder_lr_scale: float | None = setting(
        None, "Decoders' learning rate, relative to the base. Pretrained: 10; from scratch: 1."
    )
    confidence_threshold: float = setting(0.95, "tau: probability from which pseudo-labels and teaching count.")
    stability: Literal["paper", "reference", "off"] = setting(
        "paper", "Loss between the students; reference has no gradient, as the authors' released code."
    )
    supervised_warmup_steps: int | None = setting(
        None, "Steps on labels alone before unlabelled images join. Pretrained: 0; from scratch: half of the steps."
    )

    eval_steps: int | None = setting(None, "Evaluate every so many steps. Left out: at the end.")
    logging_steps: int = setting(50, "Print and log the mean losses every so many steps.")
    checkpointing_steps: int = setting(200, "Save what resuming needs every so many steps; the last two are kept.")
    resume_from_checkpoint: str | None = setting(
        None, "'last', or a folder of checkpoints/: go on from there, exactly, with the other arguments as they were."
    )
    dataloader_num_workers: int = setting(0, "Worker processes that read and crop images, per device.")
    use_cpu: bool = setting(False, "Stay on the CPU even where there is a GPU.")
    mixed_precision: Literal["no", "bf16"] | None = setting(
        None, "Left out: what `accelerate launch` says. fp16 overflows inside DINOv3."
    )
    seed: int = setting(0, "Seed of weights, order, views and drawn scenes.")

    def __post_init__(self):
        if (self.clip_model is None) != (self.dinov3_model is None):
            raise ValueError("Give both --clip_model and --dinov3_model, or neither for a tiny model from scratch.")
        if self.max_train_steps is not None and self.num_train_epochs is not None:
            raise ValueError("Give either --max_train_steps or --num_train_epochs.")
        least = {"crop_size": 8, "per_device_train_batch_size": 1, "max_train_steps": 1, "num_train_epochs": 1}
        least |= {
            "logging_steps": 1,
            "checkpointing_steps": 1,
            "eval_steps": 1,
            "supervised_warmup_steps": 0,
            "dataloader_num_workers": 0,
        }
        for name, minimum in least.items():
            if (value := getattr(self, name)) is not None and value < minimum:
                raise ValueError(f"--{name} is {value}; it must be at least {minimum}.")
        if not 0 <= self.confidence_threshold <= 1:
            raise ValueError(f"--confidence_threshold is {self.confidence_threshold}; a probability is 0 to 1.")
        if self.class_names and len(set(self.class_names)) != len(self.class_names):
            raise ValueError(f"--class_names names a class twice: {' '.join(self.class_names)}.")

    def resolve(self, epoch_steps: int):
        """Fill in what depends on the towers and on the length of the data's epoch."""
        from_scratch = self.clip_model is None
        if self.max_train_steps is None:
            self.max_train_steps = self.num_train_epochs * epoch_steps if self.num_train_epochs else 400
        defaults = {
            "learning_rate": 1e-3 if from_scratch else 1e-4,
            "train_backbones": "all" if from_scratch else "attention",
            "backbone_lr_scale": 1.0 if from_scratch else 0.01,
            "decoder_lr_scale": 1.0 if from_scratch else 10.0,
            # Pseudo-labels of a network that has learnt nothing yet cost more than they give.
            "supervised_warmup_steps": self.max_train_steps // 2 if from_scratch else 0,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.supervised_warmup_steps >= self.max_train_steps:
            raise ValueError(
                f"--supervised_warmup_steps is {self.supervised_warmup_steps} of {self.max_train_steps} steps: no "
                "unlabelled image would be used. Lower it, or train longer."
            )


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keep the examples' lines, and name a default where it says something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default in (None, False, argparse.SUPPRESS) else f"{action.help} [%(default)s]"


def main():
    parser = HfArgumentParser(Arguments, description=__doc__, formatter_class=HelpFormatter)
    args: Arguments = parser.parse_args_into_dataclasses()[0]
    accelerator = Accelerator(
        cpu=args.use_cpu,
        mixed_precision=args.mixed_precision,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        # The last CLIP layer's query and key projections train in name only (see `freeze_backbones`).
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if accelerator.mixed_precision == "fp16":
        raise ValueError("fp16 overflows inside DINOv3. Launch with --mixed_precision bf16 or no.")
    use_all_cores(accelerator)
    output_dir = Path(args.output_dir)

    # 1. The data, checked before anything expensive starts.
    data_dir = args.data_dir or output_dir.parent / f"scenes-seed{args.seed}"
    checkpoint = find_checkpoint(output_dir / "checkpoints", args.resume_from_checkpoint)
    if accelerator.is_main_process:
        if checkpoint is None:
            check_new_folder(output_dir)
        if args.data_dir is None and not data_dir.exists():
            print(f"No --data_dir: drawing scenes into {data_dir}.")
            write_scenes(data_dir, num_labeled=8, num_unlabeled=120, num_validation=24, seed=args.seed)
    accelerator.wait_for_everyone()
    data = SegmentationFolder.open(data_dir, args.class_names)
    accelerator.print(
        f"{len(data.labeled)} labelled, {len(data.unlabeled)} unlabelled, {len(data.validation)} validation images; "
        f"{len(data.id2label)} classes: {', '.join(data.id2label.values())}"
    )
    batch_size = args.per_device_train_batch_size
    global_batch_size = batch_size * accelerator.num_processes
    args.resolve(steps_per_epoch(len(data.labeled), len(data.unlabeled), global_batch_size))
    if checkpoint is not None:
        check_same_run(args, accelerator, output_dir)

    # 2. The model.
    set_seed(args.seed)
    if args.clip_model is None:
        config = tiny_config(id2label=data.id2label, palette=data.palette, class_concepts=data.class_concepts)
        model = Co2SForSemanticSegmentation(config)
    else:
        if data.class_concepts is None:
            raise ValueError(
                "CLIP is guided by the classes' names, and this folder has none. Pass --class_names, or write "
                "classes.json (which may also give several concepts per class)."
            )
        model = Co2SForSemanticSegmentation.from_backbones(
            args.clip_model,
            args.dinov3_model,
            id2label=data.id2label,
            palette=data.palette,
            class_concepts=data.class_concepts,
        )
    model.freeze_backbones(args.train_backbones).train()
    image_processor = Co2SImageProcessor.from_model_config(model.config)

    # 3. The objective is what gets distributed, since its forward is the whole step; and one stream of items.
    objective = Co2SObjective(model, threshold=args.confidence_threshold, stability=args.stability)
    optimizer = make_optimizer(
        model, args.learning_rate, args.weight_decay, args.backbone_lr_scale, args.decoder_lr_scale
    )
    scheduler = polynomial_decay(optimizer, args.max_train_steps)  # stays unprepared: it counts steps, not processes
    items = PairedViews(
        data.labeled,
        data.unlabeled,
        args.crop_size,
        length=args.max_train_steps * global_batch_size,
        num_labeled_only=args.supervised_warmup_steps * global_batch_size,
        seed=args.seed,
        ignore_index=model.config.semantic_loss_ignore_index,
        with_partner=batch_size == 1,
    )
    start = checkpoint_step(checkpoint) if checkpoint else 0
    items = Subset(items, range(start * global_batch_size, len(items)))
    on_gpu = accelerator.device.type == "cuda"
    loader = DataLoader(items, batch_size=batch_size, num_workers=args.dataloader_num_workers, pin_memory=on_gpu)
    objective, optimizer, loader = accelerator.prepare(objective, optimizer, loader)
    accelerator.register_for_checkpointing(scheduler)
    if checkpoint is not None:
        accelerator.load_state(checkpoint)
        accelerator.print(f"Going on after step {start} from {checkpoint}.")
    elif accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / "arguments.json", facts_of_run(args, accelerator))

    def measure() -> dict:
        bar = tqdm(data.validation, desc="evaluating", leave=False, disable=not accelerator.is_main_process)
        matrices = evaluate(model, image_processor, bar, args.crop_size, accelerator)
        accelerator.print(results_table(matrices, data.id2label))
        return matrices

    # 4. The loop.
    logged = []
    bar = tqdm(
        loader,
        desc="training",
        initial=start,
        total=args.max_train_steps,
        disable=not accelerator.is_main_process,
    )
    for step, batch in enumerate(bar, start=start):
        # Feature dropout, too, depends on the seed, the step and the process alone.
        torch.manual_seed(
            (args.seed * args.max_train_steps + step) * accelerator.num_processes + accelerator.process_index
        )
        # lambda rises once there is something to learn from.
        semi_step, semi_steps = (n - args.supervised_warmup_steps for n in (step, args.max_train_steps))
        losses = objective(
            make_views(batch, model.config.image_mean, model.config.image_std),
            stability_weight(max(semi_step, 0), semi_steps),
        )
        accelerator.backward(losses["loss"])
        optimizer.step()
        optimizer.zero_grad()
        logged.append({name: value.detach() for name, value in losses.items()})
        done = step + 1
        at_checkpoint = done % args.checkpointing_steps == 0 and done < args.max_train_steps
        if done % args.logging_steps == 0 or at_checkpoint or done == args.max_train_steps:
            rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
            log(accelerator, output_dir, done, logged, rates)
            logged = []
        scheduler.step()
        if at_checkpoint:
            save_checkpoint(accelerator, output_dir / "checkpoints", done)
            accelerator.print(f"Saved a checkpoint after step {done}.", flush=True)
        if args.eval_steps and done % args.eval_steps == 0 and done < args.max_train_steps:
            measure()

    # 5. What came of it.
    if accelerator.is_main_process:
        save_model(model, image_processor, output_dir / "model")
        print(f"Saved {output_dir / 'model'}: Co2SForSemanticSegmentation.from_pretrained('{output_dir / 'model'}')")
    matrices = measure()
    baseline = largest_class_mean_iou(matrices["fused"])
    accelerator.print(f"(predicting the largest class everywhere: mean IoU {100 * baseline:.1f})")
    if accelerator.is_main_process:
        results = {"step": args.max_train_steps, "largest_class_mean_iou": baseline}
        write_json(output_dir / "metrics.json", results | results_dict(matrices, data.id2label))
        palette = palette_or_default(data.palette, len(data.id2label))
        shown = examples_to_show(model, image_processor, data.validation[:NUM_SHOWN], args.crop_size)
        draw_predictions(shown, data.id2label, palette, output_dir / "predictions.png")
        draw_curves(read_log(output_dir), output_dir / "curves.png")
        print(f"Look at {output_dir / 'predictions.png'} and {output_dir / 'curves.png'}.")
    # The process group has to outlive the wrapper that reduces gradients through it: with gloo, PyTorch may otherwise
    # hang at exit, waiting for a thread that waits for the interpreter.
    objective, optimizer, loader = accelerator.free_memory(objective, optimizer, loader)
    accelerator.end_training()


def log(accelerator: Accelerator, output_dir: Path, step: int, losses: list[dict], learning_rates: dict[str, float]):
    """Print and write the mean of each loss since the last time; stop at one that is not finite."""
    names = losses[-1]  # warm-up steps lack the terms of unlabelled images
    means = {name: torch.stack([entry[name] for entry in losses if name in entry]).float().mean() for name in names}
    means = {name: value.item() for name, value in accelerator.reduce(means, reduction="mean").items()}
    if not math.isfinite(means["loss"]):
        raise FloatingPointError(f"The loss is {means['loss']} around step {step}. Lower --learning_rate.")
    if accelerator.is_main_process:
        shown = "  ".join(f"{name} {means[name]:.3f}" for name in ("loss", "clip/loss", "dinov3/loss"))
        confident = [f"{100 * means[name]:.0f} %" for name in means if name.endswith("confident_fraction")]
        tqdm.write(f"step {step:5d}  {shown}" + (f"  confident {' / '.join(confident)}" if confident else ""))
        # A resumed run replaces the lines after its checkpoint.
        lines = [line for line in read_log(output_dir) if line["step"] < step]
        lines.append({"step": step, "learning_rates": learning_rates, **means})
        write_text(output_dir / "log.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def read_log(output_dir: Path) -> list[dict]:
    """The lines of log.jsonl so far."""
    path = output_dir / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def check_same_run(args: Arguments, accelerator: Accelerator, output_dir: Path):
    """Refuse to resume with what would make another run of it."""
    saved = json.loads((output_dir / "arguments.json").read_text())
    may_differ = {"resume_from_checkpoint", "dataloader_num_workers", "output_dir", "eval_steps"}
    now = {**asdict(args), "num_processes": accelerator.num_processes}
    before = {**saved["arguments"], "num_processes": saved["num_processes"]}
    differing = [
        f"{k} was {before.get(k)}, now {now[k]}" for k in now if k not in may_differ and now[k] != before.get(k)
    ]
    if differing:
        raise ValueError(f"This is not the run in {output_dir}: {'; '.join(differing)}. Resume with its arguments.")


def facts_of_run(args: Arguments, accelerator: Accelerator) -> dict:
    """What it takes to repeat a run."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return {
        "command": sys.argv,
        "arguments": asdict(args),
        "num_processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "mixed_precision": accelerator.mixed_precision,
        "versions": {m.__name__: m.__version__ for m in (co2s_hf, torch, transformers, accelerate, kornia)},
        "git_revision": git.stdout.strip() or None,
    }


def write_json(path: Path, content: dict):
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
