"""Texts to token ids: a tokenizer by name, or one trained on the texts at hand where nothing can be downloaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from src.errors import SettingError
from src.files import write_atomically

# the end is not 2: transformers' CLIP would then take the largest id for it, as in OpenAI's vocabulary
_PAD, _END, _START = "<pad>", "<end>", "<start>"


class Tokenizer:
    """Texts to ids of one length.

    Args:
        inner: a tokenizer of transformers.
        length: tokens of a text, start and end included; a longer text loses what is before its end.

    Raises:
        SettingError: the tokenizer has no padding, or the length leaves no room for a word.
    """

    def __init__(self, inner: PreTrainedTokenizerBase, *, length: int) -> None:
        if length < 3:
            raise SettingError(f"data.text_length={length} leaves no room for a word between start and end")
        if inner.pad_token_id is None:
            raise SettingError(f"the tokenizer {inner.name_or_path} has no token to fill short texts up with")
        self.inner = inner
        self.length = length

    @property
    def vocabulary(self) -> int:
        """How many ids there are, added ones included."""
        return len(self.inner)

    @property
    def start(self) -> int | None:
        return self.inner.bos_token_id

    @property
    def end(self) -> int | None:
        return self.inner.eos_token_id

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids int64 [B, length] and which of them are no padding, bool [B, length]; B may be 0."""
        if not texts:
            return torch.zeros(0, self.length, dtype=torch.int64), torch.zeros(0, self.length, dtype=torch.bool)
        found = self.inner(
            list(texts), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        return found["input_ids"], found["attention_mask"].bool()

    def places(self, texts: Sequence[str]) -> Tensor:
        """Which characters of its text each token stands for, the first and one past the last: int64 [B, length, 2].
        Start, end and padding stand for none.

        Raises:
            SettingError: a tokenizer that does not know, one of the slow ones of transformers.
        """
        if not self.inner.is_fast:
            raise SettingError(f"the tokenizer {self.inner.name_or_path} does not say where its tokens come from")
        found = self.inner(
            list(texts), padding="max_length", truncation=True, max_length=self.length, return_offsets_mapping=True
        )
        return torch.tensor(found["offset_mapping"])

    def longer(self, texts: Sequence[str]) -> Tensor:
        """Which texts do not fit: bool [B]."""
        return torch.tensor([len(ids) > self.length for ids in self.inner(list(texts))["input_ids"]])

    def decode(self, ids: Tensor) -> list[str]:
        """Back to texts, without start, end and padding: [B, L]."""
        return self.inner.batch_decode(ids, skip_special_tokens=True)


def named(name: str, *, length: int) -> Tokenizer:
    """A tokenizer of the Hugging Face hub, or of a folder.

    Raises:
        SettingError: there is none of that name, here or within reach.
    """
    try:
        return Tokenizer(AutoTokenizer.from_pretrained(name), length=length)
    except (OSError, ValueError) as problem:
        raise SettingError(f"data.tokenizer={name}: {str(problem).splitlines()[0]}") from problem


def trained(texts: Iterable[str], *, vocabulary: int, length: int) -> Tokenizer:
    """Byte-pair encoding over the bytes of lower-case texts, learned from ``texts``; any text can be written in it.

    Args:
        vocabulary: ids at most; the 256 bytes and three marks are always among them.
    """
    inner = FastTokenizer(models.BPE())
    inner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_PAD, _END, _START],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    marks = [(mark, inner.token_to_id(mark)) for mark in (_START, _END)]
    inner.post_processor = processors.TemplateProcessing(single=f"{_START} $A {_END}", special_tokens=marks)
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=_PAD, bos_token=_START, eos_token=_END)
    return Tokenizer(fast, length=length)


def kept(path: Path, texts: Iterable[str], *, vocabulary: int, length: int) -> Tokenizer:
    """`trained`, once: the file at ``path`` is read where it exists. Several processes may ask at once."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        inner = trained(texts, vocabulary=vocabulary, length=length).inner
        write_atomically(path, inner.backend_tokenizer.to_str())
    fast = PreTrainedTokenizerFast(tokenizer_file=str(path), pad_token=_PAD, bos_token=_START, eos_token=_END)
    return Tokenizer(fast, length=length)


# forked loader processes must not use the threads that the parent's tokenizer started
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
