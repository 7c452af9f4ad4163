"""CLEVR-Robot's goals in words: built-in sentences; how texts are read, drawn and scored."""

import itertools
import re

import numpy as np
import pytest
from test_worlds import RED_BEHIND_BLUE, related

import env
from env import Goal
from worlds import _clevr_robot_sentences as sentences
from worlds.clevr_robot import COLORS, DIRECTIONS

SPLITS = sorted({(p["level"], p["split"]) for p in sentences.PATTERNS})


def test_built_in_goals_are_as_many_as_asked_for():
    count = dict.fromkeys(itertools.product(env.LEVELS, ("train", "validation", "test")), 0)
    for p in sentences.PATTERNS:
        count[p["level"], p["split"]] += 1
    assert count["offline", "train"] >= 18
    for level, least in (("rephrase", 40), ("easy", 80), ("hard", 40), ("words", 12)):
        parts = count[level, "validation"], count[level, "test"]
        assert sum(parts) >= least and min(parts) >= least // 3 and count[level, "train"] == 0
    inferred = [p for p in sentences.PATTERNS if p["relations"] == [["a", "b", "-d"]]]
    assert {"validation", "test"} <= {p["split"] for p in inferred if p["level"] == "rephrase"}


def test_no_sentence_is_in_two_levels_or_splits():
    owner = {}
    for p, direction in itertools.product(sentences.PATTERNS, DIRECTIONS):
        text = sentences.fill_pattern(p, COLORS, [direction] * 3).text.lower()
        own = (p["level"], p["split"])
        assert owner.setdefault(text, own) == own, text


@pytest.mark.parametrize("level, split", SPLITS)
def test_sampled_goals_use_all_colours_and_directions_and_name_their_balls(world, level, split):
    goals = world.sample_goals(level, split, 200, np.random.default_rng(6))
    relations = [r for g in goals for r in g.relations]
    assert {ball for ball, _, _ in relations} == set(COLORS)
    assert {direction for _, _, direction in relations} == set(DIRECTIONS)
    for g in goals:
        balls = {ball for relation in g.relations for ball in relation[:2]} - {None}
        assert level == "words" or all(ball in g.text.lower() for ball in balls), g.text
        assert g.level == level and "{" not in g.text
    with pytest.raises(ValueError, match="no built-in goals"):
        world.sample_goals(level, "nowhere", 1, np.random.default_rng(6))


def words_in(text):
    return set(re.findall("[a-z0-9]+", re.sub("{.*?}", "", text.lower())))


def new_words(split):
    """{what is named: words} of a split, and as a set the single words in them."""
    lists = sentences.NEW_WORDS[split]
    named = {"noun": lists["noun"], **lists["ball"]}
    for direction in DIRECTIONS:
        named[direction] = [phrase[direction] for phrase in lists["direction"]]
    return named, set().union(*(words_in(word) for own in named.values() for word in own))


def test_new_words_are_in_no_other_list_and_validation_and_test_share_none():
    (validation, ours), (test, theirs) = new_words("validation"), new_words("test")
    for name in (*COLORS, *DIRECTIONS):
        both = [word.lower() for word in validation[name] + test[name]]
        assert len(set(both)) == len(both) >= 12, name
    assert not ours & theirs
    others = {word for p in sentences.PATTERNS for word in words_in(p["text"])}
    others |= {word for table in sentences.PHRASES.values() for word in words_in(str(table))}
    others |= {word for text in sentences.canonical_goals() for word in words_in(text)}
    nonsense = set(sentences.NONSENSE)
    assert not others & (ours | theirs | nonsense) and not nonsense & (ours | theirs)
    known = (*COLORS, *DIRECTIONS)
    assert not [w for w in ours | theirs | nonsense if any(name in w for name in known)]


def test_phrases_of_new_directions_tell_none_of_them_by_their_form():
    for split in ("validation", "test"):
        for phrase in sentences.NEW_WORDS[split]["direction"]:
            assert set(phrase) == {"phrase", *DIRECTIONS} and phrase["phrase"].count("{}") == 1


