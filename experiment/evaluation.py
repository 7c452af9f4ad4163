"""How often policies succeed: those of all methods, seeds and checkpoints in one batch of episodes.

This file knows policies on disk and worlds, and nothing of how policies are learned.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from torch import Tensor
from tqdm import trange

import env
from data.policies import load_policy
from data.transitions import GoalTable
from experiment.settings import at_least, setting
from rl import LLM, LearnArguments


@dataclass
class EvaluateArguments:
    """Success rates."""

    episodes: int = setting(200, "for each method, level and seed")
    episode_steps: int = setting(50, "actions in an episode at most")
    curve_episodes: int = setting(25, "the same at each point of success over training")
    report_last: int = setting(1, "checkpoints whose mean is a method's success; the paper: 5")

    def __post_init__(self):
        at_least(1, self, "episodes", "episode_steps", "curve_episodes", "report_last")


# ----------------------------------------------------------------------------------------------
# Acting


def policy_of(
    parts: Sequence[Tensor], seed_index: int, goals: Tensor, observation_scale: float
) -> env.Policy:
    """A greedy policy for episodes of which number i pursues the goal encoded in goals[i].

    parts: weights and biases as `load_policy` gives them. What the first layer makes of the goals
    (B, hidden) is computed here, once for all steps.
    """
    first, first_bias, *rest = [part[seed_index].clone() for part in parts]
    observation_dim = len(first) - goals.shape[1]
    from_goals = torch.addmm(first_bias, goals, first[observation_dim:])
    of_obs = first[:observation_dim].clone()  # not a view: most of the layer is used no more

    @torch.inference_mode()
    def act(obs, rows):
        x = torch.addmm(from_goals[rows], torch.as_tensor(obs) / observation_scale, of_obs)
        for weight, bias in zip(rest[::2], rest[1::2]):
            x = torch.addmm(bias, F.relu(x), weight)
        return x.argmax(-1).numpy()

    return act


def read_policy(
    path: Path, seed_index: int, table: GoalTable, goals: Sequence[env.Goal]
) -> env.Policy:
    """The policy of one seed in a file, for episodes that pursue these goals."""
    parts, _, scale = load_policy(path)
    return policy_of(parts, seed_index, table.of_texts([goal.text for goal in goals]), scale)


def successes(
    world: env.World,
    policies: Sequence[env.Policy],
    goals: Sequence[Sequence[env.Goal]],
    starts: Sequence[ndarray],
    max_steps: int,
) -> list[ndarray]:
    """Which episodes of several policies succeed: (b,) bool for each policy.

    goals, starts: those of each policy's episodes, b goals and (b, state_dim). One call of the
    physics moves the episodes of all policies.
    """
    if not policies:
        return []
    ends = np.cumsum([len(states) for states in starts])
    begins = np.append(0, ends[:-1])
    won = np.zeros(ends[-1], bool)

    def act(obs, rows):
        actions = np.zeros(len(rows), int)
        bounds = np.searchsorted(rows, [begins, ends]).T  # rows that still run are in order
        for policy, first, (begin, end) in zip(policies, begins, bounds):
            if begin < end:
                actions[begin:end] = policy(obs[begin:end], rows[begin:end] - first)
        return actions

    encoded = np.concatenate([world.encode_goals(own) for own in goals])
    one_step = world.one_step(encoded)
    running = np.arange(len(won))
    states = np.concatenate(starts)
    for _ in trange(max_steps, desc="evaluate policies", leave=False):
        if len(running) == 0:
            break
        before = world.observe(states)
        actions = act(before, running)
        states = step_distinct(world, states, actions)
        met = world.success(encoded[running], before, world.observe(states), actions)
        won[running] = met
        goes_on = ~met & ~one_step[running]
        running = running[goes_on]
        states = states[goes_on]
    return np.split(won, ends[:-1])


def step_distinct(world: env.World, states: ndarray, actions: ndarray) -> ndarray:
    """`World.step_batch`, each state and action once: policies that begin alike agree for long,
    above all the last checkpoints of one policy, and the physics takes nearly all of the time.
    """
    pairs = np.column_stack([states, actions])
    as_bytes = pairs.view(f"V{pairs[0].nbytes}").ravel()
    _, first, number = np.unique(as_bytes, return_index=True, return_inverse=True)
    return world.step_batch(states[first], actions[first])[number]


# ----------------------------------------------------------------------------------------------
# What a run evaluates


class Trial(NamedTuple):
    """What a method had learned with a seed after some gradient steps."""

    method: str
    seed_index: int
    step: int


def trials(learned: LearnArguments, settings: EvaluateArguments) -> list[Trial]:
    """All that is evaluated, the last checkpoints first: they have the most episodes."""
    if settings.report_last > learned.last_checkpoints:
        raise ValueError(
            f"--report_last {settings.report_last}: the policies were learned with "
            f"--last_checkpoints {learned.last_checkpoints}; raise it and learn again"
        )
    found = [Trial(LLM, 0, learned.rl_steps)] if LLM in learned.method_list else []
    for step in reversed(learned.checkpoints):
        for method in learned.learned_methods:
            found += [Trial(method, number, step) for number in range(learned.seeds)]
    return found


@dataclass(frozen=True)
class Episodes:
    """What is played: for each level as many goals; starts (episodes, state_dim) for each seed."""

    goals: dict[str, list[env.Goal]]
    starts: list[ndarray]

    def rows(self, level: str, count: int) -> ndarray:
        """Where the first so many episodes of a level are among those of all, or all it has."""
        of_a_level = len(self.goals[level])
        first = of_a_level * list(self.goals).index(level)
        return np.arange(first, first + min(count, of_a_level))


def play(
    world: env.World,
    folder: Path,
    mine: Sequence[Trial],
    episodes: Episodes,
    learned: LearnArguments,
    settings: EvaluateArguments,
) -> list[tuple[Trial, ndarray]]:
    """Trials of policies in a folder, each with its successes (episodes,).

    A checkpoint that only the curves are made of plays the first episodes of each level; the others
    count as lost there, and are not read.
    """
    table = GoalTable.load(folder / "goals.safetensors")
    all_goals = sum(episodes.goals.values(), [])
    few = [episodes.rows(level, settings.curve_episodes) for level in episodes.goals]
    rows_of_step = dict.fromkeys(learned.checkpoints, np.concatenate(few))
    for step in learned.checkpoints[-settings.report_last :]:
        rows_of_step[step] = np.arange(len(all_goals))
    policies = []
    goals = []
    starts = []
    for method, seed_index, step in mine:
        rows = rows_of_step[step]
        goals.append([all_goals[row] for row in rows])
        starts.append(episodes.starts[seed_index][rows])
        path = folder / learned.policy_file(method, step)
        policies.append(read_policy(path, seed_index, table, goals[-1]))
    steps = min(settings.episode_steps, world.max_steps)
    played = []
    for trial, won in zip(mine, successes(world, policies, goals, starts, steps)):
        won_of_all = np.zeros(len(all_goals), bool)
        won_of_all[rows_of_step[trial.step]] = won
        played.append((trial, won_of_all))
    return played


# ----------------------------------------------------------------------------------------------
# Figures


def cell_of(rates: Sequence[float], episodes: int) -> dict:
    """A method's success at a level. rates: of its seeds; episodes: of each of them."""
    rates = [float(rate) for rate in rates]
    mean_and_deviation = {"mean": float(np.mean(rates)), "std": float(np.std(rates))}
    return {**mean_and_deviation, "seeds": rates, "episodes": episodes * len(rates)}


