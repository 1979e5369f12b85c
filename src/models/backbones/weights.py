"""Pretrained weights for a backbone, from a run, an export or a file of another program; complete or not at all."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import to_2tuple
from torch import Tensor, nn

from src.checkpoint_io import CheckpointError, best_or_last, read_foreign
from src.errors import UserError, nearest
from src.models.backbones.layout import size_text
from src.models.backbones.positions import interpolated_positions, position_count
from src.models.backbones.released_towers import stated_activation, with_own_names
from src.models.layers.activations import activation_name

log = logging.getLogger(__name__)

_EXPORTED = "model.safetensors"
_SHOWN = 8
_DEPTH = 4  # levels of mappings that are searched for tensors
# Where a file holds a backbone several times, these words in a prefix say which one is meant: the moving average that
# its authors evaluate (DINO, iBOT, timm), and not the momentum encoder that only makes targets (MoCo, BYOL).
_EVALUATED = ("teacher", "ema", "model_ema", "state_dict_ema", "ema_state_dict")
_TARGETS = ("student", "momentum_encoder", "encoder_k", "key_encoder", "target_encoder", "target_network", "target")


class WeightsError(UserError):
    """A file does not have the weights of a backbone; the message names the file and the tensors."""


class Weights(NamedTuple):
    """Named tensors and their origin."""

    tensors: Mapping[str, Tensor]
    origin: str  # for messages
    # prefix of the backbone's names: "student.encoder.backbone."; None to find the one under which all of them are
    prefix: str | None = None
    grid: tuple[int, ...] | None = None  # rows and columns of the positional embedding, if the origin says so
    one_encoder: bool = False  # the user asked for one encoder: nothing else of the file is meant
    activation: str | None = None  # of the towers that were released with a text tower, if the file says so


def load_backbone(
    backbone: nn.Module,
    checkpoint: str | Path | None,
    *,
    encoder: str | None = None,
    prefix: str | None = None,
    fresh: Sequence[str] = (),
) -> nn.Module:
    """Loads the weights of ``checkpoint`` into ``backbone``, see `load_into`, and returns it.

    Args:
        backbone: a timm model.
        checkpoint, encoder, prefix: see `read_weights`; None for ``checkpoint`` leaves the backbone as it is.
        fresh: see `load_into`.

    Raises:
        WeightsError: the file cannot be read, lacks some of the backbone's tensors, or has them in another shape.
    """
    if checkpoint is not None:
        log.info("backbone: %s", load_into(backbone, read_weights(checkpoint, encoder=encoder, prefix=prefix), fresh))
    return backbone


def load_into(backbone: nn.Module, weights: Weights, fresh: Sequence[str] = ()) -> str:
    """Loads weights into ``backbone``, in place, and returns one line that says what was loaded and what was not.

    A positional embedding for another grid of patches is interpolated. A classifier is loaded only if it has the same
    shape. Other content of the file (decoders, heads, teachers) is ignored.

    Args:
        backbone: a timm model.
        weights: of the same architecture.
        fresh: prefixes of the names of parameters that keep their initial values.

    Raises:
        WeightsError: some of the backbone's tensors are missing or have another shape, or it has another activation.
            Nothing is loaded then.
    """
    check_activation(weights, getattr(backbone, "blocks", None))
    state = backbone.state_dict()
    names = [name for name in state if not name.startswith(tuple(fresh))]
    optional = _optional(backbone, names)
    prefix = _prefix_of(weights, [name for name in names if name not in optional])
    loaded, notes = {}, [f"under '{prefix}'"] if prefix and weights.prefix is None else []
    for name in names:
        value = weights.tensors.get(prefix + name)
        if value is None or (name in optional and name != "pos_embed" and value.shape != state[name].shape):
            continue
        if name == "pos_embed":
            value, note = _on_grid_of(backbone, value, weights)
            notes += note
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
    return "; ".join([f"{len(loaded)} tensors from {weights.origin}", *notes])


def read_weights(checkpoint: str | Path, *, encoder: str | None = None, prefix: str | None = None) -> Weights:
    """Reads the tensors of a file, without executing code of it.

    Args:
        checkpoint: a run's folder (its best checkpoint, else the last), a checkpoint of such a run, an export's folder,
            a safetensors file, a ``.pth`` of another program, or the CLIP of OpenAI, open_clip or transformers.
        encoder: name of one of the run's encoders; None for its first.
        prefix: of the backbone's names in the file, such as ``module.base_encoder.``; None to find it.

    Raises:
        WeightsError: there is no such file or encoder, or the file cannot be read.
    """
    path, grid = Path(checkpoint), None
    if path.is_dir():
        is_run = (path / "config.yaml").exists()
        file = best_or_last(path) if is_run else path / _EXPORTED
        if file is None or not file.is_file():
            raise WeightsError(
                f"no weights at {path}: "
                + ("this run has no checkpoint yet" if is_run else "this folder is neither a run's nor an export's")
            )
        grid = None if is_run else _exported_grid(path)
        path = file
    if not path.is_file():
        raise WeightsError(f"no weights at {path}: a run's folder, a checkpoint or a safetensors file is needed")
    content = _load(path)
    one_encoder = encoder is not None or prefix is not None
    if isinstance(content.get("encoders"), Mapping) and isinstance(content.get("state_dict"), Mapping):
        encoders, tensors = content["encoders"], dict(_tensors(content["state_dict"]))
        if prefix is not None:
            return Weights(tensors, str(path), _dotted(prefix), one_encoder=True)
        name = encoder or next(iter(encoders))
        if name not in encoders:
            raise WeightsError(f"{path} has no encoder '{name}'{nearest(name, list(encoders))}")
        noted = (content.get("grids") or {}).get(name)
        grid = None if noted is None else tuple(int(side) for side in noted)
        return Weights(tensors, f"{path} (encoder '{name}')", encoders[name], grid, one_encoder)
    if encoder is not None:
        raise WeightsError(
            f"checkpoint_encoder={encoder}: {path} is no checkpoint of a run, so its encoders have no names; name the "
            f"prefix of their weights with checkpoint_prefix="
        )
    tensors = dict(_tensors(content))
    activation = stated_activation(tensors, path)
    tensors = _in_timm_names(with_own_names(tensors))
    if prefix is not None:
        prefix = _full_prefix(tensors, _dotted(prefix), path)
    return Weights(tensors, str(path), prefix, grid, one_encoder, activation)


def check_activation(weights: Weights, blocks: object) -> None:
    """Checks that a transformer has the activation with which its weights were trained, which their shapes do not show.

    Args:
        blocks: of the transformer; what has no MLP like timm's is not checked.

    Raises:
        WeightsError: the activation is another one.
    """
    if weights.activation is None or not isinstance(blocks, nn.Sequential | nn.ModuleList) or not len(blocks):
        return
    mlp = getattr(blocks[0], "mlp", None)
    layer = getattr(mlp, "act", None) or getattr(mlp, "activation_fn", None)  # in timm, in transformers
    own = None if layer is None else activation_name(layer)
    if own is not None and own != weights.activation:
        raise WeightsError(
            f"{weights.origin} was trained with {weights.activation}, and this tower has {own}: set "
            f"activation={weights.activation}, or backbone.act_layer in a recipe without that key"
        )


def grid_of(backbone: nn.Module) -> tuple[int, ...] | None:
    """The rows and columns of a backbone's patches, with the times before them for a backbone of clips; None for a
    backbone without patches."""
    embed = getattr(backbone, "patch_embed", None)
    grid = getattr(embed, "grid", None) or getattr(embed, "grid_size", None)
    return tuple(int(side) for side in grid) if isinstance(grid, tuple | list) else None


def shorten(names: Sequence[str]) -> str:
    """Lists the first names and the number of the others, for messages."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _load(path: Path) -> Mapping[str, Any]:
    try:
        content = load_file(path) if path.suffix == ".safetensors" else read_foreign(path)
    except CheckpointError as problem:
        raise WeightsError(str(problem)) from problem
    except (OSError, RuntimeError, ValueError, SafetensorError) as problem:
        raise WeightsError(f"{path} cannot be read as weights: {problem or type(problem).__name__}") from problem
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds {type(content).__name__}, not named weights")
    return content


