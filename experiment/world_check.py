"""Whether a world answers what `env.World` asks, in the right shapes, before stages take hours.

This file knows the questions and no particular world. What answers mean only tests can tell.
"""

import itertools
import numbers

import numpy as np

import env

COUNT = 4  # goals of a level that are looked at


def check_world(world: env.World, split: str) -> None:
    """Raise ValueError for the first wrong answer, with class, method and what it has to be.

    split: of the novel goals that will be asked for, validation or test.
    """
    _check_sizes(world)
    goals = _goals(world, "offline", "train")
    kinds = [goal.kind for goal in goals]
    if env.UNJUDGED in kinds:
        _refuse(world, "sample_goals", "of kinds that it judges, for level 'offline'")
    states, nexts = _check_physics(world, goals)
    obs = world.observe(states)
    _check_words(world, goals, obs)
    shape = (64, 64, 3)
    for action in (None, 0):
        _array(world, "draw", shape, np.uint8, obs[0], action, 64)
    for level in env.NOVEL_LEVELS:
        goals += _goals(world, level, split)
    if world.word_parts:
        goals += _goals(world, env.WORDS, split)
        _check_new_words(world, obs, split)
    goals.append(env.Goal("Nobody can judge this.", "hard"))
    actions = np.arange(len(goals)) % world.num_actions
    before = world.observe(states[actions % COUNT])
    after = world.observe(nexts[actions])
    _check_judge(world, goals, before, after, actions)


def _refuse(world, name, expected):
    """Say of an attribute or method what it must be."""
    found = getattr(world, name, None)
    if not callable(found):
        expected += f", got {found!r}"
    raise ValueError(f"the world's {type(world).__name__}.{name} must be {expected}")


def _answer(world, method, *arguments):
    """What a method answers; whatever it raises is a ValueError."""
    try:
        return getattr(world, method)(*arguments)
    except Exception as error:
        where = f"the world's {type(world).__name__}.{method}"
        words = " ".join(str(error).split())
        kind = type(error).__name__
        raise ValueError(f"{where} raises {kind}: {words} (see --traceback)") from error


def _array(world, method, shape, kind, *arguments):
    """What a method answers, a finite array of that shape and that kind of dtype."""
    array = _answer(world, method, *arguments)
    dtype = getattr(array, "dtype", None)
    is_array = isinstance(array, np.ndarray) and np.issubdtype(dtype, kind)
    is_right = is_array and array.shape == shape and np.isfinite(array).all()
    if not is_right:
        found = f"{type(array).__name__} {dtype} {np.shape(array)}"
        wanted = f"a finite array {shape} of {kind.__name__}"
        _refuse(world, method, f"{wanted}, got {found}")
    return array


def _goals(world, level, split):
    """Goals of a level and split that the world itself takes, the same at each call."""
    rng = np.random.default_rng(0)
    goals = _answer(world, "sample_goals", level, split, COUNT, rng)
    expected = f"a list of {COUNT} goals of level {level!r} for split {split!r}, got {goals}"
    if not isinstance(goals, list) or len(goals) != COUNT:
        _refuse(world, "sample_goals", expected)
    for goal in goals:
        if getattr(goal, "level", None) != level:
            _refuse(world, "sample_goals", expected)
        _answer(world, "check_goal", goal)
        tuples = tuple(map(tuple, goal.relations))
        names = itertools.chain(*tuples)
        are_names = all(isinstance(name, str | None) for name in names)
        if goal.relations != tuples or not are_names:
            _refuse(world, "sample_goals", f"of relations, tuples of names, got {goal}")
    rng = np.random.default_rng(0)
    again = _answer(world, "sample_goals", level, split, COUNT, rng)
    if goals != again:
        _refuse(world, "sample_goals", "the same for the same rng")
    return goals


def _check_sizes(world):
    for name in ("observation_dim", "num_actions", "state_dim", "max_steps", "objects"):
        size = getattr(world, name, None)
        is_whole = isinstance(size, numbers.Integral)
        if not is_whole or size < 1:
            _refuse(world, name, "a whole number of at least 1")
    for name in ("observation_dim", "num_actions"):
        if getattr(world, name) % world.objects:
            _refuse(world, name, f"a multiple of its {world.objects} objects")


