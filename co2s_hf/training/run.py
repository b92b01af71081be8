"""The state of a training run, and the functions that make its data, losses and batches."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Subset

from ..data.drawn_scenes import write_scenes
from ..data.options import DataOptions
from ..data.samples import PairedViews, RareClasses
from ..data.sources import Source, open_source
from ..data.splits import SPLITS
from ..data.validation.report import announce
from ..model.configuration_co2s import Co2SConfig
from ..model.image_processing_co2s import Co2SImageProcessor
from ..model.modeling_co2s import Co2SForSemanticSegmentation
from ..utils.devices import default_num_workers, make_accelerator
from ..utils.errors import UserValueError
from .checkpoints import checkpoint_step
from .class_balance import BALANCES
from .evaluation import Evaluation
from .logbook import Logbook, NonFiniteGuard
from .mean_teacher import TaughtObjective
from .objective import Co2SObjective
from .optimization import balanced_class_weights
from .options import TrainingOptions
from .warmup import WarmUp


@dataclass
class Run:
    """The state that all steps of a training run share.

    Args:
        options: Options of the training, with all defaults filled in.
        data_options: Options that the data was opened with.
        accelerator: Accelerate's state of this process.
        data: The opened data.
        model: The model, without Accelerate's wrapper.
        image_processor: Image processor of the model.
        objective: The model with its losses, prepared by Accelerate.
        optimizer: Optimizer, prepared by Accelerate.
        scheduler: Learning rate schedule. Accelerate does not wrap it: a wrapped schedule would advance by the number
            of processes in every step.
        items: Items of the whole training.
        loader: Loader of the remaining batches, prepared by Accelerate. During a warm-up that ends by itself: of the
            remaining batches of the warm-up.
        warm_up: Length of the warm-up.
        checkpoint: Checkpoint that the run was resumed from. None for a new run.
        record: Everything that is needed to repeat the run, see [`make_record`].
        logbook: Averages and logs the losses.
        guard: Finds steps whose loss is not finite.
        step_batches: Losses and image names of the batches of the current step so far.
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
    items: PairedViews
    loader: DataLoader
    warm_up: WarmUp
    checkpoint: Path | None
    record: dict
    logbook: Logbook
    guard: NonFiniteGuard
    step_batches: list[tuple[dict[str, torch.Tensor], list[str]]] = field(default_factory=list)

    @property
    def output_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.options.output_dir)

    @property
    def folder(self) -> Path:
        """Folder of the trained model, or of the adapter."""
        return self.output_dir / self.options.saved_as

    @property
    def best_folder(self) -> Path:
        """Folder of the model with the best evaluation. It exists only if the run evaluates during the training."""
        return self.output_dir / f"best_{self.options.saved_as}"

    @property
    def steps_done(self) -> int:
        """Number of steps of the checkpoint that the run was resumed from; 0 for a new run."""
        return 0 if self.checkpoint is None else checkpoint_step(self.checkpoint)


@dataclass(frozen=True)
class Trained:
    """The result of a training.

    Args:
        folder: Folder of the trained model, or of the adapter.
        best_folder: Folder of the model with the best evaluation. None without evaluations during the training.
        evaluation: Evaluation of the trained model.
        data: The opened data.
        record: Everything that is needed to repeat the run, see [`make_record`].
        config: Configuration of the trained model.
    """

    folder: Path
    best_folder: Path | None
    evaluation: Evaluation
    data: Source
    record: dict
    config: Co2SConfig


def start_accelerate(options: TrainingOptions) -> Accelerator:
    """Make the Accelerator of the run. Fill in the options that depend on it: precision and worker processes."""
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
    options.fill({"dataloader_num_workers": default_num_workers(accelerator.device)})
    return accelerator


def drawn_folder(options: TrainingOptions) -> Path:
    """Return the folder of the scenes of `data="drawn"`."""
    return Path(options.output_dir).parent / f"scenes-seed{options.seed}"


def draw_scenes(folder: Path, seed: int):
    """Draw the scenes of `data="drawn"`."""
    print(f"Drawing scenes into {folder}.")
    write_scenes(folder, num_labeled=8, num_unlabeled=120, num_validation=24, seed=seed)


def open_data(
    options: TrainingOptions, data_options: DataOptions, accelerator: Accelerator, config: Co2SConfig | None
) -> Source:
    """Open and check the data, and print what it contains. Draw the scenes of `data="drawn"` first."""
    is_main = accelerator.is_main_process
    data_options.fill()
    if data_options.data == "drawn":
        data_options.data = None
        data_options.data_dir = str(drawn_folder(options))
        if is_main and not Path(data_options.data_dir).exists():
            draw_scenes(Path(data_options.data_dir), options.seed)
    needed = SPLITS if options.method == "co2s" else ("labeled", "validation")
    hidden = options.measure_pseudo_labels and options.method == "co2s"
    if options.measure_pseudo_labels and not hidden:
        accelerator.print("`measure_pseudo_labels` has no effect: `method='supervised'` makes no pseudo-labels.")
    with accelerator.main_process_first():  # the other processes find its results in the cache
        data = open_source(
            data_options, options.seed, progress=is_main, with_hidden_labels=hidden, config=config, needed=needed
        )
    if hidden and not any(data.scans["unlabeled"].labels):
        raise UserValueError("`measure_pseudo_labels` needs label maps of unlabelled images, but there are none.")
    if is_main:
        announce(data)
    if data.class_concepts is None and config is None and not options.from_scratch:
        accelerator.print(
            "The classes have no names, so random vectors guide CLIP instead of text. To use text, name the classes "
            "in classes.json."
        )
    if len(data.labeled) < options.per_device_train_batch_size:
        accelerator.print(
            f"{len(data.labeled)} labelled images make batches of {options.per_device_train_batch_size}: a batch "
            "contains some images more than once, in different views."
        )
    return data


