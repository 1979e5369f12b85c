"""FILIP's loss: against loops, in chunks, and its memory."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from src.errors import SettingError
from src.models.losses.late_interaction import late_interaction, late_interaction_loss, select_tokens


def tokens(rows: int, length: int, seed: int, lengths: list[int] | None = None, dim: int = 4) -> Tensor:
    """Returns unit vectors, zeros after each row's length."""
    generator = torch.Generator().manual_seed(seed)
    vectors = normalize(torch.randn(rows, length, dim, generator=generator, dtype=torch.float64), dim=-1)
    for row, end in enumerate(lengths or []):
        vectors[row, end:] = 0
    return vectors


def by_loops(query: Tensor, keys: Tensor) -> Tensor:
    similarity = torch.zeros(len(query), len(keys), dtype=query.dtype)
    for q, one in enumerate(query):
        for k, other in enumerate(keys):
            best = [max(float(a @ b) for b in other if b.any()) for a in one if a.any()]
            similarity[q, k] = sum(best) / len(best)
    return similarity


IMAGE, TEXT = tokens(4, 3, seed=1), tokens(4, 5, seed=2, lengths=[5, 1, 3, 2])
SCALE = torch.tensor(6.0, dtype=torch.float64)


def test_each_token_is_compared_with_its_most_similar_one_and_padding_is_ignored():
    torch.testing.assert_close(late_interaction(IMAGE, TEXT), by_loops(IMAGE, TEXT))
    torch.testing.assert_close(late_interaction(TEXT, IMAGE), by_loops(TEXT, IMAGE))
    assert (late_interaction(IMAGE, TEXT) - late_interaction(TEXT, IMAGE).T).abs().max() > 0.01
    longer = torch.cat([TEXT, torch.zeros(4, 2, 4, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(late_interaction(IMAGE, longer), late_interaction(IMAGE, TEXT))
    torch.testing.assert_close(late_interaction(longer, IMAGE), late_interaction(TEXT, IMAGE))
    # padding would have similarity 0, more than the only token
    keys = torch.tensor([[[-1.0, 0.0], [0.0, 0.0]]])
    assert late_interaction(torch.tensor([[[1.0, 0.0]]]), keys).item() == -1


def test_the_loss_is_cross_entropy_in_both_directions():
    to_text, to_image = by_loops(IMAGE, TEXT) * 6, by_loops(TEXT, IMAGE) * 6
    labels = torch.arange(4)
    expected = (cross_entropy(to_text, labels) + cross_entropy(to_image, labels)) / 2
    torch.testing.assert_close(late_interaction_loss(IMAGE, TEXT, IMAGE, TEXT, 0, logit_scale=SCALE), expected)
    for scores in (to_text, to_image):
        scores[0, 2] = scores[2, 0] = -math.inf
    expected = (cross_entropy(to_text, labels) + cross_entropy(to_image, labels)) / 2
    text_hash = torch.tensor([7, 1, 7, 3])
    torch.testing.assert_close(
        late_interaction_loss(IMAGE, TEXT, IMAGE, TEXT, 0, logit_scale=SCALE, text_hash=text_hash), expected
    )
    with pytest.raises(SettingError, match=r"data.batch_size: a contrastive loss needs at least 2"):
        late_interaction_loss(IMAGE[:1], TEXT[:1], IMAGE[:1], TEXT[:1], 0, logit_scale=SCALE)


def whole(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Computes the loss from the tensor of all token similarities, as in the paper's formulas."""
    not_padding = text.any(dim=-1)
    similarity = torch.einsum("ikd,jrd->ijkr", image, text).masked_fill(~not_padding[None, :, None, :], -torch.inf)
    to_text = similarity.amax(dim=3).mean(dim=2)
    to_image = ((similarity.amax(dim=2) * 1).masked_fill(~not_padding[None], 0).sum(dim=2) / not_padding.sum(dim=1)).T
    labels = torch.arange(len(image))
    return (cross_entropy(scale * to_text, labels) + cross_entropy(scale * to_image, labels)) / 2


@pytest.mark.parametrize("max_entries", [1, 130, 10**6])  # one row, two rows and all rows at a time
def test_in_chunks_value_and_gradients_equal_those_of_the_whole_tensor(max_entries):
    leaves = [IMAGE.clone().requires_grad_(), TEXT.clone().requires_grad_(), SCALE.clone().requires_grad_()]
    image, text, scale = leaves
    expected = whole(image, text, scale)
    loss = late_interaction_loss(image, text, image, text, 0, logit_scale=scale, max_entries=max_entries)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)
        assert b.abs().max() > 1e-3
    torch.testing.assert_close(late_interaction(IMAGE, TEXT, max_entries=max_entries), by_loops(IMAGE, TEXT))


class Largest(TorchDispatchMode):
    """Records the number of entries of the largest tensor created."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for value in tree_flatten(output)[0]:
            if isinstance(value, Tensor):
                self.entries = max(self.entries, value.untyped_storage().nbytes() // value.element_size())
        return output


def test_no_tensor_of_all_similarities_is_created():
    rows, length = 16, 8
    image, text = (tokens(rows, length, seed=seed, dim=2).requires_grad_() for seed in (1, 2))
    with Largest() as measured:
        late_interaction_loss(
            image, text, image, text, 0, logit_scale=SCALE, max_entries=2 * rows * length**2
        ).backward()
    assert measured.entries == 2 * rows * length**2  # two rows at a time, in both passes
    with Largest() as measured:
        whole(image, text, SCALE).backward()
    assert measured.entries >= rows**2 * length**2


def test_select_tokens_returns_the_most_similar_ones():
    eye = torch.eye(3)
    image = torch.stack([eye, eye.flip(0)])
    text = torch.tensor([[[0.0, 0.96, 0.28]] * 2, [[0.0, 0.6, 0.8], [0.0, 0.0, 0.0]]])
    # greatest similarities of the axes: 0, 0.96 and 0.8; with the negated texts 0, -0.6 and -0.28
    assert torch.equal(select_tokens(image, text, 0.5), torch.stack([eye[[1, 2]], eye[[1, 2]]]))
    assert torch.equal(select_tokens(image, -text, 0.3), torch.stack([eye[[0]], eye[[0]]]))
    assert torch.equal(select_tokens(image, text, 1), image)
    # padding is selected last
    assert torch.equal(select_tokens(text, -image, 0.5)[1, 0], text[1, 0])
    leaf = image.clone().requires_grad_()
    select_tokens(leaf, text, 0.5).sum().backward()
    assert leaf.grad[0].tolist() == [[0, 0, 0], [1, 1, 1], [1, 1, 1]]


def test_queries_use_all_tokens_and_keys_the_selected_ones():
    keys = select_tokens(TEXT, IMAGE, 0.4)
    assert keys.shape == (4, 2, 4)
    value = late_interaction_loss(IMAGE, TEXT, select_tokens(IMAGE, TEXT, 0.6), keys, 0, logit_scale=SCALE)
    labels = torch.arange(4)
    to_text, to_image = by_loops(IMAGE, keys) * 6, by_loops(TEXT, select_tokens(IMAGE, TEXT, 0.6)) * 6
    torch.testing.assert_close(value, (cross_entropy(to_text, labels) + cross_entropy(to_image, labels)) / 2)


def test_similarities_are_computed_in_float32_under_autocast():
    image, text = IMAGE.bfloat16(), TEXT.bfloat16()
    wide = late_interaction_loss(
        image.float(), text.float(), image.float(), text.float(), 0, logit_scale=torch.tensor(50.0)
    )
    with torch.autocast("cpu", torch.bfloat16):
        narrow = late_interaction_loss(image, text, image, text, 0, logit_scale=torch.tensor(50.0))
    assert torch.equal(wide, narrow)
