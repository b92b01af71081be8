"""The training loop: `setup` opens the data and builds everything, `train` runs the steps, `finish` saves the result.

    run = setup(TrainingOptions(output_dir="outputs/mine"), DataOptions(data_dir="my_data"))
    trained = train(run)
    model = Co2SForSemanticSegmentation.from_pretrained(trained.folder)

Nothing is written before `train` begins.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from ..data.drawn_scenes import write_scenes
from ..data.options import DataOptions
from ..data.samples import PairedViews
from ..data.sources import Source, open_source
from ..data.splits import SPLITS
from ..data.validation.report import announce
from ..data.views import make_views
from ..model.configuration_co2s import Co2SConfig
from ..model.image_processing_co2s import Co2SImageProcessor
from ..model.modeling_co2s import Co2SForSemanticSegmentation
from ..utils.devices import make_accelerator
from ..utils.errors import UserValueError
from ..utils.figures import draw_curves, draw_predictions, palette_or_default
from ..utils.files import write_json
from .checkpoints import (
    check_output_dir,
    check_same_run,
    checkpoint_step,
    find_checkpoint,
    make_record,
    read_record,
    save_checkpoint,
    save_model,
    start_output,
)
from .evaluation import Evaluation, evaluate, predict_examples
from .logbook import Logbook, NonFiniteGuard, read_log
from .lora import has_adapter, merged
from .models import build_model
from .objective import Co2SObjective, stability_weight
from .optimization import balanced_class_weights, make_optimizer, polynomial_decay, steps_per_epoch, training_size
from .options import TrainingOptions, follow_protocol


NUM_SHOWN = 5  # validation images in predictions.png


@dataclass
class Run:
    """Everything that the steps of one training share.

    Args:
        options: Without None where a default applies.
        data_options: What the data was opened with.
        accelerator: Accelerate's state of this process.
        data: The opened data.
        model: Not wrapped by Accelerate.
        image_processor: Of the model.
        objective: The model with its losses, prepared by Accelerate.
        optimizer: Prepared by Accelerate.
        scheduler: Not prepared: it counts steps, not processes.
        loader: Batches from the first step on, prepared by Accelerate.
        checkpoint: Checkpoint that the run was resumed from.
        record: Everything that is needed to repeat the run, see [`make_record`].
        logbook: Averages and logs the losses.
        guard: Skips steps whose loss is not finite.
        skips_step: A batch of the current step was broken.
    """

    options: TrainingOptions
    data_options: DataOptions
    accelerator: Accelerator
    data: Source
    model: Co2SForSemanticSegmentation
    image_processor: Co2SImageProcessor
    objective: torch.nn.Module
    optimizer: Optimizer
    scheduler: LambdaLR
    loader: DataLoader
    checkpoint: Path | None
    record: dict
    logbook: Logbook
    guard: NonFiniteGuard
    skips_step: bool = False

    @property
    def output_dir(self) -> Path:
        return Path(self.options.output_dir)

    @property
    def folder(self) -> Path:
        """Folder of the trained model."""
        return self.output_dir / self.options.saved_as

    @property
    def best_folder(self) -> Path:
        """Folder of the model with the best evaluation; it exists if there were evaluations during the training."""
        return self.output_dir / f"best_{self.options.saved_as}"

    @property
    def steps_done(self) -> int:
        """Number of steps done before the run began."""
        return 0 if self.checkpoint is None else checkpoint_step(self.checkpoint)


@dataclass(frozen=True)
class Trained:
    """What a training leaves behind.

    Args:
        folder: The trained model, or the adapter.
        best_folder: The one with the best evaluation; None without evaluations during the training.
        evaluation: Of the trained model.
        data: The opened data.
        record: See [`make_record`].
        config: Of the trained model.
    """

    folder: Path
    best_folder: Path | None
    evaluation: Evaluation
    data: Source
    record: dict
    config: Co2SConfig


def setup(
    options: TrainingOptions,
    data_options: DataOptions,
    build: Callable[[TrainingOptions, Source], Co2SForSemanticSegmentation] = build_model,
    config: Co2SConfig | None = None,
    command: Sequence[str] = (),
) -> Run:
    """Open and check the data, build the model, and restore a checkpoint. Nothing is written.

    Args:
        options: Of the training. Options that are None are set.
        data_options: Of the data. Without any source, scenes are drawn beside the output folder.
        build: Makes the model for the data, in training mode, with the trained parameters unfrozen.
        config: Of the trained model that is adapted: how it reads images, and its classes.
        command: Words of the command line, for the record.

    Raises:
        UserError: An option, a file or the output folder cannot be used.
    """
    follow_protocol(options, data_options)
    options.fill(options.defaults)
    accelerator = _start_accelerate(options)
    checkpoint = find_checkpoint(Path(options.output_dir) / "checkpoints", options.resume_from_checkpoint)
    if checkpoint is None and accelerator.is_main_process:
        check_output_dir(options)

    is_drawn = not data_options.has_source
    data = open_data(options, data_options, accelerator, config)
    images_per_step = _images_per_step(options, accelerator)
    options.resolve_steps(steps_per_epoch(len(data.labeled), len(data.unlabeled), images_per_step))
    record = make_record(options, data_options, data, accelerator, command, is_drawn)
    if checkpoint is not None:
        check_same_run(checkpoint, record)
        record = read_record(Path(options.output_dir))
    class_weights = read_class_weights(options, data)

    set_seed(options.seed)
    model = build(options, data)
    resize = {"do_resize": True, "size": {"shortest_edge": options.eval_short_side}} if options.eval_short_side else {}
    objective = make_objective(options, model, class_weights, accelerator)
    optimizer = make_optimizer(model, options.learning_rate, options.backbone_lr_scale, options.decoder_lr_scale)
    scheduler = polynomial_decay(optimizer, options.max_train_steps)
    first_item = images_per_step * (checkpoint_step(checkpoint) if checkpoint else 0)
    loader = make_loader(options, data, model.config, images_per_step, first_item, accelerator)
    # The objective's forward is the whole step, so it is what Accelerate wraps.
    objective, optimizer, loader = accelerator.prepare(objective, optimizer, loader)
    accelerator.register_for_checkpointing(scheduler)
    if checkpoint is not None:
        accelerator.load_state(checkpoint)
        accelerator.print(f"Resumed after step {checkpoint_step(checkpoint)} from {checkpoint}.")
    return Run(
        options=options,
        data_options=data_options,
        accelerator=accelerator,
        data=data,
        model=model,
        image_processor=Co2SImageProcessor.from_model_config(model.config, **resize),
        objective=objective,
        optimizer=optimizer,
        scheduler=scheduler,
        loader=loader,
        checkpoint=checkpoint,
        record=record,
        logbook=Logbook(accelerator, Path(options.output_dir) / "log.jsonl", data.id2label),
        guard=NonFiniteGuard(accelerator),
    )


def train(run: Run, evaluate_first: bool = False) -> Trained:
    """Run all steps, evaluate, save, and return what was made. Every process must call this.

    Args:
        run: Made by [`setup`].
        evaluate_first: Also evaluate before the first step, into metrics_before.json.
    """
    options, accelerator = run.options, run.accelerator
    begin(run)
    if evaluate_first and run.checkpoint is None:
        accelerator.print("Before the first step:")
        before = measure(run, step=0)
        if accelerator.is_main_process:
            write_json(run.output_dir / "metrics_before.json", before.to_dict())

    done, total = run.steps_done, options.max_train_steps
    bar = tqdm(desc="training", initial=done, total=total, disable=not accelerator.is_main_process)
    for index, batch in enumerate(run.loader, start=done * options.gradient_accumulation_steps):
        was_skipped = training_step(run, batch, index)
        if not accelerator.sync_gradients:  # the step has more batches
            continue
        done += 1
        bar.update()
        is_last = done == total
        is_checkpoint = done % options.checkpointing_steps == 0 and not is_last
        if done % options.logging_steps == 0 or is_checkpoint or is_last:
            run.logbook.write(done, {group["name"]: group["lr"] for group in run.optimizer.param_groups})
        run.scheduler.step()
        with run.logbook.paused():
            if is_checkpoint and not was_skipped:  # after a skipped step, the next step shows whether training goes on
                save_checkpoint(accelerator, run.output_dir / "checkpoints", done)
                accelerator.print(f"Saved a checkpoint after step {done}.", flush=True)
            if options.eval_steps and done % options.eval_steps == 0 and not is_last:
                measure(run, done)
    bar.close()
    return finish(run)


def training_step(run: Run, batch: dict, index: int) -> bool:
    """Compute the losses of one batch and their gradients; after the last batch of a step, update the weights.

    Args:
        run: The run.
        batch: Collated items of [`PairedViews`], on the device.
        index: Number of the batch since the beginning of the training.

    Returns:
        Whether the step was skipped: the loss of one of its batches is not finite.
    """
    options, config = run.options, run.model.config
    step = index // options.gradient_accumulation_steps
    # Feature dropout depends on the seed and the batch alone, and all processes draw the same numbers.
    torch.manual_seed(options.seed * options.max_train_steps * options.gradient_accumulation_steps + index)
    # lambda rises after the warm-up, when the students have something to teach.
    semi_step, semi_steps = (n - options.supervised_warmup_steps for n in (step, options.max_train_steps))
    weight = stability_weight(max(semi_step, 0), semi_steps, options.stability_weight)
    with run.accelerator.accumulate(run.objective):
        losses = run.objective(make_views(batch, config.image_mean, config.image_std), weight)
        names = [*batch["labeled_name"], *batch.get("unlabeled_name", [])]
        if run.guard.must_skip(losses["loss"], names, step):
            run.skips_step = True
        else:
            run.logbook.add(losses, len(names) * run.accelerator.num_processes)
            run.accelerator.backward(losses["loss"])
        if run.accelerator.sync_gradients and run.skips_step:  # one broken batch skips the whole step
            run.optimizer.zero_grad()
        run.optimizer.step()
        run.optimizer.zero_grad()
    was_skipped = run.skips_step
    if run.accelerator.sync_gradients:
        run.skips_step = False
    return was_skipped


def begin(run: Run):
    """Create the output folder of a new run, and start the trackers."""
    if run.checkpoint is None and run.accelerator.is_main_process:
        start_output(run.options, run.data, run.record)
    run.accelerator.wait_for_everyone()
    if run.options.report_to:
        flat = asdict(run.data_options) | asdict(run.options)
        shown = {name: value for name, value in flat.items() if isinstance(value, int | float | str)}
        run.accelerator.init_trackers("co2s_hf", config=shown)


def measure(run: Run, step: int) -> Evaluation:
    """Evaluate after a step, print the table, and keep the model if it is the best so far."""
    found = evaluate(
        run.model,
        run.image_processor,
        run.data,
        run.data_options,
        run.options.crop_size,
        run.accelerator,
        step=step,
    )
    run.accelerator.print(found.table())
    means = {f"validation/{name}/mean_iou": scores.mean_iou for name, scores in found.scores.items()}
    run.accelerator.log(means, step=step)
    if run.options.eval_steps and step and run.accelerator.is_main_process and is_best(found, run.best_folder):
        save_model(savable(run), run.image_processor, run.best_folder, replace(found, is_best=True))
        print(f"The best so far: {run.best_folder}.")
    return found


def finish(run: Run) -> Trained:
    """Save and evaluate the trained model, and draw predictions and the losses' curves."""
    accelerator, data, output_dir = run.accelerator, run.data, run.output_dir
    accelerator.print(training_size(run.model, run.optimizer))
    if accelerator.is_main_process:
        save_model(savable(run), run.image_processor, run.folder)
        print(f"Saved {run.folder}: Co2SForSemanticSegmentation.from_pretrained('{run.folder}')")
    found = measure(run, run.options.max_train_steps)
    accelerator.print(f"(predicting the largest class everywhere: mean IoU {100 * found.largest_class_mean_iou:.1f})")
    if accelerator.is_main_process:
        write_json(output_dir / "metrics.json", found.to_dict())
        write_json(run.folder / "metrics.json", found.to_dict())
        draw_curves(read_log(output_dir / "log.jsonl"), output_dir / "curves.png")
        palette = palette_or_default(data.palette, len(data.id2label))
        shown = predict_examples(run.model, run.image_processor, data.validation[:NUM_SHOWN], run.options.crop_size)
        draw_predictions(shown, data.id2label, palette, output_dir / "predictions.png")
        print(f"Look at {output_dir / 'predictions.png'} and {output_dir / 'curves.png'}.")
    # The process group must outlive the wrapper that reduces gradients through it. Otherwise PyTorch may hang at exit
    # with gloo, waiting for a thread that waits for the interpreter.
    run.objective, run.optimizer, run.loader = accelerator.free_memory(run.objective, run.optimizer, run.loader)
    accelerator.end_training()
    best_folder = run.best_folder if run.best_folder.exists() else None
    return Trained(run.folder, best_folder, found, data, run.record, run.model.config)


