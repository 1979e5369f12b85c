"""Tokenizers: pretrained ones by name, or byte-pair encodings learned from the training texts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from src.errors import SettingError
from src.files import write_atomically

# the end token must not have id 2: transformers' CLIP would then pool at the largest id, as in OpenAI's vocabulary
_PAD, _END, _START = "<pad>", "<end>", "<start>"


class Tokenizer:
    """Converts texts to token ids of one length. A special token that a text spells out, such as ``<end>``, is text
    like any other: as a token it would end the text for a tower that reads it there.

    Args:
        inner: a tokenizer of transformers.
        length: tokens of a text, start and end included; longer texts are truncated before their end token.

    Raises:
        SettingError: the tokenizer has no padding token, or the length leaves no room for a word.
    """

    def __init__(self, inner: PreTrainedTokenizerBase, *, length: int) -> None:
        if length < 3:
            raise SettingError(f"data.text_length={length} must be at least 3: start, a word, and end")
        if inner.pad_token_id is None:
            raise SettingError(f"data.tokenizer: the tokenizer {inner.name_or_path} has no padding token")
        self.inner = inner
        self.length = length

    @property
    def vocabulary(self) -> int:
        """Number of token ids, added ones included."""
        return len(self.inner)

    @property
    def start(self) -> int | None:
        """Id of the start token; None if there is none."""
        return self.inner.bos_token_id

    @property
    def end(self) -> int | None:
        """Id of the end token; None if there is none."""
        return self.inner.eos_token_id

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Returns token ids int64 [B, length] and the padding mask, bool [B, length], True for tokens that are not
        padding; B may be 0."""
        if not texts:
            return torch.zeros(0, self.length, dtype=torch.int64), torch.zeros(0, self.length, dtype=torch.bool)
        encoded = self._encode(texts, return_tensors="pt")
        return encoded["input_ids"], encoded["attention_mask"].bool()

    def character_spans(self, texts: Sequence[str]) -> Tensor:
        """Returns the characters of its text that each token stands for, the first and one past the last: int64
        [B, length, 2]. Start, end and padding stand for none (0, 0).

        Raises:
            SettingError: the tokenizer is one of transformers' slow ones, which do not know.
        """
        if not self.inner.is_fast:
            raise SettingError(
                f"data.tokenizer: {self.inner.name_or_path} does not map tokens to characters; choose a fast tokenizer"
            )
        encoded = self._encode(texts, return_offsets_mapping=True)
        return torch.tensor(encoded["offset_mapping"])

    def is_truncated(self, texts: Sequence[str]) -> Tensor:
        """Returns which texts have more tokens than fit: bool [B]."""
        ids_of_texts = self.inner(list(texts), split_special_tokens=True)["input_ids"]
        return torch.tensor([len(ids) > self.length for ids in ids_of_texts])

    def _encode(self, texts: Sequence[str], **options: Any) -> Any:
        return self.inner(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.length,
            split_special_tokens=True,
            **options,
        )

    def decode(self, ids: Tensor) -> list[str]:
        """Converts ids [B, L] back to texts, without start, end and padding."""
        return self.inner.batch_decode(ids, skip_special_tokens=True)


def load_pretrained(name: str, *, length: int) -> Tokenizer:
    """Loads a tokenizer of the Hugging Face hub, or of a folder. No code of it is executed.

    Raises:
        SettingError: there is none of that name, or it cannot be downloaded.
    """
    try:
        return Tokenizer(AutoTokenizer.from_pretrained(name, trust_remote_code=False), length=length)
    except (OSError, ValueError) as problem:
        raise SettingError(f"data.tokenizer={name}: {str(problem).splitlines()[0]}") from problem


def train_tokenizer(texts: Iterable[str], *, vocabulary: int, length: int) -> Tokenizer:
    """Learns a byte-pair encoding over the bytes of lower-case texts; it can encode any text.

    Args:
        texts: to learn from.
        vocabulary: largest number of ids; the 256 bytes and three special tokens are always among them.
        length: tokens of a text.
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
    special_tokens = [(token, inner.token_to_id(token)) for token in (_START, _END)]
    inner.post_processor = processors.TemplateProcessing(single=f"{_START} $A {_END}", special_tokens=special_tokens)
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=_PAD, bos_token=_START, eos_token=_END)
    return Tokenizer(fast, length=length)


def load_or_train(path: Path, texts: Callable[[], Iterable[str]], *, vocabulary: int, length: int) -> Tokenizer:
    """Loads the tokenizer stored at ``path``; if there is none, learns it from ``texts()`` and stores it. Several
    processes may call this at once."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        inner = train_tokenizer(texts(), vocabulary=vocabulary, length=length).inner
        write_atomically(path, inner.backend_tokenizer.to_str())
    fast = PreTrainedTokenizerFast(tokenizer_file=str(path), pad_token=_PAD, bos_token=_START, eos_token=_END)
    return Tokenizer(fast, length=length)


# forked loader processes must not use the threads that the parent's tokenizer started
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
