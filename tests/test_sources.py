"""What policies learn from beside real rollouts: what is kept of imagined ones, and relabelling."""

import numpy as np
import pytest

import env
from data import sources
from data.sources import is_wanted, kept_rollouts, relabel

SAID = "The red ball is near the blue ball, behind it."


def toy(goal="Take red home to blue.", kind="relation", success=False, explanation=SAID):
    told = {"explanation": explanation, "claims": np.zeros(0)}
    return {"goal": goal, "kind": kind, "success": success, **told}


# ------------------------------------------------------------------ imagined rollouts that are kept


@pytest.mark.parametrize(
    "keep, expected",  # fulfilled and explained, fulfilled alone, explained alone, neither
    [
        ("all", [True, True, True, True]),
        ("matched", [True, True, False, False]),
        ("explained", [True, False, True, False]),
        ("both", [True, False, False, False]),
    ],
)
def test_the_judge_and_the_models_words_decide_what_is_kept(world, keep, expected):
    cases = [(True, SAID), (True, "cyan"), (False, SAID), (False, "cyan")]
    records = [toy(success=success, explanation=said) for success, said in cases]
    assert [is_wanted(world, record, keep) for record in records] == expected
    kept = kept_rollouts(world, records, keep, 0)
    assert kept == [record for record, wanted in zip(records, expected) if wanted]


@pytest.mark.parametrize("keep", ("matched", "both", "all", "explained"))
def test_without_a_judge_the_models_own_words_decide_what_is_kept(world, keep):
    for said, expected in ((SAID, True), ("The cyan ball is near.", False), ("", False)):
        assert is_wanted(world, toy(kind="unknown", explanation=said), keep) is expected


def test_without_a_self_check_the_judge_alone_decides(world):
    record = toy(success=True, explanation=None)
    assert is_wanted(world, record, "matched") and is_wanted(world, record, "all")


def test_at_most_so_many_rollouts_of_a_goal_are_kept_the_first_ones(world):
    records = [toy(goal, success=n != 1) for goal in ("Red.", "Blue.") for n in range(4)]
    order = np.random.default_rng(0).permutation(8)
    mixed = [{**records[row], "row": row} for row in order]
    kept = [record["row"] for record in kept_rollouts(world, mixed, "matched", 2)]
    first = [row for row in order if row < 4 and row != 1][:2]
    second = [row for row in order if row >= 4 and row != 5][:2]
    assert kept == [row for row in order if row in (*first, *second)]
    assert len(kept_rollouts(world, mixed, "matched", 0)) == 6


def test_of_rollouts_from_one_start_the_models_words_choose_one(world):
    def tried(start, *probabilities, goal="Put red beside blue."):
        claims = np.log(np.array(probabilities, np.float32))
        observations = np.full((2, 10), start, np.float32)
        return {**toy(goal), "claims": claims, "observations": observations}

    records = [
        *[tried(0, 0.9, 0.1), tried(0, 0.5, 0.54), tried(1, 0.01, 0.01)],
        *[tried(0, goal="Red, tidy up."), tried(0, goal="Red, tidy up.")],
        *[tried(2, 1e-30, 1e-34, goal="Move red."), tried(2, 1e-31, 1e-34, goal="Move red.")],
    ]
    mean = np.array([0.47, 0.2167])  # probability of each claim; its square decides, itself not
    for weights, better in ((mean**2, 0), (mean, 1)):
        assert np.argmax([record["claims"] @ weights for record in records[:2]]) == better
    rows = lambda kept: [row for row, r in enumerate(records) if any(r is one for one in kept)]
    assert rows(kept_rollouts(world, records, "explained", 0)) == [0, 2, 3, 4, 5]
    assert rows(kept_rollouts(world, records, "all", 0)) == [0, 1, 2, 3, 4, 5, 6]
    assert rows(kept_rollouts(world, records, "explained", 1)) == [0, 3, 5]
    unjudged = [{**record, "kind": env.UNJUDGED} for record in records[:2]]
    assert kept_rollouts(world, unjudged, "matched", 0) == unjudged[:1]
    with pytest.raises(ValueError, match="imagined without asking .*--stage imagine --force"):
        kept_rollouts(world, [toy(explanation=SAID) | {"claims": None}], "explained", 0)


