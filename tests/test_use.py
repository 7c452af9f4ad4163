"""Using it: goals typed by hand and without a judge, configs, logs, trackers, other systems."""

import os
import shutil
import subprocess
import sys

import accelerate
import huggingface_hub
import numpy as np
import pytest
import transformers
import yaml
from conftest import ROOT
from PIL import Image
from test_kalm import SMOKE, files_of, lines_of, results_of, smoke, without_times, write_goals

import env
import explain
import kalm
import rl
from data.rollouts import read_rollouts
from experiment import folder, logs
from experiment.quality import replay

UNJUDGED = [{"text": "Make a home for red.", "level": "hard"}]
UNJUDGED += [{"text": "Surprise me.", "level": "easy"}]


@pytest.fixture
def run(smoke_run, tmp_path):
    """A copy of the finished smoke run, to change."""
    return shutil.copytree(smoke_run, tmp_path / "run")


def act(run, goal, *options):
    return kalm.main(["--stage", "act", "--goal", goal, "--run", run, *options])


# ------------------------------------------------------------------ goals without a judge


def test_goals_without_a_judge_are_imagined_learned_from_and_left_out_of_evaluation(
    run, tmp_path, monkeypatch, world
):
    def said(model, tokenizer, records, *_, **options):
        return ["The red ball." if number % 2 else "" for number in range(len(records))]

    learned, build = [], rl.Buffer.__init__

    def noted(self, records, *args, **options):
        learned.extend((record["goal"], record.get("explanation")) for record in records)
        build(self, records, *args, **options)

    monkeypatch.setattr(explain, "explain", said)
    monkeypatch.setattr(rl.Buffer, "__init__", noted)
    judged = {"text": "Bring green to purple's right.", "level": "hard", "kind": "relation"}
    judged["relations"] = [["green", "purple", "right"]]
    goals = write_goals(tmp_path / "mine.jsonl", [*UNJUDGED, judged])
    options = "--self_check false --keep matched --methods bc,bc+kalm".split()
    assert smoke(run, "--goals", goals, *options) == 0
    results = results_of(run)
    assert set(results["success"]["bc+kalm"]) == {"offline", "hard"}  # easy has no judged goal
    assert "match" in results["quality"]["hard"] and "match" not in results["quality"]["easy"]
    for goal in UNJUDGED:
        records = read_rollouts(run / "rollouts" / goal["level"], world)
        ours = [record for record in records if record["goal"] == goal["text"]]
        assert ours and all(not r["success"] and (r["rewards"] == 0).all() for r in ours)
        kept = [said for text, said in learned if text == goal["text"]]
        assert 0 < len(kept) < len(ours) and set(kept) == {"The red ball."}


# ------------------------------------------------------------------ act


def test_act_plays_a_typed_goal_by_policy_and_llm_and_tells_what_happened(run, capsys, world):
    best, text = "bc+relabel", "put the red ball left of the blue one"
    results = results_of(run)
    for method, row in results["success"].items():
        for cell in row.values():
            cell["mean"] = {best: 0.9, "llm": 0.95}.get(method, 0.1)
    manifest = folder.read_json(run / "manifest.json")
    folder.write_json(run / "results.json", results)
    manifest["stages"]["evaluate"]["files"]["results.json"] = folder.sha256(run / "results.json")
    folder.write_json(run / "manifest.json", manifest)
    (run / "unfinished" / "learn-0123").mkdir(parents=True)
    (run / "unfinished" / "learn-0123" / "bc.pt").write_text("of a killed stage")
    before = files_of(run)
    assert act(run, text, "--seed", 3) == 0
    told = capsys.readouterr().out
    assert "judge: red is left of blue (read from the sentence)" in told
    entries = lines_of(run / "logs" / "act.jsonl")
    assert [entry["method"] for entry in entries] == [best, "llm"]
    goal = world.goal_of_text(text)
    start = env.unfulfilled_states(world, np.random.default_rng([3, 8]), [goal])
    for entry in entries:  # the same start, actions and judge
        plan = replay([entry["actions"]])
        (record,) = env.run_episodes(world, plan, [goal], start, len(entry["actions"]))
        assert entry["verdict"] == ("goal met" if record["success"] else "goal missed")
        changes = world.change_in_words(*record["observations"][[0, -1]])
        count = f"{len(entry['actions'])} actions; changed: {changes}"
        assert f"  {entry['method']}: {entry['verdict']}, {count}\n" in told
        assert entry["explanation"] in told and str(run / "act" / entry["gif"]) in told
        with Image.open(run / "act" / entry["gif"]) as picture:
            assert 1 < picture.n_frames <= len(entry["actions"]) + 4
    after = files_of(run)
    assert {path: after[path] for path in before} == before  # what stages made or left stays


