"""docs/methods.md and the README's table of families, made from the experiments: `make pages`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src import configuration
from src.claims.claim import load, parse
from src.claims.ledger import outcome, outdated
from src.listing import Experiment, experiments

BEGIN, END = "<!-- families: made by `make pages` -->", "<!-- end of families -->"


def write(project: Path) -> None:
    """Brings docs/methods.md and the README's table of families up to date."""
    listed = experiments(project)
    (project / "docs/methods.md").write_text(methods(listed, claims(project)))
    readme = project / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{families(listed)}\n{END}{rest.split(END)[1]}")


def families(listed: Sequence[Experiment]) -> str:
    """Returns the README's table: the experiments of every family."""
    rows = ["| family | experiments |", "|---|---|"]
    for family in dict.fromkeys(experiment.family for experiment in listed):
        names = [f"`{experiment.name}`" for experiment in listed if experiment.family == family]
        rows.append(f"| {family} | {', '.join(names)} |")
    return "\n".join(rows)


def methods(listed: Sequence[Experiment], claims: Mapping[str, Sequence[str]]) -> str:
    """Returns docs/methods.md.

    Args:
        claims: experiment -> one line for each claim about it, with its verdict.
    """
    lines = [
        "# Methods",
        "Every method with its paper, the data it needs, its deviations from the authors' code and what came of the "
        "paper's claim here. Made by `make pages` from `configs/` and [claims.json](claims.json); change "
        "nothing here.",
    ]
    for family in dict.fromkeys(experiment.family for experiment in listed):
        lines.append(f"## {family.capitalize()}")
        groups: dict[tuple[str, str], list[Experiment]] = {}
        for experiment in listed:
            if experiment.family == family:
                groups.setdefault((experiment.paper, experiment.summary), []).append(experiment)
        lines += [_method(group, claims) for group in groups.values()]
    return "\n\n".join(lines) + "\n"


def _method(group: Sequence[Experiment], claims: Mapping[str, Sequence[str]]) -> str:
    first = group[0]
    lines = [
        f"### {', '.join(f'`{experiment.name}`' for experiment in group)}",
        f"{first.summary}\n",
        f"- Paper: {first.paper}",
        f"- Data: {first.data}",
    ]
    for deviations in dict.fromkeys(experiment.deviations for experiment in group):
        names = [experiment.name for experiment in group if experiment.deviations == deviations]
        which = "" if len(names) == len(group) else f" of {', '.join(f'`{name}`' for name in names)}"
        lines.append(f"- Deviations{which}: {deviations}")
    results = list(dict.fromkeys(line for experiment in group for line in claims.get(experiment.name, ())))
    lines += [f"- Claim: {line}" for line in results] or ["- Claim: none yet"]
    lines.append(f"- `make train EXP={first.name}`")
    return "\n".join(lines)


def claims(project: Path) -> dict[str, list[str]]:
    """Returns the claims about each experiment's method, with their verdicts: experiment -> lines."""
    file = project / "docs/claims.json"
    stored: Mapping[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    found: dict[str, list[str]] = {}
    for name in configuration.names("claim", project / "configs"):
        claim = parse(name, stored[name]["claim"]) if name in stored else load(name)
        entry = stored.get(name, {})
        earlier = outdated(claim, entry)
        verdicts = [
            f"{outcome(claim, entry, data, metric).verdict} on {data}"
            + (f" by {metric.name}" if len(claim.metrics_on(data)) > 1 else "")
            + (" (earlier recipe)" if data in earlier else "")
            for data in claim.data
            for metric in claim.metrics_on(data)
        ]
        line = f"[{claim.title}](claims.md#{name}): {', '.join(verdicts)}"
        for experiment in _experiments_of(name, project) or [claim.arms[1].experiment]:
            found.setdefault(experiment, []).append(line)
    return found


def _experiments_of(claim: str, project: Path) -> list[str]:
    """Returns the experiments whose name without the backbone is the longest that begins the claim's name."""
    methods: dict[str, list[str]] = {}
    for name in configuration.names("experiment", project / "configs"):
        methods.setdefault(name.rpartition("_")[0], []).append(name)
    matching = [method for method in methods if f"{claim}_".startswith(f"{method}_")]
    return methods[max(matching, key=len)] if matching else []


def main(argv: Sequence[str]) -> int:
    write(configuration.PROJECT)
    return 0


if __name__ == "__main__":
    configuration.run_main(main)
