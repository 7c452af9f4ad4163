"""Offline RL: losses and updates by hand, buffers and batches, relabelling, goal encodings, policies on disk."""
import numpy as np
import pytest
import torch

import env
import rl
from data import llm

TEXTS = ["Put red behind blue.", "Move green left.", "Gather all balls."]


def toy_table(width=4):
    return rl.GoalTable(TEXTS, torch.randn(len(TEXTS), width, generator=torch.Generator().manual_seed(0)))


def toy_record(obs, actions, rewards, success, text=TEXTS[0]):
    return {"goal": text, "observations": np.asarray(obs, np.float32), "actions": np.array(actions),
            "rewards": np.asarray(rewards, np.float32), "success": success}


def random_records(n, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 5, n)
    return [toy_record(rng.normal(0, 0.3, (t + 1, 10)), rng.integers(40, size=t), rng.normal(0, 50, t), bool(rng.random() < 0.5),
                          TEXTS[i % 3]) for i, t in enumerate(lengths)]


# ------------------------------------------------------------------------------------------------------------ updates

def forward(layers, x):
    """Activations before each layer, and the output, of an MLP [(w, b), ...] in float64."""
    seen = []
    for i, (w, b) in enumerate(layers):
        seen.append(x)
        x = x @ w + b
        if i < len(layers) - 1:
            x = np.maximum(x, 0)
    return seen, x


def backward(layers, seen, slope):
    """Gradients of every w and b from the slope of the loss at the output."""
    gradients = []
    for (w, _), x in zip(layers[::-1], seen[::-1]):
        gradients.insert(0, (x.T @ slope, slope.sum(0, keepdims=True)))
        slope = (slope @ w.T) * (x > 0)
    return gradients


def by_hand(algorithm, config, seed_index, batches, start, table):
    """Train one seed with numpy: double-DQN target, conservative loss or cross entropy, AdamW, cosine, Polyak."""
    layers = [(w[seed_index].astype(float), b[seed_index].astype(float)) for w, b in start]
    target, mean, square = [tuple(x.copy() for x in wb) for wb in layers], 0, 0
    for step, batch in enumerate(batches):
        obs, goal, action, reward, next_obs, done = (x[seed_index].numpy().astype(float) for x in batch)
        goal, action, rows = goal.astype(int), action.astype(int), np.arange(len(obs))
        seen, q = forward(layers, np.hstack([obs / 0.3, table[goal]]))
        chances = np.exp(q) / np.exp(q).sum(1, keepdims=True)
        slope = (chances - np.eye(40)[action]) / len(obs)  # of the cross entropy, and of logsumexp Q - Q(a)
        if algorithm == "cql":
            ahead = np.hstack([next_obs / 0.3, table[goal]])
            best = forward(layers, ahead)[1].argmax(1)
            wanted = config.reward_scale * reward + config.discount * (1 - done) * forward(target, ahead)[1][rows, best]
            slope *= config.conservative_weight
            slope[rows, action] += 2 * (q[rows, action] - wanted) / len(obs)
        layers, mean, square = adamw(layers, backward(layers, seen, slope), mean, square, step, config)
        target = polyak(target, layers, config)
    return layers


def adamw(layers, gradients, mean, square, step, config):
    """One step down the gradients with the cosine's learning rate: the new layers and moments."""
    gradient = np.concatenate([g.ravel() for wb in gradients for g in wb])
    mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient ** 2
    change = (mean / (1 - 0.9 ** (step + 1))) / (np.sqrt(square / (1 - 0.999 ** (step + 1))) + 1e-8)
    lr, used, stepped = config.lr * (1 + np.cos(np.pi * step / config.steps)) / 2, 0, []
    for wb in layers:
        new = []
        for x in wb:
            new.append(x - lr * config.weight_decay * x - lr * change[used:used + x.size].reshape(x.shape))
            used += x.size
        stepped.append(tuple(new))
    return stepped, mean, square


def polyak(target, layers, config):
    return [tuple(t + config.target_update * (x - t) for t, x in zip(*pair)) for pair in zip(target, layers)]


