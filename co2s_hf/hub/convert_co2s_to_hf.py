"""Convert checkpoints of the authors' code to a model of this package, and back.

The authors' training script writes best_clip.pth and best_dinov3.pth. They publish them on the Hub in
`XavierJiezou/co2s-models`, in folders such as `POTSDAM/1_32-74.30`:

    originals = download_originals("XavierJiezou/co2s-models", "POTSDAM/1_32-74.30")
    convert(originals["clip"], originals["dinov3"], "co2s-potsdam", "potsdam")
    verify("co2s-potsdam", originals["clip"], originals["dinov3"])
    convert_to_original("co2s-potsdam", "original")  # back to both files, for the authors' tools

The key tables in this module are strict: every key of the source must be used or be listed as dropped, and every key
of the target must be filled. Sizes are read from the shapes of the weights. The numbers of heads, the pooling size and
the fixed sizes of the logits are not visible in the shapes, so they are arguments. The feature layers and the
dilations are the authors' values.
"""

import math
import os
from functools import partial
from pathlib import Path

import torch
from httpx2 import HTTPError  # huggingface_hub raises it when there is no connection
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..data.benchmarks import BENCHMARKS
from ..model.configuration_co2s import Co2SConfig
from ..model.image_processing_co2s import Co2SImageProcessor
from ..model.loading_co2s import check_finite
from ..model.modeling_co2s import STUDENTS, Co2SForSemanticSegmentation
from ..utils.errors import UserFileNotFoundError, UserOSError, UserValueError, loading
from ..utils.files import check_new_folder, recover, written_beside


CHECKPOINT_NAMES = {"clip": "best_clip.pth", "dinov3": "best_dinov3.pth"}

# A row of a key table has three items: the authors' key; our keys, relative to the student; the shape of the authors'
# tensor if it differs from ours (-1 stands for one size). If a row has several of our keys, the authors' tensor
# is split along its first dimension. None instead of a key marks a part that the authors' code masks out.
Row = tuple[str, tuple[str | None, ...], tuple[int, ...] | None]


def _rows(theirs: str, ours: str, suffixes: tuple[str, ...] = ("weight", "bias")) -> list[Row]:
    """Return a row for the weight and one for the bias of a layer."""
    return [(f"{theirs}.{suffix}", (f"{ours}.{suffix}",), None) for suffix in suffixes]


def _decoder_table(config: Co2SConfig) -> list[Row]:
    """Return the key table of the decoder. It is the same for both students."""

    def conv_norm(theirs_conv: str, theirs_norm: str, ours: str) -> list[Row]:
        return _rows(theirs_conv, f"{ours}.0", ("weight",)) + _rows(theirs_norm, f"{ours}.1")

    theirs, ours = "decode_head", "decoder"
    table = _rows(f"{theirs}.conv1", f"{ours}.similarity_projection")
    table += _rows(f"{theirs}.text_proj.0", f"{ours}.guidance_projection.0") + _rows(f"{theirs}.head", f"{ours}.head")
    num_branches = len(config.decoder_dilations) + 1
    for n in range(num_branches):
        branch = f"{theirs}.aspp.aspp_convs.{n}"
        table += conv_norm(f"{branch}.0", f"{branch}.1", f"{ours}.spatial_pyramid.branches.{n}")
    pooled = f"{theirs}.aspp.aspp_convs.{num_branches}.gap"
    table += conv_norm(f"{pooled}.1", f"{pooled}.2", f"{ours}.spatial_pyramid.global_branch")
    projection = f"{theirs}.aspp.project"
    table += conv_norm(f"{projection}.0", f"{projection}.1", f"{ours}.spatial_pyramid.projection")
    for n in range(config.decoder_num_layers):
        layer, our_layer = f"{theirs}.layers.{n}.transformer", f"{ours}.semantic_layers.{n}"
        table += _rows(f"{layer}.ln1", f"{our_layer}.norm1") + _rows(f"{layer}.ln2", f"{our_layer}.norm2")
        for kind in ("weight", "bias"):
            table.append((f"{layer}.attn.attn.in_proj_{kind}", (f"{our_layer}.qkv.{kind}",), None))
        table += _rows(f"{layer}.attn.attn.out_proj", f"{our_layer}.projection")
        table += _rows(f"{layer}.ffn.layers.0.0", f"{our_layer}.mlp.0")
        table += _rows(f"{layer}.ffn.layers.1", f"{our_layer}.mlp.2")
    for n in range(len(config.decoder_up_channels)):
        step, our_step = f"{theirs}.up{n + 1}", f"{ours}.upsampling_layers.{n}"
        table += _rows(f"{step}.up", f"{our_step}.upsample") + _rows(f"{theirs}.skip_proj.{n}.0", f"{our_step}.skip.0")
        table += conv_norm(f"{step}.conv.0", f"{step}.conv.1", f"{our_step}.join")
        table += conv_norm(f"{step}.conv.3", f"{step}.conv.4", f"{our_step}.refine")
    return table


