"""CLEVR-Robot: physics, judges, expert, symmetry and picture, against oracles; and Tiles."""

import colorsys
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import rollout_record

import env
from env import Goal
from worlds import _clevr_robot_geometry as geometry
from worlds import _clevr_robot_picture as picture
from worlds import clevr_robot
from worlds.clevr_robot import COLORS

ROOT = Path(__file__).resolve().parents[1]
RECORDINGS = ROOT.parent / "shared" / "reference" / "clevr_robot_40.npz"
GREEN = COLORS.index("green")
RED_BEHIND_BLUE = Goal("Red behind blue.", "offline", "relation", (("red", "blue", "behind"),))


def expert_episodes(world, goals, rng, max_steps=20):
    encoded = world.encode_goals(goals)
    policy = lambda obs, rows: world.expert_actions(encoded[rows], obs)
    starts = env.unfulfilled_states(world, rng, goals)
    return env.run_episodes(world, policy, goals, starts, max_steps)


# ------------------------------------------------------------------ physics, also the authors'


@pytest.fixture(scope="module")
def recorded(world):
    """All recorded transitions, flat, as the judge takes them, and as a dict."""
    if not RECORDINGS.is_file():
        pytest.skip(f"the authors' recordings are not on this machine ({RECORDINGS})")
    with np.load(RECORDINGS) as file:
        valid = file["masks"].astype(bool)
        names = ("states", "observations", "actions", "next_observations", "rewards", "terminals")
        data = {name: file[name][valid] for name in names}
        goals = [world.recorded_goal("recorded", code[None]) for code in file["goals"][valid]]
    transitions = (goals, data["observations"], data["next_observations"], data["actions"])
    return transitions, data


def test_replayed_recordings_end_where_the_authors_physics_ended(world, recorded):
    _, data = recorded
    reached = world.observe(world.step_batch(data["states"], data["actions"]))
    error = np.abs(reached - data["next_observations"]).max(1)
    assert np.median(error) <= 0.016 and np.quantile(error, 0.9) <= 0.06


def test_every_recorded_reward_is_reproduced(world, recorded):
    transitions, data = recorded
    np.testing.assert_allclose(world.reward(*transitions), data["rewards"][:, 0], atol=0.02)


def test_recorded_terminals_and_no_other_steps_are_successes(world, recorded):
    transitions, data = recorded
    judged = world.success(*transitions)
    assert judged.any() and (judged == data["terminals"][:, 0]).all()


def test_physics_is_pure_and_independent_of_batch_order_and_threads(world):
    rng = np.random.default_rng(0)
    states, actions = world.initial_states(rng, 30), rng.integers(40, size=30)
    states = world.step_batch(
        states, rng.integers(40, size=30)
    )  # moving balls: velocities carry over
    before, order = states.copy(), rng.permutation(30)
    reached = world.step_batch(states, actions, threads=1)
    assert (states == before).all() and (reached != before).any()
    assert (world.step_batch(states, actions, threads=3) == reached).all()
    assert (world.step_batch(states[order], actions[order], threads=2) == reached[order]).all()
    alone = [world.step_batch(states[i : i + 1], actions[i : i + 1]) for i in range(30)]
    assert (np.concatenate(alone) == reached).all()


def test_the_cores_are_shared_among_processes_and_counted_on_any_system(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(7)), raising=False)
    assert clevr_robot.available_threads() == 7
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert clevr_robot.available_threads() == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS and Windows
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert clevr_robot.available_threads() == 4
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert clevr_robot.available_threads() == 1


