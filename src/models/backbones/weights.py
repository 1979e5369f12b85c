"""Pretrained weights for a backbone, from a run, an export or a file of another program; complete or not at all."""

from __future__ import annotations

import logging
import math
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from src.checkpoint_io import best_or_last
from src.errors import UserError, nearest

log = logging.getLogger(__name__)

# keys under which other programs store weights in their checkpoints, and prefixes they give to a backbone's names
_WRAPPERS = ("teacher", "state_dict", "model", "model_state_dict")
_WORDS = ("module", "model", "backbone", "encoder")
_PREFIXES = ("", *(f"{word}." for word in _WORDS), *(f"{a}.{b}." for a in _WORDS for b in _WORDS if a != b))
_EXPORTED = "model.safetensors"
_SHOWN = 8


class WeightsError(UserError):
    """A file does not have the weights of a backbone; the message names the file and the tensors."""


class Weights(NamedTuple):
    """Named tensors and their origin."""

    tensors: dict[str, Tensor]
    prefixes: Sequence[str]  # possible prefixes of the backbone's names; the first that fits is used
    origin: str  # for messages


def load_backbone(
    backbone: nn.Module, checkpoint: str | Path | None, *, encoder: str | None = None, fresh: Sequence[str] = ()
) -> nn.Module:
    """Loads the weights of ``checkpoint`` into ``backbone`` and returns it.

    A positional embedding for another number of patches is interpolated. A classifier is loaded only if it has the same
    shape. Other content of the file (decoders, heads, teachers) is ignored.

    Args:
        backbone: a timm model.
        checkpoint: a run's folder (its best checkpoint, else the last), a checkpoint of such a run, an export's folder,
            a safetensors file, or a ``.pth`` of another program that holds plain tensors; None leaves the backbone as
            it is.
        encoder: name of one of the run's encoders; None for its first.
        fresh: prefixes of the names of parameters that keep their initial values.

    Raises:
        WeightsError: the file cannot be read, lacks some of the backbone's tensors, or has them in another shape.
    """
    if checkpoint is None:
        log.info("backbone: weights as created (checkpoint=null)")
        return backbone
    weights = read_weights(Path(checkpoint), encoder=encoder)
    state = backbone.state_dict()
    optional = tuple(f"{name}." for name in _classifiers(backbone))
    names = [name for name in state if not name.startswith(tuple(fresh))]
    tensors = _without_prefix(weights, [name for name in names if not name.startswith(optional)])
    loaded, notes = {}, []
    for name in names:
        if name.startswith(optional) and (name not in tensors or tensors[name].shape != state[name].shape):
            continue
        value = tensors[name]
        if value.shape != state[name].shape and name == "pos_embed":
            value = _resampled(value, backbone, weights.origin)
            notes.append(f"positional embedding of {tensors[name].shape[1]} tokens interpolated to {value.shape[1]}")
        loaded[name] = value
    mismatched = [
        f"{name} {list(value.shape)} instead of {list(state[name].shape)}"
        for name, value in loaded.items()
        if value.shape != state[name].shape
    ]
    if mismatched:
        raise WeightsError(f"{weights.origin} has another architecture: it has {shorten(mismatched)}")
    backbone.load_state_dict(loaded, strict=False)
    others = [name for name in state if name not in loaded]
    if others:
        notes.append(f"not from the file: {shorten(others)}")
    log.info("backbone: %s", "; ".join([f"{len(loaded)} tensors from {weights.origin}", *notes]))
    return backbone


def read_weights(path: Path, *, encoder: str | None = None) -> Weights:
    """Reads the tensors of ``path``. Arguments and errors as in `load_backbone`."""
    if path.is_dir():
        is_run = (path / "config.yaml").exists()
        weights = best_or_last(path) if is_run else path / _EXPORTED
        if weights is None or not weights.is_file():
            raise WeightsError(
                f"no weights at {path}: "
                + ("this run has no checkpoint yet" if is_run else "this folder is neither a run's nor an export's")
            )
        path = weights
    if not path.is_file():
        raise WeightsError(f"no weights at {path}: a run's folder, a checkpoint or a safetensors file is needed")
    content = _load(path)
    if isinstance(content.get("encoders"), Mapping) and isinstance(content.get("state_dict"), Mapping):
        encoders = content["encoders"]
        name = encoder or next(iter(encoders))
        if name not in encoders:
            raise WeightsError(f"{path} has no encoder '{name}'{nearest(name, list(encoders))}")
        return Weights(_tensors(content["state_dict"]), [encoders[name]], f"{path} (encoder '{name}')")
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            return Weights(_tensors(content[wrapper]), _PREFIXES, f"{path} ('{wrapper}')")
    return Weights(_tensors(content), _PREFIXES, str(path))


def _load(path: Path) -> Mapping[str, Any]:
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as problem:
        raise WeightsError(f"{path} is damaged, or holds other objects than tensors and plain values") from problem
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, SafetensorError) as problem:
        raise WeightsError(f"{path} cannot be read as weights: {problem or type(problem).__name__}") from problem
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds {type(content).__name__}, not named weights")
    return content


def _tensors(content: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def _without_prefix(weights: Weights, needed: Sequence[str]) -> dict[str, Tensor]:
    """Removes the first prefix under which all needed tensors exist."""
    missing: list[str] = []
    for prefix in weights.prefixes:
        absent = [name for name in needed if prefix + name not in weights.tensors]
        if not absent:
            return {name[len(prefix) :]: value for name, value in weights.tensors.items() if name.startswith(prefix)}
        if not missing or len(absent) < len(missing):
            missing = absent
    raise WeightsError(
        f"{weights.origin} lacks {len(missing)} of the backbone's {len(needed)} tensors: {shorten(missing)}; "
        f"it holds {shorten(list(weights.tensors)) or 'none'}"
    )


def _resampled(table: Tensor, backbone: nn.Module, origin: str) -> Tensor:
    """Interpolates a positional embedding of a square grid, [1, P + n, D], to the backbone's grid; for clips one for
    each time, [1, T * n, D]."""
    prefix = 0 if getattr(backbone, "no_embed_class", False) else int(backbone.num_prefix_tokens)  # type: ignore[arg-type]
    rows, columns = backbone.patch_embed.grid_size  # type: ignore[union-attr,misc]
    grid: Sequence[int] = getattr(backbone.patch_embed, "grid", ())
    times = grid[0] if len(grid) == 3 else 1
    count = max(0, table.shape[1] - prefix)
    side = math.isqrt(count // times)
    if side == 0 or times * side**2 != count:
        grids = "a square grid" if times == 1 else f"a square grid for each of {times} times"
        raise WeightsError(
            f"{origin} has a positional embedding of {table.shape[1]} tokens, not {grids} after {prefix} others"
        )
    return torch.cat(
        [
            resample_abs_pos_embed(part, [rows, columns], [side, side], num_prefix_tokens=prefix)
            for part in table.chunk(times, dim=1)
        ],
        dim=1,
    )


def _classifiers(backbone: nn.Module) -> Sequence[str]:
    names = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def shorten(names: Sequence[str]) -> str:
    """Lists the first names and the number of the others, for messages."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
