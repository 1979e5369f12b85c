"""The text transformers of CLIP, SigLIP and ALIGN, built by transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel, SiglipTextConfig, SiglipTextModel

from src.errors import SettingError


@dataclass(frozen=True)
class TextFeatures:
    """What a text tower says of a batch of texts."""

    embedding: Tensor  # [B, D], one vector a text
    tokens: Tensor  # [B, L, D], one vector a token, filling included


class Tower(nn.Module, ABC):
    """Texts to features.

    Args:
        vocabulary: token ids there may be.
        length: tokens of a text at most.
        dim: D, width of the features.
    """

    def __init__(self, *, vocabulary: int, length: int, dim: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.length = length
        self.dim = dim

    def forward(self, text: Tensor, mask: Tensor) -> TextFeatures:
        """Token ids [B, L] and which are no filling, bool [B, L]; filling stands at the end.

        Raises:
            SettingError: a text is longer than ``length``.
        """
        if text.shape[1] > self.length:
            raise SettingError(
                f"data.text_length, model.text: texts of {text.shape[1]} tokens do not fit a tower of {self.length}"
            )
        return self.read(text, mask)

    @abstractmethod
    def read(self, text: Tensor, mask: Tensor) -> TextFeatures: ...


class TextTower(Tower):
    """CLIP's (Radford et al., 2021): causal, the feature of a text stands at its last token; begun as the authors do.

    Args:
        vocabulary, length: see `Tower`.
        width, depth, heads: of the transformer.
    """

    def __init__(self, *, vocabulary: int, length: int, width: int = 512, depth: int = 12, heads: int = 8) -> None:
        super().__init__(vocabulary=vocabulary, length=length, dim=width)
        config = CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            max_position_embeddings=length,
            hidden_act="gelu",
            # read by transformers alone, where it looks for a text's end; here the mask says where that is
            bos_token_id=0,
            eos_token_id=1,
        )
        self.transformer = CLIPTextModel(config)
        self._initialise(width, depth)

    def read(self, text: Tensor, mask: Tensor) -> TextFeatures:
        tokens = self.transformer(input_ids=text).last_hidden_state
        last = mask.sum(dim=1) - 1
        return TextFeatures(tokens[torch.arange(len(tokens), device=tokens.device), last], tokens)

    @torch.no_grad()
    def _initialise(self, width: int, depth: int) -> None:
        """The released code's: transformers has the two attention scales the other way round."""
        within, out = width**-0.5, width**-0.5 * (2 * depth) ** -0.5
        scales = {
            "token_embedding.weight": 0.02,
            "position_embedding.weight": 0.01,
            "q_proj.weight": within,
            "k_proj.weight": within,
            "v_proj.weight": within,
            "out_proj.weight": out,
            "fc1.weight": (2 * width) ** -0.5,
            "fc2.weight": out,
        }
        for name, parameter in self.transformer.named_parameters():
            scale = next((scale for end, scale in scales.items() if name.endswith(end)), None)
            if scale is not None:
                nn.init.normal_(parameter, std=scale)


class SigmoidTextTower(Tower):
    """SigLIP's (Zhai et al., 2023): every token sees every other, filling included, and a linear layer on the last
    place, which is mostly filling, makes the feature.

    Args:
        vocabulary, length: see `Tower`; texts are filled up to ``length``.
        width, depth, heads: of the transformer.
        embed_dim: width of the feature.
    """

    def __init__(
        self, *, vocabulary: int, length: int, width: int = 768, depth: int = 12, heads: int = 12, embed_dim: int = 768
    ) -> None:
        super().__init__(vocabulary=vocabulary, length=length, dim=embed_dim)
        config = SiglipTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            max_position_embeddings=length,
            projection_size=embed_dim,
            bos_token_id=0,
            eos_token_id=1,
        )
        self.transformer = SiglipTextModel(config)

    def read(self, text: Tensor, mask: Tensor) -> TextFeatures:
        found = self.transformer(input_ids=text)
        return TextFeatures(found.pooler_output, found.last_hidden_state)


class BertTower(Tower):
    """ALIGN's (Jia et al., 2021): a BERT from scratch; a linear layer on the text's first token makes the feature.

    Args:
        vocabulary, length: see `Tower`.
        width, depth, heads: of the transformer.
        embed_dim: width of the feature.
        dropout: within the transformer, BERT's own.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        length: int,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        embed_dim: int = 768,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(vocabulary=vocabulary, length=length, dim=embed_dim)
        config = BertConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            max_position_embeddings=length,
            type_vocab_size=1,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            pad_token_id=None,  # the mask says what is filling
        )
        self.transformer = BertModel(config, add_pooling_layer=False)
        self.feature = nn.Linear(width, embed_dim)

    def read(self, text: Tensor, mask: Tensor) -> TextFeatures:
        tokens = self.transformer(input_ids=text, attention_mask=mask).last_hidden_state
        return TextFeatures(self.feature(tokens[:, 0]), tokens)
