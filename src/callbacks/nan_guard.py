"""Stops a run whose loss is no longer a number, before that reaches the weights."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from src.callbacks.checkpoints import Checkpoints, any_process


class NonFiniteLoss(RuntimeError):
    """The loss, or its gradient, is NaN or infinite; the message says where, and from where to go on."""


class NanGuard(L.Callback):
    """Looks at every loss before it is differentiated.

    The weights are then still those of the last good step, and no checkpoint is written after. On a GPU the look waits
    for the forward pass; backward and update are queued behind it as ever.

    With a gradient scaler (precision 16) infinite gradients are how it finds its scale, so that there only the loss
    counts.

    Args:
        gradient_steps: look at the norm of the gradients every so many optimizer steps too; None for never.
    """

    def __init__(self, gradient_steps: int | None = None) -> None:
        self.gradient_steps = gradient_steps

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        # the scaler has multiplied by a finite power of two in float32: the loss is finite if the product is
        if any_process(not bool(torch.isfinite(loss.detach()).all()), trainer):
            what = "not finite in another process" if loss.isfinite().all() else f"{loss.item():g}"
            raise NonFiniteLoss(self._message(trainer, f"the loss is {what}"))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not self.gradient_steps or trainer.global_step % self.gradient_steps:
            return
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if any_process(not bool(torch.isfinite(norm)), trainer):
            worst = [name for name, p in pl_module.named_parameters() if p.grad is not None and _is_bad(p.grad)]
            where = f" (first in {worst[0]})" if worst else ""
            raise NonFiniteLoss(self._message(trainer, f"the norm of the gradients is {norm.item():g}{where}"))

    def _message(self, trainer: L.Trainer, what: str) -> str:
        rates = sorted({float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups})
        rate = f"{rates[-1]:.3g}" if rates else "none"
        return (
            f"{what} at step {trainer.global_step + 1}, learning rate {rate}"
            f"{' (the largest of its groups)' if len(rates) > 1 else ''}. {_last_good(trainer)}"
        )


def _last_good(trainer: L.Trainer) -> str:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    saved = next((callback.saved for callback in callbacks if isinstance(callback, Checkpoints)), None)
    if saved is None:
        return "There is no checkpoint yet."
    return f"The last good checkpoint is {saved.path}, of step {saved.step}."


def _is_bad(gradient: Tensor) -> bool:
    return not bool(torch.isfinite(gradient).all())
