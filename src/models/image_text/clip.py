"""CLIP: recognize which text of the batch belongs to an image, and which image to a text."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from src.collectives import gather
from src.datamodules.batch import ImageTextBatch
from src.models.backbones.image_encoder import Pool, cls_token_or_mean
from src.models.functional import l2_normalize
from src.models.image_text.base import ImageTextModule
from src.models.losses.image_text import clip_loss
from src.models.pretrain_module import StepOutput
from src.models.text.text_tower import Tower
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
        text: Tower,
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
        loss, logs = self.contrast(image, text, batch["text"])
        return {"loss": loss, "logs": logs, "embedding": features.detach().float()}

    def contrast(self, image: Tensor, text: Tensor, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and what is logged of it: unit vectors [B, E] of images and texts, the texts' token ids [B, L]."""
        scale = self.logit_scale.exp().squeeze()
        loss = contrast_all(image, text, ids if self.mask_equal_texts else None, scale=scale)
        return loss, {"scale": scale.detach(), "gap": (image.mean(dim=0) - text.mean(dim=0)).norm().detach()}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        with torch.no_grad():  # not in the forward pass: beyond the limit there would be no gradient to come back by
            self.logit_scale.clamp_(0, math.log(self.max_scale))


def contrast_all(
    image: Tensor, text: Tensor, ids: Tensor | None, *, scale: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """`clip_loss` of the own pairs among those of all processes.

    Args:
        image, text: unit vectors [B, E].
        ids: the texts' token ids [B, L]; equal ones are no negatives of each other. None where they are.
        scale, label_smoothing: see `clip_loss`.
    """
    images, offset = gather(image)
    texts, _ = gather(text)
    same = None if ids is None else gather(equal_texts(ids))[0]
    return clip_loss(image, text, images, texts, offset, scale=scale, same=same, label_smoothing=label_smoothing)


def equal_texts(text: Tensor) -> Tensor:
    """One number for all rows of token ids that are equal: int64 [N, L] -> [N]. A hash, so that nothing is sorted and
    nobody waits for the device: two texts that differ share one with a probability of about 2^-64."""
    # the numbers of splitmix64 (Steele et al., 2014), one a place; whole numbers of 64 bits overflow as they should
    weight = torch.arange(1, text.shape[1] + 1, device=text.device) * -7046029254386353131
    weight = (weight ^ (weight >> 30)) * -4658895280553007687
    weight = (weight ^ (weight >> 27)) * -7723592293110705685
    return (text * (weight ^ (weight >> 31))).sum(dim=1)
