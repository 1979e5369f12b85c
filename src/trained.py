"""What a run has learned, put back into its method: the ground under `make evaluate` and `make export`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig

from src import configuration, runs
from src.checkpoint_io import CheckpointError, load_checkpoint
from src.errors import UserError
from src.models.pretrain_module import PretrainModule


def words_of(argv: Sequence[str], keys: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """A command's own ``key=value`` words, and the rest."""
    own, rest = {}, []
    for word in argv:
        key, equals, value = word.partition("=")
        if equals and key in keys:
            own[key] = value
        else:
            rest.append(word)
    return own, rest


def run_of(words: Mapping[str, str], command: str) -> runs.Run:
    """The run that the word ``run=`` names.

    Raises:
        UserError: it names none.
    """
    if not words.get("run"):
        raise UserError(f"say which run: {command} RUN=runs/<experiment>/<name>")
    return runs.find(words["run"])


def checkpoint_of(run: runs.Run, word: str | None) -> Path:
    """The checkpoint meant by "best", "last" or a path; without a word the best there is, else the last.

    Raises:
        UserError: there is no such file.
    """
    if word is None:
        return run.checkpoint()
    path = {"best": run.best, "last": run.last}.get(word, Path(word))
    if not path.is_file():
        there = [name for name, file in (("best", run.best), ("last", run.last)) if file.is_file()]
        raise UserError(f"{run.title} has no checkpoint '{word}'; there are: {', '.join(there) or 'none'}")
    return path


def load(config: DictConfig, checkpoint: Path) -> PretrainModule:
    """The method of ``config`` with the weights of ``checkpoint``, in evaluation mode, on the CPU.

    Raises:
        UserError: the file is not a plain checkpoint, or one of another method.
    """
    module = fresh(config)
    try:
        content = load_checkpoint(checkpoint)
        module.on_load_checkpoint(content)
        module.load_state_dict(content["state_dict"])
    except CheckpointError as problem:
        raise UserError(str(problem)) from problem
    except (RuntimeError, KeyError) as problem:
        reason = " ".join(str(problem).split())[:400]
        raise UserError(f"{checkpoint} does not fit the run's configuration: {reason}") from problem
    return module.eval()


def fresh(config: DictConfig) -> PretrainModule:
    """The method of ``config`` as it was before its first step, had nothing been loaded into it."""
    torch.manual_seed(config.seed)
    return configuration.instantiate(without_source(config).model).eval()


def without_source(config: DictConfig) -> DictConfig:
    """The configuration of a run whose weights are its own by now: what it started from may be gone, or far away."""
    config = config.copy()
    config.checkpoint = None
    if "text_checkpoint" in config:
        config.text_checkpoint = None
    if config.get("backbone") is not None and "pretrained" in config.backbone:
        config.backbone.pretrained = False
    return config
