"""Renders a scene: the image and its exact ground truth, each a pure function, at any resolution.

Everything is drawn from signed distances on the pixel grid, from far to near. In an image, the distance at a pixel's
center gives the share of the pixel that is covered; in masks and depth a pixel belongs to the object at its center.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from src.datamodules.scenes.scene import Background, Camera, Light, Mark, Rgb, Scene, SceneObject, Texture
from src.datamodules.scenes.shapes import KINDS, Kind

VISIBLE_AREA = 0.002  # share of the image that a kind must cover to count as present
_TAG_GRID = 64  # the grid on which that share is counted, whatever the image's resolution
_GRAIN_GRID = 64  # cells a side of the film grain: fixed, so that it stays with the scene and not with the pixel
CARVED = 0.22  # depth of what is carved into a face, in radii
_SHADOW_BLUR = 0.35  # width of a shadow's edge, in radii of the object


class Patch(NamedTuple):
    """The part of the pixel grid that an object can touch, in the object's coordinates."""

    rows: slice
    columns: slice
    x: np.ndarray  # float32 [h, w], in radii
    y: np.ndarray
    z: np.ndarray  # depth of the object's plane, metres
    pixel: float  # width of a pixel at the object's center, in radii


def image(scene: Scene, resolution: int) -> np.ndarray:
    """Returns the image: uint8 [3, H, W], RGB."""
    canvas = _backdrop(scene.background, scene.camera, resolution)
    for obj in reversed(_near_to_far(scene)):
        _paint(canvas, obj, scene, resolution)
    canvas *= _exposure(scene, resolution)
    canvas *= np.asarray(scene.light.tint, np.float32)[:, None, None] * np.float32(255.0)
    canvas += np.float32(0.5)
    return np.clip(canvas, 0.0, 255.0, out=canvas).astype(np.uint8)


def instance_masks(scene: Scene, resolution: int) -> np.ndarray:
    """Returns the visible part of each object: bool [T, H, W], disjoint, in the order of ``scene.objects``."""
    masks = np.zeros((len(scene.objects), resolution, resolution), bool)
    taken = np.zeros((resolution, resolution), bool)
    position = {id(obj): index for index, obj in enumerate(scene.objects)}
    for obj in _near_to_far(scene):
        patch = project(obj, scene.camera, resolution)
        if patch is None:
            continue
        window = (patch.rows, patch.columns)
        seen = (obj.kind.distance(patch.x, patch.y) < 0) & ~taken[window]
        masks[position[id(obj)]][window] = seen
        taken[window] |= seen
    return masks


def amodal_masks(scene: Scene, resolution: int) -> np.ndarray:
    """Returns each object without occlusion: bool [T, H, W]."""
    masks = np.zeros((len(scene.objects), resolution, resolution), bool)
    for mask, obj in zip(masks, scene.objects, strict=True):
        patch = project(obj, scene.camera, resolution)
        if patch is not None:
            mask[patch.rows, patch.columns] = obj.kind.distance(patch.x, patch.y) < 0
    return masks


