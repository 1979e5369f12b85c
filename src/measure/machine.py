"""Where and of what something was measured."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from src.configuration import PROJECT

TOLERATED = 0.3  # cores


def about() -> dict[str, Any]:
    """Date, commit, CPU, cores, torch, its threads, and how many cores others keep busy."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "commit": commit(),
        "cpu": cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "others": cores_in_use(),
    }


def line(about: Mapping[str, Any]) -> str:
    """`about` as a sentence."""
    gpu = f", {about['gpu']}" if about.get("gpu") else ""
    said = (
        f"{about['date']}, commit {about['commit']}, {about['cpu']} ({about['cores']} cores){gpu}, "
        f"torch {about['torch']}, {about['threads']} threads"
    )
    others = about.get("others") or 0.0
    busy = f" **Others kept {others:.1f} cores busy when it began: do not rely on this.**" if others > TOLERATED else ""
    return f"{said}.{busy}"


def lines(places: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of several `about`, a sentence for each machine and commit: from when to when, and the busiest it was."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for each in places:
        groups.setdefault(line({**each, "date": "", "others": 0.0}), []).append(each)
    found = []
    for group in groups.values():
        dates = sorted({each["date"] for each in group})
        others = max(each.get("others") or 0.0 for each in group)
        found.append(line({**group[0], "date": " to ".join(dict.fromkeys((dates[0], dates[-1]))), "others": others}))
    return sorted(found)


def cores_in_use(seconds: float = 2.0) -> float | None:
    """Cores that are busy while this process sleeps; None where the system does not say."""
    begin = _jiffies()
    time.sleep(seconds)
    end = _jiffies()
    if begin is None or end is None or end[1] == begin[1]:
        return None
    return round((os.cpu_count() or 1) * (1 - (end[0] - begin[0]) / (end[1] - begin[1])), 2)


def _jiffies() -> tuple[int, int] | None:
    """Idle time and all time of all cores since the start of the system."""
    try:
        first, *_ = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return None
    times = [int(word) for word in first.split()[1:9]]  # guests' time is within the users'
    return times[3] + times[4], sum(times)


def commit() -> str:
    """Of the project, with a plus sign where code or configuration differ from it."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--", "src", "configs") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(each.partition(":")[2].strip() for each in lines if each.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=PROJECT, check=True, capture_output=True, text=True).stdout.strip()
