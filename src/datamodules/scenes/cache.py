"""Rendered images and their ground truth on disk: built once, shared by all processes, complete or absent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock

from src import randomness
from src.datamodules.scenes import motion, patterns, render, scene, shapes, world

log = logging.getLogger(__name__)

_CODE = (motion, patterns, render, scene, shapes, world, randomness)  # modules that decide how an image looks
_CHUNK = 256  # samples that a worker renders before it reports
_SMALL = 512  # up to so many samples, starting workers would take longer than rendering


class Array(NamedTuple):
    """dtype and shape of one part of a sample."""

    dtype: type
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class RenderedSet(ABC):
    """The content of a cache: samples 0 … count - 1 of one seed of one world. It is pickled for the workers."""

    world: Any  # a frozen dataclass
    seed: int  # with the split folded in
    count: int
    resolution: int

    @property
    @abstractmethod
    def name(self) -> str:
        """The first part of the cache folder's name."""

    @property
    @abstractmethod
    def arrays(self) -> dict[str, Array]:
        """Array name -> dtype and shape of one sample."""

    @abstractmethod
    def render(self, index: int) -> tuple[Any, ...]:
        """Returns sample ``index``: a value for each of ``arrays``, in their order."""

    def description(self) -> dict[str, object]:
        """Returns everything that decides how an image looks, including the code's version, as plain values. Equal
        descriptions mean equal images."""
        settings = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        return {"what": type(self).__name__, **settings, "code": code_version()}


@dataclass(frozen=True)
class SceneImages(RenderedSet):
    """Images of an `ObjectsWorld` and their labels."""

    @property
    def name(self) -> str:
        return f"scenes-{self.resolution}px-{self.count}"

    @property
    def arrays(self) -> dict[str, Array]:
        return image_arrays((3, self.resolution, self.resolution))

    def render(self, index: int) -> tuple[np.ndarray, int]:
        scene = self.world.scene(self.seed, index)
        return render.image(scene, self.resolution), render.label(scene, self.world.kinds)


@dataclass(frozen=True)
class ObjectMaps(RenderedSet):
    """Index of the visible object at each pixel, and the kind of each object, of an `ObjectsWorld`."""

    @property
    def name(self) -> str:
        return f"objects-{self.resolution}px-{self.count}"

    @property
    def arrays(self) -> dict[str, Array]:
        most = 1 + self.world.others[1]
        return {
            "objects": Array(np.uint8, (self.resolution, self.resolution)),  # 0 the backdrop, 1 + position of an object
            "kinds": Array(np.int16, (most,)),  # -1 where there are fewer objects
        }

    def render(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        scene = self.world.scene(self.seed, index)
        masks = render.instance_masks(scene, self.resolution)
        objects = (masks * np.arange(1, 1 + len(masks), dtype=np.uint8)[:, None, None]).sum(axis=0, dtype=np.uint8)
        kinds = np.full(self.arrays["kinds"].shape, -1, np.int16)
        kinds[: len(masks)] = render.box_labels(scene, self.world.kinds)
        return objects, kinds


@dataclass(frozen=True)
class DepthMaps(RenderedSet):
    """Depth maps of an `ObjectsWorld`."""

    @property
    def name(self) -> str:
        return f"depths-{self.resolution}px-{self.count}"

    @property
    def arrays(self) -> dict[str, Array]:
        return {"depth": Array(np.float32, (self.resolution, self.resolution))}

    def render(self, index: int) -> tuple[np.ndarray]:
        return (render.depth(self.world.scene(self.seed, index), self.resolution),)


def image_arrays(shape: tuple[int, ...]) -> dict[str, Array]:
    """Returns the arrays of a cache of images of that shape, see `CachedImages`."""
    return {"images": Array(np.uint8, shape), "labels": Array(np.int64)}


def _plain(value: Any) -> Any:
    """Returns settings as JSON values: a kind or pattern by its name, a world by its fields. A mapping becomes a list,
    because its order may be that of the labels."""
    if isinstance(value, shapes.Kind | patterns.Pattern):
        return value.name
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return [[name, _plain(setting)] for name, setting in value.items()]
    return [_plain(setting) for setting in value] if isinstance(value, tuple | list) else value


class CachedImages(NamedTuple):
    """Read-only memory-mapped arrays, whose pages all processes share."""

    images: np.ndarray  # uint8 [N, 3, H, W], or [N, T, 3, H, W] of films
    labels: np.ndarray  # int64 [N]


def code_version() -> str:
    """Returns a hash of the source code that decides how an image looks."""
    digest = hashlib.sha256()
    for module in _CODE:
        assert module.__file__ is not None
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()[:16]


def folder_of(content: RenderedSet, cache_dir: str | Path) -> Path:
    """Returns the cache folder of a set, which may not exist yet."""
    key = hashlib.sha256(json.dumps(content.description(), sort_keys=True).encode()).hexdigest()[:16]
    return Path(cache_dir) / f"{content.name}-{key}"


def open_or_build(content: RenderedSet, cache_dir: str | Path, *, processes: int | None = None) -> CachedImages:
    """Returns the images and labels of a set; see `mapped`."""
    return CachedImages(**mapped(content, cache_dir, processes=processes))


def mapped(content: RenderedSet, cache_dir: str | Path, *, processes: int | None = None) -> dict[str, np.ndarray]:
    """Returns the arrays [N, ...] of a set, and renders them if they are not there yet.

    Of several callers one renders and the others wait. The folder gets its name only when it is complete; the
    remains of a killed build are removed by the next one.
    """
    folder = folder_of(content, cache_dir)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            if not folder.is_dir():
                _build(content, folder, processes or _cores())
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in content.arrays}


