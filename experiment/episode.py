"""The account of an episode of --stage act: in words, as a picture in act/ and in logs/act.jsonl.

This file knows rollout records and what a world says of them, and nothing of who acted.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import env
from experiment import folder


@dataclass(frozen=True)
class Acting:
    """What `--stage act` does: a goal in words, the start, and who acts (none named: the best)."""

    goal: str
    start_seed: int
    methods: list[str]


def verdict_of(record: dict) -> str:
    """What the judge says of a rollout: "goal met", "goal missed" or "not judged"."""
    if record["kind"] == env.UNJUDGED:
        return "not judged"
    return "goal met" if record["success"] else "goal missed"


def actors(run: Path, methods: Sequence[str], named: Sequence[str]) -> list[str]:
    """Who acts: the named methods, else the policy with the best mean success, and the LLM.

    methods: all that there can be. Raises ValueError for a named one that the run does not have.
    """
    kept = {path.stem for path in (run / "policies").iterdir()}
    learned = [name for name in methods if name in kept]
    able = [*learned, "llm"]
    for method in named:
        if method not in able:
            has = ", ".join(able)
            raise ValueError(f"--methods {method}: {run} has no such policy, it has {has}")
    if named:
        return list(named)
    path = run / "results.json"
    success = folder.read_json(path)["success"] if path.is_file() else {}

    def by_success(method):
        rates = [cell["mean"] for cell in success.get(method, {}).values()]
        return sum(rates), "kalm" in method

    best = sorted(learned, key=by_success)[-1:]
    return [*best, "llm"]


def judge_in_words(world: env.World, goal: env.Goal, is_of_run: bool) -> str:
    """Which judge a goal has. is_of_run: the run has this goal, it was not read from a sentence."""
    if goal.kind == env.UNJUDGED:
        return "none is known for this sentence, so nobody says whether it is met"
    source = "as the goals of the run have it" if is_of_run else "read from the sentence"
    return f"{world.goal_in_words(goal)} ({source})"


def write_account(run: Path, world: env.World, method: str, record: dict, seed: int) -> str:
    """A GIF in RUN/act and a line in RUN/logs/act.jsonl. Returns three lines for the terminal.

    record: of the episode, with the explanation that the LLM gave of it.
    """
    explanation_fits = world.explanation_fits(record["goal"], record["explanation"])
    words = re.sub(r"\W+", "-", record["goal"].lower())
    name = words[:100].strip("-")
    gif = run / "act" / f"{name}-{seed}-{method}.gif"
    gif.parent.mkdir(exist_ok=True)
    save_gif(gif, world, record)
    about = {"goal": record["goal"], "kind": record["kind"], "method": method, "seed": seed}
    done = {"verdict": verdict_of(record), "actions": record["actions"].tolist()}
    said = {"explanation": record["explanation"], "explanation_fits": explanation_fits}
    log = run / "logs" / "act.jsonl"
    folder.append_json(log, **about, **done, **said, gif=gif.name)
    first, *_, last = record["observations"]
    changes = world.change_in_words(first, last)
    fit = "names what the goal names" if explanation_fits else "does not fit the goal"
    steps = len(record["actions"])
    return (
        f"  {method}: {verdict_of(record)}, {steps} actions; changed: {changes}\n"
        f'    the LLM, asked what was done: "{record["explanation"]}" (this {fit})\n'
        f"    {gif}"
    )


def save_gif(
    path, world: env.World, *records: dict, captions=("",), frame_ms: int = 350, size: int = 256
) -> None:
    """Rollout records as an animated GIF, side by side with a caption each.

    path: a file name or a binary file.
    """
    strips = []
    for caption, record in zip(captions, records, strict=True):
        actions = [*map(int, record["actions"]), None]
        pictures = []
        for obs, action in zip(record["observations"], actions):
            image = Image.fromarray(world.draw(obs, action, size))
            ImageDraw.Draw(image).text((8, 6), caption, fill=(20, 20, 20), font_size=10)
            pictures.append(np.asarray(image))
        strips.append(pictures)
    frames = [Image.fromarray(np.concatenate(pictures, 1)) for pictures in zip(*strips)]
    rest = frames[1:] + frames[-1:] * 3  # the end is shown for longer
    frames[0].save(path, "GIF", save_all=True, append_images=rest, duration=frame_ms, loop=0)
