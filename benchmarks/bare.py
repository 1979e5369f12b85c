"""The training loop one would write by hand, and images in memory to run it on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from src.datamodules.batches.image import MultiViewBatch
from src.datamodules.decoding import EncodedImage
from src.datamodules.image import IMAGENET_MEAN, IMAGENET_STD
from src.datamodules.sources.source import Sample, Split
from src.datamodules.views.image import to_tensor
from src.evaluation.features import autocast
from src.models.pretrain_module import PretrainModule
from src.schedules import Horizon, WarmupCosine

_NO_NUMBERS = np.zeros((0, 0), np.float32)


class MemorySource:
    """Random images in memory, ``distinct`` different ones under ``length`` indices: an epoch can be as long as a
    measurement needs. Each has a text of its own.

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

    def caption(self, index: int, choice: float) -> str:
        return self.captions(index)[0]

    def captions(self, index: int) -> Sequence[str]:
        return (f"noise of {len(self.pictures)} kinds, the one called number {index % len(self.pictures)}",)


class _Repeated:
    """Rows of an array by positions beyond its length."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def __getitem__(self, positions: list[int]) -> np.ndarray:
        return self.rows[np.asarray(positions) % len(self.rows)]


@dataclass(frozen=True)
class Copies:
    """A view that makes a `MultiViewBatch` of images as they are, for what would otherwise cost more than the step.

    Args:
        views: copies of an image.
        local_views: copies of its corner; 0 for none.
        local_size: side of that corner.
    """

    views: int
    local_views: int = 0
    local_size: int = 0

    batch_type: ClassVar[type] = MultiViewBatch
    draws: ClassVar[int] = 0

    def decoded(self, images: Tensor, uniform: np.ndarray) -> dict[str, Tensor]:
        batch = {"views": images.unsqueeze(1).repeat(1, self.views, 1, 1, 1)}
        if self.local_views:
            corner = images[..., : self.local_size, : self.local_size].unsqueeze(1)
            batch["local_views"] = corner.repeat(1, self.local_views, 1, 1, 1)
        return batch

    def encoded(self, image: EncodedImage, uniform: np.ndarray) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.decoded(to_tensor(image.decode())[None], uniform).items()}


class BareLoop:
    """Nothing but the work: index, normalize, forward, backward, optimizer step with a scheduled learning rate, and
    what the method needs besides: its teacher's moving average, its clipping.

    The model's own ``training_step`` is the forward pass, its own recipe the optimizer; there is no Trainer, callback
    or logger.

    Args:
        module: the method, on its device.
        images: uint8 [N, 3, H, W].
        batch_size: images a step.
        precision: as the Trainer calls it; may be set between two runs.
        copies: how a batch of several views is made of them; None for an `ImageBatch`.
        clip: length to which the gradient of each parameter is cut; None for no clipping.
        texts: token ids and mask [N, L] of the images; None where the method reads none.
    """

    def __init__(
        self,
        module: PretrainModule,
        pictures: np.ndarray,
        *,
        batch_size: int,
        precision: str,
        copies: Copies | None = None,
        clip: float | None = None,
        texts: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.module = module.train()
        self.device = next(module.parameters()).device
        self.precision = precision
        self.batch_size = batch_size
        self.copies = copies
        self.clip = clip
        self.texts = texts
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
        images = self._pictures[index]
        views = {"image": images} if self.copies is None else self.copies.decoded(images, _NO_NUMBERS)
        batch = {
            **{name: (value.to(self.device).float() / 255 - self._mean) / self._std for name, value in views.items()},
            "label": torch.zeros_like(index).to(self.device),
            "index": index.to(self.device),
        }
        if self.texts is not None:
            batch["text"], batch["text_mask"] = (each[index].to(self.device) for each in self.texts)
        lr = self._schedule.value(self._step, self._horizon)
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_multiplier"]
        self._optimizer.zero_grad()
        self._scaler.scale(self._loss(batch)).backward()
        if self.clip is not None:
            self._scaler.unscale_(self._optimizer)
            for parameter in self.module.parameters():
                if parameter.grad is not None:
                    clip_grad_norm_(parameter, self.clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        with torch.no_grad():
            for student, teacher, _ in self.module.teacher_pairs():
                torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 0.01)
        self._step += 1

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        with autocast(self.precision, self.device):
            return self.module.training_step(batch, self._step)["loss"]


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
