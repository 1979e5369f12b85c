"""CLIP: its towers, its training step against the paper's pseudocode, and its temperature."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from src import configuration
from src.models.image_text.base import hash_texts
from src.models.image_text.clip import CLIP
from src.train import compose
from tests.toys import MASK, TEXT, clip, image_text_batch, text_tower


def test_a_texts_feature_is_its_last_token_whatever_the_padding():
    tower = text_tower().eval()
    features = tower(TEXT, MASK)
    torch.testing.assert_close(features.embedding, features.tokens[range(4), [3, 2, 5, 3]])
    padded = TEXT.clone()
    padded[~MASK] = 13
    torch.testing.assert_close(tower(padded, MASK).embedding, features.embedding)  # attention is causal
    other = TEXT.clone()
    other[:, 1] = 3
    assert (tower(other, MASK).embedding - features.embedding).abs().amax(dim=1).min() > 1e-4


def test_the_towers_are_initialized_as_in_the_authors_code():
    large = text_tower(vocabulary=2000, width=256, depth=3, heads=4, length=32).transformer
    stds = {name: parameter.std().item() for name, parameter in large.named_parameters() if parameter.ndim > 1}
    width, residual = 256**-0.5, 256**-0.5 * 6**-0.5
    expected = {"token_embedding": 0.02, "position_embedding": 0.01, "q_proj": width, "k_proj": width, "v_proj": width}
    expected |= {"out_proj": residual, "fc1": 512**-0.5, "fc2": residual}
    for name, std in stds.items():
        part = next(part for part in expected if part in name)
        assert std == pytest.approx(expected[part], rel=0.03), name
    assert len(stds) == 2 + 3 * 6
    assert clip().logit_scale.item() == pytest.approx(math.log(1 / 0.07))


def test_the_training_step_equals_the_papers_pseudocode():
    method, given = clip().train(), image_text_batch()
    output = method.training_step(given, 0)
    image = method.image_encoder(given["image"]).embedding @ method.image_projection.weight.T
    text = method.text_encoder(TEXT, MASK).embedding @ method.text_projection.weight.T
    image, text = (x / x.norm(dim=1, keepdim=True) for x in (image, text))
    logits = (image @ text.T) / 0.07
    # texts 0 and 3 are equal
    logits[0, 3] = logits[3, 0] = -math.inf
    labels = torch.arange(4)
    expected = (nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(output["loss"], expected)
    output["loss"].backward()
    assert method.logit_scale.grad.abs() > 0
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None, name
    assert hash_texts(TEXT).tolist()[0] == hash_texts(TEXT).tolist()[3]
    assert len(set(hash_texts(TEXT).tolist())) == 3


def test_hashes_are_equal_exactly_where_all_tokens_are():
    """Hashes partition many short texts of few tokens as torch.unique does."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, 3, (4000, 8), generator=generator)
    numbers, (_, expected) = hash_texts(text), torch.unique(text, dim=0, return_inverse=True)
    assert len(set(zip(numbers.tolist(), expected.tolist(), strict=True))) == len(set(expected.tolist()))
    assert len(set(numbers.tolist())) == len(set(expected.tolist()))
    large = torch.tensor([[49406, 320, 49407], [320, 49406, 49407], [49406, 320, 49407]])
    assert hash_texts(large)[0] == hash_texts(large)[2] != hash_texts(large)[1]


def test_equal_texts_are_negatives_without_mask_equal_texts():
    as_in_the_paper, masked = (
        clip(mask_equal_texts=value).training_step(image_text_batch(), 0)["loss"] for value in (False, True)
    )
    assert as_in_the_paper > masked


def test_the_logit_scale_is_clamped_after_the_step_and_not_decayed(monkeypatch):
    method = clip()
    groups = method.configure_optimizers().param_groups
    assert next(g["weight_decay"] for g in groups if "logit_scale" in g["names"]) == 0
    monkeypatch.setattr(method, "log", lambda *a, **k: None)
    monkeypatch.setattr(method, "log_dict", lambda *a, **k: None)
    logs = SimpleNamespace(should_update_logs=True)
    method._trainer = SimpleNamespace(accumulate_grad_batches=1, _logger_connector=logs)  # type: ignore[assignment]
    for start, expected in ((6.0, math.log(100)), (-1.0, 0.0), (3.0, 3.0)):
        method.logit_scale.data.fill_(start)
        method.on_train_batch_end({"loss": torch.zeros(())}, image_text_batch(), 0)
        assert method.logit_scale.item() == pytest.approx(expected)


def test_bad_arguments_raise():
    with pytest.raises(ValueError, match=r"texts of 6 tokens do not fit a tower of 5"):
        text_tower(length=5)(TEXT, MASK)
    with pytest.raises(ValueError, match=r"model.temperature must lie in"):
        clip(temperature=0.001)
    with pytest.raises(ValueError, match=r"data.batch_size: a contrastive loss needs at least 2"):
        clip().training_step({name: value[:1] for name, value in image_text_batch().items()}, 0)


@pytest.mark.parametrize("scale", ["paper", "smoke", "tiny"])
def test_the_recipe_composes_with_any_captioned_data(scale):
    for data in ("scenes", "emoji"):
        config = compose(["experiment=clip_vitb32", f"data={data}", f"scale={scale}", "run.dir=/tmp/run"])
        assert config.data._target_.endswith("DataModule")
        assert config.model.text.vocabulary == config.data.vocabulary
    if scale == "paper":
        assert (config.optimizer.lr, config.optimizer.weight_decay, config.data.batch_size) == (5e-4, 0.2, 32768)
        assert config.schedules.optimizer.lr.warmup == "2000 steps"
    if scale == "tiny":
        assert isinstance(configuration.instantiate(config.model), CLIP)
