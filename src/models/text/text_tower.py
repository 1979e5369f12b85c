"""Text towers: the text transformers of CLIP and SigLIP, and any text encoder of the transformers library."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from timm.layers import lecun_normal_
from torch import Tensor, nn

from src.errors import SettingError, nearest
from src.models.layers.initialization import initialize_as_big_vision


@dataclass(frozen=True)
class TextFeatures:
    """The output of a text tower."""

    embedding: Tensor  # [B, D], one vector a text
    tokens: Tensor  # [B, L, D], one vector a token, padding included


TextPool = Callable[[Tensor, Tensor], Tensor]
"""(tokens [B, L, D], padding mask [B, L], False for padding) -> [B, D]."""


def first_token(tokens: Tensor, mask: Tensor) -> Tensor:
    """Returns the first token, BERT's class token: [B, L, D], [B, L] -> [B, D]."""
    return tokens[:, 0]


def last_token(tokens: Tensor, mask: Tensor) -> Tensor:
    """Returns the last token before the padding, as CLIP does: [B, L, D], [B, L] -> [B, D]."""
    return tokens[torch.arange(len(tokens), device=tokens.device), mask.sum(dim=1) - 1]


def mean_token(tokens: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean of the tokens without padding, as for T5 and sentence encoders: [B, L, D], [B, L] -> [B, D]."""
    weight = mask.to(tokens.dtype)
    return torch.einsum("bld,bl->bd", tokens, weight) / weight.sum(dim=1, keepdim=True)


class TextTower(nn.Module, ABC):
    """Base class of networks that turn token ids into features.

    Args:
        vocabulary: number of token ids.
        length: greatest number of tokens in a text.
        dim: D, width of the features.
    """

    def __init__(self, *, vocabulary: int, length: int, dim: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.length = length
        self.dim = dim

    def forward(self, text: Tensor, mask: Tensor) -> TextFeatures:
        """
        Args:
            text: token ids int64 [B, L], padded at the end.
            mask: bool [B, L], False for padding.

        Raises:
            SettingError: the texts have more than ``length`` tokens.
        """
        if text.shape[1] > self.length:
            raise SettingError(
                f"data.text_length, model.text: texts of {text.shape[1]} tokens do not fit a tower of {self.length}"
            )
        return self.encode(text, mask)

    @abstractmethod
    def encode(self, text: Tensor, mask: Tensor) -> TextFeatures: ...


class CLIPTextTower(TextTower):
    """CLIP's text transformer (Radford et al., 2021): causal attention, the feature is the last token, weights
    initialized as in the authors' code.

    Args:
        vocabulary, length: see `TextTower`.
        width, depth, heads: of the transformer.
        activation: name of the activation in transformers; OpenAI's weights need "quick_gelu".
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
        from transformers import CLIPTextConfig, CLIPTextModel

        super().__init__(vocabulary=vocabulary, length=length, dim=width)
        sizes = _sizes(vocabulary, length, width, depth, heads)
        self.transformer = CLIPTextModel(CLIPTextConfig(hidden_act=activation, **sizes))
        self._initialize(width, depth)

    def encode(self, text: Tensor, mask: Tensor) -> TextFeatures:
        tokens = self.transformer(input_ids=text).last_hidden_state
        return TextFeatures(last_token(tokens, mask), tokens)

    @torch.no_grad()
    def _initialize(self, width: int, depth: int) -> None:
        """Initializes as the released code does; transformers swaps the two standard deviations of attention, and sets
        the biases of the MLP to zero, which are uniform there."""
        std, residual_std = width**-0.5, width**-0.5 * (2 * depth) ** -0.5
        std_by_suffix = {
            "token_embedding.weight": 0.02,
            "position_embedding.weight": 0.01,
            "q_proj.weight": std,
            "k_proj.weight": std,
            "v_proj.weight": std,
            "out_proj.weight": residual_std,
            "fc1.weight": (2 * width) ** -0.5,
            "fc2.weight": residual_std,
        }
        for name, parameter in self.transformer.named_parameters():
            for suffix, value in std_by_suffix.items():
                if name.endswith(suffix):
                    nn.init.normal_(parameter, std=value)
        for name, layer in self.transformer.named_modules():
            if name.endswith(("mlp.fc1", "mlp.fc2")):
                limit = layer.in_features**-0.5
                nn.init.uniform_(layer.bias, -limit, limit)


class SigLIPTextTower(TextTower):
    """SigLIP's text transformer (Zhai et al., 2023): attention in both directions, padding included; the feature is a
    linear layer on the token at the last position, which is usually padding. Weights are initialized as in big_vision,
    the authors' code.

    Args:
        vocabulary, length: see `TextTower`; texts are padded to ``length``.
        width, depth, heads: of the transformer.
        embed_dim: width of the feature.
    """

    def __init__(
        self, *, vocabulary: int, length: int, width: int = 768, depth: int = 12, heads: int = 12, embed_dim: int = 768
    ) -> None:
        from transformers import SiglipTextConfig, SiglipTextModel

        super().__init__(vocabulary=vocabulary, length=length, dim=embed_dim)
        sizes = _sizes(vocabulary, length, width, depth, heads)
        self.transformer = SiglipTextModel(SiglipTextConfig(projection_size=embed_dim, **sizes))
        self._initialize(width)

    def encode(self, text: Tensor, mask: Tensor) -> TextFeatures:
        output = self.transformer(input_ids=text)
        return TextFeatures(output.pooler_output, output.last_hidden_state)

    @torch.no_grad()
    def _initialize(self, width: int) -> None:
        for name, layer in self.transformer.named_modules():
            if isinstance(layer, nn.Embedding):  # of tokens and of positions
                nn.init.normal_(layer.weight, std=width**-0.5)
            elif name.endswith("self_attn"):
                attention = [(getattr(layer, f"{part}_proj"), 1) for part in ("q", "k", "v", "out")]
                initialize_as_big_vision(attention=attention, mlp=[])
            elif name.endswith("mlp"):
                initialize_as_big_vision(attention=[], mlp=[layer.fc1, layer.fc2])
            elif name.endswith("head"):
                lecun_normal_(layer.weight)
                nn.init.zeros_(layer.bias)


class TransformersTextTower(TextTower):
    """Any text encoder of the transformers library, such as BERT (Devlin et al., 2019), with random weights.

    The architecture is given in full, so that a run can be evaluated where its initial weights are no longer available.
    `load_text_weights` loads the weights of a pretrained model with the same architecture.

    Args:
        architecture: ``model_type`` and the values that differ from that type's defaults, named as in a
            ``config.json``.
        vocabulary, length: see `TextTower`.
        pool: turns the tokens into the text's feature.

    Raises:
        SettingError: transformers has no such architecture, or it has fewer than ``length`` positions.
    """

    def __init__(
        self, architecture: Mapping[str, Any], *, vocabulary: int, length: int, pool: TextPool = first_token
    ) -> None:
        from transformers import CONFIG_MAPPING, MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING, AutoConfig

        options = {**architecture, "vocab_size": vocabulary}
        model_type = str(options.pop("model_type", ""))
        if model_type not in CONFIG_MAPPING:
            suggestion = nearest(model_type, list(CONFIG_MAPPING))
            raise SettingError(f"model.text.architecture: transformers has no model_type '{model_type}'{suggestion}")
        config = AutoConfig.for_model(model_type, **options)
        # encoder-decoder models such as T5 have an encoder class of their own
        has_encoder_class = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
        model_class: Any = (MODEL_FOR_TEXT_ENCODING_MAPPING if has_encoder_class else MODEL_MAPPING)[type(config)]
        # DDP reports parameters without a gradient as an error, such as those of an unused pooling layer
        unpooled = {"add_pooling_layer": False} if "add_pooling_layer" in signature(model_class).parameters else {}
        try:
            transformer = model_class(config, **unpooled)
        except (ValueError, KeyError, TypeError) as problem:
            raise SettingError(f"model.text.architecture: {problem}") from problem
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and positions < length:
            raise SettingError(f"data.text_length={length}: this text tower has {positions} positions for tokens")
        super().__init__(vocabulary=vocabulary, length=length, dim=int(config.hidden_size))
        self.transformer = transformer
        self.pool = pool

    def encode(self, text: Tensor, mask: Tensor) -> TextFeatures:
        tokens = self.transformer(input_ids=text, attention_mask=mask.long()).last_hidden_state
        return TextFeatures(self.pool(tokens, mask), tokens)


def _sizes(vocabulary: int, length: int, width: int, depth: int, heads: int) -> dict[str, Any]:
    """Returns the sizes of a text transformer under their names in transformers.

    Raises:
        SettingError: one of them is less than 1.
    """
    given = {"vocabulary": vocabulary, "length": length, "width": width, "depth": depth, "heads": heads}
    for name, number in given.items():
        if number < 1:
            raise SettingError(f"model.text.{name} must be at least 1, got {number}")
    return {
        "vocab_size": vocabulary,
        "max_position_embeddings": length,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        # transformers alone uses these to find the end of a text; the towers here use the padding mask
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
