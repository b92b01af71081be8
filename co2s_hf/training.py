"""Building blocks of a training run: optimiser groups, schedule, evaluation, saving. The loop is in train_semi.py."""

import math
import os
import shutil
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .configuration_co2s import Co2SConfig
from .confusion import ConfusionMatrix
from .data import Sample
from .figures import Example
from .files import write_json, written_beside
from .image_processing_co2s import Co2SImageProcessor
from .inference import predict_logits
from .modeling_co2s import STUDENTS, Co2SForSemanticSegmentation


# The first process may download and look into a whole data set while the others wait.
PATIENCE = InitProcessGroupKwargs(timeout=timedelta(hours=12))


def predictors(config: Co2SConfig) -> tuple[str, ...]:
    """Whose predictions a model has: of both students, or of the one that is its fusion, and the fused ones."""
    return (*((config.fusion,) if config.fusion in STUDENTS else STUDENTS), "fused")


def check_precision(accelerator: Accelerator):
    """Refuse fp16, which the launcher may have chosen.

    Raises:
        ValueError: The mixed precision is fp16.
    """
    if accelerator.mixed_precision == "fp16":
        raise ValueError("fp16 overflows inside DINOv3. Launch with --mixed_precision bf16 or no.")


def use_all_cores(accelerator: Accelerator):
    """Share the machine's cores among the processes of a CPU run started by `accelerate launch`.

    The launcher leaves each process one thread unless `--num_cpu_threads_per_process` asks for more. Without the
    launcher PyTorch's own choice (and OMP_NUM_THREADS) stands.
    """
    if accelerator.device.type == "cpu" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(torch.get_num_threads(), cores // processes))


def tiny_config(**config_kwargs) -> Co2SConfig:
    """A model small enough to learn from scratch in minutes on a CPU: towers 96 wide, 6 layers, patches of 8 px.

    Args:
        config_kwargs: Further fields of [`Co2SConfig`] (labels, palette).
    """
    tower = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 6, "num_attention_heads": 4}
    return Co2SConfig(
        clip_config={**tower, "patch_size": 8, "image_size": 128, "projection_dim": 64},
        dinov3_config={**tower, "patch_size": 8, "num_register_tokens": 4, "layer_norm_eps": 1e-6},
        clip_feature_layers=(0, 2, 5),
        dinov3_feature_layers=(1, 3, 5),
        decoder_channels=32,
        decoder_guidance_channels=32,
        decoder_skip_channels=(8, 8),
        decoder_up_channels=(16, 16),
        **config_kwargs,
    )


def tiny_model(**config_kwargs) -> Co2SForSemanticSegmentation:
    """A model of [`tiny_config`] with fresh weights that begin to learn soon.

    Towers without pretraining see every class alike: the cosines that the decoder starts from lie within 0.1 of zero.
    So their first convolution starts larger than PyTorch's default, which it takes from its fan-in alone.
    """
    model = Co2SForSemanticSegmentation(tiny_config(**config_kwargs))
    with torch.no_grad():
        for name in STUDENTS:
            getattr(model, name).decoder.similarity_projection.weight.mul_(8)
    # Convolutions of many small maps, which is what a tiny decoder is, run a quarter faster in this layout on a CPU.
    return model.to(memory_format=torch.channels_last)


def repeat_released_quirks(model: Co2SForSemanticSegmentation) -> Co2SForSemanticSegmentation:
    """The same weights in a model that does what the authors' code does differently from the paper and the towers.

    CLIP runs with GELU, epsilon 1e-6 and ImageNet's statistics, and both students' logits take a fixed size on the
    way (224 and 256).
    """
    fields = model.config.to_dict()
    fields["clip_config"] |= {"hidden_act": "gelu", "layer_norm_eps": 1e-6}
    fields |= {"clip_image_mean": list(IMAGENET_DEFAULT_MEAN), "clip_image_std": list(IMAGENET_DEFAULT_STD)}
    fields |= {"clip_logits_size": 224, "dinov3_logits_size": 256}
    released = Co2SForSemanticSegmentation(Co2SConfig.from_dict(fields))
    released.load_state_dict(model.state_dict())
    return released


def balanced_class_weights(pixel_counts: np.ndarray) -> torch.Tensor:
    """Weights (classes,) inverse to how many labelled pixels each class has: pixels / (classes * pixels of the class).

    A class without a pixel weighs 1; nothing of it is ever weighted.
    """
    counts = torch.as_tensor(pixel_counts, dtype=torch.float32)
    present = counts > 0
    weights = counts.sum() / (present.sum() * counts.clamp(min=1))
    return weights.where(present, 1.0)


