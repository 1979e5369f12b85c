"""Rendered images, and what is true of them, on disk: built once, shared by every process, never half there."""

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

_CODE = (motion, patterns, render, scene, shapes, world, randomness)  # what an image depends on
_CHUNK = 256  # images a worker renders before it reports
_SMALL = 512  # so few are rendered here: starting workers would take longer


class Array(NamedTuple):
    """A part of one sample."""

    dtype: type
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class RenderedSet(ABC):
    """What a cache holds: samples 0 … count - 1 of one seed of one world. It is sent to the processes that render."""

    world: Any  # a frozen dataclass
    seed: int  # of what is drawn, the split already folded in
    count: int
    resolution: int

    @property
    @abstractmethod
    def name(self) -> str:
        """What its folder's name begins with."""

    @property
    @abstractmethod
    def arrays(self) -> dict[str, Array]:
        """What there is of one sample, by the name of the array that holds it of all."""

    @abstractmethod
    def render(self, index: int) -> tuple[Any, ...]:
        """Sample ``index``: a value for each of ``arrays``, in their order."""

    def description(self) -> dict[str, object]:
        """Everything that decides an image, the generator's version too, as plain values; equal descriptions mean
        equal images."""
        own = {each.name: _plain(getattr(self, each.name)) for each in fields(self)}
        return {"what": type(self).__name__, **own, "code": code_version()}


@dataclass(frozen=True)
class SceneImages(RenderedSet):
    """An image a sample, of an `ObjectsWorld`."""

    @property
    def name(self) -> str:
        return f"scenes-{self.resolution}px-{self.count}"

    @property
    def arrays(self) -> dict[str, Array]:
        return pictures((3, self.resolution, self.resolution))

    def render(self, index: int) -> tuple[np.ndarray, int]:
        scene = self.world.scene(self.seed, index)
        return render.image(scene, self.resolution), render.label(scene, self.world.kinds)


@dataclass(frozen=True)
class ObjectMaps(RenderedSet):
    """Which object of an `ObjectsWorld` each pixel shows, and of which kind each object is."""

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
    """How far away is what each pixel of an `ObjectsWorld` shows."""

    @property
    def name(self) -> str:
        return f"depths-{self.resolution}px-{self.count}"

    @property
    def arrays(self) -> dict[str, Array]:
        return {"depth": Array(np.float32, (self.resolution, self.resolution))}

    def render(self, index: int) -> tuple[np.ndarray]:
        return (render.depth(self.world.scene(self.seed, index), self.resolution),)


def pictures(shape: tuple[int, ...]) -> dict[str, Array]:
    """The arrays of a cache of images of that shape and their labels, see `Cached`."""
    return {"images": Array(np.uint8, shape), "labels": Array(np.int64)}


def _plain(value: Any) -> Any:
    """Settings as JSON has them: a kind or a pattern is its name, a world its settings; what is listed by name keeps
    its order, which may be that of labels."""
    if isinstance(value, shapes.Kind | patterns.Pattern):
        return value.name
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return [[name, _plain(each)] for name, each in value.items()]
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value


class CachedImages(NamedTuple):
    """The arrays of a cache of images, read-only and mapped: the pages are shared between processes."""

    images: np.ndarray  # uint8 [N, 3, H, W], or [N, T, 3, H, W] of films
    labels: np.ndarray  # int64 [N]


def code_version() -> str:
    """A hash of the modules that decide what an image looks like."""
    digest = hashlib.sha256()
    for module in _CODE:
        assert module.__file__ is not None
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()[:16]


def folder_of(recipe: RenderedSet, cache_dir: str | Path) -> Path:
    """Where the recipe's images are, or will be."""
    key = hashlib.sha256(json.dumps(recipe.description(), sort_keys=True).encode()).hexdigest()[:16]
    return Path(cache_dir) / f"{recipe.name}-{key}"


def open_or_build(recipe: RenderedSet, cache_dir: str | Path, *, processes: int | None = None) -> CachedImages:
    """The recipe's images and labels; see `mapped`."""
    return CachedImages(**mapped(recipe, cache_dir, processes=processes))


def mapped(recipe: RenderedSet, cache_dir: str | Path, *, processes: int | None = None) -> dict[str, np.ndarray]:
    """The recipe's arrays [N, ...], rendered first if they are not there yet.

    Of several callers one renders and the others wait. The folder takes its name only when it is complete, so a build
    that dies leaves nothing that could be mistaken for a cache; its remains are swept away by the next build.
    """
    folder = folder_of(recipe, cache_dir)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            if not folder.is_dir():
                _build(recipe, folder, processes or _cores())
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in recipe.arrays}


def _build(recipe: RenderedSet, folder: Path, processes: int) -> None:
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    for name, array in recipe.arrays.items():
        shape = (recipe.count, *array.shape)
        np.lib.format.open_memmap(unfinished / f"{name}.npy", mode="w+", dtype=array.dtype, shape=shape)
    log.info("rendering %d samples of %s", recipe.count, folder)
    done, tenth = 0, 0
    for rendered in _render_all(recipe, unfinished, processes):
        done += rendered
        if done * 10 // recipe.count > tenth:
            tenth = done * 10 // recipe.count
            log.info("rendered %d of %d samples", done, recipe.count)
    (unfinished / "recipe.json").write_text(json.dumps(recipe.description(), indent=2) + "\n")
    unfinished.rename(folder)


def _render_all(recipe: RenderedSet, folder: Path, processes: int) -> Iterator[int]:
    """Fill the arrays in ``folder``; yields how many images came with each finished chunk."""
    processes = min(processes, -(-recipe.count // _CHUNK))
    if processes <= 1 or recipe.count <= _SMALL:
        yield from _render_share(recipe, folder, 0, 1)
        return
    reader, writer = os.pipe()
    children: list[subprocess.Popen[bytes]] = []
    try:
        with os.fdopen(reader) as reports:
            try:
                children += (_start(recipe, folder, rank, processes, writer) for rank in range(processes))
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


def _start(recipe: RenderedSet, folder: Path, rank: int, world_size: int, reports: int) -> subprocess.Popen[bytes]:
    """A plain child and not multiprocessing's: that would import the caller's main module again, guarded or not.

    It writes one line a chunk to ``reports``; should this process be killed, the write fails and the child ends too.
    """
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    child = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=reports,
        env=os.environ | one_thread | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError), child.stdin:  # a child that died already is seen by its exit code
        pickle.dump((recipe, folder, rank, world_size), child.stdin)
    return child


def _render_share(recipe: RenderedSet, folder: Path, rank: int, world_size: int) -> Iterator[int]:
    """Render every ``world_size``-th chunk, from the ``rank``-th on, into the arrays of ``folder``."""
    arrays = [np.lib.format.open_memmap(folder / f"{name}.npy", mode="r+") for name in recipe.arrays]
    for start in range(rank * _CHUNK, recipe.count, world_size * _CHUNK):
        stop = min(start + _CHUNK, recipe.count)
        for index in range(start, stop):
            for array, value in zip(arrays, recipe.render(index), strict=True):
                array[index] = value
        yield stop - start
    for array in arrays:
        array.flush()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    for _rendered in _render_share(*pickle.load(sys.stdin.buffer)):
        os.write(sys.stdout.fileno(), b"%d\n" % _rendered)  # one write: the children share the pipe
