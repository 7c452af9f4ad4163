"""Properties that hold for anything: Hypothesis looks for the exception."""

import json

import numpy as np
import pytest
from conftest import rollout_record
from hypothesis import given, settings
from hypothesis import strategies as st
from test_worlds import goals_of_kind, random_scenes, twin_success

import env
from data.rollouts import read_rollouts, write_rollouts
from worlds import _clevr_robot_geometry as geometry
from worlds import clevr_robot
from worlds.clevr_robot import COLORS, DIRECTIONS

SOME, FEW = (settings(max_examples=n, deadline=None, derandomize=True) for n in (60, 12))
SEEDS = st.integers(0, 2**32 - 1)
JUDGED = st.sampled_from(clevr_robot.KINDS)
OFFSETS = st.floats(0.001, 0.275)
SIGNS = st.sampled_from([(1, 1), (1, -1), (-1, 1), (-1, -1)])


def goals():
    """Any goal that the format allows, with any text that UTF-8 can write."""
    characters = st.characters(codec="utf-8", exclude_characters="\0")
    texts = st.text(characters, min_size=1, max_size=40).filter(str.strip)
    direction, level = st.sampled_from(DIRECTIONS), st.sampled_from(env.LEVELS)
    pair = st.permutations(COLORS).map(lambda order: tuple(order[:2]))
    relation = st.builds(lambda balls, side: (*balls, side), pair, direction)
    step = st.builds(lambda ball, side: ((ball, None, side),), st.sampled_from(COLORS), direction)
    relations = dict.fromkeys((*clevr_robot.KINDS, env.UNJUDGED), st.just(()))
    relations |= {"relation": st.tuples(relation), "step": step}
    relations["relations"] = st.lists(relation, min_size=2, max_size=3).map(tuple)
    of_kind = lambda kind: st.builds(env.Goal, texts, level, st.just(kind), relations[kind])
    return st.sampled_from([*relations]).flatmap(of_kind)


@SOME
@given(goals())
def test_a_goal_survives_json_and_a_goals_file(world, tmp_path_factory, goal):
    assert env.goal_from_json(json.loads(json.dumps(goal.to_json())), world) == goal
    path = tmp_path_factory.mktemp("goals") / "mine.jsonl"
    env.write_goals(path, [goal])
    assert env.read_goals(path, world) == [goal]


@SOME
@given(JUDGED, st.booleans(), SEEDS)
def test_judges_agree_with_the_brute_force_twin(world, kind, imagined, seed):
    rng = np.random.default_rng(seed)
    goals, obs = goals_of_kind(world, kind, rng, 8), random_scenes(rng, 8)
    nexts, actions = random_scenes(rng, 8), rng.integers(40, size=8)
    expected = [twin_success(*case, imagined) for case in zip(goals, obs, nexts, actions)]
    assert world.success(goals, obs, nexts, actions, imagined).tolist() == expected


@SOME
@given(OFFSETS, OFFSETS, SIGNS, st.booleans(), st.booleans())
def test_an_offset_belongs_to_exactly_one_direction_on_a_border_too(x, y, signs, border, axis):
    other = x if border else 0 if axis else y
    offset = np.array([x * signs[0], other * signs[1]])
    assert geometry.holds(offset, np.arange(4)).sum() == 1
    too_far = offset / np.linalg.norm(offset) * geometry.NEAR * 1.0001
    assert not geometry.holds(too_far, np.arange(4)).any()


@SOME
@given(JUDGED, st.integers(1, 30), SEEDS)
def test_rewards_before_a_success_add_up_to_the_change_of_the_potential(world, kind, steps, seed):
    rng = np.random.default_rng(seed)
    goals = goals_of_kind(world, kind, rng, 1) * steps
    path, actions = rng.uniform(-0.5, 0.5, (steps + 1, 10)), rng.integers(40, size=steps)
    met = world.success(goals, path[:-1], path[1:], actions)
    missed = int((~met).cumprod().sum())  # steps before the first success
    rewards = world.reward(goals, path[:-1], path[1:], actions)[:missed]
    first, last = world.potential(goals[:1] * 2, path[[0, missed]])
    assert rewards.sum() == pytest.approx(10 * (first - last), abs=1e-9)


@FEW
@given(st.integers(1, 12), st.integers(1, 3), SEEDS)
def test_physics_does_not_depend_on_order_threads_or_company(world, n, threads, seed):
    rng = np.random.default_rng(seed)
    states, actions = world.initial_states(rng, n), rng.integers(40, size=n)
    order = rng.permutation(n)
    reached = world.step_batch(states, actions, threads=1)
    assert (world.step_batch(states[order], actions[order], threads) == reached[order]).all()
    assert (world.step_batch(states[:1], actions[:1]) == reached[:1]).all()


@FEW
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.booleans(), SEEDS)
def test_rollouts_of_any_lengths_survive_the_disk(world, tmp_path_factory, lengths, checked, seed):
    rng = np.random.default_rng(seed)
    path = tmp_path_factory.mktemp("rows") / "rollouts"
    (goal,) = world.sample_goals("hard", "test", 1, rng)
    records = []
    for n in lengths:
        episode = rng.normal(size=(n + 1, 10)), rng.integers(40, size=n)
        record = rollout_record(world, goal, *episode, imagined=True)
        if checked:
            record |= {"explanation": f"{n} steps.", "dynamics_error": rng.random(n, np.float32)}
        records.append(record)
    write_rollouts(path, records[:1])
    write_rollouts(path, records)  # replaces the one before
    assert list(path.parent.iterdir()) == [path]
    for ours, read in zip(records, read_rollouts(path, world), strict=True):
        assert env.goal_of(read) == goal and read["success"] == ours["success"]
        assert read["explanation"] == ours.get("explanation")
        for key in ("observations", "actions", "rewards", "dynamics_error"):
            np.testing.assert_array_equal(read[key], ours.get(key))
            assert ours.get(key) is None or read[key].dtype == ours[key].dtype
