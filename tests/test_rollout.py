"""The sampling loop against a slow twin without a cache; rounds; the model's own view."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_llm
from test_model import TINY_LLMS, tiny_model

import env
import rollout
import sequences
from data.rollouts import read_rollouts
from experiment import processes
from explain import explain
from model import ACTION, STATE, TEXT
from sequences import Sequences
from tasks import PROMPTS, Position, text_ids


@pytest.fixture(scope="module")
def mixed(world, rollouts):
    """Goals of all kinds and starts (24, 69), half of them seen in training; of many lengths."""
    rng = np.random.default_rng(21)
    known = rollouts[:24:2]
    goals = [env.goal_of(record) for record in known]
    for level in env.NOVEL_LEVELS:
        goals += world.sample_goals(level, "test", 4, rng)
    starts = [record["states"][0] for record in known]
    return goals, np.concatenate([starts, world.initial_states(rng, 12)])


def run_slowly(model, sequence, **options):
    """The model's answer to one sequence of (modality, index, state), without a cache."""
    modality, index, states = zip(*sequence)
    arrays = torch.tensor([index]), torch.tensor([modality]), torch.stack(states)[None]
    with torch.no_grad():
        return model(*arrays, **options)


def text_of(tokenizer, text):
    return [(TEXT, index, torch.zeros(10)) for index in text_ids(tokenizer, text)]


def shown(record):
    """A rollout as a sequence."""
    path = torch.as_tensor(record["observations"])
    sequence = [(STATE, 0, path[0])]
    for t, action in enumerate(record["actions"].tolist()):
        sequence += [(ACTION, action, path[t]), (STATE, 0, path[t + 1])]
    return sequence


def slow_rollout(model, tokenizer, world, goal, obs, max_steps, candidates=1):
    """Twin of greedy `generate`: one goal, and the whole sequence again for every new position."""
    sequence = text_of(tokenizer, PROMPTS["generation"].format(goal=goal.text))
    sequence.append((STATE, 0, torch.as_tensor(obs)))
    path, actions = [sequence[-1][2]], []
    while len(actions) < max_steps:
        logits = run_slowly(model, sequence).action_logits[0, -1]
        outcomes = []  # fulfilled, then the least potential, then the likelier action
        for rank, action in enumerate(logits.argsort(descending=True)[:candidates].tolist()):
            acted = (ACTION, action, path[-1])
            imagined = run_slowly(model, [*sequence, acted]).state_pred[0, -1]
            after = imagined.numpy()[None]
            transition = ([goal], path[-1].numpy()[None], after, np.array([action]))
            missed = not world.success(*transition, imagined=True)[0]
            potential = world.potential([goal], after)[0]
            outcomes.append((missed, potential, rank, action, imagined))
        missed, _, _, action, imagined = min(outcomes, key=lambda outcome: outcome[:3])
        actions.append(action)
        sequence += [(ACTION, action, path[-1]), (STATE, 0, imagined)]
        path.append(imagined)
        if not missed or goal.kind == "step":
            break
    return torch.stack(path).numpy(), actions


