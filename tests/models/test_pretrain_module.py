"""What every method gets from its base, and what the data's share of a batch does to it."""

from collections.abc import Sequence
from functools import partial

import lightning as L
import pytest
import timm
import torch
from torch import nn

from src.callbacks.schedules import Schedules, horizon_of
from src.datamodules.batches.image import ImageBatch
from src.datamodules.datamodule import DataModule
from src.datamodules.views.image import CenterCrop, RandomResizedCrop
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder
from src.models.pretrain_module import PretrainModule, StepOutput
from src.optim import OptimizerRecipe, Rule
from src.schedules import Linear, LinearWarmup
from tests.datamodules.test_dataset import Arrays


class Brightness(PretrainModule):
    """Regresses the mean of an image: as small as a method can be."""

    def __init__(self, optimizer: OptimizerRecipe) -> None:
        super().__init__(optimizer)
        self.backbone = timm.create_model("test_vit", img_size=16, patch_size=8, num_classes=0)
        self.linear = nn.Linear(3 * 8 * 8, 1)
        self.scale = 1.0

    def training_step(self, batch: ImageBatch, batch_idx: int) -> StepOutput:
        error = self.linear(batch["image"].flatten(1)).squeeze(1) - batch["image"].mean(dim=(1, 2, 3))
        return {"loss": error.pow(2).mean(), "logs": {"bias": error.detach().mean()}}

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": ImageEncoder(self.backbone)}


def fit(
    micro_batches: int, *callbacks: L.Callback, rules: Sequence[Rule] = ()
) -> tuple[Brightness, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    module = Brightness(OptimizerRecipe(partial(torch.optim.SGD, momentum=0.9), lr=0.1, rules=rules))
    data = DataModule(
        source=Arrays,
        train_view=RandomResizedCrop(size=8),
        eval_view=CenterCrop(size=8),
        batch_size=8,
        num_workers=0,
    )
    trainer = L.Trainer(
        max_epochs=2,
        accumulate_grad_batches=micro_batches,
        callbacks=list(callbacks),
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 6  # whatever the micro-batches
    return module, trainer.callback_metrics


def test_four_micro_batches_train_the_same_weights_as_one_batch():
    whole, _ = fit(1)
    parts, _ = fit(4)
    assert torch.allclose(whole.linear.weight, parts.linear.weight, atol=1e-6)
    assert torch.allclose(whole.linear.bias, parts.linear.bias, atol=1e-6)


def test_the_logged_loss_does_not_depend_on_the_number_of_micro_batches():
    class Own(L.Callback):
        """The loss as the method computed it, before Lightning divides it."""

        last = 0.0

        def on_before_backward(self, trainer, pl_module, loss) -> None:
            self.last = float(loss) * trainer.accumulate_grad_batches

    for micro_batches in (1, 4):
        own = Own()
        _, metrics = fit(micro_batches, own)
        assert metrics["loss/total"] == pytest.approx(own.last, rel=1e-6)
        assert "loss/bias" in metrics


def test_schedules_reach_groups_by_their_multiplier_and_attributes_by_their_path():
    seen = []

    class See(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            seen.append((trainer.optimizers[0].param_groups[0]["lr"], pl_module.scale))

    schedules = Schedules({"optimizer": {"lr": Linear(0.0, 0.3, "1 epoch")}, "scale": Linear(1.0, 4.0, "6 steps")})
    fit(1, schedules, See())
    assert [lr for lr, _ in seen] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.3, 0.3])
    assert [scale for _, scale in seen] == pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0, 3.5])


def test_a_constant_learning_rate_does_not_follow_the_schedule():
    lrs = []

    class See(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            lrs.append({name: g["lr"] for g in trainer.optimizers[0].param_groups for name in g["names"]})

    rule = Rule(r"^linear\.bias", constant_lr=True, lr_multiplier=2.0)
    fit(1, Schedules({"optimizer": {"lr": Linear(0.0, 0.3, "1 epoch")}}), See(), rules=[rule])
    assert [lr["linear.weight"] for lr in lrs] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.3, 0.3])
    assert [lr["linear.bias"] for lr in lrs] == [0.2] * 6


def test_the_cap_on_warmups_is_that_of_the_schedules():
    horizons = []

    class See(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            horizons.append(horizon_of(trainer))

    fit(1, Schedules({"scale": LinearWarmup(0.0, 1.0, "2 epochs")}), See())
    fit(1, See())
    assert [horizon.warmup_steps("2 epochs") for horizon in (horizons[0], horizons[-1])] == [0.2 * 6, 6]


def test_a_schedule_for_an_attribute_that_is_not_there_is_refused_by_its_path():
    with pytest.raises(ValueError, match=r"schedules.linear.temperature: Brightness has no attribute"):
        fit(1, Schedules({"linear": {"temperature": Linear(0.0, 1.0)}}))
