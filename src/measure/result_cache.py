"""Hours of measuring: each result is kept as soon as it is there, and not measured again while its recipe stays."""

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
from src.measure import command, machine

IDENTITY = ("run", "paths", "about", "logger")  # of the configuration: what names a run and changes no result


class Measurable(Protocol):
    """What a result depends on: a configuration, and what else there is."""

    @property
    def also(self) -> Any: ...

    def config(self) -> DictConfig: ...


J = TypeVar("J", bound=Measurable)


@dataclass(frozen=True)
class Job:
    """One run to be measured, trained as `make train` does.

    Args:
        words: what `make train` is given.
        also: what else the result depends on, besides the configuration of the training.
    """

    words: Sequence[str]
    also: Any = None

    def config(self) -> DictConfig:
        return train.compose(self.words)


@dataclass(frozen=True)
class Finished:
    """A trained run.

    Args:
        run: its folder, which need not outlast its judging.
        seconds: of the training command.
        about: where it was trained, if not just now and here.
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
    known: Mapping[str, Any],
    keep: Callable[[dict[str, Any]], None],
    about: Callable[[], dict[str, Any]] = machine.about,
) -> dict[str, Any]:
    """What is known of ``jobs`` and what had to be measured now, by key.

    Args:
        measure: one job.
        known: an earlier result. What it holds of another recipe is dropped before anything is measured, so that runs
            of two recipes never stand side by side; keys without a job stay.
        keep: is given the whole result after each job, so that nothing finished is lost.
        about: says where a job is measured.
    """
    configs = {key: job.config() for key, job in jobs.items()}
    recipes = {key: fingerprint(config, jobs[key].also) for key, config in configs.items()}
    result = {key: each for key, each in known.items() if recipes.get(key, each["recipe"]) == each["recipe"]}
    for key, job in jobs.items():
        if key not in result:
            result[key] = {"about": about(), "recipe": recipes[key], **measure(job, configs[key])}
            keep(dict(result))
    return result


@contextmanager
def trained(words: Sequence[str], config: DictConfig) -> Iterator[Finished]:
    """One run of ``config``, which is what ``words`` compose.

    Raises:
        TrainingFailed: the command did not end well.
    """
    with tempfile.TemporaryDirectory() as folder:
        ready = config.copy()
        ready.run.dir = folder  # a tokenizer that is learned here is not the run's own
        configuration.instantiate(ready.data).prepare_data()  # rendering happens once, and is no part of a run's time
        begin = time.perf_counter()
        command.train([*words, "run.name=measured"], runs=Path(folder))
        seconds = time.perf_counter() - begin
        yield Finished(runs.Run(Path(folder, config.run.experiment, "measured")), seconds)


def fingerprint(config: DictConfig, also: Any = None) -> str:
    """Of everything in the configuration, and in ``also``, that could change a result."""
    content = OmegaConf.to_container(config, resolve=False)
    assert isinstance(content, dict)
    kept: Any = {key: value for key, value in content.items() if key not in IDENTITY}
    if also is not None:
        kept = [kept, also]
    return hashlib.blake2b(json.dumps(kept, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
