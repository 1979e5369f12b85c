"""The one way encoders are evaluated: during training, afterwards, and for claims."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader

from src.collectives import gather_rows, is_distributed
from src.datamodules.datamodule import DataModule, TaggedSource
from src.datamodules.sources.source import Split
from src.errors import SettingError
from src.evaluation.features import FeatureSets, Pool, Tags, embedding, extract_pooled
from src.randomness import seeded

BANK_SAMPLES = 25_000
QUERY_SAMPLES = 10_000


class Evaluator(Protocol):
    """Judges features; what it reports is named after the protocol, e.g. ``knn_top1``. One that takes a bank in shards
    says so by an attribute ``takes_shards``; others are given all of it. One that reads `FeatureSet.tags` has a true
    ``reads_tags``, and one that reads `FeatureSets.pooled` names what it wants there in ``pools``."""

    def __call__(self, sets: FeatureSets, device: torch.device) -> dict[str, float]: ...


class EncoderEvaluation(Protocol):
    """Judges encoders by what they say of positions, or of other data than the bank and the queries."""

    def __call__(
        self,
        encoders: Mapping[str, nn.Module],
        datamodule: DataModule,
        device: torch.device,
        *,
        split: Split = "val",
        precision: str = "32-true",
    ) -> dict[str, dict[str, float]]:
        """Its numbers by encoder."""
        ...


def run_evaluators(
    encoders: Mapping[str, nn.Module],
    datamodule: DataModule,
    evaluators: Sequence[Evaluator],
    device: torch.device,
    *,
    bank_samples: int | None = BANK_SAMPLES,
    query_samples: int | None = QUERY_SAMPLES,
    split: Split = "val",
    pool: Pool = embedding,
    precision: str = "32-true",
) -> dict[str, float]:
    """Every evaluator's numbers for every encoder, from one reading of the data.

    The first encoder's have plain names (``knn_top1``), the others' end in theirs (``knn_top1_teacher``). Leaves the
    encoders, their modes and all generators of random numbers on the CPU as they were. All processes return the same.

    Args:
        encoders: by name, image -> `Features`, on ``device``.
        bank_samples, query_samples: images at most, a fixed random choice; None for all.
        split: where the queries are from; the bank is of the training split.
        pool, precision: see `extract`.

    Raises:
        NoLabels, BadFeatures: see `extract`.
    """
    sets = feature_sets(
        encoders,
        datamodule,
        device,
        bank_samples=bank_samples,
        query_samples=query_samples,
        split=split,
        pool=pool,
        precision=precision,
        evaluators=evaluators,
    )
    return score(sets, evaluators, device)


def feature_sets(
    encoders: Mapping[str, nn.Module],
    datamodule: DataModule,
    device: torch.device,
    *,
    bank_samples: int | None = BANK_SAMPLES,
    query_samples: int | None = QUERY_SAMPLES,
    split: Split = "val",
    pool: Pool = embedding,
    precision: str = "32-true",
    evaluators: Sequence[Evaluator] = (),
) -> dict[str, FeatureSets]:
    """The bank's and the queries' features by each encoder; arguments as for `run_evaluators`.

    Args:
        evaluators: who will read them. Where one takes shards, the bank's features stay where they were read, so that a
            process holds its share alone; tags and further pools are there for whom reads them.
    """
    pools = {"": pool, **_pools(evaluators)}
    shards = any(map(takes_shards, evaluators)) and is_distributed()
    # a loader that starts draws a number, which training must not notice
    with seeded(0):
        query, bank = (
            extract_pooled(
                encoders,
                loader,
                datamodule,
                device,
                pools=pools,
                tags=_tags(evaluators, datamodule, of),
                precision=precision,
                shard=shard,
            )
            for loader, of, shard in (
                (query_loader(datamodule, split, query_samples), split, False),
                (datamodule.bank_dataloader(bank_samples), "train", shards),
            )
        )

    def sets(name: str, pool: str) -> FeatureSets:
        return FeatureSets(bank=bank[name][pool], query=query[name][pool])

    return {
        name: replace(sets(name, ""), pooled={pool: sets(name, pool) for pool in pools if pool}) for name in encoders
    }


def takes_shards(evaluator: Evaluator) -> bool:
    return bool(getattr(evaluator, "takes_shards", False))


def _pools(evaluators: Sequence[Evaluator]) -> dict[str, Pool]:
    pools: dict[str, Pool] = {}
    for evaluator in evaluators:
        for name, pool in (getattr(evaluator, "pools", None) or {}).items():
            if pools.setdefault(name, pool) is not pool:
                raise SettingError(f"two evaluators mean something different by the pool '{name}'")
    return pools


def _tags(evaluators: Sequence[Evaluator], datamodule: DataModule, split: Split) -> Tags | None:
    asked = any(getattr(evaluator, "reads_tags", False) for evaluator in evaluators)
    # data without tags is refused by who reads them, so that others can be asked at once
    return partial(datamodule.tags, split) if asked and isinstance(datamodule.source(split), TaggedSource) else None


def query_loader(
    datamodule: DataModule, split: Split, samples: int | None = None
) -> DataLoader[dict[str, torch.Tensor]]:
    """The held-out images that evaluators judge on, at most ``samples`` of them.

    Raises:
        SettingError: another split; what evaluators learn from is the training split.
    """
    if split not in ("val", "test"):
        raise SettingError(f"evaluate.split is val or test, what is held out from training; not '{split}'")
    return datamodule.test_dataloader(samples) if split == "test" else datamodule.val_dataloader(samples)


def readable(
    datamodule: DataModule, split: Split, samples: int | None, device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    """What encoders see, ``label`` and ``index`` of the held-out images that could be read, this process's share in
    batches on ``device``; arguments and errors as `query_loader`."""
    for loaded in query_loader(datamodule, split, samples):
        names = (name for name in (datamodule.input_key, "label", "index") if name in loaded)
        batch = {name: loaded[name][~loaded["replaced"]] for name in names}
        yield datamodule.on_after_batch_transfer(datamodule.transfer_batch_to_device(batch, device, 0), 0)


def score(sets: Mapping[str, FeatureSets], evaluators: Sequence[Evaluator], device: torch.device) -> dict[str, float]:
    """The evaluators' numbers, named as `run_evaluators` says."""
    scores: dict[str, dict[str, float]] = {name: {} for name in sets}
    with seeded(0), exact_products():
        for name, mine in sets.items():
            for evaluator in evaluators:
                scores[name] |= evaluator(mine if takes_shards(evaluator) else mine.whole(device), device)
    return _of_first_process(named(scores), device)


def named(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Numbers by encoder under one name each: the first encoder's as they are, others' ending in the encoder's."""
    first = next(iter(scores), None)
    return {
        metric if encoder == first else f"{metric}_{encoder}": value
        for encoder, mine in scores.items()
        for metric, value in mine.items()
    }


@contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 matrices in full precision, whatever training allows itself."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _of_first_process(scores: dict[str, float], device: torch.device) -> dict[str, float]:
    """The first process's numbers on all: what is decided by them is then decided alike."""
    if not scores:
        return scores
    dtype = torch.float32 if device.type == "mps" else torch.float64
    values = gather_rows(torch.tensor([list(scores.values())], dtype=dtype, device=device))[0]
    return dict(zip(scores, values.tolist(), strict=True))
