"""What a grounded LLM says of rollouts: what they achieve, and whether it believes them.

It reads rollouts as it was taught to (`tasks`) and answers in text or in states. This file makes no
rollouts and knows no judge.
"""

from collections.abc import Sequence

import numpy as np
import torch

import env
from experiment.processes import in_batches
from model import SEGMENTS, KalmForRollouts
from sequences import decode, fitting_batch
from tasks import PROMPTS, Tokenizer, as_arrays, make_example, pack, text_ids, text_positions
from tasks import rollout_positions as positions_of

POSITIONS_A_BATCH = 4096  # of examples with claims


def self_check(model, tokenizer: Tokenizer, world: env.World, records: list[dict]) -> None:
    """Add to imagined rollouts what the model says of them and whether it believes them: shared."""
    explanations = explain(model, tokenizer, records, shared=True)
    claims = claim_log_probs(model, tokenizer, world, records, shared=True)
    errors = dynamics_error(model, tokenizer, world, records, shared=True)
    for record, explanation, claimed, error in zip(records, explanations, claims, errors):
        record.update(explanation=explanation, claims=claimed, dynamics_error=error)


def explain(
    model: KalmForRollouts,
    tokenizer: Tokenizer,
    records: Sequence[dict],
    prompt: str = PROMPTS["explanation"],
    max_tokens: int = 24,
    batch_size: int | None = None,
    shared: bool = False,
) -> list[str]:
    """What the model says that rollouts achieve, greedily decoded: a text for each record.

    batch_size and shared: as in `generate_all`.
    """
    model.eval()
    asked = text_positions(text_ids(tokenizer, prompt))
    lengths = np.array([len(record["actions"]) for record in records], int)
    if batch_size is None:
        positions = len(asked) + 2 * max(lengths, default=0) + max_tokens
        batch_size = fitting_batch(model, positions, shared)
    order = np.argsort(lengths, kind="stable")
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    costs = [(len(asked) + 2 * lengths[rows] + max_tokens).sum() for rows in batches]

    def work(rows):
        prompts = []
        for row in rows:
            shown = positions_of(records[row]["observations"], records[row]["actions"])
            prompts.append(asked + shown)
        answers = decode(model, prompts, max_tokens, tokenizer.eos_token_id)
        return [tokenizer.decode(answer).strip() for answer in answers]

    return in_batches(work, batches, costs, shared, "explain")


def claim_log_probs(
    model: KalmForRollouts,
    tokenizer: Tokenizer,
    world: env.World,
    records: Sequence[dict],
    shared: bool = False,
) -> list[np.ndarray]:
    """How likely an explanation of each rollout makes the claims of its goal (`World.claims`).

    Returns for each record, (C,) float32, the logarithms of the probabilities that a sentence which
    begins as a claim goes on as the claim does. shared: as in `generate_all`.
    """
    model.eval()
    asked = text_positions(text_ids(tokenizer, PROMPTS["explanation"]))
    claims = {}  # of each goal
    for goal in {record["goal"] for record in records}:
        claims[goal] = [claim_positions(tokenizer, *claim) for claim in world.claims(goal)]
    claims_of = [claims[record["goal"]] for record in records]
    sizes = np.zeros(len(records), int)  # in positions; 0 without claims
    for row, claimed in enumerate(claims_of):
        if claimed:
            shown = 2 * len(records[row]["actions"]) + 1
            sizes[row] = len(asked) + shown + sum(map(len, claimed))

    @torch.inference_mode()
    def work(rows):
        examples = []
        lengths = []  # of the end of each claim
        for row in rows:
            shown = positions_of(records[row]["observations"], records[row]["actions"])
            examples.append(as_arrays([asked + shown, *claims_of[row]], "explanation", world))
            for claim in claims_of[row]:
                lengths.append(sum(position.predict for position in claim))
        batch = pack(examples, row_length=0)  # a row each, in this order: the longest comes first
        batch = {key: value.to(model.device) for key, value in batch.items()}
        of_tokens = -model(**batch).text_losses.float().cpu().numpy()
        firsts = np.cumsum([0, *lengths[:-1]])
        of_claims = np.add.reduceat(of_tokens, firsts)
        counts = [len(claims_of[row]) for row in rows]
        return np.split(of_claims, np.cumsum(counts)[:-1])

    batches = longest_first(sizes)
    costs = [sizes[rows].sum() for rows in batches]
    answers = iter(in_batches(work, batches, costs, shared, "check claims"))
    return [next(answers) if claimed else np.zeros(0, np.float32) for claimed in claims_of]


def longest_first(sizes: np.ndarray) -> list[np.ndarray]:
    """Rows of each batch, of about POSITIONS_A_BATCH positions; rows of size 0 are left out."""
    order = np.argsort(-sizes, kind="stable")
    order = order[: np.count_nonzero(sizes)]
    batches = []
    while len(order):
        count = max(1, POSITIONS_A_BATCH // sizes[order[0]])
        batches.append(order[:count])
        order = order[count:]
    return batches


def claim_positions(tokenizer: Tokenizer, beginning: str, end: str) -> list:
    """A claim as positions, of which the end is to be predicted."""
    given = text_positions(text_ids(tokenizer, beginning))
    return given + text_positions(text_ids(tokenizer, end), predict=True)


def dynamics_error(
    model: KalmForRollouts,
    tokenizer: Tokenizer,
    world: env.World,
    records: Sequence[dict],
    rollouts_a_row: int = 16,
    shared: bool = False,
) -> list[np.ndarray]:
    """How far imagined next states are from the model's answer when asked for that transition
    alone.

    Returns an array (T,) for each record, the distance of the object that differs most.
    """
    model.eval()
    lengths = np.array([len(record["actions"]) for record in records], int)
    size = (SEGMENTS - 1) // max(lengths, default=1)  # each transition is a segment
    size = max(1, min(rollouts_a_row, size))
    rows = np.arange(len(records))
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    costs = [lengths[rows].sum() for rows in batches]

    @torch.inference_mode()
    def work(rows):
        example = make_example("dynamics", tokenizer, world, [records[row] for row in rows])
        batch = {key: value.to(model.device) for key, value in pack([example]).items()}
        ahead = batch["predict"][:, 1:]
        gap = model(**batch).state_pred[:, :-1] - batch["states"][:, 1:]
        gap = gap[ahead].float().unflatten(-1, (world.objects, -1))
        largest = gap.norm(dim=-1).amax(-1).cpu().numpy()
        return np.split(largest, np.cumsum(lengths[rows])[:-1])

    return in_batches(work, batches, costs, shared, "check dynamics")
