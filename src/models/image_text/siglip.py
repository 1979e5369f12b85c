"""SigLIP: classifies every pair of an image and a text as matching or not, with a sigmoid."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from src.collectives import gather, shift, world_size
from src.datamodules.batches.image_text import ImageTextBatch
from src.errors import SettingError
from src.models.backbones.image_encoder import Pool, attention_pool
from src.models.functional import l2_normalize
from src.models.image_text.base import ImageTextModule, modality_gap
from src.models.losses.image_text import sigmoid_loss
from src.models.pretrain_module import StepOutput
from src.models.text.text_tower import TextTower
from src.optim import OptimizerRecipe


class SigLIP(ImageTextModule):
    """Sigmoid Loss for Language Image Pre-Training (Zhai et al., 2023). Deviations: none in the method.

    Args:
        backbone: a timm ViT without a head; it needs ``global_pool: map`` unless ``pool`` is given.
        text: the text tower; its features are as wide as the backbone's, unless ``embed_dim`` is given.
        optimizer: Adafactor in the paper.
        temperature, bias: initial values; a pair of similarity s matches with probability
            sigmoid(s / temperature + bias).
        ring: passes texts from process to process, so that each holds the texts of one other process at a time; False
            gathers all texts. The gradients are the same.
        embed_dim: width of projected features, as in CLIP; None, the paper's choice, for no projection.
        pool: turns the backbone's tokens into the feature that is compared and evaluated; None for its
            attention-pooling head.
        freeze_image, freeze_text, micro_batch: see `ImageTextModule`.

    Raises:
        SettingError: the temperature is not above 0, or the backbone has no attention-pooling head; and those of
            `ImageTextModule`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        text: TextTower,
        optimizer: OptimizerRecipe,
        *,
        temperature: float = 0.1,
        bias: float = -10.0,
        ring: bool = True,
        embed_dim: int | None = None,
        pool: Pool | None = None,
        freeze_image: bool = False,
        freeze_text: bool = False,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__(
            backbone,
            pool or attention_pool(backbone),
            text,
            optimizer,
            embed_dim=embed_dim,
            freeze_image=freeze_image,
            freeze_text=freeze_text,
            micro_batch=micro_batch,
        )
        if temperature <= 0:
            raise SettingError(f"model.temperature must be above 0, got {temperature}")
        self.ring = ring
        # shape [1]: FSDP cannot shard 0-d parameters
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / temperature)))
        self.logit_bias = nn.Parameter(torch.full((1,), float(bias)))

    def training_step(self, batch: ImageTextBatch, batch_idx: int) -> StepOutput:
        features = self.image_features(batch["image"])
        image = l2_normalize(self.image_projection(features))
        text = self.encode_text(batch["text"], batch["text_mask"])

        logit_scale, logit_bias = self.logit_scale.exp().squeeze(), self.logit_bias.squeeze()
        if self.ring:
            loss = ring_sigmoid_loss(image, text, logit_scale=logit_scale, logit_bias=logit_bias)
        else:
            texts, offset = gather(text)
            loss = sigmoid_loss(image, texts, offset, logit_scale=logit_scale, logit_bias=logit_bias)
        logs = {
            "logit_scale": logit_scale.detach(),
            "logit_bias": logit_bias.detach(),
            "modality_gap": modality_gap(image, text),
        }
        return {"loss": loss, "logs": logs, "embedding": features.detach().float()}


def ring_sigmoid_loss(image: Tensor, text: Tensor, *, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """`sigmoid_loss` without gathering: texts are passed from process to process, each of which holds the texts of one
    other process at a time."""
    loss = sigmoid_loss(image, text, 0, logit_scale=logit_scale, logit_bias=logit_bias)
    for _ in range(world_size() - 1):
        text = shift(text)
        loss = loss + sigmoid_loss(image, text, None, logit_scale=logit_scale, logit_bias=logit_bias)
    return loss
