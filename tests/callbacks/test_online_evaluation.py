from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from src.callbacks.online_evaluation import OnlineEvaluation
from src.callbacks.online_probe import OnlineProbe
from src.callbacks.representation_health import RepresentationHealth
from src.datamodules.datamodule import DataModule
from src.datamodules.scenes.films import FilmsSource
from src.evaluation.evaluation import FeatureEvaluation, run_evaluations
from src.evaluation.features import FeatureSets
from src.evaluation.knn import KNN
from src.evaluation.label_propagation import LabelPropagation
from src.evaluation.linear import LinearProbe
from src.evaluation.multilabel import MultiLabelProbe
from src.evaluation.zero_shot import ZeroShot
from tests.evaluation.toy import Toy, squares, subject

CPU = torch.device("cpu")


def fit(callbacks: Sequence[L.Callback], *, data: DataModule | None = None, **options: Any) -> L.Trainer:
    """Three steps an epoch."""
    torch.manual_seed(3)
    trainer = L.Trainer(
        **{"max_epochs": 2, "logger": False, **options},
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    trainer.fit(Toy(), datamodule=data if data is not None else squares())
    return trainer


class Recorder(FeatureEvaluation):
    """Notes how the bank looked each time it was called."""

    def __init__(self) -> None:
        self.calls: list[float] = []

    def score(self, sets: FeatureSets, device: torch.device) -> dict[str, float]:
        self.calls.append(sets.bank.features.double().sum().item())
        return {"calls": float(len(self.calls))}


def test_training_gives_the_same_bits_with_and_without() -> None:
    watched = fit(
        [
            OnlineEvaluation({"knn": KNN(k=3), "linear": LinearProbe(l2=(1.0,))}, every_n_epochs=1, at_start=True),
            OnlineProbe(),
            RepresentationHealth(every_n_steps=2, window=8),
        ]
    )
    end = torch.get_rng_state()
    assert "eval/probe_top1" in watched.callback_metrics
    plain = fit([])
    assert torch.equal(torch.get_rng_state(), end)
    for one, other in (
        (watched.lightning_module.state_dict(), plain.lightning_module.state_dict()),
        (watched.optimizers[0].state_dict()["state"], plain.optimizers[0].state_dict()["state"]),
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    modes = [[module.training for module in trainer.lightning_module.modules()] for trainer in (watched, plain)]
    assert modes[0] == modes[1]


def test_online_numbers_equal_offline_ones() -> None:
    evaluations = {"knn": KNN(k=(3, 1)), "linear": LinearProbe(l2=(1e-2, 1.0))}
    trainer = fit([OnlineEvaluation(evaluations, bank_samples=40, query_samples=30)])
    # a DataModule of its own, as another command would have it
    encoders = trainer.lightning_module.encoders()  # type: ignore[operator]
    offline = run_evaluations(
        subject(encoders, squares(seed=7), bank_samples=40, query_samples=30), list(evaluations.values())
    )
    assert set(offline) == {
        f"{name}{suffix}"
        for name in ("knn_top1", "knn1_top1", "linear_top1", "linear_l2")
        for suffix in ("", "_teacher")
    }
    online = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("eval/")}
    assert online.pop("eval/seconds") > 0
    assert online == {f"eval/{name}": torch.tensor(value).item() for name, value in offline.items()}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_epochs": 4}, 2),  # after 2 and 4, the end being no extra time
        ({"max_epochs": 5}, 3),  # after 2, 4 and the end
        ({"max_epochs": -1, "max_steps": 8}, 2),  # after 2 and in the middle of the third
        ({"max_epochs": 1}, 1),
    ],
)
def test_every_so_many_epochs_and_at_the_end(options: dict[str, int], expected: int) -> None:
    recorder = Recorder()
    fit([OnlineEvaluation({"recorder": recorder}, every_n_epochs=2, bank_samples=8, query_samples=4)], **options)
    # called for student and teacher; the teacher stands still and the student does not
    assert len(recorder.calls) == 2 * expected
    assert len(set(recorder.calls[0::2])) == expected
    assert len(set(recorder.calls[1::2])) == 1


