"""The sampling loop against a slow twin without a cache; judging of imagined rollouts; rollouts on disk."""
import datasets
import numpy as np
import pytest
import torch
from test_model import TINY_LLMS, tiny_model

import env
import rollout
from data import llm
from data.rollouts import FEATURES, OPTIONAL
from env import Goal
from ground import PROMPTS
from model import ACTION, STATE, TEXT


@pytest.fixture(scope="module")
def mixed(rollouts):
    """Goals of all kinds and starts (24, 69), half of them seen in training: prompts and rollouts of many lengths."""
    rng = np.random.default_rng(21)
    known = rollouts[:24:2]
    goals = [env.goal_of(r) for r in known] + [g for level in env.NOVEL_LEVELS for g in env.sample_goals(level, "test", 4, rng)]
    return goals, np.concatenate([[r["states"][0] for r in known], env.initial_states(rng, 12)])


def slow_rollout(model, tokenizer, goal, obs, max_steps, candidates=1):
    """Twin of greedy `generate`: one goal, and the whole sequence again for every new position, without a cache."""
    ids = tokenizer(PROMPTS["generation"].format(goal=goal.text), add_special_tokens=False)["input_ids"]
    sequence = [(TEXT, i, torch.zeros(10)) for i in ids] + [(STATE, 0, torch.as_tensor(obs))]

    def run(*more):
        modality, index, states = zip(*sequence, *more)
        with torch.no_grad():
            return model(torch.tensor([index]), torch.tensor([modality]), torch.stack(states)[None])
    path, actions = [sequence[-1][2]], []
    while len(actions) < max_steps:
        outcomes = []  # fulfilled, then the least potential, then the likelier action
        for rank, action in enumerate(run().action_logits[0, -1].argsort(descending=True)[:candidates].tolist()):
            imagined = run((ACTION, action, path[-1])).state_pred[0, -1]
            before, after = path[-1].numpy()[None], imagined.numpy()[None]
            good = bool(env.success(goal, before, after, np.array([action]), imagined=True)[0])
            outcomes.append((not good, env.potential(goal, after)[0], rank, action, imagined))
        missed, _, _, action, imagined = min(outcomes, key=lambda outcome: outcome[:3])
        actions.append(action)
        sequence += [(ACTION, action, path[-1]), (STATE, 0, imagined)]
        path.append(imagined)
        if not missed or goal.kind == "step":
            break
    return torch.stack(path).numpy(), actions


def same_rollouts(some, others):
    return all((a["actions"].tolist(), a["observations"].tolist()) == (b["actions"].tolist(), b["observations"].tolist())
               for a, b in zip(some, others, strict=True))


def test_greedy_rollouts_with_a_cache_equal_the_slow_twins(grounded, mixed):
    model, tokenizer, _ = grounded
    goals, states = mixed
    prompts = {len(tokenizer(g.text)["input_ids"]) for g in goals}
    records = rollout.generate(model, tokenizer, goals, env.observe(states), max_steps=8)
    assert len(prompts) > 4 and len({len(r["actions"]) for r in records}) >= 3  # rows leave the batch at different steps
    for goal, obs, record in zip(goals, env.observe(states), records):
        path, actions = slow_rollout(model, tokenizer, goal, obs, 8)
        assert record["actions"].tolist() == actions
        np.testing.assert_allclose(record["observations"], path, atol=1e-4)


@pytest.mark.parametrize("name", TINY_LLMS)
def test_every_architecture_imagines_with_a_cache_as_without(name, mixed):
    goals, states = mixed
    model, tokenizer = tiny_model(name, embedding_scale=7.0), llm.tiny(0)[1]
    assert len(tokenizer) <= model.config.backbone_config.vocab_size
    records = rollout.generate(model, tokenizer, goals[::4], env.observe(states[::4]), max_steps=6)
    for goal, obs, record in zip(goals[::4], env.observe(states[::4]), records):
        path, actions = slow_rollout(model, tokenizer, goal, obs, 6)
        assert record["actions"].tolist() == actions
        np.testing.assert_allclose(record["observations"], path, atol=1e-4)
    assert rollout.explain(model, tokenizer, records[:2], max_tokens=6) == [
        slow_explanation(model, tokenizer, r, PROMPTS["explanation"], 6) for r in records[:2]]
    tried = rollout.generate_all(model, tokenizer, goals[1::4], env.observe(states[1::4]), candidates=3, max_steps=3)
    for goal, obs, record in zip(goals[1::4], env.observe(states[1::4]), tried, strict=True):
        path, actions = slow_rollout(model, tokenizer, goal, obs, 3, candidates=3)
        assert record["actions"].tolist() == actions
        np.testing.assert_allclose(record["observations"], path, atol=1e-4)


