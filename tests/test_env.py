"""CLEVR-Robot: physics against recordings, judges against plain trigonometry, goals, expert, pictures."""
import colorsys
import itertools
import json
import math

import gymnasium
import numpy as np
import pytest
import torch
from conftest import ROOT, expert_rollouts
from endurance import endure
from gymnasium.utils.env_checker import check_env
from PIL import Image

import env
from env import Goal

RECORDINGS = ROOT.parent / "shared" / "reference" / "clevr_robot_40.npz"
BEHIND, LEFT, FRONT, RIGHT = range(4)
RED, BLUE, GREEN, PURPLE, CYAN = range(5)


# ---------------------------------------------------------------------------------------------- recorded trajectories

@pytest.fixture(scope="module")
def recorded():
    """All recorded transitions, flat: a dict of arrays, and `goals`, a Goal for each."""
    if not RECORDINGS.is_file():
        pytest.skip(f"the authors' recordings are not on this machine ({RECORDINGS}); physics is checked without them only roughly")
    with np.load(RECORDINGS) as file:
        valid = file["masks"].astype(bool)
        data = {k: file[k][valid] for k in ("states", "observations", "actions", "next_observations", "rewards", "terminals", "goals")}
    marks = data["goals"]
    data["goals"] = [Goal("recorded", relations=((int(np.argmax(g[:5] == 1)), int(np.argmax(g[:5] == 2)), int(g[5])),)) for g in marks]
    return data


def test_replayed_recordings_end_where_the_authors_physics_ended(recorded):
    reached = env.observe(env.step_batch(recorded["states"], recorded["actions"]))
    error = np.abs(reached - recorded["next_observations"]).max(1)
    assert np.median(error) <= 0.016 and np.quantile(error, 0.9) <= 0.06


def test_every_recorded_reward_is_reproduced(recorded):
    rewards = env.reward(recorded["goals"], recorded["observations"], recorded["next_observations"], recorded["actions"])
    np.testing.assert_allclose(rewards, recorded["rewards"][:, 0], atol=0.02)


def test_recorded_terminals_and_no_other_steps_are_successes(recorded):
    judged = env.success(recorded["goals"], recorded["observations"], recorded["next_observations"], recorded["actions"])
    assert judged.any() and (judged == recorded["terminals"][:, 0]).all()


# ------------------------------------------------------------------------------------------------------------ physics

def test_physics_is_pure_and_independent_of_batch_order_and_threads():
    rng = np.random.default_rng(0)
    states, actions = env.initial_states(rng, 30), rng.integers(40, size=30)
    states = env.step_batch(states, rng.integers(40, size=30))  # moving balls: velocities carry over
    before, order = states.copy(), rng.permutation(30)
    reached = env.step_batch(states, actions, threads=1)
    assert (states == before).all() and (reached != before).any()
    assert (env.step_batch(states, actions, threads=3) == reached).all()
    assert (env.step_batch(states[order], actions[order], threads=2) == reached[order]).all()
    assert (np.concatenate([env.step_batch(states[i:i + 1], actions[i:i + 1]) for i in range(30)]) == reached).all()


