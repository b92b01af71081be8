"""Encode class names and concepts as text embeddings, which guide the CLIP student (explicit semantic guidance)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AutoTokenizer, CLIPTextModelWithProjection, PreTrainedModel
from transformers.utils import logging


PROMPT = "a photo of a {}"


@torch.no_grad()
def encode_class_concepts(class_concepts: dict[str, list[str]], text_encoder: str, **kwargs) -> torch.Tensor:
    """Encode every class as the normalised mean of the text embeddings of its concepts.

    Args:
        class_concepts: Concepts of every class, in label order. Each concept becomes the prompt "a photo of a
            {concept}".
        text_encoder: Hub name or local folder of a CLIP model with text encoder, text projection and tokenizer.
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
    with _explain_failure(text_encoder, "CLIP's tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(text_encoder, **kwargs)
    if len(tokenizer) != model.config.vocab_size:
        # If the tokenizer files are missing, transformers returns an empty tokenizer, which encodes all words alike.
        raise OSError(
            f"The tokenizer in '{text_encoder}' has {len(tokenizer)} tokens, but the text encoder has "
            f"{model.config.vocab_size}. Save the tokenizer's files beside the weights: "
            "`AutoTokenizer.from_pretrained(...).save_pretrained(...)`."
        )
    prompts = [PROMPT.format(concept) for concepts in class_concepts.values() for concept in concepts]
    embeddings = model(**tokenizer(prompts, padding=True, return_tensors="pt")).text_embeds  # (prompts, width)
    per_class = embeddings.split([len(concepts) for concepts in class_concepts.values()])
    return nn.functional.normalize(torch.stack([group.mean(dim=0) for group in per_class]), dim=-1)


def load_pretrained(model_class: type[PreTrainedModel], name_or_path: str, role: str, **kwargs) -> PreTrainedModel:
    """Load a pretrained model in float32 and evaluation mode. Refuse it if weights are missing.

    Args:
        model_class: transformers class of the model.
        name_or_path: Hub name or local folder.
        role: Name of the model in error messages ("CLIP's text encoder").
        kwargs: Arguments for `from_pretrained` (`revision`, `token`, ...).

    Returns:
        The model.

    Raises:
        OSError: The repository is missing, gated or cannot be reached, or weights of the model are missing.
    """
    verbosity = logging.get_verbosity()
    # A CLIP model consists of a vision and a text part, and only one is loaded. Suppress the warning about the other.
    logging.set_verbosity_error()
    try:
        with _explain_failure(name_or_path, role):
            model, info = model_class.from_pretrained(
                name_or_path, dtype=torch.float32, output_loading_info=True, **kwargs
            )
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(info["missing_keys"]):
        raise OSError(
            f"'{name_or_path}' lacks {len(missing)} weights of {role} (such as '{missing[0]}'). Choose a model that "
            f"{model_class.__name__} loads completely."
        )
    return model.eval()


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


__all__ = ["PROMPT", "encode_class_concepts", "load_pretrained"]
