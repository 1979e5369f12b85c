"""The code of CONTRIBUTING.md runs as it stands there."""

import importlib
import re
import shutil
import sys
import types

import pytest
import torch
from PIL import Image

from src import configuration
from src.configuration import CONFIGS, PROJECT
from src.evaluation.features import FeatureSet, FeatureSets
from tests.models.joint_embedding import toy

# what the examples use, as their files would import it
IMPORTS = """
import math
from dataclasses import dataclass
from pathlib import Path
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from src.datamodules.batches.image import MultiViewBatch
from src.datamodules.decoding import DataError, EncodedImage
from src.datamodules.sources.source import Sample, Source, Split
from src.evaluation.evaluation import FeatureEvaluation
from src.evaluation.features import FeatureSets
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder, mean_patch
from src.models.functional import full_precision, l2_normalize
from src.models.heads.mlp import MlpHead
from src.models.joint_embedding.base import JointEmbedding, forward_views_jointly, two_views
from src.models.pretrain_module import StepOutput
from src.optim import OptimizerRecipe
"""


def blocks(language: str) -> list[str]:
    text = (PROJECT / "CONTRIBUTING.md").read_text()
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", body, flags=re.MULTILINE) for indent, body in found]


def block_with(language: str, words: str) -> str:
    (block,) = [each for each in blocks(language) if words in each]
    return block


def module(name: str, code: str, monkeypatch) -> types.ModuleType:
    """The code as the module ``name``."""
    made = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, made)
    monkeypatch.setattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2], made, raising=False)
    exec(compile(IMPORTS + code, name, "exec"), made.__dict__)
    return made


@pytest.fixture
def configs(tmp_path):
    shutil.copytree(CONFIGS, tmp_path / "configs")
    return tmp_path / "configs"


def test_the_method_trains_from_its_recipe_and_passes_its_test(configs, monkeypatch):
    code = block_with("python", "class AlignUniform") + block_with("python", "def test_uniformity_by_hand")
    made = module("src.models.joint_embedding.align_uniform", code, monkeypatch)
    made.test_uniformity_by_hand()
    (configs / "recipe/align_uniform.yaml").write_text(block_with("yaml", "align_uniform.AlignUniform"))
    (configs / "experiment/align_uniform_r50.yaml").write_text(block_with("yaml", "override /recipe: align_uniform"))
    words = ["experiment=align_uniform_r50", "scale=tiny", "image_size=16"]
    config = configuration.composition("train", words, configs).config
    method = configuration.instantiate(config.model).double()
    output = method.training_step(toy.batch(), 0)
    output["loss"].backward()
    assert all(parameter.grad is not None for parameter in method.parameters())
    assert output["embedding"].shape == (4, method.encoder.dim)


def test_the_data_set_reads_its_list(configs, tmp_path, monkeypatch):
    module("src.datamodules.sources.listed", block_with("python", "class ListedSource"), monkeypatch)
    (configs / "data/listed.yaml").write_text(block_with("yaml", "listed.ListedSource"))
    for number in range(4):
        Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.txt").write_text("".join(f"{number}.png {number % 2}\n" for number in range(4)))
    words = ["experiment=mae_tiny", "data=listed", f"paths.data={tmp_path}", "image_size=16", "data.batch_size=4"]
    data = configuration.instantiate(
        configuration.composition("train", [*words, "data.bad_log=null"], configs).config.data
    )
    batch = next(iter(data.train_dataloader()))
    assert sorted(zip(batch["index"].tolist(), batch["label"].tolist(), strict=True)) == [
        (0, 0),
        (1, 1),
        (2, 0),
        (3, 1),
    ]
    red = {int(index): int(image[0].max()) for index, image in zip(batch["index"], batch["image"], strict=True)}
    assert red == {0: 0, 1: 60, 2: 120, 3: 180}


def test_the_evaluation_scores_by_hand(configs, monkeypatch):
    made = module("src.evaluation.nearest_mean", block_with("python", "class NearestMean"), monkeypatch)
    (configs / "evaluation/nearestmean.yaml").write_text(block_with("yaml", "nearest_mean.NearestMean"))
    assert "nearestmean" in configuration.names("evaluation", configs)
    word = re.search(r'ARGS="(\+evaluation@[^"]+)"', (PROJECT / "CONTRIBUTING.md").read_text())[1]
    config = configuration.composition("train", ["experiment=mae_tiny", word], configs).config
    evaluation = configuration.instantiate(config.callbacks.evaluation.evaluations.nearestmean)
    assert isinstance(evaluation, made.NearestMean)
    bank = FeatureSet(torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 9.0]]), torch.tensor([0, 0, 1]))
    query = FeatureSet(
        torch.tensor([[1.0, 1.0], [0.0, 5.0], [1.0, 8.0]]), torch.tensor([0, 0, 1])
    )  # the second is nearer to 1
    assert evaluation.score(FeatureSets(bank, query), torch.device("cpu")) == {"nearestmean_top1": pytest.approx(2 / 3)}
