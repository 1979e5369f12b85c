"""Every command with odd paths and names in the place of each of its arguments: it ends with a sentence.

`make fuzz` tries all of them.
"""

from __future__ import annotations

import importlib
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz.cases import count, seed
from tests.fuzz.forks import in_fork
from tests.fuzz.test_configuration import SMALL

# command, its argument that is replaced, and the others
COMMANDS: list[tuple[str, str, list[str]]] = [
    ("src.train", "experiment", []),
    ("src.train", "checkpoint", ["experiment=finetune_vitb", *SMALL]),
    ("src.train", "checkpoint", ["experiment=dino_vits", *SMALL]),
    ("src.train", "checkpoint", ["experiment=clip_vitb32", *SMALL]),
    ("src.train", "paths.data", ["experiment=mae_tiny", "data=image_folder", "scale=tiny"]),
    ("src.train", "paths.data", ["experiment=mae_tiny", "data=webdataset", "scale=tiny"]),
    ("src.train", "paths.data", ["experiment=clip_vitb32", "data=pairs", "scale=tiny"]),
    ("src.train", "paths.data", ["experiment=videomae_vitb", "data=video_folder", "scale=tiny"]),
    ("src.train", "run.name", ["experiment=mae_tiny", *SMALL, "model.mask_ratio=2"]),
    ("src.train", "data", ["experiment=mae_tiny"]),
    ("src.resume", "run", []),
    ("src.evaluate", "run", []),
    ("src.export.__main__", "run", []),
    ("src.gauntlet.__main__", "run", []),
    ("src.claims.__main__", "claim", []),
    ("src.show_config", "experiment", []),
    ("src.show_config", "vs", ["experiment=mae_tiny"]),
]
FILES: dict[str, Callable[[Path], None]] = {
    "an empty folder": lambda path: path.mkdir(),
    "an empty file": lambda path: path.touch(),
    "a file of noise": lambda path: path.write_bytes(random.Random(0).randbytes(500)),
    "a file of text": lambda path: path.write_text("text\n"),
    "a pipe": lambda path: os.mkfifo(path),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a run without a configuration": lambda path: (path / "checkpoints").mkdir(parents=True),
    "a run with a broken configuration": lambda path: _run(path, "model: [\n"),
    "a run with another's configuration": lambda path: _run(path, "a: 1\n"),
    "a run with a number for a configuration": lambda path: _run(path, "1\n"),
}
NAMES = ["", " ", ".", "/", "~", "nowhere", "a b", "a'b", 'a"b', "$HOME", "a=b", "a,b", "{a}", "[a]", "ä", "-1", "null"]
NAMES += ["\udcff", "\n", "a" * 300, "../x", "/dev/null", "/dev/zero"]


def _run(path: Path, config: str) -> None:
    path.mkdir()
    (path / "config.yaml").write_text(config)


def cases(number: int) -> list[tuple[str, str, list[str], Callable[[Path], None] | None, str]]:
    odd = [(make, title) for title, make in FILES.items()] + [(None, name) for name in NAMES]
    every = [(*command, *case) for command in COMMANDS for case in odd]
    return random.Random(seed()).sample(every, min(number, len(every)))


def test_a_command_with_an_odd_argument_ends_with_a_sentence(tmp_path):
    wrong = []
    for number, (command, argument, others, make, name) in enumerate(cases(count(60))):
        value = name
        if make is not None:
            path = tmp_path / str(number) / name
            path.parent.mkdir()
            make(path)
            value = str(path)
        answer = in_fork(importlib.import_module(command).main, [*others, f"{argument}={value}"])
        if answer:
            wrong.append(f"{command} {argument}={name[:40]!r} {' '.join(others[:1])}: {answer}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("command", sorted({command for command, _, _ in COMMANDS}))
def test_the_commands_exist(command):
    assert callable(importlib.import_module(command).main)
