from __future__ import annotations

import copy
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.callbacks.online_evaluation import OnlineEvaluation
from src.callbacks.online_probe import OnlineProbe
from src.callbacks.representation_health import RepresentationHealth
from src.evaluation.features import FeatureSet, FeatureSets
from src.evaluation.knn import KNN
from tests.evaluation.toy import Toy, random_rows, squares

CPU = torch.device("cpu")


class Steps:
    """A trainer and a module as far as the probe sees them."""

    def __init__(self, *, classes: int = 3) -> None:
        self.trainer: Any = SimpleNamespace(global_step=0, datamodule=SimpleNamespace(classes=list(range(classes))))
        self.logged: dict[str, float] = {}
        self.module: Any = SimpleNamespace(
            device=CPU, log=lambda name, value, **_: self.logged.update({name: float(value)})
        )

    def run(self, probe: OnlineProbe, embedding: Tensor, label: Tensor, *, micro_batches: int = 1) -> None:
        parts = zip(embedding.chunk(micro_batches), label.chunk(micro_batches), strict=True)
        for position, (rows, labels) in enumerate(parts):
            self.trainer.global_step += position == micro_batches - 1
            probe.on_train_batch_end(self.trainer, self.module, {"embedding": rows}, {"label": labels}, position)


def batches(count: int, rows: int = 12) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(random_rows(rows, 5, seed), torch.randint(-1, 3, (rows,), generator=generator)) for seed in range(count)]


def test_learns_as_autograd_would() -> None:
    probe, steps = OnlineProbe(lr=0.01, weight_decay=0.1), Steps()
    steps.run(probe, *batches(1)[0])
    state = copy.deepcopy(probe.state_dict())
    norm, linear = nn.BatchNorm1d(5, affine=False, eps=1e-6), nn.Linear(5, 3)
    # the state before the first step is not visible: from the first on both must walk together
    norm.load_state_dict(state["norm"])
    linear.load_state_dict(state["linear"])
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.01, weight_decay=0.1)
    optimizer.load_state_dict(state["optimizer"])
    for embedding, label in batches(6)[1:]:
        steps.run(probe, embedding, label)
        keep = label >= 0
        loss = F.cross_entropy(linear(norm(embedding[keep])), label[keep])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(probe.state_dict()["linear"], linear.state_dict())
    torch.testing.assert_close(probe.state_dict()["norm"], norm.state_dict())


def test_one_batch_and_its_micro_batches_agree() -> None:
    whole, parts = OnlineProbe(lr=0.01), OnlineProbe(lr=0.01)
    one, other = Steps(), Steps()
    for embedding, label in batches(5):
        one.run(whole, embedding, label)
        other.run(parts, embedding, label, micro_batches=4)
    torch.testing.assert_close(whole.state_dict(), parts.state_dict(), rtol=0, atol=0)


def test_rows_without_a_label_teach_nothing() -> None:
    with_them, without = OnlineProbe(), OnlineProbe()
    one, other = Steps(), Steps()
    for embedding, label in batches(5):
        one.run(with_them, embedding, label)
        other.run(without, embedding[label >= 0], label[label >= 0])
        one.run(with_them, embedding[:4] * 100, torch.full((4,), -1))
    torch.testing.assert_close(with_them.state_dict(), without.state_dict(), rtol=0, atol=0)


def test_training_accuracy_is_of_rows_not_yet_learned_from() -> None:
    probe, steps = OnlineProbe(), Steps()
    right = seen = 0
    for embedding, label in batches(7):
        keep = label >= 0
        if probe._probe is not None:
            norm = F.batch_norm(embedding[keep], None, None, training=True, eps=1e-6)
            right += int((probe._probe.linear(norm).argmax(dim=1) == label[keep]).sum())
            seen += int(keep.sum())
        steps.run(probe, embedding, label)
        if seen == 0:
            probe.on_train_epoch_end(steps.trainer, steps.module)  # the first batch counts to another epoch
    probe.on_train_epoch_end(steps.trainer, steps.module)
    assert steps.logged == {"eval/probe_train_top1": pytest.approx(right / seen)}


def test_learns_what_can_be_learned_and_is_judged_with_running_statistics() -> None:
    probe, steps = OnlineProbe(lr=0.01), Steps()
    directions = random_rows(3, 5, 0) * 3 + 7

    def draw(rows: int, seed: int) -> tuple[Tensor, Tensor]:
        label = torch.arange(rows) % 3
        return directions[label] + random_rows(rows, 5, seed), label

    for seed in range(150):
        steps.run(probe, *draw(30, seed + 1))
    bank = FeatureSet(*draw(3, 1000))
    scores = probe.score(FeatureSets(bank, FeatureSet(*draw(300, 1001))), CPU)
    assert scores["probe_top1"] > 0.95
    one_by_one = [
        probe.score(FeatureSets(bank, FeatureSet(x[None], y[None])), CPU) for x, y in zip(*draw(30, 1002), strict=True)
    ]
    together = probe.score(FeatureSets(bank, FeatureSet(*draw(30, 1002))), CPU)
    assert sum(each["probe_top1"] for each in one_by_one) / 30 == pytest.approx(together["probe_top1"])


