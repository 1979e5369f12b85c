"""`make resume`: continue a run from its last checkpoint, or extend it with a new length."""

from __future__ import annotations

from collections.abc import Sequence

from src import configuration, runs
from src.checkpoint_io import load_checkpoint
from src.errors import UserError
from src.train import fit


def main(argv: Sequence[str]) -> int:
    paths = [word.removeprefix("run=") for word in argv if word.startswith("run=")]
    if len(paths) != 1 or not paths[0]:
        raise UserError("name a run: make resume RUN=runs/<experiment>/<name>")
    run = runs.find(paths[0])
    config = configuration.apply(run.config(), [word for word in argv if not word.startswith("run=")])
    if runs.inherited() is not None:  # started by process 0, which has checked and stored everything
        return fit(config, run, resume=run.last)
    if not run.last.exists():
        raise UserError(f"{run.title} has no checkpoint to continue from: start a new run under another NAME=")
    with runs.locked(run):
        _check_unfinished(run, config)
        runs.adopt(run)
        try:
            runs.store(run, config)
        except OSError as problem:
            raise UserError(f"{run.title} cannot be written: {problem.strerror or problem}") from problem
        return fit(config, run, resume=run.last)


def _check_unfinished(run: runs.Run, config: configuration.DictConfig) -> None:
    progress = load_checkpoint(run.last)
    epochs = progress["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    by_steps = 0 <= config.trainer.max_steps <= progress["global_step"]
    if by_steps or (config.trainer.max_epochs is not None and 0 <= config.trainer.max_epochs <= epochs):
        raise UserError(
            f"{run.title} is finished ({epochs} epochs, {progress['global_step']} steps); to extend it give a new "
            f'length: make resume RUN={run.title} ARGS="trainer.max_epochs={2 * max(1, epochs)}"'
        )


if __name__ == "__main__":
    configuration.run_main(main)
