"""Every joint-embedding method, given the same backbone, the same images and the same time of a core."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from benchmarks.learning import DATA
from src import evaluate
from src.measure import machine, result_cache
from src.measure.report import Check, Section, table

SEEDS = (0, 1, 2)
METRICS = {"knn_top1": "kNN", "linear_top1": "linear"}
# of a core for training steps, data included, evaluation and start-up not; emoji has few images
SECONDS = {"scenes": 90.0, "emoji": 60.0}
TRIAL_STEPS = 60  # to see how many steps fit

# smaller images, a narrower ViT and small batches, for the steps that a table of dozens of runs can afford
SMALL = ("image_size=48", "local_image_size=24", "backbone.embed_dim=96", "backbone.depth=3", "backbone.num_heads=3")
COMMON = (
    "scale=tiny",
    "backbone=vit",
    *SMALL,
    "data.batch_size=64",
    "trainer.max_epochs=-1",
    "callbacks.evaluation=null",
    "callbacks.visualizations=null",
)
FLOORS = {"random": "random initialization", "pixels": "raw pixels (16x16)"}


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Args:
        title: as the paper calls it.
        experiment: its recipe; of a ResNet-50's the tiny ViT takes the place.
        encoder: the one the paper evaluates.
        why: it may end below its random initialization, where that is known; the report says it of those that do.
    """

    title: str
    experiment: str
    encoder: str = "encoder"
    why: str = ""


_SLOW = (
    "with eight crops an image the time is enough for few steps, and a teacher that takes 0.4 % of its student a step "
    "is still for a good part what it began as; its student is in the list above. 400 steps with other temperatures, "
    "momenta and rates gave targets that tell images apart (0.3 to 0.9 nats), but no better kNN: 12.6 to 15.2 % on "
    "validation scenes, random initialization 13.2 to 14.0."
)

METHODS: dict[str, Method] = {
    "supervised": Method("supervised", "supervised_vits"),
    "simclr": Method("SimCLR", "simclr_r50"),
    "dcl": Method("DCL", "dcl_r50"),
    "dclw": Method(
        "DCLW",
        "dclw_r50",
        why="by less than chance: a score of emoji's 321 test pictures deviates by 2.8 points, and nothing was tried.",
    ),
    "moco_v2": Method("MoCo v2", "moco_v2_r50", "student"),
    "mochi": Method("MoCHi", "mochi_r50", "student"),
    "moco_v3": Method("MoCo v3", "moco_v3_vits", "student"),
    "byol": Method(
        "BYOL",
        "byol_r50",
        "student",
        "it learns from what a teacher says that knows nothing at first, and has not begun to in so few steps: 500 of "
        "64 pictures, at teacher momenta of 0.9 and 0.99, gave a kNN of 13.6 to 15.3 % on validation scenes, "
        "random initialization 14.0. MoCo v3, of the same views, teacher and rate, has negatives to begin with.",
    ),
    "barlow_twins": Method("Barlow Twins", "barlow_twins_r50"),
    "vicreg": Method("VICReg", "vicreg_r50"),
    "swav": Method(
        "SwAV",
        "swav_r50",
        why="its loss stays at the logarithm of the number of prototypes; what was tried is in the "
        "[ledger](claims.md#swav_multicrop).",
    ),
    "dino": Method("DINO", "dino_vits", "teacher", _SLOW),
    "ibot": Method("iBOT", "ibot_vits", "teacher", _SLOW),
}


