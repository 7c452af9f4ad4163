"""Offline RL: updates and losses by hand, snapshots, policies on disk, methods and options."""

import math
import re

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector
from transformers import HfArgumentParser

import rl
from data import finite
from data.policies import load_policy
from data.transitions import GoalTable
from experiment.evaluation import values_of

TEXTS = ["Put red behind blue.", "Move green left.", "Gather all balls."]
ACTIONS = 40
SCALE = 0.3  # of observations
LEARNED = ("bc", "cql", "iql", "awac")


def toy_table(width=4):
    table = torch.randn(len(TEXTS), width, generator=torch.Generator().manual_seed(0))
    return GoalTable(TEXTS, table)


def toy_record(obs, actions, rewards, success, text=TEXTS[0]):
    return {
        "goal": text,
        "observations": np.asarray(obs, np.float32),
        "actions": np.array(actions),
        "rewards": np.asarray(rewards, np.float32),
        "success": success,
    }


def random_records(n, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 5, n)
    return [
        toy_record(
            rng.normal(0, 0.3, (t + 1, 10)),
            rng.integers(ACTIONS, size=t),
            rng.normal(0, 50, t),
            bool(rng.random() < 0.5),
            TEXTS[i % 3],
        )
        for i, t in enumerate(lengths)
    ]


# ---------------------------------------------------------------------------------------- updates


def same_numbers(one, other):
    return all(torch.equal(*parts) for parts in zip(one.parts, other.parts))


def layers_of(network, seed_index=0):
    parts = [part[seed_index].detach().double().numpy() for part in network.parts]
    return list(zip(parts[::2], parts[1::2]))


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


def adamw(layers, gradients, mean, square, step, config):
    """One step down the gradients with the cosine's learning rate: the new layers and moments."""
    gradient = np.concatenate([g.ravel() for wb in gradients for g in wb])
    mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
    deviation = np.sqrt(square / (1 - 0.999 ** (step + 1))) + 1e-8
    change = mean / (1 - 0.9 ** (step + 1)) / deviation
    lr, used, stepped = config.lr * (1 + np.cos(np.pi * step / config.steps)) / 2, 0, []
    for wb in layers:
        new = []
        for x in wb:
            moved = lr * change[used : used + x.size].reshape(x.shape)
            new.append(x - lr * config.weight_decay * x - moved)
            used += x.size
        stepped.append(tuple(new))
    return stepped, mean, square


def softmax(x):
    return np.exp(x) / np.exp(x).sum(1, keepdims=True)


