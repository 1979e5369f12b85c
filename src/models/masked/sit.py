"""SiT: reconstruct corrupted groups of pixels, and contrast class tokens of corrupted views with a teacher's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from src.collectives import gather
from src.datamodules.batches.image import MultiViewBatch
from src.errors import SettingError
from src.models.backbones.encoder import Encoder, Features
from src.models.backbones.image_encoder import ImageEncoder, cls_token
from src.models.backbones.layout import channels_of
from src.models.backbones.plain_vit import check_plain_vit
from src.models.functional import feature_std, l2_normalize
from src.models.heads.pixels import PixelHead
from src.models.joint_embedding.base import two_views
from src.models.layers.initialization import initialize_linear_layers, start_class_token
from src.models.losses.contrastive import moco_v3_loss
from src.models.losses.reconstruction import masked_l1
from src.models.masked.group_masking import Corruption
from src.models.pretrain_module import PretrainModule, StepOutput
from src.models.teacher import TeacherPair, disable_drop_path, teacher_of
from src.optim import OptimizerRecipe


class SiT(PretrainModule):
    """SiT: Self-supervised vIsion Transformer (Atito et al., 2021), as in the authors' code of December 2022: GMML's
    reconstruction and a contrast with a teacher (momentum encoder).

    Deviations: the rotation task, the NT-Xent loss within the student and the learned weights of the losses, which the
    paper's first version has, are not in that code and not here.

    The student sees both views corrupted, the teacher both views clean. The query of a view is contrasted with the
    teacher's keys of all images' other views.

    Args:
        backbone: a timm ViT with a class token and without a head, see `check_plain_vit`.
        optimizer: AdamW in the paper.
        fill, drop_share, alien_share, align, max_block: see `Corruption`.
        reconstruction_weight: weight of the reconstruction; the authors advise 5 for small data sets.
        temperature: similarities are divided by it.
        hidden_dim, projection_dim: widths of the projector.
        teacher_momentum: share of the teacher's old weights in each moving average, see `EMATeacher`.

    Raises:
        SettingError: an unknown fill, a temperature that is not positive, a backbone without a class token or one that
            does more than a plain ViT; in a step, a batch without two views of at least two images, and those of
            `group_masks`.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        optimizer: OptimizerRecipe,
        *,
        fill: str = "zeros",
        drop_share: float = 0.5,
        alien_share: float = 0.3,
        align: int = 1,
        max_block: float = 0.3,
        reconstruction_weight: float = 1.0,
        temperature: float = 0.2,
        hidden_dim: int = 4096,
        projection_dim: int = 256,
        teacher_momentum: float = 0.996,
    ) -> None:
        super().__init__(optimizer)
        check_plain_vit(backbone, "SiT")
        if backbone.cls_token is None:
            raise SettingError("backbone.class_token: SiT contrasts class tokens; set class_token=true")
        if temperature <= 0:
            raise SettingError(f"model.temperature={temperature} must be above 0")
        self.corruption = Corruption(fill, drop_share, alien_share, align, max_block)
        self.reconstruction_weight = reconstruction_weight
        self.temperature = temperature
        self.teacher_momentum = teacher_momentum
        start_class_token(backbone)
        encoder = ImageEncoder(backbone, cls_token)
        head = projector(encoder.dim, hidden_dim, projection_dim)
        self.student = nn.ModuleDict({"encoder": encoder, "projector": head})
        self.teacher = disable_drop_path(teacher_of(self.student))
        self.pixels = PixelHead(encoder.dim, backbone.patch_embed.patch_size, channels_of(backbone))

    def training_step(self, batch: MultiViewBatch, batch_idx: int) -> StepOutput:
        views = two_views(batch)
        shape = views.shape[:2]
        corrupted, masks = self.corruption(views)
        features: Features = self.student["encoder"](corrupted.flatten(0, 1))
        query = l2_normalize(self.student["projector"](features.embedding)).unflatten(0, shape)
        with torch.no_grad():
            clean: Features = self.teacher["encoder"](views.flatten(0, 1))
            key = l2_normalize(self.teacher["projector"](clean.embedding)).unflatten(0, shape)
        keys, offset = gather(key)
        contrast = moco_v3_loss(query[:, 0], keys[:, 1], offset, temperature=self.temperature)
        contrast = contrast + moco_v3_loss(query[:, 1], keys[:, 0], offset, temperature=self.temperature)
        prediction = self.pixels(features.patches, features.grid)
        reconstruction = masked_l1(prediction, views.flatten(0, 1), masks.flatten(0, 1), eps=0.0)
        return {
            "loss": contrast + self.reconstruction_weight * reconstruction,
            "logs": {
                "contrast": contrast.detach(),
                "reconstruction": reconstruction.detach(),
                "feature_std": feature_std(key),
            },
            "embedding": clean.embedding.unflatten(0, shape)[:, 0].float(),
        }

    def teacher_pairs(self) -> list[TeacherPair]:
        return [TeacherPair(self.student, self.teacher)]

    def encoders(self) -> dict[str, Encoder]:
        return {"student": self.student["encoder"], "teacher": self.teacher["encoder"]}  # type: ignore[dict-item]

    def visualize(self, batch: MultiViewBatch) -> Mapping[str, Tensor]:
        """The first view, corrupted and reconstructed."""
        views = batch["views"]
        first = self.corruption(views)[0][:, 0]
        features: Features = self.student["encoder"](first)
        prediction = self.pixels(features.patches, features.grid).to(views.dtype)
        return {"reconstruction": torch.stack([views[:, 0], first, prediction], dim=1)}


def projector(dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """The authors' projector on class tokens: three linear layers with batch norms, a ReLU after the first and a GELU
    after the second; the last norm has no scale and shift."""
    layers = nn.Sequential(
        nn.Linear(dim, hidden_dim),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(),
        nn.Linear(hidden_dim, hidden_dim),
        nn.BatchNorm1d(hidden_dim),
        nn.GELU(),
        nn.Linear(hidden_dim, out_dim),
        nn.BatchNorm1d(out_dim, affine=False),
    )
    initialize_linear_layers(layers)
    return layers
