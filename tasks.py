"""The tasks of grounding: rollouts become examples of instruction following (paper, section 4.1).

    dynamics      "what happens next" (s_t, a_t)               -> s_{t+1}
    explanation   "say what it did"   (s_0, a_0, ..., s_T)     -> text
    generation    goal text           (s_0)                    -> a_0, s_1, a_1, ..., s_T
    consequence   goal text           (s_0)                    -> s_T
    description   "say what is there" s_t, half a sentence     -> the other half (not the paper's)
    decision      goal text           (g_0, s_0, g_1, s_1 ...) -> a_0, a_1, ... (of dt.py alone)
An example is a prompt and the segments that share it; many are packed in a row. This file knows
sequences of positions and no training; sentences come from the world.
"""

import collections
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

import env
from model import ACTION, PAD, RETURN, SEGMENTS, STATE, TASKS, TEXT

# ----------------------------------------------------------------------------------------------
# Prompts

PROMPTS = {
    "dynamics": "Predict the next state after the action.",
    "explanation": "Explain what this rollout achieves.",
    "generation": "Goal: {goal}\nRollout:",
    "consequence": "Goal: {goal}\nFinal state:",
    "description": "Tell where the balls are.",
}
OTHER_WORDS = {  # examples take turns among these, so that an answer does not hang on a wording
    "explanation": (
        "What did these actions accomplish?",
        "Say in words what has been done.",
        "Describe the outcome of this rollout.",
        "Which goal does this behavior fulfil?",
        "Summarize the result for someone who did not watch.",
    )
}
ASKED_AS = {"decision": "generation"}  # tasks with the prompt of another, which they count as
# Never trained on, to ask for explanations with
UNSEEN_PROMPT = "In one sentence, what did the robot bring about?"


def text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text, without the tokenizer's special ones."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt_ids(tokenizer: Tokenizer, task: str, goal: str = "", wording: int = 0) -> list[int]:
    """Token ids of a task's prompt. wording: which of its prompts, counted round."""
    prompts = (PROMPTS[task], *OTHER_WORDS.get(task, ()))
    return text_ids(tokenizer, prompts[wording % len(prompts)].format(goal=goal))


# ----------------------------------------------------------------------------------------------
# Examples: one prompt and the segments that share it, as lists of positions


class Position(NamedTuple):
    """One place of a sequence, maybe to be predicted from the one before."""

    modality: int
    index: int = 0  # of the token or action
    state: np.ndarray | float | None = None  # of an action that before it; or a return-to-go
    predict: bool = False


def text_positions(ids: Sequence[int], predict: bool = False) -> list[Position]:
    """Token ids as positions."""
    return [Position(TEXT, index, None, predict) for index in ids]


def rollout_positions(
    observations: np.ndarray, actions: Sequence[int] = (), predict: bool = False
) -> list[Position]:
    """s0, a0, s1, ... as positions; with `predict`, everything after s0 is to be predicted."""
    positions = [Position(STATE, state=observations[0])]
    for state, action, next_state in zip(observations[:-1], actions, observations[1:]):
        positions.append(Position(ACTION, action, state, predict))
        positions.append(Position(STATE, 0, next_state, predict))
    return positions


# A task's segments from one rollout: (record, world, tokenizer, seed) -> lists of positions


def dynamics_segments(record, world, tokenizer, seed) -> list[list[Position]]:
    """Each transition alone."""
    observations = record["observations"]
    segments = []
    for state, action, next_state in zip(observations, record["actions"], observations[1:]):
        before = [Position(STATE, state=state), Position(ACTION, action, state)]
        segments.append([*before, Position(STATE, 0, next_state, predict=True)])
    return segments


def explanation_segments(record, world, tokenizer, seed) -> list[list[Position]]:
    """The rollout, then the sentence that explains it."""
    answer = text_ids(tokenizer, " " + world.canonical_text(env.goal_of(record)))
    explained = text_positions([*answer, tokenizer.eos_token_id], predict=True)
    return [rollout_positions(record["observations"], record["actions"]) + explained]


def generation_segments(record, world, tokenizer, seed) -> list[list[Position]]:
    """The rollout, to be written from its first state."""
    return [rollout_positions(record["observations"], record["actions"], predict=True)]


def consequence_segments(record, world, tokenizer, seed) -> list[list[Position]]:
    """The first state, then the last."""
    first, last = record["observations"][0], record["observations"][-1]
    return [[Position(STATE, state=first), Position(STATE, 0, last, predict=True)]]


def description_segments(record, world, tokenizer, seed) -> list[list[Position]]:
    """Three states alone, each with a true sentence of which the end is to be written."""
    segments = []
    sentences = world.describe(record["observations"], 3, np.random.default_rng(seed))
    for step, beginning, end in sentences:
        given = text_positions(text_ids(tokenizer, beginning))
        written = text_positions(text_ids(tokenizer, end), predict=True)
        state = Position(STATE, state=record["observations"][step])
        segments.append([state, *given, *written])
    return segments


def returns_to_go(rewards: np.ndarray) -> np.ndarray:
    """What is still to be collected before each action: (T,) -> (T,)."""
    return np.cumsum(rewards[::-1])[::-1]


