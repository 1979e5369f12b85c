"""Compares all joint-embedding methods with the same backbone, images and CPU time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from benchmarks.learning import DATA
from src.evaluate import evaluate
from src.evaluation_config import evaluation_config
from src.measure import machine, result_cache
from src.measure.report import Check, Section, table
from src.trained import RunSubject

SEEDS = (0, 1, 2)
METRICS = {"knn_top1": "kNN", "linear_top1": "linear"}
# CPU seconds for training steps, including data, without evaluation and start-up; emoji has few images
SECONDS = {"scenes": 90.0, "emoji": 60.0}
TRIAL_STEPS = 60  # they measure the speed, from which the number of steps follows

# small images, a narrow ViT and small batches, because the table needs dozens of runs
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
        title: the paper's name.
        experiment: its recipe; the tiny ViT replaces a ResNet-50.
        encoder: the one that the paper evaluates.
        why: a known reason why it may end below its random initialization; shown if it does.
    """

    title: str
    experiment: str
    encoder: str = "encoder"
    why: str = ""


_SLOW = (
    "with eight crops per image the time allows few steps, after which a teacher that moves by 0.4 % per step is still "
    "close to its initialization; its student is in the list above. 400 steps with other temperatures, momenta and "
    "learning rates gave targets that distinguish images (0.3 to 0.9 nats), but no better kNN: 12.6 to 15.2 % on "
    "validation scenes, random initialization 13.2 to 14.0."
)

