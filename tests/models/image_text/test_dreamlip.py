"""DreamLIP: groups of patches by hand, sentences as positives and never as negatives, and its data."""

import pytest
import torch
from torch.nn import functional as F

from src import configuration
from src.datamodules.decoding import BadSample
from src.datamodules.extras.sentences import CaptionSentences, split_sentences
from src.datamodules.scenes.source import ScenesSource
from src.datamodules.sources.texts import TextListSource
from src.models.image_text.dreamlip import DreamLIP
from src.models.losses.grouping import group_patches, patch_weights, within_image_loss
from src.optim import OptimizerRecipe
from src.train import compose
from tests.distributed import in_two_processes
from tests.toys import TEXT, image_text_batch, small_vit, text_tower


def dreamlip(**options) -> DreamLIP:
    torch.manual_seed(0)
    recipe = OptimizerRecipe(torch.optim.SGD, lr=0.1)
    return DreamLIP(small_vit(), text_tower(), recipe, **{"embed_dim": 8, **options}).double()


def sentences_batch() -> dict[str, torch.Tensor]:
    batch = image_text_batch()
    texts = torch.stack([TEXT[[1, 2, 3, 0]], TEXT[[2, 0, 1, 1]]], dim=1)
    return {**batch, "image": batch["image"].double(), "text_views": texts, "text_views_mask": texts != 0}


def test_a_sentence_weights_patches_by_its_scaled_similarities():
    text = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    angles = torch.tensor([0.0, 60.0, 90.0, 180.0], dtype=torch.float64).deg2rad()
    patches = torch.stack([angles.cos(), angles.sin()], dim=1)[None]
    # similarities 1, 0.5, 0, -1 are scaled to 1, 0.75, 0.5, 0
    expected = torch.tensor([1.0, 0.75, 0.0, 0.0], dtype=torch.float64) / 1.75
    torch.testing.assert_close(patch_weights(text, patches, 0.6)[0, 0], expected)
    group = 1.0 * patches[0, 0] + 0.75 * patches[0, 1]
    torch.testing.assert_close(group_patches(text, patches, 0.6)[0, 0], group / group.norm())
    same = patches[:, :1].expand(1, 4, 2)  # all equal: no patch is preferred, and nothing is divided by 0
    assert torch.isfinite(group_patches(text, same.clone().requires_grad_(), 0.6)).all()


def test_only_other_sentences_of_the_same_image_are_negatives():
    generator = torch.Generator().manual_seed(0)
    groups, text = (F.normalize(torch.randn(2, 3, 5, generator=generator).double(), dim=-1) for _ in range(2))
    hashes = torch.tensor([[1, 2, 3], [4, 5, 4]])
    expected = 0.0
    for image in range(2):
        logits = 3.0 * groups[image] @ text[image].T
        if image == 1:  # sentences 0 and 2 are equal
            logits[0, 2] = logits[2, 0] = -torch.inf
        expected += F.cross_entropy(logits, torch.arange(3)) / 4 + F.cross_entropy(logits.T, torch.arange(3)) / 4
    scale = torch.tensor(3.0, dtype=torch.float64)
    torch.testing.assert_close(within_image_loss(groups, text, hashes, logit_scale=scale), expected)


def test_the_step_is_clips_loss_averaged_over_texts_and_the_groups():
    method, batch = dreamlip(), sentences_batch()
    output = method.training_step(batch, 0)
    image = method.encode_image(batch["image"])
    contrast = 0.0
    for ids in (TEXT, *batch["text_views"].unbind(1)):
        logits = image @ method.encode_text(ids, ids != 0).T / 0.07
        equal = (ids[:, None] == ids[None]).all(dim=2) & ~torch.eye(4, dtype=torch.bool)
        logits = logits.masked_fill(equal, -torch.inf)
        contrast += (F.cross_entropy(logits, torch.arange(4)) + F.cross_entropy(logits.T, torch.arange(4))) / 6
    torch.testing.assert_close(output["logs"]["contrast"], contrast)
    torch.testing.assert_close(output["loss"], contrast + output["logs"]["grouping"])
    output["loss"].backward()
    assert all(parameter.grad is not None for parameter in method.parameters())
    patches = F.normalize(method.patch_projection(method.image_encoder(batch["image"]).patches), dim=-1)
    torch.testing.assert_close(method.encode_patches(batch["image"]).flatten(1, 2), patches)
    without = dreamlip(grouping_weight=0.0)
    torch.testing.assert_close(without.training_step(batch, 0)["loss"], contrast)
    assert not hasattr(without, "patch_projection")


