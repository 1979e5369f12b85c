"""`make evaluate`: a finished run's encoders under the protocols of online evaluation, and fine-tuned."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from rich.table import Table
from torch import nn

from src import configuration, runs, train, trained
from src.callbacks.checkpoints import load_checkpoint
from src.configuration import CONFIGS, UserError, nearest
from src.datamodules.image import ImageDataModule
from src.datamodules.image_text import ImageTextDataModule
from src.datamodules.video import VideoDataModule
from src.errors import SettingError
from src.evaluation.captions import CaptionEvaluation
from src.evaluation.features import BadFeatures, NoLabels
from src.evaluation.image_text import ImageTextEvaluation
from src.evaluation.localisation import Localisation
from src.evaluation.pixels import PixelEncoder
from src.evaluation.run import feature_sets, score
from src.loggers import write_atomically

WORDS = ("run", "eval", "checkpoint", "data")
FLOORS = ("random", "pixels")
FINETUNE = "finetune"
_COLUMNS = 6  # of the printed table
# of methods with two towers: what answers to which word of EVAL=, by its key in evaluate.yaml
PAIRS = dict.fromkeys(("zeroshot", "retrieval", "hardnegatives", "geometry"), "pairs") | {
    each: each for each in ("localisation", "captions")
}

_HEADS = ("global_pool", "fc_norm", "drop_path_rate")  # what fine-tuning changes in a backbone

_NEEDS = {
    "zeroshot": "it needs labels with names",
    "retrieval": "it needs texts",
    "hardnegatives": "it needs texts that are wrong in one thing, which scenes have",
    "geometry": "it needs two pictures with texts at least, and a method that compares vectors",
    "localisation": "it needs texts whose words name what is seen, which scenes have",
    "captions": "it needs texts",
}

# a run's own whatever data it is judged on: what its method was built for
KEPT = (
    "_target_",
    "train_view",
    "batch_size",
    "tokenizer",
    "tokenizer_file",
    "tokenizer_from",
    "vocabulary",
    "text_length",
    "text_filter",
    "rewrites",
)

Scores = dict[str, dict[str, float]]  # encoder -> metric -> value


def main(argv: Sequence[str]) -> int:
    shared = runs.inherited()
    if shared is not None:
        # a process that the fine-tuning's launcher started: what comes before it is done
        return train.fit(shared.config(), shared)
    words, rest = trained.words_of(argv, WORDS)
    for_finetune = [word.removeprefix(f"{FINETUNE}.") for word in rest if word.startswith(f"{FINETUNE}.")]
    overrides = [word for word in rest if not word.startswith(f"{FINETUNE}.")]
    run = trained.run_of(words, "make evaluate")
    config = settle(run, words.get("data"), overrides)
    asked = protocols(words.get("eval") or "knn,linear", list(config.evaluate.evaluators))
    checkpoint = trained.checkpoint_of(run, words.get("checkpoint"))
    data = words.get("data") or data_name(config)
    if config.evaluate.split != "val":
        if FINETUNE in asked:
            raise UserError("EVAL=finetune judges on the validation split: leave evaluate.split=val")
        data = f"{data}_{config.evaluate.split}"
    scores: Scores = {}
    if set(asked) - {FINETUNE}:
        if set(asked) - {FINETUNE, *PAIRS}:
            scores = evaluate(config, checkpoint, asked)
        if set(asked) & set(PAIRS):
            scores["pairs"] = evaluate_pairs(config, checkpoint, [name for name in PAIRS if name in asked])
        store(run, data, scores)  # a fine-tuning that ends badly takes nothing along
    if FINETUNE in asked:
        first = next(iter(load_checkpoint(checkpoint).get("encoders", {})), "encoder")
        scores.setdefault(first, {})["finetune_top1"] = finetune(run, config, checkpoint, data, for_finetune)
    store(run, data, scores)
    show(run, checkpoint, data, scores)
    return 0


def settle(run: runs.Run, data: str | None, overrides: Sequence[str]) -> DictConfig:
    """The run's configuration with the evaluation's own part, other data where asked for, and the overrides."""
    config = run.config()
    with open_dict(config):
        config.evaluate = OmegaConf.load(CONFIGS / "evaluate.yaml")
        if data is not None:
            other = configuration.compose(
                "train", [f"experiment={config.run.experiment}", f"scale={config.run.scale}", f"data={data}"]
            )
            kept = {key: config.data._get_node(key) for key in KEPT if key in config.data}
            config.data = other.data
            for key, value in kept.items():
                config.data[key] = value
    for word in overrides:
        key = word.partition("=")[0]
        if "." not in key and key not in config:
            raise UserError(f"make evaluate knows no '{key}'{nearest(key, [*WORDS, *map(str, config)])}")
    return configuration.apply(config, overrides)


def protocols(asked: str, evaluators: Sequence[str]) -> list[str]:
    """What ``eval=`` asks for; floors alone are judged by every evaluator.

    Raises:
        UserError: a name that does not exist.
    """
    known = [*evaluators, FINETUNE, *PAIRS, *FLOORS]
    names = [name for name in re.split(r"[,\s]+", asked.strip("[] ")) if name]
    for name in names:
        if name not in known:
            raise UserError(f"there is no evaluation '{name}'{nearest(name, known)}")
    if names and set(names) <= set(FLOORS):
        names += evaluators
    return list(dict.fromkeys(names))


def evaluate(config: DictConfig, checkpoint: Path, asked: Sequence[str]) -> Scores:
    """The evaluators that are asked for on every encoder of the run, and on the floors."""
    device = device_of(config)
    encoders: dict[str, nn.Module] = dict(trained.load(config, checkpoint).encoders())
    if "random" in asked:
        encoders["random"] = next(iter(trained.fresh(config).encoders().values()))
    if "pixels" in asked:
        encoders["pixels"] = PixelEncoder()
    datamodule: ImageDataModule = configuration.instantiate(config.data)
    evaluators = [configuration.instantiate(each) for name, each in config.evaluate.evaluators.items() if name in asked]
    if not evaluators:
        return {}
    datamodule.prepare_data()
    try:
        sets = feature_sets(
            {name: encoder.to(device) for name, encoder in encoders.items()},
            datamodule,
            device,
            bank_samples=config.evaluate.bank_samples,
            query_samples=config.evaluate.query_samples,
            split=config.evaluate.split,
            precision=precision_of(config, device),
        )
    except (NoLabels, BadFeatures, SettingError) as problem:
        raise UserError(str(problem)) from problem
    return {name: score({name: mine}, evaluators, device) for name, mine in sets.items()}


def evaluate_pairs(config: DictConfig, checkpoint: Path, asked: Sequence[str]) -> dict[str, float]:
    """What an `ImageTextEvaluation` and a `Localisation` say of the run's towers, and a `CaptionEvaluation` of its
    captions, as far as they are asked for.

    Raises:
        UserError: the method has no text tower, or says nothing of an image, or the data has no texts or nothing of
            what is asked for.
    """
    device, module = device_of(config), trained.load(config, checkpoint)
    keys = dict.fromkeys(PAIRS[name] for name in asked)
    evaluations: list[ImageTextEvaluation | Localisation | CaptionEvaluation] = [
        configuration.instantiate(config.evaluate[key]) for key in keys
    ]
    scores: dict[str, float] = {}
    try:
        datamodule: ImageTextDataModule = configuration.instantiate(config.data)
        datamodule.prepare_data()
        for evaluation in evaluations:
            scores |= evaluation(module.to(device), datamodule, device, precision=precision_of(config, device))
    except SettingError as problem:
        raise UserError(f"EVAL={','.join(asked)}: {problem}") from problem
    for name in asked:
        if not any(score.startswith(name) for score in scores):
            raise UserError(f"EVAL={name}: {data_name(config)} has nothing to judge that by: {_NEEDS[name]}")
    return {name: value for name, value in scores.items() if name.startswith((*asked, "gap"))}


def finetune(run: runs.Run, config: DictConfig, checkpoint: Path, data: str, overrides: Sequence[str] = ()) -> float:
    """Top-1 after fine-tuning the run's first encoder, in a run of its own within the run's folder.

    Raises:
        UserError: the fine-tuning did not come to its end.
    """
    recipe = finetune_config(config, checkpoint, overrides)
    sub = runs.Run(runs.unused(run.dir / "evaluate", f"{FINETUNE}_{data}"))
    recipe.run.name, recipe.run.dir = sub.dir.name, str(sub.dir)
    runs.store(sub, recipe)
    runs.adopt(sub)
    code = train.fit(recipe, sub)
    metrics = sub.metrics().get("train", {})
    if code or "eval/top1" not in metrics:
        raise UserError(f"the fine-tuning did not end well; what it did is in {sub.title}")
    return float(metrics["eval/top1"])


def finetune_config(config: DictConfig, checkpoint: Path, overrides: Sequence[str] = ()) -> DictConfig:
    """The fine-tuning experiment's recipe on the run's own backbone, data, scale and hardware."""
    clips = issubclass(get_class(config.data._target_), VideoDataModule)
    experiment = config.evaluate.finetune or ("action_vitb" if clips else "finetune_vitb")
    recipe = configuration.compose("train", [f"experiment={experiment}", f"scale={config.run.scale}"])
    with open_dict(recipe):
        # a ConvNet that reads clips has none of these
        heads = set(recipe.backbone) & set(config.backbone) if clips else set(recipe.backbone)
        pooled = {key: recipe.backbone[key] for key in _HEADS if key in heads}
        recipe.backbone = {**OmegaConf.to_container(config.backbone, resolve=False), **pooled}  # type: ignore[dict-item]
        # what is not the method's: neither its views nor its texts; of videos several clips are judged
        for key in set(map(str, config.data)) - {*KEPT, *(("eval_view", "eval_batch_size") if clips else ())}:
            recipe.data[key] = config.data._get_node(key)
        if clips:
            recipe.frames = config.get("frames") or recipe.frames
    recipe.image_size, recipe.seed, recipe.paths = config.image_size, config.seed, config.paths
    recipe.checkpoint = str(checkpoint)
    recipe.run.experiment = experiment
    for key in ("accelerator", "devices", "num_nodes", "strategy", "precision"):
        recipe.trainer[key] = config.trainer[key]
    return configuration.apply(recipe, overrides)


def store(run: runs.Run, data: str, scores: Scores) -> None:
    """Into ``evaluate/<data>.json`` and, beside what is there, the run's ``metrics.json``."""
    file = run.dir / "evaluate" / f"{data}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(file.read_text()) if file.exists() else {}
    for encoder, values in scores.items():
        known[encoder] = known.get(encoder, {}) | values
    write_atomically(file, json.dumps(known, indent=2) + "\n")
    metrics = run.metrics()
    metrics["evaluate"] = metrics.get("evaluate", {}) | {data: known}
    write_atomically(run.metrics_file, json.dumps(metrics, indent=2) + "\n")


