"""The command: whole runs in any world, what is redone, what is recorded, several processes."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, run_kalm
from huggingface_hub import ModelCard
from transformers.models.llama.modeling_llama import LlamaMLP

import env
import ground
import kalm
import rl
import tasks
from data.rollouts import read_rollouts
from experiment import folder
from model import KalmForRollouts

SMOKE = ("--scale", "smoke", "--output_dir")
STAGES = list(kalm.STAGES)[:-1]
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
TILES = f"{ROOT / 'docs' / 'tiles.py'}:Tiles"
MY_GOALS = [
    {"text": 'Nudge <b>red</b> & "co" to the left.', "level": "easy", "kind": "step"},
    {"text": "Green next to purple, {please}: 请.", "level": "rephrase", "kind": "relation"},
    {"text": "A tidy row.", "level": "hard", "kind": "line", "relations": []},
]
MY_GOALS[0]["relations"] = [["red", None, "left"]]
MY_GOALS[1]["relations"] = [["green", "purple", "right"]]


def smoke(run, *options):
    """Run kalm.py here. Returns its exit code."""
    return kalm.main([*SMOKE, run, *options])


def write_goals(path, goals=MY_GOALS):
    lines = [json.dumps(goal, ensure_ascii=False) + "\n" for goal in goals]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def files_of(run):
    """Every file below a folder with its content and time of writing."""
    files = [path for path in sorted(run.rglob("*")) if path.is_file()]
    return {p.relative_to(run): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def results_of(run):
    return folder.read_json(run / "results.json")


def without_times(results):
    return {name: value for name, value in results.items() if name != "time_s"}


def assert_complete(results, levels=env.LEVELS):
    of_policies = {"success", "goals", "curves", "last_checkpoints"}
    assert set(results) == of_policies | {"quality", "grounding", "words", "time_s", "config"}
    methods = kalm.SCALES["smoke"]["methods"].split(",")
    assert list(results["success"]) == methods
    asked = {method for method in methods if method != rl.DT}
    assert set(results["words"]) == (asked if env.WORDS in levels else set())
    for method, row in results["success"].items():
        assert list(row) == list(levels)
        for level, cell in row.items():
            count = 3 if level == env.WORDS else 6  # episodes of a seed
            rates = cell.pop("seeds")
            outcomes = cell.pop("outcomes")
            assert [text.count("1") / count for text in outcomes] == pytest.approx(rates)
            assert len(rates) == (1 if method in rl.MODELS else 2)
            assert 0 <= min(rates) <= max(rates) <= 1
            expected = {"mean": np.mean(rates), "std": np.std(rates)}
            expected["episodes"] = count * len(rates)
            assert cell == pytest.approx(expected)
    assert set(results["curves"]) == set(methods) - set(rl.MODELS)
    for method in results["curves"]:
        for level in levels:
            steps = [step for step, rates in results["curves"][method][level] if len(rates) == 2]
            assert steps == [30, 59, 60]
            count = 3 if level == env.WORDS else 4
            assert results["last_checkpoints"][method][level]["episodes"] == 2 * count * 2
    for level in levels[1:]:
        assert len(results["goals"][level]) == (3 if level == env.WORDS else 6)
        assert all(0 <= results["quality"][level][rate] <= 1 for rate in ("match", "executed"))
    assert set(results["time_s"]) == set(STAGES) - {"report"}


@pytest.fixture
def run(smoke_run, tmp_path):
    """A copy of the finished smoke run, to change."""
    return shutil.copytree(smoke_run, tmp_path / "run")


# ------------------------------------------------------------------ whole runs


def test_a_smoke_run_fills_every_method_and_level(smoke_run):
    assert_complete(results_of(smoke_run))
    assert {path.name for path in (smoke_run / "rollouts").iterdir()} == {"real", *env.NOVEL_LEVELS}
    endings = {path.suffix for path in smoke_run.rglob("*")}
    assert not endings & {".partial", ".pkl", ".bin", ".pt"}


def test_the_same_seed_gives_the_same_results(smoke_run, tmp_path):
    assert smoke(tmp_path / "again") == 0
    again = results_of(tmp_path / "again")
    assert without_times(again) == without_times(results_of(smoke_run))


@pytest.mark.slow
def test_two_processes_share_the_work_and_give_complete_and_the_same_results(
    smoke_run, tmp_path, world
):
    run = tmp_path / "run"
    done = run_kalm(*SMOKE, run, "--stage", "all", launcher=LAUNCHER)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("learn ...") == 1  # one process speaks for both
    assert_complete(results_of(run))
    assert (run / "report.html").is_file() and not list(tmp_path.rglob("*.partial"))
    assert "8 steps of 8 examples" in (run / "grounded" / "README.md").read_text("utf-8")
    for level in env.NOVEL_LEVELS:  # each goal and start once, in the order of one process
        both, alone = (read_rollouts(r / "rollouts" / level, world) for r in (run, smoke_run))
        for ours, theirs in zip(both[:12], alone):
            assert ours["goal"] == theirs["goal"]
            assert (ours["observations"][0] == theirs["observations"][0]).all()
        assert len(both) == 12 + sum(not record["success"] for record in both[:12])
    before = without_times(results_of(run))  # one process makes the same from what is imagined
    assert smoke(run, "--stage", "learn", "evaluate", "--force") == 0
    after = without_times(results_of(run))
    after["config"] = {name: after["config"][name] for name in before["config"]}
    for found in (before, after):  # two processes add gradients of the Trainer in another order
        del found["success"]["dt"]
    assert after == before


def test_another_world_goes_through_every_stage_from_a_file_anywhere(tmp_path, capsys):
    mine = shutil.copy(ROOT / "docs" / "tiles.py", tmp_path / "my tiles.py")
    run = tmp_path / "run"
    assert smoke(run, "--env", f"{mine}:Tiles") == 0
    results = results_of(run)
    assert_complete(results, env.LEVELS[:4])  # it has no new words
    assert results["config"]["env"] == f"{mine}:Tiles"
    rates = [cell["mean"] for row in results["success"].values() for cell in row.values()]
    assert max(rates) > 0.5  # what is learned there is of use there
    world = env.make(f"{mine}:Tiles")
    for level in ("real", *env.NOVEL_LEVELS):  # which checks sizes and actions
        assert read_rollouts(run / "rollouts" / level, world)
    assert "paper" not in (run / "report.html").read_text("utf-8")
    assert "clevr" not in (run / "grounded" / "README.md").read_text("utf-8").lower()
    capsys.readouterr()
    goal = lines_of(run / "goals.jsonl")[0]["text"]
    assert kalm.main(["--stage", "act", "--goal", goal, "--run", run, "--methods", "bc,llm"]) == 0
    assert "(as the goals of the run have it)" in capsys.readouterr().out
    assert [entry["method"] for entry in lines_of(run / "logs" / "act.jsonl")] == ["bc", "llm"]
    assert smoke(run, "--stage", "learn") == 2  # of the default world
    assert "was run with --env" in capsys.readouterr().err
    with open(mine, "a", encoding="utf-8") as file:
        file.write("# another world\n")
    assert smoke(run, "--env", f"{mine}:Tiles", "--dry_run") == 0
    assert "done before" not in capsys.readouterr().out


def test_every_algorithm_has_rows_and_curves(run):
    methods = "iql,iql+kalm,awac+relabel,awac+both"
    assert smoke(run, "--methods", methods, "--episodes", 4) == 0
    results = results_of(run)
    assert list(results["success"]) == methods.split(",")
    assert list(folder.read_json(run / "policies" / "curves.json")) == methods.split(",")
    assert all(set(row) == set(env.LEVELS) for row in results["success"].values())
    page = (run / "report.html").read_text(encoding="utf-8")
    assert all(method in page for method in methods.split(","))


def test_users_goals_reach_the_results_and_the_report(run, tmp_path, world):
    text = "Put the crimson ball left of the blue ball."
    heard_last = {"text": text, "level": "words", "kind": "relation"}
    heard_last["relations"] = [["red", "blue", "left"]]
    goals = write_goals(tmp_path / "mine.jsonl", [*MY_GOALS, heard_last])
    assert smoke(run, "--goals", goals, "--methods", "bc+kalm") == 0
    results = results_of(run)
    assert set(results["success"]["bc+kalm"]) == set(env.LEVELS) == {"offline", *results["quality"]}
    said = {text.replace("crimson", color) for color in ("red", "green", "purple", "cyan")}
    assert len(set(results["goals"]["words"])) == 1 and set(results["goals"]["words"]) <= said
    assert text in (run / "goals.jsonl").read_text("utf-8")
    assert not (run / "rollouts" / "words").exists()  # nothing is learned from it
    assert results["config"]["goals"] == str(tmp_path / "mine.jsonl")
    page = (run / "report.html").read_text(encoding="utf-8")
    for goal in MY_GOALS:
        records = read_rollouts(run / "rollouts" / goal["level"], world)
        assert len(records) == 4 and {record["goal"] for record in records} == {goal["text"]}
    assert "<b>red" not in page and "&lt;b&gt;red" in page and "{please}: 请" in page
    few = write_goals(tmp_path / "few.jsonl", MY_GOALS[:1])
    assert smoke(run, "--goals", few, "--methods", "bc+kalm") == 0
    assert set(results_of(run)["success"]["bc+kalm"]) == {"offline", "easy"}
    assert [path.name for path in sorted((run / "rollouts").iterdir())] == ["easy", "real"]


def test_users_data_take_the_place_of_the_experts(smoke_run, tmp_path, capsys, world):
    data = shutil.copytree(smoke_run / "rollouts" / "real", tmp_path / "mine")
    run = tmp_path / "run"
    assert smoke(run, "--stage", "collect", "ground", "--data", data) == 0
    theirs, ours = (read_rollouts(r / "rollouts" / "real", world) for r in (smoke_run, run))
    assert [r["goal"] for r in ours] == [r["goal"] for r in theirs]
    assert "146 rollouts of `mine`" in (run / "grounded" / "README.md").read_text("utf-8")
    moved = data.rename(tmp_path / "moved")
    capsys.readouterr()
    assert smoke(run, "--stage", "collect", "ground", "--data", moved) == 0
    assert "nothing to do" in capsys.readouterr().out  # they count by their content


# ------------------------------------------------------------------ as in Hugging Face


def test_switches_of_hugging_face_do_in_grounding_what_they_do_elsewhere(
    tmp_path, monkeypatch, smoke_run
):
    seen, layers = [], []
    real, real_layer = ground.GroundingTrainer.compute_loss, LlamaMLP.forward

    def compute_loss(self, model, inputs, *args, **kwargs):
        examples = (inputs["segments"].amax(1) // tasks.SEGMENTS + 1).sum().item()
        seen.append((self.state.global_step, model.is_gradient_checkpointing, examples))
        return real(self, model, inputs, *args, **kwargs)

    def forward(self, states):
        layers.append(self.training)
        return real_layer(self, states)

    monkeypatch.setattr(ground.GroundingTrainer, "compute_loss", compute_loss)
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    options = "--gradient_accumulation_steps 2 --logging_steps 2 --eval_steps 4".split()
    saves_memory = [*options, "--gradient_checkpointing", "true", "--dataloader_num_workers", "1"]
    for name, given in (("plain", options), ("saving", saves_memory)):
        run = shutil.copytree(smoke_run, tmp_path / name)
        seen.clear(), layers.clear()
        assert smoke(run, "--stage", "ground", *given) == 0
        assert [step for step, *_ in seen] == [step for step in range(8) for _ in range(2)]
        assert {(on, size) for _, on, size in seen} == {(name == "saving", 8)}
        passes = 2 if name == "saving" else 1  # the layers are computed again going backward
        assert layers.count(True) == 16 * 2 * passes
    plain, saving = (tmp_path / name / "grounded" for name in ("plain", "saving"))
    assert (plain / "model.safetensors").read_bytes() == (saving / "model.safetensors").read_bytes()
    log = lines_of(tmp_path / "saving" / "logs" / "grounding.jsonl")
    assert [entry["step"] for entry in log if "loss" in entry] == [2, 4, 6, 8]
    assert [entry["step"] for entry in log if "eval_action_accuracy" in entry] == [4, 8]
    assert "8 steps of 16 examples" in (saving / "README.md").read_text("utf-8")
    config = yaml.safe_load((tmp_path / "saving" / "config.yaml").read_text("utf-8"))
    assert (config["gradient_accumulation_steps"], config["max_steps"]) == (2, 8)


def test_passes_instead_of_steps_are_recorded_as_what_was_done(run, capsys):
    assert smoke(run, "--stage", "ground", "--num_train_epochs", 0.2, "--logging_steps", 1) == 0
    assert re.search(r"num_train_epochs\s+0.2", capsys.readouterr().out)
    steps = [entry["step"] for entry in lines_of(run / "logs" / "grounding.jsonl")]
    assert steps[0] == 1 and 1 < steps[-1] < 8
    card = ModelCard.load(run / "grounded" / "README.md").text
    assert f"{steps[-1]} steps of 8 examples" in card
    config = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
    assert config["num_train_epochs"] == 0.2 and "max_steps" not in config


def test_a_run_grounds_with_the_adapter_of_another_and_may_train_it_on(tmp_path, capsys):
    trained, served = tmp_path / "trained", tmp_path / "served"
    two = ("--stage", "collect", "ground")
    assert smoke(trained, *two, "--lora_rank", 2) == 0
    adapter = trained / "grounded"
    capsys.readouterr()
    assert smoke(served, *two, "--adapter", adapter) == 0
    told = " ".join(capsys.readouterr().out.split("collect ...")[0].split())
    assert f"adapter {adapter}, keep_layers 0, max_steps -1, num_train_epochs 0.0" in told
    card = ModelCard.load(served / "grounded" / "README.md").text
    assert "**Training**: none here. The adapter `grounded` (LoRA of rank 2) was taken" in card
    config = yaml.safe_load((served / "config.yaml").read_text("utf-8"))
    assert config["adapter"] == str(adapter) and not {"tasks", "learning_rate"} & set(config)
    models = [KalmForRollouts.from_pretrained(path / "grounded") for path in (trained, served)]
    theirs, ours = (model.state_dict() for model in models)
    torch.testing.assert_close(ours, theirs, rtol=2**-8, atol=1e-6)
    metrics = [folder.read_json(path / "grounded" / "metrics.json") for path in (trained, served)]
    assert metrics[0] == metrics[1] and metrics[0]["log"]
    assert smoke(trained, "--adapter", adapter) == 2  # ground would delete what it reads
    assert f"ground would replace {trained / 'grounded'}" in capsys.readouterr().err
    assert smoke(served, "--stage", "ground", "--adapter", adapter, "--max_steps", 3) == 0
    log = folder.read_json(served / "grounded" / "metrics.json")["log"]
    assert log[: len(metrics[0]["log"])] == metrics[0]["log"]
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, 12))
    card = ModelCard.load(served / "grounded" / "README.md").text
    assert "the adapter `grounded`, trained on for 3 steps of 8 examples" in card
    further = KalmForRollouts.from_pretrained(served / "grounded").state_dict()
    moved = {name for name in ours if not torch.equal(ours[name], further[name])}
    assert moved and moved <= set(models[1].new_parameters())


# ------------------------------------------------------------------ what is redone

AFTER_IMAGINE = ["imagine", "learn", "evaluate", "report"]
REDONE = {
    "": [],
    "--stage learn report": [],
    "--logging_steps 3 --save_steps 2 --report_to none": [],
    "--rl_steps 61": ["learn", "evaluate", "report"],
    "--keep matched": ["learn", "evaluate", "report"],
    "--episodes 7": ["evaluate", "report"],
    "--export npz": ["report"],
    "--temperatures 0.5": AFTER_IMAGINE,
    "--split validation": AFTER_IMAGINE,
    "--max_steps 9": ["ground", *AFTER_IMAGINE],
    "--gradient_accumulation_steps 2": ["ground", *AFTER_IMAGINE],
    "--train_goals 41": STAGES,
    "--seed 1": STAGES,
    "--llm LLM": ["ground", *AFTER_IMAGINE],
    f"--env {TILES}": STAGES,
    "--force": STAGES,
    "--stage imagine --force": ["imagine"],
}


@pytest.mark.parametrize("arguments", REDONE)
def test_a_second_run_redoes_what_a_changed_setting_touches_and_no_more(
    run, tmp_path, stages_run, monkeypatch, arguments
):
    monkeypatch.setattr(kalm.command, "check", lambda *_: None)
    monkeypatch.setattr(kalm.command, "check_llm", lambda *_: None)
    before = files_of(run)
    assert smoke(run, *arguments.split()) == 0
    assert stages_run == REDONE[arguments]
    assert stages_run or files_of(run) == before


def test_a_changed_goals_file_is_noticed(run, tmp_path, monkeypatch):
    path, stages_run = tmp_path / "mine.jsonl", []
    for name, stage in kalm.STAGES.items():
        note = lambda *_, name=name: stages_run.append(name)
        monkeypatch.setitem(kalm.STAGES, name, dataclasses.replace(stage, function=note))
    for goals, redone in ((MY_GOALS, AFTER_IMAGINE), (MY_GOALS, []), (MY_GOALS[:2], AFTER_IMAGINE)):
        stages_run.clear()
        assert smoke(run, "--goals", write_goals(path, goals)) == 0
        assert stages_run == redone


MADE_WITH = {  # a command, and the stage whose result was made with other settings
    "learn --split validation": "imagine",
    "evaluate --novel_goals 5": "imagine",
    "evaluate --keep matched": "learn",
    "report --seeds 1": "learn",
    "ground --seed 1": "collect",
}


@pytest.mark.parametrize("command", MADE_WITH)
def test_a_stage_whose_input_was_made_with_other_settings_says_so(run, capsys, command):
    assert smoke(run, "--stage", *command.split()) == 2
    option = command.split()[1]
    sentence = f"kalm: stage '{MADE_WITH[command]}' was run with {option} "
    assert capsys.readouterr().err.startswith(sentence)
