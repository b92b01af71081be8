"""A word-level tokenizer for the small text encoder."""

import re
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from ...model.text_guidance_co2s import PROMPT


PAD, UNKNOWN, START, END = "<pad>", "<unk>", "<start>", "<end>"


def singular(text: str) -> str:
    """Return a text without the plural s at the end of its words: "mobile homes" becomes "mobile home"."""
    return re.sub(r"\b(\w{2,}[^s\W])s\b", r"\1", text)


def make_tokenizer(texts: Iterable[str], max_length: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer that knows the words of the prompt and of these texts, in singular and plural.

    Args:
        texts: Tags or captions in lower case.
        max_length: Largest number of tokens of a text.
    """
    words = {word for text in texts for form in (text, singular(text)) for word in re.findall(r"\w+", form)}
    words |= set(re.findall(r"\w+", PROMPT.format("")))
    vocabulary = {word: index for index, word in enumerate((PAD, UNKNOWN, START, END, *sorted(words)))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("-", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+"), behavior="removed", invert=True)
    ids = [(token, vocabulary[token]) for token in (START, END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=START,
        eos_token=END,
        model_max_length=max_length,
        padding_side="right",
    )


__all__ = ["make_tokenizer", "singular"]
