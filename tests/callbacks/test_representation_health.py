from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from src.callbacks.ema_teacher import EMATeacher
from src.callbacks.representation_health import RepresentationHealth, effective_rank, feature_std
from src.errors import SettingError
from src.evaluation.features import extract
from src.models.joint_embedding.dino import DINO
from src.optim import OptimizerRecipe
from tests.evaluation.toy import random_rows, squares, tiny_encoder
from tests.models.joint_embedding import toy


class Steps:
    """The part of a trainer that the callback uses."""

    def __init__(self, *, micro_batches: int = 1) -> None:
        self.written: list[tuple[int, dict[str, float]]] = []
        logger = SimpleNamespace(log_metrics=lambda metrics, step: self.written.append((step, metrics)))
        self.trainer: Any = SimpleNamespace(
            global_step=0,
            accumulate_grad_batches=micro_batches,
            loggers=[logger],
            callback_metrics={},
            logged_metrics={},
        )

    def run(self, health: RepresentationHealth, embedding: Tensor, targets: Tensor | None = None) -> None:
        micro_batches = self.trainer.accumulate_grad_batches
        more = [{}] * micro_batches if targets is None else [{"targets": each} for each in targets.chunk(micro_batches)]
        for position, part in enumerate(embedding.chunk(micro_batches)):
            self.trainer.global_step += position == micro_batches - 1
            outputs = {"embedding": part, **more[position]}
            health.on_train_batch_end(self.trainer, None, outputs, {}, position)  # type: ignore[arg-type]


def test_effective_rank_of_known_singular_values() -> None:
    assert effective_rank(torch.eye(5) * 7) == pytest.approx(5)
    assert effective_rank(torch.ones(6, 4)) == pytest.approx(1, abs=1e-4)
    assert effective_rank(torch.zeros(6, 4)) == 0
    # shares 3/4 and 1/4: exp(-(0.75 ln 0.75 + 0.25 ln 0.25)) = 4 / 3^0.75
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(4 / 3**0.75)
    rotation = torch.linalg.qr(random_rows(6, 6, 0)).Q
    values = torch.tensor([8.0, 4, 2, 1, 1, 0])
    # shares 1/2, 1/4, 1/8, 1/16, 1/16: an entropy of 1.875 bits
    assert effective_rank(rotation @ torch.diag(values)) == pytest.approx(2**1.875, rel=1e-4)


def test_feature_std_of_known_directions() -> None:
    axes = torch.eye(4)
    assert feature_std(torch.cat([axes, -axes])) == pytest.approx(1)
    assert feature_std(torch.ones(6, 4)) == pytest.approx(0, abs=1e-6)
    # (1, 0) and (0, 1): each dimension deviates by 1/2 from its mean 1/2
    assert feature_std(torch.eye(2)) == pytest.approx(math.sqrt(2) / 2)
    rows = random_rows(50, 8, 0)
    assert feature_std(rows * torch.logspace(-3, 3, 50)[:, None]) == pytest.approx(feature_std(rows), rel=1e-5)
    assert feature_std(random_rows(5000, 16, 0)) == pytest.approx(1, abs=0.01)


def test_measures_the_latest_rows_of_the_window() -> None:
    health, steps = RepresentationHealth(every_n_steps=5, window=6), Steps()
    for step in range(1, 11):
        steps.run(health, torch.full((4, 3), float(step)))
    # 2 rows of step 4 and 4 of step 5; then of steps 9 and 10
    assert [step for step, _ in steps.written] == [4, 9]  # counted from zero, as Lightning does
    norms = [metrics["health/embedding_norm"] for _, metrics in steps.written]
    assert norms == pytest.approx([math.sqrt(3) * (2 * 4 + 4 * 5) / 6, math.sqrt(3) * (2 * 9 + 4 * 10) / 6])
    assert steps.trainer.callback_metrics["health/embedding_norm"].item() == pytest.approx(norms[1])


def test_small_batches_fill_the_window_over_several_measurements() -> None:
    health, steps = RepresentationHealth(every_n_steps=2, window=7), Steps()
    for step in range(1, 5):
        steps.run(health, torch.full((2, 1), float(step)))
    norms = [metrics["health/embedding_norm"] for _, metrics in steps.written]
    assert norms == pytest.approx([1.5, (1 + 2 * 2 + 2 * 3 + 2 * 4) / 7])


