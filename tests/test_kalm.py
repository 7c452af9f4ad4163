"""The command: a whole run, resuming, users' goals, several processes."""
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import run_kalm

import kalm
from env import LEVELS, NOVEL_LEVELS

SMOKE = ("--scale", "smoke", "--output_dir")
MY_GOALS = [
    {"text": "Nudge <script>red</script> & \"co\" leftward.", "level": "easy", "kind": "step", "relations": [["red", None, "left"]]},
    {"text": "Green next to purple, {please}.", "level": "rephrase", "kind": "relation", "relations": [["green", "purple", "right"]]},
    {"text": "A tidy row.", "level": "hard", "kind": "line", "relations": []}]


def write_goals(path, goals=MY_GOALS):
    path.write_text("".join(json.dumps(g) + "\n" for g in goals))
    return str(path)


def files_of(folder):
    """Every file below a folder with its content and time of writing."""
    return {p.relative_to(folder): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def results_of(run):
    return json.loads((run / "results.json").read_text())


def assert_complete(results, levels=LEVELS):
    assert set(results) == {"success", "quality", "grounding", "time_s", "config"}
    assert set(results["success"]) == {"bc", "bc+relabel", "bc+kalm", "cql", "cql+relabel", "cql+kalm", "llm"}
    for method, row in results["success"].items():
        assert set(row) == set(levels)
        for cell in row.values():
            assert set(cell) == {"mean", "std", "seeds", "episodes"} and len(cell["seeds"]) == (1 if method == "llm" else 2)
            assert all(0 <= rate <= 1 for rate in cell["seeds"]) and cell["episodes"] == 6 * len(cell["seeds"])
            assert cell["mean"] == pytest.approx(sum(cell["seeds"]) / len(cell["seeds"]))
    for level in set(levels) - {"offline"}:
        figures = results["quality"][level]
        assert all(0 <= figures[rate] <= 1 for rate in ("match", "executed", "off_table", "beyond_dynamics"))
    assert set(results["time_s"]) == {"collect", "ground", "imagine", "learn", "evaluate"}
    assert results["config"]["scale"] == "smoke" and results["config"]["rl_steps"] == 60


# --------------------------------------------------------------------------------------------------------- whole runs

def test_a_smoke_run_fills_every_method_and_level(smoke_run):
    assert_complete(results_of(smoke_run))
    assert {p.name for p in (smoke_run / "rollouts").iterdir()} == {"real", *NOVEL_LEVELS}
    assert not list(smoke_run.rglob("*.partial")) and not list(smoke_run.rglob("*.pkl")) and not list(smoke_run.rglob("*.bin"))


def test_the_report_is_one_page_that_fetches_nothing(smoke_run):
    page = (smoke_run / "report.html").read_text()
    fetched = re.findall(r"""(?:src|href|action|data)\s*=\s*["']?([^"'\s>]+)|url\(([^)]+)\)|@import\s+(\S+)""", page)
    targets = [next(filter(None, groups)).strip("'\"") for groups in fetched]
    assert targets and all(t.startswith(("data:image/", "#")) for t in targets)
    assert "<script" not in page and "<link" not in page and page.count("data:image/gif;base64,") >= 2
    assert all(method in page for method in results_of(smoke_run)["success"]) and page.count("<svg") == 6


def test_the_same_seed_gives_the_same_results(smoke_run, tmp_path):
    assert kalm.main([*SMOKE, str(tmp_path / "again")]) == 0
    ours, theirs = results_of(tmp_path / "again"), results_of(smoke_run)
    assert ours.pop("time_s") and theirs.pop("time_s") and ours == theirs


def test_users_goals_reach_the_results_and_the_report_escaped(smoke_run, tmp_path):
    run = shutil.copytree(smoke_run, tmp_path / "run")
    assert kalm.main([*SMOKE, str(run), "--goals", write_goals(tmp_path / "mine.jsonl"), "--keep", "all"]) == 0
    assert_complete(results_of(run))
    for goal in MY_GOALS:
        read = kalm.rollout.read_rollouts(run / "rollouts" / goal["level"])
        assert len(read) == 4 and {r["goal"] for r in read} == {goal["text"]}
    page = (run / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;red" in page and "{please}" in page


def test_users_goals_may_leave_out_levels(smoke_run, tmp_path):
    run = shutil.copytree(smoke_run, tmp_path / "run")
    assert kalm.main([*SMOKE, str(run), "--goals", write_goals(tmp_path / "mine.jsonl", MY_GOALS[:1]), "--keep", "all"]) == 0
    assert_complete(results_of(run), ("offline", "easy"))


def test_two_processes_share_the_work_and_give_complete_results(smoke_run, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = run_kalm(*SMOKE, tmp_path / "run", "--stage", "all", launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert_complete(results_of(tmp_path / "run"))
    assert (tmp_path / "run" / "report.html").is_file() and not list(tmp_path.rglob("*.partial"))
    for level in NOVEL_LEVELS:  # each goal and start is imagined once, in the order of a single process
        both, one = (kalm.rollout.read_rollouts(run / "rollouts" / level) for run in (tmp_path / "run", smoke_run))
        first = 12  # later rounds follow the matches, and those the sampled actions
        assert [(r["goal"], *r["observations"][0]) for r in both[:first]] == [(r["goal"], *r["observations"][0]) for r in one[:first]]
        for records in (both, one):
            assert len(records) == first + sum(not r["success"] for r in records[:first])


# ------------------------------------------------------------------------------------------------------------- resume

@pytest.mark.parametrize("arguments, redone", [
    ([], []),
    (["--stage", "learn", "report"], []),
    (["--rl_steps", "61"], ["learn", "evaluate", "report"]),
    (["--keep", "matched"], ["learn", "evaluate", "report"]),
    (["--episodes", "7"], ["evaluate", "report"]),
    (["--temperatures", "0.5"], ["imagine", "learn", "evaluate", "report"]),
    (["--split", "validation"], ["imagine", "learn", "evaluate", "report"]),
    (["--ground_steps", "9"], ["ground", "imagine", "learn", "evaluate", "report"]),
    (["--train_goals", "41"], list(kalm.STAGES)),
    (["--seed", "1"], list(kalm.STAGES)),
    (["--force"], list(kalm.STAGES)),
    (["--stage", "imagine", "--force"], ["imagine"])])
def test_a_second_run_redoes_what_a_changed_option_touches_and_no_more(smoke_run, tmp_path, stages_run, arguments, redone):
    run = shutil.copytree(smoke_run, tmp_path / "run")
    before = files_of(run)
    assert kalm.main([*SMOKE, str(run), *arguments]) == 0
    assert stages_run == redone
    assert redone or files_of(run) == before


def test_a_changed_goals_file_is_noticed(smoke_run, tmp_path, stages_run):
    run = shutil.copytree(smoke_run, tmp_path / "run")
    after = ["imagine", "learn", "evaluate", "report"]
    for goals, redone in ((MY_GOALS, after), (MY_GOALS, []), (MY_GOALS[:2], after)):
        stages_run.clear()
        assert kalm.main([*SMOKE, str(run), "--goals", write_goals(tmp_path / "mine.jsonl", goals)]) == 0
        assert stages_run == redone


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, stages_run, monkeypatch):
    def broken(options, state):
        raise RuntimeError("the lights went out")
    with monkeypatch.context() as patch:
        patch.setitem(kalm.RUN_STAGE, "imagine", broken)
        with pytest.raises(RuntimeError):
            kalm.main([*SMOKE, str(tmp_path / "run")])
    (tmp_path / "run" / "results.json").write_text("{}")  # what the noted, not run, stage would write
    assert kalm.main([*SMOKE, str(tmp_path / "run")]) == 0
    assert stages_run == list(kalm.STAGES)


@pytest.mark.parametrize("first, second", [
    (["imagine", "--novel_goals", "5"], ["learn", "--keep", "all"]),
    (["imagine", "--split", "validation"], ["learn", "--keep", "all"]),
    (["imagine", "learn", "--novel_goals", "5", "--keep", "all"], ["evaluate", "--keep", "all"]),
    (["learn", "--seeds", "1"], ["evaluate", "--episodes", "5"])], ids=("goals", "split", "evaluated goals", "seeds"))
def test_a_stage_whose_input_was_made_with_other_options_says_so(smoke_run, tmp_path, capsys, first, second):
    run = shutil.copytree(smoke_run, tmp_path / "run")
    assert kalm.main([*SMOKE, str(run), "--stage", *first]) == 0
    capsys.readouterr()
    assert kalm.main([*SMOKE, str(run), "--stage", *second]) == 2
    assert first[0] in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ adapter

def test_a_run_grounds_with_the_adapter_of_another(tmp_path):
    trained, served = tmp_path / "trained", tmp_path / "served"
    assert kalm.main([*SMOKE, str(trained), "--stage", "collect", "ground", "--lora_rank", "2"]) == 0
    adapter = str(trained / "grounded" / "adapter")
    assert kalm.main([*SMOKE, str(served), "--stage", "collect", "ground", "--adapter", adapter]) == 0
    models = [kalm.KalmForRollouts.from_pretrained(run / "grounded") for run in (trained, served)]
    for (name, ours), theirs in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2 ** -8, atol=1e-6, msg=name)
    metrics = [json.loads((run / "grounded" / "metrics.json").read_text()) for run in (trained, served)]
    assert metrics[0] == metrics[1] and metrics[0]["log"]
    assert kalm.main([*SMOKE, str(served), "--stage", "imagine", "--adapter", adapter]) == 0
    assert kalm.main([*SMOKE, str(trained), "--adapter", adapter]) == 2  # ground would delete what it reads
    assert kalm.main([*SMOKE, str(served), "--stage", "ground", "--adapter", adapter, "--adapter_steps", "3"]) == 0
    log = json.loads((served / "grounded" / "adapter" / "metrics.json").read_text())["log"]
    assert log[:-3] == metrics[0]["log"] and [entry["step"] for entry in log] == list(range(1, 12))
    further = kalm.KalmForRollouts.from_pretrained(served / "grounded").state_dict()
    moved = {name for name, weight in models[1].state_dict().items() if not torch.equal(weight, further[name])}
    assert moved and moved <= set(models[1].new_parameters())


def test_the_cpu_scale_takes_the_released_adapter_unless_ground_is_named_or_chosen(monkeypatch, tmp_path):
    def adapter_of(*arguments):
        options = kalm.parse_options(["--scale", "cpu", "--output_dir", str(tmp_path), *arguments])
        kalm.check_run_folder(options)
        return options.adapter
    assert adapter_of() == adapter_of("--stage", "all", "--keep", "all") == "released"
    assert adapter_of("--stage", "collect", "ground") == adapter_of("--ground_steps", "9") == adapter_of("--llm", "tiny") == ""
    assert adapter_of("--adapter", "mine", "--adapter_steps", "5") == "mine"
    assert adapter_of("--adapter_steps", "5") == adapter_of("--report_to", "none") == "released"
    assert adapter_of("--data", str(tmp_path)) == ""  # the LLM is grounded in the user's rollouts
    trained = {"options": kalm.stage_options("ground", kalm.parse_options(["--scale", "cpu", "--stage", "ground"]))}
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "kalm-run", "stages": {
        "collect": {"options": {}}, "ground": trained}}))
    assert adapter_of("--stage", "imagine") == ""
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert adapter_of("--adapter", "mine") == str(tmp_path / "mine")  # as --stage act finds it in config.yaml


