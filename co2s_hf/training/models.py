"""Build the model of a run: from scratch, from pretrained backbones, or from a trained model with an adapter."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils import find_adapter_config_file
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..data.reading import base_scale
from ..data.sources import Source
from ..model.configuration_co2s import SMALL_DECODER, Co2SConfig
from ..model.image_processing_co2s import Co2SImageProcessor
from ..model.modeling_co2s import STUDENTS, Co2SForSemanticSegmentation
from ..utils.errors import UserImportError, UserValueError, loading
from ..utils.files import recover
from .lora import lora_config
from .options import AdaptationOptions, TrainingOptions


def tiny_config(**config_kwargs) -> Co2SConfig:
    """Make the configuration of a tiny model, which trains from scratch in minutes on a CPU.

    The backbones have 6 layers of 96 channels and patches of 8 px.

    Args:
        config_kwargs: Further fields of [`Co2SConfig`] (labels, palette).
    """
    backbone = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 6, "num_attention_heads": 4}
    return Co2SConfig(
        clip_config={**backbone, "patch_size": 8, "image_size": 128, "projection_dim": 64},
        dinov3_config={**backbone, "patch_size": 8, "num_register_tokens": 4, "layer_norm_eps": 1e-6},
        clip_feature_layers=(0, 2, 5),
        dinov3_feature_layers=(1, 3, 5),
        **SMALL_DECODER,
        **config_kwargs,
    )


def tiny_model(**config_kwargs) -> Co2SForSemanticSegmentation:
    """Make a model of [`tiny_config`] with random weights.

    Without pretraining, the similarities of features and classes at the decoder's input are all between -0.1 and 0.1.
    Therefore the weights of the decoder's first convolution start 8 times larger than PyTorch's default.
    """
    model = Co2SForSemanticSegmentation(tiny_config(**config_kwargs))
    _strengthen(model, STUDENTS)
    # On a CPU, a tiny decoder is a quarter faster in this memory format.
    return model.to(memory_format=torch.channels_last)


def build_model(options: TrainingOptions, data: Source) -> Co2SForSemanticSegmentation:
    """Build a new model for the data's classes, in training mode, with the trained parameters unfrozen.

    Raises:
        UserValueError: The data has fewer than two classes.
        UserOSError: A pretrained backbone cannot be loaded.
    """
    if len(data.id2label) < 2:
        raise UserValueError(
            f"The data has one class, {', '.join(data.id2label.values())}; at least two are needed. Name all classes "
            "with `class_names`, and label some pixels of each."
        )
    classes = {"id2label": data.id2label, "palette": data.palette, "class_concepts": data.class_concepts}
    model = tiny_model(**classes) if options.from_scratch else pretrained_model(options, classes)
    if options.recipe == "released":
        model = repeat_released_quirks(model)
    _record_inputs(model, options, data)
    model.freeze_backbones(options.train_backbones)
    if options.lora:
        model.add_adapter(lora_config(model, options))
    train_only(model, options.students)
    return model.train()


def pretrained_model(options: TrainingOptions, classes: dict) -> Co2SForSemanticSegmentation:
    """Make a model from the pretrained backbones of the options.

    Without names of the classes, there is no text that could guide CLIP. Then each class gets a random vector.

    Args:
        options: Options of the training, with all defaults filled in.
        classes: Fields `id2label`, `palette` and `class_concepts` of the configuration. The concepts of data without
            class names are None.
    """
    for option in ("clip_model", "dinov3_model"):
        name = getattr(options, option)
        recover(name)
        with loading(f"`{option}` {name}", name=name):
            pass  # the block below cannot tell which of the two models is damaged
    text_embeddings = "random" if classes["class_concepts"] is None else None
    with loading(f"`clip_model` {options.clip_model} or `dinov3_model` {options.dinov3_model}"):
        model = Co2SForSemanticSegmentation.from_backbones(
            options.clip_model, options.dinov3_model, text_embeddings=text_embeddings, **classes
        )
    if model.config.decoder_channels != SMALL_DECODER["decoder_channels"]:
        return model
    _strengthen(model, ("dinov3",))  # its queries are random, so the similarities are small; those of CLIP are not
    return model.to(memory_format=torch.channels_last)  # as in `tiny_model`


def _strengthen(model: Co2SForSemanticSegmentation, students: Sequence[str]):
    """Enlarge the weights of the decoder's first convolution, whose inputs are all between -0.1 and 0.1."""
    with torch.no_grad():
        for name in students:
            getattr(model, name).decoder.similarity_projection.weight.mul_(8)


def repeat_released_quirks(model: Co2SForSemanticSegmentation) -> Co2SForSemanticSegmentation:
    """Copy the weights into a model with the settings of the authors' released code.

    CLIP then uses GELU, a layer norm epsilon of 1e-6 and ImageNet's statistics. The logits of both students are first
    resized to a fixed size (224 px for CLIP, 256 px for DINOv3).
    """
    fields = model.config.to_dict()
    fields["clip_config"] |= {"hidden_act": "gelu", "layer_norm_eps": 1e-6}
    fields |= {"clip_image_mean": list(IMAGENET_DEFAULT_MEAN), "clip_image_std": list(IMAGENET_DEFAULT_STD)}
    fields |= {"clip_logits_size": 224, "dinov3_logits_size": 256}
    released = Co2SForSemanticSegmentation(Co2SConfig.from_dict(fields))
    released.load_state_dict(model.state_dict())
    return released


def train_only(model: Co2SForSemanticSegmentation, students: str):
    """Freeze the student that is not in `students`, if any. The model then predicts with the other student alone."""
    for student in set(STUDENTS) - set(students.split(",")):
        getattr(model, student).requires_grad_(False)
        model.config.fusion = students


