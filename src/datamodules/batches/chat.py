"""Batches of conversations about any number of images, for chat models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from src.datamodules.batches.base import Batch, Field
from src.errors import SettingError


class ChatBatch(Batch):
    """Tokenized conversations with their images."""

    tokens: Annotated[Tensor, Field("B L", torch.int64)]  # token ids, padded at the right
    padding_mask: Annotated[Tensor, Field("B L", torch.bool)]  # True for tokens that are not padding
    loss_mask: Annotated[Tensor, Field("B L", torch.bool)]  # True for tokens to predict, such as those of answers
    images: Annotated[list[Tensor], Field("N C H W", torch.float32)]  # of each sample N, may be 0; normalized


class ChatSample(NamedTuple):
    """One conversation."""

    tokens: Tensor  # int64 [L]
    loss_mask: Tensor  # bool [L], True for tokens to predict
    images: Tensor  # uint8 [N, C, H, W], in the order of their placeholders in the text; N may be 0


def collate_chat(samples: Sequence[ChatSample], *, padding_id: int, length: int | None = None) -> dict[str, Any]:
    """Returns the fields of a `ChatBatch` except those of every batch; images stay uint8 for the DataModule.

    Args:
        samples: of the batch, at least one.
        padding_id: token id of the padding.
        length: tokens that all batches are padded to, for a static shape; None for those of the longest sample.

    Raises:
        SettingError: a sample is longer than ``length``. It is not truncated, as that could cut off the placeholder of
            an image.
        ValueError: the masks do not fit the tokens.
    """
    for sample in samples:
        if sample.tokens.shape != sample.loss_mask.shape:
            raise ValueError(
                f"a loss mask of {list(sample.loss_mask.shape)} does not fit tokens of {list(sample.tokens.shape)}"
            )
    longest = max(len(sample.tokens) for sample in samples)
    if length is not None and longest > length:
        raise SettingError(f"data.text_length={length}: a conversation has {longest} tokens")

    def padded(values: list[Tensor], fill: int | bool) -> Tensor:
        stacked = pad_sequence(values, batch_first=True, padding_value=fill)
        return torch.nn.functional.pad(stacked, (0, (length or longest) - longest), value=fill)

    return {
        "tokens": padded([sample.tokens for sample in samples], padding_id),
        "padding_mask": padded([torch.ones_like(sample.loss_mask) for sample in samples], False),
        "loss_mask": padded([sample.loss_mask for sample in samples], False),
        "images": [sample.images for sample in samples],
    }
