"""Composes and checks the configuration of a command line; mistakes are answered with the nearest names."""

from __future__ import annotations

import ctypes
import inspect
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, InstantiationException
from hydra.utils import get_object
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src import composition as layered
from src.composition import Composition
from src.errors import UserError, nearest, printable
from src.image_size import height_and_width
from src.memory import keep_freed_memory
from src.value_types import check_values

PROJECT = Path(__file__).resolve().parent.parent
CONFIGS = PROJECT / "configs"


def register_resolvers() -> None:
    """Registers the functions of configuration files.

    ``${linear_lr:base,batch,reference}`` is base * batch / reference, ``${sqrt_lr:base,batch,reference}`` base times
    the root of batch / reference, ``${times:a,b}`` a * b, ``${over:a,b}`` a / b, ``${shorter:size}`` and
    ``${longer:size}`` a side in pixels of a size (a number for a square, or [height, width]), and
    ``${data_dir:folder}`` a folder that the user must name.
    """

    def data_dir(folder: str | None) -> str:
        if folder is None:
            raise UserError("this data set is read from a folder: name it with DATA_DIR=<folder>")
        return folder

    OmegaConf.register_new_resolver("data_dir", data_dir, replace=True)
    OmegaConf.register_new_resolver("linear_lr", lambda base, batch, ref: base * batch / ref, replace=True)
    OmegaConf.register_new_resolver("sqrt_lr", lambda base, batch, ref: base * (batch / ref) ** 0.5, replace=True)
    OmegaConf.register_new_resolver("times", lambda a, b: a * b, replace=True)
    OmegaConf.register_new_resolver("over", lambda a, b: a / b, replace=True)
    OmegaConf.register_new_resolver("shorter", lambda size: min(height_and_width(size)), replace=True)
    OmegaConf.register_new_resolver("longer", lambda size: max(height_and_width(size)), replace=True)


