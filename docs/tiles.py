"""A world of your own in one file: three pucks on 4 x 4 tiles, of which two can be pushed.

    python kalm.py --env docs/tiles.py:Tiles --scale smoke --output_dir runs/tiles

A push moves the red or the green puck one tile, unless a puck or the edge is in the way; the blue
puck is too heavy. A relation is (puck, side): the puck lies at that side, or is pushed toward it.
"""

import numpy as np
from PIL import Image, ImageDraw

import env

PUCKS = ("red", "green", "blue")
SIDES = ("left", "right", "top", "bottom")
TOWARD = np.array([(-1, 0), (1, 0), (0, -1), (0, 1)])  # x to the right, y downward
LAST = 3  # the tiles of a row are 0 to 3
PATTERNS = {  # of a level: kind, sentences for training or validation, sentences for the test
    "offline": ("edge", ["Push the {a} puck to the {s} edge.", "Move {a} to the {s} side."], []),
    "rephrase": ("edge", ["Let {a} touch the {s} border."], ["{a} belongs to the {s}."]),
    "easy": ("push", ["Nudge {a} one tile to the {s}."], ["A little push of {a} to the {s}!"]),
    "hard": ("edge", ["Both {a} and {b} to the {s}."], ["Line up {a} and {b} at the {s} side."]),
}


class Tiles(env.World):
    """An observation, and a state, is x, y of each puck in tiles; an action is puck * 4 + side."""

    observation_dim = state_dim = 6
    num_actions = 8  # two pucks, four sides
    max_steps = 12
    observation_limit = LAST
    kinds = ("edge", "push")
    one_step_kinds = ("push",)

    # Physics

    def step_batch(self, states, actions):
        tiles = np.reshape(states, (-1, 3, 2)).copy()
        rows = np.arange(len(tiles))
        puck, side = np.divmod(actions, 4)
        wanted = tiles[rows, puck] + TOWARD[side]
        taken = (tiles == wanted[:, None]).all(2).any(1)
        outside = ((wanted < 0) | (wanted > LAST)).any(1)
        free = ~taken & ~outside
        tiles[rows[free], puck[free]] = wanted[free]
        return tiles.reshape(-1, 6)

    def observe(self, states):
        return np.asarray(states, np.float32)

    def state_from_observation(self, obs):
        return np.rint(obs).clip(0, LAST).astype(float)  # what is imagined may lie between tiles

    def initial_states(self, rng, n, goals=None):
        places = [rng.permutation(16)[:3] for _ in range(n)]  # three different tiles
        return np.stack(np.divmod(np.reshape(places, (n, 3)), 4), -1).reshape(n, 6).astype(float)

    # Goals

    def sample_goals(self, level, split, n, rng):
        kind, known, held_out = PATTERNS[level]
        goals = []
        for _ in range(n):
            sentence = rng.choice(held_out if split == "test" else known)
            a, b = rng.permutation(PUCKS[:2]).tolist()
            side = str(rng.choice(SIDES))
            relations = ((a, side), (b, side)) if level == "hard" else ((a, side),)
            text = sentence.format(a=a, b=b, s=side).capitalize()
            goals.append(env.Goal(text, level, kind, relations))
        return goals

    def check_goal(self, goal):
        super().check_goal(goal)
        for relation in goal.relations:
            if len(relation) != 2 or relation[0] not in PUCKS[:2] or relation[1] not in SIDES:
                raise ValueError(f"a relation is [red or green, side], got {list(relation)}")
        if goal.kind != env.UNJUDGED and not goal.relations:
            raise ValueError(f"a goal of kind {goal.kind!r} needs a relation")

    def canonical_text(self, goal):
        ((puck, side),) = goal.relations
        return f"The {puck} puck is at the {side} edge."

    # Judging

    def potential(self, goals, obs):
        """Tiles that are left to go, for a push as for an edge."""
        left = np.zeros(len(obs))
        for row, goal in enumerate(goals):
            for puck, side in goal.relations:
                x, y = np.reshape(obs[row], (3, 2))[PUCKS.index(puck)]
                left[row] += {"left": x, "right": LAST - x, "top": y, "bottom": LAST - y}[side]
        return left

    def success(self, goals, obs, next_obs, actions, imagined=False):
        to_go = self.potential(goals, next_obs)
        met = to_go < 0.5  # imagined pucks may miss a tile's middle
        nearer = self.potential(goals, obs) - to_go > 0.5
        for row, goal in enumerate(goals):
            if goal.kind == "push":
                ((puck, side),) = goal.relations
                asked = PUCKS.index(puck) * 4 + SIDES.index(side)
                met[row] = actions[row] == asked and (nearer[row] or not imagined)
            elif goal.kind == env.UNJUDGED:
                met[row] = False
        return met

    def expert_actions(self, goals, obs):
        """Push toward the side; where that moves nothing, sideways around what is in the way."""
        toward = [SIDES.index(goal.relations[0][1]) for goal in goals]
        aside = 2 - np.array(toward) // 2 * 2  # top and bottom for left and right, and vice versa
        puck = np.array([PUCKS.index(goal.relations[0][0]) for goal in goals])
        tries = puck * 4 + np.stack([toward, aside, aside + 1])  # (3, B)
        moves = [(self.step_batch(obs, actions) != obs).any(1) for actions in tries]
        return tries[np.argmax(moves, 0), np.arange(len(obs))]

    # Pictures

    def draw(self, obs, action=None, size=256):
        tile = size / 4
        image = Image.new("RGB", (size, size), "white")
        pen = ImageDraw.Draw(image)
        for number in range(16):
            x, y = tile * (number % 4), tile * (number // 4)
            pen.rectangle((x, y, x + tile, y + tile), outline="lightgray")
        for color, (x, y) in zip(PUCKS, tile * np.reshape(obs, (3, 2))):
            pen.ellipse((x + 4, y + 4, x + tile - 4, y + tile - 4), fill=color)
        if action is not None:
            pen.text((8, 20), f"{PUCKS[action // 4]} to the {SIDES[action % 4]}", fill="black")
        return np.asarray(image)
