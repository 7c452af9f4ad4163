"""New words said again in known ones: where they are, what an LLM says of them, which it gets."""

import numpy as np
import pytest
import torch

import env
from data import llm
from experiment import restate, words
from experiment.run import Run


@pytest.mark.parametrize(
    "text, found",
    [
        ("Set the moss globule behind the icicle globule.", ["moss", "icicle"]),
        ("Set a fire-engine pellet behind the Smurf pellet!", ["fire-engine", "Smurf"]),
        ("put the crimson ball left of the blue one", ["crimson"]),
        ("Put the crimson orb left of the blue one.", []),  # it names a ball, so who can tell
        ("Set the red globule on the stern side of the blue globule.", []),
        ("Find the red-colored ball.", []),
        ("Push the red ball behind the blue ball.", []),
    ],
)
def test_new_words_are_found_where_a_ball_is_named(world, text, found):
    assert [place[1] for place in world.lexicon.places(text)] == found


def test_no_built_in_goal_of_another_level_is_said_again(world):
    rng = np.random.default_rng(0)
    goals = world.sample_goals("offline", "train", 500, rng)
    for level in env.NOVEL_LEVELS:
        for split in ("validation", "test"):
            goals += world.sample_goals(level, split, 500, rng)
    assert not any(world.lexicon.places(goal.text) for goal in goals)
    for kind in ("new", "nonsense"):
        for goal in world.word_goals("ball", kind, "test", 200, rng):
            assert len(world.lexicon.places(goal.text)) == 2, goal.text


def test_each_new_word_gets_another_known_one_and_together_the_likeliest(world):
    of_words = {
        "ruby": torch.tensor([3.0, 0, 0, 2.5, 0]),
        "brick": torch.tensor([2.0, 1.9, 0, 0, 0]),
    }
    said = lambda text: restate.restate(text, world.lexicon, of_words)
    assert said("Set the brick globule near the brick globule.") == (
        "Set the red globule near the red globule."
    )
    assert said("Set the ruby globule near the brick globule.") == (
        "Set the red globule near the blue globule."
    )
    assert said("Set the brick ball near the red ball.") == "Set the blue ball near the red ball."
    assert said("Set the brick ball near the red.") == "Set the blue ball near the red."
    assert said("Set the red ball near it.") == "Set the red ball near it."


def test_what_an_llm_says_of_a_word_is_counted_from_what_it_says_of_any(world):
    language_model, tokenizer = llm.tiny([*world.vocabulary(), world.lexicon.hint], 0)
    asked = ["ruby", "moss", "a word of many tokens"]
    found = restate.meanings(asked, world.lexicon, language_model.eval(), tokenizer)
    alone = restate.meanings(asked[1:2], world.lexicon, language_model, tokenizer)
    assert list(found) == asked and found["ruby"].shape == (5,)
    torch.testing.assert_close(found["moss"], alone["moss"])

    def logits_of(word):
        ids = tokenizer(world.lexicon.hint.format(word), return_tensors="pt")["input_ids"]
        return language_model(ids).logits[0, -1].log_softmax(-1)

    colors = [tokenizer(f" {color}")["input_ids"][0] for color in world.lexicon.answers]
    of_any = torch.stack([logits_of(word) for word in restate.ANY_WORDS]).mean(0)
    torch.testing.assert_close(found["ruby"], (logits_of("ruby") - of_any)[colors].detach())


def test_questions_are_heard_in_known_words_and_new_ones_also_as_they_were_said(
    world, tmp_path, monkeypatch
):
    run = Run(tmp_path, world, "tiny", 0, torch.float32, [])
    monkeypatch.setattr(Run, "recorded", lambda self, stage: {})
    kinds = lambda asked, part: [question.words for question in asked if question.part == part]
    said = run.word_questions({"split": "test", "novel_goals": 3})
    assert run.heard(words.texts(said), False) == {}
    assert words.questions_as_heard(said, {}) == said
    assert kinds(said, "ball") == kinds(said, "direction") == list(words.KINDS)
    heard = words.questions_as_heard(said, run.heard(words.texts(said), True))
    assert kinds(heard, "direction") == list(words.KINDS)
    assert kinds(heard, "ball") == ["new", "as said", "nonsense", "known"]
    assert heard[1].goals == said[0].goals
    for before, after in zip(said[:2], heard[::2]):
        for goal, original in zip(after.goals, before.goals):
            assert goal.relations == original.relations and goal.text != original.text
            assert not world.lexicon.places(goal.text)
