"""`make claim` and `make claims`: measure what papers claim, keep it, write the page.

``claim=<name>`` measures one (without it, and without ``all=true``, they are listed), ``again=failed`` or
``again=all`` forgets runs of it first, the latter those on disk too, ``data=<data set>`` leaves its other data sets for
another time, ``out=<folder>`` is where page and numbers go, ``--write`` only writes the page anew.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from src import configuration
from src.claims import ledger
from src.claims.claim import Claim, load
from src.configuration import PROJECT, run_main
from src.errors import UserError, nearest
from src.files import write_atomically
from src.trained import words_of

KEPT = PROJECT / "cache" / "claims"
WORDS = ("claim", "all", "again", "out", "data")
FORGET: dict[str, tuple[str, ...]] = {"failed": ("failed",), "all": ("failed", "value")}  # runs that have one of these


def main(argv: Sequence[str]) -> int:
    words, rest = words_of([word for word in argv if word != "--write"], WORDS)
    if rest:
        raise UserError(f"make claim knows no '{rest[0]}'{nearest(rest[0].partition('=')[0], WORDS)}")
    folder = Path(words.get("out") or PROJECT / "docs")
    if "--write" in argv:
        _write(folder, _read(folder))
        return 0
    everything = words.get("all", "false") == "true"
    if not words.get("claim") and not everything:
        show()
        return 0
    again = words.get("again")
    if again is not None and again not in FORGET:
        raise UserError(f"again is {' or '.join(FORGET)}, not '{again}'{nearest(again, list(FORGET))}")
    data = words.get("data")
    chosen = [load(name) for name in (configuration.names("claim") if everything else [words["claim"]])]
    if everything and data is not None:
        chosen = [claim for claim in chosen if data in claim.data]
    refused = []
    for claim in chosen:
        print(f"claim: {claim.name}: {claim.title}", flush=True)
        try:
            measure(claim, folder, again, data)
        except UserError as problem:
            if len(chosen) == 1:
                raise
            refused.append(str(problem))
    if refused:
        raise UserError("\n".join(refused))
    return 0


def measure(claim: Claim, folder: Path, again: str | None = None, data: str | None = None) -> None:
    """One claim, its entry written after every run."""
    results = _read(folder)
    stored = results.get(claim.name, {})
    forgotten = FORGET[again] if again else ()
    kept = {
        kind: {key: run for key, run in stored.get(kind, {}).items() if not any(word in run for word in forgotten)}
        for kind in ("runs", "floors")
    }

    def save(entry: dict[str, Any]) -> None:
        # read anew: another claim may be under way beside this one
        _write(folder, _read(folder) | {claim.name: entry})

    for each in claim.data:
        for key, (ours, theirs) in claim.difference(each).items():
            print(f"  {each}: {key}: {ours} in '{claim.arms[0].name}', {theirs} in '{claim.arms[1].name}'", flush=True)
    kept_in = None if again == "all" else KEPT  # of a training that failed nothing is kept
    entry = ledger.measure(claim, stored=stored | kept, save=save, data=data, kept_in=kept_in)
    for each in claim.data:
        known_now = ledger.outcome(claim, entry, each)
        print(f"  {each}: {known_now.verdict}{f' ({known_now.note})' if known_now.note else ''}", flush=True)
    print(f"claim: wrote {folder / 'claims.md'}")


def show() -> None:
    """Names, titles and verdicts."""
    table = Table(box=None, header_style="bold")
    for column in ("claim", "what", "verdicts"):
        table.add_column(column, no_wrap=column == "claim")
    results = _read(PROJECT / "docs")
    for name in configuration.names("claim"):
        claim = load(name)
        verdicts = [f"{data}: {ledger.outcome(claim, results.get(name, {}), data).verdict}" for data in claim.data]
        table.add_row(name, claim.title, ", ".join(verdicts))
    console = Console()
    console.print(table)
    console.print("\nmeasure one with: make claim CLAIM=<claim>, all that are not yet: make claims")


def _read(folder: Path) -> dict[str, Any]:
    file = folder / "claims.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _write(folder: Path, results: dict[str, Any]) -> None:
    claims = [load(name) for name in configuration.names("claim")]
    write_atomically(folder / "claims.json", json.dumps(results, indent=2, sort_keys=True) + "\n")
    write_atomically(folder / "claims.md", ledger.render(results, claims))


if __name__ == "__main__":
    run_main(main)
