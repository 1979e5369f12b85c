"""STS: regress a handful of statistics of a clip, where it moves and how it looks."""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F

from src.datamodules.batches.video import StatisticsBatch
from src.models.backbones.encoder import Encoder
from src.models.backbones.video_encoder import clip_encoder
from src.models.pretrain_module import PretrainModule, StepOutput
from src.optim import OptimizerRecipe

MOTION, APPEARANCE = 14, 13  # numbers of a clip, see `src.datamodules.views.statistics`


class STS(PretrainModule):
    """Self-supervised Video Representation Learning by Uncovering Spatio-temporal Statistics (Wang et al., 2021).

    The numbers of regions, directions, frames and colors are regressed as they are. Deviations: a mirrored flow
    changes its sign, and the color of a ring is that of the ring alone, both of which the authors' code misses; where
    nothing moves all numbers of motion are 0, not the first region's; clips are not ordered by how hard they are.

    Args:
        backbone: of clips, such as `r2plus1d`; its positions are averaged.
        optimizer: SGD in the paper.
        motion_weight, appearance_weight: of the two errors.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerRecipe,
        *,
        motion_weight: float = 1.0,
        appearance_weight: float = 0.1,
    ) -> None:
        super().__init__(optimizer)
        self.backbone = backbone
        self.motion_weight = motion_weight
        self.appearance_weight = appearance_weight
        dim = clip_encoder(backbone).dim
        self.motion = nn.Linear(dim, MOTION)
        self.appearance = nn.Linear(dim, APPEARANCE)

    def training_step(self, batch: StatisticsBatch, batch_idx: int) -> StepOutput:
        embedding = self.encoders()["encoder"](batch["video"]).embedding
        motion = F.mse_loss(self.motion(embedding).float(), batch["motion"].float())
        appearance = F.mse_loss(self.appearance(embedding).float(), batch["appearance"].float())
        return {
            "loss": self.motion_weight * motion + self.appearance_weight * appearance,
            "logs": {"motion": motion.detach(), "appearance": appearance.detach()},
            "embedding": embedding.detach().float(),
        }

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": clip_encoder(self.backbone)}
