"""What holds in any world: goals files, episodes, Gymnasium, finding worlds, GIFs."""

import json
import threading
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from PIL import Image

import env
from env import Goal, WorldEnv
from experiment import episode
from experiment.quality import replay

TILES = f"{Path(__file__).resolve().parents[1] / 'docs' / 'tiles.py'}:Tiles"
WORLDS = ("clevr_robot", TILES)
both_worlds = pytest.mark.parametrize("name", WORLDS, ids=("clevr_robot", "tiles"))
GREEN_LEFT = Goal("Move green left.", "easy", "step", (("green", None, "left"),))
PUSH_RED = 0  # to the right
PUSH_GREEN_LEFT = 2 * 8 + 2


def goals_of_all_levels(world, n, rng):
    goals = world.sample_goals("offline", "train", n, rng)
    for level in env.NOVEL_LEVELS:
        goals += world.sample_goals(level, "test", n, rng)
    if world.word_parts:
        goals += world.sample_goals(env.WORDS, "test", n, rng)
    return goals


def random_episodes(world, goals, rng, max_steps):
    starts = env.unfulfilled_states(world, rng, goals)
    policy = lambda obs, rows: rng.integers(world.num_actions, size=len(rows))
    return env.run_episodes(world, policy, goals, starts, max_steps)


# ------------------------------------------------------------------ goals and goals files


@both_worlds
def test_goals_of_every_level_survive_json(name):
    world = env.make(name)
    goals = goals_of_all_levels(world, 50, np.random.default_rng(5))
    goals += world.sample_goals("rephrase", "validation", 50, np.random.default_rng(6))
    assert {goal.kind for goal in goals} == set(world.kinds)
    levels = env.LEVELS if world.word_parts else env.LEVELS[:4]
    assert {goal.level for goal in goals} == set(levels)
    again = [env.goal_from_json(json.loads(json.dumps(goal.to_json())), world) for goal in goals]
    assert again == goals


GOOD = {
    "text": "Move red left.",
    "level": "easy",
    "kind": "step",
    "relations": [["red", None, "left"]],
}
BAD_GOALS = {
    "broken JSON": ('{"text": "oops"', "JSON"),
    "nested too deep": ("[" * 100_000, "JSON"),
    "not an object": ("[1, 2]", "object"),
    "missing field": ({k: v for k, v in GOOD.items() if k != "kind"}, "kind"),
    "unknown kind": ({**GOOD, "kind": "juggle"}, "juggle"),
    "unknown level": ({**GOOD, "level": "heroic"}, "heroic"),
    "unknown colour": ({**GOOD, "relations": [["mauve", None, "left"]]}, "mauve"),
    "no colour": ({**GOOD, "relations": [[None, None, "left"]]}, "unknown colour None"),
    "unknown direction": ({**GOOD, "relations": [["red", None, "up"]]}, "up"),
    "three balls": (
        {**GOOD, "kind": "relation", "relations": [["red", "blue", "green", "left"]]},
        "green",
    ),
    "same ball twice": (
        {**GOOD, "kind": "relation", "relations": [["red", "red", "left"]]},
        "red twice",
    ),
    "relation without other": ({**GOOD, "kind": "relation"}, "two balls"),
    "step with other": ({**GOOD, "relations": [["red", "blue", "left"]]}, "one ball"),
    "too few relations": (
        {**GOOD, "kind": "relations", "relations": [["red", "blue", "left"]]},
        "2 or 3",
    ),
    "line with relations": ({**GOOD, "kind": "line"}, "'line' takes 0 relations"),
    "unknown with relations": ({**GOOD, "kind": "unknown"}, "'unknown' takes 0 relations"),
    "relations no list": ({**GOOD, "relations": "red"}, "relations"),
    "relation no list": ({**GOOD, "relations": ["red"]}, "'red'"),
    "text no sentence": ({**GOOD, "text": 5}, "text"),
    "text of spaces": ({**GOOD, "text": "  "}, "text"),
    "half a character": ({**GOOD, "text": "a\ud800"}, "Unicode"),
}