def test_micro_batches_of_a_step_are_measured_once() -> None:
    health, steps = RepresentationHealth(every_n_steps=2, window=8), Steps(micro_batches=2)
    for step in range(1, 7):
        steps.run(health, torch.full((8, 1), float(step)))
    assert [step for step, _ in steps.written] == [1, 3, 5]
    assert [metrics["health/embedding_norm"] for _, metrics in steps.written] == pytest.approx([2, 4, 6])


def test_a_collapse_is_warned_of_once_and_again_after_a_recovery(caplog: pytest.LogCaptureFixture) -> None:
    health, steps = RepresentationHealth(every_n_steps=1, window=16), Steps()
    alive, lost = random_rows(16, 8, 0), torch.ones(16, 8) + 1e-4 * random_rows(16, 8, 1)
    with caplog.at_level(logging.WARNING):
        for rows in (alive, lost, lost, alive, lost):
            steps.run(health, rows)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert messages[0].startswith("step 2: the representation has collapsed (feature std 0.0001, limit 0.01;")
    assert messages[1].startswith("step 5:")
    assert all("\n" not in message for message in messages)


def test_a_single_direction_with_both_signs_is_a_collapse(caplog: pytest.LogCaptureFixture) -> None:
    health, steps = RepresentationHealth(every_n_steps=1, window=16), Steps()
    line = torch.ones(16, 8) * torch.tensor([1.0, -1.0] * 8)[:, None]
    assert feature_std(line) == pytest.approx(1)
    steps.run(health, line)
    assert "effective rank 1.00 of 8, limit 1.1" in caplog.text


def test_a_random_encoder_is_not_called_collapsed(caplog: pytest.LogCaptureFixture) -> None:
    data = squares(length=48)
    bank = extract({"": tiny_encoder()}, data.val_dataloader(), data, torch.device("cpu"))[""]
    health, steps = RepresentationHealth(every_n_steps=1), Steps()
    steps.run(health, bank.features)
    assert len(steps.written) == 1
    assert caplog.text == ""


def test_a_resumed_run_measures_the_same(tmp_path: Path) -> None:
    straight, steps = RepresentationHealth(every_n_steps=6, window=40), Steps()
    before, other = RepresentationHealth(every_n_steps=6, window=40), Steps()
    for step in range(9):
        steps.run(straight, random_rows(8, 4, step))
        if step < 4:
            other.run(before, random_rows(8, 4, step))
    torch.save(before.state_dict(), tmp_path / "health.pt")
    after = RepresentationHealth(every_n_steps=6, window=40)
    after.load_state_dict(torch.load(tmp_path / "health.pt", weights_only=True))
    for step in range(4, 9):
        other.run(after, random_rows(8, 4, step))
    assert steps.written == other.written
    assert len(steps.written) == 1


def test_embeddings_that_are_not_finite_are_not_measured() -> None:
    health, steps = RepresentationHealth(every_n_steps=1), Steps()
    steps.run(health, torch.full((4, 3), torch.nan))
    assert steps.written == []


def test_values_are_logged_at_their_step(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    health, steps = RepresentationHealth(every_n_steps=2), Steps()
    steps.trainer.loggers = [logger]
    for step in range(4):
        steps.run(health, random_rows(8, 4, step))
    assert [(row["step"], "health/feature_std" in row) for row in logger.experiment.metrics] == [(1, True), (3, True)]


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"window": 1}])
def test_settings_that_are_too_small_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(SettingError, match=r"callbacks\.representation_health"):
        RepresentationHealth(**options)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_targets_by_hand(micro_batches: int) -> None:
    health, steps = RepresentationHealth(every_n_steps=1), Steps(micro_batches=micro_batches)
    targets = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0]])[:, None]
    steps.run(health, random_rows(2, 4, 0), targets)
    metrics = steps.written[-1][1]
    # entropies 0 and log 2; their mean is (3/4, 1/4), whose entropy is log(4 / 3^0.75)
    assert metrics["health/teacher_entropy"] == pytest.approx(math.log(2) / 2)
    assert metrics["health/effective_prototypes"] == pytest.approx(4 / 3**0.75)
    assert metrics["health/target_information"] == pytest.approx(math.log(4 / 3**0.75) - math.log(2) / 2)


