"""CLIP-Refine: its two losses by hand, its frozen teacher, and its start from a run."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from src import configuration
from src.models.backbones.weights import read_weights
from src.models.image_text.clip import CLIP
from src.models.image_text.clip_refine import CLIPRefine
from src.models.losses.refine import hybrid_distillation, random_feature_alignment
from src.optim import OptimizerRecipe, adamw
from src.train import compose
from src.trained import without_source
from tests.toys import clip, image_text_batch, small_vit, text_tower


def refine(**options) -> CLIPRefine:
    torch.manual_seed(5)
    vit = small_vit(**options.pop("backbone", {}))
    return CLIPRefine(vit, text_tower(), OptimizerRecipe(partial(adamw), lr=0.01), **{"embed_dim": 8, **options})


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_random_feature_alignment_is_the_squared_distance_to_the_reference():
    image, text, reference = (numbers(3, 4, seed=seed).requires_grad_() for seed in range(3))
    value = random_feature_alignment(image, text, reference.detach())
    by_hand = sum(
        (x[b, d].item() - reference[b, d].item()) ** 2 for x in (image, text) for b in range(3) for d in range(4)
    )
    assert value.item() == pytest.approx(by_hand / 12, rel=1e-12)
    value.backward()
    torch.testing.assert_close(image.grad, 2 * (image - reference).detach() / 12)


def distilled_by_loops(query, keys, taught, taught_keys, scale, alpha) -> float:
    total = 0.0
    for b in range(len(query)):
        ours, theirs = (
            [math.exp(scale * sum(float(x) * float(y) for x, y in zip(q[b], key, strict=True))) for key in each]
            for q, each in ((query, keys), (taught, taught_keys))
        )
        for j in range(len(keys)):
            target = alpha * (j == b) + (1 - alpha) * theirs[j] / sum(theirs)
            if target:
                total += target * (math.log(target) - math.log(ours[j] / sum(ours)))
    return total / len(query)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_hybrid_distillation_equals_the_divergence_computed_by_loops(alpha):
    given = [numbers(5, 3, seed=seed) for seed in range(4)]
    value = hybrid_distillation(*given, 0, logit_scale=torch.tensor(1.5).double(), alpha=alpha)
    assert value.item() == pytest.approx(distilled_by_loops(*given, 1.5, alpha), rel=1e-10)
    query, keys, taught, taught_keys = given
    halves = [
        hybrid_distillation(
            query[i:j],
            keys,
            taught[i:j],
            taught_keys,
            i,
            logit_scale=torch.tensor(1.5).double(),
            alpha=alpha,
            max_entries=5,
        )
        for i, j in ((0, 2), (2, 5))
    ]
    assert (2 * halves[0] + 3 * halves[1]).item() / 5 == pytest.approx(value.item(), rel=1e-10)
    own = nn.functional.cross_entropy(1.5 * query @ keys.T, torch.arange(5))
    if alpha == 1:  # the target has nothing of the teacher: InfoNCE
        assert value.item() == pytest.approx(own.item(), rel=1e-10)
    if alpha == 0:
        itself = hybrid_distillation(query, keys, query, keys, 0, logit_scale=torch.tensor(1.5).double(), alpha=0.0)
        assert itself.item() == pytest.approx(0, abs=1e-12)


def test_in_chunks_the_gradient_is_the_same_and_the_teacher_has_none():
    query, keys, taught, taught_keys = (numbers(6, 3, seed=seed).requires_grad_() for seed in range(4))
    gradients = []
    for entries in (10**6, 6):
        value = hybrid_distillation(
            query,
            keys,
            taught,
            taught_keys,
            0,
            logit_scale=torch.tensor(2.0).double(),
            alpha=0.5,
            max_entries=entries,
        )
        gradients.append(torch.autograd.grad(value, [query, keys, taught], allow_unused=True))
    for whole, chunks in zip(*gradients, strict=True):
        assert (whole is None) == (chunks is None)
        if whole is not None:
            torch.testing.assert_close(chunks, whole)
    assert gradients[0][2] is None


def test_the_training_step_is_the_sum_of_the_papers_two_losses():
    method, given = refine(), image_text_batch()
    torch.manual_seed(9)
    output = method.training_step(given, 0)
    torch.manual_seed(9)
    image = method.image_projection(method.image_encoder(given["image"]).embedding)
    text = method.text_projection(method.text_encoder(given["text"], given["text_mask"]).embedding)
    reference = torch.randn(4, 8)
    alignment = ((image - reference) ** 2).mean() + ((text - reference) ** 2).mean()
    # teacher and student still have the same weights
    similar = 100 * nn.functional.normalize(image, dim=1) @ nn.functional.normalize(text, dim=1).T
    distillation = 0.0
    for logits in (similar, similar.T):
        target = 0.5 * torch.eye(4) + 0.5 * logits.softmax(dim=1)
        distillation += nn.functional.kl_div(logits.log_softmax(dim=1), target, reduction="batchmean") / 2
    torch.testing.assert_close(output["loss"], alignment + distillation, rtol=1e-4, atol=1e-4)
    output["loss"].backward()
    for name, parameter in method.named_parameters():
        assert (parameter.grad is not None) == (not name.startswith("teacher.") and name != "logit_scale"), name


def test_micro_batches_do_not_change_the_step():
    losses = []
    for size in (None, 3):
        method = refine(micro_batch=size, alignment=0.0).double()
        output = method.training_step({**image_text_batch(), "image": image_text_batch()["image"].double()}, 0)
        output["loss"].backward()
        losses.append((output["loss"], method.text_projection.weight.grad))
    torch.testing.assert_close(losses[1], losses[0])


def test_weights_select_the_losses_and_raw_features_have_no_logit_scale():
    given = image_text_batch()
    for weights, terms in (
        ({"distillation": 0.0}, {"alignment"}),
        ({"alignment": 0.0}, {"distillation"}),
        ({"alignment": 0.0, "distillation": 0.0, "contrast": 1.0}, {"contrast"}),
    ):
        output = refine(**weights).training_step(given, 0)
        assert set(output["logs"]) == terms | {"modality_gap"}
        torch.testing.assert_close(output["loss"], output["logs"][next(iter(terms))])
    method = refine(alignment=0.0, cosine=False)
    image, text = method.teacher_features(given)
    similar = image @ text.T
    expected = sum(
        nn.functional.kl_div(x.log_softmax(dim=1), 0.5 * torch.eye(4) + 0.5 * x.softmax(dim=1), reduction="batchmean")
        for x in (similar, similar.T)
    )
    torch.testing.assert_close(method.training_step(given, 0)["loss"], expected / 2)
    plain = clip()
    contrast = refine(alignment=0.0, distillation=0.0, contrast=1.0, temperature=0.07)
    for name in ("image_encoder", "text_encoder", "image_projection", "text_projection"):
        contrast.get_submodule(name).load_state_dict(plain.get_submodule(name).state_dict())
    torch.testing.assert_close(contrast.training_step(given, 0)["loss"], plain.training_step(given, 0)["loss"])


def saved(module: CLIP, path) -> str:
    content = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(content)
    torch.save(content, path)
    return str(path)


def test_it_starts_from_a_run_and_the_teacher_keeps_its_weights(tmp_path):
    start = clip()
    start.logit_scale.data.fill_(3.0)
    method = refine()
    method.load_start(read_weights(saved(start, tmp_path / "last.ckpt")))
    assert method.logit_scale.item() == 3.0
    optimizer = method.configure_optimizers()
    for _ in range(2):
        method.train()
        optimizer.zero_grad()
        method.training_step(image_text_batch(), 0)["loss"].backward()
        optimizer.step()
    assert not method.teacher.training
    assert not any(parameter in optimizer.state for parameter in method.teacher.parameters())
    for name, value in start.state_dict().items():
        if name != "logit_scale":
            assert torch.equal(method.teacher.state_dict()[name], value), name
            assert not torch.equal(method.state_dict()[name], value), name
    # a resumed run loads the teacher from its own checkpoint
    again = refine()
    again.load_state_dict(method.state_dict())
    expected = start.image_projection(start.image_encoder(image_text_batch()["image"]).embedding)
    torch.testing.assert_close(again.teacher_features(image_text_batch())[0], expected)


def test_a_start_of_another_architecture_and_bad_arguments_raise(tmp_path):
    path = saved(clip(), tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"lacks 12 of the towers' \d+ tensors: image_encoder.backbone.blocks.1"):
        refine(backbone={"depth": 2}).load_start(read_weights(path))
    with pytest.raises(ValueError, match=r"it has image_projection.weight \[8, 16\] instead of \[4"):
        refine(embed_dim=4).load_start(read_weights(path))
    for arguments, message in (
        ({"alpha": 1.5}, "model.alpha must be at least 0"),
        ({"alignment": 0.0, "distillation": 0.0}, "one above 0"),
        ({"temperature": 0.0}, "model.temperature must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            refine(**arguments)


def test_the_recipe_composes():
    words = ["experiment=clip_refine_vitb32", "run.dir=/tmp/run", "checkpoint=/gone"]
    paper = compose([*words, "scale=paper"])
    assert (paper.optimizer.lr, paper.optimizer.weight_decay, paper.data.batch_size) == (1e-6, 0.1, 512)
    assert paper.data.tokenizer_from == "/gone"
    tiny = compose([*words, "scale=tiny"])
    assert isinstance(configuration.instantiate(without_source(tiny).model), CLIPRefine)
    # same towers as CLIP at this scale, so that its runs can be refined
    theirs = compose(["experiment=clip_vitb32", "scale=tiny", "run.dir=/tmp/run"])
    assert tiny.model.text == theirs.model.text
    assert (tiny.model.embed_dim, tiny.data.vocabulary) == (theirs.model.embed_dim, theirs.data.vocabulary)
