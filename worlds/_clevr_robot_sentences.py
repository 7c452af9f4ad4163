"""CLEVR-Robot's goals in words: built-in patterns, plain sentences and how they are read.

This file knows the names of balls and directions, and nothing of where the balls are.
"""

import functools
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

from env import Goal

COLORS = ("red", "blue", "green", "purple", "cyan")
DIRECTIONS = ("behind", "left", "front", "right")  # the opposite is two further
SENTENCES = json.loads(Path(__file__).with_name("clevr_robot.json").read_text(encoding="utf-8"))
PATTERNS = SENTENCES["patterns"]
PHRASES = SENTENCES["phrases"]

Relation = tuple[str, str | None, str]  # ball, other ball, direction

# ----------------------------------------------------------------------------------------------
# Writing


def fill_pattern(pattern: dict, colors: Sequence[str], directions: Sequence[str]) -> Goal:
    """Goal from a pattern; colors: for {a} {b} {c} {e}, directions: for {d} {d2} {d3}, in turn."""
    words = dict(zip("abce", colors))
    names = {None: None, **words}
    for slot, direction in zip(("d", "d2", "d3"), directions):
        names[slot] = direction
        names[f"-{slot}"] = DIRECTIONS[DIRECTIONS.index(direction) - 2]
        for table, phrases in PHRASES.items():
            words[f"{slot}_{table}"] = phrases[direction]
    relations = []
    for relation in pattern["relations"]:
        relations.append(tuple(names[name] for name in relation))
    text = pattern["text"].format(**words)
    text = text[0].upper() + text[1:]
    return Goal(text, pattern["level"], pattern["kind"], tuple(relations))


def canonical_sentence(ball: str, other: str, direction: str) -> str:
    """The plain sentence of a relation: both balls first, without which no direction is known."""
    return f"The {ball} ball is near the {other} ball, {PHRASES['of'][direction]} it."


def renamed(text: str, names: dict[str, str]) -> str:
    """A text with other names for the balls."""

    def new_name(match):
        name = names[match[0].lower()]
        return name.capitalize() if match[0].istitle() else name

    return re.sub(rf"\b{ANY_COLOR}\b", new_name, text, flags=re.IGNORECASE)


# ----------------------------------------------------------------------------------------------
# Reading

ANY_COLOR = f"({'|'.join(COLORS)})"
BALL = f"(?:the )?{ANY_COLOR}(?: ball| one)?"
PLAIN_SENTENCE = re.compile(
    "(?:please )?(?:put|push|move|place|bring|get|roll|set|slide|take) "
    f"{BALL}(?: to| on| at)?(?: the)? "
    "(behind|left(?= of| side of)|in front(?= of)|right(?= of| side of))(?: side)?(?: of)? "
    f"{BALL}(?:,? please)?[.!]*"
)


@functools.cache
def canonical_goals() -> dict[str, Goal]:
    """What each canonical sentence states."""
    goals = {}
    for pair, direction in itertools.product(itertools.permutations(COLORS, 2), DIRECTIONS):
        text = canonical_sentence(*pair, direction)
        goals[text] = Goal(text, "offline", "relation", ((*pair, direction),))
    return goals


def plain_relation(text: str) -> Relation | None:
    """The relation that a typed sentence plainly asks for, and nothing else."""
    plain = PLAIN_SENTENCE.fullmatch(" ".join(text.lower().split()))
    if not plain or plain[1] == plain[3]:
        return None
    return plain[1], plain[3], plain[2].split()[-1]


def named_relation(text: str) -> Relation:
    """The relation of a sentence that names ball, direction and other ball, as the authors' do."""
    words = re.findall(r"[a-z]+", text.lower())
    named = [word for word in words if word in COLORS + DIRECTIONS]
    if [word in COLORS for word in named] != [True, False, True]:
        raise ValueError(
            f"instructions: cannot tell ball, direction and other ball from {text[:80]!r}, so the "
            "rollout cannot be judged; add the field 'relations' (data/README.md)"
        )
    ball, direction, other = named
    return ball, other, direction


def coded_relation(code: Sequence[float]) -> Relation:
    """The relation of the authors' six numbers: a 1 at the ball, a 2 at the other, direction."""
    *marks, direction = code
    if sorted(marks) != [0, 0, 0, 1, 2] or direction not in range(4):
        wanted = "mark one ball with 1, one with 2 and end in a direction 0..3"
        raise ValueError(f"goals must {wanted}, got {code}")
    return COLORS[marks.index(1)], COLORS[marks.index(2)], DIRECTIONS[int(direction)]


def colors_in(text: str) -> set[str]:
    """The colours that a text names."""
    return set(re.findall(rf"\b{ANY_COLOR}\b", text.lower()))