def by_hand(algorithm, config, seed_index, batches, networks, table):
    """The layers that act after some updates of {name: layers} in numpy, one seed."""
    moments, target = dict.fromkeys(networks, (0, 0)), networks["critic"]
    for step, batch in enumerate(batches):
        obs, goal, action, reward, next_obs, done = (x[seed_index].numpy() for x in batch)
        goal = np.repeat(goal, len(obs) // len(goal))
        now = np.hstack([obs / SCALE, table[goal]]).astype(float)
        ahead = np.hstack([next_obs / SCALE, table[goal]]).astype(float)
        n, rows, taken = len(obs), np.arange(len(obs)), np.eye(ACTIONS)[action]
        seen = {name: forward(layers, now)[0] for name, layers in networks.items()}
        logits, q, v = (forward(networks[x], now)[1] for x in ("policy", "critic", "value"))
        next_logits, next_q, next_v = (
            forward(networks[name], ahead)[1] for name in ("policy", "critic", "value")
        )
        next_target, slopes = forward(target, ahead)[1], {}
        if algorithm == "bc":
            slopes["policy"] = (softmax(logits) - taken) / n
        if algorithm == "cql":  # double DQN
            next_value = next_target[rows, next_q.argmax(1)]
        if algorithm == "iql":
            next_value = next_v[:, 0]
            advantage = forward(target, now)[1][rows, action] - v[:, 0]
            tau = np.where(advantage > 0, config.expectile, 1 - config.expectile)
            slopes["value"] = (-2 * tau * advantage / n)[:, None]
        if algorithm == "awac":
            next_value = (softmax(next_logits) * next_target).sum(1)
            advantage = q[rows, action] - (softmax(logits) * q).sum(1)
        if algorithm != "bc":
            wanted = config.reward_scale * reward + config.discount * (1 - done) * next_value
            slopes["critic"] = 2 * taken * (q[rows, action] - wanted)[:, None] / n
        if algorithm == "cql":
            slopes["critic"] += config.conservative_weight * (softmax(q) - taken) / n
        if algorithm in ("iql", "awac"):
            times = np.minimum(np.exp(config.advantage_weight * advantage), 100)
            slopes["policy"] = (softmax(logits) - taken) * times[:, None] / n
        for name, slope in slopes.items():
            gradients = backward(networks[name], seen[name], slope)
            layers, *moments[name] = adamw(networks[name], gradients, *moments[name], step, config)
            networks = {**networks, name: layers}
        target = [
            tuple(t + config.target_update * (x - t) for t, x in zip(*pair))
            for pair in zip(target, networks["critic"])
        ]
    return networks["critic" if algorithm == "cql" else "policy"]


@pytest.mark.parametrize("algorithm", LEARNED)
def test_updates_equal_the_ones_computed_by_hand(algorithm):
    table, seeds = toy_table(), [3, 8]
    real, imaginary = (rl.Buffer(random_records(9, seed), table) for seed in (0, 1))
    config = rl.RLConfig(
        steps=3,
        batch=12,
        lr=0.02,
        width=8,
        weight_decay=0.1,
        discount=0.9,
        reward_scale=0.02,
        conservative_weight=0.7,
        target_update=0.3,
        expectile=0.8,
        advantage_weight=4,
        imaginary_share=0.5,
        observation_scale=SCALE,
        of_goal=3,
    )
    batches = [rl.Batches(real, [imaginary], 12, 2, 0.5, sum(seeds), 3)[step] for step in range(3)]
    network, curve = rl.learn(algorithm, real, [imaginary], table.table, seeds, config, ACTIONS)
    assert [step for step, *_ in curve] == [0, 1, 2]
    for seed_index, seed in enumerate(seeds):
        starts = {
            name: layers_of(rl.SeededMLP([seed], [14, 8, 8, outputs]))
            for name, outputs in (("policy", ACTIONS), ("critic", ACTIONS), ("value", 1))
        }
        expected = by_hand(algorithm, config, seed_index, batches, starts, table.table.numpy())
        for found, wanted in zip(layers_of(network, seed_index), expected):
            np.testing.assert_allclose(found[0], wanted[0], atol=2e-5)
            np.testing.assert_allclose(found[1], wanted[1], atol=2e-5)


def test_losses_of_two_transitions_solved_on_paper():
    q = torch.tensor([[[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]]])  # a seed, two transitions, three actions
    next_q = torch.tensor([[[0.0, 5.0, 1.0]] * 2])
    next_q_target = torch.tensor([[[9.0, 2.0, 7.0]] * 2])
    action = torch.tensor([[1, 0]])
    reward, done = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 1.0]])
    # targets: 3 + .5 * Q_target(s', argmax Q(s') = 1) = 4, and 4 at the end; errors 2 - 4, 0 - 4
    next_value = rl.of_action(next_q_target, next_q.argmax(-1))
    batch = rl.Batch(None, None, action, reward, None, done)
    assert rl.bellman_loss(q, batch, next_value, 0.5).tolist() == [(4 + 16) / 2]
    expected = ((np.log(np.e + np.e**2 + 1) - 2) + np.log(3)) / 2
    assert rl.conservative_loss(q, action).tolist() == pytest.approx([expected])
    assert rl.imitation_loss(q, action).tolist() == pytest.approx([expected])