def savable(run: Run) -> Co2SForSemanticSegmentation:
    """Return what is saved: an adapter as such, else the whole model, with low-rank updates merged."""
    return merged(run.model) if has_adapter(run.model) and run.options.saved_as == "model" else run.model


def is_best(found: Evaluation, folder: Path) -> bool:
    """Return whether the fused mean IoU exceeds that of the model in the folder."""
    path = folder / "metrics.json"
    return not path.exists() or found.scores["fused"].mean_iou > Evaluation.read(path).scores["fused"].mean_iou


def open_data(
    options: TrainingOptions, data_options: DataOptions, accelerator: Accelerator, config: Co2SConfig | None
) -> Source:
    """Open and check the data, and print what it contains. Without any source, draw scenes first."""
    is_main = accelerator.is_main_process
    if not data_options.has_source:
        data_options.data_dir = str(Path(options.output_dir).parent / f"scenes-seed{options.seed}")
        if is_main and not Path(data_options.data_dir).exists():
            print(f"No data is named: drawing scenes into {data_options.data_dir}.")
            write_scenes(data_options.data_dir, num_labeled=8, num_unlabeled=120, num_validation=24, seed=options.seed)
    needed = SPLITS if options.method == "co2s" else ("labeled", "validation")
    hidden = options.measure_pseudo_labels
    with accelerator.main_process_first():  # the others find its results in the cache
        data = open_source(
            data_options, options.seed, progress=is_main, with_hidden_labels=hidden, config=config, needed=needed
        )
    if hidden and not any(data.scans["unlabeled"].labels):
        raise UserValueError("`measure_pseudo_labels` needs label maps of unlabelled images, and none has one.")
    if is_main:
        announce(data)
    if len(data.labeled) < options.per_device_train_batch_size:
        accelerator.print(
            f"{len(data.labeled)} labelled images make batches of {options.per_device_train_batch_size}: a batch "
            "shows some of them more than once, in different views."
        )
    return data


