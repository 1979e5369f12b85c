"""Compares a training step of MAE ViT-B in bfloat16 with one in float32."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.bare import BareLoop, RandomImageSource
from src import configuration
from src.measure.paired_ratio import paired_ratio
from src.measure.report import Check, Section, table

WANTED = 0.65
BFLOAT16, FLOAT32 = "bf16-mixed", "32-true"
SMALL = ["+backbone.depth=1", "model.decoder_depth=1", "data.batch_size=2"]  # of a ViT-B, for a quick look


def measure(quick: bool = False) -> dict[str, Any]:
    """Measures the seconds of a step (forward, backward, optimizer) with the batch of SCALE=smoke, both in turn.

    Returns:
        ``seconds`` by precision, the paired ``ratio`` of bfloat16 over float32, the CPU's instructions for bfloat16,
        and the default precision.
    """
    steps, rounds = (1, 1) if quick else (2, 10)
    loop = vit_b_loop(FLOAT32, SMALL if quick else [])
    seconds: dict[str, list[float]] = {BFLOAT16: [], FLOAT32: []}
    for _ in range(rounds + 1):
        for precision, times in seconds.items():
            loop.precision = precision
            times.append(loop.run(steps) / steps)
    counted = {precision: times[1:] for precision, times in seconds.items()}
    return {
        "seconds": {precision: statistics.median(times) for precision, times in counted.items()},
        "ratio": asdict(paired_ratio(counted[BFLOAT16], counted[FLOAT32])),
        "device": loop.device.type,
        "amx": bool(torch.cpu._is_amx_tile_supported()),
        "avx512_bf16": bool(torch.cpu._is_avx512_bf16_supported()),
        "chosen": configuration.default_precision(),
        "batch_size": loop.batch_size,
    }


def vit_b_loop(precision: str, overrides: Sequence[str] = ()) -> BareLoop:
    """Returns a bare loop of `mae_vitb` at SCALE=smoke on this device, with the matmul precision of `make train`."""
    torch.set_float32_matmul_precision("high")
    config = configuration.compose("train", ["experiment=mae_vitb", "scale=smoke", *overrides])
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = configuration.instantiate(config.model).to(device)
    images = RandomImageSource("train", size=config.image_size, length=64).distinct_images
    return BareLoop(module, images, batch_size=config.data.batch_size, precision=precision)


def report(result: dict[str, Any]) -> Section:
    ratio, chosen = result["ratio"], result["chosen"]
    body = (
        f"Seconds of a training step of MAE ViT-B (forward, backward, AdamW), batch {result['batch_size']}, on the "
        f"{result['device'].upper()}. AMX: {_yes(result['amx'])}, AVX512-BF16: {_yes(result['avx512_bf16'])}. "
        f"Chosen by default: {chosen}. {verdict(result)}\n\n"
        + table(
            [BFLOAT16, FLOAT32, "ratio (quartiles)", "pairs"],
            [
                [
                    f"{result['seconds'][BFLOAT16]:.3f}",
                    f"{result['seconds'][FLOAT32]:.3f}",
                    f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
                    str(ratio["pairs"]),
                ]
            ],
        )
    )
    return Section("Precision", [check(result)], body)


def check(result: dict[str, Any]) -> Check:
    """Compares the default precision's time with float32's; required only of hardware with bfloat16 instructions."""
    chosen_bfloat16 = result["chosen"].startswith("bf16")
    able = result["device"] != "cpu" or result["amx"] or result["avx512_bf16"]
    over = result["ratio"]["median"] if chosen_bfloat16 else 1.0
    other = "" if chosen_bfloat16 else f" (float32 is chosen; bfloat16 would be {result['ratio']['median']:.2f})"
    return Check(
        "step of MAE ViT-B in the chosen precision over float32",
        f"≤ {WANTED} with AMX or AVX512-BF16",
        f"{over:.2f}{other}",
        over <= WANTED if able else None,
    )


def verdict(result: dict[str, Any]) -> str:
    """Returns a sentence that says whether the default is the faster precision, and by how much."""
    ratio = result["ratio"]["median"]
    sentence = f"In bfloat16 a step takes {ratio:.2f} times as long as in float32"
    right = (ratio < 1) == result["chosen"].startswith("bf16")
    return f"{sentence}: the choice is {'right' if right else '**wrong**'} here."


def _yes(value: bool) -> str:
    return "yes" if value else "no"
