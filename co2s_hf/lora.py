"""LoRA (arXiv 2106.09685) for Co2S with peft: what to adapt, what to save whole, and how to merge it back."""

import copy
import re
from dataclasses import dataclass

from peft import LoraConfig
from torch import nn

from .arguments import setting
from .modeling_co2s import STUDENTS, Co2SForSemanticSegmentation


# Both towers' linear layers, by the names that transformers gives them; the decoders have other names.
_LAYER = r"(clip|dinov3)\.encoder\.vision_model\..*\."
_ATTENTION = r"(self_attn|attention)\.(q_proj|k_proj|v_proj|out_proj|o_proj)"
_MLP = r"mlp\.(fc1|fc2|gate_proj|up_proj|down_proj)"
TARGETS = {"attention": rf"{_LAYER}{_ATTENTION}", "attention+mlp": rf"{_LAYER}({_ATTENTION}|{_MLP})"}


@dataclass
class LoraArguments:
    """What a script can be told about LoRA."""

    lora_rank: int = setting(8, "Rank of the updates.")
    lora_targets: str = setting(
        "attention", "What is updated: attention, attention+mlp, or a regular expression for names of layers."
    )
    lora_alpha: int | None = setting(None, "Updates are scaled by alpha / rank. Left out: twice the rank.")
    lora_dropout: float = setting(0.0, "Dropout before the updates.")
    use_dora: bool = setting(False, "Also train the magnitudes of the weights (DoRA).")
    use_rslora: bool = setting(False, "Scale by alpha / sqrt(rank), for high ranks (rsLoRA).")
    freeze_decoders: bool = setting(False, "Leave the decoders as they are; the adapter is far smaller then.")
    freeze_queries: bool = setting(False, "Leave DINOv3's learnable queries as they are.")

    def lora_config(self, model: Co2SForSemanticSegmentation) -> LoraConfig:
        """See [`co2s_lora_config`]."""
        further = {"lora_dropout": self.lora_dropout, "use_dora": self.use_dora, "use_rslora": self.use_rslora}
        further |= {} if self.lora_alpha is None else {"lora_alpha": self.lora_alpha}
        return co2s_lora_config(
            model,
            self.lora_rank,
            self.lora_targets,
            train_decoders=not self.freeze_decoders,
            train_queries=not self.freeze_queries,
            **further,
        )


def co2s_lora_config(
    model: Co2SForSemanticSegmentation,
    rank: int = 8,
    targets: str = "attention",
    train_decoders: bool = True,
    train_queries: bool = True,
    **lora_kwargs,
) -> LoraConfig:
    """A plain peft configuration for both students.

    Pass it to `model.add_adapter(...)`, which keeps the model's own methods, or to `peft.get_peft_model`.

    Args:
        model: The base; its layers are what `targets` is checked against.
        rank: Of the updates.
        targets: "attention" (query, key, value and output projections of both towers, what the paper trains),
            "attention+mlp", or a regular expression for whole module names.
        train_decoders: Train the decoders, too; the adapter then carries them whole.
        train_queries: Train the learnable queries, which the adapter carries then. Needed for new classes.
        lora_kwargs: Further fields of [`LoraConfig`]: `lora_alpha` (twice the rank when left out), `lora_dropout`,
            `use_dora`, `use_rslora`, ...

    Returns:
        The configuration. The class text is always carried along: it is small, and new classes bring their own.

    Raises:
        ValueError: The rank is not positive, no layer of the model matches, or the queries of changed classes are left
            out.
    """
    if getattr(model, "_has_new_queries", False) and not train_queries:
        raise ValueError("The model's classes were changed, so the adapter must have their queries: `train_queries`.")
    if rank < 1:
        raise ValueError(f"`rank` is {rank}; it must be at least 1.")
    pattern = TARGETS.get(targets, targets)
    try:
        names = [
            name for name, module in model.named_modules() if _is_adaptable(module) and re.fullmatch(pattern, name)
        ]
    except re.error as error:
        raise ValueError(
            f"`targets` is '{targets}': neither {' nor '.join(TARGETS)}, nor a regular expression ({error})."
        ) from error
    if not names:
        raise ValueError(
            f"`targets` is '{targets}', which no layer matches. Give {' or '.join(TARGETS)}, or a regular expression "
            "for whole names such as 'clip.encoder.vision_model.encoder.layers.0.self_attn.q_proj'."
        )
    whole = ["clip.guidance"]
    whole += ["dinov3.guidance"] if train_queries else []
    whole += [f"{student}.decoder" for student in STUDENTS] if train_decoders else []
    return LoraConfig(r=rank, target_modules=pattern, modules_to_save=whole, **{"lora_alpha": 2 * rank} | lora_kwargs)


def has_adapter(model: Co2SForSemanticSegmentation) -> bool:
    """Whether an adapter was added to the model or loaded."""
    return getattr(model, "_hf_peft_config_loaded", False)


def merged(model: Co2SForSemanticSegmentation) -> Co2SForSemanticSegmentation:
    """A copy of a model with its active adapter merged into the weights: a plain Co2S model, without peft.

    Raises:
        ValueError: The model has no adapter.
    """
    if not has_adapter(model):
        raise ValueError("The model has no adapter to merge.")
    model = copy.deepcopy(model)
    model.enable_adapters()  # and with them their classes
    model._unwrap(keep_adapter=True)
    return model


def _is_adaptable(module: nn.Module) -> bool:
    return isinstance(getattr(module, "base_layer", module), nn.Linear | nn.Conv2d)  # another adapter may be there


__all__ = ["TARGETS", "LoraArguments", "co2s_lora_config", "has_adapter", "merged"]
