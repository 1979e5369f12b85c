"""Scenes in motion: a film is a scene with motions, and every moment of it is a scene again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from src.datamodules.scenes import render
from src.datamodules.scenes.patterns import PATTERNS
from src.datamodules.scenes.scene import Camera, Scene, SceneObject
from src.datamodules.scenes.world import ObjectsWorld
from src.errors import SettingError
from src.randomness import fold


@dataclass(frozen=True)
class Swing:
    """An oscillation ``reach * cos(phase + 2 pi rate t)``; constant if the rate is 0."""

    reach: float
    phase: float  # radians
    rate: float = 0.0  # oscillations per second

    def at(self, time: float) -> float:
        return self.reach * math.cos(self.phase + 2 * math.pi * self.rate * time)


@dataclass(frozen=True)
class Motion:
    """The motion of an object around its position in the scene."""

    x: Swing  # in half image widths, as y
    y: Swing
    size: Swing  # relative
    pitch: Swing  # radians, as yaw
    yaw: Swing
    turns: float = 0.0  # rotations per second in the image plane, clockwise if positive

    def of(self, obj: SceneObject, focal: float, time: float) -> SceneObject:
        """Returns the object at ``time`` seconds for a camera of focal length ``focal``."""
        depth = obj.position[2]
        x, y = obj.position[0] + self.x.at(time) * depth / focal, obj.position[1] + self.y.at(time) * depth / focal
        roll = obj.rotation[0] + 2 * math.pi * self.turns * time
        return replace(
            obj,
            position=(x, y, depth),
            rotation=(roll, self.pitch.at(time), self.yaw.at(time)),
            size=obj.size * (1 + self.size.at(time)),
        )


_LARGEST = 1.5  # an object never grows to more than that of its size at rest

# Actions of the main object: which of its parameters move, and how often relative to the film's tempo.
ACTIONS: dict[str, Mapping[str, float]] = {
    "rests": {},
    "slides": {"x": 1.0},
    "climbs": {"y": 1.0},
    "sweeps": {"x": 1.0, "y": 1.0},
    "weaves": {"x": 1.0, "y": 2.0},
    "turns clockwise": {"turns": 1.0},
    "turns anticlockwise": {"turns": -1.0},
    "grows and shrinks": {"size": 1.0},
    "nods": {"pitch": 1.0},
    "shakes": {"yaw": 1.0},
}


# smaller than in still images to leave room for motion, and patterned, because a plain ring turns invisibly
OBJECTS = ObjectsWorld(patterns=PATTERNS[1:], plain=0.0, main_radius=(0.45, 0.7), main_place=0.15)


@dataclass(frozen=True)
class Film:
    """A scene whose objects and camera move.

    Args:
        scene: everything in the middle of its motion.
        motions: of the scene's objects, in their order.
        pan: motion of the camera in metres, to the right and down.
        action: of the main object, an index into the world's actions.
    """

    scene: Scene
    motions: tuple[Motion, ...]
    pan: tuple[Swing, Swing]
    action: int

    def at(self, time: float) -> Scene:
        """Returns the scene ``time`` seconds after the beginning, with film grain of its own."""
        camera, scene = self.scene.camera, self.scene
        objects = tuple(
            motion.of(obj, camera.focal, time) for obj, motion in zip(scene.objects, self.motions, strict=True)
        )
        x, y = (place + swing.at(time) for place, swing in zip(camera.position[:2], self.pan, strict=True))
        return replace(
            scene,
            camera=replace(camera, position=(x, y, camera.position[2])),
            objects=objects,
            grain_seed=fold(scene.grain_seed, round(abs(time) * 1e6)),
        )


@dataclass(frozen=True)
class MovingWorld:
    """Films of the scenes of an `ObjectsWorld`, labeled by the action of the main object.

    No single frame shows the action: a parameter that moves in one film is constant in another, with a value drawn from
    the same distribution. Hence a single frame is independent of the label. Other objects and the camera move in every
    film.

    Args:
        objects: distribution of the scenes.
        actions: names and rates, see `ACTIONS`.
        tempo: range of oscillations per second.
        place, grow, tilt: ranges of the main object's motion: in half image widths, relative to its size, in radians.
        other_place: range of the other objects' motion, in half image widths.
        pan: range of the camera's motion, in metres.
        pan_tempo: range of oscillations per second of the camera and the other objects.
    """

    objects: ObjectsWorld = OBJECTS
    actions: Mapping[str, Mapping[str, float]] = field(default_factory=lambda: ACTIONS)
    tempo: tuple[float, float] = (0.5, 0.8)
    place: tuple[float, float] = (0.2, 0.35)
    grow: tuple[float, float] = (0.15, 0.3)
    tilt: tuple[float, float] = (0.3, 0.5)
    other_place: tuple[float, float] = (0.0, 0.2)
    pan: tuple[float, float] = (0.0, 0.15)
    pan_tempo: tuple[float, float] = (0.1, 0.6)

    def __post_init__(self) -> None:
        unknown = sorted({name for rates in self.actions.values() for name in rates} - {*Motion.__dataclass_fields__})
        if unknown or not self.actions:
            raise SettingError(
                f"actions move {', '.join(Motion.__dataclass_fields__)}, not {', '.join(unknown) or 'nothing'}"
            )
        if not 0 <= self.grow[0] <= self.grow[1] <= _LARGEST - 1:
            raise SettingError(f"grow must be 0 <= low <= high <= {_LARGEST - 1}, got {self.grow}")

    def film(self, seed: int, index: int) -> Film:
        """Returns film ``index`` of ``seed``, a function of these two only."""
        scene = self.objects.scene(fold(seed, 0), index)
        rng = np.random.Generator(np.random.PCG64(fold(seed, 1, index)))
        action = int(rng.integers(len(self.actions)))
        rates = list(self.actions.values())[action]
        tempo = _within(rng, self.tempo)
        # every motion is drawn, also if its rate is 0: thus a single frame is independent of the action
        main = Motion(
            x=_swing(rng, self.place, tempo * rates.get("x", 0.0)),
            y=_swing(rng, self.place, tempo * rates.get("y", 0.0)),
            size=_swing(rng, self.grow, tempo * rates.get("size", 0.0)),
            pitch=_swing(rng, self.tilt, tempo * rates.get("pitch", 0.0)),
            yaw=_swing(rng, self.tilt, tempo * rates.get("yaw", 0.0)),
            turns=tempo * rates.get("turns", 0.0),
        )
        roll = 2 * math.pi * float(rng.random())
        first = replace(scene.objects[0], rotation=(roll, 0.0, 0.0))
        others = [self._other(rng) for _ in scene.objects[1:]]
        scene = replace(scene, objects=(_in_front(first, self.tilt[1], scene.camera), *scene.objects[1:]))
        pan = (_swing(rng, self.pan, _within(rng, self.pan_tempo)), _swing(rng, self.pan, _within(rng, self.pan_tempo)))
        return Film(scene, (main, *others), pan, action)

    def _other(self, rng: np.random.Generator) -> Motion:
        return Motion(
            x=_swing(rng, self.other_place, _within(rng, self.pan_tempo)),
            y=_swing(rng, self.other_place, _within(rng, self.pan_tempo)),
            size=Swing(0.0, 0.0),
            pitch=Swing(0.0, 0.0),
            yaw=Swing(0.0, 0.0),
            turns=_within(rng, self.pan_tempo) * (1 if rng.random() < 0.5 else -1),
        )


def flow(film: Film, start: float, end: float, resolution: int) -> np.ndarray:
    """Returns the motion in pixels from ``start`` to ``end`` of what each pixel shows: float32 [2, H, W], right, down.

    Of every pixel the point that its center shows is followed, seen or hidden at the end.
    """
    before, after = film.at(start), film.at(end)
    moved = np.empty((2, resolution, resolution), np.float32)
    # the backdrop moves as its middle does
    for axis in range(2):
        moved[axis] = _backdrop_shift(before, axis) - _backdrop_shift(after, axis)
    centers = (np.arange(resolution, dtype=np.float32) + np.float32(0.5)) * np.float32(2.0 / resolution) - np.float32(1)
    order = sorted(range(len(before.objects)), key=lambda number: -before.objects[number].position[2])
    for number in order:
        patch = render.project(before.objects[number], before.camera, resolution)
        if patch is None:
            continue
        u, v = _seen(after.objects[number], after.camera, patch.x, patch.y)
        inside = before.objects[number].kind.distance(patch.x, patch.y) < 0
        window = moved[:, patch.rows, patch.columns]
        np.copyto(window[0], u - centers[patch.columns], where=inside)
        np.copyto(window[1], v - centers[patch.rows, None], where=inside)
    return moved * np.float32(resolution / 2)


def _backdrop_shift(scene: Scene, axis: int) -> float:
    """Returns the difference between the backdrop's coordinate and the image's."""
    camera = scene.camera
    return camera.position[axis] * camera.focal / (scene.background.distance - camera.position[2])


def _seen(obj: SceneObject, camera: Camera, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the image coordinates u and v in [-1, 1] of the object's points (x, y), given in radii."""
    right, down, _ = render.axes(obj.rotation)
    point = [
        obj.position[k] - camera.position[k] + obj.size * (x * np.float32(right[k]) + y * np.float32(down[k]))
        for k in range(3)
    ]
    return camera.focal * point[0] / point[2], camera.focal * point[1] / point[2]


def _in_front(obj: SceneObject, tilt: float, camera: Camera) -> SceneObject:
    """Returns the main object moved so near that it stands before the others at every tilt, with the same size in the
    image."""
    behind = obj.size * _LARGEST * obj.kind.reach * math.sin(math.hypot(tilt, tilt))
    nearer = obj.position[2] / (obj.position[2] + behind)
    x, y = (place + (p - place) * nearer for place, p in zip(camera.position[:2], obj.position[:2], strict=True))
    return replace(obj, position=(x, y, obj.position[2] * nearer), size=obj.size * nearer)


def _swing(rng: np.random.Generator, reach: tuple[float, float], rate: float) -> Swing:
    return Swing(_within(rng, reach), 2 * math.pi * float(rng.random()), rate)


def _within(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * float(rng.random())
