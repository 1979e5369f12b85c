import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from src.models.image_text.siglip import ring_sigmoid_loss
from src.models.losses.image_text import clip_loss, sigmoid_loss


def unit_vectors(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def dot(x: Tensor, y: Tensor) -> float:
    return sum(float(a) * float(b) for a, b in zip(x, y, strict=True))


def clip_by_loops(image: Tensor, text: Tensor, scale: float, text_hash: list[int]) -> float:
    total = 0.0
    for queries, keys in ((image, text), (text, image)):
        for i in range(len(image)):
            candidates = [j for j in range(len(image)) if j == i or text_hash[j] != text_hash[i]]
            total += math.log(sum(math.exp(scale * dot(queries[i], keys[j])) for j in candidates))
            total -= scale * dot(queries[i], keys[i])
    return total / (2 * len(image))


def sigmoid_by_loops(image: Tensor, text: Tensor, scale: float, bias: float) -> float:
    total = 0.0
    for i in range(len(image)):
        for j in range(len(text)):
            z = 1 if i == j else -1
            total -= math.log(1 / (1 + math.exp(-z * (scale * dot(image[i], text[j]) + bias))))
    return total / len(image)


def test_clip_is_the_mean_of_both_directions():
    image, text = unit_vectors(5, 4, seed=1), unit_vectors(5, 4, seed=2)
    scale = torch.tensor(3.0, dtype=torch.float64)
    value = clip_loss(image, text, image, text, 0, logit_scale=scale)
    assert value.item() == pytest.approx(clip_by_loops(image, text, 3.0, [0, 1, 2, 3, 4]), rel=1e-12)


def test_equal_texts_are_not_negatives_of_each_other():
    image, text = unit_vectors(5, 4, seed=1), unit_vectors(5, 4, seed=2)
    text_hash = [0, 1, 0, 3, 1]
    scale = torch.tensor(3.0, dtype=torch.float64)
    value = clip_loss(image, text, image, text, 0, logit_scale=scale, text_hash=torch.tensor(text_hash))
    assert value.item() == pytest.approx(clip_by_loops(image, text, 3.0, text_hash), rel=1e-12)


def test_smoothed_targets_by_hand():
    """Logits log 3 and 0 have probabilities 3/4 and 1/4. Smoothing of 0.2 gives the targets 0.9 and 0.1; if the two
    texts are equal, the target is the own text alone."""
    eye, scale = torch.eye(2, dtype=torch.float64), torch.tensor(math.log(3.0), dtype=torch.float64)
    value = clip_loss(eye, eye, eye, eye, 0, logit_scale=scale, label_smoothing=0.2)
    assert value.item() == pytest.approx(-0.9 * math.log(3 / 4) - 0.1 * math.log(1 / 4))
    equal = clip_loss(eye, eye, eye, eye, 0, logit_scale=scale, text_hash=torch.tensor([5, 5]), label_smoothing=0.2)
    assert equal.item() == pytest.approx(0)


def test_two_orthogonal_pairs_by_hand():
    eye = torch.eye(2, dtype=torch.float64)
    scale = torch.tensor(math.log(3.0), dtype=torch.float64)
    # logits log 3 and 0: the own text has probability 3/4
    assert clip_loss(eye, eye, eye, eye, 0, logit_scale=scale).item() == pytest.approx(math.log(4 / 3))
    # the own text has sigmoid(log 3) = 3/4, the other one sigmoid(0) = 1/2
    value = sigmoid_loss(eye, eye, 0, logit_scale=scale, logit_bias=torch.zeros((), dtype=torch.float64))
    assert value.item() == pytest.approx(math.log(4 / 3) + math.log(2))


def test_sigmoid_loss_sums_over_pairs_and_divides_by_images():
    image, text = unit_vectors(4, 3, seed=1), unit_vectors(4, 3, seed=2)
    scale, bias = torch.tensor(5.0, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)
    expected = sigmoid_by_loops(image, text, 5.0, -2.0)
    assert sigmoid_loss(image, text, 0, logit_scale=scale, logit_bias=bias).item() == pytest.approx(expected, rel=1e-12)
    assert ring_sigmoid_loss(image, text, logit_scale=scale, logit_bias=bias).item() == pytest.approx(
        expected, rel=1e-12
    )
    shares = [sigmoid_loss(image[i : i + 2], text, i, logit_scale=scale, logit_bias=bias).item() for i in (0, 2)]
    assert sum(shares) / 2 == pytest.approx(expected, rel=1e-12)


def test_in_chunks_values_and_gradients_are_the_same():
    leaves = [
        unit_vectors(6, 3, seed=1),
        unit_vectors(6, 3, seed=2),
        torch.tensor(4.0).double(),
        torch.tensor(-1.0).double(),
    ]
    for leaf in leaves:
        leaf.requires_grad_()
    image, text, scale, bias = leaves
    text_hash = torch.tensor([0, 1, 2, 0, 4, 5])
    losses = [
        lambda entries: clip_loss(
            image, text, image, text, 0, logit_scale=scale, text_hash=text_hash, max_entries=entries
        ),
        lambda n: sigmoid_loss(image, text, 0, logit_scale=scale, logit_bias=bias, max_entries=n),
    ]
    for loss in losses:
        whole, chunks = loss(10**6), loss(6)
        torch.testing.assert_close(chunks, whole)
        used = leaves if loss is losses[1] else leaves[:3]
        for a, b in zip(torch.autograd.grad(whole, used), torch.autograd.grad(chunks, used), strict=True):
            torch.testing.assert_close(b, a)


def test_similarities_are_computed_in_float32_under_autocast():
    image, text = unit_vectors(4, 64, seed=1).bfloat16(), unit_vectors(4, 64, seed=2).bfloat16()
    scale, bias = torch.tensor(50.0), torch.tensor(-10.0)
    wide = [sigmoid_loss(image.float(), text.float(), 0, logit_scale=scale, logit_bias=bias)]
    wide += [clip_loss(image.float(), text.float(), image.float(), text.float(), 0, logit_scale=scale)]
    with torch.autocast("cpu", torch.bfloat16):
        narrow = [sigmoid_loss(image, text, 0, logit_scale=scale, logit_bias=bias)]
        narrow += [clip_loss(image, text, image, text, 0, logit_scale=scale)]
    for a, b in zip(wide, narrow, strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a, b)
