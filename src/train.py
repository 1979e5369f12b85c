"""`make train`: compose, decide the run's identity, instantiate, fit, say what came of it."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from src import configuration, runs
from src.callbacks.batch_check import batch_type_of
from src.callbacks.data_health import TooManyBadSamples
from src.callbacks.ema_teacher import EMATeacher
from src.callbacks.last_validation import LastValidation
from src.callbacks.nan_guard import NonFiniteLoss
from src.callbacks.recipe_card import RecipeCard
from src.callbacks.stop_on_signal import Preempted
from src.checkpoint_io import AtomicCheckpointIO, CheckpointError
from src.datamodules.batches.base import BatchError
from src.datamodules.decoding import BadSample
from src.errors import SettingError, UserError
from src.evaluation.errors import BadFeatures
from src.listing import print_experiments
from src.models.pretrain_module import PretrainModule
from src.sync_batchnorm import SyncBatchNormPlugin
from src.trained import without_source

# stop a run with their message alone: the trace would say nothing more
STOPPING = (NonFiniteLoss, TooManyBadSamples, CheckpointError, BatchError, BadSample, BadFeatures)
PREEMPTED = 143


def main(argv: Sequence[str]) -> int:
    if not any(argument.startswith("experiment=") for argument in argv):
        print_experiments()
        return 0
    config = compose(argv)
    run = runs.create(config)
    return fit(config, run)


def compose(argv: Sequence[str]) -> DictConfig:
    """The configuration of a new run, with everything that depends on this machine settled."""
    composed = configuration.composition("train", argv)
    config = composed.config
    config.run.replaced = replaced_by_scale(composed)
    # of several the last counts, as it does for everything else
    config.run.experiment = [word for word in argv if word.startswith("experiment=")][-1].removeprefix("experiment=")
    if config.trainer.precision == "auto":
        config.trainer.precision = configuration.default_precision()
    configuration.check_complete(config)
    return config


def fit(config: DictConfig, run: runs.Run, *, resume: Path | None = None) -> int:
    """Train as ``config`` says, in ``run``'s folder, from the start or from the checkpoint ``resume``.

    Returns:
        The exit code: 0, 1 where training had to stop, 143 after SIGTERM.

    Raises:
        UserError: the parts do not fit together.
    """
    quieten()
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(config.seed)
    datamodule = configuration.instantiate(config.data)
    module = configuration.instantiate((without_source(config) if resume else config).model)
    check_batches(module, datamodule)
    checkpoint_io = AtomicCheckpointIO()
    try:
        trainer: L.Trainer = configuration.instantiate(
            config.trainer,
            callbacks=[
                *(configuration.instantiate(each) for each in config.callbacks.values() if each and "_target_" in each),
                LastValidation(),
                RecipeCard(run.dir, config=plain(config), summary=recipe(config)),
            ],
            logger=[configuration.instantiate(each) for each in config.logger.values() if each],
            plugins=[checkpoint_io, *([SyncBatchNormPlugin()] if config.trainer.sync_batchnorm else [])],
        )
    except (ValueError, L.pytorch.utilities.exceptions.MisconfigurationException) as problem:
        raise UserError(f"in trainer: {problem}") from problem
    check_teachers(module, trainer.callbacks)  # type: ignore[attr-defined]
    announce(config, run, module, resume=resume)
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=resume, weights_only=True)
    except SettingError as problem:
        raise UserError(str(problem)) from problem
    except STOPPING as problem:
        report_error(f"stopped: {problem}")
        return 1
    except Preempted as notice:
        report_error(f"{notice}\ncontinue with: make resume RUN={run.title}")
        return PREEMPTED
    summarize(run, trainer)
    if checkpoint_io.failed:
        report_error(f"the last checkpoint could not be written: {checkpoint_io.failed}")
        return 1
    return 0


_SHORT = {  # what the first panel calls the keys it names; all of them stand in `make config`
    "data.batch_size": "batch",
    "trainer.max_epochs": "epochs",
    "image_size": "image size",
    "backbone.model_name": "backbone",
    "optimizer.algorithm._target_": "optimizer",
    "optimizer.lr": "learning rate",
    "data.train_samples": "training samples",
}


def replaced_by_scale(composed: configuration.Composition) -> list[str]:
    """The values of the recipe that the scale replaced, the best known first: "batch 4096 → 8"."""
    named = [key for key in _SHORT if key in composed.replaced]
    lines = []
    for key in named:
        before, after = composed.replaced[key]
        if key == "optimizer.lr":
            after = f"{composed.config.optimizer.lr:.3g}"
        lines.append(f"{_SHORT[key]} {_shown(before)} → {_shown(after)}")
    rest = len([key for key in composed.replaced if key not in _SHORT and not key.startswith("run.")])
    return [*lines, f"{rest} more"] if rest and lines else lines


def _shown(value: Any) -> str:
    return "all" if value is None else in_words(str(value)).removeprefix("src.optim.")


_LR_RULE = re.compile(r"\$\{(linear_lr|sqrt_lr):([^,]+),\$\{data\.batch_size\},(\d+)\}")


def in_words(written: str) -> str:
    """A rule of the learning rate as a formula: "${linear_lr:1.5e-4,${data.batch_size},256}" is
    "1.5e-4 × batch / 256"."""
    match = _LR_RULE.fullmatch(written)
    if match is None:
        return written.replace("${", "{")
    rule, base, reference = match.groups()
    return f"{base} × batch / {reference}" if rule == "linear_lr" else f"{base} × √(batch / {reference})"


def check_batches(module: L.LightningModule, datamodule: Any) -> None:
    """Refuse a method and data that do not fit, before anything is launched."""
    try:
        needed, made = batch_type_of(module), datamodule.batch_type
    except SettingError as problem:
        raise UserError(str(problem)) from problem
    if needed is not made:
        raise UserError(
            f"{type(module).__name__} trains on {needed.__name__}, but the data makes {made.__name__}: "
            f"data.train_view must be a view that makes {needed.__name__}"
        )


def check_teachers(module: L.LightningModule, callbacks: Sequence[L.Callback]) -> None:
    """Refuses a method with a teacher that no callback moves.

    Raises:
        UserError: there is a teacher and no `EMATeacher`.
    """
    pairs = module.teacher_pairs() if isinstance(module, PretrainModule) else []
    if pairs and not any(isinstance(callback, EMATeacher) for callback in callbacks):
        raise UserError(
            f"{type(module).__name__} has a teacher and nothing moves it: callbacks.teacher must be an EMATeacher"
        )


def recipe(config: DictConfig) -> dict[str, str]:
    """What a reader wants to know first, with the rule behind the learning rate where there is one."""
    said = {
        "paper": config.about.paper,
        "deviations": config.about.deviations,
        "scale": f"{config.run.scale}  (SCALE=paper, smoke or tiny changes it)",
        **({"replaced by it": ", ".join(config.run.replaced)} if config.run.get("replaced") else {}),
        "batch": f"{config.data.batch_size} images an optimizer step, over all processes",
        "precision": str(config.trainer.precision),
    }
    if "lr" in config.optimizer:
        rule = config.optimizer._get_node("lr")._value()
        value = f"{config.optimizer.lr:.3g}"
        said["learning rate"] = value if not isinstance(rule, str) else f"{value} = {in_words(rule)}"
    return said


def plain(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain values, everything resolved."""
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


