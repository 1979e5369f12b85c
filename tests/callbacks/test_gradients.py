from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from src.callbacks.gradients import ClipEachParameter, FreezeAtFirst
from src.callbacks.schedules import Schedules
from src.errors import SettingError
from tests.callbacks.small_runs import SmallModule, fit


def test_each_parameter_is_clipped_on_its_own():
    module = torch.nn.Linear(2, 1)
    module.weight.grad, module.bias.grad = torch.tensor([[3.0, 4.0]]), torch.tensor([0.5])
    optimizer = torch.optim.SGD(module.parameters())
    ClipEachParameter(2.0).on_before_optimizer_step(None, module, optimizer)  # type: ignore[arg-type]
    assert module.weight.grad.flatten().tolist() == pytest.approx([1.2, 1.6], rel=1e-5)  # of length 5, now 2
    assert module.bias.grad.item() == 0.5  # a common factor would have been 2 / 5.02


class Watch(L.Callback):
    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *others: Any) -> None:
        self.weights.append(pl_module.layer.weight.detach().clone())


def test_parameters_frozen_at_first_learn_from_then_on(tmp_path: Path):
    watch, module = Watch(), SmallModule()
    begun = module.layer.weight.detach().clone()
    bias = module.layer.bias.detach().clone()
    # 16 rows in batches of 4; AdamW decays weights at every step in which it sees a gradient
    fit(tmp_path, FreezeAtFirst("weight", "1 epoch"), watch, module=module, max_epochs=2)
    assert all(torch.equal(each, begun) for each in watch.weights[:4])
    assert not torch.equal(watch.weights[4], begun)
    assert not torch.equal(module.layer.bias, bias)


def test_a_freeze_is_capped_as_warmups_are(tmp_path: Path):
    watch, module = Watch(), SmallModule()
    start = module.layer.weight.detach().clone()
    fit(
        tmp_path,
        Schedules({}, max_warmup="25%"),
        FreezeAtFirst("weight", "2 epochs"),
        watch,
        module=module,
        max_epochs=2,
    )
    assert torch.equal(watch.weights[1], start)
    assert not torch.equal(watch.weights[2], start)


def test_bad_values_are_refused(tmp_path: Path):
    with pytest.raises(SettingError, match=r"callbacks\.gradient_clip\.max_norm=0 must be above 0"):
        ClipEachParameter(0)
    with pytest.raises(SettingError, match=r"callbacks\.freeze\.pattern: no parameter that learns matches 'hed'"):
        fit(tmp_path, FreezeAtFirst("hed", 1))
