"""CLEVR-Robot: five balls on a table, pushed by a point mass, with goals in natural language.

The physics (MuJoCo) is a pure function of 69 numbers, so batches, threads and replay need no environment objects.
Also here: goals and their judges, rewards, a scripted expert, a Gymnasium face, pictures.
This file knows nothing of learning: no torch, no language model.

A state is (69,) float64: 37 qpos (five balls of x, y, z and a quaternion, then the point mass's x, y) and 32 qvel.
An observation is (10,): x, y of the red, blue, green, purple and cyan ball, in metres.
An action is an integer in 0..39: ball * 8 + push direction.
"""
import functools
import itertools
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import gymnasium
import mujoco
import mujoco.rollout
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

COLORS = ("red", "blue", "green", "purple", "cyan")
DIRECTIONS = ("behind", "left", "front", "right")
LEVELS = ("offline", "rephrase", "easy", "hard")
NOVEL_LEVELS = LEVELS[1:]
KINDS = ("relation", "step", "relations", "line", "gather", "unknown")  # unknown: no judge, never a success
DIRECTION_VECTORS = np.array([(0, 1), (-1, 0), (0, -1), (1, 0)], float)  # behind is away from the viewer
PUSH_VECTORS = np.array([(1, 0), (0, 1), (-1, 0), (0, -1), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8)])
NUM_ACTIONS = len(COLORS) * len(PUSH_VECTORS)
OBSERVATION_DIM = 2 * len(COLORS)
STATE_DIM = 69
MAX_STEPS = 50          # actions in an episode

BALL_RADIUS = 0.13
START_HEIGHT = -0.195
START_SPACING = 0.36    # least distance of two ball centres at the start
PUSH_OFFSET = 0.15      # the point mass starts this far behind the ball, against the push direction
PHYSICS_STEPS = 40      # of 0.01 s for one action
NEAR = 0.39 + 0.001     # a relation holds up to this distance, with the judge's tolerance
TARGET_DISTANCE = 0.195  # the reward measures the distance to a point this far beside the other ball
GATHER_RADIUS = 0.325
LINE_ANGLE = np.radians(30)
MOVED = 0.15            # an imagined step counts as a move from here on
GREEN = COLORS.index("green")

# ------------------------------------------------------------------------------------------------------------------
# Physics

_BALL = """<body name="{color}" pos="0 0 {z}"><joint type="free" limited="false" damping=".75"/>
  <geom type="sphere" size="{radius}" density="1" contype="1" conaffinity="1"/></body>"""
_XML = """<mujoco>
<compiler angle="radian"/>
<option timestep="0.01" gravity="0 0 -9.81" integrator="Euler" iterations="20" noslip_iterations="5"/>
<default>
  <joint armature=".04" damping="1" limited="true"/>
  <geom friction=".8 .1 .1" condim="3" contype="0" conaffinity="0" margin="0.001"/>
</default>
<worldbody>
  <geom type="plane" pos="0 .5 -.325" size="1 1 .1" contype="1" conaffinity="1"/>
  <geom type="plane" pos="-.6 .5 -.325" size="1 1 .1" euler="0 1.57 0" contype="1"/>
  <geom type="plane" pos=".6 .5 -.325" size="1 1 .1" euler="0 -1.57 0" contype="1"/>
  <geom type="plane" pos="0 .7 -.325" size="1 1 .1" euler="1.57 0 0" contype="1"/>
  <geom type="plane" pos="0 -.3 -.325" size="1 1 .1" euler="-1.57 0 0" contype="1"/>
  {balls}
  <body name="point_mass" pos="0 0 -.2">
    <joint name="x" type="slide" axis="1 0 0" range="-10.32 10.3" damping=".5"/>
    <joint name="y" type="slide" axis="0 1 0" range="-10.32 10.3" damping=".5"/>
    <geom type="sphere" size=".05" density=".5" contype="1"/>
  </body>
</worldbody>
<actuator>
  <motor joint="x" ctrlrange="-2 2" ctrllimited="true"/>
  <motor joint="y" ctrlrange="-2 2" ctrllimited="true"/>
</actuator>
</mujoco>"""


