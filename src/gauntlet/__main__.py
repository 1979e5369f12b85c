"""`make gauntlet`: several runs' encoders through every task of configs/gauntlet.yaml, and a ranking of them.

``run=<folders>`` are the runs, one after the other with spaces or commas between; ``data=<data sets>`` says on what
else than their own data they are judged; ``tasks=<names>`` leaves the others out; ``checkpoint=`` is ``last`` unless it
says ``best``; ``floor=false`` leaves out the untrained encoders; ``out=<folder>`` is where numbers, page and fine-tuned
runs go. What was measured there is not measured again. Other words change the runs' configurations, as for `make
evaluate`, and ``finetune.<key>=<value>`` the recipes of fine-tuning.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from src import configuration, evaluate, runs, train, trained
from src.configuration import PROJECT
from src.errors import UserError
from src.files import write_atomically
from src.gauntlet import report
from src.gauntlet.measuring import Failures, cells_of, chosen, frozen_of, measure
from src.gauntlet.ranking import Ranking, with_backbones
from src.gauntlet.tasks import GauntletEntry, Task, TaskRun

WORDS = ("run", "data", "tasks", "checkpoint", "floor", "out")


def main(argv: Sequence[str]) -> int:
    shared = runs.inherited()
    if shared is not None:
        # a process that a fine-tuning's launcher started: what comes before it is done
        return train.fit(shared.config(), shared)
    words, rest = trained.words_of(argv, WORDS)
    titles = [title for title in re.split(r"[,\s]+", words.get("run", "").strip("[] ")) if title]
    if not titles:
        raise UserError('say which runs: make gauntlet RUN="runs/<experiment>/<name> runs/<experiment>/<name>"')
    folder = Path(words.get("out") or PROJECT / "runs" / "gauntlet")
    tasks = chosen(words.get("tasks"))
    told: Failures = {}
    cells = _cells([runs.find(title) for title in titles], words, rest, tasks, folder, told)

    def keep(rows: list[dict[str, Any]]) -> None:
        write(folder, rows, told)

    standing = write(folder, measure(cells, known(folder), told, keep=keep), told)
    report.dashboard(folder, standing, report.markdown(standing, told))
    Console(width=None if sys.stdout.isatty() else 200).print(report.terminal(standing))
    for name, reason in told.items():
        print(f"not measured: {name}: {reason}")
    print(f"gauntlet: wrote {folder / 'report.md'}")
    return 0


def _cells(
    found: Sequence[runs.Run],
    words: Mapping[str, str],
    rest: Sequence[str],
    tasks: Mapping[str, Task],
    folder: Path,
    told: Failures,
) -> dict[str, TaskRun]:
    """Every task of every contender that it applies to, by key; what does not apply is told."""
    floor = words.get("floor", "true").lower()
    if floor not in ("true", "false"):
        raise UserError(f"floor is true or false, not '{floor}'")
    overrides = [word for word in rest if not word.startswith("finetune.")]
    cells: dict[str, TaskRun] = {}
    for run in found:
        checkpoint = trained.checkpoint_of(run, words.get("checkpoint", "last"))
        for data in re.split(r"[,\s]+", words["data"].strip("[] ")) if words.get("data") else [None]:
            config = evaluate.settle(run, data, overrides)
            for weights in (checkpoint, None) if floor == "true" else (checkpoint,):
                contender = GauntletEntry(
                    run,
                    config,
                    _data_name(config, data),
                    weights,
                    frozen_of(tasks),
                    folder / "finetuned",
                    [word.removeprefix("finetune.") for word in rest if word.startswith("finetune.")],
                )
                # several runs may have begun with the same weights
                cells |= {key: cell for key, cell in cells_of(contender, tasks, told).items() if key not in cells}
                contender.forget()
    return cells


def _data_name(config: DictConfig, data: str | None) -> str:
    split = str(config.evaluate.split)
    return (data or evaluate.data_name(config)) + ("" if split == "val" else f"_{split}")


def known(folder: Path) -> dict[str, Any]:
    """The rows of an earlier call, by key."""
    file = folder / "scores.json"
    rows = json.loads(file.read_text())["scores"] if file.exists() else []
    return {row["key"]: {name: value for name, value in row.items() if name not in ("key", "backbone")} for row in rows}


def write(folder: Path, rows: Sequence[Mapping[str, Any]], told: Failures) -> Ranking:
    """The long table and the page, of everybody who has ever taken part in this folder."""
    scores = with_backbones(rows)
    write_atomically(folder / "scores.json", json.dumps({"scores": scores}, indent=2) + "\n")
    standing = Ranking(scores)
    write_atomically(folder / "report.md", report.markdown(standing, told))
    return standing


if __name__ == "__main__":
    configuration.run_main(main)
