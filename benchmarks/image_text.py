"""Compares image-text training with a bare loop, and measures its losses at several batch sizes and its tokenizer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import loop, shards
from benchmarks.bare import RandomImageSource
from src.datamodules.text import tokenizer as tokenizers
from src.measure.report import Check, Section, percent, table
from src.measure.subprocess_runner import peak_growth_mb, run_in_subprocess
from src.models.functional import l2_normalize
from src.models.losses.image_text import clip_loss, sigmoid_loss
from src.models.losses.late_interaction import late_interaction_loss

SIDE = 64
SIZES = (  # of both towers
    f"image_size={SIDE}",
    "backbone.patch_size=8",
    "backbone.embed_dim=128",
    "backbone.depth=4",
    "backbone.num_heads=4",
    "model.text.width=128",
    "model.text.depth=4",
)
STEPS, ROUNDS = 25, 4
BATCHES = (1024, 2048, 4096, 8192, 16384, 32768)
PROCESSES = 8  # one of them is measured
DIM = 512  # of the embedding of an image or a text
TOKENS = 8  # of FILIP, which share DIM. A quarter of the 49 patches and of the 32 words would be 12 and 8
TEXTS = 20_000
VOCABULARY, LENGTH = 1024, 32

_METHODS = {"CLIP": "clip_vitb32", "SigLIP": "siglip_vitb16"}


def measure(quick: bool = False) -> dict[str, Any]:
    """Measures training loops, losses, the tokenizer and sources of pairs.

    Returns:
        ``loops``: method -> the result of `loop.InterleavedLoops`. ``losses``: loss -> global batch size -> the
        ``megabytes`` and ``seconds`` of one of eight processes for its share, forward and backward. ``tokens``: texts
        tokenized per second. ``shards``: see `shards.measure`.
    """
    steps, rounds = (2, 1) if quick else (STEPS, ROUNDS)
    view = "{_target_: src.datamodules.views.image.CenterCrop, size: ${image_size}, share: 1.0}"
    small = ["data.batch_size=16"] if quick else []
    loops = {
        title: loop.measure_loops(
            [f"experiment={name}", "scale=tiny", *SIZES, "callbacks.image_text=null", *small],
            view,
            size=SIDE,
            steps=steps,
            rounds=rounds,
        )
        for title, name in _METHODS.items()
    }
    losses = {
        title: {str(batch): run_in_subprocess(loss_cost, title, batch) for batch in BATCHES[: 1 if quick else None]}
        for title in _LOSSES
    }
    return {
        "loops": loops,
        "losses": losses,
        "tokens": texts_per_second(200 if quick else TEXTS),
        "shards": shards.measure(*((6, 1) if quick else ())),
    }


def _clip(image: Tensor, text: Tensor, images: Tensor, texts: Tensor) -> Tensor:
    return clip_loss(image, text, images, texts, 0, logit_scale=torch.tensor(14.3, requires_grad=True))


def _sigmoid(image: Tensor, text: Tensor, images: Tensor, texts: Tensor) -> Tensor:
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    return sigmoid_loss(image, texts, 0, logit_scale=scale, logit_bias=bias)


def _filip(image: Tensor, text: Tensor, images: Tensor, texts: Tensor) -> Tensor:
    image, text, images, texts = (rows.unflatten(1, (TOKENS, -1)) for rows in (image, text, images, texts))
    return late_interaction_loss(image, text, images, texts, 0, logit_scale=torch.tensor(14.3, requires_grad=True))


_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "CLIP": _clip,
    "SigLIP": _sigmoid,
    "FILIP": _filip,
}
_PER_PAIR = {"FILIP": TOKENS**2}  # similarities per pair, if not 1


def loss_cost(title: str, batch: int) -> dict[str, float]:
    """Returns memory and time of the loss for one process's share of ``batch`` pairs, forward and backward."""
    share = batch // PROCESSES
    images, texts = (l2_normalize(torch.randn(batch, DIM)) for _ in range(2))
    image, text = (rows[:share].clone().requires_grad_() for rows in (images, texts))

    def both_passes() -> None:
        _LOSSES[title](image, text, torch.cat([image, images[share:]]), torch.cat([text, texts[share:]])).backward()

    begin = time.perf_counter()
    megabytes = peak_growth_mb(both_passes)
    return {"megabytes": megabytes, "seconds": time.perf_counter() - begin}


