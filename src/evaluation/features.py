"""Features of a bank and of queries, read once and shared by every evaluator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from src.collectives import gather_rows, rank
from src.datamodules.batches.base import mean_of_samples
from src.datamodules.datamodule import DataModule
from src.models.backbones.encoder import Encoder, Features
from src.models.functional import inference

Pool = Callable[[Features], Tensor]
Tags = Callable[[Tensor], Tensor]  # positions in a source, int64 [B] -> bool [B, K]

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_FULL = ("32", "32-true", "64", "64-true", "16-true", "bf16-true")


class NoLabels(ValueError):
    """There is no labelled sample to evaluate with."""


class BadFeatures(ValueError):
    """An encoder's features are not finite."""


@dataclass(frozen=True)
class FeatureSet:
    """Labelled features of one data set, in the data set's order.

    A shard holds the features this process has read, and which rows of the whole they are; labels are few bytes and are
    whole everywhere.
    """

    features: Tensor  # [n, D], or [m, D] of a shard; float32 or float16, on the CPU
    labels: Tensor  # [n], int64, none of them negative
    rows: Tensor | None = None  # int64 [m], ascending: the rows of a shard; None for the whole set
    tags: Tensor | None = (
        None  # bool [n, K]: every class that is there; None where nobody asked, or the data knows none
    )

    def whole(self, device: torch.device) -> FeatureSet:
        """The set with the features of all processes, exchanged through ``device``. Every process must call it."""
        if self.rows is None:
            return self
        order = torch.argsort(gather_rows(self.rows.to(device))).cpu()
        return replace(self, features=gather_rows(self.features.to(device)).cpu()[order], rows=None)

    def take(self, rows: Tensor) -> FeatureSet:
        """These rows of a whole set, int64 [m]."""
        tags = None if self.tags is None else self.tags[rows]
        return FeatureSet(features=self.features[rows], labels=self.labels[rows], tags=tags)


@dataclass(frozen=True)
class FeatureSets:
    """What an evaluator may learn from (``bank``) and what it is judged on (``query``)."""

    bank: FeatureSet
    query: FeatureSet
    pooled: Mapping[str, FeatureSets] = field(default_factory=dict)  # the same samples, pooled as evaluators asked

    @property
    def classes(self) -> int:
        """One more than the largest label of either set."""
        return int(max(self.bank.labels.max(), self.query.labels.max())) + 1

    def whole(self, device: torch.device) -> FeatureSets:
        """With the bank's shards put together, see `FeatureSet.whole`."""
        pooled = {name: each.whole(device) for name, each in self.pooled.items()}
        return FeatureSets(self.bank.whole(device), self.query, pooled)

    def learning_from(self, rows: Tensor) -> FeatureSets:
        """With these rows of the bank alone, int64 [m]."""
        pooled = {name: each.learning_from(rows) for name, each in self.pooled.items()}
        return FeatureSets(self.bank.take(rows), self.query, pooled)


def embedding(features: Features) -> Tensor:
    """The encoder's own embedding: [B, D]."""
    return features.embedding


def mean_of_patches(features: Features) -> Tensor:
    """The mean over positions, whatever the encoder pools by: [B, D]."""
    return features.patches.mean(dim=1)


def embedding_and_patches(features: Features) -> Tensor:
    """The embedding next to the mean over positions: [B, 2 D]."""
    return torch.cat([features.embedding, features.patches.mean(dim=1)], dim=1)


@dataclass(frozen=True)
class LastBlocks:
    """The class tokens of the last blocks beside each other, as DINO probes its small ViTs: [B, blocks D]. The
    embedding, of encoders that have none.

    Args:
        blocks: how many; those there are, of a backbone with fewer.
    """

    blocks: int = 4

    def __call__(self, features: Features) -> Tensor:
        return (
            features.embedding if features.class_tokens is None else features.class_tokens[:, -self.blocks :].flatten(1)
        )


