"""docs/tour.md and docs/recipes.md: commands run, changes apply, what should be seen is seen."""

import ast
import importlib
import json
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
import rl
from data.rollouts import read_rollouts
from data.transitions import GoalTable
from experiment import folder

TOUR, RECIPES = (
    (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("tour.md", "recipes.md")
)


def blocks(text, kind):
    return re.findall(rf"^```{kind}\n(.*?)\n```$", text, re.M | re.S)


def section(text, heading):
    """The part of a page under a heading."""
    return re.search(rf"^(#+) {heading}.*?(?=^##|\Z)", text, re.M | re.S)[0]


@pytest.fixture(scope="module")
def tree(tmp_path_factory, smoke_run):
    """A copy of the code to change and run, with the tour's first run in it."""
    assert blocks(TOUR, "sh")[0] == "python kalm.py --scale smoke --output_dir runs/tour"
    copy = tmp_path_factory.mktemp("tour") / "tree"
    left_out = shutil.ignore_patterns(".*", "runs", "tests", "adapter", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=left_out)
    shutil.copytree(smoke_run, copy / "runs" / "tour")
    return copy


def run(tree, commands):
    """Commands of a page, as a reader would type them; returns what they print."""
    python = os.path.dirname(sys.executable)  # the python of the tests
    path = f"{python}{os.pathsep}{os.environ['PATH']}"
    options = {"cwd": tree, "capture_output": True, "encoding": "utf-8", "timeout": 120}
    options["env"] = {**os.environ, "PATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(["bash", "-ec", commands], **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def here(tree, monkeypatch, capsys):
    """As `run`, but of unchanged code and in this process, which spares the imports."""

    def run_here(commands):
        monkeypatch.chdir(tree)
        capsys.readouterr()
        for command in re.findall('python -c "[^"]*"|[^\n]+', commands):
            words = shlex.split(command)
            if words[:2] == ["python", "-c"]:
                exec(words[2], {})
            elif words[:2] == ["python", "kalm.py"]:
                assert kalm.main(words[2:]) == 0
            else:
                run(tree, command)
        return capsys.readouterr().out

    return run_here


def run_changed(tree, part):
    """What the command of a part of a page prints after its changes, which are taken back."""
    kept = {}
    for change in blocks(part, "diff"):
        name, *lines = change.split("\n")
        old, new = ("\n".join(line[1:] for line in lines if line[0] == sign) for sign in ("-", "+"))
        source = (tree / name).read_text(encoding="utf-8")
        assert source.count(old) == 1, f"{name} has {source.count(old)} times: {old}"
        kept.setdefault(name, source)
        (tree / name).write_text(source.replace(old, new), encoding="utf-8")
    try:
        return run(tree, blocks(part, "sh")[0])
    finally:
        for name, source in kept.items():
            (tree / name).write_text(source, encoding="utf-8")


def before_and_after(tree, number, here):
    """The figure that an exercise prints with the code as it is, and with its changes."""
    part = section(TOUR, f"Exercise {number}:")
    texts = here(blocks(part, "sh")[0]), run_changed(tree, part)
    return [float(re.findall(r"\d+\.\d+", text)[-1]) for text in texts]


def test_exercise_1_longer_pushes_move_the_ball_further(tree, here):
    before, after = before_and_after(tree, 1, here)
    assert (round(before, 2), round(after, 2)) == (0.18, 0.27)


def test_exercise_2_a_stricter_judge_lets_fewer_rollouts_pass(tree, world):
    records = read_rollouts(tree / "runs" / "tour" / "rollouts" / "real", world)
    actions = np.mean([len(record["actions"]) for record in records])
    assert (len(records), round(actions, 1)) == (153, 3.4)
    printed = run_changed(tree, section(TOUR, "Exercise 2:"))
    count, more_actions = re.search(
        r"(\d+) of 160 expert rollouts succeed, ([\d.]+)", printed
    ).groups()
    assert int(count) == 109 and float(more_actions) > actions + 1


def test_exercise_3_without_its_prompt_a_rollout_does_not_depend_on_the_goal(tree, here):
    before, after = before_and_after(tree, 3, here)
    assert before > 0 and after == 0


def test_exercise_4_a_new_filter_keeps_what_it_should(tree, world):
    printed = run_changed(tree, section(TOUR, "Exercise 4:"))
    brief = {}
    for level in env.NOVEL_LEVELS:
        records = read_rollouts(tree / "runs" / "tour" / "rollouts" / level, world)
        brief[level] = sum(len(record["actions"]) == 1 for record in records)
    assert brief["easy"] == len(read_rollouts(tree / "runs/tour/rollouts/easy", world))
    assert brief["easy"] > brief["rephrase"] + brief["hard"]
    counts = ", ".join(f"{level} {count}" for level, count in brief.items())
    assert f"kalm: {counts}" in printed and "imagine ..." not in printed


def test_exercise_5_a_policy_that_does_not_know_its_goal_imitates_worse(tree, here):
    before, after = before_and_after(tree, 5, here)
    assert before == pytest.approx(1.15, abs=0.03) and after == pytest.approx(1.8, abs=0.1)


def test_what_the_tour_asks_to_read_is_there():
    asked = re.findall(r"`([\w/]+)\.py`: ((?:`\w+`(?:,\s+)?)+)", TOUR)
    assert len(asked) >= 10
    for path, names in asked:
        module = importlib.import_module(path.replace("/", "."))
        missing = [name for name in re.findall(r"\w+", names) if not hasattr(module, name)]
        assert missing == [], path


def test_recipe_a_world_in_a_file_of_its_own_goes_through_every_stage(tree, here):
    here(blocks(section(RECIPES, "Another world"), "sh")[0])
    tiles = env.make(f"{tree}/runs/pucks.py:Tiles")
    pucks = tree / "runs" / "pucks"
    results = folder.read_json(pucks / "results.json")
    assert set(results["success"]) == {"bc", "bc+kalm", "llm"} and (pucks / "report.html").is_file()
    for record in read_rollouts(pucks / "rollouts" / "real", tiles):  # one puck moves one tile
        moved = np.diff(record["observations"], axis=0)
        assert set(np.abs(moved).sum(1)) <= {0, 1}


def test_recipe_the_algorithm_that_is_shown_is_the_one_in_the_code():
    (shown,) = ast.parse(blocks(RECIPES, "python")[0]).body
    with open(rl.__file__, encoding="utf-8") as file:
        (ours,) = [
            part for part in ast.parse(file.read()).body if getattr(part, "name", "") == "AWAC"
        ]
    ours.body = [part for part in ours.body if not isinstance(part, ast.Expr)]  # its docstring
    assert ast.unparse(shown) == ast.unparse(ours)


def test_recipe_an_algorithm_of_ones_own_has_rows_in_every_table(tree):
    part = section(RECIPES, "Another algorithm")
    printed = run_changed(tree, part)
    methods = ["bc", "nearer", "nearer+kalm"]
    table = printed.split("\nmethod ")[1]
    assert [line.split()[0] for line in table.split("\n")[1:4]] == methods
    assert "ground ..." not in printed  # the stages before stay
    nearer = tree / "runs" / "nearer"
    assert list(folder.read_json(nearer / "results.json")["success"]) == methods
    assert list(folder.read_json(nearer / "policies" / "curves.json")) == methods
    assert (nearer / "report.html").read_text(encoding="utf-8").count("nearer+kalm") > 2


def test_recipe_another_encoder_gives_the_policies_its_width(tree, world, here):
    here(blocks(section(RECIPES, "Another goal encoder"), "sh")[0])
    policies = tree / "runs" / "bert" / "policies"
    table = GoalTable.load(policies / "goals.safetensors").table
    network, *_ = rl.load_policy(policies / "bc.safetensors")
    assert table.shape[1] == 48 and network.shapes[0][0] == world.observation_dim + 48
    assert table.std(0).min() > 0.1  # different texts have different encodings


def test_recipe_a_term_of_the_loss_is_in_the_loss_alone(tree):
    run_changed(tree, section(RECIPES, "A term of the grounding loss"))
    first = {}
    for name in ("tour", "still"):
        text = (tree / "runs" / name / "logs" / "grounding.jsonl").read_text(encoding="utf-8")
        first[name] = json.loads(text.split("\n")[0])
    parts = {"text_loss", "action_loss", "state_loss"}
    assert all(first["still"][part] == first["tour"][part] for part in parts)
    assert 0.001 < first["still"]["loss"] - first["tour"]["loss"] < 0.5
