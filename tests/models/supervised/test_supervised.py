import math

import pytest
import torch

from src.datamodules.batches.base import BatchError
from src.models.supervised.supervised import Supervised
from tests.models.joint_embedding import toy


def supervised(**options: object) -> Supervised:
    torch.manual_seed(0)
    method = Supervised(toy.vit(), toy.optimizer(), **options)
    method.build(3)
    return method


def batch(labels: list[int]) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"image": torch.randn(len(labels), 3, toy.SIDE, toy.SIDE), "label": torch.tensor(labels)}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_cross_entropy_of_the_pooled_features(smoothing):
    method, labels = supervised(smoothing=smoothing), [2, 0, 1, 1]
    method.head.weight.data.normal_()
    output = method.training_step(batch(labels), 0)
    features = method.encoder.backbone.forward_features(batch(labels)["image"])[:, 1:].mean(dim=1)
    total = 0.0
    for row, label in zip(method.head(features).tolist(), labels, strict=True):
        log_sum = math.log(sum(math.exp(value) for value in row))
        total += log_sum - (1 - smoothing) * row[label] - smoothing * sum(row) / 3
    assert output["loss"].item() == pytest.approx(total / 4, rel=1e-5)
    assert torch.allclose(output["embedding"], features, atol=1e-6)
    assert not output["embedding"].requires_grad
    output["loss"].backward()
    assert method.encoder.backbone.patch_embed.proj.weight.grad.abs().sum() > 0


def test_missing_labels_and_bad_smoothing_are_refused():
    with pytest.raises(BatchError, match="2 of 4 samples of a batch have none"):
        supervised().training_step(batch([0, -1, 2, -1]), 0)
    with pytest.raises(ValueError, match=r"model\.smoothing=.* must lie in"):
        supervised(smoothing=1.0)
