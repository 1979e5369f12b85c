"""The tasks of the gauntlet: evaluations of frozen encoders, and experiments that train on them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from src import runs
from src.errors import UserError, nearest
from src.evaluation.evaluation import joined_needs, value_of
from src.evaluation_config import evaluation_of
from src.finetuning import FineTuning
from src.measure.result_cache import fingerprint
from src.trained import RunSubject

RANDOM = "random"


@dataclass
class GauntletEntry:
    """The first encoder of a run on one data set, trained or as it was before training.

    Args:
        run: its folder.
        config: of the run, with the data it is evaluated on, see `evaluation_config`.
        data: name of that data.
        checkpoint: its weights; None for the untrained encoder.
        frozen: names of the evaluations that will be run, so that the data is read once for all of them.
        folder: for fine-tuned runs.
        overrides: of the recipes of fine-tuning.
    """

    run: runs.Run
    config: DictConfig
    data: str
    checkpoint: Path | None
    frozen: Sequence[str]
    folder: Path
    overrides: Sequence[str] = ()

    @property
    def experiment(self) -> str:
        return str(self.config.run.experiment)

    @property
    def title(self) -> str:
        """Such as "mae_tiny/first", or "random mae_tiny/first"."""
        name = f"{self.experiment}/{self.run.dir.name}"
        return name if self.checkpoint is not None else f"{RANDOM} {name}"

    @cached_property
    def weights(self) -> str:
        """A hash of the checkpoint, or of the untrained encoder, which several methods may have in common."""
        if self.checkpoint is None:
            return hash_of(self.encoder)
        with self.checkpoint.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()[:16]

    @property
    def feature_config(self) -> DictConfig:
        """The part of the configuration that frozen features depend on, besides the weights."""
        content: Any = OmegaConf.to_container(self.config, resolve=False)
        if self.checkpoint is None:
            return OmegaConf.create({key: content[key] for key in ("image_size", "data")})
        return OmegaConf.create({key: value for key, value in content.items() if key not in ("evaluate", "evaluation")})

    @cached_property
    def recipe(self) -> str:
        """A fingerprint that runs of one recipe share, whatever their seed; of an untrained encoder, that of its
        architecture."""
        content: Any = OmegaConf.to_container(self.run.config(), resolve=False)
        if self.checkpoint is None:
            content = {key: content.get(key) for key in ("backbone", "image_size")}
        return fingerprint(OmegaConf.create({key: value for key, value in content.items() if key != "seed"}))

    @cached_property
    def sample_fingerprint(self) -> str:
        """A fingerprint of the samples, which must be the same for all in a setting; resolution and normalization are
        each encoder's own."""
        settings = {key: self.config.evaluate[key] for key in ("split", "bank_samples", "query_samples")}
        return samples_of(self.config.data, settings)

    @property
    def identity(self) -> str:
        """The same for the same encoder, whatever run it comes from."""
        return f"{RANDOM} {self.weights}" if self.checkpoint is None else self.title

    @property
    def encoder(self) -> nn.Module:
        return next(iter(self.subject.encoders.values()))

    @cached_property
    def subject(self) -> RunSubject:
        """The first encoder as the subject of evaluations, which share its features."""
        subject = RunSubject.configured(self.config, self.checkpoint).only()
        subject.needs = joined_needs([evaluation_of(self.config, name) for name in self.frozen])
        return subject

    def forget(self) -> None:
        """Frees weights and features."""
        self.__dict__.pop("subject", None)


class Task(Protocol):
    """Computes one number of an entry. A task leaves encoders frozen or fine-tunes them, so that the two never share a
    setting."""

    metric: str
    kind: str  # of task, such as "classification", by which settings are grouped
    lower_is_better: bool
    data: str | None  # the name of the task's own data; None for the entry's

    @property
    def adaptation(self) -> str: ...

    def sample_fingerprint(self, entry: GauntletEntry) -> str:
        """Returns a fingerprint, equal for two entries that are evaluated on the same samples."""
        ...

    def recipe(self, entry: GauntletEntry) -> tuple[DictConfig, Any]:
        """Returns everything that decides the number: a configuration and further values.

        Raises:
            UserError: the task does not apply.
        """
        ...

    def __call__(self, entry: GauntletEntry) -> float:
        """
        Raises:
            UserError: the task does not apply, or the number is not finite.
        """
        ...


@dataclass(frozen=True)
class Frozen:
    """A number of an evaluation.

    Args:
        evaluation: its name in configs/evaluation.
        metric: the number.
        kind, data: see `Task`.
        lower_is_better: the metric is an error.
    """

    evaluation: str
    metric: str
    kind: str
    lower_is_better: bool = False
    data: str | None = None

    adaptation: ClassVar[str] = "frozen"

    def recipe(self, entry: GauntletEntry) -> tuple[DictConfig, Any]:
        evaluations: Mapping[str, Any] = entry.config.evaluation
        if self.evaluation not in evaluations:
            raise UserError(f"there is no evaluation '{self.evaluation}'{nearest(self.evaluation, list(evaluations))}")
        settings = {key: entry.config.evaluate[key] for key in ("split", "bank_samples", "query_samples")}
        settings |= {"evaluation": OmegaConf.to_container(evaluations[self.evaluation], resolve=True)}
        return entry.feature_config, [asdict(self), settings, entry.weights]

    def sample_fingerprint(self, entry: GauntletEntry) -> str:
        if self.data is None:
            return entry.sample_fingerprint
        evaluation = OmegaConf.to_container(entry.config.evaluation[self.evaluation], resolve=False)
        return fingerprint(OmegaConf.create({"evaluation": evaluation, "split": entry.config.evaluate.split}))

    def __call__(self, entry: GauntletEntry) -> float:
        return value_of(evaluation_of(entry.config, self.evaluation)(entry.subject), self.metric)


