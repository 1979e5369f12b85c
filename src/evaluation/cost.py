"""The cost of online evaluation, computed from parts that can be measured separately."""

from __future__ import annotations

import time

import torch
from torch import nn

from src.errors import SettingError
from src.evaluation.evaluation import FeatureEvaluation
from src.evaluation.features import FeatureSet, FeatureSets, autocast
from src.evaluation.knn import KNN
from src.evaluation.subject import BANK_SAMPLES, QUERY_SAMPLES, exact_products
from src.models.functional import inference


def evaluation_share(
    *,
    train_images_per_second: float,
    feature_images_per_second: float,
    scoring_seconds: float,
    train_images: int,
    bank_samples: int = BANK_SAMPLES,
    query_samples: int = QUERY_SAMPLES,
    every_n_epochs: int = 1,
    encoders: int = 1,
    processes: int = 1,
) -> float:
    """Returns the time of online evaluation over the time of training: 0.03 is 3 % of an epoch, on average.

    Args:
        train_images_per_second: throughput of training in one process.
        feature_images_per_second: throughput of feature extraction by one encoder in one process.
        scoring_seconds: time of all evaluations on the features of one encoder, which every process computes.
        train_images: images of an epoch.
        bank_samples, query_samples: images whose features are extracted.
        every_n_epochs: epochs between evaluations.
        encoders: number of encoders.
        processes: number of processes that share training and extraction.
    """
    if min(train_images_per_second, feature_images_per_second, train_images, every_n_epochs, processes) <= 0:
        raise SettingError("evaluation_share: rates, images, epochs and processes must be positive")
    training = every_n_epochs * train_images / (train_images_per_second * processes)
    images = min(bank_samples, train_images) + query_samples
    extraction = encoders * images / (feature_images_per_second * processes)
    return (extraction + encoders * scoring_seconds) / training


def feature_images_per_second(
    encoder: nn.Module,
    image_size: int,
    device: torch.device,
    *,
    batch_size: int,
    batches: int = 4,
    precision: str = "32-true",
) -> float:
    """Measures the images an encoder computes features of in a second, with the data in memory, after one batch of
    warm-up."""
    image = torch.zeros(batch_size, 3, image_size, image_size, device=device)
    with inference(encoder), autocast(precision, device):
        encoder(image).embedding.sum().item()
        begin = time.perf_counter()
        for _ in range(batches):
            encoder(image).embedding.sum().item()  # waits for the device
        return batches * batch_size / (time.perf_counter() - begin)


def scoring_seconds(
    dim: int,
    classes: int,
    device: torch.device,
    *,
    evaluation: FeatureEvaluation = KNN(),  # noqa: B008  frozen
    bank_samples: int = BANK_SAMPLES,
    query_samples: int = QUERY_SAMPLES,
) -> float:
    """Measures the seconds an evaluation takes on random features of the given size."""
    generator = torch.Generator().manual_seed(0)

    def random_set(rows: int) -> FeatureSet:
        return FeatureSet(
            features=torch.randn(rows, dim, generator=generator),
            labels=torch.randint(classes, (rows,), generator=generator),
        )

    sets = FeatureSets(bank=random_set(bank_samples), query=random_set(query_samples))
    with exact_products():
        begin = time.perf_counter()
        evaluation.score(sets, device)
        return time.perf_counter() - begin
