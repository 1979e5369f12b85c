"""The training loop one would write by hand, and pictures in memory to run it on."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from src.datamodules.image import IMAGENET_MEAN, IMAGENET_STD
from src.datamodules.sources.source import Sample, Split
from src.evaluation.features import autocast
from src.models.pretrain_module import PretrainModule
from src.schedules import Horizon, WarmupCosine


class MemorySource:
    """Random pictures in memory, ``distinct`` different ones under ``length`` indices: an epoch can be as long as a
    measurement needs.

    Args:
        split: without influence.
        size: side in pixels.
        classes: number of labels.
    """

    def __init__(self, split: Split, *, size: int, length: int, distinct: int = 512, classes: int = 10) -> None:
        draw = np.random.default_rng(0)
        distinct = min(distinct, length)
        self.pictures = draw.integers(0, 256, (distinct, 3, size, size), np.uint8)
        self.length = length
        self.classes = tuple(f"class {number}" for number in range(classes))
        self.images = _Repeated(self.pictures)
        self.labels = _Repeated(draw.integers(0, classes, distinct))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        return {"image": torch.from_numpy(self.images[[index]][0]), "label": int(self.labels[[index]][0])}

    def name(self, index: int) -> str:
        return f"memory/{index}"


class _Repeated:
    """Rows of an array by positions beyond its length."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def __getitem__(self, positions: list[int]) -> np.ndarray:
        return self.rows[np.asarray(positions) % len(self.rows)]


class BareLoop:
    """Nothing but the work: index, normalise, forward, backward, optimizer step with a scheduled learning rate.

    The model's own ``training_step`` is the forward pass, its own recipe the optimizer; there is no Trainer, callback
    or logger.

    Args:
        module: the method, on its device.
        pictures: uint8 [N, 3, H, W].
        batch_size: images a step.
        precision: as the Trainer calls it; may be set between two runs.
    """

    def __init__(self, module: PretrainModule, pictures: np.ndarray, *, batch_size: int, precision: str) -> None:
        self.module = module.train()
        self.device = next(module.parameters()).device
        self.precision = precision
        self.batch_size = batch_size
        self._pictures = torch.from_numpy(pictures)
        self._optimizer = module.configure_optimizers()
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "16-mixed")
        self._schedule = WarmupCosine(peak=module.optimizer_recipe.lr, warmup=100)
        self._horizon = Horizon(total_steps=100_000, steps_per_epoch=1000, batch_size=batch_size)
        self._step = 0
        self._mean = torch.tensor(IMAGENET_MEAN, device=self.device).view(3, 1, 1)
        self._std = torch.tensor(IMAGENET_STD, device=self.device).view(3, 1, 1)

    def run(self, steps: int) -> float:
        """Take so many steps; the seconds they took."""
        wait_for(self.device)
        begin = time.perf_counter()
        for _ in range(steps):
            self._take_step()
        wait_for(self.device)
        return time.perf_counter() - begin

    def _take_step(self) -> None:
        index = torch.randint(len(self._pictures), (self.batch_size,))
        image = self._pictures[index].to(self.device)
        batch = {
            "image": (image.to(torch.float32) / 255 - self._mean) / self._std,
            "label": torch.zeros_like(index).to(self.device),
            "index": index.to(self.device),
        }
        lr = self._schedule.value(self._step, self._horizon)
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_multiplier"]
        self._optimizer.zero_grad()
        self._scaler.scale(self._loss(batch)).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._step += 1

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        with autocast(self.precision, self.device):
            return self.module.training_step(batch, self._step)["loss"]


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