def boxes(scene: Scene, resolution: int) -> np.ndarray:
    """Returns tight bounding boxes around the visible part of each object: float32 [T, 4], x0 y0 x1 y1 in pixels.

    x1 and y1 are exclusive: a mask of one pixel has a box of one pixel. The box of an invisible object is all zeros.
    """
    return boxes_of(instance_masks(scene, resolution))


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """Returns tight bounding boxes around masks [T, H, W]: float32 [T, 4]; zeros for an empty mask."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for box, mask in zip(boxes, masks, strict=True):
        columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        if len(columns):
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


def depth(scene: Scene, resolution: int) -> np.ndarray:
    """Returns the distance along the camera's axis at each pixel's center, in metres: float32 [H, W]."""
    result = _backdrop_depth(scene.background, scene.camera, resolution)
    for obj in reversed(_near_to_far(scene)):
        patch = project(obj, scene.camera, resolution)
        if patch is not None:
            inside = obj.kind.distance(patch.x, patch.y) < 0
            np.copyto(result[patch.rows, patch.columns], patch.z, where=inside)
    return result


def facings(scene: Scene) -> np.ndarray:
    """Returns the normals of the backdrop and of each object's plane, towards the camera: float32 [1 + T, 3], x to the
    right, y down, z away from the camera. Reliefs and rims affect only the shading, not the normals."""
    across: list[tuple[float, ...]] = [(*scene.background.slope, -1.0)]
    for obj in scene.objects:
        away = axes(obj.rotation)[2]
        offset = tuple(p - c for p, c in zip(obj.position, scene.camera.position, strict=True))
        across.append(tuple(-math.copysign(1.0, _dot(away, offset)) * each for each in away))
    found = np.asarray(across, np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def label(scene: Scene, kinds: tuple[Kind, ...] = KINDS) -> int:
    """Returns the kind of the main object, an index into ``kinds``."""
    return kinds.index(scene.objects[0].kind)


def box_labels(scene: Scene, kinds: tuple[Kind, ...] = KINDS) -> np.ndarray:
    """Returns the kind of every object: int64 [T]."""
    return np.asarray([kinds.index(obj.kind) for obj in scene.objects], np.int64)


def labels(scene: Scene, kinds: tuple[Kind, ...] = KINDS) -> np.ndarray:
    """Returns the visible kinds: bool [K]. A kind is visible if its objects cover ``VISIBLE_AREA`` of the image."""
    area = np.zeros(len(kinds))
    np.add.at(area, box_labels(scene, kinds), instance_masks(scene, _TAG_GRID).mean((1, 2)))
    return area >= VISIBLE_AREA


def project(obj: SceneObject, camera: Camera, resolution: int, *, shift: float = 0.0) -> Patch | None:
    """Returns the part of the pixel grid that the object can touch; None if it is outside of the image.

    ``shift`` widens the patch, in radii. Each pixel's ray is intersected with the object's plane, so the perspective is
    exact.
    """
    right, down, normal = axes(obj.rotation)
    offset = tuple(p - c for p, c in zip(obj.position, camera.position, strict=True))
    along, focal = _dot(normal, offset), camera.focal
    reach = obj.kind.reach + shift
    bounds = _window(obj, camera, right, down, reach, resolution)
    if bounds is None:
        return None
    rows, columns = bounds
    step = 2.0 / resolution
    u = (np.arange(columns.start, columns.stop, dtype=np.float32) + np.float32(0.5)) * step - np.float32(1.0)
    v = ((np.arange(rows.start, rows.stop, dtype=np.float32) + np.float32(0.5)) * step - np.float32(1.0))[:, None]
    # with ray (u/f, v/f, 1): depth = along / (normal · ray), and a local coordinate is a ratio of two such forms
    inverse = 1.0 / (u * (normal[0] / focal) + (v * (normal[1] / focal) + normal[2]))
    local = []
    for axis in (right, down):
        shift_along = _dot(axis, offset)
        a, b, c = ((along * axis[i] - shift_along * normal[i]) / obj.size for i in range(3))
        local.append((u * (a / focal) + (v * (b / focal) + c)) * inverse)
    pixel = step * offset[2] / (focal * obj.size)
    return Patch(rows, columns, local[0], local[1], inverse * along, pixel)


def axes(rotation: tuple[float, float, float]) -> tuple[tuple[float, float, float], ...]:
    """Returns the world directions of an object's right, down and away axes: yaw after pitch after roll."""
    (cr, cp, cy), (sr, sp, sy) = [math.cos(a) for a in rotation], [math.sin(a) for a in rotation]
    right = (cy * cr + sy * sp * sr, cp * sr, -sy * cr + cy * sp * sr)
    down = (-cy * sr + sy * sp * cr, cp * cr, sy * sr + cy * sp * cr)
    away = (sy * cp, -sp, cy * cp)
    return right, down, away


