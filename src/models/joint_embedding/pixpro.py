"""PixPro: positions of two crops that lie close together in the image predict each other, after one side is smoothed by
similar positions of its own crop."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from src.datamodules.batches.image import MultiViewBatch
from src.errors import SettingError
from src.models.backbones.encoder import Encoder, Features
from src.models.backbones.image_encoder import ImageEncoder, Pool, mean_patch
from src.models.functional import feature_std, full_precision, l2_normalize
from src.models.heads.mlp import MlpHead
from src.models.joint_embedding.base import JointEmbedding, two_views
from src.models.pretrain_module import StepOutput
from src.models.teacher import TeacherPair, teacher_of
from src.optim import OptimizerRecipe


class PixPro(JointEmbedding):
    """Propagate Yourself: Exploring Pixel-Level Consistency for Unsupervised Visual Representation Learning (Xie et
    al., 2021).

    Deviations: distances are measured in pixels of the source image, and crops reach to the edges of their pixels; the
    authors measure in shares of the image's width and height, from pixel center to pixel center.

    The teacher (momentum encoder) has moved before the step and encodes both views. The student's projection of each
    position is replaced by a sum over all positions of its view, weighted by similarity (the pixel propagation module),
    and pulled to the teacher's projections of the other view at the positions less than ``max_distance`` away. The
    optional instance branch is BYOL on the same maps.

    Args:
        backbone: any timm model without a head.
        optimizer: LARS in the paper.
        hidden_dim: width of the hidden layers of projectors and predictor.
        projection_dim: width of projections and predictions.
        max_distance: positions match below this distance of their centers, in diagonals of the larger view's cells.
        sharpness: exponent of the similarities in the propagation.
        value_layers: 0, 1 or 2 layers transform the features that are propagated.
        pixel_weight: weight of the loss of positions; 0 leaves it out, which is BYOL with ``instance_weight`` 1.
        instance_weight: weight of the instance branch; 0 leaves it out.
        teacher_momentum: momentum of the moving average; the paper raises it to 1 along a cosine.
        pool: makes the embedding, which is evaluated, of the backbone's tokens.

    Raises:
        SettingError: a bad value; in a step, a batch without two views of at least two images, or without the crops of
            the views.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerRecipe,
        *,
        hidden_dim: int = 4096,
        projection_dim: int = 256,
        max_distance: float = 0.7,
        sharpness: float = 2.0,
        value_layers: int = 1,
        pixel_weight: float = 1.0,
        instance_weight: float = 0.0,
        teacher_momentum: float = 0.99,
        pool: Pool = mean_patch,
    ) -> None:
        super().__init__(optimizer)
        if min(max_distance, sharpness) <= 0:
            raise SettingError(f"model.max_distance={max_distance} and model.sharpness={sharpness} must be above 0")
        if value_layers not in (0, 1, 2):
            raise SettingError(f"model.value_layers={value_layers} must be 0, 1 or 2")
        if min(pixel_weight, instance_weight) < 0 or not pixel_weight + instance_weight:
            raise SettingError(
                f"model.pixel_weight={pixel_weight} and model.instance_weight={instance_weight}: neither below 0, and "
                "one of them above"
            )
        encoder = ImageEncoder(backbone, pool)
        self.student = nn.ModuleDict({"encoder": encoder})
        if pixel_weight:
            self.student["projector"] = MlpHead((encoder.dim, hidden_dim, projection_dim), hidden_bias=True)
            self.value = value_transform(projection_dim, value_layers)
        if instance_weight:
            self.student["instance_projector"] = MlpHead((encoder.dim, hidden_dim, projection_dim), hidden_bias=True)
            self.predictor = MlpHead((projection_dim, hidden_dim, projection_dim), hidden_bias=True)
        self.teacher = teacher_of(self.student)
        self.max_distance = max_distance
        self.sharpness = sharpness
        self.pixel_weight = pixel_weight
        self.instance_weight = instance_weight
        self.teacher_momentum = teacher_momentum

    def training_step(self, batch: MultiViewBatch, batch_idx: int) -> StepOutput:
        views, corners = two_views(batch), crop_corners(batch)
        student = [self.student["encoder"](view) for view in views.unbind(dim=1)]
        with torch.no_grad():
            teacher = [self.teacher["encoder"](view) for view in views.unbind(dim=1)]
        loss = views.new_zeros((), dtype=student[0].embedding.dtype)
        logs: dict[str, Tensor | float] = {}
        if self.pixel_weight:
            match = matching_positions(corners, student[0].grid, self.max_distance)
            pixel_loss, projections = self.pixel_loss(student, teacher, match)
            loss = loss + self.pixel_weight * pixel_loss
            logs |= {
                "pixel": pixel_loss.detach(),
                "matches": match.sum(dim=(1, 2)).float().mean(),
                "overlap": match.flatten(1).any(dim=1).float().mean(),
                "std": feature_std(l2_normalize(projections.detach())),
            }
        if self.instance_weight:
            instance_loss = self.instance_loss(student, teacher)
            loss = loss + self.instance_weight * instance_loss
            logs["instance"] = instance_loss.detach()
        return {"loss": loss, "logs": logs, "embedding": student[0].embedding.detach().float()}

    def pixel_loss(self, student: list[Features], teacher: list[Features], match: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the loss of positions, and the student's projections of the first view [B, N, D].

        Args:
            student, teacher: features of both views.
            match: bool [B, N, N], True where a position of the first view matches one of the second.
        """
        projections = [per_position(self.student["projector"], view.patches) for view in student]
        predictions = [propagate(x, per_position(self.value, x), self.sharpness) for x in projections]
        with torch.no_grad():
            targets = [per_position(self.teacher["projector"], view.patches) for view in teacher]
        first = consistency(predictions[0], targets[1], match)
        second = consistency(predictions[1], targets[0], match.mT)
        return first + second, projections[0]

    def instance_loss(self, student: list[Features], teacher: list[Features]) -> Tensor:
        """BYOL's loss of the mean prediction and the mean projection of each view, without its constant."""
        projections = [per_position(self.student["instance_projector"], view.patches) for view in student]
        predictions = [l2_normalize(per_position(self.predictor, x).mean(dim=1)) for x in projections]
        with torch.no_grad():
            targets = [
                l2_normalize(per_position(self.teacher["instance_projector"], view.patches).mean(dim=1))
                for view in teacher
            ]
        pairs = zip(predictions, reversed(targets), strict=True)
        return torch.stack([-2 * (prediction * target).sum(dim=1).mean() for prediction, target in pairs]).sum()

    def teacher_pairs(self) -> list[TeacherPair]:
        return [TeacherPair(self.student, self.teacher)]

    def encoders(self) -> dict[str, Encoder]:
        return {"student": self.student["encoder"], "teacher": self.teacher["encoder"]}  # type: ignore[dict-item]

    def visualize(self, batch: MultiViewBatch) -> Mapping[str, Tensor]:
        """The views, and the views with the cells darkened that match nothing in the other view."""
        views = two_views(batch)
        grid = self.student["encoder"](views[:2, 0]).grid
        match = matching_positions(crop_corners(batch), grid, self.max_distance)
        matched = torch.stack([match.any(dim=2), match.any(dim=1)], dim=1).unflatten(2, grid)
        bright = nn.functional.interpolate(matched.to(views.dtype), size=views.shape[-2:], mode="nearest")
        darkened = views * (0.25 + 0.75 * bright[:, :, None])
        return {"matched": torch.cat([views, darkened], dim=1)}


def value_transform(dim: int, layers: int) -> nn.Module:
    """The transform of the features that are propagated, of 0, 1 or 2 layers."""
    if layers == 2:
        return MlpHead((dim, dim, dim), hidden_bias=True)
    return nn.Linear(dim, dim) if layers else nn.Identity()


def per_position(network: nn.Module, x: Tensor) -> Tensor:
    """Applies a network to each position, [B, N, C] -> [B, N, D]; batch norms count positions as samples."""
    return network(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def crop_corners(batch: MultiViewBatch) -> Tensor:
    """The source positions of each view's left, upper, right and lower edge, in pixels: [B, 2, 4]. A mirrored view has
    its right edge at the smaller x.

    Raises:
        SettingError: the batch does not say where the views were cropped.
    """
    if "boxes" not in batch or "flipped" not in batch:
        raise SettingError("data.train_view.record_crops: this method compares positions, set it to true")
    left, top, right, bottom = batch["boxes"].unbind(dim=-1)
    flipped = batch["flipped"]
    ends = torch.where(flipped, right, left), top, torch.where(flipped, left, right), bottom
    return torch.stack(ends, dim=-1)


@torch.no_grad()
@full_precision
def matching_positions(corners: Tensor, grid: tuple[int, ...], max_distance: float) -> Tensor:
    """Returns True where a position of the first view lies near one of the second: [B, 2, 4] -> bool [B, N, N].

    Args:
        corners: edges of the views in the source image (`crop_corners`).
        grid: rows and columns of positions, N in all.
        max_distance: of two positions' centers, in diagonals of a cell of the view whose cells are larger.
    """
    rows, columns = grid
    start, end = corners[..., :2], corners[..., 2:]
    cell = (end - start) / corners.new_tensor([columns, rows])  # [B, 2, 2], of negative width in a mirrored view
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    steps = torch.stack([x, y], dim=-1).flatten(0, 1).to(corners) + 0.5  # [N, 2]
    centers = start[:, :, None] + steps * cell[:, :, None]  # [B, 2, N, 2]
    diagonal = cell.norm(dim=-1).amax(dim=1)
    distance = (centers[:, 0, :, None] - centers[:, 1, None]).norm(dim=-1)
    return distance / diagonal[:, None, None] < max_distance


@full_precision
def propagate(x: Tensor, value: Tensor, sharpness: float) -> Tensor:
    """The pixel propagation module: y_i = sum over j of max(cos(x_i, x_j), 0)^sharpness * value_j / |value_j|,
    normalized.

    Args:
        x: [B, N, D], projections of the positions of a view.
        value: [B, N, D], their transforms.
        sharpness: exponent; below 1 the authors add 1e-6 to the similarities, whose gradient is infinite at 0.
    """
    unit = l2_normalize(x)
    similarity = (unit @ unit.mT).clamp(min=0)
    weight = (similarity + 1e-6 if sharpness < 1 else similarity) ** sharpness
    return l2_normalize(weight @ l2_normalize(value))


@full_precision
def consistency(prediction: Tensor, target: Tensor, match: Tensor) -> Tensor:
    """-2 times the mean cosine of matching positions, mean over images; images without a match count as 0.

    Args:
        prediction: [B, N, D], of unit length.
        target: [B, M, D], without gradient.
        match: bool [B, N, M].
    """
    cosine = prediction @ l2_normalize(target).mT
    count = match.sum(dim=(1, 2))
    return -2 * ((cosine * match).sum(dim=(1, 2)) / (count + 1e-6)).mean()
