"""The options of a pretraining."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal

from ...utils.errors import UserFileNotFoundError, UserValueError
from ...utils.ranges import check_above_zero, check_ranges


@dataclass
class PretrainingOptions:
    """Options that both kinds of pretraining share.

    Args:
        images: Folders of images. Labels are not needed.
        exclude: Text file that names images to leave out, such as the list of the validation images.
        teacher: Vision transformer whose patch features are learned (Hub name or folder). None: no teacher.
        teacher_layer: Layer of the teacher, counted from 1. None: the last one.
        cache_features: Compute the teacher's features once and keep them on the disk. False: compute them in every
            step.
        cache_dir: Folder of these features. None: `teacher_features` in `output_dir`.
        init: Backbone to start from (Hub name or folder). None: random weights of the sizes below.
        hidden_size, num_hidden_layers, num_attention_heads, patch_size: Sizes of a new backbone.
        tile_size: Images are cut into tiles of this side, in pixels.
        crop_size: Side of training crops in pixels.
        per_device_train_batch_size: Crops per step and device.
        max_train_steps: Number of steps.
        learning_rate: Highest learning rate. It rises in the first twentieth of the steps, then falls along a cosine.
        mixed_precision: Precision of the training. None: the choice of `accelerate launch`.
        dataloader_num_workers: Worker processes that read and crop images, per device.
        use_cpu: Use the CPU even if there is a GPU.
        seed: Seed of the weights, the order of the tiles and the crops.
        output_dir: Folder of the run. The backbone is written to its subfolder `model`.
        overwrite_output_dir: Remove the results of an earlier pretraining in `output_dir`.
        logging_steps: Log the mean losses every N steps.
        checkpointing_steps: Save a checkpoint every N steps; the last two are kept.
        resume: Continue from the last checkpoint in `output_dir`.

    Raises:
        UserValueError: A value is out of range, or two options exclude each other.
        UserFileNotFoundError: A folder or a file does not exist.
    """

    SIZES: ClassVar[tuple[str, ...]] = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size")

    images: list[str] = field(default_factory=list)
    exclude: str | None = None
    teacher: str | None = None
    teacher_layer: int | None = None
    cache_features: bool = True
    cache_dir: str | None = None
    init: str | None = None
    hidden_size: int = 160
    num_hidden_layers: int = 6
    num_attention_heads: int = 5
    patch_size: int = 8
    tile_size: int = 256
    crop_size: int = 128
    per_device_train_batch_size: int = 16
    max_train_steps: int = 5000
    learning_rate: float = 1e-3
    mixed_precision: Literal["no", "bf16"] | None = None
    dataloader_num_workers: int = 0
    use_cpu: bool = False
    seed: int = 0
    output_dir: str = "outputs/pretrain"
    overwrite_output_dir: bool = False
    logging_steps: int = 50
    checkpointing_steps: int = 500
    resume: bool = False

    def __post_init__(self):
        if not self.images:
            raise UserValueError("Name at least one folder of images: `images=['my_images']`.")
        for folder in self.images:
            if not Path(folder).is_dir():
                raise UserFileNotFoundError(f"`images` names '{folder}', which is not a folder.")
        if self.overwrite_output_dir and self.resume:
            raise UserValueError("Give either `overwrite_output_dir` or `resume`.")
        for name in ("teacher_layer", "cache_dir"):
            if getattr(self, name) is not None and self.teacher is None:
                raise UserValueError(f"`{name}` is {getattr(self, name)}; it has no effect without a `teacher`.")
        if self.exclude is not None and not Path(self.exclude).is_file():
            raise UserFileNotFoundError(f"`exclude` is '{self.exclude}', which does not exist.")
        self._check_caching()
        self._check_ranges()
        if self.init is None:
            self.check_grid(self.patch_size)
        else:
            self._check_no_sizes()

    def _check_caching(self):
        if not self.cache_features and self.cache_dir is not None:
            raise UserValueError(f"`cache_dir` is '{self.cache_dir}'; it has no effect with `cache_features=False`.")
        if self.teacher is not None and not self.cache_features and self.dataloader_num_workers:
            raise UserValueError(
                f"`dataloader_num_workers` is {self.dataloader_num_workers}; worker processes read cached features "
                "only. Give `dataloader_num_workers=0` together with `cache_features=False`."
            )

    def _check_no_sizes(self):
        """Refuse sizes together with `init`. A size that is given, but equal to the default, cannot be told apart."""
        defaults = {f.name: f.default for f in fields(self)}
        for name in self.SIZES:
            if getattr(self, name) != defaults[name]:
                raise UserValueError(
                    f"`{name}` is {getattr(self, name)}; it has no effect with `init`, whose sizes are kept. Give "
                    "either `init` or sizes."
                )

    def _check_ranges(self):
        names = (*self.SIZES, "tile_size", "crop_size", "per_device_train_batch_size", "max_train_steps")
        check_ranges(self, dict.fromkeys((*names, "logging_steps", "checkpointing_steps", "teacher_layer"), 1))
        check_ranges(self, {"dataloader_num_workers": 0, "seed": 0})
        check_above_zero(self, "learning_rate")
        if self.hidden_size % (4 * self.num_attention_heads):
            raise UserValueError(
                f"`hidden_size` is {self.hidden_size}; it must be a multiple of 4 for each of the "
                f"{self.num_attention_heads} `num_attention_heads`."
            )
        if self.crop_size > self.tile_size:
            raise UserValueError(
                f"`crop_size` is {self.crop_size}; it must not be larger than `tile_size`, which is {self.tile_size}."
            )

    def check_grid(self, patch_size: int):
        """Check that crops and tiles consist of whole patches.

        Raises:
            UserValueError: They do not.
        """
        for name in ("tile_size", "crop_size"):
            if getattr(self, name) % patch_size:
                raise UserValueError(
                    f"`{name}` is {getattr(self, name)}; it must be a multiple of the backbone's patches of "
                    f"{patch_size} px, so that the grids of patches agree."
                )


@dataclass
class Dinov3Options(PretrainingOptions):
    """Options of the pretraining of a DINOv3 backbone: distillation from a teacher, or masked images without one."""

    output_dir: str = "outputs/pretrain_dinov3"


@dataclass
class ClipOptions(PretrainingOptions):
    """Options of the pretraining of a CLIP model from tags or captions.

    The text encoder has one attention head per 32 numbers of its width.

    Args:
        image_labels: CSV file with the columns `image` (path relative to the CSV file) and `tags` (words separated by
            spaces; a hyphen stands for a space) or `caption`. Images that it does not name only learn from the
            teacher.
        held_out_fraction: Share of the tagged images that are not trained on, to measure the tags.
        projection_dim: Width of the common space of images and text.
        text_hidden_size, text_num_hidden_layers: Sizes of a new text encoder.
    """

    SIZES: ClassVar[tuple[str, ...]] = (
        *PretrainingOptions.SIZES,
        "projection_dim",
        "text_hidden_size",
        "text_num_hidden_layers",
    )

    image_labels: str | None = None
    held_out_fraction: float = 0.1
    projection_dim: int = 128
    text_hidden_size: int = 128
    text_num_hidden_layers: int = 3
    output_dir: str = "outputs/pretrain_clip"

    def __post_init__(self):
        if self.image_labels is None:
            raise UserValueError("Name the tags or captions of the images: `image_labels='labels.csv'`.")
        if not Path(self.image_labels).is_file():
            raise UserFileNotFoundError(f"`image_labels` is '{self.image_labels}', which does not exist.")
        if not 0 <= self.held_out_fraction < 1:
            raise UserValueError(
                f"`held_out_fraction` is {self.held_out_fraction}; expected a share from 0 to below 1, such as 0.1."
            )
        super().__post_init__()
        if self.text_hidden_size % self.text_num_attention_heads:
            raise UserValueError(
                f"`text_hidden_size` is {self.text_hidden_size}; it must be a multiple of 32, or below 64."
            )

    @property
    def text_num_attention_heads(self) -> int:
        """Attention heads of a new text encoder."""
        return max(1, self.text_hidden_size // 32)


__all__ = ["ClipOptions", "Dinov3Options", "PretrainingOptions"]
