"""Convert the authors' checkpoints to a co2s_hf folder, and back.

    python -m co2s_hf.convert_co2s_to_hf --clip_checkpoint best_clip.pth --dinov3_checkpoint best_dinov3.pth \\
        --dataset whdld --output_dir co2s-whdld --verify

    # The same from a Hub repository that holds both files in a folder:
    python -m co2s_hf.convert_co2s_to_hf --hub_repo XavierJiezou/co2s-models --hub_folder POTSDAM/1_32-74.30 \\
        --dataset potsdam --output_dir co2s-potsdam --verify

    # Back to best_clip.pth and best_dinov3.pth for the authors' tools:
    python -m co2s_hf.convert_co2s_to_hf --to_original co2s-whdld --output_dir original

The key table below is strict: every source key is used or listed as dropped, and every target is filled. Sizes are
read off the weights; head counts, the pooling and the fixed logits sizes cannot be and are options. Tapped layers and
dilations are the authors'.
"""

import argparse
import math
import os
import pickle
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .catalog import BENCHMARKS
from .configuration_co2s import Co2SConfig
from .files import check_new_folder, written_beside
from .image_processing_co2s import Co2SImageProcessor
from .modeling_co2s import STUDENTS, Co2SForSemanticSegmentation


CHECKPOINT_NAMES = {"clip": "best_clip.pth", "dinov3": "best_dinov3.pth"}

# Rows of a key table: the authors' key, our key or keys (below the student), and the shape of the authors' tensor
# where it is not ours (-1: the width). Several of our keys are the authors' tensor split along its first dimension;
# None is a part that the authors' code masks out.
Row = tuple[str, tuple[str | None, ...], tuple[int, ...] | None]


def _rows(theirs: str, ours: str, suffixes: tuple[str, ...] = ("weight", "bias")) -> list[Row]:
    return [(f"{theirs}.{suffix}", (f"{ours}.{suffix}",), None) for suffix in suffixes]


def _decoder_table(config: Co2SConfig) -> list[Row]:
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
        table += [
            (f"{layer}.attn.attn.in_proj_{kind}", (f"{our_layer}.qkv.{kind}",), None) for kind in ("weight", "bias")
        ]
        table += _rows(f"{layer}.attn.attn.out_proj", f"{our_layer}.projection")
        table += _rows(f"{layer}.ffn.layers.0.0", f"{our_layer}.mlp.0") + _rows(
            f"{layer}.ffn.layers.1", f"{our_layer}.mlp.2"
        )
    for n in range(len(config.decoder_up_channels)):
        step, our_step = f"{theirs}.up{n + 1}", f"{ours}.upsampling_layers.{n}"
        table += _rows(f"{step}.up", f"{our_step}.upsample") + _rows(f"{theirs}.skip_proj.{n}.0", f"{our_step}.skip.0")
        table += conv_norm(f"{step}.conv.0", f"{step}.conv.1", f"{our_step}.join")
        table += conv_norm(f"{step}.conv.3", f"{step}.conv.4", f"{our_step}.refine")
    return table


def _clip_table(config: Co2SConfig) -> list[Row]:
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
        table += _rows(f"{layer}.ffn.layers.0.0", f"{our_layer}.mlp.fc1") + _rows(
            f"{layer}.ffn.layers.1", f"{our_layer}.mlp.fc2"
        )
    return table + _decoder_table(config)


def _dinov3_table(config: Co2SConfig) -> list[Row]:
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
        table += _rows(f"{layer}.mlp.fc1", f"{our_layer}.mlp.up_proj") + _rows(
            f"{layer}.mlp.fc2", f"{our_layer}.mlp.down_proj"
        )
    return table + _decoder_table(config)


def _dropped_keys(config: Co2SConfig) -> dict[str, torch.Tensor]:
    """Constants that the authors' DINOv3 student stores and transformers derives, with their values."""
    tower = config.dinov3_config
    head_size = tower.hidden_size // tower.num_attention_heads
    part = torch.ones(tower.hidden_size)
    constants = {"backbone.rope_embed.periods": tower.rope_theta ** torch.arange(0, 1, 4 / head_size)}
    for n in range(tower.num_hidden_layers):
        constants[f"backbone.blocks.{n}.attn.qkv.bias_mask"] = torch.cat([part, 0 * part, part])
    return constants


_TABLES = {"clip": _clip_table, "dinov3": _dinov3_table}


