from functools import partial

import pytest
import torch
from torch import nn

from src.models.heads.mlp import MlpHead

plain = partial(nn.BatchNorm1d, affine=False)


def described(head: MlpHead) -> list[str]:
    """The layers in the order in which they are applied."""
    words = []
    for layer in head.layers:
        if isinstance(layer, nn.Linear):
            words.append(f"{layer.in_features}-{layer.out_features}{'' if layer.bias is None else '+b'}")
        elif isinstance(layer, nn.BatchNorm1d):
            words.append("bn" if layer.affine else "bn-plain")
        else:
            words.append(type(layer).__name__.lower())
    return words


@pytest.mark.parametrize(
    ("head", "layers"),
    [
        (MlpHead((6, 6, 4), last_bias=False, last_norm=nn.BatchNorm1d), ["6-6", "bn", "relu", "6-4", "bn"]),
        (MlpHead((6, 6, 4), hidden_norm=None), ["6-6+b", "relu", "6-4+b"]),
        (
            MlpHead((6, 9, 9, 4), last_bias=False, last_norm=plain),
            ["6-9", "bn", "relu", "9-9", "bn", "relu", "9-4", "bn-plain"],
        ),
        (MlpHead((6, 9, 4), hidden_bias=True), ["6-9+b", "bn", "relu", "9-4+b"]),
        (MlpHead((6, 4)), ["6-4+b"]),
        (MlpHead((6, 9, 4), activation=nn.GELU, hidden_norm=nn.LayerNorm), ["6-9", "layernorm", "gelu", "9-4+b"]),
    ],
    ids=["simclr", "moco", "moco v3", "byol", "linear", "gelu"],
)
def test_the_heads_of_the_papers(head, layers):
    assert described(head) == layers


def test_it_applies_its_layers_in_order():
    head = MlpHead((2, 2, 1), hidden_norm=None)
    with torch.no_grad():
        head.layers[0].weight.copy_(torch.tensor([[1.0, -1.0], [2.0, 0.0]]))
        head.layers[0].bias.copy_(torch.tensor([0.0, -1.0]))
        head.layers[2].weight.copy_(torch.tensor([[3.0, 5.0]]))
        head.layers[2].bias.copy_(torch.tensor([7.0]))
    # (1, 4): hidden (-3, 1) -> relu (0, 1) -> 5 + 7
    assert head(torch.tensor([[1.0, 4.0]])).item() == 12.0


@pytest.mark.parametrize("dims", [(), (4,), (4, 0)])
def test_widths_that_make_no_head_are_refused(dims):
    with pytest.raises(ValueError, match="dims"):
        MlpHead(dims)
