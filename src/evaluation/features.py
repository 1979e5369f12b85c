"""Features of a bank and of queries, read once and shared by all evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from src.collectives import gather_rows, rank
from src.datamodules.batches.base import mean_of_samples
from src.datamodules.datamodule import DataModule
from src.errors import SettingError
from src.evaluation.errors import BadFeatures, NotApplicable
from src.models.backbones.encoder import Encoder, Features
from src.models.functional import inference

FeatureReadout = Callable[[Features], Tensor]  # computes the vector that is evaluated: [B, D]
Tags = Callable[[Tensor], Tensor]  # positions in a source, int64 [B] -> bool [B, K]

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_FULL = ("32", "32-true", "64", "64-true", "16-true", "bf16-true")


@dataclass(frozen=True)
class FeatureNeeds:
    """The data that an evaluation reads besides embeddings and labels. The needs of several evaluations are joined with
    ``|``, so that one pass over the data serves all of them.

    Args:
        readouts: further vectors of the same forward passes, by name, as `FeatureSets.readouts` holds them.
        tags: every class of an image, as `FeatureSet.tags` holds them.
        accepts_shards: the evaluation can use a bank of which each process holds the features it has read. Other
            evaluations are given the whole bank.
    """

    readouts: Mapping[str, FeatureReadout] = field(default_factory=dict)
    tags: bool = False
    accepts_shards: bool = False

    def __or__(self, other: FeatureNeeds) -> FeatureNeeds:
        """
        Raises:
            SettingError: one name stands for two readouts.
        """
        for name in self.readouts.keys() & other.readouts.keys():
            if self.readouts[name] is not other.readouts[name] and self.readouts[name] != other.readouts[name]:
                raise SettingError(f"two evaluations define the readout '{name}' differently: rename one of them")
        return FeatureNeeds(
            {**self.readouts, **other.readouts}, self.tags or other.tags, self.accepts_shards or other.accepts_shards
        )

    def covers(self, other: FeatureNeeds) -> bool:
        """Returns True if features read for these needs also serve ``other``."""
        return (other.tags <= self.tags) and all(
            self.readouts.get(name) == other.readouts[name] for name in other.readouts
        )


@dataclass(frozen=True)
class FeatureSet:
    """Features and labels of one split, in the order of its source.

    A shard holds the features this process has read, and their rows in the whole set; labels are small and are whole in
    every process.
    """

    features: Tensor  # [n, D], or [m, D] of a shard; float32 or float16, on the CPU
    labels: Tensor  # [n], int64, none of them negative
    rows: Tensor | None = None  # int64 [m], ascending: the rows of a shard; None for the whole set
    tags: Tensor | None = None  # bool [n, K]: every class of an image; None if not read, or unknown to the source

    def whole(self, device: torch.device) -> FeatureSet:
        """Returns the set with the features of all processes, exchanged through ``device``. Every process must call
        it."""
        if self.rows is None:
            return self
        order = torch.argsort(gather_rows(self.rows.to(device))).cpu()
        return replace(self, features=gather_rows(self.features.to(device)).cpu()[order], rows=None)

    def take(self, rows: Tensor) -> FeatureSet:
        """Returns the given rows of a whole set, int64 [m]."""
        tags = None if self.tags is None else self.tags[rows]
        return FeatureSet(features=self.features[rows], labels=self.labels[rows], tags=tags)


@dataclass(frozen=True)
class FeatureSets:
    """The features an evaluation may learn from (``bank``) and those it is evaluated on (``query``)."""

    bank: FeatureSet
    query: FeatureSet
    readouts: Mapping[str, FeatureSets] = field(default_factory=dict)  # the same samples, see `FeatureNeeds.readouts`

    @property
    def classes(self) -> int:
        """One more than the largest label of either set."""
        return int(max(self.bank.labels.max(), self.query.labels.max())) + 1

    def whole(self, device: torch.device) -> FeatureSets:
        """Returns the sets with the shards of the bank joined, see `FeatureSet.whole`."""
        readouts = {name: sets.whole(device) for name, sets in self.readouts.items()}
        return FeatureSets(self.bank.whole(device), self.query, readouts)

    def learning_from(self, rows: Tensor) -> FeatureSets:
        """Returns the sets with the given rows of the bank only, int64 [m]."""
        readouts = {name: sets.learning_from(rows) for name, sets in self.readouts.items()}
        return FeatureSets(self.bank.take(rows), self.query, readouts)


def embedding(features: Features) -> Tensor:
    """Returns the encoder's own embedding: [B, D]."""
    return features.embedding


