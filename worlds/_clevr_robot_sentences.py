"""CLEVR-Robot's goals in words: built-in patterns, plain sentences and how they are read.

This file knows the names of balls and directions, and nothing of where the balls are.
"""

import functools
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

from env import WORDS, Goal

COLORS = ("red", "blue", "green", "purple", "cyan")
DIRECTIONS = ("behind", "left", "front", "right")  # the opposite is two further
SENTENCES = json.loads(Path(__file__).with_name("clevr_robot.json").read_text(encoding="utf-8"))
PATTERNS = SENTENCES["patterns"]
PHRASES = SENTENCES["phrases"]
NEW_WORDS = SENTENCES["words"]  # by split; in no other sentence
NONSENSE = NEW_WORDS["nonsense"]
SLOTS = {"ball": ("a", "b"), "direction": ("d_of",)}  # of the parts that new words can name
PARTS = tuple(SLOTS)
PARTS_IN_TURN = (PARTS[:1], PARTS[1:], PARTS)

Relation = tuple[str, str | None, str]  # ball, other ball, direction

# ----------------------------------------------------------------------------------------------
# Writing


def fill_pattern(
    pattern: dict, colors: Sequence[str], directions: Sequence[str], said: dict | None = None
) -> Goal:
    """Goal from a pattern; colors: for {a} {b} {c} {e}, directions: for {d} {d2} {d3}, in turn.

    said: words for some slots instead of the usual ones.
    """
    words = {"o": "ball"}
    words |= zip("abce", colors)
    names = {None: None, **words}
    for slot, direction in zip(("d", "d2", "d3"), directions):
        names[slot] = direction
        names[f"-{slot}"] = DIRECTIONS[DIRECTIONS.index(direction) - 2]
        for table, phrases in PHRASES.items():
            words[f"{slot}_{table}"] = phrases[direction]
    relations = []
    for relation in pattern["relations"]:
        relations.append(tuple(names[name] for name in relation))
    words |= said or {}
    text = pattern["text"].format(**words)
    text = text[0].upper() + text[1:]
    return Goal(text, pattern["level"], pattern["kind"], tuple(relations))


def patterns_of(level: str, split: str) -> list[dict]:
    """The patterns of a level and split. Raises ValueError if there are none."""
    found = [p for p in PATTERNS if p["level"] == level and p["split"] == split]
    if not found:
        raise ValueError(f"no built-in goals of level {level!r} in split {split!r}")
    return found


def word_goals(part: str | None, words: str, split: str, n: int, rng) -> list[Goal]:
    """n goals of level words, as `ClevrRobot.word_goals` has them.

    New and nonsense words for directions come in the same phrases, which alone tell nothing.
    """

    def pick(items):
        return items[rng.integers(len(items))]

    patterns = patterns_of(WORDS, split)
    lists = NEW_WORDS[split]
    goals = []
    for number in range(n):
        a, b = (COLORS[ball] for ball in rng.permutation(5)[:2])
        direction = pick(DIRECTIONS)
        phrase = pick(lists["direction"])
        new = {
            "a": pick(lists["ball"][a]),
            "b": pick(lists["ball"][b]),
            "o": pick(lists["noun"]),
            "d_of": phrase["phrase"].format(phrase[direction]),
        }
        nonsense = dict(zip(new, rng.permutation(NONSENSE).tolist()))
        nonsense["d_of"] = phrase["phrase"].format(nonsense["d_of"])
        said = {"new": new, "nonsense": nonsense, "known": {}}[words]
        slots = {"o"}
        named = (part,) if part else PARTS_IN_TURN[number % 3]
        for name in named:
            slots.update(SLOTS[name])
        said = {slot: word for slot, word in said.items() if slot in slots}
        goals.append(fill_pattern(pick(patterns), (a, b), [direction], said))
    return goals


def canonical_sentence(ball: str, other: str, direction: str) -> str:
    """The plain sentence of a relation: both balls first, without which no direction is known."""
    return f"The {ball} ball is near the {other} ball, {PHRASES['of'][direction]} it."


def canonical_halves(ball: str, other: str, direction: str) -> tuple[str, str]:
    """The plain sentence in two: as it begins, with both balls, and as it goes on."""
    balls, side = canonical_sentence(ball, other, direction).split(",")
    return f" {balls},", side


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


class Lexicon:
    """What `experiment.restate` needs, to say new words for colours in those of training."""

    hint = "Colors: a banana is yellow, coal is black, snow is white. {} is"
    answers = COLORS

    @staticmethod
    def places(text: str) -> list[re.Match]:
        """Where a text has a word that training lacks before a ball; before another such word too,
        "the crimson pellet", if it names no ball else. Group 1 is the word.
        """
        is_new = lambda word: trained_words().isdisjoint(word.lower().split("-"))
        found = []
        for place in re.finditer(r"\b(?:the|a) ([\w-]+)(?= ([\w-]+))", text, re.IGNORECASE):
            noun = place[2].lower()
            may_be_ball = noun == "ball" or is_new(noun) and not colors_in(text)
            if is_new(place[1]) and may_be_ball:
                found.append(place)
        return found


@functools.cache
def trained_words() -> set[str]:
    """All words of training sentences and explanations."""
    texts = [pattern["text"] for pattern in PATTERNS if pattern["split"] == "train"]
    texts += [" ".join(phrases.values()) for phrases in PHRASES.values()]
    texts += canonical_goals()
    return set(re.findall("[a-z]+", " ".join(texts).lower()))


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


def directions_in(text: str) -> list[str]:
    """The directions that a text names, in whichever of their phrases."""
    named = []
    for direction in DIRECTIONS:
        phrases = "|".join(of_direction[direction] for of_direction in PHRASES.values())
        if re.search(rf"\b({phrases})\b", text.lower()):
            named.append(direction)
    return named
