"""Fine-tuning of a run's encoder by an experiment, as an evaluation and as a run of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict

from src import configuration, runs, train
from src.datamodules.datamodule import METHOD_KEYS
from src.datamodules.sources.source import Split
from src.datamodules.views.video import VideoView
from src.errors import UserError
from src.evaluation.errors import NotApplicable
from src.evaluation.subject import Subject
from src.trained import RunSubject

_HEAD_KEYS = ("global_pool", "fc_norm", "drop_path_rate")  # of the backbone, which fine-tuning sets itself


@dataclass(frozen=True)
class FineTuning:
    """Trains an experiment that starts from the subject's first encoder, or from random weights if the subject has no
    checkpoint. Returns the last values that this training logged, such as ``eval/top1``.

    Args:
        experiment: such as ``finetune_vitb``; None for that, or ``action_vitb`` if the run was trained on videos.
        overrides: of the experiment's recipe.
        own_data: keys of ``data`` that are the experiment's own, besides those of its method.
        folder: of the fine-tuned run, empty; None for one that is deleted afterwards.
    """

    experiment: str | None = None
    overrides: Sequence[str] = ()
    own_data: Sequence[str] = ()
    folder: Path | None = None

    def __call__(self, subject: Subject) -> dict[str, float]:
        if not isinstance(subject, RunSubject):
            raise NotApplicable("fine-tuning needs a run with its configuration")
        recipe = self.recipe(subject.config, subject.checkpoint, split=subject.split)
        if self.folder is not None:
            return fine_tune(recipe, self.folder)
        with tempfile.TemporaryDirectory() as folder:
            return fine_tune(recipe, Path(folder))

    def recipe(self, config: DictConfig, checkpoint: Path | None, *, split: Split = "val") -> DictConfig:
        """Returns the experiment's configuration with the run's backbone, data, scale and hardware.

        Args:
            config: of the run.
            checkpoint: the weights to start from; None for random ones.
            split: of the images that are evaluated on.
        """
        clips = issubclass(get_class(config.data.eval_view._target_), VideoView)
        experiment = self.experiment or ("action_vitb" if clips else "finetune_vitb")
        recipe = configuration.compose("train", [f"experiment={experiment}", f"scale={config.run.scale}"])
        with open_dict(recipe):
            # a ConvNet that reads clips has none of the keys of the head
            backbone_keys = set(recipe.backbone) & set(config.backbone) if clips else set(recipe.backbone)
            head = {key: recipe.backbone[key] for key in _HEAD_KEYS if key in backbone_keys}
            recipe.backbone = {**OmegaConf.to_container(config.backbone, resolve=False), **head}  # type: ignore[dict-item]
            if recipe.backbone.get("pretrained"):
                recipe.backbone.pretrained = False  # training starts from the run's own weights, or from random ones
            # videos keep the experiment's evaluation view, which takes several clips
            own = {*METHOD_KEYS, "text_filter", *self.own_data, *(("eval_view", "eval_batch_size") if clips else ())}
            for key in set(map(str, config.data)) - own:
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
        return configuration.apply(recipe, self.overrides)


def fine_tune(recipe: DictConfig, folder: Path) -> dict[str, float]:
    """Trains a run of ``recipe`` in the empty ``folder`` and returns the last values it logged.

    Raises:
        UserError: the training did not end well.
        SystemExit: a signal stopped it, which is meant for the whole command.
    """
    run = runs.Run(folder)
    recipe.run.name, recipe.run.dir = run.dir.name, str(run.dir)
    runs.store(run, recipe)
    runs.adopt(run)
    code = train.fit(recipe, run)
    if code > 128:
        raise SystemExit(code)
    if code:
        raise UserError(f"the fine-tuning did not end well; its run is {run.title}")
    return run.metrics().get("train", {})
