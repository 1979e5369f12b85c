"""CLIP with an improved recipe: several augmented views of image and text, with heads of their own."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.collectives import gather
from src.datamodules.batches.image_text import ImageTextViewsBatch
from src.errors import SettingError
from src.models.backbones.image_encoder import Pool, cls_token_or_mean
from src.models.functional import l2_normalize
from src.models.heads.mlp import MlpHead
from src.models.image_text.base import ImageTextModule, hash_texts, modality_gap
from src.models.image_text.slip import image_and_views, views_of
from src.models.joint_embedding.base import forward_views_separately
from src.models.losses.image_text import clip_loss
from src.models.pretrain_module import StepOutput
from src.models.text.text_tower import TextTower
from src.optim import OptimizerRecipe


class PairViews(NamedTuple):
    """Vectors of a batch of pairs: of the weakly augmented pair (the paper's global view), and of its N strongly
    augmented images and N strongly augmented texts (the local views)."""

    image: Tensor  # [B, D]
    text: Tensor  # [B, D]
    images: Tensor  # [B, N, D]
    texts: Tensor  # [B, N, D]


class AddedObjective(nn.Module, ABC):
    """A self-supervised loss that compares images with texts, added to the contrastive loss of `CLIPRocket`."""

    @abstractmethod
    def forward(self, features: PairViews, embeddings: PairViews, local_scale: Tensor) -> Tensor:
        """Computes the loss, its weight included.

        Args:
            features: of the towers.
            embeddings: of CLIP's heads, of unit length.
            local_scale: scalar, the inverse temperature of the strong views.
        """


class CLIPRocket(ImageTextModule):
    """The improved CLIP recipe of Improved baselines for vision-language pre-training (Fini et al., 2023).

    The weakly augmented pair is compared by linear heads, as in CLIP. Every strongly augmented image is compared with
    every strongly augmented text by heads of three layers, with label smoothing. An added objective makes it SiamLIP,
    BarLIP or SwALIP.

    Deviations: equal texts in a batch are not negatives of each other (``mask_equal_texts``). Gradients reach the
    features of other processes; the authors gather without gradient, so that each pair learns as a query alone.

    Args:
        backbone: any timm model without a head.
        text: the text tower.
        optimizer: AdamW in the paper.
        embed_dim: width of the embeddings.
        hidden_dim: width of the two hidden layers of the strong views' heads.
        separate_heads: False compares the strong views by the linear heads and temperature of the weak pair.
        temperature, local_temperature: initial values of the learned temperatures, of the weak pair and of the strong
            views.
        max_logit_scale: upper limit of both inverse temperatures, applied after every step, as is the lower limit 1.
        label_smoothing: of the strong views' loss.
        loss_scale: factor on the contrastive loss, 2 where the authors sum over the two directions.
        text_dropout: dropout of strongly augmented texts before each block of the text tower.
        mask_equal_texts: equal texts are not negatives of each other.
        objective: builds an added objective from the widths of the image's and the text's features; None for none.
        evaluation_share: share of the strong views' heads in the similarity that evaluations compare.
        pool: turns the backbone's tokens into the feature that is projected and evaluated.
        micro_batch: see `ImageTextModule`.

    Raises:
        SettingError: an argument is out of range; in a step, a batch without further views of image and text, or a
            single pair.
    """

    def __init__(
        self,
        backbone: nn.Module,
        text: TextTower,
        optimizer: OptimizerRecipe,
        *,
        embed_dim: int = 256,
        hidden_dim: int = 4096,
        separate_heads: bool = True,
        temperature: float = 0.07,
        local_temperature: float = 0.1,
        max_logit_scale: float = 100.0,
        label_smoothing: float = 0.1,
        loss_scale: float = 2.0,
        text_dropout: float = 0.0,
        mask_equal_texts: bool = True,
        objective: Callable[[int, int], AddedObjective] | None = None,
        evaluation_share: float = 0.0,
        pool: Pool = cls_token_or_mean,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__(backbone, pool, text, optimizer, embed_dim=embed_dim, micro_batch=micro_batch)
        for name, value in (("temperature", temperature), ("local_temperature", local_temperature)):
            if not 1 / max_logit_scale <= value <= 1:
                raise SettingError(
                    f"model.{name} must lie in [1 / model.max_logit_scale, 1] = [{1 / max_logit_scale}, 1], got {value}"
                )
        for name, value in (("label_smoothing", label_smoothing), ("text_dropout", text_dropout)):
            if not 0 <= value < 1:
                raise SettingError(f"model.{name} must be at least 0 and below 1, got {value}")
        if not 0 <= evaluation_share <= 1:
            raise SettingError(f"model.evaluation_share must lie in [0, 1], got {evaluation_share}")
        if text_dropout and micro_batch is not None:
            raise SettingError(
                "model.text_dropout: with model.micro_batch it must be 0; the backward pass recomputes parts"
            )
        if text_dropout:
            text_blocks(text)
        self.max_logit_scale = max_logit_scale
        self.label_smoothing = label_smoothing
        self.loss_scale = loss_scale
        self.text_dropout = text_dropout
        self.mask_equal_texts = mask_equal_texts
        self.evaluation_share = evaluation_share
        self.separate_heads = separate_heads
        # shape [1]: FSDP cannot shard 0-d parameters
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / temperature)))
        if separate_heads:
            widths = (hidden_dim, hidden_dim, embed_dim)
            self.local_image_head = MlpHead((self.image_encoder.dim, *widths), hidden_bias=True)
            self.local_text_head = MlpHead((text.dim, *widths), hidden_bias=True)
            self.local_logit_scale = nn.Parameter(torch.full((1,), math.log(1 / local_temperature)))
        self.objective = None if objective is None else objective(self.image_encoder.dim, text.dim)

    def training_step(self, batch: ImageTextViewsBatch, batch_idx: int) -> StepOutput:
        features = self.tower_features(batch)
        embeddings = self.embeddings(features)
        scale, local_scale = self.logit_scales()
        contrast, logs = self.contrastive_loss(embeddings, batch, scale, local_scale)
        loss = self.loss_scale * contrast
        if self.objective is not None:
            added = self.added_loss(batch, features, embeddings, local_scale)
            loss = loss + added
            logs["added"] = added.detach()
        logs |= {"logit_scale": scale.detach(), "modality_gap": modality_gap(embeddings.image, embeddings.text)}
        return {"loss": loss, "logs": logs, "embedding": features.image.detach().float()}

    def tower_features(self, batch: ImageTextViewsBatch) -> PairViews:
        """Computes the towers' features."""
        dropout = dropout_before_blocks(self.text_encoder, self.text_dropout, self.training)
        return encode_views(batch, self.image_features, self.text_features, dropout)

    def embeddings(self, features: PairViews) -> PairViews:
        """Projects the features: the weak pair by the linear heads, strong views by their own; all of unit length."""
        image_head = self.local_image_head if self.separate_heads else self.image_projection
        text_head = self.local_text_head if self.separate_heads else self.text_projection
        return PairViews(
            l2_normalize(self.image_projection(features.image)),
            l2_normalize(self.text_projection(features.text)),
            l2_normalize(forward_views_separately(image_head, features.images)),
            l2_normalize(forward_views_separately(text_head, features.texts)),
        )

    def logit_scales(self) -> tuple[Tensor, Tensor]:
        """Returns the inverse temperatures of the weak pair and of the strong views, scalars."""
        scale = self.logit_scale.exp().squeeze()
        return scale, self.local_logit_scale.exp().squeeze() if self.separate_heads else scale

    def contrastive_loss(
        self, embeddings: PairViews, batch: ImageTextViewsBatch, scale: Tensor, local_scale: Tensor
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Returns (L + N * L_local) / (1 + N) and its terms for the log, where L is CLIP's loss of the weak pairs and
        L_local its mean over the N x N pairs of a strong image and a strong text."""
        (images, offset), (texts, _) = gather(embeddings.image), gather(embeddings.text)
        weak = clip_loss(
            embeddings.image,
            embeddings.text,
            images,
            texts,
            offset,
            logit_scale=scale,
            text_hash=self._text_hash(batch["text"]),
        )
        (images, offset), (texts, _) = gather(embeddings.images), gather(embeddings.texts)
        count = images.shape[1]
        strong = embeddings.images.new_zeros(())
        for view in range(count):
            text_hash = self._text_hash(batch["text_views"][:, view])
            for image_view in range(count):
                strong = strong + clip_loss(
                    embeddings.images[:, image_view],
                    embeddings.texts[:, view],
                    images[:, image_view],
                    texts[:, view],
                    offset,
                    logit_scale=local_scale,
                    text_hash=text_hash,
                    label_smoothing=self.label_smoothing,
                )
        strong = strong / count**2
        return (weak + count * strong) / (1 + count), {"weak": weak.detach(), "strong": strong.detach()}

    def added_loss(
        self, batch: ImageTextViewsBatch, features: PairViews, embeddings: PairViews, local_scale: Tensor
    ) -> Tensor:
        """Computes the added objective."""
        assert self.objective is not None
        return self.objective(features, embeddings, local_scale)

    def encode_image(self, image: Tensor) -> Tensor:
        features = self.image_features(image)
        local = self.local_image_head if self.separate_heads else self.image_projection
        return self._mixed(self.image_projection(features), local, features)

    def encode_text(self, text: Tensor, mask: Tensor) -> Tensor:
        features = self.text_features(text, mask)
        local = self.local_text_head if self.separate_heads else self.text_projection
        return self._mixed(self.text_projection(features), local, features)

    def _mixed(self, projected: Tensor, local_head: nn.Module, features: Tensor) -> Tensor:
        """Returns unit vectors whose product is the weighted mean of the similarities of both kinds of heads."""
        embedding, share = l2_normalize(projected), self.evaluation_share
        if not share:
            return embedding
        local = l2_normalize(local_head(features))
        return torch.cat([(1 - share) ** 0.5 * embedding, share**0.5 * local], dim=1)

    def _text_hash(self, text: Tensor) -> Tensor | None:
        return gather(hash_texts(text))[0] if self.mask_equal_texts else None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        with torch.no_grad():  # clamping in the forward pass would zero the gradient beyond the limit
            self.logit_scale.clamp_(0, math.log(self.max_logit_scale))
            if self.separate_heads:
                self.local_logit_scale.clamp_(0, math.log(self.max_logit_scale))

    def visualize(self, batch: ImageTextViewsBatch) -> dict[str, Tensor]:
        return image_and_views(batch)


def encode_views(
    batch: ImageTextViewsBatch,
    encode_image: Callable[[Tensor], Tensor],
    encode_text: Callable[[Tensor, Tensor], Tensor],
    dropout: AbstractContextManager[None],
) -> PairViews:
    """Encodes the weak pair and the strong views, each view of the image in a forward pass of its own, so that batch
    norm takes its statistics over one view.

    Args:
        encode_image: [B, C, H, W] -> [B, D].
        encode_text: token ids and padding mask [B, L] -> [B, D].
        dropout: active while the strong texts are encoded.
    """
    texts, mask = text_views_of(batch)
    views = views_of(batch, texts.shape[1])
    image = encode_image(batch["image"])
    text = encode_text(batch["text"], batch["text_mask"])
    images = forward_views_separately(encode_image, views)
    with dropout:
        flat = encode_text(texts.flatten(0, 1), mask.flatten(0, 1))
    return PairViews(image, text, images, flat.unflatten(0, texts.shape[:2]))


def text_views_of(batch: ImageTextViewsBatch) -> tuple[Tensor, Tensor]:
    """Returns the further texts of the images and their padding masks: [B, T, L] each.

    Raises:
        SettingError: there are none.
    """
    if "text_views" not in batch or not batch["text_views"].shape[1]:
        raise SettingError(
            "data.extras: this method needs further texts of each image, such as AugmentedCaptions makes"
        )
    return batch["text_views"], batch["text_views_mask"]


def text_blocks(text: TextTower) -> nn.ModuleList:
    """Returns the blocks of a text tower.

    Raises:
        SettingError: its transformer has none.
    """
    blocks = getattr(getattr(getattr(text, "transformer", None), "encoder", None), "layers", None)
    if not isinstance(blocks, nn.ModuleList):
        raise SettingError(
            f"model.text_dropout: the blocks of a {type(text).__name__} are unknown; CLIPTextTower has some"
        )
    return blocks


@contextmanager
def dropout_before_blocks(text: TextTower, share: float, training: bool) -> Iterator[None]:
    """Drops a share of the values of each block's input while active, residual stream included."""
    if not share or not training:
        yield
        return

    def drop(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (F.dropout(inputs[0], share), *inputs[1:])

    handles = [block.register_forward_pre_hook(drop) for block in text_blocks(text)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
