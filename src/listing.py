"""`make list`: every experiment, one line each."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from src import configuration

_FAMILIES = ("masked", "joint embedding", "supervised", "image-text", "video", "downstream")  # in the order of a reader


@dataclass(frozen=True)
class Experiment:
    """The description of an experiment, from its file and its recipe.

    Args:
        name: its file in configs/experiment, without ending.
        recipe: the file that describes the method, without ending.
        family, data, paper, summary, deviations: see ``about`` in configs/train.yaml.
    """

    name: str
    recipe: str
    family: str
    data: str
    paper: str
    summary: str
    deviations: str


def experiments(project: Path = configuration.PROJECT) -> list[Experiment]:
    """Returns all experiments, by family and name."""
    configs = project / "configs"
    listed = []
    for name in configuration.names("experiment", configs):
        composed = configuration.composition("train", [f"experiment={name}", "scale=paper"], configs)
        about = composed.config.about
        recipe = Path(composed.origin("about.summary")).stem
        listed.append(Experiment(name, recipe, about.family, about.data, about.paper, about.summary, about.deviations))
    return sorted(listed, key=lambda experiment: (_rank(experiment.family), experiment.recipe, experiment.name))


def print_experiments() -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 200)
    table = Table(box=None, header_style="bold")
    for column in ("experiment", "family", "data", "paper"):
        table.add_column(column, no_wrap=column != "paper")
    for experiment in experiments():
        table.add_row(experiment.name, experiment.family, experiment.data, experiment.paper)
    console.print(table)
    console.print("\nrun one with: make train EXP=<experiment>; more of each in docs/methods.md")


def _rank(family: str) -> int:
    return _FAMILIES.index(family) if family in _FAMILIES else len(_FAMILIES)


def main(argv: Sequence[str]) -> int:
    print_experiments()
    return 0


if __name__ == "__main__":
    configuration.run_main(main)