def test_the_value_that_an_expectile_loss_settles_on_solved_on_paper():
    # over Q = 0, 0, 4 the 0.8-expectile solves .8 (4 - v) = .2 (v + v): 8/3; the 0.5-one is 4/3
    q = torch.tensor([[0.0, 0.0, 4.0]] * 2)
    v = torch.tensor([[8 / 3], [4 / 3]], requires_grad=True)
    loss = rl.expectile_loss(q - v, torch.tensor([[0.8], [0.5]]))
    expected = (0.4 * (8 / 3) ** 2 + 0.8 * (4 / 3) ** 2) / 3, 0.5 * (2 * 16 / 9 + 64 / 9) / 3
    assert loss.tolist() == pytest.approx(expected)
    loss.sum().backward()
    np.testing.assert_allclose(v.grad, np.zeros((2, 1)), atol=1e-6)


def test_better_actions_are_imitated_more_and_none_more_than_a_hundred_times():
    logits, action = torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]])
    advantage = torch.tensor([[0.0, np.log(2) / 5, 9.0]])
    loss = rl.advantage_weighted_loss(logits, action, advantage, 5.0)
    assert loss.tolist() == pytest.approx([np.log(4) * (1 + 2 + 100) / 3], rel=1e-5)


def test_seeds_train_together_but_apart():
    buffer, table = rl.Buffer(random_records(9), toy_table()), toy_table().table
    config = rl.RLConfig(steps=4, batch=16, width=6)
    network, _ = rl.learn("cql", buffer, [], table, [0, 1], config, ACTIONS)
    shapes = [(14, 6), (1, 6), (6, 6), (1, 6), (6, ACTIONS), (1, ACTIONS)]
    assert [part.shape for part in network.parts] == [(2, *shape) for shape in shapes]
    x = torch.randn(2, 5, 14)
    with torch.no_grad():
        (together,) = network(x[..., 10:], x[..., :10])
    for seed in range(2):
        _, alone = forward(layers_of(network, seed), x[seed].numpy())
        np.testing.assert_allclose(together[seed], alone, rtol=1e-4, atol=1e-5)
    flat = lambda network, row: parameters_to_vector(part[row] for part in network.parts)
    assert not torch.equal(flat(network, 0), flat(network, 1))
    one, other = rl.SeededMLP([1, 0], [14, 6, ACTIONS]), rl.SeededMLP([0, 1], [14, 6, ACTIONS])
    assert torch.equal(
        flat(one, 0), flat(other, 1)
    )  # a seed's start does not depend on its company


def accuracy(algorithm, records, wanted, obs, **options):
    """How often the policy learned from records picks the wanted action."""
    table, rows = toy_table(), np.arange(len(obs))
    config = rl.RLConfig(batch=64, width=32, lr=3e-3, observation_scale=SCALE, **options)
    buffer = rl.Buffer(records, table)
    network, _ = rl.learn(algorithm, buffer, [], table.table, [0], config, ACTIONS)
    goals = table.table[np.zeros(len(obs), int)]
    values = values_of([part.detach() for part in network.parts], 0, goals, SCALE)
    act = lambda obs, rows: values(obs, rows).argmax(-1).numpy()
    return (act(obs, rows) == wanted).mean()


@pytest.mark.parametrize("bf16", (False, True))
def test_bc_imitates_and_the_others_prefer_what_is_rewarded(bf16):
    rng = np.random.default_rng(0)
    obs = rng.uniform(-0.5, 0.5, (600, 10)).astype(np.float32)
    good = np.where(obs[:, 0] > 0, 3, 8)
    taken = np.where(rng.random(600) < 0.4, good, 20)
    mixed = [toy_record([o, o], [a], [100.0 * (a != 20)], a != 20) for o, a in zip(obs, taken)]
    clean = [toy_record([o, o], [a], [0.0], False) for o, a in zip(obs, good)]
    assert accuracy("bc", clean, good, obs, steps=300, bf16=bf16) > 0.95
    assert accuracy("bc", mixed, good, obs, steps=300, bf16=bf16) < 0.5  # most do something else
    for algorithm, options in (("cql", {"conservative_weight": 0.1}), ("iql", {}), ("awac", {})):
        options = {"steps": 400, "discount": 0.5, "bf16": bf16, **options}
        assert accuracy(algorithm, mixed, good, obs, **options) > 0.9, algorithm