def test_act_and_report_need_no_file_that_earlier_stages_read(smoke_run, tmp_path, capsys):
    goals = shutil.copy(smoke_run / "goals.jsonl", tmp_path)
    data = shutil.copytree(smoke_run / "rollouts" / "real", tmp_path / "data")
    base, run = tmp_path / "base", tmp_path / "run"
    assert smoke(base, "--stage", "collect", "ground", "--lora_rank", 2) == 0
    adapter = shutil.copytree(base / "grounded", tmp_path / "adapter")
    options = ("--methods", "bc,llm", "--rl_steps", 5, "--adapter", adapter, "--data", data)
    assert smoke(run, *options, "--goals", goals) == 0
    os.remove(goals)
    for path in (data, adapter):
        shutil.rmtree(path)
    assert act(run, "put the red ball left of the blue one") == 0
    config = ("--config", run / "config.yaml", "--output_dir", run, "--force")
    assert kalm.main([*config, "--stage", "evaluate", "report"]) == 0
    capsys.readouterr()
    read = {"collect": data, "ground": adapter, "imagine": goals}
    for stage, path in read.items():
        assert kalm.main([*config, "--stage", stage]) == 2
        assert str(path) in capsys.readouterr().err


def test_act_without_a_judge_says_so_and_plays_every_action(run, capsys, world):
    methods = ["bc", "cql+kalm", "dt", "llm"]
    assert act(run, "Räum den Tisch auf, 请", "--methods", ",".join(methods)) == 0
    told = capsys.readouterr().out
    assert "judge: none is known" in told and told.count("not judged") == 4
    entries = lines_of(run / "logs" / "act.jsonl")
    assert [entry["method"] for entry in entries] == methods
    for entry in entries:
        assert (len(entry["actions"]), entry["verdict"]) == (world.max_steps, "not judged")
        assert (run / "act" / entry["gif"]).is_file()


def test_act_judges_a_goal_of_the_runs_own_as_the_run_does(run, tmp_path, capsys, monkeypatch):
    goals = write_goals(tmp_path / "mine.jsonl", UNJUDGED)
    assert act(run, "Surprise me.", "--goals", goals) == 2  # imagined with others
    assert "--goals" in capsys.readouterr().err
    known = [goal for goal in lines_of(run / "goals.jsonl") if goal["level"] != "words"][-1]
    encode = lambda *_: pytest.fail("the goal is in the table of the policies already")
    monkeypatch.setattr(kalm.Run, "load_encoder", encode)
    assert act(run, known["text"], "--methods", "bc") == 0
    assert "(as the goals of the run have it)" in capsys.readouterr().out
    assert lines_of(run / "logs" / "act.jsonl")[-1]["kind"] == known["kind"] != "unknown"


# ------------------------------------------------------------------ configs


def test_the_config_of_a_run_repeats_it_from_another_folder_with_a_difficult_name(
    tmp_path, monkeypatch, capsys
):
    here, there = tmp_path / "mein Läufe 结果", tmp_path / "elsewhere"
    here.mkdir(), there.mkdir()
    monkeypatch.chdir(here)
    shutil.copy(ROOT / "docs" / "tiles.py", "tiles.py")
    goal = {"text": "Schiebe grün hinüber, 请.", "level": "easy", "kind": "push"}
    write_goals(here / "meine ziele.jsonl", [{**goal, "relations": [["green", "left"]]}])
    small = "--methods bc+kalm,llm --rl_steps 20 --train_goals 30 --seed 4 --warmup_steps 1"
    mine = (*small.split(), "--goals", "meine ziele.jsonl", "--env", "tiles.py:Tiles")
    assert smoke("ein lauf", *mine, "--self_check", "false") == 0
    monkeypatch.chdir(there)
    again = ["--config", here / "ein lauf" / "config.yaml", "--run", "noch ein läufer"]
    assert kalm.main(again) == 0
    ours, theirs = (results_of(run) for run in (here / "ein lauf", there / "noch ein läufer"))
    assert without_times(ours) == without_times(theirs)
    assert (ours["config"]["rl_steps"], ours["config"]["self_check"]) == (20, False)
    capsys.readouterr()
    assert act("noch ein läufer", goal["text"]) == 0
    assert "judge: green left (as the goals of the run have it)" in capsys.readouterr().out
    assert len(list((there / "noch ein läufer" / "act").glob("*.gif"))) == 2


