"""Configurations that are read from a run's folder, which may be somebody else's: what they may build, read and write.

A configuration names classes and functions, and building them runs code. One that is composed here was typed here; one
that lies in a run's folder was not, so it may name only what a run is made of, may not read the environment, and writes
into the run's own folder.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig
from omegaconf.base import Node

from src.errors import UserError

log = logging.getLogger(__name__)

# names packages of the user's own that stored configurations may build from, with commas, or "all" for no check
TRUST = "PRETEXT_TRUST"

# modules whose public classes a stored configuration may name
_CLASSES = (
    "src.callbacks",
    "src.datamodules",
    "src.evaluation",
    "src.loggers",
    "src.models",
    "src.optim",
    "src.schedules",
    "src.sharding",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "lightning.pytorch.trainer",
    "timm.layers",
    "timm.models",
    "timm.optim",
    "torch.nn",
    "torch.optim",
    "torchvision.models",
    "torchvision.transforms",
)
# modules whose public functions it may name, none of which writes or runs what it is given
_FUNCTIONS = ("src.evaluation", "src.models", "src.optim", "src.schedules", "timm.models._factory.create_model")
_REFERENCES = ("hydra.utils.get_method", "hydra.utils.get_class", "hydra.utils.get_object")  # these return path=
# what writes to its arguments that are paths, by their annotation or name; of the data these names alone
_WRITERS = ("src.callbacks", "src.loggers", "lightning.pytorch")
_DATA_WRITES = ("bad_log", "tokenizer_file")
_CACHES = ("cache", "cache_dir")


def check_stored(config: DictConfig, folder: Path, default_cache: Callable[[], str]) -> DictConfig:
    """Checks the configuration in a run's folder before anything is built of it, and returns it.

    Args:
        config: as it was read; ``run.dir`` is ``folder``.
        folder: of the run.
        default_cache: returns the cache folder of this machine, which takes the place of one that does not exist here.

    Raises:
        UserError: the configuration names a class or function that no run is made of, reads the environment, or writes
            outside of its folder; the message names the key.
    """
    trusted = tuple(name for name in os.environ.get(TRUST, "").replace(",", " ").split() if name)
    if "all" in trusted:
        return config
    file = os.path.relpath(folder / "config.yaml")
    for key, name, value, node in list(_values(config)):
        if not isinstance(value, str):
            continue
        for resolver in _resolvers(value):
            if "${" in resolver or (resolver.startswith("oc.") and resolver != "oc.select"):  # oc.env, oc.decode …
                raise UserError(f"{file}: {key} uses the resolver '{resolver}', which a stored run may not: {value}")
        if "${" in value and re.search(r"(?<!\$)\{|\[", value):
            # a resolver returns mappings in its arguments as configurations, which could name a _target_
            raise UserError(f"{file}: {key} computes a list or a mapping, which a stored run may not: {value}")
        if (name == "_target_" or (name == "path" and _raw(node, "_target_") in _REFERENCES)) and not _is_allowed(
            value, trusted
        ):
            raise UserError(
                f"{file}: {key} names {value}, which a run is not made of; if the code is your own, type "
                f"{TRUST}={value.partition('.')[0]} before the command"
            )
        if name in _CACHES:
            _use_existing_cache(node, key, folder, default_cache)
    for key, name, value, node in _values(config):
        home = _home(_object(_raw(node, "_target_")))
        if "_args_" in key.split("."):
            raise UserError(f"{file}: {key} is an argument without a name, which a stored run may not have")
        if isinstance(value, str) and _is_written(name, home) and not _is_inside(str(node[name]), folder):
            raise UserError(
                f"{file}: {key}={node[name]} is outside of the run's folder, where a stored run may not write; if the "
                f"run is your own, type {TRUST}=all before the command"
            )
    return config


def _is_allowed(target: str, trusted: tuple[str, ...]) -> bool:
    """True for a name of what runs are made of. The object behind the name is checked, not only the name: a module of
    this project also holds what it imports."""
    package = target.partition(".")[0]
    if package in trusted or target in _REFERENCES:
        return True
    if "${" in target or package not in {name.partition(".")[0] for name in _CLASSES}:
        return False
    named = _object(target)
    if named is None:  # what does not exist cannot run; building it says so
        return True
    home = _home(named)
    if inspect.isclass(named):
        return _is_below(home, _CLASSES)
    return inspect.isfunction(named) and _is_below(home, _FUNCTIONS)


def _object(target: Any) -> Any:
    """Returns the object of a dotted name of the packages that runs are made of, None if there is none."""
    packages = {name.partition(".")[0] for name in _CLASSES}
    if not isinstance(target, str) or target.partition(".")[0] not in packages:
        return None
    try:
        return get_object(target)
    except Exception:  # Hydra raises many types
        return None


def _home(found: Any) -> str:
    """Returns the dotted name under which an object is defined, "" for private objects, methods and nested classes."""
    name = getattr(found, "__qualname__", "_")
    module = getattr(found, "__module__", None)
    return f"{module}.{name}" if module and "." not in name and not name.startswith("_") else ""


def _is_below(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _is_written(name: str, home: str) -> bool:
    """True for an argument of what is defined at ``home`` if it is a path that is written to."""
    if name in _DATA_WRITES:
        return True
    if name.startswith("_") or not _is_below(home, _WRITERS):
        return False
    if re.search(r"(dir|dirpath|path|folder|file|filename|root)$", name):
        return True
    try:
        parameter = inspect.signature(get_object(home)).parameters.get(name)
    except Exception:  # no signature
        return False
    return parameter is not None and "path" in str(parameter.annotation).lower()


def _use_existing_cache(node: DictConfig, key: str, folder: Path, default_cache: Callable[[], str]) -> None:
    """Replaces a cache folder that does not exist and would lie neither in the project nor in the run. All that a cache
    holds can be made again."""
    from src.configuration import PROJECT  # which imports from here

    name = key.rpartition(".")[2]
    value = _raw(node, name)
    if not isinstance(value, str) or "${" in value:
        return
    path = PROJECT / value  # value where it is absolute
    if not (path.is_dir() or _is_inside(str(path), PROJECT) or _is_inside(str(path), folder)):
        node[name] = default_cache()
        log.warning("%s=%s does not exist here; %s is used", key, value, node[name])


def _resolvers(value: str) -> Iterator[str]:
    """Yields the names of the resolvers in a value; a name that is itself computed as it is written."""
    for match in re.finditer(r"\$\{", value):
        rest = value[match.end() :]
        name = re.match(r"[^:}]*", rest)
        assert name is not None
        if rest[name.end() :].startswith(":") or "${" in name[0]:
            yield name[0].strip()


def _values(node: Any, key: str = "") -> Iterator[tuple[str, str, Any, Any]]:
    """Yields the values below ``node`` as written: dotted key, last part of it, value, and the node that holds it."""
    for name in node.keys() if isinstance(node, DictConfig) else range(len(node)):
        child = node._get_node(name)
        path = f"{key}.{name!s}" if key else str(name)
        if isinstance(child, DictConfig | ListConfig) and not (
            child._is_none() or child._is_missing() or child._is_interpolation()
        ):
            yield from _values(child, path)
        else:
            yield path, str(name), child._value() if child is not None else None, node


def _raw(node: Any, name: str) -> Any:
    """Returns a value as written, None where ``node`` has none."""
    if not isinstance(node, DictConfig) or name not in node:
        return None
    child = node._get_node(name)
    return child._value() if isinstance(child, Node) else None


def _is_inside(path: str, folder: Path) -> bool:
    return Path(os.path.expanduser(path)).resolve().is_relative_to(folder.resolve())
