"""Grounding: the layout of examples, packing, training and its logs, evaluation against plain loops."""
import numpy as np
import pytest
import torch
import transformers
from conftest import new_model
from hypothesis import given, settings
from hypothesis import strategies as st

import env
import ground
from model import ACTION, PAD, SEGMENTS, STATE, TASKS, TEXT

GOAL = env.Goal("Put the red ball behind the blue ball.", relations=((0, 1, 0),))


# ----------------------------------------------------------------------------------------------------------- examples

def two_step_record():
    obs = np.arange(30, dtype=np.float32).reshape(3, 10) / 30
    return env.rollout_record(GOAL, obs, np.array([9, 33]))


@pytest.mark.parametrize("task, prompt, segments", [  # a number is an index of an observation, a string an action's, ! is to be predicted
    ("dynamics", "Predict the next state after the action.", [["0", "a0 at 0", "1!"], ["1", "a1 at 1", "2!"]]),
    ("explanation", "Explain what this rollout achieves.", [["0", "a0 at 0", "1", "a1 at 1", "2", "answer!"]]),
    ("generation", f"Goal: {GOAL.text}\nRollout:", [["0", "a0 at 0!", "1!", "a1 at 1!", "2!"]]),
    ("consequence", f"Goal: {GOAL.text}\nFinal state:", [["0", "2!"]])])
def test_each_task_lays_out_prompt_states_and_actions_as_documented(rollouts, task, prompt, segments):
    tokenizer, record = new_model(rollouts)[1], two_step_record()

    def positions(code):
        """(modality, index, state, predict) of one word of the table."""
        word, predict = code.rstrip("!"), code.endswith("!")
        if word == "answer":
            ids = [*tokenizer(" The red ball is near the blue ball, behind it.")["input_ids"], tokenizer.eos_token_id]
            return [(TEXT, i, np.zeros(10), predict) for i in ids]
        if word.startswith("a"):
            return [(ACTION, record["actions"][int(word[1])], record["observations"][int(word[-1])], predict)]
        return [(STATE, 0, record["observations"][int(word)], predict)]
    prompt_ids = tokenizer(prompt)["input_ids"]
    expected = [(TEXT, i, np.zeros(10), False, 0, n) for n, i in enumerate(prompt_ids)]
    for number in range(2 * len(segments)):  # the record is given twice: its segments come twice
        flat = [p for code in segments[number % len(segments)] for p in positions(code)]
        expected += [(*p, number + 1, len(prompt_ids) + n) for n, p in enumerate(flat)]
    example = ground.make_example(task, tokenizer, [record, record])
    for key, column in zip(("modality", "input_ids", "states", "predict", "segments", "position_ids"), zip(*expected)):
        np.testing.assert_array_equal(example[key], np.array(column, example[key].dtype), err_msg=key)
    assert (example["task"] == TASKS.index(task)).all()


def test_a_description_names_two_balls_of_a_state_and_predicts_a_direction_that_holds(rollouts):
    tokenizer = new_model(rollouts)[1]
    prompt = len(tokenizer(ground.PROMPTS["description"])["input_ids"])
    examples, said = [ground.make_example("description", tokenizer, rollouts[:6], wording=w) for w in range(20)], set()
    for example in examples:
        parts = [np.flatnonzero(example["segments"] == n) for n in range(1, example["segments"].max() + 1)]
        assert example["segments"].tolist().count(0) == prompt
        assert len(parts) == sum(min(ground.RELATIONS_PER_ROLLOUT, len(env.relations_in(r["observations"]))) for r in rollouts[:6])
        for part in parts:
            assert example["modality"][part].tolist() == [STATE] + [TEXT] * (len(part) - 1)
            state, words, ahead = example["states"][part[0]], example["input_ids"][part[1:]].tolist(), example["predict"][part[1:]]
            assert any((state == r["observations"]).all(-1).any() for r in rollouts[:6])
            there = {env.canonical_text(env.Goal("any", relations=(tuple(r[1:]),))) for r in env.relations_in(state[None]).tolist()}
            sentence, = [s for s in there if tokenizer(" " + s)["input_ids"] == words]
            direction = tokenizer(sentence.split(",")[1])["input_ids"]
            given = len(words) - len(direction)
            assert words[given:] == direction and ahead.tolist() == [False] * given + [True] * len(direction)
            said.add(sentence)
    assert len(said) > 25 and {s.split(",")[1] for s in said} == {f" {w} it." for w in env.goal_patterns()["phrases"]["of"].values()}


