"""Whether a world answers what `env.World` asks, in the right shapes, before stages take hours.

This file knows the questions and no particular world. What answers mean only tests can tell.
"""

import contextlib
import json
from collections.abc import Iterator

import numpy as np

import env

COUNT = 4  # goals of a level that are looked at


def check_world(world: env.World, split: str) -> None:
    """Raise ValueError for the first wrong answer, with class, method and what it has to be.

    split: of the novel goals that will be asked for, validation or test.
    """
    _check_sizes(world)
    goals = _goals(world, "offline", "train")
    actions = np.arange(world.num_actions)
    states, nexts = _check_physics(world, goals, actions)
    obs = world.observe(states)
    taken = _array(world, "expert_actions", (COUNT,), np.integer, world.encode_goals(goals), obs)
    _expect(world, "expert_actions", f"actions below {world.num_actions}", set(taken) <= {*actions})
    _check_words_and_pictures(world, goals, obs)
    for level in env.NOVEL_LEVELS:
        goals += _goals(world, level, split)
    goals.append(env.Goal("Nobody can judge this.", "hard"))
    rows = np.arange(len(goals)) % len(actions)
    _check_judge(world, goals, world.observe(states[rows % COUNT]), world.observe(nexts[rows]))


@contextlib.contextmanager
def _asking(world: env.World, method: str) -> Iterator[None]:
    """Whatever a method raises becomes a ValueError that names it."""
    try:
        yield
    except Exception as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        what += " (--traceback shows where)"
        raise ValueError(f"the world's {type(world).__name__}.{method} raises {what}") from error


def _expect(world, method, expected, is_so, found=None):
    if not is_so:
        got = "" if found is None else f", got {found}"
        raise ValueError(f"the world's {type(world).__name__}.{method} must be {expected}{got}")


def _array(world, method, shape, kind, *arguments):
    """The array that a method answers, if it is finite, of that shape and of that kind of dtype."""
    with _asking(world, method):
        answer = getattr(world, method)(*arguments)
    found = type(answer).__name__
    is_so = False
    if isinstance(answer, np.ndarray):
        found = f"{answer.dtype} {answer.shape}"
        is_so = answer.shape == shape and np.issubdtype(answer.dtype, kind)
        if is_so and not np.isfinite(answer).all():
            found, is_so = "NaN or infinite values", False
    _expect(world, method, f"an array {shape} of {kind.__name__}", is_so, found)
    return answer


def _check_sizes(world):
    for name in ("observation_dim", "num_actions", "state_dim", "max_steps", "objects"):
        size = getattr(world, name, None)
        is_size = isinstance(size, (int, np.integer)) and size >= 1
        _expect(world, name, "a whole number of at least 1", is_size, size)
    for name in ("observation_dim", "num_actions"):
        size = getattr(world, name)
        multiple = f"a multiple of its {world.objects} objects"
        _expect(world, name, multiple, size % world.objects == 0, size)
    for name in ("observation_limit", "observation_scale"):
        _expect(world, name, "above 0", getattr(world, name) > 0, getattr(world, name))
    kinds = getattr(world, "kinds", None)
    is_some = isinstance(kinds, tuple) and len(kinds) > 0
    _expect(world, "kinds", "a tuple of names, of one at least", is_some, kinds)
    are_known = set(world.one_step_kinds) <= set(kinds)
    _expect(world, "one_step_kinds", "some of its kinds", are_known, world.one_step_kinds)


