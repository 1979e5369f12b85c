"""The panels of a run: the panel before it starts, and the panel with results and next commands at its end."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from src import runs
from src.composition import Composition

_SHORT = {  # the keys that the first panel names; `make config` prints all of them
    "data.batch_size": "batch",
    "trainer.max_epochs": "epochs",
    "image_size": "image size",
    "backbone.model_name": "backbone",
    "optimizer.algorithm._target_": "optimizer",
    "optimizer.lr": "learning rate",
    "data.train_samples": "training samples",
}


def replaced_by_scale(composed: Composition) -> list[str]:
    """Lists the values of the recipe that the scale replaced, the most important first: "batch 4096 → 8"."""
    keys = [key for key in _SHORT if key in composed.replaced]
    lines = []
    for key in keys:
        before, after = composed.replaced[key]
        if key == "optimizer.lr":
            after = f"{composed.config.optimizer.lr:.3g}"
        lines.append(f"{_SHORT[key]} {_text(before)} → {_text(after)}")
    rest = len([key for key in composed.replaced if key not in _SHORT and not key.startswith("run.")])
    return [*lines, f"{rest} more"] if rest and lines else lines


def _text(value: Any) -> str:
    return "all" if value is None else in_words(str(value)).removeprefix("src.optim.")


_LR_RULE = re.compile(r"\$\{(linear_lr|sqrt_lr):([^,]+),\$\{data\.batch_size\},(\d+)\}")


def in_words(written: str) -> str:
    """Writes a rule of the learning rate as a formula: "${linear_lr:1.5e-4,${data.batch_size},256}"
    becomes "1.5e-4 × batch / 256"."""
    match = _LR_RULE.fullmatch(written)
    if match is None:
        return written.replace("${", "{")
    rule, base, reference = match.groups()
    return f"{base} × batch / {reference}" if rule == "linear_lr" else f"{base} × √(batch / {reference})"


def recipe_rows(config: DictConfig, start: str | None = None) -> dict[str, str]:
    """Returns the rows of the first panel: paper, scale, start, batch, precision and learning rate with its rule.

    Args:
        start: what was loaded into the encoder, in one line; None for random weights.
    """
    rows = {
        "paper": config.about.paper,
        "deviations": config.about.deviations,
        "scale": f"{config.run.scale}  (SCALE=paper, smoke or tiny changes it)",
        **({"replaced by the scale": ", ".join(config.run.replaced)} if config.run.get("replaced") else {}),
        **({} if start is None else {"starts from": start}),
        "batch": f"{config.data.batch_size} samples an optimizer step, over all processes",
        "precision": str(config.trainer.precision),
    }
    if "lr" in config.optimizer:
        rule = config.optimizer._get_node("lr")._value()
        value = f"{config.optimizer.lr:.3g}"
        rows["learning rate"] = value if not isinstance(rule, str) else f"{value} = {in_words(rule)}"
    return rows


@rank_zero_only
def announce(
    config: DictConfig, run: runs.Run, module: L.LightningModule, *, start: str | None, resume: Path | None
) -> None:
    """Prints the first panel: what runs, and how to change it."""
    lines = Table.grid(padding=(0, 2))
    lines.add_row("run", run.title + (f"  (continued from {resume.name})" if resume else ""))
    for name, value in recipe_rows(config, start).items():
        lines.add_row(name, value)
    lines.add_row("parameters", f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M")
    Console().print(Panel(lines, title=f"Pretext: {config.run.experiment}", expand=False, border_style="cyan"))


@rank_zero_only
def summarize(run: runs.Run, trainer: L.Trainer) -> None:
    """Prints the last panel: the run's folder, its results and the next commands."""
    lines = Table.grid(padding=(0, 2))
    lines.add_row("run", run.title)
    lines.add_row("steps", f"{trainer.global_step} ({trainer.current_epoch} epochs)")
    for name, value in sorted(run.metrics().get("train", {}).items()):
        if isinstance(value, float) and name.startswith(("loss/", "eval/", "speed/images")):
            lines.add_row(name, f"{value:.4g}")
    for path in (run.last, run.best):
        if path.exists():
            lines.add_row(path.stem, os.path.relpath(path))
    console = Console()
    console.print(Panel(lines, title="done", expand=False, border_style="green"))
    longer = 2 * max(1, trainer.max_epochs or 1)
    reads_clips = trainer.datamodule.input_key == "video"  # type: ignore[attr-defined]  # timm has no video encoders
    for purpose, command in (
        ("watch", "make tensorboard"),
        ("evaluate", f"make evaluate RUN={run.title} EVAL=knn,linear"),
        ("continue", f'make resume RUN={run.title} ARGS="trainer.max_epochs={longer}"'),
        ("export", f"make export RUN={run.title} FORMAT={'hf' if reads_clips else 'timm'}"),
    ):
        # outside of the frame and unbroken, so that a line can be copied
        console.print(f"  {purpose:<10} {command}", soft_wrap=True, highlight=False)