def _check_words(world, goals, obs):
    """What is said of goals, and of explanations after final observations (COUNT, D)."""
    for method in ("canonical_text", "goal_in_words"):
        text = _answer(world, method, goals[0])
        if not isinstance(text, str) or not text.strip():
            _refuse(world, method, "a text that is not empty")
    texts = [goal.text for goal in goals]
    scores = _answer(world, "explanation_scores", goals, texts, obs)
    for right in scores.values():
        if np.shape(right) != (COUNT,):
            _refuse(world, "explanation_scores", "a dict of arrays with a number a goal")
    _answer(world, "plausibility", obs, obs)


def _check_new_words(world, obs, split):
    """Goals in words that training lacks, and first actions toward them at obs (COUNT, D)."""
    for part in world.word_parts:
        for words in ("new", "nonsense", "known"):
            rng = np.random.default_rng(0)
            goals = _answer(world, "word_goals", part, words, split, COUNT, rng)
            if len(goals) != COUNT:
                _refuse(world, "word_goals", f"a list of {COUNT} goals")
        values = np.zeros((COUNT, world.num_actions))
        right = _answer(world, "first_actions_right", part, goals, obs, values)
        if np.shape(right) != (COUNT,):
            _refuse(world, "first_actions_right", "a number a goal")


def _check_physics(world, goals):
    """States (COUNT, state_dim) before any action; after each action (num_actions, state_dim)."""
    rng = np.random.default_rng(0)
    shape = (COUNT, world.state_dim)
    states = _array(world, "initial_states", shape, np.floating, rng, COUNT, goals)
    width = world.observation_dim
    _array(world, "observe", (width,), np.float32, states[0])
    obs = _array(world, "observe", (COUNT, width), np.float32, states)
    limit = world.observation_limit
    reach = np.abs(obs).max()
    if reach > limit:
        _refuse(world, "observe", f"within {limit}, its observation_limit")
    nearest = _array(world, "state_from_observation", shape, np.floating, obs)
    seen = world.observe(nearest)
    if not np.allclose(seen, obs, atol=1e-3):
        _refuse(world, "state_from_observation", "states that look like the observations")
    actions = np.arange(world.num_actions)
    starts = states[actions % COUNT]
    before = starts.copy()
    shape = (len(actions), world.state_dim)
    nexts = _array(world, "step_batch", shape, np.floating, starts, actions)
    if not np.array_equal(starts, before):
        _refuse(world, "step_batch", "a function that leaves its arguments as they are")
    backwards = (starts[::-1], actions[::-1])
    again = _array(world, "step_batch", shape, np.floating, *backwards)
    if not np.array_equal(nexts, again[::-1]):
        _refuse(world, "step_batch", "the same for each row in any order, however often")
    encoded = _answer(world, "encode_goals", goals)
    taken = _array(world, "expert_actions", (COUNT,), np.integer, encoded, obs)
    if not np.isin(taken, actions).all():
        _refuse(world, "expert_actions", f"actions below {len(actions)}")
    return states, nexts


def _check_judge(world, goals, obs, nexts, actions):
    """Judges of transitions, of which the last has a goal of kind UNJUDGED."""
    encoded = _answer(world, "encode_goals", goals)
    again = _answer(world, "encode_goals", encoded)
    if not np.array_equal(again, encoded):
        _refuse(world, "encode_goals", "an array, a row a goal, that stays when encoded again")
    shape = (len(goals),)
    _array(world, "one_step", shape, np.bool_, encoded)
    _array(world, "potential", shape, np.number, encoded, obs)
    for imagined in (False, True):
        transitions = (encoded, obs, nexts, actions, imagined)
        met = _array(world, "success", shape, np.bool_, *transitions)
        rewards = _array(world, "reward", shape, np.number, *transitions)
        if met[-1]:
            _refuse(world, "success", f"False for kind {env.UNJUDGED!r}")
        if rewards[-1] != 0:
            _refuse(world, "reward", f"0 for kind {env.UNJUDGED!r}")
