"""Tests of downstream runs through the commands."""

import shutil

import pytest
import torch

from src import resume, runs, train
from src.errors import UserError
from tests.commands import SECONDS, run

SHARED = [word for word in SECONDS if not word.startswith(("experiment=", "model."))]
FINETUNE = [
    "experiment=finetune_vitb",
    "scale=tiny",
    *SHARED,
    "backbone.drop_path_rate=0.2",
    "model.mixup=0.8",
    "model.cutmix=1.0",
    "data.train_view.policy=rand-m9-mstd0.5-inc1",
    "data.train_view.erase=0.25",
    "callbacks.progress=null",
]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("PRETEXT_RUN_DIR", "")
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def pretrained(tmp_path) -> str:
    words = [*SECONDS, "trainer.max_epochs=1", "callbacks.progress=null", "callbacks.evaluation=null"]
    assert train.main([*words, f"paths.runs={tmp_path}", "run.name=source"]) == 0
    return str(tmp_path / "mae_tiny" / "source")


def test_a_killed_fine_tuning_resumes_bitwise_equal_without_its_checkpoint(tmp_path, pretrained, monkeypatch):
    words = [*FINETUNE, f"checkpoint={pretrained}", f"paths.runs={tmp_path}"]
    killed = run(
        "src.train",
        *words,
        "run.name=killed",
        "callbacks.checkpoints.every_steps=5",
        "+callbacks.kill={_target_: tests.commands.KillAt, step: 12}",
    )
    assert killed.returncode == -9, killed.stderr
    monkeypatch.setenv("PRETEXT_RUN_DIR", "")
    assert train.main([*words, "run.name=whole"]) == 0
    shutil.rmtree(pretrained)
    broken = runs.Run(tmp_path / "finetune_vitb" / "killed")
    assert torch.load(broken.last, weights_only=True)["global_step"] == 10
    assert resume.main([f"run={broken.dir}", "callbacks.kill=null"]) == 0
    whole = runs.Run(tmp_path / "finetune_vitb" / "whole")
    resumed, expected = (torch.load(part.last, weights_only=True)["state_dict"] for part in (broken, whole))
    assert all(torch.equal(value, expected[name]) for name, value in resumed.items())
    assert broken.metrics()["train"]["eval/top1"] == whole.metrics()["train"]["eval/top1"]
    assert broken.metrics()["train"]["loss/total"] == whole.metrics()["train"]["loss/total"]


def test_linear_probing_keeps_the_encoder_of_a_run(tmp_path, pretrained, monkeypatch):
    monkeypatch.setenv("PRETEXT_RUN_DIR", "")
    words = ["experiment=linear_vitb", "scale=tiny", *SHARED, "callbacks.progress=null", "trainer.max_epochs=1"]
    assert train.main([*words, f"checkpoint={pretrained}", f"paths.runs={tmp_path}", "run.name=probe"]) == 0
    ours = torch.load(tmp_path / "linear_vitb/probe/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    source = torch.load(runs.find(pretrained).checkpoint(), weights_only=True)["state_dict"]
    shared = [name for name in ours if name.startswith("backbone.")]
    assert shared == [name for name in source if name.startswith("backbone.")]
    assert all(torch.equal(ours[name], source[name]) for name in shared)


def test_a_missing_checkpoint_is_refused_before_the_run_starts(tmp_path):
    with pytest.raises(UserError, match=r"^checkpoint: no weights at .*nowhere"):
        train.main([*FINETUNE, "checkpoint=nowhere", f"paths.runs={tmp_path}", "run.name=none"])


def test_linear_segmentation_on_the_encoder_of_a_run(tmp_path, pretrained, monkeypatch):
    monkeypatch.setenv("PRETEXT_RUN_DIR", "")
    words = ["experiment=segmentation_linear_vitb", "scale=tiny", *SHARED, "callbacks.progress=null"]
    words += ["trainer.max_epochs=1", "data.eval_batch_size=8", "callbacks.visualizations.count=2"]
    assert train.main([*words, f"checkpoint={pretrained}", f"paths.runs={tmp_path}", "run.name=dense"]) == 0
    run_of = runs.Run(tmp_path / "segmentation_linear_vitb" / "dense")
    assert 0 <= run_of.metrics()["train"]["eval/miou"] <= run_of.metrics()["train"]["eval/pixel_accuracy"] <= 1
    ours = torch.load(run_of.last, weights_only=True)
    source = torch.load(runs.find(pretrained).checkpoint(), weights_only=True)
    assert ours["classes"][0] == "backdrop"
    assert ours["encoders"] == {"encoder": "features.backbone."}
    shared = [name for name in source["state_dict"] if name.startswith("backbone.")]
    assert len(shared) > 20
    assert all(torch.equal(ours["state_dict"][f"features.{name}"], source["state_dict"][name]) for name in shared)


def test_detection_on_the_frozen_encoder_of_a_run(tmp_path, pretrained, monkeypatch):
    monkeypatch.setenv("PRETEXT_RUN_DIR", "")
    words = ["experiment=detection_vitb", "scale=tiny", *SHARED, "callbacks.progress=null", "model.frozen=true"]
    words += ["trainer.max_epochs=1", "data.eval_batch_size=8", "callbacks.visualizations.count=2"]
    assert train.main([*words, f"checkpoint={pretrained}", f"paths.runs={tmp_path}", "run.name=detection"]) == 0
    run_of = runs.Run(tmp_path / "detection_vitb" / "detection")
    metrics = run_of.metrics()["train"]
    assert {"loss/objectness", "loss/proposals", "loss/classes", "loss/boxes", "loss/masks"} <= metrics.keys()
    assert all(0 <= metrics[f"eval/{kind}_ap"] <= metrics[f"eval/{kind}_ap50"] <= 1 for kind in ("box", "mask"))
    ours = torch.load(run_of.last, weights_only=True)
    source = torch.load(runs.find(pretrained).checkpoint(), weights_only=True)
    assert ours["encoders"] == {"encoder": "pyramid.vit.backbone."}
    shared = [name for name in source["state_dict"] if name.startswith("backbone.")]
    assert len(shared) > 20
    assert all(torch.equal(ours["state_dict"][f"pyramid.vit.{name}"], source["state_dict"][name]) for name in shared)
