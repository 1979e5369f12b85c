"""SLIP, the improved CLIP recipe, and its added objectives, against sums over single pairs and single views."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from src import configuration
from src.models.backbones.weights import Weights
from src.models.image_text.barlip import BarLIP
from src.models.image_text.clip_rocket import CLIPRocket, PairViews, dropout_before_blocks
from src.models.image_text.siamlip import BYOLIP, SiamLIP, cross_modal_regression
from src.models.image_text.slip import SLIP
from src.models.image_text.swalip import SwALIP, assignment, assignment_cross_entropy
from src.optim import OptimizerRecipe
from src.train import compose
from tests.distributed import in_two_processes
from tests.toys import MASK, TEXT, image_text_batch, small_vit, text_tower

SIZES = {"embed_dim": 8, "hidden_dim": 10}


def method(kind=CLIPRocket, **options) -> nn.Module:
    torch.manual_seed(0)
    made = kind(small_vit(), text_tower(), OptimizerRecipe(torch.optim.SGD, lr=0.1), **{**SIZES, **options})
    return made.double()


def views_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    texts = torch.stack([TEXT[[1, 2, 3, 0]], TEXT[[2, 0, 1, 3]]], dim=1)
    views = torch.randn(4, 2, 3, 16, 16, generator=generator, dtype=torch.float64)
    batch = image_text_batch()
    return {
        **batch,
        "image": batch["image"].double(),
        "views": views,
        "text_views": texts,
        "text_views_mask": texts != 0,
    }


def pair_views(seed: int, count: int = 6, width: int = 5) -> PairViews:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(count, width), (count, width), (count, 2, width), (count, 2, width)]
    return PairViews(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes))


def test_the_contrastive_loss_is_the_papers_mean_over_views():
    rocket, batch = method(mask_equal_texts=False), views_batch()
    embeddings = rocket.embeddings(rocket.tower_features(batch))
    labels = torch.arange(4)

    def symmetric(image, text, scale, smoothing):
        logits = scale * image @ text.T
        both = [F.cross_entropy(one, labels, label_smoothing=smoothing) for one in (logits, logits.T)]
        return sum(both) / 2

    weak = symmetric(embeddings.image, embeddings.text, 1 / 0.07, 0.0)
    strong = sum(
        symmetric(embeddings.images[:, a], embeddings.texts[:, b], 1 / 0.1, 0.1) for a in range(2) for b in range(2)
    )
    output = rocket.training_step(batch, 0)
    torch.testing.assert_close(output["loss"], 2 * (weak + 2 * strong / 4) / 3)
    output["loss"].backward()
    assert all(parameter.grad is not None for parameter in rocket.parameters())
    # each view has a forward pass of its own
    direct = rocket.local_image_head(rocket.image_encoder(batch["views"][:, 1]).embedding)
    torch.testing.assert_close(embeddings.images[:, 1], F.normalize(direct, dim=1))
    # texts 1 and 2 of the second view of texts are equal, and are no negatives of each other with the mask
    assert method().training_step(batch, 0)["loss"] < output["loss"]


def test_evaluation_compares_a_weighted_mean_of_both_heads():
    batch, similarities = views_batch(), []
    for share in (0.0, 1.0, 0.3):
        rocket = method(evaluation_share=share).eval()
        similarities.append(rocket.encode_image(batch["image"]) @ rocket.encode_text(TEXT, MASK).T)
    torch.testing.assert_close(similarities[2], 0.7 * similarities[0] + 0.3 * similarities[1])
    assert not torch.allclose(similarities[0], similarities[1])


def test_shared_heads_have_one_temperature():
    rocket = method(separate_heads=False)
    assert not [name for name, _ in rocket.named_parameters() if "local" in name]
    assert [scale.item() for scale in rocket.logit_scales()] == pytest.approx([1 / 0.07, 1 / 0.07])
    assert torch.isfinite(rocket.training_step(views_batch(), 0)["loss"])


def test_dropout_reaches_strong_texts_alone_and_each_block():
    tower = text_tower().double()
    inputs = []
    handles = [b.register_forward_pre_hook(lambda m, x: inputs.append(x[0])) for b in tower.transformer.encoder.layers]
    with dropout_before_blocks(tower, 0.5, True):
        tower(TEXT, MASK)
    dropped, inputs = inputs, []
    tower(TEXT, MASK)
    for before, block_input in zip(dropped, tower.transformer.encoder.layers, strict=True):
        assert before.ndim == 3, block_input
    assert not any(
        block._forward_pre_hooks.keys() - {h.id for h in handles} for block in tower.transformer.encoder.layers
    )
    whole = tower(TEXT, MASK).embedding
    with dropout_before_blocks(tower, 0.5, False):
        torch.testing.assert_close(tower(TEXT, MASK).embedding, whole)
    with dropout_before_blocks(tower, 0.5, True):
        assert not torch.allclose(tower(TEXT, MASK).embedding, whole)
    rocket, batch = method(text_dropout=0.5), views_batch()
    torch.testing.assert_close(rocket.tower_features(batch).text, method().tower_features(batch).text)


def test_siamlip_averages_all_predictions_of_the_other_modality():
    p, v = pair_views(0), pair_views(1)
    total = 2 - 2 * F.cosine_similarity(p.image, v.text).mean() + 2 - 2 * F.cosine_similarity(p.text, v.image).mean()
    for a in range(2):
        for b in range(2):
            total += 2 - 2 * F.cosine_similarity(p.images[:, a], v.texts[:, b]).mean()
            total += 2 - 2 * F.cosine_similarity(p.texts[:, a], v.images[:, b]).mean()
    torch.testing.assert_close(cross_modal_regression(p, v), total / 10)
    v = PairViews(*(tensor.requires_grad_() for tensor in v))
    p = PairViews(*(tensor.requires_grad_() for tensor in p))
    cross_modal_regression(p, v).backward()
    assert all(tensor.grad is None for tensor in v)
    assert all(tensor.grad is not None for tensor in p)


def test_byolip_predicts_a_momentum_encoder_that_takes_no_gradient():
    byolip, batch = method(BYOLIP, objective=partial(SiamLIP, hidden_dim=9, projection_dim=8)), views_batch()
    siamlip = method(objective=partial(SiamLIP, hidden_dim=9, projection_dim=8))
    siamlip.load_state_dict({n: v for n, v in byolip.state_dict().items() if not n.startswith("teacher.")})
    loss = byolip.training_step(batch, 0)["loss"]
    torch.testing.assert_close(loss, siamlip.training_step(batch, 0)["loss"])  # as long as the teacher is a copy
    with torch.no_grad():
        for parameter in byolip.teacher.parameters():
            parameter.mul_(1.1)
    assert not torch.isclose(byolip.training_step(batch, 0)["loss"], loss)
    byolip.training_step(batch, 0)["loss"].backward()
    for name, parameter in byolip.named_parameters():
        assert (parameter.grad is None) == name.startswith("teacher."), name
    (pair,) = byolip.teacher_pairs()
    assert [n for n, _ in pair.student.named_parameters()] == [n for n, _ in pair.teacher.named_parameters()]
    assert pair.student["image_encoder"] is byolip.image_encoder
    assert [key for key in byolip.state_dict() if key.startswith("objective.projectors")]


def test_byolips_teacher_starts_as_a_copy_of_the_towers_it_starts_from():
    byolip, other = (method(BYOLIP, objective=partial(SiamLIP, hidden_dim=9, projection_dim=8)) for _ in range(2))
    with torch.no_grad():
        other.image_encoder.backbone.cls_token.add_(1)
    byolip.load_start(Weights(other.state_dict(), "run"))
    for name, teacher in byolip.teacher["image_encoder"].state_dict().items():
        assert torch.equal(teacher, other.image_encoder.state_dict()[name]), name


def test_barlip_is_the_papers_sum_over_the_correlation():
    torch.manual_seed(0)
    barlip = BarLIP(5, 5, hidden_dim=7, projection_dim=4).double()
    features = pair_views(3)
    projected = barlip.projectors(features)
    expected = 0.0
    pairs = [(projected.image, projected.text)]
    pairs += [(projected.images[:, a], projected.texts[:, b]) for a in range(2) for b in range(2)]
    for image, text in pairs:
        for i in range(4):
            for j in range(4):
                entry = (image[:, i] * text[:, j]).sum() / 6
                expected += (entry - 1) ** 2 if i == j else 5e-3 * entry**2
    torch.testing.assert_close(barlip(features, features, torch.ones(())), 0.025 * expected / 5)


def test_swalip_predicts_the_assignment_of_the_other_views():
    h = PairViews(*(F.normalize(tensor, dim=-1) for tensor in pair_views(4)))
    scale = torch.tensor(7.0, dtype=torch.float64)
    expected = 0.0
    for own, other in ((h.images, h.texts), (h.texts, h.images)):
        for a in range(2):
            for b in range(2):
                codes = torch.exp(own[:, 1 - a] @ other[:, 1 - b].T / 0.05)
                codes = codes / codes.sum()
                for _ in range(3):
                    codes = codes / codes.sum(dim=0, keepdim=True) / 6
                    codes = codes / codes.sum(dim=1, keepdim=True) / 6
                logits = scale * own[:, a] @ other[:, b].T
                expected += F.cross_entropy(logits, 6 * codes) / 8
    torch.testing.assert_close(SwALIP(5, 5)(h, h, scale), 0.2 * expected)
    codes = assignment(h.images[:, 0], h.texts[:, 0], eps=0.05, iterations=3)
    whole, parts = (
        assignment_cross_entropy(h.images[:, 1], h.texts[:, 1], codes, logit_scale=scale, max_entries=entries)
        for entries in (10**6, 6)
    )
    torch.testing.assert_close(parts, whole)


def test_slip_adds_simclr_of_the_views_to_clip():
    slip, batch = method(SLIP, projection_dim=6), views_batch()
    output = slip.training_step(batch, 0)
    h = [slip.image_encoder(view).embedding for view in batch["views"].unbind(1)]
    z = F.normalize(torch.cat([slip.projector(one) for one in h]), dim=1)
    logits = (z @ z.T / 0.1).masked_fill(torch.eye(8, dtype=torch.bool), -math.inf)
    simclr = F.cross_entropy(logits, torch.arange(8).roll(4))
    torch.testing.assert_close(output["loss"], output["logs"]["clip"] + simclr)
    output["loss"].backward()
    assert slip.projector.layers[0].weight.grad.abs().sum() > 0
    clip = method(SLIP, ssl_scale=0.0)
    assert clip.projector is None
    without = clip.training_step({name: value for name, value in batch.items() if name != "views"}, 0)["loss"]
    torch.testing.assert_close(without, output["logs"]["clip"])


OBJECTIVES = {
    "siam": partial(SiamLIP, hidden_dim=9, projection_dim=8),
    "bar": partial(BarLIP, hidden_dim=9, projection_dim=8),
    "swa": SwALIP,
}


def loss_and_gradient(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    results = {}
    for name, objective in OBJECTIVES.items():
        rocket = method(objective=objective, separate_heads=False, label_smoothing=0.0)
        if torch.distributed.is_initialized():
            rocket = nn.SyncBatchNorm.convert_sync_batchnorm(rocket)
        for module in rocket.modules():  # gloo has no synchronized batch norm: fixed statistics keep rows independent
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.track_running_stats = True
                module.running_mean = torch.zeros(module.num_features, dtype=torch.float64)
                module.running_var = torch.ones(module.num_features, dtype=torch.float64)
                module.eval()
        loss = rocket.training_step(batch, 0)["loss"]
        loss.backward()
        results[f"{name}_loss"] = loss.detach()
        results[f"{name}_image"] = rocket.image_projection.weight.grad
        results[f"{name}_tower"] = rocket.image_encoder.backbone.patch_embed.proj.weight.grad
    return results


def in_process(rank: int) -> dict[str, torch.Tensor]:
    return loss_and_gradient({name: value[2 * rank : 2 * rank + 2] for name, value in views_batch().items()})


def test_two_processes_are_one():
    first, second = in_two_processes(in_process)
    for name, whole in loss_and_gradient(views_batch()).items():
        torch.testing.assert_close((first[name] + second[name]) / 2, whole, msg=name)


def test_bad_input_is_named():
    batch = views_batch()
    with pytest.raises(ValueError, match=r"data.extras: this method needs further texts"):
        method().training_step({n: v for n, v in batch.items() if not n.startswith("text_views")}, 0)
    with pytest.raises(
        ValueError, match=r"data.train_view: this method needs 2 further views of each image, and got 1"
    ):
        method().training_step({**batch, "views": batch["views"][:, :1]}, 0)
    two = pair_views(0)
    one = two._replace(images=two.images[:, :1], texts=two.texts[:, :1])
    with pytest.raises(ValueError, match=r"SwALIP swaps two strong views of each image and text, got 1"):
        SwALIP(5, 5)(one, one, torch.ones(()))
    with pytest.raises(ValueError, match=r"model.local_temperature must lie in"):
        method(local_temperature=2.0)
    with pytest.raises(ValueError, match=r"model.text_dropout: with model.micro_batch it must be 0"):
        method(text_dropout=0.1, micro_batch=2)
    with pytest.raises(ValueError, match=r"model.objective: off_diagonal_weight=-1"):
        BarLIP(5, 5, off_diagonal_weight=-1)


def test_recipes_are_the_authors():
    for name in ("clip_rocket_r50", "siamlip_r50", "byolip_r50", "barlip_r50", "swalip_r50", "slip_vitb16"):
        config = compose([f"experiment={name}", "scale=paper", "run.dir=/tmp/run"])
        assert (config.optimizer.lr, config.optimizer.weight_decay, config.data.batch_size) == (3e-3, 0.1, 4096)
        view = configuration.instantiate(config.data.train_view)
        assert view.image.crop.scale == [0.5, 1.0]
        assert (view.views["strong"].count, view.views["strong"].crop.flip) == (2, 0.5)
        assert config.model.get("label_smoothing") == {"slip_vitb16": None, "swalip_r50": 0.0}.get(name, 0.1)
