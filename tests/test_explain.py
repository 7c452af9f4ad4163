"""What the grounded model says of rollouts, beside slow twins without packing or a cache."""

import numpy as np
import pytest
import torch
from test_rollout import run_slowly, shown, slow_explanation, text_of

import explain
from model import ACTION, SEGMENTS, STATE, TEXT
from tasks import PROMPTS, text_ids


def test_explanations_equal_the_slow_twins(grounded, rollouts):
    model, tokenizer, _ = grounded
    records = rollouts[::12]
    for prompt in (PROMPTS["explanation"], "Explain the rollout."):
        said = explain.explain(model, tokenizer, records, prompt, max_tokens=12, batch_size=6)
        twins = [slow_explanation(model, tokenizer, record, prompt, 12) for record in records]
        assert said == twins
    assert len(set(said)) > 1


def test_the_dynamics_check_compares_with_each_transition_asked_alone(world, grounded, rollouts):
    model, tokenizer, _ = grounded
    prompt = text_of(tokenizer, PROMPTS["dynamics"])
    found = explain.dynamics_error(model, tokenizer, world, rollouts[:9], rollouts_a_row=4)
    for record, errors in zip(rollouts, found):
        path = torch.as_tensor(record["observations"])
        assert len(errors) == len(record["actions"])
        for t, action in enumerate(record["actions"].tolist()):
            alone = [*prompt, (STATE, 0, path[t]), (ACTION, action, path[t])]
            predicted = run_slowly(model, alone).state_pred[0, -1]
            gap = (predicted - path[t + 1]).reshape(5, 2).norm(dim=1).max()
            assert errors[t] == pytest.approx(gap.item(), abs=1e-4)
    assert len(found) == 9


def test_the_dynamics_check_takes_rollouts_of_more_steps_than_one_row_can_tell_apart(
    world, grounded, rollouts
):
    model, tokenizer, _ = grounded
    long = {**rollouts[0]}
    for key, times in (("observations", 150), ("actions", 149)):
        long[key] = np.resize(rollouts[0][key], (times, *rollouts[0][key].shape[1:]))
    alone = explain.dynamics_error(model, tokenizer, world, [long], 1)[0]
    found = explain.dynamics_error(model, tokenizer, world, [long] * 8)
    assert len(found) == 8 and 8 * len(alone) > SEGMENTS
    for errors in found:
        np.testing.assert_allclose(errors, alone, atol=1e-4)
    assert explain.dynamics_error(model, tokenizer, world, []) == []


def test_claims_are_as_likely_as_the_slow_twin_finds_them(world, grounded, rollouts, monkeypatch):
    model, tokenizer, _ = grounded
    texts = ("Roll the red ball to the left.", "Gather.", "Put cyan behind or left of purple.")
    records = [{**rollouts[row], "goal": texts[row % 3]} for row in range(9)]
    monkeypatch.setattr(explain, "POSITIONS_A_BATCH", 300)
    found = explain.claim_log_probs(model, tokenizer, world, records)
    assert [len(claims) for claims in found] == [4, 0, 4] * 3
    prompt = text_of(tokenizer, PROMPTS["explanation"])
    for record, log_probs in zip(records, found):
        for (beginning, end), log_prob in zip(world.claims(record["goal"]), log_probs):
            sequence = [*prompt, *shown(record), *text_of(tokenizer, beginning)]
            expected = 0
            for token in text_ids(tokenizer, end):
                logits = run_slowly(model, sequence, text_logits=1).logits[0, -1]
                expected += logits.log_softmax(-1)[token].item()
                sequence.append((TEXT, token, torch.zeros(10)))
            assert log_prob == pytest.approx(expected, abs=1e-3)
    without = explain.claim_log_probs(model, tokenizer, world, records[1:2])
    assert len(without) == 1 and without[0].shape == (0,)
