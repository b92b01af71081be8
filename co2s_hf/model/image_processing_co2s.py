"""Image processor of Co2S (images to tensors, logits to label maps), and the pipeline.

The processor needs Pillow and NumPy, but not torchvision.
"""

import math
from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import ImageSegmentationPipeline
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ImageInput,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType, logging


if TYPE_CHECKING:
    from .configuration_co2s import Co2SConfig
    from .modeling_co2s import Co2SSemanticSegmenterOutput

logger = logging.get_logger(__name__)

IGNORE_INDEX = 255
LARGEST_SIDE = 2**14  # of a resized image, in pixels: a file of a stranger must not take all memory


class Co2SImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    do_reduce_labels (`bool`, *optional*, defaults to `self.do_reduce_labels`):
        Whether to subtract 1 from all labels of segmentation maps, and to change 0 to 255. Use it for data sets in
        which 0 means "no class" and the classes start at 1.
    """

    do_reduce_labels: bool


class Co2SImageProcessor(PilBackend):
    r"""
    Prepare images and segmentation maps for [`Co2SForSemanticSegmentation`], and turn its outputs into label maps.

    Images must be 8-bit RGB or grey. Grey is repeated for three bands. One image or a list is accepted: PIL images,
    NumPy arrays or tensors, with channels first or last. The values are scaled to 0..1 and normalised with ImageNet's
    statistics; the model converts them to the statistics of its two backbones. By default images keep their size,
    because the model accepts any size.

    Args:
        do_resize (`bool`, *optional*, defaults to `False`):
            Whether to resize to `size`: images bilinearly, segmentation maps to the nearest label.
        size (`dict`, *optional*):
            `{"height": ..., "width": ...}` or `{"shortest_edge": ...}`, in pixels.
        do_rescale (`bool`, *optional*, defaults to `True`):
            Whether to multiply by `rescale_factor` (1/255).
        rescale_factor (`float`, *optional*, defaults to `1/255`):
            Factor of `do_rescale`. It must be finite and above 0.
        do_normalize (`bool`, *optional*, defaults to `True`):
            Whether to subtract `image_mean` and divide by `image_std`.
        image_mean, image_std (`float` or `list[float]`, *optional*, default to ImageNet's statistics):
            One number per band, or one number for all bands. All must be finite, and those of `image_std` above 0. A
            list also sets the number of bands that images must have.
        do_reduce_labels (`bool`, *optional*, defaults to `False`):
            Whether to subtract 1 from all labels, see [`Co2SImageProcessorKwargs`].

    Raises:
        ValueError: `image_mean`, `image_std` or `rescale_factor` has a value that is not allowed.
    """

    valid_kwargs = Co2SImageProcessorKwargs
    model_input_names = ["pixel_values"]

    do_resize = False
    size = None
    resample = PILImageResampling.BILINEAR
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    do_reduce_labels = False

    def __init__(self, **kwargs: Unpack[Co2SImageProcessorKwargs]):
        super().__init__(**kwargs)

    @classmethod
    def from_model_config(cls, config: "Co2SConfig", **kwargs) -> "Co2SImageProcessor":
        """Build an image processor with the image statistics of a model.

        Args:
            config: Configuration of the model.
            kwargs: Further settings of the processor, such as `do_reduce_labels`.

        Returns:
            The image processor.
        """
        return cls(image_mean=list(config.image_mean), image_std=list(config.image_std), **kwargs)

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        **kwargs: Unpack[Co2SImageProcessorKwargs],
    ) -> BatchFeature:
        """Prepare images and, for training and evaluation, their segmentation maps.

        Args:
            images: One image or a list. The values are 0..255, as integers or floating point (0..1 with
                `do_rescale=False`).
            segmentation_maps: One map or a list: PIL image, array or tensor (height, width) of class indices, 255
                for pixels to ignore.
            kwargs: Settings of the processor to override in this call. `return_tensors="pt"` returns tensors.

        Returns:
            `pixel_values` (batch, channels, height, width), float32. With segmentation maps also `labels` (batch,
            height, width), int64.

        Raises:
            ValueError: An image is empty, contains NaN or infinity, or is not 8-bit RGB or grey; a map does not fit
                its image; or a setting is not supported or has a value that is not allowed.
        """
        return super().preprocess(images, segmentation_maps, **kwargs)

    def _standardize_kwargs(self, **kwargs) -> dict:
        """Check the settings. The base class calls this for the processor's own settings and for those of a call."""
        settings = super()._standardize_kwargs(**kwargs)
        _check_statistics(settings["image_mean"], settings["image_std"], settings.get("rescale_factor"))
        if settings.get("do_resize"):
            _check_resizing(settings["size"], settings.get("resample"))
        return settings

    def _preprocess_image_like_inputs(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None,
        do_rescale: bool,
        input_data_format: str | None,
        return_tensors: str | TensorType | None,
        **kwargs,
    ) -> BatchFeature:
        unsupported = {"do_center_crop": None, "do_pad": None, "data_format": "channels_first"}
        for name, default in unsupported.items():
            if kwargs.get(name) not in (None, False, default):
                raise ValueError(
                    f"`{name}={kwargs[name]}` is not supported. Leave it out: the model accepts images of any size."
                )
        num_channels = _count_bands(kwargs["image_mean"], kwargs["image_std"], self.image_mean, self.image_std)
        convert = bool(kwargs.get("do_convert_rgb"))
        arrays = [
            _image_to_array(image, num_channels, input_data_format, convert, index)
            for index, image in enumerate(self._flatten(images))
        ]
        if not arrays:
            raise ValueError("No image was given; pass at least one.")
        for index, array in enumerate(arrays):
            _check_values(array, do_rescale, index)
        pixel_values = [self._prepare_image(array, do_rescale=do_rescale, **kwargs) for array in arrays]
        sizes = sorted({image.shape[-2:] for image in pixel_values})
        if return_tensors is not None and len(sizes) > 1:
            raise ValueError(
                f"Images of different sizes (height, width) {sizes} cannot form one tensor. Pass `do_resize=True` "
                "with `size={'height': ..., 'width': ...}`, process them one at a time, or leave out `return_tensors`."
            )
        data = {"pixel_values": pixel_values}
        if segmentation_maps is not None:
            maps = [_map_to_array(map_, index) for index, map_ in enumerate(self._flatten(segmentation_maps))]
            _check_maps_fit(maps, arrays)
            data["labels"] = [
                _prepare_map(map_, image.shape[-2:], kwargs["do_reduce_labels"])
                for map_, image in zip(maps, pixel_values)
            ]
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _flatten(self, images: ImageInput) -> list:
        """Turn one image, a batch or a nested list into a list of images. Images may be two-dimensional."""
        if isinstance(images, list | tuple):
            return [image for entry in images for image in self._flatten(entry)]
        images = self.fetch_images(images)
        return list(images) if getattr(images, "ndim", 0) == 4 else [images]

    def _prepare_image(
        self,
        image: np.ndarray,
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | list[float],
        image_std: float | list[float],
        **kwargs,
    ) -> np.ndarray:
        """Resize, rescale and normalise one image (channels, height, width)."""
        if do_resize:
            image = self.resize(image, size, resample)
        if do_rescale:
            image = self.rescale(image, rescale_factor)
        if do_normalize:
            image = self.normalize(image, image_mean, image_std)
        return image.astype(np.float32)

    def post_process_semantic_segmentation(
        self,
        outputs: "Co2SSemanticSegmenterOutput",
        target_sizes: list[tuple[int, int]] | torch.Tensor | None = None,
        return_segmentation_scores: bool = False,
    ) -> list[torch.Tensor] | list[SemanticSegmentationPostProcessorOutput]:
        """Turn fused logits into label maps.

        Args:
            outputs: Output of the model.
            target_sizes: (height, width) per image, to which the probabilities are resized bilinearly. None: keep the
                size of the input.
            return_segmentation_scores: Also return the fused class probabilities.

        Returns:
            For each image a label map (height, width), int64. With scores, an object for each image instead:
            `segmentation` is the label map, and `segmentation_scores` (classes, height, width) are the fused
            probabilities, 0 to 1.

        Raises:
            ValueError: The number of target sizes is not the batch size.
        """
        probabilities = outputs.logits.float().softmax(dim=1)
        if target_sizes is None:
            target_sizes = [probabilities.shape[-2:]] * len(probabilities)
        if len(target_sizes) != len(probabilities):
            raise ValueError(
                f"{len(target_sizes)} target sizes were given for a batch of {len(probabilities)} images; give one "
                "(height, width) per image."
            )
        results = []
        for scores, size in zip(probabilities, target_sizes):  # (classes, height, width) of one image
            size = tuple(int(side) for side in size)
            if size != scores.shape[-2:]:
                scores = F.interpolate(scores.unsqueeze(0), size=size, mode="bilinear", align_corners=False)[0]
            results.append(
                SemanticSegmentationPostProcessorOutput(
                    data={"segmentation": scores.argmax(dim=0), "segmentation_scores": scores}
                )
            )
        return results if return_segmentation_scores else [result.segmentation for result in results]


def _check_statistics(mean: float | list[float] | None, std: float | list[float] | None, rescale_factor: float | None):
    """Refuse statistics that would turn every image into the same values, or into NaN or infinity."""
    for name, values, lowest in (("image_mean", mean, -math.inf), ("image_std", std, 0.0)):
        listed = list(values) if isinstance(values, list | tuple | np.ndarray) else [values]
        if values is None or (listed and all(_is_number(value) and lowest < value < math.inf for value in listed)):
            continue
        bound = " above 0" if lowest == 0 else ""
        raise ValueError(
            f"`{name}` is {values}; expected finite numbers{bound}, one per band. Correct the call, or `{name}` in "
            "preprocessor_config.json."
        )
    counts = {len(values) for values in (mean, std) if isinstance(values, list | tuple | np.ndarray)}
    if len(counts) > 1:
        raise ValueError(
            f"`image_mean` has {len(mean)} values and `image_std` has {len(std)}; give both one value per band."
        )
    if rescale_factor is not None and not (_is_number(rescale_factor) and 0 < rescale_factor < math.inf):
        raise ValueError(
            f"`rescale_factor` is {rescale_factor}; expected a finite number above 0, such as 1/255 for 8-bit images."
        )


def _check_resizing(size: Mapping[str, int] | None, resample: int | None):
    """Refuse sizes and filters with which no image can be resized."""
    sides = {name: side for name, side in dict(size or {}).items() if side is not None}
    if sides.keys() not in ({"shortest_edge"}, {"height", "width"}) or not all(
        _is_number(side) and 1 <= side <= LARGEST_SIDE for side in sides.values()
    ):
        raise ValueError(
            f"`size` is {sides}; with `do_resize`, expected {{'shortest_edge': ...}} or {{'height': ..., 'width': "
            f"...}}, from 1 to {LARGEST_SIDE} pixels. Correct the call, or `size` in preprocessor_config.json."
        )
    if resample is not None and resample not in list(PILImageResampling):
        raise ValueError(
            f"`resample` is {resample}; expected one of {[int(known) for known in PILImageResampling]}, a filter of "
            "PIL. Correct the call, or `resample` in preprocessor_config.json."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _count_bands(*statistics: float | list[float] | None) -> int:
    """Return the length of the first statistic that has one value per band, or 3 if there is none."""
    return next((len(values) for values in statistics if isinstance(values, list | tuple | np.ndarray)), 3)


def _image_to_array(
    image: ImageInput, num_channels: int, input_data_format: str | None, do_convert_rgb: bool, index: int
) -> np.ndarray:
    """Convert an image of any accepted kind to an array (channels, height, width)."""
    if isinstance(image, Image.Image):
        if num_channels == 3 and (do_convert_rgb or image.mode in ("1", "L", "P")):
            image = image.convert("RGB")
        if image.mode != "RGB":
            raise ValueError(
                f"Image {index} has the PIL mode '{image.mode}'; expected 8-bit RGB. If the further bands are "
                "transparency, use `image.convert('RGB')`. Otherwise pick three bands and scale them to 0..255 as "
                "uint8."
            )
        array, input_data_format = np.asarray(image), "channels_last"
    elif isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        array = (image.float() if image.dtype == torch.bfloat16 else image).numpy()  # NumPy has no bfloat16
    else:
        array = np.asarray(image)
    array = array[None] if array.ndim == 2 else array
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(
            f"Image {index} has the shape {array.shape}; expected (height, width, channels) with no size of 0."
        )
    if input_data_format is None:
        input_data_format = _find_channels(array.shape, num_channels, index)
    if input_data_format == "channels_last":
        array = np.moveaxis(array, -1, 0)
    if array.shape[0] == 1:
        array = np.repeat(array, num_channels, axis=0)
    if array.shape[0] != num_channels:
        raise ValueError(
            f"Image {index} has {array.shape[0]} bands of {array.shape[1]}x{array.shape[2]} pixels; expected "
            f"{num_channels}. Pick the bands for red, green and blue."
        )
    return array


def _find_channels(shape: tuple[int, ...], num_channels: int, index: int) -> str:
    """Decide whether the channels are the first or the last dimension of an image. If both are possible: the first."""
    first, last = shape[0], shape[-1]
    for count in (num_channels, 1):
        if first == count:
            return "channels_first"
        if last == count:
            return "channels_last"
    raise ValueError(
        f"Image {index} has the shape {shape}, which has neither {num_channels} bands nor 1 at either end. Pick the "
        "bands for red, green and blue."
    )


def _check_values(array: np.ndarray, do_rescale: bool, index: int):
    """Refuse 16-bit, NaN and infinite values; with `do_rescale` also values outside 0..255."""
    remedy = "Scale it to 0..255 (for example from its 2nd to its 98th percentile) and pass uint8"
    if array.dtype == np.uint16:
        raise ValueError(
            f"Image {index} is 16-bit (uint16, values {array.min()} to {array.max()}); expected 8-bit. {remedy}."
        )
    if not np.isfinite(array).all():
        raise ValueError(
            f"Image {index} contains {np.count_nonzero(~np.isfinite(array))} NaN or infinite values; expected finite "
            "values. Replace them first, for example pixels without data by 0."
        )
    if not do_rescale:
        return
    low, high = array.min(), array.max()
    if low < 0 or high > 255:
        raise ValueError(
            f"Image {index} ({array.dtype}) has values from {low} to {high}; expected 0 to 255. {remedy}."
        )
    if np.issubdtype(array.dtype, np.floating) and 0 < high <= 1:
        logger.warning_once(
            f"Image {index} is floating point with a maximum of {high}: its values may be in 0..1 already. If so, "
            "pass `do_rescale=False`."
        )


def _map_to_array(segmentation_map: ImageInput, index: int) -> np.ndarray:
    """Convert a segmentation map of any accepted kind to an int64 array (height, width)."""
    if isinstance(segmentation_map, torch.Tensor):
        segmentation_map = segmentation_map.detach().cpu().numpy()
    array = np.asarray(segmentation_map)
    array = array[0] if array.ndim == 3 and array.shape[0] == 1 else array
    if array.ndim != 2 or array.dtype.kind not in "iub" or array.size == 0:
        raise ValueError(
            f"Segmentation map {index} has the shape {array.shape} and the type {array.dtype}; expected integer class "
            "indices (height, width). Turn colours into class indices first."
        )
    return array.astype(np.int64)


def _check_maps_fit(maps: list[np.ndarray], images: list[np.ndarray]):
    """Check that each image (channels, height, width) has one map (height, width) of the same size."""
    if len(maps) != len(images):
        raise ValueError(f"There are {len(images)} images and {len(maps)} segmentation maps; give one for each image.")
    for index, (map_, image) in enumerate(zip(maps, images)):
        if map_.shape != image.shape[-2:]:
            raise ValueError(
                f"Segmentation map {index} is {map_.shape[0]}x{map_.shape[1]} (height x width), but its image is "
                f"{image.shape[1]}x{image.shape[2]}. Each pixel of the image needs one label."
            )


def _prepare_map(labels: np.ndarray, size: tuple[int, int], do_reduce_labels: bool) -> np.ndarray:
    """Reduce the labels if `do_reduce_labels`, and resize them to the (height, width) of the prepared image."""
    if do_reduce_labels:
        kept = (labels < 0) | (labels == IGNORE_INDEX)  # negative labels mark ignored pixels, too
        labels = np.where(labels == 0, IGNORE_INDEX, np.where(kept, labels, labels - 1))
    if labels.shape != size:
        image = Image.fromarray(labels.astype(np.int32))
        labels = np.asarray(image.resize(size[::-1], Image.Resampling.NEAREST)).astype(np.int64)
    return labels


class Co2SImageSegmentationPipeline(ImageSegmentationPipeline):
    """transformers' `pipeline("image-segmentation")` with a score for every class.

    The class of transformers returns no scores for semantic segmentation. If the package co2s_hf is imported,
    `pipeline` uses this class for Co2S models. Without the package, `pipeline(..., trust_remote_code=True)` uses it,
    because the configuration of saved models names it.
    """

    # Otherwise `pipeline` looks for a tokenizer and a video processor in the model. For the latter, it would ask
    # whether to run the code of the model.
    _load_tokenizer = False
    _load_video_processor = False

    def check_model_type(self, supported_models: list[str] | dict):
        """Do nothing: the inherited check would refuse models with their own code."""

    def postprocess(
        self,
        model_outputs: "Co2SSemanticSegmenterOutput",
        subtask: str | None = None,
        threshold: float = 0.0,
        mask_threshold: float | None = None,
        overlap_mask_area_threshold: float | None = None,
    ) -> list[dict[str, Any]]:
        """Turn outputs into the format of the Hub's widget.

        Args:
            model_outputs: Output of the model for one image, with its `target_size`.
            subtask: "semantic" or None; both have the same meaning.
            threshold: Lowest score of the classes to return, 0 to 1.
            mask_threshold, overlap_mask_area_threshold: Without effect, as for every semantic model in transformers.
                They are accepted because the Hub's API documents them. They apply to the overlapping masks of objects;
                here each pixel has exactly one class.

        Returns:
            A dictionary for each class in the image, in label order: `label`; `mask`, an image of the input's size
            with 255 in the pixels of the class and 0 elsewhere; and `score`, the mean probability of the class in the
            mask, 0 to 1.

        Raises:
            ValueError: `subtask` has another value.
        """
        if subtask not in (None, "semantic"):
            raise ValueError(f"`subtask` is '{subtask}'; this model segments classes, not objects: use 'semantic'.")
        result = self.image_processor.post_process_semantic_segmentation(
            model_outputs, model_outputs["target_size"], return_segmentation_scores=True
        )[0]
        segments = []
        for index in result.segmentation.unique().tolist():
            mask = result.segmentation == index
            score = result.segmentation_scores[index][mask].mean().item()
            if score >= threshold:
                picture = Image.fromarray(255 * mask.numpy().astype(np.uint8))
                segments.append({"score": score, "label": self.model.config.id2label[index], "mask": picture})
        return segments


__all__ = ["Co2SImageProcessor", "Co2SImageSegmentationPipeline"]
