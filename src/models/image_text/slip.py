"""SLIP: CLIP, and SimCLR on two further views of each image."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from src.collectives import gather
from src.datamodules.batches.image_text import ImageTextViewsBatch
from src.errors import SettingError
from src.models.functional import l2_normalize
from src.models.heads.mlp import MlpHead
from src.models.image_text.clip import CLIP
from src.models.joint_embedding.base import forward_views_separately
from src.models.losses.contrastive import nt_xent
from src.models.pretrain_module import StepOutput
from src.models.text.text_tower import TextTower
from src.optim import OptimizerRecipe


class SLIP(CLIP):
    """SLIP: Self-supervision meets Language-Image Pre-training (Mu et al., 2021). Deviations: those of `CLIP`.

    The image tower encodes three views of an image: one is compared with the caption, the two others with each other.

    Args:
        backbone, text, optimizer, others: arguments of `CLIP`.
        hidden_dim: width of the two hidden layers of SimCLR's projector.
        projection_dim: width of its projections.
        ssl_temperature: of SimCLR's loss.
        ssl_scale: weight of SimCLR's loss; 0 is CLIP, which encodes no further views.

    Raises:
        SettingError: a bad value; in a step, other than two further views, or a single pair.
    """

    def __init__(
        self,
        backbone: nn.Module,
        text: TextTower,
        optimizer: OptimizerRecipe,
        *,
        hidden_dim: int = 4096,
        projection_dim: int = 256,
        ssl_temperature: float = 0.1,
        ssl_scale: float = 1.0,
        **others: Any,
    ) -> None:
        super().__init__(backbone, text, optimizer, **others)
        if ssl_temperature <= 0 or ssl_scale < 0:
            raise SettingError(
                f"model.ssl_temperature={ssl_temperature} must be above 0, model.ssl_scale={ssl_scale} at least 0"
            )
        widths = (self.image_encoder.dim, hidden_dim, hidden_dim, projection_dim)
        # DDP reports parameters without a gradient as an error
        self.projector = MlpHead(widths, hidden_bias=True) if ssl_scale else None
        self.ssl_temperature = ssl_temperature
        self.ssl_scale = ssl_scale

    # it takes more fields than CLIP does
    def training_step(self, batch: ImageTextViewsBatch, batch_idx: int) -> StepOutput:  # type: ignore[override]
        step = super().training_step(batch, batch_idx)
        if self.projector is None:
            return step
        contrast = step["loss"]
        h = forward_views_separately(self.image_features, views_of(batch, 2))
        z = l2_normalize(forward_views_separately(self.projector, h))
        keys, offset = gather(z)
        # the mean over the two views, of which nt_xent is the sum
        ssl = nt_xent(z, keys, offset, temperature=self.ssl_temperature) / 2
        logs = {**step["logs"], "clip": contrast.detach(), "simclr": ssl.detach()}
        return {**step, "loss": contrast + self.ssl_scale * ssl, "logs": logs}

    def visualize(self, batch: ImageTextViewsBatch) -> dict[str, Tensor]:
        return image_and_views(batch)


def views_of(batch: ImageTextViewsBatch, count: int) -> Tensor:
    """Returns the further views of the images: [B, V, 3, h, w].

    Raises:
        SettingError: there are not ``count`` of them.
    """
    number = batch["views"].shape[1] if "views" in batch else 0
    if number != count:
        raise SettingError(
            f"data.train_view: this method needs {count} further views of each image, and got {number}; ImageAndViews "
            "makes them"
        )
    return batch["views"]


def image_and_views(batch: ImageTextViewsBatch) -> dict[str, Tensor]:
    """Returns images and their further views for `visualize`."""
    return {"image": batch["image"][:, None], "views": batch["views"]}