def read_class_weights(options: TrainingOptions, data: Source) -> torch.Tensor | None:
    """Return the class weights (classes,); None if `class_weights` is not given.

    Raises:
        UserValueError: The number of weights is not the number of classes, or a weight is negative or not finite.
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
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise UserValueError(
            f"`class_weights` is {' '.join(options.class_weights)}; expected finite numbers of at least 0, not all of "
            "them 0. Give one number per class, or 'balanced'."
        )
    return torch.tensor(weights)


def make_objective(
    options: TrainingOptions,
    model: Co2SForSemanticSegmentation,
    class_weights: torch.Tensor | None,
    data: Source,
    accelerator: Accelerator,
) -> Co2SObjective:
    """Make the objective (the model with its losses) for the options."""
    balance = BALANCES[options.recipe]
    is_taught = balance.teacher_decay is not None and options.method == "co2s"
    kind = TaughtObjective if is_taught else Co2SObjective
    return kind(
        model,
        students=tuple(options.students.split(",")),
        threshold=options.confidence_threshold,
        strong_weight=options.strong_weight,
        feature_dropout_weight=options.feature_dropout_weight,
        stability=options.stability,
        counts_padding=options.recipe == "released",
        confidence_mode=options.confidence_mode,
        labeled_loss=options.labeled_loss,
        class_weights=class_weights,
        balance=balance,
        labeled_share=torch.tensor(data.labeled_share, dtype=torch.float32),
        accelerator=accelerator,
    )


def make_items(options: TrainingOptions, data: Source, images_per_step: int, warmup_steps: int) -> PairedViews:
    """Make the items of the whole training.

    Args:
        options: Options of the training, with all defaults filled in.
        data: The opened data.
        images_per_step: Labelled images per step, of all processes together.
        warmup_steps: Number of steps of the warm-up, which use labelled images alone.
    """
    partner = "another" if options.per_device_train_batch_size == 1 else None
    temperature = BALANCES[options.recipe].rare_class_temperature
    rare_classes = None
    if temperature is not None:
        counts = [facts.counts for facts in data.scans["labeled"].labels]
        rare_classes = RareClasses(counts, len(data.id2label), temperature)
    return PairedViews(
        data.labeled,
        data.unlabeled,
        options.crop_size,
        length=options.max_train_steps * images_per_step,
        num_labeled_only=warmup_steps * images_per_step,
        seed=options.seed,
        partner="same" if options.recipe == "released" else partner,
        with_hidden_labels=options.measure_pseudo_labels,
        base_size=options.base_size,
        rare_classes=rare_classes,
    )


def make_loader(
    options: TrainingOptions, items: PairedViews, warm_up: WarmUp, first_item: int, accelerator: Accelerator
) -> DataLoader:
    """Make the loader of the batches that are still to do. Accelerate prepares it.

    Args:
        options: Options of the training, with all defaults filled in.
        items: Items of the whole training.
        warm_up: The warm-up. As long as its end is not known, the loader has its steps only.
        first_item: Number of items that are done already. Item n is the same in a new and in a resumed run.
        accelerator: Accelerate's state of the run.
    """
    end = items.num_labeled_only if warm_up.end is None else len(items)
    loader = DataLoader(
        Subset(items, range(first_item, end)),
        batch_size=options.per_device_train_batch_size,
        num_workers=options.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    return accelerator.prepare(loader)


def batches(run: Run) -> Iterator[dict]:
    """Yield the batches that are still to do. After a warm-up that ended by itself, go on with another loader."""
    if run.warm_up.end is None:
        for batch in run.loader:
            yield batch
            if run.warm_up.end is not None:
                break
        run.loader.end()  # otherwise Accelerate takes the loader for the active one
        run.items.num_labeled_only = run.warm_up.end * images_per_step(run.options, run.accelerator)
        run.loader = make_loader(run.options, run.items, run.warm_up, run.items.num_labeled_only, run.accelerator)
    yield from run.loader


def images_per_step(options: TrainingOptions, accelerator: Accelerator) -> int:
    """Return the number of labelled images of one step, of all processes together."""
    per_process = options.per_device_train_batch_size * options.gradient_accumulation_steps
    return per_process * accelerator.num_processes


__all__ = [
    "Run",
    "Trained",
    "batches",
    "draw_scenes",
    "drawn_folder",
    "images_per_step",
    "make_items",
    "make_loader",
    "make_objective",
    "open_data",
    "read_class_weights",
    "start_accelerate",
]