def slow_explanation(model, tokenizer, record, prompt, max_tokens):
    """Twin of `explain`: one rollout, and the whole sequence again for every new token."""
    sequence = [*text_of(tokenizer, prompt), *shown(record)]
    said = []
    while len(said) < max_tokens:
        token = int(run_slowly(model, sequence, text_logits=1).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        said.append(token)
        sequence.append((TEXT, token, torch.zeros(10)))
    return tokenizer.decode(said).strip()


def assert_equal_to_twins(records, model, tokenizer, world, goals, starts, steps, candidates=1):
    counts = np.broadcast_to(candidates, len(goals))
    for goal, obs, count, record in zip(goals, starts, counts, records, strict=True):
        path, actions = slow_rollout(model, tokenizer, world, goal, obs, steps, count)
        assert env.goal_of(record) == goal and record["actions"].tolist() == actions
        np.testing.assert_allclose(record["observations"], path, atol=1e-4)


def same_rollouts(some, others):
    values = lambda record: (record["actions"].tolist(), record["observations"].tolist())
    return all(values(a) == values(b) for a, b in zip(some, others, strict=True))


# ------------------------------------------------------------------ imagining


def test_greedy_rollouts_with_a_cache_equal_the_slow_twins(world, grounded, mixed):
    model, tokenizer, _ = grounded
    goals, starts = mixed[0], world.observe(mixed[1])
    records = rollout.generate(model, tokenizer, world, goals, starts, max_steps=8)
    assert len({len(text_ids(tokenizer, goal.text)) for goal in goals}) > 4
    assert len({len(record["actions"]) for record in records}) >= 3  # rows leave at different steps
    assert_equal_to_twins(records, model, tokenizer, world, goals, starts, 8)


@pytest.mark.parametrize("name", TINY_LLMS)
def test_every_architecture_imagines_with_a_cache_as_without(world, name, mixed):
    goals, starts = mixed[0], world.observe(mixed[1])
    model, tokenizer = tiny_model(name, embedding_scale=7.0), tiny_llm(world)[1]
    assert len(tokenizer) <= model.config.backbone_config.vocab_size
    some = (model, tokenizer, world, goals[::4], starts[::4])
    records = rollout.generate(*some, max_steps=6)
    assert_equal_to_twins(records, *some, 6)
    prompt = PROMPTS["explanation"]
    said = [slow_explanation(model, tokenizer, record, prompt, 6) for record in records[:2]]
    assert explain(model, tokenizer, records[:2], max_tokens=6) == said
    others = (model, tokenizer, world, goals[1::4], starts[1::4])
    tried = rollout.generate_all(*others, candidates=3, max_steps=3)
    assert_equal_to_twins(tried, *others, 3, candidates=3)


def test_imagined_rows_end_at_their_first_success_and_step_goals_after_one_action(
    world, grounded, mixed
):
    model, tokenizer, _ = grounded
    goals, starts = mixed[0], world.observe(mixed[1])
    options = {"temperature": 1.0, "max_steps": 12}
    records = rollout.generate(model, tokenizer, world, goals, starts, **options)
    for goal, record in zip(goals, records):
        actions, path = record["actions"], record["observations"]
        transitions = ([goal] * len(actions), path[:-1], path[1:], actions, True)
        judged = world.success(*transitions)
        assert not judged[:-1].any() and judged[-1] == record["success"]
        assert env.goal_of(record) == goal
        longest = 1 if goal.kind == "step" else 12
        assert len(actions) == longest or (record["success"] and len(actions) < longest)
        np.testing.assert_allclose(record["rewards"], world.reward(*transitions), rtol=1e-4)
    assert {r["success"] for r in records if r["kind"] != "step"} == {True, False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])  # the last has a sliding window
def test_branches_equal_sequences_of_their_own_before_and_after_one_is_kept(name, dtype):
    model = tiny_model(name, embedding_scale=7.0)
    model.backbone.to(dtype)
    within = {"atol": 1e-4, "rtol": 1e-4}
    if dtype == torch.bfloat16:
        within = {"atol": 0.1, "rtol": 0.1}  # hidden states are about one in size
    texts = [[5, 6, 7] * 7, [8, 9]]  # ragged: the second is padded
    branches = [[3, 17, 30], [39, 0, 3]]
    states = torch.randn(2, 10, generator=torch.Generator().manual_seed(1))
    prompts = [[Position(TEXT, token) for token in text] for text in texts]
    with torch.inference_mode():
        grown = Sequences(model, prompts)
        hidden = grown.feed_branches(model.action_embedding(torch.tensor(branches)))
        grown.keep_branch(torch.tensor([2, 0]), 3)
        kept = grown.hidden
        grown.feed(model.embed_states(states))
        for row, (text, actions, chosen) in enumerate(zip(texts, branches, (2, 0))):
            prompt = [Position(TEXT, token) for token in text]
            for branch, action in enumerate(actions):
                acted = Position(ACTION, action, np.zeros(10))
                alone = Sequences(model, [[*prompt, acted]]).hidden
                torch.testing.assert_close(hidden[row, branch][None], alone, **within)
            acted = Position(ACTION, actions[chosen], np.zeros(10))
            seen = Position(STATE, 0, states[row].numpy())
            alone = Sequences(model, [[*prompt, acted, seen]]).hidden
            torch.testing.assert_close(kept[row], hidden[row, chosen])
            torch.testing.assert_close(grown.hidden[row][None], alone, **within)


