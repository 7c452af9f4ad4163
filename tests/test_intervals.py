"""Intervals of success rates: solved by hand, against their promise, and against which control."""

import numpy as np
import pytest

from experiment.intervals import control_of, figure, interval, success_rows


def test_intervals_of_cases_solved_by_hand():
    two_goals = [np.array([[0.0, 1.0]])]  # drawn anew: 0, 1/2 or 1 in 1/4, 1/2, 1/4 of all cases
    assert interval(two_goals, [["a", "b"]]) == (0, 1)
    assert interval(two_goals, [["a", "a"]]) == (0.5, 0.5)  # a goal comes with all its episodes
    two_seeds = [np.array([[0.0], [1.0]])]
    assert interval(two_seeds, [["a"]]) == (0, 1)
    both_levels = [np.array([[0.0], [1.0]]), np.array([[1.0], [0.0]])]
    assert interval(both_levels, [["a"], ["b"]]) == (0.5, 0.5)  # a seed is drawn for both of them
    texts = [str(number) for number in range(400)]
    half = np.arange(400)[None] % 2.0
    low, high = interval([half], [texts])
    half_width = 1.96 * 0.5 / 400**0.5  # of a mean of 400 independent goals
    assert (low, high) == pytest.approx((0.5 - half_width, 0.5 + half_width), abs=0.006)
    assert (low, high) == interval([half], [texts])  # the same numbers, the same interval
    uneven = [np.array([[1.0, 1.0, 1.0, 0.0]])]
    assert interval(uneven, [["a", "a", "a", "b"]]) == (0, 1)


@pytest.mark.parametrize("deviation", (0.0, 0.03))
def test_intervals_hold_the_true_rate_about_as_often_as_they_say(deviation):
    rng = np.random.default_rng(1)
    texts = np.repeat([str(number) for number in range(60)], 2)
    found = []
    widths = []
    for _ in range(200):
        of_goals = np.repeat(rng.beta(1, 1.5, 60), 2)  # mean .4
        rates = of_goals + rng.normal(0, deviation, (3, 1))
        low, high = interval([(rng.random(rates.shape) < rates).astype(float)], [texts])
        found.append(low <= 0.4 <= high)
        widths.append(high - low)
    assert 0.92 <= np.mean(found)  # wide if anything: both are drawn, and their noise comes twice
    assert 0.12 < np.mean(widths) < 0.22


def results_with(keep, **outcomes):
    success = {}
    for method, texts in outcomes.items():
        rates = [np.mean([*map(int, text)]) for text in texts]
        cell = {"mean": float(np.mean(rates)), "outcomes": texts}
        success[method.replace("_", "+")] = {"easy": cell}
    return {"success": success, "goals": {"easy": ["a", "b", "c"]}, "config": {"keep": keep}}


def test_a_difference_is_taken_episode_by_episode():
    results = results_with("matched", bc=["010", "011"], bc_kalm=["110", "111"])
    success = results["success"]
    mean, low, high = figure(results, success["bc+kalm"], ["easy"], success["bc"])
    assert mean == pytest.approx(1 / 3)  # of the one goal that kalm always wins and bc never
    assert (low, high) == pytest.approx((0, 1))
    same = results_with("matched", bc=["010", "011"], bc_kalm=["010", "011"])["success"]
    assert figure(results, same["bc+kalm"], ["easy"], same["bc"]) == (0, 0, 0)
    twice = results_with("matched", bc=["010011", "010010"])  # two checkpoints
    assert figure(twice, twice["success"]["bc"], ["easy"])[0] == pytest.approx(5 / 12)


def test_the_control_is_the_fair_opponent():
    names = ["bc", "bc+relabel", "bc+kalm", "bc+both", "cql", "cql+kalm", "iql+kalm", "llm"]
    controls = {}
    for keep in ("matched", "all"):
        results = {"success": dict.fromkeys(names), "config": {"keep": keep}}
        controls[keep] = [control_of(name, results) for name in names]
    others = ["cql", None, None]
    assert controls["matched"] == [None, None, "bc+relabel", "bc+relabel", None, *others]
    assert controls["all"] == [None, None, "bc", "bc+relabel", None, *others]
    results = results_with("all", bc=["010"], bc_kalm=["110"], llm=["000"])
    rows = success_rows(results, [["easy"]])
    assert [name for name, _ in rows] == ["bc", "bc+kalm", "  - bc", "llm"]
    assert rows[2][1][0][0] == pytest.approx(1 / 3)
