"""A paper's claim against its own baseline, read from `configs/claim/<name>.yaml`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from src import configuration, train
from src.configuration import CONFIGS
from src.errors import SettingError, UserError, nearest
from src.measure.result_cache import IDENTITY_KEYS

DIRECTIONS = ("higher", "lower")
BUDGETS = ("steps", "images", "seconds", "flops")
SPLITS = ("test", "val", "train")

Difference = dict[str, tuple[Any, Any]]  # key -> its value in the first and in the second arm


# The three dataclasses are the schema of the YAML file (an OmegaConf structured config), which cannot be frozen.


@dataclass
class Arm:
    """One side of a claim: an experiment and its overrides.

    Args:
        name: unique within the claim, without "/".
        experiment: name in `configs/experiment/`.
        overrides: in Hydra's grammar, applied after all others.
        metric: replaces the claim's metric for this arm. Arms that differ in nothing else share one run per seed.
    """

    name: str
    experiment: str
    overrides: list[str] = field(default_factory=list)
    metric: dict[str, Any] | None = None


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
        metric: an evaluation, one of its values and an encoder, see `src.claims.metrics.Metric`.
        measured: name of the metric on the page.
        direction: "higher" or "lower": where the second arm should end.
        least: smallest difference that counts, in the metric's unit.
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
    metric: dict[str, Any]
    measured: str
    direction: str
    least: float
    budget: Budget
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    data: dict[str, list[str]] = field(default_factory=dict)
    common: list[str] = field(default_factory=lambda: ["scale=tiny"])
    split: str = "test"
    start: Arm | None = None
    tried: str = ""

    def metric_of(self, arm: Arm) -> dict[str, Any]:
        return self.metric if arm.metric is None else arm.metric

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
        differing |= difference(*(OmegaConf.create({"metric": self.metric_of(arm)}) for arm in self.arms))
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
    except (OmegaConfBaseException, ValueError) as problem:
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
        config = OmegaConf.merge(OmegaConf.structured(Claim), {"name": name}, given)
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
        "direction": (claim.direction, DIRECTIONS),
        "budget.equal": (claim.budget.equal, BUDGETS),
        "split": (claim.split, SPLITS),
        **{f"data.{data}": (data, configuration.names("data", CONFIGS)) for data in claim.data},
    }
    for key, (value, options) in choices.items():
        if value not in options:
            raise SettingError(f"{key}: '{value}' is not one of {', '.join(options)}{nearest(value, options)}")
    for key, number in {"least": claim.least, "budget.within": claim.budget.within}.items():
        if not number >= 0:
            raise SettingError(f"{key} must be at least 0, not {number:g}")
    if not claim.seeds or min(claim.seeds) < 0 or len(set(claim.seeds)) < len(claim.seeds):
        raise SettingError(f"seeds must be different whole numbers from 0, not {claim.seeds}")
    for metric in map(claim.metric_of, claim.arms):
        if "evaluation" not in metric and "_target_" not in metric:  # results of older versions have a _target_
            raise SettingError("metric needs an evaluation of configs/evaluation and one of its values")


def as_dict(claim: Claim) -> dict[str, Any]:
    """Returns the content that `parse` reads, as plain values for JSON.

    It describes the measurement, so ``tried``, which may be written afterwards, is left out.
    """
    content = {key: value for key, value in asdict(claim).items() if key not in ("name", "tried")}
    for arm in (*content["arms"], *([content["start"]] if content["start"] else [])):
        if arm["metric"] is None:
            del arm["metric"]
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