def test_goals_of_one_text_share_a_prefill(world, grounded, mixed, monkeypatch):
    model, tokenizer, _ = grounded
    goals = [goal for goal in mixed[0][:3] for _ in range(4)]
    starts = world.observe(mixed[1][:12])
    given = []
    whole = Sequences.__init__

    def noted(self, model, prompts):
        given.append(len(prompts))
        whole(self, model, prompts)

    monkeypatch.setattr(Sequences, "__init__", noted)
    records = rollout.generate(model, tokenizer, world, goals, starts, max_steps=3)
    assert given == [len({goal.text for goal in goals})]
    assert_equal_to_twins(records, model, tokenizer, world, goals, starts, 3)


def test_sampling_repeats_with_its_seed_only(world, grounded, mixed):
    model, tokenizer, _ = grounded
    goals, starts = mixed[0], world.observe(mixed[1])
    options = {"temperature": 1.0, "max_steps": 4}
    runs = []
    for seed in (1, 1, 2):
        records = rollout.generate(model, tokenizer, world, goals, starts, seed=seed, **options)
        runs.append(records)
    assert same_rollouts(runs[0], runs[1]) and not same_rollouts(runs[0], runs[2])


def test_of_several_candidates_the_reward_picks_the_best_imagined_outcome(world, grounded, mixed):
    model, tokenizer, _ = grounded
    given = (model, tokenizer, world, mixed[0], world.observe(mixed[1]))
    counts = np.where([goal.kind == "step" for goal in mixed[0]], 40, 5)
    records = rollout.generate_all(*given, candidates=counts, batch_size=60, max_steps=4)
    assert_equal_to_twins(records, *given, 4, counts)
    plain = rollout.generate_all(*given, max_steps=4)
    assert sum(r["success"] for r in records) > sum(r["success"] for r in plain)
    options = {"candidates": 5, "max_steps": 4, "temperature": 5.0}
    hot = [rollout.generate_all(*given, seed=seed, **options) for seed in (1, 1, 2)]
    assert same_rollouts(hot[0], hot[1]) and not same_rollouts(hot[0], hot[2])


def test_sampled_candidates_differ_and_follow_their_probabilities():
    """Pairs of actions drawn without replacement: p(a) * p(b) / (1 - p(a)), within 4 sigma."""
    draws = 20000
    logits = np.tile([[3.0, 2.0, 1.0, 0.0]], (draws, 1))
    for temperature in (1.0, 2.0):
        noise = rollout.gumbel_noise(3, range(draws), 1, 4)[:, 0]
        drawn = rollout.sample_actions(logits, temperature, noise, 2)
        chance = np.exp(logits[0] / temperature)
        chance /= chance.sum()
        for first in range(4):
            for second in range(4):
                share = (drawn == (first, second)).all(1).mean()
                expected = 0.0
                if first != second:
                    expected = chance[first] * chance[second] / (1 - chance[first])
                assert abs(share - expected) <= 4 * np.sqrt(expected * (1 - expected) / draws)
    assert rollout.sample_actions(logits[:1], 0, np.zeros((1, 4)), 3).tolist() == [[0, 1, 2]]


def test_draws_of_a_rollout_follow_from_seed_and_number_alone():
    noise = rollout.gumbel_noise([5, 1], [3, 9], 4, 40)
    np.testing.assert_array_equal(rollout.gumbel_noise([5, 1], [9], 6, 40)[0, :4], noise[1])
    for other in (rollout.gumbel_noise([5, 2], [3], 4, 40), noise[1:]):
        assert not np.isclose(other[0], noise[0]).any()


