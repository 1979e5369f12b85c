"""CoCa: compare an image with texts, and say what is in it, by one decoder of two halves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from src.collectives import reduce_sum, world_size
from src.datamodules.batch import ImageTextBatch
from src.errors import SettingError
from src.models.backbones.image_encoder import Pool, mean_patch
from src.models.functional import l2_normalize
from src.models.image_text.clip import CLIP
from src.models.layers.attentional_pooler import AttentionalPooler
from src.models.losses.captioning import captioning_loss
from src.models.pretrain_module import StepOutput
from src.models.text.generation import beam_search, greedy
from src.models.text.text_decoder import CaptioningMethod, MultimodalDecoder, UnimodalDecoder
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
        text, mask = batch["text"], batch["text_mask"]
        features = self.image_encoder(batch["image"])
        looked = self.captioning_pooler(features.patches)
        image = self._compared(looked if self.cascade else features.patches)
        read = self.text_encoder(text, mask)
        compared = l2_normalize(self.text_projection(read.embedding))
        contrastive, logs = self.contrast(image, compared, text)

        logits = self.text_decoder(read.tokens[:, :-1], looked)
        predicted = reduce_sum(mask[:, 1:].sum()) / world_size()
        captioning = captioning_loss(logits, text, mask, predicted)

        loss = self.contrastive_weight * contrastive + self.captioning_weight * captioning
        logs |= {"contrastive": contrastive.detach(), "captioning": captioning.detach()}
        return {"loss": loss, "logs": logs, "embedding": features.embedding.detach().float()}

    def encode_image(self, image: Tensor) -> Tensor:
        patches = self.image_encoder(image).patches
        return self._compared(self.captioning_pooler(patches) if self.cascade else patches)

    def _compared(self, tokens: Tensor) -> Tensor:
        """The unit vector [B, E] that is compared with texts, of an image's tokens [B, N, D]."""
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
            return greedy(CaptioningMethod(self.text_encoder, self.text_decoder, looked), begin, end=end, length=length)
        speaker = CaptioningMethod(self.text_encoder, self.text_decoder, looked.repeat_interleave(beams, dim=0))
        return beam_search(speaker, begin, beams=beams, end=end, length=length)
