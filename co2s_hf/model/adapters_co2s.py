"""peft adapters with classes and settings of their own.

One base model can hold several adapters. Switching adapters also switches the classes in `model.config`.

The adapter methods of transformers handle weights only. The mixin below also saves the adapter's part of the
configuration, in the file `co2s_adapter.json`, and updates the configuration when another adapter becomes active.
"""

import copy
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch import nn
from transformers.modeling_utils import LoadStateDictInfo
from transformers.utils import cached_file
from transformers.utils.hub import resolve_revision

from .loading_co2s import check_finite, check_names


ADAPTER_FILE = "co2s_adapter.json"  # beside peft's adapter_config.json, which cannot store these fields
PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# Fields of the configuration that belong to an adapter: its classes, its fusion, and how its training images were
# prepared.
ADAPTER_FIELDS = ("id2label", "label2id", "palette", "class_concepts", "text_encoder")
ADAPTER_FIELDS += ("fusion", "clip_temperature", "dinov3_temperature", "crop_size", "image_bands", "image_scale")
ADAPTER_FIELDS += ("ground_sampling_distance_m",)
# Adapters of earlier versions have none of these.
FIELDS_ADDED_LATER = {"clip_temperature": 1.0, "dinov3_temperature": 1.0, "ground_sampling_distance_m": None}
# Sizes that must be the same in the base of an adapter and in the model that loads it.
BACKBONE_SIZES = ("hidden_size", "num_hidden_layers", "patch_size")
DECODER_SIZES = ("decoder_channels", "decoder_guidance_channels", "decoder_num_layers", "decoder_up_channels")
DOWNLOAD_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class Co2SAdapterMixin:
    """The adapter methods of transformers, which here also switch the classes.

    Attributes:
        _shown: Name of the adapter that `config` describes at present; None for the base.
        _base_fields: Values of the [`ADAPTER_FIELDS`] for the base.
        _fields_of_adapters: Name of an adapter -> its values of the [`ADAPTER_FIELDS`].
    """

    _shown: str | None = None

    # Save and load

    def save_pretrained(self, save_directory: str | os.PathLike, *, save_original_format: bool = False, **kwargs):
        """Save weights, configuration and code. If there are adapters, save only the active adapter and its classes.

        Args:
            save_directory: Folder to save to. It is created if necessary.
            save_original_format: Rename the weights of DINOv3's layers as transformers does by default. The default
                here is False: the file has the names of `state_dict()`. The `Trainer` of transformers and Accelerate
                load files with other names only in part.
            kwargs: Passed to transformers' `save_pretrained`.
        """
        if self._has_adapters() and kwargs.get("is_main_process", True):
            os.makedirs(save_directory, exist_ok=True)
            name = self.active_adapters()[0]
            fields = self._adapter_fields() if self._shown == name else self._fields_of_adapters[name]
            content = {"config": fields, "base": self._base_sizes()}
            text = json.dumps(content, indent=1) + "\n"
            (Path(save_directory) / ADAPTER_FILE).write_text(text, encoding="utf-8")
        super().save_pretrained(save_directory, save_original_format=save_original_format, **kwargs)

    def _get_files_timestamps(self, working_dir: str | os.PathLike) -> dict[str, float]:
        # transformers uploads all files that are not in this dictionary, because it takes them for new files. Leave
        # out the adapter's file, so that it is always uploaded.
        timestamps = super()._get_files_timestamps(working_dir)
        return {name: time for name, time in timestamps.items() if name != ADAPTER_FILE}

    def add_adapter(self, adapter_config, adapter_name: str | None = None):
        """Add a new, untrained adapter with the classes of the base, and activate it.

        To train other classes, call `set_class_concepts` before adding the first adapter.

        Args:
            adapter_config: Configuration of peft, for example from `co2s_lora_config`.
            adapter_name: Name of the new adapter, for `set_adapter`. None: "default".

        Raises:
            ValueError: The name is in use, or no layer matches the configuration. The model does not change then.
        """
        name = self._check_adapter_name(adapter_name)
        with self._adding(name):
            self._fields_of_adapters[name] = self._adapter_fields()
            super().add_adapter(adapter_config, name)

    def load_adapter(
        self,
        peft_model_id: str,
        adapter_name: str | None = None,
        is_trainable: bool = False,
        load_config=None,
        adapter_kwargs: dict | None = None,
        **download_kwargs,
    ) -> LoadStateDictInfo:
        """Load an adapter from a folder or the Hub with the classes of its training, and activate it.

        The adapter may have other classes than the base, and another number of classes. The classes of the base do not
        change. peft loads the weights, because transformers 5.23 can load neither another number of classes nor the
        magnitudes of DoRA.

        Args:
            peft_model_id: Folder or Hub name.
            adapter_name: Name of the new adapter, for `set_adapter`. None: "default".
            is_trainable: Keep the parameters of the adapter trainable. False: freeze them.
            load_config: Options that `from_pretrained` of transformers passes on.
            adapter_kwargs: Download options (`token`, `revision`, ...).
            download_kwargs: The same options as keywords. They override `adapter_kwargs`.

        Returns:
            An empty report, because all weights are loaded.

        Raises:
            ImportError: peft is not installed.
            OSError: There is no such adapter.
            ValueError: The name is in use, or the adapter does not fit this model. The model does not change then.
        """
        name = self._check_adapter_name(adapter_name)
        downloads = {
            **(load_config.download_kwargs if load_config else {}),
            **(adapter_kwargs or {}),
            **download_kwargs,
        }
        downloads = {key: value for key, value in downloads.items() if key in DOWNLOAD_KEYWORDS}
        peft_config, weights, content = _download_adapter(peft_model_id, downloads, str(self.device))
        if content is not None:
            fields = content["config"]
            self._check_base(content["base"], peft_model_id)
            self._check_fields(fields, peft_model_id)
        else:  # the adapter was saved by peft alone, so it has the classes of the base
            fields = copy.deepcopy(self._current_base_fields())
            _check_num_classes(weights, len(fields["id2label"]), peft_model_id)

        peft_config.inference_mode = not is_trainable
        self._insert_adapter(name, peft_config, weights, fields, peft_model_id)
        if not is_trainable:
            self.eval()
            for module in self._adapter_modules():
                module.requires_grad_(False)
        return LoadStateDictInfo(set(), set(), set(), [], {}, set())

    def _insert_adapter(self, name: str, peft_config, weights: dict, fields: dict, peft_model_id: str):
        """Add modules, weights and configuration fields of an adapter, and activate it."""
        peft = _import_peft()
        try:
            with self._adding(name):
                # peft copies the guidance modules into the adapter, so they must have the adapter's number of classes.
                with self._resized_guidance(len(fields["id2label"])):
                    peft.inject_adapter_in_model(peft_config, self, name)
                self._hf_peft_config_loaded = True
                loaded = peft.set_peft_model_state_dict(self, weights, adapter_name=name)
                expected = peft.get_peft_model_state_dict(self, adapter_name=name, save_embedding_layers=False)
                check_names(expected.keys() - weights.keys(), loaded.unexpected_keys, "the adapter")
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            base = self.name_or_path or "this model"
            reason = " ".join(str(error).split("\n\t")[:2])  # torch lists every mismatch; show only the first
            raise ValueError(f"The adapter {peft_model_id} does not fit {base}: {reason}") from error
        self._fields_of_adapters[name] = fields
        self.set_adapter(name)

    # Switch and delete

    def set_adapter(self, adapter_name: str):
        """Activate an adapter and its classes.

        Raises:
            ValueError: No adapter has this name.
        """
        names = getattr(self, "peft_config", {})
        if adapter_name not in names:
            raise ValueError(f"There is no adapter '{adapter_name}'; loaded: {', '.join(names) or 'none'}.")
        for module in self._adapter_modules():
            module.enable_adapters(True)
            # `modules_to_save` holds a copy of the whole module for each adapter that trains it. Other adapters use
            # the module of the base.
            is_part = adapter_name in getattr(module, "modules_to_save", [adapter_name])
            module.set_adapter(adapter_name if is_part else [])
        self._show(adapter_name)

    def disable_adapters(self):
        """Switch all adapters off: predict with the base and its classes."""
        super().disable_adapters()
        self._show(None)

    def enable_adapters(self):
        """Switch the active adapter on again, with its classes."""
        # The method of transformers 5.23 leaves out modules that adapters copy as a whole (decoders, queries).
        self.set_adapter(self.active_adapters()[0])

    def delete_adapter(self, adapter_names: list[str] | str):
        """Remove adapters. Then activate the remaining adapter that was added last, or the base if none remains.

        Args:
            adapter_names: One name or several names.

        Raises:
            ValueError: No adapter has this name.
        """
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            names = getattr(self, "peft_config", {})
            if name not in names:
                raise ValueError(f"There is no adapter '{name}' to delete; loaded: {', '.join(names) or 'none'}.")
            self._show(None)
            self._remove(name)

    def _remove(self, name: str):
        """Remove an adapter, also one that was only partly added."""
        self._fields_of_adapters.pop(name, None)
        others = [other for other in getattr(self, "peft_config", {}) if other != name]
        if not others:
            self._unwrap(keep_adapter=False)
        elif name in self.peft_config:
            # Activate another adapter first: peft 0.21 cannot delete from modules in which no adapter is active.
            self.set_adapter(others[-1])
            super().delete_adapter(name)

    def _unwrap(self, keep_adapter: bool):
        """Remove all modules of peft. The base remains; with `keep_adapter` the active adapter is merged into it."""
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

    # Helpers

    def _has_adapters(self) -> bool:
        return getattr(self, "_hf_peft_config_loaded", False)

    def _adapter_modules(self) -> Iterator[nn.Module]:
        """Iterate over the modules of peft: layers with updates, and wrappers of modules that adapters copy."""
        return (m for m in self.modules() if hasattr(m, "base_layer") or hasattr(m, "modules_to_save"))

    def _check_adapter_name(self, adapter_name: str | None) -> str:
        """Return the name of a new adapter. Refuse a name that is in use."""
        name = adapter_name or "default"
        if name in getattr(self, "peft_config", {}):
            raise ValueError(f"There is an adapter '{name}' already; give another `adapter_name`.")
        return name

    @contextmanager
    def _adding(self, name: str) -> Iterator[None]:
        """Show the base in the configuration while an adapter is added; undo everything if this fails."""
        is_first, shown = not self._has_adapters(), self._shown
        active = None if is_first else self.active_adapters()[0]
        if is_first:
            self._base_fields, self._fields_of_adapters = self._adapter_fields(), {}
        self._show(None)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are supported
                yield
        except BaseException:
            self._remove(name)
            if not is_first:
                self.set_adapter(active)
                if shown is None:
                    self.disable_adapters()
            raise

    def _show(self, name: str | None):
        """Write the fields of an adapter into the configuration; None: those of the base.

        The previous fields of the configuration, with the user's changes, are first stored for their adapter or base.
        """
        if self._shown is None:
            self._base_fields = self._adapter_fields()
        elif self._shown in self._fields_of_adapters:
            self._fields_of_adapters[self._shown] = self._adapter_fields()
        fields = self._base_fields if name is None else self._fields_of_adapters[name]
        fields = fields | {"id2label": {int(index): label for index, label in fields["id2label"].items()}}
        for key in ADAPTER_FIELDS:
            setattr(self.config, key, copy.deepcopy(fields[key]))
        self._shown = name

    def _current_base_fields(self) -> dict:
        return self._adapter_fields() if self._shown is None else self._base_fields

    def _adapter_fields(self) -> dict:
        """Copy the fields that belong to an adapter from the configuration."""
        return {name: copy.deepcopy(getattr(self.config, name)) for name in ADAPTER_FIELDS}

    def _base_sizes(self) -> dict:
        """Return the sizes that an adapter depends on, in types that JSON keeps."""
        sizes = {
            f"{config}.{name}": getattr(getattr(self.config, config), name)
            for config in ("clip_config", "dinov3_config")
            for name in BACKBONE_SIZES
        }
        return sizes | {
            name: list(value) if isinstance(value := getattr(self.config, name), tuple) else value
            for name in DECODER_SIZES
        }

    def _check_base(self, wanted: dict, adapter: str):
        """Refuse an adapter of a base with other sizes."""
        found = self._base_sizes()
        if differing := [name for name in found if wanted.get(name) != found[name]]:
            raise ValueError(
                f"The adapter {adapter} was made for another base than {self.name_or_path or 'this model'}: "
                + "; ".join(f"`{name}` is {wanted.get(name)} there and {found[name]} here" for name in differing)
                + ". Load it onto the base that is named in its adapter_config.json."
            )

    def _check_fields(self, fields: dict, adapter: str):
        """Refuse fields of an adapter with which the configuration of this model would not be valid."""
        config = copy.deepcopy(self.config)
        try:
            for name in ADAPTER_FIELDS:
                setattr(config, name, fields[name])
            config.validate()
        except StrictDataclassError as error:
            raise ValueError(f"{ADAPTER_FILE} of the adapter {adapter} does not fit this model. {error}") from error

    @contextmanager
    def _resized_guidance(self, num_labels: int) -> Iterator[None]:
        """Resize the queries and the class text of the base to another number of classes, within the context."""
        # If there is an adapter already, peft's wrapper holds the module of the base as `original_module`.
        queries = getattr(self.dinov3.guidance, "original_module", self.dinov3.guidance)
        text = getattr(self.clip.guidance, "original_module", self.clip.guidance)
        base_queries, base_text = queries.queries, text.embeddings
        if len(base_queries) != num_labels:
            shape = (num_labels, base_queries.shape[1])
            queries.queries = nn.Parameter(torch.zeros(shape, dtype=base_queries.dtype, device=base_queries.device))
            text.embeddings = base_text.new_zeros(num_labels, base_text.shape[1])
        try:
            yield
        finally:
            queries.queries, text.embeddings = base_queries, base_text


