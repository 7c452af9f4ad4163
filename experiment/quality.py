"""Figures of what a grounded LLM imagined and said (paper, section 5.3).

This file knows rollout records and the world that judges them, and no model.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

import env
from experiment.processes import in_batches

PLAYED = 960  # rollouts at most that are played in the world: enough for a rate


def explanation_figures(
    world: env.World, records: Sequence[dict], explanations: Sequence[str]
) -> dict[str, float]:
    """How often explanations are right, as rates by part (`World.explanation_scores`)."""
    goals = [env.goal_of(record) for record in records]
    final = np.stack([record["observations"][-1] for record in records])
    scores = world.explanation_scores(goals, explanations, final)
    figures = {}
    for part, right in scores.items():
        figures[part] = float(np.mean(right))
    return figures


def rollout_figures(
    world: env.World, records: Sequence[dict], shared: bool = False
) -> dict[str, float]:
    """Figures of imagined rollouts. shared: all processes call this and share the playing.

    Of goals that have a judge: match, the rate that fulfils its goal; executed, the rate that does
    when its actions are played in the world from its start, in an even sample of them;
    executed_of_matched; action_match, of one-step goals the action alone. The world's rates of what
    cannot be (`World.plausibility`). After a self-check explained, the rate whose explanation fits
    the goal; match_of_explained; dynamics_error.
    """
    goals = [env.goal_of(record) for record in records]
    actions = [record["actions"] for record in records]
    lengths = [len(taken) for taken in actions]
    first = []
    obs = []
    nexts = []
    for record in records:
        path = record["observations"]
        first.append(path[0])
        obs.append(path[:-1])
        nexts.append(path[1:])
    first = np.stack(first)
    obs = np.concatenate(obs)
    nexts = np.concatenate(nexts)
    starts = world.state_from_observation(first)

    def play(rows):
        plans = [actions[row] for row in rows]
        asked = [goals[row] for row in rows]
        played = env.run_episodes(world, replay(plans), asked, starts[rows], max(lengths))
        succeeds = []
        for record, plan in zip(played, plans):
            # a plan that has ended goes on for as long as others last, which counts no more
            is_its_own = len(record["actions"]) <= len(plan)
            succeeds.append(record["success"] and is_its_own)
        return succeeds

    played = np.arange(0, len(records), math.ceil(len(records) / PLAYED))
    batches = np.array_split(played, min(len(played), 16))
    costs = list(map(len, batches))
    executed = np.array(in_batches(play, batches, costs, shared, "play what was imagined"))
    match = np.array([record["success"] for record in records])
    kinds = np.array([goal.kind for goal in goals])
    judged = kinds != env.UNJUDGED
    figures = {"rollouts": len(records)}
    if judged.any():
        figures["match"] = match[judged].mean()
        figures["executed"] = mean_or_zero(executed[judged[played]])
        figures["executed_of_matched"] = mean_or_zero(executed[match[played]])
    figures["actions"] = np.mean(lengths)
    figures |= world.plausibility(obs, nexts)
    if records[0].get("explanation") is not None:
        fits = []
        for record in records:
            fits.append(world.explanation_fits(record["goal"], record["explanation"]))
        fits = np.array(fits)
        errors = np.concatenate([record["dynamics_error"] for record in records])
        figures["explained"] = fits.mean()
        figures["dynamics_error"] = errors.mean()
        if judged.any():
            figures["match_of_explained"] = mean_or_zero(match[fits & judged])
    encoded = world.encode_goals(goals)
    one_step = world.one_step(encoded)
    if one_step.any():
        first_actions = np.array([taken[0] for taken in actions])
        met = world.success(encoded, first, first, first_actions)  # where nothing moves
        figures["action_match"] = met[one_step].mean()
    return {name: float(value) for name, value in figures.items()}


def replay(plans: Sequence[Sequence[int]]) -> env.Policy:
    """A policy that plays fixed action sequences; past its end a plan repeats its last action."""
    played = np.zeros(len(plans), int)

    def policy(obs, rows):
        actions = []
        for row in rows:
            plan = plans[row]
            actions.append(plan[min(played[row], len(plan) - 1)])
        played[rows] += 1
        return np.array(actions)

    return policy


def played_in_world(world: env.World, record: dict) -> dict:
    """The episode of a rollout's actions in the world, from the state nearest to its start."""
    start = world.state_from_observation(record["observations"][:1])
    actions = record["actions"]
    goals = [env.goal_of(record)]
    (played,) = env.run_episodes(world, replay([actions]), goals, start, len(actions))
    return played


def in_words(figures: Mapping[str, object], separator: str) -> str:
    """Figures that are numbers, on one line."""
    words = []
    for name, value in figures.items():
        if isinstance(value, float):
            words.append(f"{name} {value:.3f}")
    return separator.join(words)


def mean_or_zero(values: np.ndarray) -> float:
    """Mean of rates, 0 where there are none."""
    return values.mean() if len(values) else 0.0
