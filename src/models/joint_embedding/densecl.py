"""DenseCL: MoCo v2 for whole images, and the same loss for each position, whose key is the most similar position of the
other view."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from src.datamodules.batches.base import optional_labels
from src.datamodules.batches.image import MultiViewBatch
from src.errors import SettingError
from src.models.functional import full_precision, l2_normalize
from src.models.heads.mlp import MlpHead
from src.models.joint_embedding.base import two_views
from src.models.joint_embedding.moco_v2 import MoCoV2
from src.models.joint_embedding.queue import FeatureQueue
from src.models.losses.contrastive import contrastive_accuracy, queue_info_nce
from src.models.masked.masking import gather_tokens
from src.models.pretrain_module import StepOutput
from src.models.teacher import teacher_of
from src.optim import OptimizerRecipe


class DenseCL(MoCoV2):
    """Dense Contrastive Learning for Self-Supervised Visual Pre-Training (Wang et al., 2021). Deviations: those of
    `MoCoV2`.

    A second projector maps the feature vector of each position. The key of a position in the first view is the
    teacher's projection at the position of the second view whose backbone features are most similar. Its negatives are
    the mean dense projections of earlier images, in a queue of their own.

    Args:
        dense_weight: share of the dense loss in the total, lambda in the paper; the global loss has the rest.
        queue_size: length of either queue; a multiple of the batch size.
        hidden_dim, projection_dim: widths of either projector, as in `MoCoV2`.
        others: temperature, teacher_momentum and pool, as in `MoCoV2`.

    Raises:
        SettingError: ``dense_weight`` is outside of [0, 1]; and as `MoCoV2`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerRecipe,
        *,
        dense_weight: float = 0.5,
        queue_size: int = 65536,
        hidden_dim: int | None = None,
        projection_dim: int = 128,
        **others: Any,
    ) -> None:
        super().__init__(
            backbone, optimizer, queue_size=queue_size, hidden_dim=hidden_dim, projection_dim=projection_dim, **others
        )
        if not 0 <= dense_weight <= 1:
            raise SettingError(f"model.dense_weight={dense_weight} must lie in [0, 1]")
        start_like_the_authors(self.student["projector"])
        width: int = self.student["encoder"].dim  # type: ignore[assignment]
        self.student["dense_projector"] = MlpHead((width, hidden_dim or width, projection_dim), hidden_norm=None)
        self.teacher = teacher_of(self.student)
        self.dense_queue = FeatureQueue(projection_dim, queue_size)
        self.dense_weight = dense_weight

    def training_step(self, batch: MultiViewBatch, batch_idx: int) -> StepOutput:
        first, second = two_views(batch).unbind(dim=1)
        features = self.student["encoder"](first)
        query = l2_normalize(self.student["projector"](features.embedding))
        dense_query = l2_normalize(self.student["dense_projector"](features.patches))
        with torch.no_grad():
            others = self.teacher["encoder"](second)
            key = l2_normalize(self.teacher["projector"](others.embedding))
            dense_projection = self.teacher["dense_projector"](others.patches)
            match = most_similar_position(features.patches, others.patches)
            dense_key = l2_normalize(gather_tokens(dense_projection, match))
        global_loss = queue_info_nce(query, key, self.queue.features, temperature=self.temperature)
        dense_loss = queue_info_nce(
            dense_query.flatten(0, 1),
            dense_key.flatten(0, 1),
            self.dense_queue.features,
            temperature=self.temperature,
        )
        self.queue.stage(key, index=batch["index"], label=optional_labels(batch))
        self.dense_queue.stage(l2_normalize(dense_projection.mean(dim=1)))
        logs: dict[str, Tensor | float] = {
            "global": global_loss.detach(),
            "dense": dense_loss.detach(),
            "proxy_accuracy": contrastive_accuracy(query, key, self.queue.features),
            "matched_positions": matched_share(match),
        }
        return {
            "loss": (1 - self.dense_weight) * global_loss + self.dense_weight * dense_loss,
            "logs": logs,
            "embedding": features.embedding.detach().float(),
        }

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        super().on_before_optimizer_step(optimizer)
        self.dense_queue.enqueue()

    def visualize(self, batch: MultiViewBatch) -> Mapping[str, Tensor]:
        """The views, and the first view put together from the matching cells of the second."""
        first, second = two_views(batch).unbind(dim=1)
        features = self.student["encoder"](first)
        match = most_similar_position(features.patches, self.teacher["encoder"](second).patches)
        rows, columns = features.grid
        height, width = (side // cells * cells for side, cells in zip(first.shape[-2:], (rows, columns), strict=True))
        cells = rearrange(second[..., :height, :width], "b c (r h) (s w) -> b (r s) (c h w)", r=rows, s=columns)
        matched = rearrange(
            gather_tokens(cells, match),
            "b (r s) (c h w) -> b c (r h) (s w)",
            r=rows,
            c=first.shape[1],
            h=height // rows,
        )
        assembled = second.clone()
        assembled[..., :height, :width] = matched
        return {"matched": torch.stack([first, second, assembled], dim=1)}


@torch.no_grad()
def start_like_the_authors(projector: nn.Module) -> None:
    """Draws the global projector's weights from He's normal distribution and sets its biases to zero. The dense one
    keeps PyTorch's initialization, as in the authors' code."""
    for layer in projector.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)


@torch.no_grad()
@full_precision
def most_similar_position(query: Tensor, key: Tensor) -> Tensor:
    """Returns, for each position of the query map, the position of the key map with the highest cosine similarity:
    [B, N, D], [B, M, D] -> int64 [B, N]."""
    return (l2_normalize(query) @ l2_normalize(key).mT).argmax(dim=2)


def matched_share(match: Tensor) -> Tensor:
    """Share of distinct positions among the matches of an image, mean over images: [B, N] -> scalar. 1 / N if all
    positions have the same match."""
    ordered = match.sort(dim=1).values
    return (1 + (ordered[:, 1:] != ordered[:, :-1]).sum(dim=1)).float().mean() / match.shape[1]