def read_class_weights(options: TrainingOptions, data: Source) -> torch.Tensor | None:
    """Return the weights (classes,) of `class_weights`; None if all classes have the same weight.

    Raises:
        UserValueError: The number of weights is not the number of classes, or one is no number.
    """
    if options.class_weights is None:
        return None
    if list(options.class_weights) == ["balanced"]:
        return balanced_class_weights(data.labeled_pixels)
    try:
        weights = [float(weight) for weight in options.class_weights]
    except ValueError as error:
        raise UserValueError(f"`class_weights`: {error}. Give one number per class, or 'balanced'.") from error
    if len(weights) != len(data.id2label):
        raise UserValueError(
            f"`class_weights` has {len(weights)} weights for {len(data.id2label)} classes: "
            f"{', '.join(data.id2label.values())}. Give one number per class, or 'balanced'."
        )
    return torch.tensor(weights)


def make_objective(
    options: TrainingOptions,
    model: Co2SForSemanticSegmentation,
    class_weights: torch.Tensor | None,
    accelerator: Accelerator,
) -> Co2SObjective:
    """Make the losses that the options ask for."""
    return Co2SObjective(
        model,
        students=tuple(options.students.split(",")),
        threshold=options.confidence_threshold,
        strong_weight=options.strong_weight,
        feature_dropout_weight=options.feature_dropout_weight,
        stability=options.stability,
        confidence_mode=options.confidence_mode,
        labeled_loss=options.labeled_loss,
        class_weights=class_weights,
        accelerator=accelerator,
    )


