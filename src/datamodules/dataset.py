"""From a source and a view to batches: deterministic draws, replacement of bad samples, exact resume."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from src.datamodules.sources.source import BadSample, ImageSource, OrderedSource, Sample
from src.datamodules.views.view import View, stack
from src.errors import SettingError
from src.randomness import fold, uniform

log = logging.getLogger(__name__)

_REPLACEMENTS = 16


class SampleKey(NamedTuple):
    """One sample at one time: all its randomness follows from this and the run's seed."""

    epoch: int
    position: int  # in the subset, or the source


class ViewedDataset(Dataset[dict[str, Tensor]]):
    """Lists of draws to batches.

    A sample that cannot be read is logged with its name, noted in ``bad_log``, and replaced by another one of the same
    source, always the same one; the batch says so in ``replaced``.

    Args:
        source: where samples come from.
        view: what they become.
        seed: the run's.
        subset: positions of the source that count, in order; None for all.
        bad_log: file that collects what was replaced, one tab-separated line each (several processes may append).
    """

    def __init__(
        self,
        source: ImageSource,
        view: View,
        *,
        seed: int,
        subset: np.ndarray | None = None,
        bad_log: Path | None = None,
    ) -> None:
        self.source = source
        self.view = view
        self.seed = seed
        self.subset = subset
        self.bad_log = bad_log
        self._reported: set[int] = set()

    def __len__(self) -> int:
        return len(self.source) if self.subset is None else len(self.subset)

    def __getitem__(self, draws: list[SampleKey]) -> dict[str, Tensor]:
        positions = [draw.position if self.subset is None else int(self.subset[draw.position]) for draw in draws]
        epochs = [draw.epoch for draw in draws]
        numbers = uniform(self.seed, epochs, positions, self.view.draws)
        choices = uniform(fold(self.seed, 1), epochs, positions, 1)[:, 0]
        images = self.pictures()
        if images is not None:
            labels = list(self.source.labels[positions])  # type: ignore[attr-defined]
            fields = self.view.decoded(torch.from_numpy(np.asarray(images[positions])), numbers)
            used = positions
            besides = [self.beside(*each) for each in zip(positions, choices.tolist(), strict=True)]
        else:
            rows, labels, used, besides = self._rows(positions, numbers, choices)
            fields = self.stacked(rows) if isinstance(rows, list) else rows
        replaced = torch.tensor([mine != asked for mine, asked in zip(used, positions, strict=True)], dtype=torch.bool)
        return {
            **fields,
            **self.collate(besides, fields),
            "label": torch.as_tensor(labels, dtype=torch.int64),
            "index": torch.tensor(positions, dtype=torch.int64),
            "replaced": replaced,
        }

    def pictures(self) -> np.ndarray | None:
        """All images of the source, uint8 [N, 3, H, W], where it has them whole: they are then viewed at once."""
        return getattr(self.source, "images", None)

    def viewed(self, sample: Sample, numbers: np.ndarray) -> dict[str, Tensor] | None:
        """The sample's row of the batch; None where its image is decoded already and waits for the others.

        Raises:
            BadSample: it cannot be read.
        """
        image = sample["image"]
        return None if isinstance(image, Tensor) else self.view.encoded(image, numbers)

    def stacked(self, rows: list[dict[str, Tensor]]) -> dict[str, Any]:
        """The batch of the rows."""
        return stack(rows)

    def beside(self, position: int, choice: float) -> Any:
        """What a sample has besides its image.

        Args:
            position: in the source.
            choice: in [0, 1), for what there is more than one of.

        Raises:
            BadSample: it cannot be had.
        """
        return None

    def collate(self, besides: list[Any], fields: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of a batch, of what `beside` gave for each of its samples and what their views have made."""
        return {}

    def _rows(
        self, positions: list[int], numbers: np.ndarray, choices: np.ndarray
    ) -> tuple[Any, list[int], list[int], list[Any]]:
        samples: list[Sample] = []
        rows: list[dict[str, Tensor]] = []
        used, besides = [], []
        for position, row, choice in zip(positions, numbers, choices.tolist(), strict=True):
            sample, view, beside, candidate = self._usable(position, row, choice)
            samples.append(sample)
            besides.append(beside)
            used.append(candidate)
            if view is not None:
                rows.append(view)
        labels = [sample["label"] for sample in samples]
        if rows:
            return rows, labels, used, besides
        pictures = [sample["image"] for sample in samples]
        if len({picture.shape for picture in pictures}) == 1:  # type: ignore[union-attr]
            return self.view.decoded(torch.stack(pictures), numbers), labels, used, besides  # type: ignore[arg-type]
        single = [self.view.decoded(p[None], n[None]) for p, n in zip(pictures, numbers, strict=True)]  # type: ignore[index]
        return [{name: value[0] for name, value in fields.items()} for fields in single], labels, used, besides

    def _usable(
        self, position: int, numbers: np.ndarray, choice: float
    ) -> tuple[Sample, dict[str, Tensor] | None, Any, int]:
        """The sample at ``position`` or its stand-in, its view where the image had to be decoded for it, what it has
        besides, and its own position."""
        candidate = position
        for attempt in range(_REPLACEMENTS):
            try:
                beside = self.beside(candidate, choice)
                sample = self.source[candidate]
                return sample, self.viewed(sample, numbers), beside, candidate
            except BadSample as problem:
                self._report(candidate, problem)
                number = fold(self.seed, position, attempt)
                if isinstance(self.source, OrderedSource):
                    candidate = self.source.stand_in(position, number)
                else:
                    candidate = number % len(self.source)
        raise BadSample(f"{_REPLACEMENTS} samples in a row could not be read, the last {self.source.name(candidate)}")

    def _report(self, index: int, problem: BadSample) -> None:
        if index in self._reported:
            return
        self._reported.add(index)
        # a file's name may be in an encoding of its own, which neither a terminal nor a file of text would take
        name = self.source.name(index).encode("utf-8", "backslashreplace").decode()
        log.warning("replaced %s: %s", name, problem)
        if self.bad_log is not None:
            with self.bad_log.open("a", encoding="utf-8") as file:
                file.write(f"{name}\t{problem}\n")


class TrainSampler(Sampler[list[SampleKey]]):
    """Deals one permutation an epoch, the same for any number of processes and micro-batches.

    Optimizer step s of an epoch uses the s-th ``batch_size`` draws of the permutation; they are cut into
    ``micro_batches`` x ``world_size`` equal parts, of which this process takes one after the other its own. What does
    not fill a whole batch waits for another epoch's permutation.

    Args:
        order: what is dealt instead of a permutation, see `OrderedSource`.

    Raises:
        SettingError: the batch cannot be cut that way, or there is not one whole batch.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batches: int = 1,
        order: Callable[[int, np.random.Generator], np.ndarray] | None = None,
    ) -> None:
        if micro_batches < 1:
            raise SettingError(f"trainer.accumulate_grad_batches must be at least 1, got {micro_batches}")
        parts = world_size * micro_batches
        if batch_size < 1 or batch_size % parts:
            raise SettingError(
                f"data.batch_size={batch_size} is the batch of one optimizer step and must be a multiple of "
                f"{world_size} processes x {micro_batches} micro-batches = {parts}"
            )
        if length < batch_size:
            raise SettingError(f"data.batch_size={batch_size} is more than the {length} training samples there are")
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.micro_batches = micro_batches
        self.order = order
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.batch_size * self.micro_batches

    def __iter__(self) -> Iterator[list[SampleKey]]:
        generator = np.random.default_rng(fold(self.seed, self.epoch))
        order = generator.permutation(self.length) if self.order is None else self.order(self.length, generator)
        share = self.batch_size // (self.world_size * self.micro_batches)
        for micro_batch in range(self.start, len(self)):
            begin = (micro_batch * self.world_size + self.rank) * share
            yield [SampleKey(self.epoch, int(index)) for index in order[begin : begin + share]]


