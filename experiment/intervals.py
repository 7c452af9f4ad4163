"""How sure success rates are: 95% intervals by a bootstrap over policy seeds and goals.

Another run would have other seeds and other goals, so both are drawn anew, with replacement: seeds
once for all levels, goals within each level, a goal with all its episodes. This file knows rates as
results.json has them: results["success"][METHOD] is a row, row[LEVEL]["outcomes"] has a text of 0
and 1 for each seed, and results["goals"][LEVEL] the goal of each episode.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy import ndarray

DRAWS = 1000
JUDGED = ("matched", "both")  # the values of --keep for which somebody knows what a goal means


def interval(outcomes: Sequence[ndarray], goals: Sequence[Sequence[str]]) -> tuple[float, float]:
    """The 95% interval of a mean over levels; the same numbers have the same interval.

    outcomes: for each level (seeds, episodes), what is averaged: successes, or differences between
    those of two methods in the same episodes. goals: for each level the goal of each episode.
    """
    rng = np.random.default_rng(0)
    seeds = len(outcomes[0])
    drawn_seeds = rng.integers(seeds, size=(DRAWS, seeds))
    means = np.zeros(DRAWS)
    for values, texts in zip(outcomes, goals):
        distinct, goal_of_episode, episodes = np.unique(
            texts, return_inverse=True, return_counts=True
        )
        sums = np.zeros((len(distinct), seeds))  # over each goal's episodes
        np.add.at(sums, goal_of_episode, values.T)
        drawn = rng.integers(len(distinct), size=(DRAWS, len(distinct)))
        rates = sums[drawn].sum(1) / episodes[drawn].sum(1, keepdims=True)  # (DRAWS, seeds)
        means += np.take_along_axis(rates, drawn_seeds, 1).mean(1) / len(outcomes)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def outcomes_of(cell: Mapping) -> ndarray:
    """Successes of a method at a level: (seeds, episodes) of 0 and 1."""
    return np.array([list(text) for text in cell["outcomes"]], float)


def rate_interval(
    row: Mapping, goals: Mapping, levels: Sequence[str], control: Mapping | None = None
) -> tuple[float, float]:
    """The 95% interval of a row's mean success over levels, or of its difference to a control's."""
    values = []
    texts = []
    for level in levels:
        successes = outcomes_of(row[level])
        if control is not None:
            successes = successes - outcomes_of(control[level])
        values.append(successes)
        checkpoints = successes.shape[1] // len(goals[level])  # each of which played them all
        texts.append(list(goals[level]) * checkpoints)
    return interval(values, texts)


def control_of(method: str, results: Mapping) -> str | None:
    """What a method with imagined rollouts is to be compared with, if the run has it.

    Where the judge chose among the imagined rollouts, the fair opponent has real ones that the
    judge renamed; where nobody knew what goals mean, it has the real ones as they are.
    """
    algorithm, _, source = method.partition("+")
    if source not in ("kalm", "both"):
        return None
    uses_judge = source == "both" or results["config"].get("keep", "matched") in JUDGED
    opponents = [f"{algorithm}+relabel", algorithm] if uses_judge else [algorithm]
    found = [name for name in opponents if name in results["success"]]
    return found[0] if found else None
