"""Reading a goal that a user typed. What is not understood is not guessed: such a goal has no judge.

This file knows plain sentences of one relation; the built-in ones are patterns in goals.json.
"""
import re

import env

_BALL = f"(?:the )?({'|'.join(env.COLORS)})(?: ball| one)?"
_PLAIN = re.compile(
    f"(?:please )?(?:put|push|move|place|bring|get|roll|set|slide|take) {_BALL}(?: to| on| at)?(?: the)? "
    f"(behind|left(?= of| side of)|in front(?= of)|right(?= of| side of))(?: side)?(?: of)? {_BALL}(?:,? please)?[.!]*")


def goal_of_text(text):
    """The goal that a sentence states: kind relation where it plainly says to put one ball on a side of another ("put the red ball
    left of the blue one"), else kind unknown. Raises ValueError for an empty one."""
    plain = _PLAIN.fullmatch(" ".join(text.lower().split()))
    if not plain or plain[1] == plain[3]:
        return env.Goal(text, "hard", "unknown")
    ball, other = env.COLORS.index(plain[1]), env.COLORS.index(plain[3])
    return env.Goal(text, "rephrase", "relation", ((ball, other, env.DIRECTIONS.index(plain[2].split()[-1])),))