def _clip_table(config: Co2SConfig) -> list[Row]:
    """Return the key table of the CLIP student."""
    theirs, ours = "backbone", "encoder.vision_model"
    table: list[Row] = [
        ("_cached_text", ("guidance.embeddings",), None),
        (f"{theirs}.cls_token", (f"{ours}.embeddings.class_embedding",), (1, 1, -1)),
        (
            f"{theirs}.pos_embed",
            (f"{ours}.embeddings.position_embedding.weight",),
            (1, -1, config.clip_config.hidden_size),
        ),
        (f"{theirs}.patch_embed.projection.weight", (f"{ours}.embeddings.patch_embedding.weight",), None),
        (f"{theirs}.proj.weight", ("encoder.visual_projection.weight",), (-1, config.clip_config.hidden_size, 1, 1)),
    ]
    table += _rows(f"{theirs}.ln0", f"{ours}.pre_layrnorm") + _rows(f"{theirs}.ln1", f"{ours}.post_layernorm")
    for n in range(config.clip_config.num_hidden_layers):
        layer, our_layer = f"{theirs}.layers.{n}", f"{ours}.encoder.layers.{n}"
        table += _rows(f"{layer}.ln1", f"{our_layer}.layer_norm1") + _rows(f"{layer}.ln2", f"{our_layer}.layer_norm2")
        for kind in ("weight", "bias"):
            split = tuple(f"{our_layer}.self_attn.{part}_proj.{kind}" for part in "qkv")
            table.append((f"{layer}.attn.attn.in_proj_{kind}", split, None))
        table += _rows(f"{layer}.attn.attn.out_proj", f"{our_layer}.self_attn.out_proj")
        table += _rows(f"{layer}.ffn.layers.0.0", f"{our_layer}.mlp.fc1")
        table += _rows(f"{layer}.ffn.layers.1", f"{our_layer}.mlp.fc2")
    return table + _decoder_table(config)


def _dinov3_table(config: Co2SConfig) -> list[Row]:
    """Return the key table of the DINOv3 student."""
    theirs, ours = "backbone", "encoder.vision_model"
    table: list[Row] = [
        ("text_provider.emb.weight", ("guidance.queries",), None),
        (f"{theirs}.cls_token", (f"{ours}.embeddings.cls_token",), None),
        (f"{theirs}.storage_tokens", (f"{ours}.embeddings.register_tokens",), None),
        (f"{theirs}.mask_token", (f"{ours}.embeddings.mask_token",), (1, -1)),
    ]
    table += _rows(f"{theirs}.patch_embed.proj", f"{ours}.embeddings.patch_embeddings")
    table += _rows(f"{theirs}.norm", f"{ours}.norm")
    for n in range(config.dinov3_config.num_hidden_layers):
        layer, our_layer = f"{theirs}.blocks.{n}", f"{ours}.model.layer.{n}"
        attention = f"{our_layer}.attention"
        table += _rows(f"{layer}.norm1", f"{our_layer}.norm1") + _rows(f"{layer}.norm2", f"{our_layer}.norm2")
        table += [
            (f"{layer}.attn.qkv.weight", tuple(f"{attention}.{part}_proj.weight" for part in "qkv"), None),
            (f"{layer}.attn.qkv.bias", (f"{attention}.q_proj.bias", None, f"{attention}.v_proj.bias"), None),
            (f"{layer}.ls1.gamma", (f"{our_layer}.layer_scale1.lambda1",), None),
            (f"{layer}.ls2.gamma", (f"{our_layer}.layer_scale2.lambda1",), None),
        ]
        table += _rows(f"{layer}.attn.proj", f"{attention}.o_proj")
        table += _rows(f"{layer}.mlp.fc1", f"{our_layer}.mlp.up_proj")
        table += _rows(f"{layer}.mlp.fc2", f"{our_layer}.mlp.down_proj")
    return table + _decoder_table(config)


