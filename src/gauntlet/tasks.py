"""What encoders are put through: frozen under the evaluations of `make evaluate`, and fine-tuned by an experiment."""

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

from src import evaluate, runs, trained
from src.errors import UserError, nearest
from src.measure.result_cache import fingerprint

RANDOM = "random"


@dataclass
class GauntletEntry:
    """An encoder on one data set: a run's first, or the same one as it was before its training.

    Args:
        run: its folder.
        config: of the run, with the evaluation's part and the data it is judged on, see `evaluate.settle`.
        data: what that data is called.
        checkpoint: its weights; None for the untrained one.
        frozen: the evaluations that may be asked for, so that the data is read once for all of them.
        folder: where fine-tuned runs go.
        overrides: of the fine-tuning's recipes.
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
        """A hash of the checkpoint, or of the untrained encoder, which several methods may begin with."""
        if self.checkpoint is None:
            return hash_of(self.encoder)
        with self.checkpoint.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()[:16]

    @property
    def decides(self) -> DictConfig:
        """What of the configuration its frozen features depend on, besides its weights."""
        content: Any = OmegaConf.to_container(self.config, resolve=False)
        if self.checkpoint is None:
            return OmegaConf.create({key: content[key] for key in ("image_size", "data")})
        return OmegaConf.create({key: value for key, value in content.items() if key != "evaluate"})

    @cached_property
    def recipe(self) -> str:
        """What runs that differ by their seed alone have in common; of the untrained, what makes the encoder."""
        content: Any = OmegaConf.to_container(self.run.config(), resolve=False)
        if self.checkpoint is None:
            content = {key: content.get(key) for key in ("backbone", "image_size")}
        return fingerprint(OmegaConf.create({key: value for key, value in content.items() if key != "seed"}))

    @cached_property
    def judged_on(self) -> str:
        """What has to be the same for all in a setting; resolution and normalization are each encoder's own."""
        settings = {key: self.config.evaluate[key] for key in ("split", "bank_samples", "query_samples")}
        return samples_of(self.config.data, settings)

    @property
    def identity(self) -> str:
        """What is the same encoder, whatever run it is taken from."""
        return f"{RANDOM} {self.weights}" if self.checkpoint is None else self.title

    @cached_property
    def encoder(self) -> nn.Module:
        module = trained.fresh(self.config) if self.checkpoint is None else trained.load(self.config, self.checkpoint)
        return next(iter(module.encoders().values()))

    @cached_property
    def judged(self) -> evaluate.EncoderEvaluator:
        return evaluate.EncoderEvaluator(self.config, {"encoder": self.encoder}, self.frozen)

    def forget(self) -> None:
        """Weights and features, which the next contender needs the room of."""
        for name in ("encoder", "judged"):
            self.__dict__.pop(name, None)


class Task(Protocol):
    """One number of a contender. Frozen and fine-tuned encoders never share a setting: a task is one or the other."""

    metric: str
    kind: str  # what several tasks have in common, such as "classification"
    lower_is_better: bool
    data: str | None  # what its own data is called, if it does not judge on the contender's

    @property
    def adaptation(self) -> str: ...

    def judged_on(self, contender: GauntletEntry) -> str:
        """Equal where two contenders are judged on the same samples."""
        ...

    def recipe(self, contender: GauntletEntry) -> tuple[DictConfig, Any]:
        """Everything that decides the number: a configuration and what else. Raises UserError where the task does not
        apply."""
        ...

    def __call__(self, contender: GauntletEntry) -> float:
        """Raises UserError where the data has not what is needed."""
        ...


@dataclass(frozen=True)
class Frozen:
    """A number of an evaluation.

    Args:
        evaluation: its name in `make evaluate`'s EVAL=, of those in configs/evaluate.yaml.
        metric: which of its numbers.
        kind, data: see `Task`.
        lower_is_better: the metric is an error.
    """

    evaluation: str
    metric: str
    kind: str
    lower_is_better: bool = False
    data: str | None = None

    adaptation: ClassVar[str] = "frozen"

    def recipe(self, contender: GauntletEntry) -> tuple[DictConfig, Any]:
        settings = contender.config.evaluate
        known: Mapping[str, Any] = {**settings.evaluators, **settings.encoders}
        if self.evaluation not in known:
            raise UserError(f"there is no evaluation '{self.evaluation}'{nearest(self.evaluation, list(known))}")
        own = {key: settings[key] for key in ("split", "bank_samples", "query_samples")}
        own = own | {"evaluation": OmegaConf.to_container(known[self.evaluation], resolve=True)}
        return contender.decides, [asdict(self), own, contender.weights]

    def judged_on(self, contender: GauntletEntry) -> str:
        if self.data is None:
            return contender.judged_on
        evaluation = OmegaConf.to_container(contender.config.evaluate.encoders[self.evaluation], resolve=False)
        return fingerprint(OmegaConf.create({"evaluation": evaluation, "split": contender.config.evaluate.split}))

    def __call__(self, contender: GauntletEntry) -> float:
        return _named(self.metric, contender.judged.scores(self.evaluation)["encoder"])