def load_original(path: str | Path, student: str) -> dict[str, torch.Tensor]:
    """Read the weights of one student from a checkpoint of the authors' training script.

    Args:
        path: `best_clip.pth` or `best_dinov3.pth`: `{"model": {"module.<key>": tensor}, ...}`.
        student: "clip" or "dinov3", for the error.

    Raises:
        ValueError: The file is not such a checkpoint of this student.
    """
    try:
        # Nothing but tensors and plain containers: a checkpoint from a stranger must not run code.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        with open(path, "rb") as file:
            start = file.read(40)
        raise ValueError(
            f"{path} ({os.path.getsize(path)} bytes, starting with {start!r}) is not a PyTorch checkpoint of plain "
            "tensors; nothing else is loaded. An incomplete download, a Git LFS pointer, or another program's file?"
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        found = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(
            f"{path} holds {found}; expected the authors' {CHECKPOINT_NAMES[student]}, a dictionary with the weights "
            "under 'model'."
        )
    return {key.removeprefix("module."): value for key, value in checkpoint["model"].items()}


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
    """Read every size off the authors' weights; what weights do not show is an argument with the authors' value.

    The authors run CLIP with GELU, layer-norm epsilon 1e-6 and ImageNet statistics, and so does the result.

    Raises:
        ValueError: A key that sizes are read from is missing.
    """

    def shape(weights: dict[str, torch.Tensor], student: str, key: str) -> torch.Size:
        if key not in weights:
            raise ValueError(
                f"The {student} checkpoint has no '{key}' among its {len(weights)} weights (such as "
                f"'{next(iter(weights), None)}'). Is it the authors' {CHECKPOINT_NAMES[student]}?"
            )
        return weights[key].shape

    def num_layers(weights: dict[str, torch.Tensor], prefix: str) -> int:
        return len({key[len(prefix) :].split(".")[0] for key in weights if key.startswith(prefix)})

    clip_patch = shape(clip_weights, "clip", "backbone.patch_embed.projection.weight")
    clip_positions = shape(clip_weights, "clip", "backbone.pos_embed")[1] - 1
    dinov3_patch = shape(dinov3_weights, "dinov3", "backbone.patch_embed.proj.weight")
    head_in = shape(clip_weights, "clip", "decode_head.conv1.weight")
    skips = [shape(clip_weights, "clip", f"decode_head.skip_proj.{n}.0.weight")[0] for n in range(2)]
    ups = [shape(clip_weights, "clip", f"decode_head.up{n + 1}.conv.0.weight")[0] for n in range(2)]
    mlp_width = shape(clip_weights, "clip", "decode_head.layers.0.transformer.ffn.layers.0.0.bias")[0]
    return Co2SConfig(
        clip_config={
            "hidden_size": clip_patch[0],
            "intermediate_size": shape(clip_weights, "clip", "backbone.layers.0.ffn.layers.0.0.weight")[0],
            "projection_dim": shape(clip_weights, "clip", "backbone.proj.weight")[0],
            "num_hidden_layers": num_layers(clip_weights, "backbone.layers."),
            "num_attention_heads": num_attention_heads,
            "image_size": math.isqrt(clip_positions) * clip_patch[-1],
            "patch_size": clip_patch[-1],
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
        },
        dinov3_config={
            "hidden_size": dinov3_patch[0],
            "intermediate_size": shape(dinov3_weights, "dinov3", "backbone.blocks.0.mlp.fc1.weight")[0],
            "num_hidden_layers": num_layers(dinov3_weights, "backbone.blocks."),
            "num_attention_heads": num_attention_heads,
            "patch_size": dinov3_patch[-1],
            "num_register_tokens": shape(dinov3_weights, "dinov3", "backbone.storage_tokens")[1],
            "layer_norm_eps": 1e-6,
        },
        decoder_channels=head_in[0],
        decoder_guidance_channels=shape(clip_weights, "clip", "decode_head.text_proj.0.weight")[0],
        decoder_kernel_size=head_in[-1],
        decoder_num_layers=num_layers(clip_weights, "decode_head.layers."),
        decoder_num_attention_heads=decoder_num_attention_heads,
        decoder_mlp_ratio=mlp_width // head_in[0],
        decoder_pool_size=decoder_pool_size,
        decoder_skip_channels=skips,
        decoder_up_channels=ups,
        clip_image_mean=list(IMAGENET_DEFAULT_MEAN),
        clip_image_std=list(IMAGENET_DEFAULT_STD),
        clip_logits_size=clip_logits_size,
        dinov3_logits_size=dinov3_logits_size,
        **config_kwargs,
    )


def convert_student(
    weights: dict[str, torch.Tensor], student: str, model: Co2SForSemanticSegmentation
) -> dict[str, torch.Tensor]:
    """Rename and reshape the authors' weights of one student to the keys of `model.clip` or `model.dinov3`.

    Raises:
        ValueError: Keys are missing or left over, or a tensor has another size; the message lists them.
    """
    table = _TABLES[student](model.config)
    dropped = _dropped_keys(model.config) if student == "dinov3" else {}
    used = {theirs for theirs, _, _ in table}
    missing, unexpected = sorted(used - set(weights)), sorted(set(weights) - used - set(dropped))
    if missing or unexpected:
        raise ValueError(
            f"These are not the authors' {student} weights. Missing ({len(missing)}): {missing[:10]}. Unexpected "
            f"({len(unexpected)}): {unexpected[:10]}."
        )
    for key, expected in dropped.items():
        # Periods may have been stored in bfloat16.
        if key in weights and not torch.allclose(weights[key].float(), expected, rtol=1e-2):
            raise ValueError(f"'{key}' is not the constant that transformers' DINOv3 derives in its place.")
    target = getattr(model, student).state_dict()
    converted = {}
    for theirs, ours, shape in table:
        for key, part in zip(ours, weights[theirs].chunk(len(ours))):
            if key is None:
                continue
            if part.shape != (target[key] if shape is None else target[key].reshape(shape)).shape:
                raise ValueError(
                    f"'{theirs}' has the shape {tuple(weights[theirs].shape)}, which does not give "
                    f"{tuple(target[key].shape)} for '{student}.{key}'. Do the two checkpoints and the dataset belong "
                    "together?"
                )
            converted[key] = part.reshape(target[key].shape).contiguous()
    return converted


def restore_student(model: Co2SForSemanticSegmentation, student: str) -> dict[str, torch.Tensor]:
    """The authors' keys and shapes from `model.clip` or `model.dinov3`: the way back from [`convert_student`].

    Raises:
        ValueError: The model has weights that the authors' architecture has no place for.
    """
    ours = getattr(model, student).state_dict()
    table = _TABLES[student](model.config)
    if extra := sorted(set(ours) - {key for _, keys, _ in table for key in keys}):
        raise ValueError(
            f"The authors' {student} student has no place for {len(extra)} weights, such as '{extra[0]}'."
        )
    weights = dict(_dropped_keys(model.config)) if student == "dinov3" else {}
    for theirs, keys, shape in table:
        known = next(ours[key] for key in keys if key is not None)
        parts = [torch.zeros_like(known) if key is None else ours[key] for key in keys]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        weights[theirs] = (tensor if shape is None else tensor.reshape(shape)).clone()
    return weights


def convert(
    clip_checkpoint: str | Path, dinov3_checkpoint: str | Path, output_dir: str | Path, dataset: str, **sizes
) -> Co2SForSemanticSegmentation:
    """Convert both students of the authors' code into one folder that `from_pretrained` loads.

    Args:
        clip_checkpoint: `best_clip.pth`.
        dinov3_checkpoint: `best_dinov3.pth`.
        output_dir: New folder; it appears only when complete.
        dataset: Key of [`co2s_hf.catalog.BENCHMARKS`], for names, palette and concepts.
        sizes: See [`config_from_weights`].

    Raises:
        FileExistsError: The output folder exists and is not empty.
        ValueError: A file is not what it should be.
    """
    output_dir = check_new_folder(output_dir)
    weights = {
        "clip": load_original(clip_checkpoint, "clip"),
        "dinov3": load_original(dinov3_checkpoint, "dinov3"),
    }
    config = config_from_weights(weights["clip"], weights["dinov3"], **BENCHMARKS[dataset].config_kwargs, **sizes)
    model = Co2SForSemanticSegmentation(config).eval()
    for student in STUDENTS:
        getattr(model, student).load_state_dict(convert_student(weights[student], student, model), strict=True)
    with written_beside(output_dir) as folder:
        model.save_pretrained(folder)
        Co2SImageProcessor.from_model_config(config).save_pretrained(folder)
    return model


def verify(output_dir: str | Path, clip_checkpoint: str | Path, dinov3_checkpoint: str | Path) -> int:
    """Reload a converted folder, turn it back and compare with the authors' files, bit by bit.

    Returns:
        The number of tensors compared. Masked-out key biases and stored constants are not among them.

    Raises:
        ValueError: A tensor differs.
    """
    model = Co2SForSemanticSegmentation.from_pretrained(output_dir)
    compared = 0
    for student, path in (("clip", clip_checkpoint), ("dinov3", dinov3_checkpoint)):
        source, restored = load_original(path, student), restore_student(model, student)
        for theirs, ours, _ in _TABLES[student](model.config):
            for key, expected, found in zip(ours, source[theirs].chunk(len(ours)), restored[theirs].chunk(len(ours))):
                if key is not None and not torch.equal(expected, found):
                    raise ValueError(f"'{theirs}' of {path} differs from '{student}.{key}' in {output_dir}.")
            compared += 1
    return compared


def convert_to_original(checkpoint: str | Path, output_dir: str | Path):
    """Write `best_clip.pth` and `best_dinov3.pth`, as the authors' code loads them, from a co2s_hf checkpoint.

    Raises:
        FileExistsError: The output folder exists and is not empty.
        ValueError: The authors' code, which fixes what weights do not show, would compute something else.
    """
    output_dir = check_new_folder(output_dir)
    model = Co2SForSemanticSegmentation.from_pretrained(checkpoint)
    weights = {student: restore_student(model, student) for student in STUDENTS}
    _check_authors_settings(model.config, weights)
    with written_beside(output_dir) as folder:
        for student in STUDENTS:
            prefixed = {f"module.{key}": value for key, value in weights[student].items()}
            torch.save({"model": prefixed}, folder / CHECKPOINT_NAMES[student])


def _check_authors_settings(config: Co2SConfig, weights: dict[str, dict[str, torch.Tensor]]):
    """Refuse a model that differs from what its weights would mean to the authors' code."""
    options = {name: getattr(config, name) for name in ("decoder_num_attention_heads", "decoder_pool_size")}
    authors = config_from_weights(
        weights["clip"], weights["dinov3"], num_attention_heads=config.clip_config.num_attention_heads, **options
    ).to_dict()
    # Crops differ from run to run, and their logits sizes with them; that there is one is the authors' quirk.
    authors |= {name: getattr(config, name) or authors[name] for name in ("clip_logits_size", "dinov3_logits_size")}
    sections = {"": (authors, config.to_dict())}
    sections |= {f"{name}.": (authors[name], config.to_dict()[name]) for name in ("clip_config", "dinov3_config")}
    fields = [name for name in authors if name.startswith(("decoder_", "clip_", "dinov3_", "image_"))]
    tower_fields = ["hidden_act", "layer_norm_eps", "num_attention_heads", "key_bias", "use_gated_mlp", "rope_theta"]
    differing = []
    for prefix, (expected, found) in sections.items():
        for name in tower_fields if prefix else [field for field in fields if not field.endswith("_config")]:
            pair = [list(v) if isinstance(v, tuple) else v for v in (found.get(name), expected.get(name))]
            if pair[0] != pair[1]:
                differing.append(f"{prefix}{name} is {pair[0]}, there {pair[1]}")
    if differing:
        raise ValueError(
            "The authors' code would compute something else from this model: " + "; ".join(differing) + "."
        )


def main(arguments: list[str] | None = None):
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m co2s_hf.convert_co2s_to_hf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--clip_checkpoint", help="the authors' best_clip.pth")
    parser.add_argument("--dinov3_checkpoint", help="the authors' best_dinov3.pth")
    parser.add_argument("--hub_repo", help="Hub repository with both files, instead of paths")
    parser.add_argument("--hub_folder", default="", help="folder inside --hub_repo")
    parser.add_argument("--dataset", choices=sorted(BENCHMARKS), help="what they were trained on: classes and palette")
    parser.add_argument("--to_original", metavar="CHECKPOINT", help="convert this co2s_hf checkpoint back instead")
    parser.add_argument("--output_dir", required=True, help="new folder for the result")
    parser.add_argument("--verify", action="store_true", help="reload the result and compare it with the source")
    sizes = {
        "num_attention_heads": (12, "heads of both towers"),
        "decoder_num_attention_heads": (4, "heads of the decoders' semantic layers"),
        "decoder_pool_size": (4, "pooling before the semantic layers"),
        "clip_logits_size": (224, "fixed side of the CLIP student's logits"),
        "dinov3_logits_size": (256, "fixed side of the DINOv3 student's logits"),
    }
    for name, (value, text) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} (the authors': {value})")
    args = parser.parse_args(arguments)

    if args.to_original:
        if args.verify or args.clip_checkpoint or args.dinov3_checkpoint or args.hub_repo:
            parser.error("--to_original takes --output_dir alone")
        convert_to_original(args.to_original, args.output_dir)
        print(f"Wrote {' and '.join(CHECKPOINT_NAMES.values())} to {args.output_dir}.")
        return
    if not args.dataset:
        parser.error("--dataset is needed: it names the classes")
    paths = (args.clip_checkpoint, args.dinov3_checkpoint)
    if args.hub_repo:
        folder = f"{args.hub_folder.strip('/')}/".lstrip("/")
        paths = tuple(hf_hub_download(args.hub_repo, folder + name) for name in CHECKPOINT_NAMES.values())
    if None in paths:
        parser.error("give both --clip_checkpoint and --dinov3_checkpoint, or --hub_repo")
    convert(*paths, args.output_dir, args.dataset, **{name: getattr(args, name) for name in sizes})
    print(f"Wrote {args.output_dir}. Load it with Co2SForSemanticSegmentation.from_pretrained('{args.output_dir}').")
    if args.verify:
        print(f"Verified: {verify(args.output_dir, *paths)} tensors reload bit-equal to the authors' files.")


if __name__ == "__main__":
    main()
