"""Pretrain a backbone: `pretrain_dinov3` and `pretrain_clip`.

    pretrain_dinov3(Dinov3Options(images=["my_images"], teacher="facebook/dinov2-small"))

Both check everything that can be checked quickly (`start`), open the images and the teacher, make the model with its
losses, run the steps (`train`) and save the backbone (`finish`).
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ...model.text_guidance_co2s import read_backbone_config, unknown_words
from ...utils.devices import make_accelerator
from ...utils.errors import UserValueError, loading
from ...utils.figures import draw_curves
from ...utils.files import locked_folder, recover, write_json, write_text, written_beside
from ..checkpoints import checkpoint_step, load_checkpoint, save_checkpoint
from ..logbook import read_log
from .card import make_card
from .clip import ClipObjective, build_clip, measure_tags, split_tags
from .distillation import DistillationObjective, MaskedImageObjective, build_dinov3
from .labels import ImageLabels, read_image_labels
from .options import ClipOptions, Dinov3Options, PretrainingOptions
from .outputs import LOG, MODEL, LossLog, as_record, begin, check_outputs, features_folder
from .teacher import Teacher, TeacherFeatures, read_teacher_config
from .tiles import Tile, TileCrops, list_tiles


SCALES = (0.5, 4 / 3)  # smallest and largest factor by which a crop is scaled
WARMUP_SHARE, WEIGHT_DECAY, LARGEST_GRADIENT = 0.05, 0.05, 1.0
UNKNOWN_SHOWN = 20  # words that a warning lists


@dataclass
class Pretraining:
    """What all parts of a pretraining share.

    Args:
        options: Its options.
        accelerator: Accelerate's state of this process.
        checkpoint: The checkpoint to continue from. None for a new pretraining.
    """

    options: PretrainingOptions
    accelerator: Accelerator
    checkpoint: Path | None

    @property
    def output_dir(self) -> Path:
        """Folder of the pretraining."""
        return Path(self.options.output_dir)


def pretrain_dinov3(options: Dinov3Options) -> Path:
    """Pretrain a DINOv3 backbone: distil a teacher's features, or without a teacher predict masked images.

    Returns:
        Folder of the backbone, for `DINOv3ViTModel.from_pretrained`.

    Raises:
        UserError: An option, a file or the output folder cannot be used.
    """
    pretraining = start(options, "dinov3_vit")
    tiles = open_tiles(pretraining)
    set_seed(options.seed)
    model = build_dinov3(options)
    patch_size = model.config.patch_size
    features = open_teacher(pretraining, tiles, patch_size)
    objective = MaskedImageObjective(model) if features is None else DistillationObjective(model, *features.statistics)
    train(pretraining, objective, tiles, patch_size, features)
    return finish(pretraining, model.save_pretrained, _count(tiles), {})


def pretrain_clip(options: ClipOptions) -> Path:
    """Pretrain a small CLIP model from tags or captions of images.

    Returns:
        Folder of the model with its tokenizer, for `CLIPModel.from_pretrained`.

    Raises:
        UserError: An option, a file or the output folder cannot be used.
    """
    pretraining = start(options, "clip")
    labels = read_image_labels(Path(options.image_labels))
    tiles = open_tiles(pretraining)
    kept, held_out = split_tiles(options, tiles, labels)
    set_seed(options.seed)
    model, tokenizer = build_clip(options, labels)
    warn_of_unknown_words(pretraining, labels, tokenizer)
    patch_size = model.config.vision_config.patch_size
    features = open_teacher(pretraining, tiles, patch_size)
    statistics = (None, None) if features is None else features.statistics
    objective = ClipObjective(model, tokenizer, labels, kept, *statistics)
    train(pretraining, objective, kept, patch_size, features)

    def save(folder: Path):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    results = {}
    if held_out and pretraining.accelerator.is_main_process:
        results = measure_tags(model, tokenizer, held_out, labels, options.tile_size)
        print(
            f"{len(held_out)} held-out tiles: mean average precision of the tags "
            f"{results['mean_average_precision']:.3f} (a random order: {results['chance']:.3f})."
        )
    facts = _count(kept) | {"different texts": len(labels.vocabulary), "held-out tiles": len(held_out)}
    return finish(pretraining, save, facts, results)


def start(options: PretrainingOptions, model_type: str) -> Pretraining:
    """Make the Accelerator, and check what can be checked before images are decoded and weights are loaded.

    Args:
        options: Options of the pretraining. The precision is filled in, in place.
        model_type: Type that `init` must have, in the words of transformers.
    """
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    accelerator = make_accelerator(options.use_cpu, options.mixed_precision, kwargs_handlers=handlers)
    options.mixed_precision = accelerator.mixed_precision
    checkpoint = check_outputs(options, accelerator)
    for name in filter(None, (options.init, options.teacher)):
        recover(name)
    if options.init is not None:
        with loading(f"`init` {options.init}", name=options.init):
            config = read_backbone_config(options.init)
        if config.model_type != model_type:
            raise UserValueError(f"`init` is {options.init}, a {config.model_type} model; expected {model_type}.")
        patch_size = getattr(getattr(config, "vision_config", config), "patch_size", None)
        if not isinstance(patch_size, int) or patch_size < 1:
            raise UserValueError(
                f"`init` is {options.init}, which has the patch size {patch_size}; expected 1 or more."
            )
        options.check_grid(patch_size)
    if options.teacher is not None:
        read_teacher_config(options.teacher, options.teacher_layer)
    return Pretraining(options, accelerator, checkpoint)


def open_tiles(pretraining: Pretraining) -> list[Tile]:
    """Find and decode the images, and print their number."""
    options, accelerator = pretraining.options, pretraining.accelerator
    with accelerator.main_process_first():  # the other processes find its results in the cache
        tiles = list_tiles(options.images, options.exclude, options.tile_size, accelerator.is_main_process)
    counts = _count(tiles)
    accelerator.print(f"{counts['images']} images make {counts['tiles']} tiles of {options.tile_size} px.")
    return tiles


def open_teacher(pretraining: Pretraining, tiles: list[Tile], patch_size: int) -> TeacherFeatures | None:
    """Load the teacher and cache its features; None without a teacher."""
    options, accelerator = pretraining.options, pretraining.accelerator
    if options.teacher is None:
        return None
    teacher = Teacher(options.teacher, options.teacher_layer, accelerator)
    features = TeacherFeatures(teacher, tiles, options.tile_size, patch_size)
    if options.cache_features:
        features.cache(features_folder(options), accelerator)
    return features


def split_tiles(options: ClipOptions, tiles: list[Tile], labels: ImageLabels) -> tuple[list[Tile], list[Tile]]:
    """Return the tiles to train on, and those that are held out.

    Raises:
        UserValueError: No image to train on has a text.
    """
    kept, held_out = split_tags(tiles, labels, options.held_out_fraction)
    if options.teacher is None:  # without a teacher, an image without tags has nothing to learn
        kept = [tile for tile in kept if Path(tile.path).resolve() in labels.texts]
    if any(Path(tile.path).resolve() in labels.texts for tile in kept):
        return kept, held_out
    if held_out:
        raise UserValueError(
            f"All images that {options.image_labels} names are held out. Name more images, or lower "
            f"`held_out_fraction`, which is {options.held_out_fraction}."
        )
    raise UserValueError(f"{options.image_labels} names no image in {', '.join(options.images)}.")


def warn_of_unknown_words(pretraining: Pretraining, labels: ImageLabels, tokenizer: PreTrainedTokenizerBase):
    """Print the words of the texts that the tokenizer of `init` does not know. A new tokenizer knows all of them."""
    unknown = unknown_words({"": labels.vocabulary}, tokenizer).get("", [])
    if unknown:
        more = f" and {len(unknown) - UNKNOWN_SHOWN} more" if len(unknown) > UNKNOWN_SHOWN else ""
        pretraining.accelerator.print(
            f"Warning: {pretraining.options.init} does not know {', '.join(unknown[:UNKNOWN_SHOWN])}{more}. All "
            "unknown words mean the same to it. To learn them, pretrain a new model, without `init`."
        )


def train(
    pretraining: Pretraining,
    objective: nn.Module,
    tiles: list[Tile],
    patch_size: int,
    features: TeacherFeatures | None,
):
    """Run all steps that are not done yet. Every process must call this.

    Args:
        pretraining: State of the pretraining.
        objective: The model with its losses.
        tiles: The tiles to train on.
        patch_size: Side of the model's patches in pixels.
        features: Features of the teacher. None: no teacher.

    Raises:
        UserOSError: Another run writes into the output folder.
    """
    with locked_folder(pretraining.output_dir) if pretraining.accelerator.is_main_process else nullcontext():
        _train(pretraining, objective, tiles, patch_size, features)


def _train(
    pretraining: Pretraining,
    objective: nn.Module,
    tiles: list[Tile],
    patch_size: int,
    features: TeacherFeatures | None,
):
    options, accelerator = pretraining.options, pretraining.accelerator
    if accelerator.is_main_process:
        begin(options, tiles, pretraining.checkpoint)
    accelerator.wait_for_everyone()
    done = checkpoint_step(pretraining.checkpoint) if pretraining.checkpoint else 0
    crops_per_step = options.per_device_train_batch_size * accelerator.num_processes
    length = options.max_train_steps * crops_per_step
    items = TileCrops(tiles, options.tile_size, options.crop_size, patch_size, SCALES, length, options.seed, features)
    loader = DataLoader(
        Subset(items, range(done * crops_per_step, length)),
        batch_size=options.per_device_train_batch_size,
        num_workers=options.dataloader_num_workers,
    )
    optimizer = AdamW(objective.parameters(), lr=options.learning_rate, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))
    schedule = LambdaLR(optimizer, lambda step: rate(step, options.max_train_steps))
    prepared, optimizer, loader = accelerator.prepare(objective, optimizer, loader)
    states = {"schedule": schedule}
    if pretraining.checkpoint is not None:
        load_checkpoint(accelerator, pretraining.checkpoint, states)

    log = LossLog(accelerator, pretraining.output_dir / LOG)
    is_quiet = not accelerator.is_main_process
    for batch in tqdm(loader, "pretraining", options.max_train_steps, initial=done, disable=is_quiet):
        # Random masks and word forms depend only on the seed and the number of the step.
        torch.manual_seed(options.seed * options.max_train_steps + done)
        losses = prepared(batch)
        accelerator.backward(losses["loss"])
        accelerator.clip_grad_norm_(objective.parameters(), LARGEST_GRADIENT)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        log.add(losses)
        done += 1
        is_last = done == options.max_train_steps
        is_checkpoint = done % options.checkpointing_steps == 0 and not is_last
        if done % options.logging_steps == 0 or is_checkpoint or is_last:
            log.write(done)
        if is_checkpoint:
            save_checkpoint(accelerator, pretraining.output_dir / "checkpoints", done, states)
    # Delete the DistributedDataParallel wrapper before the process group ends. Otherwise PyTorch with gloo may hang at
    # the end of the program.
    accelerator.free_memory(prepared, optimizer, loader)


def rate(step: int, total_steps: int) -> float:
    """Return the factor on the learning rate: it rises linearly in the first twentieth, then falls along a cosine."""
    warmup = max(1, round(WARMUP_SHARE * total_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


def finish(
    pretraining: Pretraining, save: Callable[[Path], None], facts: dict[str, int], results: dict[str, float]
) -> Path:
    """Save the backbone with its card, draw the losses, and return the backbone's folder.

    Args:
        pretraining: State of the pretraining.
        save: Writes the backbone into a folder.
        facts: What the data consists of, for the card.
        results: Measurements of the backbone.
    """
    options, folder = pretraining.options, pretraining.output_dir / MODEL
    if pretraining.accelerator.is_main_process:
        log = {line.pop("step"): line for line in read_log(pretraining.output_dir / LOG)}
        with written_beside(folder) as target:
            save(target)
            write_json(target / "pretraining.json", {"options": as_record(options), "results": results})
            write_text(target / "README.md", make_card(options, facts, log[options.max_train_steps] | results))
        kind = "clip" if isinstance(options, ClipOptions) else "dinov3"
        curves = [
            {"step": step, **{f"{kind}/{name}": loss for name, loss in line.items()}} for step, line in log.items()
        ]
        draw_curves(curves, pretraining.output_dir / "curves.png")
        print(f"Saved {folder}. Look at {pretraining.output_dir / 'curves.png'}.")
    pretraining.accelerator.wait_for_everyone()
    pretraining.accelerator.end_training()
    return folder


def _count(tiles: list[Tile]) -> dict[str, int]:
    return {"images": len({tile.path for tile in tiles}), "tiles": len(tiles)}


__all__ = ["pretrain_clip", "pretrain_dinov3"]
