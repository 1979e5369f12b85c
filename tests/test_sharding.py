"""A run is the same on one process and on two, and with parameters dealt out as with whole ones."""

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from src import runs
from src.sharding import repeated_blocks
from tests.commands import SECONDS, run

WORDS = [word for word in SECONDS if not word.startswith(("model.", "experiment="))]
WORDS += ["scale=tiny", "backbone=vit", "local_image_size=16", "trainer.accelerator=cpu"]


def weights(folder: Path, experiment: str, name: str, *words: str) -> dict[str, torch.Tensor]:
    done = run("src.train", *WORDS, f"experiment={experiment}", f"paths.runs={folder}", f"run.name={name}", *words)
    assert done.returncode == 0, done.stderr
    return saved(folder / experiment / name)


def saved(directory: Path) -> dict[str, torch.Tensor]:
    return torch.load(directory / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def test_two_processes_see_the_batches_of_one_and_end_in_its_weights(tmp_path):
    """A teacher, a predictor, and batch norm over all processes; in float64, so that only rounding may differ."""
    words = [
        "trainer.precision=64-true",
        "trainer.max_steps=6",
        "callbacks.evaluation=null",
        "callbacks.visualizations=null",
    ]
    one = weights(tmp_path, "byol_r50", "one", *words, "trainer.devices=1")
    two = weights(tmp_path, "byol_r50", "two", *words, "trainer.devices=2")
    assert furthest(one, two) < 1e-8


def test_dealt_out_parameters_are_trained_saved_and_taken_up_as_whole_ones(tmp_path):
    """A teacher, a queue and batch norm over all processes; killed on the way, with images and evaluation."""
    whole = weights(tmp_path, "moco_v2_r50", "whole", "trainer.devices=2")
    words = ["trainer.devices=2", "trainer=fsdp", "callbacks.checkpoints.every_steps=4", "run.name=dealt"]
    kill = "+callbacks.kill={_target_: tests.commands.KillAt, step: 10}"
    killed = run("src.train", *WORDS, "experiment=moco_v2_r50", f"paths.runs={tmp_path}", *words, kill)
    assert killed.returncode != 0
    directory = tmp_path / "moco_v2_r50" / "dealt"
    assert torch.load(directory / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 8
    done = run("src.resume", f"run={directory}", "callbacks.kill=null")
    assert done.returncode == 0, done.stderr
    assert furthest(saved(directory), whole) < 1e-6
    metrics = [runs.find(str(tmp_path / "moco_v2_r50" / name)).metrics()["train"] for name in ("dealt", "whole")]
    for name in ("eval/knn_top1", "eval/knn_top1_teacher"):
        assert metrics[0][name] == metrics[1][name]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_tiny_patch16_224", [f"blocks.{level}" for level in range(12)]),
        ("resnet18", [f"layer{stage}.{level}" for stage in range(1, 5) for level in range(2)]),
    ],
)
def test_repeated_blocks_are_the_blocks_of_vits_and_resnets(name, expected):
    model = timm.create_model(name)
    names = {id(module): name for name, module in model.named_modules()}
    assert [names[id(block)] for block in repeated_blocks(model)] == expected
    assert repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))) == []
