import json
import re
import sys

import pytest
import torch
from omegaconf import open_dict

from src import configuration, evaluate, runs, train, trained
from src.errors import UserError
from src.evaluation.evaluation import run_evaluations
from src.evaluation.knn import KNN
from src.evaluation.linear import LinearProbe
from src.evaluation.pixels import PixelEncoder
from src.evaluation.retrieval import Instances
from src.evaluation.subject import Subject
from src.evaluation_config import evaluation_config, evaluation_of
from src.finetuning import FineTuning
from tests.commands import SECONDS
from tests.evaluation.toy import subject

WORDS = [
    *SECONDS,
    "data.train_samples=48",
    "data.batch_size=8",
    "callbacks.progress=null",
    "callbacks.visualizations=null",
]
DATA = [word for word in WORDS if word.startswith(("data.source", "data.train_samples", "data.eval_samples"))]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.delenv("PRETEXT_RUN_DIR", raising=False)
    yield
    monkeypatch.setenv("PRETEXT_RUN_DIR", "")  # what a run of this process left there goes with the test
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> runs.Run:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRETEXT_RUN_DIR", "")
        assert train.main([*WORDS, f"paths.runs={folder}", "run.name=small"]) == 0
    return runs.Run(folder / "mae_tiny" / "small")


def scores(run: runs.Run, *words: str) -> dict:
    assert evaluate.main([f"run={run.dir}", *words]) == 0
    return json.loads((run.dir / "evaluate" / "scenes.json").read_text())


def test_offline_numbers_equal_online_ones(run, capsys):
    online = run.metrics()["train"]["eval/knn_top1"]
    found = scores(run, "eval=knn", "checkpoint=last")
    assert found["encoder"]["knn_top1"] == pytest.approx(online, abs=1e-7)
    printed = capsys.readouterr().out
    assert printed.count("knn_top1") == 1
    assert f"{100 * online:.2f} %" in printed
    assert re.search(r"on scenes: 16 images, +learning from 48", " ".join(printed.split()))


def test_a_paper_s_run_is_evaluated_on_all_images_and_others_as_online(run):
    config = run.config()
    with open_dict(config):
        config.callbacks.evaluation.bank_samples = 30
    limits = {}
    for scale in ("paper", "tiny", None):
        with open_dict(config):
            config.run.scale = scale
        settled = evaluation_config(_Stored(config), None, [])
        limits[scale] = (settled.evaluate.bank_samples, settled.evaluate.query_samples)
        fewer = evaluation_config(_Stored(config), None, ["evaluate.bank_samples=5"])
        assert fewer.evaluate.bank_samples == 5
    online = config.callbacks.evaluation.get("query_samples", 10_000)
    assert limits == {"paper": (None, None), "tiny": (30, online), None: (30, online)}


class _Stored:
    """A run with another stored configuration."""

    def __init__(self, config):
        self.stored = config

    def config(self):
        return self.stored.copy()


def test_every_encoder_and_baseline_is_evaluated_by_the_shared_protocol(run):
    found = scores(run, "eval=[knn,linear,random,pixels]", "checkpoint=last")
    config = run.config()
    encoders = {
        "encoder": trained.load(config, run.last).encoders()["encoder"],
        "random": trained.fresh(config).encoders()["encoder"],
        "pixels": PixelEncoder(),
    }
    datamodule = configuration.instantiate(config.data)
    for name, encoder in encoders.items():
        alone = run_evaluations(subject({name: encoder}, datamodule), [KNN(), LinearProbe()])
        assert {metric: found[name][metric] for metric in alone} == pytest.approx(alone)
    trained_weight, random_weight = (encoders[name].backbone.cls_token for name in ("encoder", "random"))
    assert not torch.equal(trained_weight, random_weight)


def test_results_are_added_to_stored_ones(run):
    scores(run, "eval=knn")
    before = run.metrics()
    scores(run, "eval=linear")
    after = run.metrics()
    assert after["train"] == before["train"]
    assert after["evaluate"]["scenes"]["encoder"].keys() >= {"knn_top1", "linear_top1"}
    assert after["evaluate"]["scenes"] == json.loads((run.dir / "evaluate/scenes.json").read_text())


def test_the_same_data_named_anew_gives_the_same_numbers(run):
    own = scores(run, "eval=knn")["encoder"]["knn_top1"]
    assert scores(run, "eval=knn", "data=scenes_single", *DATA, "data.num_workers=0")["encoder"]["knn_top1"] == own


def test_other_data_comes_with_its_own_source_and_keeps_the_runs_batch(run):
    config = evaluation_config(run, "scenes", [*DATA, "data.num_workers=0"])
    assert config.data.train_view == run.config().data.train_view
    assert config.data.batch_size == run.config().data.batch_size
    assert config.data.source.count == {"train": 64, "val": 16, "test": 16}
    assert config.image_size == 32


