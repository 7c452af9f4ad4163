"""Grounding examples: their layout as documented, copies under a symmetry, packing into rows."""

import numpy as np
import pytest
import torch
from conftest import new_model, rollout_record, tiny_llm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_model import outputs, padded

import env
import tasks
from model import ACTION, PAD, SEGMENTS, STATE, TASKS, TEXT

RED_BEHIND_BLUE = (("red", "blue", "behind"),)
GOAL = env.Goal("Put the red ball behind the blue ball.", "offline", "relation", RED_BEHIND_BLUE)
EXPLAINED = "The red ball is near the blue ball, behind it."


# ------------------------------------------------------------------ examples


LAYOUTS = {  # a number is an observation's, a0 an action's, ! is to be predicted
    "dynamics": (tasks.PROMPTS["dynamics"], ["0 a0@0 1!", "1 a1@1 2!"]),
    "explanation": (tasks.PROMPTS["explanation"], ["0 a0@0 1 a1@1 2 answer!"]),
    "generation": (f"Goal: {GOAL.text}\nRollout:", ["0 a0@0! 1! a1@1! 2!"]),
    "consequence": (f"Goal: {GOAL.text}\nFinal state:", ["0 2!"]),
}


@pytest.mark.parametrize("task", LAYOUTS)
def test_each_task_lays_out_prompt_states_and_actions_as_documented(world, rollouts, task):
    _, tokenizer = new_model(world, rollouts)
    observations = np.arange(30, dtype=np.float32).reshape(3, 10) / 30
    record = rollout_record(world, GOAL, observations, np.array([9, 33]))
    prompt, segments = LAYOUTS[task]

    def positions(code):
        """(modality, index, state, predict) of one word of the table."""
        word, predict = code.rstrip("!"), code.endswith("!")
        if word == "answer":
            ids = [*tokenizer(f" {EXPLAINED}")["input_ids"], tokenizer.eos_token_id]
            return [(TEXT, i, np.zeros(10), predict) for i in ids]
        if word.startswith("a"):
            state = observations[int(word[-1])]
            return [(ACTION, record["actions"][int(word[1])], state, predict)]
        return [(STATE, 0, observations[int(word)], predict)]

    prompt_ids = tokenizer(prompt)["input_ids"]
    expected = [(TEXT, i, np.zeros(10), False, 0, n) for n, i in enumerate(prompt_ids)]
    for number, segment in enumerate(segments * 2, 1):  # given twice: its segments come twice
        flat = [position for code in segment.split() for position in positions(code)]
        expected += [(*p, number, len(prompt_ids) + n) for n, p in enumerate(flat)]
    example = tasks.make_example(task, tokenizer, world, [record, record])
    keys = ("modality", "input_ids", "states", "predict", "segments", "position_ids")
    for key, column in zip(keys, zip(*expected)):
        np.testing.assert_array_equal(example[key], np.array(column, example[key].dtype), key)
    assert (example["task"] == TASKS.index(task)).all()


def test_a_description_names_two_balls_of_a_state_and_predicts_a_direction_that_holds(
    world, rollouts
):
    _, tokenizer = new_model(world, rollouts)
    records, said = rollouts[:6], set()
    for wording in range(20):
        example = tasks.make_example("description", tokenizer, world, records, wording)
        segments = example["segments"]
        in_prompt = len(tokenizer(tasks.PROMPTS["description"])["input_ids"])
        assert segments.tolist().count(0) == in_prompt
        parts = [np.flatnonzero(segments == n) for n in range(1, segments.max() + 1)]
        rng = np.random.default_rng(0)
        true = [world.describe(r["observations"], 1000, rng) for r in records]
        assert len(parts) == sum(min(3, len(sentences)) for sentences in true)
        for state, *words in parts:
            assert example["modality"][state] == STATE
            assert (example["modality"][words] == TEXT).all()
            there = set()  # (beginning, end) of the true sentences about this state
            for record, sentences in zip(records, true):
                for row, *halves in sentences:
                    if np.array_equal(record["observations"][row], example["states"][state]):
                        there.add(tuple(halves))
            ahead = example["predict"][words]
            ids = example["input_ids"][words]
            halves = tokenizer.decode(ids[~ahead]), tokenizer.decode(ids[ahead])
            assert halves in {(a.strip(), b.strip()) for a, b in there}
            assert (np.diff(ahead.astype(int)) >= 0).all()  # the beginning, then the end
            said.add(halves)
    assert len(said) > 25 and len({end for _, end in said}) == 4


def test_every_rollout_is_in_every_task_once_and_shares_a_prompt_only_with_its_goal(
    world, rollouts
):
    examples = tasks.GroundingExamples(rollouts, new_model(world, rollouts)[1], world)
    assert len(examples) == len(examples.examples)
    for task in TASKS:
        groups = [rows for t, rows in examples.examples if t == task]
        assert sorted(row for rows in groups for row in rows) == list(range(len(rollouts)))
        assert all(len({rollouts[row]["goal"] for row in rows}) == 1 for rows in groups)
        assert max(map(len, groups)) > 1


