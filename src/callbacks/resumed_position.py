"""Continues a run that is resumed with another batch size or other micro-batches at the sample where it was."""

from __future__ import annotations

import logging
from typing import Any

import lightning as L

from src.checkpoint_io import CheckpointError
from src.datamodules.dataset import LoaderPosition, ResumableLoader, TrainSampler

log = logging.getLogger(__name__)


class ResumedPosition(L.Callback):
    """Converts the position of a resumed run where the batch size or the micro-batches changed: Lightning counts it in
    steps and micro-batches.

    The epoch continues with the sample after the last one that was trained on. ``trainer.global_step`` stays the number
    of steps that the optimizers have taken. Schedules read `schedule_step` instead, the number of steps of the present
    batch size that the same samples would have been: a schedule that was half done is half done after the change.
    """

    def __init__(self) -> None:
        self.surplus = 0  # steps taken, less the steps of the present batch size that the same samples would have been

    def state_dict(self) -> dict[str, int]:
        return {"surplus": self.surplus}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.surplus = state_dict["surplus"]

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """
        Raises:
            CheckpointError: the checkpoint does not say how many samples of its epoch were trained on.
        """
        if trainer.state.fn != "fit":
            return
        loop = checkpoint["loops"]["fit_loop"]
        saved = _saved_position(loop)
        loader = trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        if not isinstance(loader, ResumableLoader):  # of a DataModule that has its own, which Lightning resumes
            return
        if saved is None:
            raise CheckpointError(
                f"{trainer.ckpt_path} does not say how many samples of its epoch were trained on: it was written by "
                "another version, and can be started from with CKPT=, but not be resumed"
            )
        sampler: TrainSampler = loader.sampler  # type: ignore[assignment]
        if saved["batch_size"] != sampler.batch_size or saved["micro_batches"] != sampler.micro_batches:
            convert(loop, saved, sampler)
        if saved["batch_size"] != sampler.batch_size:
            # the callback's own state is restored after this hook
            state = checkpoint["callbacks"].setdefault(self.state_key, self.state_dict())
            before = checkpoint["global_step"] - state["surplus"]
            after = before * saved["batch_size"] // sampler.batch_size
            state["surplus"] = checkpoint["global_step"] - after
            log.warning(
                "resumed with batches of %d samples, %d before: schedules go on as after %d steps of the new size",
                sampler.batch_size,
                saved["batch_size"],
                after,
            )


def schedule_step(trainer: L.Trainer) -> int:
    """Returns the number of optimizer steps done, as schedules count them: in steps of the present batch size."""
    return trainer.global_step - surplus_steps(trainer)


def surplus_steps(trainer: L.Trainer) -> int:
    """Returns the optimizer steps done beyond those that schedules count; negative if they count more."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback.surplus for callback in callbacks if isinstance(callback, ResumedPosition)), 0)


def convert(loop: dict[str, Any], saved: LoaderPosition, sampler: TrainSampler) -> None:
    """Changes the saved state of the fit loop, in place, so that it counts the steps and micro-batches of ``sampler``.

    Args:
        loop: ``checkpoint["loops"]["fit_loop"]``, saved between two optimizer steps.
        saved: the loader's position in it.
        sampler: of the resumed run.
    """
    batches = loop["epoch_loop.batch_progress"]["current"]
    if not batches["ready"]:  # between two epochs
        return
    steps = sampler.steps_before(saved["samples"])
    for counter, count in (
        (batches, steps * sampler.micro_batches),
        (loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["current"], steps),
        (loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["zero_grad"]["current"], steps),
        (loop["epoch_loop.manual_optimization.optim_step_progress"]["current"], steps),
    ):
        counter.update({key: count for key, done in counter.items() if done})


def _saved_position(loop: dict[str, Any]) -> LoaderPosition | None:
    states: list[Any] = loop["state_dict"].get("combined_loader") or [None]
    state: LoaderPosition | None = states[0]
    return state if isinstance(state, dict) and "samples" in state else None