def iql_by_hand(config, seed_index, batches, start, table):
    """Train one seed's policy with numpy: expectile regression of V, Q to r + gamma V, weighted imitation."""
    policy, critic, value = ([(w[seed_index].astype(float), b[seed_index].astype(float)) for w, b in of] for of in start)
    target, moments = critic, [(0, 0)] * 3
    for step, batch in enumerate(batches):
        obs, goal, action, reward, next_obs, done = (x[seed_index].numpy().astype(float) for x in batch)
        goal, action, rows = goal.astype(int), action.astype(int), np.arange(len(obs))
        now, ahead = np.hstack([obs / 0.3, table[goal]]), np.hstack([next_obs / 0.3, table[goal]])
        (seen_policy, logits), (seen_q, q), (seen_v, v) = (forward(layers, now) for layers in (policy, critic, value))
        advantage = forward(target, now)[1][rows, action] - v[:, 0]
        times = [min(np.exp(config.advantage_weight * a), 100) for a in advantage]
        policy_slope = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(40)[action]) * np.array(times)[:, None] / len(obs)
        q_slope = np.zeros_like(q)
        wanted = config.reward_scale * reward + config.discount * (1 - done) * forward(value, ahead)[1][:, 0]
        q_slope[rows, action] = 2 * (q[rows, action] - wanted) / len(obs)
        v_slope = np.array([-2 * (config.expectile if a > 0 else 1 - config.expectile) * a for a in advantage])[:, None] / len(obs)
        stepped = []
        for i, (layers, seen, slope) in enumerate(((policy, seen_policy, policy_slope), (critic, seen_q, q_slope), (value, seen_v, v_slope))):
            layers, *moments[i] = adamw(layers, backward(layers, seen, slope), *moments[i], step, config)
            stepped.append(layers)
        policy, critic, value = stepped
        target = polyak(target, critic, config)
    return policy


@pytest.mark.parametrize("algorithm", ("bc", "cql", "iql"))
def test_updates_equal_the_ones_computed_by_hand(algorithm):
    table, seeds = toy_table(), [3, 8]
    real, imaginary = (rl.Buffer(random_records(9, seed), table) for seed in (0, 1))
    config = rl.RLConfig(steps=3, batch=12, lr=0.02, width=8, weight_decay=0.1, discount=0.9, conservative_weight=0.7, reward_scale=0.02,
                         target_update=0.3, expectile=0.8, advantage_weight=4)
    start, value = ([(w.detach().numpy(), b.detach().numpy()) for w, b in zip(first.weights, first.biases)]
                    for first in (rl.SeededMLP(seeds, [14, 8, 8, outputs]) for outputs in (40, 1)))
    generator = torch.Generator().manual_seed(sum(seeds) + 17)
    batches = [rl.sample_batch(real, [imaginary], 12, 2, 0.5, generator) for _ in range(3)]
    network, curve = rl.learn(algorithm, real, [imaginary], table.table, seeds, config)
    assert [step for step, *_ in curve] == [0, 1, 2]
    for seed_index in range(2):
        inputs = config, seed_index, batches, table.table.numpy().astype(float)
        expected = iql_by_hand(*inputs[:3], (start, start, value), inputs[3]) if algorithm == "iql" else by_hand(
            algorithm, *inputs[:3], start, inputs[3])
        for layer, (w, b) in enumerate(expected):
            np.testing.assert_allclose(network.weights[layer][seed_index].detach(), w, atol=2e-5)
            np.testing.assert_allclose(network.biases[layer][seed_index].detach(), b, atol=2e-5)


def test_losses_of_two_transitions_solved_on_paper():
    q = torch.tensor([[[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]]])                     # one seed, two transitions, three actions
    next_q, next_q_target = torch.tensor([[[0.0, 5.0, 1.0]] * 2]), torch.tensor([[[9.0, 2.0, 7.0]] * 2])
    action, reward, done = torch.tensor([[1, 0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 1.0]])
    # targets: 3 + .5 * Q_target(s', argmax Q(s') = 1) = 4, and 4 at the end; errors 2 - 4 and 0 - 4
    assert rl.bellman_loss(q, next_q, next_q_target, action, reward, done, 0.5).tolist() == [(4 + 16) / 2]
    expected = ((np.log(np.e + np.e ** 2 + 1) - 2) + np.log(3)) / 2
    assert rl.conservative_loss(q, action).tolist() == pytest.approx([expected])
    assert rl.imitation_loss(q, action).tolist() == pytest.approx([expected])


