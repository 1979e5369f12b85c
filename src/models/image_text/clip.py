"""CLIP: contrastive learning of images and texts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from src.collectives import gather
from src.datamodules.batches.image_text import ImageTextBatch
from src.errors import SettingError
from src.models.backbones.image_encoder import Pool, cls_token_or_mean
from src.models.functional import l2_normalize
from src.models.image_text.base import ImageTextModule, hash_texts, modality_gap
from src.models.losses.image_text import clip_loss
from src.models.pretrain_module import StepOutput
from src.models.text.text_tower import TextTower
from src.optim import OptimizerRecipe


class CLIP(ImageTextModule):
    """Learning Transferable Visual Models From Natural Language Supervision (Radford et al., 2021). Deviations: equal
    texts in a batch are not negatives of each other (``mask_equal_texts``).

    Args:
        backbone: any timm model without a head.
        text: the text tower.
        optimizer: AdamW in the paper.
        embed_dim: width of the projected features; None compares the towers' features without a projection.
        temperature: initial value of the learned temperature, by which similarities are divided.
        max_logit_scale: upper limit of the inverse temperature, applied after every step, as is the lower limit 1; None
            for no limits, as in LiT.
        mask_equal_texts: equal texts are not negatives of each other. The paper's 400 M web pairs rarely have equal
            texts in a batch; data with a small vocabulary often has.
        pool: turns the backbone's tokens into the feature that is projected and evaluated.
        projection_bias: adds a bias to the projections, as in LiT.
        project_image, freeze_image, freeze_text, micro_batch: see `ImageTextModule`. A frozen, pretrained image tower
            without projection is LiT (Zhai et al., 2022).

    Raises:
        SettingError: the temperature is out of range; in a step, a single pair.
    """

    def __init__(
        self,
        backbone: nn.Module,
        text: TextTower,
        optimizer: OptimizerRecipe,
        *,
        embed_dim: int | None = 512,
        temperature: float = 0.07,
        max_logit_scale: float | None = 100.0,
        mask_equal_texts: bool = True,
        pool: Pool = cls_token_or_mean,
        projection_bias: bool = False,
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
            bias=projection_bias,
            project_image=project_image,
            freeze_image=freeze_image,
            freeze_text=freeze_text,
            micro_batch=micro_batch,
        )
        if temperature <= 0:
            raise SettingError(f"model.temperature must be above 0, got {temperature}")
        if max_logit_scale is not None and not 1 / max_logit_scale <= temperature <= 1:
            raise SettingError(
                f"model.temperature must lie in [1 / model.max_logit_scale, 1] = [{1 / max_logit_scale}, 1], got "
                f"{temperature}"
            )
        self.max_logit_scale = max_logit_scale
        self.mask_equal_texts = mask_equal_texts
        # shape [1]: FSDP cannot shard 0-d parameters
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
        if self.max_logit_scale is None:
            return
        with torch.no_grad():  # clamping in the forward pass would zero the gradient beyond the limit
            self.logit_scale.clamp_(0, math.log(self.max_logit_scale))
