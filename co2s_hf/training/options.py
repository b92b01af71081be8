"""The options of a training run, their defaults, and the paper's protocol."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..data.benchmarks import ALL_LABELS, BENCHMARKS
from ..data.options import DataOptions
from ..model.text_guidance_co2s import SHIPPED_BACKBONES
from ..utils.errors import UserValueError
from ..utils.ranges import check_above_zero, check_ranges


# Values for options that are None. Small backbones without pretraining are seldom confident, so their threshold is
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
# The small backbones of the package, trained as a whole.
SHIPPED = {
    "clip_model": SHIPPED_BACKBONES[0],
    "dinov3_model": SHIPPED_BACKBONES[1],
    "crop_size": 128,
    "per_device_train_batch_size": 4,
    "confidence_threshold": 0.9,
    "learning_rate": 4e-3,
    "train_backbones": "all",
    "backbone_lr_scale": 0.04,
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
# LoRA on a trained model. The decoders are trained already, so they get a tenth of the learning rate.
ADAPTING = {
    "per_device_train_batch_size": 4,
    "confidence_threshold": 0.95,
    "learning_rate": 1e-3,
    "train_backbones": "none",
    "backbone_lr_scale": 1.0,
    "decoder_lr_scale": 0.1,
}
SHIPPED_STEPS, DEFAULT_STEPS, ADAPTING_STEPS = 450, 550, 200


@dataclass
class LoraOptions:
    """Options of LoRA, see [`co2s_lora_config`].

    Args:
        lora_rank: Rank of the updates.
        lora_targets: Layers to update: "attention", "attention+mlp", or a regular expression for layer names.
        lora_alpha: The updates are scaled by alpha / rank. None: twice the rank.
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

    Some defaults depend on other options. These options are None until `fill` and `resolve_steps` set them. The
    defaults of a pair of backbones are in `SHIPPED`, `PRETRAINED` (any other pair) and `FROM_SCRATCH`.

    Args:
        clip_model, dinov3_model: Pretrained backbones (Hub name, shipped name or folder). None: the two small ones
            that ship with this package.
        from_scratch: Train small backbones from random weights instead.
        students: Students to train.
        train_backbones: Parameters of the backbones to train, see [`Co2SForSemanticSegmentation.freeze_backbones`].
        lora: Train LoRA updates of the backbones instead of `train_backbones`. They are merged at the end.
        method: "supervised" does not use the unlabelled images.
        recipe: "balanced" keeps pseudo-labels of every class, see [`Balance`]. "paper" is the method of the paper.
            "released" follows the authors' released code where it differs from the paper.
        confidence_threshold: tau: lowest confidence of pseudo-labels and of a student that teaches, 0 to 1.
        confidence_mode: Weights of pseudo-labels, see [`PseudoLabels.loss`].
        strong_weight: Weight of the loss on each strong view, relative to the loss on labels. With the recipe
            "balanced", the only strong view has the weight `2 * strong_weight + feature_dropout_weight`.
        feature_dropout_weight: Weight of the loss on perturbed features, relative to the loss on labels.
        stability_weight: lambda: final weight of the loss between the students; 0 leaves that loss out. Not with the
            recipe "balanced".
        labeled_loss: Loss on the labels, see [`labeled_loss`].
        class_weights: Loss weight of each class: one number per class, or ["balanced"] (inverse to its frequency).
        supervised_warmup_steps: Steps on labelled images alone, before unlabelled images are used. None: the warm-up
            of the recipe "balanced" ends by itself, see [`WarmUp`]; other recipes have a number that fits the model.
        measure_pseudo_labels: Report the accuracy of pseudo-labels on unlabelled images that have label files.
        crop_size: Side of training crops and of evaluation windows, in pixels.
        base_size: (long, short) side in pixels that training images are resized to fit into, before random scaling.
        per_device_train_batch_size: Labelled images per batch and device, and as many unlabelled ones.
        gradient_accumulation_steps: Batches per optimizer step.
        max_train_steps, num_train_epochs: Length of the training. An epoch passes once over the longer list of images.
        learning_rate: Base learning rate. The learnable queries use it unchanged.
        backbone_lr_scale, decoder_lr_scale: Factors on the base learning rate, for backbones and decoders.
        gradient_checkpointing: Recompute the backbones' layers in the backward pass, to save memory.
        mixed_precision: Precision of the training. None: the choice of `accelerate launch`. A CPU without bfloat16
            instructions uses "no" instead of "bf16".
        dataloader_num_workers: Worker processes that read and crop images, per device. None: 0 on a CPU; on a GPU one
            per CPU core, at most 8, see [`default_num_workers`].
        use_cpu: Use the CPU even if there is a GPU.
        seed: Seed of all random numbers: weights, order of the images, views, drawn sets and scenes.
        eval_steps, eval_epochs: Evaluate every N steps or epochs and keep the best model.
        eval_short_side: Short side in pixels that images are resized to for prediction; saved with the model.
        output_dir: Folder of the run.
        overwrite_output_dir: Remove the results of an earlier run in `output_dir`.
        logging_steps: Log mean losses every N steps.
        report_to: Names of trackers of Accelerate, such as ["tensorboard"].
        checkpointing_steps: Save a checkpoint every N steps; the last two are kept.
        resume_from_checkpoint: "last", or a folder in `checkpoints/`. None: start from the beginning.

    Raises:
        UserValueError: A value is out of range, or two options exclude each other.
    """

    saved_as: ClassVar[str] = "model"  # name of the folder that the run writes

    clip_model: str | None = None
    dinov3_model: str | None = None
    from_scratch: bool = False
    students: Literal["clip,dinov3", "clip", "dinov3"] = "clip,dinov3"
    train_backbones: Literal["attention", "all", "none"] | None = None
    lora: bool = False

    method: Literal["co2s", "supervised"] = "co2s"
    recipe: Literal["balanced", "paper", "released"] = "balanced"
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
    dataloader_num_workers: int | None = None
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
            raise UserValueError(
                "Give both `clip_model` and `dinov3_model`, or neither (the small ones of this package)."
            )
        if self.from_scratch and self.clip_model is not None:
            raise UserValueError("Give either `from_scratch`, or `clip_model` and `dinov3_model`.")
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
        if self.recipe == "balanced" and self.stability_weight != TrainingOptions.stability_weight:
            raise UserValueError(
                f"`stability_weight` is {self.stability_weight}; it has an effect with `recipe='paper'` and "
                "`recipe='released'` only. With \"balanced\", the fused pseudo-labels teach both students."
            )

    def _check_trackers(self):
        from accelerate.tracking import get_available_trackers  # takes seconds, and --help must be quick

        if unknown := set(self.report_to) - {str(tracker) for tracker in get_available_trackers()}:
            raise UserValueError(
                f"`report_to` names {', '.join(sorted(unknown))}, which is not installed or unknown to Accelerate. "
                "Install it with pip, or correct the name."
            )

    def _check_ranges(self):
        least = {"crop_size": 8, "eval_short_side": 8, "supervised_warmup_steps": 0, "dataloader_num_workers": 0}
        least |= dict.fromkeys(("strong_weight", "feature_dropout_weight", "stability_weight"), 0)
        least |= dict.fromkeys(("max_train_steps", "num_train_epochs", "eval_steps", "eval_epochs"), 1)
        least |= dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps"), 1)
        least |= {"checkpointing_steps": 1, "lora_rank": 1, "lora_alpha": 1, "lora_dropout": 0, "seed": 0}
        check_ranges(self, least | dict.fromkeys(("backbone_lr_scale", "decoder_lr_scale"), 0))
        check_above_zero(self, "learning_rate")
        if self.lora_dropout >= 1:
            raise UserValueError(f"`lora_dropout` is {self.lora_dropout}; it must be less than 1.")
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
        """Mode of the loss between the students: "paper", "reference" or "off", see [`Co2SObjective`]."""
        return "off" if self.stability_weight == 0 else "reference" if self.recipe == "released" else "paper"

    @property
    def longest_warmup(self) -> int:
        """Largest number of steps of the warm-up, after [`resolve_steps`]."""
        if self.supervised_warmup_steps is not None:
            return self.supervised_warmup_steps
        return (3 if self.from_scratch else 2) * self.max_train_steps // 5

    @property
    def has_shipped_backbones(self) -> bool:
        """Whether both backbones are those that ship with this package."""
        names = (self.clip_model, self.dinov3_model)
        return not self.from_scratch and names in ((None, None), SHIPPED_BACKBONES)

    @property
    def defaults(self) -> dict:
        """Values for options that are None."""
        defaults = FROM_SCRATCH if self.from_scratch else SHIPPED if self.has_shipped_backbones else PRETRAINED
        return defaults | ({"train_backbones": "none", "backbone_lr_scale": 1.0} if self.lora else {})

    def fill(self, defaults: dict):
        """Set options that are None to these values."""
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def resolve_steps(self, epoch_steps: int):
        """Set the options that depend on the number of steps.

        Args:
            epoch_steps: Number of steps of an epoch.

        Raises:
            UserValueError: The warm-up is as long as the training, or longer.
        """
        if self.max_train_steps is None:
            default = SHIPPED_STEPS if self.has_shipped_backbones else DEFAULT_STEPS
            self.max_train_steps = self.num_train_epochs * epoch_steps if self.num_train_epochs else default
        if self.eval_epochs is not None:
            self.eval_steps = self.eval_epochs * epoch_steps
        if self.method == "supervised":
            self.supervised_warmup_steps = self.max_train_steps
        elif self.supervised_warmup_steps is None and self.recipe != "balanced":
            # Pseudo-labels of an untrained model do more harm than good.
            if self.from_scratch:
                self.supervised_warmup_steps = 3 * self.max_train_steps // 5
            else:
                self.supervised_warmup_steps = self.max_train_steps // 3 if self.has_shipped_backbones else 0
        if self.method == "co2s" and self.longest_warmup >= self.max_train_steps:
            raise UserValueError(
                f"`supervised_warmup_steps` is {self.supervised_warmup_steps} of {self.max_train_steps} steps: no "
                "unlabelled image would be used. Lower it, or train longer."
            )


@dataclass
class AdaptationOptions(TrainingOptions):
    """The options of LoRA fine-tuning: the options of a training, and the trained model to adapt.

    Args:
        checkpoint: Folder or Hub name of the trained model to adapt.
        text_encoder: CLIP model that encodes the text of the classes. None: that of the base.
        quantize: Load the backbones of the base in 8 or 4 bits, with bitsandbytes. None: do not quantize.
    """

    saved_as: ClassVar[str] = "adapter"

    checkpoint: str | None = None
    text_encoder: str | None = None
    quantize: Literal["8bit", "4bit"] | None = None
    method: Literal["co2s", "supervised"] = "supervised"
    output_dir: str = "outputs/finetune_lora"

    def __post_init__(self):
        if self.checkpoint is None:
            raise UserValueError("Name the model to adapt: `checkpoint='user/name'`, or its folder.")
        super().__post_init__()

    @property
    def defaults(self) -> dict:
        """Values for options that are None."""
        defaults = dict(ADAPTING)
        if self.max_train_steps is None and self.num_train_epochs is None:
            defaults["max_train_steps"] = ADAPTING_STEPS
        if self.method == "co2s":
            defaults["supervised_warmup_steps"] = 0
        return defaults


def follow_protocol(options: TrainingOptions, data: DataOptions):
    """If the data is a benchmark of the paper, set options that are None to the values of the paper.

    Raises:
        UserValueError: All images of the benchmark are labelled, and the method needs unlabelled images.
    """
    if data.dataset is None:
        return
    benchmark = BENCHMARKS[data.dataset]
    if data.partition == ALL_LABELS and options.method != "supervised":
        raise UserValueError(
            f"`partition` is '{ALL_LABELS}' and `method` is '{options.method}'. With all labels there are no "
            "unlabelled images, which this method needs. Train on the labels alone: `method='supervised'`. Or choose "
            f"a share: `partition='1_{benchmark.partitions[0]}'`."
        )
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
