"""Worlds: what the rest of KALM asks of an environment, and what can be done in any of them.

A world is one class in one file (worlds/clevr_robot.py is the default): physics as a pure function
of arrays, goals in words with their judge, an expert. Here are the questions that a world answers,
goals and rollout records, episodes in lockstep, Gymnasium's interface and animated pictures.
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
from PIL import Image, ImageDraw
from tqdm import tqdm

LEVELS = ("offline", "rephrase", "easy", "hard")  # paper, section 4.2
NOVEL_LEVELS = LEVELS[1:]
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
    if not isinstance(relations, (list, tuple)):
        raise ValueError("field 'relations' must be a list")
    for relation in relations:
        if not isinstance(relation, (list, tuple)):
            raise ValueError(f"a relation is a list of names, got {relation!r}")
    relations = tuple(tuple(relation) for relation in relations)
    goal = Goal(record["text"], record["level"], record["kind"], relations)
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
        if not line.strip():
            continue
        try:
            goals.append(goal_from_json(json.loads(line), world))
        except (json.JSONDecodeError, RecursionError) as error:
            problem = getattr(error, "msg", "nested too deep")
            raise ValueError(
                f"{path}, line {number}: not JSON ({problem}); write one JSON object a line"
            ) from None
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not goals:
        raise ValueError(f"{path}: no goals; write one JSON object a line")
    return goals


def write_goals(path: Path, goals: Sequence[Goal]) -> None:
    """Goals as a file that `read_goals` reads."""
    lines = [json.dumps(goal.to_json(), ensure_ascii=False) + "\n" for goal in goals]
    path.write_text("".join(lines), encoding="utf-8")


def by_level(goals: Sequence[Goal]) -> dict[str, list[Goal]]:
    """Goals by their level, levels in their usual order, those without goals left out."""
    found = {}
    for level in LEVELS:
        of_level = [goal for goal in goals if goal.level == level]
        if of_level:
            found[level] = of_level
    return found


# ----------------------------------------------------------------------------------------------
# What a world answers


class World:
    """An environment as the stages of KALM see it. Subclass it; what raises NotImplementedError is
    yours to write.

    Arrays have a batch dimension B first. An observation is (observation_dim,) float32, a state
    (state_dim,) float64
    is all that physics needs to go on, an action is an integer below num_actions. Where `goals` are
    asked for, they
    are B goals, or what `encode_goals` made of them.
    """

    name: str
    observation_dim: int
    num_actions: int
    state_dim: int
    max_steps: int = 50  # actions in an episode
    observation_limit: float = np.inf  # the largest number that an observation can have
    observation_scale: float = 1.0  # policies read observations divided by it: about one in size
    kinds: tuple[str, ...]  # kinds of goals that it can judge
    one_step_kinds: tuple[str, ...] = ()  # those that are over after one action, met or not
    # An observation lists so many like objects, each with as many numbers, and an action is object
    # * moves + move. The model then predicts dynamics as seen from the acted object. 1: no such
    # structure, a plain head.
    objects: int = 1

    # Physics

    def step_batch(self, states: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """States (B, state_dim) after one action each: a pure function, whatever the batch and its
        order.
        """
        raise NotImplementedError

    def observe(self, states: np.ndarray) -> np.ndarray:
        """What is seen of states: (..., state_dim) -> (..., observation_dim) float32."""
        raise NotImplementedError

    def state_from_observation(self, obs: np.ndarray) -> np.ndarray:
        """The nearest state that can be, for observations that may be imagined: (...,
        state_dim).
        """
        raise NotImplementedError

    def initial_states(self, rng: np.random.Generator, n: int, goals=None) -> np.ndarray:
        """n starts of episodes, (n, state_dim), where given suitable for n goals."""
        raise NotImplementedError

    # Goals

    def sample_goals(self, level: str, split: str, n: int, rng: np.random.Generator) -> list[Goal]:
        """n built-in goals. split: "train" for level offline, else "validation" or "test"."""
        raise NotImplementedError

    def goal_of_text(self, text: str) -> Goal:
        """The goal that a typed sentence states; kind unknown where that is not plain."""
        return Goal(text, "hard")

    def recorded_goal(self, text: str, code: np.ndarray | None = None) -> Goal:
        """The goal of a recording that has its sentence alone, or also numbers for it. Raises
        ValueError.
        """
        goal = self.goal_of_text(text)
        if goal.kind == UNJUDGED:
            raise ValueError(
                f"instructions: cannot tell the goal from {text[:80]!r}, so the rollout cannot be judged; add the "
                "fields 'kind' and 'relations' (data/README.md)"
            )
        return Goal(text, "offline", goal.kind, goal.relations)

    def check_goal(self, goal: Goal) -> None:
        """Raise ValueError, saying what is allowed, where kind or relations are none of this
        world's.
        """
        if goal.kind not in (*self.kinds, UNJUDGED):
            kinds = ", ".join((*self.kinds, UNJUDGED))
            raise ValueError(f"unknown kind {goal.kind!r}; kinds are {kinds}")
        if goal.kind == UNJUDGED and goal.relations:
            raise ValueError(
                f"a goal of kind {UNJUDGED!r} takes 0 relations, got {len(goal.relations)}"
            )

    def encode_goals(self, goals: Sequence[Goal] | np.ndarray) -> np.ndarray:
        """Goals as an array whose rows can be chosen, in the form in which the judge reads them
        fastest.
        """
        if isinstance(goals, np.ndarray):
            return goals
        encoded = np.empty(len(goals), object)
        encoded[:] = goals
        return encoded

    def one_step(self, goals) -> np.ndarray:
        """Which goals are over after one action: (B,) bool."""
        return np.array([goal.kind in self.one_step_kinds for goal in goals], bool)

    # Language: what a grounded model is taught to say, and how it is read

    def canonical_text(self, goal: Goal) -> str:
        """The plain sentence that explains a rollout of an offline goal."""
        return goal.text

    def vocabulary(self) -> list[str]:
        """Texts that hold the words of training goals and explanations, for the tiny LLM."""
        goals = self.sample_goals("offline", "train", 200, np.random.default_rng(0))
        return [text for goal in goals for text in (goal.text, self.canonical_text(goal))]

    def explanation_scores(
        self, goals: Sequence[Goal], explanations: Sequence[str], final_obs: np.ndarray
    ) -> dict[str, np.ndarray]:
        """What explanations of rollouts get right: {part: (B,) bool}. final_obs: (B,
        observation_dim).
        """
        right = [said == self.canonical_text(goal) for said, goal in zip(explanations, goals)]
        return {"exact": np.array(right, bool)}

    def explanation_fits(self, goal_text: str, explanation: str) -> bool:
        """Whether an explanation may be one of this goal, by its words alone: no judge is asked."""
        return True

    def describe(
        self, obs: np.ndarray, count: int, rng: np.random.Generator
    ) -> list[tuple[int, str, str]]:
        """At most count true sentences about states (N, observation_dim): (row, how it begins, how
        it goes on).
        """
        return []

    # Judging

    def success(self, goals, obs, next_obs, actions, imagined: bool = False) -> np.ndarray:
        """Whether transitions fulfil goals: (B,) bool. imagined: nobody saw to it that next_obs is
        physical.
        """
        raise NotImplementedError

    def potential(self, goals, obs: np.ndarray) -> np.ndarray:
        """How far observations are from goals, (B,); the reward pays for reducing it."""
        return np.zeros(len(obs))

    def reward(self, goals, obs, next_obs, actions, imagined: bool = False) -> np.ndarray:
        """+100 where a transition succeeds, else ten times the reduction of the potential: (B,)."""
        shaped = 10 * (self.potential(goals, obs) - self.potential(goals, next_obs))
        return np.where(self.success(goals, obs, next_obs, actions, imagined), 100.0, shaped)

    def fulfilled(self, goals, obs: np.ndarray) -> np.ndarray:
        """Which goals are met before any action, as one-step goals never are: (B,) bool."""
        no_actions = np.zeros(len(obs), int)
        return ~self.one_step(goals) & self.success(goals, obs, obs, no_actions)

    def plausibility(self, obs: np.ndarray, next_obs: np.ndarray) -> dict[str, float]:
        """Rates of what cannot be among imagined transitions (paper, section 5.3)."""
        return {}

    def expert_actions(self, goals, obs: np.ndarray) -> np.ndarray:
        """Actions toward offline goals, (B,), of which enough succeed to learn from."""
        raise NotImplementedError

    # Symmetries, words and pictures

    def rename(self, records: list[dict], rng: np.random.Generator) -> list[dict]:
        """The same rollouts under one exact symmetry of the world, drawn by rng."""
        return records

    def goal_in_words(self, goal: Goal) -> str:
        """What the judge asks for."""
        return (
            " and ".join(" ".join(map(str, relation)) for relation in goal.relations) or goal.kind
        )

    def change_in_words(self, before: np.ndarray, after: np.ndarray) -> str:
        """What became different between two observations."""
        changed = np.flatnonzero(~np.isclose(before, after)).tolist()
        return (
            f"numbers {', '.join(map(str, changed))} of the observation" if changed else "nothing"
        )

    def draw(self, obs: np.ndarray, action: int | None = None, size: int = 256) -> np.ndarray:
        """A picture (size, size, 3) uint8 of an observation, and of the action about to be
        taken.
        """
        image = Image.new("RGB", (size, size), "white")
        lines = [f"{number:.2f}" for number in obs]
        if action is not None:
            lines.append(f"action {action}")
        ImageDraw.Draw(image).multiline_text((8, 24), "\n".join(lines), fill="black")
        return np.asarray(image)


def make(name: str = DEFAULT_WORLD) -> World:
    """The world of a name in worlds/, or of path/to/file.py:Class. Raises ValueError if there is
    none.
    """
    path, _, class_name = name.rpartition(":") if ".py:" in name else (name, "", "")
    if class_name:
        found = getattr(_module_of_file(path), class_name, None)
    elif name.isidentifier() and (WORLDS / f"{name}.py").is_file():
        found = importlib.import_module(f"worlds.{name}").WORLD
    else:
        known = ", ".join(sorted(path.stem for path in WORLDS.glob("[a-z]*.py")))
        raise ValueError(
            f"--env {name}: no such world; worlds are {known}, or path/to/file.py:Class"
        )
    if not (isinstance(found, type) and issubclass(found, World)):
        raise ValueError(f"--env {name}: {class_name} is not a class made from env.World")
    world = found()
    world.name = name
    return world


def _module_of_file(path: str):
    """The module of a Python file anywhere. The file's name is no name for imports, so it takes
    none from others.
    """
    if not Path(path).is_file():
        raise ValueError(f"--env {path}: no such file")
    spec = importlib.util.spec_from_file_location(f"world_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ----------------------------------------------------------------------------------------------
# Episodes


def unfulfilled_states(world: World, rng: np.random.Generator, goals) -> np.ndarray:
    """A start for each goal that does not fulfil it yet: (len(goals), state_dim)."""
    encoded = world.encode_goals(goals)
    states = world.initial_states(rng, len(encoded), encoded)
    while True:
        fulfilled = world.fulfilled(encoded, world.observe(states))
        if not fulfilled.any():
            return states
        again = encoded[fulfilled]
        states[fulfilled] = world.initial_states(rng, len(again), again)


def unfulfilled_observations(
    world: World, rng: np.random.Generator, goals, observations: np.ndarray
) -> np.ndarray:
    """One of observations (N, D) for each goal that does not fulfil it yet: (len(goals), D). Gives
    up after 100 draws.
    """
    encoded = world.encode_goals(goals)
    chosen = observations[rng.integers(len(observations), size=len(encoded))]
    for _ in range(100):
        fulfilled = world.fulfilled(encoded, chosen)
        if not fulfilled.any():
            break
        chosen[fulfilled] = observations[rng.integers(len(observations), size=fulfilled.sum())]
    return chosen


Policy = Callable[
    [np.ndarray, np.ndarray], np.ndarray
]  # (observations (b, D), episodes (b,)) -> actions (b,)


def run_episodes(
    world: World,
    policy: Policy,
    goals: Sequence[Goal],
    states: np.ndarray,
    max_steps: int | None = None,
    description: str | None = None,
) -> list[dict]:
    """Act in the world, all episodes in lockstep, each until its success or max_steps.

    policy(obs, rows): actions for observations (b, observation_dim) of the episodes `rows` (b,),
    those that still run.
    states: (B, state_dim) starts. One-step goals last one action. description: of a progress bar.
    Returns B rollout records (see `rollout_record`).
    """
    encoded = world.encode_goals(goals)
    one_step = world.one_step(encoded)
    current = np.array(states, np.float64)
    paths = [[state.copy()] for state in current]
    actions = [[] for _ in paths]
    running = np.arange(len(paths))
    steps = range(world.max_steps if max_steps is None else max_steps)
    for _ in tqdm(steps, desc=description, disable=description is None, leave=False):
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
    records = []
    for goal, path, taken in zip(goals, paths, actions):
        path = np.array(path)
        taken = np.array(taken, np.int64)
        records.append(rollout_record(world, goal, world.observe(path), taken, states=path))
    return records


def replay(plans: Sequence[Sequence[int]]) -> Policy:
    """A policy that plays fixed action sequences; past its end a plan repeats its last action."""
    played = np.zeros(len(plans), int)

    def policy(obs, rows):
        actions = [plans[row][min(played[row], len(plans[row]) - 1)] for row in rows]
        played[rows] += 1
        return np.array(actions)

    return policy


def rollout_record(
    world: World,
    goal: Goal,
    observations: np.ndarray,
    actions: np.ndarray,
    states: np.ndarray | None = None,
    imagined: bool = False,
) -> dict:
    """One row of a rollouts dataset: rewards and success are judged here, real and imagined
    rollouts alike.

    observations: (T+1, observation_dim); actions: (T,) int64; states: (T+1, state_dim) where they
    are known.
    """
    encoded = np.repeat(world.encode_goals([goal]), len(actions), 0)
    transitions = (encoded, observations[:-1], observations[1:], actions, imagined)
    last_step = world.success(*transitions)[-1:]
    record = goal.to_json()
    record["goal"] = record.pop("text")
    record["observations"] = np.asarray(observations, np.float32)
    record["actions"] = np.asarray(actions, np.int64)
    record["rewards"] = world.reward(*transitions).astype(np.float32)
    record["success"] = bool(last_step.any())
    record["states"] = None if states is None else np.asarray(states, np.float64)
    return record


def goal_of(record: dict) -> Goal:
    """The goal of a rollout record or dataset row."""
    relations = tuple(tuple(relation) for relation in record["relations"])
    return Goal(record["goal"], record["level"], record["kind"], relations)


class WorldEnv(gymnasium.Env):
    """Any world with Gymnasium's interface. The goal is in info["goal"], as text.

    world: a World, or its name as `make` takes it. reset options: "goal", a Goal (default: a random
    training goal);
    "state", a (state_dim,) state. info tells goal, level, kind, relations (JSON), state and success
    at every step.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(
        self,
        world: World | str = DEFAULT_WORLD,
        render_mode: str | None = None,
        max_steps: int | None = None,
    ):
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode is None or 'rgb_array', got {render_mode!r}")
        self.world = make(world) if isinstance(world, str) else world
        self.render_mode = render_mode
        self.max_steps = max_steps or self.world.max_steps
        limit = self.world.observation_limit
        shape = (self.world.observation_dim,)
        self.observation_space = gymnasium.spaces.Box(-limit, limit, shape, np.float32)
        self.action_space = gymnasium.spaces.Discrete(self.world.num_actions)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        options = options or {}
        goal = (
            options.get("goal") or self.world.sample_goals("offline", "train", 1, self.np_random)[0]
        )
        if not isinstance(goal, Goal):
            raise ValueError(f"options['goal'] must be an env.Goal, got {type(goal).__name__}")
        self.world.check_goal(goal)
        self.goal = goal
        if "state" in options:
            state = np.array(options["state"], np.float64)
        else:
            state = unfulfilled_states(self.world, self.np_random, [goal])[0]
        if state.shape != (self.world.state_dim,) or not np.isfinite(state).all():
            raise ValueError(
                f"options['state'] must be ({self.world.state_dim},) finite numbers, got shape {state.shape}"
            )
        self.state = state
        self.steps = 0
        return self.world.observe(state), self._info(success=False)

    def step(self, action):
        before = self.world.observe(self.state)[None]
        actions = np.array([action])
        self.state = self.world.step_batch(self.state[None], actions)[0]
        self.steps += 1
        after = self.world.observe(self.state)[None]
        transition = (self.world.encode_goals([self.goal]), before, after, actions)
        success = bool(self.world.success(*transition)[0])
        reward = float(self.world.reward(*transition)[0])
        truncated = not success and self.steps >= self.max_steps
        return after[0], reward, success, truncated, self._info(success)

    def _info(self, success):
        goal = self.goal.to_json()
        relations = json.dumps(goal["relations"])
        told = {"goal": goal["text"], "level": goal["level"], "kind": goal["kind"]}
        return {**told, "relations": relations, "state": self.state.copy(), "success": success}

    def render(self):
        if self.render_mode == "rgb_array":
            return self.world.draw(self.world.observe(self.state))
        return None


