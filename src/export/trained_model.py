"""The trained model that is exported, and what its files say about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from src import configuration, runs, trained
from src.datamodules.datamodule import DataModule
from src.datamodules.text.tokenizer import Tokenizer
from src.datamodules.views.squeezed import SqueezedCenterCrop
from src.errors import UserError, nearest
from src.image_size import height_and_width
from src.models.backbones.cross_frame_encoder import CrossFrameEncoder
from src.models.backbones.encoder import Encoder
from src.models.backbones.video_vit import TubeletEmbed
from src.models.image_text.base import ImageTextModule

BACKBONES = ("timm.create_model", "src.models.backbones.video_vit.video_vit")


@dataclass(frozen=True)
class Towers:
    """An image tower and a text tower with the tokenizer of the text tower."""

    module: ImageTextModule  # in evaluation mode
    tokenizer: Tokenizer


@dataclass(frozen=True)
class TrainedModel:
    """A run's backbone with its preprocessing and its configuration."""

    run: runs.Run
    config: DictConfig
    backbone: nn.Module  # trained, in evaluation mode
    encoder: str  # its name in `PretrainModule.encoders`
    checkpoint: Path
    size: tuple[int, int]  # height and width of the evaluation images, pixels
    crop_share: float  # side of the center crop as a share of the image's shorter side
    squeezed: bool  # the crop is of the image squeezed to a square, and its share is of both sides
    mean: list[float]
    std: list[float]
    classes: list[str]  # of the backbone's classifier; empty without a classifier
    towers: Towers | None = None  # of a two-tower method, unless one encoder was named

    @property
    def pretrained_from(self) -> str:
        """The weights that training started from, "" for a random initialization."""
        checkpoint = self.config.get("checkpoint")
        if checkpoint is not None:
            return Path(checkpoint).name
        return f"timm's {self.architecture}" if self.config.backbone.get("pretrained") else ""

    @property
    def architecture(self) -> str:
        return str(self.config.backbone.model_name)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of ``timm.create_model``, besides the name, that build this backbone."""
        training_only = ("_target_", "model_name", "pretrained", "checkpoint_path", "drop_path_rate")
        values = OmegaConf.to_container(self.config.backbone, resolve=True)
        assert isinstance(values, dict)
        arguments = {str(key): value for key, value in values.items() if key not in training_only}
        return arguments | {"num_classes": int(getattr(self.backbone, "num_classes", 0))}

    @property
    def tubelet_embed(self) -> TubeletEmbed | None:
        """The tubelet embedding of a video backbone, None for an image backbone."""
        embed = getattr(self.backbone, "patch_embed", None)
        return embed if isinstance(embed, TubeletEmbed) else None

    def example_input(self) -> Tensor:
        """Random input that is the same in every call: images [2, C, H, W], or clips [2, T, C, H, W]."""
        frames = () if self.tubelet_embed is None else (self.tubelet_embed.frames,)
        return torch.randn(2, *frames, self.channels, *self.size, generator=torch.Generator().manual_seed(0))

    @property
    def channels(self) -> int:
        """Number of channels of the images."""
        return len(self.mean)


def load_trained(run: runs.Run, encoder: str | None, checkpoint: str | None) -> TrainedModel:
    """Loads a run's model for export.

    Args:
        run: the run.
        encoder: name of an encoder; None exports both towers where a format can, else the first encoder.
        checkpoint: "best", "last" or a path; None for the best checkpoint, else the last.

    Raises:
        UserError: the encoder or checkpoint does not exist, or the run has no timm backbone.
    """
    config = run.config()
    backbone = config.get("backbone")
    if backbone is None or backbone.get("_target_") not in BACKBONES:
        raise UserError(f"{run.title} has no timm backbone (`backbone._target_: timm.create_model`) to export")
    path = trained.checkpoint_of(run, checkpoint)
    module = trained.load(config, path)
    encoders: Mapping[str, Encoder] = module.encoders()
    name = encoder or next(iter(encoders))
    if name not in encoders:
        raise UserError(f"{run.title} has no encoder '{name}'{nearest(name, list(encoders))}")
    if isinstance(encoders[name], CrossFrameEncoder):
        raise UserError(f"{run.title} has a ViT with cross-frame attention, which neither timm nor transformers has")
    datamodule = configuration.instantiate(config.data)
    view = datamodule.eval_view
    body = encoders[name].backbone.eval()
    towers = None
    if encoder is None and isinstance(module, ImageTextModule) and isinstance(datamodule, DataModule):
        towers = Towers(module, datamodule.tokenizer)
    return TrainedModel(
        run=run,
        config=config,
        backbone=body,
        encoder=name,
        checkpoint=path,
        size=height_and_width(getattr(view, "size", config.image_size)),
        crop_share=float(getattr(view, "share", 1.0)),
        squeezed=isinstance(view, SqueezedCenterCrop),
        mean=[round(value, 6) for value in datamodule.mean.flatten().tolist()],
        std=[round(value, 6) for value in datamodule.std.flatten().tolist()],
        classes=list(getattr(module, "classes", [])) if getattr(body, "num_classes", 0) else [],
        towers=towers,
    )
