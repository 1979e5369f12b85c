from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from src.errors import SettingError
from src.evaluation.features import FeatureSets, embedding_and_patches, mean_of_patches
from src.evaluation.knn import KNN
from src.evaluation.linear import LinearProbe
from src.evaluation.pixels import PixelEncoder
from src.evaluation.run import feature_sets, run_evaluators
from tests.evaluation.toy import Squares, make_data, squares, tiny_encoder

CPU = torch.device("cpu")


def test_names_say_which_encoder() -> None:
    def width(sets: FeatureSets, device: torch.device) -> dict[str, float]:
        return {"width": float(sets.query.features.shape[1])}

    encoders = {"student": tiny_encoder(), "small": PixelEncoder(2), "large": PixelEncoder(4)}
    scores = run_evaluators(encoders, squares(), [width], CPU)
    assert scores == {"width": 32.0, "width_small": 12.0, "width_large": 48.0}


def test_limits_draw_evenly_from_a_set_in_the_order_of_its_classes() -> None:
    sets = feature_sets({"": PixelEncoder(1)}, squares(length=60), CPU, bank_samples=30, query_samples=24)[""]
    assert (len(sets.bank.labels), len(sets.query.labels)) == (30, 24)
    assert set(sets.query.labels.tolist()) == set(sets.bank.labels.tolist()) == {0, 1, 2}
    again = feature_sets({"": PixelEncoder(1)}, squares(length=60, seed=5), CPU, bank_samples=30, query_samples=24)[""]
    assert torch.equal(sets.query.features, again.query.features)  # the same for every seed of a run


def test_bank_and_queries_come_from_their_own_splits() -> None:
    sets = feature_sets({"": PixelEncoder(1)}, squares(length=60), CPU)[""]
    for part, split in ((sets.bank, "train"), (sets.query, "val")):
        images = torch.from_numpy(Squares(split, length=60).images).float()
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        torch.testing.assert_close(part.features, (images.mean(dim=(2, 3)) / 255 - mean) / std, rtol=0, atol=1e-5)


def test_random_numbers_are_left_alone() -> None:
    def states() -> list[object]:
        return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]

    before = states()
    run_evaluators({"": tiny_encoder()}, squares(), [KNN(), LinearProbe()], CPU)
    assert states() == before


def test_products_are_exact_whatever_training_allows_itself() -> None:
    seen = []

    def look(sets: FeatureSets, device: torch.device) -> dict[str, float]:
        seen.append(torch.get_float32_matmul_precision())
        return {}

    torch.set_float32_matmul_precision("medium")
    try:
        run_evaluators({"": PixelEncoder(1)}, squares(), [look], CPU)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["highest"]


def test_pixels_are_averaged_by_area() -> None:
    image = torch.zeros(1, 3, 4, 4)
    image[0, 0] = torch.tensor([[1.0, 3, 0, 0], [5, 7, 0, 0], [0, 0, 8, 8], [0, 0, 8, 8]])
    features = PixelEncoder(2)(image)
    assert features.embedding.tolist() == [[4.0, 0, 0, 8] + [0.0] * 8]
    assert features.patches.tolist() == [[[4.0, 0, 0], [0, 0, 0], [0, 0, 0], [8, 0, 0]]]
    assert features.grid == (2, 2)
    assert PixelEncoder(2).dim == 12
    with pytest.raises(ValueError, match="size"):
        PixelEncoder(0)


def test_pixels_tell_the_colors_apart() -> None:
    scores = run_evaluators({"pixels": PixelEncoder(1)}, squares(length=60), [KNN(k=5), LinearProbe()], CPU)
    assert scores["knn_top1"] > 0.9
    assert scores["linear_top1"] > 0.9


def test_queries_come_from_the_split_that_is_asked_for() -> None:
    def mean(split: str) -> torch.Tensor:
        images = torch.from_numpy(np.stack([Numbered(split)[index]["image"] for index in range(6)])).float()
        return images.mean(dim=(1, 2, 3)) / 255

    class Numbered(Squares):
        """Squares that tell the splits apart."""

        def __init__(self, split: str) -> None:
            super().__init__("val", length=6)
            self.images = self.images // 4 + {"train": 0, "val": 60, "test": 120}[split]
            self.images = self.images.astype(np.uint8)

    data = make_data(Numbered)
    for split in ("val", "test"):
        sets = feature_sets({"": PixelEncoder(1)}, data, CPU, split=split)[""]
        for part, name in ((sets.bank, "train"), (sets.query, split)):
            std, center = torch.tensor([0.229, 0.224, 0.225]), torch.tensor([0.485, 0.456, 0.406])
            torch.testing.assert_close((part.features * std + center).mean(dim=1), mean(name), rtol=0, atol=1e-5)
    for split in ("train", "tset"):
        with pytest.raises(SettingError, match=rf"evaluate.split is val or test.*not '{split}'"):
            feature_sets({"": PixelEncoder(1)}, data, CPU, split=split)


def test_pools_are_of_the_same_forward_pass() -> None:
    encoder, seen = tiny_encoder(), []
    encoder.register_forward_hook(lambda *_: seen.append(1))
    probe = LinearProbe(pools={"patches": mean_of_patches, "both": embedding_and_patches})
    sets = feature_sets({"": encoder}, squares(length=20), CPU, evaluators=[probe])[""]
    assert len(seen) == 4  # two batches of bank and queries each, once
    for name, pool in probe.pools.items():
        alone = feature_sets({"": tiny_encoder()}, squares(length=20), CPU, pool=pool)[""]
        assert torch.equal(sets.pooled[name].query.features, alone.query.features)
        assert torch.equal(sets.pooled[name].bank.labels, sets.bank.labels)
    few = sets.learning_from(torch.tensor([3, 5]))
    assert torch.equal(few.pooled["both"].bank.features, sets.pooled["both"].bank.features[[3, 5]])
    assert torch.equal(few.query.features, sets.query.features)


def test_a_pool_that_means_two_things_is_refused() -> None:
    probes = [LinearProbe(pools={"it": pool}) for pool in (mean_of_patches, embedding_and_patches)]
    with pytest.raises(SettingError, match="something different by the pool 'it'"):
        feature_sets({"": tiny_encoder()}, squares(), CPU, evaluators=probes)