def test_other_data_keeps_the_runs_normalization(tmp_path):
    """The encoder was trained with it, whatever the other data set's own is."""
    config = train.compose([*WORDS, f"paths.runs={tmp_path}", "+data.mean=[0.1,0.2,0.3]", "+data.std=[0.4,0.5,0.6]"])
    run = runs.Run(tmp_path)
    runs.store(run, config)
    for data in ("scenes", "cifar10"):
        other = evaluation_config(run, data, []).data
        assert (list(other.mean), list(other.std)) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
        assert other.batch_size == config.data.batch_size
    # a run with the defaults of the code keeps them, whatever the other data's file sets
    with open_dict(config):
        del config.data.mean, config.data.std
    runs.store(run, config)
    assert not {"mean", "std"} & set(evaluation_config(run, "cifar10", []).data)


def test_the_filter_of_training_texts_is_not_applied_to_other_data(tmp_path):
    """Other data may have no texts, such as labelled images for zero-shot classification."""
    chosen = "+data.text_filter={_target_: src.datamodules.sources.text_filter.TextFilter}"
    run = runs.Run(tmp_path)
    runs.store(run, train.compose([*WORDS, f"paths.runs={tmp_path}", chosen]))
    assert "text_filter" in run.config().data
    assert "text_filter" not in evaluation_config(run, "cifar10", []).data


def test_an_evaluation_keeps_the_settings_it_had_during_training(tmp_path):
    config = train.compose([*WORDS, f"paths.runs={tmp_path}", "callbacks.evaluation.evaluations.knn.k=7"])
    run = runs.Run(tmp_path)
    runs.store(run, config)
    assert evaluation_config(run, None, [], as_online=True).evaluation.knn.k == 7
    assert evaluation_config(run, None, []).evaluation.knn.k == 20
    assert evaluation_config(run, None, ["evaluation.knn.k=3"], as_online=True).evaluation.knn.k == 3


def test_every_file_of_configs_evaluation_is_an_evaluation(run):
    config = evaluation_config(run, None, [])
    names = configuration.names("evaluation")
    assert {"knn", "linear", "zeroshot", "captions", "labelpropagation"} <= set(names)
    for name in names:
        assert callable(evaluation_of(config, name))
    with pytest.raises(UserError, match="there is no evaluation 'kn'; did you mean knn"):
        evaluation_of(config, "kn")


def test_fine_tuning_is_a_run_of_its_own_on_the_runs_encoder(run):
    words = ["finetune.trainer.max_epochs=1", "finetune.data.batch_size=8", "finetune.callbacks.progress=null"]
    found = scores(run, "eval=finetune", "finetune.optimizer.lr=0.0", "finetune.schedules.optimizer.lr.end=0.0", *words)
    sub = runs.find(str(run.dir / "evaluate" / "finetune_scenes"))
    assert found["encoder"]["finetune_top1"] == sub.metrics()["train"]["eval/top1"]
    recipe = sub.config()
    assert (recipe.backbone.embed_dim, recipe.backbone.global_pool, recipe.image_size) == (32, "avg", 32)
    assert recipe.data.train_view._target_.endswith("RandAugmentCrop")
    # at learning rate 0 the backbone is still the pretrained one
    ours, theirs = (torch.load(path, weights_only=True)["state_dict"] for path in (run.checkpoint(), sub.last))
    for name in ("backbone.cls_token", "backbone.blocks.1.mlp.fc2.weight"):
        assert torch.equal(ours[name], theirs[name])
    again = scores(run, "eval=finetune", *words)
    assert (run.dir / "evaluate" / "finetune_scenes_2" / "config.yaml").exists()
    assert 0 <= again["encoder"]["finetune_top1"] <= 1


def test_fine_tuning_judges_on_the_split_that_is_asked_for(run):
    recipes = {split: FineTuning().recipe(run.config(), run.last, split=split) for split in ("val", "test")}
    assert "eval_split" not in recipes["val"].data
    judged = {split: configuration.instantiate(recipe.data).val_dataloader() for split, recipe in recipes.items()}
    assert [judged[split].dataset.source.split for split in ("val", "test")] == ["val", "test"]


