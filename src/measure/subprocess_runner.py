"""Runs a function in a new process, so that its peak memory is not hidden by an earlier peak of this process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from src.callbacks.throughput import peak_memory_gb
from src.configuration import PROJECT

_CODE = """
import importlib, json, sys
module, name, arguments = json.loads(sys.argv[1])
print(json.dumps(getattr(importlib.import_module(module), name)(*arguments)))
"""


def run_in_subprocess(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns the result of a module's function, called in a new process.

    Args:
        function: found there by its module's name, so it must be importable from the project's folder.
        arguments: sent as JSON, and so is the result.
    """
    call = json.dumps([function.__module__, function.__qualname__, arguments])
    completed = subprocess.run(
        [sys.executable, "-c", _CODE, call], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    return json.loads(completed.stdout.splitlines()[-1])


def peak_growth_mb(work: Callable[[], object]) -> float:
    """Returns by how many MB the peak memory of this process grows during ``work``."""
    clear_refs = Path("/proc/self/clear_refs")
    if clear_refs.exists():
        clear_refs.write_text("5")  # resets the peak: that of the imports would hide a part of the growth
    before = peak_memory_gb(torch.device("cpu"))
    work()
    return 1e3 * (peak_memory_gb(torch.device("cpu")) - before)
