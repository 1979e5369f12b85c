"""Compares SimCLR, DINO and SwAV with a bare loop, and measures the memory of contrastive losses."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import loop
from benchmarks.bare import BareLoop, RandomImageSource, RepeatViews
from src import configuration, runs
from src.callbacks.throughput import peak_memory_gb
from src.measure import train_command
from src.measure.report import Check, Section, table
from src.measure.subprocess_runner import peak_growth_mb, run_in_subprocess
from src.memory import keep_freed_memory
from src.models.losses.contrastive import nt_xent
from src.train import compose

SIDE = 64
COMMON = (
    "scale=tiny",
    f"image_size={SIDE}",
    "local_image_size=32",
    "backbone=vit",
    "backbone.patch_size=8",
    "backbone.embed_dim=128",
    "backbone.depth=4",
    "backbone.num_heads=4",
)
STEPS, ROUNDS = 25, 4
BATCHES = (512, 1024, 2048, 4096, 8192)
DIM = 128


@dataclass(frozen=True)
class MethodSetting:
    """An experiment, its views, and the gradient norm to which it clips each parameter."""

    experiment: str
    repeat_views: RepeatViews
    clip: float | None = None

    @property
    def view(self) -> str:
        arguments = ", ".join(f"{name}: {value}" for name, value in vars(self.repeat_views).items())
        return f"{{_target_: benchmarks.bare.RepeatViews, {arguments}}}"


METHODS = {
    "SimCLR": MethodSetting("simclr_r50", RepeatViews(2)),
    "DINO": MethodSetting("dino_vits", RepeatViews(2, 4, 32), clip=3.0),
    "SwAV": MethodSetting("swav_r50", RepeatViews(2, 6, 32)),
}


def measure(quick: bool = False) -> dict[str, Any]:
    """Measures training loops and losses.

    Returns:
        ``loops``: method -> the result of `loop.InterleavedLoops`, the peak ``memory`` of a process that trains with
        `make train`, and of one that runs the bare loop (``bare_memory``), in GB. ``contrastive``: for each batch
        size the megabytes that SimCLR's loss adds to its input, forward and backward, in one process and in one of
        eight; ``matrix`` is what the matrix of all similarities alone would take.
    """
    steps, rounds = (2, 1) if quick else (STEPS, ROUNDS)
    loops = {}
    for title, setting in METHODS.items():
        words = [f"experiment={setting.experiment}", *COMMON, *(["data.batch_size=16"] if quick else [])]
        more = f", repeat_views: {setting.view}" + (f", clip: {setting.clip}" if setting.clip else "")
        found = loop.measure_loops(words, setting.view, size=SIDE, steps=steps, rounds=rounds, more=more)
        found["memory"], found["bare_memory"] = (
            _train_peak_gb(words, setting, steps),
            run_in_subprocess(bare_peak_gb, title, words, steps),
        )
        loops[title] = found
    batches = BATCHES[:1] if quick else BATCHES
    contrastive = {
        str(batch): {
            "one": run_in_subprocess(loss_growth_mb, batch, 1),
            "of_eight": run_in_subprocess(loss_growth_mb, batch, 8),
            "matrix": (2 * batch) ** 2 * 4 / 1e6,
        }
        for batch in batches
    }
    return {"loops": loops, "contrastive": contrastive}


def _train_peak_gb(words: list[str], setting: MethodSetting, steps: int) -> float:
    """Returns the peak memory of `make train` in GB."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = [
            "callbacks.evaluation=null",
            "callbacks.visualizations=null",
            "trainer.max_epochs=-1",
            "run.name=memory",
        ]
        whole = [*words, *loop.in_memory(setting.view, SIDE), *quiet, f"trainer.max_steps={max(10, steps)}"]
        train_command.run_training(whole, runs=Path(folder))
        return float(runs.Run(Path(folder, setting.experiment, "memory")).metrics()["train"]["speed/peak_memory_gb"])


def bare_peak_gb(title: str, words: list[str], steps: int) -> float:
    """Returns the peak memory in GB of this process after some steps of the bare loop."""
    keep_freed_memory()  # as a command does
    setting, config = METHODS[title], compose(words)
    bare = BareLoop(
        configuration.instantiate(config.model),
        RandomImageSource("train", size=SIDE, length=512).distinct_images,
        batch_size=config.data.batch_size,
        precision=str(config.trainer.precision),
        repeat_views=setting.repeat_views,
        clip=setting.clip,
    )
    bare.run(max(10, steps))
    return peak_memory_gb(torch.device("cpu"))


def loss_growth_mb(batch: int, processes: int) -> float:
    """Returns by how many MB SimCLR's loss grows this process, forward and backward.

    Args:
        batch: images of all processes together.
        processes: of which one is measured, with its share of the images.
    """
    share = batch // processes
    keys = torch.nn.functional.normalize(torch.randn(batch, 2, DIM), dim=-1)
    z = keys[:share].clone().requires_grad_()
    keys[:share] = z.detach()
    return peak_growth_mb(lambda: nt_xent(z, torch.cat([z, keys[share:]]), 0, temperature=0.1).backward())


def report(result: dict[str, Any]) -> Section:
    rows = [
        [
            title,
            str(measured["batch_size"]),
            f"{1e3 * measured['batch_size'] / measured['images_per_second']:.0f} ms",
            f"{1e3 * measured['batch_size'] / measured['bare_images_per_second']:.0f} ms",
            f"{measured['ratio']['median']:.3f} ({measured['ratio']['low']:.3f} to {measured['ratio']['high']:.3f})",
            f"{measured['memory']:.2f} GB",
            f"{measured['bare_memory']:.2f} GB",
        ]
        for title, measured in result["loops"].items()
    ]
    head = ["", "batch", "step", "bare step", "rate over bare (quartiles)", "memory", "bare memory"]
    body = (
        "Tiny ViT on images of 64 pixels (local views 32) in memory, repeated and not augmented: a step of `make "
        "train` with every default callback, beside a step of a loop written by hand with the same model, teacher, "
        "clipping and optimizer. Memory is the peak of the training process, libraries included (about 0.5 GB).\n\n"
        + table(head, rows)
    )
    sizes = [
        [batch, f"{each['one']:.0f}", f"{each['of_eight']:.0f}", f"{each['matrix']:.0f}"]
        for batch, each in result["contrastive"].items()
    ]
    body += (
        f"\n\nMB that SimCLR's loss adds to a process, forward and backward, two views per image, {DIM} dimensions:\n\n"
        + table(["images in all", "one process", "one of eight", "all similarities at once"], sizes)
    )
    largest = max(result["contrastive"].items(), key=lambda item: int(item[0]))
    grown = max(largest[1]["one"], largest[1]["of_eight"])
    check = Check(
        f"memory of a contrastive loss, {largest[0]} images",
        f"< {largest[1]['matrix']:.0f} MB, the matrix of all similarities",
        f"{grown:.0f} MB",
        grown < largest[1]["matrix"],
    )
    return Section("Joint embedding beside a bare loop", [check], body)
