"""The configuration of an evaluation: a run's own, the files of configs/evaluation, and other data to evaluate on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from src import configuration, runs
from src.configuration import CONFIGS
from src.datamodules.datamodule import METHOD_KEYS, NORMALIZATION_KEYS
from src.errors import UserError, nearest
from src.evaluation.evaluation import Evaluation


def evaluation_config(
    run: runs.Run, data: str | None, overrides: Sequence[str], *, as_online: bool = False
) -> DictConfig:
    """Returns the run's configuration with what evaluations need: ``evaluate`` (configs/evaluate.yaml) and
    ``evaluation``, which holds the files of configs/evaluation by name.

    Args:
        data: the name in configs/data of other data to evaluate on; None for the run's own. What the method and its
            encoder expect of any data, their normalization included, stays the run's.
        overrides: changes, such as ``evaluate.split=test`` or ``evaluation.knn.k=10``.
        as_online: evaluations that also ran during training keep the settings they had there.

    Raises:
        UserError: an override names no key.
    """
    config = run.config()
    with open_dict(config):
        config.evaluate = OmegaConf.load(CONFIGS / "evaluate.yaml")
        config.evaluation = {name: _file(name) for name in configuration.names("evaluation")}
        for name, settings in _online(config).items() if as_online else ():
            config.evaluation[name] = settings
        if data is not None:
            config.data = _other_data(config, data)
    for override in overrides:
        key = override.partition("=")[0]
        if "." not in key and key not in config:
            keys = ["run", "eval", "checkpoint", "data", *map(str, config)]
            raise UserError(f"there is no argument or key '{key}'{nearest(key, keys)}")
    return configuration.apply(config, overrides)


def evaluation_of(config: DictConfig, spec: str | Mapping[str, Any]) -> Evaluation:
    """Builds an evaluation.

    Args:
        config: of a run, which the evaluation's values may refer to.
        spec: a name in configs/evaluation, or the ``_target_`` of an evaluation and its arguments.

    Raises:
        UserError: there is no evaluation of that name, or its arguments are wrong.
    """
    if isinstance(spec, str):
        files = config.get("evaluation") or dict.fromkeys(configuration.names("evaluation"))
        if spec not in files:
            raise UserError(f"there is no evaluation '{spec}'{nearest(spec, [str(name) for name in files])}")
        name, spec = spec, files[spec] or _file(spec)
    else:
        name = "metric"
    config = config.copy()
    with open_dict(config):
        config.evaluation = {name: spec}  # so that its values can refer to the run's
    return configuration.instantiate(config.evaluation[name])


def data_name(config: DictConfig) -> str:
    """Returns the name of the run's data, "scenes" for ``…ScenesSource``."""
    target = str(config.data.source._target_).rsplit(".", 1)[-1].removesuffix("Source")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", target).lower()


def _file(name: str) -> Any:
    return OmegaConf.load(CONFIGS / "evaluation" / f"{name}.yaml")


def _online(config: DictConfig) -> dict[str, Any]:
    """Returns the settings of the evaluations that ran during training, by name."""
    settings_of: dict[str, Any] = {}
    for callback in (config.get("callbacks") or {}).values():
        settings_of |= {
            str(name): settings for name, settings in ((callback or {}).get("evaluations") or {}).items() if settings
        }
    return settings_of


def _other_data(config: DictConfig, data: str) -> DictConfig:
    """Returns ``data`` as the run's experiment and scale would have it, with the run's own method and normalization."""
    arguments = [f"experiment={config.run.experiment}", f"scale={config.run.scale}", f"data={data}"]
    other = configuration.compose("train", arguments).data
    with open_dict(other):
        for key in (*METHOD_KEYS, *NORMALIZATION_KEYS):
            if key in config.data:
                other[key] = config.data._get_node(key)
            else:
                other.pop(key, None)  # the run uses the default of the code
    return other
