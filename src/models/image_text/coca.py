"""CoCa: contrastive learning and captioning with one text decoder of two halves."""

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
    """CoCa: Contrastive Captioners are Image-Text Foundation Models (Yu et al., 2022). Deviations: the
    decoder's weights are initialized as those of CLIP's text tower, since the paper does not say how; equal texts in a
    batch are not negatives of each other (``mask_equal_texts``).

    The unimodal half of the text decoder reads the text alone; its class token is compared with the image. The
    multimodal half reads the other tokens, attends to the image and predicts the caption. Two attentional poolers read
    the image tokens: one query for the contrastive loss, many queries for the caption.

    Args:
        backbone: any timm model without a head; its class token, if it has one, is not used.
        text: the unimodal half.
        optimizer: Adafactor in the paper.
        depth, heads: of the multimodal half, which is as wide as the unimodal one.
        queries: number of queries of the captioning pooler.
        pooler_heads: of both poolers.
        cascade: the contrastive pooler reads the captioning pooler's output; False lets it read the image tokens.
        contrastive_weight, captioning_weight: of the two losses.
        pool: turns the backbone's tokens into the image's feature for evaluation.
        options: of `CLIP`.

    Raises:
        SettingError: a weight is below 0, or both are 0; ``micro_batch`` is set; and those of `CLIP`.
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
                f"model.micro_batch={self.micro_batch}: CoCa's decoder needs the whole batch's tokens; set it to null"
            )
        if min(contrastive_weight, captioning_weight) < 0 or contrastive_weight + captioning_weight == 0:
            raise SettingError(
                f"model.contrastive_weight={contrastive_weight}, model.captioning_weight={captioning_weight}: "
                "both must be at least 0, and one above 0"
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
        """Generates captions of images [B, 3, H, W]: token ids int64 [B, length], padded with ``end``.

        Args:
            start: id of the first token.
            end: id of the token that ends a caption.
            length: greatest number of tokens.
            beams: width of beam search; 1 for greedy decoding.

        Raises:
            SettingError: ``length`` exceeds the decoder's positions, or ``beams`` is below 1.
        """
        if length > self.text_encoder.length or beams < 1:
            raise SettingError(
                f"length={length}, beams={beams}: length must be at most model.text.length={self.text_encoder.length} "
                "and beams at least 1"
            )
        image_tokens = self.captioning_pooler(self.image_encoder(image).patches)
        first = torch.full((len(image),), start, device=image.device)
        if beams == 1:
            model = CachedCaptionDecoder(self.text_encoder, self.text_decoder, image_tokens)
            return greedy(model, first, end=end, length=length)
        model = CachedCaptionDecoder(self.text_encoder, self.text_decoder, image_tokens.repeat_interleave(beams, dim=0))
        return beam_search(model, first, beams=beams, end=end, length=length)