def test_each_action_pushes_its_ball_its_way_and_no_other():
    corners = np.array([(-0.45, -0.15), (0.45, -0.15), (-0.45, 0.55), (0.45, 0.55)])
    ways = [(1, 0), (0, 1), (-1, 0), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]  # the order of the facts
    start = np.array([np.insert(corners, action // 8, (0, 0.2), 0).ravel() for action in range(40)])
    moved = env.observe(env.step_batch(env.state_from_observation(start), np.arange(40))) - start
    for action, change in enumerate(moved.reshape(40, 5, 2)):
        x, y = change[action // 8]
        off_course = math.atan2(y, x) - math.atan2(*ways[action % 8][::-1])
        assert 0.08 < math.hypot(x, y) < 0.35 and math.cos(off_course) > 0.99
        assert np.abs(np.delete(change, action // 8, 0)).max() < 0.005


def test_step_batch_names_the_row_of_a_state_that_is_not_finite():
    states = env.initial_states(np.random.default_rng(0), 3)
    states[1, 40] = np.nan
    with pytest.raises(ValueError, match="state 1 of the batch has NaN"):
        env.step_batch(states, np.zeros(3, int))


def test_step_batch_refuses_wrong_shapes_and_unknown_actions():
    state = env.initial_states(np.random.default_rng(0), 2)
    for states, actions in ((state, [0]), (state[:, :68], [0, 1]), (state, [0, 40]), (state, [-1, 0])):
        with pytest.raises(ValueError):
            env.step_batch(states, actions)
    assert env.step_batch(state[:0], []).shape == (0, 69)


def test_starts_are_at_rest_in_range_and_spaced():
    states = env.initial_states(np.random.default_rng(1), 400)
    xy = env.observe(states).reshape(-1, 5, 2)
    apart = np.linalg.norm(xy[:, :, None] - xy[:, None], axis=-1)[:, ~np.eye(5, dtype=bool)]
    assert states.shape == (400, 69) and apart.min() >= 0.36 - 1e-6 and not states[:, 37:].any()
    np.testing.assert_allclose([xy[..., 0].min(), xy[..., 0].max(), xy[..., 1].min(), xy[..., 1].max()], [-0.5, 0.5, -0.3, 0.5], atol=0.02)
    assert xy[..., 0].min() >= -0.5 and xy[..., 0].max() <= 0.5 and xy[..., 1].min() >= -0.3 and xy[..., 1].max() <= 0.5


def test_a_state_made_from_an_observation_shows_that_observation():
    obs = env.observe(env.initial_states(np.random.default_rng(2), 7))
    states = env.state_from_observation(obs)
    np.testing.assert_array_equal(env.observe(states), obs)
    np.testing.assert_array_equal(states[0], env.state_from_observation(obs[0]))


# ------------------------------------------------------------------------------------------------------------- judges

def related(obs, a, b, way):
    """Twin of one relation, in degrees."""
    dx, dy = float(obs[2 * a]) - float(obs[2 * b]), float(obs[2 * a + 1]) - float(obs[2 * b + 1])
    angle = math.degrees(math.atan2(dy, dx)) - (90, 180, 270, 0)[way]
    return -45 <= (angle + 180) % 360 - 180 < 45 and math.hypot(dx, dy) < 0.391


def twin_success(goal, obs, next_obs, action, imagined):
    """The facts' definitions in plain Python, one transition at a time."""
    at = [(float(x), float(y)) for x, y in np.reshape(next_obs, (5, 2))]
    if goal.kind == "step":
        (ball, _, way), = goal.relations
        dx, dy = (at[ball][k] - float(obs[2 * ball + k]) for k in (0, 1))
        good = action // 8 == ball and action % 8 in {BEHIND: (1, 4, 5), LEFT: (2, 5, 7), FRONT: (3, 6, 7), RIGHT: (0, 4, 6)}[way]
        return good and (not imagined or (dy, -dx, -dy, dx)[way] >= 0.15)
    if goal.kind == "line":
        return all(abs(math.degrees(math.atan2(at[i + 1][1] - at[i][1], at[i + 1][0] - at[i][0]))) <= 30 for i in range(4))
    if goal.kind == "gather":
        return all(math.dist(at[i], at[GREEN]) <= 0.325 for i in range(5))
    return all(related(next_obs, *r) for r in goal.relations)


def random_scenes(rng, n):
    """Observations of all sorts: scattered, crowded, in a row, huddled round green. (n, 10)"""
    scattered, crowded = rng.uniform(-0.5, 0.5, (n, 5, 2)), rng.uniform(-0.25, 0.25, (n, 5, 2))
    row = np.stack([np.linspace(-0.4, 0.4, 5) + rng.normal(0, 0.03, (n, 5)), rng.normal(0, 0.06, (n, 5))], -1)
    return np.array([scattered, crowded, row])[rng.integers(3, size=n), np.arange(n)].reshape(n, 10)


def goals_of_kind(kind, rng, n):
    level = {"relation": "rephrase", "step": "easy"}.get(kind, "hard")
    return [g for g in env.sample_goals(level, "test", 40 * n, rng) if g.kind == kind][:n]


@pytest.mark.parametrize("imagined", (False, True))
@pytest.mark.parametrize("kind", env.KINDS[:-1])
def test_success_agrees_with_plain_trigonometry(kind, imagined):
    rng, n = np.random.default_rng(3), 3000
    goals, action = goals_of_kind(kind, rng, 60) * 50, rng.integers(40, size=n)
    obs, nexts = random_scenes(rng, n), random_scenes(rng, n)
    if kind == "step":  # half the actions pick the right ball
        action = np.where(rng.random(n) < 0.5, action, [g.relations[0][0] * 8 + a % 8 for g, a in zip(goals, action)])
    expected = [twin_success(*row, imagined) for row in zip(goals, obs, nexts, action)]
    judged = env.success(goals, obs, nexts, action, imagined)
    assert judged.tolist() == expected and 3 <= sum(expected) <= n - 3
    assert env.success(goals[0], obs[:1], nexts[:1], action[:1], imagined).tolist() == expected[:1]


def test_each_sector_owns_its_clockwise_edge_and_no_other():
    owners = {(0.1, -0.1): RIGHT, (0.1, 0.1): BEHIND, (-0.1, 0.1): LEFT, (-0.1, -0.1): FRONT}
    for offset, owner in owners.items():
        held = [bool(env.holds(np.array(offset), way)) for way in range(4)]
        assert held == [way == owner for way in range(4)]
    angles = np.linspace(0, 2 * np.pi, 1001)
    circle = 0.2 * np.stack([np.cos(angles), np.sin(angles)], -1)
    assert (sum(env.holds(circle, np.full(1001, way)).astype(int) for way in range(4)) == 1).all()
    assert not any(env.holds(2 * circle, np.full(1001, way)).any() for way in range(4))


def test_relations_in_states_are_those_that_a_loop_finds():
    obs = np.random.default_rng(4).uniform(-0.4, 0.4, (30, 10))
    expected = [[row, a, b, way] for row, balls in enumerate(obs.reshape(30, 5, 2)) for a in range(5) for b in range(5)
                for way in range(4) if a != b and env.holds(balls[a] - balls[b], way)]
    assert env.relations_in(obs).tolist() == expected and len(expected) > 60


@pytest.mark.parametrize("push, moved, acted, imagined", [
    (2, 0.16, True, True), (5, 0.15, True, True), (2, 0.14, True, False), (2, -0.2, True, False),
    (0, 0.3, False, False), (1, 0.3, False, False)])
def test_step_goals_ask_for_the_push_and_in_imagination_for_the_movement(push, moved, acted, imagined):
    goal, obs = Goal("Move green left.", "easy", "step", ((GREEN, None, LEFT),)), np.zeros((1, 10))
    nexts = obs - moved * np.eye(10)[2 * GREEN]
    action = np.array([GREEN * 8 + push])
    assert env.success(goal, obs, nexts, action)[0] == acted
    assert env.success(goal, obs, nexts, action, imagined=True)[0] == imagined
    assert not env.success(goal, obs, nexts, action - 8)[0]  # another ball


def test_relation_reward_is_ten_times_the_approach_to_the_point_beside_the_other_ball():
    goal = Goal("Red behind blue.", relations=((RED, BLUE, BEHIND),))
    obs, nexts = np.zeros((1, 10)), np.zeros((1, 10))
    obs[0, :2], nexts[0, :2] = (0.5, 0.195), (0.1, -0.105)  # from the target point (0, .195): .5, then sqrt(.1^2 + .3^2)
    np.testing.assert_allclose(env.reward(goal, obs, nexts, np.array([0])), 10 * (0.5 - math.hypot(0.1, 0.3)))
    nexts[0, :2] = (0, 0.3)
    assert env.reward(goal, obs, nexts, np.array([0])) == 100


@pytest.mark.parametrize("kind", env.KINDS[:-1])
def test_rewards_telescope_until_success(kind):
    rng = np.random.default_rng(4)
    checked = 0
    for goal in goals_of_kind(kind, rng, 20):
        path, actions = rng.uniform(-0.5, 0.5, (7, 10)), rng.integers(40, size=6)
        if not env.success(goal, path[:-1], path[1:], actions).any():
            rewards = env.reward(goal, path[:-1], path[1:], actions)
            np.testing.assert_allclose(rewards.sum(), 10 * (env.potential(goal, path[:1]) - env.potential(goal, path[-1:]))[0])
            checked += 1
    assert checked >= 5


# -------------------------------------------------------------------------------------------------------------- goals

PATTERNS = env.goal_patterns()["patterns"]


def test_goals_survive_json():
    rng = np.random.default_rng(5)
    goals = [g for level, split in {(p["level"], p["split"]) for p in PATTERNS} for g in env.sample_goals(level, split, 50, rng)]
    assert {g.kind for g in goals} == set(env.KINDS) - {"unknown"}
    assert [Goal.from_json(json.loads(json.dumps(g.to_json()))) for g in goals] == goals


GOOD = {"text": "Move red left.", "level": "easy", "kind": "step", "relations": [["red", None, "left"]]}
BAD_GOALS = {
    "broken JSON": ('{"text": "oops"', "JSON"),
    "not an object": ("[1, 2]", "object"),
    "missing field": (json.dumps({k: v for k, v in GOOD.items() if k != "kind"}), "kind"),
    "unknown kind": (json.dumps({**GOOD, "kind": "juggle"}), "juggle"),
    "unknown level": (json.dumps({**GOOD, "level": "heroic"}), "heroic"),
    "unknown colour": (json.dumps({**GOOD, "relations": [["mauve", None, "left"]]}), "mauve"),
    "unknown direction": (json.dumps({**GOOD, "relations": [["red", None, "up"]]}), "up"),
    "three balls": (json.dumps({**GOOD, "kind": "relation", "relations": [["red", "blue", "green", "left"]]}), "green"),
    "same ball twice": (json.dumps({**GOOD, "kind": "relation", "relations": [["red", "red", "left"]]}), "red"),
    "relation without other": (json.dumps({**GOOD, "kind": "relation"}), "two balls"),
    "step with other": (json.dumps({**GOOD, "relations": [["red", "blue", "left"]]}), "one ball"),
    "too few relations": (json.dumps({**GOOD, "kind": "relations", "relations": [["red", "blue", "left"]]}), "2 or 3"),
    "line with relations": (json.dumps({**GOOD, "kind": "line"}), "line"),
    "relations no list": (json.dumps({**GOOD, "relations": "red"}), "relations"),
    "text no sentence": (json.dumps({**GOOD, "text": 5}), "text"),
}


@pytest.mark.parametrize("line, named", BAD_GOALS.values(), ids=BAD_GOALS)
def test_a_bad_goals_file_is_refused_with_file_line_and_reason(tmp_path, line, named):
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(ValueError, match="mine.jsonl, line 3") as error:
        env.read_goals(path)
    assert named in str(error.value)


@pytest.mark.parametrize("content", (b"", b"\n\n", b'{"text": "caf\xe9"}\n'), ids=("empty", "blank", "not UTF-8"))
def test_a_goals_file_without_readable_goals_is_refused_by_name(tmp_path, content):
    (tmp_path / "mine.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="mine.jsonl"):
        env.read_goals(tmp_path / "mine.jsonl")


def test_built_in_goals_are_as_many_as_asked_for():
    count = {(level, split): sum(p["level"] == level and p["split"] == split for p in PATTERNS)
             for level in env.LEVELS for split in ("train", "validation", "test")}
    assert count["offline", "train"] >= 18
    for level, least in (("rephrase", 40), ("easy", 80), ("hard", 40)):
        parts = count[level, "validation"], count[level, "test"]
        assert sum(parts) >= least and min(parts) >= least // 3 and count[level, "train"] == 0
    inferred = [p["split"] for p in PATTERNS if p["level"] == "rephrase" and p["relations"] == [["a", "b", "-d"]]]
    assert {"validation", "test"} <= set(inferred)


def test_no_sentence_is_in_two_levels_or_splits():
    owner = {}
    for p in PATTERNS:
        for d in range(4):
            text = env.fill_pattern(p, range(5), (d, d, d)).text.lower()
            assert owner.setdefault(text, (p["level"], p["split"])) == (p["level"], p["split"]), text


@pytest.mark.parametrize("level, split", sorted({(p["level"], p["split"]) for p in PATTERNS}))
def test_sampled_goals_use_all_patterns_colours_and_directions_and_name_their_balls(level, split):
    goals = env.sample_goals(level, split, 200, np.random.default_rng(6))
    relations = [r for g in goals for r in g.relations]
    assert {a for a, _, _ in relations} == set(range(5)) and {d for _, _, d in relations} == set(range(4))
    for g in goals:
        assert all(env.COLORS[ball] in g.text.lower() for a, b, _ in g.relations for ball in (a, b) if ball is not None), g.text
        assert g.level == level and "{" not in g.text


# ----------------------------------------------------------------------------------------------------- expert, episodes

def test_the_expert_reaches_95_percent_of_goals_in_20_actions():
    rng = np.random.default_rng(7)
    won = [r["success"] for r in expert_rollouts(env.sample_goals("offline", "train", 1500, rng), rng)]
    assert np.mean(won) >= 0.94  # 1,500 episodes measure .95 to within .012, two standard errors


@pytest.mark.slow
def test_an_mlp_that_clones_20000_expert_rollouts_reaches_85_percent():
    def inputs(obs, goals):
        a, b, d = env.goal_array(goals)[:, 1:4].T
        return np.concatenate([np.asarray(obs) / 0.3, np.eye(5)[a], np.eye(5)[b], np.eye(4)[d]], 1).astype(np.float32)
    torch.manual_seed(0)
    rng = np.random.default_rng(8)
    records = [r for r in expert_rollouts(env.sample_goals("offline", "train", 21500, rng), rng) if r["success"]][:20000]
    assert len(records) == 20000
    x = torch.from_numpy(inputs(np.concatenate([r["observations"][:-1] for r in records]),
                                [goal for r in records for goal in [env.goal_of(r)] * len(r["actions"])]))
    y = torch.from_numpy(np.concatenate([r["actions"] for r in records]))
    layers = [torch.nn.Linear(24, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 40)]
    network = torch.nn.Sequential(*layers)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6000)
    for _ in range(6000):
        rows = torch.randint(len(y), (256,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
    goals = env.sample_goals("offline", "train", 3000, rng)

    def act(obs, rows):
        with torch.no_grad():
            return network(torch.from_numpy(inputs(obs, [goals[r] for r in rows]))).argmax(-1).numpy()
    played = env.run_episodes(act, goals, env.unfulfilled_states(rng, goals), max_steps=20)
    assert np.mean([r["success"] for r in played]) >= 0.85


def test_episodes_start_unfulfilled_and_end_at_the_first_success():
    rng = np.random.default_rng(9)
    goals = [g for level in ("rephrase", "easy", "hard") for g in env.sample_goals(level, "test", 30, rng)]
    records = env.run_episodes(lambda obs, rows: rng.integers(40, size=len(rows)), goals, env.unfulfilled_states(rng, goals), max_steps=8)
    for goal, r in zip(goals, records):
        obs, nexts = r["observations"][:-1], r["observations"][1:]
        judged = [twin_success(goal, *row, False) for row in zip(obs, nexts, r["actions"])]
        assert not any(judged[:-1]) and judged[-1] == r["success"] and env.goal_of(r) == goal
        assert r["success"] or len(r["actions"]) == (1 if goal.kind == "step" else 8)
        assert goal.kind == "step" or not twin_success(goal, obs[0], obs[0], 0, False)
        np.testing.assert_array_equal(env.step_batch(r["states"][:-1], r["actions"]), r["states"][1:])
    assert {r["success"] for r in records} == {True, False}


# ------------------------------------------------------------------------------------------------- Gymnasium, pictures

def test_random_play_stays_finite_and_between_the_walls():
    squeezed, past, memory = endure(4000, rows=40)
    assert 0 <= squeezed < 0.02 and past == 0  # a ball pressed against a wall gives way by millimetres
    assert memory < 20e6


@pytest.mark.filterwarnings("ignore")
def test_the_environment_passes_gymnasiums_checks():
    check_env(gymnasium.make("KALM/ClevrRobot-v0", render_mode="rgb_array").unwrapped)


def test_a_plain_sentence_is_read_back_as_its_relation_and_others_as_none():
    for a, b, d in itertools.product(range(5), range(5), range(4)):
        if a != b:
            assert env.read_relation(env.canonical_text(Goal("x", relations=((a, b, d),)))) == (a, b, d)
    for text in ("", "The red ball is near the red ball, behind it.", "the red ball", "Put the red ball behind the blue ball."):
        assert env.read_relation(text) is None


@pytest.mark.parametrize("goal, explanation, expected", [
    ("Put RED next to the blue one.", "The blue ball is near the red ball, behind it.", False),
    ("Put red next to blue.", "The red ball is near the cyan ball, behind it.", True),
    ("Red, blue and cyan in a row.", "The red ball is near the cyan ball, behind it.", False),
    ("Move the red ball left.", "The red ball is near the cyan ball, behind it.", False),
    ("Move the red ball left.", "The green ball is near the cyan ball, behind it.", True),
    ("Be bored and tidy.", "The green ball is near the cyan ball, behind it.", False),
    ("Put red next to blue.", "Nothing.", True),
    ("Move the red ball left.", "Nothing.", True)])
def test_an_explanation_contradicts_a_goal_by_the_balls_that_it_names(goal, explanation, expected):
    assert env.contradicts(goal, explanation) == expected


def test_unfulfilled_observations_come_from_the_pool_and_leave_something_to_do(rollouts):
    pool = np.concatenate([r["observations"] for r in rollouts])
    goals = [env.goal_of(r) for r in rollouts]
    chosen = env.unfulfilled_observations(np.random.default_rng(0), goals, pool)
    assert {tuple(o) for o in chosen} <= {tuple(o) for o in pool} and len({tuple(o) for o in chosen}) > 50
    assert not env.success(goals, chosen, chosen, np.zeros(len(goals), int)).any()
    always = [r["observations"][-1:] for r in rollouts[:1]][0]  # a pool in which every state fulfils the goal
    assert (env.unfulfilled_observations(np.random.default_rng(0), goals[:1], always) == always).all()


def test_renamed_balls_do_as_before_under_their_new_names(rollouts):
    order = np.array([2, 0, 4, 1, 3])  # red is now green, blue red, green cyan, purple blue, cyan purple
    for record in rollouts[:20]:
        renamed = env.rename_balls(record, order)
        goal, new_goal = env.goal_of(record), env.goal_of(renamed)
        (a, b, d), = goal.relations
        assert new_goal.relations == ((order[a], order[b], d),)
        assert renamed["goal"].replace(env.COLORS[order[a]], "X").replace(env.COLORS[order[b]], "Y") == (
            record["goal"].replace(env.COLORS[a], "X").replace(env.COLORS[b], "Y"))
        again = env.rollout_record(new_goal, renamed["observations"], renamed["actions"])
        np.testing.assert_allclose(again["rewards"], record["rewards"], atol=1e-5)
        assert again["success"] and renamed["states"] is None and record["states"] is not None
        before, after = (env.state_from_observation(r["observations"][:1]) for r in (record, renamed))
        moved, expected = (env.observe(env.step_batch(s, r["actions"][:1])) for s, r in ((after, renamed), (before, record)))
        np.testing.assert_allclose(moved.reshape(5, 2)[order], expected.reshape(5, 2), atol=0.01)
    step = {**rollouts[0], "goal": "Push red left, red!", "kind": "step", "relations": [["red", None, "left"]]}
    assert env.rename_balls(step, order)["relations"] == [["green", None, "left"]]
    assert env.rename_balls(step, order)["goal"] == "Push green left, green!"
    assert env.rename_balls({**step, "goal": "Red or red-hued, balls are scattered"}, order)["goal"] == "Green or green-hued, balls are scattered"


def test_the_same_seed_gives_the_same_episode():
    def episode(seed):
        clevr = env.ClevrRobotEnv(max_steps=5)
        obs, info = clevr.reset(seed=seed)
        steps = [clevr.step(action) for action in (3, 17, 30, 8)]
        return [info["goal"], obs.tolist(), *((s[0].tolist(), *s[1:4]) for s in steps)]
    assert episode(1) == episode(1) and episode(1) != episode(2)


def test_reset_takes_a_goal_and_a_state_and_the_episode_ends_by_success_or_limit():
    goal = Goal("Move green left.", "easy", "step", ((GREEN, None, LEFT),))
    state = env.initial_states(np.random.default_rng(10), 1)[0]
    clevr = env.ClevrRobotEnv(max_steps=2)
    obs, info = clevr.reset(options={"goal": goal, "state": state})
    assert info["goal"] == goal.text and (obs == env.observe(state)).all()
    obs, reward, terminated, truncated, info = clevr.step(RED * 8)
    assert not terminated and not truncated and (info["state"] == env.step_batch(state[None], [RED * 8])[0]).all()
    assert clevr.step(RED * 8)[2:4] == (False, True)
    clevr.reset(options={"goal": goal, "state": state})
    assert clevr.step(GREEN * 8 + 2)[1:4] == (100.0, True, False)
    for options in ({"goal": "a text"}, {"state": np.zeros(5)}, {"state": np.full(69, np.nan)}):
        with pytest.raises(ValueError):
            clevr.reset(options=options)


def test_a_picture_shows_every_ball_in_its_colour_at_its_place():
    for obs in env.observe(env.initial_states(np.random.default_rng(11), 5)):
        picture = env.draw(obs, size=256)
        assert picture.dtype == np.uint8 and picture.shape == (256, 256, 3)
        for ball, name in enumerate(env.COLORS):
            u, v, _ = env._project(*obs[2 * ball:2 * ball + 2], 0, 256)
            hue = colorsys.rgb_to_hsv(*np.median(picture[int(v):int(v) + 5, int(u) - 2:int(u) + 3].reshape(-1, 3), 0) / 255)[0]
            away = {c: min(abs(hue - h), 1 - abs(hue - h)) for c, h in
                    (("red", 0), ("blue", 0.61), ("green", 0.36), ("purple", 0.77), ("cyan", 0.51))}
            assert min(away, key=away.get) == name


def test_a_rollout_becomes_a_gif_with_a_frame_for_every_observation(tmp_path, rollouts):
    record = max(rollouts, key=lambda r: len(r["actions"]))
    env.save_gif(tmp_path / "rollout.gif", record, size=96)
    with Image.open(tmp_path / "rollout.gif") as gif:
        assert gif.format == "GIF" and gif.size == (96, 96) and gif.n_frames >= len(record["actions"]) + 1
    env.save_gif(tmp_path / "two.gif", record, record, captions=("imagined", "executed"), size=96)
    with Image.open(tmp_path / "two.gif") as gif:
        assert gif.size == (192, 96) and gif.n_frames >= len(record["actions"]) + 1