def test_starts_from_its_own_seed() -> None:
    states = []
    for seed, luck in ((0, 1), (0, 2), (5, 1)):
        torch.manual_seed(luck)
        before = torch.get_rng_state()
        probe = OnlineProbe(seed=seed)
        Steps().run(probe, *batches(1)[0])
        assert torch.equal(torch.get_rng_state(), before)
        states.append(probe.state_dict()["linear"]["weight"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


class SaveAt(L.Callback):
    """Saves once, after everyone else has seen the step."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(resume: Path | None = None, save: Path | None = None) -> tuple[L.Trainer, OnlineProbe]:
    """Three epochs of three steps."""
    probe = OnlineProbe(lr=0.01)
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        callbacks=[
            OnlineEvaluation({"knn": KNN(k=3)}, every_n_epochs=1),
            probe,
            RepresentationHealth(every_n_steps=4, window=100),
            *([SaveAt(5, save)] if save else []),
        ],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(Toy(dropout=0.0), datamodule=squares(), ckpt_path=resume, weights_only=True)
    return trainer, probe


def test_a_run_resumed_within_an_epoch_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    whole, learned = fit(save=tmp_path / "middle.ckpt")
    resumed, continued = fit(resume=tmp_path / "middle.ckpt")
    assert resumed.global_step == 9
    torch.testing.assert_close(continued.state_dict(), learned.state_dict(), rtol=0, atol=0)
    metrics = [
        {name: value for name, value in trainer.callback_metrics.items() if name != "eval/seconds"}
        for trainer in (whole, resumed)
    ]
    assert {"eval/probe_top1", "eval/probe_train_top1", "eval/knn_top1", "health/effective_rank"} <= set(metrics[0])
    assert metrics[0] == metrics[1]


def test_a_checkpoint_in_the_middle_of_an_epoch_knows_its_accuracy_so_far(tmp_path: Path) -> None:
    data = batches(6)
    straight, steps = OnlineProbe(), Steps()
    for embedding, label in data:
        steps.run(straight, embedding, label)
    before, other = OnlineProbe(), Steps()
    for embedding, label in data[:4]:
        other.run(before, embedding, label)
    torch.save(before.state_dict(), tmp_path / "probe.pt")
    after = OnlineProbe()
    after.load_state_dict(torch.load(tmp_path / "probe.pt", weights_only=True))
    torch.testing.assert_close(after.state_dict(), before.state_dict(), rtol=0, atol=0)  # also before its next step
    after.on_train_start(other.trainer, other.module)
    for embedding, label in data[4:]:
        other.run(after, embedding, label)
    for probe, seen_by in ((straight, steps), (after, other)):
        probe.on_train_epoch_end(seen_by.trainer, seen_by.module)
    assert steps.logged == other.logged
    torch.testing.assert_close(after.state_dict(), straight.state_dict(), rtol=0, atol=0)


def test_a_run_resumed_after_the_last_step_of_an_epoch_has_its_accuracy(tmp_path: Path) -> None:
    """A signal in that step puts off the end of the epoch, and no batch comes before it."""
    before, steps = OnlineProbe(), Steps()
    for embedding, label in batches(4):
        steps.run(before, embedding, label)
    after, resumed = OnlineProbe(), Steps()
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    after.on_train_start(resumed.trainer, resumed.module)
    for probe, seen_by in ((before, steps), (after, resumed)):
        probe.on_train_epoch_end(seen_by.trainer, seen_by.module)
    assert resumed.logged == steps.logged != {}
    features = FeatureSet(random_rows(6, 5, 9), torch.tensor([0, 1, 2, 0, 1, 2]))
    sets = FeatureSets(features, features)
    assert after.score(sets, CPU) == before.score(sets, CPU) != {}


def test_says_what_does_not_fit(caplog: pytest.LogCaptureFixture) -> None:
    probe, steps = OnlineProbe(), Steps()
    with pytest.raises(ValueError, match=r"one row for each of the 4 labels, got \[8, 5\]"):
        steps.run(probe, torch.zeros(8, 5), torch.zeros(4, dtype=torch.int64))
    steps.run(probe, *batches(1)[0])
    wide = FeatureSet(torch.zeros(2, 7), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="width 5, but the first encoder gives 7"):
        probe.score(FeatureSets(wide, wide), CPU)
    silent = OnlineProbe()
    with caplog.at_level(logging.WARNING):
        for step in range(2):
            silent.on_train_batch_end(steps.trainer, steps.module, {"loss": torch.zeros(())}, {}, step)
    assert [record.getMessage() for record in caplog.records] == ["the method returns no embedding: no online probe"]
    assert silent.state_dict() == {}
    assert silent.score(FeatureSets(wide, wide), CPU) == {}
