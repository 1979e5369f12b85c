"""CoCa's loss against numbers of open_clip; its authors published no code, and open_clip's network is another one.

Made with mlfoundations/open_clip, src/open_clip/loss.py (CoCaLoss, weights 1 and 2), commit 89fb801: three steps in
float64 of AdamW (rate 0.05, weight decay 0.01 of everything) on the image vectors, text vectors and logits of four
captions, which are `by_rule` of numbers 1 to 3 and of length 1 before the loss; the logit scale starts at 2.
"""

import pytest
import torch
from torch import nn

from src.models.functional import l2_normalize
from src.models.losses.captioning import captioning_loss
from src.models.losses.image_text import clip_loss
from tests.fidelity.rules import by_rule
from tests.fidelity.towers import TEXT

LOSSES = [11.713778498189797, 10.861148963669255, 10.06306417842599]
# image vectors, text vectors, logits, logit scale
SQUARES = [17.19148076335073, 16.680130507901335, 203.8973044020443, 3.41661038291264]


def test_three_steps_are_those_of_open_clip():
    leaves = [nn.Parameter(by_rule(shape, n, 1.0)) for n, shape in enumerate([(4, 8), (4, 8), (4, 5, 20)], start=1)]
    leaves.append(nn.Parameter(torch.tensor(2.0, dtype=torch.float64)))
    optimizer = torch.optim.AdamW(leaves, lr=0.05, weight_decay=0.01)
    mask, losses = TEXT != 0, []
    for _ in range(3):
        image, text = l2_normalize(leaves[0]), l2_normalize(leaves[1])
        contrastive = clip_loss(image, text, image, text, 0, logit_scale=leaves[3].exp())
        loss = contrastive + 2 * captioning_loss(leaves[2], TEXT, mask, mask[:, 1:].sum())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(LOSSES, rel=1e-12)
    assert [leaf.detach().pow(2).sum().item() for leaf in leaves] == pytest.approx(SQUARES, rel=1e-12)
