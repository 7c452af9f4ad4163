"""Another environment, as a recipe: pucks on a grid of tiles instead of balls in MuJoCo.

    python docs/grid_env.py --scale smoke --output_dir runs/grid

A push moves a puck one tile, unless the tile is taken or off the table. It takes everything else from env: goals, judges,
rewards, pictures. kalm's stages ask env for its physics by name, so replacing two functions there is enough.
"""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import env  # noqa: E402
import kalm  # noqa: E402

TILE, LOW, HIGH = 0.2, np.array((-2, -1)), np.array((2, 3))  # a table of 5 x 5 tiles, as multiples of 0.2 m


def step_batch(states, actions, threads=None):
    """States (B, 69) after one push each, as env.step_batch."""
    tiles, rows, pucks = np.rint(env.observe(states).reshape(-1, 5, 2) / TILE), np.arange(len(states)), np.asarray(actions) // 8
    wanted = tiles[rows, pucks] + np.sign(env.PUSH_VECTORS[np.asarray(actions) % 8])
    taken = (tiles == wanted[:, None]).all(-1).any(1) | (wanted < LOW).any(1) | (wanted > HIGH).any(1)
    tiles[rows, pucks] = np.where(taken[:, None], tiles[rows, pucks], wanted)
    return env.state_from_observation(TILE * tiles.reshape(-1, 10))


def initial_states(rng, n):
    """n starts (n, 69): five pucks on five different tiles."""
    places = np.array([rng.permutation(25)[:5] for _ in range(n)]).reshape(n, 5)
    return env.state_from_observation(TILE * (np.stack([places % 5, places // 5], -1) + LOW).reshape(n, 10))


env.step_batch, env.initial_states = step_batch, initial_states

if __name__ == "__main__":
    sys.exit(kalm.main())
