"""`make bench`: measures the template, stores the results and writes docs/benchmarks.md.

- ``only=loop,precision``: the parts to measure (default all)
- ``quick=true``: a short trial of each part; its page goes to ``cache/bench``
- ``again=true``: repeat finished runs of the parts that train for hours (learning, methods, gauntlet)
- ``data=<data set>``: measure learning and gauntlet on this data set only
- ``workers=<number>``: runs of methods that are trained side by side, one thread each (default: one for each core)
- ``out=<folder>``: where benchmarks.json and benchmarks.md are written (default docs)
- ``--write``: write benchmarks.md from benchmarks.json, and measure nothing
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
from src.measure.side_by_side import default_workers, workers_of
from src.trained import split_arguments

OPTIONS = ("only", "quick", "again", "out", "data", "workers")
# these measure for hours: finished runs are stored and not repeated. Their options, besides those of all parts
LONG = {"learning": (learning, ("data",)), "methods": (methods, ("workers",)), "gauntlet": (gauntlet, ("data",))}


def main(argv: Sequence[str]) -> int:
    options, rest = split_arguments([word for word in argv if word != "--write"], OPTIONS)
    if rest:
        raise UserError(f"make bench has no option '{rest[0]}'{nearest(rest[0].partition('=')[0], OPTIONS)}")
    quick, again = (_flag(options, name) for name in ("quick", "again"))
    data = (options["data"],) if "data" in options else DATA
    if not set(data) <= set(DATA):
        raise UserError(f"data must be {' or '.join(DATA)}, not '{data[0]}'{nearest(data[0], DATA)}")
    own: dict[str, Any] = {"data": data, "workers": workers_of(options.get("workers"), default_workers())}
    chosen = _chosen(options.get("only") or ",".join(PARTS))
    for key in own.keys() & options.keys():
        if not any(key in LONG[name][1] for name in chosen if name in LONG):
            takes = [name for name, (_, keys) in LONG.items() if key in keys]
            raise UserError(f"{key}={options[key]}: none of {', '.join(chosen)} takes it, only {' and '.join(takes)}")
    folder = Path(options.get("out") or PROJECT / ("cache/bench" if quick else "docs"))
    results = _read(folder)
    if "--write" in argv:
        _write(folder, results)
        return 0
    for name in chosen:
        print(f"bench: {name} …", flush=True)
        about = machine.about()

        def save(result: dict[str, Any], name: str = name, about: dict[str, Any] = about) -> None:
            results[name] = {"about": about, "quick": quick, "result": result}
            _write(folder, results)

        if name in LONG:
            part, keys = LONG[name]
            stored = {} if again else results.get(name, {}).get("result", {})
            save(part.measure(quick, stored=stored, save=save, **{key: own[key] for key in keys}))
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


def _flag(options: dict[str, str], name: str) -> bool:
    value = options.get(name, "false").lower()
    if value not in ("true", "false"):
        raise UserError(f"{name} must be true or false, not '{value}'")
    return value == "true"


def _read(folder: Path) -> dict[str, Any]:
    file = folder / "benchmarks.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _write(folder: Path, results: dict[str, Any]) -> None:
    write_atomically(folder / "benchmarks.json", json.dumps(results, indent=2) + "\n")
    write_atomically(folder / "benchmarks.md", render(results))


if __name__ == "__main__":
    run_main(main)
