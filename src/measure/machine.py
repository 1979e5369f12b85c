"""Describes the machine, commit and date of a measurement."""

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

TOLERATED_CORES = 0.3  # kept busy by other processes, without a warning


def about() -> dict[str, Any]:
    """Returns date, commit, CPU, cores, GPU, torch, its threads, and how many cores other processes keep busy."""
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
    """Returns `about` as a sentence."""
    gpu = f", {about['gpu']}" if about.get("gpu") else ""
    sentence = (
        f"{about['date']}, commit {about['commit']}, {about['cpu']} ({about['cores']} cores){gpu}, "
        f"torch {about['torch']}, {about['threads']} threads"
    )
    others = about.get("others") or 0.0
    busy = (
        f" **Other processes kept {others:.1f} cores busy at the start: do not rely on this.**"
        if others > TOLERATED_CORES
        else ""
    )
    return f"{sentence}.{busy}"


def lines(abouts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a sentence for each machine and commit, with its first and last date and the largest load by others."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for about in abouts:
        groups.setdefault(line({**about, "date": "", "others": 0.0}), []).append(about)
    sentences = []
    for group in groups.values():
        dates = sorted({about["date"] for about in group})
        others = max(about.get("others") or 0.0 for about in group)
        sentences.append(
            line({**group[0], "date": " to ".join(dict.fromkeys((dates[0], dates[-1]))), "others": others})
        )
    return sorted(sentences)


def cores_in_use(seconds: float = 2.0) -> float | None:
    """Returns how many cores are busy while this process sleeps; None on systems without /proc/stat."""
    begin = _jiffies()
    time.sleep(seconds)
    end = _jiffies()
    if begin is None or end is None or end[1] == begin[1]:
        return None
    return round((os.cpu_count() or 1) * (1 - (end[0] - begin[0]) / (end[1] - begin[1])), 2)


def _jiffies() -> tuple[int, int] | None:
    """Returns the idle time and the total time of all cores since the start of the system."""
    try:
        first, *_ = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return None
    times = [int(word) for word in first.split()[1:9]]  # the time of guests is part of the users'
    return times[3] + times[4], sum(times)


def commit() -> str:
    """Returns the project's commit, with a plus sign if code or configuration were changed since."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--", "src", "benchmarks", "configs") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=PROJECT, check=True, capture_output=True, text=True).stdout.strip()
