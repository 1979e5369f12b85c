"""Films: what moves, that no single image tells, and exact flow."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.ndimage import map_coordinates
from scipy.stats import kruskal

from src.datamodules.scenes import render
from src.datamodules.scenes.motion import ACTIONS, Film, Motion, MovingWorld, Swing, flow
from src.datamodules.scenes.world import depth_span
from src.errors import SettingError

WORLD = MovingWorld()


def films(count: int, start: int = 0) -> list[Film]:
    return [WORLD.film(7, index) for index in range(start, start + count)]


def test_a_swing_at_hand_worked_times() -> None:
    swing = Swing(reach=2.0, phase=math.pi / 2, rate=0.5)  # 2 cos(pi / 2 + pi t)
    assert [round(swing.at(time), 6) for time in (0.0, 0.5, 1.0, 1.5)] == [0.0, -2.0, 0.0, 2.0]
    assert Swing(3.0, 0.0).at(17.0) == 3.0


def test_a_film_is_a_function_of_seed_and_index() -> None:
    assert WORLD.film(3, 5) == WORLD.film(3, 5)
    assert WORLD.film(3, 5) != WORLD.film(3, 6)
    assert WORLD.film(3, 5).at(0.25) == WORLD.film(3, 5).at(0.25)


def _state(film: Film, time: float) -> dict[str, float]:
    scene = film.at(time)
    obj, rest = scene.objects[0], film.scene.objects[0]
    depth = obj.position[2] / scene.camera.focal
    return {
        "x": (obj.position[0] - rest.position[0]) / depth,
        "y": (obj.position[1] - rest.position[1]) / depth,
        "size": obj.size / rest.size - 1,
        "pitch": obj.rotation[1],
        "yaw": obj.rotation[2],
        "roll": obj.rotation[0] % (2 * math.pi),
    }


@pytest.mark.parametrize("name", list(ACTIONS))
def test_a_main_object_does_what_its_label_says_and_nothing_else(name: str) -> None:
    film = next(film for film in films(200) if film.action == list(ACTIONS).index(name))
    states = [_state(film, time) for time in np.linspace(0, 2.5, 26)]
    moving = {key for key in states[0] if np.ptp([state[key] for state in states]) > 1e-9}
    assert moving == {"roll" if key == "turns" else key for key in ACTIONS[name]}
    if "turns" in ACTIONS[name]:
        turned = (states[1]["roll"] - states[0]["roll"] + math.pi) % (2 * math.pi) - math.pi
        assert np.sign(turned) == ACTIONS[name]["turns"]


@pytest.mark.parametrize("time", [0.0, 0.9])
@pytest.mark.parametrize("key", ["x", "y", "size", "pitch", "yaw", "roll"])
def test_no_single_picture_tells_the_action(key: str, time: float) -> None:
    """What is seen at a time is drawn alike for all actions: ranks do not differ, nor do those of the distances."""
    groups: list[list[float]] = [[] for _ in ACTIONS]
    for film in films(3000, start=1000):
        groups[film.action].append(_state(film, time)[key])
    assert min(map(len, groups)) > 200
    middle = math.pi if key == "roll" else 0.0
    assert kruskal(*groups).pvalue > 1e-3
    assert kruskal(*([abs(value - middle) for value in group] for group in groups)).pvalue > 1e-3


def test_the_main_object_stays_before_the_others() -> None:
    for film in films(60):
        for time in (0.0, 0.4, 1.1, 1.9):
            spans = [depth_span(obj) for obj in film.at(time).objects]
            assert all(spans[0][1] < near for near, _ in spans[1:])
            assert spans[0][0] > 0.2


def test_flow_leads_an_objects_points_to_where_they_are_seen() -> None:
    """At the place to which a pixel has moved, the later scene shows the same point of the same object."""
    size, followed = 64, 0
    for film in films(12):
        before, after = film.at(0.2), film.at(0.45)
        patch = render.project(before.objects[0], before.camera, size)
        later = render.project(after.objects[0], after.camera, size)
        assert patch is not None
        assert later is not None
        moved = flow(film, 0.2, 0.45, size)[:, patch.rows, patch.columns]
        inside = before.objects[0].kind.distance(patch.x, patch.y) < 0
        rows, columns = np.nonzero(inside)
        row = rows + moved[1][inside] + patch.rows.start - later.rows.start
        column = columns + moved[0][inside] + patch.columns.start - later.columns.start
        seen = (row >= 0) & (row <= later.x.shape[0] - 1) & (column >= 0) & (column <= later.x.shape[1] - 1)
        for local, mine in ((later.x, patch.x), (later.y, patch.y)):
            found = map_coordinates(
                np.asarray(np.broadcast_to(local, later.z.shape)), [row[seen], column[seen]], order=1
            )
            expected = np.broadcast_to(mine, inside.shape)[inside][seen]
            assert np.abs(found - expected).max() < 0.02  # of a radius; linear interpolation between pixels
        followed += int(seen.sum())
    assert followed > 3000


def test_flow_of_the_backdrop_is_the_cameras() -> None:
    film = next(film for film in films(50) if abs(film.pan[0].at(0.0) - film.pan[0].at(0.8)) > 0.1)
    moved = flow(film, 0.0, 0.8, 48)
    masks = render.instance_masks(film.at(0.0), 48)
    behind = ~masks.any(axis=0)
    camera = film.scene.camera
    shift = film.pan[0].at(0.0) - film.pan[0].at(0.8)  # to the left of what is seen as the camera moves right
    expected = shift * camera.focal / (film.scene.background.distance - camera.position[2]) * 24
    np.testing.assert_allclose(moved[0][behind], expected, rtol=1e-5)


def test_nothing_moves_between_a_time_and_itself() -> None:
    for film in films(5):
        assert np.abs(flow(film, 0.7, 0.7, 32)).max() < 1e-4


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(SettingError, match="actions move x, y, size, pitch, yaw, turns, not hue"):
        MovingWorld(actions={"blushes": {"hue": 1.0}})
    with pytest.raises(SettingError, match=r"grow must be 0 <= low <= high <= 0\.5"):
        MovingWorld(grow=(0.1, 0.8))


def test_motion_knows_metres_from_half_picture_widths() -> None:
    film = WORLD.film(1, 1)
    obj, still = film.scene.objects[0], Swing(0.0, 0.0)
    moved = Motion(Swing(0.5, 0.0), still, still, still, still).of(obj, film.scene.camera.focal, 0.0)
    seen = film.scene.camera.focal * (moved.position[0] - obj.position[0]) / obj.position[2]
    assert seen == pytest.approx(0.5)
