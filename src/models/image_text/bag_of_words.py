"""Bag-of-words prediction: predicts the words of a text in any order, the baseline of CLIP's ablation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from src.datamodules.batches.image_text import ImageTextBatch
from src.errors import SettingError
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder, Pool, cls_token_or_mean
from src.models.functional import full_precision, l2_normalize
from src.models.losses.image_text import bag_of_words_loss
from src.models.pretrain_module import PretrainModule, StepOutput
from src.optim import OptimizerRecipe


class BagOfWords(PretrainModule):
    """Learning Visual Features from Large Weakly Supervised Data (Joulin et al., 2016), the baseline of CLIP's second
    figure: a linear layer on the image's feature predicts a logit for every word; a text is a set of words.
    Deviations: words are the tokens of the tokenizer; each text has the same weight, whatever its length, and texts are
    sampled uniformly, where the paper samples words uniformly.

    There is no text tower. A text is encoded as the unit vector of its set of words, so that its similarity with an
    image is proportional to the sum of its words' logits. Zero-shot classification compares class names this way.

    Args:
        backbone: any timm model without a head.
        optimizer: the same as CLIP's in a comparison.
        vocabulary: number of token ids.
        special_tokens: ids of tokens that are no words; by default padding, end and start of the learned tokenizer.
        pool: turns the backbone's tokens into the feature that predicts words and is evaluated.

    Raises:
        SettingError: a special token is no id of the vocabulary.
    """

    is_word: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerRecipe,
        *,
        vocabulary: int,
        special_tokens: Sequence[int] = (0, 1, 2),
        pool: Pool = cls_token_or_mean,
    ) -> None:
        super().__init__(optimizer)
        if any(not 0 <= token < vocabulary for token in special_tokens):
            raise SettingError(
                f"model.special_tokens={list(special_tokens)} must be ids below model.vocabulary={vocabulary}"
            )
        self.image_encoder = ImageEncoder(backbone, pool)
        self.words = nn.Linear(self.image_encoder.dim, vocabulary)
        nn.init.normal_(self.words.weight, std=self.image_encoder.dim**-0.5)
        nn.init.zeros_(self.words.bias)
        is_word = torch.ones(vocabulary)
        is_word[list(special_tokens)] = 0
        self.register_buffer("is_word", is_word, persistent=False)

    def training_step(self, batch: ImageTextBatch, batch_idx: int) -> StepOutput:
        features = self.image_encoder(batch["image"]).embedding
        bag = self.bag(batch["text"], batch["text_mask"])
        loss = bag_of_words_loss(self.words(features), bag)
        return {"loss": loss, "logs": {"words": bag.sum(dim=1).mean()}, "embedding": features.detach().float()}

    def bag(self, text: Tensor, mask: Tensor) -> Tensor:
        """Returns the set of words of each text: ids [B, L] and padding mask [B, L] -> [B, V], 1 for each word."""
        counts = torch.zeros(len(text), len(self.is_word), device=text.device)
        return counts.scatter_add_(1, text, mask.to(counts.dtype)).clamp_(max=1) * self.is_word

    def encode_image(self, image: Tensor) -> Tensor:
        """Encodes images to unit vectors [B, V], the words' logits minus their mean, on which a softmax does not
        depend."""
        return self._unit_logits(self.words(self.image_encoder(image).embedding))

    def encode_text(self, text: Tensor, mask: Tensor) -> Tensor:
        """Encodes texts to unit vectors [B, V], zeros for a text without words."""
        return l2_normalize(self.bag(text, mask))

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": self.image_encoder}

    @full_precision
    def _unit_logits(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        mean = (logits * self.is_word).sum(dim=1, keepdim=True) / self.is_word.sum()
        return l2_normalize((logits - mean) * self.is_word)