def success_of(won: Mapping[Trial, ndarray], method: str, seeds, steps, rows: ndarray) -> dict:
    """The success of a method in some episodes, after some numbers of steps, one after the other.

    Its outcomes are for each seed a text of 0 and 1.
    """
    of_seeds = []
    for seed in seeds:
        of_steps = [won[Trial(method, seed, step)][rows] for step in steps]
        of_seeds.append(np.concatenate(of_steps))
    cell = cell_of([outcomes.mean() for outcomes in of_seeds], len(of_seeds[0]))
    texts = ["".join(map(str, outcomes.astype(int))) for outcomes in of_seeds]
    return {**cell, "outcomes": texts}


def results_of(
    won: Mapping[Trial, ndarray],
    episodes: Episodes,
    learned: LearnArguments,
    settings: EvaluateArguments,
) -> dict:
    """What results.json has of policies: success by method and level, the goals of its episodes,
    success over training, and what the paper reports, the mean of the last checkpoints.
    """
    goals = {}
    for level, own in episodes.goals.items():
        goals[level] = [goal.text for goal in own]
    success = {}
    curves = {}
    last_checkpoints = {}
    for method in learned.method_list:
        seeds = range(1 if method == LLM else learned.seeds)
        steps = [learned.rl_steps] if method == LLM else learned.checkpoints
        success[method] = {}
        curves[method] = {}
        last_checkpoints[method] = {}
        for level in goals:
            rows = episodes.rows(level, settings.episodes)
            reported = steps[-settings.report_last :]
            success[method][level] = success_of(won, method, seeds, reported, rows)
            few = episodes.rows(level, settings.curve_episodes)
            of_steps = [success_of(won, method, seeds, [step], few)["seeds"] for step in steps]
            curves[method][level] = [list(point) for point in zip(steps, of_steps)]
            last = of_steps[-learned.last_checkpoints :]
            cell = cell_of(np.mean(last, axis=0), len(last) * len(few))
            last_checkpoints[method][level] = cell
        if len(steps) == 1:
            del curves[method], last_checkpoints[method]
    results = {"success": success, "goals": goals}
    return {**results, "curves": curves, "last_checkpoints": last_checkpoints}
