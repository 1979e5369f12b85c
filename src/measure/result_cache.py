"""Results of long measurements: stored as soon as they are there, measured again only if their recipe changes."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from omegaconf import DictConfig, OmegaConf

from src import configuration, runs, train
from src.measure import machine, train_command

IDENTITY_KEYS = ("run", "paths", "about", "logger")  # of a configuration: they name a run and change no result


class Measurable(Protocol):
    """Anything whose result depends on a configuration and on ``extra``, both of which enter its fingerprint."""

    @property
    def extra(self) -> Any: ...

    def config(self) -> DictConfig: ...


J = TypeVar("J", bound=Measurable)


@dataclass(frozen=True)
class TrainingJob:
    """A run that is trained as `make train` does, then measured.

    Args:
        overrides: the arguments of `make train`.
        extra: plain values besides the training's configuration that the result depends on, such as the evaluation's
            settings.
    """

    overrides: Sequence[str]
    extra: Any = None

    def config(self) -> DictConfig:
        return train.compose(self.overrides)


@dataclass(frozen=True)
class TrainedRun:
    """A run whose training ended well.

    Args:
        run: its folder, which may be deleted after it was measured.
        seconds: duration of the training command.
        about: machine and date of the training, see `machine.about`; None for here and now.
    """

    run: runs.Run
    seconds: float
    about: Mapping[str, Any] | None = None

    @property
    def steps(self) -> int:
        return int(self.run.metrics()["train"]["step"])


def measure_missing(
    jobs: Mapping[str, J],
    measure: Callable[[J, DictConfig], dict[str, Any]],
    *,
    stored: Mapping[str, Any],
    save: Callable[[dict[str, Any]], None],
    about: Callable[[], dict[str, Any]] = machine.about,
) -> dict[str, Any]:
    """Returns the results of all ``jobs`` by key, and measures those that are not among the ``stored`` ones.

    Args:
        measure: measures one job.
        stored: earlier results by key. Those of another recipe are dropped before anything is measured, so that runs
            of two recipes are never compared; keys without a job stay.
        save: receives all results after each job, so that an interrupted measurement loses one job at most.
        about: describes the machine on which a job is measured.
    """
    configs = {key: job.config() for key, job in jobs.items()}
    recipes = {key: fingerprint(config, jobs[key].extra) for key, config in configs.items()}
    results = {key: result for key, result in stored.items() if recipes.get(key, result["recipe"]) == result["recipe"]}
    for key, job in jobs.items():
        if key not in results:
            results[key] = {"about": about(), "recipe": recipes[key], **measure(job, configs[key])}
            save(dict(results))
    return results


@contextmanager
def train_once(overrides: Sequence[str], config: DictConfig) -> Iterator[TrainedRun]:
    """Trains a run in a temporary folder that is deleted at the end of the ``with`` block.

    Args:
        overrides: the arguments of `make train`.
        config: the configuration that they compose.

    Raises:
        TrainingFailed: the command ended with another exit code than 0.
    """
    with tempfile.TemporaryDirectory() as folder:
        prepared = config.copy()
        prepared.run.dir = folder  # a tokenizer learned here must not be taken for the run's own
        # rendering and downloading happen once and are not part of a run's time
        configuration.instantiate(prepared.data).prepare_data()
        begin = time.perf_counter()
        train_command.run_training([*overrides, "run.name=measured"], runs=Path(folder))
        seconds = time.perf_counter() - begin
        yield TrainedRun(runs.Run(Path(folder, config.run.experiment, "measured")), seconds)


def fingerprint(config: DictConfig, extra: Any = None) -> str:
    """Returns a hash of everything in the configuration, and of ``extra``, that can change a result."""
    content = OmegaConf.to_container(config, resolve=False)
    assert isinstance(content, dict)
    hashed: Any = {key: value for key, value in content.items() if key not in IDENTITY_KEYS}
    if extra is not None:
        hashed = [hashed, extra]
    return hashlib.blake2b(json.dumps(hashed, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
