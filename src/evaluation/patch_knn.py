"""Segmentation without training: every patch takes the class of the patches it resembles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

from src.datamodules.datamodule import DataModule
from src.datamodules.sources.source import Split
from src.evaluation.features import FeatureSet, FeatureSets, Rows, autocast, gathered, labelled, weight_dtype
from src.evaluation.knn import KNN
from src.evaluation.run import Evaluator, query_loader, score
from src.models.functional import inference
from src.randomness import seeded, uniform

BANK_IMAGES, QUERY_IMAGES, BANK_PATCHES = 2000, 500, 20_000


@dataclass(frozen=True)
class PatchKNN:
    """Weighted nearest neighbors (see `KNN`) of patches among patches.

    Reports ``patch_miou``, the mean over classes of intersection over union in patches (classes that neither occur nor
    are predicted left out), and ``patch_accuracy``, the share of patches that are right.

    Args:
        k: neighbors that vote.
        temperature: of their weights.
    """

    k: int = 20
    temperature: float = 0.07

    def __post_init__(self) -> None:
        KNN(k=self.k, temperature=self.temperature)  # refuses what makes no sense

    def __call__(self, sets: FeatureSets, device: torch.device) -> dict[str, float]:
        predicted = KNN(k=self.k, temperature=self.temperature).predict(sets, device)[self.k]
        truth, classes = sets.query.labels, sets.classes
        iou = multiclass_jaccard_index(predicted, truth, num_classes=classes, average="macro", validate_args=False)
        right = multiclass_accuracy(predicted, truth, num_classes=classes, average="micro", validate_args=False)
        return {"patch_miou": iou.item(), "patch_accuracy": right.item()}


@dataclass(frozen=True)
class PatchSegmentation:
    """An evaluator of patches, whose classes come from the data's masks; see `patch_sets`.

    Args:
        evaluator: of rows of features.
    """

    evaluator: Evaluator = field(default_factory=PatchKNN)
    bank_images: int = BANK_IMAGES
    query_images: int = QUERY_IMAGES
    bank_patches: int = BANK_PATCHES

    def __call__(
        self,
        encoders: Mapping[str, nn.Module],
        datamodule: DataModule,
        device: torch.device,
        *,
        split: Split = "val",
        precision: str = "32-true",
    ) -> dict[str, dict[str, float]]:
        """The evaluator's numbers by encoder; errors as of `patch_sets`."""
        sets = patch_sets(
            encoders,
            datamodule,
            device,
            split=split,
            bank_images=self.bank_images,
            query_images=self.query_images,
            bank_patches=self.bank_patches,
            precision=precision,
        )
        return {name: score({name: mine}, [self.evaluator], device) for name, mine in sets.items()}


def patch_sets(
    encoders: Mapping[str, nn.Module],
    datamodule: DataModule,
    device: torch.device,
    *,
    split: Split = "val",
    bank_images: int = BANK_IMAGES,
    query_images: int = QUERY_IMAGES,
    bank_patches: int = BANK_PATCHES,
    precision: str = "32-true",
) -> dict[str, FeatureSets]:
    """Patch features and what the patches show, by each encoder: of all patches of ``query_images`` held-out images,
    and of about ``bank_patches`` patches of ``bank_images`` training images, as many of each, chosen by the image's
    position alone. What is held is bounded by these three numbers, whatever the size of the data.

    Args:
        encoders: by name, image -> `Features`, on ``device``.
        split: where the queries are from.
        precision: of the forward pass, as Lightning's Trainer calls it.

    Raises:
        SettingError: the data knows no masks.
        BadFeatures: NaN or infinite features.
    """
    with seeded(0):  # a loader that starts draws a number
        bank_loader: DataLoader[dict[str, Tensor]] = datamodule.bank_dataloader(bank_images)
        count = min(bank_images, datamodule.train_samples or bank_images, len(datamodule.train_source))
        each = max(1, bank_patches // count)
        bank = _extract(encoders, bank_loader, datamodule, device, split="train", each=each, precision=precision)
        loader = query_loader(datamodule, split, query_images)
        query = _extract(encoders, loader, datamodule, device, split=split, each=None, precision=precision)
    return {name: FeatureSets(bank=bank[name], query=query[name]) for name in encoders}


def patch_labels(shares: Tensor, grid: tuple[int, int]) -> Tensor:
    """What most of each patch shows: [B, C, H, W] shares of C classes -> int64 [B, N], raster order; of classes with
    equal areas the first."""
    return F.adaptive_avg_pool2d(shares, grid).argmax(dim=1).flatten(1)


def _extract(
    encoders: Mapping[str, nn.Module],
    loader: Iterable[dict[str, Tensor]],
    datamodule: DataModule,
    device: torch.device,
    *,
    split: Split,
    each: int | None,
    precision: str,
) -> dict[str, FeatureSet]:
    """Rows of all patches of every image, or of ``each`` of them; as `extract` does, each process its share."""
    rows = {name: Rows([], [], []) for name in encoders}
    with inference(nn.ModuleList(encoders.values())), autocast(precision, device):
        for loaded in loader:
            batch = labelled(loaded, datamodule.input_key)
            if len(batch["label"]) == 0:
                continue
            index = batch["index"]
            shares = datamodule.class_shares(split, index)
            batch = datamodule.on_after_batch_transfer(datamodule.transfer_batch_to_device(batch, device, 0), 0)
            for name, encoder in encoders.items():
                features = encoder(batch["image"].to(weight_dtype(encoder)))
                patches, labels = features.patches.to("cpu", torch.float32), patch_labels(shares, features.grid)
                if each is not None:
                    chosen = _choice(index, patches.shape[1], each)
                    patches = patches.gather(1, chosen[:, :, None].expand(-1, -1, patches.shape[2]))
                    labels = labels.gather(1, chosen)
                repeated = index.repeat_interleave(patches.shape[1])
                rows[name].add(patches.flatten(0, 1), {"label": labels.flatten(), "index": repeated})
    return {name: gathered(name, mine, device, torch.float32) for name, mine in rows.items()}


def _choice(index: Tensor, patches: int, each: int) -> Tensor:
    """``each`` different positions of every image, sorted, a function of its index alone: int64 [B, each]."""
    numbers = uniform(0, [0] * len(index), index.tolist(), patches)
    return torch.from_numpy(np.sort(np.argsort(numbers, axis=1, kind="stable")[:, :each], axis=1))
