"""Surface normals: the angle, the density behind the loss, what is reported, and that it learns."""

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
    """Blocks of 8 pixels whose color is their normal; of some nothing is known."""
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

    def test_a_slope_is_finite_where_two_directions_are_one(self) -> None:
        ours = field((0, 0, -1), (1e-4, 0, -1)).requires_grad_()
        angles(ours, field((0, 0, -1), (0, 0, -1))).sum().backward()
        assert ours.grad is not None
        assert torch.isfinite(ours.grad).all()
        assert ours.grad[0, 0, 0, 1].item() == pytest.approx(1.0, abs=1e-3)  # a small angle is its sine

    @pytest.mark.parametrize("concentration", [0.01, 1.0, 30.0])
    def test_it_is_the_likelihood_of_a_density_on_the_sphere(self, concentration: float) -> None:
        """exp(-loss) / 2 pi, summed over rings of directions: 1."""
        turn = (torch.arange(20_000, dtype=torch.float64) + 0.5) * math.pi / 20_000
        ring = torch.stack([turn.sin(), torch.zeros_like(turn), turn.cos()]).view(3, 1, -1).float()
        truth = torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1).expand_as(ring)
        # a image each, so that no mean is taken
        each = torch.stack(
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
        density = torch.exp(-each) / (2 * math.pi)
        total = (density * 2 * math.pi * turn[::100].sin()).sum() * math.pi / 200
        assert total.item() == pytest.approx(1.0, rel=0.02)

    def test_by_hand_over_what_is_known(self) -> None:
        prediction = torch.cat([field((1, 0, 0), (0, 1, 0)), field((1, 0, 0), (0, 1, 0))])
        normals = torch.cat([field((0, 1, 0), (0, 0, 0)), field((0, 0, 0), (0, 0, 0))])
        valid = torch.tensor([[[True, False]], [[False, False]]])
        concentration = torch.full((2, 1, 2), 2.0).requires_grad_()
        found = angular_nll(prediction.requires_grad_(), concentration, normals, valid)
        expected = (2 * math.pi / 2 - math.log(5) + math.log(1 + math.exp(-2 * math.pi))) / 2
        assert found.item() == pytest.approx(expected, abs=1e-5)
        found.backward()
        assert prediction.grad is not None
        assert torch.isfinite(prediction.grad).all()
        assert not prediction.grad[1].any()

    def test_of_a_batch_it_is_the_mean_of_the_halves(self) -> None:
        """So that several processes together have the gradient of one."""
        data = batch(4)
        ours = F.normalize(data["image"] + 0.3, dim=1)
        sure = torch.rand(4, SIZE, SIZE)
        of = [
            angular_nll(ours[part], sure[part], data["normals"][part], data["valid"][part])
            for part in (slice(0, 2), slice(2, 4))
        ]
        torch.testing.assert_close(angular_nll(ours, sure, data["normals"], data["valid"]), sum(of) / 2)


@pytest.mark.parametrize("backbone", [vit, resnet], ids=["vit", "resnet"])
def test_it_learns_eight_pictures(backbone: Any) -> None:
    module, data = head(backbone(), width=16).train(), batch(8)
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3)
    for _ in range(100):
        optimizer.zero_grad()
        module.training_step(data, 0)["loss"].backward()  # type: ignore[arg-type]
        optimizer.step()
    wrong = angles(module(data["image"]), data["normals"])[data["valid"]]
    assert wrong.mean() < math.radians(15)
    assert module(data["image"]).norm(dim=1).sub(1).abs().max() < 1e-5


def test_all_that_is_to_learn_gets_a_gradient_and_a_frozen_encoder_none() -> None:
    module = head(frozen=True).train()
    module.training_step(batch(2), 0)["loss"].backward()  # type: ignore[arg-type]
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad != name.startswith("features."), name
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_a_split_is_judged_by_all_its_known_pixels() -> None:
    """Three pixels at 0, 20 and 90 degrees of two images, of which one counts for nothing as it stands in."""
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
    found = {name: float(metric.compute()) for name, metric in module.metrics.items()}  # type: ignore[operator]
    assert found["normals_mean"] == pytest.approx((0 + 20 + 90) / 3, abs=1e-3)
    assert [found[name] for name in ("within_11", "within_22", "within_30")] == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    data["valid"][:] = False
    module.validation_step(data, 0)  # type: ignore[arg-type]  # nothing to be judged, nothing goes wrong


def test_pictures_are_colored_by_where_surfaces_face() -> None:
    module, data = head().eval(), batch(2)
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(normalize=lambda image: image / 255))  # type: ignore
    right_up_camera = field((1, 0, 0), (0, -1, 0), (0, 0, -1), (0, 0, 0))
    data |= {"image": torch.zeros(1, 3, 1, 4), "normals": right_up_camera, "valid": torch.ones(1, 1, 4) > 0}
    module.forward = lambda image: data["normals"]  # type: ignore[method-assign,assignment]
    shown = module.visualize(data)["normals"]  # type: ignore[arg-type]
    grey = 128 / 255
    expected = torch.tensor([[1, grey, grey], [grey, 1, grey], [grey, grey, 1], [grey, grey, grey]]).T
    torch.testing.assert_close(shown[0, 2, :, 0], expected)
    assert torch.equal(shown[0, 1], shown[0, 2])
