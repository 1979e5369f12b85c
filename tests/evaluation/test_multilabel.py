"""Every class that is seen: which ones, from which image, and how well they are found."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import scipy.optimize
import torch

from src.datamodules.scenes.source import ScenesSource
from src.errors import SettingError
from src.evaluation.errors import NotApplicable
from src.evaluation.evaluation import run_evaluations
from src.evaluation.features import FeatureSet, FeatureSets
from src.evaluation.knn import KNN
from src.evaluation.linear import LinearProbe
from src.evaluation.multilabel import MultiLabelProbe, binary_cross_entropy, mean_average_precision
from src.evaluation.pixels import PixelEncoder
from tests.evaluation.toy import features, make_data, random_rows, squares, subject

CPU = torch.device("cpu")


def tagged(rows: int, seed: int) -> FeatureSet:
    """Three classes, each there where its own direction is: the third in a tenth of all samples."""
    features = random_rows(rows, 6, seed)
    tags = features[:, :3] + 0.5 * random_rows(rows, 3, seed + 50) > torch.tensor([0.0, 0.5, 1.4])
    return FeatureSet(features, torch.zeros(rows, dtype=torch.int64), tags=tags)


def test_average_precision_by_hand() -> None:
    """Class 0: right at places 1 and 3, (1 + 2/3) / 2. Class 1: right at place 2, 1/2. Class 2 is nowhere."""
    scores = torch.tensor([[3.0, 0.0, 9.0], [2.0, 40.0, 1.0], [1.0, 30.0, 2.0], [0.0, -9.0, 3.0]])
    tags = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 0], [0, 0, 0]], dtype=torch.bool)
    assert mean_average_precision(scores, tags) == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert mean_average_precision(scores, torch.zeros_like(tags)) == 0


def test_large_scores_are_ranked_and_equal_ones_are_tied() -> None:
    """A sigmoid of 40 and of 41 is 1 in float64. By hand: the wrong ones first, so 1/3 and 2/4; all in one tie: 2/4."""
    scores = torch.tensor([[43.0], [42.0], [41.0], [40.0]])
    tags = torch.tensor([[0], [0], [1], [1]], dtype=torch.bool)
    assert mean_average_precision(scores, tags) == pytest.approx((1 / 3 + 2 / 4) / 2)
    assert mean_average_precision(scores - 1000, tags) == pytest.approx((1 / 3 + 2 / 4) / 2)
    assert mean_average_precision(torch.full((4, 1), 40.0), tags) == pytest.approx(2 / 4)


def test_each_class_has_the_minimizer_it_would_have_alone() -> None:
    bank = tagged(60, 0)
    tags = bank.tags.float()  # type: ignore[union-attr]
    probe = LinearProbe(tolerance=1e-7)
    weights = probe.fit(bank.features, tags, 3, 0.01, loss=binary_cross_entropy)
    x, y = bank.features.double().numpy(), tags[:, 1].double().numpy()

    def value(w: np.ndarray) -> float:
        logits = x @ w[:-1] + w[-1]
        return float(np.mean(np.logaddexp(0, logits) - y * logits) + 0.005 * (w[:-1] ** 2).sum())

    expected = scipy.optimize.minimize(value, np.zeros(7), options={"gtol": 1e-9}).x
    np.testing.assert_allclose(weights[:, 1].numpy(), expected, atol=1e-3)


def test_tags_are_learned_and_l2_does_not_depend_on_queries() -> None:
    bank, query = tagged(300, 0), tagged(200, 1)
    found = MultiLabelProbe().score(FeatureSets(bank, query), CPU)
    assert found["multilabel_map"] > 0.8
    other = FeatureSet(query.features, query.labels, tags=~query.tags)  # type: ignore[operator]
    turned = MultiLabelProbe().score(FeatureSets(bank, other), CPU)
    assert turned["multilabel_l2"] == found["multilabel_l2"]
    assert turned["multilabel_map"] < 0.6


def test_tags_of_scenes_are_in_the_rows_of_their_images() -> None:
    source = partial(ScenesSource, count=12, resolution=32, fields=("labels",))
    data = make_data(source, eval_batch_size=5)
    sets = features({"": PixelEncoder(2)}, data, [MultiLabelProbe()], query_samples=7)[""]
    for part, split in ((sets.bank, "train"), (sets.query, "val")):
        drawn = source(split)  # type: ignore[arg-type]
        everything = torch.stack([drawn[index]["fields"]["labels"] for index in range(12)])
        positions = range(12) if split == "train" else data._subset(drawn, 7)  # type: ignore[arg-type]
        assert torch.equal(part.tags, everything[list(positions)])  # type: ignore[arg-type]
        assert part.tags.any(dim=1).all()  # type: ignore[union-attr]
    assert features({"": PixelEncoder(2)}, data, [KNN()])[""].bank.tags is None
    found = run_evaluations(subject({"": PixelEncoder(2)}, data), [MultiLabelProbe()])
    assert 0 < found["multilabel_map"] <= 1


def test_data_with_one_class_per_image_is_not_applicable() -> None:
    assert "knn_top1" in run_evaluations(subject({"": PixelEncoder(1)}, squares()), [KNN()])
    with pytest.raises(NotApplicable, match="all classes of an image are needed"):
        run_evaluations(subject({"": PixelEncoder(1)}, squares()), [KNN(), MultiLabelProbe()])
    with pytest.raises(SettingError, match=r"data.source: Squares knows at most one class an image"):
        squares().tags("val", torch.tensor([0]))
