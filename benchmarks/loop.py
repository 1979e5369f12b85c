"""The whole training loop of `make train`, next to a bare one of the same model, batch, precision and data."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from benchmarks.bare import BareLoop, Copies, wait_for
from benchmarks.precision import SMALL
from src.datamodules.image_text import ImageTextDataModule
from src.files import write_atomically
from src.measure import train_command
from src.measure.paired_ratio import paired_ratio
from src.measure.report import Check, Section, percent, table
from src.models.pretrain_module import PretrainModule

WANTED = 0.97


@dataclass(frozen=True)
class Arm:
    """What is trained on images of ``size`` pixels, and for how long: representation health, the rarest of what the
    default callbacks do in a step, has its turn every 50 steps. ``small`` makes a quick look quick."""

    words: tuple[str, ...]
    size: int
    steps: int
    rounds: int
    small: tuple[str, ...] = ()


_ARMS = {
    "mae_tiny": Arm(("experiment=mae_tiny",), size=64, steps=50, rounds=10),
    "mae_vitb": Arm(("experiment=mae_vitb", "scale=smoke"), size=224, steps=10, rounds=10, small=tuple(SMALL)),
}


def measure(quick: bool = False) -> dict[str, Any]:
    """Both loops in one process in turn, a segment of some steps each, for a small and for a large model.

    `make train` runs with every default callback and logger. Visualizations are in memory and taken as they are, by the
    process that trains: what decoding and augmenting cost is not asked here. Evaluation, images and checkpoints at
    epochs' ends lie outside the segments.

    Returns:
        By experiment what `Interleaved` writes.
    """
    return {
        name: interleaved(
            [*arm.words, *(arm.small if quick else ())],
            "{_target_: src.datamodules.views.image.CenterCrop, size: ${image_size}, share: 1.0}",
            size=arm.size,
            steps=2 if quick else arm.steps,
            rounds=1 if quick else arm.rounds,
        )
        for name, arm in _ARMS.items()
    }


def interleaved(words: list[str], view: str, *, size: int, steps: int, rounds: int, more: str = "") -> dict[str, Any]:
    """Run `make train` with ``words`` on images in memory and an `Interleaved` among its callbacks.

    Args:
        view: how the images become a batch, in Hydra's grammar.
        size: side of an image.
        steps, rounds, more: arguments of `Interleaved`, the last in Hydra's grammar.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "loop.json")
        callback = f"_target_: benchmarks.loop.Interleaved, bare: '${{model}}', steps: {steps}, rounds: {rounds}{more}"
        train_command.run_training(
            [
                *words,
                *in_memory(view, size),
                "run.name=loop",
                "trainer.max_epochs=1",
                # one short evaluation after the last segment
                "data.eval_samples=16",
                "callbacks.evaluation.bank_samples=32",
                "callbacks.evaluation.query_samples=16",
                f"+callbacks.interleaved={{{callback}, out: '{out}'}}",
            ],
            runs=Path(folder, "runs"),
        )
        return json.loads(out.read_text())


def in_memory(view: str, size: int) -> list[str]:
    """Words for images in memory, taken by the process that trains; no epoch of them ends within a measurement."""
    return [
        "~data.source",
        f"+data.source={{_target_: benchmarks.bare.MemorySource, _partial_: true, size: {size}, length: 1000000}}",
        "~data.train_view",
        f"+data.train_view={view}",
        "data.eval_view.share=1.0",
        "data.num_workers=0",
        "data.train_samples=null",
    ]


