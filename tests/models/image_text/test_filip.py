"""FILIP: its training step by hand, and its similarity in evaluation."""

import math
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

from src import configuration
from src.evaluation.similarity import CustomSimilarity
from src.models.image_text.filip import FILIP
from src.optim import OptimizerRecipe, adamw
from src.train import compose
from tests.models.losses.test_late_interaction import by_loops
from tests.toys import MASK, TEXT, image_text_batch, small_vit, text_tower


def filip(**options) -> FILIP:
    torch.manual_seed(0)
    vit = small_vit()
    return FILIP(vit, text_tower(), OptimizerRecipe(partial(adamw), lr=0.1), **{"embed_dim": 8, **options})


def test_the_training_step_equals_the_papers_formulas():
    method, given = filip(), image_text_batch()
    output = method.training_step(given, 0)
    patches = method.image_encoder.backbone.forward_features(given["image"])[:, 1:]  # without the class token
    image = patches @ method.image_projection.weight.T
    text = method.text_encoder.transformer(input_ids=TEXT).last_hidden_state @ method.text_projection.weight.T
    image, text = (x / x.norm(dim=-1, keepdim=True) for x in (image, text))
    text = text * MASK[:, :, None]
    to_text, to_image = by_loops(image.detach(), text.detach()) / 0.07, by_loops(text.detach(), image.detach()) / 0.07
    for scores in (to_text, to_image):  # texts 0 and 3 are equal
        scores[0, 3] = scores[3, 0] = -math.inf
    labels = torch.arange(4)
    expected = (cross_entropy(to_text, labels) + cross_entropy(to_image, labels)) / 2
    torch.testing.assert_close(output["loss"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output["embedding"], patches.mean(dim=1))
    output["loss"].backward()
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None, name


def test_padding_changes_nothing():
    method = filip().eval()
    given = image_text_batch()
    text = method.encode_text(TEXT, MASK)
    assert torch.equal(text.any(dim=-1), MASK)
    images, text = method.encode_image(given["image"]).detach(), text.detach()
    assert (images.shape, text.shape) == ((4, 4, 8), (4, 6, 8))
    other = TEXT.clone()
    other[~MASK] = 13
    torch.testing.assert_close(method.encode_text(other, MASK), text)
    assert isinstance(method, CustomSimilarity)
    torch.testing.assert_close(method.similarity(images, text), by_loops(images, text))
    torch.testing.assert_close(method.similarity(text, images), by_loops(text, images))
    # positions that are padding in all texts are left out
    torch.testing.assert_close(method.similarity(images, text[1:2]), by_loops(images, text[1:2]))


def test_patches_are_returned_on_their_grid():
    method, image = filip().eval(), image_text_batch()["image"]
    torch.testing.assert_close(method.encode_patches(image).flatten(1, 2), method.encode_image(image))
    assert method.encode_patches(image).shape == (4, 2, 2, 8)


def test_bad_arguments_raise():
    with pytest.raises(ValueError, match=r"model.token_keep_ratio must be above 0"):
        filip(token_keep_ratio=0.0)
    with pytest.raises(ValueError, match=r"data.batch_size: a contrastive loss needs at least 2"):
        filip(token_keep_ratio=0.5).training_step({name: value[:1] for name, value in image_text_batch().items()}, 0)


@pytest.mark.parametrize("scale", ["paper", "tiny"])
def test_the_recipe_composes(scale):
    config = compose(["experiment=filip_vitb32", f"scale={scale}", "run.dir=/tmp/run"])
    view = configuration.instantiate(config.data.train_view)
    images = torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8)
    numbers = torch.rand(2, view.num_uniforms).numpy()
    assert view.from_decoded(images, numbers)["image"].shape == (2, 3, config.image_size, config.image_size)
    if scale == "paper":
        assert config.optimizer.lr == pytest.approx(2e-3 * (40960 / 512) ** 0.5)
        assert (config.model.embed_dim, config.model.token_keep_ratio, config.optimizer.weight_decay) == (
            256,
            0.25,
            3e-3,
        )
    if scale == "tiny":
        method = configuration.instantiate(config.model)
        assert isinstance(method, FILIP)