def _import_peft() -> ModuleType:
    """Import peft, which is optional."""
    # transformers refuses saved code if one of its imports is not installed, except for imports within `try`.
    try:
        import peft
    except ImportError as error:
        raise ImportError("Adapters need peft: pip install peft") from error
    return peft


def _download_adapter(peft_model_id: str, downloads: dict, device: str) -> tuple:
    """Fetch the files of an adapter from a folder or the Hub.

    Args:
        peft_model_id: Folder or Hub name.
        downloads: Download options, a part of `DOWNLOAD_KEYWORDS`.
        device: Device to load the weights to.

    Returns:
        The configuration of peft; the weights, by parameter names without the prefix of `PeftModel`; the content of
        `co2s_adapter.json`, or None if there is no such file.

    Raises:
        OSError: There is no such adapter.
        ValueError: A file is damaged, a weight is not finite, or the adapter would load further adapters.
    """
    peft = _import_peft()
    # Resolve the revision here, so that all files are of one commit. The commit that `from_pretrained` resolved
    # belongs to the repository of the base.
    access = {key: value for key, value in downloads.items() if key in ("token", "local_files_only", "cache_dir")}
    downloads = downloads | {"revision": resolve_revision(peft_model_id, downloads.get("revision"), **access)}
    config_path = cached_file(peft_model_id, PEFT_CONFIG_FILE, **downloads)
    try:
        peft_config = peft.PeftConfig.from_pretrained(Path(config_path).parent)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{PEFT_CONFIG_FILE} of the adapter {peft_model_id} cannot be read ({type(error).__name__}: {error}). "
            "Download or save the adapter again, or update peft."
        ) from error
    if peft_config.peft_type == peft.PeftType.XLORA:
        raise ValueError(
            f"The adapter {peft_model_id} has the type X-LoRA. It would load further adapters, from places that its "
            "configuration names. Load a LoRA adapter instead."
        )
    weights = load_file(cached_file(peft_model_id, PEFT_WEIGHTS_FILE, **downloads), device=device)
    weights = {key.removeprefix("base_model.model."): value for key, value in weights.items()}  # PeftModel's prefix
    check_finite(weights.items(), f"the adapter {peft_model_id}")
    path = cached_file(peft_model_id, ADAPTER_FILE, _raise_exceptions_for_missing_entries=False, **downloads)
    return peft_config, weights, None if path is None else _read_adapter_file(Path(path), peft_model_id)


