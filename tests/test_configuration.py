from __future__ import annotations

import copy
import math
import sys

import pytest
import torch
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from src import configuration, runs, train
from src.configuration import apply, check_complete, compose
from src.errors import UserError, nearest

TINY = "experiment=mae_tiny"


@pytest.fixture(scope="module")
def composed():
    return train.compose([TINY])


@pytest.fixture
def tiny(composed):
    """The configuration of `mae_tiny`, a copy to change."""
    return copy.deepcopy(composed)


def answer(*words: str) -> str:
    """What the person who typed ``words`` is told."""
    with pytest.raises(UserError) as refusal:
        train.compose(words)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["experiment=mae_vitbb"], "there is no experiment 'mae_vitbb'; did you mean mae_vitb or "),
        (["experiment=xyz"], "there is no experiment 'xyz'; there are "),
        (["experiment="], "there is no experiment ''; there are "),
        (["experiment=null"], "there is no experiment 'null'; there are "),
        ([TINY, "scale=tinny"], "there is no scale 'tinny'; did you mean tiny?"),
        ([TINY, "scale="], "there is no scale ''; there are paper, smoke, tiny"),
        ([TINY, "data=scene"], "there is no data 'scene'; did you mean scenes?"),
        ([TINY, "data=_base"], "there is no data '_base'"),
        ([TINY, "recipe=mea"], "there is no recipe 'mea'; did you mean mae or "),
        ([TINY, "trainer.max_epoch=3"], "there is no key 'trainer.max_epoch'; did you mean trainer.max_epochs or "),
        ([TINY, "data.batchsize=3"], "there is no key 'data.batchsize'; did you mean data.batch_size"),
        ([TINY, "model.maskratio=0.5"], "there is no key 'model.maskratio'; did you mean model.mask_ratio"),
        ([TINY, "zzzzzzzz=1"], "there is no key 'zzzzzzzz'; see config.yaml of any run"),
        ([TINY, "trainer.max_epochs=three"], "; 'three' is not"),
        ([TINY, "optimizer.algorithm.betas.1=x"], "optimizer.algorithm.betas.1 is a number (0.95); 'x' is not"),
        ([TINY, "seed=true"], "seed is a number (0); 'true' is not"),
        ([TINY, "image_size="], "image_size is a number (32); '' is not"),
        ([TINY, "verbose"], "cannot read the override 'verbose' (key=value is expected, "),
        ([TINY, "=3"], "there is no key ''"),
        ([TINY, "data.mean=[1,"], "cannot read the override 'data.mean=[1,' (key=value is expected, "),
        ([TINY, "seed=1,2"], "'seed=1,2' has several values; a run takes one"),
        ([TINY, "~nothing"], "'nothing' does not exist"),
        ([TINY, "optimizer.lr=${oops}"], "Interpolation key 'oops' not found"),
        ([TINY, "optimizer.lr=${linear_lr:1,2,0}"], "division by zero"),
        ([TINY, "data=imagenet"], "this data set is read from a folder: name it with DATA_DIR=<folder>"),
        ([TINY, "data=cifar10", "scale=paper"], "name it with DATA_DIR=<folder>"),
        ([TINY, "data=huggingface"], "missing value: data.source.path=…"),
        ([TINY, "data=webdataset"], "missing value: data.source.shards.train=…, data.source.shards.val=…"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_answered_with_what_to_type(words, told):
    assert told in answer(*words)


@pytest.mark.parametrize("word", ["a/{00..11}.tar", "'a/{00..11}.tar'", '"a/{00..11}.tar"'])
def test_numbered_shards_need_no_quotes_that_outlast_the_shell(word):
    words = [TINY, "data=webdataset", f"data.source.shards.train={word}", "data.source.shards.val=[a/{0..1}.tar,b.tar]"]
    with pytest.raises(UserError, match="cannot read the override"):
        compose("train", words)  # a list is Hydra's own to read
    shards = compose("train", words[:-1]).data.source.shards
    assert shards.train == "a/{00..11}.tar"


def test_nearest_names_at_most_three_and_nothing_where_nothing_is_near():
    assert nearest("mae_vitb", ["mae_vitl", "mae_vitb16", "mae_vith", "mae_vits"]).count(" or ") == 2
    assert nearest("zzz", ["a", "b"]) == "; there are a, b"
    assert nearest("zzz", [f"option_{number}" for number in range(41)]) == ""
    assert nearest("zzz", [f"option_{number}" for number in range(41)], most=41).endswith("option_39, option_40")
    assert nearest("scene", ["scenes", "scenes_depth"]) == "; did you mean scenes?"  # the other is hardly meant


def test_a_folder_named_by_the_user_reaches_the_source_whatever_is_in_its_name():
    for folder in ("/data/my pictures", "it's/here", "a=b, {c}: [d]", "~/images"):
        quoted = folder.replace("'", "\\'")
        config = train.compose([TINY, "data=imagenet", f"paths.data='{quoted}'"])
        assert config.data.source.root == folder


@pytest.fixture(scope="module")
def recipes():
    """Every experiment at every scale, composed once."""
    pairs = [(name, scale) for name in configuration.names("experiment") for scale in ("paper", "smoke", "tiny")]
    assert len(pairs) >= 7 * 3
    return {
        (name, scale): compose("train", [f"experiment={name}", f"scale={scale}", "paths.data=/data"])
        for name, scale in pairs
    }


def test_every_experiment_composes_completely_at_every_scale(recipes):
    for (name, scale), config in recipes.items():
        check_complete(config)
        assert config.run.scale == scale, name
        assert config.about.paper, name
        assert max(config.trainer.max_epochs, config.trainer.max_steps) > 0, name


def test_a_smoke_run_has_the_papers_architecture_and_input(recipes):
    """Less of everything, but the same model."""
    for (name, scale), config in recipes.items():
        paper = recipes[name, "paper"]
        if scale == "smoke":
            assert plain(config.backbone) == plain(paper.backbone), name
            assert config.image_size == paper.image_size, name
            assert config.data.train_samples * config.trainer.max_epochs <= 2000, name
        if scale == "tiny":
            assert config.image_size < paper.image_size, name
            assert config.data.source.cache_dir == config.paths.cache, name


def plain(node):
    return OmegaConf.to_container(node, resolve=True)


@pytest.mark.parametrize(
    ("name", "base", "batch"), [("mae_vitb", 1.5e-4, 4096), ("finetune_vitl", 1e-3, 1024), ("linear_vitb", 0.1, 16384)]
)
def test_the_papers_learning_rate_follows_its_batch(recipes, name, base, batch):
    config = recipes[name, "paper"]
    assert config.data.batch_size == batch
    assert config.optimizer.lr == pytest.approx(base * batch / 256, rel=1e-12)
    config = compose("train", [f"experiment={name}", "scale=paper", "data.batch_size=64"])
    assert config.optimizer.lr == pytest.approx(base / 4, rel=1e-12)
    assert config.schedules.optimizer.lr.peak == config.optimizer.lr


def test_resolvers():
    configuration.register_resolvers()
    values = OmegaConf.create({"a": "${linear_lr:3.0e-4,512,128}", "b": "${sqrt_lr:3.0e-4,512,128}"})
    assert values.a == pytest.approx(1.2e-3, rel=1e-12)
    assert values.b == pytest.approx(6e-4, rel=1e-12)
    assert math.isclose(values.b**2 / 3e-4, values.a)  # the root rule is the geometric mean of base and linear rule
    assert OmegaConf.create({"dir": "${data_dir:/data}"}).dir == "/data"


def test_the_scale_comes_from_the_machine_unless_it_is_named(monkeypatch):
    for gpu, scale in ((False, "smoke"), (True, "paper")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr(configuration, "default_precision", lambda: "32-true")
        assert configuration.default_scale() == scale
        assert train.compose(["experiment=mae_vitb"]).run.scale == scale
    assert train.compose([TINY]).run.scale == "tiny"  # an experiment may bring its own


@pytest.mark.parametrize(
    ("gpu", "bf16", "amx", "precision"),
    [
        (True, True, False, "bf16-mixed"),
        (True, False, False, "16-mixed"),
        (True, False, True, "16-mixed"),  # the GPU computes, whatever the CPU can
        (False, False, True, "bf16-mixed"),
        (False, True, False, "32-true"),
    ],
)
def test_the_precision_is_the_fastest_the_hardware_multiplies(monkeypatch, gpu, bf16, amx, precision):
    def supported(*, including_emulation: bool) -> bool:
        assert not including_emulation  # emulated bfloat16 would be slower than float32
        return bf16

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert configuration.default_precision() == precision


def test_a_run_takes_the_machines_precision_unless_one_is_named(monkeypatch):
    monkeypatch.setattr(configuration, "default_precision", lambda: "16-mixed")
    assert train.compose([TINY]).trainer.precision == "16-mixed"
    assert train.compose([TINY, "trainer.precision=64-true"]).trainer.precision == "64-true"


def test_parts_of_other_files_are_no_options():
    data = configuration.names("data")
    assert "scenes" in data
    assert not [name for name in data if name.startswith("_")]
    assert (configuration.CONFIGS / "data/_base.yaml").exists()
    assert data == sorted(data)


def test_of_several_experiments_the_last_is_run_and_names_the_folder():
    config = train.compose(["experiment=mae_vitb", "scale=tiny", "experiment=finetune_vitb"])
    assert config.run.experiment == "finetune_vitb"
    assert config.about.family == "downstream"


def test_a_stored_configuration_changes_only_in_keys_it_has(tiny):
    config = tiny
    apply(config, ["trainer.max_epochs=7", "callbacks.visualizations=null", "+data.extra=3"])
    assert (config.trainer.max_epochs, config.callbacks.visualizations, config.data.extra) == (7, None, 3)
    for words, told in (
        (["data=emoji"], "'data' cannot change in a run that exists; start a new one"),
        (["trainer.max_epoch=7"], "there is no key 'trainer.max_epoch'; did you mean trainer.max_epochs"),
        (["seed=seven"], r"seed is a number \(0\); 'seven' is not"),
    ):
        with pytest.raises(UserError, match=told):
            apply(config, words)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["image_size=62"], "in model: image_size: an image of 62x62 pixels is not a whole number of patches of 4x4"),
        (["image_size=2"], r"in model: image_size: an image of 2x2 pixels is not a whole number"),
        (["model.mask_ratio=1.5"], r"in model: model\.mask_ratio=1\.5 must lie between 0 and 1"),
        (["model.decoder_heads=7"], "in model: dim should be divisible by num_heads"),
        (["+model.foo=3"], "in model: .*unexpected keyword argument 'foo'"),
        (
            ["backbone.model_name=vit_tiny_patch16"],
            "in model.backbone: Unknown model .*; did you mean vit_tiny_patch16_",
        ),
        (["trainer.accelerator=gpus"], "in trainer: .*invalid accelerator name"),
        (["trainer.max_epochs=-5"], "in trainer: .*max_epochs. must be a non-negative integer or -1"),
        (["trainer.devices=two"], "in trainer: .*should be an int"),
    ],
)
def test_a_value_that_a_part_refuses_is_answered_with_its_key(tiny, words, told):
    apply(tiny, [*words, "trainer.accelerator=cpu"] if "accelerator" not in words[0] else words)
    with pytest.raises(UserError, match=told):
        configuration.instantiate(tiny.trainer if words[0].startswith("trainer") else tiny.model)


