"""docs/tour.md and docs/recipes.md: their commands run, their changes apply, and what should be seen is seen."""
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import ground
import kalm
import model
import rl
import rollout

MODULES = {f"{m.__name__}.py": m for m in (kalm.env, model, ground, rollout, rl, kalm)}
TOUR, RECIPES = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("tour.md", "recipes.md"))


def blocks(text, kind):
    return re.findall(rf"^```{kind}\n(.*?)\n```$", text, re.M | re.S)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the code to change and run, with the tour's first run in it."""
    folder = tmp_path_factory.mktemp("tour")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    (folder / "data").symlink_to(ROOT / "data")
    shutil.copytree(ROOT / "docs", folder / "docs")
    (folder / "first.txt").write_text(run(folder, blocks(TOUR, "sh")[0]))
    return folder


def run(folder, commands):
    """Commands of the page, as a reader would type them; returns what they print."""
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"  # the python of the tests
    done = subprocess.run(["bash", "-ec", commands], cwd=folder, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PATH": path, "PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def exercise(copy, number, compare=True):
    """What an exercise's command prints before its changes (compare) and after them; the copy is left as it was."""
    text = re.search(rf"^### Exercise {number}:.*?(?=^##|\Z)", TOUR, re.M | re.S)[0]
    command, = blocks(text, "sh")
    before, kept = run(copy, command) if compare else None, {}
    for change in blocks(text, "diff"):
        name, *lines = change.split("\n")
        old, new = ("\n".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")
        source = (copy / name).read_text(encoding="utf-8")
        assert source.count(old) == 1, f"{name} has {source.count(old)} times: {old}"
        kept.setdefault(name, source)
        (copy / name).write_text(source.replace(old, new), encoding="utf-8")
    try:
        return before, run(copy, command)
    finally:
        for name, source in kept.items():
            (copy / name).write_text(source, encoding="utf-8")


def figure(text, pattern):
    return float(re.search(pattern, text)[1])


def test_exercise_1_longer_pushes_move_the_ball_further(copy):
    before, after = (figure(out, r"moves ([\d.]+) m") for out in exercise(copy, 1))
    assert (round(before, 2), round(after, 2)) == (0.18, 0.27)


def test_exercise_2_a_stricter_judge_lets_fewer_rollouts_pass(copy):
    outputs = (copy / "first.txt").read_text(), exercise(copy, 2, compare=False)[1]
    (before, before_length), (after, after_length) = (
        map(float, re.search(r"(\d+) of 160 expert rollouts succeed, ([\d.]+)", out).groups()) for out in outputs)
    assert (before, after) == (153, 109) and after_length > before_length + 1


def test_exercise_3_without_its_prompt_a_rollout_does_not_depend_on_the_goal(copy):
    before, after = (figure(out, r"by up to ([\d.]+)") for out in exercise(copy, 3))
    assert before > 0 and after == 0


def test_exercise_4_a_new_filter_keeps_what_it_should(copy):
    _, after = exercise(copy, 4, compare=False)
    imagined = {level: rollout.read_rollouts(copy / "runs" / "tour" / "rollouts" / level) for level in ("rephrase", "easy", "hard")}
    brief = {level: sum(len(r["actions"]) == 1 for r in records) for level, records in imagined.items()}
    assert brief["easy"] == len(imagined["easy"]) > brief["rephrase"] + brief["hard"]
    assert "; kalm " + ", ".join(f"{level} {count}" for level, count in brief.items()) in after
    assert "imagine ..." not in after


def test_exercise_5_a_policy_that_does_not_know_its_goal_imitates_worse(copy):
    before, after = (figure(out, r"loss of imitation ([\d.]+)") for out in exercise(copy, 5))
    assert before < 1.3 and after > 1.3 * before


def test_recipe_1_pucks_on_a_grid_go_through_every_stage(copy):
    run(copy, blocks(RECIPES, "sh")[0])
    results = json.loads((copy / "runs" / "grid" / "results.json").read_text())
    assert "cql+kalm" in results["success"] and (copy / "runs" / "grid" / "report.html").is_file()
    moves = [np.diff(r["observations"], axis=0) / 0.2 for r in rollout.read_rollouts(copy / "runs" / "grid" / "rollouts" / "real")]
    for move in moves:  # at most one puck moves, by whole tiles
        assert np.allclose(move, np.rint(move), atol=1e-5) and (np.abs(np.rint(move)).reshape(len(move), 5, 2).any(-1).sum(1) <= 1).all()
    assert len(moves) > 60


def test_recipe_2_implicit_q_learning_has_rows_of_its_own(copy):
    shutil.copytree(copy / "runs" / "tour", copy / "runs" / "iql")
    run(copy, blocks(RECIPES, "sh")[1])
    results = json.loads((copy / "runs" / "iql" / "results.json").read_text())
    assert set(results["success"]) == {"bc", "iql", "iql+kalm"}


def test_recipe_3_another_encoder_gives_the_policies_its_width(copy):
    shutil.copytree(copy / "runs" / "tour", copy / "runs" / "bert")
    run(copy, blocks(RECIPES, "sh")[2])
    table = rl.GoalTable.load(copy / "runs" / "bert" / "policies" / "goals.safetensors")
    network, _ = rl.load_policy(copy / "runs" / "bert" / "policies" / "bc.safetensors")
    assert table.table.shape[1] == 48 and network.weights[0].shape[1] == kalm.env.OBSERVATION_DIM + 48
    assert table.table.std(0).min() > 0.1  # different texts have different encodings


@pytest.mark.parametrize("name", MODULES)
def test_what_the_tour_asks_to_read_is_there(name):
    asked = [word for line in re.findall(rf"`{name}`: ((?:`\w+`(?:, )?)+)", TOUR) for word in re.findall(r"\w+", line)]
    assert len(asked) >= 3 and [word for word in asked if not hasattr(MODULES[name], word)] == []