@rank_zero_only
def announce(config: DictConfig, run: runs.Run, module: L.LightningModule, *, resume: Path | None) -> None:
    """Say what is about to run, and how to change it."""
    lines = Table.grid(padding=(0, 2))
    lines.add_row("run", run.title + (f"  (continued from {resume.name})" if resume else ""))
    for name, value in recipe(config).items():
        lines.add_row(name, value)
    lines.add_row("parameters", f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M")
    Console().print(Panel(lines, title=f"Pretext: {config.run.experiment}", expand=False, border_style="cyan"))


@rank_zero_only
def summarize(run: runs.Run, trainer: L.Trainer) -> None:
    """The closing panel: where the run is, how it did, what to do next."""
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
    reads_clips = trainer.datamodule.input_key == "video"  # type: ignore[attr-defined]  # of which timm has no encoders
    for what, command in (
        ("look", "make tensorboard"),
        ("judge", f"make evaluate RUN={run.title} EVAL=knn,linear"),
        ("go on", f'make resume RUN={run.title} ARGS="trainer.max_epochs={longer}"'),
        ("take away", f"make export RUN={run.title} FORMAT={'hf' if reads_clips else 'timm'}"),
    ):
        # outside of the frame and never broken, so that a line can be copied
        console.print(f"  {what:<10} {command}", soft_wrap=True, highlight=False)


@rank_zero_only
def report_error(message: str) -> None:
    print(f"error: {message}" if not message.startswith("error") else message, file=sys.stderr)


def quieten() -> None:
    """Keep what Lightning says of itself out of the way of what the run says."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*You passed in a `val_dataloader` but have no `validation_step`.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")


if __name__ == "__main__":
    configuration.run_main(main)
