"""A claim is judged by the evaluations that training and `make evaluate` use, on the claim's split."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from torch import nn

from src import train
from src.claims.metrics import Logged, Metric, values_of
from src.errors import UserError
from src.evaluation.patch_knn import PatchSegmentation
from src.evaluation.subject import Subject
from src.trained import RunSubject
from tests.commands import SECONDS
from tests.evaluation.test_image_text import Reader, data
from tests.evaluation.test_label_propagation import Patches, Walkers
from tests.evaluation.test_patch_knn import Colors, bands
from tests.evaluation.toy import subject, towers


class Configured(RunSubject):
    """Parts that need no run, as a run's."""

    def __init__(self, of: Subject) -> None:
        Subject.__init__(self, of.datamodule, None, split="test", bank_samples=None, query_samples=None)
        self.device, self.precision = of.device, of.precision
        self.config, self.checkpoint = OmegaConf.create({"image_size": 8}), None
        self.module, self.datamodule = of._module, of.datamodule  # type: ignore[assignment]
        if of._encoders is not None:
            self.all_encoders = of._encoders


def number(of: RunSubject, evaluation: Any, value: str, encoder: str | None = None) -> float:
    return values_of({"it": {"evaluation": evaluation, "value": value, "encoder": encoder}}, of)["it"]


def trained(tmp_path, module: nn.Module | None = None, **options: Any) -> Configured:
    made = data(tmp_path)
    return Configured(towers(module or Reader(made, **options), made))


def test_numbers_of_two_towers_are_those_of_the_evaluation(tmp_path):
    prompts = {"_target_": "src.evaluation.zero_shot.ZeroShot", "templates": ["{}"], "single": "{}"}
    assert number(trained(tmp_path), prompts, "zeroshot_top1") == 1
    assert number(trained(tmp_path, blind=True), "retrieval", "retrieval_i2t_r1") == 0.1
    assert number(trained(tmp_path), "geometry", "gap") < 1e-6


def test_not_applicable_evaluations_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no 'zeroshot_top'.*zeroshot_top1"):
        number(trained(tmp_path), "zeroshot", "zeroshot_top")
    with pytest.raises(UserError, match="an image tower and a text tower is needed, which Linear is not"):
        number(trained(tmp_path, module=nn.Linear(1, 1)), "zeroshot", "zeroshot_top1")
    with pytest.raises(UserError, match="there is no evaluation 'zero'; did you mean zeroshot"):
        number(trained(tmp_path), "zero", "zeroshot_top1")


def test_logged_values_have_a_split_and_no_random_baseline():
    logged = {"evaluation": {"_target_": "src.claims.metrics.Logged"}}
    health, online = (Metric(**logged | {"value": value}) for value in ("health/feature_std", "eval/knn_top1"))
    assert (health.splits, online.splits, health.untrained) == (("train",), ("val",), False)
    other = Metric("knn", "knn_top1")
    assert (other.splits, other.untrained) == (("test", "val"), True)
    assert Logged()(subject({}, bands(), logged={"a": 1.0})) == {"a": 1.0}


def test_fine_tuning_starts_from_the_checkpoint_and_uses_the_claim_s_split(tmp_path, monkeypatch):
    given = []

    def fine_tune(recipe: DictConfig, folder: Path) -> dict[str, float]:
        given.append((recipe, list(folder.iterdir())))
        return {"eval/top1": 0.25, "eval/loss": float("nan")}

    monkeypatch.setattr("src.finetuning.fine_tune", fine_tune)
    config = train.compose(SECONDS)
    finetuning = {
        "_target_": "src.finetuning.FineTuning",
        "experiment": "finetune_vitb",
        "overrides": ["trainer.max_epochs=3"],
    }
    for checkpoint in (tmp_path / "last.ckpt", None):
        assert number(RunSubject(config, checkpoint, split="test"), finetuning, "eval/top1") == 0.25
    for (recipe, content), checkpoint in zip(given, (str(tmp_path / "last.ckpt"), None), strict=True):
        assert (recipe.checkpoint, recipe.data.eval_split, recipe.trainer.max_epochs) == (checkpoint, "test", 3)
        assert (recipe.run.experiment, recipe.backbone.embed_dim, content) == ("finetune_vitb", 32, [])
    with pytest.raises(UserError, match="eval/loss is not a finite number"):
        number(RunSubject(config, None), finetuning, "eval/loss")


def test_metrics_of_one_encoder_share_its_features(monkeypatch):
    """Three metrics of two encoders read the data twice."""
    both = Configured(subject({"student": Colors(), "teacher": Patches()}, bands(), split="test"))
    read = []
    monkeypatch.setattr(
        Subject, "_read", lambda self, needs, read_once=Subject._read: (read.append(needs), read_once(self, needs))[1]
    )
    spec = {"evaluation": "knn", "value": "knn_top1", "encoder": None}
    found = values_of(
        {"a": spec, "b": spec | {"encoder": "teacher"}, "c": spec | {"evaluation": "linear", "value": "linear_top1"}},
        both,
    )
    assert list(found) == ["a", "b", "c"]
    assert len(read) == 2


def test_numbers_of_patches_are_those_of_the_evaluation():
    colors = Configured(subject({"it": Colors()}, bands()))
    expected = PatchSegmentation()(subject({"it": Colors()}, bands(), split="test"))
    for value in ("patch_miou", "patch_accuracy"):
        assert number(colors, "patchknn", value) == expected[value]
    patches = Configured(subject({"it": Patches()}, bands()))
    walkers = {"_target_": f"{Walkers.__module__}.Walkers", "_partial_": True}
    follow = {"_target_": "src.evaluation.label_propagation.LabelPropagation", "films": walkers, "radius": 30}
    assert number(patches, follow, "labelpropagation_j") > 0.5
    with pytest.raises(UserError, match=r"the evaluation reports no 'labelpropagation'; did you mean"):
        number(patches, follow, "labelpropagation")


def test_an_encoder_is_the_first_or_the_named_one():
    both = subject({"student": Colors(), "teacher": Patches()}, bands(), split="test")
    run = Configured(both)
    values = [number(run, "patchknn", "patch_miou", name) for name in (None, "student", "teacher")]
    of_each = PatchSegmentation().by_encoder(both)
    assert values == [of_each[name]["patch_miou"] for name in ("student", "student", "teacher")]
    with pytest.raises(UserError, match="there is no encoder 'teecher'; did you mean teacher"):
        number(run, "patchknn", "patch_miou", "teecher")
