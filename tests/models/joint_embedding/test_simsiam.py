import copy

import pytest
import torch

from src import train
from src.models.joint_embedding.simsiam import SimSiam, negative_cosine
from src.sync_batchnorm import SyncBatchNormPlugin
from tests.distributed import in_two_processes
from tests.models.joint_embedding import toy


def simsiam(**options) -> SimSiam:
    torch.manual_seed(0)
    return SimSiam(toy.resnet(), toy.optimizer(), **{"projection_dim": 8, "predictor_dim": 4, **options}).double()


def test_the_loss_by_hand():
    p = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    z = torch.tensor([[[5.0, 0.0], [0.0, -1.0]]])
    assert negative_cosine(p, z).item() == pytest.approx(-(0.6 - 1.0) / 2)


def test_gradients_reach_both_heads_and_the_encoder_but_not_through_the_target():
    """With the stop-gradient the loss is that of fixed targets."""
    method, batch = simsiam(), toy.batch()
    with torch.no_grad():
        h = [method.encoder(view).embedding for view in batch["views"].unbind(1)]
        fixed = torch.stack([method.projector(view) for view in h], dim=1)
    reference = copy.deepcopy(method)
    method.training_step(batch, 0)["loss"].backward()
    h = [reference.encoder(view).embedding for view in batch["views"].unbind(1)]
    p = torch.stack([reference.predictor(reference.projector(view)) for view in h], dim=1)
    negative_cosine(p, fixed.flip(1)).backward()
    expected = toy.gradients(reference)
    assert set(expected) == {name for name, _ in method.named_parameters()}
    for name, gradient in toy.gradients(method).items():
        assert torch.allclose(gradient, expected[name], rtol=0, atol=1e-12), name


def test_without_the_stop_gradient_the_targets_are_trained_too():
    with_stop, without = simsiam(), simsiam(stop_gradient=False)
    losses = [method.training_step(toy.batch(), 0)["loss"] for method in (with_stop, without)]
    assert losses[0].item() == losses[1].item()
    for loss in losses:
        loss.backward()
    name = "projector.layers.0.weight"
    assert not torch.allclose(toy.gradients(with_stop)[name], toy.gradients(without)[name])


def test_the_predictor_s_rate_is_constant_and_all_weights_are_decayed():
    config = train.compose(["experiment=simsiam_r50", "scale=paper"])
    assert config.optimizer.lr == pytest.approx(0.05 * 512 / 256)
    rules = config.optimizer.rules
    assert (rules[0].pattern, rules[0].constant_lr) == (r"^predictor\.", True)
    assert {rule.weight_decay for rule in rules} == {1e-4}


def on_each(process: int) -> dict[str, torch.Tensor]:
    method = SyncBatchNormPlugin().apply(simsiam())
    method.training_step(toy.part_of(toy.batch(6), process), 0)["loss"].backward()
    return toy.gradients(method)


def test_two_processes_are_one():
    whole = simsiam()
    whole.training_step(toy.batch(6), 0)["loss"].backward()
    parts = in_two_processes(on_each)
    for name, gradient in toy.gradients(whole).items():
        assert torch.allclose((parts[0][name] + parts[1][name]) / 2, gradient, rtol=0, atol=1e-8), name
