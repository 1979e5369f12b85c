import math
from functools import partial

import pytest
import torch
from torch import nn

from src.models.joint_embedding.simclr import SimCLR
from src.models.losses.contrastive import dcl, dclw
from src.sync_batchnorm import SyncBatchNormPlugin
from tests.distributed import in_two_processes
from tests.models.joint_embedding import toy


def simclr(backbone: nn.Module | None = None, **options: object) -> SimCLR:
    torch.manual_seed(0)
    return SimCLR(backbone or toy.vit(), toy.optimizer(), projection_dim=5, **options).double()


def by_loops(z: list[list[float]], temperature: float, decoupled: bool) -> float:
    """z[2 * i + v], of unit length, one anchor after the other: the sum over views, mean over images."""
    total = 0.0
    for i, anchor in enumerate(z):
        similar = [math.exp(sum(a * b for a, b in zip(anchor, other, strict=True)) / temperature) for other in z]
        negatives = sum(s for j, s in enumerate(similar) if j // 2 != i // 2)
        total += -math.log(similar[i ^ 1] / (negatives + (0 if decoupled else similar[i ^ 1])))
    return total / (len(z) / 2)


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_step_is_the_paper_written_as_loops(decoupled):
    method = simclr(temperature=0.3, **({"loss": dcl} if decoupled else {}))
    batch = toy.batch()
    # image after image, all views in one batch for the projector's batch norms
    h = method.encoder(batch["views"].reshape(8, 3, toy.SIDE, toy.SIDE)).embedding
    linear, norm, _, last, last_norm = method.projector.layers

    def normed(x, layer):
        scaled = (x - x.mean(0)) / (x.var(0, correction=0) + layer.eps).sqrt()
        return scaled * layer.weight + layer.bias

    z = normed(normed(h @ linear.weight.T, norm).clamp(min=0) @ last.weight.T, last_norm)
    rows = [[value / math.hypot(*row) for value in row] for row in z.tolist()]
    output = method.training_step(batch, 0)
    assert output["loss"].item() == pytest.approx(by_loops(rows, 0.3, decoupled), rel=1e-10)
    positive = sum(sum(a * b for a, b in zip(rows[2 * i], rows[2 * i + 1], strict=True)) for i in range(4)) / 4
    assert output["logs"]["positive"].item() == pytest.approx(positive, rel=1e-10)
    # what the probe learns from is the first view's features, which is what evaluation reads too
    assert torch.allclose(output["embedding"], h.view(4, 2, -1)[:, 0].float())


def test_gradients_reach_everything_but_the_shift_of_the_output():
    method = simclr()
    method.training_step(toy.batch(), 0)["loss"].backward()
    without = {name for name, p in method.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    shift = "projector.layers.4.bias"  # center=False
    assert without - {"encoder.backbone.cls_token"} == {shift}  # the mean of the patches is what is projected
    learning = {name for group in method.configure_optimizers().param_groups for name in group["names"]}
    assert shift not in learning
    assert method.projector.layers[4].bias.abs().sum() == 0


def test_the_projector_s_linear_layers_start_as_the_authors_do():
    torch.manual_seed(0)
    layers = SimCLR(toy.vit(embed_dim=96), toy.optimizer(), projection_dim=96).projector.layers
    for layer in (layers[0], layers[3]):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)  # 9216 values, three standard errors 2 %
        assert layer.weight.mean().abs() < 5e-4


def on_each(process: int, backbone: str, loss: str) -> dict[str, torch.Tensor]:
    method = build(backbone, loss)
    if backbone == "resnet":
        method = SyncBatchNormPlugin().apply(method)
    else:
        method.projector = SyncBatchNormPlugin().apply(method.projector)
    method.training_step(toy.part_of(toy.batch(6), process), 0)["loss"].backward()
    buffers = {f"buffer {name}": value for name, value in method.named_buffers() if "running" in name}
    return toy.gradients(method) | buffers


def build(backbone: str, loss: str) -> SimCLR:
    torch.manual_seed(0)
    return simclr(toy.resnet() if backbone == "resnet" else toy.vit(), **({"loss": dclw} if loss == "dclw" else {}))


@pytest.mark.parametrize(("backbone", "loss"), [("vit", "dclw"), ("resnet", "nt_xent")])
def test_two_processes_are_one(backbone, loss):
    """With batch norm over both, as in the paper: gradients and running statistics."""
    whole = build(backbone, loss)
    whole.training_step(toy.batch(6), 0)["loss"].backward()
    parts = in_two_processes(partial(on_each, backbone=backbone, loss=loss))
    expected = toy.gradients(whole)
    assert len(expected) > 10
    for name, gradient in expected.items():
        assert torch.allclose((parts[0][name] + parts[1][name]) / 2, gradient, rtol=0, atol=1e-8), name
    running = {f"buffer {name}": value for name, value in whole.named_buffers() if "running" in name}
    for name, value in running.items():
        for part in parts:
            assert torch.allclose(part[name], value, rtol=0, atol=1e-10), name


def test_half_precision_stops_before_the_similarities():
    method = simclr().float()
    batch = {name: value.float() if value.is_floating_point() else value for name, value in toy.batch().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = method.training_step(batch, 0)
    assert output["loss"].dtype == torch.float32
    assert output["embedding"].dtype == torch.float32
    output["loss"].backward()
    assert all(p.grad.dtype == torch.float32 for p in method.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (toy.batch(views=3), r"data\.train_view: .* 2 views .* has 3 in train_view\.views and 0 in"),
        (toy.batch(local_views=4), r"data\.train_view: .* has 2 in train_view\.views and 4 in train_view\.local_views"),
        (toy.batch(count=1), r"data\.batch_size: .* at least 2 images"),
    ],
)
def test_a_batch_that_does_not_suit_is_refused_by_its_key(batch, message):
    with pytest.raises(ValueError, match=message):
        simclr().training_step(batch, 0)


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"model\.temperature=0 must be above 0"):
        simclr(temperature=0)


def test_pictures_are_the_views_side_by_side():
    batch = toy.batch(local_views=3)
    pictures = simclr().visualize(batch)
    assert torch.equal(pictures["views"], batch["views"])
    assert torch.equal(pictures["local_views"], batch["local_views"])
