"""Measures how hard the scenes are: raw pixels, a random encoder, a supervised tiny ViT, nuisances alone, chance.

``python -m benchmarks.headroom`` prints the table; ``--quick`` leaves the supervised ViT out. ``--films`` prints the
table of films: recognition of the action from all frames, and from one frame, which should be at chance.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.datamodules.scenes.films import FilmsSource
from src.datamodules.scenes.scene import Scene
from src.datamodules.scenes.source import ScenesSource
from src.evaluation.features import FeatureSet, FeatureSets
from src.evaluation.knn import KNN
from src.evaluation.linear import LinearProbe, standardized
from src.models.backbones.positions import sincos_2d
from src.models.backbones.video_conv import r2plus1d
from src.randomness import seeded

log = logging.getLogger("benchmarks.headroom")

Row = tuple[str, float]


class SceneSplit(NamedTuple):
    """One split in memory."""

    images: Tensor  # uint8 [N, 3, H, W]
    labels: Tensor  # int64 [N]
    scenes: list[Scene]


def load(split: str, count: int, resolution: int, cache_dir: Path | None, seed: int = 0) -> SceneSplit:
    """Renders ``count`` scenes of a split, or reads their images from the cache."""
    source = ScenesSource(split, count=count, resolution=resolution, seed=seed, cache_dir=cache_dir)  # type: ignore[arg-type]
    scenes = [source.scene(index) for index in range(count)]
    if source.images is not None and source.labels is not None:
        return SceneSplit(torch.from_numpy(np.array(source.images)), torch.from_numpy(np.array(source.labels)), scenes)
    samples = [source[index] for index in range(count)]
    images = torch.stack([torch.as_tensor(sample["image"]) for sample in samples])
    return SceneSplit(images, torch.tensor([sample["label"] for sample in samples]), scenes)


class Clips(NamedTuple):
    """One split of films in memory."""

    images: Tensor  # uint8 [N, T, 3, H, W]
    labels: Tensor  # int64 [N]


def load_films(split: str, count: int, resolution: int, duration: float = 2.0, seed: int = 0) -> Clips:
    """Renders the first seconds of ``count`` films of a split at six frames per second."""
    source = FilmsSource(split, count=count, resolution=resolution, duration=duration, rate=6.0, seed=seed)  # type: ignore[arg-type]
    rendered = [source.films.render(index) for index in range(count)]
    images = torch.from_numpy(np.stack([frames for frames, _ in rendered]))
    return Clips(images, torch.tensor([label for _, label in rendered]))


def knn(train: Tensor, labels: Tensor, test: Tensor, *, k: int = 20, temperature: float = 0.07) -> Tensor:
    """Returns the classes [M] that `KNN` predicts for ``test`` [M, D] from ``train`` [N, D]."""
    return KNN(k=k, temperature=temperature).predict(_sets(train, labels, test), torch.device("cpu"))[k]


def linear(train: Tensor, labels: Tensor, test: Tensor, *, classes: int, steps: int = 60) -> Tensor:
    """Returns the classes [M] that a `LinearProbe` with a fixed l2 predicts from standardized features."""
    bank, query = standardized(_sets(train, labels, test), torch.device("cpu"))
    with torch.no_grad():
        weights = LinearProbe(max_iterations=steps).fit(bank, labels, classes, l2=2e-3)
        return (query @ weights[:-1] + weights[-1]).argmax(1)


def _sets(train: Tensor, labels: Tensor, test: Tensor) -> FeatureSets:
    unknown = torch.zeros(len(test), dtype=torch.int64)  # predictions do not read the labels of the queries
    return FeatureSets(FeatureSet(train, labels), FeatureSet(test, unknown))


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Returns the accuracy in percent."""
    return 100.0 * (predicted == labels).float().mean().item()


def nuisances(split: SceneSplit) -> dict[str, Tensor]:
    """Returns name -> properties float32 [N, D] that must not reveal the label."""
    scenes, images = split.scenes, split.images.float() / 255.0
    mains = [scene.objects[0] for scene in scenes]
    return {
        "mean color of the image": images.mean((2, 3)),
        "backdrop's colors": _rows([(*s.background.rgb[0], *s.background.rgb[1]) for s in scenes]),
        "main object's colors": _rows([(*obj.rgb, *obj.texture.rgb) for obj in mains]),
        "main object's place and size": _rows([(*obj.position, obj.size, *obj.rotation) for obj in mains]),
        "number of objects": _rows([(len(scene.objects),) for scene in scenes]),
        "order in the data set": _rows([_order(index) for index in range(len(scenes))]),
        "corner pixels": torch.cat([images[:, :, i, j] for i in (0, -1) for j in (0, -1)], dim=1),
    }


