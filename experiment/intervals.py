"""How sure success rates are: 95% intervals by a bootstrap over policy seeds and goals.

Another run would have other seeds and other goals, so both are drawn anew, with replacement: seeds
once for all levels, goals within each level, a goal with all its episodes. This file knows rates as
results.json has them.
"""

from collections.abc import Sequence

import numpy as np
from numpy import ndarray

DRAWS = 1000
JUDGED = ("matched", "both")  # values of --keep for which somebody knows what a goal means


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
        _, goal, episodes = np.unique(texts, return_inverse=True, return_counts=True)
        sums = np.zeros((len(episodes), seeds))  # over each goal's episodes
        np.add.at(sums, goal, values.T)
        drawn = rng.integers(len(sums), size=(DRAWS, len(sums)))
        played = episodes[drawn].sum(1, keepdims=True)
        of_seeds = sums[drawn].sum(1) / played  # (DRAWS, seeds)
        of_drawn_seeds = np.take_along_axis(of_seeds, drawn_seeds, 1)
        means += of_drawn_seeds.mean(1)
    means /= len(outcomes)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def figure(
    results: dict, row: dict, levels: Sequence[str], control: dict | None = None
) -> tuple[float, float, float]:
    """A method's mean success over levels, or its difference to a control's in the same episodes,
    with the interval. row and control: as in results["success"].
    """
    means = []
    outcomes = []
    goals = []
    for level in levels:
        mean = row[level]["mean"]
        values = outcomes_of(row[level])
        if control:
            mean -= control[level]["mean"]
            values -= outcomes_of(control[level])
        means.append(mean)
        outcomes.append(values)
        texts = results["goals"][level]
        goals.append(texts * (values.shape[1] // len(texts)))  # each checkpoint played them all
    low, high = interval(outcomes, goals)
    return float(np.mean(means)), low, high


def outcomes_of(cell: dict) -> ndarray:
    """The successes in a cell of results["success"]: (seeds, episodes) of 0 and 1."""
    return np.array([list(text) for text in cell["outcomes"]], float)


def success_rows(results: dict, columns: Sequence[Sequence[str]]) -> list[tuple[str, list]]:
    """Rows (name, figures) of each method, and below one with imagined rollouts its difference to
    its control. columns: the levels that a figure is the mean of.
    """
    rows = []
    for method, row in results["success"].items():
        figures = [figure(results, row, levels) for levels in columns]
        rows.append((method, figures))
        name = control_of(method, results)
        if name:
            control = results["success"][name]
            differences = [figure(results, row, levels, control) for levels in columns]
            source = name.rpartition("+")[2]
            rows.append((f"  - {source}", differences))
    return rows


def control_of(method: str, results: dict) -> str | None:
    """What a method with imagined rollouts is to be compared with, if the run has it.

    Where the judge chose among the imagined rollouts, the fair opponent has real ones that the
    judge renamed; where nobody knew what goals mean, it has the real ones as they are.
    """
    algorithm, _, source = method.partition("+")
    if source not in ("kalm", "both"):
        return None
    uses_judge = source == "both" or results["config"].get("keep", "matched") in JUDGED
    opponents = [f"{algorithm}+relabel", algorithm] if uses_judge else [algorithm]
    for name in opponents:
        if name in results["success"]:
            return name
    return None
