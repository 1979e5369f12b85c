"""DreamLIP's losses against numbers of the authors' code; they published no training code.

Made with zyf0619sjtu/DreamLIP, open_clip/loss.py (ClipLoss with use_declip_loss and use_finegrained_loss), commit
d2aeea8, in float64 on one process: scales 7 and 5, unit vectors along sin(40 * `by_rule`), numbers 1 of images, 2 of
texts and 3 of patches. Their loss of groups takes the texts of several images in another order than the images, so that
it is compared where this has no effect: one image with four texts, which is the paper's loss within an image, and five
images with one text each. Of each the loss and the squared norms of the gradients.
"""

import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from src.models.image_text.dreamlip import DreamLIP
from src.optim import OptimizerRecipe
from tests.fidelity.rules import by_rule
from tests.toys import small_vit, text_tower

# images, texts, threshold, within an image -> loss, squared norms of the gradients of texts and patches
GROUPING = [
    (1, 4, 0.1, True, 1.07749921487716, [1.243496356123508, 0.6706098188267869]),
    (1, 4, None, True, 1.0424514050010423, [0.7495286790847915, 0.46180971932762754]),
    (5, 1, 0.3, False, 1.3693077942489031, [1.1073505992130046, 0.19165125931138421]),
]


def leaf(shape: tuple[int, ...], number: int) -> torch.Tensor:
    return torch.sin(40 * by_rule(shape, number)).requires_grad_()


def unit(x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x, dim=-1)


def dreamlip(**options) -> DreamLIP:
    recipe = OptimizerRecipe(partial(torch.optim.SGD), lr=0.1)
    method = DreamLIP(small_vit(), text_tower(), recipe, embed_dim=6, **options).double()
    method.logit_scale.data.fill_(math.log(7))
    method.local_logit_scale.data.fill_(math.log(5))
    return method


def test_the_loss_of_several_texts_is_the_authors():
    image, texts = leaf((5, 6), 1), leaf((5, 3, 6), 2)
    loss = dreamlip().multi_positive_loss(unit(image), unit(texts), torch.arange(15).view(5, 3))
    loss.backward()
    found = [loss.item(), *(one.grad.pow(2).sum().item() for one in (image, texts))]
    assert found == pytest.approx([2.987224308209648, 0.5280062623921884, 0.8662221068618867], rel=1e-12)


@pytest.mark.parametrize(("images", "count", "threshold", "within", "expected", "gradients"), GROUPING)
def test_the_loss_of_groups_is_the_authors(images, count, threshold, within, expected, gradients):
    texts, patches = leaf((images, count, 6), 2), leaf((images, 7, 6), 3)
    method = dreamlip(threshold=threshold, within_image=within)
    loss = method.grouping_loss(unit(texts), unit(patches), torch.arange(images * count).view(images, count))
    loss.backward()
    found = [loss.item(), *(one.grad.pow(2).sum().item() for one in (texts, patches))]
    assert found == pytest.approx([expected, *gradients], rel=1e-12)
