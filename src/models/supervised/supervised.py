"""Supervised pretraining: the reference for methods without labels."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from src.datamodules.batches.image import ImageBatch
from src.errors import SettingError
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder, Pool, mean_patch
from src.models.downstream.classifier import Classifier, truncated_normal
from src.models.pretrain_module import StepOutput
from src.optim import OptimizerRecipe


class Supervised(Classifier):
    """Classification from scratch, as in Deep Residual Learning (He et al., 2015) or DeiT (Touvron et al., 2020) by
    recipe. Deviations: none.

    Args:
        backbone: any timm model without a head.
        optimizer: SGD for ResNets, AdamW for ViTs in the papers.
        smoothing: label smoothing, the share of a target that is spread evenly over all classes.
        head_std: standard deviation of the classifier's initial weights, drawn from a truncated normal distribution.
        pool: makes the embedding, which is classified and evaluated, of the backbone's tokens.
        num_classes: number of classes; None for that of the data.

    Raises:
        SettingError: smoothing outside of [0, 1).
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerRecipe,
        *,
        smoothing: float = 0.0,
        head_std: float = 0.02,
        pool: Pool = mean_patch,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(optimizer, num_classes)
        if not 0 <= smoothing < 1:
            raise SettingError(f"model.smoothing={smoothing} must lie in [0, 1)")
        self.encoder = ImageEncoder(backbone, pool)
        self.smoothing = smoothing
        self.head_std = head_std

    def make_head(self, num_classes: int) -> None:
        self.head = nn.Linear(self.encoder.dim, num_classes)
        truncated_normal(self.head, self.head_std)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> StepOutput:
        embedding = self.encoder(batch["image"]).embedding
        logits = self.head(embedding).float()
        loss = F.cross_entropy(logits, self.labels_of(batch), label_smoothing=self.smoothing)
        return {"loss": loss, "embedding": embedding.detach().float()}

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.encoder(image).embedding)

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": self.encoder}
