"""A paper's claim against its own baseline, read from `configs/claim/<name>.yaml`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from src import configuration, train
from src.configuration import CONFIGS
from src.errors import SettingError, UserError, nearest
from src.measure.result_cache import IDENTITY_KEYS

DIRECTIONS = ("higher", "lower")
BUDGETS = ("steps", "images", "seconds", "flops")
SPLITS = ("test", "val", "train")
METRIC_KEYS = ("evaluation", "value", "encoder")

Difference = dict[str, tuple[Any, Any]]  # key -> its value in the first and in the second arm


# The three dataclasses are the schema of the YAML file (an OmegaConf structured config), which cannot be frozen.


@dataclass
class Arm:
    """One side of a claim: an experiment and its overrides.

    Args:
        name: unique within the claim, without "/".
        experiment: name in `configs/experiment/`.
        overrides: in Hydra's grammar, applied after all others.
        metric: keys of the claim's only metric that this arm replaces. Arms that differ in nothing else share one run
            per seed.
    """

    name: str
    experiment: str
    overrides: list[str] = field(default_factory=list)
    metric: dict[str, Any] | None = None


@dataclass
class ClaimMetric:
    """One metric by which a claim is judged.

    Args:
        name: on the page; unique within the claim.
        evaluation, value, encoder: one number of an evaluation, see `src.claims.metrics.Metric`.
        least: smallest difference that counts, in the metric's unit.
        direction: "higher" or "lower": where the second arm should end.
        data: the claim's data sets that it judges on; empty for all.
    """

    name: str
    evaluation: Any
    value: str
    least: float
    direction: str = "higher"
    encoder: str | None = None
    data: list[str] = field(default_factory=list)


@dataclass
class Budget:
    """The cost that is equal in both arms.

    Args:
        equal: "steps", "images", "seconds" (of the training command) or "flops" (counted, forward and backward).
        how: explains in words how the settings make it equal.
        within: relative difference that the measured costs may have.
    """

    equal: str
    how: str
    within: float = 0.0


@dataclass
class Claim:
    """States that the second arm is better than the first.

    Args:
        name: name of the file.
        title: a few words.
        paper: title, authors, year, and the table or section if there is one.
        claim: the claimed sentence.
        arms: the baseline, then the arm that is claimed to be better.
        differs: keys in which the arms' configurations may differ; a key includes everything below it.
        metrics: what it is judged by. It is reproduced where all of them say so.
        budget: the cost that is equal in both arms.
        seeds: one pair of runs each.
        data: data set -> overrides that apply to it.
        common: overrides of both arms.
        split: the evaluated split. "test" by default, because recipes are chosen on "val"; "train" for a metric that
            training logs of its own batches.
        start: a run that is trained first with each seed; both arms start from its last checkpoint.
        tried: experiments made after a claim failed. It is shown on the page and no result depends on it.
    """

    name: str
    title: str
    paper: str
    claim: str
    arms: list[Arm]
    differs: list[str]
    metrics: list[ClaimMetric]
    budget: Budget
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    data: dict[str, list[str]] = field(default_factory=dict)
    common: list[str] = field(default_factory=lambda: ["scale=tiny"])
    split: str = "test"
    start: Arm | None = None
    tried: str = ""

    def metrics_on(self, data: str) -> list[ClaimMetric]:
        """Returns the metrics that judge on a data set."""
        return [metric for metric in self.metrics if not metric.data or data in metric.data]

    def metrics_of(self, arm: Arm, data: str) -> dict[str, dict[str, Any]]:
        """Returns what is evaluated of an arm's run: name of the metric -> evaluation, value and encoder."""
        return {
            metric.name: {"evaluation": metric.evaluation, "value": metric.value, "encoder": metric.encoder}
            | (arm.metric or {})
            for metric in self.metrics_on(data)
        }

    def run_overrides(self, arm: Arm, data: str, seed: int) -> list[str]:
        """Returns the arguments of `make train` for one run of an arm; the arm's own come last and win."""
        return [
            f"experiment={arm.experiment}",
            f"data={data}",
            f"seed={seed}",
            *self.common,
            *self.data[data],
            *arm.overrides,
        ]

    def start_overrides(self, data: str, seed: int) -> list[str]:
        """Returns the arguments of `make train` for the run that both arms start from; empty without a ``start``."""
        if self.start is None:
            return []
        return [f"experiment={self.start.experiment}", f"data={data}", f"seed={seed}", *self.start.overrides]

    def difference(self, data: str) -> Difference:
        """Returns every key in which the arms' composed configurations or metrics differ, except a run's identity.

        Raises:
            UserError: a key is not listed in ``differs``, or there is no difference.
        """
        differing = difference(*(train.compose(self.run_overrides(arm, data, self.seeds[0])) for arm in self.arms))
        first_metrics = (next(iter(self.metrics_of(arm, data).values())) for arm in self.arms)
        differing |= difference(*(OmegaConf.create({"metric": metric}) for metric in first_metrics))
        unlisted = [
            key
            for key in differing
            if not any(key == listed or key.startswith(f"{listed}.") for listed in self.differs)
        ]
        if unlisted:
            values = ", ".join(f"{key} ({differing[key][0]} against {differing[key][1]})" for key in unlisted)
            raise UserError(
                f"claim '{self.name}' on {data}: the arms differ in keys that `differs` does not list: {values}"
            )
        if not differing:
            raise UserError(f"claim '{self.name}' on {data}: the arms do not differ")
        return differing


