"""Strict loading: weights that do not fit the configuration or are not finite are errors."""

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import LoadStateDictConfig, LoadStateDictInfo


class Co2SStrictLoadingMixin:
    """A stricter `from_pretrained`.

    transformers only warns of missing weights, and initialises them at random. The model then predicts nonsense.
    """

    @classmethod
    def from_pretrained(cls, *args, use_safetensors: bool = True, **kwargs):
        """Load a model, or a model with an adapter, from a folder or the Hub.

        The folder of an adapter names its base, a folder or a repository. It is loaded, too.

        Args:
            args: Folder or Hub name, and further arguments of transformers' `from_pretrained`.
            use_safetensors: Load only safetensors files, which cannot contain code.
            kwargs: Further arguments of transformers' `from_pretrained`. `ignore_mismatched_sizes=True` also accepts
                missing and unknown weights. Missing ones are initialised at random.

        Returns:
            The model, in evaluation mode.

        Raises:
            OSError: There is no such model, or it has no safetensors file.
            ValueError: Weights are missing or unknown, have wrong shapes, or are not finite.
        """
        return super().from_pretrained(*args, use_safetensors=use_safetensors, **kwargs)

    # transformers calls this method when all weights are loaded, also those of the base of an adapter.
    @staticmethod
    def _finalize_model_loading(
        model: PreTrainedModel, load_config: LoadStateDictConfig, loading_info: LoadStateDictInfo
    ) -> LoadStateDictInfo:
        source = f"'{load_config.pretrained_model_name_or_path or 'state_dict'}'"
        is_strict = not load_config.ignore_mismatched_sizes
        if is_strict and loading_info.mismatched_keys:
            name, found, expected = min(loading_info.mismatched_keys)
            raise ValueError(
                f"{len(loading_info.mismatched_keys)} weights of {source} do not fit its configuration. The weight "
                f"'{name}' has the shape {tuple(found)}, expected {tuple(expected)}. To load the model for other "
                "classes, pass `ignore_mismatched_sizes=True`."
            )
        loading_info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        if is_strict:
            check_names(loading_info.missing_keys, loading_info.unexpected_keys, source)
        check_finite(model.state_dict().items(), source)
        return loading_info


def check_names(missing: Iterable[str], unknown: Iterable[str], source: str):
    """Refuse weights if some are missing, or if the model has no place for some.

    Args:
        missing: Names of the missing weights.
        unknown: Names of the weights that the model has no place for.
        source: The model or adapter, for the message.

    Raises:
        ValueError: There are such names.
    """
    groups = {"missing": sorted(missing), "unknown": sorted(unknown)}
    found = [f"{len(names)} {kind} (such as '{names[0]}')" for kind, names in groups.items() if names]
    if found:
        raise ValueError(
            f"The weights of {source} do not fit its configuration: {' and '.join(found)}. The files are incomplete "
            "or do not belong together. Download or save them again."
        )


def check_finite(weights: Iterable[tuple[str, torch.Tensor]], source: str):
    """Refuse weights with NaN or infinite values. With them, the prediction would be the first class everywhere.

    Weights that are offloaded to the disk are not checked.

    Args:
        weights: Pairs of name and tensor.
        source: The model or adapter, for the message.

    Raises:
        ValueError: A weight has such a value.
    """
    for name, weight in weights:
        # Quantized weights have one byte. Their scales are checked.
        if weight.is_meta or weight.numel() == 0 or not weight.is_floating_point() or weight.element_size() == 1:
            continue
        # NaN and infinity reach the extreme values. This is ten times as fast as `isfinite` of the whole weight.
        if not torch.stack(weight.aminmax()).isfinite().all():
            raise ValueError(
                f"The weight '{name}' of {source} contains NaN or infinite values, so predictions would mean nothing. "
                "The training diverged, or the weights are too large for the number format (`dtype`). Use another "
                "checkpoint."
            )


__all__ = ["Co2SStrictLoadingMixin", "check_finite", "check_names"]