@contextmanager
def reaching(encoders: Iterable[nn.Module], pools: Iterable[Pool]) -> Iterator[None]:
    """Encoders that give what the pools read of earlier blocks; afterwards they do not any more."""
    deep = max((pool.blocks for pool in pools if isinstance(pool, LastBlocks)), default=0)
    able = [encoder for encoder in encoders if isinstance(encoder, Encoder)]
    for encoder in able:
        encoder.last_blocks = deep
    try:
        yield
    finally:
        for encoder in able:
            encoder.last_blocks = 0


@dataclass
class Rows:
    """What this process has read so far."""

    features: list[Tensor]
    labels: list[Tensor]
    indices: list[Tensor]
    tags: list[Tensor] = field(default_factory=list)

    def add(self, features: Tensor, batch: Mapping[str, Tensor], tags: Tensor | None = None) -> None:
        self.features.append(features)
        self.labels.append(batch["label"].cpu())
        self.indices.append(batch["index"].cpu())
        if tags is not None:
            self.tags.append(tags)


def extract(
    encoders: Mapping[str, nn.Module],
    loader: Iterable[dict[str, Tensor]],
    datamodule: DataModule,
    device: torch.device,
    *,
    pool: Pool = embedding,
    precision: str = "32-true",
    storage: torch.dtype = torch.float32,
    shard: bool = False,
) -> dict[str, FeatureSet]:
    """Features of every labelled image of ``loader`` by each of ``encoders``, in one pass over the data.

    Each process reads the share its loader gives it and all of them return all rows, in the data set's order, so the
    result does not depend on the number of processes. Features of several clips of a video are averaged. Stand-ins for
    unreadable samples and samples without a label are left out. Encoders run in evaluation mode, without gradients, and
    are left in the modes they were in.

    Args:
        encoders: by name, image [B, 3, H, W] or video [B, T, 3, H, W] -> `Features`, already on ``device``.
        pool: what is taken of the `Features`: [B, D].
        precision: of the forward pass, as Lightning's Trainer calls it.
        shard: leave each process the features it has read, instead of giving all of them to all.
        storage: type the features are kept in; float16 halves the memory of a large bank.

    Raises:
        NoLabels: no sample has a label.
        BadFeatures: NaN or infinite features, naming the encoder and the sample.
    """
    found = extract_pooled(
        encoders, loader, datamodule, device, pools={"": pool}, precision=precision, storage=storage, shard=shard
    )
    return {name: each[""] for name, each in found.items()}


def extract_pooled(
    encoders: Mapping[str, nn.Module],
    loader: Iterable[dict[str, Tensor]],
    datamodule: DataModule,
    device: torch.device,
    *,
    pools: Mapping[str, Pool],
    tags: Tags | None = None,
    precision: str = "32-true",
    storage: torch.dtype = torch.float32,
    shard: bool = False,
) -> dict[str, dict[str, FeatureSet]]:
    """As `extract`, with several pools of the same forward passes: by encoder, then by pool.

    Args:
        tags: what else is known of samples, by their positions in the source.
    """
    rows = {name: {pool: Rows([], [], []) for pool in pools} for name in encoders}
    every = list(encoders.values())
    with inference(nn.ModuleList(every)), reaching(every, pools.values()), autocast(precision, device):
        for loaded in loader:
            batch = labelled(loaded, datamodule.input_key)
            if len(batch["label"]) == 0:
                continue
            known = None if tags is None else tags(batch["index"])
            batch = datamodule.transfer_batch_to_device(batch, device, 0)
            batch = datamodule.on_after_batch_transfer(batch, 0)
            for name, encoder in encoders.items():
                features = encoder(batch[datamodule.input_key].to(weight_dtype(encoder)))
                for pool, of in pools.items():
                    mean, first = mean_of_samples(of(features).float(), batch["index"])
                    of_sample = {key: batch[key][first] for key in ("label", "index")}
                    tagged = None if known is None else known[first.cpu()]
                    rows[name][pool].add(mean.to("cpu").to(storage), of_sample, tagged)
    return {
        name: {pool: gathered(name, each, device, storage, shard=shard) for pool, each in mine.items()}
        for name, mine in rows.items()
    }


