"""SiamLIP and BYOLIP: images predict the projections of their texts and texts those of their images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from src.datamodules.batches.image_text import ImageTextViewsBatch
from src.models.backbones.weights import Weights
from src.models.functional import in_full_precision
from src.models.heads.mlp import MlpHead
from src.models.image_text.clip_rocket import (
    AddedObjective,
    CLIPRocket,
    PairViews,
    dropout_before_blocks,
    encode_views,
)
from src.models.joint_embedding.base import forward_views_separately
from src.models.joint_embedding.byol import regression
from src.models.teacher import TeacherPair, teacher_of
from src.models.text.text_tower import TextTower
from src.optim import OptimizerRecipe

PLAIN_NORM = partial(nn.BatchNorm1d, affine=False)


class NormalizedMlp(nn.Module):
    """A projector and a batch norm on its output, which computes in float32 at least.

    Args:
        projector: [B, D] -> [B, E].
        norm: of width E.
    """

    def __init__(self, projector: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.projector = projector
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return in_full_precision(self.norm, self.projector(x))


class PairProjectors(nn.Module):
    """Projectors of images and texts, for all views or with others for the strong views.

    Args:
        image, text: build a projector from nothing.
        separate: builds projectors of their own for the strong views.
    """

    def __init__(self, image: Callable[[], nn.Module], text: Callable[[], nn.Module], *, separate: bool) -> None:
        super().__init__()
        self.image, self.text = image(), text()
        self.local_image = image() if separate else None
        self.local_text = text() if separate else None

    def forward(self, views: PairViews) -> PairViews:
        return PairViews(
            self.image(views.image),
            self.text(views.text),
            forward_views_separately(self.local_image or self.image, views.images),
            forward_views_separately(self.local_text or self.text, views.texts),
        )


class SiamLIP(AddedObjective):
    """SiamLIP, SimSiam between images and texts (Fini et al., 2023). Deviations: none.

    Args:
        image_dim, text_dim: widths of the towers' features.
        hidden_dim: width of the hidden layers of projectors and predictors.
        projection_dim: width of projections and predictions.
        separate_views: projectors and predictors of their own for the strong views, as the authors' ViTs have.
    """

    def __init__(
        self,
        image_dim: int,
        text_dim: int,
        *,
        hidden_dim: int = 2048,
        projection_dim: int = 128,
        separate_views: bool = False,
    ) -> None:
        super().__init__()

        def projector(width: int) -> nn.Module:
            mlp = MlpHead((width, hidden_dim, projection_dim), last_bias=False)
            return NormalizedMlp(mlp, PLAIN_NORM(projection_dim))

        def predictor() -> nn.Module:
            return MlpHead((projection_dim, hidden_dim, projection_dim))

        self.projectors = PairProjectors(
            partial(projector, image_dim), partial(projector, text_dim), separate=separate_views
        )
        self.predictors = PairProjectors(predictor, predictor, separate=separate_views)

    def forward(
        self, features: PairViews, embeddings: PairViews, local_scale: Tensor, targets: PairViews | None = None
    ) -> Tensor:
        """``targets`` are projections to predict; None for the own ones behind a stop-gradient."""
        projections = self.projectors(features)
        return cross_modal_regression(self.predictors(projections), targets or projections)


class BYOLIP(CLIPRocket):
    """BYOLIP (Fini et al., 2023): `SiamLIP` whose targets are the projections of a momentum encoder of both towers.

    The teacher moves after every update; its batch norms use the statistics of its own batches. Deviations and errors
    as of `CLIPRocket`.

    Args:
        backbone, text, optimizer, others: arguments of `CLIPRocket`.
        objective: builds the objective from the widths of the image's and the text's features.
        teacher_momentum: momentum of the moving average, constant in the authors' code.
    """

    def __init__(
        self,
        backbone: nn.Module,
        text: TextTower,
        optimizer: OptimizerRecipe,
        *,
        objective: Callable[[int, int], SiamLIP] = SiamLIP,
        teacher_momentum: float = 0.99,
        **others: Any,
    ) -> None:
        super().__init__(backbone, text, optimizer, objective=objective, **others)
        self.teacher_momentum = teacher_momentum
        self.teacher = teacher_of(self._student())

    def _student(self) -> nn.ModuleDict:
        """Returns what the teacher follows: both towers and the objective's projectors."""
        assert isinstance(self.objective, SiamLIP)
        return nn.ModuleDict(
            {
                "image_encoder": self.image_encoder,
                "text_encoder": self.text_encoder,
                "projectors": self.objective.projectors,
            }
        )

    def teacher_pairs(self) -> list[TeacherPair]:
        return [TeacherPair(self._student(), self.teacher)]

    def load_start(self, weights: Weights) -> str:
        line = super().load_start(weights)
        self.teacher.load_state_dict(self._student().state_dict())
        return line

    def added_loss(
        self, batch: ImageTextViewsBatch, features: PairViews, embeddings: PairViews, local_scale: Tensor
    ) -> Tensor:
        assert isinstance(self.objective, SiamLIP)
        return self.objective(features, embeddings, local_scale, targets=self.teacher_projections(batch))

    @torch.no_grad()
    def teacher_projections(self, batch: ImageTextViewsBatch) -> PairViews:
        """Returns the teacher's projections of the same views."""
        image_tower, text_tower = self.teacher["image_encoder"], self.teacher["text_encoder"]
        features = encode_views(
            batch,
            lambda image: image_tower(image).embedding,
            lambda text, mask: text_tower(text, mask).embedding,
            dropout_before_blocks(text_tower, self.text_dropout, self.training),  # type: ignore[arg-type]
        )
        return self.teacher["projectors"](features)


def cross_modal_regression(predictions: PairViews, targets: PairViews) -> Tensor:
    """Mean of 2 - 2 cos(prediction, target), BYOL's loss, over the pairs and over all combinations of an image that
    predicts a text and of a text that predicts an image: of the weak pair, and of each strong image with each strong
    text. Targets have no gradient."""
    to_text = _combinations(predictions.image, predictions.images, targets.text, targets.texts)
    to_image = _combinations(predictions.text, predictions.texts, targets.image, targets.images)
    prediction, target = (torch.stack(vectors, dim=1) for vectors in zip(*to_text, *to_image, strict=True))
    return regression(prediction, target.detach()) / prediction.shape[1]


def _combinations(
    weak: Tensor, strong: Tensor, weak_target: Tensor, strong_targets: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Pairs of a prediction and a target, [B, D] each: the weak ones, and all N x N strong ones [B, N, D]."""
    pairs = [(one, target) for one in strong.unbind(dim=1) for target in strong_targets.unbind(dim=1)]
    return [(weak, weak_target), *pairs]