def texts_per_second(count: int, batch: int = 128) -> float:
    """Returns how many texts per second a tokenizer reads that was learned from them."""
    source = RandomImageSource("train", size=1, length=count)
    texts = [source.caption(index, 0.0) for index in range(count)]
    learned = tokenizers.train_tokenizer(texts, vocabulary=VOCABULARY, length=LENGTH)
    begin = time.perf_counter()
    for start in range(0, count, batch):
        learned(texts[start : start + batch])
    return count / (time.perf_counter() - begin)


def report(result: dict[str, Any]) -> Section:
    rows, checks = [], []
    for title, measured in result["loops"].items():
        ratio, batch = measured["ratio"], measured["batch_size"]
        step = batch / measured["images_per_second"]
        rows.append(
            [
                title,
                str(batch),
                f"{1e3 * step:.0f} ms",
                f"{1e3 * batch / measured['bare_images_per_second']:.0f} ms",
                f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})",
                percent(batch / result["tokens"] / step),
            ]
        )
        checks.append(
            Check(
                f"whole loop over a bare loop, {title}",
                f"≥ {loop.WANTED}",
                f"{ratio['median']:.3f}",
                ratio["median"] >= loop.WANTED,
            )
        )
    body = (
        f"Tiny towers on images of {SIDE} pixels in memory with captions of a few words: a step of `make train` with "
        "every default callback and tokenizing, beside a step of a loop written by hand on the same images and tokens "
        f"made beforehand. The last column is the share of tokenizing ({result['tokens']:,.0f} texts per second) in a "
        "step.\n\n" + table(["", "pairs", "step", "bare step", "rate over bare (quartiles)", "tokenizing"], rows)
    )
    batches = list(next(iter(result["losses"].values())))
    head = ["pairs in all", *(f"{title}, {unit}" for title in result["losses"] for unit in ("MB", "s"))]
    cost = [
        [
            f"{int(batch):,}",
            *(
                cell
                for costs in result["losses"].values()
                for cell in (f"{costs[batch]['megabytes']:.0f}", f"{costs[batch]['seconds']:.2f}")
            ),
        ]
        for batch in batches
    ]
    body += (
        f"\n\nCost of a loss in one of {PROCESSES} processes, forward and backward, for its share of the pairs "
        f"({DIM} dimensions, FILIP's in {TOKENS} tokens) against all of them:\n\n" + table(head, cost)
    )
    for title, costs in result["losses"].items():
        most = batches[-1]
        matrix = int(most) ** 2 / PROCESSES * _PER_PAIR.get(title, 1) * 4 / 1e6
        checks.append(
            Check(
                f"memory of {title}'s loss, {int(most):,} pairs",
                f"< {matrix:.0f} MB, its rows of similarities",
                f"{costs[most]['megabytes']:.0f} MB",
                costs[most]["megabytes"] < matrix,
            )
        )
    files = result["shards"]
    body += (
        "\n\nPairs per second and core, read in random order, decoded, cropped to 224 and tokenized; JPEGs of 500x375 "
        "in the page cache, median of alternating passes: "
        f"{files['folder']:.1f} from a folder and a list, {files['shards']:.1f} from tar shards of the same files, "
        f"{files['ratio']:.3f} times as many."
    )
    checks.append(
        Check("tar shards over a folder of the same files", "≥ 1.0", f"{files['ratio']:.3f}", files["ratio"] >= 1)
    )
    return Section("Image-text beside a bare loop", checks, body)
