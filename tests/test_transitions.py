"""What policies learn from: buffers, balanced or not, batches, encodings of goal texts."""

import numpy as np
import pytest
import torch
from test_rl import TEXTS, random_records, toy_record, toy_table

from data import llm
from data.transitions import Batches, Buffer, GoalTable, encode_texts

# ------------------------------------------------------------------------------- buffers, batches


def test_a_balanced_buffer_draws_goals_alike_and_of_each_its_rollouts_alike():
    records = [r for r in random_records(40) if r["goal"] != TEXTS[2]] + random_records(3)[2:]
    records[0]["dynamics_error"] = np.full(len(records[0]["actions"]), 9.0)  # is left out
    left = [[r for r in records[1:] if r["goal"] == text] for text in TEXTS]
    assert [len(rollouts) for rollouts in left] == [13, 13, 1]
    by_transition = 1 / sum(len(r["actions"]) for r in records[1:])
    for balanced in (False, True):
        buffer = Buffer(records, toy_table(), balanced=balanced, dynamics_tolerance=1)
        rows = torch.as_tensor(buffer.draw((2, 20000), 2, np.random.default_rng(0)))
        assert rows.shape == (2, 20000, 2)
        goals = buffer.transitions.goal[rows]
        assert torch.equal(goals[..., 0], goals[..., 1])
        drawn = torch.bincount(rows.flatten(), minlength=len(buffer)) / rows.numel()
        expected = []
        for rollouts in left:
            for record in rollouts:
                by_goal = 1 / (3 * len(rollouts) * len(record["actions"]))
                expected += [by_goal if balanced else by_transition] * len(record["actions"])
        torch.testing.assert_close(drawn, torch.tensor(expected), rtol=0.2, atol=1e-3)


def test_balancing_and_dropping_keep_transitions_whole():
    records = random_records(30)
    for r in records:
        r["dynamics_error"] = np.abs(r["observations"][:-1, 0])

    def transitions(records, **options):
        buffer = Buffer(records, toy_table(), **options)
        columns = [column.reshape(len(buffer), -1).float() for column in buffer.transitions]
        return sorted(map(tuple, torch.cat(columns, 1).tolist()))

    plain = transitions(records)
    assert len(plain) == sum(len(r["actions"]) for r in records)
    assert transitions(records, balanced=True) == plain
    believed = transitions(records, balanced=True, dynamics_tolerance=0.2)
    assert believed == [t for t in plain if abs(t[0]) <= 0.2] and 0 < len(believed) < len(plain)
    unchecked = [{**r, "dynamics_error": None} for r in records]  # nothing says that they are off
    assert transitions(unchecked, dynamics_tolerance=0.2) == plain
    assert len(Buffer([], toy_table(), balanced=True)) == 0


def test_a_buffer_lays_transitions_out_flat_and_is_done_at_successful_ends_only():
    obs = np.arange(60, dtype=np.float32).reshape(6, 10)
    buffer = Buffer(
        [
            toy_record(obs[:4], [1, 2, 3], [5, 6, 100], True),
            toy_record(obs[4:], [4], [7], False, TEXTS[2]),
        ],
        toy_table(),
    )
    expected = (
        obs[[0, 1, 2, 4]],
        [0, 0, 0, 2],
        [1, 2, 3, 4],
        [5, 6, 100, 7],
        obs[[1, 2, 3, 5]],
        [0, 0, 1, 0],
    )
    assert len(buffer) == 4
    for found, wanted in zip(buffer.transitions, expected):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    "share, buffers, expected",
    [
        (0.5, 0, [10]),
        (0.5, 1, [5, 5]),
        (0.5, 2, [5, 2, 3]),
        (0.6, 3, [4, 2, 2, 2]),
        (0.0, 2, [10, 0, 0]),
    ],
)
def test_a_batch_is_real_and_imaginary_in_the_asked_shares(share, buffers, expected):
    sources = [Buffer(random_records(20, i), toy_table()) for i in range(buffers + 1)]
    for number, buffer in enumerate(sources):
        buffer.transitions.reward[:] = number
    batch = Batches(sources[0], sources[1:], 10, 3, share, 0)[250]
    wide = Batches(sources[0], sources[1:], 20, 3, share, 0, 2)[250]
    assert wide.goal.shape == (3, 10) and wide.obs.shape == (3, 20, 10)
    for row in wide.reward:
        assert [int((row == number).sum()) for number in range(buffers + 1)] == [
            2 * count for count in expected
        ]
    assert [x.shape for x in batch] == [(3, 10, 10), *[(3, 10)] * 3, (3, 10, 10), (3, 10)]
    for row in batch.reward:
        assert [int((row == number).sum()) for number in range(buffers + 1)] == expected
    assert not torch.equal(batch.obs[0], batch.obs[1])  # each seed draws its own


