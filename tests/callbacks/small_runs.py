"""Training runs of some milliseconds, for tests of callbacks and checkpoints."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from src.callbacks.step_seed import StepSeed
from src.checkpoint_io import AtomicCheckpointIO
from src.datamodules.dataset import ResumableLoader, SampleKey, TrainSampler

SIZE = 4


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random rows that are read by lists of `SampleKey`, as the real dataset reads images."""

    def __init__(self, length: int, bad: Sequence[int] = ()) -> None:
        self.image = torch.randn(length, SIZE, generator=torch.Generator().manual_seed(0))
        self.bad = torch.tensor(sorted(bad), dtype=torch.long)

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, draws: list[SampleKey]) -> dict[str, Tensor]:
        index = torch.tensor([draw.position for draw in draws])
        return {"image": self.image[index], "index": index, "replaced": torch.isin(index, self.bad)}


class SmallData(L.LightningDataModule):
    """``length`` rows, sampled as by the real DataModule, in micro-batches for gradient accumulation."""

    def __init__(self, length: int = 16, batch_size: int = 4, num_workers: int = 0, bad: Sequence[int] = ()) -> None:
        super().__init__()
        self.rows = Rows(length, bad)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.max_bad_share = 1.0
        self.bad_log: Path | None = None

    def train_dataloader(self) -> ResumableLoader:
        assert self.trainer is not None
        sampler = TrainSampler(
            len(self.rows),
            batch_size=self.batch_size,
            seed=3,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            micro_batches=self.trainer.accumulate_grad_batches,
        )
        return ResumableLoader(self.rows, sampler, num_workers=self.num_workers)  # type: ignore[arg-type]


class SmallModule(L.LightningModule):
    """A denoiser with dropout and momentum: every step depends on all before it, on order and on random numbers."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.layer = nn.Linear(SIZE, SIZE)
        self.layer.weight.data = torch.randn(SIZE, SIZE, generator=generator) / 2
        self.layer.bias.data.zero_()
        self.dropout = nn.Dropout(0.3)
        self.seen: list[tuple[int, ...]] = []
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        self.seen.append(tuple(batch["index"].tolist()))
        noise = torch.randn_like(batch["image"])
        loss = (self.layer(self.dropout(batch["image"] + 0.1 * noise)) - batch["image"]).square().mean()
        self.losses.append(loss.item())
        return {"loss": loss}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("loss/total", outputs["loss"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


class Evaluation(L.Callback):
    """Logs a number that depends on the weights when an epoch ends, as online evaluations do."""

    def __init__(self, name: str = "eval/knn_top1") -> None:
        self.name = name
        self.values: list[float] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.values.append(float(pl_module.layer.weight.detach().double().sum()))  # type: ignore[union-attr,operator]
        pl_module.log(self.name, self.values[-1])


def fit(
    folder: Path,
    *callbacks: L.Callback,
    module: L.LightningModule | None = None,
    data: L.LightningDataModule | None = None,
    loggers: Sequence[Any] = (),
    resume: Path | None = None,
    **options: Any,
) -> L.Trainer:
    """Train a small module (as ``trainer.lightning_module`` afterwards) with ``callbacks``."""
    torch.set_num_threads(1)
    trainer = L.Trainer(
        **{
            "max_epochs": 3,
            "accelerator": "cpu",
            "devices": 1,
            "logger": list(loggers),
            "callbacks": [StepSeed(5), *callbacks],
            "plugins": [AtomicCheckpointIO()],
            "enable_checkpointing": any(isinstance(callback, L.pytorch.callbacks.Checkpoint) for callback in callbacks),
            "enable_model_summary": False,
            "enable_progress_bar": any(isinstance(callback, L.pytorch.callbacks.ProgressBar) for callback in callbacks),
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "use_distributed_sampler": False,
            "default_root_dir": folder,
            **options,
        }
    )
    trainer.fit(module or SmallModule(), datamodule=data or SmallData(), ckpt_path=resume, weights_only=True)
    return trainer


def in_child(work: Callable[[], None]) -> int:
    """Starts ``work`` in a fork, which needs no imports, and returns its process id."""
    child = os.fork()
    if child == 0:
        code = 70
        # the tests themselves may run in the background, where shells ignore these
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            work()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def end_of(child: int) -> int:
    """The exit code of a process, or minus the number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fails_with(number: int, after: int = 0) -> Any:
    """A replacement for a system call that succeeds ``after`` times and then fails with ``number``."""
    calls = iter(range(1_000_000))

    def call(*args: Any) -> None:
        if next(calls) >= after:
            raise OSError(number, os.strerror(number))

    return call