def test_imagined_rows_end_at_their_first_success_and_step_goals_after_one_action(grounded, mixed):
    model, tokenizer, _ = grounded
    goals, states = mixed
    records = rollout.generate(model, tokenizer, goals, env.observe(states), temperature=1.0, max_steps=12)
    for goal, r in zip(goals, records):
        judged = env.success(goal, r["observations"][:-1], r["observations"][1:], r["actions"], imagined=True)
        assert not judged[:-1].any() and judged[-1] == r["success"] and env.goal_of(r) == goal
        assert len(r["actions"]) == 1 if goal.kind == "step" else r["success"] or len(r["actions"]) == 12
        rewards = env.reward(goal, r["observations"][:-1], r["observations"][1:], r["actions"], imagined=True)
        np.testing.assert_allclose(r["rewards"], rewards, rtol=1e-4)
    assert {r["success"] for r in records if r["kind"] != "step"} == {True, False}


def test_sampling_repeats_with_its_seed_only(grounded, mixed):
    model, tokenizer, _ = grounded
    goals, states = mixed
    runs = [rollout.generate(model, tokenizer, goals, env.observe(states), temperature=1.0, max_steps=4, seed=s) for s in (1, 1, 2)]
    assert same_rollouts(runs[0], runs[1]) and not same_rollouts(runs[0], runs[2])


def test_of_several_candidates_the_reward_picks_the_best_imagined_outcome(grounded, mixed):
    model, tokenizer, _ = grounded
    goals, starts = mixed[0], env.observe(mixed[1])
    counts = np.where([g.kind == "step" for g in goals], 40, 5)
    records = rollout.generate_all(model, tokenizer, goals, starts, candidates=counts, batch_size=60, max_steps=4)
    for goal, obs, count, record in zip(goals, starts, counts, records, strict=True):
        path, actions = slow_rollout(model, tokenizer, goal, obs, 4, count)
        assert record["actions"].tolist() == actions and env.goal_of(record) == goal
        np.testing.assert_allclose(record["observations"], path, atol=1e-4)
    plain = rollout.generate_all(model, tokenizer, goals, starts, max_steps=4)
    assert sum(r["success"] for r in records) > sum(r["success"] for r in plain)
    hot = [rollout.generate_all(model, tokenizer, goals, starts, candidates=5, max_steps=4, temperature=5.0, seed=s) for s in (1, 1, 2)]
    assert same_rollouts(hot[0], hot[1]) and not same_rollouts(hot[0], hot[2])


def test_sampled_candidates_differ_and_follow_their_probabilities():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).log_softmax(-1).expand(20000, 4)
    drawn = rollout.sample_actions(logits, 1.0, torch.Generator().manual_seed(0), 2)
    assert (drawn[:, 0] != drawn[:, 1]).all()
    shares = torch.bincount(drawn[:, 0], minlength=4) / 20000
    np.testing.assert_allclose(shares, logits[0].exp(), atol=0.015)
    assert rollout.sample_actions(logits[:1], 0, None, 3).tolist() == [[0, 1, 2]]


def test_batches_do_not_change_greedy_rollouts_nor_their_order(grounded, mixed):
    model, tokenizer, _ = grounded
    goals, states = mixed
    whole = rollout.generate(model, tokenizer, goals, env.observe(states), max_steps=5)
    batched = rollout.generate_all(model, tokenizer, goals, env.observe(states), batch_size=7, max_steps=5)
    for a, b in zip(whole, batched, strict=True):
        assert a["actions"].tolist() == b["actions"].tolist() and a["goal"] == b["goal"]
        np.testing.assert_allclose(a["observations"], b["observations"], atol=1e-4)


def test_acting_in_the_environment_follows_the_physics(grounded, mixed):
    model, tokenizer, _ = grounded
    goals, states = mixed
    before = states.copy()
    records = rollout.generate_all(model, tokenizer, goals, env.observe(states), states=states, max_steps=6, batch_size=9)
    assert (states == before).all()
    for goal, state, r in zip(goals, states, records):
        np.testing.assert_array_equal(r["states"][0], state)
        np.testing.assert_array_equal(env.step_batch(r["states"][:-1], r["actions"]), r["states"][1:])
        np.testing.assert_array_equal(env.observe(r["states"]), r["observations"])
        judged = env.success(goal, r["observations"][:-1], r["observations"][1:], r["actions"])
        assert not judged[:-1].any() and judged[-1] == r["success"]
        assert r["success"] or len(r["actions"]) == (1 if goal.kind == "step" else 6)


# ----------------------------------------------------------------------------------------------- the model's own view