# -------------------------------------------------------------------------------------------------- rounds of imagining

@pytest.mark.parametrize("level, candidates", [("hard", 3), ("easy", 9)])
def test_later_rounds_imagine_from_the_starts_without_a_match(monkeypatch, tmp_path, level, candidates):
    goals, asked = kalm.env.sample_goals(level, "test", 5, np.random.default_rng(0)), []

    def imagine_some(model, tokenizer, wanted, starts, **options):
        asked.append((options["temperature"], set(np.atleast_1d(options["candidates"])), [(g, s.tobytes()) for g, s in zip(wanted, starts, strict=True)]))
        return [{"success": i % 3 == len(asked) - 1 or len(asked) == 3, "goal": g} for i, g in enumerate(wanted)]
    monkeypatch.setattr(kalm.rollout, "generate_all", imagine_some)
    options = kalm.parse_options(["--scale", "smoke", "--starts_per_goal", "4", "--step_starts", "4", "--step_candidates", "9",
                                  "--self_check", "0", "--visited_share", "0.5", "--temperatures", "1,2,3,4"])
    visited = kalm.env.observe(kalm.env.initial_states(np.random.default_rng(1), 7))
    rounds = kalm.imagine_level(options, kalm.PartialState(), None, None, level, goals, visited, 0, tmp_path)
    assert [len(made) for made in rounds] == [20, 13, 9]
    assert [(t, tried) for t, tried, _ in asked] == [(1, {1}), (2, {candidates}), (3, {candidates})]
    starts = [pairs for _, _, pairs in asked]
    assert [g for g, _ in starts[0]] == [goal for goal in goals for _ in range(4)] and len(set(starts[0])) >= 15
    for number, (before, after) in enumerate(zip(starts, starts[1:])):
        assert after == [pair for i, pair in enumerate(before) if i % 3 != number]
    elsewhere = sum(start in {v.tobytes() for v in visited} for _, start in starts[0])
    assert 4 <= elsewhere <= 16