@dataclass(frozen=True)
class FineTuned:
    """The last value that an experiment logs which starts from the encoder; the untrained one starts from random
    weights.

    Args:
        experiment: trained with the entry's backbone and data, at its scale.
        metric: such as ``eval/top1``.
        kind, data: see `Task`.
        lower_is_better: the metric is an error.
        own_data: keys of ``data`` that are the experiment's own, besides those of its method: ``source`` and
            ``eval_view``, if the experiment has data of its own, which ``data`` then names.
        overrides: of the experiment.
    """

    experiment: str
    metric: str
    kind: str
    lower_is_better: bool = False
    data: str | None = None
    own_data: Sequence[str] = ()
    overrides: Sequence[str] = field(default_factory=list)

    adaptation: ClassVar[str] = "fine-tuned"

    def recipe(self, entry: GauntletEntry) -> tuple[DictConfig, Any]:
        config = self._config(entry)
        config.checkpoint = None  # the hash of the weights counts, not their path
        return config, [asdict(self), entry.weights]

    def sample_fingerprint(self, entry: GauntletEntry) -> str:
        return samples_of(self._config(entry).data, {})

    def __call__(self, entry: GauntletEntry) -> float:
        name = "_".join([self.experiment, entry.title, self.data or entry.data])
        folder = runs.unused(entry.folder, re.sub(r"[/ ]", "_", name))
        return value_of(self._finetuning(entry, folder)(entry.subject), self.metric)

    def _finetuning(self, entry: GauntletEntry, folder: Path | None = None) -> FineTuning:
        return FineTuning(self.experiment, [*self.overrides, *entry.overrides], self.own_data, folder)

    def _config(self, entry: GauntletEntry) -> DictConfig:
        return self._finetuning(entry).recipe(entry.config, entry.checkpoint, split=entry.config.evaluate.split)


@dataclass(frozen=True)
class FrozenHeadTask(FineTuned):
    """The same for an experiment that keeps the encoder frozen and trains a head on it."""

    adaptation: ClassVar[str] = "frozen"


@dataclass(frozen=True)
class TaskRun:
    """A task of an entry, see `result_cache.Measurable`. The configuration is composed once.

    Raises:
        UserError: the task does not apply.
    """

    name: str
    task: Task
    entry: GauntletEntry

    def __post_init__(self) -> None:
        self._recipe  # noqa: B018  raises if the task does not apply

    @cached_property
    def _recipe(self) -> tuple[DictConfig, Any]:
        return self.task.recipe(self.entry)

    @cached_property
    def sample_fingerprint(self) -> str:
        return self.task.sample_fingerprint(self.entry)

    @property
    def extra(self) -> Any:
        return self._recipe[1]

    def config(self) -> DictConfig:
        return self._recipe[0]

    @property
    def setting(self) -> str:
        return f"{self.name}/{self.task.data or self.entry.data}"

    @property
    def key(self) -> str:
        return f"{self.entry.identity} {self.setting}"

    def facts(self) -> dict[str, Any]:
        """Returns all columns of the table except the number itself."""
        return {
            "setting": self.setting,
            "metric": self.task.metric,
            "seed": int(self.entry.config.seed),
            "run": self.entry.title,
            "experiment": self.entry.experiment,
            "trained": self.entry.checkpoint is not None,
            "made_by": self.entry.recipe,
            "kind": self.task.kind,
            "adaptation": self.task.adaptation,
            "lower_is_better": self.task.lower_is_better,
            "judged_on": self.sample_fingerprint,
        }


def hash_of(encoder: nn.Module) -> str:
    """Returns a hash of the weights and of the pooling that makes an embedding of them."""
    pool = getattr(encoder, "pool", None)
    while isinstance(pool, partial):
        pool = pool.func
    digest = hashlib.blake2b(f"{type(encoder)} {getattr(pool, '__qualname__', type(pool))}".encode(), digest_size=8)
    for name, value in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def samples_of(data: DictConfig, settings: Mapping[str, Any]) -> str:
    """Returns a fingerprint of the samples, whatever their folder and resolution."""
    content: Any = OmegaConf.to_container(data, resolve=False)
    source = {key: value for key, value in content["source"].items() if key not in ("cache_dir", "root", "resolution")}
    limits = {key: content.get(key) for key in ("train_samples", "eval_samples")}
    limits |= {key: content[key] for key in ("eval_split",) if key in content}  # absent means val, in older results too
    return fingerprint(OmegaConf.create({"source": source, **limits, **settings}))
