"""Bag of words: predict which words a text has, in no order. What CLIP was compared with before it was CLIP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from src.datamodules.batches.image_text import ImageTextBatch
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder, Pool, cls_token_or_mean
from src.models.functional import full_precision, l2_normalize
from src.models.losses.image_text import bag_of_words_loss
from src.models.pretrain_module import PretrainModule, StepOutput
from src.optim import OptimizerRecipe


class BagOfWords(PretrainModule):
    """Learning Visual Features from Large Weakly Supervised Data (Joulin et al., 2016), the baseline of CLIP's second
    figure: a linear layer on the image's feature has a logit for every word, and the text is a set of words.
    Deviations: the tokens of the tokenizer are the words, all of them; each text counts alike, however long it is, and
    is drawn like any other, where the paper draws words uniformly.

    There is no text tower. A text is told by the logits of its words: their sum, over the square root of their number,
    so that texts are unit vectors as `TwoTowers` wants them. A class is then recognized by the logits of its name.

    Args:
        backbone: any timm model without a head.
        optimizer: as CLIP's, to be compared with it.
        vocabulary: token ids there may be.
        marks: ids that are no words: padding, end and start, as the learned tokenizer has them.
        pool: what of the backbone's tokens the words are read from and is evaluated.
    """

    is_word: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerRecipe,
        *,
        vocabulary: int,
        marks: Sequence[int] = (0, 1, 2),
        pool: Pool = cls_token_or_mean,
    ) -> None:
        super().__init__(optimizer)
        if any(not 0 <= mark < vocabulary for mark in marks):
            raise ValueError(f"BagOfWords: marks {list(marks)} must be ids of a vocabulary of {vocabulary}")
        self.image_encoder = ImageEncoder(backbone, pool)
        self.words = nn.Linear(self.image_encoder.dim, vocabulary)
        nn.init.normal_(self.words.weight, std=self.image_encoder.dim**-0.5)
        nn.init.zeros_(self.words.bias)
        is_word = torch.ones(vocabulary)
        is_word[list(marks)] = 0
        self.register_buffer("is_word", is_word, persistent=False)

    def training_step(self, batch: ImageTextBatch, batch_idx: int) -> StepOutput:
        features = self.image_encoder(batch["image"]).embedding
        bag = self.bag(batch["text"], batch["text_mask"])
        loss = bag_of_words_loss(self.words(features), bag)
        return {"loss": loss, "logs": {"words": bag.sum(dim=1).mean()}, "embedding": features.detach().float()}

    def bag(self, text: Tensor, mask: Tensor) -> Tensor:
        """Which words there are: ids [B, L] and which of them are no padding [B, L] -> 0 or 1, [B, V]."""
        counts = torch.zeros(len(text), len(self.is_word), device=text.device)
        return counts.scatter_add_(1, text, mask.to(counts.dtype)).clamp_(max=1) * self.is_word

    def encode_image(self, image: Tensor) -> Tensor:
        """Unit vectors [B, V] of the words' logits. Their mean, which the softmax leaves open, is taken off."""
        return self._logits(self.words(self.image_encoder(image).embedding))

    def encode_text(self, text: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors [B, V] of the bags; without a word nothing is said: zeros."""
        return l2_normalize(self.bag(text, mask))

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": self.image_encoder}

    @full_precision
    def _logits(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        mean = (logits * self.is_word).sum(dim=1, keepdim=True) / self.is_word.sum()
        return l2_normalize((logits - mean) * self.is_word)
