"""Images and ground truth of a scene: exact, consistent with each other and between resolutions."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from src.datamodules.scenes import render
from src.datamodules.scenes.patterns import PATTERNS, PLAIN
from src.datamodules.scenes.scene import Background, Camera, Light, Scene, SceneObject, Texture
from src.datamodules.scenes.shapes import DISC, KINDS, RING, SQUARE, Kind
from src.datamodules.scenes.world import ObjectsWorld, depth_span

GREY = (0.5, 0.5, 0.5)
SMOOTH = replace(DISC, carving=None)
FLAT = Texture(pattern=PLAIN, rgb=GREY, period=1.0, angle=0.0, phase=(0.0, 0.0))


def _object(**changes: object) -> SceneObject:
    obj = SceneObject(
        kind=SMOOTH,
        color="white",
        rgb=(1.0, 1.0, 1.0),
        texture=FLAT,
        size=0.8,
        position=(0.0, 0.0, 4.0),
        rotation=(0.0, 0.0, 0.0),
        bevel=0.2,
        relief=0.0,
        gloss=0.0,
    )
    return replace(obj, **changes)  # type: ignore[arg-type]


def _scene(*objects: SceneObject, **changes: object) -> Scene:
    scene = Scene(
        camera=Camera(position=(0.0, 0.0, 0.0), focal=2.0),
        light=Light(direction=(0.0, 0.0, -1.0), ambient=0.5, tint=(1.0, 1.0, 1.0), falloff=(0.0, 0.0), shadow=0.0),
        background=Background(
            distance=20.0, slope=(0.0, 0.0), rgb=((0.0, 0.0, 0.0),) * 2, angle=0.0, texture=FLAT, marks=()
        ),
        objects=objects,
        grain=0.0,
        grain_seed=0,
    )
    return replace(scene, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [ObjectsWorld().scene(5, index) for index in range(40)]


def test_disc_seen_straight_has_the_area_and_place_of_its_projection() -> None:
    """Radius 0.8 m at 4 m with focal 2 is 0.4 half widths; center (0.5, -0.25) m is (0.25, -0.125) half widths."""
    scene, resolution = _scene(_object(position=(0.5, -0.25, 4.0))), 400
    (mask,) = render.instance_masks(scene, resolution)
    assert mask.mean() == pytest.approx(math.pi * 0.4**2 / 4, rel=2e-3)
    (box,) = render.boxes(scene, resolution)
    expected = np.array([0.25 - 0.4, -0.125 - 0.4, 0.25 + 0.4, -0.125 + 0.4]) * 200 + 200
    np.testing.assert_allclose(box, expected, atol=1.0)
    assert (render.depth(scene, resolution)[mask] == 4.0).all()
    # an anti-aliased smooth white disc on black: the mean brightness is the covered area
    smooth = _scene(_object(kind=SMOOTH, position=(0.5, -0.25, 4.0)))
    assert render.image(smooth, 64)[0].mean() / 255 == pytest.approx(math.pi * 0.4**2 / 4, rel=2e-3)


def test_a_carved_face_takes_the_light_by_its_slope() -> None:
    """A corrugation cos(2 pi y / 0.85) of depth c: the normal is (0, c dh/dy, -1), and Lambert's law gives the rest."""
    corrugated = replace(SQUARE, carving=lambda x, y: np.cos(y * (2 * math.pi / 0.85)))
    light = Light(direction=(0.0, 0.6, -0.8), ambient=0.25, tint=(1.0, 1.0, 1.0), falloff=(0.0, 0.0), shadow=0.0)
    resolution = 800
    carved = _scene(_object(kind=corrugated), light=light)
    column = render.image(carved, resolution)[0, :, resolution // 2] / 255
    # 0.8 m at 4 m with focal 2: a radius is 0.4 half widths
    y = ((np.arange(resolution) + 0.5) * 2 / resolution - 1) / 0.4
    slope = -render.CARVED * np.sin(2 * math.pi * y / 0.85) * 2 * math.pi / 0.85
    facing = np.maximum((0.8 - 0.6 * slope) / np.sqrt(1 + slope**2), 0)
    inside = np.abs(y) < 0.6
    np.testing.assert_allclose(column[inside], (0.25 + 0.75 * facing)[inside], atol=0.01)
    smooth = _scene(_object(kind=replace(SQUARE, carving=None)), light=light)
    assert np.array_equal(render.instance_masks(carved, 64), render.instance_masks(smooth, 64))


def test_tilted_disc_has_the_area_of_the_exact_perspective_ellipse() -> None:
    """Yawed by a about its center at depth Z, the disc of radius r is seen as an ellipse of area
    π r² f² cos(a) Z / (Z² - r² sin²(a))^1.5 in half widths squared."""
    angle, radius, z = 0.9, 0.8, 4.0
    scene = _scene(_object(rotation=(0.0, 0.0, angle)))
    area = math.pi * radius**2 * 4.0 * math.cos(angle) * z / (z**2 - (radius * math.sin(angle)) ** 2) ** 1.5
    assert render.instance_masks(scene, 500)[0].mean() == pytest.approx(area / 4, rel=3e-3)


@pytest.mark.parametrize("rotation", [(0.4, 0.3, -0.5), (-0.7, -0.2, 0.6)])
def test_every_pixel_of_an_object_casts_back_onto_it(rotation: tuple[float, float, float]) -> None:
    """From depth and pixel the world point follows; it must lie in the square's plane and inside the square."""
    obj = _object(kind=SQUARE, rotation=rotation, position=(0.3, -0.2, 4.0))
    camera = Camera(position=(0.4, 0.1, 0.5), focal=1.8)
    scene, resolution = _scene(obj, camera=camera), 120
    (mask,), depth = render.instance_masks(scene, resolution), render.depth(scene, resolution)
    rows, columns = np.nonzero(mask)
    u, v = ((index + 0.5) * 2 / resolution - 1 for index in (columns, rows))
    z = depth[rows, columns].astype(np.float64)
    points = np.stack([u * z / 1.8 + 0.4, v * z / 1.8 + 0.1, z + 0.5], 1) - np.array(obj.position)
    roll, pitch, yaw = (_rotation(axis, angle) for axis, angle in zip((2, 0, 1), rotation, strict=True))
    local = points @ (yaw @ pitch @ roll)
    half = 0.8 * math.sqrt(math.pi) / 2  # of the square whose area is that of a disc of radius 0.8 m
    assert np.abs(local[:, 2]).max() < 1e-4
    assert half * 0.97 < np.abs(local[:, :2]).max() <= half * 1.001


def _rotation(axis: int, angle: float) -> np.ndarray:
    """Right-handed rotation about a world axis; a positive roll turns right towards down, and so on cyclically."""
    matrix, i, j = np.eye(3), (axis + 1) % 3, (axis + 2) % 3
    matrix[i, i] = matrix[j, j] = math.cos(angle)
    matrix[i, j], matrix[j, i] = -math.sin(angle), math.sin(angle)
    return matrix


def test_nearer_object_hides_farther_one_whatever_their_order() -> None:
    near, far = _object(position=(0.2, 0.0, 3.0), size=0.4), _object(kind=RING, position=(0.0, 0.0, 6.0), size=1.4)
    first, second = render.instance_masks(_scene(near, far), 80)
    swapped_second, swapped_first = render.instance_masks(_scene(far, near), 80)
    np.testing.assert_array_equal(first, swapped_first)
    np.testing.assert_array_equal(second, swapped_second)
    amodal = render.amodal_masks(_scene(near, far), 80)
    np.testing.assert_array_equal(first, amodal[0])
    np.testing.assert_array_equal(second, amodal[1] & ~amodal[0])
    assert (amodal[0] & amodal[1]).any()


def test_masks_are_disjoint_and_cover_what_any_object_covers(scenes: list[Scene]) -> None:
    for scene in scenes:
        masks = render.instance_masks(scene, 96)
        assert masks.sum(0).max() <= 1
        np.testing.assert_array_equal(masks.any(0), render.amodal_masks(scene, 96).any(0))


def test_depth_is_the_nearest_of_all_objects_and_the_backdrop(scenes: list[Scene]) -> None:
    """Every object alone gives its own depth; the scene's must be their minimum and agree with the masks."""
    for scene in scenes:
        alone = np.stack([render.depth(replace(scene, objects=(obj,)), 64) for obj in scene.objects])
        backdrop = render.depth(replace(scene, objects=()), 64)
        together = render.depth(scene, 64)
        np.testing.assert_array_equal(together, np.minimum(alone.min(0), backdrop))
        masks = render.instance_masks(scene, 64)
        for mask, depth, obj in zip(masks, alone, scene.objects, strict=True):
            np.testing.assert_array_equal(together[mask], depth[mask])
            nearest, farthest = depth_span(obj)
            assert nearest <= depth[mask].min(initial=nearest)
            assert depth[mask].max(initial=farthest) <= farthest
        np.testing.assert_array_equal(together[~masks.any(0)], backdrop[~masks.any(0)])


def test_objects_of_the_world_are_apart_in_depth_and_the_main_one_leads(scenes: list[Scene]) -> None:
    for scene in scenes:
        spans = [depth_span(obj) for obj in scene.objects]
        for (_, farthest), (nearest, _) in itertools.pairwise(spans):
            assert farthest < nearest
        areas = render.amodal_masks(scene, 64).sum((1, 2))
        assert areas[0] > 1.5 * areas[1:].max(initial=0)
        assert render.label(scene) == KINDS.index(scene.objects[0].kind)
        assert render.box_labels(scene)[0] == render.label(scene)
        assert len(set(render.box_labels(scene))) == len(scene.objects)


def test_boxes_are_tight(scenes: list[Scene]) -> None:
    for scene in scenes:
        masks, boxes = render.instance_masks(scene, 64), render.boxes(scene, 64)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.astype(int), strict=True):
            if not mask.any():
                assert (x0, y0, x1, y1) == (0, 0, 0, 0)
                continue
            assert mask[y0:y1, x0:x1].sum() == mask.sum()
            assert mask[y0, x0:x1].any()
            assert mask[y1 - 1, x0:x1].any()
            assert mask[y0:y1, x0].any()
            assert mask[y0:y1, x1 - 1].any()


