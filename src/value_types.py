"""Checks the values of a configuration against the annotations of the classes that they are for."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import is_dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any, get_args, get_origin, get_type_hints

from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf

from src.errors import UserError

_CONTAINERS = (Mapping, dict, Sequence, list)


def check_values(node: Any) -> None:
    """Checks every value below ``node`` that goes to an annotated argument of a ``_target_``.

    The check is a strict one: 1.5 is no int, "8" neither, and a number is no list of numbers. A value that another key
    refers to is named by the key where it stands.

    Raises:
        UserError: a value is of another type, or a ``_target_`` or ``_partial_`` is none.
    """
    if isinstance(node, DictConfig | ListConfig) and not (node._is_none() or node._is_missing()):
        if isinstance(node, DictConfig) and "_target_" in node:
            _check_arguments(node)
        for _, child in _children(node):
            check_values(child)


def _check_arguments(node: DictConfig) -> None:
    target, partial = node._target_, node.get("_partial_", False)
    key = node._get_full_key("")
    if not isinstance(target, str) or not target:
        raise UserError(f"{key}._target_ must name a class or function, such as src.optim.adamw, not {_shown(target)}")
    if not isinstance(partial, bool):
        raise UserError(f"{key}._partial_ must be true or false, not {_shown(partial)}")
    try:
        hints = _hints(get_object(target))
    except (ImportError, ValueError, TypeError):
        return  # Hydra's own message names what cannot be found
    for name, child in _children(node):
        if name in hints:
            value = OmegaConf.to_container(child, resolve=True) if OmegaConf.is_config(child) else child._value()
            check_value(child._get_full_key("") or f"{key}.{name}", value, hints[name])


def check_value(key: str, value: Any, hint: Any) -> None:
    """Checks one plain value against an annotation.

    Args:
        key: of the value, for the message.
        value: a plain value, or a part of a configuration.
        hint: such as ``int | None``.

    Raises:
        UserError: the value is of another type.
    """
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    expected = _mismatch(value, hint)
    if expected:
        raise UserError(f"{key} {expected}, not {_shown(value)}")


def _children(node: DictConfig | ListConfig) -> Iterator[tuple[Any, Any]]:
    names: Any = range(len(node)) if isinstance(node, ListConfig) else list(node.keys())
    for name in names:
        child: Any = node._get_node(name)
        if child is not None and child._is_interpolation():
            child = child._dereference_node()
        if child is not None and not child._is_missing():
            yield name, child


def _hints(target: Any) -> dict[str, Any]:
    """Returns the annotations of a function's or class's arguments. Those of base classes serve ``**kwargs``."""
    if not inspect.isclass(target):
        return _resolved(target, target)
    hints: dict[str, Any] = {}
    for base in target.__mro__:
        init = vars(base).get("__init__")
        if is_dataclass(base):  # its fields, whose annotations are those of the modules that declare them
            arguments = inspect.signature(base).parameters
            fields = {name: hint for part in base.__mro__[::-1] for name, hint in _resolved(part, part).items()}
            return {**{name: hint for name, hint in fields.items() if name in arguments}, **hints}
        if init is not None and base is not object:
            hints = {**_resolved(init, base), **hints}
            if inspect.Parameter.VAR_KEYWORD not in {p.kind for p in inspect.signature(init).parameters.values()}:
                break
    return hints


def _resolved(annotated: Any, owner: Any) -> dict[str, Any]:
    """Returns the annotations of a function, or of a class's fields, but of ``*args`` and ``**kwargs``."""
    names = vars(sys.modules[owner.__module__])
    parameters = {} if inspect.isclass(annotated) else inspect.signature(annotated).parameters
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    hints: dict[str, Any] = {}
    for name, annotation in inspect.get_annotations(annotated).items():
        if name not in parameters or parameters[name].kind not in variable:
            # one by one: a name that is imported for type checkers alone hides no other argument
            with suppress(NameError, TypeError, AttributeError):
                hints |= get_type_hints(SimpleNamespace(__annotations__={name: annotation}), names)
    return hints


def _mismatch(value: Any, hint: Any) -> str | None:
    """Returns what ``value`` must be by its annotation, None if it is that or an object yet to be built."""
    # imported where they are needed: `make list` need not wait for them
    from pydantic import ValidationError
    from pydantic_core import SchemaError

    needs_target = f"must be {_name(hint)}, which has a _target_"
    if isinstance(value, dict) and "_target_" in value:
        return None
    if _has_target(value):  # a container of objects, whose values are checked one by one
        container = next((part for part in (hint, *get_args(hint)) if get_origin(part) in _CONTAINERS), None)
        values = value.values() if isinstance(value, dict) else value
        return next(filter(None, (_mismatch(item, get_args(container)[-1]) for item in values if container)), None)
    if is_dataclass(hint):  # pydantic would build one from a mapping
        return needs_target
    try:
        adapter = _adapter(hint)
        if adapter is not None:
            adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as problem:
        errors = problem.errors(include_url=False)
        if any(error["type"] in ("needs_python_object", "is_instance_of", "callable_type") for error in errors):
            return needs_target
        expected = dict.fromkeys(
            error["msg"].removeprefix("Input should be ").partition(", got")[0] for error in errors
        )
        return f"must be {' or '.join(expected)}"
    except SchemaError:  # a protocol, which no plain value satisfies
        return None if value is None and type(None) in get_args(hint) else needs_target
    return None


def _name(hint: Any) -> str:
    named = [part for part in get_args(hint) or [hint] if part is not type(None)]
    return " or ".join(getattr(part, "__name__", None) or str(part) for part in named)


@cache
def _adapter(hint: Any) -> Any:
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter

    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:
        return None


def _has_target(value: Any) -> bool:
    if isinstance(value, dict):
        return "_target_" in value or any(map(_has_target, value.values()))
    return isinstance(value, list) and any(map(_has_target, value))


def _shown(value: Any) -> str:
    text = json.dumps(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
