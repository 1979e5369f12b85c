"""Linear probing: a linear classifier on a frozen backbone, trained with augmentation."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.datamodules.batches.image import ImageBatch
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder, Pool, cls_token
from src.models.downstream.classifier import Classifier
from src.models.functional import in_full_precision
from src.models.pretrain_module import StepOutput
from src.optim import OptimizerRecipe


class LinearProtocol(Classifier):
    """The linear probing of Masked Autoencoders Are Scalable Vision Learners (He et al., 2021). Deviations: none.

    The backbone stays in evaluation mode and without gradient. A batch norm without scale and shift normalizes its
    embedding for the linear layer.

    Args:
        backbone: a timm model, pretrained; frozen in place.
        optimizer: for the linear layer, LARS in the paper.
        pool: computes the embedding from the tokens.
        head_std: standard deviation of the classifier's initialization, a normal distribution.
        num_classes: number of classes; None for the number of classes in the data.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerRecipe,
        *,
        pool: Pool = cls_token,
        head_std: float = 0.01,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(optimizer, num_classes)
        self.backbone = backbone.requires_grad_(False).eval()
        self.pool = pool
        self.head_std = head_std
        self.norm = nn.BatchNorm1d(self.encoder.dim, affine=False, eps=1e-6)

    def make_head(self, num_classes: int) -> None:
        self.head = nn.Linear(self.norm.num_features, num_classes)
        nn.init.normal_(self.head.weight, std=self.head_std)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> LinearProtocol:
        super().train(mode)
        self.backbone.eval()
        return self

    def training_step(self, batch: ImageBatch, batch_idx: int) -> StepOutput:
        return self.learn(batch["image"], self.labels_of(batch))

    def learn(self, image: Tensor, label: Tensor) -> StepOutput:
        """The step on images [B, 3, H, W] or clips [B, T, 3, H, W] with class labels [B]."""
        embedding = self.embed(image)
        return {"loss": F.cross_entropy(self.classify(embedding), label), "embedding": embedding}

    def classify(self, embedding: Tensor) -> Tensor:
        """The scores of the classes, float32: [B, D] -> [B, C]."""
        return in_full_precision(self.head, in_full_precision(self.norm, embedding))

    def embed(self, image: Tensor) -> Tensor:
        """The embedding of the frozen backbone, float32 [B, D]."""
        with torch.no_grad():
            return self.encoder(image).embedding.float()

    def forward(self, image: Tensor) -> Tensor:
        return self.classify(self.embed(image))

    @cached_property
    def encoder(self) -> Encoder:
        """Built once: it checks its backbone, which takes as long as a small training step."""
        return ImageEncoder(self.backbone, pool=self.pool)

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": self.encoder}
