"""ALIGN: its towers, its training step by hand, and its temperature."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from src import configuration
from src.errors import SettingError
from src.models.backbones.efficientnet import headless_efficientnet
from src.models.backbones.image_encoder import ImageEncoder
from src.models.image_text.align import ALIGN
from src.models.text.text_tower import TransformersTextTower
from src.optim import OptimizerRecipe, lamb
from src.train import compose
from tests.toys import MASK, TEXT, image_text_batch


def bert() -> TransformersTextTower:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return TransformersTextTower({"model_type": "bert", **small, **no_dropout}, vocabulary=20, length=6)


def align(**options) -> ALIGN:
    torch.manual_seed(0)
    backbone = headless_efficientnet("test_efficientnet", num_classes=0)
    return ALIGN(backbone, bert(), OptimizerRecipe(partial(lamb), lr=0.1, weight_decay=1e-5), **options)


def given() -> dict[str, torch.Tensor]:
    image = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return {**image_text_batch(), "image": image}


def test_a_text_is_read_at_its_start_by_all_words_and_no_filling():
    texts = bert().eval()
    found = texts(TEXT, MASK)
    torch.testing.assert_close(found.embedding, found.tokens[:, 0])
    filled = TEXT.clone()
    filled[~MASK] = 13
    torch.testing.assert_close(texts(filled, MASK).embedding, found.embedding)
    for place in range(6):  # each word is seen from the start
        other = TEXT.clone()
        other[:, place] = 11
        changed = (texts(other, MASK).embedding - found.embedding).abs().amax(dim=1) > 1e-6
        assert torch.equal(changed, MASK[:, place]), place


def test_a_step_is_the_paper_s_sum_of_two_smoothed_cross_entropies():
    method = align()
    output = method.training_step(given(), 0)
    image = method.image_encoder.backbone.forward_features(given()["image"]).mean(dim=(2, 3))  # no projection
    text = method.text_encoder(TEXT, MASK).embedding @ method.text_projection.weight.T + method.text_projection.bias
    image, text = (x / x.norm(dim=1, keepdim=True) for x in (image, text))
    scores = image @ text.T / 1.0
    expected = 0.0
    for logits in (scores, scores.T):
        for row in range(4):
            others = [column for column in range(4) if column == row or {row, column} != {0, 3}]  # equal texts
            target = [0.9 * (column == row) + 0.1 / len(others) for column in others]
            log_p = logits[row, others].log_softmax(dim=0)
            expected = expected - sum(p * q for p, q in zip(target, log_p, strict=True)) / 4
    torch.testing.assert_close(output["loss"], expected)
    as_in_the_paper = align(mask_equal_texts=False).training_step(given(), 0)["loss"]
    labels, smoothed = torch.arange(4), partial(nn.functional.cross_entropy, label_smoothing=0.1)
    torch.testing.assert_close(as_in_the_paper, smoothed(scores, labels) + smoothed(scores.T, labels))
    output["loss"].backward()
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None, name


def test_the_temperature_divides_and_stays_above_nothing(monkeypatch):
    method = align()
    assert method.temperature.item() == align(temperature=1).temperature.item() == 1  # a whole number does as well
    groups = method.configure_optimizers().param_groups
    assert next(g["weight_decay"] for g in groups if "temperature" in g["names"]) == 0
    monkeypatch.setattr(method, "log", lambda *a, **k: None)
    monkeypatch.setattr(method, "log_dict", lambda *a, **k: None)
    logs = SimpleNamespace(should_update_logs=True)
    method._trainer = SimpleNamespace(accumulate_grad_batches=1, _logger_connector=logs)  # type: ignore[assignment]
    for start, expected in ((-0.5, 1e-3), (0.01, 0.01), (3.0, 3.0)):
        method.temperature.data.fill_(start)
        method.on_train_batch_end({"loss": torch.zeros(())}, given(), 0)
        assert method.temperature.item() == pytest.approx(expected)


def test_the_backbone_ends_with_its_last_block():
    encoder = ImageEncoder(headless_efficientnet("test_efficientnet", num_classes=0)).eval()
    image = given()["image"]
    plain = encoder.backbone
    features = encoder(image)
    torch.testing.assert_close(features.patches, plain.blocks(plain.bn1(plain.conv_stem(image))).flatten(2).mT)
    assert (encoder.dim, features.grid) == (64, (2, 2))
    with pytest.raises(SettingError, match=r"backbone.model_name=test_resnet must be an EfficientNet, not a ResNet"):
        headless_efficientnet("test_resnet", num_classes=0)


def test_bad_arguments_raise():
    with pytest.raises(ValueError, match="min_temperature <= temperature"):
        align(temperature=0.0)
    with pytest.raises(ValueError, match="label_smoothing must be at least 0"):
        align(label_smoothing=1.0)


@pytest.mark.parametrize("scale", ["paper", "tiny"])
def test_the_recipe_composes(scale):
    config = compose(["experiment=align_b7", f"scale={scale}", "run.dir=/tmp/run"])
    if scale == "paper":
        assert (config.optimizer.lr, config.optimizer.weight_decay, config.data.batch_size) == (1e-3, 1e-5, 16384)
        assert (config.image_size, config.model.text.architecture.hidden_size) == (289, 768)
        assert config.model.label_smoothing == 0.1
        share = config.data.train_view.scale[0]
        assert math.sqrt(share) == pytest.approx(289 / 346, abs=1e-4)
    if scale == "tiny":
        assert isinstance(configuration.instantiate(config.model), ALIGN)
