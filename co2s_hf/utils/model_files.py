"""Check the files of a model's folder before a library loads them, so that an error names the file."""

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open


CONFIG, ADAPTER_CONFIG, PROCESSOR_CONFIG = "config.json", "adapter_config.json", "preprocessor_config.json"


def check_model_files(name: str | Path, model_type: str | None = None):
    """Check that a model's folder exists, and that its configuration and weights can be read.

    Nothing happens for the name of a model on the Hub.

    Args:
        name: Folder of a model or of an adapter, or a name on the Hub.
        model_type: Type that config.json must name; the weights must be safetensors files then. None: any.

    Raises:
        OSError: The folder or a file does not exist.
        ValueError: A file is damaged, or the model is of another type.
    """
    folder = Path(name)
    if not folder.exists():
        if is_path(str(name)):
            raise OSError(f"'{name}' does not exist.")
        return
    if not folder.is_dir():
        raise OSError(f"'{name}' is a file, not the folder of a model.")
    found = {file: _read_object(folder / file) for file in (CONFIG, ADAPTER_CONFIG, PROCESSOR_CONFIG)}
    config = found[CONFIG]
    if config is None and found[ADAPTER_CONFIG] is None:
        raise OSError(f"'{folder / CONFIG}' does not exist, so '{name}' is not the folder of a model.")
    if config is not None and model_type is not None and config.get("model_type") != model_type:
        shown = f"the model_type '{config['model_type']}'" if "model_type" in config else "no model_type"
        raise ValueError(f"'{folder / CONFIG}' has {shown}; expected '{model_type}'.")
    weights = sorted(folder.glob("*.safetensors"))
    if model_type is not None and not weights:
        raise OSError(f"'{folder / 'model.safetensors'}' does not exist.")
    for path in weights:
        if not path.is_file():
            raise ValueError(f"'{path}' is no file, but a folder, a device, or a link to nothing. Replace it.")
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"'{path}' is damaged: {error}. Download or save it again.") from error


def is_path(name: str) -> bool:
    """Return whether a name can only be a path: a name on the Hub has at most one slash, in the middle."""
    return name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1 or name.endswith("/")


def _read_object(path: Path) -> dict | None:
    """Read a JSON file that contains an object. None: it does not exist."""
    if not os.path.lexists(path):
        return None
    if not path.is_file():  # opening a pipe could wait forever
        raise ValueError(f"'{path}' is no file, but a folder, a device, or a link to nothing. Replace it.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is damaged: {error}. Download or save it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' is damaged: expected an object, {{...}}. Download or save it again.")
    return content


__all__ = ["check_model_files", "is_path"]
