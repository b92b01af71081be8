"""LoRA (arXiv 2106.09685) for Co2S with peft: layers to update, modules to train as a whole, and merging."""

import copy
import re
from collections.abc import Sequence

from peft import LoraConfig
from torch import nn

from ..model.modeling_co2s import STUDENTS, Co2SForSemanticSegmentation
from ..utils.errors import UserValueError
from .options import LoraOptions


# Names of linear layers in the backbones of transformers. The layers of the decoders have other names.
_LAYER = r"(clip|dinov3)\.encoder\.vision_model\..*\."
_ATTENTION = r"(self_attn|attention)\.(q_proj|k_proj|v_proj|out_proj|o_proj)"
_MLP = r"mlp\.(fc1|fc2|gate_proj|up_proj|down_proj)"
TARGETS = {"attention": rf"{_LAYER}{_ATTENTION}", "attention+mlp": rf"{_LAYER}({_ATTENTION}|{_MLP})"}


def co2s_lora_config(
    model: Co2SForSemanticSegmentation,
    rank: int = 8,
    targets: str = "attention",
    train_decoders: bool = True,
    train_queries: bool = True,
    **lora_kwargs,
) -> LoraConfig:
    """Make a peft configuration for both students.

    Pass it to `model.add_adapter(...)`, which keeps the model's own methods, or to `peft.get_peft_model`.

    Args:
        model: The base model. At least one of its layers must match `targets`.
        rank: Rank of the updates.
        targets: "attention" (query, key, value and output projections of both backbones, which the paper trains),
            "attention+mlp", or a regular expression that matches whole module names.
        train_decoders: Train the decoders, too. The adapter then contains them.
        train_queries: Train the learnable queries, too. The adapter then contains them. New classes need this.
        lora_kwargs: Further fields of [`LoraConfig`]: `lora_alpha` (default: twice the rank), `lora_dropout`,
            `use_dora`, `use_rslora`, ...

    Returns:
        The configuration. The adapter always contains the class-text embeddings: they are small, and new classes have
        their own.

    Raises:
        UserValueError: The rank is below 1, no layer of the model matches, or the model has new classes and
            `train_queries` is False.
    """
    if getattr(model, "_has_new_queries", False) and not train_queries:
        raise UserValueError("The model has new classes, so their queries must be trained: `train_queries=True`.")
    if rank < 1:
        raise UserValueError(f"`rank` is {rank}; it must be at least 1.")
    pattern = TARGETS.get(targets, targets)
    adaptable = [name for name, module in model.named_modules() if _is_adaptable(module)]
    try:
        names = [name for name in adaptable if re.fullmatch(pattern, name)]
    except re.error as error:
        raise UserValueError(
            f"`targets` is '{targets}': neither {' nor '.join(TARGETS)}, nor a regular expression ({error}). "
            f"{_layers_to_match(adaptable)}"
        ) from error
    if not names:
        raise UserValueError(
            f"`targets` is '{targets}', which matches no layer. Give {' or '.join(TARGETS)}, or a regular expression "
            f"for whole names. {_layers_to_match(adaptable)}"
        )
    whole = ["clip.guidance"]
    whole += ["dinov3.guidance"] if train_queries else []
    whole += [f"{student}.decoder" for student in STUDENTS] if train_decoders else []
    return LoraConfig(r=rank, target_modules=pattern, modules_to_save=whole, **{"lora_alpha": 2 * rank} | lora_kwargs)


def lora_config(model: Co2SForSemanticSegmentation, options: LoraOptions) -> LoraConfig:
    """Make the peft configuration for the options of a run."""
    further = {} if options.lora_alpha is None else {"lora_alpha": options.lora_alpha}
    try:
        return co2s_lora_config(
            model,
            options.lora_rank,
            options.lora_targets,
            train_decoders=not options.freeze_decoders,
            train_queries=not options.freeze_queries,
            lora_dropout=options.lora_dropout,
            **further,
        )
    except UserValueError as error:  # name the option, not the parameter
        raise UserValueError(str(error).replace("`targets`", "`lora_targets`")) from error


def has_adapter(model: Co2SForSemanticSegmentation) -> bool:
    """Return whether the model has an adapter."""
    return getattr(model, "_hf_peft_config_loaded", False)


def merged(model: Co2SForSemanticSegmentation) -> Co2SForSemanticSegmentation:
    """Return a copy of the model with its active adapter merged into the weights. The copy does not need peft.

    Raises:
        ValueError: The model has no adapter.
    """
    if not has_adapter(model):
        raise ValueError("The model has no adapter to merge.")
    model = copy.deepcopy(model)
    model.enable_adapters()  # this also sets the adapter's classes
    model._unwrap(keep_adapter=True)
    return model


def _layers_to_match(names: Sequence[str]) -> str:
    """Say how the layers are called that an expression may match."""
    backbones = [name for name in names if re.match(_LAYER, name)]
    ends = dict.fromkeys(name.rpartition(".")[2] for name in backbones)
    return f"A whole name is '{backbones[0]}'. Names end with {', '.join(ends)}."


def _is_adaptable(module: nn.Module) -> bool:
    return isinstance(getattr(module, "base_layer", module), nn.Linear | nn.Conv2d)  # an adapter may be there already


__all__ = ["TARGETS", "co2s_lora_config", "has_adapter", "lora_config", "merged"]