def labelled(loaded: dict[str, Tensor], seen: str) -> dict[str, Tensor]:
    """A batch without stand-ins and samples that have no label: the field ``seen``, label and index."""
    if "label" not in loaded:
        raise NoLabels("the evaluation data has no labels")
    keep = (loaded["label"] >= 0) & ~loaded["replaced"]
    fields = {name: loaded[name] for name in (seen, "label", "index")}
    return fields if keep.all() else {name: value[keep] for name, value in fields.items()}


def weight_dtype(encoder: nn.Module) -> torch.dtype:
    """The type the encoder's weights have, which differs from float32 where a whole run is kept in another."""
    return next((p.dtype for p in encoder.parameters() if p.is_floating_point()), torch.float32)


def gathered(name: str, mine: Rows, device: torch.device, storage: torch.dtype, *, shard: bool = False) -> FeatureSet:
    """The rows of all processes, in the order of their indices; rows of one index stay in theirs."""
    # a process with fewer samples than the others may hold none, and then does not know the width
    width = torch.tensor([mine.features[0].shape[1] if mine.features else 0], device=device)
    empty = torch.zeros(0, int(gather_rows(width).max()), dtype=storage)
    features = torch.cat([empty, *mine.features])
    if not shard:
        features = gather_rows(features.to(device)).cpu()
    no_rows = torch.zeros(0, dtype=torch.int64)
    labels = gather_rows(torch.cat([no_rows, *mine.labels]).to(device)).cpu()
    indices = gather_rows(torch.cat([no_rows, *mine.indices]).to(device)).cpu()
    tags = _gathered_tags(mine.tags, device)
    if len(labels) == 0:
        raise NoLabels("no sample of the evaluation data has a label")
    # after the gathering, so that all processes stop alike
    bad = ~torch.isfinite(features).all(dim=1)
    if shard:
        bad = gather_rows(bad.to(device)).cpu()
    if bad.any():
        raise BadFeatures(
            f"the encoder '{name}' gives NaN or infinite features for {int(bad.sum())} of {len(bad)} samples, "
            f"the first at index {int(indices[bad].min())} (kept as {storage})"
        )
    order = torch.argsort(indices, stable=True)
    tags = None if tags is None else tags[order]
    if not shard:
        return FeatureSet(features=features[order], labels=labels[order], tags=tags)
    # the processes' rows were joined one process after the other: where the own ones begin, and where they end up
    begin = int(gather_rows(torch.tensor([len(features)], device=device))[: rank()].sum())
    own = (order >= begin) & (order < begin + len(features))
    own_rows = own.nonzero().flatten()
    return FeatureSet(features=features[order[own] - begin], labels=labels[order], rows=own_rows, tags=tags)


def _gathered_tags(mine: list[Tensor], device: torch.device) -> Tensor | None:
    """Those of all processes, one after the other; None where no process has any."""
    width = int(gather_rows(torch.tensor([mine[0].shape[1] if mine else 0], device=device)).max())
    if width == 0:
        return None
    tags = torch.cat([torch.zeros(0, width, dtype=torch.bool), *mine])
    return gather_rows(tags.to(device, torch.uint8)).cpu().bool()


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The forward pass's context under a Trainer's ``precision``.

    Raises:
        ValueError: not a precision that is known here.
    """
    if precision in _AUTOCAST:
        return torch.autocast(device.type, dtype=_AUTOCAST[precision])
    if str(precision) in _FULL:
        return nullcontext()
    raise ValueError(f"precision '{precision}' is not one of {', '.join([*_AUTOCAST, *_FULL])}")