def make_optimizer(
    model: Co2SForSemanticSegmentation,
    learning_rate: float = 1e-4,
    weight_decay: float = 0.01,
    backbone_lr_scale: float = 0.01,
    decoder_lr_scale: float = 10.0,
) -> Optimizer:
    """AdamW over the trainable parameters: towers slow, queries at the base rate, decoders fast.

    Args:
        model: After `freeze_backbones`.
        learning_rate: Of the learnable queries.
        weight_decay: Of every parameter.
        backbone_lr_scale: Learning rate of both towers, relative.
        decoder_lr_scale: Learning rate of both decoders, relative.
    """
    scales = {"encoder": backbone_lr_scale, "guidance": 1.0, "decoder": decoder_lr_scale}
    groups = []
    for part, scale in scales.items():
        modules = [getattr(getattr(model, student), part) for student in STUDENTS]
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        if parameters:
            groups.append({"params": parameters, "lr": learning_rate * scale, "name": part})
    return AdamW(groups, lr=learning_rate, weight_decay=weight_decay, fused=True)


def training_size(model: Co2SForSemanticSegmentation, optimizer: Optimizer) -> str:
    """A line on how much of the model trains, and the memory of the optimiser's state."""
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
    megabytes = sum(tensor.numel() * tensor.element_size() for tensor in state) / 1e6
    return f"Trained {trained / 1e6:.2f} M of {total / 1e6:.2f} M parameters; optimiser state {megabytes:.1f} MB."


def polynomial_decay(optimizer: Optimizer, total_steps: int, power: float = 0.9) -> LambdaLR:
    """Learning rates fall to 0 as (1 - step / total)^power, without warm-up."""
    return LambdaLR(optimizer, lambda step: max(0.0, 1 - step / total_steps) ** power)


def steps_per_epoch(num_labeled: int, num_unlabeled: int, global_batch_size: int) -> int:
    """Steps in which every image of the longer list is seen at least once: the paper's epoch."""
    return math.ceil(max(num_labeled, num_unlabeled) / global_batch_size)


def evaluate(
    model: Co2SForSemanticSegmentation,
    image_processor: Co2SImageProcessor,
    samples: Iterable[Sample],
    crop_size: int,
    accelerator: Accelerator,
    flip: bool = False,
) -> dict[str, ConfusionMatrix]:
    """Measure the students and their fusion with sliding windows, each sample once, shared among processes.

    Args:
        model: Unwrapped; put into evaluation mode for the time being.
        image_processor: Normalises the images.
        samples: With labels; a progress bar may be wrapped around them.
        crop_size: Side of a window in pixels.
        accelerator: Of the run.
        flip: Average with the prediction for the mirrored image.

    Returns:
        A confusion matrix over all processes' samples for each of [`predictors`].
    """
    was_training = model.training
    model.eval()
    ignore_index = model.config.semantic_loss_ignore_index
    matrices = {name: ConfusionMatrix(model.config.num_labels, ignore_index) for name in predictors(model.config)}
    for n, sample in enumerate(samples):
        if n % accelerator.num_processes != accelerator.process_index:
            continue
        inputs = image_processor(sample.load_image(), return_tensors="pt")  # perhaps resized; the label is not
        labels = torch.from_numpy(np.array(sample.load_label())).long()
        with accelerator.autocast():
            logits = predict_logits(model, inputs["pixel_values"], crop_size, tuple(labels.shape), flip)
        for name, matrix in matrices.items():
            matrix.update(logits[name].argmax(dim=0).cpu(), labels)
    model.train(was_training)
    return {name: matrix.over_processes() for name, matrix in matrices.items()}


def examples_to_show(
    model: Co2SForSemanticSegmentation, image_processor: Co2SImageProcessor, samples: Iterable[Sample], crop_size: int
) -> list[Example]:
    """Predict some labelled samples for a figure: truth, the students, fused prediction and its confidence."""
    was_training = model.training
    model.eval()
    examples = []
    for sample in samples:
        image, label = sample.load_image(), sample.load_label()
        inputs = image_processor(image, return_tensors="pt")
        logits = predict_logits(model, inputs["pixel_values"], crop_size, (label.height, label.width))
        maps = {name: value.argmax(dim=0).cpu().numpy() for name, value in logits.items()}
        examples.append(
            Example(
                image, {"truth": np.asarray(label)} | maps, logits["fused"].softmax(dim=0).amax(dim=0).cpu().numpy()
            )
        )
    model.train(was_training)
    return examples