def test_a_fine_tuned_run_can_be_judged_too(run):
    words = ["finetune.trainer.max_epochs=1", "finetune.data.batch_size=8", "finetune.callbacks.progress=null"]
    scores(run, "eval=finetune", *words)
    sub = runs.Run(max((run.dir / "evaluate").glob("finetune_scenes*"), key=lambda path: path.stat().st_mtime))
    assert set(scores(sub, "eval=knn")["encoder"]) == {"knn_top1"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval=kn,linear"], "there is no evaluation 'kn'; did you mean knn?"),
        (["evla=knn"], "there is no argument or key 'evla'; did you mean eval"),
        (["data=scene"], "there is no data 'scene'; did you mean scenes?"),
        (["data.batchsize=3"], "there is no key 'data.batchsize'; did you mean data.batch_size"),
        (["checkpoint=bset"], "has no checkpoint 'bset'; there are: best, last"),
        (
            ["eval=finetune", "finetune.trainer.max_epoch=1"],
            "no key 'trainer.max_epoch'; did you mean trainer.max_epochs",
        ),
    ],
)
def test_typos_end_with_the_nearest_names_and_exit_code_2(run, words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate", f"run={run.dir}", *words])
    with pytest.raises(SystemExit) as end:
        configuration.run_main(evaluate.main)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_no_run_or_no_such_run_is_said(run):
    with pytest.raises(UserError, match="missing value: run; type make evaluate RUN="):
        evaluate.main(["eval=knn"])
    with pytest.raises(UserError, match="is not a run's folder"):
        evaluate.main([f"run={run.dir}x"])


SHORT_FILMS = [
    "evaluation.labelpropagation.films.count=1",
    "+evaluation.labelpropagation.films.duration=0.4",
]


def test_further_evaluations_read_the_data_once(run, monkeypatch):
    read, read_features = [], Subject._read
    monkeypatch.setattr(Subject, "_read", lambda self, needs: read.append(needs) or read_features(self, needs))
    words = "lineargrid,lowshot,multilabel,instances,patchknn,labelpropagation"
    found = scores(run, f"eval={words}", "checkpoint=last", *SHORT_FILMS)["encoder"]
    assert len(read) == 1
    assert (read[0].tags, read[0].accepts_shards, len(read[0].readouts)) == (True, False, 4)
    for name in ("lineargrid_top1", "lineargrid_pool", "lowshot10_top1", "multilabel_map", "instances_r5"):
        assert 0 <= found[name] <= 5
    for name in ("patch_miou", "patch_accuracy", "labelpropagation_jf"):
        assert 0 < found[name] < 1
    config = run.config()
    encoder = trained.load(config, run.last).encoders()["encoder"]
    alone = run_evaluations(subject({"": encoder}, configuration.instantiate(config.data)), [Instances()])
    assert {name: found[name] for name in alone} == pytest.approx(alone)


def test_an_evaluation_that_is_not_applicable_is_refused(run):
    with pytest.raises(
        UserError,
        match=r"EVAL=fewshot is not applicable: .* has . samples of class .* raise evaluate.bank",
    ):
        scores(run, "eval=fewshot")


def test_baselines_alone_are_evaluated_by_the_default_evaluations():
    evaluations, default = ["fewshot", "knn", "linear"], ["knn", "linear"]
    assert evaluate.requested("pixels", default, evaluations) == ["pixels", "knn", "linear"]
    assert evaluate.requested(None, default, evaluations) == ["knn", "linear"]
    assert evaluate.requested("pixels knn", default, evaluations) == ["pixels", "knn"]
    assert evaluate.requested("[fewshot,finetune]", default, evaluations) == ["fewshot", "finetune"]


def test_a_file_that_is_no_checkpoint_is_refused_by_name(run, tmp_path):
    (tmp_path / "odd.ckpt").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"odd.ckpt cannot be read as a checkpoint"):
        evaluate.main([f"run={run.dir}", f"checkpoint={tmp_path / 'odd.ckpt'}"])


def test_an_image_tower_that_learned_from_texts_is_fine_tuned_on_images_alone(tmp_path):
    words = ["experiment=clip_vitb32", "scale=tiny", *SECONDS[1:], "data.train_samples=48", "data.batch_size=8"]
    words = [word for word in words if not word.startswith(("experiment=mae", "model.", "optimizer", "scale=smoke"))]
    words += ["model.text.width=32", "model.text.depth=1", "model.text.heads=2", "callbacks.image_text=null"]
    assert train.main([*words, f"paths.runs={tmp_path}", "run.name=pairs", "callbacks.visualizations=null"]) == 0
    run = runs.Run(tmp_path / "clip_vitb32" / "pairs")
    found = scores(
        run,
        "eval=finetune",
        "finetune.trainer.max_epochs=1",
        "finetune.data.batch_size=8",
        "finetune.optimizer.lr=0.0",
        "finetune.schedules.optimizer.lr.end=0.0",
    )
    sub = runs.find(str(run.dir / "evaluate" / "finetune_scenes"))
    recipe = sub.config()
    assert found["encoder"]["finetune_top1"] == sub.metrics()["train"]["eval/top1"]
    assert recipe.data._target_.endswith("DataModule")
    assert recipe.data.mean == run.config().data.mean  # CLIP's own, which its tower has learned from
    assert "tokenizer" not in recipe.data
    ours, theirs = (torch.load(path, weights_only=True)["state_dict"] for path in (run.last, sub.last))
    name = "blocks.0.mlp.fc2.weight"
    assert torch.equal(ours[f"image_encoder.backbone.{name}"], theirs[f"backbone.{name}"])