# -------------------------------------------------------------------------------------------------- other options

def test_chosen_methods_filters_and_fresh_weights_run_through_every_stage(monkeypatch, tmp_path):
    monkeypatch.setattr(kalm.rollout, "explain", lambda model, tokenizer, records, *_: [
        r["goal"] if number % 4 else "Nothing happened." for number, r in enumerate(records)])
    options = ("--methods", "cql+both,bc,llm", "--keep", "explained", "--kept_per_goal", "1", "--dynamics_tolerance", "0.5",
               "--balance_goals", "0", "--visited_share", "1", "--fresh_layers", "1", "--random_weights", "1", "--temperatures", "1")
    assert kalm.main([*SMOKE, str(tmp_path / "run"), *options]) == 0
    success = results_of(tmp_path / "run")["success"]
    assert list(success) == ["cql+both", "bc", "llm"] and set(success["bc"]) == set(LEVELS)
    found = kalm.imagined_rollouts(kalm.parse_options([*SMOKE, str(tmp_path / "run"), *options]))
    for records, kept in found.values():
        fitting = [r["goal"] for r in records if not kalm.env.contradicts(r["goal"], r["explanation"])]
        assert len(records) == 12 and len(fitting) > len(set(fitting)) and sorted(r["goal"] for r in kept) == sorted(set(fitting))


def test_lora_and_another_split_run_through_every_stage(monkeypatch, tmp_path):
    asked, train = [], kalm.ground.train
    monkeypatch.setattr(kalm.ground, "train", lambda *args, tasks, **kwargs: asked.append(tasks) or train(*args, tasks=tasks, **kwargs))
    options = ("--lora_rank", "2", "--split", "validation", "--keep", "all", "--temperatures", "0", "--seed", "5",
               "--train_goals", "12", "--tasks", "generation,description")
    assert kalm.main([*SMOKE, str(tmp_path / "run"), *options]) == 0
    assert asked == [["generation", "description"]]
    assert_complete(results_of(tmp_path / "run"))
    model = kalm.KalmForRollouts.from_pretrained(tmp_path / "run" / "grounded")
    assert any(".lora_" in name and torch.isfinite(p).all() for name, p in model.named_parameters())
