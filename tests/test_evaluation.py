"""Evaluation: many policies in one batch of episodes, what is evaluated, and the figures of it."""

import numpy as np
import pytest
import torch
from test_rl import ACTIONS, SCALE, toy_table

import env
import rl
from data.policies import load_policy, save_policy
from data.transitions import GoalTable
from experiment import evaluation, words
from experiment.evaluation import EvaluateArguments, Evaluation, Trial
from rl import LearnArguments

SETTINGS = LearnArguments(rl_steps=100, curve_points=2, last_checkpoints=2, seeds=2, methods="bc")


def test_policies_survive_the_disk_and_take_the_networks_best_action(tmp_path):
    table, network = toy_table(), rl.SeededMLP([5, 2], [14, 6, 6, ACTIONS])
    path, config = tmp_path / "cql.safetensors", rl.RLConfig(observation_scale=SCALE)
    save_policy(path, [part.detach() for part in network.parts], [5, 2], "cql", config)
    loaded, seeds, scale = load_policy(path)
    assert (seeds, scale) == ([5, 2], SCALE) and list(tmp_path.iterdir()) == [path]
    obs = np.random.default_rng(0).normal(0, 0.3, (9, 10)).astype(np.float32)
    goals = table.table[np.arange(9) % 3]
    with torch.no_grad():
        x = torch.cat([torch.from_numpy(obs) / SCALE, goals], -1).expand(2, -1, -1)
        best = network(x[..., 10:], x[..., :10])[0].argmax(-1).numpy()
    assert (best[0] != best[1]).any()
    for seed in range(2):
        values = evaluation.values_of(loaded, seed, goals, scale)
        act = lambda obs, rows, values=values: values(obs, rows).argmax(-1).numpy()
        assert (act(obs, np.arange(9)) == best[seed]).all()
        still = np.array([2, 7])  # the rows of those that still run
        assert (act(obs[still], still) == best[seed][still]).all()


def test_policies_together_do_as_each_alone_and_the_physics_computes_nothing_twice(
    world, monkeypatch
):
    rng = np.random.default_rng(3)
    goals = world.sample_goals("offline", "train", 12, rng)
    goals += world.sample_goals("easy", "test", 12, rng)
    encoded = world.encode_goals(goals)
    starts = env.unfulfilled_states(world, rng, goals)

    def policy(chance, rows_of):
        """The expert, but for some goals and states another action, which follows from these."""

        def act(obs, rows):
            expert = world.expert_actions(encoded[rows_of[rows]], obs)
            noise = np.abs(obs).sum(1) * 1000 % 1 < chance
            return np.where(noise, expert + 3, expert) % world.num_actions

        return act

    alone = []
    whole = np.arange(24)
    for chance in (0.1, 0.6, 0.6):
        records = env.run_episodes(world, policy(chance, whole), goals, starts, 6)
        alone.append([record["success"] for record in records])
    few = np.arange(5, 20)
    moved = []
    step_batch = type(world).step_batch

    def counted(self, states, actions):
        moved.append(np.column_stack([states, actions]))
        return step_batch(self, states, actions)

    monkeypatch.setattr(type(world), "step_batch", counted)
    policies = [policy(0.1, whole), policy(0.6, whole), policy(0.6, few)]
    whose = [goals, goals, [goals[row] for row in few]]
    together = evaluation.successes(world, policies, whose, [starts, starts, starts[few]], 6)
    assert [won.tolist() for won in together[:2]] == alone[:2] and alone[0] != alone[1]
    assert together[2].tolist() == np.array(alone[2])[few].tolist()
    assert 0.2 < np.mean(alone) < 0.9 and len(moved) == 6
    for rows in moved:
        assert len(np.unique(rows, axis=0)) == len(rows)


