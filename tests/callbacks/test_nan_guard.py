from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from src.callbacks.checkpoints import Checkpoints, NonFiniteWeights, non_finite
from src.callbacks.nan_guard import NanGuard, NonFiniteLoss
from src.callbacks.stop_on_signal import StopOnSignal
from src.checkpoint_io import AtomicCheckpointIO, load_checkpoint
from tests.callbacks.small_runs import SmallModule, fit


class BreaksAt(SmallModule):
    """Multiplies the loss by ``value`` at one micro-batch."""

    def __init__(self, batch: int, value: float) -> None:
        super().__init__()
        self.batch = batch
        self.value = value

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        output = super().training_step(batch, batch_idx)
        return {"loss": output["loss"] * self.value} if len(self.seen) == self.batch + 1 else output


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nan_or_infinite_loss_stops_the_run_before_the_update(tmp_path: Path, value: float, accumulate: int) -> None:
    good, broken = SmallModule(), BreaksAt(7 * accumulate - 1, value)  # the last micro-batch of step 7
    fit(tmp_path / "good", module=good, max_epochs=-1, max_steps=6, accumulate_grad_batches=accumulate)
    checkpoints = Checkpoints(tmp_path, every_steps=1, every_minutes=None)
    with pytest.raises(NonFiniteLoss) as stop:
        fit(tmp_path, NanGuard(), checkpoints, module=broken, accumulate_grad_batches=accumulate)
    assert all(torch.equal(a, b) for a, b in zip(good.parameters(), broken.parameters(), strict=True))
    assert f"the loss is {value:g} at step 7, learning rate 0.05" in str(stop.value)
    assert f"The last good checkpoint is {checkpoints.last}, of step 6." in str(stop.value)
    saved = load_checkpoint(checkpoints.last)
    assert saved["global_step"] == 6
    assert torch.equal(saved["state_dict"]["layer.weight"], good.layer.weight)


def test_without_a_checkpoint_the_message_says_so(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss, match=r"at step 1, .*There is no checkpoint yet"):
        fit(tmp_path, NanGuard(), module=BreaksAt(0, float("nan")))


class Overflows(L.Callback):
    """Gives a weight a gradient that is NaN in one step, whose loss is finite; the guard looks at losses."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step == self.step - 1:
            pl_module.layer.bias.grad[1] = float("nan")  # type: ignore[union-attr,index]


@pytest.mark.parametrize("every_steps", [1, None])  # a save in that step, or at the end of its epoch
def test_weights_that_are_not_finite_replace_no_good_checkpoint(tmp_path: Path, every_steps: int | None) -> None:
    checkpoints = Checkpoints(tmp_path, every_steps=every_steps, every_minutes=None)
    with pytest.raises(NonFiniteWeights) as stop:
        fit(tmp_path, checkpoints, Overflows(8))
    last = 7 if every_steps else 4
    assert "weights are NaN or infinite after step 8 ('layer.bias' is the first)" in str(stop.value)
    assert f"The last good checkpoint is {checkpoints.last}, of step {last}." in str(stop.value)
    saved = load_checkpoint(checkpoints.last)
    assert saved["global_step"] == last
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_a_signal_does_not_save_weights_that_are_not_finite(tmp_path: Path) -> None:
    class Stop(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    checkpoints = Checkpoints(tmp_path, every_minutes=None)
    with pytest.raises(NonFiniteWeights, match=r"of step 4\."):
        fit(tmp_path, checkpoints, Overflows(6), Stop(), StopOnSignal())
    assert load_checkpoint(checkpoints.last)["global_step"] == 4


def test_buffers_may_be_infinite_and_not_nan() -> None:
    module = SmallModule()
    module.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    module.register_buffer("count", torch.tensor(3))
    assert non_finite(module) is None
    module.mask[0] = float("nan")
    assert non_finite(module) == "mask"
    module.layer.weight.data[2, 1] = float("inf")
    assert non_finite(module) == "layer.weight"


class SteepAt(SmallModule):
    """Has a finite loss with an infinite gradient, the square root at zero."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        output = super().training_step(batch, batch_idx)
        if len(self.seen) == 3:
            output["loss"] = output["loss"] + (self.layer.bias - self.layer.bias.detach()).abs().sum().sqrt()
        return output


def test_gradient_steps_checks_the_gradient_norm(tmp_path: Path) -> None:
    module = SteepAt()
    with pytest.raises(NonFiniteLoss, match=r"gradient norm is nan \(first in layer.bias\) at step 3"):
        fit(tmp_path, NanGuard(gradient_steps=2), module=module)  # steps 1, 3, 5 ...
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())


def test_infinite_gradients_of_a_gradient_scaler_are_ignored(tmp_path: Path) -> None:
    class Large(SmallModule):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
            return super().training_step({**batch, "image": batch["image"] * 1e3}, batch_idx)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100, growth_interval=1000)
    plugins = [MixedPrecision("16-mixed", device="cpu", scaler=scaler), AtomicCheckpointIO()]
    module = Large()
    trainer = fit(tmp_path, NanGuard(gradient_steps=1), module=module, plugins=plugins)
    assert trainer.global_step == 12
    assert scaler.get_scale() < 2.0**100  # there were infinite gradients
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())
    with pytest.raises(NonFiniteLoss, match="the loss is nan"):
        fit(tmp_path, NanGuard(), module=BreaksAt(2, float("nan")), plugins=plugins)
