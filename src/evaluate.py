"""`make evaluate`: a finished run's encoders under the protocols of online evaluation, and fine-tuned."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from rich.table import Table
from torch import nn

from src import configuration, runs, train, trained
from src.checkpoint_io import load_checkpoint
from src.configuration import CONFIGS
from src.datamodules.datamodule import DataModule
from src.datamodules.sources.source import Split
from src.datamodules.views.video import VideoView
from src.errors import SettingError, UserError, nearest
from src.evaluation.captions import CaptionEvaluation
from src.evaluation.features import BadFeatures, FeatureSets, NoLabels
from src.evaluation.image_text import ImageTextEvaluation
from src.evaluation.localization import Localization
from src.evaluation.pixels import PixelEncoder
from src.evaluation.run import EncoderEvaluation, Evaluator, feature_sets, score
from src.files import write_atomically

WORDS = ("run", "eval", "checkpoint", "data")
FLOORS = ("random", "pixels")
FINETUNE = "finetune"
_COLUMNS = 6  # of the printed table
# of methods with two towers: what answers to which word of EVAL=, by its key in evaluate.yaml
PAIRS = dict.fromkeys(("zeroshot", "retrieval", "hardnegatives", "geometry"), "pairs") | {
    each: each for each in ("localization", "captions")
}

_HEADS = ("global_pool", "fc_norm", "drop_path_rate")  # what fine-tuning changes in a backbone

_NEEDS = {
    "zeroshot": "it needs labels with names",
    "retrieval": "it needs texts",
    "hardnegatives": "it needs texts that are wrong in one thing, which scenes have",
    "geometry": "it needs two pictures with texts at least, and a method that compares vectors",
    "localization": "it needs texts whose words name what is seen, which scenes have",
    "captions": "it needs texts",
}

# a run's own whatever data it is judged on: what its method was built for
KEPT = (
    "train_view",
    "batch_size",
    "tokenizer",
    "tokenizer_file",
    "tokenizer_from",
    "vocabulary",
    "text_length",
    "text_filter",
    "extras",
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
    default, others = list(config.evaluate.default), [*config.evaluate.evaluators, *config.evaluate.encoders]
    asked = protocols(words.get("eval") or ",".join(default), default, others)
    checkpoint = trained.checkpoint_of(run, words.get("checkpoint"))
    data = words.get("data") or data_name(config)
    if config.evaluate.split != "val":
        data = f"{data}_{config.evaluate.split}"
    scores: Scores = {}
    if set(asked) - {FINETUNE}:
        if set(asked) - {FINETUNE, *PAIRS, *FLOORS}:
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


def protocols(asked: str, evaluators: Sequence[str], others: Sequence[str] = ()) -> list[str]:
    """What ``eval=`` asks for; floors alone are judged by ``evaluators``, and ``others`` have to be named.

    Raises:
        UserError: a name that does not exist.
    """
    known = list(dict.fromkeys([*evaluators, *others, FINETUNE, *PAIRS, *FLOORS]))
    names = [name for name in re.split(r"[,\s]+", asked.strip("[] ")) if name]
    for name in names:
        if name not in known:
            raise UserError(f"there is no evaluation '{name}'{nearest(name, known)}")
    if names and set(names) <= set(FLOORS):
        names += evaluators
    return list(dict.fromkeys(names))


def evaluate(config: DictConfig, checkpoint: Path, asked: Sequence[str]) -> Scores:
    """The evaluators that are asked for on every encoder of the run, and on the floors."""
    encoders: dict[str, nn.Module] = dict(trained.load(config, checkpoint).encoders())
    if "random" in asked:
        encoders["random"] = next(iter(trained.fresh(config).encoders().values()))
    if "pixels" in asked:
        encoders["pixels"] = PixelEncoder()
    judged = EncoderEvaluator(config, encoders, [name for name in asked if name not in (FINETUNE, *PAIRS, *FLOORS)])
    scores: Scores = {}
    for name in judged.evaluations:
        for encoder, values in judged.scores(name).items():
            scores[encoder] = scores.get(encoder, {}) | values
    return scores


class EncoderEvaluator:
    """Encoders on a run's data. The data is read once, whatever is asked of it.

    Args:
        config: of the run, with the evaluation's part, see `settle`.
        encoders: by name.
        evaluations: the names in ``evaluate.evaluators`` and ``evaluate.encoders`` that may be asked for.
    """

    def __init__(self, config: DictConfig, encoders: Mapping[str, nn.Module], evaluations: Sequence[str]) -> None:
        self.config = config
        self.device = device_of(config)
        self.precision = precision_of(config, self.device)
        self.encoders = encoders
        self.evaluations = list(evaluations)

    def scores(self, name: str) -> Scores:
        """What the evaluation ``name`` says of each encoder.

        Raises:
            UserError: the data has not what it needs, or an encoder's features are not finite.
        """
        try:
            if name in self._evaluators:
                evaluators = [self._evaluators[name]]
                return {each: score({each: mine}, evaluators, self.device) for each, mine in self._sets.items()}
            evaluation: EncoderEvaluation = configuration.instantiate(self.config.evaluate.encoders[name])
            return evaluation(
                self._on_device,
                self._datamodule,
                self.device,
                split=self.config.evaluate.split,
                precision=self.precision,
            )
        except (NoLabels, BadFeatures, SettingError) as problem:
            raise UserError(str(problem)) from problem

    @cached_property
    def _evaluators(self) -> dict[str, Evaluator]:
        known = self.config.evaluate.evaluators
        return {name: configuration.instantiate(known[name]) for name in self.evaluations if name in known}

    @cached_property
    def _on_device(self) -> dict[str, nn.Module]:
        return {name: encoder.to(self.device) for name, encoder in self.encoders.items()}

    @cached_property
    def _datamodule(self) -> DataModule:
        datamodule: DataModule = configuration.instantiate(self.config.data)
        datamodule.prepare_data()
        return datamodule

    @cached_property
    def _sets(self) -> dict[str, FeatureSets]:
        return feature_sets(
            self._on_device,
            self._datamodule,
            self.device,
            bank_samples=self.config.evaluate.bank_samples,
            query_samples=self.config.evaluate.query_samples,
            split=self.config.evaluate.split,
            precision=self.precision,
            evaluators=list(self._evaluators.values()),
        )


def evaluate_pairs(config: DictConfig, checkpoint: Path, asked: Sequence[str]) -> dict[str, float]:
    """What an `ImageTextEvaluation` and a `Localization` say of the run's towers, and a `CaptionEvaluation` of its
    captions, as far as they are asked for.

    Raises:
        UserError: the method has no text tower, or says nothing of an image, or the data has no texts or nothing of
            what is asked for.
    """
    device, module = device_of(config), trained.load(config, checkpoint)
    keys = dict.fromkeys(PAIRS[name] for name in asked)
    evaluations: list[ImageTextEvaluation | Localization | CaptionEvaluation] = [
        configuration.instantiate(config.evaluate[key]) for key in keys
    ]
    scores: dict[str, float] = {}
    try:
        datamodule: DataModule = configuration.instantiate(config.data)
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
    folder = runs.unused(run.dir / "evaluate", f"{FINETUNE}_{data}")
    asked = config.evaluate
    recipe = finetune_config(config, checkpoint, overrides, experiment=asked.finetune, split=asked.split)
    return fine_tuned(recipe, folder, "eval/top1")


def fine_tuned(recipe: DictConfig, folder: Path, metric: str) -> float:
    """The last value of ``metric`` of a run of ``recipe`` in the empty ``folder``.

    Raises:
        UserError: it did not come to its end, or logged no such metric.
    """
    sub = runs.Run(folder)
    recipe.run.name, recipe.run.dir = sub.dir.name, str(sub.dir)
    runs.store(sub, recipe)
    runs.adopt(sub)
    code = train.fit(recipe, sub)
    metrics = sub.metrics().get("train", {})
    if code or metrics.get(metric) is None:
        known = "" if code else f", or logged no {metric}{nearest(metric, list(metrics))}"
        raise UserError(f"the fine-tuning did not end well{known}; what it did is in {sub.title}")
    return float(metrics[metric])


def finetune_config(
    config: DictConfig,
    checkpoint: Path | None,
    overrides: Sequence[str] = (),
    *,
    experiment: str | None = None,
    split: Split = "val",
    kept: Sequence[str] = KEPT,
) -> DictConfig:
    """The fine-tuning experiment's recipe on the run's own backbone, data, scale and hardware.

    Args:
        checkpoint: what it starts from; None for its own beginning.
        overrides: of the recipe.
        experiment: None for ``finetune_vitb``, or ``action_vitb`` of a run that has seen videos.
        split: what it is judged on.
        kept: what of ``data`` is the experiment's own, and not the run's.
    """
    clips = issubclass(get_class(config.data.eval_view._target_), VideoView)
    experiment = experiment or ("action_vitb" if clips else "finetune_vitb")
    recipe = configuration.compose("train", [f"experiment={experiment}", f"scale={config.run.scale}"])
    with open_dict(recipe):
        # a ConvNet that reads clips has none of these
        heads = set(recipe.backbone) & set(config.backbone) if clips else set(recipe.backbone)
        pooled = {key: recipe.backbone[key] for key in _HEADS if key in heads}
        recipe.backbone = {**OmegaConf.to_container(config.backbone, resolve=False), **pooled}  # type: ignore[dict-item]
        # what is not the method's: neither its views nor its texts; of videos several clips are judged
        for key in set(map(str, config.data)) - {*kept, *(("eval_view", "eval_batch_size") if clips else ())}:
            recipe.data[key] = config.data._get_node(key)
        if clips:
            recipe.frames = config.get("frames") or recipe.frames
        if split != "val":
            recipe.data.eval_split = split
    recipe.image_size, recipe.seed, recipe.paths = config.image_size, config.seed, config.paths
    recipe.checkpoint = None if checkpoint is None else str(checkpoint)
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
    share = re.search(r"top\d|_r\d|_map$|_miou$|_accuracy$|^labelpropagation|hardnegatives|separability", metric)
    return f"{100 * value:.2f} %" if share else f"{value:.4g}"


if __name__ == "__main__":
    configuration.run_main(main)