def _dropped_keys(config: Co2SConfig) -> dict[str, torch.Tensor]:
    """Return constants that the authors' DINOv3 files store and transformers computes: key -> expected value."""
    backbone = config.dinov3_config
    head_size = backbone.hidden_size // backbone.num_attention_heads
    ones = torch.ones(backbone.hidden_size)
    constants = {"backbone.rope_embed.periods": backbone.rope_theta ** torch.arange(0, 1, 4 / head_size)}
    for n in range(backbone.num_hidden_layers):
        constants[f"backbone.blocks.{n}.attn.qkv.bias_mask"] = torch.cat([ones, 0 * ones, ones])
    return constants


_TABLES = {"clip": _clip_table, "dinov3": _dinov3_table}


def download_originals(repo: str, folder: str = "") -> dict[str, Path]:
    """Download best_clip.pth and best_dinov3.pth from a repository on the Hub into the Hugging Face cache.

    Args:
        repo: Repository, such as `XavierJiezou/co2s-models`.
        folder: Folder in the repository that holds both files, such as `POTSDAM/1_32-74.30`.

    Returns:
        "clip" and "dinov3" -> path of the file.

    Raises:
        UserOSError: A file could not be downloaded.
    """
    prefix = f"{folder.strip('/')}/".lstrip("/")
    paths = {}
    for student, name in CHECKPOINT_NAMES.items():
        try:
            paths[student] = Path(hf_hub_download(repo, prefix + name))
        except (OSError, HTTPError, HFValidationError) as error:
            cause = (isinstance(error, LocalEntryNotFoundError) and error.__cause__) or error
            reason = str(cause).strip().splitlines() or [type(cause).__name__]
            raise UserOSError(
                f"'{prefix}{name}' of the repository '{repo}' could not be downloaded: {reason[0]} Expected a "
                f"repository with {' and '.join(CHECKPOINT_NAMES.values())} in one folder, such as "
                "'POTSDAM/1_32-74.30' of 'XavierJiezou/co2s-models'. Check both names and the network connection."
            ) from error
    return paths