def assert_alike(some, others):
    """The same goals and actions, and states but for rounding."""
    for a, b in zip(some, others, strict=True):
        assert a["actions"].tolist() == b["actions"].tolist() and a["goal"] == b["goal"]
        np.testing.assert_allclose(a["observations"], b["observations"], atol=1e-4)


@pytest.mark.parametrize("candidates", [1, 5])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_neither_batches_nor_who_shares_them_change_rollouts_or_their_order(
    world, grounded, mixed, temperature, candidates
):
    model, tokenizer, _ = grounded
    goals, starts = mixed[0], world.observe(mixed[1])
    counts = np.where([goal.kind == "step" for goal in goals], 40, candidates)
    options = {"temperature": temperature, "max_steps": 5, "seed": [4, 2]}

    def imagined(rows, **more):
        some = [goals[row] for row in rows]
        given = (model, tokenizer, world, some, starts[rows])
        return rollout.generate_all(
            *given, candidates=counts[rows], numbers=rows, **options, **more
        )

    whole = imagined(np.arange(24))
    assert_alike(imagined(np.arange(24), batch_size=3), whole)
    halves = [imagined(np.arange(start, 24, 2)) for start in (0, 1)]
    assert_alike([record for pair in zip(*halves) for record in pair], whole)


def test_batches_hold_every_row_once_and_keep_goals_of_one_text_together(mixed):
    goals = [mixed[0][row % 6] for row in range(60)]
    counts = np.where(np.arange(60) % 6 == 0, 400, 1)
    batches = rollout.batches_of(goals, counts, 20)
    assert sorted(np.concatenate(batches).tolist()) == list(range(60))
    for rows in batches:
        assert len(set(counts[rows])) == 1 and len(rows) <= (2 if counts[rows[0]] > 1 else 20)
        texts = [goals[row].text for row in rows]
        changes = sum(text != other for text, other in zip(texts, texts[1:]))
        assert changes == len(set(texts)) - 1


def test_jobs_are_shared_evenly_each_once_the_dearest_first():
    assert processes.shares([1, 5, 3, 3, 2], 2) == [[1, 4], [2, 3, 0]]
    assert processes.shares([2, 7], 3) == [[1], [0], []]
    costs = np.random.default_rng(0).integers(1, 9, 60)
    taken = processes.shares(costs, 4)
    assert sorted(sum(taken, [])) == list(range(60))
    loads = [costs[jobs].sum() for jobs in taken]
    assert max(loads) - min(loads) <= 8


@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_of_all_processes_come_in_the_order_of_rows(monkeypatch, count):
    batches = [np.array([4, 0]), np.array([1, 5, 2]), np.array([3])]
    work = lambda rows: [f"row {row}" for row in rows]
    shares = []

    def part(index, gather):
        state = SimpleNamespace(
            num_processes=count, process_index=index, is_main_process=index == 0
        )
        monkeypatch.setattr(processes, "PartialState", lambda: state)
        monkeypatch.setattr(processes, "gather_object", gather)
        return processes.in_batches(work, batches, [2, 3, 1], True, "")

    for index in range(count):
        part(index, lambda pairs: shares.append(pairs) or pairs)
    assert sum(map(len, shares)) == 6 and all(map(len, shares))
    everything = sum(shares, [])
    assert part(0, lambda pairs: everything) == [f"row {row}" for row in range(6)]


def test_the_rows_of_a_batch_fill_half_of_the_free_memory_and_are_256_at_most(monkeypatch):
    model = tiny_model("qwen3")  # 2 layers, 2 key-value heads of 8 float32: 256 bytes a position
    free = SimpleNamespace(available=2 * 256 * 50 * 30)
    monkeypatch.setattr(sequences.psutil, "virtual_memory", lambda: free)
    assert sequences.rows_that_fit(model, 50) == 30
    assert sequences.rows_that_fit(model, 50, processes=2) == 15
    assert sequences.rows_that_fit(model.to(torch.bfloat16), 50) == 60
    assert sequences.rows_that_fit(model, 5) == 256 and sequences.rows_that_fit(model, 10**6) == 1