def test_the_value_that_an_expectile_loss_settles_on_solved_on_paper():
    # over Q = 0, 0, 4 the 0.8-expectile solves .8 (4 - v) = .2 (v + v), so v = 8/3; the 0.5-expectile is their mean
    q = torch.tensor([[0.0, 0.0, 4.0]] * 2)
    v, expectile = torch.tensor([[8 / 3], [4 / 3]], requires_grad=True), torch.tensor([[0.8], [0.5]])
    loss = rl.expectile_loss(q - v, expectile)
    assert loss.tolist() == pytest.approx([(0.2 * 2 * (8 / 3) ** 2 + 0.8 * (4 / 3) ** 2) / 3, 0.5 * (2 * 16 / 9 + 64 / 9) / 3])
    loss.sum().backward()
    np.testing.assert_allclose(v.grad, np.zeros((2, 1)), atol=1e-6)


def test_better_actions_are_imitated_more_and_none_more_than_a_hundred_times():
    logits, action = torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]])
    loss = rl.advantage_weighted_loss(logits, action, torch.tensor([[0.0, np.log(2) / 5, 9.0]]), 5.0)
    assert loss.tolist() == pytest.approx([np.log(4) * (1 + 2 + 100) / 3], rel=1e-5)


def test_seeds_train_together_but_apart():
    table = toy_table()
    network, _ = rl.learn("cql", rl.Buffer(random_records(9), table), [], table.table, [0, 1], rl.RLConfig(steps=4, batch=16, width=6))
    assert [tuple(w.shape) for w in network.weights] == [(2, 14, 6), (2, 6, 6), (2, 6, 40)]
    x = torch.randn(2, 5, 14)
    with torch.no_grad():
        together, = network(x[..., 10:], x[..., :10])
        for seed in range(2):
            _, alone = forward([(w[seed].numpy(), b[seed].numpy()) for w, b in zip(network.weights, network.biases)], x[seed].numpy())
            np.testing.assert_allclose(together[seed], alone, rtol=1e-4, atol=1e-5)
    assert not torch.equal(network.weights[0][0], network.weights[0][1])
    same = rl.SeededMLP([1, 0], [14, 6, 40]), rl.SeededMLP([0, 1], [14, 6, 40])
    assert torch.equal(same[0].weights[0][0], same[1].weights[0][1])  # a seed's start does not depend on its company


def accuracy(algorithm, records, wanted, obs, **options):
    """How often the policy learned from records picks the wanted action."""
    table = toy_table()
    network, _ = rl.learn(algorithm, rl.Buffer(records, table), [], table.table, [0], rl.RLConfig(batch=64, width=32, lr=3e-3, **options))
    return (rl.policy_of(network, 0, table.table, np.zeros(len(obs), int))(obs, np.arange(len(obs))) == wanted).mean()


@pytest.mark.parametrize("bf16", (False, True))
def test_bc_imitates_and_cql_and_iql_prefer_what_is_rewarded(bf16):
    rng = np.random.default_rng(0)
    obs = rng.uniform(-0.5, 0.5, (600, 10)).astype(np.float32)
    good = np.where(obs[:, 0] > 0, 3, 8)
    taken = np.where(rng.random(600) < 0.4, good, 20)
    mixed = [toy_record([o, o], [a], [100.0 if a != 20 else 0.0], a != 20) for o, a in zip(obs, taken)]
    clean = [toy_record([o, o], [a], [0.0], False) for o, a in zip(obs, good)]
    assert accuracy("bc", clean, good, obs, steps=300, bf16=bf16) > 0.95
    assert accuracy("bc", mixed, good, obs, steps=300, bf16=bf16) < 0.5  # most of the data does something else
    assert accuracy("cql", mixed, good, obs, steps=400, conservative_weight=0.1, discount=0.5, bf16=bf16) > 0.9
    assert accuracy("iql", mixed, good, obs, steps=400, discount=0.5, bf16=bf16) > 0.9


# ------------------------------------------------------------------------------------------------------------ buffers

def test_a_balanced_buffer_draws_each_goal_alike_and_each_of_its_transitions_alike():
    records = [r for r in random_records(40) if r["goal"] != TEXTS[2]] + random_records(3)[2:]
    for balanced in (False, True):
        buffer = rl.Buffer(records, toy_table(), balanced=balanced)
        rows = buffer.draw((2, 20000), torch.Generator().manual_seed(0))
        assert rows.shape == (2, 20000)
        drawn = torch.bincount(rows.flatten(), minlength=len(buffer)) / rows.numel()
        sizes = torch.bincount(buffer.goal)
        expected = 1 / (3 * sizes[buffer.goal]) if balanced else torch.full((len(buffer),), 1 / len(buffer))
        assert sizes.max() > 5 * sizes.min()
        torch.testing.assert_close(drawn, expected, rtol=0.25, atol=1e-3)


