"""`make train`: compose the configuration, create the run's folder, build the parts, train, print the results."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from src import configuration, panels, runs
from src.callbacks.batch_check import batch_type_of
from src.callbacks.checkpoints import NonFiniteWeights
from src.callbacks.data_health import TooManyBadSamples
from src.callbacks.ema_teacher import EMATeacher
from src.callbacks.last_validation import LastValidation
from src.callbacks.nan_guard import NonFiniteLoss
from src.callbacks.recipe_card import RecipeCard
from src.callbacks.resumed_position import ResumedPosition
from src.callbacks.stop_on_signal import Preempted, StopOnSignal
from src.checkpoint_io import AtomicCheckpointIO, CheckpointError
from src.datamodules.batches.base import BatchError
from src.datamodules.decoding import BadSample
from src.errors import UserError
from src.evaluation.errors import BadFeatures
from src.listing import print_experiments
from src.loggers import ResumedLogger
from src.models.pretrain_module import PretrainModule
from src.sync_batchnorm import SyncBatchNormPlugin
from src.trained import started, without_source

# these end a run with their message alone: a trace would not help
STOPPING = (
    NonFiniteLoss,
    NonFiniteWeights,
    TooManyBadSamples,
    CheckpointError,
    BatchError,
    BadSample,
    BadFeatures,
)


def main(argv: Sequence[str]) -> int:
    if not any(argument.startswith("experiment=") for argument in argv):
        print_experiments()
        return 0
    config = compose(argv)
    run = runs.create(config)
    try:
        return fit(config, run)
    except UserError:
        if runs.inherited() is None:
            runs.discard(run)  # so that its name is free for the corrected command
        raise


def compose(argv: Sequence[str]) -> DictConfig:
    """Returns the configuration of a new run, with everything decided that depends on this machine."""
    composed = configuration.composition("train", argv)
    config = composed.config
    for section in ("paths", "data", "model", "optimizer", "schedules", "trainer", "callbacks", "logger"):
        if not isinstance(config[section], DictConfig):
            raise UserError(f"{section} cannot be null: a run needs it")
    if not isinstance(config.paths.runs, str) or not config.paths.runs:
        raise UserError(f"paths.runs={config.paths.runs} must be a folder")
    config.run.replaced = panels.replaced_by_scale(composed)
    # the last of several wins, as for every other override
    config.run.experiment = [word for word in argv if word.startswith("experiment=")][-1].removeprefix("experiment=")
    if config.trainer.precision == "auto":
        config.trainer.precision = configuration.default_precision()
    configuration.check_complete(config)
    if not isinstance(config.seed, int) or not 0 <= config.seed < 2**32:
        raise UserError(f"seed={config.seed} must be a whole number from 0 to {2**32 - 1}")
    if not isinstance(config.checkpoint, str | None):
        raise UserError(f"CKPT={config.checkpoint} must be a run's folder or a file")
    return config


def fit(config: DictConfig, run: runs.Run, *, resume: Path | None = None) -> int:
    """Trains the configuration in the run's folder, from the start or from the checkpoint ``resume``.

    Returns:
        The exit code: 0, 1 if training had to stop, 128 + the signal's number after a signal (143 for SIGTERM, 130 for
        Ctrl-C).

    Raises:
        UserError: the parts do not fit together, or another process trains this run.
    """
    callbacks = build_each(config, "callbacks")
    stop = next((callback for callback in callbacks if isinstance(callback, StopOnSignal)), None)
    with runs.locked(run), children_ended(), stop.before_training() if stop else nullcontext():
        try:
            return _fit(config, run, callbacks, resume)
        except Preempted as notice:
            return _stopped(notice, run)


def _fit(config: DictConfig, run: runs.Run, callbacks: list[L.Callback], resume: Path | None) -> int:
    quieten()
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(config.seed)
    datamodule = configuration.instantiate(config.data)
    if resume:
        module, start = configuration.instantiate(without_source(config).model), None
    else:
        module, start = started(config, datamodule)
    check_batches(module, datamodule)
    checkpoint_io = AtomicCheckpointIO()
    try:
        trainer: L.Trainer = configuration.instantiate(
            config.trainer,
            callbacks=[
                *callbacks,
                LastValidation(),
                ResumedPosition(),
                RecipeCard(run.dir, config=plain(config), summary=panels.recipe_rows(config, start)),
            ],
            logger=build_each(config, "logger"),
            plugins=[checkpoint_io, *([SyncBatchNormPlugin()] if config.trainer.sync_batchnorm else [])],
        )
    except (ValueError, L.pytorch.utilities.exceptions.MisconfigurationException) as problem:
        raise UserError(f"in trainer: {problem}") from problem
    check_processes(trainer)
    check_teachers(module, trainer.callbacks)  # type: ignore[attr-defined]
    panels.announce(config, run, module, start=start, resume=resume)
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=resume, weights_only=True)
    except STOPPING as problem:
        report_error(f"stopped: {problem}")
        return 1
    except Preempted as notice:
        if notice.step is None and trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGTERM)  # the processes it has started wait for this one
        raise
    panels.summarize(run, trainer)
    unwritten = [f"the last checkpoint could not be written: {checkpoint_io.failed}"] if checkpoint_io.failed else []
    for logger in trainer.loggers:
        if isinstance(logger, ResumedLogger) and logger.failed:
            unwritten.append(f"the last values could not be written: {logger.failed}")
    for message in unwritten:
        report_error(message)
    return 1 if unwritten else 0


def _stopped(notice: Preempted, run: runs.Run) -> int:
    """Says how a run that a signal stopped goes on, and returns its exit code."""
    if run.last.exists():
        report_error(f"{notice}\ncontinue with: make resume RUN={run.title}")
    else:
        report_error(f"{notice}; nothing was trained, so start it again")
    if runs.inherited() is not None:
        return 0  # Lightning kills process 0 when one that it has started ends with another code
    runs.discard(run)
    return int(notice.code or 0)


@contextmanager
def children_ended() -> Iterator[None]:
    """Kills the processes that were started meanwhile and are left, such as a loader's worker that hangs: Python would
    wait for it for ever."""
    before = set(multiprocessing.active_children())
    try:
        yield
    finally:
        for child in set(multiprocessing.active_children()) - before:
            with suppress(RuntimeError):  # torch's message that a worker was killed
                child.kill()
                child.join()


def build_each(config: DictConfig, section: str) -> list[Any]:
    """Builds the parts of a section, such as ``callbacks``; those that are null are switched off.

    Raises:
        UserError: a part names no class.
    """
    parts = {name: part for name, part in config[section].items() if part}
    for name, part in parts.items():
        if not isinstance(part, DictConfig) or "_target_" not in part:
            raise UserError(
                f"{section}.{name} has no _target_, so it would do nothing: name its class, or set it to null"
            )
    return [configuration.instantiate(part) for part in parts.values()]


def check_batches(module: L.LightningModule, datamodule: Any) -> None:
    """Checks that the data makes the batches the method needs, before any process is started.

    Raises:
        UserError: it does not.
    """
    needed, made = batch_type_of(module), datamodule.batch_type
    if needed is not made:
        raise UserError(
            f"{type(module).__name__} trains on {needed.__name__}, but the data makes {made.__name__}: "
            f"data.train_view must be a view that makes {needed.__name__}"
        )


def check_processes(trainer: L.Trainer) -> None:
    """Refuses far more processes than there are cores, each of which needs about a gigabyte, before they are started.

    Raises:
        UserError: there are more than eight to a core.
    """
    cores = os.cpu_count() or 1
    if trainer.strategy.root_device.type == "cpu" and trainer.num_devices > 8 * cores:
        raise UserError(f"DEVICES={trainer.num_devices}: this machine has {cores} cores and no GPU")


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


def plain(config: DictConfig) -> dict[str, Any]:
    """Returns the configuration as plain values, resolved."""
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


@rank_zero_only
def report_error(message: str) -> None:
    print(f"error: {message}" if not message.startswith("error") else message, file=sys.stderr)


def quieten() -> None:
    """Hides Lightning's messages about itself."""
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
