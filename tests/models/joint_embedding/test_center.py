import pytest
import torch

from src.models.joint_embedding.center import Center


def test_it_moves_towards_the_mean_of_everything_observed():
    center = Center(2, momentum=0.75)
    center.observe(
        torch.tensor([[[4.0, 0.0], [8.0, 0.0]], [[0.0, 4.0], [0.0, 4.0]]], requires_grad=True)
    )  # mean (3, 2)
    assert center().tolist() == [0.0, 0.0]  # used before it moves
    center.update()
    assert center().tolist() == [0.75, 0.5]
    center.update()  # nothing new
    assert center().tolist() == [0.75, 0.5]
    center.observe(torch.tensor([[0.75, 4.5]]))
    center.update()
    assert center().tolist() == [0.75, 1.5]
    assert not center().requires_grad


def test_micro_batches_move_it_once_and_as_far_as_one_batch():
    logits = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    whole, parts = Center(5), Center(5)
    whole.observe(logits)
    for part in logits.split([3, 7, 2]):  # unequal ones too: each row counts alike
        parts.observe(part)
        assert parts().abs().max() == 0
    whole.update()
    parts.update()
    assert torch.allclose(whole(), parts(), rtol=0, atol=1e-7)
    assert torch.allclose(whole(), 0.1 * logits.mean(dim=0), atol=1e-6)


def test_it_is_part_of_the_state_and_half_precision_is_averaged_in_float32():
    center, restored = Center(1, momentum=0.0), Center(1, momentum=0.0)
    center.observe(torch.tensor([[1.0], [1.0078125], [1.0], [1.0]], dtype=torch.bfloat16))
    center.update()
    assert center().item() == 1.0 + 0.0078125 / 4  # in bfloat16 this would be 1
    restored.load_state_dict(center.state_dict())
    assert restored().item() == center().item()


@pytest.mark.parametrize("momentum", [-0.1, 1.1])
def test_a_momentum_outside_of_its_range_is_refused(momentum):
    with pytest.raises(ValueError, match=f"momentum={momentum}"):
        Center(2, momentum)