@pytest.mark.parametrize("line, named", BAD_GOALS.values(), ids=BAD_GOALS)
def test_a_bad_goals_file_is_refused_with_file_line_and_reason(tmp_path, world, line, named):
    path = tmp_path / "mine.jsonl"
    line = line if isinstance(line, str) else json.dumps(line)
    path.write_text(f"{json.dumps(GOOD)}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="mine.jsonl, line 3") as error:
        env.read_goals(path, world)
    assert named in str(error.value)


@pytest.mark.parametrize(
    "content", (b"", b"\n\n", b'{"text": "caf\xe9"}\n'), ids=("empty", "blank", "not UTF-8")
)
def test_a_goals_file_without_readable_goals_is_refused_by_name(tmp_path, world, content):
    (tmp_path / "mine.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="mine.jsonl"):
        env.read_goals(tmp_path / "mine.jsonl", world)


@pytest.mark.parametrize("encoding", ("utf-8", "utf-8-sig"))
def test_a_goals_file_may_begin_with_a_byte_order_mark_and_hold_any_character(
    tmp_path, world, encoding
):
    line = {**GOOD, "text": "Schiebe Rot\u2028nach links, \u8bf7."}
    text = json.dumps(line, ensure_ascii=False)
    (tmp_path / "mine.jsonl").write_text(text, encoding=encoding)
    (goal,) = env.read_goals(tmp_path / "mine.jsonl", world)
    assert goal == Goal(line["text"], "easy", "step", (("red", None, "left"),))


@both_worlds
def test_lines_without_kind_and_relations_are_goals_without_a_judge(tmp_path, name):
    world = env.make(name)
    lines = [
        {"text": "Make a home for the red ball.", "level": "hard"},
        {"text": "Surprise me.", "level": "easy"},
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    goals = env.read_goals(tmp_path / "mine.jsonl", world)
    assert goals == [Goal(line["text"], line["level"], "unknown", ()) for line in lines]
    assert [env.goal_from_json(goal.to_json(), world) for goal in goals] == goals


@both_worlds
def test_a_goal_without_a_judge_never_succeeds_and_earns_nothing(name):
    world = env.make(name)
    rng = np.random.default_rng(0)
    (judged,) = world.sample_goals("easy", "test", 1, rng)
    states = world.initial_states(rng, 50)
    actions = np.arange(50) % world.num_actions
    obs, nexts = world.observe(states), world.observe(world.step_batch(states, actions))
    goals = [Goal("Surprise me.", "hard"), judged] * 25  # beside others it stays so
    for imagined in (False, True):
        rewards = world.reward(goals, obs, nexts, actions, imagined)
        assert (
            not world.success(goals, obs, nexts, actions, imagined)[::2].any()
            and (rewards[::2] == 0).all()
        )
        assert rewards[1::2].any()


# ------------------------------------------------------------------ episodes


@both_worlds
def test_episodes_start_unfulfilled_and_end_at_the_first_success(name):
    world, rng = env.make(name), np.random.default_rng(9)
    goals = goals_of_all_levels(world, 30, rng)
    records = random_episodes(world, goals, rng, max_steps=8)
    for goal, r in zip(goals, records):
        steps = len(r["actions"])
        judged = world.success(
            [goal] * steps, r["observations"][:-1], r["observations"][1:], r["actions"]
        )
        assert not judged[:-1].any() and judged[-1] == r["success"] and env.goal_of(r) == goal
        is_brief = goal.kind in world.one_step_kinds
        assert r["success"] or steps == (1 if is_brief else 8)
        assert (
            is_brief
            or not world.success([goal], r["observations"][:1], r["observations"][:1], [0]).any()
        )
        np.testing.assert_array_equal(
            world.step_batch(r["states"][:-1], r["actions"]), r["states"][1:]
        )
        np.testing.assert_array_equal(world.observe(r["states"]), r["observations"])
        assert (
            r["observations"].dtype == r["rewards"].dtype == np.float32
            and r["actions"].dtype == np.int64
        )
        assert r["rewards"].shape == (steps,) and (r["rewards"][-1] == 100) == r["success"]
    assert {r["success"] for r in records} == {True, False}


@both_worlds
def test_replayed_actions_repeat_an_episode_and_the_last_one_goes_on(name):
    world, rng = env.make(name), np.random.default_rng(1)
    records = random_episodes(world, [Goal("Whatever.", "hard")] * 5, rng, max_steps=4)
    goals, starts = [env.goal_of(r) for r in records], np.stack([r["states"][0] for r in records])
    again = env.run_episodes(
        world, replay([r["actions"] for r in records]), goals, starts, max_steps=6
    )
    for first, second in zip(records, again):
        np.testing.assert_array_equal(second["states"][:5], first["states"])
        assert second["actions"].tolist() == [*first["actions"], *[first["actions"][-1]] * 2]


def test_encoded_goals_are_judged_like_the_goals_and_encoding_them_again_changes_nothing(world):
    rng = np.random.default_rng(2)
    goals = goals_of_all_levels(world, 40, rng)
    encoded = world.encode_goals(goals)
    assert world.encode_goals(encoded) is encoded
    obs, nexts = rng.uniform(-0.3, 0.3, (2, len(goals), 10))
    actions = rng.integers(40, size=len(goals))
    order = rng.permutation(len(goals))
    rewards = world.reward(goals, obs, nexts, actions, True)
    again = world.reward(encoded[order], obs[order], nexts[order], actions[order], True)
    np.testing.assert_array_equal(again, rewards[order])
    assert world.one_step(encoded).tolist() == [goal.kind == "step" for goal in goals]


def test_unfulfilled_observations_come_from_the_pool_and_leave_something_to_do(world, rollouts):
    pool = np.concatenate([r["observations"] for r in rollouts])
    goals = [env.goal_of(r) for r in rollouts]
    chosen = env.unfulfilled_observations(world, np.random.default_rng(0), goals, pool)
    assert {tuple(o) for o in chosen} <= {tuple(o) for o in pool} and len(
        {tuple(o) for o in chosen}
    ) > 50
    assert not world.fulfilled(goals, chosen).any()
    always = rollouts[0]["observations"][-1:]  # a pool in which every state fulfils the goal
    again = env.unfulfilled_observations(world, np.random.default_rng(0), goals[:1], always)
    assert (again == always).all()


# ------------------------------------------------------------------ Gymnasium's interface


@pytest.mark.filterwarnings("ignore")
@both_worlds
def test_a_world_passes_gymnasiums_checks(name):
    made = gymnasium.make("KALM/ClevrRobot-v0", render_mode="rgb_array", world=name)
    check_env(made.unwrapped)
    assert (
        made.unwrapped.world.name == name
        and made.action_space.n == made.unwrapped.world.num_actions
    )


@both_worlds
def test_the_same_seed_gives_the_same_episode(name):
    def episode(seed):
        world_env = WorldEnv(name, max_steps=5)
        obs, info = world_env.reset(seed=seed)
        steps = [world_env.step(action) for action in (3, 6, 1, 0)]
        return [info["goal"], obs.tolist(), *((s[0].tolist(), *s[1:4]) for s in steps)]

    assert episode(1) == episode(1) and episode(1) != episode(2)


def test_reset_takes_a_goal_and_a_state_and_the_episode_ends_by_success_or_limit(world):
    state = world.initial_states(np.random.default_rng(10), 1)[0]
    clevr = WorldEnv(world, max_steps=2)
    far = Goal("far", "hard", "line")
    obs, info = clevr.reset(options={"goal": far, "state": state})
    assert info["goal"] == far.text and (obs == world.observe(state)).all()
    obs, reward, terminated, truncated, info = clevr.step(PUSH_RED)
    assert not terminated and not truncated
    assert (info["state"] == world.step_batch(state[None], [PUSH_RED])[0]).all()
    assert clevr.step(PUSH_RED)[2:4] == (False, True)
    clevr.reset(options={"goal": GREEN_LEFT, "state": state})
    assert clevr.step(PUSH_RED)[2:4] == (False, True)  # a goal of one step is over, met or not
    clevr.reset(options={"goal": GREEN_LEFT, "state": state})
    assert clevr.step(PUSH_GREEN_LEFT)[1:4] == (100.0, True, False)


@pytest.mark.parametrize(
    "options",
    [
        {"goal": 3},
        {"goal": Goal("x", "easy", "step", (("mauve", None, "left"),))},
        {"goal": "x", "kind": "step"},
        {"goal": "x", "level": "easy", "kind": "step", "relations": "[["},
        {"state": np.zeros(5)},
        {"state": np.full(69, np.nan)},
    ],
)
def test_reset_refuses_what_is_no_goal_or_state_of_its_world(options):
    with pytest.raises(ValueError):
        WorldEnv().reset(options=options)
    with pytest.raises(ValueError, match="render_mode"):
        WorldEnv(render_mode="human")


@both_worlds
def test_info_tells_the_same_things_at_every_step(name):
    world_env = WorldEnv(name)
    _, first = world_env.reset(seed=3)
    later = world_env.step(0)[-1]
    assert list(first) == list(later) == ["goal", "level", "kind", "relations", "state", "success"]
    record = {"text": first["goal"], **{k: first[k] for k in ("level", "kind")}}
    goal = env.goal_from_json(
        {**record, "relations": json.loads(first["relations"])}, world_env.world
    )
    assert goal == world_env.goal and first["success"] is False
    again = WorldEnv(name)
    assert again.reset(options=first)[1]["relations"] == first["relations"]
    assert again.goal == goal and (again.state == first["state"]).all()
    first["state"][:] = 7  # is a copy
    assert not (world_env.state == 7).all() and not (later["state"] == 7).all()


def play(seed, results):
    clevr = WorldEnv()
    obs, _ = clevr.reset(seed=seed)
    path = [obs]
    for action in np.random.default_rng(seed).integers(40, size=300):
        path.append(clevr.step(action)[0])
    results[seed] = np.array(path)


def test_environments_in_two_threads_play_as_they_do_alone():
    together, alone = {}, {}
    threads = [threading.Thread(target=play, args=(seed, together)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        play(seed, alone)
        np.testing.assert_array_equal(together[seed], alone[seed])


# ------------------------------------------------------------------ worlds by name


def test_a_world_knows_the_name_that_makes_it_again():
    for name in WORLDS:
        world = env.make(name)
        assert world.name == name and type(env.make(world.name)).__name__ == type(world).__name__
    assert env.make().name == "clevr_robot"


@pytest.mark.parametrize(
    "name, named",
    [
        ("chess", "clevr_robot"),
        ("", "clevr_robot"),
        ("../env", "clevr_robot"),
        ("nowhere.py:Chess", "nowhere.py"),
        (TILES.replace("Tiles", "Chess"), "Chess"),
        (TILES.replace("Tiles", "PUCKS"), "PUCKS"),
    ],
)
def test_a_world_that_is_not_there_is_refused_by_name(name, named):
    with pytest.raises(ValueError, match="--env") as error:
        env.make(name)
    assert named in str(error.value) and "_clevr" not in str(error.value)


def test_the_file_of_a_world_may_have_any_name_and_takes_none_from_others(tmp_path):
    path = tmp_path / "random.py"
    path.write_text("from env import World\nclass Mine(World):\n    pass\n", encoding="utf-8")
    assert type(env.make(f"{path}:Mine")).__name__ == "Mine"
    import random

    assert random.__file__ != str(path)


def test_a_world_without_words_of_its_own_gets_plain_ones():
    tiles = env.make(TILES)
    goal = tiles.sample_goals("offline", "train", 1, np.random.default_rng(0))[0]
    said = [tiles.canonical_text(goal), "Nothing."]
    assert tiles.explanation_scores([goal] * 2, said, None)["exact"].tolist() == [True, False]
    assert tiles.goal_in_words(goal) == " ".join(goal.relations[0])
    assert tiles.change_in_words(np.zeros(6), np.eye(6)[1]) == "numbers 1 of the observation"
    assert tiles.describe(np.zeros((2, 6)), 3, None) == []


# ------------------------------------------------------------------ pictures


def test_a_rollout_becomes_a_gif_with_a_frame_for_every_observation(tmp_path, world, rollouts):
    record = max(rollouts, key=lambda r: len(r["actions"]))
    episode.save_gif(tmp_path / "rollout.gif", world, record, size=96)
    with Image.open(tmp_path / "rollout.gif") as gif:
        assert (
            gif.format == "GIF"
            and gif.size == (96, 96)
            and gif.n_frames >= len(record["actions"]) + 1
        )
    captions = ("imagined", "executed")
    episode.save_gif(tmp_path / "two.gif", world, record, record, captions=captions, size=96)
    with Image.open(tmp_path / "two.gif") as gif:
        assert gif.size == (192, 96) and gif.n_frames >= len(record["actions"]) + 1
        assert (
            np.asarray(gif.convert("RGB"))[:, :96] != np.asarray(gif.convert("RGB"))[:, 96:]
        ).any()


@both_worlds
def test_a_gif_can_be_made_in_any_world(tmp_path, name):
    world, rng = env.make(name), np.random.default_rng(0)
    (record,) = random_episodes(world, [Goal("Whatever.", "hard")], rng, max_steps=3)
    episode.save_gif(tmp_path / "any.gif", world, record, size=64)
    with Image.open(tmp_path / "any.gif") as gif:
        assert gif.size == (64, 64) and gif.n_frames >= 4