def test_hidden_object_has_no_mask_an_empty_box_and_no_tag() -> None:
    front, hidden = _object(kind=SQUARE, size=1.0), _object(kind=RING, size=0.2, position=(0.0, 0.0, 8.0))
    scene = _scene(front, hidden)
    assert not render.instance_masks(scene, 64)[1].any()
    assert render.boxes(scene, 64)[1].tolist() == [0.0, 0.0, 0.0, 0.0]
    assert [KINDS[i] for i in np.flatnonzero(render.labels(scene))] == [SQUARE]
    outside = _scene(front, replace(hidden, position=(9.0, 0.0, 8.0)))
    assert not render.instance_masks(outside, 64)[1].any()


def test_tags_name_the_kinds_seen(scenes: list[Scene]) -> None:
    for scene in scenes:
        tags = render.labels(scene)
        seen = render.instance_masks(scene, 256).mean((1, 2))
        for obj, share in zip(scene.objects, seen, strict=True):
            if share > 1.25 * render.VISIBLE_AREA or share < 0.75 * render.VISIBLE_AREA:
                assert tags[KINDS.index(obj.kind)] == (share >= render.VISIBLE_AREA)
        assert tags.sum() <= len(scene.objects)


def test_same_picture_at_every_resolution(scenes: list[Scene]) -> None:
    """Shrunk by area, 256 px must be 64 px: edges, textures, light, shadow and grain alike."""
    for scene in scenes:
        small = render.image(scene, 64).astype(np.float64)
        large = render.image(scene, 256).astype(np.float64).reshape(3, 64, 4, 64, 4).mean((2, 4))
        error = np.abs(small - large)
        assert error.mean() < 3.0  # of 255; another scene differs by about 60
        assert np.quantile(error, 0.99) < 30.0
        masks = render.instance_masks(scene, 256).reshape(-1, 64, 4, 64, 4).mean((2, 4))
        coarse = render.instance_masks(scene, 64)
        assert np.quantile(masks[coarse], 0.02) > 0.3  # a pixel whose center is inside is mostly inside
        assert np.abs(masks - coarse).mean() < 0.02


