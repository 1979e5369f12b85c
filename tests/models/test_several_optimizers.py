"""A method with two optimizers and two teachers: schedules and momenta of their own, resuming, several processes."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from src.callbacks.ema_teacher import EMATeacher
from src.callbacks.schedules import Schedules
from src.errors import SettingError
from src.models.backbones.encoder import Encoder
from src.models.pretrain_module import PretrainModule, StepOutput
from src.models.teacher import TeacherPair, teacher_of
from src.optim import OptimizerRecipe
from src.schedules import Constant, Cosine, Linear
from tests.callbacks.small_runs import SIZE, fit
from tests.distributed import in_two_processes


def recipes(**options: Any) -> dict[str, OptimizerRecipe]:
    sgd = partial(torch.optim.SGD, **options)
    return {name: OptimizerRecipe(sgd, lr=0.1, parameters=rf"^{name}\.") for name in ("generator", "discriminator")}


class Adversaries(PretrainModule):
    """A generator and a discriminator with an optimizer each, and two teachers of the generator."""

    def __init__(self, optimizer: dict[str, OptimizerRecipe], generator: nn.Module, discriminator: nn.Module) -> None:
        super().__init__(optimizer)
        self.generator = generator
        self.discriminator = discriminator
        self.fast, self.slow = teacher_of(generator), teacher_of(generator)
        self.fast_momentum = 0.5
        self.slow_momentum = 0.9

    def teacher_pairs(self) -> list[TeacherPair]:
        return [
            TeacherPair(self.generator, self.fast, "fast_momentum"),
            TeacherPair(self.generator, self.slow, "slow_momentum"),
        ]

    def encoders(self) -> dict[str, Encoder]:
        return {}

    def update(self, index: int, loss: Tensor) -> None:
        optimizer = self.optimizers()[index]
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Lines(Adversaries):
    """Two numbers, pushed down with the gradients 1 and 2."""

    def __init__(self) -> None:
        super().__init__(recipes(), nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
        for module in (self.generator, self.discriminator, self.fast, self.slow):
            nn.init.ones_(module.weight)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> StepOutput:
        self.update(1, 2 * self.discriminator.weight.sum())
        loss = self.generator.weight.sum()
        self.update(0, loss)
        return {"loss": loss}


class GAN(Adversaries):
    """Learns the rows of the data, with a pull towards both teachers."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(recipes(momentum=0.9), nn.Linear(SIZE, SIZE).double(), nn.Linear(SIZE, 1).double())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> StepOutput:
        real = batch["image"].double()
        with torch.no_grad():
            teachers = (self.fast(real) + self.slow(real)) / 2
        generated = self.generator(real.flip(1))
        judged = softplus(-self.discriminator(real)) + softplus(self.discriminator(generated.detach()))
        self.update(1, judged.mean())
        generator, _ = self.optimizers()
        self.toggle_optimizer(generator)
        loss = softplus(-self.discriminator(generated)).mean() + (generated - teachers).square().mean()
        self.update(0, loss)
        self.untoggle_optimizer(generator)
        return {"loss": loss}


def test_schedules_reach_each_optimizer_and_momenta_each_teacher_by_hand(tmp_path):
    method = Lines()
    schedules = Schedules(
        {
            "optimizers": {"generator": {"lr": Linear(0.4, 0.0, "4 steps")}, "discriminator": {"lr": Constant(0.25)}},
            "slow_momentum": Linear(1.0, 0.5, "4 steps"),
        }
    )
    trainer = fit(tmp_path, schedules, EMATeacher(), module=method, max_epochs=-1, max_steps=4)
    assert trainer.global_step == 4  # batches, not the steps of both optimizers
    generator, fast, slow = 1.0, 1.0, 1.0
    for lr, momentum in zip((0.4, 0.3, 0.2, 0.1), (1.0, 0.875, 0.75, 0.625), strict=True):
        generator -= lr
        fast = 0.5 * fast + 0.5 * generator
        slow = momentum * slow + (1 - momentum) * generator
    assert method.generator.weight.item() == pytest.approx(generator, abs=1e-6)
    assert method.discriminator.weight.item() == pytest.approx(1 - 4 * 0.25 * 2)
    assert method.fast.weight.item() == pytest.approx(fast)
    assert method.slow.weight.item() == pytest.approx(slow)


class SaveAt(L.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def train(folder: Path, *callbacks: L.Callback, **options: Any) -> dict[str, Tensor]:
    schedules = {
        "optimizers": {"generator": {"lr": Cosine(0.2, 0.0)}, "discriminator": {"lr": Linear(0.0, 0.1)}},
        "slow_momentum": Cosine(0.9, 1.0),
    }
    trainer = fit(folder, Schedules(schedules), EMATeacher(), *callbacks, module=GAN(), **options)
    assert trainer.global_step == 12
    return trainer.lightning_module.state_dict()


def test_a_resumed_run_ends_in_the_same_bits(tmp_path):
    middle = tmp_path / "middle.ckpt"
    whole = train(tmp_path, SaveAt(6, middle))
    resumed = train(tmp_path, resume=middle)
    saved = torch.load(middle, weights_only=True)["state_dict"]
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
        assert not torch.equal(value, saved[name]), name


class InTwo(L.Callback):
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        assert trainer.world_size == 2
        assert len(batch["image"]) == 2  # of the 4 rows of a step


def on_each(rank: int) -> dict[str, Tensor]:
    os.environ["LOCAL_RANK"] = str(rank)
    with tempfile.TemporaryDirectory() as folder:
        return train(Path(folder), InTwo(), devices=2, strategy="ddp_find_unused_parameters_true")


def test_two_processes_end_in_the_weights_of_one(tmp_path):
    whole = train(tmp_path)
    for part in in_two_processes(on_each):
        for name, value in whole.items():
            assert torch.allclose(part[name], value, rtol=0, atol=1e-12), name


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("optimizer.lr", r"schedules\.optimizer\.lr: Lines has the optimizers generator, discriminator; write"),
        ("optimizers.critic.lr", r"schedules\.optimizers\.critic\.lr: Lines has no optimizer 'critic'"),
        ("optimizers.generator.momentum", r"schedules\.optimizers\.<name>\.lr"),
    ],
)
def test_schedules_of_optimizers_that_do_not_exist_are_refused(tmp_path, path, message):
    with pytest.raises(SettingError, match=message):
        fit(tmp_path, Schedules({path: Constant(0.1)}), EMATeacher(), module=Lines())
