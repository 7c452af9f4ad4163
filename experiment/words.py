"""What an agent makes of words that no training sentence has, seen in its first action alone.

Success can be luck: who wanders meets a goal at times. What is asked here no luck can lift: does
the first action show that a word was understood? Goals in new words stand beside the same goals in
nonsense words, the floor, and in known words, the ceiling. This file knows worlds and how actions
are valued, and no method.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray

import env
import rollout
from experiment.intervals import interval
from experiment.processes import in_batches
from model import KalmForRollouts
from tasks import Tokenizer

KINDS = ("new", "nonsense", "known")  # of words

# ----------------------------------------------------------------------------------------------
# Episodes


def groups_of(goals: Sequence[env.Goal]) -> list[ndarray]:
    """Rows of episodes that are drawn and played together. Those of level words, the last, are
    apart: what others draw, and how their batches round, does not hang on them.
    """
    are_words = np.array([goal.level == env.WORDS for goal in goals])
    return [np.flatnonzero(rows) for rows in (~are_words, are_words) if rows.any()]


def draw_starts(world: env.World, goals: Sequence[env.Goal], rng: np.random.Generator) -> ndarray:
    """A start of each episode, (episodes, state_dim), that does not fulfil its goal."""
    starts = []
    for rows in groups_of(goals):
        starts.append(env.unfulfilled_states(world, rng, [goals[row] for row in rows]))
    return np.concatenate(starts)


# ----------------------------------------------------------------------------------------------
# First actions


class Question(NamedTuple):
    """Goals, of which new, nonsense or known words name a part, and what is seen."""

    part: str
    words: str
    goals: list[env.Goal]
    obs: ndarray  # (goals, observation_dim)


def as_heard(goals: Sequence[env.Goal], heard: Mapping[str, str]) -> list[env.Goal]:
    """Goals with the texts that agents hear instead, where there are such (`Run.heard`)."""
    found = []
    for goal in goals:
        text = heard.get(goal.text, goal.text)
        found.append(dataclasses.replace(goal, text=text))
    return found


def texts(asked: Sequence[Question]) -> list[str]:
    """Of all goals of questions."""
    return [goal.text for question in asked for goal in question.goals]


Values = Callable[[Sequence[env.Goal], ndarray], ndarray]  # goals, obs (B, D) -> (B, num_actions)


def questions(world: env.World, split: str, seed: int, count: int) -> list[Question]:
    """For each part that a world has new words for, count goals in words of each kind, else alike.
    Starts are drawn until it is clear there what is right, which tells nothing of the goal.
    """
    asked = []
    for number, part in enumerate(world.word_parts):
        of_kinds = {}
        for words in KINDS:
            rng = np.random.default_rng([seed, 9, number])
            of_kinds[words] = world.word_goals(part, words, split, count, rng)
        goals = of_kinds["known"]
        obs = world.observe(world.initial_states(rng, count, goals))
        for _ in range(100):
            nothing = np.zeros((count, world.num_actions))
            unclear = np.isnan(world.first_actions_right(part, goals, obs, nothing))
            again = [goals[row] for row in np.flatnonzero(unclear)]
            obs[unclear] = world.observe(world.initial_states(rng, len(again), again))
        asked += [Question(part, words, own, obs) for words, own in of_kinds.items()]
    return asked


def questions_as_heard(asked: Sequence[Question], heard: Mapping[str, str]) -> list[Question]:
    """Questions as agents hear them; new words that they hear otherwise also as they were said."""
    found = []
    for question in asked:
        goals = as_heard(question.goals, heard)
        found.append(question._replace(goals=goals))
        if question.words == "new" and goals != question.goals:
            found.append(question._replace(words="as said"))
    return found


def figures(world: env.World, asked: Sequence[Question], agents: Sequence[Values]) -> dict:
    """How often the first actions of agents, which differ by their seeds, are right: {part: {kind
    of words: [mean, low, high]}} with 95% intervals, and in `gain` the new words' lead over
    nonsense, goal by goal.
    """
    right = {}
    for part, words, goals, obs in asked:
        scores = []
        for of_agent in agents:
            values = of_agent(goals, obs)
            scores.append(world.first_actions_right(part, goals, obs, values))
        right.setdefault(part, {})[words] = np.array(scores)
    found = {}
    for part, of_kinds in right.items():
        of_kinds["gain"] = of_kinds["new"] - of_kinds["nonsense"]
        found[part] = {}
        for name, scores in of_kinds.items():
            mean = float(scores.mean())
            each = np.arange(scores.shape[1]).astype(str)  # a goal has one start
            found[part][name] = [mean, *interval([scores], [each])]
    return found


def llm_values(model: KalmForRollouts, tokenizer: Tokenizer, batch_size: int = 128) -> Values:
    """The grounded model's logits of the first action; all processes share the work."""

    @torch.inference_mode()
    def values(goals, obs):
        def work(rows):
            sequences = rollout.prefill(model, tokenizer, [goals[row] for row in rows])
            seen = torch.as_tensor(obs[rows], device=model.device)
            sequences.feed(model.embed_states(seen))
            logits = model.action_logits(sequences.hidden)
            return list(logits.float().cpu().numpy())

        rows = np.arange(len(goals))
        batches = [rows[start : start + batch_size] for start in rows[::batch_size]]
        costs = [len(batch) for batch in batches]
        found = in_batches(work, batches, costs, True, "new words")
        return np.array(found)

    return values