def load_original(path: str | Path, student: str) -> dict[str, torch.Tensor]:
    """Load the weights of one student from a checkpoint of the authors' training script.

    Args:
        path: `best_clip.pth` or `best_dinov3.pth`. It holds `{"model": {"module.<key>": tensor}, ...}`.
        student: "clip" or "dinov3", for the error message.

    Returns:
        Key without "module." -> tensor.

    Raises:
        UserFileNotFoundError: The file does not exist.
        UserValueError: The file is not such a checkpoint, or a weight is not finite.
    """
    if not Path(path).is_file():
        raise UserFileNotFoundError(f"'{path}' is not a file. Expected the authors' {CHECKPOINT_NAMES[student]}.")
    try:
        # weights_only: load tensors and plain containers only, because other objects could run code.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files cause many types
        with open(path, "rb") as file:
            start = file.read(40)
        raise UserValueError(
            f"'{path}' ({os.path.getsize(path)} bytes, starting with {start!r}) is not a PyTorch checkpoint of plain "
            "tensors. For safety, other objects are not loaded. The file may be an incomplete download, a Git LFS "
            "pointer, or a file of another program; download it again."
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        found = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise UserValueError(
            f"'{path}' holds {found}. Expected the authors' {CHECKPOINT_NAMES[student]}: a dictionary with the "
            "weights under 'model'."
        )
    weights = checkpoint["model"]
    if wrong := [key for key, value in weights.items() if not (isinstance(key, str) and torch.is_tensor(value))]:
        raise UserValueError(
            f"'{path}' holds '{wrong[0]}' under 'model', which is not a name with a tensor. Expected the authors' "
            f"{CHECKPOINT_NAMES[student]}."
        )
    try:
        check_finite(weights.items(), f"'{path}'")
    except ValueError as error:
        raise UserValueError(str(error)) from error
    return {key.removeprefix("module."): value for key, value in weights.items()}


def config_from_weights(
    clip_weights: dict[str, torch.Tensor],
    dinov3_weights: dict[str, torch.Tensor],
    *,
    num_attention_heads: int = 12,
    decoder_num_attention_heads: int = 4,
    decoder_pool_size: int = 4,
    clip_logits_size: int = 224,
    dinov3_logits_size: int = 256,
    **config_kwargs,
) -> Co2SConfig:
    """Read the sizes of a model from the authors' weights.

    The authors run CLIP with GELU, a layer norm epsilon of 1e-6, and the ImageNet mean and standard deviation. The
    configuration has the same settings.

    Args:
        clip_weights, dinov3_weights: Weights from [`load_original`].
        num_attention_heads: Heads of both backbones.
        decoder_num_attention_heads: Heads of the semantic layers of both decoders.
        decoder_pool_size: Factor by which features are average-pooled before the semantic layers.
        clip_logits_size, dinov3_logits_size: Side in pixels of the square to which a student's logits are resized
            before they are resized to the image.
        config_kwargs: Other fields of [`Co2SConfig`], such as id2label.

    Raises:
        UserValueError: A weight that has one of the sizes is missing.
    """
    return Co2SConfig(
        clip_config=_clip_sizes(clip_weights) | {"num_attention_heads": num_attention_heads},
        dinov3_config=_dinov3_sizes(dinov3_weights) | {"num_attention_heads": num_attention_heads},
        **_decoder_sizes(clip_weights),
        decoder_num_attention_heads=decoder_num_attention_heads,
        decoder_pool_size=decoder_pool_size,
        clip_image_mean=list(IMAGENET_DEFAULT_MEAN),
        clip_image_std=list(IMAGENET_DEFAULT_STD),
        clip_logits_size=clip_logits_size,
        dinov3_logits_size=dinov3_logits_size,
        **config_kwargs,
    )


def _shape(weights: dict[str, torch.Tensor], student: str, key: str) -> torch.Size:
    """Return the shape of a tensor; raise a UserValueError if the key is missing."""
    if key not in weights:
        raise UserValueError(
            f"The {student} checkpoint has no '{key}' among its {len(weights)} weights (such as "
            f"'{next(iter(weights), None)}'). Expected the authors' {CHECKPOINT_NAMES[student]}."
        )
    return weights[key].shape


def _num_layers(weights: dict[str, torch.Tensor], prefix: str) -> int:
    """Count the different names that follow a prefix in the keys."""
    return len({key[len(prefix) :].split(".")[0] for key in weights if key.startswith(prefix)})


def _clip_sizes(weights: dict[str, torch.Tensor]) -> dict:
    """Return the CLIP backbone's configuration, except for the number of heads."""
    shape = partial(_shape, weights, "clip")
    hidden_size, *_, patch_size = shape("backbone.patch_embed.projection.weight")
    num_positions = shape("backbone.pos_embed")[1] - 1  # without the class token
    return {
        "hidden_size": hidden_size,
        "intermediate_size": shape("backbone.layers.0.ffn.layers.0.0.weight")[0],
        "projection_dim": shape("backbone.proj.weight")[0],
        "num_hidden_layers": _num_layers(weights, "backbone.layers."),
        "image_size": math.isqrt(num_positions) * patch_size,
        "patch_size": patch_size,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    }


def _dinov3_sizes(weights: dict[str, torch.Tensor]) -> dict:
    """Return the DINOv3 backbone's configuration, except for the number of heads."""
    shape = partial(_shape, weights, "dinov3")
    hidden_size, *_, patch_size = shape("backbone.patch_embed.proj.weight")
    return {
        "hidden_size": hidden_size,
        "intermediate_size": shape("backbone.blocks.0.mlp.fc1.weight")[0],
        "num_hidden_layers": _num_layers(weights, "backbone.blocks."),
        "patch_size": patch_size,
        "num_register_tokens": shape("backbone.storage_tokens")[1],
        "layer_norm_eps": 1e-6,
    }


def _decoder_sizes(weights: dict[str, torch.Tensor]) -> dict:
    """Return the decoder's sizes, from the weights of the CLIP student. Both decoders have the same sizes."""
    shape = partial(_shape, weights, "clip")
    channels, *_, kernel_size = shape("decode_head.conv1.weight")
    mlp_channels = shape("decode_head.layers.0.transformer.ffn.layers.0.0.bias")[0]
    return {
        "decoder_channels": channels,
        "decoder_guidance_channels": shape("decode_head.text_proj.0.weight")[0],
        "decoder_kernel_size": kernel_size,
        "decoder_num_layers": _num_layers(weights, "decode_head.layers."),
        "decoder_mlp_ratio": mlp_channels // channels,
        "decoder_skip_channels": [shape(f"decode_head.skip_proj.{n}.0.weight")[0] for n in range(2)],
        "decoder_up_channels": [shape(f"decode_head.up{n + 1}.conv.0.weight")[0] for n in range(2)],
    }


def convert_student(
    weights: dict[str, torch.Tensor], student: str, model: Co2SForSemanticSegmentation
) -> dict[str, torch.Tensor]:
    """Rename and reshape the authors' weights of one student to the keys of `model.clip` or `model.dinov3`.

    Args:
        weights: Weights from [`load_original`].
        student: "clip" or "dinov3".
        model: Model with the sizes of the weights.

    Returns:
        State dictionary of the student.

    Raises:
        UserValueError: A key is missing or unknown, or a tensor has another shape. The message names them.
    """
    table = _TABLES[student](model.config)
    dropped = _dropped_keys(model.config) if student == "dinov3" else {}
    used = {theirs for theirs, _, _ in table}
    missing, unexpected = sorted(used - set(weights)), sorted(set(weights) - used - set(dropped))
    if missing or unexpected:
        raise UserValueError(
            f"These are not the authors' {student} weights. Missing ({len(missing)}): {missing[:10]}. Unexpected "
            f"({len(unexpected)}): {unexpected[:10]}. Expected the authors' {CHECKPOINT_NAMES[student]}."
        )
    for key, expected in dropped.items():
        # The tolerance is that of bfloat16, in which the periods may have been stored.
        if key in weights and not torch.allclose(weights[key].float(), expected, rtol=1e-2):
            raise UserValueError(
                f"'{key}' differs from the constant that transformers' DINOv3 computes, so the converted model would "
                f"give other results. Expected the authors' {CHECKPOINT_NAMES[student]}."
            )
    target = getattr(model, student).state_dict()
    converted = {}
    for theirs, ours, shape in table:
        for key, part in zip(ours, weights[theirs].chunk(len(ours))):
            if key is None:
                continue
            if part.shape != (target[key] if shape is None else target[key].reshape(shape)).shape:
                raise UserValueError(
                    f"'{theirs}' has the shape {tuple(weights[theirs].shape)}, which does not give "
                    f"{tuple(target[key].shape)} for '{student}.{key}'. Give both checkpoints of one training, and "
                    "the benchmark that they were trained on."
                )
            converted[key] = part.reshape(target[key].shape).contiguous()
    return converted


def restore_student(model: Co2SForSemanticSegmentation, student: str) -> dict[str, torch.Tensor]:
    """Convert the weights of `model.clip` or `model.dinov3` to the authors' keys and shapes.

    This is the inverse of [`convert_student`], except that the key biases of DINOv3 become zero. The authors' code
    does not use them.

    Args:
        model: Model with the authors' architecture.
        student: "clip" or "dinov3".

    Returns:
        Key -> tensor, without the prefix "module.".

    Raises:
        UserValueError: The model has weights that the authors' architecture does not have.
    """
    ours = getattr(model, student).state_dict()
    table = _TABLES[student](model.config)
    if extra := sorted(set(ours) - {key for _, keys, _ in table for key in keys}):
        raise UserValueError(
            f"The authors' {student} student has no place for {len(extra)} weights of this model, such as "
            f"'{extra[0]}'. Only models with the authors' architecture can be converted back."
        )
    weights = dict(_dropped_keys(model.config)) if student == "dinov3" else {}
    for theirs, keys, shape in table:
        example = next(ours[key] for key in keys if key is not None)
        parts = [torch.zeros_like(example) if key is None else ours[key] for key in keys]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        weights[theirs] = (tensor if shape is None else tensor.reshape(shape)).clone()
    return weights


def convert(
    clip_checkpoint: str | Path, dinov3_checkpoint: str | Path, output_dir: str | Path, dataset: str, **sizes: int
) -> Co2SForSemanticSegmentation:
    """Convert both students of the authors' code, and write one folder for `from_pretrained`.

    Args:
        clip_checkpoint: Path of `best_clip.pth`.
        dinov3_checkpoint: Path of `best_dinov3.pth`.
        output_dir: New folder. It appears only when all files are written.
        dataset: Benchmark of the training, a key of [`BENCHMARKS`]. It gives the class names, palette and concepts.
        sizes: Keyword arguments of [`config_from_weights`].

    Returns:
        The model, in evaluation mode.

    Raises:
        UserFileExistsError: The output folder exists and is not empty.
        UserFileNotFoundError: A checkpoint does not exist.
        UserValueError: A checkpoint or `dataset` is not what is expected.
    """
    if dataset not in BENCHMARKS:
        raise UserValueError(f"`dataset` is '{dataset}'; expected one of {', '.join(sorted(BENCHMARKS))}.")
    output_dir = check_new_folder(output_dir)
    paths = {"clip": clip_checkpoint, "dinov3": dinov3_checkpoint}
    weights = {student: load_original(path, student) for student, path in paths.items()}
    try:
        config = config_from_weights(weights["clip"], weights["dinov3"], **BENCHMARKS[dataset].config_kwargs, **sizes)
    except UserValueError as error:
        raise UserValueError(f"'{clip_checkpoint}' and '{dinov3_checkpoint}' cannot be converted. {error}") from error
    except (IndexError, ValueError, ZeroDivisionError, StrictDataclassError) as error:
        raise UserValueError(
            f"'{clip_checkpoint}' and '{dinov3_checkpoint}' cannot be converted. The shapes of the weights are not "
            f"those of the authors' models: {error} Expected their {' and '.join(CHECKPOINT_NAMES.values())}."
        ) from error
    model = Co2SForSemanticSegmentation(config).eval()
    for student, path in paths.items():
        try:
            converted = convert_student(weights[student], student, model)
        except UserValueError as error:
            raise UserValueError(f"'{path}' cannot be converted. {error}") from error
        getattr(model, student).load_state_dict(converted, strict=True)
    with written_beside(output_dir) as folder:
        model.save_pretrained(folder)
        Co2SImageProcessor.from_model_config(config).save_pretrained(folder)
    return model


def verify(output_dir: str | Path, clip_checkpoint: str | Path, dinov3_checkpoint: str | Path) -> int:
    """Load a converted model, convert it back, and compare it with the authors' files bit by bit.

    Args:
        output_dir: Folder of the converted model.
        clip_checkpoint: Path of `best_clip.pth`.
        dinov3_checkpoint: Path of `best_dinov3.pth`.

    Returns:
        The number of compared tensors. Masked key biases and stored constants are not compared.

    Raises:
        UserValueError: A tensor differs.
    """
    model = Co2SForSemanticSegmentation.from_pretrained(output_dir)
    num_compared = 0
    for student, path in (("clip", clip_checkpoint), ("dinov3", dinov3_checkpoint)):
        source, restored = load_original(path, student), restore_student(model, student)
        for theirs, ours, _ in _TABLES[student](model.config):
            for key, expected, found in zip(ours, source[theirs].chunk(len(ours)), restored[theirs].chunk(len(ours))):
                if key is not None and not torch.equal(expected, found):
                    raise UserValueError(
                        f"'{theirs}' of {path} differs from '{student}.{key}' of {output_dir}. Convert the "
                        "checkpoints again."
                    )
            num_compared += 1
    return num_compared


def convert_to_original(checkpoint: str | Path, output_dir: str | Path):
    """Write `best_clip.pth` and `best_dinov3.pth`, as the authors' code loads them, from a model of this package.

    Args:
        checkpoint: Folder or Hub name of a model.
        output_dir: New folder. It appears only when both files are written.

    Raises:
        UserFileExistsError: The output folder exists and is not empty.
        UserOSError: There is no such model, or its files cannot be read or downloaded.
        UserValueError: The model has settings that the authors' files cannot store and that differ from the fixed
            settings in the authors' code. That code would compute other logits.
    """
    output_dir = check_new_folder(output_dir)
    recover(checkpoint)
    expected = "the folder of a model of this package or its name on the Hub"
    with loading(f"'{checkpoint}'", expected, checkpoint, Co2SConfig.model_type):
        model = Co2SForSemanticSegmentation.from_pretrained(checkpoint)
    weights = {student: restore_student(model, student) for student in STUDENTS}
    _check_authors_settings(model.config, weights)
    with written_beside(output_dir) as folder:
        for student in STUDENTS:
            prefixed = {f"module.{key}": value for key, value in weights[student].items()}
            torch.save({"model": prefixed}, folder / CHECKPOINT_NAMES[student])


def _check_authors_settings(config: Co2SConfig, weights: dict[str, dict[str, torch.Tensor]]):
    """Raise a UserValueError if a setting differs from the one that the authors' code uses for these weights."""
    options = {name: getattr(config, name) for name in ("decoder_num_attention_heads", "decoder_pool_size")}
    # The logits sizes depend on the crop size of a training, so any sizes are allowed. They must not be None.
    options |= {name: size for name in ("clip_logits_size", "dinov3_logits_size") if (size := getattr(config, name))}
    try:
        authors = config_from_weights(
            weights["clip"], weights["dinov3"], num_attention_heads=config.clip_config.num_attention_heads, **options
        )
    except (ValueError, StrictDataclassError) as error:  # the fixed settings of the authors' code do not fit the sizes
        raise UserValueError(
            f"The authors' code cannot load a model of these sizes: {error} Only models with the authors' settings "
            "can be converted back."
        ) from error
    found, expected = _network_settings(config), _network_settings(authors)
    differing = [name for name in expected if found.get(name) != expected[name]]
    if differing:
        pairs = "; ".join(f"{name} is {found.get(name)} (authors: {expected[name]})" for name in differing)
        raise UserValueError(
            f"The authors' code would compute other logits from this model: {pairs}. Only models with the authors' "
            "settings can be converted back."
        )


def _network_settings(config: Co2SConfig) -> dict[str, object]:
    """Return the fields of a configuration that change the logits and are fixed in the authors' code."""
    content = config.to_dict()
    prefixes = ("decoder_", "clip_", "dinov3_", "image_")
    names = [name for name in content if name.startswith(prefixes) and not name.endswith("_config")]
    settings = {name: content[name] for name in names}
    backbone_names = ["hidden_act", "layer_norm_eps", "num_attention_heads", "key_bias", "use_gated_mlp", "rope_theta"]
    for section in ("clip_config", "dinov3_config"):
        settings |= {f"{section}.{name}": content[section].get(name) for name in backbone_names}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


__all__ = [
    "CHECKPOINT_NAMES",
    "config_from_weights",
    "convert",
    "convert_student",
    "convert_to_original",
    "download_originals",
    "load_original",
    "restore_student",
    "verify",
]
