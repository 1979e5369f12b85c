"""Projectors and predictors: multi-layer perceptrons between encoder and loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from src.errors import SettingError


class MlpHead(nn.Module):
    """A projector (projection head) or predictor: linear layers, with a norm and an activation after each but the last.

    The heads of the papers, on features of width ``d`` (``plain = partial(nn.BatchNorm1d, affine=False)``):

    ==================  =======================================================================================
    SimCLR              ``MlpHead((d, d, 128), last_bias=False, last_norm=batch_norm_without_shift)``
    MoCo v2, MoCHi      ``MlpHead((d, d, 128), hidden_norm=None)``; so have DenseCL (both), SupCon and LOOK
    MoCo v3 projector   ``MlpHead((d, 4096, 4096, 256), last_bias=False, last_norm=plain)``; ResNet: one 4096 less
    MoCo v3 predictor   ``MlpHead((256, 4096, 256), last_bias=False, last_norm=plain)``; ResNet: no last norm
    SimSiam projector   ``MlpHead((d, d, d, 2048), last_bias=False, last_norm=plain)``
    SimSiam predictor   ``MlpHead((2048, 512, 2048))``
    BYOL, both          ``MlpHead((d, 4096, 256), hidden_bias=True, last_bias=False)``
    NNCLR projector     ``MlpHead((d, 2048, 2048, 256), hidden_bias=True, last_norm=nn.BatchNorm1d)``
    NNCLR predictor     ``MlpHead((256, 4096, 256), hidden_bias=True)``
    PixPro, all         ``MlpHead((d, 4096, 256), hidden_bias=True)``
    Barlow Twins        ``MlpHead((d, 8192, 8192, 8192), last_bias=False)``, its norm on z being ``plain(8192)``
    VICReg              ``MlpHead((d, 8192, 8192, 8192), hidden_bias=True, last_bias=False)``
    SwAV                ``MlpHead((d, d, 128), hidden_bias=True)``
    ==================  =======================================================================================

    Args:
        dims: widths from the input to the output; two make a single linear layer.
        hidden_norm: builds the norm after each hidden layer from its width; None for no norm.
        hidden_bias: biases of the hidden linear layers. None for biases only without a norm, which cancels them.
        activation: builds the activation after each hidden layer.
        last_bias: bias of the last linear layer.
        last_norm: builds the norm after the last layer from its width; None for no norm.

    Raises:
        SettingError: fewer than two widths, or one that is not positive.
    """

    def __init__(
        self,
        dims: Sequence[int],
        *,
        hidden_norm: Callable[[int], nn.Module] | None = nn.BatchNorm1d,
        hidden_bias: bool | None = None,
        activation: Callable[[], nn.Module] = nn.ReLU,
        last_bias: bool = True,
        last_norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if len(dims) < 2 or min(dims) < 1:
            raise SettingError(
                f"model: a projector's dims={list(dims)} must be an input and an output width at least, all positive"
            )
        layers: list[nn.Module] = []
        for width_in, width in pairwise(dims[:-1]):
            layers.append(nn.Linear(width_in, width, bias=hidden_norm is None if hidden_bias is None else hidden_bias))
            if hidden_norm is not None:
                layers.append(hidden_norm(width))
            layers.append(activation())
        layers.append(nn.Linear(dims[-2], dims[-1], bias=last_bias))
        if last_norm is not None:
            layers.append(last_norm(dims[-1]))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """[B, dims[0]] -> [B, dims[-1]]."""
        return self.layers(x)


def batch_norm_without_shift(dim: int) -> nn.BatchNorm1d:
    """A batch norm with a learned scale, whose shift stays 0 (SimCLR's output, ``center=False`` in the authors' code).

    The shift is a frozen parameter rather than None, which torch's synchronized batch norm does not take.
    """
    norm = nn.BatchNorm1d(dim)
    norm.bias.requires_grad_(False)
    return norm
