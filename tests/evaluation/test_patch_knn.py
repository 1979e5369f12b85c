"""Patches get the right classes from masks, and their segmentation the numbers worked by hand."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torch.nn import functional as F

from src.datamodules.datamodule import DataModule
from src.datamodules.scenes.source import ScenesSource
from src.datamodules.sources.source import Sample, Source, Split
from src.datamodules.views.image import CenterCrop
from src.errors import SettingError
from src.evaluation.errors import NotApplicable
from src.evaluation.features import FeatureSet, FeatureSets
from src.evaluation.patch_knn import PatchSegmentation, patch_labels
from src.models.backbones.encoder import Features
from tests.evaluation.toy import squares, subject

CPU = torch.device("cpu")


class Bands(Source):
    """Images of 8 x 8 whose left ``index % 8`` columns are red things (class 0) and whose rest is black."""

    classes = ("thing", "never seen")

    def __init__(self, split: Split, *, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        image = torch.zeros(3, 8, 8, dtype=torch.uint8)
        image[0] = self.segmentation(index) * 255
        return {"image": image, "label": 0}

    def segmentation(self, index: int) -> Tensor:
        segments = torch.zeros(8, 8, dtype=torch.uint8)
        segments[:, : index % 8] = 1
        return segments

    def name(self, index: int) -> str:
        return f"bands {index}"


class Colors(nn.Module):
    """Mean color of each 4 x 4 patch, and how far it is from black and from red."""

    def forward(self, image: Tensor) -> Features:
        patches = F.avg_pool2d(image, 4).flatten(2).transpose(1, 2)
        return Features(embedding=patches.mean(dim=1), patches=patches, grid=(image.shape[-2] // 4, 2))


def bands(length: int = 16, **options: Any) -> DataModule:
    settings: dict[str, Any] = {"batch_size": 4, "eval_batch_size": 5, "num_workers": 0, **options}
    view = CenterCrop(8, settings.pop("share", 1.0))
    source = partial(Bands, length=length)
    return DataModule(source=source, train_view=view, eval_view=view, **settings)


def rows(features: list[list[float]], labels: list[int]) -> FeatureSet:
    return FeatureSet(torch.tensor(features), torch.tensor(labels))


def test_intersection_over_union_by_hand() -> None:
    """Truth 0 0 0 1 1, predicted 0 0 1 1 1: 2 of 3 and 2 of 3; class 2 is nowhere and does not count."""
    bank = rows([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [0, 1, 2])
    query = rows([[2.0, 0, 0], [3.0, 0, 0], [0, 1.0, 0], [0, 5.0, 0], [0, 1.0, 0]], [0, 0, 0, 1, 1])
    scores = PatchSegmentation(k=1).score(FeatureSets(bank=bank, query=query), CPU)
    assert scores == {"patch_miou": pytest.approx(2 / 3), "patch_accuracy": pytest.approx(4 / 5)}


def test_a_rare_class_counts_as_much_as_the_background() -> None:
    """Nine patches of background right, the only one of a thing wrong: unions 10 and 1, so (9/10 + 0) / 2."""
    bank = rows([[1.0, 0.0], [0.0, 1.0]], [0, 1])
    query = rows([[1.0, 0.0]] * 10, [0] * 9 + [1])
    scores = PatchSegmentation(k=1).score(FeatureSets(bank=bank, query=query), CPU)
    assert scores == {"patch_miou": pytest.approx(0.45), "patch_accuracy": pytest.approx(0.9)}


def test_the_class_of_a_patch_covers_most_of_it() -> None:
    """Two patches of 2 x 2: three pixels of class 2 and one of background; two of each, where the first one has it."""
    kinds = torch.tensor([[2, 2, 0, 1], [0, 2, 1, 0]])
    shares = F.one_hot(kinds, 3).permute(2, 0, 1)[None].float()
    assert patch_labels(shares, (1, 2)).tolist() == [[2, 0]]


def test_masks_are_cropped_like_images() -> None:
    """The middle half of an image, enlarged: 3 red columns of 8 leave the first of 4, which fills 2 of 8 columns."""
    data = bands(share=0.5)
    index = torch.tensor([3])
    shares = data.class_shares("val", index)
    assert shares.shape == (1, 3, 8, 8)
    picture = data.eval_view.from_decoded(Bands("val", length=4)[3]["image"][None], np.zeros((1, 0), np.float32))[
        "image"
    ]
    assert torch.equal(shares[:, 1], picture[:, 0].float() / 255)
    assert shares[0, 1, :, 0].min() > 0.9
    assert shares[0, 1, :, 4:].max() < 0.05
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(1, 8, 8), rtol=0, atol=2 / 255)


def test_labels_and_features_are_of_the_same_patches_in_the_order_of_the_images() -> None:
    """A column of 4 is a thing from 3 columns on (2 of 4 is a draw, which the background has)."""
    sets = PatchSegmentation(bank_images=16, query_images=16, bank_patches=1000).patch_sets(
        subject({"": Colors()}, bands())
    )[""]
    expected = [[int(min(i % 8, 4) > 2), int(max(i % 8 - 4, 0) > 2)] * 2 for i in range(16)]
    assert sets.query.labels.view(16, 4).tolist() == expected
    assert torch.equal(sets.bank.labels, sets.query.labels)
    red = (sets.query.features[:, 0] * 0.229 + 0.485).view(16, 4)
    torch.testing.assert_close(red, torch.tensor([[min(i % 8, 4) / 4, max(i % 8 - 4, 0) / 4] * 2 for i in range(16)]))


def test_the_bank_is_bounded_and_chosen_by_the_image_alone() -> None:
    sets, again = (
        PatchSegmentation(bank_images=8, bank_patches=16).patch_sets(
            subject({"": Colors()}, bands(seed=seed, eval_batch_size=size))
        )[""]
        for seed, size in ((0, 5), (1, 3))
    )
    assert len(sets.bank.labels) == 16
    assert len(sets.query.labels) == 16 * 4
    assert torch.equal(sets.bank.features, again.bank.features)
    assert torch.equal(sets.bank.labels, again.bank.labels)


def test_two_processes_read_what_one_does() -> None:
    """Each its share; together, by image, the same rows."""
    whole = PatchSegmentation().patch_sets(subject({"": Colors()}, bands(15)))[""].query
    parts = []
    for rank in range(2):
        data = bands(15)
        data.trainer = SimpleNamespace(
            global_rank=rank, world_size=2, accumulate_grad_batches=1, precision_plugin=Precision()
        )  # type: ignore[assignment]
        parts.append(PatchSegmentation().patch_sets(subject({"": Colors()}, data))[""].query)
    together = torch.cat([torch.cat([part.features, part.labels[:, None]], dim=1) for part in parts])
    one = torch.cat([whole.features, whole.labels[:, None]], dim=1)
    assert sorted(together.tolist()) == sorted(one.tolist())


def test_scenes_know_the_class_of_each_pixel() -> None:
    source = ScenesSource("test", count=3, resolution=32, fields=("instance_masks", "box_labels"))
    for index in range(3):
        fields = source[index]["fields"]
        expected = torch.zeros(32, 32, dtype=torch.long)
        for mask, kind in zip(fields["instance_masks"], fields["box_labels"], strict=True):
            expected[mask] = kind + 1
        assert torch.equal(source.segmentation(index).long(), expected)
        assert expected.any()


def test_data_without_masks_is_refused() -> None:
    with pytest.raises(NotApplicable, match=r"masks are needed, .*Squares \(data.source\) does not"):
        PatchSegmentation().patch_sets(subject({"": Colors()}, squares()))


def test_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="k must be at least 1"):
        PatchSegmentation(k=0)


@pytest.mark.parametrize("name", ["bank_images", "query_images", "bank_patches"])
def test_numbers_of_nothing_are_refused(name):
    with pytest.raises(SettingError, match=f"PatchSegmentation: {name} must be at least 1, got 0"):
        PatchSegmentation(**{name: 0})