@functools.cache
def physics_model():
    """The compiled MuJoCo model, built once a process."""
    balls = "\n  ".join(_BALL.format(color=c, z=START_HEIGHT, radius=BALL_RADIUS) for c in COLORS)
    return mujoco.MjModel.from_xml_string(_XML.format(balls=balls))


@functools.cache
def _simulators(threads):
    datas = [mujoco.MjData(physics_model()) for _ in range(max(threads, 1))]
    return datas, mujoco.rollout.Rollout(nthread=threads)


def available_threads():
    """CPU cores this process may use, shared among the processes that a launcher started on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def step_batch(states, actions, threads=None):
    """Physics of one action for each row: a pure function, the same for any batch order and number of threads.

    states: (B, 69) float64; actions: (B,) int in 0..39. Returns the next states, (B, 69) float64.
    Raises ValueError for other shapes, for actions out of range and for states that are not finite.
    """
    states, actions = np.asarray(states, np.float64), np.asarray(actions)
    if states.ndim != 2 or states.shape[1] != STATE_DIM or actions.shape != states.shape[:1]:
        raise ValueError(f"step_batch takes states (B, {STATE_DIM}) and actions (B,), got {states.shape}, {actions.shape}")
    if len(actions) == 0:
        return states.copy()
    if actions.min() < 0 or actions.max() >= NUM_ACTIONS:
        raise ValueError(f"actions must be in 0..{NUM_ACTIONS - 1}, got {actions.min()}..{actions.max()}")
    if not np.isfinite(states).all():
        raise ValueError(f"state {np.flatnonzero(~np.isfinite(states).all(1))[0]} of the batch has NaN or infinite values")
    balls, push = actions // 8, PUSH_VECTORS[actions % 8]
    rows = np.arange(len(states))
    start = np.concatenate([np.zeros((len(states), 1)), states], 1)  # MuJoCo's full state begins with the time
    start[:, 36:38] = start[rows[:, None], 1 + 7 * balls[:, None] + np.arange(2)] - PUSH_OFFSET * push
    start[:, 68:70] = 0
    control = np.repeat(push[:, None], PHYSICS_STEPS, 1)
    threads = min(available_threads() if threads is None else threads, len(states))
    datas, simulator = _simulators(0 if threads == 1 else threads)
    next_states = np.empty_like(states)
    for i in range(0, len(states), 2048):  # the trajectory of every physics step is kept until here: bound it
        path, _ = simulator.rollout(physics_model(), datas, start[i:i + 2048], control[i:i + 2048])
        next_states[i:i + 2048] = path[:, -1, 1:]
    return next_states


def observe(states):
    """Ball positions of physics states: (B, 69) -> (B, 10) float32, or (69,) -> (10,)."""
    states = np.asarray(states)
    return states[..., :35].reshape(*states.shape[:-1], 5, 7)[..., :2].reshape(*states.shape[:-1], 10).astype(np.float32)


def state_from_observation(obs):
    """A physics state at rest with the balls where `obs` has them: (..., 10) -> (..., 69)."""
    obs = np.asarray(obs, np.float64)
    balls = np.zeros((*obs.shape[:-1], 5, 7))
    balls[..., :2] = obs.reshape(*obs.shape[:-1], 5, 2)
    balls[..., 2], balls[..., 3] = START_HEIGHT, 1
    state = np.zeros((*obs.shape[:-1], STATE_DIM))
    state[..., :35] = balls.reshape(*obs.shape[:-1], 35)
    return state


def initial_states(rng, n):
    """n starts at rest, (n, 69): x ~ U(-.5, .5), y ~ U(-.3, .5), redrawn until all centres are .36 apart."""
    found = []
    while len(found) < n:
        xy = rng.uniform((-0.5, -0.3), (0.5, 0.5), (512, 5, 2))
        distance = np.linalg.norm(xy[:, :, None] - xy[:, None], axis=-1) + np.eye(5)
        found.extend(xy[(distance >= START_SPACING).all((1, 2))])
    return state_from_observation(np.array(found[:n]).reshape(n, 10))


# ------------------------------------------------------------------------------------------------------------------
# Goals, success, reward

@dataclass(frozen=True)
class Goal:
    """What a rollout should reach. `relations` holds (ball, other ball or None, direction), as indices."""
    text: str
    level: str = "offline"
    kind: str = "relation"
    relations: tuple = ()

    def __post_init__(self):
        def require(true, message):
            if not true:
                raise ValueError(message)
        require(isinstance(self.text, str) and self.text.strip(), f"a goal's text must be a sentence, got {self.text!r}")
        require(not re.search("[\ud800-\udfff]", self.text), f"a goal's text must be whole Unicode characters, got {self.text!r}")
        require(self.level in LEVELS, f"unknown level {self.level!r}; levels are {', '.join(LEVELS)}")
        require(self.kind in KINDS, f"unknown kind {self.kind!r}; kinds are {', '.join(KINDS)}")
        counts = {"relation": (1,), "step": (1,), "relations": (2, 3)}.get(self.kind, (0,))
        require(len(self.relations) in counts, f"a goal of kind {self.kind!r} takes {' or '.join(map(str, counts))} "
                                               f"relations, got {len(self.relations)}")
        for ball, other, direction in self.relations:
            require((other is None) == (self.kind == "step"),
                    "a step goal names one ball and null as the other" if self.kind == "step" else
                    f"a goal of kind {self.kind!r} names two balls in each relation")
            require(ball != other, f"a relation needs two different balls, got {COLORS[ball]} twice")

    def to_json(self):
        """The record of a goals file, with names for indices."""
        relations = [[COLORS[a], None if b is None else COLORS[b], DIRECTIONS[d]] for a, b, d in self.relations]
        return {**asdict(self), "relations": relations}

    @staticmethod
    def from_json(record):
        """Goal from a goals-file record. Raises ValueError that says which field is wrong and what it takes."""
        if not isinstance(record, dict):
            raise ValueError(f"a goal is a JSON object, got {type(record).__name__}")
        if "kind" not in record and "relations" not in record:
            record = {**record, "kind": "unknown", "relations": []}
        for field in ("text", "level", "kind", "relations"):
            if field not in record:
                raise ValueError(f"field {field!r} is missing")
        if not isinstance(record["relations"], (list, tuple)):
            raise ValueError("field 'relations' must be a list")
        relations = []
        for item in record["relations"]:
            if not isinstance(item, (list, tuple)) or len(item) != 3:
                raise ValueError(f"a relation is [ball, other ball or null, direction], got {item!r}")
            ball, other, direction = item
            for color in (ball,) if other is None else (ball, other):
                if color not in COLORS:
                    raise ValueError(f"unknown colour {color!r}; colours are {', '.join(COLORS)}")
            if direction not in DIRECTIONS:
                raise ValueError(f"unknown direction {direction!r}; directions are {', '.join(DIRECTIONS)}")
            relations.append((COLORS.index(ball), None if other is None else COLORS.index(other),
                              DIRECTIONS.index(direction)))
        return Goal(record["text"], record["level"], record["kind"], tuple(relations))


def read_goals(path):
    """Goals of a file with one JSON object a line. Raises ValueError that names file and line."""
    goals = []
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # splitlines would cut JSON strings at U+2028
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                goals.append(Goal.from_json(json.loads(line)))
            except (json.JSONDecodeError, RecursionError) as error:
                problem = getattr(error, "msg", "nested too deep")
                raise ValueError(f"{path}, line {number}: not JSON ({problem}); write one JSON object a line") from None
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not goals:
        raise ValueError(f"{path}: no goals; write one JSON object a line")
    return goals


@functools.cache
def goal_patterns():
    """The built-in sentence patterns and the phrases for their directions (data/goals.json)."""
    return json.loads((Path(__file__).parent / "data" / "goals.json").read_text(encoding="utf-8"))


def fill_pattern(pattern, colors, directions):
    """Goal from a pattern. colors: five ball indices for {a} {b} {c} {e} in turn; directions: three for {d} {d2} {d3}."""
    balls = dict(zip("abce", colors))
    ways = dict(zip(("d", "d2", "d3"), directions))
    words = {name: COLORS[ball] for name, ball in balls.items()}
    for table, phrases in goal_patterns()["phrases"].items():
        words.update({f"{name}_{table}": phrases[DIRECTIONS[way]] for name, way in ways.items()})
    relations = tuple(
        (balls[a], None if b is None else balls[b], (ways[d.lstrip("-")] + 2 * d.startswith("-")) % 4)
        for a, b, d in pattern["relations"])
    text = pattern["text"].format(**words)
    return Goal(text[0].upper() + text[1:], pattern["level"], pattern["kind"], relations)


def sample_goals(level, split, n, rng):
    """n built-in goals of a level: every pattern of the split in turn, filled with random colours and directions.

    split: "train" for level offline, else "validation" or "test". Patterns without placeholders repeat.
    """
    patterns = [p for p in goal_patterns()["patterns"] if p["level"] == level and p["split"] == split]
    if not patterns:
        raise ValueError(f"no built-in goals of level {level!r} in split {split!r}")
    order = rng.permutation(len(patterns))
    return [fill_pattern(patterns[order[i % len(order)]], rng.permutation(5).tolist(), rng.integers(4, size=3).tolist())
            for i in range(n)]


def canonical_text(goal):
    """A plain sentence for a relation goal: what the grounded model is taught to answer when it explains.

    Both balls come before the direction, which can only be told once they are known.
    """
    (a, b, d), = goal.relations
    return f"The {COLORS[a]} ball is near the {COLORS[b]} ball, {goal_patterns()['phrases']['of'][DIRECTIONS[d]]} it."


@functools.cache
def _canonical_relations():
    pairs = itertools.permutations(range(len(COLORS)), 2)
    relations = [(a, b, d) for a, b in pairs for d in range(len(DIRECTIONS))]
    return {canonical_text(Goal("any", relations=(r,))): r for r in relations}


def read_relation(text):
    """The relation (ball, other, direction) that a sentence of `canonical_text` states, or None for any other text."""
    return _canonical_relations().get(text.strip())


def contradicts(text, explanation):
    """Whether an explanation names balls that do not fit a goal's text: it needs no judge.

    Both balls of an explanation must be among those that the text names; if it names one, that one must be explained. An
    explanation without a ball contradicts every goal.
    """
    named = {c for c in COLORS if re.search(rf"\b{c}\b", text.lower())}
    explained = {c for c in COLORS if re.search(rf"\b{c}\b", explanation.lower())}
    return not explained or bool(named) and not (explained <= named if len(named) > 1 else named <= explained)


def goal_array(goals):
    """Goals as integers, (B, 10): kind, then up to three (ball, other, direction), padded with -1."""
    if isinstance(goals, Goal):
        goals = [goals]
    if isinstance(goals, np.ndarray) and goals.dtype != object:
        return goals
    array = np.full((len(goals), 10), -1)
    for row, goal in zip(array, goals):
        flat = [-1 if x is None else x for relation in goal.relations for x in relation]
        row[0], row[1:1 + len(flat)] = KINDS.index(goal.kind), flat
    return array


def holds(d, direction):
    """Whether offsets d (..., 2) between two balls fulfil a direction (...): near enough, and in its 90-degree sector.

    Of a sector's two edges the clockwise one belongs to it, so each angle lies in exactly one of four sectors.
    """
    u, v = d[..., 0] + d[..., 1], d[..., 1] - d[..., 0]
    sectors = np.stack([(v >= 0) & (u > 0), (u <= 0) & (v > 0), (v <= 0) & (u < 0), (u >= 0) & (v < 0)], -1)
    return np.take_along_axis(sectors, np.asarray(direction)[..., None], -1)[..., 0] & (np.linalg.norm(d, axis=-1) < NEAR)


def relations_in(obs):
    """All relations that hold in observations (N, 10): (M, 4) int64 rows of observation, source, target, direction."""
    balls = obs.reshape(-1, len(COLORS), 2)
    offsets = (balls[:, :, None] - balls[:, None])[:, :, :, None].repeat(len(DIRECTIONS), 3)
    hold = holds(offsets, np.broadcast_to(np.arange(len(DIRECTIONS)), offsets.shape[:-1]))
    return np.argwhere(hold & ~np.eye(len(COLORS), dtype=bool)[:, :, None])


def pushes_toward(action, ball, direction):
    """Whether actions (...) push `ball` with a component toward `direction`."""
    along = (PUSH_VECTORS[action % 8] * DIRECTION_VECTORS[direction]).sum(-1)
    return (action // 8 == ball) & (along > 0)


def success(goal, obs, next_obs, action, imagined=False):
    """Judge transitions: (B,) bool. goal: one Goal, B of them, or their `goal_array`.

    obs, next_obs: (B, 10); action: (B,). Goals other than `step` look at next_obs alone. With `imagined`, a step goal
    also asks that the ball moved .15 that way: in the environment physics sees to it, in imagination nobody does.
    """
    array = goal_array(goal)
    obs, xy = (np.asarray(x, np.float64).reshape(-1, 5, 2) for x in (obs, next_obs))
    array = np.broadcast_to(array, (len(xy), 10))
    rows = np.arange(len(xy))[:, None]
    kind, (ball, other, way) = array[:, 0], array[:, 1:].reshape(-1, 3, 3).transpose(2, 0, 1)
    related = (holds(xy[rows, ball] - xy[rows, other], way) | (ball < 0)).all(1)
    stepped = pushes_toward(np.asarray(action), ball[:, 0], way[:, 0])
    if imagined:
        moved = ((xy - obs)[rows[:, 0], ball[:, 0]] * DIRECTION_VECTORS[way[:, 0]]).sum(-1)
        stepped &= moved >= MOVED
    gap = np.diff(xy, axis=1)
    lined = (np.abs(np.arctan2(gap[..., 1], gap[..., 0])) <= LINE_ANGLE).all(1)
    gathered = (np.linalg.norm(xy - xy[:, GREEN:GREEN + 1], axis=-1) <= GATHER_RADIUS).all(1)
    return np.choose(kind, [related, stepped, related, lined, gathered, np.zeros(len(xy), bool)])


def potential(goal, obs):
    """How far observations (B, 10) are from a goal, in metres; the reward pays for reducing it. Returns (B,).

    relation(s): the distance of A from the point .195 beside B, summed (the authors' definition for one relation).
    Ours, in the same spirit: step, how far A still is from an edge that way; line, neighbours as relations to the
    right; gather, distances from green, summed.
    """
    array = goal_array(goal)
    xy = np.asarray(obs, np.float64).reshape(-1, 5, 2)
    array = np.broadcast_to(array, (len(xy), 10))
    rows = np.arange(len(xy))[:, None]
    kind, (ball, other, way) = array[:, 0], array[:, 1:].reshape(-1, 3, 3).transpose(2, 0, 1)
    beside = np.linalg.norm(xy[rows, ball] - xy[rows, other] - TARGET_DISTANCE * DIRECTION_VECTORS[way], axis=-1)
    related = np.where(ball < 0, 0, beside).sum(1)
    step = -(xy[rows[:, 0], ball[:, 0]] * DIRECTION_VECTORS[way[:, 0]]).sum(-1)
    line = np.linalg.norm(np.diff(xy, axis=1) - (TARGET_DISTANCE, 0), axis=-1).sum(1)
    gather = np.linalg.norm(xy - xy[:, GREEN:GREEN + 1], axis=-1).sum(1)
    return np.choose(kind, [related, step, related, line, gather, np.zeros(len(xy))])


def reward(goal, obs, next_obs, action, imagined=False):
    """+100 where the transition succeeds, else ten times the reduction of the potential. Shapes as in `success`."""
    shaped = 10 * (potential(goal, obs) - potential(goal, next_obs))
    return np.where(success(goal, obs, next_obs, action, imagined), 100.0, shaped)


# ------------------------------------------------------------------------------------------------------------------
# The scripted expert for relation goals

_LOW, _HIGH = np.array((-0.47, -0.17)), np.array((0.47, 0.57))  # where a ball's centre can be, between the walls
_UNIT_PUSHES = PUSH_VECTORS / np.linalg.norm(PUSH_VECTORS, axis=1, keepdims=True)


def path_around(start, end, center, radius):
    """Length of the shortest path from start to end that stays out of a circle; points (..., 2). Returns (...)."""
    length = np.linalg.norm(end - start, axis=-1)
    blocked = distance_to_segment(start, end, center) < radius
    to_start, to_end = np.linalg.norm(start - center, axis=-1), np.linalg.norm(end - center, axis=-1)
    cosine = ((start - center) * (end - center)).sum(-1) / np.maximum(to_start * to_end, 1e-9)
    arc = np.arccos(np.clip(cosine, -1, 1)) - sum(np.arccos(np.minimum(radius / np.maximum(x, 1e-9), 1)) for x in (to_start, to_end))
    tangents = sum(np.sqrt(np.maximum(x ** 2 - radius ** 2, 0)) for x in (to_start, to_end))
    return np.where(blocked, tangents + radius * np.maximum(arc, 0), length)


def distance_to_segment(start, end, point):
    """Distance of points from the segments between start and end, all (..., 2). Returns (...)."""
    segment = end - start
    along = ((point - start) * segment).sum(-1) / np.maximum((segment ** 2).sum(-1), 1e-9)
    return np.linalg.norm(start + np.clip(along, 0, 1)[..., None] * segment - point, axis=-1)


def _beyond_walls(xy):
    return np.linalg.norm(xy - np.clip(xy, _LOW, _HIGH), axis=-1)


def expert_actions(goal, obs):
    """Actions toward relation goals, (B,): a plain function of what is seen, so that a policy can imitate it.

    Push A the one of eight ways that leaves the shortest path, round B, to the point .3 beside B. If that point is too
    near a wall to be reached, push B away from the wall. Pushes into walls or other balls cost extra.
    """
    array = np.broadcast_to(goal_array(goal), (len(obs), 10))
    xy = np.asarray(obs, np.float64).reshape(-1, 5, 2)
    rows = np.arange(len(xy))
    ball, other, way = array[:, 1:4].T
    a, b, beside = xy[rows, ball][:, None], xy[rows, other][:, None], 0.3 * DIRECTION_VECTORS[way][:, None]
    target = b + beside
    cornered = ((target < _LOW + 0.08) | (target > _HIGH - 0.08)).any((1, 2))

    def crowding(start, end, mover):
        distance = distance_to_segment(start[:, :, None], end[:, :, None], xy[:, None])
        distance[rows, :, mover] = np.inf
        return 0.05 * np.clip(1 - distance / 0.24, 0, 1).sum(-1) + _beyond_walls(end)

    a_next, b_next = a + 0.12 * _UNIT_PUSHES, b + 0.2 * _UNIT_PUSHES
    push_a = path_around(a_next, np.clip(target, _LOW, _HIGH), b, 0.27) + crowding(a, a_next, ball)
    moved_target = b_next + beside
    push_b = (2 * _beyond_walls(moved_target) + crowding(b, b_next, other)
              + 0.5 * path_around(a, np.clip(moved_target, _LOW, _HIGH), b_next, 0.27))
    return np.where(cornered, other * 8 + push_b.argmin(1), ball * 8 + push_a.argmin(1))


# ------------------------------------------------------------------------------------------------------------------
# Episodes

def fulfilled_at_start(array, obs):
    """Which goals (see `goal_array`) observations (B, 10) fulfil before any action, as step goals never do: (B,) bool."""
    return (array[:, 0] != KINDS.index("step")) & success(array, obs, obs, np.zeros(len(obs), int))


def unfulfilled_states(rng, goals):
    """A start for each goal that does not fulfil it yet: (len(goals), 69)."""
    array = goal_array(goals)
    states = initial_states(rng, len(array))
    while (fulfilled := fulfilled_at_start(array, observe(states))).any():
        states[fulfilled] = initial_states(rng, fulfilled.sum())
    return states


def unfulfilled_observations(rng, goals, observations):
    """One of `observations` (N, 10) for each goal that does not fulfil it yet: (len(goals), 10). Gives up after 100 draws."""
    array = goal_array(goals)
    chosen = observations[rng.integers(len(observations), size=len(array))]
    for _ in range(100):
        fulfilled = fulfilled_at_start(array, chosen)
        if not fulfilled.any():
            break
        chosen[fulfilled] = observations[rng.integers(len(observations), size=fulfilled.sum())]
    return chosen


def run_episodes(act, goals, states, max_steps=MAX_STEPS, description=None):
    """Act in the environment, all episodes in lockstep, each until its success or max_steps; description: of a progress bar.

    act(obs, rows): actions for observations (b, 10) of the episodes `rows` (b,), those that still run.
    goals: B goals; states: (B, 69) starts. Step goals last one action. Returns B rollout records (see `rollout_record`).
    """
    array, current = goal_array(goals), np.array(states, np.float64)
    paths = [[state.copy()] for state in current]
    actions, done = [[] for _ in paths], [False] * len(paths)
    running = np.arange(len(paths))
    for _ in tqdm(range(max_steps), desc=description, disable=description is None, leave=False):
        if len(running) == 0:
            break
        before = observe(current[running])
        action = np.asarray(act(before, running))
        current[running] = step_batch(current[running], action)
        judged = success(array[running], before, observe(current[running]), action)
        for row, a, good in zip(running, action, judged):
            paths[row].append(current[row].copy())
            actions[row].append(a)
            done[row] = bool(good)
        running = running[~judged & (array[running, 0] != KINDS.index("step"))]
    return [rollout_record(goal, observe(np.array(path)), np.array(a, np.int64), np.array(path))
            for goal, path, a in zip(goals, paths, actions)]


def rollout_record(goal, observations, actions, states=None, imagined=False):
    """One row of a rollouts dataset: rewards and success are judged here, for real and imagined rollouts alike.

    observations: (T+1, 10); actions: (T,) int64; states: (T+1, 69) where they are known.
    """
    steps = (goal, observations[:-1], observations[1:], actions, imagined)
    record = goal.to_json()
    record["goal"] = record.pop("text")
    return {**record, "observations": np.asarray(observations, np.float32), "actions": np.asarray(actions, np.int64),
            "rewards": reward(*steps).astype(np.float32), "success": bool(success(*steps)[-1:].any()),
            "states": None if states is None else np.asarray(states, np.float64)}


def rename_balls(record, order):
    """The same rollout with other names for the balls: ball i becomes order[i]. Exact, since all balls are alike.

    Text, relations, observations and actions change; `states` are dropped.
    """
    names = {color: COLORS[new] for color, new in zip(COLORS, order)}

    def renamed(found):
        new = names[found[0].lower()]
        return new.capitalize() if found[0].istitle() else new
    observations = np.empty_like(record["observations"])
    observations.reshape(-1, 5, 2)[:, order] = record["observations"].reshape(-1, 5, 2)
    return {**record, "goal": re.sub(rf"\b({'|'.join(COLORS)})\b", renamed, record["goal"], flags=re.IGNORECASE),
            "relations": [[names[a], b and names[b], d] for a, b, d in record["relations"]], "observations": observations,
            "actions": np.asarray(order)[record["actions"] // 8] * 8 + record["actions"] % 8, "states": None}


def goal_of(record):
    """The goal of a rollout record or dataset row."""
    return Goal.from_json({"text": record["goal"], **{k: record[k] for k in ("level", "kind", "relations")}})


class ClevrRobotEnv(gymnasium.Env):
    """CLEVR-Robot with Gymnasium's interface. The goal is in `info["goal"]`, as text; the observation is the balls.

    reset options: "goal", a Goal (default: a random training goal); "state", a (69,) physics state.
    """
    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(self, render_mode=None, max_steps=MAX_STEPS):
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode is None or 'rgb_array', got {render_mode!r}")
        self.render_mode, self.max_steps = render_mode, max_steps
        self.observation_space = gymnasium.spaces.Box(-2, 2, (OBSERVATION_DIM,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(NUM_ACTIONS)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        options = options or {}
        self.goal = options.get("goal") or sample_goals("offline", "train", 1, self.np_random)[0]
        if not isinstance(self.goal, Goal):
            raise ValueError(f"options['goal'] must be an env.Goal, got {type(self.goal).__name__}")
        state = options.get("state")
        state = unfulfilled_states(self.np_random, [self.goal])[0] if state is None else np.array(state, np.float64)
        if state.shape != (STATE_DIM,) or not np.isfinite(state).all():
            raise ValueError(f"options['state'] must be ({STATE_DIM},) finite numbers, got shape {state.shape}")
        self.state, self.steps = state, 0
        return observe(self.state), {"goal": self.goal.text, "state": self.state.copy()}

    def step(self, action):
        before = observe(self.state)[None]
        self.state = step_batch(self.state[None], np.array([action]), threads=1)[0]
        self.steps += 1
        step = (self.goal, before, observe(self.state)[None], np.array([action]))
        terminated = bool(success(*step)[0])
        truncated = not terminated and self.steps >= self.max_steps
        info = {"goal": self.goal.text, "state": self.state.copy(), "success": terminated}
        return observe(self.state), float(reward(*step)[0]), terminated, truncated, info

    def render(self):
        return draw(observe(self.state)) if self.render_mode == "rgb_array" else None


gymnasium.register("KALM/ClevrRobot-v0", entry_point="env:ClevrRobotEnv", order_enforce=True)


# ------------------------------------------------------------------------------------------------------------------
# Pictures

_RGB = {"red": (214, 48, 49), "blue": (41, 98, 220), "green": (46, 160, 67), "purple": (142, 68, 190), "cyan": (38, 190, 200)}


def _project(x, y, z, size):
    """Pixel and scale of a point seen from above at an angle: a pin-hole camera in front of the table."""
    eye, pitch = np.array((0.0, -1.75, 1.55)), np.radians(44)
    dx, dy, dz = x - eye[0], y - eye[1], z - eye[2]
    depth = dy * np.cos(pitch) - dz * np.sin(pitch)
    up = dy * np.sin(pitch) + dz * np.cos(pitch)
    focal = 1.55 * size
    return size / 2 + focal * dx / depth, 0.56 * size - focal * up / depth, focal / depth


def draw(obs, caption="", action=None, size=256):
    """A picture of the scene, (size, size, 3) uint8, drawn without GL. action: an arrow shows the push."""
    scale = 2  # drawn twice as large and shrunk, which smooths the edges
    wide = size * scale
    image = Image.new("RGB", (wide, wide), (238, 240, 244))
    pen = ImageDraw.Draw(image)
    floor = -BALL_RADIUS
    corners = [(-0.6, -0.3), (0.6, -0.3), (0.6, 0.7), (-0.6, 0.7)]
    pen.polygon([_project(x, y, floor, wide)[:2] for x, y in corners], fill=(205, 190, 165), outline=(140, 120, 90))
    xy = np.asarray(obs, float).reshape(5, 2)
    for x, y in xy:
        u, v, unit = _project(x + 0.03, y - 0.02, floor, wide)
        r = BALL_RADIUS * unit
        pen.ellipse((u - r, v - 0.6 * r, u + r, v + 0.6 * r), fill=(165, 150, 128))
    for ball in np.argsort(-xy[:, 1]):  # far balls first
        u, v, unit = _project(*xy[ball], 0, wide)
        color = np.array(_RGB[COLORS[ball]])
        for t in np.linspace(0, 1, 12):  # shading: ever smaller, brighter discs toward the light
            r = BALL_RADIUS * unit * (1 - 0.85 * t)
            shade = tuple((color * (0.72 + 0.28 * t) + 90 * t ** 3).clip(0, 255).astype(int))
            pen.ellipse((u - r - 0.3 * t * unit * BALL_RADIUS, v - r - 0.35 * t * unit * BALL_RADIUS,
                         u + r - 0.3 * t * unit * BALL_RADIUS, v + r - 0.35 * t * unit * BALL_RADIUS), fill=shade)
    if action is not None:
        ball, push = action // 8, _UNIT_PUSHES[action % 8]
        tail, head = xy[ball] - 0.28 * push, xy[ball] - 0.13 * push
        (u0, v0, _), (u1, v1, _) = (_project(*p, 0, wide) for p in (tail, head))
        pen.line((u0, v0, u1, v1), fill=(20, 20, 20), width=3 * scale)
        pen.ellipse((u1 - 4 * scale, v1 - 4 * scale, u1 + 4 * scale, v1 + 4 * scale), fill=(20, 20, 20))
    if caption:
        pen.text((8 * scale, 6 * scale), caption, fill=(20, 20, 20), font_size=10 * scale)
    return np.asarray(image.resize((size, size), Image.LANCZOS))


def save_gif(path, *rollouts, captions=("",), frame_ms=350, size=256):
    """Rollout records as an animated GIF, side by side, with a caption each; path may be a file name or a binary file."""
    strips = [[draw(obs, caption, action, size) for obs, action in zip(record["observations"], [*map(int, record["actions"]), None])]
              for caption, record in zip(captions, rollouts, strict=True)]
    frames = [Image.fromarray(np.concatenate(pictures, 1)) for pictures in zip(*strips)]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:] + frames[-1:] * 3, duration=frame_ms, loop=0)
