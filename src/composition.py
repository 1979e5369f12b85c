"""Composes the files of `configs/` in layers; the last layer that sets a value wins."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.core_plugins.structured_config_source import StructuredConfigSource
from hydra._internal.defaults_list import create_defaults_list
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from src.errors import SettingError, nearest

COMMAND_LINE = "command line"
_SECTIONS = ("data", "data.train_view", "backbone")  # keys of groups whose files may have a section `scales` below them


@dataclass(frozen=True)
class Layer:
    """The values of one file, or of one section `scales` of a file.

    Args:
        origin: such as "configs/recipe/mae.yaml" or "configs/recipe/mae.yaml (tiny)".
        values: from the root of the configuration, interpolations as written.
    """

    origin: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Composition:
    """A composed configuration, and where each of its values comes from.

    Args:
        config: the result.
        origins: key of each value -> `Layer.origin`.
        replaced: key -> (value without the scale, value with it), for what the scale replaced and no later layer set.
    """

    config: DictConfig
    origins: Mapping[str, str]
    replaced: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)

    def origin(self, key: str) -> str:
        """Returns the layer that set ``key``, or the last one that set something below it."""
        if key in self.origins:
            return self.origins[key]
        below = [origin for name, origin in self.origins.items() if name.startswith(f"{key}.")]
        return below[-1] if below else ""

    def with_values(self, overrides: Sequence[Override]) -> Composition:
        """Returns the composition with the command line's ``key=value`` overrides.

        Raises:
            hydra.errors.HydraException: a value cannot be set.
        """
        config = copy.deepcopy(self.config)
        ConfigLoaderImpl._apply_overrides_to_config(list(overrides), config)
        typed = {override.key_or_group for override in overrides}
        origins: dict[str, str] = {}
        for key, _ in leaves(OmegaConf.to_container(config, resolve=False)):
            parts = key.split(".")
            above = {".".join(parts[:depth]) for depth in range(1, len(parts) + 1)}
            origins[key] = COMMAND_LINE if above & typed else self.origins.get(key, "")
        replaced = {key: values for key, values in self.replaced.items() if origins.get(key) != COMMAND_LINE}
        return Composition(config, origins, replaced)


def compose(
    folder: Path, name: str, groups: Sequence[Override] = (), *, scale: str | None = None, default_scale: str = "smoke"
) -> Composition:
    """Composes ``<folder>/<name>.yaml``.

    The layers, from the first to the last: the files of the defaults list without the experiment; their sections
    `scales` for the chosen scale; the experiment and its section; the local file.

    Args:
        groups: Hydra's overrides that choose files.
        scale: the command line's; None for the one that a file chooses, else ``default_scale``.

    Raises:
        SettingError: there is no such scale.
        hydra.errors.HydraException: the files cannot be composed.
    """
    _, repository = _loader(folder)
    defaults = create_defaults_list(repository, name, list(groups), prepend_hydra=False, skip_missing=False)
    files = [
        Layer(f"{folder.name}/{d.config_path}.yaml", _load(folder, d.config_path, d.package)) for d in defaults.defaults
    ]
    experiment = [layer for layer in files if layer.origin.startswith(f"{folder.name}/experiment/")]
    local = [layer for layer in files if layer.origin.startswith(f"{folder.name}/local/")]
    base = [layer for layer in files if layer not in experiment and layer not in local]

    values: dict[str, Any] = {}
    layers = [_without_scales(layer) for layer in base]
    for layer in layers:
        _merge(values, layer.values)
    plain = copy.deepcopy(values)
    scales = ["paper", *_scales(files)]
    if len(scales) > 1:  # other commands' configurations have none
        if scale is None:
            written = [layer.values["scale"] for layer in files if layer.values.get("scale")]
            scale = written[-1] if written else default_scale
        if scale not in scales:
            raise SettingError(f"there is no scale '{scale}'{nearest(scale, scales)}")
        for layer in base:
            for section in _sections(layer, scale):
                section = Layer(section.origin, _replacing(section.values, values))
                _merge(values, section.values)
                layers.append(section)
        values["run"]["scale"] = plain["run"]["scale"] = scale
    own = [_without_scales(layer) for layer in experiment]
    own += [section for layer in experiment for section in _sections(layer, str(scale))]
    own += [_without_scales(layer) for layer in local]
    for layer in own:
        _merge(values, layer.values)
        _merge(plain, layer.values)
    origins = {key: layer.origin for layer in [*layers, *own] for key, _ in leaves(layer.values)}
    values.pop("scale", None)
    config = OmegaConf.create(values)
    OmegaConf.set_struct(config, True)
    before, after = dict(leaves(plain)), dict(leaves(values))
    replaced = {key: (before.get(key), value) for key, value in after.items() if before.get(key) != value}
    return Composition(config, {key: origins.get(key, "") for key in after}, replaced)


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every value below ``value`` with its dotted key; lists and empty mappings are values."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from leaves(item, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, value


def _sections(layer: Layer, scale: str) -> Iterator[Layer]:
    """Yields the values that a file replaces at ``scale``, below the keys of `_SECTIONS` and at the root."""
    origin = f"{layer.origin} ({scale})"
    for name in _SECTIONS:
        *above, last = name.split(".")
        section: Any = layer.values
        for key in (*above, last):
            section = section.get(key) if isinstance(section, Mapping) else None
        if isinstance(section, Mapping) and (section.get("scales") or {}).get(scale):
            values: Any = {last: section["scales"][scale]}
            for key in reversed(above):
                values = {key: values}
            yield Layer(origin, values)
    if (layer.values.get("scales") or {}).get(scale):
        yield Layer(origin, layer.values["scales"][scale])


def _replacing(values: Mapping[str, Any], existing: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of a section `scales` that applies: not the settings of what is null or missing."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if not isinstance(value, Mapping):
            result[key] = value
        elif isinstance(existing.get(key), Mapping):
            result[key] = _replacing(value, existing[key])
    return result


def _merge(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Sets ``changes`` in ``values``, in place: mappings are merged, everything else is replaced."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        elif value != "???" or key not in values:
            values[key] = copy.deepcopy(value)


def _scales(layers: Sequence[Layer]) -> list[str]:
    """Returns the scales that the files have besides the paper's."""
    names = [str(name) for layer in layers for name in layer.values.get("scales") or {}]
    return [name for name in dict.fromkeys(names) if name != "paper"]