def _read_adapter_file(path: Path, adapter: str) -> dict[str, dict]:
    """Read `co2s_adapter.json`.

    Returns:
        "config" -> the [`ADAPTER_FIELDS`], not yet checked; "base" -> the sizes of the base.

    Raises:
        ValueError: The file has another structure.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        fields = FIELDS_ADDED_LATER | content["config"]
        fields = {name: fields[name] for name in ADAPTER_FIELDS}
        fields["id2label"] = {int(index): label for index, label in fields["id2label"].items()}
        return {"config": fields, "base": dict(content["base"])}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{ADAPTER_FILE} of the adapter {adapter} is damaged ({type(error).__name__}: {error}). Download or save "
            "the adapter again."
        ) from error


def _check_num_classes(weights: dict[str, torch.Tensor], num_labels: int, adapter: str):
    """Refuse an adapter with another number of classes. It has no file that describes its classes."""
    for key in ("clip.guidance.embeddings", "dinov3.guidance.queries"):
        if key in weights and len(weights[key]) != num_labels:
            raise ValueError(
                f"The adapter {adapter} is for {len(weights[key])} classes and this model has {num_labels}, but it "
                f"lacks {ADAPTER_FILE}, which describes its classes. Save the adapter with the model's own "
                "`save_pretrained`."
            )


__all__ = ["ADAPTER_FILE", "PEFT_CONFIG_FILE", "Co2SAdapterMixin"]
