"""ALIGN: a ConvNet and a BERT, both from scratch, on as many noisy pairs as there are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from src.collectives import gather
from src.datamodules.batches.image_text import ImageTextBatch
from src.models.backbones.image_encoder import Pool, mean_patch
from src.models.functional import l2_normalize
from src.models.image_text.base import ImageTextModule, hash_texts, modality_gap
from src.models.losses.image_text import clip_loss
from src.models.pretrain_module import StepOutput
from src.models.text.text_tower import TextTower
from src.optim import OptimizerRecipe


class ALIGN(ImageTextModule):
    """Scaling Up Visual and Vision-Language Representation Learning With Noisy Text Supervision (Jia et al., 2021).
    There is no code of the authors. Deviations: equal texts of a batch are no negatives of each other
    (``mask_equal_texts``).

    The image's feature is compared as the backbone pools it; only the text's is brought to its width.

    Args:
        backbone: a ConvNet of timm without a head.
        text: the text tower, a BERT in the paper.
        optimizer: LAMB in the paper.
        temperature: similarities are divided by it; learned itself, not its logarithm, from this start.
        min_temperature: it is held at or above, after every step: beyond 0 a divisor would turn everything round.
        label_smoothing: the share of the targets that is dealt out evenly.
        mask_equal_texts: in 1.8 G pairs of the web equal texts hardly meet, in a small vocabulary they do.
        pool: what of the backbone's positions is compared and evaluated.

    Raises:
        SettingError: in a step, of one pair.
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
            raise ValueError(
                f"ALIGN: 0 < min_temperature <= temperature must hold, got {min_temperature} and {temperature}"
            )
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"ALIGN: label_smoothing is a share in [0, 1), got {label_smoothing}")
        self.min_temperature = min_temperature
        self.label_smoothing = label_smoothing
        self.mask_equal_texts = mask_equal_texts
        # one axis of one number: what has no axis cannot be dealt out over processes
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