def _rows(values: list[tuple[float, ...]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def _order(index: int) -> tuple[float, ...]:
    """Returns the index and its phase in every period up to 16, so that no simple order of labels goes unnoticed."""
    turns = [2.0 * math.pi * index / period for period in range(2, 17)]
    return (index / 1000.0, *map(math.sin, turns), *map(math.cos, turns))


def tiny_vit(classes: int, *, dim: int = 128, depth: int = 4) -> timm.models.VisionTransformer:
    """Returns a ViT for 64 px: patches of 8, sin-cos positional embedding, mean pooling."""
    model = timm.models.VisionTransformer(
        img_size=64,
        patch_size=8,
        embed_dim=dim,
        depth=depth,
        num_heads=dim // 32,
        num_classes=classes,
        class_token=False,
        global_pool="avg",
        weight_init="jax",  # timm's default suits wide models; a narrow one hardly learns from it
    )
    model.pos_embed = nn.Parameter(sincos_2d(dim, (8, 8))[None])
    return model


def pooled(model: timm.models.VisionTransformer, images: Tensor) -> Tensor:
    """Returns the mean of the last tokens, before the head: float32 [N, D]."""
    return _in_parts(model, images, lambda x: model.forward_head(model.forward_features(x), pre_logits=True))


def _in_parts(model: nn.Module, images: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    model.eval()
    with torch.no_grad():
        return torch.cat([function(_scaled(part)) for part in images.split(500)])


def supervised(
    train: SceneSplit, *, classes: int, steps: int, batch: int = 64, rate: float = 2e-3, seed: int = 0
) -> nn.Module:
    """Trains a tiny ViT from scratch on random crops and flips: AdamW, short warm-up, cosine to zero."""
    with seeded(seed):
        return _fit(tiny_vit(classes), _batches(train, batch), steps=steps, rate=rate)


def supervised_clips(
    train: Clips, *, classes: int, steps: int, single: bool, batch: int = 32, rate: float = 2e-3, seed: int = 0
) -> nn.Module:
    """Trains a tiny R(2+1)D from scratch on crops of films, as `supervised` does.

    Args:
        single: replaces all frames of a film by one of them, drawn anew every time.
    """
    with seeded(seed):
        model = r2plus1d(layers=(1, 1, 1, 1), width=8, num_classes=classes)
        return _fit(model, _clip_batches(train, batch, single), steps=steps, rate=rate)


def _fit(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], *, steps: int, rate: float) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05, betas=(0.9, 0.98), fused=True)
    warmup = min(200, max(1, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1.0 + math.cos(math.pi * step / steps)))
    )
    model.train()
    running = None
    for step, (images, labels) in zip(range(steps), batches, strict=False):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running = loss.item() if running is None else running + 0.02 * (loss.item() - running)
        if step % 100 == 99:
            log.debug("step %d, running loss %.3f", step + 1, running)
    return model