def _goals(world, level, split):
    drawn = []
    for _ in range(2):
        with _asking(world, "sample_goals"):
            drawn.append(world.sample_goals(level, split, COUNT, np.random.default_rng(0)))
    goals, again = drawn
    expected = f"a list of {COUNT} goals of level {level!r} for split {split!r}"
    are_goals = isinstance(goals, list) and len(goals) == COUNT
    are_goals = are_goals and all(getattr(goal, "level", None) == level for goal in goals)
    _expect(world, "sample_goals", expected, are_goals, goals)
    _expect(world, "sample_goals", "the same for the same rng", goals == again)
    for goal in goals:
        is_judged = level != "offline" or goal.kind != env.UNJUDGED
        _expect(world, "sample_goals", "of kinds that it judges", is_judged, goal)
        with _asking(world, "check_goal"):
            record = json.loads(json.dumps(goal.to_json()))
            is_same = env.goal_from_json(record, world) == goal
        _expect(world, "sample_goals", "of relations that are tuples of names", is_same, goal)
    return goals


def _check_physics(world, goals, actions):
    """States (COUNT, state_dim) before any action; after each action (num_actions, state_dim)."""
    size = world.state_dim
    rng = np.random.default_rng(0)
    states = _array(world, "initial_states", (COUNT, size), np.floating, rng, COUNT, goals)
    _array(world, "observe", (world.observation_dim,), np.float32, states[0])
    obs = _array(world, "observe", (COUNT, world.observation_dim), np.float32, states)
    limit = world.observation_limit
    _expect(world, "observe", f"within {limit}", np.abs(obs).max() <= limit, np.abs(obs).max())
    nearest = _array(world, "state_from_observation", (COUNT, size), np.floating, obs)
    is_seen = np.allclose(world.observe(nearest), obs, atol=1e-3)
    _expect(world, "state_from_observation", "states that look like the observations", is_seen)
    starts = states[actions % COUNT]
    before = starts.copy()
    shape = (len(actions), size)
    nexts = _array(world, "step_batch", shape, np.floating, starts, actions)
    is_kept = np.array_equal(starts, before)
    _expect(world, "step_batch", "a function that leaves its arguments as they are", is_kept)
    again = _array(world, "step_batch", shape, np.floating, starts[::-1], actions[::-1])[::-1]
    is_pure = np.array_equal(nexts, again)
    _expect(world, "step_batch", "the same for each row in any order, however often", is_pure)
    return states, nexts


def _check_judge(world, goals, obs, nexts):
    """Judges of transitions, of which the last has a goal of kind UNJUDGED."""
    with _asking(world, "encode_goals"):
        encoded = world.encode_goals(goals)
        is_kept = np.array_equal(world.encode_goals(encoded), encoded)
    _expect(world, "encode_goals", "an array of a row a goal, which stays", is_kept)
    actions = np.arange(len(goals)) % world.num_actions
    shape = (len(goals),)
    _array(world, "one_step", shape, np.bool_, encoded)
    _array(world, "potential", shape, np.number, encoded, obs)
    for imagined in (False, True):
        transitions = (encoded, obs, nexts, actions, imagined)
        met = _array(world, "success", shape, np.bool_, *transitions)
        rewards = _array(world, "reward", shape, np.number, *transitions)
        _expect(world, "success", f"False for kind {env.UNJUDGED!r}", not met[-1])
        is_none = rewards[-1] == 0
        _expect(world, "reward", f"0 for kind {env.UNJUDGED!r}", is_none, rewards[-1])
    with _asking(world, "initial_states"):
        env.unfulfilled_states(world, np.random.default_rng(0), goals)


def _check_words_and_pictures(world, goals, obs):
    goal = goals[0]
    texts = {"canonical_text": (goal,), "goal_in_words": (goal,), "change_in_words": obs[:2]}
    for method, arguments in texts.items():
        with _asking(world, method):
            text = getattr(world, method)(*arguments)
        is_text = isinstance(text, str) and text.strip() != ""
        _expect(world, method, "a text that is not empty", is_text, repr(text))
    with _asking(world, "goal_of_text"):
        read = world.goal_of_text(goal.text)
    _expect(world, "goal_of_text", "an env.Goal", isinstance(read, env.Goal), type(read).__name__)
    for action in (None, 0):
        _array(world, "draw", (64, 64, 3), np.uint8, obs[0], action, 64)
