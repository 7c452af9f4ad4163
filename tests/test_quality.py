"""Figures of what was imagined and said, for rollouts made by hand."""

import numpy as np
import pytest
from conftest import rollout_record

import env
from env import Goal
from experiment import quality

SCENE = [(-0.4, 0.5), (0.4, 0.5), (0, 0.2), (-0.4, -0.1), (0.4, -0.1)]  # far apart, green amid them
LEFT = Goal("Move green left.", "easy", "step", (("green", None, "left"),))
NEAR = Goal("Green right of blue.", "easy", "relation", (("green", "blue", "right"),))


def imagined(world, goal, actions, *changes):
    """A rollout of which each change moves ball k by (dx, dy)."""
    path = [np.array(SCENE, np.float32)]
    for ball, dx, dy in changes:
        path.append(path[-1].copy())
        path[-1][ball] += (dx, dy)
    path = np.reshape(path, (-1, 10))
    return rollout_record(world, goal, path, np.array(actions), imagined=True)


@pytest.fixture
def records(world):
    return [
        imagined(world, LEFT, [18], (2, -0.2, 0)),  # pushes left, goes left: match, also in physics
        imagined(world, LEFT, [18], (2, -0.1, 0)),  # hardly moves: only the action matches
        imagined(world, LEFT, [16], (2, 1.0, 0)),  # pushes right, and jumps off the table
        imagined(world, NEAR, [0, 8], (0, 0.1, 0), (2, 0.55, 0.4)),  # a match that physics denies
    ]


def test_rollouts_match_in_imagination_and_when_their_actions_are_played(world, records):
    assert [record["success"] for record in records] == [True, False, False, True]
    expected = {"rollouts": 4, "match": 2 / 4, "executed": 2 / 4, "executed_of_matched": 1 / 2}
    expected |= {"actions": 5 / 4, "off_table": 1 / 5, "beyond_dynamics": 2 / 5}
    expected["action_match"] = 2 / 3
    assert quality.rollout_figures(world, records) == pytest.approx(expected)
    assert "action_match" not in quality.rollout_figures(world, records[3:])


def test_of_many_rollouts_an_even_sample_is_played(world, records, monkeypatch):
    monkeypatch.setattr(quality, "PLAYED", 2)
    figures = quality.rollout_figures(world, records)  # the first and the third
    assert figures["rollouts"] == 4 and figures["match"] == 2 / 4
    assert (figures["executed"], figures["executed_of_matched"]) == (1 / 2, 1)


def test_a_plan_counts_as_executed_by_its_own_actions_alone(world, rollouts):
    alike = lambda record: len(set(record["actions"])) == 1 < len(record["actions"]) < 4
    longer = next(record for record in rollouts if alike(record))
    path, actions = longer["observations"], longer["actions"]
    brief = rollout_record(world, env.goal_of(longer), path[:2], actions[:1], imagined=True)
    assert not brief["success"]  # the same push once more would meet its goal
    both = quality.rollout_figures(world, [brief, longer])
    alone = [quality.rollout_figures(world, [record])["executed"] for record in (brief, longer)]
    assert alone == [0, 1] and both["executed"] == 1 / 2


def test_a_self_check_adds_what_fits_and_what_is_believed(world, records):
    words = ("Green went left.", "Red went left.", "Green, red.", "Green beside red.")
    errors = ([0], [0.2], [0], [0, 0.3])
    for record, said, error in zip(records, words, errors):
        record.update(explanation=said, dynamics_error=np.array(error))
    figures = quality.rollout_figures(world, records)
    found = [figures[name] for name in ("explained", "match_of_explained", "dynamics_error")]
    assert found == pytest.approx([2 / 4, 1 / 2, 0.1])


def test_matches_are_counted_among_judged_goals_only(world, rollouts):
    checked = [{**r, "explanation": r["goal"], "dynamics_error": np.zeros(1)} for r in rollouts[:3]]
    unjudged = {"goal": "Red.", "kind": "unknown", "relations": [], "success": False}
    others = [{**record, **unjudged, "explanation": "Blue."} for record in checked]
    both = quality.rollout_figures(world, checked + others)
    assert both["match"] == quality.rollout_figures(world, checked)["match"] == 1
    assert both["rollouts"] == 6 and both["explained"] == 3 / 6
    alone = quality.rollout_figures(world, others)
    of_a_judge = {"match", "executed", "executed_of_matched", "match_of_explained"}
    assert not of_a_judge & set(alone) and alone["explained"] == 0


def test_explanations_are_right_by_part_and_true_of_the_final_state(world):
    goal = Goal("Put red left of blue.", "offline", "relation", (("red", "blue", "left"),))
    places = [(-0.3, 0.2), (0, 0.2), (0.02, -0.1), (0.4, 0.5), (0.4, -0.1)]
    final = np.reshape(places, 10).astype(np.float32)  # red left of blue, green in front of blue
    record = rollout_record(world, goal, np.array([final, final]), np.array([0]))
    said = ["The red ball is near the blue ball, to the left of it."]
    said += ["The green ball is near the blue ball, in front of it."]
    said += ["The red ball is near the cyan ball, behind it.", "A fine rollout."]
    figures = quality.explanation_figures(world, [record] * 4, said)
    expected = {"source": 2 / 4, "target": 2 / 4, "direction": 1 / 4, "exact": 1 / 4}
    assert figures == {**expected, "holds": 2 / 4}
