"""`make claim` and `make claims`: measure papers' claims, store the results and write docs/claims.md.

- ``claim=<name>``: the claim to measure; without it, and without ``all=true``, all claims are listed
- ``all=true``: measure every claim
- ``again=failed``, ``again=all``: measure failed runs, or all runs, again; the latter are also trained again
- ``data=<data set>``: measure on this data set only
- ``workers=<number>``: runs that are trained side by side, one thread each (default: with ``all=true`` one for each
  core, or 1 beside a GPU)
- ``out=<folder>``: where claims.json and claims.md are written (default docs)
- ``--write``: write claims.md from claims.json, and measure nothing
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from src import configuration
from src.claims import ledger, page
from src.claims.claim import Claim, load
from src.configuration import PROJECT, run_main
from src.errors import UserError, nearest
from src.files import write_atomically
from src.measure.side_by_side import default_workers, workers_of
from src.trained import split_arguments

RUN_FOLDER = PROJECT / "cache" / "claims"
OPTIONS = ("claim", "all", "again", "out", "data", "workers")
# ``again=`` -> runs with one of these keys are measured again
REPEATED: dict[str, tuple[str, ...]] = {"failed": ("failed",), "all": ("failed", "values")}


def main(argv: Sequence[str]) -> int:
    options, rest = split_arguments([word for word in argv if word != "--write"], OPTIONS)
    if rest:
        raise UserError(f"make claim has no option '{rest[0]}'{nearest(rest[0].partition('=')[0], OPTIONS)}")
    folder = Path(options.get("out") or PROJECT / "docs")
    if "--write" in argv:
        results = _read(folder)
        _write(folder, results, _outdated(results))
        return 0
    measure_all = options.get("all", "false") == "true"
    if not options.get("claim") and not measure_all:
        show()
        return 0
    again = options.get("again")
    if again is not None and again not in REPEATED:
        raise UserError(f"again must be {' or '.join(REPEATED)}, not '{again}'{nearest(again, list(REPEATED))}")
    workers = workers_of(options.get("workers"), default_workers() if measure_all else 1)
    data = options.get("data")
    claims = [load(name) for name in (configuration.names("claim") if measure_all else [options["claim"]])]
    if measure_all and data is not None:
        claims = [claim for claim in claims if data in claim.data]
    measure(claims, folder, again, data, workers=workers)
    return 0


def measure(
    claims: Sequence[Claim], folder: Path, again: str | None = None, data: str | None = None, workers: int = 1
) -> None:
    """Measures claims, and writes the entry of a claim after each of its runs.

    Args:
        folder: of claims.json and claims.md.
        again: a key of ``REPEATED``; None measures only what is missing.
        data: the only data set to measure on now; None for all of the claims'.
        workers: see `ledger.measure`.

    Raises:
        UserError: a training was stopped; and after all others were measured, claims that cannot be.
    """
    results = _read(folder)
    outdated = _outdated(results)
    plans: dict[str, ledger.Plan] = {}
    problems = []
    for claim in claims:  # all are checked before anything is trained
        print(f"claim: {claim.name}: {claim.title}", flush=True)
        try:
            plan = ledger.plan(claim, _without_repeated(results.get(claim.name, {}), again), data)
        except UserError as problem:
            problems.append(str(problem))
            continue
        for source, differences in plan.entry["difference"].items():
            for key, (baseline, claimed) in differences.items():
                values = f"{baseline} in '{claim.arms[0].name}', {claimed} in '{claim.arms[1].name}'"
                print(f"  {source}: {key}: {values}", flush=True)
        plans[claim.name] = plan
        outdated[claim.name] = set()  # a plan has results of today's recipe alone

    def save(name: str, entry: dict[str, Any]) -> None:
        # read again: another claim may be measured at the same time
        _write(folder, _read(folder) | {name: entry}, outdated)

    run_folder = None if again == "all" else RUN_FOLDER  # failed trainings are never kept there
    entries = ledger.measure(plans, save=save, run_folder=run_folder, workers=workers)
    results = _read(folder) | entries
    _write(folder, results, _outdated(results))
    for claim in claims:
        for source in claim.data if claim.name in entries else ():
            for metric in claim.metrics_on(source):
                result = ledger.outcome(claim, entries[claim.name], source, metric)
                note = f" ({result.note})" if result.note else ""
                print(f"  {claim.name} on {source}, {metric.name}: {result.verdict}{note}", flush=True)
    print(f"claim: wrote {folder / 'claims.md'}")
    if problems:
        raise UserError("\n".join(problems))


def _without_repeated(entry: dict[str, Any], again: str | None) -> dict[str, Any]:
    """Returns a claim's entry without the results that ``again`` asks to measure again."""
    repeated = REPEATED[again] if again else ()
    return entry | {
        kind: {key: run for key, run in entry.get(kind, {}).items() if not any(word in run for word in repeated)}
        for kind in ("runs", "floors")
    }


def show() -> None:
    """Prints the names, titles and verdicts of all claims."""
    results = _read(PROJECT / "docs")
    rows = Table(box=None, header_style="bold")
    for column in ("claim", "title", "verdict"):
        rows.add_column(column, no_wrap=column == "claim")
    for name in configuration.names("claim"):
        claim = load(name)
        rows.add_row(name, claim.title, ledger.overall_verdict(claim, results.get(name, {})))
    console = Console()
    console.print(rows)
    console.print("\nmeasure one with: make claim CLAIM=<claim>, all missing ones with: make claims")


def _read(folder: Path) -> dict[str, Any]:
    file = folder / "claims.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _outdated(results: Mapping[str, Any]) -> dict[str, set[str]]:
    """Returns claim -> data sets measured with an earlier recipe. It composes every claim, which takes seconds."""
    return {name: ledger.outdated(load(name), results.get(name, {})) for name in configuration.names("claim")}


def _write(folder: Path, results: dict[str, Any], outdated: Mapping[str, set[str]]) -> None:
    claims = [load(name) for name in configuration.names("claim")]
    write_atomically(folder / "claims.json", json.dumps(results, indent=2, sort_keys=True) + "\n")
    write_atomically(folder / "claims.md", page.render(results, claims, outdated))


if __name__ == "__main__":
    run_main(main)