def measure(
    quick: bool = False,
    *,
    stored: Mapping[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda result: None,
    overrides: Sequence[str] = (),
    methods: Sequence[str] = tuple(METHODS),
    data: Sequence[str] = DATA,
    seeds: Sequence[int] = SEEDS,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Train each method for as many steps as fit into ``seconds`` here, and judge the encoder its paper judges: the
    whole training split against the whole test split. Seed by seed, so that an unfinished table is of whole rows.

    Time is a core's, added up over threads, so that what else the machine does hardly counts; how many steps fit is
    tried first, once for each method and data set.

    Returns:
        ``rates``: for "<method>/<data>" the ``rate`` in images a core's second and ``memory`` in GB. ``runs``: for
        "<method>/<data>/<seed>" the ``scores`` by encoder and metric, ``steps``, ``batch`` and the ``seconds`` of the
        training command. For all of them where they were measured.
    """
    data, seeds = (data[:1], (0,)) if quick else (data, seeds)

    def words(name: str, source: str, *more: str) -> list[str]:
        small = _quick(source) if quick else []
        return [f"experiment={METHODS[name].experiment}", *COMMON, f"data={source}", *more, *small, *overrides]

    steps = 12 if quick else TRIAL_STEPS
    trials = {
        f"{name}/{source}": result_cache.TrainingJob(words(name, source, f"trainer.max_steps={steps}", *_timed(steps)))
        for source in data
        for name in methods
    }
    stored = stored or {}
    runs_before = dict(stored.get("runs", {}))
    rates = result_cache.measure_missing(
        trials,
        lambda job, config: tried(job.overrides, config),
        stored=stored.get("rates", {}),
        save=lambda each: save({"rates": each, "runs": runs_before}),
    )
    jobs = {
        f"{name}/{source}/{seed}": result_cache.TrainingJob(
            words(name, source, f"seed={seed}"),
            extra={
                "seconds": seconds or (2.0 if quick else SECONDS[source]),
                "rate": rates[f"{name}/{source}"]["rate"],
                # what no method has touched is the same for all of them
                "judged": ["knn", "linear", *(FLOORS if name == methods[0] else ())],
            },
        )
        for seed in seeds
        for source in data
        for name in methods
    }
    found = result_cache.measure_missing(
        jobs,
        lambda job, config: judged(job.overrides, config, **job.extra),
        stored=runs_before,
        save=lambda each: save({"rates": rates, "runs": each}),
    )
    return {"rates": rates, "runs": found}


def _quick(source: str) -> list[str]:
    return ["data.source.count={train: 512, val: 64, test: 64}"] if source == "scenes" else []


def _timed(steps: int) -> list[str]:
    """Words for a clock that counts the process's own time, of all its threads, over all steps but the first."""
    clock = "{_target_: hydra.utils.get_method, path: time.process_time}"
    return [f"+callbacks.throughput.clock={clock}", f"callbacks.throughput.every_n_steps={steps}"]


def tried(words: Sequence[str], config: DictConfig) -> dict[str, float]:
    """How fast a short run is by a core's time, and what it takes."""
    with result_cache.train_once(words, config) as finished:
        logged = finished.run.metrics()["train"]
    return {"rate": float(logged["speed/images_per_second"]), "memory": float(logged["speed/peak_memory_gb"])}


def judged(
    words: Sequence[str], config: DictConfig, *, rate: float, seconds: float, judged: Sequence[str]
) -> dict[str, Any]:
    """One run, as long as ``seconds`` allow at ``rate``, trained and judged."""
    batch = int(config.data.batch_size)
    steps = steps_within(seconds, rate, batch)
    with result_cache.train_once([*words, f"trainer.max_steps={steps}"], config) as finished:
        run = finished.run
        settings = ["evaluate.bank_samples=null", "evaluate.query_samples=null", "evaluate.split=test"]
        scores = evaluate.evaluate(evaluate.settle(run, None, settings), run.last, judged)
    return {
        "scores": {encoder: {metric: values[metric] for metric in METRICS} for encoder, values in scores.items()},
        "steps": steps,
        "batch": batch,
        "seconds": finished.seconds,
    }


def steps_within(seconds: float, images_per_second: float, batch: int) -> int:
    """Optimizer steps, at least ten: fewer are not logged."""
    return max(10, int(seconds * images_per_second / batch))


def report(result: dict[str, Any]) -> Section:
    parts, checks = [], []
    for source in DATA:
        mine = _of(result, source)
        if mine:
            parts.append(_part(source, mine, result["rates"]))
            checks.append(_check(source, mine))
    said = ", ".join(f"{source} {seconds:.0f} seconds" for source, seconds in SECONDS.items())
    body = (
        "A ViT (width 96, depth 3, patches of 8 at 48 px) trained by every method on batches of 64 for the same "
        f"time of a core's steps ({said}); how many steps that makes was tried beforehand. Top-1 of the "
        "test split by the whole training split, of the encoder that the paper judges (the teacher of DINO and iBOT). "
        "Memory is the training process's at its peak. Mean and standard deviation over seeds.\n\n" + "\n\n".join(parts)
    )
    return Section("Methods at equal time", checks, body)


def _part(source: str, mine: Mapping[str, Mapping[int, Any]], rates: Mapping[str, Any]) -> str:
    rows = []
    for name, method in METHODS.items():
        if name in mine:
            each, tried_out = list(mine[name].values()), rates[f"{name}/{source}"]
            rows.append(
                [
                    method.title,
                    *(_mean([run["scores"][method.encoder][metric] for run in each]) for metric in METRICS),
                    f"{tried_out['rate']:.0f}",
                    f"{statistics.fmean(run['steps'] * run['batch'] for run in each):,.0f}",
                    f"{tried_out['memory']:.2f}",
                ]
            )
    some = [run for each in mine.values() for run in each.values()]
    for floor, title in FLOORS.items():
        scores = [run["scores"][floor] for run in some if floor in run["scores"]]
        if scores:
            rows.append([title, *(_mean([each[metric] for each in scores]) for metric in METRICS), "", "", ""])
    head = [
        "",
        *(f"{said}, top-1 %" for said in METRICS.values()),
        "images a core's second",
        "images seen",
        "memory, GB",
    ]
    others = [
        f"{METHODS[name].title}'s {encoder} "
        + ", ".join(_mean([run["scores"][encoder][metric] for run in each.values()]) for metric in METRICS)
        for name, each in mine.items()
        for encoder in next(iter(each.values()))["scores"]
        if encoder not in (METHODS[name].encoder, *FLOORS)
    ]
    alike: dict[str, list[str]] = {}
    for name in _below(mine):
        if METHODS[name].why:
            alike.setdefault(METHODS[name].why, []).append(METHODS[name].title)
    reasons = "\n".join(f"- {', '.join(titles)}: {why}" for why, titles in alike.items())
    remarks = [
        *([f"The other of two encoders, kNN and linear: {'; '.join(others)}."] if others else []),
        *([f"Below random initialization by one of the two, and why:\n\n{reasons}"] if reasons else []),
    ]
    seeds = sorted({seed for each in mine.values() for seed in each})
    trials = [each for key, each in rates.items() if key.endswith(f"/{source}")]
    where = "\n".join(f"- {each}" for each in machine.lines([run["about"] for run in [*trials, *some]]))
    said = "".join(f"{remark}\n\n" for remark in remarks)
    return f"### {source}\n\n{table(head, rows)}\n\n{said}Seeds {', '.join(map(str, seeds))}.\n\n{where}"


def _below(mine: Mapping[str, Mapping[int, Any]]) -> dict[str, list[str]]:
    """By which metrics methods are not above random initialization in the mean; those that are have no entry."""
    untrained = [
        run["scores"]["random"] for each in mine.values() for run in each.values() if "random" in run["scores"]
    ]
    found: dict[str, list[str]] = {}
    for name, seeds in mine.items() if untrained else ():
        for metric, said in METRICS.items():
            ours = statistics.fmean(run["scores"][METHODS[name].encoder][metric] for run in seeds.values())
            if ours <= statistics.fmean(each[metric] for each in untrained):
                found.setdefault(name, []).append(said)
    return found


def _check(source: str, mine: Mapping[str, Mapping[int, Any]]) -> Check:
    below = [f"{METHODS[name].title} by {said}" for name, each in _below(mine).items() for said in each]
    whole = set(METHODS) <= set(mine) and all(set(SEEDS) <= set(seeds) for seeds in mine.values())
    floor = any("random" in run["scores"] for each in mine.values() for run in each.values())
    return Check(
        f"every method on {source} ends above its random initialization",
        f"{len(METHODS)} methods, {len(SEEDS)} seeds",
        f"below: {', '.join(below)}" if below else f"all of {sum(map(len, mine.values()))} runs above",
        False if below else (True if whole and floor else None),
    )


def _of(result: Mapping[str, Any], source: str) -> dict[str, dict[int, Any]]:
    found: dict[str, dict[int, Any]] = {}
    for key, run in result["runs"].items():
        name, data, seed = key.split("/")
        if data == source and name in METHODS:
            found.setdefault(name, {})[int(seed)] = run
    return found


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"