@dataclass(frozen=True)
class FineTuned:
    """The last value of what an experiment logs that goes on from the encoder; the untrained one begins anew.

    Args:
        experiment: trained with the contender's backbone and data, at its scale.
        metric: such as ``eval/top1``.
        kind, data: see `Task`.
        lower_is_better: the metric is an error.
        keeps: what else of ``data`` is the experiment's own and not the contender's: ``source`` and ``eval_view``,
            where ``data`` says what that is.
        overrides: of the experiment.
    """

    experiment: str
    metric: str
    kind: str
    lower_is_better: bool = False
    data: str | None = None
    keeps: Sequence[str] = ()
    overrides: Sequence[str] = field(default_factory=list)

    adaptation: ClassVar[str] = "fine-tuned"

    def recipe(self, contender: GauntletEntry) -> tuple[DictConfig, Any]:
        config = self._config(contender)
        config.checkpoint = None  # its weights say more than where they lie
        return config, [asdict(self), contender.weights]

    def judged_on(self, contender: GauntletEntry) -> str:
        return samples_of(self._config(contender).data, {})

    def __call__(self, contender: GauntletEntry) -> float:
        name = "_".join([self.experiment, contender.title, self.data or contender.data])
        folder = runs.unused(contender.folder, re.sub(r"[/ ]", "_", name))
        return evaluate.fine_tuned(self._config(contender), folder, self.metric)

    def _config(self, contender: GauntletEntry) -> DictConfig:
        return evaluate.finetune_config(
            contender.config,
            contender.checkpoint,
            [*self.overrides, *contender.overrides],
            experiment=self.experiment,
            split=contender.config.evaluate.split,
            kept=(*evaluate.KEPT, *self.keeps),
        )


@dataclass(frozen=True)
class FrozenHeadTask(FineTuned):
    """The same of an experiment that leaves the encoder as it is and trains a head on it."""

    adaptation: ClassVar[str] = "frozen"


@dataclass(frozen=True)
class TaskRun:
    """A task of a contender; see `result_cache.Measurable`. The configuration is composed once.

    Raises:
        UserError: the task does not apply.
    """

    name: str
    task: Task
    contender: GauntletEntry

    def __post_init__(self) -> None:
        self._recipe  # noqa: B018  says at once what does not apply

    @cached_property
    def _recipe(self) -> tuple[DictConfig, Any]:
        return self.task.recipe(self.contender)

    @cached_property
    def judged_on(self) -> str:
        return self.task.judged_on(self.contender)

    @property
    def extra(self) -> Any:
        return self._recipe[1]

    def config(self) -> DictConfig:
        return self._recipe[0]

    @property
    def setting(self) -> str:
        return f"{self.name}/{self.task.data or self.contender.data}"

    @property
    def key(self) -> str:
        return f"{self.contender.identity} {self.setting}"

    def facts(self) -> dict[str, Any]:
        """All that the table says of the number, but the number."""
        return {
            "setting": self.setting,
            "metric": self.task.metric,
            "seed": int(self.contender.config.seed),
            "run": self.contender.title,
            "experiment": self.contender.experiment,
            "trained": self.contender.checkpoint is not None,
            "made_by": self.contender.recipe,
            "kind": self.task.kind,
            "adaptation": self.task.adaptation,
            "lower_is_better": self.task.lower_is_better,
            "judged_on": self.judged_on,
        }


def hash_of(encoder: nn.Module) -> str:
    """Of the weights, and of what makes an embedding of them."""
    pool = getattr(encoder, "pool", None)
    while isinstance(pool, partial):
        pool = pool.func
    digest = hashlib.blake2b(f"{type(encoder)} {getattr(pool, '__qualname__', type(pool))}".encode(), digest_size=8)
    for name, value in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def samples_of(data: DictConfig, settings: Mapping[str, Any]) -> str:
    """A fingerprint of which samples there are, wherever they lie and however large they are shown."""
    content: Any = OmegaConf.to_container(data, resolve=False)
    source = {key: value for key, value in content["source"].items() if key not in ("cache_dir", "root", "resolution")}
    limits = {key: content.get(key) for key in ("train_samples", "eval_samples")}
    limits |= {key: content[key] for key in ("eval_split",) if key in content}  # without it, what was always judged on
    return fingerprint(OmegaConf.create({"source": source, **limits, **settings}))


def _named(metric: str, scores: Mapping[str, float]) -> float:
    if metric not in scores:
        raise UserError(f"it reports no '{metric}'{nearest(metric, list(scores))}")
    return float(scores[metric])
