"""STS: regresses motion and appearance statistics of a clip."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor, nn
from torch.nn import functional as F

from src.datamodules.batches.video import StatisticsBatch
from src.models.backbones.encoder import Encoder
from src.models.backbones.video_encoder import clip_encoder
from src.models.functional import full_precision
from src.models.pretrain_module import PretrainModule, StepOutput
from src.optim import OptimizerRecipe

MOTION, APPEARANCE = 14, 13  # numbers of statistics, see `src.datamodules.views.statistics`


class STS(PretrainModule):
    """Self-supervised Video Representation Learning by Uncovering Spatio-temporal Statistics (Wang et al., 2021).

    The statistics are numbers of regions, directions, frames and colors, regressed without scaling. Deviations: flow is
    negated when a clip is mirrored, and the color of a ring excludes what it surrounds, both of which the authors' code
    omits; all motion statistics of a clip without motion are 0, not those of the first region; there is no curriculum.

    Args:
        backbone: a network that reads clips, such as `r2plus1d`; its features are averaged over positions.
        optimizer: SGD in the paper.
        motion_weight, appearance_weight: of the two mean squared errors.
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
        dim = self.encoder.dim
        self.motion = nn.Linear(dim, MOTION)
        self.appearance = nn.Linear(dim, APPEARANCE)

    def training_step(self, batch: StatisticsBatch, batch_idx: int) -> StepOutput:
        embedding = self.encoder(batch["video"]).embedding
        motion = _mean_squared_error(self.motion(embedding), batch["motion"])
        appearance = _mean_squared_error(self.appearance(embedding), batch["appearance"])
        return {
            "loss": self.motion_weight * motion + self.appearance_weight * appearance,
            "logs": {"motion": motion.detach(), "appearance": appearance.detach()},
            "embedding": embedding.detach().float(),
        }

    @cached_property
    def encoder(self) -> Encoder:
        """Built once: it checks its backbone."""
        return clip_encoder(self.backbone)

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": self.encoder}


@full_precision
def _mean_squared_error(predicted: Tensor, statistics: Tensor) -> Tensor:
    return F.mse_loss(predicted, statistics)
