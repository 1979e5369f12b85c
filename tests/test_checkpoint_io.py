"""Tests of checkpoint files: atomic writes, and refusal of damaged files and of code."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import resource
import signal
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from src.checkpoint_io import AtomicCheckpointIO, CheckpointError, load_checkpoint
from tests.callbacks.small_runs import end_of, fails_with, fit, in_child

STATE = {"state_dict": {"weight": torch.arange(6.0)}}


def test_a_full_disk_keeps_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint_io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    checkpoint_io.save_checkpoint(STATE, path)
    before = path.read_bytes()
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(os, "fsync", fails_with(errno.ENOSPC))
        checkpoint_io.save_checkpoint({"state_dict": {"weight": torch.zeros(500_000)}}, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert checkpoint_io.failed is not None
    assert checkpoint_io.failed.path == path
    assert "No space left on device (needs about 2.0 MB" in caplog.text
    assert "MB free" in str(checkpoint_io.failed)
    checkpoint_io.save_checkpoint(STATE, path)
    assert checkpoint_io.failed is None


def test_a_real_file_size_limit_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"

    def fill() -> None:
        checkpoint_io = AtomicCheckpointIO()
        checkpoint_io.save_checkpoint(STATE, path)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        checkpoint_io.save_checkpoint({"state_dict": {"weight": torch.zeros(1_000_000)}}, path)
        raise SystemExit(7 if "File too large" in str(checkpoint_io.failed) else 8)

    assert end_of(in_child(fill)) == 7
    assert torch.equal(load_checkpoint(path)["state_dict"]["weight"], STATE["state_dict"]["weight"])
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_kill_during_a_save_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(STATE, path)

    def save() -> None:
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        AtomicCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.zeros(1000)}}, path)

    assert end_of(in_child(save)) == -signal.SIGKILL
    assert torch.equal(load_checkpoint(path)["state_dict"]["weight"], STATE["state_dict"]["weight"])
    # the next process that saves removes the partial file
    [left, last] = sorted(os.listdir(tmp_path))
    assert left.startswith(".last.ckpt.")
    assert (left.endswith(".partial"), last) == (True, "last.ckpt")
    AtomicCheckpointIO().save_checkpoint(STATE, tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_two_writers_never_mix_their_files(tmp_path: Path) -> None:
    """Each writes tensors of its own value while the other does: what is read is always whole, and one of the two."""
    path = tmp_path / "last.ckpt"

    def write(value: float) -> None:
        checkpoint_io = AtomicCheckpointIO()
        for _ in range(30):
            checkpoint_io.save_checkpoint({"state_dict": {"weight": torch.full((50_000,), value)}}, path)

    AtomicCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.full((50_000,), 1.0)}}, path)
    writers = [in_child(partial(write, value)) for value in (1.0, 2.0)]
    for _ in range(30):
        weight = load_checkpoint(path)["state_dict"]["weight"]
        assert weight.unique().tolist() in ([1.0], [2.0])
    assert [end_of(writer) for writer in writers] == [0, 0]
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_one_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """torch.load itself returns the changed weight."""
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.ones(1000)}}, path)
    content = bytearray(path.read_bytes())
    position = content.find(np.ones(1000, np.float32).tobytes()) + 2002
    content[position] ^= 64
    path.write_bytes(content)
    assert not torch.load(path, weights_only=True)["state_dict"]["weight"].eq(1).all()
    with pytest.raises(CheckpointError, match=r"last\.ckpt cannot be read as a checkpoint: it is damaged"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"it is damaged"):
        AtomicCheckpointIO().load_checkpoint(path)


class Trap:
    """Creates the folder ``mark`` when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_a_file_with_code_is_refused_and_the_code_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    pickled, saved = tmp_path / "pickle.ckpt", tmp_path / "saved.ckpt"
    pickled.write_bytes(pickle.dumps({"state_dict": Trap(mark)}))
    torch.save({"state_dict": {"weight": Trap(mark)}}, saved)
    with pytest.raises(CheckpointError, match=r"pickle\.ckpt cannot be read.*a pickle of arbitrary objects"):
        load_checkpoint(pickled)
    with pytest.raises(CheckpointError, match=r"saved\.ckpt cannot be read.*objects other than tensors.*mkdir"):
        load_checkpoint(saved)
    with pytest.raises(CheckpointError, match=r"saved\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(saved, weights_only=False)  # even with weights_only=False
    with pytest.raises(CheckpointError, match=r"saved\.ckpt"):
        fit(tmp_path, resume=saved)
    assert not mark.exists()


def test_a_damaged_or_foreign_file_is_refused_with_the_reason(tmp_path: Path) -> None:
    whole = tmp_path / "whole.ckpt"
    torch.save({"state_dict": {"weight": torch.zeros(10_000)}}, whole)
    assert load_checkpoint(whole)["state_dict"]["weight"].shape == (10_000,)
    wrong = {
        "cut": (whole.read_bytes()[:20_000], "damaged or incomplete"),
        "cut early": (whole.read_bytes()[:50], "damaged or incomplete"),
        "text": (b"not a checkpoint at all", "not written by torch.save"),
        "empty": (b"", "it is empty"),
    }
    for name, (content, reason) in wrong.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name} cannot be read.*{reason}"):
            load_checkpoint(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "archive", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(CheckpointError, match=r"archive cannot be read.*damaged"):
        load_checkpoint(tmp_path / "archive")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "weights")
    with pytest.raises(CheckpointError, match="weights is not a checkpoint: it has no 'state_dict'"):
        load_checkpoint(tmp_path / "weights")
    with pytest.raises(CheckpointError, match="absent is not a checkpoint: no such file"):
        load_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="is not a checkpoint: it is a folder"):
        load_checkpoint(tmp_path)


def test_a_value_that_cannot_be_read_back_is_refused_when_saved(tmp_path: Path) -> None:
    state = {**STATE, "callbacks": {"Probe": {"best": [np.float64(0.5)]}}}
    with pytest.raises(
        CheckpointError, match=r"checkpoint\['callbacks'\]\['Probe'\]\['best'\]\[0\] is a numpy.float64"
    ):
        AtomicCheckpointIO().save_checkpoint(state, tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == []
