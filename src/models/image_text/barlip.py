"""BarLIP: the cross-correlation of image and text projections is brought close to the identity."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from src.collectives import all_reduce, world_size
from src.errors import SettingError
from src.models.heads.mlp import MlpHead
from src.models.image_text.clip_rocket import AddedObjective, PairViews
from src.models.image_text.siamlip import NormalizedMlp, PairProjectors
from src.models.losses.redundancy import barlow_twins, cross_correlation


class BarLIP(AddedObjective):
    """BarLIP, Barlow Twins between images and texts (Fini et al., 2023). Deviations: gradients are those of one process
    on the whole batch; the authors' code does not differentiate through its sum over processes.

    Args:
        image_dim, text_dim: widths of the towers' features.
        hidden_dim: width of the projectors' two hidden layers.
        projection_dim: width of the projections.
        off_diagonal_weight: weight of the redundancy reduction term.
        weight: of this loss.
        separate_views: projectors of their own for the strong views, as the authors' ViTs have.

    Raises:
        SettingError: a weight is negative.
    """

    def __init__(
        self,
        image_dim: int,
        text_dim: int,
        *,
        hidden_dim: int = 3000,
        projection_dim: int = 8192,
        off_diagonal_weight: float = 5e-3,
        weight: float = 0.025,
        separate_views: bool = False,
    ) -> None:
        super().__init__()
        if min(off_diagonal_weight, weight) < 0:
            raise SettingError(
                f"model.objective: off_diagonal_weight={off_diagonal_weight} and weight={weight} must not be negative"
            )
        self.off_diagonal_weight, self.weight = off_diagonal_weight, weight

        def projector(width: int) -> nn.Module:
            mlp = MlpHead((width, hidden_dim, hidden_dim, projection_dim), hidden_bias=True)
            return NormalizedMlp(mlp, nn.BatchNorm1d(projection_dim))

        self.projectors = PairProjectors(
            partial(projector, image_dim), partial(projector, text_dim), separate=separate_views
        )

    def forward(self, features: PairViews, embeddings: PairViews, local_scale: Tensor) -> Tensor:
        projections = self.projectors(features)
        combinations = [(projections.image, projections.text)] + [
            (image, text) for image in projections.images.unbind(dim=1) for text in projections.texts.unbind(dim=1)
        ]
        total = projections.image.new_zeros(())
        for image, text in combinations:
            correlation = all_reduce(cross_correlation(image, text, len(image) * world_size()))
            total = total + barlow_twins(correlation, self.off_diagonal_weight)
        return self.weight * total / len(combinations)
