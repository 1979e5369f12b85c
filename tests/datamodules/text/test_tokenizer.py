"""Tokenizers: texts to token ids and back."""

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from src.datamodules.text.tokenizer import Tokenizer, load_or_train, load_pretrained, train_tokenizer

TEXTS = ["a photo of a red star", "a blue ring above a red star", "a red star below a blue ring"] * 4


def test_any_text_is_decoded_in_lower_case():
    tokenizer = train_tokenizer(TEXTS, vocabulary=300, length=24)
    texts = ["A photo of a red STAR", "Grüße, 世界", "tab\tand \\ and emoji 🦊"]
    ids, mask = train_tokenizer(TEXTS, vocabulary=300, length=64)(texts)
    assert tokenizer.decode(ids) == [text.lower() for text in texts]
    assert ids.dtype == torch.int64
    assert torch.equal(mask, ids != 0)
    assert tokenizer.vocabulary <= 300


def test_frequent_words_become_one_token():
    tokenizer = train_tokenizer(TEXTS, vocabulary=340, length=24)
    assert [tokenizer.inner.decode([i]) for i in tokenizer.inner("a red star")["input_ids"]] == [
        "<start>",
        "a",
        " red",
        " star",
        "<end>",
    ]


def test_truncation_keeps_start_and_end():
    tokenizer = train_tokenizer(TEXTS, vocabulary=340, length=5)
    ids, mask = tokenizer([TEXTS[1], "a"])
    assert ids.shape == (2, 5)
    assert ids[0, 0] == ids[1, 0] == tokenizer.inner.bos_token_id
    assert ids[0, 4] == ids[1, 2] == tokenizer.end
    assert mask[1].tolist() == [True, True, True, False, False]
    assert tokenizer.is_truncated([TEXTS[1], "a"]).tolist() == [True, False]


def test_the_tokenizer_is_trained_once_and_then_loaded(tmp_path):
    path = tmp_path / "run" / "tokenizer.json"
    first = load_or_train(path, lambda: TEXTS, vocabulary=300, length=16)

    def never():
        raise AssertionError("the file is there")
        yield ""

    second = load_or_train(path, never, vocabulary=300, length=16)
    for a, b in zip(first(TEXTS[:3]), second(TEXTS[:3]), strict=True):
        assert torch.equal(a, b)


def test_transformers_clip_pools_at_the_end_token():
    """It pools at the end token, which it finds by a rule that depends on that token's id."""
    tokenizer = train_tokenizer(TEXTS, vocabulary=300, length=12)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        eos_token_id=tokenizer.end,
        bos_token_id=tokenizer.inner.bos_token_id,
        pad_token_id=0,
    )
    model = CLIPTextModel(config).eval()
    ids, mask = tokenizer(["a red star", "a blue ring above"])
    found = model(input_ids=ids, attention_mask=mask)
    last = mask.sum(dim=1) - 1
    torch.testing.assert_close(found.pooler_output, found.last_hidden_state[torch.arange(2), last])


def test_invalid_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="text_length=2 must be at least 3"):
        train_tokenizer(TEXTS, vocabulary=300, length=2)
    inner = train_tokenizer(TEXTS, vocabulary=300, length=8).inner
    inner.pad_token = None
    with pytest.raises(ValueError, match="has no padding token"):
        Tokenizer(inner, length=8)
    with pytest.raises(ValueError, match=r"data.tokenizer=.*nothing_here"):
        load_pretrained(str(tmp_path / "nothing_here"), length=8)
