"""Figures of what a grounded LLM imagined and said (paper, section 5.3).

This file knows rollout records and the world that judges them, and no model.
"""

from collections.abc import Sequence

import numpy as np

import env


def explanation_figures(
    world: env.World, records: Sequence[dict], explanations: Sequence[str]
) -> dict[str, float]:
    """How often explanations are right, as rates by part (`World.explanation_scores`)."""
    goals = [env.goal_of(record) for record in records]
    final = np.stack([record["observations"][-1] for record in records])
    scores = world.explanation_scores(goals, explanations, final)
    return {part: float(np.mean(right)) for part, right in scores.items()}


def rollout_figures(world: env.World, records: Sequence[dict]) -> dict[str, float]:
    """Figures of imagined rollouts.

    Of goals that have a judge: match, the rate that fulfils its goal; executed, the rate that does
    when its actions are played in the world from its start; executed_of_matched; action_match, of
    one-step goals the action alone. The world's rates of what cannot be (`World.plausibility`).
    After a self-check explained, the rate whose explanation fits the goal; match_of_explained;
    dynamics_error.
    """
    goals = [env.goal_of(record) for record in records]
    encoded = world.encode_goals(goals)
    first = np.stack([record["observations"][0] for record in records])
    obs = np.concatenate([record["observations"][:-1] for record in records])
    nexts = np.concatenate([record["observations"][1:] for record in records])
    lengths = [len(record["actions"]) for record in records]
    plans = env.replay([record["actions"] for record in records])
    starts = world.state_from_observation(first)
    played = env.run_episodes(world, plans, goals, starts, max(lengths))
    match = np.array([record["success"] for record in records])
    executed = np.array([record["success"] for record in played])
    judged = np.array([goal.kind != env.UNJUDGED for goal in goals])
    figures = {"rollouts": len(records)}
    if judged.any():
        figures["match"] = match[judged].mean()
        figures["executed"] = executed[judged].mean()
        figures["executed_of_matched"] = mean_or_zero(executed[match])
    figures["actions"] = np.mean(lengths)
    figures |= world.plausibility(obs, nexts)
    if records[0].get("explanation") is not None:
        fits = [world.explanation_fits(r["goal"], r["explanation"]) for r in records]
        fits = np.array(fits)
        figures["explained"] = fits.mean()
        if judged.any():
            figures["match_of_explained"] = mean_or_zero(match[fits & judged])
        errors = [record["dynamics_error"] for record in records]
        figures["dynamics_error"] = np.concatenate(errors).mean()
    one_step = world.one_step(encoded)
    if one_step.any():
        actions = np.array([record["actions"][0] for record in records])[one_step]
        where = first[one_step]
        figures["action_match"] = world.success(encoded[one_step], where, where, actions).mean()
    return {name: float(value) for name, value in figures.items()}


def mean_or_zero(values: np.ndarray) -> float:
    """Mean of rates, 0 where there are none."""
    return values.mean() if len(values) else 0.0
