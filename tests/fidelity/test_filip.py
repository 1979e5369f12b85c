"""FILIP's loss against numbers of DeCLIP's re-implementation; its authors published no code.

Made with Sense-GVT/DeCLIP, prototype/model/filip.py (get_weighted_dense_logits, all tokens kept) and ClipInfoCELoss,
commit 5d99a85: three steps in float64 of AdamW (rate 0.05, weight decay 0.01 of everything) on six tokens of four
images and of four texts, `by_rule` of numbers 1 and 2; the logit scale starts at 2. It has no padding.
"""

import pytest
import torch
from torch import nn

from src.models.functional import l2_normalize
from src.models.losses.late_interaction import late_interaction_loss
from tests.fidelity.rules import by_rule

LOSSES = [2.027144190191114, 1.680089808937002, 1.465443295443142]
SQUARES = [98.66770665082038, 99.85584359382977, 3.4600546628499598]  # image tokens, text tokens, logit scale


def test_three_steps_are_those_of_declip():
    leaves = [nn.Parameter(by_rule((4, 6, 8), number, 1.0)) for number in (1, 2)]
    leaves.append(nn.Parameter(torch.tensor(2.0, dtype=torch.float64)))
    optimizer = torch.optim.AdamW(leaves, lr=0.05, weight_decay=0.01)
    losses = []
    for _ in range(3):
        image, text = l2_normalize(leaves[0]), l2_normalize(leaves[1])
        loss = late_interaction_loss(image, text, image, text, 0, logit_scale=leaves[2].exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(LOSSES, rel=1e-12)
    assert [leaf.detach().pow(2).sum().item() for leaf in leaves] == pytest.approx(SQUARES, rel=1e-12)
