"""Contenders through their tasks: what is kept, what is told, and what ends nothing."""

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

Failures = dict[str, str]  # what could not be measured -> why


def chosen(names: str | None) -> dict[str, Task]:
    """The tasks of configs/gauntlet.yaml, or those of them that are named.

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


def frozen_of(tasks: Mapping[str, Task]) -> list[str]:
    """The evaluations among them, which share a contender's features."""
    return list(dict.fromkeys(task.evaluation for task in tasks.values() if isinstance(task, Frozen)))


def cells_of(contender: GauntletEntry, tasks: Mapping[str, Task], told: Failures) -> dict[str, TaskRun]:
    """The contender's tasks by key; one that does not apply to it is told."""
    cells = {}
    for name, task in tasks.items():
        try:
            cell = TaskRun(name, task, contender)
        except UserError as problem:
            told[f"{contender.title}, {name}/{contender.data}"] = str(problem)
        else:
            cells[cell.key] = cell
    return cells


def measure(
    cells: Mapping[str, TaskRun],
    earlier: Mapping[str, Any],
    told: Failures,
    *,
    keep: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """The rows of what is known and of what had to be measured now. A task that fails is told and ends nothing.

    Args:
        cells: by key.
        earlier: rows by key.
        told: is given what fails.
        keep: is given all rows after each number.

    Raises:
        UserError: in one setting some are judged on other samples than the rest.
    """
    alike = {row["setting"]: row["judged_on"] for key, row in earlier.items() if key not in cells}
    for cell in cells.values():
        if alike.setdefault(cell.setting, cell.judged_on) != cell.judged_on:
            raise UserError(
                f"{cell.contender.title} would be judged by {cell.setting} on other samples than the rest: "
                'say the same for all, such as ARGS="data.source.count={train: 2000, val: 500, test: 500} '
                'data.train_samples=null evaluate.bank_samples=null evaluate.query_samples=null", or another out='
            )
    before: list[GauntletEntry] = []

    def one(cell: TaskRun, config: DictConfig) -> dict[str, Any]:
        if before and before[-1] is not cell.contender:
            before.pop().forget()
        before[:] = [cell.contender]
        title = f"{cell.contender.title}, {cell.setting}"
        print(f"gauntlet: {title} …", flush=True)
        try:
            parameters = sum(each.numel() for each in cell.contender.encoder.parameters())
            value = cell.task(cell.contender)
            if not math.isfinite(value):
                raise UserError(f"{cell.task.metric} is not a finite number")
        except UserError as problem:
            told[title] = str(problem)
        except Exception as problem:  # one task's mistake must not cost the others' hours
            log.exception("%s", title)
            told[title] = f"{type(problem).__name__}: {problem}"
        else:
            return {**cell.facts(), "parameters": parameters, "value": value}
        return {"value": None}

    def rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [{"key": key, **row} for key, row in found.items() if row["value"] is not None]

    found = result_cache.measure_missing(
        cells, one, stored=earlier, save=lambda found: keep(rows(found)), about=cache(machine.about)
    )
    return rows(found)