class EvalSampler(Sampler[list[SampleKey]]):
    """Every sample once, in order, dealt out over processes; the last batches may be short."""

    def __init__(self, length: int, *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, length, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for begin in range(0, len(self.indices), self.batch_size):
            yield [SampleKey(0, index) for index in self.indices[begin : begin + self.batch_size]]


class ResumableLoader(DataLoader[dict[str, Tensor]]):
    """A DataLoader that knows how far it is, so that a run taken up in the middle of an epoch goes on with the next
    batch. Lightning saves and restores the state."""

    def __init__(
        self, dataset: ViewedDataset, sampler: TrainSampler, *, num_workers: int = 0, pin_memory: bool = False
    ) -> None:
        super().__init__(
            dataset,
            sampler=sampler,
            batch_size=None,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            prefetch_factor=4 if num_workers > 0 else None,
        )
        self._epoch = 0
        self._served = 0
        self._resume: dict[str, int] | None = None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
        # a generator: Lightning asks for the iterator before it has told the sampler which epoch a resumed run is in
        sampler: TrainSampler = self.sampler  # type: ignore[assignment]
        # the state of a finished epoch names that epoch, and the one to come then starts at its beginning
        resumes = self._resume is not None and self._resume["epoch"] == sampler.epoch
        sampler.start = self._resume["batch"] if resumes and self._resume else 0
        self._resume = None
        self._epoch, self._served = sampler.epoch, sampler.start
        for batch in super().__iter__():
            self._served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "batch": self._served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._resume = dict(state)