# ------------------------------------------------------------------ relabelling


@pytest.fixture(scope="module")
def wandering(world, rollouts):
    """Real rollouts, many of them aimless, and novel goals by level."""
    rng = np.random.default_rng(5)
    goals = world.sample_goals("offline", "train", 150, rng)
    at_random = lambda obs, rows: rng.integers(40, size=len(rows))
    states = env.unfulfilled_states(world, rng, goals)
    aimless = env.run_episodes(world, at_random, goals, states, max_steps=12)
    novel = {level: world.sample_goals(level, "test", 12, rng) for level in env.NOVEL_LEVELS}
    return rollouts + aimless, novel


def all_of(goals_by_level):
    return [goal for goals in goals_by_level.values() for goal in goals]


def transitions_of(record):
    return record["observations"][:-1], record["observations"][1:], record["actions"]


def chances(world, records, goal):
    """How many rollouts (for a step goal: transitions) come to fulfil a goal that their start does
    not."""
    found = 0
    for record in records:
        obs, nexts, actions = transitions_of(record)
        hits = world.success([goal] * len(actions), obs, nexts, actions)
        if goal.kind == "step":
            found += hits.sum()
        else:
            found += hits.any() and not world.success([goal], obs[:1], obs[:1], actions[:1])[0]
    return int(found)


def test_relabelled_rollouts_are_real_and_come_to_fulfil_their_new_goal(world, wandering):
    records, goals = wandering[0], all_of(wandering[1])
    made = relabel(world, records, goals, 150, np.random.default_rng(0))
    pieces = lambda r: [
        o.tobytes() + bytes([a]) + n.tobytes() for o, n, a in zip(*transitions_of(r))
    ]
    real = {piece for record in records for piece in pieces(record)}
    assert len(made) == 150 and {"step", "relation"} <= {record["kind"] for record in made}
    for record in made:
        goal, (obs, nexts, actions) = env.goal_of(record), transitions_of(record)
        judged = world.success([goal] * len(actions), obs, nexts, actions)
        assert goal in goals and record["success"] and record["rewards"][-1] == 100
        assert judged[-1] and not judged[:-1].any()
        if goal.kind == "step":
            assert len(actions) == 1
        else:
            assert not world.success([goal], obs[:1], obs[:1], actions[:1])[0]
        assert real.issuperset(pieces(record))


def test_relabelling_spreads_over_all_goals_that_some_rollout_fulfils(world, wandering):
    records, goals = wandering[0], all_of(wandering[1])
    possible = {goal.text: chances(world, records, goal) for goal in goals}
    for count in (20, 100, 10**6):
        relabelled = relabel(world, records, goals, count, np.random.default_rng(0))
        texts = [record["goal"] for record in relabelled]
        made = {text: texts.count(text) for text in possible}
        assert len(texts) == min(count, sum(possible.values()))
        most = max(made.values())
        assert all(most - made[text] <= 1 or made[text] == possible[text] for text in possible)
    assert 0 in possible.values()  # the goals are not all easy


def test_relabelling_draws_from_a_pool_of_rollouts(world, wandering):
    records, goals = wandering[0], all_of(wandering[1])
    few = relabel(world, records, goals, 10**6, np.random.default_rng(0), pool=20)
    drawn = np.random.default_rng(0).permutation(len(records))[:20]
    possible = sum(chances(world, [records[row] for row in drawn], goal) for goal in goals)
    assert len(few) == possible > 0


def test_each_source_has_its_parts_and_relabelling_as_many_as_were_imagined(world, wandering):
    records, goals = wandering
    imagined = {"rephrase": records[:30], "easy": records[30:37]}
    found = sources.by_source(world, records, imagined, goals, np.random.default_rng(0))
    assert set(found) == {"", "relabel", "kalm", "both"} and found[""] == {}
    assert found["kalm"] == imagined and list(found["relabel"]) == ["rephrase", "easy"]
    assert list(map(len, found["relabel"].values())) == [30, 7]
    for level, made in found["relabel"].items():
        assert {record["level"] for record in made} == {level}
        assert found["both"][f"relabelled {level}"] is made
        assert found["both"][f"imagined {level}"] is imagined[level]
    assert len(found["both"]) == 4
