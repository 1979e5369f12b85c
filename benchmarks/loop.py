"""Compares the training loop of `make train` with a bare loop of the same model, batch, precision and data."""

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

from benchmarks.bare import BareLoop, RepeatViews, synchronize
from benchmarks.precision import SMALL
from src.datamodules.datamodule import DataModule
from src.files import write_atomically
from src.measure import train_command
from src.measure.paired_ratio import paired_ratio
from src.measure.report import Check, Section, percent, table
from src.models.pretrain_module import PretrainModule

WANTED = 0.97


@dataclass(frozen=True)
class LoopSetting:
    """A recipe and the length of its measurement.

    Args:
        overrides: of the configuration.
        size: side of the images in pixels.
        steps: length of a segment. 50 include the rarest work of a default callback, representation health.
        rounds: measured pairs of segments.
        small: further overrides for ``quick=true``.
    """

    overrides: tuple[str, ...]
    size: int
    steps: int
    rounds: int
    small: tuple[str, ...] = ()


_SETTINGS = {
    "mae_tiny": LoopSetting(("experiment=mae_tiny",), size=32, steps=50, rounds=10),
    "mae_vitb": LoopSetting(("experiment=mae_vitb", "scale=smoke"), size=224, steps=10, rounds=10, small=tuple(SMALL)),
}


def measure(quick: bool = False) -> dict[str, Any]:
    """Measures both loops in one process, a segment of some steps each in turn, for a small and a large model.

    `make train` runs with every default callback and logger. Images are in memory and not augmented, so decoding and
    augmentation are not measured; nor are evaluation, visualizations and checkpoints at the end of an epoch.

    Returns:
        Experiment -> the result of `InterleavedLoops`.
    """
    return {
        name: measure_loops(
            [*setting.overrides, *(setting.small if quick else ())],
            "{_target_: src.datamodules.views.image.CenterCrop, size: ${image_size}, share: 1.0}",
            size=setting.size,
            steps=2 if quick else setting.steps,
            rounds=1 if quick else setting.rounds,
        )
        for name, setting in _SETTINGS.items()
    }


def measure_loops(
    overrides: list[str], view: str, *, size: int, steps: int, rounds: int, more: str = ""
) -> dict[str, Any]:
    """Runs `make train` on random images in memory with `InterleavedLoops` among its callbacks, and returns its result.

    Args:
        overrides: of the configuration.
        view: `_target_` and arguments of the training view, in Hydra's grammar.
        size: side of the images in pixels.
        steps, rounds: see `InterleavedLoops`.
        more: its other arguments, in Hydra's grammar.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "loop.json")
        arguments = f"bare: '${{model}}', steps: {steps}, rounds: {rounds}{more}, out: '{out}'"
        train_command.run_training(
            [
                *overrides,
                *in_memory(view, size),
                "run.name=loop",
                "trainer.max_epochs=1",
                # one short evaluation after the last segment
                "data.eval_samples=16",
                "callbacks.evaluation.bank_samples=32",
                "callbacks.evaluation.query_samples=16",
                f"+callbacks.interleaved={{_target_: benchmarks.loop.InterleavedLoops, {arguments}}}",
            ],
            runs=Path(folder, "runs"),
        )
        return json.loads(out.read_text())


def in_memory(view: str, size: int) -> list[str]:
    """Returns overrides for random images in memory, without worker processes and without an end of the epoch."""
    return [
        "~data.source",
        f"+data.source={{_target_: benchmarks.bare.RandomImageSource, _partial_: true, size: {size}, length: 1000000}}",
        "~data.train_view",
        f"+data.train_view={view}",
        "data.eval_view.share=1.0",
        "data.num_workers=0",
        "data.train_samples=null",
    ]


class InterleavedLoops(L.Callback):
    """Runs a segment of a `BareLoop` after each segment of the training run, then stops the run and writes the speeds.

    Args:
        bare: the module of the bare loop, a copy of the trained one.
        steps: optimizer steps of a segment.
        rounds: pairs of segments that are measured, after a first one that is not.
        out: JSON file for the result.
        repeat_views, clip: see `BareLoop`.
    """

    def __init__(
        self,
        bare: PretrainModule,
        *,
        steps: int,
        rounds: int,
        out: str | Path,
        repeat_views: RepeatViews | None = None,
        clip: float | None = None,
    ) -> None:
        self.bare = bare
        self.steps = steps
        self.rounds = rounds
        self.out = Path(out)
        self.repeat_views = repeat_views
        self.clip = clip
        self._loop: BareLoop | None = None
        self._began = 0.0
        self._whole_seconds: list[float] = []
        self._bare_seconds: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._loop = BareLoop(
            self.bare.to(pl_module.device),
            datamodule.train_source.distinct_images,
            batch_size=datamodule.batch_size,
            precision=str(trainer.precision),
            repeat_views=self.repeat_views,
            clip=self.clip,
            texts=_texts(datamodule) if datamodule.extras is not None else None,
        )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # a segment lasts from the start of a step to the start of another, with everything between them
        if batch_idx % self.steps or trainer.should_stop or self._loop is None:
            return
        synchronize(pl_module.device)
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


def _texts(datamodule: DataModule) -> tuple[Tensor, Tensor]:
    """Returns token ids and mask of each image's caption."""
    source: Any = datamodule.train_source
    return datamodule.tokenizer([source.caption(index, 0.0) for index in range(len(source.distinct_images))])


def compare(whole_seconds: list[float], bare_seconds: list[float], *, images: int) -> dict[str, Any]:
    """Returns the images per second of both loops, medians of all segments but the first, and their paired ratio."""
    whole, bare = whole_seconds[1:], bare_seconds[1:]
    return {
        "images_per_second": images / statistics.median(whole),
        "bare_images_per_second": images / statistics.median(bare),
        "ratio": asdict(paired_ratio(bare, whole)),  # of rates: the inverse of that of times
    }


def report(result: dict[str, Any]) -> Section:
    rows, checks = [], []
    for name, measured in result.items():
        ratio = measured["ratio"]
        rows.append(
            [
                name,
                str(measured["batch_size"]),
                measured["precision"],
                f"{measured['images_per_second']:.1f}",
                f"{measured['bare_images_per_second']:.1f}",
                f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})",
                f"{ratio['of_sums']:.3f}",
                f"{ratio['pairs']} x {measured['steps']} steps",
                f"{measured['checkpoint_seconds']:.2f} s ({percent(measured['checkpoint_seconds'] / 600, 2)})",
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
        "the same model, batch, precision and optimizer, one segment of each in turn in one process; images "
        "in memory, without augmentation. Work at the end of an epoch is not included. A checkpoint is written every "
        "ten minutes: its time, and the share of these ten minutes.\n\n" + table(head, rows)
    )
    return Section("The training loop", checks, body)
