"""Segmentation without training: every patch takes the class of its nearest patches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

from src.datamodules.datamodule import SegmentedSource
from src.datamodules.sources.source import Split
from src.errors import SettingError
from src.evaluation.errors import NotApplicable
from src.evaluation.evaluation import EncoderEvaluation, score_exactly
from src.evaluation.features import FeatureSet, FeatureSets, Rows, autocast, gathered, labelled, weight_dtype
from src.evaluation.knn import KNN
from src.evaluation.subject import Subject
from src.models.functional import inference
from src.randomness import seeded, uniform


@dataclass(frozen=True)
class PatchSegmentation(EncoderEvaluation):
    """Weighted nearest neighbors (see `KNN`) of patches among patches, whose classes come from the masks of the data.

    The queries are all patches of ``query_images`` images; the bank is about ``bank_patches`` patches of
    ``bank_images`` training images, equally many of each, chosen by the image's position in the source alone. These
    three numbers bound memory, whatever the size of the data.

    Reports ``patch_miou``, the mean over classes of intersection over union in patches (without classes that neither
    occur nor are predicted), and ``patch_accuracy``, the share of patches whose class is right.

    Args:
        k: number of neighbors that vote.
        temperature: of their weights.
        bank_images, query_images: numbers of images.
        bank_patches: number of patches.

    Raises:
        SettingError: a number is less than 1, or see `KNN`.
    """

    k: int = 20
    temperature: float = 0.07
    bank_images: int = 2000
    query_images: int = 500
    bank_patches: int = 20_000

    def __post_init__(self) -> None:
        KNN(k=self.k, temperature=self.temperature)  # checks the values
        for name in ("bank_images", "query_images", "bank_patches"):
            if getattr(self, name) < 1:
                raise SettingError(f"PatchSegmentation: {name} must be at least 1, got {getattr(self, name)}")

    def by_encoder(self, subject: Subject) -> dict[str, dict[str, float]]:
        return {name: score_exactly(self, sets, subject.device) for name, sets in self.patch_sets(subject).items()}

    def score(self, sets: FeatureSets, device: torch.device) -> dict[str, float]:
        """Returns the numbers of patches, one row each."""
        predicted = KNN(k=self.k, temperature=self.temperature).predict(sets, device)[self.k]
        labels, classes = sets.query.labels, sets.classes
        iou = multiclass_jaccard_index(predicted, labels, num_classes=classes, average="macro", validate_args=False)
        accuracy = multiclass_accuracy(predicted, labels, num_classes=classes, average="micro", validate_args=False)
        return {"patch_miou": iou.item(), "patch_accuracy": accuracy.item()}

    def patch_sets(self, subject: Subject) -> dict[str, FeatureSets]:
        """Returns features and classes of patches by each encoder.

        Raises:
            NotApplicable: the source has no masks.
            BadFeatures: NaN or infinite features.
        """
        datamodule = subject.datamodule
        if not isinstance(subject.source, SegmentedSource):
            raise NotApplicable(
                f"masks are needed, which scenes have and {type(subject.source).__name__} (data.source) does not"
            )
        with seeded(0):  # starting a loader draws a random number
            bank_loader: DataLoader[dict[str, Tensor]] = datamodule.bank_dataloader(self.bank_images)
            images = min(self.bank_images, datamodule.train_samples or self.bank_images, len(datamodule.train_source))
            bank = _extract(subject, bank_loader, split="train", count=max(1, self.bank_patches // images))
            query_loader = subject.query_loader(self.query_images)
            query = _extract(subject, query_loader, split=subject.source_split, count=None)
        return {name: FeatureSets(bank=bank[name], query=query[name]) for name in bank}


def patch_labels(shares: Tensor, grid: tuple[int, int]) -> Tensor:
    """Returns the class that covers most of each patch: shares of C classes [B, C, H, W] -> int64 [B, N], raster order;
    of classes with equal areas the first."""
    return F.adaptive_avg_pool2d(shares, grid).argmax(dim=1).flatten(1)


def _extract(
    subject: Subject, loader: Iterable[dict[str, Tensor]], *, split: Split, count: int | None
) -> dict[str, FeatureSet]:
    """Returns a row for each of ``count`` patches of every image, or for all of its patches; each process reads its
    share, as in `extract`."""
    datamodule, encoders, device = subject.datamodule, subject.encoders, subject.device
    rows = {name: Rows() for name in encoders}
    with inference(nn.ModuleList(encoders.values())), autocast(subject.precision, device):
        for loaded in loader:
            batch = labelled(loaded, datamodule.input_key)
            if len(batch["label"]) == 0:
                continue
            index = batch["index"]
            shares = datamodule.class_shares(split, index)
            batch = datamodule.on_after_batch_transfer(datamodule.transfer_batch_to_device(batch, device, 0), 0)
            for name, encoder in encoders.items():
                features = encoder(batch["image"].to(weight_dtype(encoder)))
                grid_rows, grid_columns = features.grid
                patches = features.patches.to("cpu", torch.float32)
                labels = patch_labels(shares, (grid_rows, grid_columns))
                if count is not None:
                    chosen = _choice(index, patches.shape[1], count)
                    patches = patches.gather(1, chosen[:, :, None].expand(-1, -1, patches.shape[2]))
                    labels = labels.gather(1, chosen)
                repeated = index.repeat_interleave(patches.shape[1])
                rows[name].add(patches.flatten(0, 1), {"label": labels.flatten(), "index": repeated})
    return {name: gathered(name, read, device, torch.float32) for name, read in rows.items()}


def _choice(index: Tensor, patches: int, count: int) -> Tensor:
    """Chooses ``count`` different patches of every image, a function of its index alone: int64 [B, count], sorted."""
    numbers = uniform(0, [0] * len(index), index.tolist(), patches)
    return torch.from_numpy(np.sort(np.argsort(numbers, axis=1, kind="stable")[:, :count], axis=1))