def test_stages_run_one_by_one_leave_one_config_with_the_settings_of_all(run, capsys):
    learned = ("--rl_steps", 15, "--seeds", 1, "--methods", "bc")
    assert smoke(run, "--stage", "learn", *learned) == 0
    assert smoke(run, "--stage", "evaluate", *learned, "--episodes", 4) == 0
    found = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
    assert (found["rl_steps"], found["episodes"], found["imagined_steps"]) == (15, 4, 4)
    assert found["stage"] == list(kalm.STAGES)[:-1] and found["scale"] == "smoke"
    results = results_of(run)["config"]
    assert results == {name: found[name] for name in found if name != "stage"}
    capsys.readouterr()
    assert kalm.main(["--config", run / "config.yaml", "--run", run, "--dry_run"]) == 0
    plan = capsys.readouterr().out
    assert plan.count("done before") == 5  # all but the report, which follows from those


# ------------------------------------------------------------------ logs


def test_everything_is_logged_as_json_lines(smoke_run):
    logged, stages = smoke_run / "logs", list(kalm.STAGES)[:-1]
    assert [line["stage"] for line in lines_of(logged / "stages.jsonl")] == stages
    metrics = folder.read_json(smoke_run / "grounded" / "metrics.json")
    shown = {"loss", "eval_easy_state"}
    grounding = [line for line in lines_of(logged / "grounding.jsonl") if shown & set(line)]
    for line in grounding:
        line.pop("time")
    assert grounding == metrics["log"]
    curves = folder.read_json(smoke_run / "policies" / "curves.json")
    assert set(curves) == set(results_of(smoke_run)["success"]) - {"llm"}
    for method, curve in curves.items():
        lines = lines_of(logged / f"rl_{method}.jsonl")
        assert [[line["step"], line["loss"]] for line in lines] == curve
    times = [line["time"] for path in logged.glob("*.jsonl") for line in lines_of(path)]
    assert min(times) > 1e9


@pytest.mark.parametrize("chosen", [None, "/home/me/wandb"])
def test_trackers_keep_files_where_the_user_says_else_in_the_run(tmp_path, monkeypatch, chosen):
    for name in ("WANDB_DIR", "TENSORBOARD_LOGGING_DIR"):
        monkeypatch.setenv(name, "")  # so that the end of the test restores them
    monkeypatch.delenv("WANDB_DIR")
    if chosen:
        monkeypatch.setenv("WANDB_DIR", chosen)
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: object())
    logs.check_trackers(["wandb"], tmp_path / "logs")
    assert os.environ["WANDB_DIR"] == (chosen or str(tmp_path / "logs"))


