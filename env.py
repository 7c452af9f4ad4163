"""Worlds: what KALM asks of an environment, and what can be done in any of them.

A world is one class in one file (worlds/clevr_robot.py is the default): physics as a pure function
of arrays, goals in words with their judge, an expert. Here are the questions that it answers, goals
and rollout records, episodes in lockstep and Gymnasium's interface.
This file knows no particular world and nothing of learning: no torch, no language model.
"""

import importlib
import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import gymnasium
import numpy as np
from numpy import ndarray
from numpy.random import Generator
from PIL import Image, ImageDraw

WORDS = "words"  # ours: in words that no other goal has, and heard only when all is learned
LEVELS = ("offline", "rephrase", "easy", "hard", WORDS)  # paper, section 4.2
NOVEL_LEVELS = LEVELS[1:4]
UNJUDGED = "unknown"  # kind of a goal that no world can judge: never a success, no reward
WORLDS = Path(__file__).resolve().parent / "worlds"
DEFAULT_WORLD = "clevr_robot"

# ----------------------------------------------------------------------------------------------
# Goals


@dataclass(frozen=True)
class Goal:
    """What a rollout should reach: a sentence for the agent, kind and relations for the judge.

    relations: tuples of names whose meaning is the world's; `World.check_goal` knows which.
    """

    text: str
    level: str = "offline"
    kind: str = UNJUDGED
    relations: tuple = ()

    def __post_init__(self):
        if not isinstance(self.text, str) or not self.text.strip():
            raise ValueError(f"a goal's text must be a sentence, got {self.text!r}")
        if re.search("[\0\ud800-\udfff]", self.text):
            raise ValueError(f"a goal's text must be whole Unicode characters, got {self.text!r}")
        if self.level not in LEVELS:
            raise ValueError(f"unknown level {self.level!r}; levels are {', '.join(LEVELS)}")

    def to_json(self) -> dict:
        """The record of a goals file."""
        return {**asdict(self), "relations": [list(relation) for relation in self.relations]}


def goal_from_json(record: dict, world: "World") -> Goal:
    """Goal of a goals-file record. Raises ValueError that says which field is wrong, and how."""
    if not isinstance(record, dict):
        raise ValueError(f"a goal is a JSON object, got {type(record).__name__}")
    if "kind" not in record and "relations" not in record:
        record = {**record, "kind": UNJUDGED, "relations": []}
    for field in ("text", "level", "kind", "relations"):
        if field not in record:
            raise ValueError(f"field {field!r} is missing")
    relations = record["relations"]
    if isinstance(relations, str):  # as infos and recordings have them
        try:
            relations = json.loads(relations)
        except (ValueError, RecursionError):
            raise ValueError("field 'relations' is a text, and not JSON") from None
    if not isinstance(relations, (list, tuple)):
        raise ValueError("field 'relations' must be a list")
    for relation in relations:
        if not isinstance(relation, (list, tuple)):
            raise ValueError(f"a relation is a list of names, got {relation!r}")
    goal = Goal(record["text"], record["level"], record["kind"], tuple(map(tuple, relations)))
    world.check_goal(goal)
    return goal


