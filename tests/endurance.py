"""Random play for as long as wanted: `python tests/endurance.py [--steps 200000] [--rows 256]`

Says how far a ball's centre gets beyond where the walls let a ball at rest be, and how memory grew;
a number that is not finite ends it.
"""

import argparse
import resource
import time
from pathlib import Path

import conftest  # noqa: F401, it sets the import path
import numpy as np

from worlds import clevr_robot
from worlds._clevr_robot_picture import BALL_RADIUS


def endure(steps, rows=256, seed=0, episode=50):
    """Random actions for so many steps in all, episodes of `episode` in lockstep.

    Returns how many metres a centre came past a wall (below 0: it stayed inside), start states
    apart, and the bytes of memory added after the first tenth.
    """
    world, rng = clevr_robot.ClevrRobot(), np.random.default_rng(seed)
    done, past, memory = 0, -np.inf, None
    while done < steps:
        states = world.initial_states(rng, rows)
        for _ in range(episode):
            states = world.step_batch(states, rng.integers(world.num_actions, size=rows))
            assert np.isfinite(states).all()
            xy = states[:, clevr_robot.BALL_XY]
            beyond = np.maximum(clevr_robot.TABLE_LOW - xy, xy - clevr_robot.TABLE_HIGH)
            past = max(past, float(beyond.max()))
            done += rows
        if done >= steps / 10 and memory is None:
            memory = resident()
    return past, resident() - memory


def resident():
    """Bytes of memory that this process holds now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--rows", type=int, default=256)
    options = parser.parse_args()
    began = time.monotonic()
    past, memory = endure(options.steps, options.rows)
    print(f"{options.steps} steps in {time.monotonic() - began:.0f} s, all numbers finite")
    print(f"a centre came {past + BALL_RADIUS:.3f} m nearer to a wall than its radius", end=", ")
    print(f"{max(past, 0):.3f} m past the wall; memory grew by {memory / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