def test_a_curve_begun_again_starts_anew_and_goes_to_every_tracker(tmp_path, monkeypatch):
    calls = []

    class Tracker:
        requires_logging_directory = False

        def __init__(self, project, name, **options):
            calls.append((project, name))

        def start(self):
            assert self.main_process_only is False  # each process logs what it learns

        def log(self, values, step):
            calls.append((values, step))

        def finish(self):
            calls.append("finished")

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "trackio", Tracker)
    for losses in ((3.0, 2.0), (1.5,)):
        with logs.curve(tmp_path, "rl_bc", ["trackio"]) as log:
            for step, loss in enumerate(losses):
                log(step, loss)
    lines = lines_of(tmp_path / "rl_bc.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(0, 1.5)]
    first = [("kalm", "rl_bc"), ({"rl_bc/loss": 3.0}, 0), ({"rl_bc/loss": 2.0}, 1), "finished"]
    assert calls == [*first, ("kalm", "rl_bc"), ({"rl_bc/loss": 1.5}, 0), "finished"]


# ------------------------------------------------------------------ elsewhere


def test_the_grounded_folder_loads_with_auto_classes_after_importing_model(smoke_run, tmp_path):
    script = """import sys
sys.path.insert(0, sys.argv[2])
import model
from transformers import AutoConfig, AutoModel, AutoTokenizer
loaders = (AutoModel, AutoConfig, AutoTokenizer)
model, config, tokenizer = (loader.from_pretrained(sys.argv[1]) for loader in loaders)
print(type(model).__name__, config.num_actions, tokenizer("red ball"))
"""
    command = [sys.executable, "-c", script, str(smoke_run / "grounded"), str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=100)
    assert done.stdout.startswith("KalmForRollouts 40 {'input_ids'"), done.stderr


def test_push_to_hub_uploads_the_finished_model_and_no_secret_stays(run, tmp_path, monkeypatch):
    made, sent = [], {}

    def create_repo(name, **options):
        made.append((name, options["token"], options["private"]))
        return type("Url", (), {"repo_id": name})

    def upload_folder(repo_id, folder_path, token):
        sent[repo_id] = shutil.copytree(folder_path, tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    switches = "--push_to_hub true --hub_model_id me/mine --hub_token hf_secret".split()
    assert smoke(run, "--stage", "ground", "--force", *switches, "--hub_private_repo", "true") == 0
    assert made == [("me/mine", "hf_secret", True)]
    model = transformers.AutoModel.from_pretrained(sent["me/mine"])
    assert type(model) is kalm.KalmForRollouts and (tmp_path / "hub" / "README.md").is_file()
    assert not [
        name for name, (content, _) in files_of(tmp_path).items() if b"hf_secret" in content
    ]


def kalm_as(preamble, *arguments, options=(), **variables):
    """kalm.py in a process of its own, after a preamble and in another environment."""
    script = f"{preamble}\nimport runpy, sys\nsys.argv[0] = {str(ROOT / 'kalm.py')!r}\n"
    script += f"sys.path.insert(0, {str(ROOT)!r})\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, *options, "-c", script, *map(str, arguments)]
    changed = {"env": {**os.environ, **variables}, "timeout": 300}
    return subprocess.run(command, capture_output=True, **changed)


def test_a_terminal_that_lacks_the_characters_of_a_goal_shows_others(run):
    acts = ("--stage", "act", "--goal", "Räum auf, 请 ✓", "--run", run, "--methods", "bc")
    done = kalm_as("", *acts, PYTHONIOENCODING="cp1252")
    assert done.returncode == 0, done.stderr
    assert 'goal: "Räum auf, ? ?"' in done.stdout.decode("cp1252")


OTHER_SYSTEM = """
import os, signal, sys, warnings
for name in ("sched_getaffinity", "fork", "getuid", "geteuid", "getloadavg"):
    delattr(os, name)
for name in ("SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGCHLD", "setitimer", "alarm"):
    delattr(signal, name)
for name in ("fcntl", "pwd", "grp"):
    sys.modules[name] = None
ours = r"(__main__|kalm|model|ground|rollout|rl|env|(experiment|data|worlds)\\..*)$"
warnings.filterwarnings("error", category=EncodingWarning, module=ours)
"""


def test_a_run_needs_nothing_that_macos_or_windows_lacks(tmp_path):
    """No home to write to, an encoding of files other than UTF-8, no calls of Linux alone."""
    goals = write_goals(tmp_path / "mine.jsonl", [{"text": "Grün zu 请.", "level": "hard"}])
    variables = {
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "LC_ALL": "C",
        "HOME": "/dev/null/x",
    }
    arguments = (*SMOKE, tmp_path / "run", "--goals", goals, "--methods", "bc+kalm,llm")
    done = kalm_as(OTHER_SYSTEM, *arguments, options=("-X", "warn_default_encoding"), **variables)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Grün zu 请." in page
    assert set(results_of(tmp_path / "run")["success"]) == {"bc+kalm", "llm"}