def _dot(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _near_to_far(scene: Scene) -> list[SceneObject]:
    return sorted(scene.objects, key=lambda obj: obj.position[2])


def _window(
    obj: SceneObject,
    camera: Camera,
    right: tuple[float, ...],
    down: tuple[float, ...],
    reach: float,
    resolution: int,
) -> tuple[slice, slice] | None:
    """Returns the rows and columns that contain the projected square of half side ``reach`` radii."""
    u, v = [], []
    for i in (-1.0, 1.0):
        for j in (-1.0, 1.0):
            x, y, z = (
                obj.position[k] - camera.position[k] + obj.size * reach * (i * right[k] + j * down[k]) for k in range(3)
            )
            u.append(camera.focal * x / z)
            v.append(camera.focal * y / z)
    spans = []
    for values in (v, u):
        first = max(0, math.floor((min(values) + 1.0) * resolution / 2.0) - 1)
        last = min(resolution, math.ceil((max(values) + 1.0) * resolution / 2.0) + 1)
        if first >= last:
            return None
        spans.append(slice(first, last))
    return spans[0], spans[1]


def _paint(canvas: np.ndarray, obj: SceneObject, scene: Scene, resolution: int) -> None:
    """Draws the object's shadow, then the object, on ``canvas`` [3, H, W]."""
    patch = project(obj, scene.camera, resolution)
    if scene.light.shadow > 0.0:
        _cast(canvas, obj, scene, resolution)
    if patch is None:
        return
    distance = obj.kind.distance(patch.x, patch.y)
    cover = np.clip(0.5 - distance * (1.0 / patch.pixel), 0.0, 1.0)
    diffuse, highlight = _shading(distance, patch, obj, scene.light)
    under = canvas[:, patch.rows, patch.columns]
    for channel, (near, far) in enumerate(zip(obj.rgb, obj.texture.rgb, strict=True)):
        if channel == 0:
            share = _mix(obj.texture, patch.x, patch.y, patch.pixel)
        surface = diffuse * near if share is None else (share * (far - near) + near) * diffuse
        if highlight is not None:
            surface += highlight
        surface -= under[channel]
        surface *= cover
        under[channel] += surface


def _cast(canvas: np.ndarray, obj: SceneObject, scene: Scene, resolution: int) -> None:
    """Draws the shadow: the object's form, moved away from the lamp and blurred."""
    light = scene.light
    right, down, _ = axes(obj.rotation)
    shift_x = 0.45 * _dot(light.direction, right)  # in radii; towards the lamp
    shift_y = 0.45 * _dot(light.direction, down)
    patch = project(obj, scene.camera, resolution, shift=max(abs(shift_x), abs(shift_y)) + _SHADOW_BLUR / 2)
    if patch is None:
        return
    distance = obj.kind.distance(patch.x + shift_x, patch.y + shift_y)
    shade = np.clip(0.5 - distance * (1.0 / max(_SHADOW_BLUR, patch.pixel)), 0.0, 1.0)
    shade *= -light.shadow
    shade += 1.0
    canvas[:, patch.rows, patch.columns] *= shade


def _shading(
    distance: np.ndarray, patch: Patch, obj: SceneObject, light: Light
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the diffuse light [h, w], and the highlight [h, w] or None, of a carved face with a rounded rim."""
    pixel = patch.pixel
    slope = np.clip(distance * (1.0 / obj.bevel) + 1.0, 0.0, 1.0)
    slope *= obj.relief
    slope *= 1.0 / pixel
    nx, ny = _difference(distance, 1) * slope, _difference(distance, 0) * slope
    if obj.kind.carving is not None:
        depth = -CARVED / pixel
        height = obj.kind.carving(patch.x, patch.y)
        nx += _difference(height, 1) * depth
        ny += _difference(height, 0) * depth
    scale = 1.0 / np.sqrt(nx * nx + ny * ny + 1.0)
    lx, ly, lz = light.direction
    facing = (nx * lx + ny * ly - lz) * scale
    diffuse = np.maximum(facing, 0.0) * (1.0 - light.ambient)
    diffuse += light.ambient
    if obj.gloss <= 0.0:
        return diffuse, None
    hx, hy, hz = lx, ly, lz - 1.0  # halfway between the lamp and the eye, which looks along +z
    length = math.sqrt(hx * hx + hy * hy + hz * hz)
    mirror = (nx * (hx / length) + ny * (hy / length) - hz / length) * scale
    np.maximum(mirror, 0.0, out=mirror)
    for _ in range(4):  # 16th power
        mirror *= mirror
    mirror *= obj.gloss
    return diffuse, mirror


def _difference(values: np.ndarray, axis: int) -> np.ndarray:
    """Returns the change from pixel to pixel: central differences, one-sided at the ends."""
    return np.gradient(values, axis=axis) if values.shape[axis] > 1 else np.zeros_like(values)


def _mix(texture: Texture, x: np.ndarray, y: np.ndarray, pixel: float) -> np.ndarray | None:
    """Returns the share of the texture's second color, or None for a pattern of one color."""
    paint = texture.pattern.paint
    if paint is None:
        return None
    c, s = math.cos(texture.angle) / texture.period, math.sin(texture.angle) / texture.period
    return paint(x * c + y * s, y * c - x * s, pixel / texture.period, texture.phase)


def _backdrop(background: Background, camera: Camera, resolution: int) -> np.ndarray:
    """Returns the backdrop without light: float32 [3, H, W]."""
    u, v = _backdrop_grid(background, camera, resolution)
    step = 2.0 / resolution
    ramp = (u * math.cos(background.angle) + v * math.sin(background.angle)) * 0.5 + 0.5
    share = _mix(background.texture, u, v, step)
    canvas = np.empty((3, resolution, resolution), np.float32)
    first, second = background.rgb
    for channel in range(3):
        plane = ramp * (second[channel] - first[channel]) + first[channel]
        if share is not None:
            plane += share * background.texture.rgb[channel]
        canvas[channel] = plane
    for mark in background.marks:
        _stroke(canvas, mark, u, v, step)
    return np.clip(canvas, 0.0, 1.0, out=canvas)


def _backdrop_grid(background: Background, camera: Camera, resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pixels' coordinates on the backdrop, u [1, W] and v [H, 1], which move with the camera."""
    axis = _axis(resolution)
    shift = camera.focal / (background.distance - camera.position[2])
    return axis[None, :] + camera.position[0] * shift, axis[:, None] + camera.position[1] * shift


def _backdrop_depth(background: Background, camera: Camera, resolution: int) -> np.ndarray:
    axis = _axis(resolution)
    sx, sy = background.slope
    middle = background.distance - camera.position[2] + sx * camera.position[0] + sy * camera.position[1]
    tilt = axis[None, :] * (sx / camera.focal) + axis[:, None] * (sy / camera.focal)
    return np.float32(middle) / (np.float32(1.0) - tilt)


def _stroke(canvas: np.ndarray, mark: Mark, u: np.ndarray, v: np.ndarray, step: float) -> None:
    x0, y0 = mark.start
    dx, dy = mark.end[0] - x0, mark.end[1] - y0
    columns = _between(u[0], min(x0, x0 + dx) - mark.width - step, max(x0, x0 + dx) + mark.width + step)
    rows = _between(v[:, 0], min(y0, y0 + dy) - mark.width - step, max(y0, y0 + dy) + mark.width + step)
    x, y = u[:, columns] - x0, v[rows] - y0
    along = np.clip((x * dx + y * dy) * (1.0 / (dx * dx + dy * dy)), 0.0, 1.0)
    x, y = x - along * dx, y - along * dy
    cover = np.clip(0.5 - (np.sqrt(x * x + y * y) - mark.width) * (1.0 / step), 0.0, 1.0)
    cover *= mark.opacity
    window = canvas[:, rows, columns]
    for channel in range(3):
        window[channel] += (mark.rgb[channel] - window[channel]) * cover


def _between(values: np.ndarray, low: float, high: float) -> slice:
    first, last = np.searchsorted(values, (low, high))
    return slice(int(first), int(last))


def _exposure(scene: Scene, resolution: int) -> np.ndarray:
    """Returns the brightness over the image, with film grain: float32 [H, W]."""
    axis = _axis(resolution)
    fx, fy = scene.light.falloff
    exposure = (axis * fx + 1.0)[None, :] + (axis * fy)[:, None]
    if scene.grain > 0.0:
        exposure += _grain(scene.grain_seed, scene.grain, resolution)
    return exposure


def _grain(seed: int, deviation: float, resolution: int) -> np.ndarray:
    cells = np.random.default_rng(seed).standard_normal((_GRAIN_GRID, _GRAIN_GRID), np.float32)
    cells *= deviation
    if resolution == _GRAIN_GRID:
        return cells
    weights = _interpolation(resolution)
    return weights @ cells @ weights.T


@lru_cache(maxsize=16)
def _axis(resolution: int) -> np.ndarray:
    """Returns the pixels' centers in [-1, 1]: float32 [R]."""
    return ((np.arange(resolution) + 0.5) * (2.0 / resolution) - 1.0).astype(np.float32)


@lru_cache(maxsize=16)
def _interpolation(resolution: int) -> np.ndarray:
    """Returns the linear interpolation from the grain's cells to the pixels: float32 [R, cells]."""
    position = np.clip((np.arange(resolution) + 0.5) * _GRAIN_GRID / resolution - 0.5, 0, _GRAIN_GRID - 1)
    return np.maximum(0.0, 1.0 - np.abs(position[:, None] - np.arange(_GRAIN_GRID))).astype(np.float32)


def mean_rgb(obj: SceneObject) -> Rgb:
    """Returns the object's mean color over its texture, without light."""
    if obj.texture.pattern.paint is None:
        return obj.rgb
    red, green, blue = (0.5 * (a + b) for a, b in zip(obj.rgb, obj.texture.rgb, strict=True))
    return red, green, blue
