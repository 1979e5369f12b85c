"""The model card of an export: how to load it, its recipe and its metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from src.export.folder import TOLERANCE
from src.export.trained_model import TrainedModel


class ExportInfo(NamedTuple):
    """Facts about an export that depend on its format."""

    parts: str  # the exported part of the run, such as "encoder 'student'"
    kind: str  # first words of the model card
    library: str  # the library that loads it, as the Hugging Face Hub calls it
    task: str  # pipeline tag of the Hugging Face Hub
    load: str  # code that loads it


def encoder_info(model: TrainedModel, library: str, load: str) -> ExportInfo:
    """The facts about an exported encoder.

    Args:
        model: the exported model.
        library: that loads it.
        load: code that loads it.
    """
    parts = f"encoder '{model.encoder}'"
    if model.tubelet_embed is not None:
        return ExportInfo(parts, "A video encoder", library, "video-classification", load)
    task = "image-classification" if model.classes else "image-feature-extraction"
    return ExportInfo(parts, "An image encoder", library, task, load)


def model_card(model: TrainedModel, info: ExportInfo) -> str:
    """The card as Markdown with the Hub's metadata."""
    config, embed = model.config, model.tubelet_embed
    parameters = sum(p.numel() for p in model.backbone.parameters())
    recipe = {
        "experiment": f"`{config.run.experiment}` at scale `{config.run.scale}`",
        "paper": config.about.paper,
        "deviations": config.about.deviations,
        "data": describe_data(config),
        "backbone": f"timm `{model.architecture}`, {parameters / 1e6:.2f} M",
        "input": (f"{embed.frames} frames of " if embed else "")
        + f"{model.size[0]} x {model.size[1]} pixels, mean {_short(model.mean)}, std {_short(model.std)}",
        "epochs": config.trainer.max_epochs,
        "batch size": config.data.batch_size,
        "learning rate": f"{config.optimizer.lr:.4g}",
        "weight decay": config.optimizer.weight_decay,
        "seed": config.seed,
        "weights": f"{info.parts} of `{model.checkpoint.name}`",
    }
    metrics = [f"| {stage} | {name} | {value:.4g} |" for stage, name, value in _metric_rows(model.run.metrics())]
    origin = model.pretrained_from
    lines = [
        "---",
        f"license: {'other' if origin else 'mit'}",
        f"library_name: {info.library}",
        f"pipeline_tag: {info.task}",
        "---",
        f"# {config.run.experiment}: {config.run.name}",
        "",
        f"{info.kind} trained with Pretext. When this folder was written, its features on random input were compared "
        f"with those of the training code: they differ by at most {TOLERANCE:g}.",
        "",
        "## Load",
        "```python",
        info.load.rstrip(),
        "```",
        "",
        "## Recipe",
        *(f"- {key}: {value}" for key, value in recipe.items()),
        "",
        "The whole configuration:",
        "```yaml",
        OmegaConf.to_yaml(_without_paths(config)).rstrip(),
        "```",
        "",
        "## Metrics",
        "| stage | metric | value |",
        "|---|---|---|",
        *(metrics or ["| | none logged | |"]),
        "",
        "## Intended use",
        "Features for research: nearest neighbors, linear probes, fine-tuning. The features reflect the training data "
        "above; they have not been examined for bias, safety or fitness for decisions about people.",
        "",
        "## License",
        "The template's code is under the MIT license, and so are these weights unless their author says otherwise. "
        + (f"Training started from {origin}, whose license applies to these weights too. " if origin else "")
        + "Rights in the training data may restrict their use.",
        "",
    ]
    return "\n".join(lines)


def describe_data(config: DictConfig) -> str:
    """The training data in a few words, without paths of the machine."""
    source = str(config.data.source._target_).rsplit(".", 1)[-1].removesuffix("Source")
    samples = config.data.train_samples
    return source if samples is None else f"{source}, {samples} samples"


def _metric_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Stage, name and value of all evaluation scores and of the last losses."""
    rows: list[tuple[str, str, float]] = []

    def walk(stage: str, path: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                walk(stage, f"{path} {key}".strip(), item)
        elif isinstance(value, int | float) and (stage != "train" or path.startswith(("eval/", "loss/"))):
            rows.append((stage, path, float(value)))

    for stage, values in metrics.items():
        walk(stage, "", values)
    return rows


def _without_paths(config: DictConfig) -> DictConfig:
    """The recipe without the paths of the machine that trained it."""
    keys = ("model", "backbone", "optimizer", "schedules", "image_size", "seed")
    nodes = {key: config._get_node(key) for key in keys}
    return OmegaConf.create({key: node for key, node in nodes.items() if node is not None})


def _short(values: Sequence[float]) -> str:
    return json.dumps([round(value, 4) for value in values])