def _build(content: RenderedSet, folder: Path, processes: int) -> None:
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    for name, array in content.arrays.items():
        shape = (content.count, *array.shape)
        np.lib.format.open_memmap(unfinished / f"{name}.npy", mode="w+", dtype=array.dtype, shape=shape)
    log.info("rendering %d samples of %s", content.count, folder)
    done, tenth = 0, 0
    for rendered in _render_all(content, unfinished, processes):
        done += rendered
        if done * 10 // content.count > tenth:
            tenth = done * 10 // content.count
            log.info("rendered %d of %d samples", done, content.count)
    (unfinished / "recipe.json").write_text(json.dumps(content.description(), indent=2) + "\n")
    unfinished.rename(folder)


def _render_all(content: RenderedSet, folder: Path, processes: int) -> Iterator[int]:
    """Fills the arrays in ``folder``; yields the number of samples of each finished chunk."""
    processes = min(processes, -(-content.count // _CHUNK))
    if processes <= 1 or content.count <= _SMALL:
        yield from _render_share(content, folder, 0, 1)
        return
    reader, writer = os.pipe()
    children: list[subprocess.Popen[bytes]] = []
    try:
        with os.fdopen(reader) as reports:
            try:
                children += (_start(content, folder, rank, processes, writer) for rank in range(processes))
            finally:
                os.close(writer)
            yield from map(int, reports)
        failed = [child.wait() for child in children if child.wait() != 0]
        if failed:
            raise RuntimeError(f"rendering the scenes failed: a worker ended with code {failed[0]}, see its messages")
    finally:
        for child in children:
            child.kill()
            child.wait()


def _start(content: RenderedSet, folder: Path, rank: int, world_size: int, reports: int) -> subprocess.Popen[bytes]:
    """Starts a worker as a plain subprocess, because multiprocessing would import the caller's main module again.

    It writes one line per chunk to ``reports``; if this process is killed, the write fails and the worker ends, too.
    """
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    child = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=reports,
        env=os.environ | one_thread | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError), child.stdin:  # a worker that has died is noticed by its exit code
        pickle.dump((content, folder, rank, world_size), child.stdin)
    return child


def _render_share(content: RenderedSet, folder: Path, rank: int, world_size: int) -> Iterator[int]:
    """Renders every ``world_size``-th chunk, beginning with number ``rank``, into the arrays of ``folder``."""
    arrays = [np.lib.format.open_memmap(folder / f"{name}.npy", mode="r+") for name in content.arrays]
    for start in range(rank * _CHUNK, content.count, world_size * _CHUNK):
        stop = min(start + _CHUNK, content.count)
        for index in range(start, stop):
            for array, value in zip(arrays, content.render(index), strict=True):
                array[index] = value
        yield stop - start
    for array in arrays:
        array.flush()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    for _rendered in _render_share(*pickle.load(sys.stdin.buffer)):
        os.write(sys.stdout.fileno(), b"%d\n" % _rendered)  # one write: the children share the pipe
