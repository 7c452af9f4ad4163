"""What offline RL draws its batches from: encodings of goal texts, and rollouts as flat arrays.

Texts are encoded once by a frozen language model. This file knows no algorithm, and no particular
world: rollouts come in as records.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.rollouts import terminals_of
from experiment.processes import in_batches

# ----------------------------------------------------------------------------------------------
# Goal encodings


def encode_texts(
    texts: Sequence[str], model, tokenizer, batch_size: int = 128, shared: bool = False
) -> Tensor:
    """Frozen encodings (len(texts), hidden) float32: the mean of a text's last hidden states.

    model: any transformers encoder or causal LM without a head, e.g. `AutoModel.from_pretrained`.
    shared: all processes call this with the same, and each does a part.
    """
    model.eval()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    @torch.inference_mode()
    def work(rows):
        asked = [texts[row] for row in rows]
        tokens = tokenizer(asked, padding=True, padding_side="right", return_tensors="pt")
        mask = tokens["attention_mask"].to(model.device)
        ids = tokens["input_ids"].to(model.device)
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        lengths = mask.sum(1)
        weight = mask[..., None] / lengths[:, None, None]
        return list((hidden * weight).sum(1).cpu().numpy())

    order = np.argsort([len(text) for text in texts], kind="stable")  # like lengths: little padding
    batches = [order[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    costs = [len(rows) * len(texts[rows[-1]]) for rows in batches]
    means = in_batches(work, batches, costs, shared, "encode goals")
    return torch.from_numpy(np.stack(means))


class GoalTable:
    """Encodings of distinct goal texts: `table` is (texts, hidden) float32, `index[text]` its row.

    scale: (2, hidden), the mean and deviation that standardised what the encoder gave, for
    `with_texts`.
    """

    def __init__(self, texts: Sequence[str], table: Tensor, scale: Tensor | None = None):
        self.index = {text: row for row, text in enumerate(texts)}
        self.table = table
        self.scale = scale

    @classmethod
    def encode(cls, training_texts, novel_texts, model, tokenizer, shared=False) -> "GoalTable":
        """Encode all texts, standardised by the mean and deviation of the training texts.

        shared: as `encode_texts`.
        """
        texts = list(dict.fromkeys([*training_texts, *novel_texts]))
        encodings = encode_texts(texts, model, tokenizer, shared=shared)
        known = encodings[: len(set(training_texts))]
        deviation = known.std(0) if len(known) > 1 else torch.ones_like(known[0])
        scale = torch.stack([known.mean(0), deviation + 1e-6])
        return cls(texts, (encodings - scale[0]) / scale[1], scale)

    def with_texts(self, texts: Sequence[str], model, tokenizer, shared=False) -> "GoalTable":
        """The table with more texts behind, by the model that encoded the others."""
        more = [text for text in dict.fromkeys(texts) if text not in self.index]
        encodings = encode_texts(more, model, tokenizer, shared=shared)
        encodings = (encodings - self.scale[0]) / self.scale[1]
        return GoalTable([*self.index, *more], torch.cat([self.table, encodings]), self.scale)

    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """Encodings of known texts: (len(texts), hidden)."""
        rows = [self.index[text] for text in texts]
        return self.table[rows]

    def save(self, path: str | Path) -> None:
        """A safetensors file; the texts are its metadata, as JSON."""
        tensors = {"table": self.table, "scale": self.scale}
        tensors = {name: x.cpu().contiguous() for name, x in tensors.items() if x is not None}
        metadata = {"texts": json.dumps(list(self.index))}
        save_file(tensors, str(path), metadata)

    @classmethod
    def load(cls, path: str | Path) -> "GoalTable":
        with safe_open(str(path), "pt") as file:
            texts = json.loads(file.metadata()["texts"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        return cls(texts, **tensors)


# ----------------------------------------------------------------------------------------------
# Transitions


class Batch(NamedTuple):
    """Transitions, one a row: (N, ...) in a buffer, (seeds, batch, ...) in training."""

    obs: Tensor  # (..., observation_dim)
    goal: Tensor  # (...,) row of the goal table, in training one for each few transitions
    action: Tensor  # (...,) int64
    reward: Tensor  # (...,); losses get it scaled, as the observations
    next_obs: Tensor  # (..., observation_dim)
    done: Tensor  # (...,) float32: 1 at the end of a success, after which there is no reward


EMPTY = Batch(*np.zeros((6, 0)))


class Groups:
    """Rows of an array that lies group by group. sizes: how many rows each group has."""

    def __init__(self, sizes: np.ndarray):
        self.sizes = sizes
        self.starts = sizes.cumsum() - sizes

    def draw(self, groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A row of each of the groups, any of its rows alike."""
        return self.starts[groups] + rng.integers(self.sizes[groups])


