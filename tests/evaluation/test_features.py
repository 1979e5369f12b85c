from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from src.evaluation.errors import BadFeatures, NotApplicable
from src.evaluation.features import (
    LastBlocks,
    embedding_and_patches,
    extract,
    mean_of_patches,
)
from src.models.backbones.encoder import Features
from src.models.backbones.image_encoder import ImageEncoder, cls_token
from tests.evaluation.toy import PatchySquares, Squares, make_data, squares, tiny_encoder, tiny_vit

CPU = torch.device("cpu")


class MeanColor(nn.Module):
    """Three numbers an image, which are known without an encoder."""

    def forward(self, image: Tensor) -> Features:
        mean = image.mean(dim=(2, 3))
        return Features(embedding=mean, patches=image.flatten(2).transpose(1, 2) * 2, grid=(1, 1))


def test_features_are_those_of_the_source_in_its_order() -> None:
    data = squares(length=23)
    found = extract({"color": MeanColor()}, data.val_dataloader(), data, CPU)["color"]
    source = Squares("val", length=23)
    expected = (source.images.astype(np.float64).mean(axis=(2, 3)) / 255 - [0.485, 0.456, 0.406]) / [
        0.229,
        0.224,
        0.225,
    ]
    np.testing.assert_allclose(found.features.numpy(), expected, atol=1e-5)
    assert found.labels.tolist() == source.labels.tolist()


def test_the_order_is_the_source_s_whatever_the_loader_s() -> None:
    data = squares(length=23)
    batches = list(data.val_dataloader())
    found = extract({"color": MeanColor()}, batches[::-1], data, CPU)["color"]
    again = extract({"color": MeanColor()}, batches, data, CPU)["color"]
    assert torch.equal(found.features, again.features)
    assert torch.equal(found.labels, again.labels)


def test_stand_ins_and_unlabelled_samples_are_left_out() -> None:
    data = make_data(partial(PatchySquares, length=20, unreadable={2, 11}, unlabelled={5, 19}))
    found = extract({"color": MeanColor()}, data.val_dataloader(), data, CPU)["color"]
    whole = squares(length=20)
    every = extract({"color": MeanColor()}, whole.val_dataloader(), whole, CPU)["color"]
    kept = [index for index in range(20) if index not in (2, 5, 11, 19)]
    assert torch.equal(found.features, every.features[kept])
    assert torch.equal(found.labels, every.labels[kept])


def test_several_encoders_share_one_reading() -> None:
    data = squares(length=23)
    read: list[int] = []

    def counted() -> list[dict[str, Tensor]]:
        for batch in data.val_dataloader():
            read.append(len(batch["label"]))
            yield batch

    both = extract({"a": tiny_encoder(0), "b": tiny_encoder(1)}, counted(), data, CPU)
    assert sum(read) == 23
    alone = extract({"b": tiny_encoder(1)}, data.val_dataloader(), data, CPU)
    assert torch.equal(both["b"].features, alone["b"].features)
    assert not torch.equal(both["a"].features, both["b"].features)


def test_encoders_are_left_as_they_were() -> None:
    data = squares(length=12)
    encoder = nn.Sequential(ImageEncoder(tiny_vit(proj_drop_rate=0.5)))
    encoder[0].backbone.blocks[0].eval()
    modes = [module.training for module in encoder.modules()]
    weights = {name: value.clone() for name, value in encoder.state_dict().items()}
    first = extract({"": encoder}, data.val_dataloader(), data, CPU)[""]
    second = extract({"": encoder}, data.val_dataloader(), data, CPU)[""]
    assert torch.equal(first.features, second.features)  # no dropout
    assert not first.features.requires_grad
    assert [module.training for module in encoder.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in encoder.state_dict().items())


def test_readouts() -> None:
    data = squares(length=12)
    vit = tiny_vit()
    by = {
        name: extract({"": ImageEncoder(vit, pool)}, data.val_dataloader(), data, CPU, readout=read)[""].features
        for name, pool, read in [
            ("mean", ImageEncoder(vit).pool, lambda features: features.embedding),
            ("cls", cls_token, lambda features: features.embedding),
            ("mean though cls", cls_token, mean_of_patches),
            ("both", cls_token, embedding_and_patches),
        ]
    }
    assert torch.equal(by["mean"], by["mean though cls"])
    assert not torch.equal(by["mean"], by["cls"])
    assert torch.equal(by["both"], torch.cat([by["cls"], by["mean"]], dim=1))


def test_the_class_tokens_of_the_last_blocks_stand_beside_each_other() -> None:
    """Those of the first block are what a ViT of one block ends with; an encoder without any gives its embedding."""
    data, whole = squares(length=6), tiny_vit()
    short = copy.deepcopy(whole)
    short.blocks = short.blocks[:1]
    encoder = ImageEncoder(whole, cls_token)
    read = partial(extract, loader=data.val_dataloader(), datamodule=data, device=CPU)
    both = read({"": encoder}, readout=LastBlocks(4))[""].features  # it has two
    first, last = (read({"": ImageEncoder(vit, cls_token)})[""].features for vit in (short, whole))
    torch.testing.assert_close(both, torch.cat([first, last], dim=1))
    torch.testing.assert_close(read({"": encoder}, readout=LastBlocks(1))[""].features, last)
    assert encoder.last_blocks == 0
    assert encoder(torch.zeros(1, 3, 32, 32)).class_tokens is None
    colors = read({"": MeanColor()}, readout=LastBlocks(4))[""].features
    assert torch.equal(colors, read({"": MeanColor()})[""].features)


def test_precision_and_storage() -> None:
    data = squares(length=12)
    encoder = tiny_encoder()
    full = extract({"": encoder}, data.val_dataloader(), data, CPU)[""].features
    mixed = extract({"": encoder}, data.val_dataloader(), data, CPU, precision="bf16-mixed")[""].features
    assert mixed.dtype == torch.float32
    assert 0 < (mixed - full).abs().max() < 0.1
    half = extract({"": encoder}, data.val_dataloader(), data, CPU, storage=torch.float16)[""].features
    assert torch.equal(half, full.half())
    low = extract({"": encoder.bfloat16()}, data.val_dataloader(), data, CPU, precision="bf16-true")[""].features
    assert 0 < (low - full).abs().max() < 0.1
    with pytest.raises(ValueError, match=r"trainer.precision: 'bf17' is not one of bf16-mixed"):
        extract({"": encoder}, data.val_dataloader(), data, CPU, precision="bf17")


def test_features_that_are_not_finite_are_named() -> None:
    class Breaks(MeanColor):
        def forward(self, image: Tensor) -> Features:
            features = super().forward(image)
            features.embedding[3] = torch.nan
            return features

    data = squares(length=12, eval_batch_size=12)
    with pytest.raises(BadFeatures, match=r"'student' gives NaN or infinite features for 1 of 12 .* index 3"):
        extract({"student": Breaks()}, data.val_dataloader(), data, CPU)


def test_without_labels_there_is_nothing_to_evaluate() -> None:
    data = squares(length=12, labelled=False)
    with pytest.raises(NotApplicable, match="label"):
        extract({"": MeanColor()}, data.val_dataloader(), data, CPU)
