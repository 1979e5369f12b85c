"""What SimCLR, DINO and SwAV cost beside a bare loop, and what contrastive losses keep in memory."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import loop
from benchmarks.bare import BareLoop, Copies, MemorySource
from src import configuration, runs
from src.callbacks.throughput import peak_memory_gb
from src.measure import train_command
from src.measure.report import Check, Section, table
from src.measure.subprocess_runner import peak_growth_mb, run_in_subprocess
from src.memory import keep_freed_memory
from src.models.losses.contrastive import nt_xent
from src.train import compose

SIDE = 64
COMMON = ("scale=tiny", "backbone=vit")
STEPS, ROUNDS = 25, 4
BATCHES = (512, 1024, 2048, 4096, 8192)
DIM = 128


@dataclass(frozen=True)
class Arm:
    """A recipe, the views it takes and the length to which it clips each gradient."""

    experiment: str
    copies: Copies
    clip: float | None = None

    @property
    def view(self) -> str:
        made = ", ".join(f"{name}: {value}" for name, value in vars(self.copies).items())
        return f"{{_target_: benchmarks.bare.Copies, {made}}}"


ARMS = {
    "SimCLR": Arm("simclr_r50", Copies(2)),
    "DINO": Arm("dino_vits", Copies(2, 4, 32), clip=3.0),
    "SwAV": Arm("swav_r50", Copies(2, 6, 32)),
}


def measure(quick: bool = False) -> dict[str, Any]:
    """
    Returns:
        ``loops``: for each method what `loop.Interleaved` writes, and the peak ``memory`` of a process that trains with
        `make train`, and of one that runs the bare loop (``bare_memory``), in GB. ``contrastive``: for each batch
        size the megabytes that SimCLR's loss adds to its input, forward and backward, in one process and in one of
        eight; ``matrix`` is what the matrix of all similarities alone would take.
    """
    steps, rounds = (2, 1) if quick else (STEPS, ROUNDS)
    loops = {}
    for title, arm in ARMS.items():
        words = [f"experiment={arm.experiment}", *COMMON, *(["data.batch_size=16"] if quick else [])]
        more = f", copies: {arm.view}" + (f", clip: {arm.clip}" if arm.clip else "")
        found = loop.interleaved(words, arm.view, size=SIDE, steps=steps, rounds=rounds, more=more)
        found["memory"], found["bare_memory"] = (
            _memory(words, arm, steps),
            run_in_subprocess(bare_peak, title, words, steps),
        )
        loops[title] = found
    batches = BATCHES[:1] if quick else BATCHES
    contrastive = {
        str(batch): {
            "one": run_in_subprocess(loss_megabytes, batch, 1),
            "of_eight": run_in_subprocess(loss_megabytes, batch, 8),
            "matrix": (2 * batch) ** 2 * 4 / 1e6,
        }
        for batch in batches
    }
    return {"loops": loops, "contrastive": contrastive}


def _memory(words: list[str], arm: Arm, steps: int) -> float:
    """GB at the peak of `make train`."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = [
            "callbacks.evaluation=null",
            "callbacks.visualizations=null",
            "trainer.max_epochs=-1",
            "run.name=memory",
        ]
        whole = [*words, *loop.in_memory(arm.view, SIDE), *quiet, f"trainer.max_steps={max(10, steps)}"]
        train_command.run_training(whole, runs=Path(folder))
        return float(runs.Run(Path(folder, arm.experiment, "memory")).metrics()["train"]["speed/peak_memory_gb"])


def bare_peak(title: str, words: list[str], steps: int) -> float:
    """GB at the peak of this process after some steps of the bare loop."""
    keep_freed_memory()  # as a command does
    arm, config = ARMS[title], compose(words)
    bare = BareLoop(
        configuration.instantiate(config.model),
        MemorySource("train", size=SIDE, length=512).pictures,
        batch_size=config.data.batch_size,
        precision=str(config.trainer.precision),
        copies=arm.copies,
        clip=arm.clip,
    )
    bare.run(max(10, steps))
    return peak_memory_gb(torch.device("cpu"))


def loss_megabytes(batch: int, processes: int) -> float:
    """By how many MB this process grows for SimCLR's loss of its share of ``batch`` images among all, both passes."""
    own = batch // processes
    keys = torch.nn.functional.normalize(torch.randn(batch, 2, DIM), dim=-1)
    z = keys[:own].clone().requires_grad_()
    keys[:own] = z.detach()
    return peak_growth_mb(lambda: nt_xent(z, torch.cat([z, keys[own:]]), 0, temperature=0.1).backward())


def report(result: dict[str, Any]) -> Section:
    rows = [
        [
            title,
            str(arm["batch_size"]),
            f"{1e3 * arm['batch_size'] / arm['images_per_second']:.0f} ms",
            f"{1e3 * arm['batch_size'] / arm['bare_images_per_second']:.0f} ms",
            f"{arm['ratio']['median']:.3f} ({arm['ratio']['low']:.3f} to {arm['ratio']['high']:.3f})",
            f"{arm['memory']:.2f} GB",
            f"{arm['bare_memory']:.2f} GB",
        ]
        for title, arm in result["loops"].items()
    ]
    head = ["", "batch", "step", "bare step", "rate over bare (quartiles)", "memory", "bare memory"]
    body = (
        "Tiny ViT, pictures of 64 pixels (small views 32) in memory, copied and not augmented: a step of `make train` "
        "with every default callback, next to one of a loop written by hand with the same model, teacher, clipping and "
        "optimizer. Memory is the peak of the process that trains, libraries included (about 0.5 GB).\n\n"
        + table(head, rows)
    )
    sizes = [
        [batch, f"{each['one']:.0f}", f"{each['of_eight']:.0f}", f"{each['matrix']:.0f}"]
        for batch, each in result["contrastive"].items()
    ]
    body += (
        f"\n\nMB that SimCLR's loss adds to a process, forward and backward, two views of {DIM} numbers an image:\n\n"
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
