"""CUA's and CUAXU's losses against numbers of the authors' code.

Made with abrar-fahim/contrastive-gap, clips/hf_clip.py (HFClip.forward) and src/my_ce_loss.py, commit 8c1a17b, in
float64: temperature 0.01, both directions weighted by one half, alignment and uniformity, without and with uniformity
across modalities. The embeddings are sin(40 * `by_rule`), numbers 1 of images and 2 of texts, in place of their
encoders. Of each the loss and the squared norms of the gradients of both embeddings.
"""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from src.models.image_text.cua import CUA
from src.optim import OptimizerRecipe
from tests.fidelity.rules import by_rule
from tests.toys import small_vit, text_tower

NUMBERS = {
    0.0: [2.081503212297178, 90.78636083560836, 97.17227085360396],
    1.0: [-1.4104942358397778, 93.36133867390429, 99.27297081742692],
}


@pytest.mark.parametrize("cross", NUMBERS)
def test_the_loss_is_the_authors(cross):
    recipe = OptimizerRecipe(partial(torch.optim.SGD), lr=0.1)
    method = CUA(small_vit(), text_tower(), recipe, embed_dim=6, cross_uniformity_weight=cross).double()
    method.logit_scale.data.fill_(torch.tensor(100.0).double().log().item())
    image, text = (torch.sin(40 * by_rule((5, 6), number)).requires_grad_() for number in (1, 2))
    loss, _ = method.loss(F.normalize(image, dim=1), F.normalize(text, dim=1), None)
    loss.backward()
    found = [loss.item(), *(x.grad.pow(2).sum().item() for x in (image, text))]
    assert found == pytest.approx(NUMBERS[cross], rel=1e-12)