class Buffer:
    """The transitions of rollout records on a device, goal by goal.

    balanced: draw each goal as often as any other, and each of its rollouts, however long.
    dynamics_tolerance: leave out transitions whose `dynamics_error` is larger; 0 keeps all.
    """

    def __init__(
        self, records, goals: GoalTable, device="cpu", balanced=False, dynamics_tolerance=0.0
    ):
        row_of = lambda record: goals.index[record["goal"]]
        parts = []
        for record in sorted(records, key=row_of):
            part = _transitions(record, row_of(record))
            error = record.get("dynamics_error")
            if dynamics_tolerance and error is not None:
                believed = error <= dynamics_tolerance
                part = Batch(*[column[believed] for column in part])
            if len(part.action):
                parts.append(part)
        columns = Batch(*[np.concatenate(column) for column in zip(*parts)]) if parts else EMPTY
        self.balanced = balanced
        self.transitions = Batch(*[torch.as_tensor(column, device=device) for column in columns])
        _, self.goal_of_transition, transitions = np.unique(
            columns.goal, return_inverse=True, return_counts=True
        )
        _, rollouts = np.unique([part.goal[0] for part in parts], return_counts=True)
        self.transitions_of_goal = Groups(transitions)
        self.rollouts_of_goal = Groups(rollouts)
        self.transitions_of_rollout = Groups(np.array([len(part.action) for part in parts], int))

    def __len__(self):
        return len(self.transitions.action)

    def draw(self, shape: tuple[int, ...], each: int, rng: np.random.Generator) -> np.ndarray:
        """Rows to train on, (*shape, each), of which the last axis has one goal: uniform over
        transitions, or over goals, then each one's rollouts, then their transitions.
        """
        if self.balanced:
            goal = rng.integers(len(self.rollouts_of_goal.sizes), size=shape)
        else:
            goal = self.goal_of_transition[rng.integers(len(self), size=shape)]
        goal = np.repeat(goal[..., None], each, axis=-1)
        if self.balanced:
            rollout = self.rollouts_of_goal.draw(goal, rng)
            return self.transitions_of_rollout.draw(rollout, rng)
        return self.transitions_of_goal.draw(goal, rng)


class Batches:
    """What training steps see: number n of the batches (seeds, size) is batches[n].

    Of each batch all is real but for a share, to which each of the imaginary buffers gives as much
    as the others. `each` transitions in turn have one goal, so that what a network makes of it is
    computed once: `goal` is (seeds, size / each). Rows are drawn for BLOCK batches at a time, from
    a stream of each block's own: so number n is the same for who begins there. prepare: makes of
    all transitions, once, what batches have.
    """

    BLOCK = 100

    def __init__(
        self,
        real: Buffer,
        imaginary: Sequence[Buffer],
        size: int,
        seeds: int,
        share: float,
        seed: int,
        each: int = 1,
        prepare: Callable[[Batch], Batch] | None = None,
    ):
        self.buffers = [real, *imaginary]
        self.each = each
        groups = size // each
        bounds = np.linspace(0, round(groups * share), len(imaginary) + 1).astype(int)
        counts = np.diff(bounds)
        self.counts = [groups - counts.sum(), *counts]  # of each buffer's goals in a batch
        self.seeds = seeds
        self.seed = seed
        columns = zip(*[buffer.transitions for buffer in self.buffers])
        transitions = Batch(*[torch.cat(column) for column in columns])
        self.transitions = prepare(transitions) if prepare else transitions
        self.block = None
        self.rows = None

    def __getitem__(self, number: int) -> Batch:
        block, within = divmod(number, self.BLOCK)
        if block != self.block:
            self.rows = self._draw(np.random.default_rng([self.seed, block]))
            self.block = block
        rows = self.rows[within]
        batch = Batch(*[column[rows] for column in self.transitions])
        return batch._replace(goal=batch.goal[:, :: self.each])

    def _draw(self, rng: np.random.Generator) -> Tensor:
        """Rows of all transitions, (BLOCK, seeds, size)."""
        first = 0
        drawn = []
        for buffer, count in zip(self.buffers, self.counts):
            shape = (self.BLOCK, self.seeds, count)
            if count:
                drawn.append(first + buffer.draw(shape, self.each, rng))
            first += len(buffer)
        rows = np.concatenate(drawn, axis=2).reshape(self.BLOCK, self.seeds, -1)
        return torch.as_tensor(rows, device=self.transitions.action.device)


def _transitions(record, goal_row):
    """The transitions of a rollout record: arrays (T, ...)."""
    observations = record["observations"]
    return Batch(
        obs=observations[:-1],
        goal=np.full(len(record["actions"]), goal_row),
        action=record["actions"],
        reward=record["rewards"],
        next_obs=observations[1:],
        done=terminals_of(record).astype(np.float32),
    )