def load(name: str) -> Claim:
    """Reads ``configs/claim/<name>.yaml``. A file with ``like: <another claim>`` takes all missing keys from that one.

    Raises:
        UserError: no such file, or a key is missing, unknown or has a bad value; the message names the key.
    """
    return parse(name, _read(name))


def _read(name: str, followed: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the file's keys and values, completed from the claim that it is ``like``."""
    names = configuration.names("claim", CONFIGS)
    if name not in names:
        raise UserError(f"there is no claim '{name}'{nearest(name, names)}")
    if name in followed:
        raise UserError(f"`like` leads in a circle: {', '.join([*followed, name])}")
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / "claim" / f"{name}.yaml"), resolve=False)
    except (OmegaConfBaseException, YAMLError, ValueError) as problem:
        raise UserError(f"configs/claim/{name}.yaml cannot be read: {problem}") from problem
    if not isinstance(content, dict):
        raise UserError(f"configs/claim/{name}.yaml must hold keys and values, not {content!r}")
    if "like" not in content:
        return content
    # ``tried`` describes the other claim's failure, so it is not inherited
    return _read(str(content.pop("like")), [*followed, name]) | {"tried": ""} | content


def parse(name: str, content: dict[str, Any]) -> Claim:
    """Builds a claim from the keys and values of its file, or from its entry in the ledger.

    Raises:
        SettingError: see `load`.
    """
    given = {key: value for key, value in content.items() if value is not None}
    data = given.get("data", {"scenes": []})
    if isinstance(data, dict):
        given["data"] = {source: [] if overrides is None else overrides for source, overrides in data.items()}
    try:
        if "name" in given:
            raise SettingError("unknown key 'name': a claim has the name of its file")
        config = OmegaConf.merge(OmegaConf.structured(Claim), {"name": name}, _literal(given))
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise SettingError(f"missing keys: {', '.join(missing)}")
        claim = OmegaConf.to_object(config)
        assert isinstance(claim, Claim)
        _check(claim)
    except SettingError as problem:
        raise SettingError(f"claim '{name}': {problem}") from problem
    except OmegaConfBaseException as problem:
        raise SettingError(f"claim '{name}': {_explained(problem)}") from problem
    return claim


