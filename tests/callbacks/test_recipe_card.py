from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.callbacks import recipe_card
from src.callbacks.recipe_card import RecipeCard
from src.loggers import OrderedTensorBoardLogger
from tests.callbacks.small_runs import SmallModule, fit

CONFIG = {"model": {"_target_": "a.B", "layers": [1, 2]}, "lr": 1.5e-4, "note": None}
SUMMARY = {"paper": "He et al. | 2022", "deviations": "none", "learning rate": "1.5e-4 x batch / 256"}


def test_the_card_describes_the_run(tmp_path: Path) -> None:
    module = SmallModule()
    module.layer.bias.requires_grad_(False)
    run_dir = tmp_path / "my_run"
    fit(run_dir, RecipeCard(run_dir, CONFIG, SUMMARY), module=module, loggers=[OrderedTensorBoardLogger(run_dir)])
    card = (run_dir / "card.md").read_text()
    assert card.startswith("# my_run\n")
    assert "| paper | He et al. \\| 2022 |\n| deviations | none |\n| learning rate | 1.5e-4 x batch / 256 |" in card
    assert "| layer | 20 | 16 |\n| all | 20 | 16 |" in card  # 4 x 4 weights are trainable, 4 biases are not
    assert f"| torch | {torch.__version__} |" in card
    assert "| device | 1 x cpu |\n| precision | 32-true |" in card
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0]) == CONFIG
    assert [path.name for path in run_dir.iterdir() if path.name.startswith(".")] == []
    events = EventAccumulator(str(run_dir))
    events.Reload()
    [text] = events.Tensors("recipe/text_summary")
    assert text.tensor_proto.string_val[0].decode() == card


def test_the_commit_is_that_of_the_code_or_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    code = tmp_path / "src" / "callbacks"
    code.mkdir(parents=True)
    (code / "recipe_card.py").write_text("1")
    monkeypatch.setattr(recipe_card, "__file__", str(code / "recipe_card.py"))
    find = recipe_card.commit.__wrapped__
    assert find() == "unknown"
    git("init", "-q")
    assert find() == "unknown"  # nothing committed
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert find() == git("rev-parse", "HEAD")
    (code / "recipe_card.py").write_text("2")
    assert find() == git("rev-parse", "HEAD") + " (modified)"
    inner = tmp_path / "vendored" / "src" / "callbacks"
    inner.mkdir(parents=True)
    monkeypatch.setattr(recipe_card, "__file__", str(inner / "recipe_card.py"))
    assert find() == "unknown"  # not the commit of another project
