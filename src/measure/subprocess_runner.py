"""A measurement in a process of its own: a peak of memory never falls again."""

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


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of a module returns in a new process; arguments and result go as JSON."""
    asked = json.dumps([function.__module__, function.__qualname__, arguments])
    done = subprocess.run([sys.executable, "-c", _CODE, asked], cwd=PROJECT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def megabytes_of(work: Callable[[], object]) -> float:
    """By how many MB this process grows at its peak while ``work`` is done."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # the peak of what came before, such as the imports, would hide a part of the growth
    before = peak_memory_gb(torch.device("cpu"))
    work()
    return 1e3 * (peak_memory_gb(torch.device("cpu")) - before)
