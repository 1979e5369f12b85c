"""A claim about two towers is judged by the evaluation that training and `make evaluate` use, on the claim's split."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from src import train
from src.claims.metrics import FineTuned, ImageText, OnEncoder, OnPatches, Subject
from src.errors import UserError
from src.evaluation.image_text import ImageTextEvaluation
from src.evaluation.label_propagation import LabelPropagation
from src.evaluation.patch_knn import PatchSegmentation
from tests.commands import SECONDS
from tests.evaluation.test_image_text import Reader, data
from tests.evaluation.test_label_propagation import Patches, Walkers
from tests.evaluation.test_patch_knn import Colors, bands


def trained(tmp_path, module: nn.Module | None = None, **options: Any) -> Any:
    made = data(tmp_path)
    module = module or Reader(made, **options)
    return SimpleNamespace(
        module=module, datamodule=made, device=torch.device("cpu"), precision="32-true", split="test"
    )


def test_a_number_of_two_towers_is_the_evaluation_s_own(tmp_path, monkeypatch):
    asked = []
    images = ImageTextEvaluation._images
    monkeypatch.setattr(ImageTextEvaluation, "_images", lambda self, *a: asked.append(self) or images(self, *a))
    evaluation = ImageTextEvaluation(templates=["{}"], samples=None)
    assert ImageText("zeroshot_top1", evaluation)(trained(tmp_path)) == 1
    assert ImageText("retrieval_i2t_r1", evaluation)(trained(tmp_path, blind=True)) == 0.1
    assert ImageText("gap")(trained(tmp_path)) < 1e-6
    assert [each.split for each in asked] == ["test"] * 3
    assert asked[2].samples is None  # all of what a claim is judged on


def test_what_cannot_be_judged_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no 'zeroshot_top'.*zeroshot_top1"):
        ImageText("zeroshot_top")(trained(tmp_path))
    with pytest.raises(UserError, match=r"of a method with a text tower, which Linear is not"):
        ImageText("zeroshot_top1")(trained(tmp_path, module=nn.Linear(1, 1)))


def test_a_fine_tuned_number_goes_on_from_the_checkpoint_and_is_of_the_claim_s_split(tmp_path, monkeypatch):
    given = []

    def fine_tuned(recipe: Any, folder: Path, metric: str) -> float:
        given.append((recipe, list(folder.iterdir()), metric))
        return 0.25

    monkeypatch.setattr("src.evaluate.fine_tuned", fine_tuned)
    config = train.compose(SECONDS)
    metric = FineTuned("finetune_vitb", overrides=["trainer.max_epochs=3"])
    for checkpoint in (tmp_path / "last.ckpt", None):
        assert metric(Subject(config, "test", checkpoint)) == 0.25
    for (recipe, content, name), checkpoint in zip(given, (str(tmp_path / "last.ckpt"), None), strict=True):
        assert (recipe.checkpoint, recipe.data.eval_split, recipe.trainer.max_epochs) == (checkpoint, "test", 3)
        assert (recipe.run.experiment, recipe.backbone.embed_dim, content, name) == (
            "finetune_vitb",
            32,
            [],
            "eval/top1",
        )
    monkeypatch.setattr("src.evaluate.fine_tuned", lambda *_: float("nan"))
    with pytest.raises(UserError, match="eval/top1 is not a finite number"):
        metric(Subject(config, "val"))


def test_a_number_of_positions_is_the_evaluation_s_own():
    run: Any = SimpleNamespace(
        encoder=lambda name: Colors(),
        datamodule=bands(),
        device=torch.device("cpu"),
        precision="32-true",
        split="test",
    )
    expected = PatchSegmentation()({"it": Colors()}, bands(), run.device, split="test")["it"]
    assert OnPatches()(run) == expected["patch_miou"]
    assert OnEncoder(PatchSegmentation(), "patch_accuracy")(run) == expected["patch_accuracy"]
    run.encoder = lambda name: Patches()
    follow = LabelPropagation(partial(Walkers), radius=30)
    assert OnEncoder(follow, "labelpropagation_j")(run) > 0.5
    with pytest.raises(UserError, match=r"LabelPropagation reports no 'labelpropagation'; did you mean"):
        OnEncoder(follow, "labelpropagation")(run)
