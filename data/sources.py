"""Which rollouts policies learn from beside the real ones: imagined, or real ones renamed.

The renamed ones are the control without a language model. This file knows the judge and the words
of rollouts, and nothing of how they were made or are learned from.
"""

import collections
from collections.abc import Mapping, Sequence

import numpy as np

import env


def is_wanted(world: env.World, record: dict, keep: str) -> bool:
    """Whether an imagined rollout may be kept: matched (judge), explained (own words) or both."""
    if record["kind"] == env.UNJUDGED:
        keep = "explained"  # all that can tell
    if keep in ("matched", "both") and not record["success"]:
        return False
    if keep in ("explained", "both"):
        return world.explanation_fits(record["goal"], record["explanation"])
    return True


def kept_rollouts(
    world: env.World, imagined: Sequence[dict], keep: str, per_goal: int
) -> list[dict]:
    """The wanted ones of imagined rollouts, at most per_goal of a goal (0: all).

    Where the model's own words decide, it is one of each start. Raises ValueError for rollouts from
    before these words were asked for.
    """
    wanted = [record for record in imagined if is_wanted(world, record, keep)]
    told = []  # rows that the model's own words decide on
    for row, record in enumerate(wanted):
        if keep == "explained" or record["kind"] == env.UNJUDGED:
            told.append(row)
    left_out = set(told) - best_of_starts(wanted, told)
    kept = []
    counts = collections.Counter()
    for row, record in enumerate(wanted):
        if row not in left_out:
            counts[record["goal"]] += 1
            if not per_goal or counts[record["goal"]] <= per_goal:
                kept.append(record)
    return kept


def best_of_starts(records: Sequence[dict], rows: Sequence[int]) -> set[int]:
    """Of rows of rollouts for one goal from one start, the row that the model itself prefers.

    That is the one of which an explanation makes the goal's claims with the highest probability.
    Goals without claims keep all rows. Raises ValueError for rollouts without the field.
    """
    rows_of_goal = collections.defaultdict(list)
    for row in rows:
        if records[row].get("claims") is None:
            raise ValueError(
                "these rollouts were imagined without asking the model for claims; "
                "run `--stage imagine --force`"
            )
        rows_of_goal[records[row]["goal"]].append(row)
    chosen = set()
    for alike in rows_of_goal.values():
        claims = np.array([records[row]["claims"] for row in alike])
        if claims.size == 0:
            chosen.update(alike)
            continue
        best_of_start = {}
        for scored in zip(claim_scores(claims), alike):
            start = records[scored[1]]["observations"][0].tobytes()
            best_of_start[start] = max(best_of_start.get(start, scored), scored)
        chosen.update(row for _, row in best_of_start.values())
    return chosen


def claim_scores(claims: np.ndarray) -> np.ndarray:
    """How well rollouts fit their goal, (rollouts,), from logarithms of probabilities (rollouts,
    claims).

    Words alone do not tell which of its claims a goal means; the best guess is what its rollouts
    mostly do. So a claim weighs as the square of its mean probability.
    """
    probabilities = np.exp(claims - claims.max())  # the largest as 1, so that not all vanish
    weights = probabilities.mean(0) ** 2
    return claims @ weights


def by_source(
    world: env.World,
    real: Sequence[dict],
    imagined: Mapping[str, list[dict]],
    goals: Mapping[str, Sequence[env.Goal]],
    rng: np.random.Generator,
) -> dict[str, dict[str, list[dict]]]:
    """{source of a method: {part: records}}. imagined, goals: by level.

    relabel has as many rollouts a level as kalm where the real ones fulfil as many novel goals.
    """
    relabelled = {}
    both = {}
    for level, records in imagined.items():
        relabelled[level] = relabel(world, real, goals[level], len(records), rng)
    for name, levels in (("relabelled", relabelled), ("imagined", imagined)):
        for level, records in levels.items():
            both[f"{name} {level}"] = records
    return {"": {}, "relabel": relabelled, "kalm": dict(imagined), "both": both}


def relabel(
    world: env.World,
    records: Sequence[dict],
    goals: Sequence[env.Goal],
    count: int,
    rng: np.random.Generator,
    pool: int = 6000,
) -> list[dict]:
    """Real rollouts for novel goals that they happen to fulfil, spread evenly over those goals.

    Of `pool` records, count new ones are made, or as many as there are. They end where they first
    fulfil the goal; one-step goals, judged by the action as in the world, take that step alone.
    """
    chosen = [records[row] for row in rng.permutation(len(records))[:pool]]
    obs = np.concatenate([record["observations"][:-1] for record in chosen])
    nexts = np.concatenate([record["observations"][1:] for record in chosen])
    actions = np.concatenate([record["actions"] for record in chosen])
    lengths = np.array([len(record["actions"]) for record in chosen])
    rollout_of = np.repeat(np.arange(len(chosen)), lengths)  # of each transition
    first = np.cumsum(lengths) - lengths  # the first transition of each rollout
    one_step = world.one_step(world.encode_goals(goals))
    candidates = []  # how many of the same goal come before it, goal, last transition
    for row, goal in enumerate(goals):
        encoded = np.repeat(world.encode_goals([goal]), len(obs), 0)
        hits = np.flatnonzero(world.success(encoded, obs, nexts, actions))
        if not one_step[row]:
            _, first_hits = np.unique(rollout_of[hits], return_index=True)
            hits = hits[first_hits]
            met_at_start = world.fulfilled(encoded[: len(first)], obs[first])
            of_hits = met_at_start[rollout_of[hits]]
            hits = hits[~of_hits]
        for turn, hit in enumerate(rng.permutation(hits)):
            candidates.append((turn, row, hit))
    fulfilled = []
    episodes = []
    for _, row, hit in sorted(candidates)[:count]:
        number = rollout_of[hit]
        end = hit - first[number] + 1
        begin = end - 1 if one_step[row] else 0
        observations = chosen[number]["observations"][begin : end + 1]
        fulfilled.append(goals[row])
        episodes.append((observations, chosen[number]["actions"][begin:end], None))
    return env.rollout_records(world, fulfilled, episodes)
