"""Tests run offline and on the CPU, with one thread for each process: several run side by side, and sums stay the same
on any machine."""

import os

# before torch is imported, and for the processes that tests start
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
os.environ.pop("PRETEXT_RUN_DIR", None)
os.environ["PRETEXT_TRUST"] = "tests"  # stored runs name callbacks of tests/, which kill them

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_inherited_run(monkeypatch):
    """No test works in the run folder of the one before."""
    monkeypatch.delenv("PRETEXT_RUN_DIR", raising=False)
