"""CLIP-Refine: a short post-pre-training that reduces the modality gap without forgetting."""

from __future__ import annotations

import math
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from src.collectives import gather
from src.datamodules.batches.image_text import ImageTextBatch
from src.errors import SettingError
from src.models.backbones.image_encoder import Pool, cls_token_or_mean
from src.models.backbones.weights import Weights
from src.models.functional import l2_normalize
from src.models.image_text.base import ImageTextModule, hash_texts, modality_gap
from src.models.image_text.micro_batches import in_micro_batches
from src.models.losses.image_text import clip_loss
from src.models.losses.refine import hybrid_distillation, random_feature_alignment
from src.models.pretrain_module import StepOutput
from src.models.teacher import teacher_of
from src.models.text.text_tower import TextTower
from src.optim import OptimizerRecipe


class CLIPRefine(ImageTextModule):
    """Post-pre-training for Modality Alignment in Vision-Language Foundation Models (Yamaguchi et al., 2025).
    Deviations: HyCD compares unit vectors with the logit scale that the start had learned; the authors multiply
    features that are not normalized, whose norm is about 10 for OpenAI's weights (``cosine: false``).

    The teacher is a frozen copy of the towers as they start. It is saved in every checkpoint, so that a resumed run
    does not need the start.

    Args:
        backbone, text: with the architecture of the run it starts from (``checkpoint``).
        optimizer: AdamW in the paper.
        embed_dim: width of the projected features, as in the run it starts from.
        temperature: inverse of the logit scale, where it starts from no run.
        alignment: weight of the random feature alignment (RaFA).
        distillation: weight of the hybrid contrastive distillation (HyCD).
        contrast: weight of CLIP's loss; 0 in the paper. Alone it is the paper's baseline, contrastive fine-tuning.
        alpha: weight of the given pairs in HyCD's target.
        cosine: HyCD compares unit vectors; False compares features that are not normalized, without a logit scale.
        pool: turns the backbone's tokens into the feature that is projected and evaluated.
        micro_batch: see `ImageTextModule`.

    Raises:
        SettingError: an argument is out of range.
    """

    starts_from_towers = True

    def __init__(
        self,
        backbone: nn.Module,
        text: TextTower,
        optimizer: OptimizerRecipe,
        *,
        embed_dim: int = 512,
        temperature: float = 0.01,
        alignment: float = 1.0,
        distillation: float = 1.0,
        contrast: float = 0.0,
        alpha: float = 0.5,
        cosine: bool = True,
        pool: Pool = cls_token_or_mean,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__(backbone, pool, text, optimizer, embed_dim=embed_dim, micro_batch=micro_batch)
        if temperature <= 0:
            raise SettingError(f"model.temperature must be above 0, got {temperature}")
        if not 0 <= alpha <= 1:
            raise SettingError(f"model.alpha must be at least 0 and at most 1, got {alpha}")
        if min(alignment, distillation, contrast) < 0 or alignment + distillation + contrast == 0:
            raise SettingError(
                f"model.alignment={alignment}, model.distillation={distillation}, model.contrast={contrast}: all must "
                "be at least 0, and one above 0"
            )
        self.alignment, self.distillation, self.contrast = alignment, distillation, contrast
        self.alpha = alpha
        self.cosine = cosine
        # frozen: the losses that use it compare the student with its teacher, which learned this logit scale
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / temperature)), requires_grad=False)
        self.teacher = teacher_of(self._towers()).eval()

    def _towers(self) -> nn.ModuleDict:
        towers = ("image_encoder", "image_projection", "text_encoder", "text_projection")
        return nn.ModuleDict({name: self.get_submodule(name) for name in towers})

    def load_start(self, weights: Weights) -> str:
        line = super().load_start(weights)
        self.teacher.load_state_dict(self._towers().state_dict())
        return line

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if "teacher" in self._modules:  # the base class calls train() before there is a teacher
            self.teacher.eval()
        return self

    def training_step(self, batch: ImageTextBatch, batch_idx: int) -> StepOutput:
        features = self.image_features(batch["image"])
        image = self.image_projection(features)
        text = self.text_projection(self.text_features(batch["text"], batch["text_mask"]))

        losses = {}
        if self.alignment:
            # one random vector a pair, shared by its image and its text
            reference = torch.randn_like(image, dtype=torch.promote_types(image.dtype, torch.float32))
            losses["alignment"] = self.alignment * random_feature_alignment(image, text, reference)
        if self.distillation:
            losses["distillation"] = self.distillation * self._distillation_loss(batch, image, text)
        if self.contrast:
            losses["contrast"] = self.contrast * self._contrastive_loss(batch, image, text)

        logs = {name: loss.detach() for name, loss in losses.items()}
        logs["modality_gap"] = modality_gap(l2_normalize(image), l2_normalize(text))
        return {"loss": sum(losses.values(), image.new_zeros(())), "logs": logs, "embedding": features.detach().float()}

    def _distillation_loss(self, batch: ImageTextBatch, image: Tensor, text: Tensor) -> Tensor:
        """HyCD: the target mixes the teacher's similarities with the given pairs."""
        with torch.no_grad():
            teacher_image, teacher_text = (self._normalize(features) for features in self.teacher_features(batch))
            teacher_images, teacher_texts = gather(teacher_image)[0], gather(teacher_text)[0]
            logit_scale = self.logit_scale.exp().squeeze() if self.cosine else self.logit_scale.new_ones(())
        image, text = self._normalize(image), self._normalize(text)
        images, offset = gather(image)
        texts, _ = gather(text)
        distil = partial(hybrid_distillation, logit_scale=logit_scale, alpha=self.alpha)
        to_text = distil(image, texts, teacher_image, teacher_texts, offset)
        to_image = distil(text, images, teacher_text, teacher_images, offset)
        return (to_text + to_image) / 2

    def _contrastive_loss(self, batch: ImageTextBatch, image: Tensor, text: Tensor) -> Tensor:
        """CLIP's loss, in which equal texts are not negatives of each other."""
        image, text = l2_normalize(image), l2_normalize(text)
        images, offset = gather(image)
        texts, _ = gather(text)
        text_hash, _ = gather(hash_texts(batch["text"]))
        logit_scale = self.logit_scale.exp().squeeze()
        return clip_loss(image, text, images, texts, offset, logit_scale=logit_scale, text_hash=text_hash)

    @torch.no_grad()
    def teacher_features(self, batch: ImageTextBatch) -> tuple[Tensor, Tensor]:
        """Returns the teacher's image and text features, [B, E] each."""
        teacher, size = self.teacher, self.micro_batch
        image = in_micro_batches(lambda part: teacher["image_encoder"](part).embedding, batch["image"], size=size)
        texts = batch["text"], batch["text_mask"]
        text = in_micro_batches(lambda *part: teacher["text_encoder"](*part).embedding, *texts, size=size)
        return teacher["image_projection"](image), teacher["text_projection"](text)

    def _normalize(self, features: Tensor) -> Tensor:
        return l2_normalize(features) if self.cosine else features
