"""Whether a world answers what `env.World` asks, in the right shapes, before stages take hours.

This file knows the questions and no particular world. What answers mean only tests can tell.
"""

import itertools

import numpy as np

import env

COUNT = 4  # goals of a level that are looked at


def check_world(world: env.World, split: str) -> None:
    """Raise ValueError for the first wrong answer, with class, method and what it has to be.

    split: of the novel goals that will be asked for, validation or test.
    """
    ask = _Questions(world)
    for name in ("observation_dim", "num_actions", "state_dim", "max_steps", "objects"):
        size = getattr(world, name, None)
        is_size = isinstance(size, (int, np.integer)) and size >= 1
        ask.expect(is_size, name, "a whole number of at least 1")
    for name in ("observation_dim", "num_actions"):
        is_multiple = getattr(world, name) % world.objects == 0
        ask.expect(is_multiple, name, f"a multiple of its {world.objects} objects")
    goals = ask.goals("offline", "train")
    are_judged = all(goal.kind != env.UNJUDGED for goal in goals)
    ask.expect(are_judged, "sample_goals", "of kinds that it judges, for level 'offline'")
    states, nexts = _check_physics(ask, goals)
    for method in ("canonical_text", "goal_in_words"):
        text = ask.answer(method, goals[0])
        ask.expect(isinstance(text, str) and text.strip(), method, "a text that is not empty")
    obs = world.observe(states)
    scores = ask.answer("explanation_scores", goals, [goal.text for goal in goals], obs)
    are_rows = all(np.shape(right) == (COUNT,) for right in scores.values())
    ask.expect(are_rows, "explanation_scores", "a dict of arrays with a number a goal")
    ask.answer("plausibility", obs, obs)
    for action in (None, 0):
        ask.array("draw", (64, 64, 3), np.uint8, obs[0], action, 64)
    for level in env.NOVEL_LEVELS:
        goals += ask.goals(level, split)
    if world.word_parts:
        goals += ask.goals(env.WORDS, split)
    for part in world.word_parts:
        for words in ("new", "nonsense", "known"):
            rng = np.random.default_rng(0)
            asked = ask.answer("word_goals", part, words, split, COUNT, rng)
            ask.expect(len(asked) == COUNT, "word_goals", f"a list of {COUNT} goals")
        values = np.zeros((COUNT, world.num_actions))
        right = ask.answer("first_actions_right", part, asked, obs, values)
        ask.expect(np.shape(right) == (COUNT,), "first_actions_right", "a number a goal")
    goals.append(env.Goal("Nobody can judge this.", "hard"))
    rows = np.arange(len(goals)) % world.num_actions
    _check_judge(ask, goals, world.observe(states[rows % COUNT]), world.observe(nexts[rows]))


class _Questions:
    """Asks a world; whatever is wrong is a ValueError that names class and method."""

    def __init__(self, world):
        self.world = world
        self.name = f"the world's {type(world).__name__}"

    def expect(self, is_so, name, expected):
        if not is_so:
            found = getattr(self.world, name, None)
            got = "" if callable(found) else f", got {found!r}"
            raise ValueError(f"{self.name}.{name} must be {expected}{got}")

    def answer(self, method, *arguments):
        """What a method answers."""
        try:
            return getattr(self.world, method)(*arguments)
        except Exception as error:
            words = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"{self.name}.{method} raises {words} (see --traceback)") from error

    def array(self, method, shape, kind, *arguments):
        """What a method answers, a finite array of that shape and that kind of dtype."""
        array = self.answer(method, *arguments)
        found = (type(array).__name__, getattr(array, "dtype", ""), getattr(array, "shape", ""))
        is_so = found[0] == "ndarray" and found[2] == shape and np.issubdtype(found[1], kind)
        expected = f"a finite array {shape} of {kind.__name__}, got {' '.join(map(str, found))}"
        self.expect(is_so and np.isfinite(array).all(), method, expected)
        return array

    def goals(self, level, split):
        """Goals of a level and split that the world itself takes."""
        rngs = [np.random.default_rng(0) for _ in range(2)]
        goals, again = [self.answer("sample_goals", level, split, COUNT, rng) for rng in rngs]
        are_goals = isinstance(goals, list) and len(goals) == COUNT
        are_goals = are_goals and all(getattr(goal, "level", None) == level for goal in goals)
        expected = f"a list of {COUNT} goals of level {level!r} for split {split!r}, got {goals}"
        self.expect(are_goals, "sample_goals", expected)
        self.expect(goals == again, "sample_goals", "the same for the same rng")
        for goal in goals:
            self.answer("check_goal", goal)
            are_tuples = all(isinstance(part, tuple) for part in (goal.relations, *goal.relations))
            names = itertools.chain(*goal.relations)
            are_names = are_tuples and all(name is None or isinstance(name, str) for name in names)
            self.expect(are_names, "sample_goals", f"of relations, tuples of names, got {goal}")
        return goals


def _check_physics(ask, goals):
    """States (COUNT, state_dim) before any action; after each action (num_actions, state_dim)."""
    world = ask.world
    rng = np.random.default_rng(0)
    shape = (COUNT, world.state_dim)
    states = ask.array("initial_states", shape, np.floating, rng, COUNT, goals)
    ask.array("observe", (world.observation_dim,), np.float32, states[0])
    obs = ask.array("observe", (COUNT, world.observation_dim), np.float32, states)
    limit = world.observation_limit
    ask.expect(np.abs(obs).max() <= limit, "observe", f"within {limit}, its observation_limit")
    nearest = ask.array("state_from_observation", shape, np.floating, obs)
    is_seen = np.allclose(world.observe(nearest), obs, atol=1e-3)
    ask.expect(is_seen, "state_from_observation", "states that look like the observations")
    actions = np.arange(world.num_actions)
    starts = states[actions % COUNT]
    before = starts.copy()
    shape = (len(actions), world.state_dim)
    nexts = ask.array("step_batch", shape, np.floating, starts, actions)
    is_kept = np.array_equal(starts, before)
    ask.expect(is_kept, "step_batch", "a function that leaves its arguments as they are")
    again = ask.array("step_batch", shape, np.floating, starts[::-1], actions[::-1])[::-1]
    is_pure = np.array_equal(nexts, again)
    ask.expect(is_pure, "step_batch", "the same for each row in any order, however often")
    encoded = ask.answer("encode_goals", goals)
    taken = ask.array("expert_actions", (COUNT,), np.integer, encoded, obs)
    ask.expect(np.isin(taken, actions).all(), "expert_actions", f"actions below {len(actions)}")
    return states, nexts


def _check_judge(ask, goals, obs, nexts):
    """Judges of transitions, of which the last has a goal of kind UNJUDGED."""
    encoded = ask.answer("encode_goals", goals)
    is_kept = np.array_equal(ask.answer("encode_goals", encoded), encoded)
    ask.expect(is_kept, "encode_goals", "an array with a row a goal, and stay when encoded again")
    actions = np.arange(len(goals)) % ask.world.num_actions
    shape = (len(goals),)
    ask.array("one_step", shape, np.bool_, encoded)
    ask.array("potential", shape, np.number, encoded, obs)
    for imagined in (False, True):
        transitions = (encoded, obs, nexts, actions, imagined)
        met = ask.array("success", shape, np.bool_, *transitions)
        rewards = ask.array("reward", shape, np.number, *transitions)
        ask.expect(not met[-1], "success", f"False for kind {env.UNJUDGED!r}")
        ask.expect(rewards[-1] == 0, "reward", f"0 for kind {env.UNJUDGED!r}")