@pytest.mark.parametrize("pattern", PATTERNS[1:], ids=lambda pattern: pattern.name)
def test_patterns_do_not_alias(pattern: object) -> None:
    """Even a texture far finer than a pixel must fade to an even mixture instead of beating."""
    texture = Texture(pattern=pattern, rgb=(0.0, 0.0, 0.0), period=0.35, angle=0.3, phase=(0.2, 0.6))  # type: ignore[arg-type]
    scene = _scene(_object(texture=texture, size=1.4))
    small = render.image(scene, 64)[0].astype(np.float64)
    large = render.image(scene, 512)[0].astype(np.float64).reshape(64, 8, 64, 8).mean((1, 3))
    assert np.sqrt(((small - large) ** 2).mean()) < 12.0


def test_light_comes_from_where_it_says() -> None:
    """The rim that faces the lamp is brighter, and the shadow falls on the other side."""
    light = Light(direction=(-0.8, 0.0, -0.6), ambient=0.2, tint=(1.0, 1.0, 1.0), falloff=(0.0, 0.0), shadow=0.4)
    scene = _scene(
        _object(relief=1.0),
        light=light,
        background=Background(
            distance=20.0, slope=(0.0, 0.0), rgb=((0.6, 0.6, 0.6),) * 2, angle=0.0, texture=FLAT, marks=()
        ),
    )
    row = render.image(scene, 200)[0, 100].astype(int)  # the disc spans columns 60 to 140
    assert row[64] > row[100] > row[136]
    assert row[145] < row[55] == row[10] == row[190]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.carving is not None], ids=lambda kind: kind.name)