def show(run: runs.Run, checkpoint: Path, data: str, scores: Scores) -> None:
    """The table."""
    columns = list(dict.fromkeys(metric for metrics in scores.values() for metric in metrics))
    table = Table(title=f"{run.title} ({checkpoint.name}) on {data}", title_justify="left")
    # an encoder a row, or a column where there are more numbers than fit beside each other
    across = len(columns) <= _COLUMNS
    table.add_column("encoder" if across else "")
    for name in columns if across else scores:
        table.add_column(name, justify="right")
    for name in scores if across else columns:
        pairs = [(column, scores[name]) for column in columns] if across else [(name, each) for each in scores.values()]
        table.add_row(name, *(_shown(metric, values.get(metric)) for metric, values in pairs))
    Console().print(table)


def data_name(config: DictConfig) -> str:
    """What the run's data is called: "scenes" of ``…ScenesSource``."""
    target = str(config.data.source._target_).rsplit(".", 1)[-1].removesuffix("Source")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", target).lower()


def device_of(config: DictConfig) -> torch.device:
    accelerator = config.trainer.accelerator
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def precision_of(config: DictConfig, device: torch.device) -> str:
    """The precision the run was trained in, as online evaluation has it, where the device knows it."""
    precision = str(config.trainer.precision)
    if precision == "auto":
        precision = configuration.default_precision()
    return "32-true" if precision == "16-mixed" and device.type == "cpu" else precision


def _shown(metric: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.2f} %" if re.search(r"top\d|_r\d|hardnegatives|separability", metric) else f"{value:.4g}"


if __name__ == "__main__":
    configuration.run_main(main)
