"""The account of an episode of --stage act: what happened in words, a picture of it in act/, a line in logs/act.jsonl.

This file knows rollout records, and nothing of who acted.
"""
import json
import re

import numpy as np

import env
from data import logs

BESIDE = {"left": "left of", "front": "in front of", "right": "right of"}


def actors(run, methods, named):
    """Who acts: the methods that were named, else the policy of a run with the best mean success over levels, and the LLM.

    methods: all that there are. Raises ValueError for a policy that the run has not.
    """
    learned = [m for m in methods if (run / "policies" / f"{m}.safetensors").is_file()]
    for method in named:
        if method not in (*learned, "llm"):
            raise ValueError(f"--methods {method}: {run} has no such policy, it has {', '.join((*learned, 'llm'))}")
    path = run / "results.json"
    success = json.loads(path.read_text(encoding="utf-8")).get("success", {}) if path.is_file() else {}
    means = {m: np.mean([cell["mean"] for cell in success[m].values()]) if m in success else 0 for m in learned}
    return named or [*sorted(learned, key=lambda m: (means[m], "kalm" in m))[-1:], "llm"]


def judge_of(goal, is_of_run):
    """Which judge a goal has, in words. is_of_run: it is one of the run's goals, and was not read from a sentence typed by hand."""
    if goal.kind == "unknown":
        return "none is known for this sentence, so nobody says whether it is met"
    relations = [f"{a} goes {d}" if b is None else f"{a} is {BESIDE.get(d, d)} {b}" for a, b, d in goal.to_json()["relations"]]
    return f"{' and '.join(relations) or goal.kind} ({'as the goals of the run have it' if is_of_run else 'read from the sentence'})"


def movements(record, least=0.05):
    """How far each ball came in a rollout, in words, where it is at least so many metres."""
    moves = (record["observations"][-1] - record["observations"][0]).reshape(-1, 2)
    ways = [("back", "left", "front", "right")[way] for way in (moves @ env.DIRECTION_VECTORS.T).argmax(1)]
    lengths = np.linalg.norm(moves, axis=1)
    moved = [f"{color} {length:.2f} m {way}" for color, length, way in zip(env.COLORS, lengths, ways) if length >= least]
    return ", ".join(moved) or "nothing"


def write(run, goal, method, record, explanation_fits, seed):
    """A GIF in RUN/act and a line in RUN/logs/act.jsonl. Returns the account in words, three lines."""
    (run / "act").mkdir(exist_ok=True)
    name = re.sub(r"\W+", "-", goal.text.lower())[:40].strip("-")
    gif = run / "act" / f"{name}-{seed}-{method}.gif"
    env.save_gif(gif, record)
    verdict = "not judged" if goal.kind == "unknown" else "goal met" if record["success"] else "goal missed"
    logs.write_line(run / "logs" / "act.jsonl", goal=goal.text, kind=goal.kind, method=method, seed=seed, verdict=verdict,
                    actions=record["actions"].tolist(), explanation=record["explanation"], explanation_fits=explanation_fits, gif=gif.name)
    fit = "fit" if explanation_fits else "do not fit"
    return (f"  {method}: {verdict}, {len(record['actions'])} actions; moved: {movements(record)}\n"
            f"    the LLM, asked what was done: \"{record['explanation']}\" (its balls {fit} the goal)\n"
            f"    {gif}")
