"""Measures image-text pairs per second and core from tar shards, and from a folder with a list of the same files."""

from __future__ import annotations

import csv
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.input_pipeline import photo_like
from src.datamodules.dataset import SampleKey, ViewedDataset
from src.datamodules.extras.captions import Captions
from src.datamodules.sources.captioned_files import CaptionListSource
from src.datamodules.sources.webdataset import CaptionedWebDatasetSource
from src.datamodules.text import tokenizer as tokenizers
from src.datamodules.views.image import RandomResizedCrop

PICTURES, BATCH, REPETITIONS = 96, 32, 9
_SHARDS = 3


def measure(pictures: int = PICTURES, repetitions: int = REPETITIONS) -> dict[str, float]:
    """Measures reading, decoding, RandomResizedCrop to 224, choosing a caption and tokenizing it, in random order.

    Both run in this process on one thread, in alternating passes over the same 500x375 JPEGs (in the page cache).

    Args:
        pictures: number of images.
        repetitions: number of passes over each.

    Returns:
        Medians of pairs per second, ``folder`` and ``shards``, and of their ``ratio``.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            runs = {name: _passes(source) for name, source in written(Path(folder), pictures).items()}
            for run in runs.values():
                run(0)
            speeds: dict[str, list[float]] = {name: [] for name in runs}
            for repetition in range(repetitions):
                for name in sorted(runs, reverse=bool(repetition % 2)):
                    begin = time.perf_counter()
                    runs[name](1 + repetition)
                    speeds[name].append(pictures / (time.perf_counter() - begin))
    finally:
        torch.set_num_threads(threads)
    ratios = [a / b for a, b in zip(speeds["shards"], speeds["folder"], strict=True)]
    return {**{name: statistics.median(passes) for name, passes in speeds.items()}, "ratio": statistics.median(ratios)}


def written(root: Path, pictures: int) -> dict[str, CaptionListSource | CaptionedWebDatasetSource]:
    """Writes the same pairs as files with a list and as img2dataset's tars below ``root``; returns both sources."""
    names = [f"{number:05d}" for number in range(pictures)]
    (root / "files").mkdir()
    for number, name in enumerate(names):
        photo_like(375, 500, number).save(root / "files" / f"{name}.jpg", quality=90)
        (root / "files" / f"{name}.txt").write_text(_text(number))
    with open(root / "list.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        rows.writerows([f"{name}.jpg", _text(number)] for number, name in enumerate(names))
    for shard in range(_SHARDS):
        with tarfile.open(root / f"{shard:05d}.tar", "w") as tar:
            for name in names[shard::_SHARDS]:
                for extension in ("jpg", "txt"):
                    tar.add(root / "files" / f"{name}.{extension}", f"{name}.{extension}")
    listed = CaptionListSource("train", root=root / "files", files=str(root / "list.csv"), val_share=0.0)
    shards = CaptionedWebDatasetSource("train", shards=str(root / "*.tar"), val_share=0.0)
    return {"folder": listed, "shards": shards}


def _text(number: int) -> str:
    return f"a photo with the number {number} of a place that is mostly grey, with some color"


def _passes(source: CaptionListSource | CaptionedWebDatasetSource) -> Callable[[int], None]:
    texts = [source.caption(index, 0.0) for index in range(len(source))]
    learned = tokenizers.train_tokenizer(texts, vocabulary=512, length=32)
    data = ViewedDataset(
        source, RandomResizedCrop(size=224, scale=(0.2, 1.0)), extras=Captions(), tokenizer=learned, seed=0
    )

    def run(epoch: int) -> None:
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(epoch)).tolist()
        for start in range(0, len(order), BATCH):
            batch = data[[SampleKey(epoch, position) for position in order[start : start + BATCH]]]
            assert not batch["replaced"].any()

    return run
