"""Trained runs: their checkpoints, and their methods with the trained weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from pydantic import PositiveInt

from src import configuration, runs
from src.checkpoint_io import load_checkpoint
from src.datamodules.datamodule import DataModule
from src.datamodules.sources.source import Split
from src.errors import UserError
from src.evaluation.subject import Subject
from src.models.backbones.weights import Weights, WeightsError, grid_of, read_weights
from src.models.image_text.base import ImageTextModule, has_towers
from src.models.pretrain_module import PretrainModule
from src.value_types import check_value


class RunSubject(Subject):
    """A run as the `Subject` of evaluations. Weights and data are loaded when an evaluation needs them.

    Args:
        config: of the run.
        checkpoint: its weights; None for those before the first step, the random baseline.
        split, bank_samples, query_samples, logged: see `Subject`.
    """

    def __init__(
        self,
        config: DictConfig,
        checkpoint: Path | None,
        *,
        split: Split = "val",
        bank_samples: int | None = None,
        query_samples: int | None = None,
        logged: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(None, None, split=split, bank_samples=bank_samples, query_samples=query_samples, logged=logged)
        self.config = config
        self.checkpoint = checkpoint

    @classmethod
    def configured(cls, config: DictConfig, checkpoint: Path | None) -> RunSubject:
        """Returns a run with the split and the limits of ``config.evaluate``, see `evaluation_config`.

        Raises:
            UserError: they are none.
        """
        samples = PositiveInt | None
        hints: dict[str, Any] = {"split": Split, "bank_samples": samples, "query_samples": samples}
        for name, hint in hints.items():
            check_value(f"evaluate.{name}", config.evaluate[name], hint)
        return cls(config, checkpoint, **{name: config.evaluate[name] for name in hints})

    @cached_property
    def device(self) -> torch.device:
        return device_of(self.config)

    @cached_property
    def precision(self) -> str:
        return precision_of(self.config, self.device)

    @cached_property
    def module(self) -> PretrainModule:
        module = fresh(self.config) if self.checkpoint is None else load(self.config, self.checkpoint)
        return module.to(self.device)

    @cached_property
    def datamodule(self) -> DataModule:
        datamodule: DataModule = configuration.instantiate(self.config.data)
        datamodule.prepare_data()
        return datamodule


def split_arguments(argv: Sequence[str], keys: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Splits a command line into the command's own ``key=value`` arguments and all others."""
    arguments, others = {}, []
    for argument in argv:
        key, equals, value = argument.partition("=")
        if equals and key in keys:
            arguments[key] = value
        else:
            others.append(argument)
    return arguments, others


def run_of(arguments: Mapping[str, str], command: str) -> runs.Run:
    """Returns the run that the argument ``run=`` names.

    Raises:
        UserError: there is none.
    """
    if not arguments.get("run"):
        raise UserError(f"missing value: run; type {command} RUN=runs/<experiment>/<name>")
    return runs.find(arguments["run"])


def checkpoint_of(run: runs.Run, name: str | None) -> Path:
    """Returns the checkpoint called "best" or "last", or at a path; for None the best one, else the last.

    Raises:
        UserError: there is no such file.
    """
    if name is None:
        return run.checkpoint()
    path = {"best": run.best, "last": run.last}.get(name, Path(name))
    if not path.is_file():
        existing = [key for key, file in (("best", run.best), ("last", run.last)) if file.is_file()]
        raise UserError(f"{run.title} has no checkpoint '{name}'; there are: {', '.join(existing) or 'none'}")
    return path


def load(config: DictConfig, checkpoint: Path) -> PretrainModule:
    """Returns the method of ``config`` with the weights of ``checkpoint``, in evaluation mode, on the CPU.

    Raises:
        UserError: the file is not a plain checkpoint, or belongs to another method.
    """
    module = fresh(config)
    try:
        content = load_checkpoint(checkpoint)
        module.on_load_checkpoint(content)
        module.load_state_dict(content["state_dict"])
    except (RuntimeError, KeyError) as problem:
        reason = " ".join(str(problem).split())[:400]
        raise UserError(f"{checkpoint} does not fit the run's configuration: {reason}") from problem
    return module.eval()