def open_base(options: AdaptationOptions) -> Co2SConfig:
    """Check the model to adapt, and fill in options that are None, partly from its configuration.

    Returns:
        Configuration of the base model.

    Raises:
        UserValueError: The model to adapt is an adapter itself.
        UserOSError: The model cannot be loaded.
        UserImportError: `quantize` needs bitsandbytes.
    """
    if options.quantize is not None and find_spec("bitsandbytes") is None:
        raise UserImportError(f"`quantize='{options.quantize}'` needs bitsandbytes: pip install bitsandbytes")
    recover(options.checkpoint)
    if Path(options.checkpoint).is_dir():
        options.checkpoint = str(Path(options.checkpoint).resolve())  # the adapter stores it as its base
    with loading(f"`checkpoint` {options.checkpoint}", name=options.checkpoint, model_type=Co2SConfig.model_type):
        is_adapter = find_adapter_config_file(options.checkpoint) is not None
        config = None if is_adapter else Co2SConfig.from_pretrained(options.checkpoint)
        image_processor = None if is_adapter else Co2SImageProcessor.from_pretrained(options.checkpoint)
    if is_adapter:
        raise UserValueError(f"{options.checkpoint} is an adapter. Merge it (`merge=True`), and adapt the result.")
    options.fill({"crop_size": config.crop_size or 256})
    if image_processor.do_resize:
        options.fill({"eval_short_side": image_processor.size["shortest_edge"]})
    if config.fusion in STUDENTS:  # the other student may be untrained
        options.students = config.fusion
    options.fill(options.defaults)
    return config


def build_adapted_model(options: AdaptationOptions, data: Source) -> Co2SForSemanticSegmentation:
    """Load the base for the classes of the data, and add a new adapter.

    Returns:
        The model in training mode.

    Raises:
        UserOSError: The base or its text encoder cannot be loaded.
        UserValueError: The data has other classes than the base, and `freeze_queries` is True.
    """
    with loading(f"`checkpoint` {options.checkpoint}", name=options.checkpoint, model_type=Co2SConfig.model_type):
        # Load in float32, even if the base was saved in half precision, which would round small updates to zero.
        model = Co2SForSemanticSegmentation.from_pretrained(
            options.checkpoint, dtype=torch.float32, **quantization(options.quantize)
        )
        change_classes(model, options, data)
    # The temperatures of the base are not right for the weights of the adapted model.
    model.config.clip_temperature = model.config.dinov3_temperature = 1.0
    _record_inputs(model, options, data)
    train_only(model, options.students)  # sets the fusion, which the adapter stores
    model.add_adapter(lora_config(model, options))
    train_only(model, options.students)  # freezes again what `add_adapter` unfroze
    return model.train()


def quantization(bits: str | None) -> dict:
    """Return the arguments of `from_pretrained` that quantize the linear layers of the frozen backbones."""
    if bits is None:
        return {}
    kept = ["clip.decoder", "dinov3.decoder", "clip.encoder.visual_projection"]
    settings = {"load_in_8bit": True} if bits == "8bit" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return {"quantization_config": BitsAndBytesConfig(llm_int8_skip_modules=kept, **settings)}


def change_classes(model: Co2SForSemanticSegmentation, options: AdaptationOptions, data: Source):
    """Change the classes of the model to those of the data, if they differ."""
    own, labels = list(model.config.id2label.values()), list(data.id2label.values())
    concepts = data.class_concepts or model.config.class_concepts
    if labels == own and options.text_encoder is None and concepts == model.config.class_concepts:
        return
    if options.freeze_queries and labels != own:
        raise UserValueError(
            f"The data has new classes ({', '.join(labels)}). Train their queries: `freeze_queries=False`."
        )
    fusion = model.config.fusion
    if labels != list(concepts or ()):
        concepts = {label: [label] for label in labels}
    embeddings = None
    if options.text_encoder is None and model.config.text_encoder is None:
        # The base has random vectors instead of encoded text. New classes get new random vectors.
        directions = torch.empty(len(labels), model.config.clip_config.projection_dim)
        embeddings = nn.init.orthogonal_(directions)
        for index, label in enumerate(labels):
            if label in own:
                embeddings[index] = model.clip.guidance.embeddings[own.index(label)]
    model.set_class_concepts(concepts, embeddings, options.text_encoder, data.palette)
    model.config.fusion = fusion  # set_class_concepts changed it to "clip" for new classes


def _record_inputs(model: Co2SForSemanticSegmentation, options: TrainingOptions, data: Source):
    """Store in the configuration how to read files for prediction; switch on gradient checkpointing."""
    rule = data.read_rule
    model.config.crop_size = options.crop_size
    model.config.ground_sampling_distance_m = seen_distance_m(options, data)
    model.config.image_bands, model.config.image_scale = rule.bands, rule.scale
    if options.gradient_checkpointing:
        model.activation_checkpointing_enable()


def seen_distance_m(options: TrainingOptions, data: Source) -> float | None:
    """Return the ground sampling distance of the training images as the model sees them, in metres.

    `base_size` makes their pixels larger or smaller. If images of several sizes get several factors, the factor is
    their median. The random scale is left out: it is 1 for the images that the model predicts later. None: the
    distance of the data is unknown.
    """
    if data.ground_sampling_distance_m is None:
        return None
    factors = [base_scale(facts.size, options.base_size) for facts in data.scans["labeled"].images]
    return data.ground_sampling_distance_m / median(factors)


__all__ = [
    "build_adapted_model",
    "build_model",
    "change_classes",
    "open_base",
    "quantization",
    "repeat_released_quirks",
    "seen_distance_m",
    "tiny_config",
    "tiny_model",
    "train_only",
]