def _literal(value: Any) -> Any:
    """Returns ``value`` with its interpolations escaped: ``${seed}`` in an override is the run's seed."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def _explained(problem: OmegaConfBaseException) -> str:
    """Returns one line that names the key, and for an unknown key the nearest known one."""
    if isinstance(problem, ConfigKeyError) and problem.object_type is not None:
        names = [each.name for each in fields(problem.object_type)]
        return f"unknown key '{problem.full_key}'{nearest(str(problem.key), names)}"
    return f"{problem.full_key}: {str(problem.msg).splitlines()[0]}"


def _check(claim: Claim) -> None:
    """
    Raises:
        SettingError: a value has the right type but cannot be used.
    """
    if len(claim.arms) != 2:
        raise SettingError(f"arms must be two, the baseline and the claimed arm, not {len(claim.arms)}")
    names = [arm.name for arm in claim.arms]
    if names[0] == names[1] or any("/" in name for name in names):
        raise SettingError(f"arms must have different names without '/', not {' and '.join(map(repr, names))}")
    choices = {
        "budget.equal": (claim.budget.equal, BUDGETS),
        "split": (claim.split, SPLITS),
        **{f"data.{data}": (data, configuration.names("data", CONFIGS)) for data in claim.data},
        **{f"metrics.{metric.name}.direction": (metric.direction, DIRECTIONS) for metric in claim.metrics},
        **{
            f"metrics.{metric.name}.data": (data, tuple(claim.data)) for metric in claim.metrics for data in metric.data
        },
    }
    for key, (value, options) in choices.items():
        if value not in options:
            raise SettingError(f"{key}: '{value}' is not one of {', '.join(options)}{nearest(value, options)}")
    numbers = {f"metrics.{metric.name}.least": metric.least for metric in claim.metrics}
    for key, number in {**numbers, "budget.within": claim.budget.within}.items():
        if not number >= 0:
            raise SettingError(f"{key} must be at least 0, not {number:g}")
    if not claim.seeds or min(claim.seeds) < 0 or len(set(claim.seeds)) < len(claim.seeds):
        raise SettingError(f"seeds must be different whole numbers from 0, not {claim.seeds}")
    _check_metrics(claim)


def _check_metrics(claim: Claim) -> None:
    """
    Raises:
        SettingError: see `_check`.
    """
    names = [metric.name for metric in claim.metrics]
    if len(set(names)) < len(names):
        raise SettingError(f"metrics must have different names, not {', '.join(names)}")
    for data in claim.data:
        if not claim.metrics_on(data):
            raise SettingError(f"metrics: none of them judges on {data}")
    for arm in claim.arms:
        if arm.metric is not None and len(claim.metrics) != 1:
            raise SettingError(f"arms.{arm.name}.metric: an arm has a metric of its own only where the claim has one")
        for key in arm.metric or ():
            if key not in METRIC_KEYS:
                raise SettingError(f"arms.{arm.name}.metric: there is no key '{key}'{nearest(str(key), METRIC_KEYS)}")


def as_dict(claim: Claim) -> dict[str, Any]:
    """Returns the content that `parse` reads, as plain values for JSON.

    It describes the measurement, so ``tried``, which may be written afterwards, is left out.
    """
    content = {key: value for key, value in asdict(claim).items() if key not in ("name", "tried")}
    for arm in (*content["arms"], *([content["start"]] if content["start"] else [])):
        if arm["metric"] is None:
            del arm["metric"]
    for metric in content["metrics"]:
        for key in [key for key in ("encoder", "data") if not metric[key]]:
            del metric[key]
    if content["start"] is None:
        del content["start"]
    return content


def difference(first: DictConfig, second: DictConfig) -> Difference:
    """Returns the keys whose resolved values differ; a key that one side does not have is None there.

    An interpolation (``${…}``) of a whole section is compared where that section stands, not once more.
    """
    ours, theirs = _leaves(first), _leaves(second)
    keys = sorted(key for key in ours.keys() | theirs.keys() if key.split(".")[0] not in IDENTITY_KEYS)
    absent = object()
    return {key: (ours.get(key), theirs.get(key)) for key in keys if ours.get(key, absent) != theirs.get(key, absent)}


def _leaves(config: DictConfig | ListConfig, prefix: str = "") -> dict[str, Any]:
    """Returns dotted key -> value of everything in ``config`` that has nothing below it."""
    leaves: dict[str, Any] = {}
    names: Any = range(len(config)) if isinstance(config, ListConfig) else list(config)
    for name in names:
        key = f"{prefix}{name}"
        node: Any = config._get_node(name)
        value = None if node._is_missing() else config[name]
        if not isinstance(value, DictConfig | ListConfig):
            leaves[key] = value
        elif node._is_interpolation():
            leaves[key] = node._value()  # its content is compared where it stands
        elif len(value) == 0:
            leaves[key] = [] if isinstance(value, ListConfig) else {}
        else:
            leaves |= _leaves(value, f"{key}.")
    return leaves