def test_copies_come_first_as_they_are_and_then_with_renamed_balls(world, rollouts):
    _, tokenizer = new_model(world, rollouts)
    three = ("dynamics", "explanation", "generation")
    once = tasks.GroundingExamples(rollouts, tokenizer, world, three)
    thrice = tasks.GroundingExamples(rollouts, tokenizer, world, three, copies=3, seed=3)
    assert len(thrice) == 3 * len(once)
    changed = 0
    for index in (0, 7, len(once) - 1):
        first, *others = (thrice[index + copy * len(once)] for copy in range(3))
        for key, value in once[index].items():
            np.testing.assert_array_equal(first[key], value)
        balls = lambda e: np.sort(e["states"][e["modality"] != TEXT].reshape(-1, 5, 2), 1)
        for other in others:
            np.testing.assert_array_equal(balls(other), balls(first))
            changed += not np.array_equal(other["states"], first["states"])
    assert changed >= 4
    again = thrice[len(once) + 7]["states"]
    np.testing.assert_array_equal(thrice[len(once) + 7]["states"], again)


def test_more_segments_than_a_mask_can_tell_apart_are_refused(world, rollouts):
    longest = max(rollouts, key=lambda record: len(record["actions"]))
    too_many = [longest] * (SEGMENTS // len(longest["actions"]) + 1)
    with pytest.raises(ValueError, match=f"at most {SEGMENTS} segments"):
        tasks.make_example("dynamics", tiny_llm(world)[1], world, too_many)


# ------------------------------------------------------------------ packing


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=25), st.integers(1, 120))
def test_packed_rows_unpack_to_the_same_examples(lengths, row_length):
    rng = np.random.default_rng(len(lengths))
    examples = []
    for number, n in enumerate(lengths):
        example = {"input_ids": 1000 * number + np.arange(n), "modality": rng.integers(3, size=n)}
        example["states"] = rng.normal(size=(n, 10)).astype(np.float32)
        example["segments"] = np.sort(rng.integers(5, size=n))
        example |= {"position_ids": np.arange(n), "predict": rng.random(n) < 0.5}
        examples.append({**example, "task": np.full(n, number % 4)})
    batch, found = tasks.pack(examples, row_length), {}
    for row in range(len(batch["segments"])):
        used = batch["segments"][row] >= 0
        assert not batch["predict"][row, ~used].any()
        assert (batch["modality"][row, ~used] == PAD).all()
        owner = batch["segments"][row] // SEGMENTS
        assert used.sum() <= row_length or len(owner[used].unique()) == 1
        for number in owner[used].unique():
            part = {key: v[row, used & (owner == number)].numpy() for key, v in batch.items()}
            part["segments"] = part["segments"] % SEGMENTS
            found[int(part["input_ids"][0]) // 1000] = part
    assert len(found) == len(examples)
    for number, example in enumerate(examples):
        for key, value in example.items():
            np.testing.assert_array_equal(found[number][key], value)


@pytest.fixture(scope="module")
def separate(world, rollouts):
    """An untrained model, examples of all tasks, and a batch with each in a row of its own."""
    model, tokenizer = new_model(world, rollouts)
    examples = []
    for start in range(0, 24, 4):
        for task in TASKS:
            some = rollouts[start : start + 1 + start % 3]
            examples.append(tasks.make_example(task, tokenizer, world, some))
    batch = tasks.pack(examples, row_length=1)
    assert len(batch["segments"]) == len(examples)
    return model, examples, batch


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.randoms(use_true_random=False), st.integers(1, 2000), st.integers(0, 40))
def test_losses_are_the_same_however_examples_are_ordered_packed_and_padded(
    separate, losses_of, order, row_length, more
):
    model, examples, alone = separate
    shuffled = order.sample(examples, len(examples))
    batch = padded(tasks.pack(shuffled, row_length), more)
    assert losses_of(model, batch) == pytest.approx(losses_of(model, alone), rel=1e-4)


def test_a_rollout_in_a_row_with_others_is_predicted_as_if_alone(world, rollouts):
    model, tokenizer = new_model(world, rollouts)
    same_goal = [{**record, "goal": rollouts[0]["goal"]} for record in rollouts[:3]]
    generation = tasks.make_example("generation", tokenizer, world, same_goal)
    dynamics = tasks.make_example("dynamics", tokenizer, world, rollouts[5:9])
    batch = tasks.pack([generation, dynamics], row_length=9999)
    assert len(batch["segments"]) == 1
    together, ours = outputs(model, batch), batch["task"] == TASKS.index("generation")
    for number, record in enumerate(same_goal, 1):
        single = tasks.pack([tasks.make_example("generation", tokenizer, world, [record])])
        here = ours & (batch["segments"] % SEGMENTS == number)
        for many, alone in zip(together, outputs(model, single)):
            expected = alone[single["segments"] == 1]
            torch.testing.assert_close(many[here], expected, rtol=1e-4, atol=1e-5)