METHODS: dict[str, Method] = {
    "supervised": Method("supervised", "supervised_vits"),
    "simclr": Method("SimCLR", "simclr_r50"),
    "dcl": Method("DCL", "dcl_r50"),
    "dclw": Method(
        "DCLW",
        "dclw_r50",
        why="by less than chance: a score on emoji's 321 test images has a standard deviation of 2.8 points; nothing "
        "was tried.",
    ),
    "moco_v2": Method("MoCo v2", "moco_v2_r50", "student"),
    "mochi": Method("MoCHi", "mochi_r50", "student"),
    "moco_v3": Method("MoCo v3", "moco_v3_vits", "student"),
    "byol": Method(
        "BYOL",
        "byol_r50",
        "student",
        "it learns from a teacher that starts untrained, and so few steps do not suffice: 500 steps of 64 images with "
        "teacher momenta of 0.9 and 0.99 gave a kNN of 13.6 to 15.3 % on validation scenes, random initialization "
        "14.0. MoCo v3 has the same views, teacher and learning rate, but also negatives.",
    ),
    "barlow_twins": Method("Barlow Twins", "barlow_twins_r50"),
    "vicreg": Method("VICReg", "vicreg_r50"),
    "swav": Method(
        "SwAV",
        "swav_r50",
        why="its loss stays at the logarithm of the number of prototypes; the [ledger](claims.md#swav_multicrop) lists "
        "the attempts.",
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
    """Trains each method for as many steps as fit into ``seconds`` on this machine, and evaluates the encoder that its
    paper evaluates on the whole training and test split. Seed by seed, so that unfinished tables have all methods.

    Time is CPU time, added up over threads, so that other work of the machine hardly matters. A short run of each
    method and data set measures first how many steps fit.

    Returns:
        ``rates``: for "<method>/<data>" the ``rate`` in images per CPU second and ``memory`` in GB. ``runs``: for
        "<method>/<data>/<seed>" the ``scores`` by encoder and metric, ``steps``, ``batch`` and the ``seconds`` of the
        training command. Each says where it was measured.
    """
    data, seeds = (data[:1], (0,)) if quick else (data, seeds)

    def overrides_of(name: str, source: str, *more: str) -> list[str]:
        small = _quick(source) if quick else []
        return [f"experiment={METHODS[name].experiment}", *COMMON, f"data={source}", *more, *small, *overrides]

    steps = 12 if quick else TRIAL_STEPS
    trials = {
        f"{name}/{source}": result_cache.TrainingJob(
            overrides_of(name, source, f"trainer.max_steps={steps}", *_timed(steps))
        )
        for source in data
        for name in methods
    }
    stored = stored or {}
    runs_before = dict(stored.get("runs", {}))
    rates = result_cache.measure_missing(
        trials,
        lambda job, config: measure_rate(job.overrides, config),
        stored=stored.get("rates", {}),
        save=lambda each: save({"rates": each, "runs": runs_before}),
    )
    jobs = {
        f"{name}/{source}/{seed}": result_cache.TrainingJob(
            overrides_of(name, source, f"seed={seed}"),
            extra={
                "seconds": seconds or (2.0 if quick else SECONDS[source]),
                "rate": rates[f"{name}/{source}"]["rate"],
                # the baselines are the same for all methods
                "evaluations": ["knn", "linear", *(FLOORS if name == methods[0] else ())],
            },
        )
        for seed in seeds
        for source in data
        for name in methods
    }
    found = result_cache.measure_missing(
        jobs,
        lambda job, config: train_and_evaluate(job.overrides, config, **job.extra),
        stored=runs_before,
        save=lambda each: save({"rates": rates, "runs": each}),
    )
    return {"rates": rates, "runs": found}


def _quick(source: str) -> list[str]:
    return ["data.source.count={train: 512, val: 64, test: 64}"] if source == "scenes" else []


def _timed(steps: int) -> list[str]:
    """Returns overrides that measure the CPU time of the process over all steps but the first."""
    clock = "{_target_: hydra.utils.get_method, path: time.process_time}"
    return [f"+callbacks.throughput.clock={clock}", f"callbacks.throughput.every_n_steps={steps}"]


def measure_rate(overrides: Sequence[str], config: DictConfig) -> dict[str, float]:
    """Returns the images per CPU second and the peak memory of a short run."""
    with result_cache.train_once(overrides, config) as trained:
        logged = trained.run.metrics()["train"]
    return {"rate": float(logged["speed/images_per_second"]), "memory": float(logged["speed/peak_memory_gb"])}


def train_and_evaluate(
    overrides: Sequence[str], config: DictConfig, *, rate: float, seconds: float, evaluations: Sequence[str]
) -> dict[str, Any]:
    """Trains one run for as many steps as fit into ``seconds`` at ``rate``, and evaluates it."""
    batch = int(config.data.batch_size)
    steps = steps_within(seconds, rate, batch)
    with result_cache.train_once([*overrides, f"trainer.max_steps={steps}"], config) as trained:
        run = trained.run
        settings = ["evaluate.bank_samples=null", "evaluate.query_samples=null", "evaluate.split=test"]
        subject = RunSubject.configured(evaluation_config(run, None, settings), run.last)
        scores = evaluate(subject, evaluations)
    return {
        "scores": {encoder: {metric: values[metric] for metric in METRICS} for encoder, values in scores.items()},
        "steps": steps,
        "batch": batch,
        "seconds": trained.seconds,
    }


def steps_within(seconds: float, images_per_second: float, batch: int) -> int:
    """Returns the optimizer steps that fit; at least ten, because fewer are not logged."""
    return max(10, int(seconds * images_per_second / batch))


def report(result: dict[str, Any]) -> Section:
    parts, checks = [], []
    for source in DATA:
        runs_by_method = _runs_on(result, source)
        if runs_by_method:
            parts.append(_part(source, runs_by_method, result["rates"]))
            checks.append(_check(source, runs_by_method))
    times = ", ".join(f"{source} {seconds:.0f} seconds" for source, seconds in SECONDS.items())
    body = (
        "A ViT (width 96, depth 3, patches of 8 at 48 px), trained by every method on batches of 64 for the same CPU "
        f"time ({times}); a short run measured beforehand how many steps fit. Top-1 on the test split with "
        "the whole training split as bank, of the encoder that the paper evaluates (the teacher of DINO and iBOT). "
        "Memory is the peak of the training process. Mean and standard deviation over seeds.\n\n" + "\n\n".join(parts)
    )
    return Section("Methods at equal time", checks, body)


def _part(source: str, runs_by_method: Mapping[str, Mapping[int, Any]], rates: Mapping[str, Any]) -> str:
    rows = []
    for name, method in METHODS.items():
        if name in runs_by_method:
            runs, speed = list(runs_by_method[name].values()), rates[f"{name}/{source}"]
            rows.append(
                [
                    method.title,
                    *(_mean([run["scores"][method.encoder][metric] for run in runs]) for metric in METRICS),
                    f"{speed['rate']:.0f}",
                    f"{statistics.fmean(run['steps'] * run['batch'] for run in runs):,.0f}",
                    f"{speed['memory']:.2f}",
                ]
            )
    all_runs = [run for each in runs_by_method.values() for run in each.values()]
    for floor, title in FLOORS.items():
        scores = [run["scores"][floor] for run in all_runs if floor in run["scores"]]
        if scores:
            rows.append([title, *(_mean([each[metric] for each in scores]) for metric in METRICS), "", "", ""])
    head = [
        "",
        *(f"{title}, top-1 %" for title in METRICS.values()),
        "images per CPU second",
        "images seen",
        "memory, GB",
    ]
    others = [
        f"{METHODS[name].title}'s {encoder} "
        + ", ".join(_mean([run["scores"][encoder][metric] for run in each.values()]) for metric in METRICS)
        for name, each in runs_by_method.items()
        for encoder in next(iter(each.values()))["scores"]
        if encoder not in (METHODS[name].encoder, *FLOORS)
    ]
    alike: dict[str, list[str]] = {}
    for name in _below(runs_by_method):
        if METHODS[name].why:
            alike.setdefault(METHODS[name].why, []).append(METHODS[name].title)
    reasons = "\n".join(f"- {', '.join(titles)}: {why}" for why, titles in alike.items())
    remarks = [
        *([f"The other of two encoders, kNN and linear: {'; '.join(others)}."] if others else []),
        *([f"Below random initialization in one of the two metrics, with the reason:\n\n{reasons}"] if reasons else []),
    ]
    seeds = sorted({seed for each in runs_by_method.values() for seed in each})
    trials = [each for key, each in rates.items() if key.endswith(f"/{source}")]
    where = "\n".join(f"- {each}" for each in machine.lines([run["about"] for run in [*trials, *all_runs]]))
    paragraphs = "".join(f"{remark}\n\n" for remark in remarks)
    return f"### {source}\n\n{table(head, rows)}\n\n{paragraphs}Seeds {', '.join(map(str, seeds))}.\n\n{where}"


def _below(runs_by_method: Mapping[str, Mapping[int, Any]]) -> dict[str, list[str]]:
    """Returns method -> metrics in which its mean is not above random initialization; others have no entry."""
    untrained = [
        run["scores"]["random"]
        for each in runs_by_method.values()
        for run in each.values()
        if "random" in run["scores"]
    ]
    found: dict[str, list[str]] = {}
    for name, seeds in runs_by_method.items() if untrained else ():
        for metric, title in METRICS.items():
            ours = statistics.fmean(run["scores"][METHODS[name].encoder][metric] for run in seeds.values())
            if ours <= statistics.fmean(each[metric] for each in untrained):
                found.setdefault(name, []).append(title)
    return found


def _check(source: str, runs_by_method: Mapping[str, Mapping[int, Any]]) -> Check:
    below = [f"{METHODS[name].title} by {title}" for name, each in _below(runs_by_method).items() for title in each]
    whole = set(METHODS) <= set(runs_by_method) and all(set(SEEDS) <= set(seeds) for seeds in runs_by_method.values())
    floor = any("random" in run["scores"] for each in runs_by_method.values() for run in each.values())
    return Check(
        f"every method on {source} ends above its random initialization",
        f"{len(METHODS)} methods, {len(SEEDS)} seeds",
        f"below: {', '.join(below)}" if below else f"all of {sum(map(len, runs_by_method.values()))} runs above",
        False if below else (True if whole and floor else None),
    )


def _runs_on(result: Mapping[str, Any], source: str) -> dict[str, dict[int, Any]]:
    found: dict[str, dict[int, Any]] = {}
    for key, run in result["runs"].items():
        name, data, seed = key.split("/")
        if data == source and name in METHODS:
            found.setdefault(name, {})[int(seed)] = run
    return found


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"