def loss_and_gradient(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    results = {}
    for within in (True, False):
        method = dreamlip(within_image=within)
        loss = method.training_step(batch, 0)["loss"]
        loss.backward()
        results |= {f"{within}_{name}": parameter.grad for name, parameter in method.named_parameters()}
        results[f"{within}_loss"] = loss.detach()
    return results


def in_process(rank: int) -> dict[str, torch.Tensor]:
    return loss_and_gradient({name: value[2 * rank : 2 * rank + 2] for name, value in sentences_batch().items()})


def test_two_processes_are_one():
    first, second = in_two_processes(in_process)
    for name, whole in loss_and_gradient(sentences_batch()).items():
        torch.testing.assert_close((first[name] + second[name]) / 2, whole, msg=name)


class Listed(TextListSource):
    input_key = "image"

    def raw_texts(self, index):
        return [["a photo", "A disc. A ring </s>\nA star."], ["a photo"]][index]


class Short:
    """A source of captions without long ones."""

    def caption(self, index, choice):
        return "a photo"

    def captions(self, index):
        return ["a photo"]


def test_sentences_of_long_captions_are_drawn_besides_the_caption():
    assert split_sentences("A disc. A ring </s>\nA star.") == ["A disc", "A ring", "A star"]
    drawn = [CaptionSentences(count=2).read(Listed(), 0, choice, 0) for choice in (0.1, 0.2, 0.3, 0.4, 0.5)]
    for caption, *sentences in drawn:
        assert caption == "a photo"
        assert len(set(sentences) & {"A disc", "A ring", "A star"}) == 2
    assert len({tuple(texts) for texts in drawn}) > 1
    assert len(CaptionSentences(count=9).read(Listed(), 0, 0.1, 0)) == 10
    with pytest.raises(BadSample, match="it has no long caption"):
        CaptionSentences().read(Listed(), 1, 0.1, 0)
    source = ScenesSource("train", count=4, resolution=16)
    caption, *sentences = CaptionSentences(count=2).read(source, 1, 0.5, 0)
    described = split_sentences(source.descriptions(1, 0.5)[0])
    assert set(sentences) <= set(described)
    assert len(described) == 1 + len(source.scene(1).objects)
    assert "." not in caption
    learned = list(CaptionSentences().vocabulary_texts(source, 4))
    assert source.descriptions(1, 0.5)[0] in learned


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"data.extras: this method needs further texts of each image"):
        dreamlip().training_step({**image_text_batch(), "image": image_text_batch()["image"].double()}, 0)
    with pytest.raises(ValueError, match=r"model.threshold must lie in \[0, 1\]"):
        dreamlip(threshold=2.0)
    with pytest.raises(ValueError, match=r"model.contrast_weight=0"):
        dreamlip(contrast_weight=0.0)
    with pytest.raises(ValueError, match=r"model.local_temperature must lie in"):
        dreamlip(local_temperature=3.0)
    with pytest.raises(ValueError, match=r"data.extras.count must be at least 1"):
        CaptionSentences(count=0)
    with pytest.raises(ValueError, match=r"data.source: Short has no long captions"):
        CaptionSentences().check(Short())


def test_the_recipe_composes():
    config = compose(["experiment=dreamlip_vitb16", "scale=paper", "run.dir=/tmp/run"])
    assert (config.data.extras.count, config.model.threshold, config.optimizer.lr) == (6, 0.0, 5e-4)
    tiny = compose(["experiment=dreamlip_vitb16", "scale=tiny", "run.dir=/tmp/run"])
    assert isinstance(configuration.instantiate(tiny.model), DreamLIP)
