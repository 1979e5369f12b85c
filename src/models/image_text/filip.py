"""FILIP: CLIP that compares patches with words, each with the one that suits it best, instead of whole with whole."""

from __future__ import annotations

from torch import Tensor, nn

from src.collectives import gather
from src.datamodules.batch import ImageTextBatch
from src.models.backbones.image_encoder import mean_patch
from src.models.functional import l2_normalize
from src.models.image_text.clip import CLIP, equal_texts
from src.models.losses.late_interaction import late_interaction, late_interaction_loss, salient
from src.models.pretrain_module import StepOutput
from src.models.text.text_tower import Tower
from src.optim import OptimizerRecipe


class FILIP(CLIP):
    """FILIP: Fine-grained Interactive Language-Image Pre-Training (Yao et al., 2021). There is no code of the authors.
    Start and end of a text count as words, as in the paper's figure. Deviations: equal texts of a batch are no
    negatives of each other (``mask_equal_texts``); the temperature's limits are CLIP's; tokens cross processes in
    float32.

    Args:
        backbone: any timm model without a head; a class token takes part in attention and is not compared.
        text: a text tower whose tokens see what stands before them.
        optimizer: LAMB in the paper.
        embed_dim: width in which patches and words are compared.
        temperature, max_scale, mask_equal_texts: see `CLIP`.
        kept: the share of its patches and of its words that a pair shows to the others, those most like anything of the
            other kind in the same process; a pair itself always looks with all of them. Below 1 the loss depends on how
            many pairs a process holds.

    Raises:
        SettingError: in a step, of one pair.
    """

    def __init__(
        self,
        backbone: nn.Module,
        text: Tower,
        optimizer: OptimizerRecipe,
        *,
        embed_dim: int = 256,
        temperature: float = 0.07,
        max_scale: float = 100.0,
        mask_equal_texts: bool = True,
        kept: float = 1.0,
    ) -> None:
        super().__init__(
            backbone,
            text,
            optimizer,
            embed_dim=embed_dim,
            temperature=temperature,
            max_scale=max_scale,
            mask_equal_texts=mask_equal_texts,
            pool=mean_patch,
        )
        if not 0 < kept <= 1:
            raise ValueError(f"FILIP: kept is a share of the tokens, above 0 and at most 1; got {kept}")
        self.kept = kept

    def training_step(self, batch: ImageTextBatch, batch_idx: int) -> StepOutput:
        features = self.image_encoder(batch["image"])
        image = l2_normalize(self.image_projection(features.patches))
        text = self.encode_text(batch["text"], batch["text_mask"])
        images, offset = gather(salient(image, text, self.kept))
        texts, _ = gather(salient(text, image, self.kept))
        same = gather(equal_texts(batch["text"]))[0] if self.mask_equal_texts else None
        scale = self.logit_scale.exp().squeeze()
        loss = late_interaction_loss(image, text, images, texts, offset, scale=scale, same=same)
        return {"loss": loss, "logs": {"scale": scale.detach()}, "embedding": features.embedding.detach().float()}

    def encode_image(self, image: Tensor) -> Tensor:
        """Unit vectors [B, N, E] of the patches of images [B, 3, H, W]."""
        return l2_normalize(self.image_projection(self.image_encoder(image).patches))

    def encode_text(self, text: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors [B, L, E] of the tokens of texts [B, L], zeros where the mask says that they are padding."""
        return l2_normalize(self.text_projection(self.text_encoder(text, mask).tokens)) * mask[:, :, None]

    def encode_words(self, text: Tensor, mask: Tensor) -> Tensor:
        """What is compared are words already: [B, L, E]."""
        return self.encode_text(text, mask)

    def similarity(self, query: Tensor, keys: Tensor) -> Tensor:
        """How well keys fit queries, images and texts or the other way round: [Q, n, E], [K, m, E] -> [Q, K]."""
        some = keys.any(dim=-1).any(dim=0)  # where all texts are short, their padding need not be compared
        return late_interaction(query, keys[:, some])
