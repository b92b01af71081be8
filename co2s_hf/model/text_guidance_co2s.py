"""Encode class names and concepts as text embeddings, which guide the CLIP student (explicit semantic guidance).

This file also loads pretrained backbones. Two small ones ship with the package co2s_hf; their short names,
`SHIPPED_BACKBONES`, stand for its folders.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPTextModelWithProjection,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from .configuration_co2s import check_backbone
from .loading_co2s import check_finite


logger = logging.get_logger(__name__)

PROMPT = "a photo of a {}"
SHIPPED_BACKBONES = ("co2s-tiny-clip", "co2s-tiny-dinov3")
LONGEST_WORD_LIST = 1000  # a warning lists the words of a tokenizer up to this number


@torch.no_grad()
def encode_class_concepts(class_concepts: dict[str, list[str]], text_encoder: str, **kwargs) -> torch.Tensor:
    """Encode every class as the normalised mean of the text embeddings of its concepts.

    A warning names the words of the concepts that the tokenizer does not know, if any.

    Args:
        class_concepts: Concepts of every class, in label order. Each concept becomes the prompt "a photo of a
            {concept}".
        text_encoder: Hub name, shipped name or local folder of a CLIP model with text encoder, text projection and
            tokenizer.
        kwargs: Arguments for `from_pretrained` (`revision`, `token`, ...).

    Returns:
        Tensor (classes, projection width), float32, rows of length 1, without gradients.

    Raises:
        OSError: The model or its tokenizer cannot be loaded.
        ValueError: A class has no concept.
    """
    if empty := [label for label, concepts in class_concepts.items() if not concepts]:
        raise ValueError(f"`class_concepts` has no concept for {empty}. Give at least the class's own name.")
    model = load_pretrained(CLIPTextModelWithProjection, text_encoder, "CLIP's text encoder", **kwargs)
    source = find_backbone(text_encoder)
    with _explain_failure(text_encoder, "CLIP's tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
    if len(tokenizer) != model.config.vocab_size:
        # If the tokenizer files are missing, transformers returns an empty tokenizer, which encodes all words alike.
        raise OSError(
            f"The tokenizer in '{text_encoder}' has {len(tokenizer)} tokens, but the text encoder has "
            f"{model.config.vocab_size}. Save the tokenizer's files beside the weights: "
            "`AutoTokenizer.from_pretrained(...).save_pretrained(...)`."
        )
    _warn_of_unknown_words(class_concepts, tokenizer, text_encoder)
    prompts = [PROMPT.format(concept) for concepts in class_concepts.values() for concept in concepts]
    embeddings = model(**tokenizer(prompts, padding=True, return_tensors="pt")).text_embeds  # (prompts, width)
    per_class = embeddings.split([len(concepts) for concepts in class_concepts.values()])
    return nn.functional.normalize(torch.stack([group.mean(dim=0) for group in per_class]), dim=-1)


def load_pretrained(model_class: type[PreTrainedModel], name_or_path: str, role: str, **kwargs) -> PreTrainedModel:
    """Load a pretrained model in float32 and evaluation mode. Refuse it if weights are missing.

    Args:
        model_class: transformers class of the model.
        name_or_path: Hub name, shipped name or local folder.
        role: Name of the model in error messages ("CLIP's text encoder").
        kwargs: Arguments for `from_pretrained` (`revision`, `token`, ...).

    Returns:
        The model.

    Raises:
        OSError: The repository is missing, gated or cannot be reached, or weights of the model are missing.
        ValueError: A size in the configuration is out of range, or a weight is not finite.
    """
    source = find_backbone(name_or_path)
    verbosity = logging.get_verbosity()
    # A CLIP model consists of a vision and a text part, and only one is loaded. Suppress the warning about the other.
    logging.set_verbosity_error()
    try:
        with _explain_failure(name_or_path, role):
            check_backbone(model_class.config_class.get_config_dict(source, **kwargs)[0])
            model, info = model_class.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **kwargs)
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(info["missing_keys"]):
        raise OSError(
            f"'{name_or_path}' lacks {len(missing)} weights of {role} (such as '{missing[0]}'). Choose a model that "
            f"{model_class.__name__} loads completely."
        )
    check_finite(model.state_dict().items(), f"'{name_or_path}'")
    model.config.name_or_path = str(name_or_path)  # saved models must not name the folder of a shipped backbone
    return model.eval()


def read_backbone_config(name_or_path: str) -> PreTrainedConfig:
    """Read the configuration of a backbone of any type.

    Args:
        name_or_path: Hub name, shipped name or local folder.

    Raises:
        OSError: The configuration is missing or cannot be read.
        ValueError: A size is out of range.
    """
    source = find_backbone(name_or_path)
    check_backbone(PreTrainedConfig.get_config_dict(source)[0])
    return AutoConfig.from_pretrained(source)


def find_backbone(name_or_path: str) -> str:
    """Return the folder that a shipped name stands for. Return every other name or path as it is.

    A shipped name always means the backbone of the package, even if the working directory has a folder of that name.
    Write such a folder as `./co2s-tiny-clip`.

    Raises:
        OSError: The backbone ships with the package co2s_hf, and this package or its folder is missing.
    """
    if str(name_or_path) not in SHIPPED_BACKBONES:
        return name_or_path
    assets = assets_folder()
    if assets is None:
        raise OSError(
            f"'{name_or_path}' ships with the package co2s_hf, which is not installed here: pip install co2s_hf"
        )
    folder = assets / name_or_path
    if not (folder / "config.json").is_file():
        raise OSError(
            f"'{name_or_path}' ships with the package co2s_hf, but this installation has no {folder}. Install the "
            "whole package: pip install co2s_hf"
        )
    return str(folder)


def assets_folder() -> Path | None:
    """Return the folder of the files that the package co2s_hf ships. None: the package is not installed.

    Python is asked for the package, because this file may be a copy in a saved model, far from the package.
    """
    package = find_spec("co2s_hf")
    return None if package is None or package.origin is None else Path(package.origin).parent / "assets"


def unknown_words(class_concepts: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[str]]:
    """Find the words that a tokenizer maps to its unknown token.

    Args:
        class_concepts: Concepts of every class.
        tokenizer: Tokenizer of the text encoder. Without an unknown token, it knows all words.

    Returns:
        Class -> its unknown words, each once, without classes that have none.
    """
    unknown = {}
    for label, concepts in class_concepts.items():
        words = dict.fromkeys(word for concept in concepts for word in concept.split())
        tokens = {word: tokenizer(word, add_special_tokens=False).input_ids for word in words}
        if found := [word for word in words if tokenizer.unk_token_id in tokens[word]]:
            unknown[label] = found
    return unknown


def _warn_of_unknown_words(
    class_concepts: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, text_encoder: str
):
    """Warn once of all unknown words, and list the known ones."""
    unknown = unknown_words(class_concepts, tokenizer)
    if not unknown:
        return
    named = "; ".join(f"{label}: {', '.join(words)}" for label, words in unknown.items())
    message = (
        f"The text encoder '{text_encoder}' does not know these words of `class_concepts`: {named}. All unknown words "
        "mean the same to it. Describe these classes by words that it knows."
    )
    known = sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
    if len(known) <= LONGEST_WORD_LIST:
        message += f" It knows {len(known)} words: {', '.join(known)}."
    logger.warning(message)


@contextmanager
def _explain_failure(name_or_path: str, role: str) -> Iterator[None]:
    """Add the remedy to the error of a failed download or a failed read."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"Cannot load {role} from '{name_or_path}'. If it is a Hub repository, check its name. If the repository "
            f"is gated, accept its terms at https://huggingface.co/{name_or_path} and log in with `hf auth login`. "
            f"Without network access, pass a local folder instead. transformers reports: {error}"
        ) from error


__all__ = [
    "PROMPT",
    "SHIPPED_BACKBONES",
    "encode_class_concepts",
    "find_backbone",
    "load_pretrained",
    "read_backbone_config",
    "unknown_words",
]
