"""Using it: a goal typed by hand, goals without a judge, config files, dry runs, help, logs, the model card."""
import json
import re
import shutil
import subprocess
import sys

import accelerate
import numpy as np
import pytest
import torch
import transformers
import yaml
from conftest import ROOT
from huggingface_hub import ModelCard
from PIL import Image
from test_kalm import SMOKE, files_of, results_of, write_goals
from transformers.utils import hub

import env
import kalm
import rl
import rollout
from data import account, llm, logs, sentences
from env import Goal

UNJUDGED = [{"text": "Make a home for the red ball.", "level": "hard"}, {"text": "Surprise me.", "level": "easy"}]


def kalm_from(folder, *arguments):
    """`python /path/to/kalm.py ...` in a process of its own, from another folder."""
    command = [sys.executable, str(ROOT / "kalm.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def run(smoke_run, tmp_path):
    """A copy of the finished smoke run, to change."""
    return shutil.copytree(smoke_run, tmp_path / "run")


# ------------------------------------------------------------------------------------------------ goals without a judge

def test_a_goal_without_a_judge_never_succeeds_and_earns_nothing():
    goal = Goal("Surprise me.", "hard", "unknown")
    rng = np.random.default_rng(0)
    obs, nexts = rng.normal(size=(2, 50, 10)) / 3
    for imagined in (True, False):
        assert not env.success(goal, obs, nexts, rng.integers(40, size=50), imagined).any()
        assert (env.reward(goal, obs, nexts, rng.integers(40, size=50), imagined) == 0).all()
    mixed = [goal, Goal("x", "easy", "step", ((0, None, 3),))] * 25  # beside others it stays so
    assert (env.success(mixed, obs, nexts, np.zeros(50, int)) == [False, True] * 25).all()


def test_lines_without_kind_and_relations_are_goals_without_a_judge(tmp_path):
    path = write_goals(tmp_path / "mine.jsonl", UNJUDGED)
    goals = env.read_goals(path)
    assert [(g.text, g.level, g.kind, g.relations) for g in goals] == [(u["text"], u["level"], "unknown", ()) for u in UNJUDGED]
    assert [Goal.from_json(g.to_json()) for g in goals] == goals


def test_quality_counts_matches_among_judged_goals_only(rollouts):
    judged = [dict(r, explanation=r["goal"], dynamics_error=np.zeros(1)) for r in rollouts[:3]]
    unjudged = [dict(r, goal="Red.", kind="unknown", relations=[], success=False, explanation="Blue.") for r in judged]
    both, alone = rollout.quality(judged + unjudged), rollout.quality(unjudged)
    assert both["match"] == rollout.quality(judged)["match"] == 1 and both["rollouts"] == 6 and both["explained"] == 3 / 6
    assert not {"match", "executed", "executed_of_matched", "match_of_explained"} & set(alone) and alone["explained"] == 0


@pytest.mark.parametrize("keep", ("matched", "both", "all", "explained"))
def test_without_a_judge_the_models_own_words_decide_what_is_kept(keep):
    for said, expected in (("The red ball is near the blue ball, behind it.", True), ("The cyan ball is near.", False), ("", False)):
        record = {"goal": "Take red home to blue.", "kind": "unknown", "success": False, "explanation": said}
        assert kalm.is_wanted(record, keep) is expected
    judged = {"goal": "Take red.", "kind": "relation", "success": False, "explanation": "red"}
    assert kalm.is_wanted(judged, keep) is (keep in ("all", "explained"))


def test_goals_without_a_judge_are_imagined_learned_from_and_left_out_of_evaluation(run, tmp_path, monkeypatch):
    def every_other(model, tokenizer, records):
        return ["The red ball." if i % 2 else "" for i in range(len(records))]
    monkeypatch.setattr(rollout, "explain", lambda *arguments: every_other(*arguments[:3]))
    learned, build = set(), rl.Buffer.__init__

    def noted(self, records, *arguments, **options):
        learned.update(r["goal"] for r in records)
        build(self, records, *arguments, **options)
    monkeypatch.setattr(rl.Buffer, "__init__", noted)
    judged = {"text": "Bring green to purple's right.", "level": "hard", "kind": "relation", "relations": [["green", "purple", "right"]]}
    goals = write_goals(tmp_path / "mine.jsonl", [*UNJUDGED, judged])
    options = [*SMOKE, str(run), "--goals", goals, "--self_check", "0", "--keep", "matched", "--methods", "bc,bc+kalm"]
    assert kalm.main(options) == 0
    results = results_of(run)
    assert set(results["success"]["bc+kalm"]) == {"offline", "hard"}  # easy has no judged goal
    assert "match" in results["quality"]["hard"] and "match" not in results["quality"]["easy"]
    found = kalm.imagined_rollouts(kalm.parse_options(options))
    for goal in UNJUDGED:
        records, kept = found[goal["level"]]
        ours = [r for r in records if r["goal"] == goal["text"]]
        assert ours and all(not r["success"] and (r["rewards"] == 0).all() for r in ours)
        mine = [r for r in kept if r["goal"] == goal["text"]]
        assert 0 < len(mine) < len(ours) and all(r["explanation"] == "The red ball." for r in mine)
        assert goal["text"] in learned


# ------------------------------------------------------------------------------------------------------------------ act

@pytest.mark.parametrize("text, relation", [
    ("put the red ball left of the blue one", ("red", "blue", "left")),
    ("Please push green to the right side of the cyan ball!", ("green", "cyan", "right")),
    ("Move the purple  ball in front of RED, please.", ("purple", "red", "front")),
    ("Place cyan behind blue", ("cyan", "blue", "behind")),
    ("Don't put the red ball left of the blue one", None),
    ("I can't stand the red ball in front of the blue ball.", None),
    ("Put the red ball left of the blue one and behind the green one", None),
    ("Put the red ball right behind the blue one", None),
    ("Put the red ball left of the red one", None),
    ("Put the red ball left of the blue one, or rather right of it", None),
    ("Move the red ball to the left", None)])
def test_a_judge_is_read_only_from_a_sentence_that_says_plainly_one_relation(text, relation):
    goal = sentences.goal_of_text(text)
    assert goal.text == text and goal.kind == ("relation" if relation else "unknown")
    assert not relation or goal.to_json()["relations"] == [list(relation)]


def frames_of(path):
    with Image.open(path) as picture:
        return picture.n_frames


def test_act_plays_a_typed_goal_by_policy_and_llm_and_tells_what_happened(run, capsys):
    best = "bc+relabel"
    results = results_of(run)
    for method, row in results["success"].items():
        for cell in row.values():
            cell["mean"] = 0.9 if method == best else 0.95 if method == "llm" else 0.1
    (run / "results.json").write_text(json.dumps(results))
    (run / "unfinished" / "learn-0123").mkdir(parents=True)
    (run / "unfinished" / "learn-0123" / "bc-40").write_text("what a killed stage goes on from")
    before = files_of(run)
    assert kalm.main(["--stage", "act", "--goal", "put the red ball left of the blue one", "--run", str(run), "--seed", "3"]) == 0
    said = capsys.readouterr().out
    assert "judge: red is left of blue (read from the sentence)" in said
    entries = lines_of(run / "logs" / "act.jsonl")
    assert [e["method"] for e in entries] == [best, "llm"]
    start = env.unfulfilled_states(np.random.default_rng([3, 8]), [sentences.goal_of_text(entries[0]["goal"])])
    for entry in entries:
        goal = sentences.goal_of_text(entry["goal"])
        record, = env.run_episodes(rollout.replay([entry["actions"]]), [goal], start, len(entry["actions"]))  # the same start and judge
        assert entry["verdict"] == ("goal met" if record["success"] else "goal missed") and len(entry["actions"]) <= 10
        assert f"{entry['method']}: {entry['verdict']}, {len(entry['actions'])} actions; moved: {account.movements(record)}" in said
        assert entry["explanation"] in said and str(run / "act" / entry["gif"]) in said
        assert entry["seed"] == 3 and entry["gif"].endswith(f"-3-{entry['method']}.gif")
        assert entry["explanation_fits"] is rollout.explanation_fits(entry)
        assert 1 < frames_of(run / "act" / entry["gif"]) <= len(entry["actions"]) + 4
    after = files_of(run)
    assert {p: after[p] for p in before} == before  # act changes nothing that a stage made


def test_movements_name_each_ball_that_moved_with_its_distance_and_way():
    moves = np.array([(-0.2, 0.05), (0.3, 0), (0.01, -0.06), (0, 0.1), (0.03, 0.03)])  # +x is right, +y is back
    told = account.movements({"observations": np.stack([np.zeros(10), moves.ravel()])})
    red, blue, green, purple, cyan = env.COLORS
    assert told == f"{red} 0.21 m left, {blue} 0.30 m right, {green} 0.06 m front, {purple} 0.10 m back"
    assert account.movements({"observations": np.zeros((3, 10))}) == "nothing"


def test_act_without_a_judge_says_so_and_plays_every_action(run, capsys):
    assert kalm.main(["--stage", "act", "--goal", "Räum den Tisch auf, 请", "--run", str(run), "--methods", "bc,cql+kalm,llm"]) == 0
    said, entries = capsys.readouterr().out, lines_of(run / "logs" / "act.jsonl")
    assert "judge: none is known" in said and said.count("not judged") == 3 and "goal met" not in said
    assert [(e["method"], len(e["actions"]), e["verdict"]) for e in entries] == [(m, 10, "not judged") for m in ("bc", "cql+kalm", "llm")]
    assert all((run / "act" / e["gif"]).is_file() for e in entries)


def test_act_judges_a_goal_of_the_runs_own_as_the_run_does(run, tmp_path, capsys, monkeypatch):
    line = {"text": "Everybody in a row!", "level": "hard", "kind": "line", "relations": []}
    goals = write_goals(tmp_path / "mine.jsonl", [line])
    assert kalm.main(["--stage", "act", "--goal", line["text"], "--run", str(run), "--goals", goals]) == 2
    assert "--goals" in capsys.readouterr().err  # imagined with others
    known = kalm.novel_goals(kalm.parse_options([*SMOKE, str(run)]))["hard"][0]
    monkeypatch.setattr(kalm, "load_encoder", lambda *_: pytest.fail("the goal is in the table of the policies already"))
    assert kalm.main(["--stage", "act", "--goal", known.text, "--run", str(run), "--methods", "bc"]) == 0
    assert "(as the goals of the run have it)" in capsys.readouterr().out
    assert lines_of(run / "logs" / "act.jsonl")[-1]["kind"] == known.kind != "unknown"


@pytest.mark.parametrize("arguments, named", [(["--goal", " "], "sentence"), (["--goal", "x", "--methods", "bc+both"], "bc+both")])
def test_act_refuses_what_it_cannot_do_and_writes_nothing(run, capsys, arguments, named):
    before = files_of(run)
    assert kalm.main(["--stage", "act", "--run", str(run), *arguments]) == 2
    err = capsys.readouterr().err
    assert named in err and err.count("\n") == 1 and files_of(run) == before


def test_a_goal_added_to_a_table_is_encoded_as_if_it_had_been_there(tmp_path):
    model, tokenizer = llm.tiny(0)
    texts = [g.text for g in env.sample_goals("offline", "train", 9, np.random.default_rng(0))]
    together = rl.GoalTable.encode(texts, ["Move red left."], model.base_model, tokenizer)
    rl.GoalTable.encode(texts, [], model.base_model, tokenizer).save(tmp_path / "goals.safetensors")
    added = rl.GoalTable.load(tmp_path / "goals.safetensors").with_text("Move red left.", model.base_model, tokenizer)
    assert added.index == together.index
    torch.testing.assert_close(added.table, together.table, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="learn"):
        rl.GoalTable(["a"], torch.zeros(1, 64)).with_text("b", model.base_model, tokenizer)


# --------------------------------------------------------------------------------------------------- config files, plans

def test_the_config_of_a_run_repeats_it_from_another_folder_with_a_difficult_name(smoke_run, tmp_path):
    folder = tmp_path / "mein Läufe 结果"
    folder.mkdir()
    small = ("--methods", "bc+kalm,llm", "--rl_steps", "20", "--train_goals", "30", "--seed", "4")
    goals = {"text": "Schiebe rot nach links.", "level": "easy", "kind": "step", "relations": [["red", None, "left"]]}
    write_goals(folder / "meine ziele.jsonl", [goals])
    first = kalm_from(folder, "--scale", "smoke", "--output_dir", "ein lauf", *small, "--goals", "meine ziele.jsonl")
    assert first.returncode == 0, first.stderr
    second = kalm_from(tmp_path, "--config", folder / "ein lauf" / "config.yaml", "--run", "noch ein läufer")
    assert second.returncode == 0, second.stderr
    ours, theirs = (results_of(run) for run in (folder / "ein lauf", tmp_path / "noch ein läufer"))
    assert ours.pop("time_s") and theirs.pop("time_s") and ours["config"].pop("goals") and theirs["config"].pop("goals")
    assert ours == theirs and ours["config"]["rl_steps"] == 20
    acted = kalm_from(tmp_path, "--stage", "act", "--goal", "Schiebe rot nach links.", "--run", "noch ein läufer")
    assert acted.returncode == 0, acted.stderr
    assert "judge: red goes left" in acted.stdout and len(list((tmp_path / "noch ein läufer" / "act").glob("*.gif"))) == 2


def test_stages_run_one_by_one_leave_one_config_with_all_their_options(run):
    assert kalm.main([*SMOKE, str(run), "--stage", "learn", "--rl_steps", "15", "--seeds", "1"]) == 0
    assert kalm.main([*SMOKE, str(run), "--stage", "evaluate", "--rl_steps", "15", "--seeds", "1", "--episodes", "4"]) == 0
    assert kalm.main([*SMOKE, str(run), "--stage", "imagine", "--force"]) == 0
    found = yaml.safe_load((run / "config.yaml").read_text())
    assert (found["rl_steps"], found["episodes"], found["stage"]) == (15, 4, list(kalm.STAGES))
    options = kalm.parse_options(["--config", str(run / "config.yaml"), "--output_dir", str(run)])
    assert options.rl_steps == 15 and options.stages == list(kalm.STAGES) and options.scale == "smoke"


@pytest.mark.parametrize("name, content", [
    ("mine.yaml", "scale: smoke\nlearning_rate: 1e-5\nmethods: [bc, cql]\nself_check: true\ntemperatures: 2\ngoals:\nepisodes: 7\n"
                  "stage: learn evaluate"),
    ("mine.json", '{\t"scale": "smoke", "learning_rate": 1e-5, "methods": "bc,cql", "self_check": 1, "temperatures": "2", "episodes": 7, '
                  '"stage": ["learn", "evaluate"]}')])
def test_options_come_from_the_command_line_then_the_config_file_then_the_scale(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    options = kalm.parse_options(["--config", str(tmp_path / name), "--episodes", "3"])
    assert (options.episodes, options.learning_rate, options.methods, options.self_check) == (3, 1e-5, "bc,cql", 1)
    assert (options.temperatures, options.goals, options.rl_steps, options.stages) == ("2", "", 60, ["learn", "evaluate"])


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, monkeypatch, capsys, run):
    monkeypatch.setattr(llm, "fetch_default", lambda: pytest.fail("a dry run must not fetch"))
    monkeypatch.setenv("KALM_CACHE", str(tmp_path / "empty"))
    before = files_of(tmp_path)
    assert kalm.main(["--scale", "cpu", "--output_dir", str(tmp_path / "new"), "--dry_run", "--rl_steps", "77"]) == 0
    plan = capsys.readouterr().out
    assert all(re.search(rf"^  {stage} ", plan, re.M) for stage in kalm.STAGES)
    assert kalm.main([*SMOKE, str(run), "--dry_run", "--rl_steps", "77"]) == 0
    plan = capsys.readouterr().out
    assert re.search(r"imagine +done before", plan) and re.search(r"learn .*rl_steps 77", plan)
    assert files_of(tmp_path) == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize("columns", (80, 120, 300))
def test_help_fits_two_screens_and_shows_every_option_with_its_defaults(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as stopped:
        kalm.main(["--help"])
    said = capsys.readouterr().out
    lines, words = said.splitlines(), re.sub(r"\s+", "", said)
    assert stopped.value.code == 0 and len(lines) <= 100 and max(map(len, lines)) <= min(columns, 120)
    for option in kalm.OPTIONS:
        assert f"--{option.name}" in words and re.sub(r"\s+", "", f"({'/'.join(map(str, option.values))})") in words
    titles = [line.split(" ")[0].rstrip(":") for line in lines if re.match(r"\w+ .*:$|\w+:$", line)]
    assert titles == ["the", *kalm.STAGES]


# ----------------------------------------------------------------------------------------------------------------- logs

def test_everything_is_logged_as_json_lines(smoke_run):
    results, folder = results_of(smoke_run), smoke_run / "logs"
    assert [line["stage"] for line in lines_of(folder / "stages.jsonl")] == list(kalm.STAGES)
    metrics = json.loads((smoke_run / "grounded" / "metrics.json").read_text())
    grounding = [line for line in lines_of(folder / "grounding.jsonl") if "loss" in line]
    assert [(line["step"], line["text_loss"]) for line in grounding] == [(e["step"], e["text_loss"]) for e in metrics["log"]]
    curves = json.loads((smoke_run / "policies" / "curves.json").read_text())
    assert set(curves) == set(results["success"]) - {"llm"}
    for method, curve in curves.items():
        assert [[line["step"], line["loss"]] for line in lines_of(folder / f"rl_{method}.jsonl")] == curve
    assert all(line["time"] > 1e9 for path in folder.glob("*.jsonl") for line in lines_of(path))


def test_a_curve_begun_again_starts_anew_and_goes_to_every_tracker(tmp_path, monkeypatch):
    told = []

    class Tracker:
        requires_logging_directory = False

        def __init__(self, project, name, **options):
            told.append((project, name))

        def start(self):
            assert self.main_process_only is False  # each process tells what it learns

        def log(self, values, step):
            told.append((values, step))

        def finish(self):
            told.append("finished")
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "trackio", Tracker)
    for losses in ((3.0, 2.0), (1.5,)):
        curve = logs.Curve(tmp_path, "rl_bc", "trackio")
        for step, loss in enumerate(losses):
            curve.log(step, loss)
        curve.finish()
    assert [(line["step"], line["loss"]) for line in lines_of(tmp_path / "rl_bc.jsonl")] == [(0, 1.5)]
    assert told == [("kalm", "rl_bc"), ({"rl_bc/loss": 3.0}, 0), ({"rl_bc/loss": 2.0}, 1), "finished",
                    ("kalm", "rl_bc"), ({"rl_bc/loss": 1.5}, 0), "finished"]


def test_a_tracker_that_is_not_installed_is_refused_before_anything_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: None)
    assert kalm.main([*SMOKE, str(tmp_path / "run"), "--report_to", "wandb"]) == 2
    assert "pip install wandb" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_wandb_keeps_its_files_in_the_runs_logs(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", "elsewhere")  # and is put back after the test
    monkeypatch.chdir(tmp_path)
    kalm.parse_options([*SMOKE, "mine"])
    assert logs.os.environ["WANDB_DIR"] == str(tmp_path / "mine" / "logs")


def test_tensorboard_shows_grounding_and_offline_rl(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    options = (*SMOKE, str(tmp_path / "run"), "--report_to", "tensorboard", "--methods", "bc,cql+kalm")
    assert kalm.main([*options, "--stage", "collect", "ground", "imagine", "learn"]) == 0
    found = {}
    for path in (tmp_path / "run" / "logs").rglob("events.out.*"):
        events = EventAccumulator(str(path)).Reload()
        found |= {tag: len(events.Scalars(tag)) for tag in events.Tags()["scalars"]}
    assert found["train/loss"] == found["train/action_loss"] == 8 and found["rl_bc/loss"] == found["rl_cql+kalm/loss"] == 60


# ----------------------------------------------------------------------------------------------------- at home elsewhere

def test_the_grounded_folder_loads_with_auto_classes_after_importing_model(smoke_run, tmp_path):
    script = ("import sys; sys.path.insert(0, sys.argv[2])\nimport model\nfrom transformers import AutoConfig, AutoModel, AutoTokenizer\n"
              "m, c, t = (x.from_pretrained(sys.argv[1]) for x in (AutoModel, AutoConfig, AutoTokenizer))\n"
              "print(type(m).__name__, c.model_type, c.num_actions, len(t('red ball')['input_ids']))")
    command = [sys.executable, "-c", script, str(smoke_run / "grounded"), str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["KalmForRollouts", "kalm", "40", "2"], done.stderr


def test_the_model_card_has_front_matter_figures_and_how_to_load(smoke_run, tmp_path):
    card = ModelCard.load(smoke_run / "grounded" / "README.md")
    metrics = json.loads((smoke_run / "grounded" / "metrics.json").read_text())
    assert card.data.license == "apache-2.0" and "kalm" in card.data.tags and card.data.base_model is None
    assert f"| error of a coordinate of the next state (m) | {metrics['state_error']:.3f} |" in card.text
    assert "AutoModel.from_pretrained" in card.text and "import model" in card.text and "146 rollouts" in card.text
    options, config = kalm.parse_options(["--scale", "paper"]), transformers.AutoConfig.from_pretrained(smoke_run / "grounded")
    kalm.card.write(tmp_path, metrics, options, config, (9, 2))
    llama = ModelCard.load(tmp_path / "README.md")
    assert (llama.data.base_model, llama.data.license) == ("meta-llama/Llama-2-7b-chat-hf", "other")
    options = kalm.parse_options(["--scale", "cpu"])
    config.lora_rank = 64
    kalm.card.write(tmp_path, metrics, options, config, (9, 2))
    smollm = ModelCard.load(tmp_path / "README.md")
    assert (smollm.data.base_model, smollm.data.license) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    assert "2 layers of it" in llama.text and "LoRA of rank 64" in smollm.text and "adapter `released`" in smollm.text


def test_push_to_hub_uploads_weights_and_configuration_that_load_again(smoke_run, tmp_path, monkeypatch):
    model, uploaded = kalm.KalmForRollouts.from_pretrained(smoke_run / "grounded"), {}

    class Api:
        def create_repo(self, repo_id, **options):
            return type("Repo", (), {"repo_id": f"me/{repo_id}"})
    monkeypatch.setattr(hub, "hf_api", Api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: ModelCard("---\ntags: [kalm]\n---\n"))
    monkeypatch.setattr(type(model), "_upload_modified_files", lambda self, folder, repo, **options: uploaded.update(
        repo=repo, folder=shutil.copytree(folder, tmp_path / "hub")))
    model.push_to_hub("grounded")
    again = transformers.AutoModel.from_pretrained(uploaded["folder"])
    assert uploaded["repo"] == "me/grounded"
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
