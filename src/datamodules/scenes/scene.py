"""A scene is data: what is where, seen from where, under which light. Images and labels are views of it."""

from __future__ import annotations

from dataclasses import dataclass

from src.datamodules.scenes.patterns import Pattern
from src.datamodules.scenes.shapes import Kind

Rgb = tuple[float, float, float]  # each in [0, 1]

# World axes: x right, y down, z away from the camera; lengths in metres, angles in radians.
# Image axes: u right, v down, [-1, 1] across the image.


@dataclass(frozen=True)
class Camera:
    """A pinhole at ``position`` looking along +z: a point (x, y, z) projects to u = focal * (x - px) / (z - pz)."""

    position: tuple[float, float, float]
    focal: float  # in half image widths


@dataclass(frozen=True)
class Light:
    """A distant lamp and ambient light."""

    direction: tuple[float, float, float]  # unit vector from the objects towards the lamp (z < 0: camera's side)
    ambient: float  # share of light without direction, in [0, 1]
    tint: Rgb  # multiplies every color
    falloff: tuple[float, float]  # relative change of brightness from the image's middle to its right, lower edge
    shadow: float  # share of the light that a shadow takes, in [0, 1]


@dataclass(frozen=True)
class Texture:
    """A pattern between a surface's own color and ``rgb``."""

    pattern: Pattern
    rgb: Rgb
    period: float  # in radii of the object, or in half image widths on the backdrop
    angle: float
    phase: tuple[float, float]  # in [0, 1)


@dataclass(frozen=True)
class Mark:
    """A straight stroke on the backdrop, in image units as seen by a camera at the origin."""

    start: tuple[float, float]
    end: tuple[float, float]
    width: float
    rgb: Rgb
    opacity: float


@dataclass(frozen=True)
class Background:
    """A plane z = distance + slope · (x, y), painted with a gradient, a texture and a few strokes."""

    distance: float
    slope: tuple[float, float]
    rgb: tuple[Rgb, Rgb]  # ends of the gradient
    angle: float  # of the gradient
    texture: Texture
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class SceneObject:
    """A flat, bevelled object."""

    kind: Kind
    color: str  # the name; ``rgb`` is this object's shade of it
    rgb: Rgb
    texture: Texture
    size: float  # radius of the disc of the same area, metres
    position: tuple[float, float, float]  # of the centroid, metres
    rotation: tuple[float, float, float]  # roll in its own plane, then pitch about x, then yaw about y
    bevel: float  # width of the rounded rim, in radii
    relief: float  # steepness of the rim
    gloss: float  # strength of the highlight


@dataclass(frozen=True)
class Scene:
    """Everything that is needed to render. ``objects[0]`` is the main one: nearest and, in the image, largest.

    Objects do not pass through each other or the backdrop: ordered by the depth of their centers, an object's farthest
    point is nearer than the next object's nearest point. The worlds keep this, and it makes occlusion exact.
    """

    camera: Camera
    light: Light
    background: Background
    objects: tuple[SceneObject, ...]
    grain: float  # standard deviation of the film grain, in [0, 1] of full scale
    grain_seed: int
