"""LiT against numbers of the authors' code.

Made with google-research/big_vision, trainers/proj/image_text/_deprecated_contrastive.py (softmax_loss) and optax.py
(make), commit 0127fb6: four steps in float64 of Adam with a rate of 0.01, a weight decay of 0.01 of kernels that
follows the schedule but is not multiplied by the rate, and a cosine after one step of warm-up. The frozen tower's
features are `by_rule` of 40 + step, those of the text tower 50 + step; the head, a linear layer with bias, is `by_rule`
of 1 and 2; the logarithm of the logit scale starts at 5 and is not limited. Their 1e-8 beside norms is left out, and
the schedule is computed in float64.
"""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from src.models.image_text.clip import CLIP
from src.models.text.text_tower import TextFeatures, TextTower
from src.optim import OptimizerRecipe, adamw
from src.schedules import WarmupCosine
from tests.fidelity.rules import by_rule
from tests.fidelity.runs import run

LOSSES = [71.12318920278292, 65.9921380375142, 55.136936244772535, 45.73308550348491]
SQUARES = [10.910902402239795, 16.52002271140987, 24.80252358650996]  # kernel, bias, logit scale


class Given(nn.Module):
    """A frozen image tower whose features are given as a map of one position."""

    num_features = 16

    def forward_features(self, image: Tensor) -> Tensor:
        return image


class GivenText(TextTower):
    """A text tower whose features are given as the text."""

    def __init__(self) -> None:
        super().__init__(vocabulary=1, length=16, dim=16)

    def encode(self, text: Tensor, mask: Tensor) -> TextFeatures:
        return TextFeatures(text, text[:, None])


def batch(step: int) -> dict[str, Tensor]:
    rows = torch.arange(4)
    image, text = by_rule((4, 16), 40 + step, 1.0)[:, :, None, None], by_rule((4, 16), 50 + step, 1.0)
    return {"image": image, "text": text, "text_mask": text != 0, "label": rows, "index": rows, "replaced": rows < 0}


def test_four_steps_are_the_authors():
    recipe = OptimizerRecipe(partial(adamw, betas=(0.9, 0.999)), lr=0.01, weight_decay=0.01 / 0.01)
    method = CLIP(
        Given(),
        GivenText(),
        recipe,
        embed_dim=None,
        project_image=False,
        projection_bias=True,
        max_logit_scale=None,
        mask_equal_texts=False,
        freeze_image=True,
    ).double()
    head = method.text_projection
    head.weight.data.copy_(by_rule((16, 16), 1).T)  # Flax multiplies from the left
    head.bias.data.copy_(by_rule((16,), 2) + 1)
    method.logit_scale.data.fill_(5.0)
    schedule = WarmupCosine(peak=0.01, warmup="1 steps")
    losses = run(method, [batch(step) for step in range(4)], {"optimizer": {"lr": schedule}}, epochs=1)
    assert losses == pytest.approx(LOSSES, rel=1e-12)
    squares = [p.detach().pow(2).sum().item() for p in (head.weight, head.bias, method.logit_scale)]
    assert squares == pytest.approx(SQUARES, rel=1e-12)
