"""Runs the tasks of the gauntlet, stores their results and reports failures without aborting."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src import configuration
from src.configuration import CONFIGS
from src.errors import UserError, nearest
from src.gauntlet.tasks import Frozen, GauntletEntry, Task, TaskRun
from src.measure import machine, result_cache

log = logging.getLogger(__name__)

Failures = dict[str, str]  # entry and setting -> reason


def tasks_named(names: str | None) -> dict[str, Task]:
    """Returns the tasks of configs/gauntlet.yaml with the given names, None for all.

    Raises:
        UserError: there is no such task.
    """
    config = OmegaConf.load(CONFIGS / "gauntlet.yaml")
    tasks = list(map(str, config.tasks))
    wanted = tasks if not names else [name for name in re.split(r"[,\s]+", names.strip("[] ")) if name]
    for name in wanted:
        if name not in tasks:
            raise UserError(f"the gauntlet has no task '{name}'{nearest(name, tasks)}")
    return {name: configuration.instantiate(config.tasks[name]) for name in wanted}


def frozen_evaluations(tasks: Mapping[str, Task]) -> list[str]:
    """Returns the names of the evaluations among the tasks, which share an entry's features."""
    return list(dict.fromkeys(task.evaluation for task in tasks.values() if isinstance(task, Frozen)))


def task_runs(entry: GauntletEntry, tasks: Mapping[str, Task], failures: Failures) -> dict[str, TaskRun]:
    """Returns the entry's task runs by key; tasks that do not apply to it are added to ``failures``."""
    applicable = {}
    for name, task in tasks.items():
        try:
            task_run = TaskRun(name, task, entry)
        except UserError as problem:
            failures[f"{entry.title}, {name}/{entry.data}"] = str(problem)
        else:
            applicable[task_run.key] = task_run
    return applicable


def measure(
    task_runs: Mapping[str, TaskRun],
    earlier: Mapping[str, Any],
    failures: Failures,
    *,
    save: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Returns the rows of earlier results and of those measured now. A task that fails is added to ``failures`` and the
    others continue.

    Args:
        task_runs: by key.
        earlier: rows by key.
        save: receives all rows after each number.

    Raises:
        UserError: the entries of a setting would be evaluated on different samples.
    """
    samples = {row["setting"]: row["judged_on"] for key, row in earlier.items() if key not in task_runs}
    for task_run in task_runs.values():
        if samples.setdefault(task_run.setting, task_run.sample_fingerprint) != task_run.sample_fingerprint:
            raise UserError(
                f"{task_run.entry.title} would be evaluated by {task_run.setting} on other samples than the rest: "
                'give the same for all, such as ARGS="data.source.count={train: 2000, val: 500, test: 500} '
                'data.train_samples=null evaluate.bank_samples=null evaluate.query_samples=null", or another out='
            )
    loaded: list[GauntletEntry] = []  # the last entry, whose weights and features are freed before the next one's

    def measure_one(task_run: TaskRun, config: DictConfig) -> dict[str, Any]:
        if loaded and loaded[-1] is not task_run.entry:
            loaded.pop().forget()
        loaded[:] = [task_run.entry]
        title = f"{task_run.entry.title}, {task_run.setting}"
        print(f"gauntlet: {title} …", flush=True)
        try:
            parameters = sum(parameter.numel() for parameter in task_run.entry.encoder.parameters())
            value = task_run.task(task_run.entry)
            if not math.isfinite(value):
                raise UserError(f"{task_run.task.metric} is not a finite number")
        except UserError as problem:
            failures[title] = str(problem)
        except Exception as problem:  # the other tasks, which may take hours, must continue
            log.exception("%s", title)
            failures[title] = f"{type(problem).__name__}: {problem}"
        else:
            return {**task_run.facts(), "parameters": parameters, "value": value}
        return {"value": None}

    def rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [{"key": key, **row} for key, row in results.items() if row["value"] is not None]

    results = result_cache.measure_missing(
        task_runs, measure_one, stored=earlier, save=lambda results: save(rows(results)), about=cache(machine.about)
    )
    return rows(results)