def test_carving_changes_how_a_face_takes_the_light_and_nothing_else(kind: Kind) -> None:
    light = Light(direction=(-0.8, 0.0, -0.6), ambient=0.2, tint=(1.0, 1.0, 1.0), falloff=(0.0, 0.0), shadow=0.0)
    carved = _scene(_object(kind=kind), light=light)
    smooth = _scene(_object(kind=replace(kind, carving=None)), light=light)
    np.testing.assert_array_equal(render.instance_masks(carved, 96), render.instance_masks(smooth, 96))
    np.testing.assert_array_equal(render.depth(carved, 96), render.depth(smooth, 96))
    one, other = render.image(carved, 96).astype(int), render.image(smooth, 96).astype(int)
    (inside,) = render.amodal_masks(smooth, 96)
    assert np.unique(other[0][inside]).size < np.unique(one[0][inside]).size  # flat before, shaded after
    differs = np.abs(one - other).max(0) > 0
    assert differs[inside].mean() > 0.5
    # at a sharp corner the share that covers a pixel is not zero until one pixel further out
    rim = binary_dilation(inside, np.ones((3, 3)), iterations=2)
    assert not (differs & ~rim).any()


def test_camera_that_moves_right_shifts_near_objects_more_than_far_ones() -> None:
    near, far = _object(size=0.3, position=(0.0, 0.0, 3.0)), _object(size=0.6, position=(0.0, 1.5, 6.0))
    scene = _scene(near, far)
    moved = replace(scene, camera=Camera(position=(0.3, 0.0, 0.0), focal=2.0))
    shift = (render.boxes(scene, 600) - render.boxes(moved, 600))[:, 0]
    np.testing.assert_allclose(shift, [0.3 * 2 / 3 * 300, 0.3 * 2 / 6 * 300], atol=1.0)


def test_normals_are_those_of_the_surface_that_the_depths_span(scenes: list[Scene]) -> None:
    """Three pixels that show one object span a triangle in space; its normal, to the camera's side, is the object's."""
    checked = 0
    for scene in scenes:
        resolution, focal = 64, scene.camera.focal
        depth = render.depth(scene, resolution).astype(np.float64)
        axis = (np.arange(resolution) + 0.5) * 2 / resolution - 1
        points = np.stack([axis[None, :] * depth / focal, axis[:, None] * depth / focal, depth])
        beside, below = np.diff(points, axis=2)[:, :-1], np.diff(points, axis=1)[:, :, :-1]
        spanned = -np.cross(beside, below, axis=0)  # x to the right, y down: their product points away
        spanned /= np.linalg.norm(spanned, axis=0)
        masks = render.instance_masks(scene, resolution)
        facings = render.facings(scene)
        assert np.sum(facings * facings, axis=1) == pytest.approx(1)
        assert (facings[:, 2] < 0).all()
        for mask, facing in zip([~masks.any(axis=0), *masks], facings, strict=True):
            whole = mask[:-1, :-1] & mask[1:, :-1] & mask[:-1, 1:]
            np.testing.assert_allclose(spanned[:, whole], np.broadcast_to(facing[:, None], (3, whole.sum())), atol=2e-3)
            checked += whole.sum()
    assert checked > 1000


def test_backdrop_depth_is_its_plane() -> None:
    background = replace(_scene().background, slope=(0.2, -0.1))
    scene = _scene(camera=Camera(position=(0.5, -0.3, 0.2), focal=2.0), background=background)
    depth = render.depth(scene, 10).astype(np.float64)
    axis = (np.arange(10) + 0.5) / 5 - 1
    x, y = axis[None, :] * depth / 2 + 0.5, axis[:, None] * depth / 2 - 0.3
    np.testing.assert_allclose(depth + 0.2, 20.0 + 0.2 * x - 0.1 * y, rtol=1e-5)
