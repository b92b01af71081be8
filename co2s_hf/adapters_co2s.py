"""peft adapters that bring their own classes and settings: several on one base, switched, each with its own labels."""

import copy
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers.modeling_utils import LoadStateDictInfo
from transformers.utils import cached_file
from transformers.utils.hub import resolve_revision


ADAPTER_FILE = "co2s_adapter.json"  # beside adapter_config.json, which has no place for these
PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# What an adapter may change in the configuration: the classes, and what was done to the images it was trained on.
ADAPTER_FIELDS = ("id2label", "label2id", "palette", "class_concepts", "text_encoder")
ADAPTER_FIELDS += ("fusion", "crop_size", "image_bands", "image_scale")
# What it fits to: the sizes of the base.
TOWER_SIZES = ("hidden_size", "num_hidden_layers", "patch_size")
DECODER_SIZES = ("decoder_channels", "decoder_guidance_channels", "decoder_num_layers", "decoder_up_channels")
DOWNLOADS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class Co2SAdapterMixin:
    """Adapters through transformers' own methods, with the configuration following what predicts.

    `_shown` is the adapter whose fields the configuration holds, None for the base.
    """

    _shown: str | None = None

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Save weights, configuration and code; of a model with adapters the active adapter and its classes alone."""
        if getattr(self, "_hf_peft_config_loaded", False) and kwargs.get("is_main_process", True):
            os.makedirs(save_directory, exist_ok=True)
            name = self.active_adapters()[0]
            fields = self._adapter_fields() if self._shown == name else self._fields_of_adapters[name]
            content = {"config": fields, "base": self._base_sizes()}
            (Path(save_directory) / ADAPTER_FILE).write_text(json.dumps(content, indent=1) + "\n")
        super().save_pretrained(save_directory, **kwargs)

    def _get_files_timestamps(self, working_dir: str | os.PathLike) -> dict[str, float]:
        # What transformers does not find here it takes for new, and uploads with the rest.
        return {
            name: time for name, time in super()._get_files_timestamps(working_dir).items() if name != ADAPTER_FILE
        }

    def add_adapter(self, adapter_config, adapter_name: str | None = None):
        """Add a fresh adapter for the base's classes and activate it. (Change these before adding the first.)"""
        is_first, name = not getattr(self, "_hf_peft_config_loaded", False), self._new_name(adapter_name)
        self._begin(is_first)
        self._fields_of_adapters[name] = self._adapter_fields()
        try:
            super().add_adapter(adapter_config, name)
        except BaseException:
            del self._fields_of_adapters[name]
            self._hf_peft_config_loaded = not is_first
            raise

    def load_adapter(
        self,
        peft_model_id: str,
        adapter_name: str | None = None,
        is_trainable: bool = False,
        load_config=None,
        adapter_kwargs: dict | None = None,
        **download_kwargs,
    ) -> LoadStateDictInfo:
        """Load an adapter from a folder or the Hub, with the classes that it was trained on, and activate it.

        The classes may be others than the base's, in number, too: the base keeps its own. (transformers 5.23's own
        method neither allows that nor loads DoRA's magnitudes; the weights here are read by peft's.)

        Args:
            peft_model_id: Folder or Hub name.
            adapter_name: To switch to it by; "default" when left out.
            is_trainable: Leave its parameters trainable.
            load_config: What `from_pretrained` passes on.
            adapter_kwargs: Of the download (`token`, `revision`, ...).
            download_kwargs: The same.

        Raises:
            ImportError: peft is not installed.
            OSError: There is no such adapter.
            ValueError: The name is taken, or the adapter does not fit this model, which stays as it was.
        """
        try:
            from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
        except ImportError as error:
            raise ImportError("Adapters need peft: pip install peft") from error

        is_first, name = not getattr(self, "_hf_peft_config_loaded", False), self._new_name(adapter_name)
        downloads = {
            **(load_config.download_kwargs if load_config else {}),
            **(adapter_kwargs or {}),
            **download_kwargs,
        }
        downloads = {key: value for key, value in downloads.items() if key in DOWNLOADS}
        # One commit of the adapter's repository; what `from_pretrained` resolved was one of the base's.
        places = {key: value for key, value in downloads.items() if key in ("token", "local_files_only", "cache_dir")}
        downloads["revision"] = resolve_revision(peft_model_id, downloads.get("revision"), **places)
        peft_config = PeftConfig.from_pretrained(
            Path(cached_file(peft_model_id, PEFT_CONFIG_FILE, **downloads)).parent
        )
        weights = load_file(cached_file(peft_model_id, PEFT_WEIGHTS_FILE, **downloads), device=str(self.device))
        weights = {
            key.removeprefix("base_model.model."): value for key, value in weights.items()
        }  # as PeftModel has it
        path = cached_file(peft_model_id, ADAPTER_FILE, _raise_exceptions_for_missing_entries=False, **downloads)
        self._begin(is_first)
        fields = self._base_fields
        if path is not None:
            content = json.loads(Path(path).read_text())
            self._check_base(content["base"], peft_model_id)
            fields = content["config"]
        else:  # saved by peft alone, for the base's classes
            _check_classes(weights, len(fields["id2label"]), peft_model_id)

        peft_config.inference_mode = not is_trainable
        try:
            with (
                self._guidance_for(len(fields["id2label"])),
                warnings.catch_warnings(),
            ):  # for the adapter's own copies
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # so there may be
                inject_adapter_in_model(peft_config, self, name)
            self._hf_peft_config_loaded = True
            loaded = set_peft_model_state_dict(self, weights, adapter_name=name)
            if loaded.unexpected_keys:
                raise ValueError(f"There is no place for {', '.join(loaded.unexpected_keys[:5])} ...")
        except (RuntimeError, KeyError, ValueError) as error:
            self._remove(name)
            base, reason = (
                self.name_or_path or "this model",
                " ".join(str(error).split("\n\t")[:2]),
            )  # the first of many
            raise ValueError(f"The adapter {peft_model_id} does not fit {base}: {reason}") from error
        self._fields_of_adapters[name] = fields
        self.set_adapter(name)
        if not is_trainable:
            self.eval()
            for module in self._adapter_modules():
                module.requires_grad_(False)
        return LoadStateDictInfo(set(), set(), set(), [], {}, set())

    def set_adapter(self, adapter_name: str):
        """Activate an adapter and its classes."""
        if adapter_name not in getattr(self, "peft_config", {}):
            names = ", ".join(getattr(self, "peft_config", {})) or "none"
            raise ValueError(f"There is no adapter '{adapter_name}'; loaded: {names}.")
        for module in self._adapter_modules():
            module.enable_adapters(True)
            is_part = adapter_name in getattr(module, "modules_to_save", [adapter_name])
            module.set_adapter(adapter_name if is_part else [])  # what it does not have is the base's
        self._show(adapter_name)

    def disable_adapters(self):
        """Predict as the base does, with its classes."""
        super().disable_adapters()
        self._show(None)

    def enable_adapters(self):
        """Go back to the active adapter."""
        # transformers 5.23's own method forgets what an adapter has whole copies of (decoders, queries).
        self.set_adapter(self.active_adapters()[0])

    def delete_adapter(self, adapter_names: list[str] | str):
        """Remove adapters; another one, if there is any, or the base predicts then."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name not in getattr(self, "peft_config", {}):
                raise ValueError(f"There is no adapter '{name}' to delete.")
            self._show(None)
            self._remove(name)

    def _remove(self, name: str):
        """Take an adapter out again, also one that was loaded in part."""
        self._fields_of_adapters.pop(name, None)
        others = [other for other in getattr(self, "peft_config", {}) if other != name]
        if not others:
            self._unwrap(keep_adapter=False)
        elif name in self.peft_config:
            super().delete_adapter(name)
            self.set_adapter(others[-1])

    def _unwrap(self, keep_adapter: bool):
        """Be a plain model again: the base, or the base with the active adapter merged into it."""
        for name, module in list(self.named_modules()):
            if hasattr(module, "base_layer"):
                if keep_adapter:
                    module.merge()
                self.set_submodule(name, module.get_base_layer())
            elif hasattr(module, "modules_to_save"):
                active = module.active_adapters if keep_adapter else []
                self.set_submodule(name, module.modules_to_save[active[0]] if active else module.original_module)
        if hasattr(self, "peft_config"):
            del self.peft_config
        self._hf_peft_config_loaded, self._shown = False, None

    def _adapter_modules(self) -> Iterator[nn.Module]:
        """The modules that peft put in: layers with updates, and wrappers of what adapters have whole copies of."""
        return (m for m in self.modules() if hasattr(m, "base_layer") or hasattr(m, "modules_to_save"))

    def _new_name(self, adapter_name: str | None) -> str:
        name = adapter_name or "default"
        if name in getattr(self, "peft_config", {}):
            raise ValueError(f"There is an adapter '{name}' already; give another `adapter_name`.")
        return name

    def _begin(self, is_first: bool):
        """Before an adapter joins: what the configuration holds is the base's then."""
        if is_first:
            self._base_fields, self._fields_of_adapters = self._adapter_fields(), {}
        self._show(None)

    def _show(self, name: str | None):
        """Let the configuration hold an adapter's fields, or the base's; what it held is kept for its owner."""
        if self._shown is None:
            self._base_fields = self._adapter_fields()
        elif self._shown in self._fields_of_adapters:
            self._fields_of_adapters[self._shown] = self._adapter_fields()
        fields = self._base_fields if name is None else self._fields_of_adapters[name]
        fields = fields | {"id2label": {int(index): label for index, label in fields["id2label"].items()}}
        for key in ADAPTER_FIELDS:
            setattr(self.config, key, copy.deepcopy(fields[key]))
        self._shown = name

    def _adapter_fields(self) -> dict:
        return {name: copy.deepcopy(getattr(self.config, name)) for name in ADAPTER_FIELDS}

    def _base_sizes(self) -> dict:
        sizes = {
            f"{tower}.{name}": getattr(getattr(self.config, tower), name)
            for tower in ("clip_config", "dinov3_config")
            for name in TOWER_SIZES
        }
        return sizes | {
            name: list(value) if isinstance(value := getattr(self.config, name), tuple) else value
            for name in DECODER_SIZES
        }

    def _check_base(self, wanted: dict, adapter: str):
        found = self._base_sizes()
        if differing := [name for name in found if wanted.get(name) != found[name]]:
            raise ValueError(
                f"The adapter {adapter} was made for another base than {self.name_or_path or 'this model'}: "
                + "; ".join(f"`{name}` is {wanted.get(name)} there and {found[name]} here" for name in differing)
                + ". Load it onto the base that its adapter_config.json names."
            )

    @contextmanager
    def _guidance_for(self, num_labels: int) -> Iterator[None]:
        """Let the base's queries and class text have the shape of so many classes for the time being."""
        # Once there is an adapter, peft wraps the module.
        queries = getattr(self.dinov3.guidance, "original_module", self.dinov3.guidance)
        text = getattr(self.clip.guidance, "original_module", self.clip.guidance)
        own_queries, own_text = queries.queries, text.embeddings
        if len(own_queries) != num_labels:
            shape = (num_labels, own_queries.shape[1])
            queries.queries = nn.Parameter(torch.zeros(shape, dtype=own_queries.dtype, device=own_queries.device))
            text.embeddings = own_text.new_zeros(num_labels, own_text.shape[1])
        try:
            yield
        finally:
            queries.queries, text.embeddings = own_queries, own_text


def _check_classes(weights: dict[str, torch.Tensor], num_labels: int, adapter: str):
    """Refuse an adapter for another number of classes that does not say which."""
    for key in ("clip.guidance.embeddings", "dinov3.guidance.queries"):
        if key in weights and len(weights[key]) != num_labels:
            raise ValueError(
                f"The adapter {adapter} is for {len(weights[key])} classes and this model has {num_labels}, but it "
                f"lacks {ADAPTER_FILE}, which says what they are: save it with the model's own `save_pretrained`."
            )


__all__ = ["ADAPTER_FILE", "PEFT_CONFIG_FILE", "Co2SAdapterMixin"]
