"""Tokenizers: texts to token ids and back."""

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from src.datamodules.extras.captions import Captions
from src.datamodules.sources.source import Source
from src.datamodules.text.tokenizer import Tokenizer, load_or_train, load_pretrained, train_tokenizer
from src.datamodules.text.tokenizing import TokenizerSettings

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


def test_special_tokens_in_a_text_are_text():
    """A caption that spells the end token neither ends there nor pads: each character is encoded."""
    tokenizer = train_tokenizer(TEXTS, vocabulary=300, length=24)
    texts = ["a red <end> star", "<pad><start>"]
    ids, mask = tokenizer(texts)
    assert tokenizer.decode(ids) == texts
    for special in (tokenizer.start, tokenizer.end):
        assert (ids == special).sum(dim=1).tolist() == [1, 1]
    assert torch.equal(mask, ids != tokenizer.inner.pad_token_id)
    assert int((mask[0] & (ids[0] == tokenizer.end)).nonzero()) == int(mask[0].sum()) - 1
    spans = tokenizer.character_spans(texts)[0]
    assert [texts[0][begin:end] for begin, end in spans[4:9].tolist()] == ["<", "e", "n", "d", ">"]
    assert tokenizer.is_truncated(["<end>" * 5, "<end>"]).tolist() == [True, False]


class Sentences(Source):
    """``count`` captions; each of the first ``fresh`` has a word of its own."""

    def __init__(self, count: int, fresh: int) -> None:
        self.count, self.fresh = count, fresh

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        raise AssertionError("texts are read without images")

    def name(self, index: int) -> str:
        return str(index)

    def caption(self, index: int, choice: float) -> str:
        # five letters: words that share no pair of bytes over and over
        return "".join(chr(97 + index // 26**place % 26) for place in range(5)) if index < self.fresh else "star"

    def captions(self, index: int) -> list[str]:
        return [self.caption(index, 0.5)]


def test_a_large_vocabulary_is_learned_from_more_texts(tmp_path, caplog, monkeypatch):
    """ALIGN's 100,000 ids from 1.6 million samples, CLIP's 49,408 from 790,528, a small one from 20,000."""
    samples = [TokenizerSettings(vocabulary=size).samples for size in (512, 49408, 100_000)]
    assert samples == [20_000, 790_528, 1_600_000]
    monkeypatch.setattr("src.datamodules.text.tokenizing._SAMPLES", 40)
    monkeypatch.setattr("src.datamodules.text.tokenizing._NO_NEW_WORD", 50)
    source, extras = Sentences(10_000, fresh=10_000), Captions()
    assert len(list(extras.vocabulary_texts(source, 6000))) == 6000
    assert len(list(extras.vocabulary_texts(Sentences(100, 100), 6000))) == 100
    # sixty different captions and "star", then 50 more without a new word
    assert len(list(extras.vocabulary_texts(Sentences(6000, fresh=60), 6000))) == 60 + 1 + 50
    settings = TokenizerSettings(file=tmp_path / "one.json", vocabulary=900)
    assert settings.load(lambda: extras.vocabulary_texts(source, settings.samples)).vocabulary == 900
    assert not caplog.records
    small = TokenizerSettings(file=tmp_path / "two.json", vocabulary=900)
    ids = small.load(lambda: ["a red star"]).vocabulary
    assert caplog.messages == [
        f"data.vocabulary=900: the training texts have words for {ids} token ids; other embeddings stay unused"
    ]


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
