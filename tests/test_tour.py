"""docs/tour.md and docs/recipes.md: commands run, changes apply, what should be seen is seen."""

import ast
import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import env
import kalm
from data.policies import load_policy
from data.rollouts import read_rollouts
from data.transitions import GoalTable
from experiment import folder

PAGES = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("tour.md", "recipes.md")]


def section(heading):
    return re.search(rf"^##+ {heading}.*?(?=^##|\Z)", "\n".join(PAGES), re.M | re.S)[0]


def blocks(text, kind):
    return re.findall(rf"^```{kind}\n(.*?)\n```$", text, re.M | re.S)


@pytest.fixture(scope="module")
def tree(tmp_path_factory, smoke_run):
    """A copy of the code to change and run, with the tour's first run in it."""
    assert blocks(PAGES[0], "sh")[0] == "python kalm.py --scale smoke --output_dir runs/tour"
    copy = tmp_path_factory.mktemp("tour") / "tree"
    left_out = shutil.ignore_patterns(".*", "runs", "tests", "adapter", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=left_out)
    shutil.copytree(smoke_run, copy / "runs" / "tour")
    return copy


def run(tree, commands):
    """Commands of a page, as a reader would type them; returns what they print."""
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"  # of this python
    environment = {**os.environ, "PATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    options = {"cwd": tree, "env": environment, "capture_output": True, "encoding": "utf-8"}
    done = subprocess.run(["bash", "-ec", commands], timeout=120, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_changed(tree, heading):
    """What the command of a section prints after its changes, which are taken back."""
    with contextlib.ExitStack() as taken_back:
        for change in blocks(section(heading), "diff"):
            name, *lines = change.split("\n")
            old, new = ("\n".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")
            source = (tree / name).read_text(encoding="utf-8")
            assert source.count(old) == 1, f"{name} has {source.count(old)} times: {old}"
            taken_back.callback((tree / name).write_text, source, encoding="utf-8")
            (tree / name).write_text(source.replace(old, new), encoding="utf-8")
        return run(tree, blocks(section(heading), "sh")[0])


def run_here(tree, heading):
    """The same without a change, and in this process, which spares the imports."""
    printed = io.StringIO()
    with contextlib.chdir(tree), contextlib.redirect_stdout(printed):
        for command in re.findall('python -c "[^"]*"|[^\n]+', blocks(section(heading), "sh")[0]):
            program, *words = shlex.split(command)
            if program != "python":
                run(tree, command)
            elif words[0] == "-c":
                exec(words[1], {})
            else:
                assert kalm.main(words[1:]) == 0
    return printed.getvalue()


def before_and_after(tree, heading):
    """The figure that an exercise prints with the code as it is, and with its changes."""
    texts = run_here(tree, heading), run_changed(tree, heading)
    return [float(re.findall(r"\d+\.\d+", text)[-1]) for text in texts]


def test_exercise_1_longer_pushes_move_the_ball_further(tree):
    assert [round(moved, 2) for moved in before_and_after(tree, "Exercise 1")] == [0.18, 0.27]


def test_exercise_2_a_stricter_judge_lets_fewer_rollouts_pass(tree, world):
    records = read_rollouts(tree / "runs" / "tour" / "rollouts" / "real", world)
    actions = np.mean([len(record["actions"]) for record in records])
    assert (len(records), round(actions, 1)) == (153, 3.4)
    printed = run_changed(tree, "Exercise 2")
    count, more = re.search(r"(\d+) of 160 expert rollouts succeed, ([\d.]+)", printed).groups()
    assert int(count) == 109 and float(more) > actions + 1


def test_exercise_3_without_its_prompt_a_rollout_does_not_depend_on_the_goal(tree):
    before, after = before_and_after(tree, "Exercise 3")
    assert before > 0 and after == 0


def test_exercise_4_a_new_filter_keeps_what_it_should(tree, world):
    printed = run_changed(tree, "Exercise 4")
    brief = {}
    for level in env.NOVEL_LEVELS:
        records = read_rollouts(tree / "runs" / "tour" / "rollouts" / level, world)
        brief[level] = sum(len(record["actions"]) == 1 for record in records)
        assert level != "easy" or brief[level] == len(records)
    assert brief["easy"] > brief["rephrase"] + brief["hard"]
    counts = ", ".join(f"{level} {count}" for level, count in brief.items())
    assert f"kalm: {counts}" in printed and "imagine ..." not in printed


def test_exercise_5_a_policy_that_does_not_know_its_goal_imitates_worse(tree):
    before, after = before_and_after(tree, "Exercise 5")
    assert before == pytest.approx(0.84, abs=0.03) and after == pytest.approx(1.5, abs=0.1)


def test_what_the_tour_asks_to_read_is_there():
    asked = re.findall(r"`([\w/]+)\.py`: ((?:`\w+`(?:,\s+)?)+)", PAGES[0])
    assert len(asked) >= 10
    for path, names in asked:
        module = importlib.import_module(path.replace("/", "."))
        assert [name for name in re.findall(r"\w+", names) if not hasattr(module, name)] == [], path


def test_recipe_a_world_in_a_file_of_its_own_goes_through_every_stage(tree):
    run_here(tree, "Another world")
    pucks = tree / "runs" / "pucks"
    assert (pucks / "report.html").is_file() and (pucks / "results.json").is_file()
    tiles = env.make(f"{tree}/runs/pucks.py:Tiles")
    for record in read_rollouts(pucks / "rollouts" / "real", tiles):  # one puck moves one tile
        assert set(np.abs(np.diff(record["observations"], axis=0)).sum(1)) <= {0, 1}


def test_recipe_the_algorithm_that_is_shown_is_the_one_in_the_code():
    shown = ast.parse(blocks(PAGES[1], "python")[0]).body[0]
    module = ast.parse((ROOT / "rl.py").read_text(encoding="utf-8"))
    ours = next(part for part in module.body if getattr(part, "name", "") == shown.name)
    ours.body = [part for part in ours.body if not isinstance(part, ast.Expr)]  # its docstring
    assert ast.unparse(shown) == ast.unparse(ours)


def test_recipe_an_algorithm_of_ones_own_has_rows_in_every_table(tree):
    printed = run_changed(tree, "Another algorithm")
    methods = ["bc", "nearer", "nearer+kalm"]
    rows = printed.split("\nmethod ")[1].split("\n")[1:4]
    assert [row.split()[0] for row in rows] == methods and "ground ..." not in printed
    nearer = tree / "runs" / "nearer"
    assert list(folder.read_json(nearer / "results.json")["success"]) == methods
    assert (nearer / "report.html").read_text(encoding="utf-8").count("nearer+kalm") > 2


def test_recipe_another_encoder_gives_the_policies_its_width(tree, world):
    run_here(tree, "Another goal encoder")
    table = GoalTable.load(tree / "runs/bert/policies/goals.safetensors").table
    parts, *_ = load_policy(tree / "runs/bert/policies/bc.safetensors")
    assert table.shape[1] == 48 and parts[0].shape[1] == world.observation_dim + 48
    assert table.std(0).min() > 0.1  # different texts have different encodings


def test_recipe_a_term_of_the_loss_is_in_the_loss_and_in_the_log(tree):
    run_changed(tree, "A term of the grounding loss")
    paths = [tree / "runs" / name / "grounded" / "metrics.json" for name in ("tour", "still")]
    before, after = (folder.read_json(path)["log"][0] for path in paths)
    assert all(before[f"{part}_loss"] == after[f"{part}_loss"] for part in ("text", "state"))
    assert 0.001 < after["loss"] - before["loss"] < 0.5
    assert after["still_loss"] > 0
