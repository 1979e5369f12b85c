"""A method, its encoders and its data as the subject of evaluations, which share whatever is computed of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Self, TypeVar, cast

import torch
from torch import nn
from torch.utils.data import DataLoader

from src.collectives import is_distributed
from src.datamodules.datamodule import DataModule, TaggedSource
from src.datamodules.sources.source import Source, Split
from src.errors import SettingError, UserError, nearest
from src.evaluation.errors import NotApplicable
from src.evaluation.features import FeatureNeeds, FeatureSets, Tags, embedding, extract_readouts
from src.randomness import seeded

BANK_SAMPLES = 25_000
QUERY_SAMPLES = 10_000

T = TypeVar("T")

_FIRST = ""  # stands for the first encoder, whatever its name


class Subject:
    """A method or encoders, and the data to evaluate them on. Whatever several evaluations need is computed once.

    Modules, their modes and all generators of random numbers on the CPU are left as they were.

    Args:
        datamodule: of the run, or of the other data to evaluate on.
        device: where everything is computed; the modules must be there.
        module: the method; None if only encoders are evaluated.
        encoders: by name, image or video -> `Features`; None for those of ``module``. The numbers of the first one have
            plain names, see `named`.
        precision: of forward passes, as Lightning's Trainer names it.
        split: of the images that are evaluated on, "val" or "test". Evaluations learn from the training split.
        bank_samples: number of training images to learn from at most, a fixed random choice; None for all.
        query_samples: number of images of ``split`` at most, a fixed random choice; None for all.
        logged: the last values that training logged, by name.
        needs: what features are read for at once; `run_evaluations` joins the needs of its evaluations.
    """

    def __init__(
        self,
        datamodule: DataModule | None,
        device: torch.device | None,
        *,
        module: nn.Module | None = None,
        encoders: Mapping[str, nn.Module] | None = None,
        precision: str = "32-true",
        split: Split = "val",
        bank_samples: int | None = BANK_SAMPLES,
        query_samples: int | None = QUERY_SAMPLES,
        logged: Mapping[str, float] | None = None,
        needs: FeatureNeeds = FeatureNeeds(),  # noqa: B008  frozen
    ) -> None:
        self.split = split
        self.bank_samples = bank_samples
        self.query_samples = query_samples
        self.logged = logged or {}
        self.needs = needs
        self._datamodule, self._module, self._encoders = datamodule, module, encoders
        self._device, self._precision = device, precision
        self._chosen: str | None = None
        self._features: tuple[FeatureNeeds, dict[str, FeatureSets]] | None = None
        self._results: dict[Hashable, Any] = {}

    @cached_property
    def device(self) -> torch.device:
        assert self._device is not None
        return self._device

    @cached_property
    def precision(self) -> str:
        return self._precision

    @cached_property
    def datamodule(self) -> DataModule:
        assert self._datamodule is not None
        return self._datamodule

    @cached_property
    def module(self) -> nn.Module:
        """The method.

        Raises:
            NotApplicable: only encoders are evaluated.
        """
        if self._module is None:
            raise NotApplicable("a method is needed, and there are only encoders")
        return self._module

    @cached_property
    def all_encoders(self) -> Mapping[str, nn.Module]:
        """Encoders by name, the one a user would take away first."""
        return self._encoders if self._encoders is not None else cast(Any, self.module).encoders()

    @property
    def encoders(self) -> Mapping[str, nn.Module]:
        """The encoders to evaluate: all of them, or the one chosen by `only`.

        Raises:
            UserError: there is no encoder of the chosen name.
        """
        encoders = self.all_encoders
        if self._chosen is None:
            return encoders
        if self._chosen == _FIRST:
            return dict(list(encoders.items())[:1])
        if self._chosen not in encoders:
            raise UserError(f"there is no encoder '{self._chosen}'{nearest(self._chosen, list(encoders))}")
        return {self._chosen: encoders[self._chosen]}

    @property
    def source_split(self) -> Split:
        """The split of the source that is evaluated on, which is not "val" if ``data.eval_split`` names another."""
        return self.datamodule.eval_split if self.split == "val" else self.split

    @property
    def source(self) -> Source:
        """The source of the images that are evaluated on."""
        return self.datamodule.source(self.source_split)

    def add_encoders(self, encoders: Mapping[str, nn.Module]) -> None:
        """Adds further encoders, such as those of baselines, before any features are read."""
        self.all_encoders = {**self.all_encoders, **encoders}

    def only(self, encoder: str | None = None) -> Self:
        """Returns this subject with one of its encoders, None for the first."""
        other = copy.copy(self)
        other._chosen = encoder or _FIRST
        return other

    def once(self, compute: Callable[[Self], T]) -> T:
        """Returns ``compute(self)``, which is computed by the first call only."""
        if compute not in self._results:
            self._results[compute] = compute(self)
        return self._results[compute]

    def features(self, needs: FeatureNeeds = FeatureNeeds()) -> dict[str, FeatureSets]:  # noqa: B008  frozen
        """Returns the features of bank and queries by each encoder, read in one pass for ``self.needs`` and ``needs``
        together.

        The bank is of the training split, the queries of ``split``. If ``needs`` accepts shards, the features of the
        bank stay in the process that has read them.

        Raises:
            NotApplicable: there are no labels.
            BadFeatures: features are NaN or infinite.
        """
        if self._features is None or not self._features[0].covers(needs) or self.encoders.keys() - self._features[1]:
            wanted = self.needs | needs
            self._features = wanted, self._read(wanted)
        sets = {name: self._features[1][name] for name in self.encoders}
        return sets if needs.accepts_shards else {name: shard.whole(self.device) for name, shard in sets.items()}

    @property
    def images_read(self) -> tuple[int, int] | None:
        """Number of images that features were read of, by this process: (to learn from, to evaluate on); None if no
        evaluation has asked for features."""
        if self._features is None:
            return None
        sets = next(iter(self._features[1].values()))
        return len(sets.bank.labels), len(sets.query.labels)

    def query_loader(self, samples: int | None = None) -> DataLoader[dict[str, torch.Tensor]]:
        """Returns a loader of the images of ``split``, at most ``samples`` of them.

        Raises:
            SettingError: ``split`` is the training split, or none.
        """
        if self.split not in ("val", "test"):
            raise SettingError(f"evaluate.split is val or test, which training does not see; not '{self.split}'")
        datamodule = self.datamodule
        return datamodule.test_dataloader(samples) if self.split == "test" else datamodule.val_dataloader(samples)

    def batches(self, samples: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """Yields the readable images of ``split`` in batches on ``device``, the share of this process: what the
        encoders read, ``label`` and ``index``.

        Args:
            samples: number of images at most, besides ``query_samples``; None for no further limit.
        """
        datamodule = self.datamodule
        limits = [limit for limit in (samples, self.query_samples) if limit is not None]
        for loaded in self.query_loader(min(limits, default=None)):
            batch = {
                name: loaded[name][~loaded["replaced"]]
                for name in (datamodule.input_key, "label", "index")
                if name in loaded
            }
            yield datamodule.on_after_batch_transfer(datamodule.transfer_batch_to_device(batch, self.device, 0), 0)

    def _read(self, needs: FeatureNeeds) -> dict[str, FeatureSets]:
        datamodule, encoders = self.datamodule, self.encoders
        readouts = {"": embedding, **needs.readouts}
        shards = needs.accepts_shards and is_distributed()
        loaders: list[tuple[DataLoader[dict[str, torch.Tensor]], Split, bool]] = [
            (self.query_loader(self.query_samples), self.source_split, False),
            (datamodule.bank_dataloader(self.bank_samples), "train", shards),
        ]
        # starting a loader draws a random number, which must not change training
        with seeded(0):
            query, bank = (
                extract_readouts(
                    encoders,
                    loader,
                    datamodule,
                    self.device,
                    readouts=readouts,
                    tags=self._tags(split) if needs.tags else None,
                    precision=self.precision,
                    shard=shard,
                )
                for loader, split, shard in loaders
            )

        def sets(name: str, readout: str) -> FeatureSets:
            return FeatureSets(bank=bank[name][readout], query=query[name][readout])

        return {
            name: replace(sets(name, ""), readouts={readout: sets(name, readout) for readout in readouts if readout})
            for name in encoders
        }

    def _tags(self, split: Split) -> Tags | None:
        # data without tags is refused by the evaluation that reads them, so that others can run
        return partial(self.datamodule.tags, split) if isinstance(self.datamodule.source(split), TaggedSource) else None


@contextmanager
def exact_products() -> Iterator[None]:
    """Computes products of float32 matrices in full precision, whatever precision training allows."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
