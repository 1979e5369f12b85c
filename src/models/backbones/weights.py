"""Pretrained weights for a backbone, from wherever they lie; nothing is loaded by halves."""

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

from src import runs
from src.errors import nearest

log = logging.getLogger(__name__)

# where other programs put the weights inside their checkpoints, and what they put before a backbone's names
_WRAPPERS = ("teacher", "state_dict", "model", "model_state_dict")
_WORDS = ("module", "model", "backbone", "encoder")
_PREFIXES = ("", *(f"{word}." for word in _WORDS), *(f"{a}.{b}." for a in _WORDS for b in _WORDS if a != b))
_EXPORTED = "model.safetensors"
_SHOWN = 8


class WeightsError(ValueError):
    """A file cannot fill a backbone; the message says which file and what is the matter."""


class Weights(NamedTuple):
    """Named tensors and where they came from."""

    tensors: dict[str, Tensor]
    prefixes: Sequence[str]  # what may stand before the backbone's names, the first that fits counts
    origin: str


def pretrained(
    backbone: nn.Module, checkpoint: str | Path | None, *, encoder: str | None = None, fresh: Sequence[str] = ()
) -> nn.Module:
    """``backbone`` with the weights of ``checkpoint``, in place.

    A position table for another number of patches is interpolated. The classifier is taken over only where it fits.
    Whatever else the file holds (decoders, heads, teachers) is left out.

    Args:
        backbone: a timm model.
        checkpoint: a run's folder (its best checkpoint, else the last), a checkpoint of such a run, an export's folder,
            a safetensors file, or a ``.pth`` of another program holding plain tensors; None leaves the backbone alone.
        encoder: which of the run's encoders; None for its first.
        fresh: beginnings of names that keep the weights they have.

    Raises:
        WeightsError: the file cannot be read, or lacks any of the backbone's tensors, or has them in another shape.
    """
    if checkpoint is None:
        log.info("backbone: weights as created (checkpoint=null)")
        return backbone
    weights = read(Path(checkpoint), encoder=encoder)
    own = backbone.state_dict()
    optional = tuple(f"{name}." for name in _classifiers(backbone))
    wanted = [name for name in own if not name.startswith(tuple(fresh))]
    found = _without_prefix(weights, [name for name in wanted if not name.startswith(optional)])
    chosen, notes = {}, []
    for name in wanted:
        if name.startswith(optional) and (name not in found or found[name].shape != own[name].shape):
            continue
        value = found[name]
        if value.shape != own[name].shape and name == "pos_embed":
            value = _resampled(value, backbone, weights.origin)
            notes.append(f"position table of {found[name].shape[1]} tokens interpolated to {value.shape[1]}")
        chosen[name] = value
    wrong = [
        f"{name} {list(value.shape)} instead of {list(own[name].shape)}"
        for name, value in chosen.items()
        if value.shape != own[name].shape
    ]
    if wrong:
        raise WeightsError(f"{weights.origin} is of another architecture: it has {some(wrong)}")
    backbone.load_state_dict(chosen, strict=False)
    new = [name for name in own if name not in chosen]
    if new:
        notes.append(f"not from the file: {some(new)}")
    log.info("backbone: %s", "; ".join([f"{len(chosen)} tensors from {weights.origin}", *notes]))
    return backbone


def read(path: Path, *, encoder: str | None = None) -> Weights:
    """The tensors that ``path`` holds; arguments and errors as for `pretrained`."""
    if path.is_dir():
        if not (path / "config.yaml").exists() and (path / _EXPORTED).exists():
            path = path / _EXPORTED
        else:
            path = runs.find(str(path)).checkpoint()
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
        raise WeightsError(f"{path} is refused: it is damaged or holds more than tensors and plain values") from problem
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, SafetensorError) as problem:
        raise WeightsError(f"{path} cannot be read as weights: {problem or type(problem).__name__}") from problem
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds {type(content).__name__}, not named weights")
    return content


def _tensors(content: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def _without_prefix(weights: Weights, needed: Sequence[str]) -> dict[str, Tensor]:
    """The tensors under the backbone's own names, by the first prefix under which all that are needed exist."""
    missing: list[str] = []
    for prefix in weights.prefixes:
        lacking = [name for name in needed if prefix + name not in weights.tensors]
        if not lacking:
            return {name[len(prefix) :]: value for name, value in weights.tensors.items() if name.startswith(prefix)}
        if not missing or len(lacking) < len(missing):
            missing = lacking
    raise WeightsError(
        f"{weights.origin} lacks {len(missing)} of the backbone's {len(needed)} tensors: {some(missing)}; "
        f"it holds {some(list(weights.tensors)) or 'none'}"
    )


def _resampled(table: Tensor, backbone: nn.Module, origin: str) -> Tensor:
    """A square position table [1, P + n, D] for the backbone's own grid; of clips one of each time, [1, T * n, D]."""
    prefix = 0 if getattr(backbone, "no_embed_class", False) else int(backbone.num_prefix_tokens)  # type: ignore[arg-type]
    rows, columns = backbone.patch_embed.grid_size  # type: ignore[union-attr,misc]
    grid: Sequence[int] = getattr(backbone.patch_embed, "grid", ())
    times = grid[0] if len(grid) == 3 else 1
    count = max(0, table.shape[1] - prefix)
    side = math.isqrt(count // times)
    if side == 0 or times * side**2 != count:
        wanted = "no square grid" if times == 1 else f"no square grid for each of {times} times"
        raise WeightsError(
            f"{origin} has a position table of {table.shape[1]} tokens, which is {wanted} after {prefix} others"
        )
    return torch.cat(
        [
            resample_abs_pos_embed(each, [rows, columns], [side, side], num_prefix_tokens=prefix)
            for each in table.chunk(times, dim=1)
        ],
        dim=1,
    )


def _classifiers(backbone: nn.Module) -> Sequence[str]:
    names = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