def mean_of_patches(features: Features) -> Tensor:
    """Returns the mean over patches, whatever pooling the encoder has: [B, D]."""
    return features.patches.mean(dim=1)


def embedding_and_patches(features: Features) -> Tensor:
    """Concatenates the embedding and the mean over patches: [B, 2 D]."""
    return torch.cat([features.embedding, features.patches.mean(dim=1)], dim=1)


@dataclass(frozen=True)
class LastBlocks:
    """Concatenates the class tokens of the last blocks, as DINO probes its small ViTs: [B, blocks D]. An encoder
    without class tokens gives its embedding.

    Args:
        blocks: number of blocks; a backbone with fewer gives all of its blocks.

    Raises:
        SettingError: ``blocks`` is less than 1.
    """

    blocks: int = 4

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise SettingError(f"LastBlocks: blocks must be at least 1, got {self.blocks}")

    def __call__(self, features: Features) -> Tensor:
        if features.class_tokens is None:
            return features.embedding
        return features.class_tokens[:, -self.blocks :].flatten(1)


@contextmanager
def keep_class_tokens(encoders: Iterable[nn.Module], readouts: Iterable[FeatureReadout]) -> Iterator[None]:
    """Makes encoders return the class tokens of as many last blocks as the readouts need."""
    blocks = max((readout.blocks for readout in readouts if isinstance(readout, LastBlocks)), default=0)
    adapters = [encoder for encoder in encoders if isinstance(encoder, Encoder)]
    for encoder in adapters:
        encoder.last_blocks = blocks
    try:
        yield
    finally:
        for encoder in adapters:
            encoder.last_blocks = 0


@dataclass
class Rows:
    """The rows this process has read so far."""

    features: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    indices: list[Tensor] = field(default_factory=list)
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
    readout: FeatureReadout = embedding,
    precision: str = "32-true",
    storage: torch.dtype = torch.float32,
    shard: bool = False,
) -> dict[str, FeatureSet]:
    """Computes the features of every labelled image of ``loader`` by each of ``encoders``, in one pass over the data.

    Each process reads the share its loader gives it and all of them return all rows, in the order of the source, so the
    result does not depend on the number of processes. Features of several clips of a video are averaged. Stand-ins for
    unreadable samples and samples without a label are left out. Encoders run in evaluation mode, without gradients, and
    are left in the modes they were in.

    Args:
        encoders: by name, image [B, 3, H, W] or video [B, T, 3, H, W] -> `Features`, already on ``device``.
        readout: computes the stored vector from the `Features`: [B, D].
        precision: of the forward pass, as Lightning's Trainer names it.
        shard: leave each process the features it has read, instead of giving all of them to all.
        storage: type the features are kept in; float16 halves the memory of a large bank.

    Raises:
        NotApplicable: no sample has a label.
        BadFeatures: NaN or infinite features, naming the encoder and the sample.
    """
    sets = extract_readouts(
        encoders, loader, datamodule, device, readouts={"": readout}, precision=precision, storage=storage, shard=shard
    )
    return {name: by_readout[""] for name, by_readout in sets.items()}


