"""Tests that the final weights of a run are validated once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils.data import DataLoader

from src.callbacks.last_validation import LastValidation
from tests.callbacks.small_runs import SmallData, SmallModule, fit


class ValidatedData(SmallData):
    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows.image, batch_size=16)  # type: ignore[arg-type]


class ValidatedModule(SmallModule):
    def __init__(self) -> None:
        super().__init__()
        self.validated: list[tuple[int, float]] = []

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated.append((self.trainer.global_step, float(self.layer.weight.detach().sum())))


@pytest.mark.parametrize(
    ("options", "at"),
    [
        ({"max_epochs": 2}, [4, 8]),  # four steps an epoch
        ({"max_epochs": 3, "check_val_every_n_epoch": 2}, [8, 12]),
        ({"max_epochs": -1, "max_steps": 6}, [4, 6]),
        ({"max_epochs": -1, "max_steps": 8}, [4, 8]),  # once, at the end of both epoch and run
        ({"max_epochs": -1, "max_steps": 6, "accumulate_grad_batches": 2}, [4, 6]),
        ({"max_epochs": -1, "max_steps": 7, "check_val_every_n_epoch": 10}, [7]),
    ],
)
def test_validation_after_the_last_step_and_at_the_usual_epochs(
    tmp_path: Path, options: dict[str, Any], at: list[int]
) -> None:
    module = ValidatedModule()
    trainer = fit(tmp_path, LastValidation(), module=module, data=ValidatedData(), limit_val_batches=1.0, **options)
    assert [step for step, _ in module.validated] == at
    assert trainer.global_step == at[-1]
    assert module.validated[-1][1] == float(module.layer.weight.detach().sum())


def test_a_method_without_validation_trains(tmp_path: Path) -> None:
    with_it, without = SmallModule(), SmallModule()
    for module, callbacks in ((with_it, [LastValidation()]), (without, [])):
        assert fit(tmp_path, *callbacks, module=module, max_epochs=-1, max_steps=6).global_step == 6
    assert with_it.losses == without.losses
