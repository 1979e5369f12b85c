"""CoCa: compare an image with texts, and say what is in it, by one decoder of two halves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from src.collectives import gather, reduce_sum, world_size
from src.datamodules.batches.image_text import ImageTextBatch
from src.errors import SettingError
from src.models.backbones.image_encoder import Pool, mean_patch
from src.models.functional import l2_normalize
from src.models.image_text.base import hash_texts, modality_gap
from src.models.image_text.clip import CLIP
from src.models.layers.attentional_pooler import AttentionalPooler
from src.models.losses.captioning import captioning_loss
from src.models.losses.image_text import clip_loss
from src.models.pretrain_module import StepOutput
from src.models.text.generation import beam_search, greedy
from src.models.text.text_decoder import CachedCaptionDecoder, MultimodalDecoder, UnimodalDecoder
from src.optim import OptimizerRecipe


class CoCa(CLIP):
    """CoCa: Contrastive Captioners are Image-Text Foundation Models (Yu et al., 2022). Deviations: CLIP's first values,
    which the paper does not give; equal texts of a batch are no negatives of each other (``mask_equal_texts``).

    The lower half of the text decoder reads the text alone, and a token behind it becomes what is compared with the
    image. Its upper half goes on from the other tokens, attends to the image and predicts the caption. Two poolers make
    what they need of the image's tokens: one query for the comparison, many for the caption.

    Args:
        backbone: any timm model without a head; its class token, if it has one, is not asked.
        text: the lower half.
        optimizer: Adafactor in the paper.
        depth, heads: of the upper half, as wide as the lower one.
        queries: of the caption's pooler.
        pooler_heads: of both poolers.
        cascade: the comparison's pooler asks the caption's pooler, and not the image's tokens themselves.
        contrastive_weight, captioning_weight: of the two losses.
        pool: what of the backbone's tokens is evaluated as the image's feature.
        options: of `CLIP`.

    Raises:
        SettingError: weights below 0, or both 0; micro-batches, which go through towers alone; and CLIP's.
    """

    text_encoder: UnimodalDecoder

    def __init__(
        self,
        backbone: nn.Module,
        text: UnimodalDecoder,
        optimizer: OptimizerRecipe,
        *,
        depth: int = 12,
        heads: int = 12,
        queries: int = 256,
        pooler_heads: int = 12,
        cascade: bool = True,
        contrastive_weight: float = 1.0,
        captioning_weight: float = 2.0,
        pool: Pool = mean_patch,
        **options: Any,
    ) -> None:
        super().__init__(backbone, text, optimizer, pool=pool, **options)
        if self.micro_batch is not None:
            raise SettingError(
                f"model.micro_batch={self.micro_batch}: the decoder reads the towers' tokens all at once"
            )
        if min(contrastive_weight, captioning_weight) < 0 or contrastive_weight + captioning_weight == 0:
            raise SettingError(
                f"model.contrastive_weight={contrastive_weight}, model.captioning_weight={captioning_weight}: both at "
                "least 0, one above it"
            )
        dim = self.image_encoder.dim
        self.captioning_pooler = AttentionalPooler(dim, queries=queries, heads=pooler_heads)
        self.contrastive_pooler = AttentionalPooler(dim, queries=1, heads=pooler_heads)
        self.text_decoder = MultimodalDecoder(
            vocabulary=text.vocabulary, width=text.dim, depth=depth, heads=heads, image_dim=dim
        )
        self.cascade = cascade
        self.contrastive_weight = contrastive_weight
        self.captioning_weight = captioning_weight

    def training_step(self, batch: ImageTextBatch, batch_idx: int) -> StepOutput:
        features = self.image_encoder(batch["image"])
        image_tokens = self.captioning_pooler(features.patches)
        image = self._contrastive_embedding(image_tokens if self.cascade else features.patches)
        text_features = self.text_encoder(batch["text"], batch["text_mask"])
        text = l2_normalize(self.text_projection(text_features.embedding))

        images, offset = gather(image)
        texts, _ = gather(text)
        text_hash = gather(hash_texts(batch["text"]))[0] if self.mask_equal_texts else None
        logit_scale = self.logit_scale.exp().squeeze()
        contrastive = clip_loss(image, text, images, texts, offset, logit_scale=logit_scale, text_hash=text_hash)

        logits = self.text_decoder(text_features.tokens[:, :-1], image_tokens)
        predicted_tokens = reduce_sum(batch["text_mask"][:, 1:].sum()) / world_size()
        captioning = captioning_loss(logits, batch["text"], batch["text_mask"], predicted_tokens)

        loss = self.contrastive_weight * contrastive + self.captioning_weight * captioning
        logs = {
            "contrastive": contrastive.detach(),
            "captioning": captioning.detach(),
            "logit_scale": logit_scale.detach(),
            "modality_gap": modality_gap(image, text),
        }
        return {"loss": loss, "logs": logs, "embedding": features.embedding.detach().float()}

    def encode_image(self, image: Tensor) -> Tensor:
        patches = self.image_encoder(image).patches
        return self._contrastive_embedding(self.captioning_pooler(patches) if self.cascade else patches)

    def _contrastive_embedding(self, tokens: Tensor) -> Tensor:
        """Pools image tokens [B, N, D] to the unit vectors [B, E] that are compared with texts."""
        return l2_normalize(self.image_projection(self.contrastive_pooler(tokens)[:, 0]))

    @torch.no_grad()
    def caption(self, image: Tensor, *, start: int, end: int, length: int, beams: int = 1) -> Tensor:
        """What images [B, 3, H, W] show: token ids int64 [B, length], ``start`` first, filled up with ``end``.

        Args:
            length: tokens at most.
            beams: captions followed at a time; 1 takes the likeliest token each time.

        Raises:
            SettingError: ``length`` is more than the decoder has positions for, or there is no beam.
        """
        if length > self.text_encoder.length or beams < 1:
            raise SettingError(
                f"a caption has at most model.text.length={self.text_encoder.length} tokens and at least one beam, not "
                f"{length} and {beams}"
            )
        looked = self.captioning_pooler(self.image_encoder(image).patches)
        begin = torch.full((len(image),), start, device=image.device)
        if beams == 1:
            return greedy(
                CachedCaptionDecoder(self.text_encoder, self.text_decoder, looked), begin, end=end, length=length
            )
        speaker = CachedCaptionDecoder(self.text_encoder, self.text_decoder, looked.repeat_interleave(beams, dim=0))
        return beam_search(speaker, begin, beams=beams, end=end, length=length)
