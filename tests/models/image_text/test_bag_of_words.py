"""Bag of words: its loss, and zero-shot classification by the words of class names."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from src import configuration
from src.claims.claim import load
from src.evaluation.image_text import TwoTowers
from src.evaluation.zero_shot import classifier
from src.models.image_text.bag_of_words import BagOfWords
from src.models.losses.image_text import bag_of_words_loss
from src.optim import OptimizerRecipe, adamw
from src.train import compose
from tests.toys import MASK, TEXT, image_text_batch, small_vit


def method(**options) -> BagOfWords:
    torch.manual_seed(0)
    vit = small_vit()
    recipe = OptimizerRecipe(partial(adamw, betas=(0.9, 0.98)), lr=0.1, weight_decay=0.2)
    return BagOfWords(vit, recipe, **{"vocabulary": 20, **options})


def test_a_bag_has_each_word_once_and_no_special_tokens():
    bag = method().bag(
        torch.tensor([[2, 7, 7, 8, 1, 0], [2, 1, 0, 0, 0, 0]]), torch.tensor([[1] * 5 + [0], [1] * 2 + [0] * 4]).bool()
    )
    assert bag.nonzero().tolist() == [[0, 7], [0, 8]]
    assert bag.unique().tolist() == [0, 1]
    # padding is left out, whatever its id
    padded = method(special_tokens=(1, 2)).bag(
        torch.tensor([[2, 7, 1, 9, 9, 9]]), torch.tensor([[True] * 3 + [False] * 3])
    )
    assert padded.nonzero().tolist() == [[0, 7]]


def test_the_loss_by_hand():
    logits = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0], [5.0, 1.0, 2.0]], requires_grad=True)
    words = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    total = torch.tensor([1.0, 2.0, 0.0]).exp().sum().log().item()
    loss = bag_of_words_loss(logits, words)
    assert loss.item() == pytest.approx(((total - 1.5) + torch.tensor(3.0).log().item() + 0) / 3)
    loss.backward()
    assert logits.grad[2].abs().max() == 0  # a text without a word
    # parts of a batch on two processes: the mean of their losses is the whole's
    rows = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    bags = (torch.rand(6, 9, generator=torch.Generator().manual_seed(1)) < 0.4).float()
    halves = [bag_of_words_loss(a, b) for a, b in zip(rows.split(3), bags.split(3), strict=True)]
    torch.testing.assert_close(bag_of_words_loss(rows, bags), sum(halves) / 2)


def test_the_training_step_is_a_softmax_over_words():
    bag_of_words, given = method(), image_text_batch()
    output = bag_of_words.training_step(given, 0)
    features = bag_of_words.image_encoder(given["image"]).embedding
    log_p = F.log_softmax(features @ bag_of_words.words.weight.T + bag_of_words.words.bias, dim=1)
    words_of_texts = [[7, 8], [9], [7, 8, 9, 5], [7, 8]]  # TEXT without start, end and padding
    expected = sum(-log_p[row, words].mean() for row, words in enumerate(words_of_texts)) / 4
    torch.testing.assert_close(output["loss"], expected)
    assert output["logs"]["words"] == 9 / 4
    output["loss"].backward()
    for name, parameter in bag_of_words.named_parameters():
        assert parameter.grad is not None, name


def test_a_class_is_scored_by_the_logits_of_its_words():
    bag_of_words = method().eval()
    assert isinstance(bag_of_words, TwoTowers)
    with torch.no_grad():
        image = bag_of_words.encode_image(image_text_batch()["image"])
        logits = bag_of_words.words(bag_of_words.image_encoder(image_text_batch()["image"]).embedding)
    # two words each, a shared one among them
    names = {"a": [2, 7, 8, 1, 0, 0], "b": [2, 7, 9, 1, 0, 0], "c": [2, 11, 7, 1, 0, 0]}

    def encode(texts: list[str]) -> torch.Tensor:
        ids = torch.tensor([names[text] for text in texts])
        return bag_of_words.encode_text(ids, ids != 0)

    scores = image @ classifier(list(names), encode, ["{}"]).T
    sums = torch.stack([logits[:, ids[1:3]].sum(dim=1) for ids in names.values()], dim=1)
    assert torch.equal(scores.argsort(dim=1), sums.argsort(dim=1))
    # differences agree up to a factor, the length of each image's logits
    spread = (scores - scores[:, :1]) / (sums - sums[:, :1])
    torch.testing.assert_close(spread[:, 1], spread[:, 2])
    torch.testing.assert_close(image.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(bag_of_words.encode_text(TEXT, MASK).norm(dim=1), torch.ones(4))


def test_neither_word_order_nor_a_constant_in_the_logits_matters():
    bag_of_words = method().eval()
    reordered = torch.tensor([[2, 8, 7, 1, 0, 0]])
    encoded = bag_of_words.encode_text(TEXT[:1], MASK[:1])
    assert torch.equal(encoded, bag_of_words.encode_text(reordered, reordered != 0))
    before = bag_of_words.encode_image(image_text_batch()["image"])
    with torch.no_grad():
        bag_of_words.words.bias += 3
    torch.testing.assert_close(bag_of_words.encode_image(image_text_batch()["image"]), before)
    nothing = bag_of_words.encode_text(torch.tensor([[2, 1, 0]]), torch.tensor([[True, True, False]]))
    assert nothing.abs().max() == 0


def test_special_tokens_must_be_ids():
    with pytest.raises(ValueError, match=r"model.special_tokens=\[0, 20\] must be ids below model.vocabulary=20"):
        method(special_tokens=(0, 20))


@pytest.mark.parametrize("scale", ["paper", "smoke", "tiny"])
def test_everything_but_the_model_equals_clips_recipe(scale):
    ours, clip = (
        compose([f"experiment={name}_vitb32", f"scale={scale}", "run.dir=/tmp/run"])
        for name in ("bag_of_words", "clip")
    )
    for part in ("data", "optimizer", "schedules", "trainer", "backbone", "callbacks"):
        assert ours[part] == clip[part], part
    if scale == "tiny":
        assert isinstance(configuration.instantiate(ours.model), BagOfWords)


def test_the_arms_of_siglips_claim_have_the_same_initial_towers():
    claim = load("siglip_small_batch")
    data = next(iter(claim.data))
    softmax, sigmoid = (
        configuration.instantiate(compose([*claim.run_overrides(arm, data, 0), "run.dir=/tmp/run"]).model)
        for arm in claim.arms
        if torch.manual_seed(0)
    )
    ours, theirs = softmax.state_dict(), sigmoid.state_dict()
    assert set(theirs) - set(ours) == {"logit_bias"}
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    assert type(softmax).__name__ == "CLIP"
    assert type(sigmoid).__name__ == "SigLIP"
    assert not softmax.mask_equal_texts
    given = image_text_batch() | {"image": torch.randn(4, 3, 32, 32)}
    for method in (softmax, sigmoid):
        method.training_step(given, 0)["loss"].backward()
    assert sigmoid.image_projection.weight.grad.abs().max() > 0