def make_loader(
    options: TrainingOptions,
    data: Source,
    config: Co2SConfig,
    images_per_step: int,
    first_item: int,
    accelerator: Accelerator,
) -> DataLoader:
    """Make the loader of all batches from `first_item` on: one stream of items for the whole training."""
    partner = "another" if options.per_device_train_batch_size == 1 else None
    items = PairedViews(
        data.labeled,
        data.unlabeled,
        options.crop_size,
        length=options.max_train_steps * images_per_step,
        num_labeled_only=options.supervised_warmup_steps * images_per_step,
        seed=options.seed,
        ignore_index=config.semantic_loss_ignore_index,
        partner="same" if options.recipe == "released" else partner,
        with_hidden_labels=options.measure_pseudo_labels,
        base_size=options.base_size,
    )
    return DataLoader(
        Subset(items, range(first_item, len(items))),
        batch_size=options.per_device_train_batch_size,
        num_workers=options.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )


def _start_accelerate(options: TrainingOptions) -> Accelerator:
    """Make the run's Accelerator, and store the precision in the options: the launcher may have chosen it."""
    accelerator = make_accelerator(
        options.use_cpu,
        options.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        log_with=options.report_to,
        project_dir=options.output_dir,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        # The query and key projections of the last CLIP layer get no gradient (see `freeze_backbones`).
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    options.mixed_precision = accelerator.mixed_precision
    return accelerator


def _images_per_step(options: TrainingOptions, accelerator: Accelerator) -> int:
    """Return the labelled images of one step, of all processes together."""
    per_process = options.per_device_train_batch_size * options.gradient_accumulation_steps
    return per_process * accelerator.num_processes


__all__ = ["Run", "Trained", "finish", "measure", "setup", "train", "training_step"]
