"""Changes to gradients between the backward pass and the update."""

from __future__ import annotations

import re
from collections.abc import Sequence

import lightning as L
import torch
from torch.nn.utils import clip_grad_norm_

from src.callbacks.resumed_position import schedule_step
from src.callbacks.schedules import horizon_of
from src.errors import SettingError


class ClipEachParameter(L.Callback):
    """Clips the gradient of every parameter on its own to the norm ``max_norm`` (DINO).

    Lightning's ``trainer.gradient_clip_val`` scales all gradients by one factor, so that one large tensor, such as the
    prototypes, would shrink the updates of all others.

    Raises:
        SettingError: ``max_norm`` is not positive.
    """

    def __init__(self, max_norm: float) -> None:
        if max_norm <= 0:
            raise SettingError(f"callbacks.gradient_clip.max_norm={max_norm} must be above 0")
        self.max_norm = max_norm

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            if parameter.grad is not None:
                clip_grad_norm_(parameter, self.max_norm)


class ClipEachPart(L.Callback):
    """Clips the gradient of each part of a model on its own to the norm ``max_norm`` (DINOv2: the backbone and each
    head).

    Args:
        max_norm: largest norm of the gradient of all parameters of a part together.
        parts: a pattern (``re.search``) of the parameters' names for each part.

    Raises:
        SettingError: ``max_norm`` is not positive; at start, a parameter that learns is in no part or in several.
    """

    def __init__(self, max_norm: float, parts: Sequence[str]) -> None:
        if max_norm <= 0:
            raise SettingError(f"callbacks.gradient_clip.max_norm={max_norm} must be above 0")
        self.max_norm = max_norm
        self.parts = list(parts)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, parameter in pl_module.named_parameters():
            matching = [part for part in self.parts if re.search(part, name)]
            if parameter.requires_grad and len(matching) != 1:
                raise SettingError(
                    f"callbacks.gradient_clip.parts: '{name}' must match one of the parts, not {matching}"
                )

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        named = [(name, p) for name, p in pl_module.named_parameters() if p.grad is not None]
        for part in self.parts:
            clip_grad_norm_([p for name, p in named if re.search(part, name)], self.max_norm)


class FreezeAtFirst(L.Callback):
    """Freezes parameters for the first part of a run: no update, no weight decay, no momentum.

    Their gradients are computed and dropped, so that nothing else changes when they begin to learn.

    Args:
        pattern: of the parameters' names (``re.search``).
        duration: such as "1 epoch", capped as a warm-up is (`Horizon.warmup_steps`).

    Raises:
        SettingError: at start, no parameter that learns matches.
    """

    def __init__(self, pattern: str, duration: int | float | str) -> None:
        self.pattern = pattern
        self.duration = duration

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._matching(pl_module):
            raise SettingError(f"callbacks.freeze.pattern: no parameter that learns matches '{self.pattern}'")

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if schedule_step(trainer) < horizon_of(trainer).warmup_steps(self.duration):
            for parameter in self._matching(pl_module):
                parameter.grad = None

    def _matching(self, pl_module: L.LightningModule) -> list[torch.nn.Parameter]:
        return [p for name, p in pl_module.named_parameters() if p.requires_grad and re.search(self.pattern, name)]
