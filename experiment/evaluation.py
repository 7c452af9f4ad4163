"""How often policies succeed: those of all methods, seeds and checkpoints in one batch of episodes.

This file knows policies on disk, LLMs as policies and worlds, and nothing of how they learned.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from torch import Tensor
from tqdm import trange

import env
import rollout
from data.policies import load_policy
from data.transitions import GoalTable
from experiment import words
from experiment.run import Run
from experiment.settings import at_least, setting
from experiment.words import Question
from rl import MODELS, LearnArguments


@dataclass
class EvaluateArguments:
    """Success rates."""

    episodes: int = setting(120, "of a method, level and seed; words: half")
    episode_steps: int = setting(50, "actions in an episode at most")
    curve_episodes: int = setting(6, "the same of policies on the way")
    report_last: int = setting(1, "checkpoints to report the mean of")

    def __post_init__(self):
        at_least(1, self, "episodes", "episode_steps", "curve_episodes", "report_last")


# ----------------------------------------------------------------------------------------------
# Acting


def values_of(
    parts: Sequence[Tensor], seed_index: int, goals: Tensor, scale: float
) -> Callable[[ndarray, ndarray], Tensor]:
    """What a policy gives each action, for episodes of which number i pursues the goal encoded in
    goals[i]: a function as `env.Policy`, of (b, num_actions).

    parts, scale: as `load_policy` gives them. What the first layer makes of the goals (B, hidden)
    is computed here, once for all steps.
    """
    first, first_bias, *rest = [part[seed_index].clone() for part in parts]
    observation_dim = len(first) - goals.shape[1]
    from_goals = torch.addmm(first_bias, goals, first[observation_dim:])
    of_obs = first[:observation_dim].clone()  # not a view: most of the layer is used no more

    @torch.inference_mode()
    def values(obs, rows):
        x = torch.addmm(from_goals[rows], torch.as_tensor(obs) / scale, of_obs)
        for weight, bias in zip(rest[::2], rest[1::2]):
            x = torch.addmm(bias, F.relu(x), weight)
        return x

    return values


def read_values(path: Path, seed_index: int, table: GoalTable, goals) -> Callable:
    """`values_of` the policy of one seed in a file, for episodes that pursue these goals."""
    parts, _, scale = load_policy(path)
    return values_of(parts, seed_index, table.of_texts([goal.text for goal in goals]), scale)


def read_policy(path: Path, seed_index: int, table: GoalTable, goals) -> env.Policy:
    """The policy, which takes the action of most value."""
    values = read_values(path, seed_index, table, goals)
    return lambda obs, rows: values(obs, rows).argmax(-1).numpy()


def first_values(path: Path, seed_index: int, table: GoalTable, goals, obs: ndarray) -> ndarray:
    """What the policy gives each first action, (B, num_actions), for goals in obs (B, D)."""
    return read_values(path, seed_index, table, goals)(obs, np.arange(len(obs))).numpy()


def successes(
    world: env.World,
    policies: Sequence[env.Policy],
    goals: Sequence[Sequence[env.Goal]],
    starts: Sequence[ndarray],
    max_steps: int,
) -> list[ndarray]:
    """Which episodes of several policies succeed: (b,) bool for each, as `env.run_episodes` has it.

    goals, starts: of each policy's episodes, b goals and (b, state_dim). One call of the physics
    moves the episodes of all.
    """
    bounds = np.cumsum([0, *map(len, starts)])
    encoded = np.concatenate([world.encode_goals(own) for own in goals])
    one_step = world.one_step(encoded)
    states = np.concatenate(starts)
    won = np.zeros(len(states), bool)
    running = np.arange(len(states))
    for _ in trange(max_steps, desc="evaluate policies", leave=False):
        if len(running) == 0:
            break
        before = world.observe(states)
        actions = []
        still = np.searchsorted(running, bounds)  # where each policy's rows begin and end now
        for number, policy in enumerate(policies):
            own = slice(still[number], still[number + 1])
            if own.start < own.stop:
                actions.append(policy(before[own], running[own] - bounds[number]))
        actions = np.concatenate(actions)
        states = step_distinct(world, states, actions)
        met = world.success(encoded[running], before, world.observe(states), actions)
        won[running] = met
        goes_on = ~met & ~one_step[running]
        running = running[goes_on]
        states = states[goes_on]
    return np.split(won, bounds[1:-1])


def step_distinct(world: env.World, states: ndarray, actions: ndarray) -> ndarray:
    """`World.step_batch`, each state and action once: policies that begin alike agree for long,
    above all the last checkpoints of one policy, and the physics takes nearly all of the time.
    """
    pairs = np.column_stack([states, actions])
    as_bytes = pairs.view(f"V{pairs[0].nbytes}").ravel()
    _, first, number = np.unique(as_bytes, return_index=True, return_inverse=True)
    return world.step_batch(states[first], actions[first])[number]


def play_llm(
    run: Run, model, goals: list[env.Goal], starts, max_steps: int, shared: bool = False
) -> list[dict]:
    """Episodes of an LLM as policy, one a goal and start (B, state_dim). model: with tokenizer.

    shared: as `rollout.generate_all`.
    """
    obs = run.world.observe(starts)
    options = {"max_steps": max_steps, "description": "an LLM as policy", "shared": shared}
    records = []
    with run.autocast():
        for rows in words.groups_of(goals):
            options["states"] = starts[rows]
            asked = [goals[row] for row in rows]
            records += rollout.generate_all(*model, run.world, asked, obs[rows], **options)
    return records


# ----------------------------------------------------------------------------------------------
# What a run evaluates


class Trial(NamedTuple):
    """What a method had learned with a seed after some gradient steps."""

    method: str
    seed_index: int
    step: int


def trials(learned: LearnArguments, settings: EvaluateArguments) -> list[Trial]:
    """All that is evaluated: language models, then policies, the last checkpoints before others."""
    if settings.report_last > learned.last_checkpoints:
        raise ValueError(
            f"--report_last {settings.report_last}: learning keeps --last_checkpoints "
            f"{learned.last_checkpoints}; raise it and learn again"
        )
    models = [method for method in learned.method_list if method in MODELS]
    found = [Trial(method, 0, learned.rl_steps) for method in models]
    for step in reversed(learned.checkpoints):
        for method in learned.learned_methods:
            found += [Trial(method, number, step) for number in range(learned.seeds)]
    return found


@dataclass(frozen=True)
class Evaluation:
    """Who is evaluated in which episodes: for each level goals, and for each seed starts
    (episodes of all levels, state_dim). A checkpoint that only curves are made of plays the first
    `curve_episodes` of each level.
    """

    learned: LearnArguments
    settings: EvaluateArguments
    goals: dict[str, list[env.Goal]]
    starts: list[ndarray]

    @property
    def reported_steps(self) -> list[int]:
        """The checkpoints that play all episodes."""
        return self.learned.checkpoints[-self.settings.report_last :]

    def rows(self, level: str, of_curve: bool) -> ndarray:
        """Which episodes of all are those of a level."""
        before = itertools.takewhile(level.__ne__, self.goals)
        first = sum(len(self.goals[other]) for other in before)
        every = len(self.goals[level])
        count = min(self.settings.curve_episodes, every) if of_curve else every
        return np.arange(first, first + count)

    def play(
        self, world: env.World, table: GoalTable, policies: Path, mine: Sequence[Trial]
    ) -> list[tuple]:
        """(trial, successes) of trials whose policies are in a folder. table: with all goals.
        successes: (episodes,) bool, False where it did not play.
        """
        all_goals = sum(self.goals.values(), [])
        played = {trial: np.zeros(len(all_goals), bool) for trial in mine}
        steps = min(self.settings.episode_steps, world.max_steps)
        for group in words.groups_of(all_goals) if mine else []:
            acting = []
            goals = []
            starts = []
            rows_of_trials = []
            for method, seed_index, step in mine:
                of_curve = step not in self.reported_steps
                rows = np.concatenate([self.rows(level, of_curve) for level in self.goals])
                rows = np.intersect1d(rows, group)
                rows_of_trials.append(rows)
                goals.append([all_goals[row] for row in rows])
                starts.append(self.starts[seed_index][rows])
                path = policies / self.learned.policy_file(method, step)
                acting.append(read_policy(path, seed_index, table, goals[-1]))
            won_by_trial = successes(world, acting, goals, starts, steps)
            for trial, rows, won in zip(mine, rows_of_trials, won_by_trial):
                played[trial][rows] = won
        return list(played.items())

    def first_actions(
        self, world: env.World, table: GoalTable, policies: Path, asked: Sequence[Question]
    ) -> dict:
        """`words.figures` of every method's policies at the end."""
        found = {}
        for method in self.learned.learned_methods if asked else []:
            path = policies / self.learned.policy_file(method, self.learned.rl_steps)
            agents = []
            for number in range(self.learned.seeds):
                agents.append(partial(first_values, path, number, table))
            found[method] = words.figures(world, asked, agents)
        return found

    def results(self, won: Mapping[Trial, ndarray]) -> dict:
        """What results.json has of policies: success by method and level, the goals of these
        episodes, success over training, and the paper's figure, the mean of the last checkpoints.
        """
        results = {"success": {}, "goals": {}, "curves": {}, "last_checkpoints": {}}
        for level, goals in self.goals.items():
            results["goals"][level] = [goal.text for goal in goals]
            for method in self.learned.method_list:
                cell = self.reported(won, method, level)
                results["success"].setdefault(method, {})[level] = cell
                if method in MODELS or len(self.learned.checkpoints) == 1:
                    continue
                curve = self.curve(won, method, level)
                results["curves"].setdefault(method, {})[level] = curve
                last = [rates for _, rates in curve[-self.learned.last_checkpoints :]]
                cell = cell_of(np.transpose(last))
                cell["episodes"] = len(self.rows(level, of_curve=True)) * np.size(last)
                results["last_checkpoints"].setdefault(method, {})[level] = cell
        return results

    def reported(self, won: Mapping[Trial, ndarray], method: str, level: str) -> dict:
        """Success of a method at a level, with the outcome of each episode by seed."""
        rows = self.rows(level, of_curve=False)
        seeds, steps = range(self.learned.seeds), self.reported_steps
        if method in MODELS:
            seeds, steps = [0], [self.learned.rl_steps]
        outcomes = []
        for seed in seeds:
            of_steps = [won[Trial(method, seed, step)][rows] for step in steps]
            outcomes.append(np.concatenate(of_steps))
        texts = ["".join(map(str, own.astype(int))) for own in outcomes]
        return {**cell_of(outcomes), "outcomes": texts}

    def curve(self, won: Mapping[Trial, ndarray], method: str, level: str) -> list[list]:
        """[step, rate of each seed] at every checkpoint."""
        rows = self.rows(level, of_curve=True)
        curve = []
        for step in self.learned.checkpoints:
            rates = []
            for seed in range(self.learned.seeds):
                rates.append(float(won[Trial(method, seed, step)][rows].mean()))
            curve.append([step, rates])
        return curve


def cell_of(outcomes: Sequence[ndarray]) -> dict:
    """A method's success at a level from the outcomes of each seed."""
    rates = [float(np.mean(own)) for own in outcomes]
    episodes = sum(len(own) for own in outcomes)
    mean_and_deviation = {"mean": float(np.mean(rates)), "std": float(np.std(rates))}
    return {**mean_and_deviation, "seeds": rates, "episodes": episodes}
