"""The text transformers of CLIP and SigLIP, and any other that transformers knows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    CLIPTextConfig,
    CLIPTextModel,
    SiglipTextConfig,
    SiglipTextModel,
)

from src.errors import SettingError, nearest


@dataclass(frozen=True)
class TextFeatures:
    """What a text tower says of a batch of texts."""

    embedding: Tensor  # [B, D], one vector a text
    tokens: Tensor  # [B, L, D], one vector a token, padding included


TextPool = Callable[[Tensor, Tensor], Tensor]


def first_token(tokens: Tensor, mask: Tensor) -> Tensor:
    """BERT's: [B, L, D], [B, L] -> [B, D]."""
    return tokens[:, 0]


def last_token(tokens: Tensor, mask: Tensor) -> Tensor:
    """The last one that is no padding, CLIP's: [B, L, D], [B, L] -> [B, D]."""
    return tokens[torch.arange(len(tokens), device=tokens.device), mask.sum(dim=1) - 1]


def mean_token(tokens: Tensor, mask: Tensor) -> Tensor:
    """The mean of all that are no padding, as T5 and sentence encoders are read: [B, L, D], [B, L] -> [B, D]."""
    weight = mask.to(tokens.dtype)
    return torch.einsum("bld,bl->bd", tokens, weight) / weight.sum(dim=1, keepdim=True)


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
        """Token ids [B, L] and which are no padding, bool [B, L]; padding stands at the end.

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
        activation: as transformers names it; OpenAI's weights were trained with "quick_gelu".
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        length: int,
        width: int = 512,
        depth: int = 12,
        heads: int = 8,
        activation: str = "gelu",
    ) -> None:
        super().__init__(vocabulary=vocabulary, length=length, dim=width)
        sizes = _sizes(vocabulary, length, width, depth, heads)
        self.transformer = CLIPTextModel(CLIPTextConfig(hidden_act=activation, **sizes))
        self._initialize(width, depth)

    def read(self, text: Tensor, mask: Tensor) -> TextFeatures:
        tokens = self.transformer(input_ids=text).last_hidden_state
        return TextFeatures(last_token(tokens, mask), tokens)

    @torch.no_grad()
    def _initialize(self, width: int, depth: int) -> None:
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


def _sizes(vocabulary: int, length: int, width: int, depth: int, heads: int) -> dict[str, Any]:
    """As transformers calls them."""
    return {
        "vocab_size": vocabulary,
        "max_position_embeddings": length,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        # read by transformers alone, where it looks for a text's end; here the mask says where that is
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


class SigmoidTextTower(Tower):
    """SigLIP's (Zhai et al., 2023): every token sees every other, padding included, and a linear layer on the last
    place, which is mostly padding, makes the feature.

    Args:
        vocabulary, length: see `Tower`; texts are filled up to ``length``.
        width, depth, heads: of the transformer.
        embed_dim: width of the feature.
    """

    def __init__(
        self, *, vocabulary: int, length: int, width: int = 768, depth: int = 12, heads: int = 12, embed_dim: int = 768
    ) -> None:
        super().__init__(vocabulary=vocabulary, length=length, dim=embed_dim)
        sizes = _sizes(vocabulary, length, width, depth, heads)
        self.transformer = SiglipTextModel(SiglipTextConfig(projection_size=embed_dim, **sizes))

    def read(self, text: Tensor, mask: Tensor) -> TextFeatures:
        found = self.transformer(input_ids=text)
        return TextFeatures(found.pooler_output, found.last_hidden_state)


class TransformersTower(Tower):
    """Any text encoder of transformers, such as BERT (Devlin et al., 2019), with weights as created.

    Its architecture is said in full, so that a run can be evaluated where what it started from is no longer there;
    `text_weights.pretrained` fills it from a model of the same architecture.

    Args:
        architecture: ``model_type`` and what differs from that type's defaults, as a ``config.json`` has them.
        vocabulary, length: see `Tower`.
        pool: what of the tokens is the text's feature.

    Raises:
        SettingError: transformers knows no such architecture, or it has no place for ``length`` tokens.
    """

    def __init__(
        self, architecture: Mapping[str, Any], *, vocabulary: int, length: int, pool: TextPool = first_token
    ) -> None:
        options = {**architecture, "vocab_size": vocabulary}
        kind = str(options.pop("model_type", ""))
        if kind not in CONFIG_MAPPING:
            near = nearest(kind, list(CONFIG_MAPPING))
            raise SettingError(f"model.text.architecture: transformers knows no model_type '{kind}'{near}")
        config = AutoConfig.for_model(kind, **options)
        # of what reads and writes (T5) the half that reads
        reads = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
        model_class: Any = (MODEL_FOR_TEXT_ENCODING_MAPPING if reads else MODEL_MAPPING)[type(config)]
        # an unused layer would have no gradient, which DDP takes for a mistake
        unpooled = {"add_pooling_layer": False} if "add_pooling_layer" in signature(model_class).parameters else {}
        try:
            transformer = model_class(config, **unpooled)
        except (ValueError, KeyError, TypeError) as problem:
            raise SettingError(f"model.text.architecture: {problem}") from problem
        places = getattr(config, "max_position_embeddings", None)
        if places is not None and places < length:
            raise SettingError(f"data.text_length={length}: this text tower has places for {places} tokens")
        super().__init__(vocabulary=vocabulary, length=length, dim=int(config.hidden_size))
        self.transformer = transformer
        self.pool = pool

    def read(self, text: Tensor, mask: Tensor) -> TextFeatures:
        tokens = self.transformer(input_ids=text, attention_mask=mask.long()).last_hidden_state
        return TextFeatures(self.pool(tokens, mask), tokens)
