"""Configurations in the folders of other people's runs: what they may build, read and write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from src import configuration, resume, runs
from src.configuration import PROJECT
from src.errors import UserError
from src.evaluate import main as evaluate
from src.export.__main__ import main as export
from src.runs import Run


@pytest.fixture(scope="module")
def honest() -> DictConfig:
    overrides = ["experiment=clip_vitb32", "scale=tiny", "run.name=theirs", "run.dir=/theirs"]
    return configuration.compose("train", overrides)


def stored(config: DictConfig, folder: Path, key: str = "", value: Any = None) -> Run:
    config = config.copy()
    OmegaConf.set_struct(config, False)
    if key:
        OmegaConf.update(config, key, value, force_add=True, merge=False)
    run = Run(folder)
    runs.store(run, config)
    return run


@pytest.mark.parametrize("experiment", configuration.names("experiment"))
def test_every_experiment_is_made_of_what_a_stored_run_may_name(experiment: str, tmp_path: Path) -> None:
    overrides = [f"experiment={experiment}", "run.name=mine", f"run.dir={tmp_path}"]
    config = configuration.compose("train", overrides)
    read = stored(config, tmp_path).config()
    assert OmegaConf.to_container(read, resolve=False) == OmegaConf.to_container(config, resolve=False)


FUNCTION = {"_target_": "hydra.utils.get_method"}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model._target_", "os.system", r"model._target_ names os.system, which .* PRETEXT_TRUST=os before"),
        ("model._target_", "torch.load", "model._target_ names torch.load"),
        ("backbone._target_", "torch.hub.load", "backbone._target_ names torch.hub.load"),
        ("backbone._target_", "numpy.load", "backbone._target_ names numpy.load"),
        # through a module of the project, or a class
        ("backbone._target_", "src.checkpoint_io.torch.load", "backbone._target_ names src.checkpoint_io.torch.load"),
        ("backbone._target_", "src.models.masked.mae.torch.load", "names src.models.masked.mae.torch.load"),
        ("backbone._target_", "src.files.write_atomically", "names src.files.write_atomically"),
        ("backbone._target_", "src.datamodules.scenes.cache.subprocess.run", "names src.datamodules.scenes.cache.sub"),
        ("backbone._target_", "src.models.masked.mae.MAE.load_from_checkpoint", "names .*load_from_checkpoint"),
        ("backbone._target_", "timm.models.load_checkpoint", "names timm.models.load_checkpoint"),
        ("backbone._target_", "timm.models._helpers.torch.load", "names timm.models._helpers.torch.load"),
        ("backbone._target_", "lightning.pytorch.cli.LightningCLI", "names lightning.pytorch.cli.LightningCLI"),
        ("backbone._target_", "hydra.utils.call", "names hydra.utils.call"),
        ("backbone._target_", "${run.name}", r"backbone._target_ names \$\{run.name\}"),
        ("data.train_view.hidden", [{"deep": {"_target_": "builtins.eval"}}], r"hidden.0.deep._target_ names builtins"),
        ("model.pool", {**FUNCTION, "path": "os.system"}, "model.pool.path names os.system"),
        ("model.pool", {**FUNCTION, "_args_": ["os.system"]}, "_args_.0 is an argument without a name"),
        # the environment, and configurations that only appear when they are resolved
        ("about.paper", "${oc.env:HOME}", "about.paper uses the resolver 'oc.env'"),
        ("about.paper", "a ${times:2,${oc.env:HOME}}", "about.paper uses the resolver 'oc.env'"),
        ("about.paper", "${${run.name}:HOME}", "about.paper uses the resolver"),
        ("about.paper", "${oc.${run.name}:HOME}", "about.paper uses the resolver"),
        ("model", "${data_dir:{_target_:os.system,command:id}}", "model computes a list or a mapping"),
        ("model", "${times:[{_target_:os.system}],1}", "model computes a list or a mapping"),
        # writing
        ("callbacks.checkpoints.folder", "/etc", r"callbacks.checkpoints.folder=/etc is outside of the run's folder"),
        ("callbacks.checkpoints.folder", "${run.dir}/../..", "callbacks.checkpoints.folder=.* is outside"),
        ("logger.metrics.path", "src/train.py", "logger.metrics.path=src/train.py is outside"),
        ("logger.tensorboard.save_dir", "~/x", "logger.tensorboard.save_dir=~/x is outside"),
        ("trainer.default_root_dir", "/elsewhere", "trainer.default_root_dir=/elsewhere is outside"),
        ("data.bad_log", "/etc/passwd", "data.bad_log=/etc/passwd is outside"),
        ("data.tokenizer_file", "/etc/passwd", "data.tokenizer_file=/etc/passwd is outside"),
        (
            "model.pool",
            {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "/etc"},
            "model.pool.save_dir=/etc is outside",
        ),
    ],
)
def test_a_stored_run_is_refused_before_anything_is_built(
    honest: DictConfig, tmp_path: Path, key: str, value: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stored(honest, tmp_path, key, value)
    with pytest.raises(UserError, match=f"config.yaml: .*{message}"):
        run.config()
    monkeypatch.setenv("PRETEXT_TRUST", "all")
    run.config()


def test_resume_evaluate_and_export_run_nothing_of_it(honest: DictConfig, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    run = stored(honest, tmp_path, "model", {"_target_": "os.mkdir", "path": str(mark)})
    for main in (resume.main, evaluate, export):
        with pytest.raises(UserError, match=r"model\._target_ names os\.mkdir"):
            main([f"run={run.dir}"])
    assert not mark.exists()


def test_packages_of_the_users_own_are_trusted_by_name(
    honest: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stored(honest, tmp_path, "callbacks.mine", {"_target_": "mine.callbacks.Mine"})
    with pytest.raises(UserError, match="type PRETEXT_TRUST=mine before the command"):
        run.config()
    monkeypatch.setenv("PRETEXT_TRUST", "other,mine")
    assert run.config().callbacks.mine._target_ == "mine.callbacks.Mine"


def test_a_cache_folder_of_another_machine_is_replaced_by_this_ones(honest: DictConfig, tmp_path: Path) -> None:
    gone = stored(honest, tmp_path, "paths.cache", "/scratch/of/another/machine").config()
    assert (PROJECT / gone.paths.cache).resolve() == PROJECT / "cache"
    there = stored(honest, tmp_path, "paths.cache", str(tmp_path)).config()
    assert there.paths.cache == str(tmp_path)