def test_each_action_pushes_its_ball_its_way_and_no_other(world):
    corners = np.array([(-0.45, -0.15), (0.45, -0.15), (-0.45, 0.55), (0.45, 0.55)])
    ways = [(1, 0), (0, 1), (-1, 0), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]  # as in the facts
    start = np.array([np.insert(corners, action // 8, (0, 0.2), 0).ravel() for action in range(40)])
    reached = world.step_batch(world.state_from_observation(start), np.arange(40))
    for action, change in enumerate((world.observe(reached) - start).reshape(40, 5, 2)):
        x, y = change[action // 8]
        off_course = math.atan2(y, x) - math.atan2(*ways[action % 8][::-1])
        assert 0.08 < math.hypot(x, y) < 0.35 and math.cos(off_course) > 0.99
        assert np.abs(np.delete(change, action // 8, 0)).max() < 0.005


def test_step_batch_refuses_wrong_shapes_unknown_actions_and_states_that_are_not_finite(world):
    state = world.initial_states(np.random.default_rng(0), 3)
    wrong = ((state, [0]), (state[:, :68], [0, 1, 2]), (state, [0, 40, 1]), (state, [-1, 0, 1]))
    for states, actions in wrong:
        with pytest.raises(ValueError):
            world.step_batch(states, actions)
    assert world.step_batch(state[:0], []).shape == (0, 69)
    state[1, 40] = np.nan
    with pytest.raises(ValueError, match="state 1 of the batch has NaN"):
        world.step_batch(state, np.zeros(3, int))


def test_starts_are_at_rest_in_range_and_spaced(world):
    states = world.initial_states(np.random.default_rng(1), 400)
    xy = world.observe(states).reshape(-1, 5, 2)
    apart = np.linalg.norm(xy[:, :, None] - xy[:, None], axis=-1)[:, ~np.eye(5, dtype=bool)]
    assert states.shape == (400, 69) and apart.min() >= 0.36 - 1e-6 and not states[:, 37:].any()
    reach = [*xy.min((0, 1)), *xy.max((0, 1))]
    np.testing.assert_allclose(reach, [-0.5, -0.3, 0.5, 0.5], atol=0.02)
    assert (np.abs(reach) <= [0.5, 0.3, 0.5, 0.5]).all()


def test_a_state_made_from_an_observation_shows_that_observation(world):
    obs = world.observe(world.initial_states(np.random.default_rng(2), 7))
    states = world.state_from_observation(obs)
    np.testing.assert_array_equal(world.observe(states), obs)
    np.testing.assert_array_equal(states[0], world.state_from_observation(obs[0]))


def test_random_play_stays_finite_and_between_the_walls(world):
    rng = np.random.default_rng(0)
    states = world.initial_states(rng, 40)
    for _ in range(100):
        states = world.step_batch(states, rng.integers(40, size=40))
        xy = states[:, clevr_robot.BALL_XY]
        beyond = np.maximum(clevr_robot.TABLE_LOW - xy, xy - clevr_robot.TABLE_HIGH).max()
        assert np.isfinite(states).all()
        assert (
            beyond < 0.02 - picture.BALL_RADIUS
        )  # a ball pressed to a wall gives way by millimetres


# ------------------------------------------------------------------ judges


def related(obs, ball, other, direction):
    """Twin of one relation, in degrees."""
    (ax, ay), (bx, by) = (map(float, obs[COLORS.index(c)]) for c in (ball, other))
    middle = {"behind": 90, "left": 180, "front": 270, "right": 0}[direction]
    angle = math.degrees(math.atan2(ay - by, ax - bx)) - middle
    return -45 <= (angle + 180) % 360 - 180 < 45 and math.hypot(ax - bx, ay - by) < 0.391


def twin_success(goal, obs, next_obs, action, imagined):
    """The facts' definitions in plain Python, one transition at a time."""
    before, at = np.reshape(obs, (5, 2)).tolist(), np.reshape(next_obs, (5, 2)).tolist()
    if goal.kind == "step":
        ((color, _, direction),) = goal.relations
        ball = COLORS.index(color)
        dx, dy = at[ball][0] - before[ball][0], at[ball][1] - before[ball][1]
        pushes = {"behind": (1, 4, 5), "left": (2, 5, 7), "front": (3, 6, 7), "right": (0, 4, 6)}
        moved = {"behind": dy, "left": -dx, "front": -dy, "right": dx}[direction]
        pushed = action // 8 == ball and action % 8 in pushes[direction]
        return pushed and (not imagined or moved >= 0.15)
    if goal.kind == "line":
        gaps = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(at, at[1:])]
        return all(abs(math.degrees(math.atan2(dy, dx))) <= 30 for dx, dy in gaps)
    if goal.kind == "gather":
        return all(math.dist(place, at[GREEN]) <= 0.325 for place in at)
    return all(related(at, *relation) for relation in goal.relations)


def random_scenes(rng, n):
    """Observations of all sorts: scattered, crowded, in a row. (n, 10)"""
    scattered, crowded = rng.uniform(-0.5, 0.5, (n, 5, 2)), rng.uniform(-0.25, 0.25, (n, 5, 2))
    x, y = np.linspace(-0.4, 0.4, 5) + rng.normal(0, 0.03, (n, 5)), rng.normal(0, 0.06, (n, 5))
    sorts = np.array([scattered, crowded, np.stack([x, y], -1)])
    return sorts[rng.integers(3, size=n), np.arange(n)].reshape(n, 10)


def goals_of_kind(world, kind, rng, n):
    level = {"relation": "rephrase", "step": "easy"}.get(kind, "hard")
    return [g for g in world.sample_goals(level, "test", 40 * n, rng) if g.kind == kind][:n]


@pytest.mark.parametrize("imagined", (False, True))
@pytest.mark.parametrize("kind", clevr_robot.KINDS)
def test_success_agrees_with_plain_trigonometry(world, kind, imagined):
    rng, n = np.random.default_rng(3), 3000
    goals = goals_of_kind(world, kind, rng, 60) * 50
    actions = rng.integers(40, size=n)
    obs, nexts = random_scenes(rng, n), random_scenes(rng, n)
    if kind == "step":  # half the actions pick the right ball
        right = [COLORS.index(g.relations[0][0]) * 8 + a % 8 for g, a in zip(goals, actions)]
        actions = np.where(rng.random(n) < 0.5, actions, right)
    expected = [twin_success(*row, imagined) for row in zip(goals, obs, nexts, actions)]
    judged = world.success(goals, obs, nexts, actions, imagined)
    assert judged.tolist() == expected and 3 <= sum(expected) <= n - 3


def test_each_sector_owns_its_clockwise_edge_and_no_other():
    edges = np.array([(0.1, 0.1), (-0.1, 0.1), (-0.1, -0.1), (0.1, -0.1)])  # of behind, left, ...
    held = geometry.holds(edges[:, None], np.arange(4))
    assert (held == np.eye(4, dtype=bool)).all()
    angles = np.linspace(0, 2 * np.pi, 1001)
    circle = 0.2 * np.stack([np.cos(angles), np.sin(angles)], -1)[:, None]
    assert (geometry.holds(circle, np.arange(4)).sum(1) == 1).all()
    assert not geometry.holds(2 * circle, np.arange(4)).any()


@pytest.mark.parametrize(
    "push, moved, acted, imagined",
    [
        (2, 0.16, True, True),
        (5, 0.15, True, True),
        (2, 0.14, True, False),
        (2, -0.2, True, False),
        (0, 0.3, False, False),
        (1, 0.3, False, False),
    ],
)
def test_steps_ask_for_the_push_and_in_imagination_for_the_movement(
    world, push, moved, acted, imagined
):
    goals, obs = (
        [Goal("Green left.", "easy", "step", (("green", None, "left"),))],
        np.zeros((1, 10)),
    )
    nexts = obs - moved * np.eye(10)[2 * GREEN]
    actions = np.array([GREEN * 8 + push])
    assert world.success(goals, obs, nexts, actions)[0] == acted
    assert world.success(goals, obs, nexts, actions, imagined=True)[0] == imagined
    assert not world.success(goals, obs, nexts, actions - 8)[0]  # another ball


def test_relation_reward_is_ten_times_the_approach_to_the_point_beside_the_other_ball(world):
    obs, nexts = np.zeros((1, 10)), np.zeros((1, 10))
    obs[0, :2] = (0.5, 0.195)  # .5 from the target point (0, .195)
    nexts[0, :2] = (0.1, -0.105)
    reward = world.reward([RED_BEHIND_BLUE], obs, nexts, np.array([0]))
    np.testing.assert_allclose(reward, 10 * (0.5 - math.hypot(0.1, 0.3)))
    nexts[0, :2] = (0, 0.3)
    assert world.reward([RED_BEHIND_BLUE], obs, nexts, np.array([0])) == 100


@pytest.mark.parametrize("kind", clevr_robot.KINDS)
def test_rewards_telescope_until_success(world, kind):
    rng = np.random.default_rng(4)
    checked = 0
    for goal in goals_of_kind(world, kind, rng, 20):
        path, actions = rng.uniform(-0.5, 0.5, (7, 10)), rng.integers(40, size=6)
        if not world.success([goal] * 6, path[:-1], path[1:], actions).any():
            rewards = world.reward([goal] * 6, path[:-1], path[1:], actions)
            first, last = world.potential([goal] * 2, path[[0, -1]])
            np.testing.assert_allclose(rewards.sum(), 10 * (first - last))
            checked += 1
    assert checked >= 5


def test_what_cannot_be_is_counted_by_transition(world):
    obs = np.zeros((4, 10), np.float32)
    nexts = obs.copy()
    nexts[0, :2] = (0.3, 0.32)  # further than a push can
    nexts[1, 3] = -0.31  # off the table
    nexts[2, 8] = 0.61  # both
    assert world.plausibility(obs, nexts) == {"off_table": 0.5, "beyond_dynamics": 0.5}


# ------------------------------------------------------------------ expert, symmetry, picture


def test_the_expert_reaches_95_percent_of_goals_in_20_actions(world):
    rng = np.random.default_rng(7)
    goals = world.sample_goals("offline", "train", 1500, rng)
    won = [r["success"] for r in expert_episodes(world, goals, rng)]
    assert np.mean(won) >= 0.94  # 1,500 episodes measure .95 to within .012, two standard errors


@pytest.mark.slow
def test_an_mlp_that_clones_10000_expert_rollouts_reaches_85_percent(world):
    def inputs(obs, encoded):
        a, b, d = encoded[:, 1:4].T
        parts = [np.asarray(obs) / 0.3, np.eye(5)[a], np.eye(5)[b], np.eye(4)[d]]
        return torch.from_numpy(np.concatenate(parts, 1).astype(np.float32))

    torch.manual_seed(0)
    rng = np.random.default_rng(8)
    records = expert_episodes(world, world.sample_goals("offline", "train", 10750, rng), rng)
    records = [r for r in records if r["success"]][:10000]
    assert len(records) == 10000
    encoded = world.encode_goals([env.goal_of(r) for r in records])
    encoded = np.repeat(encoded, [len(r["actions"]) for r in records], 0)
    x = inputs(np.concatenate([r["observations"][:-1] for r in records]), encoded)
    y = torch.from_numpy(np.concatenate([r["actions"] for r in records]))
    hidden = [torch.nn.Linear(24, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256), torch.nn.ReLU()]
    network = torch.nn.Sequential(*hidden, torch.nn.Linear(256, 40))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4000)
    for _ in range(4000):
        rows = torch.randint(len(y), (256,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
    goals = world.sample_goals("offline", "train", 1500, rng)
    encoded = world.encode_goals(goals)

    def policy(obs, rows):
        with torch.no_grad():
            return network(inputs(obs, encoded[rows])).argmax(-1).numpy()

    starts = env.unfulfilled_states(world, rng, goals)
    played = env.run_episodes(world, policy, goals, starts, max_steps=20)
    assert np.mean([r["success"] for r in played]) >= 0.85


class Order:  # draws that red is now green, blue red, green cyan, purple blue, cyan purple
    def permutation(self, n):
        return np.array([2, 0, 4, 1, 3])


def test_renamed_balls_do_as_before_under_their_new_names(world, rollouts):
    order = Order().permutation(5)
    names = dict(zip(COLORS, (COLORS[new] for new in order)))
    for record, renamed in zip(rollouts[:20], world.rename(rollouts[:20], Order())):
        goal, new_goal = env.goal_of(record), env.goal_of(renamed)
        ((a, b, d),) = goal.relations
        assert new_goal.relations == ((names[a], names[b], d),)
        hidden = renamed["goal"].replace(names[a], "X").replace(names[b], "Y")
        assert hidden == record["goal"].replace(a, "X").replace(b, "Y")
        again = rollout_record(world, new_goal, renamed["observations"], renamed["actions"])
        np.testing.assert_allclose(again["rewards"], record["rewards"], atol=1e-5)
        assert again["success"] and renamed["states"] is None and record["states"] is not None
        reached = []
        for r in (record, renamed):
            start = world.state_from_observation(r["observations"][:1])
            reached.append(world.observe(world.step_batch(start, r["actions"][:1])).reshape(5, 2))
        np.testing.assert_allclose(reached[1][order], reached[0], atol=0.01)


def test_renaming_leaves_no_old_name_in_texts_and_relations(world, rollouts):
    step = {**rollouts[0], "kind": "step", "relations": [["red", None, "left"]]}
    texts = {
        "Push red left, red!": "Push green left, green!",
        "Red or red-hued, balls are scattered": "Green or green-hued, balls are scattered",
    }
    renamed = world.rename([{**step, "goal": text} for text in texts], Order())
    assert [r["goal"] for r in renamed] == list(texts.values())
    assert renamed[0]["relations"] == [["green", None, "left"]]


def test_a_picture_shows_every_ball_in_its_colour_at_its_place(world):
    hues = {"red": 0, "blue": 0.61, "green": 0.36, "purple": 0.77, "cyan": 0.51}
    for obs in world.observe(world.initial_states(np.random.default_rng(11), 5)):
        image = world.draw(obs, size=256)
        assert image.dtype == np.uint8 and image.shape == (256, 256, 3)
        for color, (x, y) in zip(COLORS, obs.reshape(5, 2)):
            u, v, _ = picture.project(x, y, 0, 256)
            patch = image[int(v) : int(v) + 5, int(u) - 2 : int(u) + 3].reshape(-1, 3)
            hue = colorsys.rgb_to_hsv(*np.median(patch, 0) / 255)[0]
            away = {c: min(abs(hue - h), 1 - abs(hue - h)) for c, h in hues.items()}
            assert min(away, key=away.get) == color
        assert (world.draw(obs, 3) != image).any()  # the push


# ------------------------------------------------------------------ Tiles


@pytest.fixture(scope="module")
def tiles():
    return env.make(f"{ROOT / 'docs' / 'tiles.py'}:Tiles")


def test_a_push_moves_at_most_one_puck_by_one_tile_and_none_onto_another(tiles):
    rng = np.random.default_rng(0)
    states = tiles.initial_states(rng, 500)
    for _ in range(5):
        actions = rng.integers(8, size=500)
        reached = tiles.step_batch(states, actions)
        change = (reached - states).reshape(-1, 3, 2)
        assert set(np.abs(change).sum((1, 2))) == {0, 1} and not change[:, 2].any()
        assert reached.min() == 0 and reached.max() == 3
        places = reached.reshape(-1, 3, 2) @ [10, 1]
        assert all(len(set(row)) == 3 for row in places)
        states = reached
    assert (tiles.state_from_observation(tiles.observe(states) + 0.4) == states).all()


def test_the_expert_of_tiles_reaches_nine_of_ten_goals(tiles):
    rng = np.random.default_rng(0)
    goals = tiles.sample_goals("offline", "train", 300, rng)
    starts = env.unfulfilled_states(tiles, rng, goals)
    policy = lambda obs, rows: tiles.expert_actions([goals[row] for row in rows], obs)
    records = env.run_episodes(tiles, policy, goals, starts)
    assert np.mean([r["success"] for r in records]) >= 0.9
    assert all((r["rewards"] <= 100).all() and r["observations"].shape[1] == 6 for r in records)
