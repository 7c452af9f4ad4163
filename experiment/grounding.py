"""How well a grounded language model does on rollouts that it was not trained on (paper, 5.3).

This file knows the model and what it is asked, and no training.
"""

from collections.abc import Sequence

import numpy as np

import env
import ground
import rollout
import tasks
from data.grounded import is_sharded
from experiment.quality import explanation_figures, rollout_figures
from explain import explain
from model import KalmForRollouts
from tasks import Tokenizer

PROMPTS = {"explanation": tasks.PROMPTS["explanation"], "unseen_prompt": tasks.UNSEEN_PROMPT}
ON_THE_WAY = 64  # rollouts to explain, and easy goals, at each of the Trainer's eval_steps
EASY_GOALS = 200  # when it is grounded


def grounding_figures(
    model: KalmForRollouts, tokenizer: Tokenizer, world: env.World, held_out: Sequence[dict]
) -> dict[str, float]:
    """Figures of a grounded model on held-out rollouts: teacher-forced, of explanations with a
    prompt of training and an unseen one, and of one step toward easy goals, where easy goals take
    one: how often the action fits, and the state that is imagined to follow.
    """
    figures = ground.held_out_figures(model, tokenizer, world, held_out)
    return figures | _generated(model, tokenizer, world, held_out, EASY_GOALS)


def figures_on_the_way(
    model: KalmForRollouts, tokenizer: Tokenizer, world: env.World, held_out, batch_size: int
) -> dict[str, float]:
    """The same at bounded cost, of a model in training; teacher-forced alone where it is sharded,
    which cannot be sampled from.
    """
    figures = ground.held_out_figures(model, tokenizer, world, held_out, batch_size)
    if is_sharded(model):
        return figures
    return figures | _generated(model, tokenizer, world, held_out[:ON_THE_WAY], ON_THE_WAY)


def longer_log(before: list[dict], more: list[dict]) -> list[dict]:
    """A log of losses and held-out figures, and behind it the Trainer's of a training since."""
    steps = before[-1]["step"] if before else 0
    kept = [entry for entry in more if {"loss", "eval_action_accuracy"} & set(entry)]
    return before + [{**entry, "step": steps + entry["step"]} for entry in kept]


def _generated(model, tokenizer, world, rollouts, easy_goals):
    figures = {}
    for name, prompt in PROMPTS.items():
        explanations = explain(model, tokenizer, rollouts, prompt)
        parts = explanation_figures(world, rollouts, explanations)
        figures |= {f"{name}_{part}": rate for part, rate in parts.items()}
    rng = np.random.default_rng(0)
    goals = world.sample_goals("easy", "validation", easy_goals, rng)
    if world.one_step(world.encode_goals(goals)).all():
        obs = world.observe(env.unfulfilled_states(world, rng, goals))
        records = rollout.generate_all(model, tokenizer, world, goals, obs, max_steps=1)
        easy = rollout_figures(world, records)
        figures |= {"easy_action": easy["action_match"], "easy_state": easy["match"]}
    return figures