# the last: a softmax of scores that differ by a tenth has 0.1^2 / 2 nats of information
@pytest.mark.parametrize(
    "lost", [torch.eye(8)[:1], torch.full((1, 8), 0.125), (0.1 * random_rows(16, 8, 2)).softmax(dim=1)]
)
def test_equal_targets_of_all_images_are_a_collapse(lost: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    health, steps = RepresentationHealth(every_n_steps=1, window=16), Steps()
    rows, alive = random_rows(16, 8, 0), (3 * random_rows(16, 8, 1)).softmax(dim=1)
    for targets in (alive, lost.expand(16, 8), lost.expand(16, 8), alive, lost.expand(16, 8)):
        steps.run(health, rows, targets)
    messages = [record.getMessage() for record in caplog.records]
    assert [message.split(":")[0] for message in messages] == ["step 2", "step 5"]
    assert "the teacher's targets have collapsed: all images have nearly the same target" in messages[0]


def test_a_resumed_run_measures_the_same_targets(tmp_path: Path) -> None:
    straight, steps = RepresentationHealth(every_n_steps=4, window=40), Steps()
    before, other = RepresentationHealth(every_n_steps=4, window=40), Steps()
    draws = [(random_rows(8, 4, step), random_rows(8, 5, step).softmax(dim=1)) for step in range(4)]
    for step, (rows, targets) in enumerate(draws):
        steps.run(straight, rows, targets)
        if step == 2:
            torch.save(before.state_dict(), tmp_path / "health.pt")
            before = RepresentationHealth(every_n_steps=4, window=40)
            before.load_state_dict(torch.load(tmp_path / "health.pt", weights_only=True))
        other.run(before, rows, targets)
    assert steps.written == other.written
    assert "health/target_information" in steps.written[-1][1]


class Colors(L.LightningDataModule):
    """Two noisy views of images of one of eight colors."""

    batch_size = 32

    def train_dataloader(self) -> Any:
        draw = torch.Generator().manual_seed(0)
        batches = []
        for step in range(60):
            color = torch.randint(2, (32, 1, 3, 1, 1), generator=draw) * 2.0 - 1
            views = color + 0.3 * torch.randn(32, 2, 3, toy.SIDE, toy.SIDE, generator=draw)
            batches.append({"views": views, "step": torch.tensor(step)})
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def train_dino(folder: Path, *, center_momentum: float, lr: float, teacher_momentum: float) -> dict[str, Tensor]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    recipe = OptimizerRecipe(torch.optim.AdamW, lr=lr)
    small: dict[str, Any] = {"prototypes": 32, "hidden_dim": 32, "bottleneck_dim": 32}
    momenta = {"teacher_momentum": teacher_momentum, "center_momentum": center_momentum}
    method = DINO(toy.vit(), recipe, **momenta, **small)
    health = RepresentationHealth(every_n_steps=10, window=64)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        callbacks=[EMATeacher(), health],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=folder,
    )
    trainer.fit(method, datamodule=Colors())
    return dict(trainer.callback_metrics)


def test_dino_without_centering_collapses_to_one_prototype(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics = train_dino(tmp_path, center_momentum=1.0, lr=1e-3, teacher_momentum=0.95)
    assert "the teacher's targets have collapsed" in caplog.text
    assert metrics["health/effective_prototypes"] < 1.001
    assert metrics["health/teacher_entropy"] < 0.001


def test_dino_with_too_high_a_learning_rate_collapses_to_uniform_targets(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Centering does not prevent uniform targets."""
    metrics = train_dino(tmp_path, center_momentum=0.9, lr=1e-2, teacher_momentum=0.99)
    assert "the teacher's targets have collapsed" in caplog.text
    assert metrics["health/effective_prototypes"] > 16
    assert metrics["health/target_information"] < 0.001


def test_dino_that_learns_gives_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics = train_dino(tmp_path, center_momentum=0.9, lr=3e-4, teacher_momentum=0.98)
    assert "collapsed" not in caplog.text
    assert metrics["health/effective_prototypes"] > 16
    assert metrics["health/target_information"] > 0.2
