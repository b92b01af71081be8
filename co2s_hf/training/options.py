"""The options of a training run, the defaults that depend on the model, and the paper's protocol."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..data.benchmarks import BENCHMARKS
from ..data.options import DataOptions
from ..utils.errors import UserValueError


# Defaults of the options that are None. Small backbones without pretraining are seldom confident, so the threshold is
# lower.
FROM_SCRATCH = {
    "crop_size": 64,
    "per_device_train_batch_size": 16,
    "confidence_threshold": 0.6,
    "learning_rate": 1e-3,
    "train_backbones": "all",
    "backbone_lr_scale": 1.0,
    "decoder_lr_scale": 1.0,
}
PRETRAINED = {
    "crop_size": 256,
    "per_device_train_batch_size": 2,
    "confidence_threshold": 0.95,
    "learning_rate": 1e-4,
    "train_backbones": "attention",
    "backbone_lr_scale": 0.01,
    "decoder_lr_scale": 10.0,
}
# LoRA on a trained model. A tenth of the rate keeps what the decoders have learnt.
ADAPTING = {
    "per_device_train_batch_size": 4,
    "confidence_threshold": 0.95,
    "learning_rate": 1e-3,
    "train_backbones": "none",
    "backbone_lr_scale": 1.0,
    "decoder_lr_scale": 0.1,
}
DEFAULT_STEPS, ADAPTING_STEPS = 550, 200


@dataclass
class LoraOptions:
    """What LoRA updates; see [`co2s_lora_config`].

    Args:
        lora_rank: Rank of the updates.
        lora_targets: "attention", "attention+mlp", or a regular expression for names of layers.
        lora_alpha: Updates are scaled by alpha / rank. None: twice the rank.
        lora_dropout: Dropout probability before the updates.
        freeze_decoders: Do not train the decoders; the adapter is much smaller then.
        freeze_queries: Do not train DINOv3's learnable queries.
    """

    lora_rank: int = 8
    lora_targets: str = "attention"
    lora_alpha: int | None = None
    lora_dropout: float = 0.0
    freeze_decoders: bool = False
    freeze_queries: bool = False


@dataclass
class TrainingOptions(LoraOptions):
    """The options of a training run.

    None stands for a default that depends on other options; see `defaults` and `resolve_steps`.

    Args:
        clip_model, dinov3_model: Pretrained backbones (Hub name or folder). None: small ones, from scratch.
        students: Students to train.
        train_backbones: Parameters of the backbones to train.
        lora: Train low-rank updates of the backbones instead of `train_backbones`; they are merged in the end.
        method: "supervised" does not use the unlabelled images.
        recipe: "released" follows the authors' released code where it differs from the paper.
        confidence_threshold: tau: confidence from which pseudo-labels are used and a student teaches, 0 to 1.
        confidence_mode: Weights of pseudo-labels, see [`PseudoLabels.loss`].
        strong_weight: Weight of each strong view's loss, relative to the loss on labels.
        feature_dropout_weight: Weight of the loss of the perturbed features, relative to the loss on labels.
        stability_weight: lambda: final weight of the loss between the students; 0 leaves that loss out.
        labeled_loss: Loss on the labels, see [`labeled_loss`].
        class_weights: Weights of labelled pixels by class: numbers, or ["balanced"] (inverse to their frequency).
        supervised_warmup_steps: Steps on labels alone before the unlabelled images are used.
        measure_pseudo_labels: Report the accuracy of pseudo-labels, where unlabelled images have label files.
        crop_size: Side of training crops and of evaluation windows, in pixels.
        base_size: (long, short) side that training images are scaled to fit into before the random scale.
        per_device_train_batch_size: Labelled images per step and device, and as many unlabelled ones.
        gradient_accumulation_steps: Batches per step.
        max_train_steps, num_train_epochs: Length of the training; an epoch walks the longer list once.
        learning_rate: Base learning rate, that of the learnable queries.
        backbone_lr_scale, decoder_lr_scale: Factors on the base learning rate.
        gradient_checkpointing: Recompute the backbones' layers in the backward pass, to save memory.
        mixed_precision: None: what `accelerate launch` chose.
        dataloader_num_workers: Worker processes that read and crop images, per device.
        use_cpu: Stay on the CPU even if there is a GPU.
        seed: Seed of weights, order, views, drawn sets and drawn scenes.
        eval_steps, eval_epochs: Evaluate every N steps or epochs and keep the best model.
        eval_short_side: Short side that images are scaled to before they are predicted; saved with the model.
        output_dir: Folder of the run.
        overwrite_output_dir: Remove the results of an earlier run in `output_dir`.
        logging_steps: Log mean losses every N steps.
        report_to: Trackers of Accelerate.
        checkpointing_steps: Save a checkpoint every N steps; the last two are kept.
        resume_from_checkpoint: "last", or a folder of `checkpoints/`.

    Raises:
        UserValueError: A value does not fit.
    """

    saved_as: ClassVar[str] = "model"  # name of the folder that the run writes

    clip_model: str | None = None
    dinov3_model: str | None = None
    students: Literal["clip,dinov3", "clip", "dinov3"] = "clip,dinov3"
    train_backbones: Literal["attention", "all", "none"] | None = None
    lora: bool = False

    method: Literal["co2s", "supervised"] = "co2s"
    recipe: Literal["paper", "released"] = "paper"
    confidence_threshold: float | None = None
    confidence_mode: Literal["pixelwise", "pixelratio", "pixelavg"] = "pixelwise"
    strong_weight: float = 0.25
    feature_dropout_weight: float = 0.5
    stability_weight: float = 0.5
    labeled_loss: Literal["cross_entropy", "ohem"] = "cross_entropy"
    class_weights: list[str] | None = None
    supervised_warmup_steps: int | None = None
    measure_pseudo_labels: bool = False

    crop_size: int | None = None
    base_size: list[int] | None = None
    per_device_train_batch_size: int | None = None
    gradient_accumulation_steps: int = 1
    max_train_steps: int | None = None
    num_train_epochs: int | None = None
    learning_rate: float | None = None
    backbone_lr_scale: float | None = None
    decoder_lr_scale: float | None = None
    gradient_checkpointing: bool = False
    mixed_precision: Literal["no", "bf16"] | None = None
    dataloader_num_workers: int = 0
    use_cpu: bool = False
    seed: int = 0

    eval_steps: int | None = None
    eval_epochs: int | None = None
    eval_short_side: int | None = None

    output_dir: str = "outputs/train_semi"
    overwrite_output_dir: bool = False
    logging_steps: int = 50
    report_to: list[str] | None = None
    checkpointing_steps: int = 200
    resume_from_checkpoint: str | None = None

    def __post_init__(self):
        if (self.clip_model is None) != (self.dinov3_model is None):
            raise UserValueError("Give both `clip_model` and `dinov3_model`, or neither for small ones from scratch.")
        if self.lora and self.train_backbones not in (None, "none"):
            raise UserValueError(f"Give either `lora` or `train_backbones='{self.train_backbones}'`.")
        for one, other in (("max_train_steps", "num_train_epochs"), ("eval_steps", "eval_epochs")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise UserValueError(f"Give either `{one}` or `{other}`.")
        if self.overwrite_output_dir and self.resume_from_checkpoint:
            raise UserValueError("Give either `overwrite_output_dir` or `resume_from_checkpoint`.")
        if self.report_to:
            self._check_trackers()
        self._check_ranges()

    def _check_trackers(self):
        from accelerate.tracking import get_available_trackers  # costs seconds, and --help must be quick

        if unknown := set(self.report_to) - {str(tracker) for tracker in get_available_trackers()}:
            raise UserValueError(
                f"`report_to` names {', '.join(sorted(unknown))}, which is not installed (pip install it) or unknown "
                "to Accelerate."
            )

    def _check_ranges(self):
        least = {"crop_size": 8, "eval_short_side": 8, "supervised_warmup_steps": 0, "dataloader_num_workers": 0}
        least |= dict.fromkeys(("strong_weight", "feature_dropout_weight", "stability_weight"), 0)
        least |= dict.fromkeys(("max_train_steps", "num_train_epochs", "eval_steps", "eval_epochs"), 1)
        least |= dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps"), 1)
        least |= {"checkpointing_steps": 1, "lora_rank": 1}
        for name, minimum in least.items():
            if (value := getattr(self, name)) is not None and value < minimum:
                raise UserValueError(f"`{name}` is {value}; it must be at least {minimum}.")
        if self.confidence_threshold is not None and not 0 <= self.confidence_threshold <= 1:
            raise UserValueError(
                f"`confidence_threshold` is {self.confidence_threshold}; a probability lies between 0 and 1."
            )
        if self.base_size is not None and (len(self.base_size) != 2 or min(self.base_size) < 8):
            raise UserValueError(
                f"`base_size` is {self.base_size}; expected a long and a short side: `base_size=(2048, 512)`."
            )

    @property
    def stability(self) -> str:
        """How the loss between the students is computed, see [`stability_losses`]."""
        return "off" if self.stability_weight == 0 else "reference" if self.recipe == "released" else "paper"

    @property
    def defaults(self) -> dict:
        """Values for the options that are None."""
        defaults = FROM_SCRATCH if self.clip_model is None else PRETRAINED
        return defaults | ({"train_backbones": "none", "backbone_lr_scale": 1.0} if self.lora else {})

    def fill(self, defaults: dict):
        """Set the options that are None."""
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def resolve_steps(self, epoch_steps: int):
        """Compute the options that depend on the number of steps of an epoch.

        Raises:
            UserValueError: The warm-up takes the whole training.
        """
        if self.max_train_steps is None:
            self.max_train_steps = self.num_train_epochs * epoch_steps if self.num_train_epochs else DEFAULT_STEPS
        if self.eval_epochs is not None:
            self.eval_steps = self.eval_epochs * epoch_steps
        if self.method == "supervised":
            self.supervised_warmup_steps = self.max_train_steps
        elif self.supervised_warmup_steps is None:
            # Pseudo-labels of an untrained network do more harm than good.
            self.supervised_warmup_steps = 3 * self.max_train_steps // 5 if self.clip_model is None else 0
        if self.method == "co2s" and self.supervised_warmup_steps >= self.max_train_steps:
            raise UserValueError(
                f"`supervised_warmup_steps` is {self.supervised_warmup_steps} of {self.max_train_steps} steps: no "
                "unlabelled image would be used. Lower it, or train longer."
            )


@dataclass
class AdaptationOptions(TrainingOptions):
    """The options of LoRA fine-tuning: those of a training, with a trained model as the base.

    Args:
        checkpoint: Folder or Hub name of the trained model to adapt.
        text_encoder: CLIP that encodes the text of new classes. None: the base's own.
        quantize: Load the base's backbones in fewer bits, with bitsandbytes.
    """

    saved_as: ClassVar[str] = "adapter"

    checkpoint: str | None = None
    text_encoder: str | None = None
    quantize: Literal["8bit", "4bit"] | None = None
    method: Literal["co2s", "supervised"] = "supervised"
    output_dir: str = "outputs/finetune_lora"

    def __post_init__(self):
        if self.checkpoint is None:
            raise UserValueError("Name the model to adapt: `checkpoint='user/name'` or a folder.")
        super().__post_init__()

    @property
    def defaults(self) -> dict:
        """Values for the options that are None."""
        defaults = dict(ADAPTING)
        if self.max_train_steps is None and self.num_train_epochs is None:
            defaults["max_train_steps"] = ADAPTING_STEPS
        if self.method == "co2s":
            defaults["supervised_warmup_steps"] = 0
        return defaults


def follow_protocol(options: TrainingOptions, data: DataOptions):
    """Take what is None from the paper's protocol, where the data is one of its benchmarks."""
    if data.dataset is None:
        return
    benchmark = BENCHMARKS[data.dataset]
    data.partition = data.partition or f"1_{benchmark.partitions[0]}"
    protocol = {
        "crop_size": benchmark.crop_size,
        "per_device_train_batch_size": benchmark.images_per_device,
        "base_size": benchmark.base_size,
        "eval_short_side": benchmark.eval_short_side,
    }
    if options.max_train_steps is None:
        protocol["num_train_epochs"] = benchmark.num_epochs
    options.fill(protocol)