# ------------------------------------------------------------------ snapshots, what is not finite


class Killed(Exception):
    pass


def learned(algorithm, width=8, **options):
    """Policies of a toy run of 9 steps, and its curve."""
    table = toy_table()
    real, imaginary = (rl.Buffer(random_records(9, seed), table) for seed in (0, 1))
    config = rl.RLConfig(steps=9, batch=12, width=width, snapshot_steps=2)
    return rl.learn(algorithm, real, [imaginary], table.table, [3, 8], config, ACTIONS, **options)


@pytest.mark.parametrize("algorithm", LEARNED)
@pytest.mark.parametrize("number", (1, 3, 5))  # the last is the one at the end
def test_a_snapshot_taken_up_again_gives_the_same_policy_curve_and_log_to_the_last_bit(
    tmp_path, monkeypatch, algorithm, number
):
    straight, curve = learned(algorithm)
    logged, saved, path, save = [], [], tmp_path / "method.pt", rl.Training.save

    def save_and_die(self, path):
        save(self, path)
        saved.append(self.schedule.last_epoch)
        if len(saved) == number:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(rl.Training, "save", save_and_die)
        learned(algorithm, snapshot=path)
    assert saved == [2, 4, 6, 8, 9][:number]
    resumed, again = learned(algorithm, snapshot=path, log=lambda *entry: logged.append(entry))
    assert again == curve and same_numbers(straight, resumed)
    assert logged == [(step, loss) for step, loss, _ in curve] and len(curve) == 9
    assert [p.name for p in tmp_path.iterdir()] == ["method.pt"]


def test_policies_are_kept_on_the_way_and_a_killed_training_keeps_the_same(tmp_path, monkeypatch):
    files = {step: tmp_path / f"{step}.safetensors" for step in (3, 5, 9)}
    network, _ = learned("cql", checkpoints=files)
    found = {step: load_policy(path)[0] for step, path in files.items()}
    for ours, wanted in zip(found[9], network.parts):
        assert torch.equal(ours, wanted)
    brief, _ = learned("cql")
    assert same_numbers(brief, network)  # looking does not change it
    for step, later in ((3, 5), (5, 9)):  # these in half precision
        assert all(torch.equal(x, x.half().float()) for x in found[step])
        assert not torch.equal(found[step][0], found[later][0])
    snapshot = tmp_path / "cql.pt"

    def save_and_die(self, path, save=rl.Training.save):
        save(self, path)
        if self.schedule.last_epoch == 4:
            files[3].unlink()  # what was kept before a snapshot is not made again
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(rl.Training, "save", save_and_die)
        learned("cql", checkpoints=files, snapshot=snapshot)
    learned("cql", checkpoints=files, snapshot=snapshot)
    assert not files.pop(3).exists()
    for step, path in files.items():
        assert all(map(torch.equal, load_policy(path)[0], found[step]))


def test_checkpoints_are_even_over_the_steps_and_close_at_the_end():
    settings = rl.LearnArguments(rl_steps=1000, curve_points=4, last_checkpoints=3)
    assert settings.checkpoints == [250, 500, 750, 960, 980, 1000]
    names = [settings.policy_file("bc", step) for step in (960, 1000)]
    assert names == ["checkpoints/bc-960.safetensors", "bc.safetensors"]
    paper = rl.LearnArguments(rl_steps=500000, curve_points=50)
    assert paper.checkpoints == list(range(10000, 500001, 10000))
    assert rl.LearnArguments(curve_points=0, last_checkpoints=1).checkpoints == [8000]
    assert rl.LearnArguments(rl_steps=2).checkpoints == [1, 2]