def decision_segments(record, world, tokenizer, seed) -> list[list[Position]]:
    """Return-to-go, state and action in turn, of which the actions are to be predicted."""
    positions = []
    steps = zip(returns_to_go(record["rewards"]), record["observations"], record["actions"])
    for to_go, state, action in steps:
        positions += [Position(RETURN, state=to_go), Position(STATE, state=state)]
        positions.append(Position(ACTION, action, state, predict=True))
    return [positions]


TASK_EXAMPLES = {  # segments of a rollout, and how many rollouts share one prompt
    "dynamics": (dynamics_segments, 4),
    "explanation": (explanation_segments, 2),
    "generation": (generation_segments, 6),
    "consequence": (consequence_segments, 6),
    "description": (description_segments, 6),
    "decision": (decision_segments, 6),
}


def make_example(
    task: str, tokenizer: Tokenizer, world: env.World, rollouts: Sequence[dict], wording: int = 0
) -> dict[str, np.ndarray]:
    """One grounding example as arrays over L positions; its rollouts share the first one's goal.

    wording: which of the task's prompts, counted round, and the seed of what a task draws.
    Returns input_ids, modality, segments, position_ids, predict, task (L,) and states
    (L, observation_dim), as `KalmForRollouts.forward` takes them. Raises ValueError where there are
    more segments than `SEGMENTS` allows.
    """
    asked = ASKED_AS.get(task, task)
    prompt = text_positions(prompt_ids(tokenizer, asked, rollouts[0]["goal"], wording))
    segments_of, _ = TASK_EXAMPLES[task]
    segments = [prompt]
    for record in rollouts:
        segments += segments_of(record, world, tokenizer, [wording, len(segments) - 1])
    return as_arrays(segments, asked, world)


def as_arrays(
    segments: Sequence[list[Position]], task: str, world: env.World
) -> dict[str, np.ndarray]:
    """An example of a prompt and the segments that share it, as `make_example` returns it."""
    if len(segments) > SEGMENTS:
        raise ValueError(f"an example holds at most {SEGMENTS} segments, got {len(segments)}")
    positions = []
    places = []  # segments all go on where the prompt ends
    for segment in segments:
        start = len(segments[0]) if positions else 0
        places.append(start + np.arange(len(segment)))
        positions += segment
    states = np.zeros((len(positions), world.observation_dim), np.float32)
    for row, position in zip(states, positions):
        if position.state is not None:
            row[:] = position.state
    return {
        "input_ids": np.array([position.index for position in positions]),
        "modality": np.array([position.modality for position in positions]),
        "states": states,
        "segments": np.repeat(np.arange(len(segments)), [len(segment) for segment in segments]),
        "predict": np.array([position.predict for position in positions]),
        "position_ids": np.concatenate(places),
        "task": np.full(len(positions), TASKS.index(task)),
    }


class GroundingExamples(torch.utils.data.Dataset):
    """All examples of rollout records: grouped by goal text, each group once for every task.

    copies: how often they all come, from the second time on under a symmetry of the world.
    """

    def __init__(self, rollouts, tokenizer, world, tasks=TASKS, copies=1, seed=0):
        self.rollouts = rollouts
        self.tokenizer = tokenizer
        self.world = world
        self.copies = copies
        self.seed = seed
        rows_of_goal = collections.defaultdict(list)
        for row, record in enumerate(rollouts):
            rows_of_goal[record["goal"]].append(row)
        self.examples = []  # (task, rows of rollouts)
        for rows in rows_of_goal.values():
            for task in tasks:
                _, size = TASK_EXAMPLES[task]
                for start in range(0, len(rows), size):
                    self.examples.append((task, rows[start : start + size]))

    def __len__(self):
        return len(self.examples) * self.copies

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        copy_number, number = divmod(index, len(self.examples))
        task, rows = self.examples[number]
        rollouts = [self.rollouts[row] for row in rows]
        if copy_number > 0:
            rng = np.random.default_rng([self.seed, index])
            rollouts = self.world.rename(rollouts, rng)
        return make_example(task, self.tokenizer, self.world, rollouts, wording=index)


PADDING = {"modality": PAD, "segments": -1}  # 0 for the rest


def pack(examples: Sequence[dict], row_length: int = 256) -> dict[str, torch.Tensor]:
    """Collate examples into rows of at most row_length positions; a longer one makes a longer row.

    First fit, longest first: little is padded, and `segment_mask` keeps a row's examples apart.
    """
    rows = []
    lengths = []
    for example in sorted(examples, key=lambda example: -len(example["input_ids"])):
        size = len(example["input_ids"])
        fitting = [row for row, length in enumerate(lengths) if length + size <= row_length]
        if not fitting:
            fitting = [len(rows)]
            rows.append([])
            lengths.append(0)
        rows[fitting[0]].append(example)
        lengths[fitting[0]] += size
    batch = {}
    for key, like in examples[0].items():
        shape = (len(rows), max(lengths), *like.shape[1:])
        batch[key] = np.full(shape, PADDING.get(key, 0), like.dtype)
    for row_number, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row):
            end = start + len(example["input_ids"])
            for key, value in example.items():
                batch[key][row_number, start:end] = value
            batch["segments"][row_number, start:end] += number * SEGMENTS
            start = end
    return {key: torch.from_numpy(value) for key, value in batch.items()}
