"""Estimates the cost of online evaluation at paper scale from parts measured on this machine."""

from __future__ import annotations

from typing import Any

from benchmarks.precision import SMALL, vit_b_loop
from src import configuration
from src.evaluation.cost import evaluation_share, feature_images_per_second, scoring_seconds
from src.measure.report import Check, Section, percent, table

WANTED = 0.03
TRAIN_IMAGES, CLASSES = 1_281_167, 1000  # ImageNet-1k


def measure(quick: bool = False) -> dict[str, Any]:
    """Estimates the share of an epoch of MAE ViT-B on ImageNet that evaluation with the default settings takes.

    Returns:
        The measured parts, the settings, and the ``share``.
    """
    config = configuration.compose("train", ["experiment=mae_vitb", "scale=paper"])
    online = configuration.instantiate(config.callbacks.evaluation)
    settings = {key: int(getattr(online, key)) for key in ("bank_samples", "query_samples", "every_n_epochs")}
    precision = configuration.default_precision()
    loop = vit_b_loop(precision, SMALL if quick else [])
    steps = 1 if quick else 8
    loop.run(1)
    encoder = loop.module.encoders()["encoder"]
    train_rate = steps * loop.batch_size / loop.run(steps)
    feature_rate = feature_images_per_second(
        encoder,
        config.image_size,
        loop.device,
        batch_size=2 if quick else 16,
        batches=1 if quick else 6,
        precision=precision,
    )
    seconds = scoring_seconds(
        encoder.dim,
        CLASSES,
        loop.device,
        bank_samples=500 if quick else settings["bank_samples"],
        query_samples=200 if quick else settings["query_samples"],
    )
    share = evaluation_share(
        train_images_per_second=train_rate,
        feature_images_per_second=feature_rate,
        scoring_seconds=seconds,
        train_images=TRAIN_IMAGES,
        **settings,
    )
    return {
        "train_images_per_second": train_rate,
        "feature_images_per_second": feature_rate,
        "evaluator_seconds": seconds,
        **settings,
        "precision": precision,
        "device": loop.device.type,
        "share": share,
    }


def report(result: dict[str, Any]) -> Section:
    check = Check(
        "online evaluation, share of an epoch of MAE ViT-B on ImageNet",
        f"≤ {percent(WANTED, 0)}",
        percent(result["share"], 2),
        result["share"] <= WANTED,
    )
    body = (
        f"MAE ViT-B on the {result['device'].upper()} in {result['precision']}, {TRAIN_IMAGES:,} images an epoch; "
        f"every {result['every_n_epochs']} epochs kNN of {result['query_samples']:,} queries in a bank of "
        f"{result['bank_samples']:,}. If it ran every epoch, it would be "
        f"{percent(result['share'] * result['every_n_epochs'], 2)}.\n\n"
        + table(
            ["trained, images/s", "features, images/s", "kNN, s", "share"],
            [
                [
                    f"{result['train_images_per_second']:.1f}",
                    f"{result['feature_images_per_second']:.1f}",
                    f"{result['evaluator_seconds']:.1f}",
                    percent(result["share"], 2),
                ]
            ],
        )
    )
    return Section("Online evaluation", [check], body)