@pytest.mark.parametrize(
    "damage", ("cut off", "one bit", "no snapshot", "other width", "other algorithm")
)
def test_a_snapshot_that_does_not_fit_is_refused_with_its_name_and_what_to_do(tmp_path, damage):
    path = tmp_path / "cql.pt"
    learned("cql", snapshot=path)
    if damage == "cut off":
        path.write_bytes(path.read_bytes()[:-500])
    if damage == "one bit":  # torch.load takes it
        flipped = bytearray(path.read_bytes())
        flipped[len(flipped) // 2] ^= 16
        path.write_bytes(flipped)
        torch.load(path, weights_only=True)
    if damage == "no snapshot":
        path.write_bytes(b"text")
    algorithm, width = "iql" if "algorithm" in damage else "cql", 6 if "width" in damage else 8
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} .*--force"):
        learned(algorithm, width, snapshot=path)


@pytest.mark.parametrize("algorithm", LEARNED)
@pytest.mark.parametrize("field", ("obs", "next_obs", "reward"))
def test_numbers_that_are_none_stop_learning_with_method_step_seed_and_row(algorithm, field):
    table, config = toy_table(), rl.RLConfig(steps=2, batch=64)
    buffer = rl.Buffer(random_records(8), table)
    getattr(buffer.transitions, field)[3] = torch.nan
    inputs = buffer, [], table.table, [0, 1], config, ACTIONS, f"{algorithm}+kalm"
    if algorithm == "bc" and field != "obs":
        rl.learn(algorithm, *inputs)  # it does not read them
        return
    problem = "the loss is nan and the norm of the gradient is nan, from seed 0, batch row"
    with pytest.raises(FloatingPointError, match=rf"^{algorithm}\+kalm, step 1: {problem} \d+;"):
        rl.learn(algorithm, *inputs)


def test_outputs_that_are_too_large_are_traced_to_their_seed():
    table = toy_table()
    training = rl.Training(rl.BC([0, 1], [14, 8, ACTIONS], rl.RLConfig()), "cpu")
    of_seed = [part.data[1].fill_(1e38) for part in training.algorithm.policy.parts]
    buffer = rl.Buffer(random_records(8), table)
    batch = rl.Batches(buffer, [], 32, 2, 0, 0)[0]
    with pytest.raises(FloatingPointError, match="here: the loss is nan .*, from seed 1, batch"):
        training.gradient_step(batch._replace(goal=table.table[batch.goal]), "here")
    assert all((part == 1e38).all() for part in of_seed)  # no step was taken


def test_a_seed_whose_numbers_are_none_is_told_from_the_others():
    rows = torch.zeros(3, 5, 4)
    rows[1, 4, 2] = torch.inf
    numbers = {"sound": torch.zeros(()), "loss": torch.tensor([0, torch.nan, 0])}
    with pytest.raises(FloatingPointError, match="^here: the loss is nan, from seed 1, .* row 4;"):
        finite.check("here", numbers, (torch.zeros(3, 5), rows), ("seed", "batch row"))
    with pytest.raises(FloatingPointError, match=r"from batch row 1 \(goal 1\);"):
        finite.check("here", numbers, [rows], about=lambda row: f"goal {row}")
    with pytest.raises(FloatingPointError, match="the loss is nan, from no row alone;"):
        finite.check("here", numbers, [torch.zeros(2)])
    finite.check("here", {"large": torch.tensor([3e38, 3e38])}, [rows])  # finite, but not their sum


def test_long_gradients_are_cut_for_each_seed_alone_and_their_norms_told():
    network = rl.SeededMLP([0, 1], [6, 5, 4])
    loss = network(torch.randn(2, 7, 4), torch.randn(2, 7, 2))[0].square().sum((1, 2))
    (loss * torch.tensor([1e-3, 1e3])).sum().backward()
    before = [part.grad.clone() for part in network.parts]
    expected = [sum((own[s].double() ** 2).sum() for own in before) ** 0.5 for s in range(2)]
    assert expected[0] < 2 < expected[1]
    norms = rl.clip_gradients(list(network.parameters()), 2.0)
    assert norms.tolist() == pytest.approx(list(map(float, expected)), rel=1e-5)
    for part, own in zip(network.parts, before):
        assert torch.equal(part.grad[0], own[0])
        torch.testing.assert_close(part.grad[1], own[1] * (2 / expected[1]).float())