@pytest.mark.parametrize("part", [*sentences.PARTS, None])
def test_new_nonsense_and_known_words_make_the_same_goals(world, part):
    of_kind = {}
    for kind in ("new", "nonsense", "known"):
        rng = np.random.default_rng(3)
        of_kind[kind] = world.word_goals(part, kind, "test", 60, rng)
    _, theirs = new_words("test")
    parts_new = set()
    for new, nonsense, known in zip(*of_kind.values()):
        assert new.level == "words" and new.kind == "relation"
        assert new.relations == nonsense.relations == known.relations
        assert not words_in(known.text) & (theirs | set(sentences.NONSENSE))
        assert words_in(new.text) & theirs and not words_in(nonsense.text) & theirs
        (ball, other, direction), phrases = new.relations[0], sentences.PHRASES["of"]
        assert f"the {ball} ball" in known.text.lower().replace("a ", "the ")
        named = {ball, other} <= words_in(new.text), phrases[direction] in new.text.lower()
        parts_new.add(named)
    expected = {"ball": {(False, True)}, "direction": {(True, False)}}
    every = {(False, True), (True, False), (False, False)}
    assert parts_new == expected.get(part, every)


@pytest.mark.parametrize(
    "text, relation",
    [
        ("put the red ball left of the blue one", ("red", "blue", "left")),
        ("Please push green to the right side of the cyan ball!", ("green", "cyan", "right")),
        ("Move the purple  ball in front of RED, please.", ("purple", "red", "front")),
        ("Place cyan behind blue", ("cyan", "blue", "behind")),
        ("Don't put the red ball left of the blue one", None),
        ("I can't stand the red ball in front of the blue ball.", None),
        ("Put the red ball left of the blue one and behind the green one", None),
        ("Put the red ball right behind the blue one", None),
        ("Put the red ball left of the red one", None),
        ("Put the red ball left of the blue one, or rather right of it", None),
        ("Move the red ball to the left", None),
    ],
)
def test_a_judge_is_read_only_from_a_sentence_that_says_plainly_one_relation(world, text, relation):
    goal = world.goal_of_text(text)
    assert goal.text == text and goal.kind == ("relation" if relation else "unknown")
    assert goal.relations == ((relation,) if relation else ())


def test_a_recorded_goal_is_read_from_its_numbers_or_from_three_names_in_order(world):
    code = np.tile([0, 2, 1, 0, 0, 3], (4, 1))
    expected = Goal("x", "offline", "relation", (("green", "blue", "right"),))
    assert world.recorded_goal("x", code) == expected
    text = "Can you get green to the right of that blue thing?"
    assert world.recorded_goal(text).relations == expected.relations
    for wrong in ("Behind red is blue.", "Red left, blue, cyan.", "Red left of red.", "Red."):
        with pytest.raises(ValueError):
            world.recorded_goal(wrong)
    for wrong in (code[:0], code[:, :5], code[0], code + 1, code * [1, 1, 1, 1, 1, 2]):
        with pytest.raises(ValueError, match="goals must"):
            world.recorded_goal("x", wrong)
    code[2, 0] = 1
    with pytest.raises(ValueError, match="same at each step"):
        world.recorded_goal("x", code)


def test_plain_sentences_are_read_back_part_by_part(world):
    pairs = list(itertools.permutations(COLORS, 2))
    relations = [(*pair, direction) for pair in pairs for direction in DIRECTIONS]
    goals = [Goal("x", "offline", "relation", (relation,)) for relation in relations]
    final = np.random.default_rng(0).uniform(-0.25, 0.25, (len(goals), 10))
    said = [world.canonical_text(goal) for goal in goals]
    true = [related(obs.reshape(5, 2), *relation) for obs, relation in zip(final, relations)]
    scores = world.explanation_scores(goals, [f" {text} " for text in said], final)
    assert scores.pop("holds").tolist() == true and 5 < sum(true) < 75
    assert list(scores) == ["source", "target", "direction", "exact"]
    assert all(right.all() for right in scores.values())
    other = "The red ball is near the cyan ball, in front of it."  # said of each
    scores = world.explanation_scores(goals, [other] * len(goals), final)
    for part, own in enumerate(("source", "target", "direction")):
        expected = [relation[part] == ("red", "cyan", "front")[part] for relation in relations]
        assert scores[own].tolist() == expected
    assert scores["exact"].sum() == 1
    assert scores["holds"].tolist() == [
        related(o.reshape(5, 2), "red", "cyan", "front") for o in final
    ]


