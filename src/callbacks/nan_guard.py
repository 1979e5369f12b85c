"""Stops a run whose loss is NaN or infinite before the weights are updated with it."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from src.callbacks.checkpoints import Checkpoints, last_good
from src.collectives import any_process


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient is NaN or infinite. The message names the step and the last good checkpoint."""


class NanGuard(L.Callback):
    """Raises `NonFiniteLoss` if a loss is NaN or infinite, before its backward pass.

    The weights are still those of the last good step, and no later checkpoint is written. On a GPU this waits for the
    forward pass of every step, not for the backward pass.

    Gradients are not checked with a gradient scaler (precision 16), because the scaler finds its scale by producing
    infinite gradients.

    Args:
        gradient_steps: optimizer steps between two checks of the gradient norm; None for no check, which saves reading
            all gradients.
    """

    def __init__(self, gradient_steps: int | None = None) -> None:
        self.gradient_steps = gradient_steps

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        # a gradient scaler has multiplied the loss by a finite power of two: both are finite or neither is
        if any_process(not bool(torch.isfinite(loss.detach()).all()), trainer.strategy.root_device):
            value = "not finite in another process" if loss.isfinite().all() else f"{loss.item():g}"
            raise NonFiniteLoss(self._message(trainer, f"the loss is {value}"))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not self.gradient_steps or trainer.global_step % self.gradient_steps:
            return
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if any_process(not bool(torch.isfinite(norm)), trainer.strategy.root_device):
            bad = [name for name, p in pl_module.named_parameters() if p.grad is not None and _is_bad(p.grad)]
            where = f" (first in {bad[0]})" if bad else ""
            raise NonFiniteLoss(self._message(trainer, f"the gradient norm is {norm.item():g}{where}"))

    def _message(self, trainer: L.Trainer, problem: str) -> str:
        rates = sorted({float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups})
        rate = f"{rates[-1]:.3g}" if rates else "none"
        return (
            f"{problem} at step {trainer.global_step + 1}, learning rate {rate}"
            f"{' (the largest of all parameter groups)' if len(rates) > 1 else ''}. {_last_good(trainer)}"
        )


def _last_good(trainer: L.Trainer) -> str:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return last_good(next((callback.saved for callback in callbacks if isinstance(callback, Checkpoints)), None))


def _is_bad(gradient: Tensor) -> bool:
    return not bool(torch.isfinite(gradient).all())