def test_acting_in_the_environment_follows_the_physics(world, grounded, mixed):
    model, tokenizer, _ = grounded
    goals, states = mixed
    before = states.copy()
    given = (model, tokenizer, world, goals, world.observe(states))
    records = rollout.generate_all(*given, states=states, max_steps=6, batch_size=9)
    assert (states == before).all()
    for goal, state, record in zip(goals, states, records):
        path, actions, played = record["observations"], record["actions"], record["states"]
        np.testing.assert_array_equal(played[0], state)
        np.testing.assert_array_equal(world.step_batch(played[:-1], actions), played[1:])
        np.testing.assert_array_equal(world.observe(played), path)
        judged = world.success([goal] * len(actions), path[:-1], path[1:], actions)
        assert not judged[:-1].any() and judged[-1] == record["success"]
        assert record["success"] or len(actions) == (1 if goal.kind == "step" else 6)


# ------------------------------------------------------------------ rounds


def imagine(world, grounded, level, work, rollouts, **options):
    model, tokenizer, _ = grounded
    few = {"starts_per_goal": 3, "step_starts": 2, "temperatures": "1,1,2", "imagined_steps": 4}
    few |= {"candidates": 3, "step_candidates": 6}
    settings = rollout.ImagineArguments(**{**few, **options})
    split = "train" if level == "offline" else "test"
    goals = world.sample_goals(level, split, 5, np.random.default_rng(2))
    visited = np.concatenate([record["observations"] for record in rollouts])
    given = (model, tokenizer, world, level, goals, visited, settings, [0, 1])
    return goals, rollout.imagine_rounds(*given, work)


@pytest.mark.parametrize("level, starts", [("offline", 1), ("rephrase", 3), ("easy", 2)])
def test_each_goal_has_its_starts_and_later_rounds_the_starts_without_a_match(
    world, grounded, rollouts, tmp_path, level, starts
):
    goals, rounds = imagine(world, grounded, level, tmp_path, rollouts, visited_share=0.5)
    texts = [record["goal"] for record in rounds[0]]
    assert texts == [goal.text for goal in goals for _ in range(starts)]
    assert len(rounds) == (1 if level == "offline" else 3)
    start = lambda record: (record["goal"], record["observations"][0].tolist())
    for earlier, later in zip(rounds, rounds[1:]):
        missed = [start(record) for record in earlier if not record["success"]]
        assert [start(record) for record in later] == missed
    seen = {obs.tobytes() for record in rollouts for obs in record["observations"]}
    visited = [r["observations"][0].tobytes() in seen for r in rounds[0]]
    assert any(visited) == (level != "offline") and not all(visited)


def test_a_goal_of_one_action_is_not_tried_again_after_all_its_actions(
    world, grounded, rollouts, tmp_path
):
    _, rounds = imagine(world, grounded, "easy", tmp_path, rollouts, step_candidates=40)
    assert len(rounds) == 2 and not all(record["success"] for record in rounds[1])


def test_a_finished_round_is_kept_and_read_instead_of_imagined_again(
    world, grounded, rollouts, tmp_path, monkeypatch
):
    _, rounds = imagine(world, grounded, "hard", tmp_path, rollouts, self_check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hard-0", "hard-1", "hard-2"]
    assert same_rollouts(read_rollouts(tmp_path / "hard-2", world), rounds[2])
    imagined = []
    generate = rollout.generate

    def counting(*args, **options):
        imagined.append(len(args[3]))
        return generate(*args, **options)

    monkeypatch.setattr(rollout, "generate", counting)
    (tmp_path / "hard-2").rename(tmp_path / "lost")
    _, again = imagine(world, grounded, "hard", tmp_path, rollouts, self_check=True)
    assert sum(imagined) == len(rounds[2])
    for old, new in zip(rounds, again, strict=True):
        assert same_rollouts(old, new)
        assert [r["explanation"] for r in old] == [r["explanation"] for r in new]
        assert [r["claims"].tolist() for r in old] == [r["claims"].tolist() for r in new]
