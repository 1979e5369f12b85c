"""DreamLIP: several sentences of a long caption are positives of an image, and each is matched with its patches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from src.collectives import gather
from src.datamodules.batches.image_text import ImageTextViewsBatch
from src.errors import SettingError
from src.models.backbones.image_encoder import Pool, cls_token_or_mean
from src.models.functional import l2_normalize
from src.models.image_text.base import hash_texts, modality_gap
from src.models.image_text.clip import CLIP
from src.models.image_text.clip_rocket import text_views_of
from src.models.losses.grouping import group_patches, within_image_loss
from src.models.losses.image_text import clip_loss
from src.models.pretrain_module import StepOutput
from src.models.text.text_tower import TextTower
from src.optim import OptimizerRecipe


class DreamLIP(CLIP):
    """DreamLIP: Language-Image Pre-training with Long Captions (Zheng et al., 2024).

    The texts of an image are its caption and K sentences of its long captions. CLIP's loss is averaged over the texts.
    Each text also selects patches of its image, whose weighted mean is compared with the texts of the same image.

    Deviations: equal texts are not negatives of each other. The authors' code compares the groups of patches with the
    texts of all images (``within_image: false``), the paper with those of the same image; the code takes the texts in
    another order there than the images. Its projection of patches and its local temperature are missing from the
    published code; here they are like those of CLIP.

    Args:
        backbone, text, optimizer, embed_dim, temperature, max_logit_scale, mask_equal_texts, pool: see `CLIP`.
        threshold: scaled similarities below it leave a patch out of a group; None for 1 / number of patches, as in
            SPARC.
        within_image: compares groups with the texts of the same image, as in the paper; False with all texts of the
            batch, as in the code.
        contrast_weight, grouping_weight: of the two losses. Without grouping, patches are projected as the image is.
        local_temperature: initial value of the learned temperature of the groups.

    Raises:
        SettingError: a bad value; in a step, a batch without further texts, or a single pair.
    """

    def __init__(
        self,
        backbone: nn.Module,
        text: TextTower,
        optimizer: OptimizerRecipe,
        *,
        embed_dim: int = 512,
        temperature: float = 0.07,
        max_logit_scale: float = 100.0,
        mask_equal_texts: bool = True,
        pool: Pool = cls_token_or_mean,
        threshold: float | None = 0.0,
        within_image: bool = True,
        contrast_weight: float = 1.0,
        grouping_weight: float = 1.0,
        local_temperature: float = 0.07,
    ) -> None:
        super().__init__(
            backbone,
            text,
            optimizer,
            embed_dim=embed_dim,
            temperature=temperature,
            max_logit_scale=max_logit_scale,
            mask_equal_texts=mask_equal_texts,
            pool=pool,
        )
        if threshold is not None and not 0 <= threshold <= 1:
            raise SettingError(f"model.threshold must lie in [0, 1], or be null for 1 / patches; got {threshold}")
        if contrast_weight <= 0 or grouping_weight < 0:
            raise SettingError(
                f"model.contrast_weight={contrast_weight} must be above 0, model.grouping_weight={grouping_weight} at "
                "least 0"
            )
        if not 1 / max_logit_scale <= local_temperature <= 1:
            raise SettingError(
                f"model.local_temperature must lie in [1 / model.max_logit_scale, 1], got {local_temperature}"
            )
        self.threshold = threshold
        self.within_image = within_image
        self.contrast_weight, self.grouping_weight = contrast_weight, grouping_weight
        if grouping_weight:  # DDP reports parameters without a gradient as an error
            self.patch_projection = nn.Linear(self.image_encoder.dim, embed_dim, bias=False)
            nn.init.normal_(self.patch_projection.weight, std=self.image_encoder.dim**-0.5)
            self.local_logit_scale = nn.Parameter(torch.full((1,), math.log(1 / local_temperature)))

    # it takes more fields than CLIP does
    def training_step(self, batch: ImageTextViewsBatch, batch_idx: int) -> StepOutput:  # type: ignore[override]
        sentences, mask = text_views_of(batch)
        ids = torch.cat([batch["text"][:, None], sentences], dim=1)
        mask = torch.cat([batch["text_mask"][:, None], mask], dim=1)
        features = self.image_encoder(batch["image"])
        image = l2_normalize(self.image_projection(features.embedding))
        texts = self.encode_text(ids.flatten(0, 1), mask.flatten(0, 1)).unflatten(0, ids.shape[:2])
        text_hash = hash_texts(ids.flatten(0, 1)).unflatten(0, ids.shape[:2])

        contrast = self.multi_positive_loss(image, texts, text_hash)
        loss = self.contrast_weight * contrast
        logs = {
            "contrast": contrast.detach(),
            "logit_scale": self.logit_scale.exp().squeeze().detach(),
            "modality_gap": modality_gap(image, texts[:, 0]),
        }
        if self.grouping_weight:
            patches = l2_normalize(self.patch_projection(features.patches))
            grouping = self.grouping_loss(texts, patches, text_hash)
            loss = loss + self.grouping_weight * grouping
            logs["grouping"] = grouping.detach()
        return {"loss": loss, "logs": logs, "embedding": features.embedding.detach().float()}

    def multi_positive_loss(self, image: Tensor, texts: Tensor, text_hash: Tensor) -> Tensor:
        """Mean of CLIP's loss over the K texts of each image: [B, E], [B, K, E], [B, K] -> scalar. The texts of an
        image are never negatives of each other, because the k-th texts are compared among themselves."""
        (images, offset), (all_texts, _) = gather(image), gather(texts)
        hashes, _ = gather(text_hash)
        logit_scale = self.logit_scale.exp().squeeze()
        total = image.new_zeros(())
        for k in range(texts.shape[1]):
            total = total + clip_loss(
                image,
                texts[:, k],
                images,
                all_texts[:, k],
                offset,
                logit_scale=logit_scale,
                text_hash=hashes[:, k] if self.mask_equal_texts else None,
            )
        return total / texts.shape[1]

    def grouping_loss(self, texts: Tensor, patches: Tensor, text_hash: Tensor) -> Tensor:
        """Compares the patches that each text selects with the texts: [B, K, E], [B, N, E], [B, K] -> scalar."""
        threshold = 1 / patches.shape[1] if self.threshold is None else self.threshold
        groups = group_patches(texts, patches, threshold)
        logit_scale = self.local_logit_scale.exp().squeeze()
        if self.within_image:
            return within_image_loss(groups, texts, text_hash, logit_scale=logit_scale)
        (all_groups, offset), (all_texts, _) = gather(groups), gather(texts)
        hashes, _ = gather(text_hash)
        return clip_loss(
            groups.flatten(0, 1),
            texts.flatten(0, 1),
            all_groups.flatten(0, 1),
            all_texts.flatten(0, 1),
            offset * texts.shape[1],
            logit_scale=logit_scale,
            text_hash=hashes.flatten() if self.mask_equal_texts else None,
        )

    def encode_patches(self, image: Tensor) -> Tensor:
        if not self.grouping_weight:
            return super().encode_patches(image)
        features = self.image_encoder(image)
        return l2_normalize(self.patch_projection(features.patches)).unflatten(1, features.grid)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        assert self.max_logit_scale is not None
        if not self.grouping_weight:
            return
        with torch.no_grad():
            self.local_logit_scale.clamp_(0, math.log(self.max_logit_scale))
