"""FILIP: CLIP with late interaction, which compares every patch with every text token."""

from __future__ import annotations

from torch import Tensor, nn

from src.collectives import gather
from src.datamodules.batches.image_text import ImageTextBatch
from src.errors import SettingError
from src.models.backbones.image_encoder import mean_patch
from src.models.functional import l2_normalize
from src.models.image_text.base import hash_texts
from src.models.image_text.clip import CLIP
from src.models.losses.late_interaction import late_interaction, late_interaction_loss, select_tokens
from src.models.pretrain_module import StepOutput
from src.models.text.text_tower import TextTower
from src.optim import OptimizerRecipe


class FILIP(CLIP):
    """FILIP: Fine-grained Interactive Language-Image Pre-Training (Yao et al., 2021). The start and end tokens of a
    text are compared like words, as in the paper's figure. Deviations: equal texts in a batch are not negatives of each
    other (``mask_equal_texts``); the temperature has CLIP's limits; tokens are gathered in float32.

    The authors published no code. Their employer published a version for MindSpore (mindformers, models/filip), which
    differs from the paper and from this class: labels are smoothed by 0.1, logits are clipped to [-100, 100], the
    temperature starts at 1 / 47.8 without limits, the gradient of each tensor is clipped to a norm of 1, QuickGELU is
    the activation (``activation=quick_gelu``), a token learner makes 24 tokens of the patches, no gathered token is
    left out, and images are mirrored and their colors changed where the paper has AutoAugment.

    Args:
        backbone: any timm model without a head; its class token, if it has one, is not compared.
        text: a text tower with causal attention.
        optimizer: LAMB in the paper.
        embed_dim: width of projected patches and text tokens.
        temperature, max_logit_scale, mask_equal_texts: see `CLIP`.
        token_keep_ratio: share of a pair's patches and text tokens that other pairs are compared with: those most
            similar to any token of the other modality in the same process. A pair's own queries use all tokens; only
            gathered keys are subsampled. Below 1 the loss depends on the number of pairs in a process.

    Raises:
        SettingError: ``token_keep_ratio`` is out of range; and those of `CLIP`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        text: TextTower,
        optimizer: OptimizerRecipe,
        *,
        embed_dim: int = 256,
        temperature: float = 0.07,
        max_logit_scale: float = 100.0,
        mask_equal_texts: bool = True,
        token_keep_ratio: float = 1.0,
    ) -> None:
        super().__init__(
            backbone,
            text,
            optimizer,
            embed_dim=embed_dim,
            temperature=temperature,
            max_logit_scale=max_logit_scale,
            mask_equal_texts=mask_equal_texts,
            pool=mean_patch,
        )
        if not 0 < token_keep_ratio <= 1:
            raise SettingError(f"model.token_keep_ratio must be above 0 and at most 1, got {token_keep_ratio}")
        self.token_keep_ratio = token_keep_ratio

    def training_step(self, batch: ImageTextBatch, batch_idx: int) -> StepOutput:
        features = self.image_encoder(batch["image"])
        image = l2_normalize(self.image_projection(features.patches))
        text = self.encode_text(batch["text"], batch["text_mask"])

        images, offset = gather(select_tokens(image, text, self.token_keep_ratio))
        texts, _ = gather(select_tokens(text, image, self.token_keep_ratio))
        text_hash = gather(hash_texts(batch["text"]))[0] if self.mask_equal_texts else None

        logit_scale = self.logit_scale.exp().squeeze()
        loss = late_interaction_loss(image, text, images, texts, offset, logit_scale=logit_scale, text_hash=text_hash)
        logs = {"logit_scale": logit_scale.detach()}
        return {"loss": loss, "logs": logs, "embedding": features.embedding.detach().float()}

    def encode_image(self, image: Tensor) -> Tensor:
        """Encodes the patches of images [B, 3, H, W] to unit vectors [B, N, E]."""
        return l2_normalize(self.image_projection(self.image_encoder(image).patches))

    def encode_text(self, text: Tensor, mask: Tensor) -> Tensor:
        """Encodes the tokens of texts [B, L] to unit vectors [B, L, E], zeros for padding."""
        return l2_normalize(self.text_projection(self.text_encoder(text, mask).tokens)) * mask[:, :, None]

    def encode_words(self, text: Tensor, mask: Tensor) -> Tensor:
        """Returns `encode_text`, whose vectors are those of tokens: [B, L, E]."""
        return self.encode_text(text, mask)

    def similarity(self, query: Tensor, keys: Tensor) -> Tensor:
        """Computes `late_interaction` of images with texts or of texts with images: [Q, n, E], [K, m, E] -> [Q, K]."""
        not_padding = keys.any(dim=-1).any(dim=0)  # positions that are padding in all keys need no computation
        return late_interaction(query, keys[:, not_padding])
