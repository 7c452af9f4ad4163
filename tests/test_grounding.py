"""Figures of a grounded model on held-out rollouts, in training and after."""

import numpy as np
import pytest
import torch
from conftest import grounding_settings, new_model

import ground
from experiment import grounding

PARTS = ("source", "target", "direction", "exact", "holds")
TEACHER_FORCED = {"action_accuracy", "state_error", "state_error_nothing_moves"}
EXPLAINED = {f"{prompt}_{part}" for prompt in grounding.PROMPTS for part in PARTS}
EASY = {"easy_action", "easy_state"}


def test_figures_are_of_prediction_explanation_and_easy_steps(world, rollouts, grounded):
    model, tokenizer, _ = grounded
    figures = grounding.grounding_figures(model, tokenizer, world, rollouts[140:])
    assert set(figures) == TEACHER_FORCED | EXPLAINED | EASY
    assert all(np.isfinite(value) for value in figures.values())
    assert figures["explanation_exact"] <= figures["explanation_source"]
    assert 0 <= figures["easy_state"] <= figures["easy_action"] <= 1
    on_the_way = grounding.figures_on_the_way(model, tokenizer, world, rollouts[140:], 32)
    same = TEACHER_FORCED | EXPLAINED  # of so few rollouts, all
    assert {name: on_the_way[name] for name in same} == {name: figures[name] for name in same}


def test_a_world_whose_easy_goals_take_more_steps_has_no_figure_of_one(
    world, rollouts, grounded, monkeypatch
):
    monkeypatch.setattr(type(world), "one_step", lambda self, goals: np.zeros(len(goals), bool))
    model, tokenizer, _ = grounded
    figures = grounding.figures_on_the_way(model, tokenizer, world, rollouts[150:], 32)
    assert set(figures) == TEACHER_FORCED | EXPLAINED


def test_measuring_on_the_way_is_logged_and_changes_nothing_of_the_training(
    world, rollouts, tmp_path
):
    found = []
    for strategy in ("no", "steps"):
        model, tokenizer = new_model(world, rollouts)
        work = tmp_path / strategy
        options = {"max_steps": 4, "logging_steps": 1, "eval_strategy": strategy, "eval_steps": 2}
        settings = grounding_settings(work, **options)
        data = (rollouts[:60], rollouts[150:])
        where = (settings, work, work / "log.jsonl", grounding.figures_on_the_way)
        log = ground.train(model, tokenizer, world, *data, *where)
        found.append(([entry["loss"] for entry in log if "loss" in entry], model.state_dict()))
    (losses, weights), (same_losses, same_weights) = found
    assert losses == same_losses and len(losses) == 4
    assert all(torch.equal(weights[name], same_weights[name]) for name in weights)
    measured = [entry for entry in log if "eval_easy_state" in entry]
    assert [entry["step"] for entry in measured] == [2, 4]
    kept = grounding.longer_log([{"step": 10, "loss": 1.0}], log)
    assert [entry["step"] for entry in kept] == [10, 11, 12, 12, 13, 14, 14]


@pytest.mark.parametrize("before, steps", [([], [1]), ([{"step": 7, "loss": 0.5}], [7, 8])])
def test_a_log_goes_on_behind_an_earlier_one(before, steps):
    more = [{"step": 1, "loss": 1.0}, {"step": 1, "train_runtime": 2.0}]
    assert [entry["step"] for entry in grounding.longer_log(before, more)] == steps
