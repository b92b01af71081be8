"""The word-level tokenizer."""

import pytest
from transformers import AutoTokenizer

from co2s_hf.training.pretraining.words import make_tokenizer, singular


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("grass", "grass"),
        ("bus", "bus"),
        ("gas", "gas"),
        ("cars", "car"),
        ("mobile homes", "mobile home"),
        ("trees and buildings", "tree and building"),
        ("as is", "as is"),
    ],
)
def test_singular(text, expected):
    assert singular(text) == expected


def test_a_tokenizer_knows_its_words_in_both_forms_and_the_prompt(tmp_path):
    tokenizer = make_tokenizer(["mobile home", "trees", "bare soil, dry"], max_length=8)
    words = ["a", "bare", "dry", "home", "mobile", "of", "photo", "soil", "tree", "trees"]
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary, key=vocabulary.get) == ["<pad>", "<unk>", "<start>", "<end>", *words]
    ids = tokenizer("A photo of a Mobile-home").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<start>", "a", "photo", "of", "a", "mobile", "home", "<end>"]
    assert tokenizer("bare soil, dry!", add_special_tokens=False).input_ids == [5, 11, 6]
    assert tokenizer("sea trees", add_special_tokens=False).input_ids == [tokenizer.unk_token_id, 13]
    batch = tokenizer(["tree", "a photo of a photo of a photo"], padding=True, truncation=True, return_tensors="pt")
    assert batch.input_ids[0].tolist() == [2, 12, 3, 0, 0, 0, 0, 0]
    assert batch.attention_mask.sum(dim=1).tolist() == [3, 8] and batch.input_ids[1, -1] == tokenizer.eos_token_id

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a photo of a mobile-home", "Sea TREES", "bare soil, dry"):
        assert loaded(text).input_ids == tokenizer(text).input_ids
    assert (loaded.pad_token_id, loaded.unk_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2, 3)
    assert loaded.model_max_length == 8 and loaded.padding_side == "right"
