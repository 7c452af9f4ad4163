"""Properties that hold for anything: Hypothesis looks for the exception."""
import json

import numpy as np
import pytest
import torch
from conftest import new_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_env import goals_of_kind, random_scenes, twin_success
from test_model import padded

import env
import ground
import rollout

SOME, FEW = (settings(max_examples=n, deadline=None, derandomize=True) for n in (60, 12))
SEEDS = st.integers(0, 2 ** 32 - 1)
JUDGED = st.sampled_from([kind for kind in env.KINDS if kind != "unknown"])


def goals():
    """Any goal that the format allows, with any text that UTF-8 can write."""
    texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40).filter(str.strip)
    levels, way = st.sampled_from(env.LEVELS), st.integers(0, 3)
    pair = st.permutations(range(5)).map(lambda p: tuple(p[:2]))
    relation = st.builds(lambda ab, d: (*ab, d), pair, way)
    relations = {"relation": st.tuples(relation), "step": st.builds(lambda a, d: ((a, None, d),), st.integers(0, 4), way),
                 "relations": st.lists(relation, min_size=2, max_size=3).map(tuple), **dict.fromkeys(("line", "gather", "unknown"), st.just(()))}
    return st.sampled_from(env.KINDS).flatmap(lambda kind: st.builds(env.Goal, texts, levels, st.just(kind), relations[kind]))


@SOME
@given(JUDGED, st.booleans(), SEEDS)
def test_judges_agree_with_the_brute_force_twin(kind, imagined, seed):
    rng = np.random.default_rng(seed)
    goals, obs, nexts = goals_of_kind(kind, rng, 8), random_scenes(rng, 8), random_scenes(rng, 8)
    action = rng.integers(40, size=8)
    assert env.success(goals, obs, nexts, action, imagined).tolist() == [
        twin_success(*case, imagined) for case in zip(goals, obs, nexts, action)]


@SOME
@given(st.floats(0.001, 0.275), st.floats(0.001, 0.275), st.sampled_from([(1, 1), (1, -1), (-1, 1), (-1, -1)]), st.booleans(), st.booleans())
def test_an_offset_belongs_to_exactly_one_direction_on_a_border_too(x, y, signs, border, axis):
    d = np.array([x * signs[0], (x if border else 0 if axis else y) * signs[1]])
    assert sum(bool(env.holds(d, np.array(way))) for way in range(4)) == 1
    assert not any(bool(env.holds(d / np.linalg.norm(d) * env.NEAR * 1.0001, np.array(way))) for way in range(4))


@SOME
@given(JUDGED, st.integers(1, 30), SEEDS)
def test_rewards_before_a_success_add_up_to_the_change_of_the_potential(kind, steps, seed):
    rng = np.random.default_rng(seed)
    goal, = goals_of_kind(kind, rng, 1)
    path, actions = rng.uniform(-0.5, 0.5, (steps + 1, 10)), rng.integers(40, size=steps)
    missed = int((~env.success(goal, path[:-1], path[1:], actions)).cumprod().sum())  # steps before the first success
    path, actions = path[:missed + 1], actions[:missed]
    expected = 10 * (env.potential(goal, path[:1]) - env.potential(goal, path[-1:]))[0]
    assert env.reward(goal, path[:-1], path[1:], actions).sum() == pytest.approx(expected, abs=1e-9)


@SOME
@given(goals())
def test_a_goal_survives_json_and_a_goals_file(tmp_path_factory, goal):
    assert env.Goal.from_json(json.loads(json.dumps(goal.to_json()))) == goal
    path = tmp_path_factory.mktemp("goals") / "mine.jsonl"
    path.write_text(json.dumps(goal.to_json(), ensure_ascii=False) + "\n", encoding="utf-8", newline="")
    assert env.read_goals(path) == [goal]


@FEW
@given(st.integers(1, 12), st.integers(1, 3), SEEDS)
def test_physics_does_not_depend_on_order_threads_or_company(n, threads, seed):
    rng = np.random.default_rng(seed)
    states, actions, order = env.initial_states(rng, n), rng.integers(40, size=n), rng.permutation(n)
    reached = env.step_batch(states, actions, threads=1)
    assert (env.step_batch(states[order], actions[order], threads=threads) == reached[order]).all()
    assert (env.step_batch(states[:1], actions[:1]) == reached[:1]).all()


@FEW
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), SEEDS)
def test_rollouts_of_any_lengths_survive_the_disk(tmp_path_factory, lengths, seed):
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("rows") / "real"
    goal, = env.sample_goals("offline", "train", 1, rng)
    records = [env.rollout_record(goal, rng.normal(size=(n + 1, 10)), rng.integers(40, size=n)) for n in lengths]
    rollout.write_rollouts(folder, records)
    for ours, read in zip(records, rollout.read_rollouts(folder), strict=True):
        for key in ("observations", "actions", "rewards"):
            assert read[key].dtype == ours[key].dtype
            np.testing.assert_array_equal(read[key], ours[key])


@pytest.fixture(scope="module")
def expected(rollouts):
    """An untrained model, examples of all tasks, and the losses of each packed alone."""
    model, tokenizer = new_model(rollouts)
    examples = [ground.make_example(task, tokenizer, rollouts[i:i + 1]) for i in range(0, 24, 4) for task in ground.TASKS]
    return model, examples, losses(model, ground.pack(examples, row_length=1))


def losses(model, batch):
    with torch.no_grad():
        out = model(**batch)
    return [*out.task_losses.tolist(), out.text_loss.item(), out.action_loss.item(), out.state_loss.item()]


@FEW
@given(order=st.randoms(use_true_random=False), row_length=st.integers(1, 2000), more=st.integers(0, 40))
def test_losses_are_the_same_however_examples_are_ordered_packed_and_padded(expected, order, row_length, more):
    model, examples, alone = expected
    shuffled = order.sample(examples, len(examples))
    assert losses(model, padded(ground.pack(shuffled, row_length), more)) == pytest.approx(alone, rel=1e-4)