# ------------------------------------------------------------------------------- methods, options


def test_a_new_algorithm_is_one_class_and_one_entry(monkeypatch):
    class Lazy(rl.BC):
        def loss(self, batch):
            return super().loss(batch._replace(action=torch.full_like(batch.action, 7)))

    monkeypatch.setitem(rl.ALGORITHMS, "lazy", Lazy)
    settings = rl.LearnArguments(methods="lazy,lazy+relabel,lazy+kalm,lazy+both,llm")
    assert settings.learned_methods == [m for m in rl.method_names() if "lazy" in m]
    assert {rl.algorithm_of(method) for method in settings.learned_methods} == {"lazy"}
    sources = [rl.source_of(method) for method in settings.learned_methods]
    assert sources == ["", "relabel", "kalm", "both"]
    obs = np.zeros((5, 10), np.float32)
    assert accuracy("lazy", [toy_record(obs, [1] * 4, [0] * 4, False)], 7, obs, steps=50) == 1


def test_an_unknown_algorithm_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown algorithm 'cqk'; did you mean cql.* bc, cql,"):
        learned("cqk")


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"rl_batch": 0}, "--rl_batch must be at least 1, got 0"),
        ({"rl_steps": 0}, "--rl_steps must be at least 1, got 0"),
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"rl_snapshot_steps": 0}, "--rl_snapshot_steps must be at least 1"),
        ({"curve_points": -1}, "--curve_points must be at least 0, got -1"),
        ({"last_checkpoints": 0}, "--last_checkpoints must be at least 1, got 0"),
        ({"kept_per_goal": -1}, "--kept_per_goal must be at least 0, got -1"),
        ({"encoder_layers": -1}, "--encoder_layers must be at least 0"),
        ({"rl_learning_rate": math.nan}, "--rl_learning_rate .* got nan"),
        ({"conservative_weight": math.inf}, "--conservative_weight .* got inf"),
        ({"dynamics_tolerance": -0.1}, "--dynamics_tolerance must be at least 0, got -0.1"),
        ({"keep": "some"}, "--keep takes .* 'some'"),
        ({"imaginary_share": 1.0}, "--imaginary_share must be below 1, got 1.0"),
        (
            {"methods": "bc,cql+klam"},
            r"--methods: .* 'cql\+klam'; did you mean cql\+kalm\? .*, llm",
        ),
        ({"methods": "bc,"}, "--methods: unknown method ''"),
        ({"methods": "bc,bc"}, "--methods .* once"),
        (
            {"rl_batch": 48, "methods": "bc+kalm"},
            "--imaginary_share is 2 of a batch's goals, for 3 sources",
        ),
        ({"rl_batch": 100, "methods": "bc+both"}, "is 5 of a batch's goals, for 6 sources"),
        ({"rl_batch": 30}, "--rl_batch 30 must be a multiple of --rl_of_goal 4"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(options, problem):
    with pytest.raises(ValueError, match=problem):
        rl.LearnArguments(**options)


def test_options_are_read_by_the_hugging_face_parser_and_become_the_config():
    arguments = "--rl_steps 5 --rl_batch 12 --methods bc,cql --no_balance_goals".split()
    (settings,) = HfArgumentParser(rl.LearnArguments).parse_args_into_dataclasses(arguments)
    config = settings.config(observation_scale=SCALE, bf16=True)
    assert (config.steps, config.batch) == (5, 12)
    assert (config.observation_scale, config.bf16) == (SCALE, True)
    assert settings.method_list == ["bc", "cql"] and settings.balance_goals is False
    assert rl.LearnArguments().config() == rl.RLConfig()
    rl.LearnArguments(rl_batch=12, methods="bc,llm")  # nothing imaginary: no share is too small
