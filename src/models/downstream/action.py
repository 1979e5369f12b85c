"""Action recognition: a whole encoder fine-tuned, or a linear classifier on a frozen one."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from src.datamodules.batches.video import VideoBatch
from src.models.backbones.encoder import Encoder
from src.models.backbones.video_encoder import clip_encoder, reads_clips
from src.models.downstream.finetune import FineTune
from src.models.downstream.linear import LinearProtocol
from src.models.pretrain_module import StepOutput


class FineTuneAction(FineTune):
    """The fine-tuning of VideoMAE: Masked Autoencoders are Data-Efficient Learners for Self-Supervised Video
    Pre-Training (Tong et al., 2022), which is `FineTune` on clips. Deviations: frames are resized with
    antialiasing.

    An image backbone embeds each frame, and the embeddings are averaged. It is a baseline without the order of frames.
    """

    input_field = "video"

    def training_step(self, batch: VideoBatch, batch_idx: int) -> StepOutput:  # type: ignore[override]
        return self.learn(batch["video"], self.labels_of(batch), batch_idx)

    def embed(self, image: Tensor) -> Tensor:
        """Clips [B, T, 3, H, W] -> input of the classifier [B, D]."""
        if reads_clips(self.backbone):
            return super().embed(image)
        return super().embed(image.flatten(0, 1)).unflatten(0, image.shape[:2]).mean(dim=1)

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": clip_encoder(self.backbone, self.pool)}


class LinearAction(LinearProtocol):
    """`LinearProtocol` on clips. An image backbone embeds them as in `FineTuneAction`."""

    input_field = "video"

    def training_step(self, batch: VideoBatch, batch_idx: int) -> StepOutput:  # type: ignore[override]
        return self.learn(batch["video"], self.labels_of(batch))

    @cached_property
    def encoder(self) -> Encoder:
        return clip_encoder(self.backbone, self.pool)