def slow_explanation(model, tokenizer, record, prompt, max_tokens):
    """Twin of `explain`: one rollout, and the whole sequence again for every new token, without a cache."""
    path, actions, nothing = torch.as_tensor(record["observations"]), record["actions"].tolist(), torch.zeros(10)
    sequence = [(TEXT, i, nothing) for i in tokenizer(prompt, add_special_tokens=False)["input_ids"]] + [(STATE, 0, path[0])]
    for t, action in enumerate(actions):
        sequence += [(ACTION, action, path[t]), (STATE, 0, path[t + 1])]
    said = []
    while len(said) < max_tokens:
        modality, index, states = zip(*sequence)
        with torch.no_grad():
            logits = model(torch.tensor([index]), torch.tensor([modality]), torch.stack(states)[None], text_logits=1).logits
        said.append(int(logits[0, -1].argmax()))
        if said[-1] == tokenizer.eos_token_id:
            return tokenizer.decode(said[:-1]).strip()
        sequence.append((TEXT, said[-1], nothing))
    return tokenizer.decode(said).strip()


def test_explanations_equal_the_slow_twins(grounded, rollouts):
    model, tokenizer, _ = grounded
    for prompt in (PROMPTS["explanation"], "Explain the rollout."):
        said = rollout.explain(model, tokenizer, rollouts[::12], prompt, max_tokens=12, batch_size=6)
        assert said == [slow_explanation(model, tokenizer, r, prompt, 12) for r in rollouts[::12]]
    assert len(set(said)) > 1


def test_the_dynamics_check_compares_with_each_transition_asked_alone(grounded, rollouts):
    model, tokenizer, _ = grounded
    records = rollouts[:9]
    prompt = tokenizer(PROMPTS["dynamics"], add_special_tokens=False)["input_ids"]
    for record, errors in zip(records, rollout.dynamics_error(model, tokenizer, records, rollouts_a_row=4), strict=True):
        path = torch.as_tensor(record["observations"])
        for t, action in enumerate(record["actions"].tolist()):
            ids, modality = torch.tensor([[*prompt, 0, action]]), torch.tensor([[TEXT] * len(prompt) + [STATE, ACTION]])
            states = torch.zeros(1, len(prompt) + 2, 10)
            states[0, -2:] = path[t]
            with torch.no_grad():
                predicted = model(ids, modality, states).state_pred[0, -1]
            gap = (predicted - path[t + 1]).reshape(5, 2).norm(dim=1).max()
            assert errors[t] == pytest.approx(gap.item(), abs=1e-4)


def test_explanations_are_right_by_part_and_true_of_the_final_state():
    goal = Goal("Put red left of blue.", relations=((0, 1, 1),))
    final = np.array([-0.3, 0.2, 0, 0.2, 0.02, -0.1, 0.4, 0.5, 0.4, -0.1], np.float32)  # red left of blue, green in front of blue
    record = env.rollout_record(goal, np.array([final, final]), np.array([0]))
    said = ["The red ball is near the blue ball, to the left of it.", "The green ball is near the blue ball, in front of it.",
            "The red ball is near the cyan ball, behind it.", "A fine rollout."]
    assert rollout.explanation_accuracy([record] * 4, said) == {
        "source": 2 / 4, "target": 2 / 4, "direction": 1 / 4, "exact": 1 / 4, "holds": 2 / 4}


# ------------------------------------------------------------------------------------------------------------ quality

def test_quality_of_hand_made_rollouts():
    scene = np.array([-0.4, 0.5, 0.4, 0.5, 0, 0.2, -0.4, -0.1, 0.4, -0.1], np.float32)  # far apart; green in the middle

    def record(goal, actions, *changes):
        """Imagined: each change moves ball k by (dx, dy)."""
        path = [scene]
        for ball, dx, dy in changes:
            path.append(path[-1].copy())
            path[-1][2 * ball:2 * ball + 2] += (dx, dy)
        return env.rollout_record(goal, np.array(path), np.array(actions), imagined=True)
    left = Goal("Move green left.", "easy", "step", ((2, None, 1),))
    near = Goal("Green right of blue.", "easy", "relation", ((2, 1, 3),))
    records = [record(left, [18], (2, -0.2, 0)),               # pushes left, goes left: match, and so in the physics
               record(left, [18], (2, -0.1, 0)),               # pushes left, hardly moves: only the action matches
               record(left, [16], (2, 1.0, 0)),                # pushes right, and jumps off the table
               record(near, [0, 8], (0, 0.1, 0), (2, 0.55, 0.4))]  # jumps right of blue: match, but not in the physics
    assert [r["success"] for r in records] == [True, False, False, True]
    assert rollout.quality(records) == pytest.approx({
        "rollouts": 4, "match": 2 / 4, "executed": 2 / 4, "executed_of_matched": 1 / 2, "actions": 5 / 4, "off_table": 1 / 5,
        "beyond_dynamics": 2 / 5, "action_match": 2 / 3})
    assert "action_match" not in rollout.quality(records[3:])
    words, errors = ("Green went left.", "Red went left.", "Green, red.", "Green beside red."), ([0], [0.2], [0], [0, 0.3])
    for r, said, error in zip(records, words, errors):
        r.update(explanation=said, dynamics_error=np.array(error))
    figures = rollout.quality(records)
    assert [figures[k] for k in ("explained", "match_of_explained", "dynamics_error")] == pytest.approx([2 / 4, 1 / 2, 0.1])


