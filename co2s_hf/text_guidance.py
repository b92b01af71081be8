"""Class-text embeddings, which guide the CLIP student (the paper's explicit semantic guidance)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AutoTokenizer, CLIPTextModelWithProjection, PreTrainedModel
from transformers.utils import logging


PROMPT = "a photo of a {}"


@contextmanager
def _loading(name_or_path: str, role: str) -> Iterator[None]:
    """Turn a failed download or read into an error that says what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"Cannot load {role} from '{name_or_path}'. If it is a Hub repository: check the name; if it is gated, "
            f"accept its terms at https://huggingface.co/{name_or_path} and log in with `hf auth login`; without "
            f"network access pass a local folder instead. The library said: {error}"
        ) from error


def load_tower(model_class: type[PreTrainedModel], name_or_path: str, role: str, **kwargs) -> PreTrainedModel:
    """Load one pretrained tower completely, in float32 and evaluation mode, or fail with the remedy.

    Args:
        model_class: transformers class of the tower.
        name_or_path: Hub repository or local folder.
        role: What the tower is, for the error ("CLIP's text tower").
        kwargs: Passed to `from_pretrained` (`revision`, `token`, ...).

    Raises:
        OSError: The repository is missing, gated or out of reach, or lacks weights of this tower.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a CLIP checkpoint's other half would be reported as unexpected
    try:
        with _loading(name_or_path, role):
            model, info = model_class.from_pretrained(
                name_or_path, dtype=torch.float32, output_loading_info=True, **kwargs
            )
    finally:
        logging.set_verbosity(verbosity)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise OSError(
            f"'{name_or_path}' lacks {len(missing)} weights of {role} (such as '{missing[0]}'). It must be a "
            f"checkpoint that {model_class.__name__} loads completely."
        )
    return model.eval()


@torch.no_grad()
def encode_class_concepts(class_concepts: dict[str, list[str]], text_encoder: str, **kwargs) -> torch.Tensor:
    """Encode every class as the mean of its concepts' text embeddings, at unit length.

    Args:
        class_concepts: For every class, in label order, its concepts. Each becomes the prompt "a photo of a
            {concept}".
        text_encoder: Hub name or local folder of a CLIP checkpoint with text tower, text projection and tokenizer.
        kwargs: Passed to `from_pretrained` (`revision`, `token`, ...).

    Returns:
        Tensor (number of classes, projection width), float32, rows of unit length.

    Raises:
        OSError: The checkpoint cannot be loaded.
        ValueError: A class has no concept.
    """
    if empty := [label for label, concepts in class_concepts.items() if not concepts]:
        raise ValueError(f"No concept is given for {empty}. Give at least the class's own name.")
    model = load_tower(CLIPTextModelWithProjection, text_encoder, "CLIP's text tower", **kwargs)
    with _loading(text_encoder, "CLIP's tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(text_encoder, **kwargs)
    if len(tokenizer) != model.config.vocab_size:
        # A folder without tokenizer files gives an empty one, to which all words are the same.
        raise OSError(
            f"The tokenizer in '{text_encoder}' has {len(tokenizer)} tokens, but its text tower "
            f"{model.config.vocab_size}. Put the tokenizer's files beside the weights: "
            "`AutoTokenizer.from_pretrained(...).save_pretrained(...)`."
        )
    prompts = [PROMPT.format(concept) for concepts in class_concepts.values() for concept in concepts]
    embeddings = model(**tokenizer(prompts, padding=True, return_tensors="pt")).text_embeds
    per_class = embeddings.split([len(concepts) for concepts in class_concepts.values()])
    return nn.functional.normalize(torch.stack([group.mean(dim=0) for group in per_class]), dim=-1)


__all__ = ["PROMPT", "encode_class_concepts", "load_tower"]