def _tensors(content: Mapping[Any, Any], outer: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, Tensor]]:
    """Yields all tensors of nested mappings with their dotted names: {"model": {"norm.bias": …}} gives
    "model.norm.bias"."""
    for name, value in content.items():
        if isinstance(value, Tensor):
            yield f"{outer}{name}", value
        elif isinstance(value, Mapping) and depth > 1:
            yield from _tensors(value, f"{outer}{name}.", depth - 1)


def _in_timm_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds timm's names of tensors that the authors' code of VideoMAE stores in another form: the biases of queries and
    values without that of keys, which is zero, and the projection of tubelets."""
    for name, value in list(tensors.items()):
        if name.endswith("attn.q_bias") and f"{name[:-6]}v_bias" in tensors:
            parts = [value, torch.zeros_like(value), tensors[f"{name[:-6]}v_bias"]]
            tensors.setdefault(f"{name[:-6]}qkv.bias", torch.cat(parts))
        elif name.endswith("patch_embed.proj.weight") and value.ndim == 5:
            stem = name.removesuffix("proj.weight")
            for leaf in ("weight", "bias"):
                if f"{stem}proj.{leaf}" in tensors:
                    tensors.setdefault(f"{stem}projection.{leaf}", tensors[f"{stem}proj.{leaf}"])
    return tensors


def _optional(backbone: nn.Module, names: Sequence[str]) -> set[str]:
    """Returns the names of tensors that a file need not have: a classifier, a fixed positional embedding, and the
    counters of batch norms, which old files lack."""
    classifiers = tuple(f"{name}." for name in _classifiers(backbone))
    table = getattr(backbone, "pos_embed", None)
    fixed = isinstance(table, nn.Parameter) and not table.requires_grad
    return {
        name
        for name in names
        if name.startswith(classifiers)
        or name.rpartition(".")[2] == "num_batches_tracked"
        or (name == "pos_embed" and fixed)
    }


def _prefix_of(weights: Weights, needed: Sequence[str]) -> str:
    """Returns the prefix under which all needed tensors exist.

    Raises:
        WeightsError: there is none, or there are several and none is known to be the one that is meant.
    """
    wanted = set(needed)
    found: Counter[str] = Counter()
    for name in weights.tensors:
        parts = name.split(".")
        for depth in range(len(parts)):
            if (rest := ".".join(parts[depth:])) in wanted:
                found[name[: len(name) - len(rest)]] += 1
    if weights.prefix is not None:
        complete = [weights.prefix] if found[weights.prefix] == len(wanted) else []
    else:
        complete = sorted((prefix for prefix, count in found.items() if count == len(wanted)), key=_rank)
    if len(complete) > 1 and _rank(complete[0]) == _rank(complete[1]):
        raise WeightsError(
            f"{weights.origin} has the backbone's tensors {len(complete)} times, under the prefixes "
            f"{_quoted(complete)}: name one with checkpoint_prefix="
        )
    if complete:
        return complete[0]
    best = [weights.prefix] if weights.prefix is not None else [prefix for prefix, _ in found.most_common(1)]
    missing = [name for name in needed if not best or best[0] + name not in weights.tensors]
    raise WeightsError(
        f"{weights.origin} lacks {len(missing)} of the backbone's {len(needed)} tensors: {shorten(missing)}; "
        f"it holds {shorten(list(weights.tensors)) or 'none'}{_prefixes(weights, found, len(wanted))}"
    )


def _rank(prefix: str) -> int:
    modules = prefix.split(".")
    if any(module in _TARGETS for module in modules):
        return 2
    return 0 if any(module in _EVALUATED for module in modules) else 1


def _prefixes(weights: Weights, found: Counter[str], wanted: int) -> str:
    """Names the file's prefixes for the answer to a miss: those with some of the wanted tensors, else the first parts
    of the names."""
    if found:
        shown = [f"'{prefix}' ({count} of {wanted})" for prefix, count in found.most_common(_SHOWN // 2)]
        return f"; the backbone's names begin with {', '.join(shown)} there"
    first = Counter(name.split(".")[0] + "." for name in weights.tensors if "." in name)
    if not first:
        return ""
    shown = [f"'{prefix}' ({count})" for prefix, count in first.most_common(_SHOWN)]
    return f"; its names begin with {', '.join(shown)} (number of tensors)"


def _dotted(prefix: str) -> str:
    return prefix if not prefix or prefix.endswith(".") else f"{prefix}."


def _full_prefix(tensors: Mapping[str, Tensor], prefix: str, path: Path) -> str:
    """Completes a prefix by the keys of the mappings around it: "module." -> "state_dict.module.".

    Raises:
        WeightsError: no tensor has it.
    """
    full = {
        name[: position + len(prefix)]
        for name in tensors
        for position in [0, *(index + 1 for index, letter in enumerate(name) if letter == ".")]
        if name.startswith(prefix, position)
    }
    if not full:
        first = Counter(name.split(".")[0] + "." for name in tensors if "." in name)
        raise WeightsError(f"checkpoint_prefix={prefix}: no tensor in {path} has it{nearest(prefix, list(first))}")
    return min(full, key=len)


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _on_grid_of(backbone: nn.Module, table: Tensor, weights: Weights) -> tuple[Tensor, list[str]]:
    """Interpolates a positional embedding [1, P + n, D] to the backbone's grid; for clips one for each time,
    [1, T * n, D]. Returns it with a note, if there is something to say.

    A file of another program does not say what grid its embedding has: a square one, if the number of patches is a
    square, and else that of the backbone.
    """
    target = grid_of(backbone)
    own = getattr(backbone, "pos_embed", None)
    if target is None or not isinstance(own, Tensor) or own.ndim != 3 or table.ndim != 3:
        return table, []
    prefix = position_count(backbone)
    times = target[0] if len(target) == 3 else 1
    source = weights.grid or _assumed_grid(table.shape[1] - prefix, times, target)
    if source is None or math.prod(source) != table.shape[1] - prefix:
        grids = "a square grid" if times == 1 else f"a square grid for each of {times} times"
        raise WeightsError(
            f"{weights.origin} has a positional embedding of {table.shape[1]} tokens, not {grids} after {prefix} others"
        )
    if source == target:
        return table, []
    if source[:-2] != target[:-2]:
        raise WeightsError(
            f"{weights.origin} has a positional embedding of {size_text(source)} tubelets, where the backbone's clips "
            f"have {size_text(target)}: times cannot be interpolated"
        )
    old, new = (source[-2], source[-1]), (target[-2], target[-1])
    patches = [interpolated_positions(part, old, new) for part in table[:, prefix:].chunk(times, dim=1)]
    resampled = torch.cat([table[:, :prefix], *patches], dim=1)
    note = f"positional embedding of {table.shape[1]} tokens interpolated to {resampled.shape[1]}"
    return resampled, [f"{note} ({size_text(source)} to {size_text(target)})"]


def _assumed_grid(count: int, times: int, target: tuple[int, ...]) -> tuple[int, ...] | None:
    side = math.isqrt(max(0, count) // times)
    if side and times * side**2 == count:
        return (*target[:-2], side, side)
    return target if math.prod(target) == count else None


def _exported_grid(folder: Path) -> tuple[int, ...] | None:
    """The grid of patches that an export's ``config.json`` gives, in the form of timm."""
    try:
        content = json.loads((folder / "config.json").read_text())
        arguments = content["model_args"]
        size, patch = to_2tuple(arguments["img_size"]), to_2tuple(arguments["patch_size"])
        return int(size[0]) // int(patch[0]), int(size[1]) // int(patch[1])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _classifiers(backbone: nn.Module) -> Sequence[str]:
    names = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)
