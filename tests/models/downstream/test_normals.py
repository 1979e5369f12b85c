"""Tests of surface normals: the angle, the density of the loss, validation and training."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.models.downstream.normals import SurfaceNormals
from src.models.losses.normals import angles, angular_nll
from src.optim import OptimizerRecipe
from tests.models.downstream.toy import SIZE, resnet, vit

RECIPE = OptimizerRecipe(torch.optim.AdamW, lr=0.1)


def head(backbone: nn.Module | None = None, **options: Any) -> SurfaceNormals:
    return SurfaceNormals(backbone or vit(), RECIPE, **({"width": 8, "widths": (4, 6, 8, 10)} | options))


def batch(size: int = 8) -> dict[str, Tensor]:
    """Blocks of 8 x 8 pixels whose color is their normal; some pixels are unknown."""
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randn(size, 3, SIZE // 8, SIZE // 8, generator=generator)
    blocks[:, 2] = -blocks[:, 2].abs() - 0.3
    normals = F.normalize(blocks, dim=1).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    valid = torch.rand(size, SIZE, SIZE, generator=generator) > 0.2
    return {
        "image": 2 * normals,
        "normals": normals * valid[:, None],
        "valid": valid,
        "replaced": torch.zeros(size, dtype=torch.bool),
    }


def field(*vectors: tuple[float, float, float]) -> Tensor:
    """[1, 3, 1, N]"""
    return torch.tensor(vectors, dtype=torch.float32).T[None, :, None]


class TestLoss:
    def test_angles_of_directions_of_any_length(self) -> None:
        ours = field((1, 0, 0), (1, 0, 0), (2, 0, 0), (0, 0, -3), (1, 1, 0))
        theirs = field((5, 0, 0), (-1, 0, 0), (0, 7, 0), (0, 0, -1), (1, 0, 0))
        expected = torch.tensor([[[0, math.pi, math.pi / 2, 0, math.pi / 4]]])
        torch.testing.assert_close(angles(ours, theirs), expected, atol=2e-6, rtol=0)

    def test_the_gradient_is_finite_for_equal_directions(self) -> None:
        ours = field((0, 0, -1), (1e-4, 0, -1)).requires_grad_()
        angles(ours, field((0, 0, -1), (0, 0, -1))).sum().backward()
        assert ours.grad is not None
        assert torch.isfinite(ours.grad).all()
        assert ours.grad[0, 0, 0, 1].item() == pytest.approx(1.0, abs=1e-3)  # a small angle equals its sine

    @pytest.mark.parametrize("concentration", [0.01, 1.0, 30.0])
    def test_it_is_the_negative_log_likelihood_of_a_density_on_the_sphere(self, concentration: float) -> None:
        """exp(-loss) / 2 pi integrates to 1 over rings of directions."""
        turn = (torch.arange(20_000, dtype=torch.float64) + 0.5) * math.pi / 20_000
        ring = torch.stack([turn.sin(), torch.zeros_like(turn), turn.cos()]).view(3, 1, -1).float()
        truth = torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1).expand_as(ring)
        # one pixel an image, because the loss averages over an image
        losses = torch.stack(
            [
                angular_nll(
                    a[None, :, :, None],
                    torch.full((1, 1, 1), concentration),
                    b[None, :, :, None],
                    torch.ones(1, 1, 1) > 0,
                )
                for a, b in zip(ring[:, :, ::100].permute(2, 0, 1), truth[:, :, ::100].permute(2, 0, 1), strict=True)
            ]
        ).double()
        density = torch.exp(-losses) / (2 * math.pi)
        total = (density * 2 * math.pi * turn[::100].sin()).sum() * math.pi / 200
        assert total.item() == pytest.approx(1.0, rel=0.02)

    def test_by_hand_over_known_pixels(self) -> None:
        prediction = torch.cat([field((1, 0, 0), (0, 1, 0)), field((1, 0, 0), (0, 1, 0))])
        normals = torch.cat([field((0, 1, 0), (0, 0, 0)), field((0, 0, 0), (0, 0, 0))])
        valid = torch.tensor([[[True, False]], [[False, False]]])
        concentration = torch.full((2, 1, 2), 2.0).requires_grad_()
        output = angular_nll(prediction.requires_grad_(), concentration, normals, valid)
        expected = (2 * math.pi / 2 - math.log(5) + math.log(1 + math.exp(-2 * math.pi))) / 2
        assert output.item() == pytest.approx(expected, abs=1e-5)
        output.backward()
        assert prediction.grad is not None
        assert torch.isfinite(prediction.grad).all()
        assert not prediction.grad[1].any()

    def test_the_loss_of_a_batch_is_the_mean_of_its_halves(self) -> None:
        """Several processes have the gradient of one."""
        data = batch(4)
        ours = F.normalize(data["image"] + 0.3, dim=1)
        concentration = torch.rand(4, SIZE, SIZE)
        halves = [
            angular_nll(ours[part], concentration[part], data["normals"][part], data["valid"][part])
            for part in (slice(0, 2), slice(2, 4))
        ]
        torch.testing.assert_close(angular_nll(ours, concentration, data["normals"], data["valid"]), sum(halves) / 2)


@pytest.mark.parametrize("backbone", [vit, resnet], ids=["vit", "resnet"])
def test_it_memorizes_eight_images(backbone: Any) -> None:
    module, data = head(backbone(), width=16).train(), batch(8)
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3)
    for _ in range(100):
        optimizer.zero_grad()
        module.training_step(data, 0)["loss"].backward()  # type: ignore[arg-type]
        optimizer.step()
    error = angles(module(data["image"]), data["normals"])[data["valid"]]
    assert error.mean() < math.radians(15)
    assert module(data["image"]).norm(dim=1).sub(1).abs().max() < 1e-5


def test_trainable_parameters_have_gradients_and_a_frozen_encoder_has_none() -> None:
    module = head(frozen=True).train()
    module.training_step(batch(2), 0)["loss"].backward()  # type: ignore[arg-type]
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad != name.startswith("features."), name
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_validation_averages_over_all_known_pixels() -> None:
    """Three pixels with errors of 0, 20 and 90 degrees in two images; the third image is a replacement."""
    module = head().eval()
    module.log = lambda *_args, **_kwargs: None  # type: ignore[method-assign,assignment]
    turn = math.radians(20)
    truth = torch.cat([field((0, 0, -1), (math.sin(turn), 0, -math.cos(turn)), (0, 0, 0))] * 3)
    truth[1, :, 0, :] = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 0]]).T
    data = {
        "image": torch.zeros(3, 3, 1, 3),
        "normals": truth,
        "valid": truth.norm(dim=1) > 0.5,
        "replaced": torch.tensor([False, False, True]),
    }
    module.forward = lambda image: field((0, 0, -1), (0, 0, -1), (0, 0, -1)).expand(len(image), -1, -1, -1)  # type: ignore[method-assign,assignment]
    module.validation_step(data, 0)  # type: ignore[arg-type]
    output = {name: float(metric.compute()) for name, metric in module.metrics.items()}  # type: ignore[operator]
    assert output["normals_mean"] == pytest.approx((0 + 20 + 90) / 3, abs=1e-3)
    assert [output[name] for name in ("within_11", "within_22", "within_30")] == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    data["valid"][:] = False
    module.validation_step(data, 0)  # type: ignore[arg-type]  # nothing is known, and nothing is raised


def test_visualize_colors_normals_by_direction() -> None:
    module, data = head().eval(), batch(2)
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(normalize=lambda image: image / 255))  # type: ignore
    right_up_camera = field((1, 0, 0), (0, -1, 0), (0, 0, -1), (0, 0, 0))
    data |= {"image": torch.zeros(1, 3, 1, 4), "normals": right_up_camera, "valid": torch.ones(1, 1, 4) > 0}
    module.forward = lambda image: data["normals"]  # type: ignore[method-assign,assignment]
    shown = module.visualize(data)["normals"]  # type: ignore[arg-type]
    gray = 128 / 255
    expected = torch.tensor([[1, gray, gray], [gray, 1, gray], [gray, gray, 1], [gray, gray, gray]]).T
    torch.testing.assert_close(shown[0, 2, :, 0], expected)
    assert torch.equal(shown[0, 1], shown[0, 2])
