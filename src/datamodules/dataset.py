"""Data loading: deterministic augmentation, replacement of unreadable samples, exact resume."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypedDict, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from src.datamodules.channels import VideoInChannels, to_channels
from src.datamodules.decoding import BadSample, EncodedImage
from src.datamodules.extras.extras import Extras
from src.datamodules.sources.source import Sample, Source
from src.datamodules.views.view import ImageView, View
from src.errors import SettingError, printable
from src.files import DistinctLines
from src.randomness import fold, uniform

if TYPE_CHECKING:
    from src.datamodules.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_REPLACEMENTS = 16
_PER_SAMPLE = ("label", "index", "replaced")


@runtime_checkable
class OrderedSource(Protocol):
    """A source that is expensive to read in any order but its own."""

    def order(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """Returns the positions of one epoch over the first ``count`` samples, int64 [count], drawn by ``generator``
        alone."""
        ...

    def replacement(self, index: int, number: int) -> int:
        """Returns a sample that is cheap to read after the one at ``index``, another one for each ``number``."""
        ...


class SampleKey(NamedTuple):
    """A sample in an epoch. With the seed it determines all randomness of the sample."""

    epoch: int
    position: int  # in the subset, or in the source if there is no subset


class ViewedDataset(Dataset[dict[str, Any]]):
    """Maps lists of sample keys to batches.

    An unreadable sample is logged by name, noted in ``bad_log``, and replaced by another sample of the source, always
    the same one; the batch marks it in ``replaced``. Several rows of one sample follow each other with its label and
    index.

    Args:
        source: the samples.
        view: makes rows of samples.
        seed: of augmentation and extras.
        extras: further fields of the batch, such as captions; None for none.
        tokenizer: of the extras' texts.
        subset: positions of the source that are used, in order; None for all.
        bad_log: file that lists replaced samples, one tab-separated line each, whatever the number of epochs, processes
            and resumed runs that meet them.
        channels: of the images and videos that the view reads.
        white: value of white in image files of 16 bits; None for 65535.

    Raises:
        SettingError: image files cannot be decoded to so many channels.
    """

    def __init__(
        self,
        source: Source,
        view: View,
        *,
        seed: int,
        extras: Extras | None = None,
        tokenizer: Tokenizer | None = None,
        subset: np.ndarray | None = None,
        bad_log: Path | None = None,
        channels: int = 3,
        white: int | None = None,
    ) -> None:
        self.source = source
        self.view = view
        self.seed = seed
        self.extras = extras
        self.tokenizer = tokenizer
        self.subset = subset
        self.bad_log = None if bad_log is None else DistinctLines(bad_log)
        self.channels = channels
        self.white = white
        self._reported: set[int] = set()

    def __len__(self) -> int:
        return len(self.source) if self.subset is None else len(self.subset)

    def __getitem__(self, keys: list[SampleKey]) -> dict[str, Any]:
        positions = [key.position if self.subset is None else int(self.subset[key.position]) for key in keys]
        epochs = [key.epoch for key in keys]
        numbers = uniform(self.seed, epochs, positions, self.view.num_uniforms)
        choices = uniform(fold(self.seed, 1), epochs, positions, 1)[:, 0].tolist()
        read = self._from_memory(positions, numbers, choices) or self._read_all(positions, numbers, choices)
        replaced = [position != read_at for position, read_at in zip(positions, read.positions, strict=True)]
        batch = {
            **read.fields,
            "index": torch.tensor(positions, dtype=torch.int64),
            "replaced": torch.tensor(replaced, dtype=torch.bool),
        }
        if read.labels is not None:
            batch["label"] = torch.tensor(read.labels, dtype=torch.int64)
        if self.extras is not None:
            batch |= self.extras.collate(read.extras, read.fields, self.tokenizer)
        if self.view.rows == 1:
            return batch
        return {
            name: value.repeat_interleave(self.view.rows) if name in _PER_SAMPLE else value.flatten(0, 1)
            for name, value in batch.items()
        }

    def _from_memory(self, positions: list[int], numbers: np.ndarray, choices: list[float]) -> _ReadBatch | None:
        """Makes all views at once if the source holds its images decoded; returns None otherwise."""
        images, labels = self.source.images, self.source.labels
        if images is None or not isinstance(self.view, ImageView):
            return None
        return _ReadBatch(
            fields=self.view.from_decoded(
                to_channels(torch.from_numpy(np.asarray(images[positions])), self.channels), numbers
            ),
            labels=None if labels is None else labels[positions].tolist(),
            positions=positions,
            extras=[self._extra(position, choice) for position, choice in zip(positions, choices, strict=True)],
        )

    def _read_all(self, positions: list[int], numbers: np.ndarray, choices: list[float]) -> _ReadBatch:
        """Reads samples one by one."""
        read = [self._usable(*drawn) for drawn in zip(positions, numbers, choices, strict=True)]
        samples = [one.sample for one in read]
        rows = [one.row for one in read if one.row is not None]
        return _ReadBatch(
            fields=self.view.collate(rows) if rows else self._of_decoded(samples, numbers),
            labels=[sample["label"] for sample in samples] if all("label" in sample for sample in samples) else None,
            positions=[one.position for one in read],
            extras=[one.extra for one in read],
        )

    def _of_decoded(self, samples: list[Sample], numbers: np.ndarray) -> dict[str, Any]:
        """Makes the views of decoded images, at once if they are of one size."""
        assert isinstance(self.view, ImageView)
        images: list[Tensor] = [sample["image"] for sample in samples]  # type: ignore[misc]
        if len({image.shape for image in images}) == 1:
            return self.view.from_decoded(torch.stack(images), numbers)
        return self.view.collate([self.view.from_sample(*drawn) for drawn in zip(samples, numbers, strict=True)])

    def _usable(self, position: int, numbers: np.ndarray, choice: float) -> _ReadSample:
        """Reads the sample at ``position``, or the first readable one of its replacements."""
        candidate = position
        for attempt in range(_REPLACEMENTS):
            try:
                extra = self._extra(candidate, choice)
                sample = self._in_channels(self.source[candidate])
                # a decoded image waits for the others, so that all are viewed at once
                waits = isinstance(sample["image"], Tensor) and isinstance(self.view, ImageView)
                row = None if waits else self.view.from_sample(sample, numbers)
                return _ReadSample(sample, row, extra, candidate)
            except BadSample as problem:
                self._report(candidate, problem)
                number = fold(self.seed, position, attempt)
                if isinstance(self.source, OrderedSource):
                    candidate = self.source.replacement(position, number)
                else:
                    candidate = number % len(self.source)
        raise BadSample(f"{_REPLACEMENTS} samples in a row could not be read, the last {self.source.name(candidate)}")

    def _in_channels(self, sample: Sample) -> Sample:
        image = sample["image"]
        if isinstance(image, EncodedImage):
            return {**sample, "image": image.as_channels(self.channels, self.white)}
        if isinstance(image, Tensor):
            return {**sample, "image": to_channels(image, self.channels)}
        return sample if self.channels == 3 else {**sample, "image": VideoInChannels(image, self.channels)}

    def _extra(self, position: int, choice: float) -> Any:
        return None if self.extras is None else self.extras.read(self.source, position, choice, self.seed)

    def _report(self, index: int, problem: BadSample) -> None:
        if index in self._reported:
            return
        self._reported.add(index)
        name, reason = printable(self.source.name(index)), printable(problem)
        log.warning("replaced %s: %s", name, reason)
        if self.bad_log is not None:
            try:
                self.bad_log.add(f"{name}\t{reason}".replace("\n", " "))
            except OSError as failure:  # such as a full disk, which must not end the run
                log.warning("could not note this in %s: %s", self.bad_log.path, failure.strerror or failure)


class _ReadSample(NamedTuple):
    sample: Sample
    row: dict[str, Tensor] | None  # None for a decoded image, whose view is made with the whole batch
    extra: Any
    position: int  # in the source, of the sample or of its replacement


class _ReadBatch(NamedTuple):
    fields: dict[str, Any]  # as made by the view
    labels: list[int] | None
    positions: list[int]
    extras: list[Any]


class TrainSampler(Sampler[list[SampleKey]]):
    """Deals one permutation an epoch to all processes and micro-batches.

    Optimizer step s of an epoch uses the s-th ``batch_size`` entries of the permutation. They are cut into
    ``micro_batches`` x ``world_size`` equal parts, and each process takes its part of one micro-batch after the other.
    Entries that do not fill a whole batch are left out in this epoch. An epoch that is resumed after ``start`` of its
    entries takes its further steps from the entries that follow, whatever the batch size was before.

    Args:
        length: number of samples.
        batch_size: samples of one optimizer step.
        seed: of the permutations.
        rank: of this process.
        world_size: number of processes.
        micro_batches: forward passes of one optimizer step.
        order: makes the order of an epoch instead of a permutation, see `OrderedSource`.

    Raises:
        SettingError: the batch cannot be cut into equal parts, or there are fewer samples than one batch has.
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
        self.start = 0  # entries of the epoch's permutation that all processes together have used

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return self.length // self.batch_size

    def steps_before(self, entries: int) -> int:
        """Steps of an epoch that are no longer to be taken after ``entries`` of its entries."""
        return self.steps - (self.length - entries) // self.batch_size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.micro_batches

    def __iter__(self) -> Iterator[list[SampleKey]]:
        generator = np.random.default_rng(fold(self.seed, self.epoch))
        order = generator.permutation(self.length) if self.order is None else self.order(self.length, generator)
        share = self.batch_size // (self.world_size * self.micro_batches)
        for micro_batch in range((self.steps - self.steps_before(self.start)) * self.micro_batches):
            begin = self.start + (micro_batch * self.world_size + self.rank) * share
            yield [SampleKey(self.epoch, int(index)) for index in order[begin : begin + share]]


