"""A hand-written training loop, and random images in memory to run it on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from src.datamodules.batches.image import MultiViewBatch
from src.datamodules.datamodule import IMAGENET_MEAN, IMAGENET_STD
from src.datamodules.decoding import EncodedImage
from src.datamodules.sources.source import Sample, Source, Split
from src.datamodules.views.image import to_tensor
from src.datamodules.views.view import ImageView
from src.evaluation.features import autocast
from src.models.pretrain_module import PretrainModule
from src.schedules import Horizon, WarmupCosine

_NO_NUMBERS = np.zeros((0, 0), np.float32)


class RandomImageSource(Source):
    """Random images in memory, each with a caption. They repeat, so an epoch can be as long as a measurement needs.

    Args:
        split: ignored.
        size: side in pixels.
        length: number of samples in an epoch.
        distinct: number of different images.
        classes: number of class labels.
    """

    def __init__(self, split: Split, *, size: int, length: int, distinct: int = 512, classes: int = 10) -> None:
        draw = np.random.default_rng(0)
        distinct = min(distinct, length)
        self.distinct_images = draw.integers(0, 256, (distinct, 3, size, size), np.uint8)
        self.length = length
        self.classes = tuple(f"class {number}" for number in range(classes))
        self.images: Any = _RepeatedRows(self.distinct_images)
        self.labels: Any = _RepeatedRows(draw.integers(0, classes, distinct))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        return {"image": torch.from_numpy(self.images[[index]][0]), "label": int(self.labels[[index]][0])}

    def name(self, index: int) -> str:
        return f"memory/{index}"

    def caption(self, index: int, choice: float) -> str:
        return self.captions(index)[0]

    def captions(self, index: int) -> Sequence[str]:
        return (
            f"noise of {len(self.distinct_images)} kinds, the one called number {index % len(self.distinct_images)}",
        )


class _RepeatedRows:
    """The rows of an array, repeated without end."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def __getitem__(self, positions: list[int]) -> np.ndarray:
        return self.rows[np.asarray(positions) % len(self.rows)]


@dataclass(frozen=True)
class RepeatViews(ImageView):
    """A view that repeats images without augmentation to a `MultiViewBatch`, because augmentation would dominate the
    measurement.

    Args:
        views: global views of an image.
        local_views: local views, all of its top left corner.
        local_size: side of that corner in pixels.
    """

    views: int
    local_views: int = 0
    local_size: int = 0

    batch_type: ClassVar[type] = MultiViewBatch
    num_uniforms: ClassVar[int] = 0

    def from_decoded(self, images: Tensor, uniform: np.ndarray) -> dict[str, Tensor]:
        batch = {"views": images.unsqueeze(1).repeat(1, self.views, 1, 1, 1)}
        if self.local_views:
            corner = images[..., : self.local_size, : self.local_size].unsqueeze(1)
            batch["local_views"] = corner.repeat(1, self.local_views, 1, 1, 1)
        return batch

    def from_encoded(self, image: EncodedImage, uniform: np.ndarray) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.from_decoded(to_tensor(image.decode())[None], uniform).items()}


class BareLoop:
    """A minimal loop: index, normalize, forward, backward, optimizer step with a scheduled learning rate, and the
    method's moving average of the teacher and gradient clipping.

    It calls the method's ``training_step`` and uses its optimizer, without Trainer, callbacks or loggers.

    Args:
        module: the method, on its device.
        images: uint8 [N, 3, H, W].
        batch_size: images per step.
        precision: Lightning's name for it; may be changed between two calls of `run`.
        repeat_views: makes a `MultiViewBatch` of the images; None for an `ImageBatch`.
        clip: largest gradient norm of each parameter; None for no clipping.
        texts: token ids and mask [N, L] of the images; None for methods without texts.
    """

    def __init__(
        self,
        module: PretrainModule,
        images: np.ndarray,
        *,
        batch_size: int,
        precision: str,
        repeat_views: RepeatViews | None = None,
        clip: float | None = None,
        texts: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.module = module.train()
        self.device = next(module.parameters()).device
        self.precision = precision
        self.batch_size = batch_size
        self.repeat_views = repeat_views
        self.clip = clip
        self.texts = texts
        self._images = torch.from_numpy(images)
        self._optimizer = module.configure_optimizers()
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "16-mixed")
        self._schedule = WarmupCosine(peak=module.optimizer_recipe.lr, warmup=100)
        self._horizon = Horizon(total_steps=100_000, steps_per_epoch=1000, batch_size=batch_size)
        self._step = 0
        self._mean = torch.tensor(IMAGENET_MEAN, device=self.device).view(3, 1, 1)
        self._std = torch.tensor(IMAGENET_STD, device=self.device).view(3, 1, 1)

    def run(self, steps: int) -> float:
        """Takes ``steps`` steps and returns the seconds they took."""
        synchronize(self.device)
        begin = time.perf_counter()
        for _ in range(steps):
            self._take_step()
        synchronize(self.device)
        return time.perf_counter() - begin

    def _take_step(self) -> None:
        index = torch.randint(len(self._images), (self.batch_size,))
        images = self._images[index]
        views = {"image": images} if self.repeat_views is None else self.repeat_views.from_decoded(images, _NO_NUMBERS)
        batch = {
            **{name: (value.to(self.device).float() / 255 - self._mean) / self._std for name, value in views.items()},
            "label": torch.zeros_like(index).to(self.device),
            "index": index.to(self.device),
        }
        if self.texts is not None:
            batch["text"], batch["text_mask"] = (values[index].to(self.device) for values in self.texts)
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


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
