"""`make list`: every experiment, one line each; the README's table is the same list."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from src import configuration

BEGIN, END = "<!-- experiments: made by `make list` -->", "<!-- end of experiments -->"


@dataclass(frozen=True)
class Experiment:
    name: str
    family: str
    data: str
    paper: str
    deviations: str


def experiments() -> list[Experiment]:
    """All of them, by family and name, as their files say."""
    found = []
    for name in configuration.names("experiment"):
        about = configuration.compose("train", [f"experiment={name}"]).about
        found.append(Experiment(name, about.family, about.data, about.paper, about.deviations))
    return sorted(found, key=lambda each: (each.family, each.name))


def markdown() -> str:
    """The table as the README has it."""
    rows = ["| experiment | family | data | paper |", "|---|---|---|---|"]
    rows += [f"| `{each.name}` | {each.family} | {each.data} | {each.paper} |" for each in experiments()]
    return "\n".join(rows)


def write_readme(project: Path) -> None:
    """Bring the README's table of experiments up to date, between its two marks."""
    readme = project / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{markdown()}\n{END}{rest.split(END)[1]}")


def print_experiments() -> None:
    console = Console(width=None if sys.stdout.isatty() else 200)
    table = Table(box=None, header_style="bold")
    for column in ("experiment", "family", "data", "paper"):
        table.add_column(column, no_wrap=column != "paper")
    for each in experiments():
        table.add_row(each.name, each.family, each.data, each.paper)
    console.print(table)
    console.print("\nrun one with: make train EXP=<experiment>")


def main(argv: Sequence[str]) -> int:
    if list(argv) == ["--write"]:
        write_readme(configuration.PROJECT)
    else:
        print_experiments()
    return 0


if __name__ == "__main__":
    configuration.run_main(main)
