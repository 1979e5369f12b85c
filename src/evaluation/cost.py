"""What online evaluation costs, computed from parts that can be measured on their own."""

from __future__ import annotations

import time

import torch
from torch import nn

from src.evaluation.features import FeatureSet, FeatureSets, autocast
from src.evaluation.knn import KNN
from src.evaluation.run import BANK_SAMPLES, QUERY_SAMPLES, Evaluator, exact_products
from src.models.functional import inference


def evaluation_share(
    *,
    train_images_per_second: float,
    feature_images_per_second: float,
    evaluator_seconds: float,
    train_images: int,
    bank_samples: int = BANK_SAMPLES,
    query_samples: int = QUERY_SAMPLES,
    every_n_epochs: int = 1,
    encoders: int = 1,
    processes: int = 1,
) -> float:
    """Time of online evaluation over the time of the training it accompanies: 0.03 is 3 % of an epoch, on average.

    Args:
        train_images_per_second: of one process's training step.
        feature_images_per_second: of one process's extraction by one encoder.
        evaluator_seconds: all evaluators on one encoder's features; every process computes them.
        train_images: in an epoch.
        encoders: how many are evaluated.
        processes: that share training and extraction.
    """
    if min(train_images_per_second, feature_images_per_second, train_images, every_n_epochs, processes) <= 0:
        raise ValueError("evaluation_share: rates, images, epochs and processes must be positive")
    training = every_n_epochs * train_images / (train_images_per_second * processes)
    images = min(bank_samples, train_images) + query_samples
    extraction = encoders * images / (feature_images_per_second * processes)
    return (extraction + encoders * evaluator_seconds) / training


def feature_images_per_second(
    encoder: nn.Module,
    image_size: int,
    device: torch.device,
    *,
    batch_size: int,
    batches: int = 4,
    precision: str = "32-true",
) -> float:
    """Images an encoder turns into features in a second, data in memory, after one batch of warm-up."""
    image = torch.zeros(batch_size, 3, image_size, image_size, device=device)
    with inference(encoder), autocast(precision, device):
        encoder(image).embedding.sum().item()
        begin = time.perf_counter()
        for _ in range(batches):
            encoder(image).embedding.sum().item()  # waits for the device
        return batches * batch_size / (time.perf_counter() - begin)


def evaluator_seconds(
    dim: int,
    classes: int,
    device: torch.device,
    *,
    evaluator: Evaluator = KNN(),  # noqa: B008  frozen
    bank_samples: int = BANK_SAMPLES,
    query_samples: int = QUERY_SAMPLES,
) -> float:
    """Seconds an evaluator takes on random features of the given size."""
    generator = torch.Generator().manual_seed(0)

    def random_set(rows: int) -> FeatureSet:
        return FeatureSet(
            features=torch.randn(rows, dim, generator=generator),
            labels=torch.randint(classes, (rows,), generator=generator),
        )

    sets = FeatureSets(bank=random_set(bank_samples), query=random_set(query_samples))
    with exact_products():
        begin = time.perf_counter()
        evaluator(sets, device)
        return time.perf_counter() - begin