# ------------------------------------------------------------------------------------------------------------ on disk

def test_rollouts_survive_the_disk(tmp_path, rollouts):
    rng = np.random.default_rng(0)
    goals = env.sample_goals("easy", "test", 3, rng) + env.sample_goals("hard", "test", 20, rng)
    imagined = [env.rollout_record(g, rng.normal(size=(3, 10)).astype(np.float32), rng.integers(40, size=2), imagined=True) for g in goals]
    for number, r in enumerate(imagined):
        r.update(explanation=f"Text {number}.", dynamics_error=rng.random(2, np.float32))
    for records in (rollouts[:5], imagined, rollouts[5:9]):  # the last one replaces the one before
        rollout.write_rollouts(tmp_path / "rows", records)
        for ours, read in zip(records, rollout.read_rollouts(tmp_path / "rows"), strict=True):
            assert env.goal_of(read) == env.goal_of(ours) and read["success"] == ours["success"]
            for key in ("observations", "actions", "rewards"):
                np.testing.assert_array_equal(read[key], ours[key])
                assert read[key].dtype == ours[key].dtype
            assert read["explanation"] == ours.get("explanation")
            np.testing.assert_array_equal(read["dynamics_error"], ours.get("dynamics_error"))
    states = datasets.load_from_disk(str(tmp_path / "rows"))["states"]
    np.testing.assert_array_equal(np.array(states[0]), rollouts[5]["states"])
    assert [p.name for p in tmp_path.iterdir()] == ["rows"]


DAMAGE = {  # what happens to row 2; what the message names
    "short row": (lambda r: r["observations"].pop(), "row 2: observations"),
    "narrow observation": (lambda r: [o.pop() for o in r["observations"]], "row 2: observations"),
    "ragged observation": (lambda r: r["observations"][0].pop(), "row 2"),
    "NaN observation": (lambda r: r["observations"][0].__setitem__(3, float("nan")), "row 2: observations"),
    "infinite reward": (lambda r: r["rewards"].__setitem__(0, float("inf")), "row 2: rewards"),
    "missing reward": (lambda r: r["rewards"].pop(), "row 2: rewards"),
    "action too large": (lambda r: r["actions"].__setitem__(0, 40), "row 2: actions"),
    "negative action": (lambda r: r["actions"].__setitem__(0, -1), "row 2: actions"),
    "no action": (lambda r: r.update(observations=r["observations"][:1], actions=[], rewards=[]), "row 2.*action"),
    "empty cell": (lambda r: r.update(observations=None), "row 2"),
    "unknown level": (lambda r: r.update(level="heroic"), "row 2.*heroic"),
    "unknown colour": (lambda r: r["relations"][0].__setitem__(0, "mauve"), "row 2.*mauve"),
    "empty success": (lambda r: r.update(success=None), "row 2: success"),
}


def plain_rows(records):
    keys = [k for k in FEATURES if k not in OPTIONAL]
    return [{k: np.array(r[k]).tolist() if k in ("observations", "actions", "rewards") else r[k] for k in keys} for r in records]


def copied(row):
    return {k: [list(x) if isinstance(x, list) else x for x in v] if isinstance(v, list) else v for k, v in row.items()}


@pytest.mark.parametrize("damage, named", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_row_is_refused_by_folder_row_and_field(tmp_path, rollouts, damage, named):
    rows = [copied(row) for row in plain_rows(rollouts[:4])]
    damage(rows[2])
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "rows"))
    with pytest.raises(ValueError, match=f"rows, {named}"):
        rollout.read_rollouts(tmp_path / "rows")


def test_a_dataset_without_a_column_or_rows_and_no_dataset_are_refused_by_name(tmp_path, rollouts):
    whole = datasets.Dataset.from_list(plain_rows(rollouts[:3]))
    for column in whole.column_names:
        whole.remove_columns(column).save_to_disk(str(tmp_path / column))
        with pytest.raises(ValueError, match=f"{column}: column '{column}'"):
            rollout.read_rollouts(tmp_path / column)
    whole.select([]).save_to_disk(str(tmp_path / "nothing"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("no dataset")
    for name in ("nothing", "folder", "file", "absent"):
        with pytest.raises(ValueError, match=name):
            rollout.read_rollouts(tmp_path / name)
