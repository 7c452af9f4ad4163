"""Numbers that are NaN or infinite stop a run where they come up (those of rl: test_rl.py)."""

import re

import numpy as np
import pytest
import torch
from conftest import grounding_settings, new_model
from test_trust import assert_whole, note, smoke, up_to

import env
import ground
import rollout
from experiment import folder


def test_a_loss_that_is_none_stops_with_step_row_and_task_and_the_checkpoint_stays(
    smoke_run, tmp_path, monkeypatch, capsys
):
    run, real = up_to(smoke_run, tmp_path / "run", "ground"), ground.GroundingTrainer.compute_loss

    def spoiled(self, model, inputs, *args, **kwargs):
        inputs["states"][1] += torch.nan if self.state.global_step == 6 else 0
        return real(self, model, inputs, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ground.GroundingTrainer, "compute_loss", spoiled)
        assert smoke(run) == 2
    tasks = rf"({'|'.join(ground.TASKS)}|, )+"
    where = rf"grounding, step 7: the loss is nan, from batch row 1 \({tasks}\)"
    assert re.search(f"kalm: stage 'ground': {where}", capsys.readouterr().err)
    steps = []
    note(monkeypatch, ground.GroundingTrainer, "compute_loss", steps.append)
    assert smoke(run, "--stage", "ground") == 0 and len(steps) == 4
    assert_whole(run, smoke_run, "ground")


def test_a_gradient_that_is_none_stops_before_the_weights_take_it(world, rollouts, tmp_path):
    model, tokenizer = new_model(world, rollouts)
    model.action_head[2].bias.register_hook(lambda gradient: gradient * torch.inf)
    data = (world, rollouts[:20], rollouts[20:22], grounding_settings(tmp_path, max_steps=2))
    what = "grounding, step 1: the norm of the gradient is (nan|inf)"
    with pytest.raises(FloatingPointError, match=what):
        ground.train(model, tokenizer, *data, tmp_path, tmp_path / "log.jsonl")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("level, split", [("offline", "train"), ("easy", "test")])
def test_an_imagined_state_that_is_none_is_named(world, rollouts, level, split):
    (model, tokenizer), rng = new_model(world, rollouts), np.random.default_rng(0)
    goals = world.sample_goals(level, split, 4, rng)
    starts = world.observe(env.unfulfilled_states(world, rng, goals))
    torch.nn.init.constant_(model.state_head[-1].bias, torch.inf)
    what = rf"rollout, action 1: the state is inf, from batch row 0 .{re.escape(goals[0].text)}"
    with pytest.raises(FloatingPointError, match=what):
        rollout.generate(model, tokenizer, world, goals, starts)


def test_the_norms_of_gradients_are_logged_by_both_trainers(smoke_run):
    norms = folder.read_json(smoke_run / "policies" / "gradient_norms.json")
    for method, curve in folder.read_json(smoke_run / "policies" / "curves.json").items():
        steps, values = zip(*norms[method])
        assert steps == tuple(step for step, _ in curve) and min(values) > 0
    log = folder.read_json(smoke_run / "grounded" / "metrics.json")["log"]
    assert all(entry["grad_norm"] > 0 for entry in log if "loss" in entry)