def read_goals(path: str | Path, world: "World") -> list[Goal]:
    """Goals of a file with one JSON object a line. Raises ValueError that names file and line."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    goals = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut strings at U+2028
        try:
            if line.strip():
                goals.append(goal_from_json(json.loads(line), world))
        except (json.JSONDecodeError, RecursionError) as error:
            problem = f"line {number}: not JSON ({getattr(error, 'msg', 'nested too deep')})"
            raise ValueError(f"{path}, {problem}; write one JSON object a line") from None
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not goals:
        raise ValueError(f"{path}: no goals; write one JSON object a line")
    return goals


def write_goals(path: Path, goals: Sequence[Goal]) -> None:
    """Goals as a file that `read_goals` reads."""
    lines = [json.dumps(goal.to_json(), ensure_ascii=False) for goal in goals]
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")


def by_level(goals: Sequence[Goal]) -> dict[str, list[Goal]]:
    """Goals by their level, levels in their usual order, those without goals left out."""
    levels = {}
    for level in LEVELS:
        levels[level] = [goal for goal in goals if goal.level == level]
    return {level: found for level, found in levels.items() if found}


# ----------------------------------------------------------------------------------------------
# What a world answers


class World:
    """An environment as KALM sees it. Subclass it; what raises NotImplementedError is yours.

    Arrays begin with a batch dimension B. An observation is (observation_dim,) float32; a state,
    (state_dim,) float64, is all that physics needs to go on; an action is an integer below
    num_actions. Where `goals` are asked for, they are B goals or what `encode_goals` made of them.
    """

    name: str  # as `make` takes it
    observation_dim: int
    num_actions: int
    state_dim: int
    max_steps: int = 50  # actions in an episode
    observation_limit: float = np.inf  # the largest number that an observation can have
    observation_scale: float = 1.0  # policies read observations divided by it: about one in size
    kinds: tuple[str, ...]  # of goals that it can judge
    one_step_kinds: tuple[str, ...] = ()  # those that are over after one action, met or not
    # An observation lists so many like objects, each with as many numbers, and an action is
    # object * moves + move: the model then predicts dynamics as seen from the acted object.
    # 1: no such structure, a plain head.
    objects: int = 1
    # Parts of goals with new words: then also `word_goals`, `first_actions_right`, a `lexicon`.
    word_parts: tuple[str, ...] = ()

    # Physics

    def step_batch(self, states: ndarray, actions: ndarray) -> ndarray:
        """States (B, state_dim) after one action each: pure, whatever the batch and its order."""
        raise NotImplementedError

    def observe(self, states: ndarray) -> ndarray:
        """What is seen of states: (..., state_dim) -> (..., observation_dim) float32."""
        raise NotImplementedError

    def state_from_observation(self, obs: ndarray) -> ndarray:
        """The nearest states that can be, for observations that may be imagined."""
        raise NotImplementedError

    def initial_states(self, rng: Generator, n: int, goals=None) -> ndarray:
        """n starts of episodes, (n, state_dim), where given suitable for n goals."""
        raise NotImplementedError

    # Goals

    def sample_goals(self, level: str, split: str, n: int, rng: Generator) -> list[Goal]:
        """n built-in goals. split: "train" for level offline, else "validation" or "test"."""
        raise NotImplementedError

    def goal_of_text(self, text: str) -> Goal:
        """The goal that a typed sentence states; kind unknown where that is not plain."""
        return Goal(text, "hard")

    def recorded_goal(self, text: str, code: ndarray | None = None) -> Goal:
        """The goal of a recording that has its sentence, perhaps numbers. Raises ValueError."""
        goal = self.goal_of_text(text)
        if goal.kind == UNJUDGED:
            raise ValueError(
                f"instructions: cannot tell the goal from {text[:80]!r}, so the rollout cannot be "
                "judged; add the fields 'kind' and 'relations' (data/README.md)"
            )
        return Goal(text, "offline", goal.kind, goal.relations)

    def check_goal(self, goal: Goal) -> None:
        """Raise ValueError, saying what is allowed, for kinds or relations of other worlds."""
        if goal.kind not in (*self.kinds, UNJUDGED):
            kinds = ", ".join((*self.kinds, UNJUDGED))
            raise ValueError(f"unknown kind {goal.kind!r}; kinds are {kinds}")
        if goal.kind == UNJUDGED and goal.relations:
            count = len(goal.relations)
            raise ValueError(f"a goal of kind {UNJUDGED!r} takes 0 relations, got {count}")

    def encode_goals(self, goals: Sequence[Goal] | ndarray) -> ndarray:
        """Goals as an array with a row each, as the judge reads them fastest; arrays stay."""
        if isinstance(goals, ndarray):
            return goals
        encoded = np.empty(len(goals), object)
        encoded[:] = goals
        return encoded

    def one_step(self, goals) -> ndarray:
        """Which goals are over after one action: (B,) bool."""
        return np.array([goal.kind in self.one_step_kinds for goal in goals], bool)

    # Language: what a grounded model is taught to say, and how it is read

    def vocabulary(self) -> list[str]:
        """Texts that hold the words of training goals and explanations, for the tiny LLM."""
        goals = self.sample_goals("offline", "train", 200, np.random.default_rng(0))
        return [goal.text for goal in goals] + [self.canonical_text(goal) for goal in goals]

    def canonical_text(self, goal: Goal) -> str:
        """The plain sentence that explains a rollout of an offline goal."""
        return goal.text

    def explanation_scores(self, goals, explanations, final_obs: ndarray) -> dict[str, ndarray]:
        """What explanations of rollouts get right: {part: (B,) bool}."""
        right = [said == self.canonical_text(goal) for said, goal in zip(explanations, goals)]
        return {"exact": np.array(right, bool)}

    def explanation_fits(self, goal_text: str, explanation: str) -> bool:
        """Whether an explanation may be one of this goal, by its words alone: no judge."""
        goal = self.goal_of_text(goal_text)
        return explanation == (goal_text if goal.kind == UNJUDGED else self.canonical_text(goal))

    def claims(self, goal_text: str) -> list[tuple[str, str]]:
        """Sentences (beginning, end) that may explain this goal's rollouts, by its words alone."""
        return []

    def describe(self, obs: ndarray, count: int, rng: Generator) -> list[tuple[int, str, str]]:
        """At most count true sentences about states (N, D): (row, beginning, end)."""
        return []

    # Judging

    def success(self, goals, obs, next_obs, actions, imagined: bool = False) -> ndarray:
        """Which transitions fulfil goals, (B,). imagined: nobody saw to it that they can be."""
        raise NotImplementedError

    def potential(self, goals, obs: ndarray) -> ndarray:
        """How far observations are from goals, (B,); the reward pays for reducing it."""
        return np.zeros(len(obs))

    def reward(self, goals, obs, next_obs, actions, imagined: bool = False) -> ndarray:
        """+100 where a transition succeeds, else ten times the reduction of the potential."""
        shaped = 10 * (self.potential(goals, obs) - self.potential(goals, next_obs))
        return np.where(self.success(goals, obs, next_obs, actions, imagined), 100.0, shaped)

    def fulfilled(self, goals, obs: ndarray) -> ndarray:
        """Which goals are met before any action, as one-step goals never are: (B,) bool."""
        no_actions = np.zeros(len(obs), int)
        return ~self.one_step(goals) & self.success(goals, obs, obs, no_actions)

    def plausibility(self, obs: ndarray, next_obs: ndarray) -> dict[str, float]:
        """Rates of what cannot be among imagined transitions (paper, section 5.3)."""
        return {}

    def expert_actions(self, goals, obs: ndarray) -> ndarray:
        """Actions toward offline goals, (B,), of which enough succeed to learn from."""
        raise NotImplementedError

    # Symmetries, words and pictures

    def rename(self, records: list[dict], rng: Generator) -> list[dict]:
        """The same rollouts under one exact symmetry of the world, drawn by rng."""
        return records

    def goal_in_words(self, goal: Goal) -> str:
        """What the judge asks for."""
        relations = [" ".join(map(str, relation)) for relation in goal.relations]
        return " and ".join(relations) or goal.kind

    def change_in_words(self, before: ndarray, after: ndarray) -> str:
        """What became different between two observations."""
        changed = ", ".join(map(str, np.flatnonzero(~np.isclose(before, after))))
        return f"numbers {changed} of the observation" if changed else "nothing"

    def draw(self, obs: ndarray, action: int | None = None, size: int = 256) -> ndarray:
        """A picture (size, size, 3) uint8 of an observation and the action about to be taken."""
        lines = [f"{number:.2f}" for number in obs]
        lines.append("" if action is None else f"action {action}")
        image = Image.new("RGB", (size, size), "white")
        ImageDraw.Draw(image).multiline_text((8, 24), "\n".join(lines), fill="black")
        return np.asarray(image)


