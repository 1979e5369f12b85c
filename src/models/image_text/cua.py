"""CUA and CUAXU: contrastive fine-tuning with alignment and uniformity, which closes the gap between the modalities."""

from __future__ import annotations

from torch import Tensor, nn

from src.collectives import gather
from src.datamodules.batches.image_text import ImageTextBatch
from src.errors import SettingError
from src.models.backbones.image_encoder import Pool, cls_token_or_mean
from src.models.backbones.weights import Weights
from src.models.functional import l2_normalize
from src.models.image_text.base import has_towers, hash_texts, modality_gap
from src.models.image_text.clip import CLIP
from src.models.losses.image_text import clip_loss
from src.models.losses.uniformity import alignment, uniformity
from src.models.pretrain_module import StepOutput
from src.models.text.text_tower import TextTower
from src.optim import OptimizerRecipe

_NEW = ("image_projection.", "text_projection.", "logit_scale")


class CUA(CLIP):
    """It's Not a Modality Gap: Characterizing and Addressing the Contrastive Gap (Fahim et al., 2024).

    Both towers of a trained CLIP are fine-tuned with projections that begin anew, at a fixed temperature, with CLIP's
    loss and the alignment and uniformity of its embeddings (CUA). With the uniformity across modalities it is CUAXU.

    Deviations: pairs with equal texts count as the same, where the authors drop repeated captions from a batch. With
    several processes all pairs are compared; the authors use one.

    Args:
        backbone, text: with the architecture of the run it starts from (``checkpoint``).
        optimizer: AdamW in the paper.
        embed_dim: width of the new projections.
        temperature: of CLIP's loss, not learned.
        alignment_weight, uniformity_weight, cross_uniformity_weight: of the added terms. All 0 is contrastive
            fine-tuning, the paper's baseline.
        mask_equal_texts: pairs with equal texts count as the same; False for different ones.
        pool, micro_batch: see `CLIP`.

    Raises:
        SettingError: a weight is negative; and those of `CLIP`.
    """

    starts_from_towers = True

    def __init__(
        self,
        backbone: nn.Module,
        text: TextTower,
        optimizer: OptimizerRecipe,
        *,
        embed_dim: int = 128,
        temperature: float = 0.01,
        alignment_weight: float = 1.0,
        uniformity_weight: float = 1.0,
        cross_uniformity_weight: float = 0.0,
        mask_equal_texts: bool = True,
        pool: Pool = cls_token_or_mean,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__(
            backbone,
            text,
            optimizer,
            embed_dim=embed_dim,
            temperature=temperature,
            max_logit_scale=None,
            mask_equal_texts=mask_equal_texts,
            pool=pool,
            micro_batch=micro_batch,
        )
        if min(alignment_weight, uniformity_weight, cross_uniformity_weight) < 0:
            raise SettingError(
                f"model.alignment_weight={alignment_weight}, model.uniformity_weight={uniformity_weight}, "
                f"model.cross_uniformity_weight={cross_uniformity_weight}: none may be negative"
            )
        self.alignment_weight = alignment_weight
        self.uniformity_weight = uniformity_weight
        self.cross_uniformity_weight = cross_uniformity_weight
        self.logit_scale.requires_grad_(False)

    def load_start(self, weights: Weights) -> str:
        """Starts from the towers alone: the projections and the temperature are this method's own."""
        if has_towers(weights):
            own = {name: value for name, value in self.state_dict().items() if name.startswith(_NEW)}
            weights = weights._replace(tensors={**weights.tensors, **own})
        return super().load_start(weights)

    def training_step(self, batch: ImageTextBatch, batch_idx: int) -> StepOutput:
        features = self.image_features(batch["image"])
        image = l2_normalize(self.image_projection(features))
        text = self.encode_text(batch["text"], batch["text_mask"])
        text_hash = gather(hash_texts(batch["text"]))[0] if self.mask_equal_texts else None
        loss, terms = self.loss(image, text, text_hash)
        logs = {name: term.detach() for name, term in terms.items()} | {"modality_gap": modality_gap(image, text)}
        return {"loss": loss, "logs": logs, "embedding": features.detach().float()}

    def loss(self, image: Tensor, text: Tensor, text_hash: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the sum of CLIP's loss and the weighted terms, and each of them: unit vectors [B, E] of this process,
        and int64 [N] of all."""
        (images, offset), (texts, _) = gather(image), gather(text)
        logit_scale = self.logit_scale.exp().squeeze()
        within_images = uniformity(image, images, text_hash, offset)
        within_texts = uniformity(text, texts, text_hash, offset)
        terms = {
            "contrast": clip_loss(image, text, images, texts, offset, logit_scale=logit_scale, text_hash=text_hash),
            "alignment": alignment(image, text),
            "uniformity": (within_images + within_texts) / 2,
            "cross_uniformity": uniformity(image, texts, text_hash, offset),
        }
        loss = (
            terms["contrast"]
            + self.alignment_weight * terms["alignment"]
            + self.uniformity_weight * terms["uniformity"]
            + self.cross_uniformity_weight * terms["cross_uniformity"]
        )
        return loss, terms
