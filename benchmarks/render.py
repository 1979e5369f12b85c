"""From the stored results to the page that shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from benchmarks import (
    evaluation,
    gauntlet,
    image_text,
    input_folder,
    joint_embedding,
    learning,
    loop,
    methods,
    precision,
    startup,
    video,
)
from src.measure import machine
from src.measure.report import Section, table


class Part(Protocol):
    """A module of this package that measures one thing, and says what came of it."""

    def measure(self, quick: bool = False) -> dict[str, Any]: ...

    def report(self, result: dict[str, Any]) -> Section: ...


PARTS: dict[str, Part] = {
    "loop": loop,
    "precision": precision,
    "input": input_folder,
    "video": video,
    "startup": startup,
    "evaluation": evaluation,
    "joint_embedding": joint_embedding,
    "image_text": image_text,
    "learning": learning,
    "methods": methods,
    "gauntlet": gauntlet,
}


def render(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page as markdown.

    Args:
        results: part -> ``about`` (where it was measured, see `machine.about`), ``quick`` (whether it was only a look),
            and ``result`` (what the part measured).
    """
    sections = {name: part.report(results[name]["result"]) for name, part in PARTS.items() if name in results}
    checks = [check for section in sections.values() for check in section.checks]
    missing = [name for name in PARTS if name not in results]
    lines = ["# Benchmarks", "Written by `make bench` from [benchmarks.json](benchmarks.json); change nothing here."]
    if checks:
        rows = [[check.what, check.wanted, check.measured, check.answer] for check in checks]
        lines.append(table(["", "wanted", "measured", "met"], rows))
    if missing:
        lines.append(f"Not measured yet: {', '.join(missing)} (`make bench ARGS=only={','.join(missing)}`).")
    for name, section in sections.items():
        lines += [f"## {section.title}", section.body, _where(results[name])]
    return "\n\n".join(lines) + "\n"


def _where(entry: Mapping[str, Any]) -> str:
    quick = " **Only a quick look, not a measurement.**" if entry.get("quick") else ""
    return f"{machine.line(entry['about'])}{quick}"