gymnasium.register(
    "KALM/ClevrRobot-v0", entry_point="env:WorldEnv", kwargs={"world": "clevr_robot"}
)

# ----------------------------------------------------------------------------------------------
# Pictures


def save_gif(
    path,
    world: World,
    *records: dict,
    captions: Sequence[str] = ("",),
    frame_ms: int = 350,
    size: int = 256,
) -> None:
    """Rollout records as an animated GIF, side by side, with a caption each. path: a file name or a
    binary file.
    """
    strips = []
    for caption, record in zip(captions, records, strict=True):
        actions = [*map(int, record["actions"]), None]
        pictures = []
        for obs, action in zip(record["observations"], actions):
            pictures.append(_captioned(world.draw(obs, action, size), caption))
        strips.append(pictures)
    frames = [Image.fromarray(np.concatenate(pictures, 1)) for pictures in zip(*strips)]
    rest = frames[1:] + frames[-1:] * 3  # the end is shown for longer
    frames[0].save(path, "GIF", save_all=True, append_images=rest, duration=frame_ms, loop=0)


def _captioned(picture, caption):
    if not caption:
        return picture
    image = Image.fromarray(picture)
    pen = ImageDraw.Draw(image)
    pen.text((8, 6), caption, fill=(20, 20, 20), font_size=10)
    return np.asarray(image)
