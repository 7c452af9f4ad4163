"""First actions in new words: figures solved by hand, and what the models are asked."""

import numpy as np
import pytest

import env
import rollout
from experiment import words

CENTER = [(-0.4, 0.5), (0.1, 0.15), (0, 0.2), (-0.4, -0.1), (0.4, -0.1)]
GOAL = env.Goal("x", "words", "relation", (("blue", "green", "left"),))


def values_for(*actions):
    """A row of values for each action, which likes it best."""
    return np.eye(40)[list(actions)]


def test_a_first_action_is_right_if_it_moves_one_of_the_goals_balls(world):
    obs = np.reshape(CENTER, (1, 10))
    for action, right in ((8, 1), (15, 1), (16, 1), (23, 1), (7, 0), (24, 0), (39, 0)):
        assert world.first_actions_right("ball", [GOAL], obs, values_for(action)) == [right]
    rng = np.random.default_rng(0)
    goals = world.word_goals("ball", "nonsense", "test", 4000, rng)
    wanders = rng.random((4000, 40))
    obs = world.observe(world.initial_states(rng, 4000))
    chance = world.first_actions_right("ball", goals, obs, wanders).mean()
    assert chance == pytest.approx(0.4, abs=0.03)


def test_a_direction_is_right_if_of_the_experts_four_actions_the_goals_is_liked_best(world):
    rng = np.random.default_rng(0)
    obs = world.observe(world.initial_states(rng, 300))
    actions = []
    for direction in ("behind", "left", "front", "right"):
        goal = env.Goal("x", "words", "relation", (("blue", "green", direction),))
        actions.append(world.expert_actions([goal] * 300, obs))
    actions = np.stack(actions, 1)
    clear = np.array([len(set(row)) == 4 for row in actions.tolist()])
    assert 50 < clear.sum() < 250
    for way in range(4):  # whatever the goal, the action for one direction
        values = values_for(*actions[:, way]) + 0.5 * (np.arange(40) == 39)
        right = world.first_actions_right("direction", [GOAL] * 300, obs, values)
        assert (np.isnan(right) == ~clear).all() and (right[clear] == (way == 1)).all()


def test_questions_have_clear_starts_that_tell_nothing_and_the_same_for_each_kind(world):
    asked = words.questions(world, "validation", 0, 60)
    names = [(question.part, question.words) for question in asked]
    assert names == [(part, kind) for part in ("ball", "direction") for kind in words.KINDS]
    expert = lambda goals, obs: values_for(*world.expert_actions(goals, obs))
    found = words.figures(world, asked, [expert, expert])
    for part in ("ball", "direction"):
        for kind in words.KINDS:
            assert found[part][kind] == [1, 1, 1]
        assert found[part]["gain"] == [0, 0, 0]
    again = words.questions(world, "validation", 0, 60)
    assert words.texts(again) == words.texts(asked) and (again[0].obs == asked[0].obs).all()


def test_figures_are_means_over_goals_and_seeds_and_the_gain_is_goal_by_goal(world):
    asked = [q for q in words.questions(world, "test", 0, 40) if q.part == "ball"]
    kind_of = {goal.text: words for _, words, goals, _ in asked for goal in goals}

    def agent(**rates):
        """Right for the first so many of forty goals in words of a kind."""

        def values(goals, obs):
            encoded = world.encode_goals(goals)
            right = np.arange(40) < 40 * rates.get(kind_of[goals[0].text], 0)
            others = [min(set(range(5)) - set(row)) for row in encoded[:, 1:3].tolist()]
            return values_for(*np.where(right, encoded[:, 1], others) * 8)

        return values

    (found,) = words.figures(world, asked, [agent(new=0.5, known=1), agent(new=0)]).values()
    assert [found[kind][0] for kind in (*words.KINDS, "gain")] == [0.25, 0, 0.5, 0.25]
    assert found["nonsense"] == [0, 0, 0] and 0 <= found["gain"][1] < 0.25 < found["gain"][2]


def test_the_llm_is_asked_for_the_action_that_it_would_take(world, grounded):
    model, tokenizer, _ = grounded
    for part, _, goals, obs in words.questions(world, "test", 0, 12):
        values = words.llm_values(model, tokenizer, batch_size=5)(goals, obs)
        records = rollout.generate_all(model, tokenizer, world, goals, obs, max_steps=1)
        assert values.argmax(1).tolist() == [record["actions"][0] for record in records], part
