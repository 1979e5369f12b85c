"""`make bench`: measure, keep what was measured, write the page.

``only=loop,precision`` names parts, ``quick=true`` only looks whether they work (its page goes to ``cache/bench``),
``again=true`` forgets finished runs of the parts that train for hours (learning, methods, gauntlet),
``data=<data set>`` leaves their other data sets for another time, ``out=<folder>`` is where page and numbers go.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import gauntlet, learning, methods
from benchmarks.learning import DATA
from benchmarks.render import PARTS, render
from src.configuration import PROJECT, run_main
from src.errors import UserError, nearest
from src.files import write_atomically
from src.measure import machine
from src.trained import words_of

WORDS = ("only", "quick", "again", "out", "data")
LONG = {"learning": learning, "methods": methods, "gauntlet": gauntlet}


def main(argv: Sequence[str]) -> int:
    words, rest = words_of(argv, WORDS)
    if rest:
        raise UserError(f"make bench knows no '{rest[0]}'{nearest(rest[0].partition('=')[0], WORDS)}")
    quick, again = (_flag(words, name) for name in ("quick", "again"))
    data = (words["data"],) if "data" in words else DATA
    if not set(data) <= set(DATA):
        raise UserError(f"data is {' or '.join(DATA)}, not '{data[0]}'{nearest(data[0], DATA)}")
    folder = Path(words.get("out") or PROJECT / ("cache/bench" if quick else "docs"))
    results = _read(folder)
    for name in _chosen(words.get("only") or ",".join(PARTS)):
        print(f"bench: {name} …", flush=True)
        about = machine.about()

        def save(result: dict[str, Any], name: str = name, about: dict[str, Any] = about) -> None:
            results[name] = {"about": about, "quick": quick, "result": result}
            _write(folder, results)

        if name in LONG:
            # hours of it: what is finished is kept, and not done again
            stored = {} if again else results.get(name, {}).get("result", {})
            save(LONG[name].measure(quick, stored=stored, save=save, data=data))
        else:
            save(PARTS[name].measure(quick))
    print(f"bench: wrote {folder / 'benchmarks.md'}")
    return 0


def _chosen(only: str) -> list[str]:
    names = [name for name in only.strip("[] ").replace(" ", ",").split(",") if name]
    for name in names:
        if name not in PARTS:
            raise UserError(f"there is no benchmark '{name}'{nearest(name, list(PARTS))}")
    return names


def _flag(words: dict[str, str], name: str) -> bool:
    value = words.get(name, "false").lower()
    if value not in ("true", "false"):
        raise UserError(f"{name} is true or false, not '{value}'")
    return value == "true"


def _read(folder: Path) -> dict[str, Any]:
    file = folder / "benchmarks.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _write(folder: Path, results: dict[str, Any]) -> None:
    write_atomically(folder / "benchmarks.json", json.dumps(results, indent=2) + "\n")
    write_atomically(folder / "benchmarks.md", render(results))


if __name__ == "__main__":
    run_main(main)
