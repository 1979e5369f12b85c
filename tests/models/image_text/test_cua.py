"""CUA: alignment and uniformity over single pairs, a start whose projections begin anew, and the recipe."""

import math

import pytest
import torch
from torch.nn import functional as F

from src import configuration
from src.models.backbones.weights import Weights, WeightsError
from src.models.image_text.cua import CUA
from src.models.losses.uniformity import alignment, uniformity
from src.optim import OptimizerRecipe
from src.train import compose
from tests.distributed import in_two_processes
from tests.toys import clip, image_text_batch, small_vit, text_tower


def cua(**options) -> CUA:
    torch.manual_seed(3)
    recipe = OptimizerRecipe(torch.optim.SGD, lr=0.1)
    return CUA(small_vit(), text_tower(), recipe, **{"embed_dim": 6, **options})


def pairs(count: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(count, 4, generator=generator).double(), dim=1) for _ in range(2))
    return image.requires_grad_(), text.requires_grad_()


def by_loops(one: torch.Tensor, other: torch.Tensor, group: list[int]) -> float:
    distances = [
        math.exp(-2 * (one[i] - other[j]).pow(2).sum().item())
        for i in range(len(one))
        for j in range(len(other))
        if group[i] != group[j]
    ]
    return math.log(sum(distances) / len(distances))


def test_terms_are_those_of_single_pairs():
    image, text = pairs()
    distance = sum((image[b] - text[b]).pow(2).sum().item() for b in range(5)) / 5
    assert alignment(image, text).item() == pytest.approx(distance)
    groups = [0, 1, 2, 1, 4]  # the texts 1 and 3 are equal
    for one, other in ((image, image), (text, text), (image, text)):
        assert uniformity(one, other).item() == pytest.approx(by_loops(one, other, list(range(5))))
        assert uniformity(one, other, torch.tensor(groups)).item() == pytest.approx(by_loops(one, other, groups))
        gradients = []
        for entries in (10**6, 7):
            value = uniformity(one, other, torch.tensor(groups), max_entries=entries)
            gradients.append(torch.autograd.grad(value, [one])[0])
        torch.testing.assert_close(gradients[1], gradients[0])
    # opposite vectors: the squared distance is 4; equal vectors have a finite gradient
    two = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert uniformity(two, two).item() == pytest.approx(-8)
    same = torch.ones(3, 1, dtype=torch.float64, requires_grad=True)
    uniformity(same, same).backward()
    assert torch.isfinite(same.grad).all()
    assert torch.isfinite(uniformity(image, text, torch.zeros(5, dtype=torch.int64)))


def test_the_step_adds_the_weighted_terms_at_a_fixed_temperature():
    batch = image_text_batch()
    for weights in ((0.0, 0.0, 0.0), (1.0, 1.0, 0.0), (1.0, 2.0, 3.0)):
        names = ("alignment", "uniformity", "cross_uniformity")
        method = cua(**{f"{name}_weight": weight for name, weight in zip(names, weights, strict=True)})
        output = method.training_step(batch, 0)
        terms = output["logs"]
        expected = terms["contrast"] + sum(w * terms[name] for name, w in zip(names, weights, strict=True))
        torch.testing.assert_close(output["loss"], expected)
        output["loss"].backward()
        assert {n for n, p in method.named_parameters() if p.grad is None} == {"logit_scale"}
    assert method.logit_scale.exp().item() == pytest.approx(100)
    plain = clip(embed_dim=6, temperature=0.01).double()
    baseline = cua(alignment_weight=0.0, uniformity_weight=0.0).double()
    plain.load_state_dict(baseline.state_dict())
    given = {**batch, "image": batch["image"].double()}
    torch.testing.assert_close(baseline.training_step(given, 0)["loss"], plain.training_step(given, 0)["loss"])


def test_it_starts_from_both_towers_with_new_projections():
    method, start = cua(), clip(embed_dim=8)
    before = method.image_projection.weight.clone()
    method.load_start(Weights(start.state_dict(), "run"))
    torch.testing.assert_close(method.text_encoder.state_dict(), start.text_encoder.state_dict())
    torch.testing.assert_close(method.image_encoder.state_dict(), start.image_encoder.state_dict())
    assert torch.equal(method.image_projection.weight, before)
    assert method.logit_scale.exp().item() == pytest.approx(100)
    with pytest.raises(WeightsError, match="CUA starts from both towers of a run, and this has no text tower"):
        method.load_start(Weights(start.image_encoder.state_dict(), "encoder"))


def loss_and_gradient(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    method = cua(cross_uniformity_weight=1.0).double()
    loss = method.training_step({**batch, "image": batch["image"].double()}, 0)["loss"]
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in method.named_parameters() if parameter.requires_grad}
    return {"loss": loss.detach(), **gradients}


def in_process(rank: int) -> dict[str, torch.Tensor]:
    return loss_and_gradient({name: value[2 * rank : 2 * rank + 2] for name, value in image_text_batch().items()})


def test_two_processes_are_one():
    first, second = in_two_processes(in_process)
    for name, whole in loss_and_gradient(image_text_batch()).items():
        torch.testing.assert_close((first[name] + second[name]) / 2, whole, msg=name)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"model.cross_uniformity_weight=-1.0: none may be negative"):
        cua(cross_uniformity_weight=-1.0)
    with pytest.raises(ValueError, match=r"data.batch_size: a contrastive loss needs at least 2"):
        cua().training_step({name: value[:1] for name, value in image_text_batch().items()}, 0)


def test_the_recipe_is_the_authors():
    for name, cross in (("cua_vitb32", 0.0), ("cuaxu_vitb32", 1.0)):
        config = compose([f"experiment={name}", "scale=paper", "run.dir=/tmp/run"])
        assert (config.optimizer.lr, config.optimizer.weight_decay, config.data.batch_size) == (1e-6, 0.1, 64)
        assert (config.model.embed_dim, config.model.cross_uniformity_weight) == (128, cross)
        assert (config.trainer.max_epochs, config.data.extras.rewrites) == (9, 0)
    tiny = compose(["experiment=cua_vitb32", "scale=tiny", "run.dir=/tmp/run"])
    assert isinstance(configuration.instantiate(tiny.model), CUA)