def _without_scales(layer: Layer) -> Layer:
    return Layer(layer.origin, _pruned(layer.values, ("", *_SECTIONS)))


def _pruned(values: Mapping[str, Any], sections: Sequence[str], path: str = "") -> dict[str, Any]:
    """Returns ``values`` without the keys `scales` directly below ``sections``; "" is the root."""
    return {
        key: _pruned(value, sections, f"{path}.{key}".removeprefix(".")) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if not (key == "scales" and path in sections)
    }


@cache
def _load(folder: Path, path: str, package: str) -> dict[str, Any]:
    """Returns a file's values from the root of the configuration. The result is shared: do not change it."""
    loader, repository = _loader(folder)
    config = loader._load_single_config(ResultDefault(config_path=path, package=package), repository).config
    content = OmegaConf.to_container(config, resolve=False)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


@cache
def _loader(folder: Path) -> tuple[ConfigLoaderImpl, CachingConfigRepository]:
    registry = SourcesRegistry.instance()
    for source in (FileConfigSource, StructuredConfigSource):
        if source.scheme() not in registry.types:
            registry.register(source)
    search_path = ConfigSearchPathImpl()
    search_path.append("main", f"file://{folder}")
    search_path.append("schema", "structured://")
    loader = ConfigLoaderImpl(search_path)
    return loader, CachingConfigRepository(loader.repository)