def test_balancing_and_dropping_keep_transitions_whole():
    records = random_records(30)
    for r in records:
        r["dynamics_error"] = np.abs(r["observations"][:-1, 0])

    def transitions(buffer):
        return sorted(tuple(torch.cat([x.reshape(1, -1).float() for x in buffer.take(torch.tensor(i))], 1)[0].tolist())
                      for i in range(len(buffer)))
    plain, balanced = (rl.Buffer(records, toy_table(), balanced=b) for b in (False, True))
    assert transitions(plain) == transitions(balanced) and len(plain) == sum(len(r["actions"]) for r in records)
    believed = rl.Buffer(records, toy_table(), balanced=True, dynamics_tolerance=0.2)
    assert 0 < len(believed) < len(plain)
    assert transitions(believed) == [t for t in transitions(plain) if abs(t[0]) <= 0.2]


# -------------------------------------------------------------------------------------------------- buffers, batches

def test_a_buffer_lays_transitions_out_flat_and_is_done_at_successful_ends_only():
    table = toy_table()
    obs = np.arange(60, dtype=np.float32).reshape(6, 10)
    buffer = rl.Buffer([toy_record(obs[:4], [1, 2, 3], [5, 6, 100], True), toy_record(obs[4:], [4], [7], False, TEXTS[2])], table)
    assert len(buffer) == 4
    for found, expected in zip(buffer.take(torch.arange(4)), (
            obs[[0, 1, 2, 4]], [0, 0, 0, 2], [1, 2, 3, 4], [5, 6, 100, 7], obs[[1, 2, 3, 5]], [0, 0, 1, 0])):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("share, buffers, expected", [
    (0.5, 0, [10]), (0.5, 1, [5, 5]), (0.5, 2, [5, 2, 3]), (0.6, 3, [4, 2, 2, 2]), (0.0, 2, [10, 0, 0])])
def test_a_batch_is_real_and_imaginary_in_the_asked_shares(share, buffers, expected):
    table = toy_table()
    sources = [rl.Buffer(random_records(20, i), table) for i in range(buffers + 1)]
    for number, buffer in enumerate(sources):
        buffer.reward[:] = number
    batch = rl.sample_batch(sources[0], sources[1:], 10, 3, share, torch.Generator().manual_seed(0))
    assert [tuple(x.shape) for x in batch] == [(3, 10, 10), (3, 10), (3, 10), (3, 10), (3, 10, 10), (3, 10)]
    for row in batch[3]:
        assert [int((row == number).sum()) for number in range(buffers + 1)] == expected
    assert not torch.equal(batch[0][0], batch[0][1])  # each seed draws its own


# --------------------------------------------------------------------------------------------------------- relabelling

@pytest.fixture(scope="module")
def wandering(rollouts):
    """Real rollouts, many of them aimless, and novel goals."""
    rng = np.random.default_rng(5)
    goals = env.sample_goals("offline", "train", 150, rng)
    aimless = env.run_episodes(lambda obs, rows: rng.integers(40, size=len(rows)), goals, env.unfulfilled_states(rng, goals), max_steps=12)
    return rollouts + aimless, [g for level in env.NOVEL_LEVELS for g in env.sample_goals(level, "test", 12, rng)]


def chances(records, goal):
    """How many rollouts (for a step goal: transitions) come to fulfil a goal that their start does not."""
    found = 0
    for r in records:
        obs, nexts = r["observations"][:-1], r["observations"][1:]
        hits = env.success(goal, obs, nexts, r["actions"])
        if goal.kind == "step":
            found += hits.sum()
        else:
            found += bool(hits.any()) and not env.success(goal, obs[:1], obs[:1], r["actions"][:1])[0]
    return int(found)