def extract_readouts(
    encoders: Mapping[str, nn.Module],
    loader: Iterable[dict[str, Tensor]],
    datamodule: DataModule,
    device: torch.device,
    *,
    readouts: Mapping[str, FeatureReadout],
    tags: Tags | None = None,
    precision: str = "32-true",
    storage: torch.dtype = torch.float32,
    shard: bool = False,
) -> dict[str, dict[str, FeatureSet]]:
    """Computes several readouts of the same forward passes, otherwise as `extract`: by encoder, then by readout.

    Args:
        tags: returns all classes of samples from their positions in the source; None to read none.
    """
    rows = {name: {readout: Rows() for readout in readouts} for name in encoders}
    modules = list(encoders.values())
    with inference(nn.ModuleList(modules)), keep_class_tokens(modules, readouts.values()), autocast(precision, device):
        for loaded in loader:
            batch = labelled(loaded, datamodule.input_key)
            if len(batch["label"]) == 0:
                continue
            batch_tags = None if tags is None else tags(batch["index"])
            batch = datamodule.transfer_batch_to_device(batch, device, 0)
            batch = datamodule.on_after_batch_transfer(batch, 0)
            for name, encoder in encoders.items():
                features = encoder(batch[datamodule.input_key].to(weight_dtype(encoder)))
                for readout_name, readout in readouts.items():
                    mean, first = mean_of_samples(readout(features).float(), batch["index"])
                    of_sample = {key: batch[key][first] for key in ("label", "index")}
                    sample_tags = None if batch_tags is None else batch_tags[first.cpu()]
                    rows[name][readout_name].add(mean.to("cpu").to(storage), of_sample, sample_tags)
    return {
        name: {readout: gathered(name, read, device, storage, shard=shard) for readout, read in by_readout.items()}
        for name, by_readout in rows.items()
    }


def labelled(loaded: dict[str, Tensor], input_key: str) -> dict[str, Tensor]:
    """Returns the field ``input_key``, labels and indices of a batch, without stand-ins and samples that have no
    label."""
    if "label" not in loaded:
        raise NotApplicable("the data has no labels")
    keep = (loaded["label"] >= 0) & ~loaded["replaced"]
    fields = {name: loaded[name] for name in (input_key, "label", "index")}
    return fields if keep.all() else {name: value[keep] for name, value in fields.items()}


def weight_dtype(encoder: nn.Module) -> torch.dtype:
    """Returns the type of the encoder's weights, which is not float32 if the whole run uses another."""
    return next((p.dtype for p in encoder.parameters() if p.is_floating_point()), torch.float32)


def gathered(name: str, read: Rows, device: torch.device, storage: torch.dtype, *, shard: bool = False) -> FeatureSet:
    """Returns the rows of all processes, sorted by index; rows of one index stay in order.

    Args:
        name: of the encoder, for the error.
        read: the rows of this process.
        shard: keep the features where they were read, see `FeatureSet`.

    Raises:
        NotApplicable, BadFeatures: see `extract`.
    """
    # a process with fewer samples than the others may hold none, and then does not know the width of the features
    width = torch.tensor([read.features[0].shape[1] if read.features else 0], device=device)
    empty = torch.zeros(0, int(gather_rows(width).max()), dtype=storage)
    features = torch.cat([empty, *read.features])
    if not shard:
        features = gather_rows(features.to(device)).cpu()
    no_rows = torch.zeros(0, dtype=torch.int64)
    labels = gather_rows(torch.cat([no_rows, *read.labels]).to(device)).cpu()
    indices = gather_rows(torch.cat([no_rows, *read.indices]).to(device)).cpu()
    tags = _gathered_tags(read.tags, device)
    if len(labels) == 0:
        raise NotApplicable("no sample of the evaluation data has a label")
    # checked after gathering, so that all processes raise
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
    # rows were concatenated in the order of the processes: find where those of this process begin, and their sorted
    # place
    begin = int(gather_rows(torch.tensor([len(features)], device=device))[: rank()].sum())
    own = (order >= begin) & (order < begin + len(features))
    own_rows = own.nonzero().flatten()
    return FeatureSet(features=features[order[own] - begin], labels=labels[order], rows=own_rows, tags=tags)


def _gathered_tags(tags: list[Tensor], device: torch.device) -> Tensor | None:
    """Returns the tags of all processes, concatenated; None if no process has any."""
    width = int(gather_rows(torch.tensor([tags[0].shape[1] if tags else 0], device=device)).max())
    if width == 0:
        return None
    joined = torch.cat([torch.zeros(0, width, dtype=torch.bool), *tags])
    return gather_rows(joined.to(device, torch.uint8)).cpu().bool()


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Returns the context of a forward pass under a Trainer's ``precision``.

    Raises:
        SettingError: another precision.
    """
    if precision in _AUTOCAST:
        return torch.autocast(device.type, dtype=_AUTOCAST[precision])
    if str(precision) in _FULL:
        return nullcontext()
    raise SettingError(f"trainer.precision: '{precision}' is not one of {', '.join([*_AUTOCAST, *_FULL])}")