class Interleaved(L.Callback):
    """Cuts a run into segments of ``steps`` optimizer steps and runs as many of a `BareLoop` after each; the first pair
    is dropped. Ends the run after ``rounds`` more and writes what was measured.

    Args:
        bare: another module of the same kind.
        steps: of a segment.
        rounds: pairs that count.
        out: JSON file.
        copies, clip: of the bare loop.
    """

    def __init__(
        self,
        bare: PretrainModule,
        *,
        steps: int,
        rounds: int,
        out: str | Path,
        copies: Copies | None = None,
        clip: float | None = None,
    ) -> None:
        self.bare = bare
        self.steps = steps
        self.rounds = rounds
        self.out = Path(out)
        self.copies = copies
        self.clip = clip
        self._loop: BareLoop | None = None
        self._began = 0.0
        self._whole_seconds: list[float] = []
        self._bare_seconds: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._loop = BareLoop(
            self.bare.to(pl_module.device),
            datamodule.train_source.pictures,
            batch_size=datamodule.batch_size,
            precision=str(trainer.precision),
            copies=self.copies,
            clip=self.clip,
            texts=_texts(datamodule) if isinstance(datamodule, ImageTextDataModule) else None,
        )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # from one step's start to another's: a segment holds everything that happens between them
        if batch_idx % self.steps or trainer.should_stop or self._loop is None:
            return
        wait_for(pl_module.device)
        if batch_idx:
            self._whole_seconds.append(time.perf_counter() - self._began)
            self._bare_seconds.append(self._loop.run(self.steps))
        if len(self._whole_seconds) > self.rounds:
            trainer.should_stop = True
        self._began = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        begin = time.perf_counter()
        trainer.save_checkpoint(self.out.with_suffix(".ckpt"))
        checkpoint_seconds = time.perf_counter() - begin
        batch_size: int = trainer.datamodule.batch_size  # type: ignore[attr-defined]
        result = {
            **compare(self._whole_seconds, self._bare_seconds, images=self.steps * batch_size),
            "batch_size": batch_size,
            "precision": str(trainer.precision),
            "steps": self.steps,
            "checkpoint_seconds": checkpoint_seconds,
        }
        write_atomically(self.out, json.dumps(result))


def _texts(datamodule: ImageTextDataModule) -> tuple[Tensor, Tensor]:
    """Ids and mask of each image's text."""
    source: Any = datamodule.train_source
    return datamodule.tokenizer([source.caption(index, 0.0) for index in range(len(source.pictures))])


def compare(whole_seconds: list[float], bare_seconds: list[float], *, images: int) -> dict[str, Any]:
    """Images per second of both, medians of all segments but the first, and the paired ratio of these rates."""
    whole, bare = whole_seconds[1:], bare_seconds[1:]
    return {
        "images_per_second": images / statistics.median(whole),
        "bare_images_per_second": images / statistics.median(bare),
        "ratio": asdict(paired_ratio(bare, whole)),  # of rates: the inverse of that of times
    }


def report(result: dict[str, Any]) -> Section:
    rows, checks = [], []
    for name, arm in result.items():
        ratio = arm["ratio"]
        rows.append(
            [
                name,
                str(arm["batch_size"]),
                arm["precision"],
                f"{arm['images_per_second']:.1f}",
                f"{arm['bare_images_per_second']:.1f}",
                f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})",
                f"{ratio['of_sums']:.3f}",
                f"{ratio['pairs']} x {arm['steps']} steps",
                f"{arm['checkpoint_seconds']:.2f} s ({percent(arm['checkpoint_seconds'] / 600, 2)})",
            ]
        )
        checks.append(
            Check(
                f"whole loop over a bare loop, {name}",
                f"≥ {WANTED}",
                f"{ratio['median']:.3f}",
                ratio["median"] >= WANTED,
            )
        )
    head = [
        "",
        "batch",
        "precision",
        "`make train`",
        "bare loop",
        "ratio (quartiles)",
        "of sums",
        "pairs",
        "checkpoint",
    ]
    body = (
        "Images per second of `make train` with every default callback and logger, and of a loop written by hand with "
        "the same model, batch, precision and optimizer, one segment of each in turn in one process; pictures in "
        "memory, taken as they are. What happens at the end of an epoch is not in it. A checkpoint is written every "
        "ten minutes: its time, and the share of them.\n\n" + table(head, rows)
    )
    return Section("The training loop", checks, body)