def make(name: str = DEFAULT_WORLD) -> World:
    """The world of a name in worlds/, or of path/to/file.py:Class. Raises ValueError if none."""
    path, _, class_name = name.rpartition(":")
    if path.endswith(".py"):
        if not Path(path).is_file():
            raise ValueError(f"--env {name}: there is no file {path}")
        spec = importlib.util.spec_from_file_location(f"world_{Path(path).stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found = getattr(module, class_name, None)
    elif name.isidentifier() and (WORLDS / f"{name}.py").is_file():
        found = importlib.import_module(f"worlds.{name}").WORLD
    else:
        known = ", ".join(sorted(path.stem for path in WORLDS.glob("[a-z]*.py")))
        raise ValueError(f"--env {name}: there is {known}, or give path/to/file.py:Class")
    if not (isinstance(found, type) and issubclass(found, World)):
        raise ValueError(f"--env {name}: {class_name} is not a class made from env.World")
    world = found()
    world.name = name
    return world


# ----------------------------------------------------------------------------------------------
# Episodes


def unfulfilled_states(world: World, rng: Generator, goals) -> ndarray:
    """A start for each goal that does not fulfil it yet: (len(goals), state_dim)."""
    encoded = world.encode_goals(goals)
    states = world.initial_states(rng, len(encoded), encoded)
    for _ in range(1000):
        fulfilled = world.fulfilled(encoded, world.observe(states))
        if not fulfilled.any():
            return states
        again = encoded[fulfilled]
        states[fulfilled] = world.initial_states(rng, len(again), again)
    raise ValueError(f"{world.name}: {len(again)} goals are met by every start that was drawn")


def unfulfilled_observations(world: World, rng: Generator, goals, observations: ndarray) -> ndarray:
    """One of observations (N, D) for each goal, not fulfilling it. Gives up after 100 draws."""
    encoded = world.encode_goals(goals)
    chosen = observations[rng.integers(len(observations), size=len(encoded))]
    for _ in range(100):
        fulfilled = world.fulfilled(encoded, chosen)
        if not fulfilled.any():
            break
        chosen[fulfilled] = observations[rng.integers(len(observations), size=fulfilled.sum())]
    return chosen


Policy = Callable[[ndarray, ndarray], ndarray]  # (observations (b, D), episodes (b,)) -> actions


def run_episodes(
    world: World,
    policy: Policy,
    goals: Sequence[Goal],
    states: ndarray,
    max_steps: int | None = None,
) -> list[dict]:
    """Act in the world, all episodes in lockstep, each until its success or max_steps.

    policy(obs, rows): actions for observations (b, D) of the episodes `rows` (b,), those that still
    run. states: (B, state_dim) starts. One-step goals last one action. Returns B rollout records.
    """
    encoded = world.encode_goals(goals)
    one_step = world.one_step(encoded)
    current = np.array(states, np.float64)
    paths = [[state.copy()] for state in current]
    actions = [[] for _ in paths]
    running = np.arange(len(paths))
    steps = range(world.max_steps if max_steps is None else max_steps)
    for _ in steps:
        if len(running) == 0:
            break
        before = world.observe(current[running])
        action = np.asarray(policy(before, running))
        current[running] = world.step_batch(current[running], action)
        after = world.observe(current[running])
        met = world.success(encoded[running], before, after, action)
        for row, taken in zip(running, action):
            paths[row].append(current[row].copy())
            actions[row].append(taken)
        running = running[~met & ~one_step[running]]
    episodes = []
    for path, taken in zip(map(np.array, paths), actions):
        episodes.append((world.observe(path), np.array(taken, np.int64), path))
    return rollout_records(world, goals, episodes)


def expert_rollouts(
    world: World, goals: Sequence[Goal], states: ndarray, max_steps: int
) -> list[dict]:
    """An episode of the world's expert for each goal and start (B, state_dim)."""
    encoded = world.encode_goals(goals)
    expert = lambda obs, rows: world.expert_actions(encoded[rows], obs)
    return run_episodes(world, expert, goals, states, max_steps)


def rollout_records(
    world: World, goals: Sequence[Goal], episodes: Sequence[tuple], imagined: bool = False
) -> list[dict]:
    """Rows of a rollouts dataset: rewards and success are judged here, real or imagined.

    episodes: of each goal (T+1, observation_dim) observations, (T,) actions and, where they are
    known, (T+1, state_dim) states, else None.
    """
    if not episodes:
        return []
    before = [seen[:-1] for seen, _, _ in episodes]
    after = [seen[1:] for seen, _, _ in episodes]
    actions = [taken for _, taken, _ in episodes]
    lengths = [len(taken) for taken in actions]
    encoded = np.repeat(world.encode_goals(goals), lengths, 0)
    transitions = (encoded, *map(np.concatenate, (before, after, actions)), imagined)
    ends = np.cumsum(lengths)[:-1]
    met = np.split(world.success(*transitions), ends)
    rewards = np.split(world.reward(*transitions).astype(np.float32), ends)
    records = []
    for row, (goal, (seen, taken, states)) in enumerate(zip(goals, episodes)):
        record = goal.to_json()
        record["goal"] = record.pop("text")
        record["observations"] = np.asarray(seen, np.float32)
        record["actions"] = np.asarray(taken, np.int64)
        record["rewards"] = rewards[row]
        record["success"] = bool(met[row][-1:].any())
        record["states"] = None if states is None else np.asarray(states, np.float64)
        records.append(record)
    return records


def goal_of(record: dict) -> Goal:
    """The goal of a rollout record or dataset row."""
    relations = tuple(map(tuple, record["relations"]))
    return Goal(record["goal"], record["level"], record["kind"], relations)


class WorldEnv(gymnasium.Env):
    """Any world with Gymnasium's interface; info has goal, level, kind, relations (JSON), state and
    success at every step.

    world: a World, or its name as `make` takes it. reset options: "goal", a Goal or a text that
    states one, or with level, kind and relations as an info has them (default: a random training
    goal); "state", a (state_dim,) state.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(self, world: World | str = DEFAULT_WORLD, render_mode=None, max_steps=None):
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode is None or 'rgb_array', got {render_mode!r}")
        self.world = make(world) if isinstance(world, str) else world
        self.render_mode = render_mode
        self.max_steps = max_steps or self.world.max_steps
        limit = self.world.observation_limit
        shape = (self.world.observation_dim,)
        self.observation_space = gymnasium.spaces.Box(-limit, limit, shape, np.float32)
        self.action_space = gymnasium.spaces.Discrete(self.world.num_actions)

    def reset(self, *, seed=None, options=None) -> tuple[ndarray, dict]:
        """Begin an episode."""
        super().reset(seed=seed)
        options = options or {}
        goal = options.get("goal")
        if goal is None:
            goal = self.world.sample_goals("offline", "train", 1, self.np_random)[0]
        elif isinstance(goal, str) and "kind" in options:
            goal = goal_from_json({**options, "text": goal}, self.world)
        elif isinstance(goal, str):
            goal = self.world.goal_of_text(goal)
        elif not isinstance(goal, Goal):
            raise ValueError(f"options['goal'] is a text or an env.Goal, got {type(goal).__name__}")
        self.world.check_goal(goal)
        self.goal = goal
        if "state" in options:
            self.state = np.array(options["state"], np.float64)
        else:
            self.state = unfulfilled_states(self.world, self.np_random, [self.goal])[0]
        size, shape = self.world.state_dim, self.state.shape
        if shape != (size,) or not np.isfinite(self.state).all():
            raise ValueError(f"options['state'] must be ({size},) finite numbers, got {shape}")
        self.steps = 0
        return self.world.observe(self.state), self._info(success=False)

    def step(self, action) -> tuple[ndarray, float, bool, bool, dict]:
        """Gymnasium's five: observation, reward, terminated, truncated, info."""
        if not self.action_space.contains(action):
            raise ValueError(f"{action!r} is none of {self.world.num_actions} actions")
        before = self.world.observe(self.state)[None]
        actions = np.array([action])
        self.state = self.world.step_batch(self.state[None], actions)[0]
        self.steps += 1
        after = self.world.observe(self.state)[None]
        transition = (self.world.encode_goals([self.goal]), before, after, actions)
        success = bool(self.world.success(*transition)[0])
        reward = float(self.world.reward(*transition)[0])
        is_over = self.steps >= self.max_steps or self.world.one_step([self.goal])[0]
        truncated = bool(not success and is_over)
        return after[0], reward, success, truncated, self._info(success)

    def _info(self, success):
        goal = self.goal.to_json()
        goal["relations"] = json.dumps(goal["relations"])
        return {"goal": goal.pop("text"), **goal, "state": self.state.copy(), "success": success}

    def render(self) -> ndarray | None:
        """The scene as a picture, if that was asked for."""
        return self.world.draw(self.world.observe(self.state)) if self.render_mode else None


gymnasium.register("KALM/World-v0", "env:WorldEnv")  # any, by its keyword world
gymnasium.register("KALM/ClevrRobot-v0", "env:WorldEnv", kwargs={"world": "clevr_robot"})
