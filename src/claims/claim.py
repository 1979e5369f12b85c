"""What a paper claims against its own baseline, said in `configs/claim/<name>.yaml` so that it can be measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src import configuration, train
from src.configuration import CONFIGS
from src.errors import UserError, nearest
from src.measure.result_cache import IDENTITY_KEYS

SPENT = ("steps", "images", "seconds", "flops")  # what a budget can be equal in
SPLITS = ("test", "val", "train")

Difference = dict[str, tuple[Any, Any]]  # key -> its value in either arm


@dataclass(frozen=True)
class Arm:
    """One side: an experiment and what is changed in it.

    Args:
        metric: what it is judged by, where not by the claim's. Arms that differ in nothing else are one run a seed,
            judged twice.
    """

    name: str
    experiment: str
    overrides: Sequence[str] = ()
    metric: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Budget:
    """What both arms have the same of.

    Args:
        equal: steps, images, seconds (of the training command) or flops (of forward and backward, counted).
        how: in words, how the arms' settings make it so.
        within: the share by which what was really spent may differ.
    """

    equal: str
    how: str
    within: float = 0.0


@dataclass(frozen=True)
class Claim:
    """The second arm is said to be better than the first one.

    Args:
        name: of its file.
        title: a few words.
        paper: title, authors, year; the table or section where there is one.
        claim: the sentence that is claimed.
        arms: baseline, then what is claimed of.
        differs: the keys that may differ between them; a key stands for everything below it.
        metric: the `_target_` of a metric (see `src.claims.metrics`) and its arguments.
        measured: what the metric is called on the page.
        direction: whether the second arm is to be "higher" or "lower" than the first one.
        least: the smallest difference that counts, in the metric's unit.
        budget: what both arms have the same of.
        seeds: each gives one pair of runs.
        data: data set -> overrides that come with it.
        common: overrides of both arms.
        start: what both arms go on from: a run of its own with each seed, whose last checkpoint is their
            ``checkpoint``.
        tried: what was done about a claim that failed; the page says it, and no result depends on it.
        split: what is judged on. Recipes are chosen on val, so that test has decided nothing; train for what training
            itself logs of its batches.
    """

    name: str
    title: str
    paper: str
    claim: str
    arms: tuple[Arm, Arm]
    differs: Sequence[str]
    metric: Mapping[str, Any]
    measured: str
    direction: str
    least: float
    budget: Budget
    seeds: Sequence[int] = (0, 1, 2)
    data: Mapping[str, Sequence[str]] = field(default_factory=lambda: {"scenes": []})
    common: Sequence[str] = ("scale=tiny",)
    split: str = "test"
    start: Arm | None = None
    tried: str = ""

    def metric_of(self, arm: Arm) -> Mapping[str, Any]:
        return self.metric if arm.metric is None else arm.metric

    def words(self, arm: Arm, data: str, seed: int) -> list[str]:
        """What `make train` is given for one run; an arm has the last word."""
        return [
            f"experiment={arm.experiment}",
            f"data={data}",
            f"seed={seed}",
            *self.common,
            *self.data[data],
            *arm.overrides,
        ]

    def start_words(self, data: str, seed: int) -> list[str]:
        """What `make train` is given for the run that both arms go on from; nothing where they begin anew."""
        if self.start is None:
            return []
        return [f"experiment={self.start.experiment}", f"data={data}", f"seed={seed}", *self.start.overrides]

    def difference(self, data: str) -> Difference:
        """Everything in which the arms' composed configurations differ, besides what names a run, and their metrics.

        Raises:
            UserError: a key is not among those the claim lists.
        """
        found = difference(*(train.compose(self.words(arm, data, self.seeds[0])) for arm in self.arms))
        found |= difference(*(OmegaConf.create({"metric": dict(self.metric_of(arm))}) for arm in self.arms))
        unlisted = [key for key in found if not any(key == each or key.startswith(f"{each}.") for each in self.differs)]
        if unlisted:
            said = ", ".join(f"{key} ({found[key][0]} against {found[key][1]})" for key in unlisted)
            raise UserError(f"claim '{self.name}' on {data}: its arms differ in what `differs` does not list: {said}")
        if not found:
            raise UserError(f"claim '{self.name}' on {data}: its arms do not differ")
        return found


def load(name: str) -> Claim:
    """The claim of ``configs/claim/<name>.yaml``. A file that says ``like: <another claim>`` says the rest.

    Raises:
        UserError: there is none, or it does not say what it has to; the message names the key.
    """
    return parse(name, _content(name))


def _content(name: str, followed: Sequence[str] = ()) -> dict[str, Any]:
    """Keys and values of the file; what it does not say itself is said by the claim that it is ``like``."""
    known = configuration.names("claim")
    if name not in known:
        raise UserError(f"there is no claim '{name}'{nearest(name, known)}")
    if name in followed:
        raise UserError(f"claims are like each other in a circle: {', '.join([*followed, name])}")
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / "claim" / f"{name}.yaml"), resolve=False)
    except (OmegaConfBaseException, ValueError) as problem:
        raise UserError(f"claim '{name}' cannot be read: {problem}") from problem
    _require(isinstance(content, dict), f"claim '{name}': keys and values are expected, not {content!r}")
    if "like" not in content:
        return content
    # what was tried about another claim was not tried about this one
    return _content(str(content.pop("like")), [*followed, name]) | {"tried": ""} | content


def parse(name: str, content: Any) -> Claim:
    """A claim from the plain values of its file, or of the ledger.

    Raises:
        UserError: see `load`.
    """
    place = f"claim '{name}'"
    values = _checked(place, content, Claim, given=("name",))
    arms = values["arms"]
    _require(isinstance(arms, list) and len(arms) == 2, f"{place}: arms are two, the baseline and what is claimed of")
    values["arms"] = tuple(Arm(**_checked(f"{place}, arms", arm, Arm)) for arm in arms)
    if values.get("start") is not None:
        values["start"] = Arm(**_checked(f"{place}, start", values["start"], Arm))
    names = [arm.name for arm in values["arms"]]
    _require(
        names[0] != names[1] and not any("/" in str(each) for each in names),
        f"{place}: arms have names of their own without '/', not {' and '.join(map(repr, names))}",
    )
    values["budget"] = Budget(**_checked(f"{place}, budget", values["budget"], Budget))
    budget, seeds = values["budget"], values.get("seeds", Claim.seeds)
    _among(f"{place}: direction", values["direction"], ("higher", "lower"))
    _among(f"{place}: budget.equal", budget.equal, SPENT)
    _among(f"{place}: split", values.get("split", Claim.split), SPLITS)
    _number(f"{place}: least", values["least"])
    _number(f"{place}: budget.within", budget.within)
    whole = isinstance(seeds, list | tuple) and all(isinstance(seed, int) and seed >= 0 for seed in seeds)
    _require(
        whole and len(seeds) > 0 and len(set(seeds)) == len(seeds),
        f"{place}: seeds are different whole numbers from 0, not {seeds}",
    )
    data = values["data"] = values.get("data") or {"scenes": []}
    _require(isinstance(data, dict), f"{place}: data is written as {{scenes: [overrides], …}}, not {data}")
    for each in data:
        _among(f"{place}: data", each, configuration.names("data"))
        data[each] = data[each] or []
    for metric in [values["metric"], *(arm.metric for arm in values["arms"] if arm.metric is not None)]:
        _require(isinstance(metric, dict) and "_target_" in metric, f"{place}: metric needs a _target_")
    lists = {
        "differs": values["differs"],
        "common": values.get("common", []),
        **{f"data.{k}": v for k, v in data.items()},
    }
    given = [*values["arms"], *([values["start"]] if values.get("start") else [])]
    lists |= {f"the overrides of '{arm.name}'": arm.overrides for arm in given}
    for where, words in lists.items():
        is_words = isinstance(words, list | tuple) and all(isinstance(word, str) for word in words)
        _require(is_words, f"{place}: {where} must be a list of words, not {words!r}")
    return Claim(name=name, **values)


def plain(claim: Claim) -> dict[str, Any]:
    """What `parse` reads, as JSON can say it; of what was measured, so without what was tried since."""
    return {
        "title": claim.title,
        "paper": claim.paper,
        "claim": claim.claim,
        "arms": [_plain(arm) for arm in claim.arms],
        **({"start": _plain(claim.start)} if claim.start else {}),
        "differs": list(claim.differs),
        "metric": dict(claim.metric),
        "measured": claim.measured,
        "direction": claim.direction,
        "least": claim.least,
        "budget": {"equal": claim.budget.equal, "how": claim.budget.how, "within": claim.budget.within},
        "seeds": list(claim.seeds),
        "data": {name: list(words) for name, words in claim.data.items()},
        "common": list(claim.common),
        "split": claim.split,
    }


def _plain(arm: Arm) -> dict[str, Any]:
    of_its_own = {} if arm.metric is None else {"metric": dict(arm.metric)}
    return {"name": arm.name, "experiment": arm.experiment, "overrides": list(arm.overrides), **of_its_own}


def difference(first: DictConfig, second: DictConfig) -> Difference:
    """Keys whose values differ, worked out; what another key says (``${…}``) only counts there. A key that one side
    does not have is None there."""
    ours, theirs = _leaves(first), _leaves(second)
    keys = sorted(key for key in ours.keys() | theirs.keys() if key.split(".")[0] not in IDENTITY_KEYS)
    absent = object()
    return {key: (ours.get(key), theirs.get(key)) for key in keys if ours.get(key, absent) != theirs.get(key, absent)}


def _leaves(config: DictConfig | ListConfig, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    names: Any = range(len(config)) if isinstance(config, ListConfig) else list(config)
    for name in names:
        key = f"{prefix}{name}"
        node: Any = config._get_node(name)
        value = None if node._is_missing() else config[name]
        if not isinstance(value, DictConfig | ListConfig):
            found[key] = value
        elif node._is_interpolation():
            found[key] = node._value()  # its content differs, if it does, where it stands
        elif len(value) == 0:
            found[key] = [] if isinstance(value, ListConfig) else {}
        else:
            found |= _leaves(value, f"{key}.")
    return found


def _checked(place: str, content: Any, kind: type, given: Sequence[str] = ()) -> dict[str, Any]:
    """``content`` as the arguments of the dataclass ``kind``."""
    _require(isinstance(content, dict), f"{place}: keys and values are expected, not {content!r}")
    wanted = [each for each in fields(kind) if each.name not in given]
    known = [each.name for each in wanted]
    for key in content:
        _require(key in known, f"{place} knows no key '{key}'{nearest(str(key), known)}")
    needed = [each.name for each in wanted if each.default is MISSING and each.default_factory is MISSING]
    missing = [name for name in needed if content.get(name) is None]
    _require(not missing, f"{place} has to say: {', '.join(missing)}")
    return {key: value for key, value in content.items() if value is not None}


def _among(what: str, value: Any, options: Sequence[str]) -> None:
    _require(value in options, f"{what} is {' or '.join(options)}, not {value!r}{nearest(str(value), options)}")


def _number(what: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    _require(is_number and value >= 0, f"{what} is a number from 0, not {value!r}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)
