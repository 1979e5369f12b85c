"""CLIP: recognize which text of the batch belongs to an image, and which image to a text."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from src.collectives import gather
from src.datamodules.batches.image_text import ImageTextBatch
from src.models.backbones.image_encoder import Pool, cls_token_or_mean
from src.models.functional import l2_normalize
from src.models.image_text.base import ImageTextModule, hash_texts, modality_gap
from src.models.losses.image_text import clip_loss
from src.models.pretrain_module import StepOutput
from src.models.text.text_tower import TextTower
from src.optim import OptimizerRecipe


class CLIP(ImageTextModule):
    """Learning Transferable Visual Models From Natural Language Supervision (Radford et al., 2021). Deviations: equal
    texts of a batch are no negatives of each other (``mask_equal_texts``).

    Args:
        backbone: any timm model without a head.
        text: the text tower.
        optimizer: AdamW in the paper.
        embed_dim: width of what is compared; None compares the towers' features as they are.
        temperature: similarities are divided by it; learned from this start.
        max_scale: the temperature's inverse is held at or below it, after every step.
        mask_equal_texts: in 400 M pairs of the web equal texts hardly meet, in a small vocabulary they do.
        pool: what of the backbone's tokens is projected and evaluated.
        project_image, freeze_image, freeze_text, micro_batch: see `ImageTextModule`. A frozen pretrained image tower
            whose features are not projected is LiT (Zhai et al., 2022).

    Raises:
        SettingError: in a step, of one pair.
    """

    def __init__(
        self,
        backbone: nn.Module,
        text: TextTower,
        optimizer: OptimizerRecipe,
        *,
        embed_dim: int | None = 512,
        temperature: float = 0.07,
        max_scale: float = 100.0,
        mask_equal_texts: bool = True,
        pool: Pool = cls_token_or_mean,
        project_image: bool = True,
        freeze_image: bool = False,
        freeze_text: bool = False,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__(
            backbone,
            pool,
            text,
            optimizer,
            embed_dim=embed_dim,
            project_image=project_image,
            freeze_image=freeze_image,
            freeze_text=freeze_text,
            micro_batch=micro_batch,
        )
        if not 1 / max_scale <= temperature <= 1:
            raise ValueError(f"CLIP: temperature must lie in [1 / max_scale, 1], got {temperature}")
        self.max_scale = max_scale
        self.mask_equal_texts = mask_equal_texts
        # one axis of one number: what has no axis cannot be dealt out over processes
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / temperature)))

    def training_step(self, batch: ImageTextBatch, batch_idx: int) -> StepOutput:
        features = self.image_features(batch["image"])
        image = l2_normalize(self.image_projection(features))
        text = self.encode_text(batch["text"], batch["text_mask"])

        images, offset = gather(image)
        texts, _ = gather(text)
        text_hash = gather(hash_texts(batch["text"]))[0] if self.mask_equal_texts else None

        logit_scale = self.logit_scale.exp().squeeze()
        loss = clip_loss(image, text, images, texts, offset, logit_scale=logit_scale, text_hash=text_hash)
        logs = {"logit_scale": logit_scale.detach(), "modality_gap": modality_gap(image, text)}
        return {"loss": loss, "logs": logs, "embedding": features.detach().float()}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        with torch.no_grad():  # clamping in the forward pass would zero the gradient beyond the limit
            self.logit_scale.clamp_(0, math.log(self.max_scale))
