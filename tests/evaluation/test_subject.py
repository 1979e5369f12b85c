from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from src.errors import SettingError, UserError
from src.evaluation.errors import NotApplicable
from src.evaluation.evaluation import FeatureEvaluation, joined_needs, run_evaluations
from src.evaluation.features import FeatureSets, embedding_and_patches, extract, mean_of_patches
from src.evaluation.knn import KNN
from src.evaluation.linear import LinearProbe
from src.evaluation.pixels import PixelEncoder
from tests.evaluation.toy import Squares, features, make_data, squares, subject, tiny_encoder

CPU = torch.device("cpu")


def test_names_say_which_encoder() -> None:
    class Width(FeatureEvaluation):
        def score(self, sets: FeatureSets, device: torch.device) -> dict[str, float]:
            return {"width": float(sets.query.features.shape[1])}

    encoders = {"student": tiny_encoder(), "small": PixelEncoder(2), "large": PixelEncoder(4)}
    scores = run_evaluations(subject(encoders, squares()), [Width()])
    assert scores == {"width": 32.0, "width_small": 12.0, "width_large": 48.0}


def test_limits_draw_evenly_from_a_set_in_the_order_of_its_classes() -> None:
    sets = features({"": PixelEncoder(1)}, squares(length=60), bank_samples=30, query_samples=24)[""]
    assert (len(sets.bank.labels), len(sets.query.labels)) == (30, 24)
    assert set(sets.query.labels.tolist()) == set(sets.bank.labels.tolist()) == {0, 1, 2}
    again = features({"": PixelEncoder(1)}, squares(length=60, seed=5), bank_samples=30, query_samples=24)[""]
    assert torch.equal(sets.query.features, again.query.features)  # the same for every seed of a run


def test_bank_and_queries_come_from_their_own_splits() -> None:
    sets = features({"": PixelEncoder(1)}, squares(length=60))[""]
    for part, split in ((sets.bank, "train"), (sets.query, "val")):
        images = torch.from_numpy(Squares(split, length=60).images).float()
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        torch.testing.assert_close(part.features, (images.mean(dim=(2, 3)) / 255 - mean) / std, rtol=0, atol=1e-5)


def test_random_numbers_are_left_alone() -> None:
    def states() -> list[object]:
        return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]

    before = states()
    run_evaluations(subject({"": tiny_encoder()}, squares()), [KNN(), LinearProbe()])
    assert states() == before


def test_products_are_exact_whatever_training_allows_itself() -> None:
    seen = []

    class Look(FeatureEvaluation):
        def score(self, sets: FeatureSets, device: torch.device) -> dict[str, float]:
            seen.append(torch.get_float32_matmul_precision())
            return {}

    torch.set_float32_matmul_precision("medium")
    try:
        run_evaluations(subject({"": PixelEncoder(1)}, squares()), [Look()])
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
    scores = run_evaluations(subject({"pixels": PixelEncoder(1)}, squares(length=60)), [KNN(k=5), LinearProbe()])
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
        sets = features({"": PixelEncoder(1)}, data, split=split)[""]
        for part, name in ((sets.bank, "train"), (sets.query, split)):
            std, center = torch.tensor([0.229, 0.224, 0.225]), torch.tensor([0.485, 0.456, 0.406])
            torch.testing.assert_close((part.features * std + center).mean(dim=1), mean(name), rtol=0, atol=1e-5)
    for split in ("train", "tset"):
        with pytest.raises(SettingError, match=rf"evaluate.split is val or test.*not '{split}'"):
            features({"": PixelEncoder(1)}, data, split=split)


def test_readouts_are_of_the_same_forward_pass() -> None:
    encoder, passes = tiny_encoder(), []
    encoder.register_forward_hook(lambda *_: passes.append(1))
    probe = LinearProbe(readouts={"patches": mean_of_patches, "both": embedding_and_patches})
    sets = features({"": encoder}, squares(length=20), [probe])[""]
    assert len(passes) == 4  # two batches of bank and queries each, once
    data = squares(length=20)
    for name, readout in probe.readouts.items():
        alone = extract({"": tiny_encoder()}, data.val_dataloader(), data, CPU, readout=readout)[""]
        assert torch.equal(sets.readouts[name].query.features, alone.features)
        assert torch.equal(sets.readouts[name].bank.labels, sets.bank.labels)
    few = sets.learning_from(torch.tensor([3, 5]))
    assert torch.equal(few.readouts["both"].bank.features, sets.readouts["both"].bank.features[[3, 5]])
    assert torch.equal(few.query.features, sets.query.features)


def test_a_readout_defined_twice_is_refused() -> None:
    probes = [LinearProbe(readouts={"it": readout}) for readout in (mean_of_patches, embedding_and_patches)]
    with pytest.raises(SettingError, match="two evaluations define the readout 'it' differently"):
        joined_needs(probes)


def test_several_evaluations_read_the_data_once() -> None:
    encoder, passes = tiny_encoder(), []
    encoder.register_forward_hook(lambda *_: passes.append(1))
    grid = LinearProbe(readouts={"patches": mean_of_patches}, name="grid")
    scores = run_evaluations(subject({"": encoder}, squares(length=20)), [KNN(), LinearProbe(), grid])
    assert {"knn_top1", "linear_top1", "grid_top1"} <= set(scores)
    assert len(passes) == 4
    alone = run_evaluations(subject({"": tiny_encoder()}, squares(length=20)), [LinearProbe()])
    assert alone == {name: scores[name] for name in alone}


def test_one_encoder_is_chosen_by_name_or_is_the_first() -> None:
    both = subject({"student": PixelEncoder(1), "teacher": PixelEncoder(2)}, squares(length=20))
    assert list(both.only().encoders) == ["student"]
    teacher = both.only("teacher")
    assert list(teacher.features()) == ["teacher"]
    assert teacher.features()["teacher"].query.features.shape == (20, 12)
    with pytest.raises(UserError, match="no encoder 'teecher'; did you mean teacher"):
        both.only("teecher").features()


def test_data_without_labels_is_not_applicable() -> None:
    with pytest.raises(NotApplicable, match="no sample of the evaluation data has a label"):
        features({"": tiny_encoder()}, squares(labelled=False))


def test_a_method_is_needed_where_there_are_only_encoders() -> None:
    with pytest.raises(NotApplicable, match="a method is needed, and there are only encoders"):
        _ = subject({"": tiny_encoder()}, squares()).module