def test_relabelled_rollouts_are_real_and_come_to_fulfil_their_new_goal(wandering):
    records, goals = wandering
    made = rl.relabel(records, goals, 150, np.random.default_rng(0))
    real = {o.tobytes() + bytes([a]) + n.tobytes() for r in records
            for o, a, n in zip(r["observations"][:-1], r["actions"], r["observations"][1:])}
    assert len(made) == 150 and {"step", "relation"} <= {r["kind"] for r in made}
    for r in made:
        goal, obs, nexts = env.goal_of(r), r["observations"][:-1], r["observations"][1:]
        judged = env.success(goal, obs, nexts, r["actions"])
        assert goal in goals and r["success"] and judged[-1] and not judged[:-1].any() and r["rewards"][-1] == 100
        assert goal.kind == "step" or not env.success(goal, obs[:1], obs[:1], r["actions"][:1])[0]
        assert all(o.tobytes() + bytes([a]) + n.tobytes() in real for o, a, n in zip(obs, r["actions"], nexts))


def test_relabelling_spreads_over_all_goals_that_some_rollout_fulfils(wandering):
    records, goals = wandering
    possible = {g.text: chances(records, g) for g in goals}
    for count in (20, 100, 10 ** 6):
        texts = [r["goal"] for r in rl.relabel(records, goals, count, np.random.default_rng(0))]
        made = {text: texts.count(text) for text in possible}
        assert len(texts) == min(count, sum(possible.values()))
        assert all(max(made.values()) - made[t] <= 1 or made[t] == possible[t] for t in possible)
    assert 0 in possible.values()  # the goals are not all easy


# ---------------------------------------------------------------------------------------------------- goals, policies

def test_text_encodings_are_token_means_whatever_the_batch():
    model, tokenizer = llm.tiny(0)
    texts = [g.text for level in env.NOVEL_LEVELS for g in env.sample_goals(level, "test", 9, np.random.default_rng(0))]
    encodings = rl.encode_texts(texts, model.base_model, tokenizer)
    assert encodings.shape == (27, 64) and encodings.dtype == torch.float32
    torch.testing.assert_close(rl.encode_texts(texts, model.base_model, tokenizer, batch_size=4), encodings, rtol=1e-4, atol=1e-5)
    for text, encoding in zip(texts, encodings):
        with torch.no_grad():
            hidden = model.base_model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
        torch.testing.assert_close(hidden.mean(0), encoding, rtol=1e-4, atol=1e-5)


def test_a_goal_table_is_standardised_by_its_training_texts_and_survives_the_disk(tmp_path):
    model, tokenizer = llm.tiny(0)
    rng = np.random.default_rng(0)
    training = [g.text for g in env.sample_goals("offline", "train", 40, rng)] * 2
    novel = [g.text for g in env.sample_goals("hard", "test", 5, rng)]
    table = rl.GoalTable.encode(training, novel, model.base_model, tokenizer)
    known = table.table[table.rows(sorted(set(training)))]
    np.testing.assert_allclose(known.mean(0), np.zeros(64), atol=1e-4)
    np.testing.assert_allclose(known.std(0), np.ones(64), atol=1e-2)
    table.save(tmp_path / "goals.safetensors")
    loaded = rl.GoalTable.load(tmp_path / "goals.safetensors")
    assert torch.equal(loaded.table, table.table) and loaded.index == table.index and len(loaded.table) == len({*training, *novel})


def test_policies_survive_the_disk_and_take_the_networks_best_action(tmp_path):
    table, network = toy_table(), rl.SeededMLP([5, 2], [14, 6, 6, 40])
    rl.save_policy(tmp_path / "cql.safetensors", network, [5, 2], "cql", rl.RLConfig())
    loaded, seeds = rl.load_policy(tmp_path / "cql.safetensors")
    assert seeds == [5, 2] and [p.name for p in tmp_path.iterdir()] == ["cql.safetensors"]
    obs, goals = np.random.default_rng(0).normal(0, 0.3, (9, 10)).astype(np.float32), np.arange(9) % 3
    with torch.no_grad():
        x = torch.cat([rl.scaled(torch.from_numpy(obs)), table.table[goals]], -1).expand(2, -1, -1)
        best = network(x[..., 10:], x[..., :10])[0].argmax(-1).numpy()
    assert (best[0] != best[1]).any()
    for seed in range(2):
        act = rl.policy_of(loaded, seed, table.table, goals)
        assert (act(obs, np.arange(9)) == best[seed]).all()
        assert (act(obs[[7, 2]], np.array([7, 2])) == best[seed][[7, 2]]).all()  # the rows of those that still run