def test_also_where_a_later_callback_stops_the_training() -> None:
    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.should_stop = True

    recorder = Recorder()
    trainer = fit([OnlineEvaluation({"recorder": recorder}, every_n_epochs=2), Stop()], max_epochs=5)
    assert trainer.current_epoch == 1
    assert len(recorder.calls) == 2
    assert trainer.callback_metrics["eval/calls_teacher"] == 2


def test_at_start_is_what_training_starts_from(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    recorder = Recorder()
    fit([OnlineEvaluation({"recorder": recorder}, at_start=True)], max_epochs=1, logger=logger)
    untrained = Recorder()
    run_evaluations(subject(Toy().encoders(), squares()), [untrained])
    assert recorder.calls[:2] == untrained.calls
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["eval/calls"]]
    assert [(int(row["step"]), float(row["eval/calls"])) for row in rows] == [(0, 1), (2, 3)]


def test_missing_labels_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    with caplog.at_level(logging.WARNING):
        trainer = fit(
            [OnlineEvaluation({"recorder": recorder}, every_n_epochs=1, at_start=True), OnlineProbe()],
            data=squares(labelled=False),
        )
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("src.")]
    assert sorted(ours) == [
        "no online evaluation 'recorder': no sample of the evaluation data has a label",
        "the data has no labels: no online probe",
    ]
    assert recorder.calls == []
    assert not any(name.startswith("eval/") for name in trainer.callback_metrics)


def test_evaluations_of_patches_run_online() -> None:
    follow = LabelPropagation(partial(FilmsSource, count=1, resolution=32, duration=0.5, rate=8.0))
    trainer = fit([OnlineEvaluation({"knn": KNN(k=3), "labelpropagation": follow})], max_epochs=1)
    module = trainer.lightning_module
    offline = follow.by_encoder(subject(module.encoders(), squares()))  # type: ignore[operator]
    assert set(offline) == {"student", "teacher"}
    for name, end in (("student", ""), ("teacher", "_teacher")):
        online = trainer.callback_metrics[f"eval/labelpropagation_jf{end}"]
        assert float(online) == pytest.approx(offline[name]["labelpropagation_jf"])
    assert "eval/knn_top1" in trainer.callback_metrics


def test_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="every_n_epochs"):
        OnlineEvaluation({}, every_n_epochs=0)


def test_evaluations_that_are_not_applicable_are_skipped(caplog: pytest.LogCaptureFixture) -> None:
    evaluations = {"multilabel": MultiLabelProbe(), "knn": KNN(k=3), "left_out": None, "zeroshot": ZeroShot()}
    with caplog.at_level(logging.WARNING):
        trainer = fit([OnlineEvaluation(evaluations, every_n_epochs=1, seconds="knn_seconds")], max_epochs=2)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("src.")]
    assert len(ours) == 2
    assert ours[0].startswith("no online evaluation 'multilabel': all classes of an image are needed")
    assert ours[1].startswith(
        "no online evaluation 'zeroshot': a method with an image tower and a text tower is needed"
    )
    assert {"eval/knn_top1", "eval/knn_seconds"} <= set(trainer.callback_metrics)


def test_the_probe_is_evaluated_only_if_features_are_read() -> None:
    def names(*evaluations: OnlineEvaluation) -> set[str]:
        found = fit([*evaluations, OnlineProbe()], max_epochs=1).callback_metrics
        return {name for name in found if name.startswith("eval/")}

    follow = LabelPropagation(partial(FilmsSource, count=1, resolution=32, duration=0.5, rate=8.0))
    apart = [
        OnlineEvaluation({"knn": KNN(k=3)}),
        OnlineEvaluation({"labelpropagation": follow}, seconds="film_seconds"),
    ]
    assert {"eval/probe_top1", "eval/seconds", "eval/film_seconds", "eval/labelpropagation_jf"} <= names(*apart)
    assert "eval/probe_top1" not in names(apart[1])