def test_a_mistake_in_the_code_of_a_part_keeps_its_trace():
    broken = OmegaConf.create({"_target_": "tests.test_configuration.Broken"})
    with pytest.raises(InstantiationException, match="IndexError"):
        configuration.instantiate(broken)


class Broken:
    def __init__(self) -> None:
        [].pop()


@pytest.mark.parametrize("name", ["a/b", "../b", "/tmp/b", ".", "..", ".hidden", "b/"])
def test_a_runs_name_is_the_name_of_one_folder(tmp_path, tiny, name):
    tiny.paths.runs, tiny.run.name = str(tmp_path), name
    with pytest.raises(UserError, match="the name of one folder"):
        runs.create(tiny)
    assert list(tmp_path.rglob("config.yaml")) == []


def test_a_run_without_a_name_gets_a_folder_of_its_own(tmp_path, composed, monkeypatch):
    """Also where several start in the same second; its configuration is stored whole and read back alike."""
    made = []
    monkeypatch.setattr(runs.time, "strftime", lambda form: "2030-01-01_00-00-00")
    for _ in range(3):
        config = copy.deepcopy(composed)
        config.paths.runs = str(tmp_path)
        run = runs.create(config)
        made.append(run.dir.name)
        assert run.config() == config
        monkeypatch.delenv("PRETEXT_RUN_DIR")
    assert made == ["2030-01-01_00-00-00", "2030-01-01_00-00-00_2", "2030-01-01_00-00-00_3"]


def test_processes_started_by_a_launcher_share_the_folder(tmp_path, composed, monkeypatch):
    config, other = copy.deepcopy(composed), copy.deepcopy(composed)
    config.paths.runs = other.paths.runs = str(tmp_path)
    first = runs.create(config)
    assert runs.inherited() is None  # the process that decided
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert runs.create(other) == first == runs.inherited()
    assert (other.run.name, other.run.dir) == (config.run.name, config.run.dir)
    assert len(list(tmp_path.glob("mae_tiny/*"))) == 1


def test_commands_end_with_the_answer_and_code_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "experiment=mae_vitbb"])
    with pytest.raises(SystemExit) as end:
        configuration.run_main(train.main)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: there is no experiment 'mae_vitbb'; did you mean mae_vitb")
