"""A small world for the tests of evaluation: colored squares, a tiny ViT, a method with a student and a teacher."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from src.datamodules.batches.image import ImageBatch
from src.datamodules.datamodule import DataModule
from src.datamodules.decoding import BadSample
from src.datamodules.sources.source import Sample, Source, Split
from src.datamodules.views.image import CenterCrop
from src.evaluation.evaluation import Evaluation, joined_needs
from src.evaluation.features import FeatureSets
from src.evaluation.subject import Subject
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder
from src.models.pretrain_module import PretrainModule, StepOutput
from src.optim import OptimizerRecipe
from src.randomness import seeded
from tests.toys import small_vit

SIZE = 32


class Squares(Source):
    """Noise whose red, green or blue channel is brighter, by class; in the order of the classes, as folders are."""

    def __init__(self, split: Split, *, length: int, labelled: bool = True) -> None:
        generator = np.random.default_rng(length + (split == "train"))
        labels = np.sort(np.arange(length) % 3)
        images = generator.integers(0, 200, (length, 3, SIZE, SIZE))
        images[np.arange(length), labels] += 25
        self.images = images.astype(np.uint8)
        self.labels = labels if labelled else np.full(length, -1)
        self.classes = ["red", "green", "blue"] if labelled else []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return Sample(image=torch.from_numpy(self.images[index]), label=int(self.labels[index]))

    def name(self, index: int) -> str:
        return f"square {index}"


class PatchySquares(Source):
    """Squares read one at a time, some of which cannot be read and some of which have no label."""

    def __init__(self, split: Split, *, length: int, unreadable: set[int], unlabelled: set[int]) -> None:
        self.squares = Squares(split, length=length)
        self.unreadable, self.unlabelled = unreadable, unlabelled
        self.classes = self.squares.classes

    def __len__(self) -> int:
        return len(self.squares)

    def __getitem__(self, index: int) -> Sample:
        if index in self.unreadable:
            raise BadSample("torn")
        sample = self.squares[index]
        return Sample(image=sample["image"], label=-1 if index in self.unlabelled else sample["label"])

    def name(self, index: int) -> str:
        return self.squares.name(index)


def squares(length: int = 48, *, labelled: bool = True, **options: Any) -> DataModule:
    return make_data(partial(Squares, length=length, labelled=labelled), **options)


def make_data(source: Any, **options: Any) -> DataModule:
    settings = {"batch_size": 16, "eval_batch_size": 10, "num_workers": 0, **options}
    return DataModule(source=source, train_view=CenterCrop(SIZE, 1.0), eval_view=CenterCrop(SIZE, 1.0), **settings)


def tiny_vit(seed: int = 0, **options: Any) -> nn.Module:
    with seeded(seed):
        return small_vit(**{"img_size": SIZE, "embed_dim": 32, "depth": 2, **options})


def tiny_encoder(seed: int = 0) -> ImageEncoder:
    return ImageEncoder(tiny_vit(seed))


def subject(encoders: Mapping[str, nn.Module], datamodule: DataModule, **options: Any) -> Subject:
    """Encoders on the CPU, to be evaluated."""
    return Subject(datamodule, torch.device("cpu"), encoders=encoders, **options)


def towers(module: nn.Module, datamodule: DataModule, **options: Any) -> Subject:
    """A method on the CPU, to be evaluated on at most 5000 images."""
    return Subject(datamodule, torch.device("cpu"), module=module, **{"query_samples": 5000, **options})


def features(
    encoders: Mapping[str, nn.Module],
    datamodule: DataModule,
    evaluations: Sequence[Evaluation] = (),
    **options: Any,
) -> dict[str, FeatureSets]:
    """The features that the evaluations read."""
    return subject(encoders, datamodule, **options).features(joined_needs(evaluations))


class Toy(PretrainModule):
    """Regresses an image's mean color. Dropout draws random numbers, which evaluation must not disturb."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__(OptimizerRecipe(partial(torch.optim.AdamW), lr=1e-3))
        self.student = tiny_vit(proj_drop_rate=dropout)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        with seeded(1):
            self.head = nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 3))

    def training_step(self, batch: ImageBatch, batch_idx: int) -> StepOutput:
        embedding = ImageEncoder(self.student)(batch["image"]).embedding
        loss = (self.head(embedding) - batch["image"].mean(dim=(2, 3))).square().mean()
        return StepOutput(loss=loss, embedding=embedding.detach())

    def encoders(self) -> dict[str, Encoder]:
        return {"student": ImageEncoder(self.student), "teacher": ImageEncoder(self.teacher)}


def random_rows(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