def fresh(config: DictConfig) -> PretrainModule:
    """Returns the method of ``config`` with the random weights its training would start from if nothing was loaded."""
    torch.manual_seed(config.seed)
    return configuration.instantiate(without_source(config).model).eval()


def started(config: DictConfig, datamodule: DataModule | None = None) -> tuple[PretrainModule, str | None]:
    """Builds the method of ``config`` for a new run, with the weights that it starts from: those of ``checkpoint``, or
    timm's (``backbone.pretrained``).

    Args:
        config: of the run.
        datamodule: its data; where the towers of a run are loaded it takes the tokenizer of that run, whose ids they
            know, unless a tokenizer is named.

    Returns:
        The method, and one line that says what was loaded; None for random weights.

    Raises:
        UserError: the weights cannot be read or do not fit the method, or two starts are named.
    """
    config = config.copy()
    pretrained = bool(config.get("backbone") and config.backbone.get("pretrained"))
    if pretrained:
        config.backbone.pretrained = False  # loaded below, because some methods initialize their backbone anew
    module = configuration.instantiate(config.model)
    try:
        weights = _start_of(config, pretrained=pretrained)
        if weights is None:
            return module, None
        if not isinstance(module, PretrainModule):
            raise WeightsError(f"{type(module).__name__} has no encoders to load weights into")
        line = module.load_start(weights)
    except WeightsError as problem:
        raise UserError(f"checkpoint: {problem}") from problem
    if isinstance(module, ImageTextModule) and has_towers(weights) and isinstance(datamodule, DataModule):
        settings = datamodule.tokenizer_settings
        if settings.name is None and settings.other_run is None:
            datamodule.tokenizer_settings = replace(settings, other_run=Path(config.checkpoint))
    return module, line


def _start_of(config: DictConfig, *, pretrained: bool) -> Weights | None:
    checkpoint = config.get("checkpoint")
    named = {key: config.get(f"checkpoint_{key}") for key in ("encoder", "prefix")}
    if checkpoint is None:
        for key, value in named.items():
            if value is not None:
                raise UserError(f"checkpoint_{key}={value}: there is no checkpoint to start from; name it: checkpoint=")
        if not pretrained:
            return None
        backbone = configuration.instantiate(config.backbone, pretrained=True)
        return Weights(backbone.state_dict(), f"timm's {config.backbone.model_name}", "", grid_of(backbone))
    if pretrained:
        raise UserError(
            f"checkpoint={checkpoint} and backbone.pretrained=true: training starts from one of them; leave one out"
        )
    return read_weights(checkpoint, **named)


def without_source(config: DictConfig) -> DictConfig:
    """Returns the configuration without the weights it starts from, which a trained run no longer needs and which may
    be gone."""
    config = config.copy()
    for key in ("checkpoint", "checkpoint_encoder", "checkpoint_prefix"):
        if key in config:
            config[key] = None
    if "text_checkpoint" in config:
        config.text_checkpoint = None
    if config.get("backbone") is not None and "pretrained" in config.backbone:
        config.backbone.pretrained = False
    return config


def device_of(config: DictConfig) -> torch.device:
    """Returns the device of ``trainer.accelerator``, or of what is there for "auto"."""
    accelerator = config.trainer.accelerator
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def precision_of(config: DictConfig, device: torch.device) -> str:
    """Returns the precision the run was trained in, which online evaluation uses, or float32 if the device does not
    have it."""
    precision = str(config.trainer.precision)
    if precision == "auto":
        precision = configuration.default_precision()
    return "32-true" if precision == "16-mixed" and device.type == "cpu" else precision