def test_a_batch_is_the_same_whoever_asks_and_its_transitions_are_whole():
    sources = [Buffer(random_records(20, i), toy_table(), balanced=i > 0) for i in range(3)]
    whole, again = (Batches(sources[0], sources[1:], 12, 2, 0.5, 7) for _ in range(2))
    asked = [again[number] for number in (205, 3, 99, 100)]
    for number, batch in zip((205, 3, 99, 100), asked):
        assert all(map(torch.equal, batch, whole[number]))
    assert not torch.equal(asked[2].obs, asked[3].obs)
    known = set()
    for buffer in sources:
        columns = [column.reshape(len(buffer), -1).float() for column in buffer.transitions]
        known |= set(map(tuple, torch.cat(columns, 1).tolist()))
    columns = [column.reshape(24, -1).float() for column in whole[17]]
    assert set(map(tuple, torch.cat(columns, 1).tolist())) <= known
    others = Batches(sources[0], sources[1:], 12, 2, 0.5, 8)[17]
    assert not torch.equal(others.action, whole[17].action)


# --------------------------------------------------------------------------------- goal encodings

SENTENCES = [
    f"{verb} the {color} ball {end}."
    for verb in ("Put", "Could you gently move")
    for color in ("red", "blue", "green")
    for end in ("left", "behind the purple ball and the cyan one", "to where I like it")
]


def test_text_encodings_are_token_means_whatever_the_batch():
    model, tokenizer = llm.tiny(SENTENCES)
    encodings = encode_texts(SENTENCES, model.base_model, tokenizer)
    assert encodings.shape == (18, 64) and encodings.dtype == torch.float32
    by_four = encode_texts(SENTENCES, model.base_model, tokenizer, batch_size=4)
    torch.testing.assert_close(by_four, encodings, rtol=1e-4, atol=1e-5)
    for text, encoding in zip(SENTENCES, encodings):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            hidden = model.base_model(ids).last_hidden_state[0]
        torch.testing.assert_close(hidden.mean(0), encoding, rtol=1e-4, atol=1e-5)


def test_a_goal_table_is_standardised_by_its_training_texts_and_survives_the_disk(tmp_path):
    model, tokenizer = llm.tiny(SENTENCES)
    training, novel = SENTENCES[:12], SENTENCES[9:]
    table = GoalTable.encode(training * 2, novel, model.base_model, tokenizer)
    known = table.of_texts(training)
    np.testing.assert_allclose(known.mean(0), np.zeros(64), atol=1e-4)
    np.testing.assert_allclose(known.std(0), np.ones(64), atol=1e-2)
    table.save(tmp_path / "goals.safetensors")
    loaded = GoalTable.load(tmp_path / "goals.safetensors")
    assert torch.equal(loaded.table, table.table) and torch.equal(loaded.scale, table.scale)
    assert loaded.index == table.index and len(loaded.table) == 18


def test_one_training_text_has_no_deviation_and_encodings_are_numbers():
    model, tokenizer = llm.tiny(SENTENCES)
    table = GoalTable.encode(SENTENCES[:1] * 3, SENTENCES[1:4], model.base_model, tokenizer)
    assert (table.table[0] == 0).all() and 0 < table.table[1:].abs().max() < 100


def test_a_goal_added_to_a_table_is_encoded_as_if_it_had_been_there():
    model, tokenizer = llm.tiny(SENTENCES)
    encoder = model.base_model, tokenizer
    together = GoalTable.encode(SENTENCES[:9], SENTENCES[-1:], *encoder)
    added = GoalTable.encode(SENTENCES[:9], [], *encoder).with_texts(SENTENCES[-1:], *encoder)
    assert added.index == together.index
    torch.testing.assert_close(added.table, together.table, rtol=1e-4, atol=1e-4)