def test_every_rollout_is_in_every_task_once_and_shares_a_prompt_only_with_its_goal(rollouts):
    examples = ground.GroundingExamples(rollouts, new_model(rollouts)[1])
    assert len(examples) == len(examples.examples)
    for task in TASKS:
        groups = [rows for t, rows in examples.examples if t == task]
        assert sorted(row for rows in groups for row in rows) == list(range(len(rollouts)))
        assert all(len({rollouts[row]["goal"] for row in rows}) == 1 for rows in groups) and max(map(len, groups)) > 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=25), st.integers(1, 120))
def test_packed_rows_unpack_to_the_same_examples(lengths, row_length):
    rng = np.random.default_rng(len(lengths))
    examples = [{"input_ids": 1000 * number + np.arange(n), "modality": rng.integers(3, size=n),
                 "states": rng.normal(size=(n, 10)).astype(np.float32), "segments": np.sort(rng.integers(5, size=n)),
                 "position_ids": np.arange(n), "predict": rng.random(n) < 0.5, "task": np.full(n, number % 4)}
                for number, n in enumerate(lengths)]
    batch, found = ground.pack(examples, row_length), {}
    for row in range(len(batch["segments"])):
        used = batch["segments"][row] >= 0
        assert not batch["predict"][row, ~used].any() and (batch["modality"][row, ~used] == PAD).all()
        owner = batch["segments"][row] // SEGMENTS
        assert used.sum() <= row_length or len(owner[used].unique()) == 1
        for number in owner[used].unique():
            part = {k: v[row, used & (owner == number)].numpy() for k, v in batch.items()}
            part["segments"] = part["segments"] % SEGMENTS
            found[int(part["input_ids"][0]) // 1000] = part
    assert len(found) == len(examples)
    for number, example in enumerate(examples):
        for key, value in example.items():
            np.testing.assert_array_equal(found[number][key], value)


def test_copies_come_first_as_they_are_and_then_with_renamed_balls(rollouts):
    _, tokenizer = new_model(rollouts)
    once, thrice = (ground.GroundingExamples(rollouts, tokenizer, ("dynamics", "explanation", "generation"), n, seed=3) for n in (1, 3))
    assert len(thrice) == 3 * len(once)
    changed = 0
    for index in (0, 7, len(once) - 1):
        first, *others = (thrice[index + copy * len(once)] for copy in range(3))
        for key, value in once[index].items():
            np.testing.assert_array_equal(first[key], value)
        for other in others:
            seen, balls = (np.sort(e["states"][e["modality"] != TEXT].reshape(-1, 5, 2), 1) for e in (other, first))
            np.testing.assert_array_equal(seen, balls)
            changed += not np.array_equal(other["states"], first["states"])
    assert changed >= 4
    np.testing.assert_array_equal(thrice[len(once) + 7]["states"], thrice[len(once) + 7]["states"])


# ----------------------------------------------------------------------------------------------------------- training

def test_grounding_lowers_the_loss_of_every_task(rollouts, grounded, losses_of):
    model, tokenizer, _ = grounded
    batch = ground.pack([ground.make_example(task, tokenizer, [r]) for r in rollouts[:20] for task in TASKS])
    before, after = losses_of(new_model(rollouts)[0], batch), losses_of(model, batch)
    assert all(a < b for a, b in zip(after, before)), (before, after)


def test_the_log_has_losses_by_modality_and_task(grounded):
    entries = [entry for entry in grounded[2] if "loss" in entry]
    assert len(entries) >= 5 and entries[-1]["loss"] < entries[0]["loss"]
    for entry in entries:
        assert all(np.isfinite(entry[f"{name}_loss"]) for name in ("text", "action", "state", *TASKS))


def test_logged_losses_average_only_the_batches_that_have_them(rollouts, tmp_path, losses_of):
    model, tokenizer = new_model(rollouts)
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = ground.GroundingTrainer(model=model, args=arguments, data_collator=ground.pack)
    batches = [ground.pack([ground.make_example(task, tokenizer, rollouts[:1])]) for task in ("dynamics", "explanation")]
    for batch in batches:
        trainer.compute_loss(model, batch)
    trainer.log({"loss": 1.0})
    logged = trainer.state.log_history[-1]
    assert logged["explanation_loss"] == pytest.approx(losses_of(model, batches[1])[0], abs=1e-3)
    assert logged["dynamics_loss"] == pytest.approx(losses_of(model, batches[0])[0], abs=1e-3)


@pytest.mark.parametrize("lora_rank", (0, 2))
@pytest.mark.parametrize("trained", ("new", "pretrained"))
def test_each_learning_rate_moves_its_own_parameters_only(rollouts, tmp_path, trained, lora_rank):
    model, tokenizer = new_model(rollouts, lora_rank=lora_rank)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rates = {"learning_rate": 1e-3 * (trained == "pretrained"), "new_learning_rate": 1e-3 * (trained == "new")}
    ground.train(model, tokenizer, rollouts[:40], tmp_path, steps=3, batch_examples=16, **rates)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    layers = {n for n in before if n.startswith("backbone.") and "embed_tokens" not in n}
    adapters = {n for n in layers if ".lora_" in n}
    new = {n for n in before if not n.startswith("backbone.")} | adapters
    assert moved == (new if trained == "new" else set() if lora_rank else layers)


@pytest.mark.parametrize("freeze", (True, False))
def test_token_embeddings_stay_as_they_were_if_frozen(rollouts, tmp_path, freeze):
    model, tokenizer = new_model(rollouts)
    before = model.get_input_embeddings().weight.detach().clone()
    ground.train(model, tokenizer, rollouts[:40], tmp_path, steps=2, freeze_embeddings=freeze)
    assert torch.equal(model.get_input_embeddings().weight, before) == freeze


# --------------------------------------------------------------------------------------------------------- evaluation

def test_evaluation_agrees_with_one_rollout_at_a_time(rollouts, grounded):
    model, tokenizer, _ = grounded
    held_out = rollouts[100:]  # some were seen in training, so that no figure is 0
    actions, errors, still = [], [], []
    for record in held_out:
        example = ground.make_example("generation", tokenizer, [record])
        start = int(np.flatnonzero(example["segments"] == 1)[0])  # s0; then a0, s1, a1, ...
        with torch.no_grad():
            out = model(**{k: v for k, v in ground.pack([example]).items() if k not in ("predict", "task")})
        for t, action in enumerate(record["actions"]):
            actions.append(int(out.action_logits[0, start + 2 * t].argmax()) == action)
            errors.append(out.state_pred[0, start + 2 * t + 1].numpy() - record["observations"][t + 1])
            still.append(record["observations"][t + 1] - record["observations"][t])
    expected = {"action_accuracy": np.mean(actions), "state_error": np.sqrt(np.mean(np.square(errors))),
                "state_error_nothing_moves": np.sqrt(np.mean(np.square(still)))}
    figures = ground.evaluate(model, tokenizer, held_out, batch_examples=7)
    assert figures == pytest.approx(expected, abs=1e-4) and 0 < figures["action_accuracy"] < 1
