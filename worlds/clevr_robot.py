"""CLEVR-Robot: five balls on a table, pushed by a point mass, with goals in natural language.

A state is (69,): 37 qpos (x, y, z and a quaternion of each ball, x, y of the point mass), 32 qvel.
An observation is (10,): x, y of the red, blue, green, purple and cyan ball, in metres.
An action is an integer in 0..39: ball * 8 + push direction.
Beside this file lie the scene (MuJoCo's XML), the sentences and the picture of the table.
This file knows nothing of learning: no torch, no language model.
"""

import itertools
import os
import threading
from pathlib import Path

import mujoco
import mujoco.rollout
import numpy as np

from env import UNJUDGED, WORDS, Goal, World
from worlds import _clevr_robot_sentences as sentences
from worlds._clevr_robot_geometry import (
    DIRECTION_VECTORS,
    PUSH_VECTORS,
    REACH_HIGH,
    REACH_LOW,
    UNIT_PUSHES,
    beyond_walls,
    crowding,
    dot,
    holds,
    length,
    path_around,
    positions,
    relations_in,
)
from worlds._clevr_robot_picture import draw_table
from worlds._clevr_robot_sentences import COLORS, DIRECTIONS

Array = np.ndarray
KINDS = ("relation", "step", "relations", "line", "gather")
RELATION_COUNTS = {"relation": (1,), "step": (1,), "relations": (2, 3)}  # others have none
INDEX = {None: -1}  # of the names in a relation
INDEX |= zip(COLORS, range(5))
INDEX |= zip(DIRECTIONS, range(4))

START_HEIGHT = -0.195
START_SPACING = 0.36  # least distance of two ball centres at the start
PUSH_OFFSET = 0.15  # the point mass starts this far behind the ball, against the push direction
PHYSICS_STEPS = 40  # of 0.01 s for one action
TABLE_LOW = np.array((-0.6, -0.3))
TABLE_HIGH = np.array((0.6, 0.7))
LARGEST_MOVE = 0.43  # metres in one action; random play reaches .42 in 100,000 (docs/log.md)
TARGET_DISTANCE = 0.195  # the reward pays for the way to a point this far beside the other ball
GATHER_RADIUS = 0.325
LINE_ANGLE = np.radians(30)
MOVED = 0.15  # an imagined step counts as a move from here on
TOLD_MOVE = 0.05  # shorter moves are left out where changes are told in words
MOST_NAMED = 3  # balls of a goal that makes claims
GREEN = COLORS.index("green")
SIDES = {"behind": "behind", "left": "left of", "front": "in front of", "right": "right of"}
WAYS = ("back", "left", "front", "right")

# ----------------------------------------------------------------------------------------------
# Physics

SCENE = Path(__file__).with_suffix(".xml").read_text(encoding="utf-8")
PHYSICS = mujoco.MjModel.from_xml_string(SCENE)
BALL_XY = np.array([(7 * ball, 7 * ball + 1) for ball in range(5)])  # columns of a state
MASS_XY = slice(35, 37)
MASS_VELOCITY = slice(67, 69)
ROWS_AT_ONCE = 2048  # MuJoCo keeps the trajectory of every physics step: this bounds it
_own = threading.local()  # where two threads share a simulator, the process dies


def simulator(threads: int) -> tuple[mujoco.rollout.Rollout, list[mujoco.MjData]]:
    """The calling thread's simulator with so many workers (0: none), and a memory for each."""
    if not hasattr(_own, "simulators"):
        _own.simulators = {}
    if threads not in _own.simulators:
        memories = [mujoco.MjData(PHYSICS) for _ in range(max(threads, 1))]
        _own.simulators[threads] = (mujoco.rollout.Rollout(nthread=threads), memories)
    return _own.simulators[threads]


def available_threads() -> int:
    """CPU cores of this process, shared among those that a launcher started on this machine."""
    own_cores = hasattr(os, "sched_getaffinity")  # not on macOS and Windows
    cores = len(os.sched_getaffinity(0)) if own_cores else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def check_batch(states: Array, actions: Array) -> None:
    """Raise ValueError for wrong shapes, unknown actions and states that are not finite."""
    count = len(states)
    if states.shape != (count, 69) or actions.shape != (count,):
        shapes = f"{states.shape}, {actions.shape}"
        raise ValueError(f"step_batch takes states (B, 69) and actions (B,), got {shapes}")
    if ((actions < 0) | (actions >= 40)).any():
        raise ValueError(f"actions must be in 0..39, got {actions.min()}..{actions.max()}")
    finite = np.isfinite(states).all(1)
    if not finite.all():
        raise ValueError(f"state {finite.argmin()} of the batch has NaN or infinite values")