def compose(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """Composes ``configs/<config_name>.yaml`` with overrides (Hydra's grammar).

    Raises:
        UserError: an override does not parse, or names an experiment, option or key that does not exist.
    """
    return composition(config_name, overrides).config


def composition(config_name: str, overrides: Sequence[str], configs: Path = CONFIGS) -> Composition:
    """Composes as `compose` does, and keeps the file of each value and what the scale replaced.

    Args:
        configs: the folder of the configuration's files.
    """
    register_resolvers()
    parsed = _parse(overrides)
    groups = [override for override in parsed if _is_group(override, configs)]
    for override in parsed:
        if override.is_sweep_override():
            raise UserError(f"'{override.input_line}' has several values; a run takes one (a list is written [1,2])")
    for override in groups:
        _check_option(override, configs)
    values = [override for override in parsed if override not in groups and override.key_or_group != "scale"]
    scales = [override.value() for override in parsed if override.key_or_group == "scale"]
    scale = None if not scales or scales[-1] is None else str(scales[-1])
    try:
        composed = layered.compose(configs, config_name, groups, scale=scale, default_scale=default_scale())
        for override in values:
            _check_value(override, composed.config)
        return composed.with_values(values) if values else composed
    except (HydraException, OmegaConfBaseException) as problem:
        raise UserError(_first_lines(problem)) from problem


def check_complete(config: DictConfig) -> None:
    """Checks that every value is there.

    Raises:
        UserError: a value is missing or cannot be computed.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(config))  # follows references, as the resolution does
        if missing:
            raise UserError(f"missing value: {', '.join(f'{key}=…' for key in missing)}")
        OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as problem:
        raise UserError(_first_lines(_user_error(problem) or problem)) from problem


def apply(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Changes a stored configuration by ``key=value`` overrides and returns it.

    Raises:
        UserError: the configuration does not have a key.
    """
    for override in _parse(overrides):
        if _is_group(override):
            raise UserError(f"'{override.key_or_group}' cannot change in a run that exists; start a new one")
        _check_value(override, config)
        try:
            OmegaConf.update(config, override.key_or_group, override.value(), force_add=override.is_add())
        except OmegaConfBaseException as problem:
            raise UserError(f"{override.input_line}: {_first_lines(problem)}") from problem
    return config


def instantiate(config: Any, **kwargs: Any) -> Any:
    """Builds the object that a configuration describes. A constructor's error about a value becomes a UserError."""
    check_values(config)
    try:
        return hydra_instantiate(config, _convert_="all", **kwargs)
    except InstantiationException as problem:
        cause = problem.__cause__
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        message = _message(cause) or _message_of_library(cause)
        if message is None:
            raise
        key = getattr(problem, "full_key", None) or _named_key(problem)
        raise UserError(f"{f'in {key}: ' if key else ''}{message}") from problem


def names(group: str, configs: Path = CONFIGS) -> list[str]:
    """Returns the options of a configuration group, sorted, without the files that are only parts of others (_name)."""
    return sorted(path.stem for path in (configs / group).glob("*.yaml") if not path.stem.startswith("_"))


def run_main(main: Callable[[Sequence[str]], int | None]) -> NoReturn:
    """Runs a command's ``main`` on the command line. A UserError, or the system's error about a file, ends it with its
    message and exit code 2.

    ``PRETEXT_TRACE=1`` in the environment shows where the error was raised.
    """
    if not torch.cuda.is_available():
        keep_freed_memory()
    _stop_with_make()
    try:
        code = main(sys.argv[1:])
    except UserError as problem:
        _end_with(str(problem))
    except KeyboardInterrupt:
        print("error: stopped by SIGINT", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as problem:
        if problem.filename is None:
            raise
        _end_with(f"{os.fsdecode(problem.filename)[:200]!r}: {problem.strerror}")
    raise SystemExit(code or 0)


def _end_with(message: str) -> NoReturn:
    if os.environ.get("PRETEXT_TRACE"):
        traceback.print_exc()
    print(f"error: {printable(message)}", file=sys.stderr)
    raise SystemExit(2) from None


def _stop_with_make() -> None:
    """Lets a killed `make` end the command too, as by kill: a run would train on, and nobody would know of it."""
    if sys.platform == "linux" and "MAKELEVEL" in os.environ:
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def default_scale() -> str:
    return "paper" if torch.cuda.is_available() else "smoke"


def default_precision() -> str:
    """Returns bf16-mixed if the hardware multiplies bfloat16 matrices faster than float32: GPUs that support it, and
    CPUs with AMX. AVX512-BF16 alone does not count: a training step was measured slower with it than in float32
    (docs/benchmarks.md)."""
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    return "bf16-mixed" if torch.cpu._is_amx_tile_supported() else "32-true"


_NUMBERED = re.compile(r"\{\d+\.\.\d+\}")


def _parse(overrides: Sequence[str]) -> list[Override]:
    parser = OverridesParser.create()
    parsed = []
    for line in overrides:
        key, equals, value = line.partition("=")
        if _NUMBERED.search(value) and value[:1] not in "'\"[{":
            # a pattern of shards such as {000..099}.tar, whose quotes the shell has removed
            line = f"{key}{equals}'{value}'"
        try:
            parsed.append(parser.parse_override(line))
        except HydraException as problem:
            raise UserError(
                f"cannot read the override '{line}' (key=value is expected, the value in quotes of its own if it has "
                f"any of {{}}[]= in it): {_first_lines(problem)}"
            ) from None
    return parsed


def _is_group(override: Override, configs: Path = CONFIGS) -> bool:
    group = override.key_or_group.split("@")[0]
    return bool(group) and (configs / group).is_dir()


def _check_option(override: Override, configs: Path) -> None:
    group, option = override.key_or_group.split("@")[0], override.value()
    options = names(group, configs)
    if isinstance(option, list) and not option:
        raise UserError(f"{group}=[] names no file of configs/{group}{nearest('', options, most=len(options))}")
    for name in option if isinstance(option, list) else [option]:
        word = "null" if name is None else str(name)
        if word not in options:
            raise UserError(f"there is no {group} '{word}'{nearest(word, options, most=len(options))}")


def _check_value(override: Override, config: DictConfig) -> None:
    if override.is_add() or override.is_delete():
        return
    key = override.key_or_group
    keys, new = list(_keys(config)), override.value()
    if key in keys:
        old = OmegaConf.to_container(config, resolve=False)
        for part in key.split("."):
            old = old[int(part)] if isinstance(old, list) else old[part]  # type: ignore[index]
    else:
        arguments = _arguments(config, key.rpartition(".")[0])
        if key not in arguments:
            raise UserError(
                f"there is no key '{key}'{nearest(key, [*keys, *arguments]) or '; see config.yaml of any run'}"
            )
        old, override.type = arguments[key], OverrideType.FORCE_ADD
    if isinstance(old, dict) and "_target_" in old and not (new is None or isinstance(new, dict) or "${" in str(new)):
        own = ", ".join(f"{key}.{name!s}=…" for name in old)
        raise UserError(f"{key} has values of its own; set one of them: {own}")
    is_number = isinstance(old, int | float) and not isinstance(old, bool)
    if is_number and (isinstance(new, bool) or (isinstance(new, str) and "${" not in new)):
        raise UserError(f"{key} is a number ({old}); '{str(new).lower() if isinstance(new, bool) else new}' is not")


def _arguments(config: DictConfig, key: str) -> dict[str, Any]:
    """Returns the arguments of the ``_target_`` at ``key`` with their defaults, by dotted key. Files leave out
    arguments that keep their default."""
    node = OmegaConf.select(config, key, throw_on_resolution_failure=False) if key else None
    if not isinstance(node, DictConfig) or not isinstance(node.get("_target_"), str):
        return {}
    try:
        parameters = inspect.signature(get_object(node._target_)).parameters.values()
    except (ImportError, ValueError, TypeError):
        return {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {f"{key}.{parameter.name}": parameter.default for parameter in parameters if parameter.kind in named}


def _keys(config: DictConfig | ListConfig, prefix: str = "") -> Iterator[str]:
    items: Any = range(len(config)) if isinstance(config, ListConfig) else config.keys()
    for name in items:
        path = f"{prefix}{name}"
        yield path
        node: Any = config._get_node(name)
        if isinstance(node, DictConfig | ListConfig) and not (
            node._is_none() or node._is_missing() or node._is_interpolation()
        ):
            yield from _keys(node, f"{path}.")


def _message(cause: BaseException | None) -> str | None:
    """Returns a constructor's message about a value; None if its error looks like a mistake in its code."""
    # imported here because `make list` need not wait for them
    import timm
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    if isinstance(cause, ValueError | OSError | ImportError | MisconfigurationException):
        return str(cause)
    text = str(cause)
    if isinstance(cause, RuntimeError) and text.startswith("Unknown model"):
        return f"{text}{nearest(text.removeprefix('Unknown model (').rstrip(')'), timm.list_models())}"
    # timm and Lightning check values by assertions and types
    of_a_library = isinstance(cause, AssertionError) and bool(text)
    of_a_signature = isinstance(cause, TypeError) and ("unexpected keyword argument" in text or "should be" in text)
    return text if of_a_library or of_a_signature else None


def _message_of_library(cause: BaseException | None) -> str | None:
    """Returns the error of a library, with its type; None for one of the project, whose trace shows the mistake."""
    frames = traceback.extract_tb(cause.__traceback__) if cause is not None else []
    if not frames or "site-packages" not in Path(frames[-1].filename).parts:
        return None
    return f"{type(cause).__name__}: {_first_lines(cause) or 'refused'}"  # type: ignore[arg-type]


def _named_key(problem: InstantiationException) -> str | None:
    for line in str(problem).splitlines():
        if line.startswith("full_key: "):
            return line.removeprefix("full_key: ")
    return None


def _user_error(problem: BaseException | None) -> UserError | None:
    """Returns the resolver's error, which OmegaConf wraps in its own."""
    while problem is not None and not isinstance(problem, UserError):
        problem = problem.__cause__ or problem.__context__
    return problem


def _first_lines(problem: BaseException) -> str:
    return " ".join(line.strip() for line in str(problem).splitlines()[:2] if line.strip())
