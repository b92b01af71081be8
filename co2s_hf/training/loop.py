"""The training loop: `setup` opens the data and builds the model, `train` runs the steps, `finish` saves the result.

    run = setup(TrainingOptions(output_dir="outputs/mine"), DataOptions(data_dir="my_data"))
    trained = train(run)
    model = Co2SForSemanticSegmentation.from_pretrained(trained.folder)

`setup` writes nothing into the output folder; `train` does.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from ..data.options import DataOptions
from ..data.sources import Source
from ..data.views import make_views
from ..model.configuration_co2s import Co2SConfig
from ..model.image_processing_co2s import Co2SImageProcessor
from ..model.modeling_co2s import Co2SForSemanticSegmentation
from ..utils.figures import draw_curves, draw_predictions, palette_or_default
from ..utils.files import locked_folder, write_json
from ..utils.redaction import redacted
from .calibration import calibrate
from .checkpoints import (
    check_output_dir,
    check_same_run,
    checkpoint_step,
    clean_run,
    find_checkpoint,
    is_in_run,
    load_checkpoint,
    make_record,
    save_checkpoint,
    save_model,
    start_output,
)
from .evaluation import Evaluation, evaluate, predict_examples
from .logbook import Logbook, NonFiniteGuard, pseudo_label_table, read_log
from .lora import has_adapter, merged
from .models import build_model
from .objective import stability_weight
from .optimization import make_optimizer, polynomial_decay, steps_per_epoch, training_size
from .options import TrainingOptions, follow_protocol
from .run import (
    Run,
    Trained,
    batches,
    images_per_step,
    make_items,
    make_loader,
    make_objective,
    open_data,
    read_class_weights,
    start_accelerate,
)
from .warmup import WarmUp, relative_coverage


NUM_SHOWN = 5  # validation images in predictions.png


def setup(
    options: TrainingOptions,
    data_options: DataOptions,
    build: Callable[[TrainingOptions, Source], Co2SForSemanticSegmentation] = build_model,
    config: Co2SConfig | None = None,
    command: Sequence[str] = (),
) -> Run:
    """Open and check the data, build the model, and restore a checkpoint. The output folder does not change.

    Args:
        options: Options of the training. Options that are None get their defaults, in place.
        data_options: Options of the data. Those of the scenes of `data="drawn"`, or of the real images if no source is
            named, are filled in, in place.
        build: Function that builds the model for the data. It returns the model in training mode, and unfreezes only
            the parameters to train.
        config: Configuration of the trained model to adapt. It sets how images are read. None: train a new model.
        command: Words of the command line, for the record.

    Returns:
        The state of the run, for [`train`].

    Raises:
        UserError: An option, a file or the output folder cannot be used.
    """
    follow_protocol(options, data_options)
    options.fill(options.defaults)
    accelerator = start_accelerate(options)
    checkpoint = find_checkpoint(Path(options.output_dir) / "checkpoints", options.resume_from_checkpoint)
    if accelerator.is_main_process and not is_in_run(checkpoint, Path(options.output_dir)):
        check_output_dir(options)

    is_drawn = data_options.data == "drawn"
    data = open_data(options, data_options, accelerator, config)
    num_images = images_per_step(options, accelerator)
    options.resolve_steps(steps_per_epoch(len(data.labeled), len(data.unlabeled), num_images))
    record = make_record(options, data_options, data, accelerator, command, is_drawn)
    if checkpoint is not None:
        record = check_same_run(checkpoint, record)
    class_weights = read_class_weights(options, data)

    set_seed(options.seed)
    model = build(options, data)
    resize = {"do_resize": True, "size": {"shortest_edge": options.eval_short_side}} if options.eval_short_side else {}
    objective = make_objective(options, model, class_weights, data, accelerator)
    rates = (options.learning_rate, options.backbone_lr_scale, options.decoder_lr_scale)
    optimizer = make_optimizer(model, *rates, device=accelerator.device)
    scheduler = polynomial_decay(optimizer, options.max_train_steps)
    warm_up = WarmUp.for_options(options)
    # Accelerate wraps the objective, not the model: the forward of the objective computes all losses of a batch.
    objective, optimizer = accelerator.prepare(objective, optimizer)
    if checkpoint is not None:
        load_checkpoint(accelerator, checkpoint, {"schedule": scheduler, "warm_up": warm_up})
    first_item = num_images * (checkpoint_step(checkpoint) if checkpoint else 0)
    items = make_items(options, data, num_images, warm_up.steps)
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
        items=items,
        loader=make_loader(options, items, warm_up, first_item, accelerator),
        warm_up=warm_up,
        checkpoint=checkpoint,
        record=record,
        logbook=Logbook(accelerator, Path(options.output_dir) / "log.jsonl", data.id2label, data.labeled_share),
        guard=NonFiniteGuard(accelerator),
    )


def train(run: Run, evaluate_first: bool = False) -> Trained:
    """Run all steps, evaluate and save. Every process must call this.

    Args:
        run: Made by [`setup`].
        evaluate_first: Also evaluate before the first step, and write metrics_before.json.

    Returns:
        The folders and results of the training.

    Raises:
        UserOSError: Another run writes into the output folder.
    """
    with locked_folder(run.output_dir) if run.accelerator.is_main_process else nullcontext():
        return _train(run, evaluate_first)


def _train(run: Run, evaluate_first: bool) -> Trained:
    options, accelerator = run.options, run.accelerator
    begin(run)
    if evaluate_first and run.checkpoint is None:
        accelerator.print("Before the first step:")
        before = measure(run, step=0)
        if accelerator.is_main_process:
            write_json(run.output_dir / "metrics_before.json", before.to_dict())

    done, total = run.steps_done, options.max_train_steps
    run.logbook.start()
    bar = tqdm(desc="training", initial=done, total=total, disable=not accelerator.is_main_process)
    for index, batch in enumerate(batches(run), start=done * options.gradient_accumulation_steps):
        was_skipped = training_step(run, batch, index)
        if not accelerator.sync_gradients:  # the step is not complete: it has more batches
            continue
        done += 1
        bar.update()
        is_last = done == total
        is_checkpoint = done % options.checkpointing_steps == 0 and not is_last
        if done % options.logging_steps == 0 or is_checkpoint or is_last:
            run.logbook.write(done, {group["name"]: group["lr"] for group in run.optimizer.param_groups})
        run.scheduler.step()
        with run.logbook.paused():
            if run.warm_up.must_check(done):
                check_warm_up(run, done)
            if options.eval_steps and done % options.eval_steps == 0 and not is_last:
                set_temperatures(run)
                measure(run, done)
            # The checkpoint is the last thing of a step: a resumed run continues with the next step.
            if is_checkpoint and not was_skipped:  # after a skipped step, the next step may stop the run
                states = {"schedule": run.scheduler, "warm_up": run.warm_up}
                save_checkpoint(accelerator, run.output_dir / "checkpoints", done, states)
                accelerator.print(f"Saved a checkpoint after step {done}.", flush=True)
    bar.close()
    return finish(run)


def training_step(run: Run, batch: dict, index: int) -> bool:
    """Compute the losses of one batch and their gradients; after the last batch of a step, update the weights.

    Args:
        run: State of the run.
        batch: Collated items of [`PairedViews`], on the device.
        index: Number of batches since the beginning of the training.

    Returns:
        Whether the step is skipped, because the loss of one of its batches is not finite. False before its last batch.
    """
    options, config = run.options, run.model.config
    step = index // options.gradient_accumulation_steps
    # Feature dropout depends only on the seed and the number of the batch. All processes draw the same numbers.
    torch.manual_seed(options.seed * options.max_train_steps * options.gradient_accumulation_steps + index)
    # lambda rises only after the warm-up. Before it, the predictions of the students are not reliable.
    semi_step, semi_steps = (n - run.warm_up.steps for n in (step, options.max_train_steps))
    weight = stability_weight(max(semi_step, 0), semi_steps, options.stability_weight)
    with run.accelerator.accumulate(run.objective):
        losses = run.objective(make_views(batch, config.image_mean, config.image_std), weight)
        names = [*batch["labeled_name"], *batch.get("unlabeled_name", [])]
        run.accelerator.backward(losses["loss"])
        run.step_batches.append(({name: value.detach() for name, value in losses.items()}, names))
        is_skipped = run.accelerator.sync_gradients and must_skip(run, step)
        if is_skipped:
            run.optimizer.zero_grad()  # without gradients, the update below changes nothing
        # Accelerate's wrappers do nothing here before the last batch of a step.
        run.optimizer.step()
        run.optimizer.zero_grad()
    return is_skipped


def must_skip(run: Run, step: int) -> bool:
    """Log the losses of a complete step, and return whether to skip it. One broken batch is enough.

    Raises:
        DivergenceError: The previous step was skipped, too.
    """
    losses, names = zip(*run.step_batches)
    broken = run.guard.broken_batches([values["loss"] for values in losses], list(names), step)
    for values, images, is_broken in zip(losses, names, broken):
        if not is_broken:
            run.logbook.add(values, len(images) * run.accelerator.num_processes)
    run.step_batches.clear()
    return any(broken)


def begin(run: Run):
    """Start the trackers. For a new run, first create the output folder and remove the results of an earlier run.

    Raises:
        UserValueError: The log of the run to continue is damaged.
    """
    if run.accelerator.is_main_process:
        if is_in_run(run.checkpoint, run.output_dir):
            clean_run(run.output_dir)
            read_log(run.logbook.path)
        else:
            start_output(run.options, run.data, run.record)
    run.accelerator.wait_for_everyone()
    if run.options.report_to:
        flat = asdict(run.data_options) | asdict(run.options)
        shown = {name: value for name, value in flat.items() if isinstance(value, int | float | str)}
        # TensorBoard hides the values that were logged after the checkpoint. The resumed run logs them again.
        again = {"tensorboard": {"purge_step": run.steps_done + 1}} if run.checkpoint else {}
        run.accelerator.init_trackers("co2s_hf", config=redacted(shown), init_kwargs=again)


def check_warm_up(run: Run, done: int):
    """Measure the coverage of the pseudo-labels after a step of the warm-up, and end the warm-up if it suffices."""
    objective = run.accelerator.unwrap_model(run.objective)
    check = -(-done // run.warm_up.check_steps)
    coverage = relative_coverage(objective, run.items, check, run.options.per_device_train_batch_size)
    if reason := run.warm_up.end_if_covered(done, coverage, list(run.data.id2label.values())):
        run.accelerator.print(reason)


def measure(run: Run, step: int) -> Evaluation:
    """Evaluate after a step, print the table, and save the model if it is the best so far."""
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


def set_temperatures(run: Run):
    """Calibrate the students if the recipe is "balanced", and print their temperatures."""
    if run.options.recipe != "balanced":  # the paper compares the confidences of the students as they are
        return
    found = calibrate(run.model, run.data, run.options, run.accelerator)
    shown = ", ".join(f"{name} {temperature:.2f}" for name, temperature in found.items())
    run.accelerator.print(f"Temperatures of the students: {shown}.")


def finish(run: Run) -> Trained:
    """Calibrate, save and evaluate the trained model, and draw its predictions and the curves of the losses."""
    accelerator, data, output_dir = run.accelerator, run.data, run.output_dir
    accelerator.print(training_size(run.model, run.optimizer))
    set_temperatures(run)
    if accelerator.is_main_process:
        save_model(savable(run), run.image_processor, run.folder)
        print(f"Saved {run.folder}: Co2SForSemanticSegmentation.from_pretrained('{run.folder}')")
    found = measure(run, run.options.max_train_steps)
    accelerator.print(f"(predicting the largest class everywhere: mean IoU {100 * found.largest_class_mean_iou:.1f})")
    if accelerator.is_main_process:
        write_json(output_dir / "metrics.json", found.to_dict())
        write_json(run.folder / "metrics.json", found.to_dict())
        log = read_log(output_dir / "log.jsonl")
        draw_curves(log, output_dir / "curves.png")
        if table := pseudo_label_table(log, run.logbook.labeled_share):
            print(table)
        palette = palette_or_default(data.palette, len(data.id2label))
        shown = predict_examples(
            run.model, run.image_processor, data.validation[:NUM_SHOWN], run.options.crop_size, accelerator
        )
        draw_predictions(shown, data.id2label, palette, output_dir / "predictions.png")
        print(f"Look at {output_dir / 'predictions.png'} and {output_dir / 'curves.png'}.")
    # Delete the DistributedDataParallel wrapper before the process group ends. Otherwise PyTorch with gloo may hang at
    # the end of the program.
    run.objective, run.optimizer, run.loader = accelerator.free_memory(run.objective, run.optimizer, run.loader)
    accelerator.end_training()
    best_folder = run.best_folder if run.best_folder.exists() else None
    return Trained(run.folder, best_folder, found, data, run.record, run.model.config)


def savable(run: Run) -> Co2SForSemanticSegmentation:
    """Return the model to save.

    `co2s finetune` saves the adapter alone. `co2s train --lora` merges the LoRA updates into the model.
    """
    return merged(run.model) if has_adapter(run.model) and run.options.saved_as == "model" else run.model


def is_best(found: Evaluation, folder: Path) -> bool:
    """Return whether the fused mean IoU is higher than that of the model in the folder, if there is one."""
    path = folder / "metrics.json"
    return not path.exists() or found.scores["fused"].mean_iou > Evaluation.read(path).scores["fused"].mean_iou


__all__ = ["finish", "measure", "setup", "train", "training_step"]
