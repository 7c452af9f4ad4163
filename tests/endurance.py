"""Random play for as long as asked: `python tests/endurance.py [--steps 200000] [--rows 256]`; test_env.py runs a short one.

Says how far a ball's centre gets beyond where the walls let a ball at rest be, whether a number was not finite, and how memory grew.
"""
import argparse
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402

import env  # noqa: E402

LOW, HIGH = np.array((-0.6, -0.3)), np.array((0.6, 0.7))  # the walls; a ball at rest keeps its radius away from them


def endure(steps, rows=256, seed=0, episode=50):
    """Random actions for so many steps in all, episodes of `episode` in lockstep. Raises AssertionError at a number that is none.

    Returns (metres that a centre came nearer to a wall than a ball's radius, the same past the wall itself, start states apart;
    bytes of memory added after the first tenth).
    """
    rng, done, squeezed, past, memory = np.random.default_rng(seed), 0, 0.0, 0.0, None
    while done < steps:
        states = env.initial_states(rng, rows)
        for _ in range(episode):
            states = env.step_batch(states, rng.integers(env.NUM_ACTIONS, size=rows))
            xy = env.observe(states).reshape(-1, 2).astype(float)
            assert np.isfinite(states).all()
            beyond = float(np.maximum(LOW - xy, xy - HIGH).max())
            squeezed, past = max(squeezed, beyond + env.BALL_RADIUS), max(past, beyond)
            done += rows
        if done >= steps / 10 and memory is None:
            memory = resident()
    return squeezed, past, resident() - memory


def resident():
    """Bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--rows", type=int, default=256)
    options = parser.parse_args()
    began = time.monotonic()
    squeezed, past, memory = endure(options.steps, options.rows)
    print(f"{options.steps} steps in {time.monotonic() - began:.0f} s, all numbers finite; a centre came {squeezed:.3f} m nearer to a wall than "
          f"its radius, {max(past, 0):.3f} m past the wall; memory grew by {memory / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