def test_the_last_policies_play_all_episodes_and_checkpoints_the_first_of_each_level(
    world, tmp_path, monkeypatch
):
    goals = {"offline": world.sample_goals("offline", "train", 3, np.random.default_rng(0))}
    goals["easy"] = world.sample_goals("easy", "test", 3, np.random.default_rng(0))
    texts = [goal.text for level in goals.values() for goal in level]
    table = GoalTable(texts, torch.zeros(6, 4))
    for step in SETTINGS.checkpoints:
        path = tmp_path / SETTINGS.policy_file("bc", step)
        network = rl.SeededMLP([0, 1], [14, 6, ACTIONS])
        save_policy(path, [part.detach() for part in network.parts], [0, 1], "bc", rl.RLConfig())
    played = {}

    def all_succeed(world, policies, goals, starts, max_steps):
        played.update(zip(trials, zip(goals, starts)))
        return [np.ones(len(own), bool) for own in goals]

    monkeypatch.setattr(evaluation, "successes", all_succeed)
    settings = EvaluateArguments(episodes=3, curve_episodes=2)
    trials = evaluation.trials(SETTINGS, settings)
    assert trials == [Trial("bc", seed, step) for step in (100, 98, 50) for seed in (0, 1)]
    starts = [np.zeros((6, 1)), np.ones((6, 1))]
    won = dict(Evaluation(SETTINGS, settings, goals, starts).play(world, table, tmp_path, trials))
    for trial in trials:
        own_goals, own_starts = played[trial]
        assert len(own_goals) == (6 if trial.step == 100 else 4)
        assert (own_starts == trial.seed_index).all()
        expected = [1] * 6 if trial.step == 100 else [1, 1, 0, 1, 1, 0]
        assert won[trial].astype(int).tolist() == expected
    assert [goal.text for goal in played[trials[-1]][0]] == [*texts[:2], *texts[3:5]]
    settings = EvaluateArguments(episodes=3, curve_episodes=2, report_last=2)
    won = dict(Evaluation(SETTINGS, settings, goals, starts).play(world, table, tmp_path, trials))
    assert [len(played[trial][0]) for trial in trials] == [6, 6, 6, 6, 4, 4]


def test_goals_in_new_words_are_drawn_and_played_apart_and_change_nothing_for_others(world):
    rng = np.random.default_rng(0)
    goals = {"hard": world.sample_goals("hard", "test", 40, rng)}
    hard = goals["hard"]
    assert [rows.tolist() for rows in words.groups_of(hard)] == [[*range(40)]]
    goals["words"] = world.sample_goals("words", "test", 5, rng)
    both = hard + goals["words"]
    groups = [rows.tolist() for rows in words.groups_of(both)]
    assert groups == [[*range(40)], [*range(40, 45)]]
    alone = words.draw_starts(world, hard, np.random.default_rng(1))
    starts = words.draw_starts(world, both, np.random.default_rng(1))
    assert starts.shape == (45, 69) and (starts[:40] == alone).all()
    assert not world.fulfilled(both, world.observe(starts)).any()


WON = {  # one level; episodes 0 and 1 are those of the curve
    (50, 0): (0, 0, 0), (50, 1): (0, 1, 0),
    (98, 0): (1, 0, 1), (98, 1): (1, 1, 0),
    (100, 0): (1, 1, 1), (100, 1): (0, 1, 0),
}  # fmt: skip


def figures(**options):
    settings = EvaluateArguments(episodes=3, curve_episodes=2, **options)
    goals = {"hard": [env.Goal(text) for text in "abc"]}
    won = {Trial("bc", seed, step): np.array(x, bool) for (step, seed), x in WON.items()}
    won[Trial("llm", 0, 100)] = np.array([0, 1, 0], bool)
    learned = LearnArguments(**{**vars(SETTINGS), "methods": "bc,llm"})
    return Evaluation(learned, settings, goals, []).results(won)


def test_figures_of_the_last_policies_over_training_and_of_the_last_checkpoints():
    found = figures()
    cell = found["success"]["bc"]["hard"]
    assert cell["seeds"] == pytest.approx([1, 1 / 3]) and cell["outcomes"] == ["111", "010"]
    assert cell["mean"] == pytest.approx(2 / 3) and cell["std"] == pytest.approx(1 / 3)
    assert cell["episodes"] == 6 and found["goals"] == {"hard": ["a", "b", "c"]}
    assert found["success"]["llm"]["hard"]["outcomes"] == ["010"]
    curve = [[50, [0.0, 0.5]], [98, [0.5, 1.0]], [100, [1.0, 0.5]]]
    assert found["curves"] == {"bc": {"hard": curve}}
    last = {"mean": 0.75, "std": 0.0, "seeds": [0.75, 0.75], "episodes": 8}
    assert found["last_checkpoints"] == {"bc": {"hard": last}}


def test_the_papers_figure_is_the_mean_of_the_last_checkpoints():
    cell = figures(report_last=2)["success"]["bc"]["hard"]
    assert cell["seeds"] == pytest.approx([5 / 6, 0.5]) and cell["episodes"] == 12
    assert cell["outcomes"] == ["101111", "110010"]  # of one checkpoint, then of the next
    with pytest.raises(ValueError, match="--report_last 3: .* --last_checkpoints 2; raise it"):
        evaluation.trials(SETTINGS, EvaluateArguments(report_last=3))
