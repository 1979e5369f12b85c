"""Writes a description of the run to TensorBoard and to a file."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from src.files import write_atomically

log = logging.getLogger(__name__)


class RecipeCard(L.Callback):
    """Writes the recipe, the environment and the configuration as TensorBoard text and as ``card.md``.

    Args:
        run_dir: the run's folder.
        config: the composed configuration as plain values.
        summary: the first table, such as paper, deviations and batch size.
    """

    def __init__(self, run_dir: str | Path, config: Mapping[str, Any], summary: Mapping[str, str]) -> None:
        self.path = Path(run_dir) / "card.md"
        self.config = config
        self.summary = summary

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        card = self.card(trainer, pl_module)
        try:
            write_atomically(self.path, card)
        except OSError as problem:
            log.error("could not write %s: %s. Training continues.", self.path, problem)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("recipe", card, trainer.global_step)

    def card(self, trainer: L.Trainer, pl_module: L.LightningModule) -> str:
        """The card as Markdown."""
        title = self.path.parent.name or type(pl_module).__name__
        parts = [
            f"# {title}",
            _table(("", ""), list(self.summary.items())),
            "## Parameters",
            _table(("part", "parameters", "trainable"), _parameters(pl_module)),
            "## Environment",
            _table(("", ""), list(environment(trainer).items())),
            "## Configuration",
            "```yaml\n" + yaml.safe_dump(_plain(self.config), sort_keys=False, allow_unicode=True) + "```",
        ]
        return "\n\n".join(part for part in parts if part) + "\n"


def environment(trainer: L.Trainer) -> dict[str, str]:
    """Versions of code and packages, device and precision."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "commit": commit(),
        "torch": str(torch.__version__),  # includes the build, such as +cu128
        **{package: _version(package) for package in ("torchvision", "lightning", "timm")},
        "device": f"{trainer.world_size} x {name}",
        "precision": str(trainer.precision),
    }


@cache
def commit() -> str:
    """The commit of the code, followed by "(modified)" if files differ from it; "unknown" outside a repository."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return "unknown"  # a copy of the code within another repository
        return git("rev-parse", "HEAD") + (" (modified)" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _parameters(module: nn.Module) -> list[tuple[str, ...]]:
    rows = [
        (name, f"{sum(p.numel() for p in child.parameters()):,}", f"{_trainable(child):,}")
        for name, child in module.named_children()
        if any(True for _ in child.parameters())
    ]
    return [*rows, ("all", f"{sum(p.numel() for p in module.parameters()):,}", f"{_trainable(module):,}")]


def _trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    lines = [header, tuple("---" for _ in header), *rows]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | type(None)) else str(value)