def rename_balls(record: dict, order: Array) -> dict:
    """The same rollout where ball i has the name of ball order[i]; `states` are dropped."""
    names = {}
    for color, new in zip(COLORS, order):
        names[color] = COLORS[new]
    relations = []
    for relation in record["relations"]:
        relations.append([names.get(name, name) for name in relation])
    balls = record["observations"].reshape(-1, 5, 2)
    renamed_balls = balls[:, np.argsort(order)]
    ball, push = np.divmod(record["actions"], 8)
    return {
        **record,
        "goal": sentences.renamed(record["goal"], names),
        "relations": relations,
        "observations": renamed_balls.reshape(-1, 10),
        "actions": order[ball] * 8 + push,
        "states": None,
    }


class ClevrRobot(World):
    """The paper's world (section 5). A relation is (ball, other ball or None, direction)."""

    observation_dim = 10
    num_actions = 40
    state_dim = 69
    observation_limit = 2.0
    observation_scale = 0.3
    kinds = KINDS
    one_step_kinds = ("step",)
    word_parts = sentences.PARTS
    lexicon = sentences.Lexicon()
    objects = len(COLORS)

    # Physics

    def step_batch(self, states, actions, threads: int | None = None) -> Array:
        """As World; threads: of the physics, by default all cores. Raises ValueError."""
        states = np.asarray(states, np.float64)
        actions = np.asarray(actions)
        check_batch(states, actions)
        if len(actions) == 0:
            return states.copy()
        ball, push = np.divmod(actions, 8)
        push = PUSH_VECTORS[push]
        starts = states.copy()
        ball_xy = np.take_along_axis(states, BALL_XY[ball], 1)
        starts[:, MASS_XY] = ball_xy - PUSH_OFFSET * push
        starts[:, MASS_VELOCITY] = 0
        starts = np.insert(starts, 0, 0, axis=1)  # MuJoCo's full state begins with the time
        controls = np.repeat(push[:, None], PHYSICS_STEPS, 1)
        threads = min(threads or available_threads(), len(states))
        rollout, memories = simulator(0 if threads == 1 else threads)
        next_states = np.empty_like(states)
        for first in range(0, len(states), ROWS_AT_ONCE):
            rows = slice(first, first + ROWS_AT_ONCE)
            path, _ = rollout.rollout(PHYSICS, memories, starts[rows], controls[rows])
            next_states[rows] = path[:, -1, 1:]
        return next_states

    def observe(self, states) -> Array:
        return np.take(states, BALL_XY.ravel(), axis=-1).astype(np.float32)

    def state_from_observation(self, obs) -> Array:
        """A state at rest with the balls where obs has them."""
        rows = np.shape(obs)[:-1]
        state = np.zeros((*rows, self.state_dim))
        state[..., BALL_XY.ravel()] = obs
        state[..., 2:35:7] = START_HEIGHT
        state[..., 3:35:7] = 1  # the quaternion of no rotation
        return state

    def initial_states(self, rng, n: int, goals=None) -> Array:
        """At rest: x ~ U(-.5, .5), y ~ U(-.3, .5), redrawn until all centres are .36 apart."""
        found = []
        while len(found) < n:
            xy = rng.uniform((-0.5, -0.3), (0.5, 0.5), (512, 5, 2))
            distance = length(xy[:, :, None] - xy[:, None]) + np.eye(5)  # none is near itself
            is_spaced = (distance >= START_SPACING).all((1, 2))
            found.extend(xy[is_spaced])
        return self.state_from_observation(np.array(found[:n]).reshape(n, 10))

    # Goals

    def sample_goals(self, level: str, split: str, n: int, rng) -> list[Goal]:
        """Every pattern of the split in turn, filled with random colours and directions."""
        if level == WORDS:
            return self.word_goals(None, "new", split, n, rng)
        patterns = sentences.patterns_of(level, split)
        order = rng.permutation(len(patterns))
        goals = []
        for number in range(n):
            colors = [COLORS[ball] for ball in rng.permutation(5)]
            directions = [DIRECTIONS[way] for way in rng.integers(4, size=3)]
            pattern = patterns[order[number % len(order)]]
            goals.append(sentences.fill_pattern(pattern, colors, directions))
        return goals

    def word_goals(self, part: str | None, words: str, split: str, n: int, rng) -> list[Goal]:
        """n goals, a part named (None: each in turn, then both) in new, nonsense or known words."""
        return sentences.word_goals(part, words, split, n, rng)

    def first_actions_right(self, part: str, goals, obs, values) -> Array:
        """Whether values of first actions (B, num_actions) show a part to be understood, (B,); NaN
        where that is not clear. ball: the best action moves one of the goal's two, chance .40.
        direction: it is the best of the expert's for the four, if all differ, chance .25.
        """
        encoded = self.encode_goals(goals)
        if part == "ball":
            moved = values.argmax(1)[:, None] // 8
            return (moved == encoded[:, 1:3]).any(1).astype(float)
        asked = np.repeat(encoded, 4, 0)
        asked[:, 3] = np.tile(np.arange(4), len(encoded))
        seen = np.repeat(obs, 4, 0)
        actions = self.expert_actions(asked, seen).reshape(-1, 4)
        in_order = np.sort(actions, 1)
        all_differ = (np.diff(in_order, axis=1) > 0).all(1)
        preferred = np.take_along_axis(values, actions, 1).argmax(1)
        return np.where(all_differ, preferred == encoded[:, 3], np.nan)

    def goal_of_text(self, text: str) -> Goal:
        """Judged where a sentence plainly says to put one ball on a side of another."""
        relation = sentences.plain_relation(text)
        if relation is None:
            return Goal(text, "hard")
        return Goal(text, "rephrase", "relation", (relation,))

    def recorded_goal(self, text: str, code=None) -> Goal:
        """Read from the authors' `goals`, else from a text that names ball, direction, other."""
        if code is None:
            relation = sentences.named_relation(text)
        else:
            code = np.asarray(code)
            is_code = len(code) > 0 and code.shape == (len(code), 6)
            if not is_code or (code != code[0]).any():
                wanted = "6 numbers, the same at each step"
                raise ValueError(f"goals must be {wanted}, got shape {code.shape}")
            relation = sentences.coded_relation(code[0].tolist())
        goal = Goal(text, "offline", "relation", (relation,))
        self.check_goal(goal)
        return goal

    def check_goal(self, goal: Goal) -> None:
        super().check_goal(goal)
        counts = RELATION_COUNTS.get(goal.kind, (0,))
        if len(goal.relations) not in counts:
            takes = f"a goal of kind {goal.kind!r} takes {' or '.join(map(str, counts))} relations"
            raise ValueError(f"{takes}, got {len(goal.relations)}")
        for relation in map(list, goal.relations):
            if len(relation) != 3:
                form = "[ball, other ball or null, direction]"
                raise ValueError(f"a relation is {form}, got {relation!r}")
            ball, other, direction = relation
            for color in (ball,) if other is None else (ball, other):
                if color not in COLORS:
                    raise ValueError(f"unknown colour {color!r}; colours are {', '.join(COLORS)}")
            if direction not in DIRECTIONS:
                known = ", ".join(DIRECTIONS)
                raise ValueError(f"unknown direction {direction!r}; directions are {known}")
            if goal.kind == "step" and other is not None:
                raise ValueError("a step goal names one ball and null as the other")
            if goal.kind != "step" and other is None:
                raise ValueError(f"a goal of kind {goal.kind!r} names two balls in each relation")
            if ball == other:
                raise ValueError(f"a relation needs two different balls, got {ball} twice")

    def encode_goals(self, goals) -> Array:
        """(B, 10) integers: kind, then up to three (ball, other, direction); -1 where none is."""
        if isinstance(goals, np.ndarray):
            return goals
        encoded = np.full((len(goals), 10), -1)
        kinds = (*KINDS, UNJUDGED)
        for row, goal in zip(encoded, goals):
            row[0] = kinds.index(goal.kind)
            names = itertools.chain(*goal.relations)
            for column, name in enumerate(names, 1):
                row[column] = INDEX[name]
        return encoded

    def one_step(self, goals) -> Array:
        return self.encode_goals(goals)[:, 0] == KINDS.index("step")

    # Language

    def vocabulary(self) -> list[str]:
        texts = [*COLORS]
        for direction in DIRECTIONS:
            texts.append(sentences.canonical_sentence("red", "blue", direction))
            for pattern in sentences.PATTERNS:
                if pattern["split"] == "train":
                    texts.append(sentences.fill_pattern(pattern, COLORS, [direction] * 3).text)
        return texts

    def canonical_text(self, goal: Goal) -> str:
        return sentences.canonical_sentence(*goal.relations[0])

    def explanation_scores(self, goals, explanations, final_obs) -> dict[str, Array]:
        """Of goals of one relation: what is named right, and whether it holds, asked for or not."""
        unread = Goal("unread")
        goal_of_sentence = sentences.canonical_goals()
        stated = [goal_of_sentence.get(text.strip(), unread) for text in explanations]
        stated = self.encode_goals(stated)
        right = (stated == self.encode_goals(goals)) & (stated >= 0)
        right = right[:, 1:4]
        scores = dict(zip(("source", "target", "direction"), right.T))
        scores["exact"] = right.all(1)
        scores["holds"] = self.fulfilled(stated, final_obs)
        return scores

    def explanation_fits(self, goal_text: str, explanation: str) -> bool:
        """Its balls are among those that the goal names, or the only one of the goal is named."""
        named = sentences.colors_in(goal_text)
        explained = sentences.colors_in(explanation)
        if not explained or not named:
            return bool(explained)
        return explained <= named if len(named) > 1 else named <= explained

    def claims(self, goal_text: str) -> list[tuple[str, str]]:
        """Two of its balls, or its only one and another, lie in a direction that it names.

        All such sentences; a goal of more than MOST_NAMED balls has none.
        """
        named = [color for color in COLORS if color in sentences.colors_in(goal_text)]
        if len(named) > MOST_NAMED:
            return []
        others = COLORS if len(named) == 1 else named
        directions = sentences.directions_in(goal_text)
        claims = []
        for ball, other, direction in itertools.product(named, others, directions):
            if ball != other:
                claims.append(sentences.canonical_halves(ball, other, direction))
        return claims

    def describe(self, obs, count: int, rng) -> list[tuple[int, str, str]]:
        """Relations that hold: both balls, then the direction."""
        relations = relations_in(obs)
        drawn = rng.permutation(len(relations))[:count]
        described = []
        for row, ball, other, direction in relations[drawn].tolist():
            names = (COLORS[ball], COLORS[other], DIRECTIONS[direction])
            described.append((row, *sentences.canonical_halves(*names)))
        return described

    # Judging

    def _read(self, goals, xy):
        """kind (B,); of three relations ball, direction (B, 3), offset from the other (B, 3, 2)."""
        encoded = np.broadcast_to(self.encode_goals(goals), (len(xy), 10))
        ball, other, direction = encoded[:, 1:].reshape(-1, 3, 3).transpose(2, 0, 1)
        row = np.arange(len(xy))[:, None]
        offset = xy[row, ball] - xy[row, other]
        return encoded[:, 0], ball, direction, offset

    def success(self, goals, obs, next_obs, actions, imagined: bool = False) -> Array:
        """Steps are judged by the push, and imagined also by the movement; others by next_obs."""
        xy = positions(next_obs)
        rows = np.arange(len(xy))
        kind, ball, direction, offset = self._read(goals, xy)
        related = (holds(offset, direction) | (ball < 0)).all(1)
        pushed, push = np.divmod(actions, 8)
        first = ball[:, 0]
        way = DIRECTION_VECTORS[direction[:, 0]]
        goes_there = dot(PUSH_VECTORS[push], way) > 0
        stepped = (pushed == first) & goes_there
        if imagined:
            moves = xy - positions(obs)
            stepped &= dot(moves[rows, first], way) >= MOVED
        gap = np.diff(xy, axis=1)
        slope = np.arctan2(gap[..., 1], gap[..., 0])
        lined = (np.abs(slope) <= LINE_ANGLE).all(1)
        from_green = length(xy - xy[:, [GREEN]])
        gathered = (from_green <= GATHER_RADIUS).all(1)
        never = np.zeros(len(xy), bool)
        return np.choose(kind, [related, stepped, related, lined, gathered, never])

    def potential(self, goals, obs) -> Array:
        """Metres to go: relation, from A to the point .195 beside B (the authors' definition).

        Ours: the same summed; step, to the edge that way; line, neighbours as relations to the
        right; gather, distances from green.
        """
        xy = positions(obs)
        kind, ball, direction, offset = self._read(goals, xy)
        way = DIRECTION_VECTORS[direction]
        missing = length(offset - TARGET_DISTANCE * way)
        related = np.where(ball < 0, 0, missing).sum(1)
        first_ball = xy[np.arange(len(xy)), ball[:, 0]]
        step = -dot(first_ball, way[:, 0])
        gap = np.diff(xy, axis=1)
        line = length(gap - (TARGET_DISTANCE, 0)).sum(1)
        from_green = length(xy - xy[:, [GREEN]])
        gather = from_green.sum(1)
        never = np.zeros(len(xy))
        return np.choose(kind, [related, step, related, line, gather, never])

    def plausibility(self, obs, next_obs) -> dict[str, float]:
        """Rates of transitions that leave the table, and that no push can make."""
        balls = next_obs.reshape(-1, 5, 2)
        before = obs.reshape(-1, 5, 2)
        moves = length(balls - before)
        off_table = ((balls < TABLE_LOW) | (balls > TABLE_HIGH)).any((1, 2))
        too_far = (moves > LARGEST_MOVE).any(1)
        return {"off_table": float(off_table.mean()), "beyond_dynamics": float(too_far.mean())}

    def expert_actions(self, goals, obs) -> Array:
        """A plain function of what is seen, so that a policy can imitate it.

        Push A the way that leaves the shortest path, round B, to the point .3 beside B. If that
        is too near a wall, push B away from the wall. Pushes at walls or other balls cost extra.
        """
        xy = positions(obs)
        rows = np.arange(len(xy))
        ball, other, direction = self.encode_goals(goals)[:, 1:4].T
        beside = 0.3 * DIRECTION_VECTORS[direction][:, None]
        a = xy[rows, ball][:, None]
        b = xy[rows, other][:, None]
        target = b + beside
        cornered = (target < REACH_LOW + 0.08) | (target > REACH_HIGH - 0.08)

        a_next = a + 0.12 * UNIT_PUSHES
        path = path_around(a_next, np.clip(target, REACH_LOW, REACH_HIGH), b, 0.27)
        push_a = (path + crowding(xy, ball, a, a_next)).argmin(1)

        b_next = b + 0.2 * UNIT_PUSHES
        target = b_next + beside
        path = path_around(a, np.clip(target, REACH_LOW, REACH_HIGH), b_next, 0.27)
        in_the_way = 2 * beyond_walls(target) + crowding(xy, other, b, b_next)
        push_b = (in_the_way + 0.5 * path).argmin(1)

        action_a = ball * 8 + push_a
        action_b = other * 8 + push_b
        return np.where(cornered.any((1, 2)), action_b, action_a)

    # Symmetry, words and pictures

    def rename(self, records: list[dict], rng) -> list[dict]:
        """Other names for the balls, which are all alike; `states` are dropped."""
        order = rng.permutation(5)
        return [rename_balls(record, order) for record in records]

    def goal_in_words(self, goal: Goal) -> str:
        parts = []
        for ball, other, direction in goal.relations:
            if other is None:
                parts.append(f"{ball} goes {direction}")
            else:
                parts.append(f"{ball} is {SIDES[direction]} {other}")
        return " and ".join(parts) or goal.kind

    def change_in_words(self, before, after) -> str:
        """How far each ball came."""
        moves = (after - before).reshape(-1, 2)
        ways = (moves @ DIRECTION_VECTORS.T).argmax(1)
        parts = []
        for color, distance, way in zip(COLORS, length(moves), ways):
            if distance >= TOLD_MOVE:
                parts.append(f"{color} {distance:.2f} m {WAYS[way]}")
        return ", ".join(parts) or "nothing"

    def draw(self, obs, action: int | None = None, size: int = 256) -> Array:
        """An arrow shows the push."""
        balls = positions(obs)[0]
        if action is None:
            return draw_table(balls, None, size)
        ball, push = divmod(action, 8)
        tail = balls[ball] - 0.28 * UNIT_PUSHES[push]
        head = balls[ball] - 0.13 * UNIT_PUSHES[push]
        return draw_table(balls, (tail, head), size)


WORLD = ClevrRobot