def _clip_batches(clips: Clips, batch: int, single: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields shuffled batches without end, cropped to 7/8 of the side at the same place in all frames of a film."""
    size = clips.images.shape[-1]
    side = size * 7 // 8
    while True:
        for rows in torch.randperm(len(clips.images)).split(batch):
            if len(rows) < batch:
                continue
            images = clips.images[rows]
            if single:
                images = one_frame(images, torch.randint(images.shape[1], (batch,)))
            place = torch.randint(size - side + 1, (batch, 2)).tolist()
            cropped = [clip[..., y : y + side, x : x + side] for clip, (y, x) in zip(images, place, strict=True)]
            yield _scaled(torch.stack(cropped)), clips.labels[rows]


def one_frame(images: Tensor, number: Tensor) -> Tensor:
    """Returns films [N, T, …] in which the frame ``number`` [N] stands at every time."""
    return images[torch.arange(len(images)), number][:, None].expand_as(images)


def _batches(split: SceneSplit, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields shuffled and augmented batches without end."""
    while True:
        for rows in torch.randperm(len(split.images)).split(batch):
            if len(rows) == batch:
                yield _crop_and_flip(_scaled(split.images[rows])), split.labels[rows]


def _crop_and_flip(images: Tensor) -> Tensor:
    """Crops 0.4 to 1 of the area with an aspect of 3/4 to 4/3, resizes to the whole and flips half of the images.

    Crops are never reduced, so bilinear sampling does not alias.
    """
    count = len(images)
    area = torch.empty(count).uniform_(0.4, 1.0)
    aspect = torch.empty(count).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    width, height = (area * aspect).sqrt().clamp(max=1.0), (area / aspect).sqrt().clamp(max=1.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = width * (torch.rand(count) < 0.5).float().mul(2.0).sub(1.0)
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (1.0 - width) * torch.empty(count).uniform_(-1.0, 1.0)
    theta[:, 1, 2] = (1.0 - height) * torch.empty(count).uniform_(-1.0, 1.0)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _scaled(images: Tensor) -> Tensor:
    return (images.float() / 255.0 - 0.5) / 0.25


def table(train: SceneSplit, test: SceneSplit, *, classes: int, steps: int) -> Iterator[Row]:
    """Yields rows (name, accuracy in percent) as they are measured."""
    yield "chance", 100.0 / classes
    flat, flat_test = train.images.flatten(1).float() / 255.0, test.images.flatten(1).float() / 255.0
    mean = flat.mean(0)
    yield "raw pixels, kNN", accuracy(knn(flat, train.labels, flat_test), test.labels)
    yield (
        "raw pixels minus their mean, kNN",
        accuracy(knn(flat - mean, train.labels, flat_test - mean), test.labels),
    )
    with seeded(0):
        random = tiny_vit(classes)
    features, features_test = pooled(random, train.images), pooled(random, test.images)
    yield "random tiny ViT, kNN", accuracy(knn(features, train.labels, features_test), test.labels)
    yield (
        "random tiny ViT, linear",
        accuracy(linear(features, train.labels, features_test, classes=classes), test.labels),
    )
    properties, properties_test = nuisances(train), nuisances(test)
    for name, values in properties.items():
        yield (
            f"{name} alone, linear",
            accuracy(linear(values, train.labels, properties_test[name], classes=classes), test.labels),
        )
    if steps > 0:
        start = time.perf_counter()
        model = supervised(train, classes=classes, steps=steps)
        minutes = (time.perf_counter() - start) / 60
        predicted = _in_parts(model, test.images, model).argmax(1)
        yield f"supervised tiny ViT, {steps} steps of 64 ({minutes:.1f} min)", accuracy(predicted, test.labels)
        confused = torch.zeros(classes, classes, dtype=torch.int64)
        confused.index_put_((test.labels, predicted), torch.ones_like(predicted), accumulate=True)
        log.debug("confusion, rows true:\n%s", confused)


def films_table(train: Clips, test: Clips, *, classes: int, steps: int) -> Iterator[Row]:
    """Yields rows like `table`."""
    yield "chance", 100.0 / classes
    middle = torch.full((len(test.images),), test.images.shape[1] // 2)
    for name, frames in (("one frame", slice(middle[0], middle[0] + 1)), ("all frames", slice(None))):
        flat, flat_test = (clips.images[:, frames].flatten(1).float() / 255.0 for clips in (train, test))
        yield (
            f"raw pixels of {name}, kNN",
            accuracy(knn(flat, train.labels, flat_test), test.labels),
        )
    for name, single in (("one frame", True), ("all frames", False)) if steps else ():
        start = time.perf_counter()
        model = supervised_clips(train, classes=classes, steps=steps, single=single)
        minutes = (time.perf_counter() - start) / 60
        images = one_frame(test.images, middle) if single else test.images
        border = images.shape[-1] // 16
        seen = images[..., border : images.shape[-1] - border, border : images.shape[-1] - border]
        predicted = _in_parts(model, seen, model).argmax(1)
        yield (
            f"supervised R(2+1)D, {name}, {steps} steps of 32 ({minutes:.1f} min)",
            accuracy(predicted, test.labels),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="How hard the scenes are.")
    parser.add_argument("--train", type=int, default=20_000, help="training images (default 20000)")
    parser.add_argument("--test", type=int, default=2_000, help="test images (default 2000)")
    parser.add_argument("--steps", type=int, default=3400, help="of the supervised network (default 3400; 0: skip it)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--cache-dir", type=Path, default=None, help="folder for rendered images")
    parser.add_argument("--quick", action="store_true", help="4000 images, no supervised ViT: about a minute")
    parser.add_argument("--films", action="store_true", help="films of 12 frames at 32 px instead of images")
    parser.add_argument("--verbose", action="store_true", help="also progress and the confusion matrix")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.train, arguments.test, arguments.steps = 4_000, 1_000, 0
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.DEBUG if arguments.verbose else logging.WARNING)
    torch.set_num_threads(arguments.threads)
    if arguments.films:
        clips, held_out = (
            load_films(split, count, 32) for split, count in (("train", arguments.train), ("val", arguments.test))
        )
        print(f"action at 32 px: {arguments.train} training films, {arguments.test} of val for the test\n")
        classes = int(clips.labels.max()) + 1
        show(films_table(clips, held_out, classes=classes, steps=arguments.steps))
        return
    train = load("train", arguments.train, 64, arguments.cache_dir)
    test = load("val", arguments.test, 64, arguments.cache_dir)
    print(f"main label at 64 px: {arguments.train} training images, {arguments.test} of val for the test\n")
    classes = int(train.labels.max()) + 1
    show(table(train, test, classes=classes, steps=arguments.steps))


def show(rows: Iterator[Row]) -> None:
    """Prints rows as they are measured."""
    for name, value in rows:
        print(f"{value:6.1f} %  {name}", flush=True)


if __name__ == "__main__":
    main()