def results_table(matrices: dict[str, ConfusionMatrix], id2label: dict[int, str]) -> str:
    """IoU in per cent of every class and their mean, a column for each predictor; '-' for a class that is absent."""
    width = max(len("mean (paper's convention)"), *(len(label) for label in id2label.values()))
    lines = [" " * width + "".join(f"{name:>9}" for name in matrices)]
    ious = {name: matrix.iou() for name, matrix in matrices.items()}
    for index, label in id2label.items():
        cells = (f"{100 * iou[index]:9.1f}" if iou[index].isfinite() else f"{'-':>9}" for iou in ious.values())
        lines.append(label.ljust(width) + "".join(cells))
    means = {
        "mean IoU": ConfusionMatrix.mean_iou,
        "mean (paper's convention)": ConfusionMatrix.mean_iou_paper,
        "mean F1": ConfusionMatrix.mean_f1,
        "pixel accuracy": ConfusionMatrix.accuracy,
    }
    for label, measure in means.items():
        lines.append(label.ljust(width) + "".join(f"{100 * measure(matrix):9.1f}" for matrix in matrices.values()))
    return "\n".join(lines)


def results_dict(matrices: dict[str, ConfusionMatrix], id2label: dict[int, str]) -> dict:
    """The same as numbers from 0 to 1, for JSON; null for an absent class."""

    def per_class(values: torch.Tensor) -> dict[str, float | None]:
        return {
            label: value if math.isfinite(value := values[index].item()) else None for index, label in id2label.items()
        }

    return {
        name: {
            "mean_iou": matrix.mean_iou(),
            "mean_iou_paper": matrix.mean_iou_paper(),
            "mean_f1": matrix.mean_f1(),
            "accuracy": matrix.accuracy(),
            "iou": per_class(matrix.iou()),
            "f1": per_class(matrix.f1()),
        }
        for name, matrix in matrices.items()
    }


def save_model(
    model: Co2SForSemanticSegmentation,
    image_processor: Co2SImageProcessor,
    folder: str | Path,
    results: dict | None = None,
):
    """Write model and image processor as one folder that `from_pretrained` loads; it appears only when complete.

    Args:
        model: Unwrapped.
        image_processor: Of the model.
        folder: What stands there is replaced.
        results: What was measured, written along as metrics.json.
    """
    with written_beside(folder) as target:
        model.save_pretrained(target)
        image_processor.save_pretrained(target)
        if results is not None:
            write_json(target / "metrics.json", results)


def save_checkpoint(accelerator: Accelerator, root: Path, step: int, keep: int = 2):
    """Save what resuming after a step needs (weights, optimiser, schedule) as `root/step-<step>`.

    The folder appears only when every process has written its part. Older ones than the last `keep` are removed then.
    Every process must call this.
    """
    folder = root / f"step-{step:07d}"
    unfinished = root / f".unfinished-{step:07d}"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed while writing it
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(unfinished)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        for old in sorted(root.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def find_checkpoint(root: Path, name: str | None) -> Path | None:
    """The folder to resume from: None for no name, the newest below `root` for "last", or the named one.

    Raises:
        FileNotFoundError: There is no such checkpoint.
    """
    if name is None:
        return None
    if name == "last":
        if checkpoints := sorted(root.glob("step-*")):
            return checkpoints[-1]
        raise FileNotFoundError(f"There is no checkpoint in '{root}' to resume from. Start without resuming.")
    folder = Path(name)
    if not (folder.is_dir() and folder.name.startswith("step-")):
        raise FileNotFoundError(
            f"'{folder}' is no checkpoint; give 'last' or a folder such as {root / 'step-0000200'}."
        )
    return folder


def checkpoint_step(folder: Path) -> int:
    """How many steps were done when a checkpoint was saved."""
    return int(folder.name.removeprefix("step-"))


def largest_class_mean_iou(matrix: ConfusionMatrix) -> float:
    """Mean IoU of predicting the most frequent class everywhere: what a model must beat."""
    pixels = matrix.counts.sum(dim=1)
    return (pixels.max() / pixels.sum() / (pixels > 0).sum()).item()


__all__ = [
    "PATIENCE",
    "balanced_class_weights",
    "check_precision",
    "checkpoint_step",
    "evaluate",
    "examples_to_show",
    "find_checkpoint",
    "largest_class_mean_iou",
    "make_optimizer",
    "polynomial_decay",
    "predictors",
    "repeat_released_quirks",
    "results_dict",
    "results_table",
    "save_checkpoint",
    "save_model",
    "steps_per_epoch",
    "tiny_config",
    "tiny_model",
    "training_size",
    "use_all_cores",
]
