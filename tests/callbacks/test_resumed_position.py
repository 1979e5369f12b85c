from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from src.callbacks.checkpoints import Checkpoints
from src.callbacks.resumed_position import ResumedPosition
from src.callbacks.schedules import Schedules
from src.checkpoint_io import CheckpointError
from src.randomness import fold
from src.schedules import Linear
from tests.callbacks.small_runs import SmallData, SmallModule, fit


class Scheduled(SmallModule):
    """Also records the value that a schedule gave each step."""

    rate = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.rates.append(self.rate)
        return super().training_step(batch, batch_idx)


class Stop(L.Callback):
    """Ends the run after a number of steps, without the end of an epoch."""

    class Reached(Exception):
        pass

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise self.Reached


def train(
    folder: Path, *, length: int = 48, batch: int, parts: int = 1, stop: int | None = None, **options: Any
) -> Any:
    module = Scheduled()
    callbacks = [Checkpoints(folder, every_steps=1, monitor=None), ResumedPosition()]
    callbacks.append(Schedules({"rate": Linear(0.0, 1.0)}, max_warmup=None))
    with contextlib.suppress(Stop.Reached):
        fit(
            folder,
            *callbacks,
            *([] if stop is None else [Stop(stop)]),
            module=module,
            data=SmallData(48, batch_size=batch),
            accumulate_grad_batches=parts,
            **{"max_epochs": 2, **options},
        )
    return module


def epoch(number: int) -> list[int]:
    """The order in which the samples of an epoch are served."""
    return np.random.default_rng(fold(3, number)).permutation(48).tolist()


def served(module: SmallModule) -> list[int]:
    return [index for indices in module.seen for index in indices]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((8, 1), (8, 2)),
        ((8, 4), (8, 1)),
        ((8, 1), (4, 1)),
        ((8, 2), (4, 4)),
        ((8, 1), (12, 3)),  # 24 of 48 samples are whole steps of 12
        ((8, 1), (16, 1)),  # and one and a half of 16: the last 8 of the epoch are left out
        ((8, 1), (48, 1)),  # nothing fits into the rest of the epoch
    ],
)
def test_every_sample_of_an_epoch_is_served_once_after_the_batches_changed(tmp_path, before, after):
    first = train(tmp_path, batch=before[0], parts=before[1], stop=3)
    resumed = train(tmp_path, batch=after[0], parts=after[1], resume=tmp_path / "last.ckpt")
    assert served(first) == epoch(0)[:24]
    rest = 24 // after[0] * after[0]
    assert served(resumed)[:rest] == epoch(0)[24 : 24 + rest]
    whole = 48 // after[0] * after[0]
    assert served(resumed)[rest:] == epoch(1)[:whole]
    assert len(resumed.seen) == (rest + whole) // after[0] * after[1]


def test_schedules_go_on_by_samples(tmp_path):
    """A straight line from 0 to 1 over 2 epochs of 48 samples: its value is the share of the 96 samples seen."""
    first = train(tmp_path, batch=8, stop=3)
    assert first.rates == pytest.approx([0 / 12, 1 / 12, 2 / 12])
    second = train(tmp_path, batch=4, parts=2, resume=tmp_path / "last.ckpt", stop=7)
    assert second.rates[::2] == pytest.approx([6 / 24, 7 / 24, 8 / 24, 9 / 24])  # 24 samples are 6 steps of 4
    third = train(tmp_path, batch=8, resume=tmp_path / "last.ckpt")
    assert third.rates == pytest.approx([step / 12 for step in range(5, 12)])  # 40 samples seen
    assert served(first) + served(second) + served(third) == epoch(0) + epoch(1)


def test_a_number_of_steps_counts_the_steps_taken(tmp_path):
    """3 steps of 8 and 5 of 4 are 8 steps; the schedule ends with them."""
    train(tmp_path, batch=8, stop=3)
    resumed = train(tmp_path, batch=4, resume=tmp_path / "last.ckpt", max_steps=8, max_epochs=100)
    assert resumed.rates == pytest.approx([step / 11 for step in range(6, 11)])
    assert resumed.trainer.global_step == 8


def test_a_resumed_run_with_the_same_batches_takes_the_same_steps(tmp_path):
    whole = train(tmp_path / "whole", batch=8, parts=2)
    first = train(tmp_path, batch=8, parts=2, stop=4)
    resumed = train(tmp_path, batch=8, parts=2, resume=tmp_path / "last.ckpt")
    assert first.losses + resumed.losses == whole.losses
    assert first.rates + resumed.rates == whole.rates


def test_between_two_epochs_nothing_is_left_of_the_first(tmp_path):
    train(tmp_path, batch=8, max_epochs=1)
    resumed = train(tmp_path, batch=16, resume=tmp_path / "last.ckpt")
    assert served(resumed) == epoch(1)
    assert resumed.rates == pytest.approx([3 / 6, 4 / 6, 5 / 6])


def test_a_checkpoint_without_the_number_of_samples_is_refused(tmp_path):
    train(tmp_path, batch=8, stop=3)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    saved["loops"]["fit_loop"]["state_dict"]["combined_loader"] = [{"epoch": 0, "batch": 3}]
    torch.save(saved, tmp_path / "old.ckpt")
    with pytest.raises(CheckpointError, match=r"does not say how many samples .* started from with CKPT="):
        train(tmp_path, batch=8, resume=tmp_path / "old.ckpt")


class PlainData(SmallData):
    """A DataModule with a loader of PyTorch's own."""

    def train_dataloader(self) -> Any:
        rows = [{"image": row, "index": index} for index, row in enumerate(self.rows.image)]
        return torch.utils.data.DataLoader(rows, batch_size=self.batch_size)


def test_a_loader_that_counts_no_samples_is_left_to_lightning(tmp_path):
    def callbacks() -> list[L.Callback]:
        return [Checkpoints(tmp_path, every_steps=1, monitor=None), ResumedPosition()]

    with pytest.raises(Stop.Reached):
        fit(tmp_path, *callbacks(), Stop(2), data=PlainData(), max_epochs=1)
    resumed = fit(tmp_path, *callbacks(), data=PlainData(), resume=tmp_path / "last.ckpt", max_epochs=1)
    assert resumed.global_step == 4