class EvalSampler(Sampler[list[SampleKey]]):
    """Gives every sample once, in order, dealt out over processes; the last batches may be short."""

    def __init__(self, length: int, *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, length, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for begin in range(0, len(self.indices), self.batch_size):
            yield [SampleKey(0, index) for index in self.indices[begin : begin + self.batch_size]]


def ignore_stop_signals(worker: int) -> None:
    """Makes a loader's worker leave stop signals to the training process: a terminal, a service manager or a cluster
    sends them to all processes of a job, and a run cannot finish its step without its workers.

    SIGTERM from the training process itself still ends the worker: this is how Python ends it.
    """
    for name in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        if name in signal.Signals.__members__:  # Windows has fewer
            signal.signal(signal.Signals[name], signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # a handler is not told the sender, and macOS has no such call
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_when_told_by, args=(os.getppid(),), daemon=True).start()


def _exit_when_told_by(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


class LoaderPosition(TypedDict):
    """The position of a `ResumableLoader` in its epoch."""

    epoch: int
    samples: int  # of this epoch, served by all processes
    batch_size: int  # samples of one optimizer step
    micro_batches: int  # forward passes of one optimizer step


class ResumableLoader(DataLoader[dict[str, Any]]):
    """A DataLoader that counts the samples it has served, so that a run resumed within an epoch continues with the next
    sample. Lightning saves and restores the count.

    The count is one of samples over all processes, saved with the batch size and the micro-batches by which Lightning's
    own counters are to be read: `ResumedPosition` converts them where a run is resumed with others.
    """

    def __init__(
        self, dataset: ViewedDataset, sampler: TrainSampler, *, num_workers: int = 0, pin_memory: bool = False
    ) -> None:
        super().__init__(
            dataset,
            sampler=sampler,
            batch_size=None,
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=ignore_stop_signals,
            persistent_workers=num_workers > 0,
            prefetch_factor=4 if num_workers > 0 else None,
        )
        self._epoch = 0
        self._served = 0  # micro-batches of this process since `_start`
        self._start = 0
        self._resume: LoaderPosition | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        # a generator, because Lightning asks for the iterator before it sets the epoch of a resumed run
        sampler: TrainSampler = self.sampler  # type: ignore[assignment]
        # the state of a finished epoch names that epoch; the next one then starts at its beginning
        resumes = self._resume is not None and self._resume["epoch"] == sampler.epoch
        sampler.start = self._resume["samples"] if resumes and self._resume else 0
        self._resume = None
        self._epoch, self._start, self._served = sampler.epoch, sampler.start, 0
        for batch in super().__iter__():
            self._served += 1
            yield batch

    def state_dict(self) -> LoaderPosition:
        sampler: TrainSampler = self.sampler  # type: ignore[assignment]
        # a checkpoint is never saved between the micro-batches of a step
        samples = self._start + self._served // sampler.micro_batches * sampler.batch_size
        resume = self._resume  # not taken up yet where an epoch is resumed after its last step
        return {
            "epoch": self._epoch if resume is None else resume["epoch"],
            "samples": samples if resume is None else resume["samples"],
            "batch_size": sampler.batch_size,
            "micro_batches": sampler.micro_batches,
        }

    def load_state_dict(self, state: LoaderPosition) -> None:
        self._resume = state
