import copy

import torch
from torch.nn.functional import gelu

from src.models.heads.dino import DINOHead


def head(**kwargs) -> DINOHead:
    torch.manual_seed(0)
    return DINOHead(6, 5, hidden_dim=8, bottleneck_dim=4, **kwargs)


def test_scores_are_cosines_with_the_prototypes():
    module, x = head().double(), torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad():
        module.last_layer.weight.mul_(7.0)  # lengths of the rows must not matter
    hidden = gelu(x @ module.mlp[0].weight.T + module.mlp[0].bias)
    hidden = gelu(hidden @ module.mlp[2].weight.T + module.mlp[2].bias)
    z = hidden @ module.mlp[4].weight.T + module.mlp[4].bias
    expected = torch.stack([torch.cosine_similarity(z, row[None]) for row in module.last_layer.weight], dim=1)
    assert torch.allclose(module(x), expected, atol=1e-12)
    assert module(x).abs().max() <= 1


def test_one_head_serves_class_tokens_and_patches():
    module, tokens = head(), torch.randn(2, 7, 6)
    scores = module(tokens)
    assert torch.allclose(scores[:, 0], module(tokens[:, 0]), atol=1e-6)
    assert torch.allclose(scores[1, 3], module(tokens[1, 3]), atol=1e-6)


def test_the_gain_is_fixed_or_learned_and_scales_the_scores():
    assert not head().last_layer.gain.requires_grad
    module, x = head(train_gain=True), torch.randn(3, 6)
    before = module(x)
    before.sum().backward()
    # scores are linear in the gain: at gain 1 its gradient is the sum of the scores themselves
    assert torch.allclose(module.last_layer.gain.grad.squeeze(1), before.detach().sum(dim=0), atol=1e-6)
    # the direction's gradient is at right angles to it
    weight = module.last_layer.weight
    assert (weight * weight.grad).sum(dim=1).abs().max() < 1e-6
    with torch.no_grad():
        module.last_layer.gain[2] = 3.0
    assert torch.allclose(module(x)[:, 2], 3 * before[:, 2], atol=1e-6)


def test_a_copy_and_a_restored_state_are_the_same_head_with_the_same_names():
    module, x = head(), torch.randn(3, 6)
    teacher = copy.deepcopy(module)
    assert torch.equal(teacher(x), module(x))
    torch.manual_seed(1)
    other = DINOHead(6, 5, hidden_dim=8, bottleneck_dim=4)
    assert not torch.equal(other(x), module(x))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))
    assert [name for name, _ in teacher.named_parameters()] == [name for name, _ in module.named_parameters()]


def test_weights_start_as_in_the_paper_s_code():
    torch.manual_seed(0)
    module = DINOHead(64, 512, hidden_dim=256, bottleneck_dim=64)
    for layer in (module.mlp[0], module.mlp[2], module.mlp[4]):
        assert abs(layer.weight.std().item() - 0.02) < 1e-3
        assert layer.bias.abs().max() == 0
    # nn.Linear's uniform between -1 / sqrt(64) and 1 / sqrt(64)
    assert abs(module.last_layer.weight.std().item() - 0.125 / 3**0.5) < 1e-3
    assert module.last_layer.gain.eq(1).all()
