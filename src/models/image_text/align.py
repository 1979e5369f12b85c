"""ALIGN: contrastive learning of a ConvNet and a BERT, both from scratch, on noisy image-text pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from src.collectives import gather
from src.datamodules.batches.image_text import ImageTextBatch
from src.errors import SettingError
from src.models.backbones.image_encoder import Pool, mean_patch
from src.models.functional import l2_normalize
from src.models.image_text.base import ImageTextModule, hash_texts, modality_gap
from src.models.losses.image_text import clip_loss
from src.models.pretrain_module import StepOutput
from src.models.text.text_tower import TextTower
from src.optim import OptimizerRecipe


class ALIGN(ImageTextModule):
    """Scaling Up Visual and Vision-Language Representation Learning With Noisy Text Supervision (Jia et al., 2021).
    The authors published no code. Deviations: equal texts in a batch are not negatives of each other
    (``mask_equal_texts``).

    The image's pooled feature is compared without a projection; the text's feature is projected to its width.

    Args:
        backbone: a ConvNet of timm without a head.
        text: the text tower, a BERT in the paper.
        optimizer: LAMB in the paper.
        temperature: initial value; similarities are divided by it. The temperature itself is learned, not its
            logarithm.
        min_temperature: lower limit, applied after every step; a negative temperature would invert all similarities.
        label_smoothing: share of the target that is spread evenly over a pair and its negatives.
        mask_equal_texts: see `CLIP`.
        pool: turns the backbone's map into the feature that is compared and evaluated.

    Raises:
        SettingError: an argument is out of range; in a step, a single pair.
    """

    def __init__(
        self,
        backbone: nn.Module,
        text: TextTower,
        optimizer: OptimizerRecipe,
        *,
        temperature: float = 1.0,
        min_temperature: float = 1e-3,
        label_smoothing: float = 0.1,
        mask_equal_texts: bool = True,
        pool: Pool = mean_patch,
    ) -> None:
        super().__init__(backbone, pool, text, optimizer, embed_dim=None, bias=True, project_image=False)
        if not 0 < min_temperature <= temperature:
            raise SettingError(
                f"model.min_temperature={min_temperature}, model.temperature={temperature}: "
                "0 < min_temperature <= temperature must hold"
            )
        if not 0 <= label_smoothing < 1:
            raise SettingError(f"model.label_smoothing must be at least 0 and below 1, got {label_smoothing}")
        self.min_temperature = min_temperature
        self.label_smoothing = label_smoothing
        self.mask_equal_texts = mask_equal_texts
        # shape [1]: FSDP cannot shard 0-d parameters
        self.temperature = nn.Parameter(torch.full((1,), float(temperature)))

    def training_step(self, batch: ImageTextBatch, batch_idx: int) -> StepOutput:
        features = self.image_encoder(batch["image"]).embedding
        image = l2_normalize(features)
        text = self.encode_text(batch["text"], batch["text_mask"])

        images, offset = gather(image)
        texts, _ = gather(text)
        text_hash = gather(hash_texts(batch["text"]))[0] if self.mask_equal_texts else None

        # the paper adds the two directions, clip_loss averages them
        loss = 2 * clip_loss(
            image,
            text,
            images,
            texts,
            offset,
            logit_scale=1 / self.temperature.squeeze(),
            text_hash=text_hash,
            label_smoothing=self.label_smoothing,
        )
        logs = {"temperature": self.temperature.detach().squeeze(), "modality_gap": modality_gap(image, text)}
        return {"loss": loss, "logs": logs, "embedding": features.detach().float()}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        with torch.no_grad():
            self.temperature.clamp_(min=self.min_temperature)
