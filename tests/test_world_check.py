"""A world that answers wrongly is refused before the first stage, by class, method, what is right.

Each case changes docs/tiles.py's world in one place.
"""

import time

import pytest
from conftest import ROOT
from test_bad_input import here  # noqa: F401, a fixture
from test_kalm import smoke

import env
from experiment.world_check import check_world

TILES = (ROOT / "docs" / "tiles.py").read_text(encoding="utf-8")


def method(name, body):
    """Source of a method of the broken world, of any arguments; `theirs` is the right answer."""
    return (
        f"    def {name}(self, *args, **kwargs):\n"
        f"        theirs = super().{name}(*args, **kwargs)\n"
        f"        {body}\n"
    )


BROKEN = {  # what the class has of its own, and what the sentence says after its name
    "no number of actions": ("    num_actions = None", "num_actions must be a whole number of"),
    "episodes without actions": ("    max_steps = 0", "max_steps must be a whole number of at"),
    "half a number": ("    observation_dim = 6.0", "observation_dim must be a whole number"),
    "three objects": ("    objects = 3", "num_actions must be a multiple of its 3 objects, got 8"),
    "no kinds": (
        "    kinds = ()",
        "check_goal raises ValueError: unknown kind 'edge'; kinds are unk",
    ),
    "a wide state": (
        "    state_dim = 7",
        "initial_states must be a finite array (4, 7) of floating",
    ),
    "a wide view": ("    observation_dim = 8", "observe must be a finite array (8,) of float32"),
    "doubles": (
        method("observe", "return theirs.astype(float)"),
        "observe must be a finite array (6,) of float32, got ndarray float64 (6,)",
    ),
    "a view beyond the limit": (method("observe", "return theirs + 9"), "observe must be within"),
    "a view of a batch alone": (
        "    def observe(self, states):\n        return np.float32(states).reshape(-1, 6)",
        "observe must be a finite array (6,) of float32, got ndarray float32 (1, 6)",
    ),
    "few starts": (
        method("initial_states", "return theirs[:1]"),
        "initial_states must be a finite array",
    ),
    "NaN": (
        method("step_batch", "return theirs * np.nan"),
        "step_batch must be a finite array (8, 6) of floating",
    ),
    "states changed in place": (
        method("step_batch", "args[0][:] = theirs; return theirs"),
        "step_batch must be a function that leaves its arguments as they are",
    ),
    "noise": (
        method("step_batch", "return theirs + np.random.rand()"),
        "step_batch must be the same for each row in any order, however often",
    ),
    "not all actions": (
        "    num_actions = 16",
        "step_batch raises IndexError: index 3 is out of bounds",
    ),
    "another state": (
        method("state_from_observation", "return theirs * 0"),
        "state_from_observation must be states that look like the observations",
    ),
    "no such split": (
        method("sample_goals", "return theirs if args[1] != 'test' else []"),
        "sample_goals must be a list of 4 goals of level 'rephrase' for split 'test', got []",
    ),
    "a missing level": (
        "    def sample_goals(self, level, split, n, rng):\n"
        "        return super().sample_goals({'offline': level}[level], split, n, rng)",
        "sample_goals raises KeyError: 'rephrase'",
    ),
    "texts for goals": (method("sample_goals", "return [goal.text for goal in theirs]"), "sample_"),
    "empty texts": (
        method("sample_goals", "return [env.Goal(' ', 'offline', 'edge') for _ in theirs]"),
        "sample_goals raises ValueError: a goal's text must be a sentence, got ' '",
    ),
    "goals of no rng": (
        "    def sample_goals(self, level, split, n, rng):\n"
        "        return super().sample_goals(level, split, n, np.random.default_rng())",
        "sample_goals must be the same for the same rng",
    ),
    "numbers in relations": (
        method("sample_goals", "return [env.Goal('1', args[0], 'edge', ((1, 2),))] * 4"),
        "check_goal raises ValueError: a relation is [red or green, side]",
    ),
    "numbers in relations that it takes": (
        method("sample_goals", "return [env.Goal('1', args[0], 'edge', ((1, 2),))] * 4")
        + "    def check_goal(self, goal):\n        pass",
        "sample_goals must be of relations, tuples of names, got Goal(text='1'",
    ),
    "a training goal that nobody judges": (
        method("sample_goals", "return [env.Goal(goal.text) for goal in theirs]"),
        "sample_goals must be of kinds that it judges",
    ),
    "a kind that is not named": (
        "    kinds = ('push',)",
        "check_goal raises ValueError: unknown kind 'edge'; kinds are push, unknown",
    ),
    "an expert of too many actions": (
        method("expert_actions", "return theirs + 8"),
        "expert_actions must be actions below 8",
    ),
    "an expert of floats": (
        method("expert_actions", "return theirs / 1"),
        "expert_actions must be a finite array (4,) of integer, got ndarray float64 (4,)",
    ),
    "no expert": (
        "    expert_actions = env.World.expert_actions",
        "expert_actions raises NotImplementedError",
    ),
    "success as numbers": (
        method("success", "return 1.0 * theirs"),
        "success must be a finite array (17,) of bool, got ndarray float64 (17,)",
    ),
    "success of the batch": (
        method("success", "return theirs.any()"),
        "success must be a finite array",
    ),
    "success without a judge": (
        method("success", "return theirs | True"),
        "success must be False for kind 'unknown'",
    ),
    "reward without a judge": (method("reward", "return theirs + 1"), "reward must be 0 for kind"),
    "a potential of two columns": (
        method("potential", "return np.stack([theirs, theirs], 1)"),
        "potential must be a finite array (17,) of number, got ndarray float64 (17, 2)",
    ),
    "a judge that has no imagination": (
        "    def success(self, goals, obs, next_obs, actions):\n        return obs[:, 0] > 9",
        "success raises TypeError",
    ),
    "one score for all": (
        method("explanation_scores", "return {'exact': theirs['exact'].mean()}"),
        "explanation_scores must be a dict of arrays with a number a goal",
    ),
    "rates of nothing": (
        "    def plausibility(self, obs, next_obs):\n        return 1 // 0",
        "plausibility raises ZeroDivisionError",
    ),
    "a list for an array": (
        method("success", "return [*theirs]"),
        "success must be a finite array",
    ),
    "no text": ("    def canonical_text(self, goal):\n        return ''", "canonical_text must be"),
    "no words for a goal": (
        "    def goal_in_words(self, goal):\n        pass",
        "goal_in_words must",
    ),
    "a picture of another size": (
        method("draw", "return theirs[1:]"),
        "draw must be a finite array (64, 64, 3) of uint8, got ndarray uint8 (63, 64, 3)",
    ),
    "a picture that needs an action": (
        "    def draw(self, obs, action, size=256):\n        return 255 // action",
        "draw raises TypeError",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_world_is_refused_with_class_and_method(here, capsys, case):  # noqa: F811
    own, said = BROKEN[case]
    (here / "broken.py").write_text(f"{TILES}\n\nclass Broken(Tiles):\n{own}\n", encoding="utf-8")
    assert smoke(here / "run", "--env", "broken.py:Broken") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"kalm: the world's Broken.{said}") and err.count("\n") == 1, err
    assert not (here / "run").exists()


def test_the_worlds_that_there_are_pass_in_less_than_half_a_second():
    for name in ("clevr_robot", f"{ROOT / 'docs' / 'tiles.py'}:Tiles"):
        world = env.make(name)
        began = time.perf_counter()
        for split in ("validation", "test"):
            check_world(world, split)
        assert time.perf_counter() - began < 1, name


def test_no_method_goes_unasked_that_a_world_has_to_write(monkeypatch):
    """What env.World leaves open, taken out of a world one by one."""
    tiles = env.make(f"{ROOT / 'docs' / 'tiles.py'}:Tiles")
    for name, value in vars(env.World).items():
        if "NotImplementedError" not in getattr(getattr(value, "__code__", None), "co_names", ()):
            continue
        with monkeypatch.context() as patch:
            patch.setattr(type(tiles), name, value)
            with pytest.raises(ValueError, match=f"Tiles.{name} raises NotImplementedError"):
                check_world(tiles, "test")


def test_the_check_comes_before_a_world_is_used(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("worlds.clevr_robot.ClevrRobot.max_steps", 0)
    assert smoke(tmp_path / "run", "--dry_run") == 2
    assert "ClevrRobot.max_steps must be a whole number" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
