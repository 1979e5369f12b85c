"""Conversations of different length, about different numbers of images, become one batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from src.datamodules.batches.base import BatchError, validate
from src.datamodules.batches.chat import ChatBatch, ChatSample, collate_chat
from src.datamodules.datamodule import DataModule
from src.datamodules.views.image import CenterCrop
from src.errors import SettingError
from tests.datamodules.test_dataset import Arrays


def sample(tokens: list[int], answer: int, images: int, side: int = 4) -> ChatSample:
    """The last ``answer`` tokens are to be predicted."""
    loss_mask = torch.arange(len(tokens)) >= len(tokens) - answer
    return ChatSample(torch.tensor(tokens), loss_mask, torch.full((images, 3, side, side), 255, dtype=torch.uint8))


SAMPLES = [sample([5, 6, 7], answer=1, images=2), sample([8], answer=0, images=0), sample([3, 4], 2, images=1, side=6)]


def on_device(fields: dict[str, Any]) -> dict[str, Any]:
    view = CenterCrop(8)
    data = DataModule(source=Arrays, train_view=view, eval_view=view, batch_size=4, num_workers=0)
    index = torch.arange(len(fields["tokens"]))
    return data.on_after_batch_transfer({**fields, "index": index, "replaced": index < 0}, 0)


def test_tokens_are_padded_and_images_stay_lists() -> None:
    batch = on_device(collate_chat(SAMPLES, padding_id=9))
    validate(batch, ChatBatch)
    assert batch["tokens"].tolist() == [[5, 6, 7], [8, 9, 9], [3, 4, 9]]
    assert batch["padding_mask"].tolist() == [[True, True, True], [True, False, False], [True, True, False]]
    assert batch["loss_mask"].tolist() == [[False, False, True], [False, False, False], [True, True, False]]
    assert [tuple(images.shape) for images in batch["images"]] == [(2, 3, 4, 4), (0, 3, 4, 4), (1, 3, 6, 6)]
    white = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(batch["images"][0][1, :, 2, 3], white)


def test_a_length_gives_all_batches_one_shape() -> None:
    batch = on_device(collate_chat(SAMPLES[1:], padding_id=0, length=5))
    validate(batch, ChatBatch)
    assert batch["tokens"].tolist() == [[8, 0, 0, 0, 0], [3, 4, 0, 0, 0]]
    assert batch["padding_mask"].sum() == 3
    with pytest.raises(SettingError, match=r"data.text_length=2: a conversation has 3 tokens"):
        collate_chat(SAMPLES, padding_id=0, length=2)


def test_masks_must_fit_their_tokens() -> None:
    wrong = ChatSample(torch.tensor([1, 2]), torch.tensor([True]), torch.zeros(0, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"a loss mask of \[1\] does not fit tokens of \[2\]"):
        collate_chat([wrong], padding_id=0)
    batch = on_device(collate_chat(SAMPLES, padding_id=0))
    with pytest.raises(BatchError, match=r"batch\['loss_mask'\] has L = 2 where 3 is expected"):
        validate({**batch, "loss_mask": batch["loss_mask"][:, :2]}, ChatBatch)
    with pytest.raises(BatchError, match=r"batch\['images'\] must be a list of 3 tensors, one a sample; got 2"):
        validate({**batch, "images": batch["images"][:2]}, ChatBatch)
    with pytest.raises(BatchError, match=r"batch\['images'\]\[0\] must be torch.float32"):
        validate(
            {**batch, "images": [images.byte() for images in batch["images"][:2]] + batch["images"][2:]}, ChatBatch
        )
