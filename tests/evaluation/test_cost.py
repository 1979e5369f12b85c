from __future__ import annotations

import inspect
import time

import pytest
import torch

from src.callbacks.online_evaluation import OnlineEvaluation
from src.evaluation.cost import evaluation_share, feature_images_per_second, scoring_seconds
from src.evaluation.evaluation import FeatureEvaluation
from src.evaluation.features import FeatureSets
from src.evaluation.pixels import PixelEncoder
from src.models.backbones.encoder import Features

CPU = torch.device("cpu")


def test_share_of_an_epoch() -> None:
    # an epoch of 1000 images takes 10 s; 200 + 100 images take 0.6 s and the evaluator 0.4 s: 1 s in 2 epochs of 10 s
    parts = {
        "train_images_per_second": 100.0,
        "feature_images_per_second": 500.0,
        "scoring_seconds": 0.4,
        "train_images": 1000,
        "bank_samples": 200,
        "query_samples": 100,
        "every_n_epochs": 2,
    }
    assert evaluation_share(**parts) == pytest.approx(0.05)
    assert evaluation_share(**parts, encoders=2) == pytest.approx(0.1)
    # four processes share training (5 s in 2 epochs) and extraction (0.15 s), but all run the evaluator
    assert evaluation_share(**parts, processes=4) == pytest.approx((0.15 + 0.4) / 5)
    # a bank cannot be larger than the training set
    assert evaluation_share(**parts | {"bank_samples": 5000}) == pytest.approx((1100 / 500 + 0.4) / 20)
    with pytest.raises(ValueError, match="positive"):
        evaluation_share(**parts | {"every_n_epochs": 0})


def test_the_defaults_are_cheap_on_imagenet() -> None:
    # a forward pass over all tokens costs 0.6 of MAE's training step over a quarter of them
    defaults = inspect.signature(OnlineEvaluation).parameters
    share = evaluation_share(
        train_images_per_second=1.0,
        feature_images_per_second=1 / 0.6,
        scoring_seconds=60.0,
        train_images=1_281_167,
        **{name: defaults[name].default for name in ("every_n_epochs", "bank_samples", "query_samples")},
    )
    assert share < 0.01


def test_parts_are_measured() -> None:
    class Sleeps(PixelEncoder):
        def forward(self, image: torch.Tensor) -> Features:
            time.sleep(0.01 * len(image))
            return super().forward(image)

    rate = feature_images_per_second(Sleeps(1), 4, CPU, batch_size=3, batches=2)
    assert 50 < rate <= 100  # 10 ms an image and a little

    class Slow(FeatureEvaluation):
        def score(self, sets: FeatureSets, device: torch.device) -> dict[str, float]:
            assert (sets.bank.features.shape, len(sets.query.labels)) == ((30, 8), 20)
            time.sleep(0.02)
            return {}

    seconds = scoring_seconds(8, 3, CPU, evaluation=Slow(), bank_samples=30, query_samples=20)
    assert 0.02 <= seconds < 0.2