def test_any_other_text_is_no_explanation(world):
    impossible = "The red ball is near the red ball, behind it."
    texts = ["", impossible, "the red ball", "Put the red ball behind the blue ball."]
    goals, final = [RED_BEHIND_BLUE] * 4, np.zeros((4, 10))
    final[:, 1] = 0.2  # what is asked for is there
    scores = world.explanation_scores(goals, texts, final)
    assert not any(right.any() for right in scores.values())


@pytest.mark.parametrize(
    "goal, explanation, fits",
    [
        ("Put RED next to the blue one.", "The blue ball is near the red ball, behind it.", True),
        ("Put red next to blue.", "The red ball is near the cyan ball, behind it.", False),
        ("Red, blue and cyan in a row.", "The red ball is near the cyan ball, behind it.", True),
        ("Move the red ball left.", "The red ball is near the cyan ball, behind it.", True),
        ("Move the red ball left.", "The green ball is near the cyan ball, behind it.", False),
        ("Be bored and tidy.", "The green ball is near the cyan ball, behind it.", True),
        ("Put red next to blue.", "Nothing.", False),
        ("Move the red ball left.", "Nothing.", False),
    ],
)
def test_an_explanation_fits_a_goal_by_the_balls_that_it_names(world, goal, explanation, fits):
    assert world.explanation_fits(goal, explanation) is fits


def test_claims_are_all_that_a_goals_words_may_mean(world):
    claims = lambda text: ["".join(claim).strip() for claim in world.claims(text)]
    assert claims("Nudge the RED orb to the viewer's left.") == [
        f"The red ball is near the {other} ball, to the left of it."
        for other in ("blue", "green", "purple", "cyan")
    ]
    assert set(claims("Switch the green and the blue one: green further forward.")) == {
        "The blue ball is near the green ball, in front of it.",
        "The green ball is near the blue ball, in front of it.",
    }
    assert len(claims("Red behind blue, blue left of cyan.")) == 3 * 2 * 2
    for text in (
        "Put red next to blue.",
        "Move it left.",
        "Left to right: red, blue, cyan, green.",
    ):
        assert claims(text) == []
    for goal in world.sample_goals("offline", "train", 200, np.random.default_rng(0)):
        assert world.canonical_text(goal) in claims(goal.text)


def test_descriptions_are_drawn_from_all_relations_that_a_loop_finds(world):
    obs = np.random.default_rng(4).uniform(-0.4, 0.4, (30, 10))
    expected = []
    for row, (a, b), way in itertools.product(
        range(30), itertools.permutations(COLORS, 2), DIRECTIONS
    ):
        if related(obs[row].reshape(5, 2), a, b, way):
            goal = Goal("x", "offline", "relation", ((a, b, way),))
            expected.append((row, " " + world.canonical_text(goal)))
    drawn = world.describe(obs, 1000, np.random.default_rng(0))
    assert sorted((row, begun + rest) for row, begun, rest in drawn) == sorted(expected)
    assert len(expected) > 60 and all(begun.endswith(" ball,") for _, begun, _ in drawn)
    assert world.describe(obs, 3, np.random.default_rng(0)) == drawn[:3]
    assert world.describe(obs, 3, np.random.default_rng(1)) != drawn[:3]


def test_goals_and_changes_are_told_in_words(world):
    relations = (("red", "blue", "left"), ("cyan", "red", "front"))
    assert world.goal_in_words(Goal("x", "hard", "relations", relations)) == (
        "red is left of blue and cyan is in front of red"
    )
    step = Goal("x", "easy", "step", (("red", None, "left"),))
    assert world.goal_in_words(step) == "red goes left"
    assert world.goal_in_words(Goal("x", "hard", "gather")) == "gather"
    moves = np.array([(-0.2, 0.05), (0.3, 0), (0.01, -0.06), (0, 0.1), (0.03, 0.03)])  # +y is back
    changes = world.change_in_words(np.zeros(10), moves.ravel())
    assert changes == "red 0.21 m left, blue 0.30 m right, green 0.06 m front, purple 0.10 m back"
    assert world.change_in_words(np.zeros(10), np.zeros(10)) == "nothing"
