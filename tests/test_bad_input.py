"""Bad input: each case gives one sentence that says what, where and what to do, exit code 2, no traceback, and nothing is written.

Lines of a goals file and rows of a dataset have their own tables, in test_env.py and test_rollout.py.
"""
import json
import os
import shutil

import datasets
import pytest
from conftest import run_kalm
from test_kalm import MY_GOALS, files_of
from test_rollout import plain_rows

import kalm
from data import llm

SMOKE = ("--scale", "smoke", "--output_dir")
BROKEN = json.dumps(MY_GOALS[0]) + '\n{"text": \n'
BAD_OPTIONS = {  # arguments, the content of mine.jsonl, what the message names
    "unknown stage": (["--stage", "dream"], "", "dream"),
    "unknown scale": (["--scale", "huge"], "", "huge"),
    "unknown LLM": (["--llm", "nosuchmodel"], "", "nosuchmodel"),
    "unknown encoder": (["--encoder", "nosuchmodel"], "", "nosuchmodel"),
    "too many layers": (["--llm", "LLM", "--keep_layers", "3"], "", "2 layers"),
    "too many encoder layers": (["--llm", "LLM", "--encoder_layers", "3"], "", "2 layers"),
    "unknown split": (["--split", "train"], "", "train"),
    "unknown keep": (["--keep", "best"], "", "best"),
    "missing goals file": (["--goals", "absent.jsonl"], "", "absent.jsonl"),
    "broken goals file": (["--goals", "mine.jsonl"], BROKEN, "mine.jsonl, line 2"),
    "unknown level": (["--goals", "mine.jsonl"], json.dumps({**MY_GOALS[0], "level": "heroic"}), "heroic"),
    "training level": (["--goals", "mine.jsonl"], json.dumps({**MY_GOALS[0], "level": "offline"}), "offline"),
    "unknown colour": (["--goals", "mine.jsonl"], json.dumps({**MY_GOALS[0], "relations": [["mauve", None, "left"]]}), "mauve"),
    "goals not UTF-8": (["--goals", "mine.jsonl"], b'{"text": "caf\xe9"}', "mine.jsonl"),
    "missing input": (["--stage", "learn"], "", "--stage collect"),
    "missing input of a later stage": (["--stage", "collect", "ground", "learn"], "", "--stage imagine"),
    "no run folder": (["--output_dir", "photos"], "", "photos"),
    "foreign manifest": (["--output_dir", "foreign"], "", "manifest.json"),
    "output is a file": (["--output_dir", "mine.jsonl"], "", "mine.jsonl"),
    "negative size": (["--train_goals", "-3"], "", "--train_goals"),
    "no episodes": (["--episodes", "0"], "", "--episodes"),
    "negative rate": (["--rl_learning_rate", "-0.1"], "", "--rl_learning_rate"),
    "rate no number": (["--learning_rate", "nan"], "", "--learning_rate"),
    "too little of a batch": (["--imaginary_share", "0.05"], "", "--rl_batch times --imaginary_share is 2 of a batch, for 3 sources"),
    "all imaginary": (["--imaginary_share", "1"], "", "--imaginary_share"),
    "training on no adapter": (["--adapter_steps", "5"], "", "--adapter released"),
    "no adapter": (["--adapter", "photos"], "", "photos has no adapter_model.safetensors"),
    "fresh layers below an adapter": (["--fresh_layers", "1", "--lora_rank", "2"], "", "--lora_rank 0"),
    "random weights below an adapter": (["--random_weights", "1", "--adapter", "photos"], "", "no --adapter"),
    "too many fresh layers": (["--llm", "LLM", "--fresh_layers", "3"], "", "2 layers"),
    "more fresh than kept": (["--llm", "LLM", "--keep_layers", "1", "--fresh_layers", "2"], "", "1 layers that are kept"),
    "half a switch": (["--self_check", "2"], "", "--self_check is 0 or 1"),
    "more than all visited": (["--visited_share", "1.5"], "", "--visited_share"),
    "filter without check": (["--keep", "explained", "--self_check", "0"], "", "--self_check 1"),
    "unknown method": (["--methods", "bc,sac"], "", "sac"),
    "a method twice": (["--methods", "bc,bc"], "", "--methods"),
    "unknown task": (["--tasks", "dynamics,sleep"], "", "sleep"),
    "temperatures no numbers": (["--temperatures", "1;2"], "", "--temperatures"),
    "no candidates": (["--step_candidates", "0"], "", "--step_candidates"),
    "more candidates than actions": (["--candidates", "41"], "", "--candidates"),
    "negative temperature": (["--temperatures", "1,-1"], "", "--temperatures"),
    "negative seed": (["--seed", "-1"], "", "--seed"),
    "negative seed with goals": (["--seed", "-1", "--goals", "mine.jsonl"], json.dumps(MY_GOALS[0]), "--seed"),
    "unknown option": (["--nosuch", "3"], "", "unknown option --nosuch"),
    "abbreviated option": (["--episode", "3"], "", "--episode: did you mean --episodes?"),
    "an option with hyphens": (["--ground-steps=3000000000000000"], "", "did you mean --ground_steps?"),
    "word for a number": (["--episodes", "many"], "", "--episodes: invalid int value: 'many'"),
    "act without a goal": (["--stage", "act"], "", "--goal"),
    "a goal without act": (["--goal", "Push red."], "", "--stage act"),
    "act without a run": (["--stage", "act", "--goal", "Push red."], "", "--stage ground"),
    "unknown tracker": (["--report_to", "pigeon"], "", "pigeon"),
    "missing config": (["--config", "absent.yaml"], "", "absent.yaml"),
    "broken config": (["--config", "mine.jsonl"], "seed: 1\nscale: [", "mine.jsonl, line 2"),
    "config is a list": (["--config", "mine.jsonl"], "- seed", "mine.jsonl"),
    "nearly a config key": (["--config", "mine.jsonl"], "rl_step: 3", "'rl_step': did you mean rl_steps?"),
    "config value no number": (["--config", "mine.jsonl"], "episodes: many", "episodes takes a whole number, got 'many'"),
    "config value half a step": (["--config", "mine.jsonl"], "rl_steps: 60.5", "rl_steps"),
    "fraction for a number": (["--seeds", "1.5"], "", "--seeds: invalid int value"),
    "word for a rate": (["--learning_rate", "fast"], "", "--learning_rate: invalid float value"),
    "no stage": (["--stage"], "", "--stage: expected at least one argument"),
    "no value": (["--output_dir"], "", "expected one argument"),
    "a word too many": (["smoke"], "", "smoke"),
    "infinite rate": (["--rl_learning_rate", "inf"], "", "--rl_learning_rate"),
    "share no number": (["--imaginary_share", "nan"], "", "--imaginary_share"),
    "no seeds": (["--seeds", "0"], "", "--seeds"),
    "no steps": (["--rl_steps", "0"], "", "--rl_steps"),
    "negative layers": (["--keep_layers", "-1"], "", "--keep_layers"),
    "negative minutes": (["--checkpoint_minutes", "-1"], "", "--checkpoint_minutes"),
    "minutes no number": (["--checkpoint_minutes", "nan"], "", "--checkpoint_minutes"),
    "infinite temperature": (["--temperatures", "inf"], "", "--temperatures"),
    "no temperature": (["--temperatures", ""], "", "--temperatures"),
    "no methods": (["--methods", ""], "", "--methods"),
    "a stage twice wrong": (["--stage", "collect", "colect"], "", "colect"),
    "goals file is a folder": (["--goals", "photos"], "", "photos"),
    "empty goals file": (["--goals", "mine.jsonl"], "", "mine.jsonl: no goals"),
    "goals file of one array": (["--goals", "mine.jsonl"], json.dumps(MY_GOALS), "mine.jsonl, line 1: a goal is a JSON object"),
    "goals with a number as text": (["--goals", "mine.jsonl"], json.dumps({**MY_GOALS[0], "text": 5}), "mine.jsonl, line 1"),
    "goals with nested JSON bombs": (["--goals", "mine.jsonl"], "[" * 100_000, "mine.jsonl, line 1"),
    "goals with a null byte": (["--goals", "mine.jsonl"], b"\0\0\0", "mine.jsonl, line 1"),
    "folder without config as LLM": (["--llm", "photos"], "", "photos: this folder has no config.json"),
    "LLM of unknown architecture": (["--llm", "odd_type"], "", "odd_type: its config.json"),
    "LLM with broken config": (["--llm", "odd_json"], "", "odd_json: its config.json"),
    "LLM without weights": (["--llm", "odd_weights"], "", "odd_weights: this folder has no *.safetensors"),
    "LLM with code of its own": (["--llm", "odd_code"], "", "odd_code: its config.json"),
    "output folder without manifest, unicode": (["--output_dir", "фото и so weiter"], "", "фото и so weiter"),
    "manifest no JSON": (["--output_dir", "manifest_cut"], "", "manifest.json is not a manifest"),
    "manifest not UTF-8": (["--output_dir", "manifest_bytes"], "", "manifest.json is not a manifest"),
    "manifest of odd stages": (["--output_dir", "manifest_stages"], "", "manifest.json is not a manifest"),
}
CONFIGS = {"odd_type": '{"model_type": "nosuchmodel"}', "odd_json": '{"model_type": ', "odd_weights": '{"model_type": "llama"}',
           "odd_code": '{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}'}
MANIFESTS = {"foreign": b"{}", "manifest_cut": b'{"format": "kalm-run", "sta', "manifest_bytes": b"\xff\xfe\x00",
             "manifest_stages": b'{"format": "kalm-run", "stages": {"collect": 3}}'}


def one_sentence(capsys, named):
    err = capsys.readouterr().err.strip()
    assert err.startswith("kalm: ") and named in err and "\n" not in err, err


@pytest.mark.parametrize("arguments, goals, named", BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_a_bad_command_line_goals_file_or_folder_is_refused(tmp_path, monkeypatch, capsys, stages_run, arguments, goals, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "mine.jsonl").write_bytes(goals if isinstance(goals, bytes) else goals.encode())
    for folder in {*arguments} & {"photos", "фото и so weiter", *CONFIGS, *MANIFESTS}:
        os.mkdir(folder)
        (tmp_path / folder / "cat.txt").write_text("a cat")
        if folder in CONFIGS:
            (tmp_path / folder / "config.json").write_text(CONFIGS[folder])
            (tmp_path / folder / "mine.py").write_text("open('was_run', 'w')\nclass Config: pass\n")
        if folder in MANIFESTS:
            (tmp_path / folder / "manifest.json").write_bytes(MANIFESTS[folder])
    if "LLM" in arguments:
        for part in llm.tiny(0):
            part.save_pretrained("LLM")
    before = files_of(tmp_path)
    assert kalm.main(["--scale", "smoke", "--output_dir", "run", *arguments]) == 2
    one_sentence(capsys, named)
    assert files_of(tmp_path) == before and not (tmp_path / "run").exists() and stages_run == []


# ------------------------------------------------------------------------------------------------- files of other stages

def forget_checksums(run):
    """As if whoever changed the files of a run had also forged its manifest."""
    manifest = json.loads((run / "manifest.json").read_text())
    for stage in manifest["stages"].values():
        del stage["files"]
    (run / "manifest.json").write_text(json.dumps(manifest))


def rows_with(**columns):
    def change(run):
        rows = plain_rows(kalm.rollout.read_rollouts(run / "rollouts" / "real"))
        for name, value in columns.items():
            rows[3][name] = value(rows[3])
        save(run, datasets.Dataset.from_list(rows))
    return change


def save(run, data):
    shutil.rmtree(run / "rollouts" / "real")
    data.save_to_disk(str(run / "rollouts" / "real"))


def few_rows(run):
    save(run, datasets.Dataset.from_list(plain_rows(kalm.rollout.read_rollouts(run / "rollouts" / "real"))[:1]))


def no_rows(run):
    save(run, datasets.Dataset.from_list(plain_rows(kalm.rollout.read_rollouts(run / "rollouts" / "real"))).select([]))


def many_rows_of_zero_length(run):
    n = 1_000_000
    texts = {k: [v] * n for k, v in (("goal", "Red behind blue."), ("level", "offline"), ("kind", "relation"))}
    lists = {k: [[]] * n for k in ("relations", "observations", "actions", "rewards")}
    save(run, datasets.Dataset.from_dict({**texts, **lists, "success": [True] * n}))


def words_as_numbers(run):
    rows = plain_rows(kalm.rollout.read_rollouts(run / "rollouts" / "real"))
    save(run, datasets.Dataset.from_list([{**r, "rewards": ["a lot"] * len(r["rewards"])} for r in rows]))


def no_column(run):
    rows = plain_rows(kalm.rollout.read_rollouts(run / "rollouts" / "real"))
    save(run, datasets.Dataset.from_list([{k: v for k, v in r.items() if k != "actions"} for r in rows]))


def config_with(name, **changes):
    def change(run):
        path = run / "grounded" / name
        config = json.loads(path.read_text())
        config.update({k: {**config[k], **v} if isinstance(v, dict) else v for k, v in changes.items()})
        path.write_text(json.dumps(config))
    return change


def other_actions(run):
    model, _ = llm.load_grounded(run / "grounded")
    other = type(model)(type(model.config)(backbone_config=model.config.backbone_config, num_actions=41))
    other.save_pretrained(run / "grounded")


def without(name):
    return lambda run: (run / name).unlink()


def cut(name):
    return lambda run: (run / name).write_bytes((run / name).read_bytes()[:-50])


BAD_FILES = {  # what happens to a finished run, the stage that is redone, what the message names
    "one row": (few_rows, "ground", "has 1 rollouts, and 2 are held out"),
    "no rows": (no_rows, "ground", "real is not a rollouts dataset"),
    "a million rows of zero length": (many_rows_of_zero_length, "ground", "real, row 0: a rollout needs at least one action"),
    "no dataset": (lambda run: shutil.rmtree(run / "rollouts" / "real"), "ground", "real is not a rollouts dataset"),
    "missing column": (no_column, "ground", "real: column 'actions' is missing"),
    "words as numbers": (words_as_numbers, "ground", "real, row 0"),
    "action out of range": (rows_with(actions=lambda r: [99] * len(r["actions"])), "ground", "real, row 3: actions must be in 0..39, got 99"),
    "NaN": (rows_with(rewards=lambda r: [float("nan")] * len(r["rewards"])), "ground", "real, row 3: rewards has NaN"),
    "wrong shape": (rows_with(observations=lambda r: r["observations"][:-1]), "ground", "real, row 3: observations must have shape"),
    "dataset cut off": (cut("rollouts/real/data-00000-of-00001.arrow"), "ground", "rollouts/real"),
    "state.json cut off": (cut("rollouts/real/state.json"), "ground", "real is not a rollouts dataset"),
    "no weights": (without("grounded/model.safetensors"), "imagine", "grounded is not a grounded model"),
    "no config": (without("grounded/config.json"), "imagine", "grounded is not a grounded model"),
    "no tokenizer": (without("grounded/tokenizer.json"), "imagine", "grounded is not a grounded model"),
    "weights cut off": (cut("grounded/model.safetensors"), "imagine", "grounded is not a grounded model"),
    "other architecture": (config_with("config.json", backbone_config={"model_type": "gpt2"}), "imagine", "grounded is not a grounded model"),
    "other hidden size": (config_with("config.json", backbone_config={"hidden_size": 32}), "imagine", "grounded is not a grounded model"),
    "other action count, weights as before": (config_with("config.json", num_actions=41), "imagine", "grounded is not a grounded model"),
    "other action count": (other_actions, "imagine", "num_actions 41, and the environment has 40"),
}


@pytest.mark.parametrize("damage, stage, named", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_refused_by_the_stage_that_reads_them_even_under_a_forged_manifest(smoke_run, tmp_path, capsys, damage, stage, named):
    run = shutil.copytree(smoke_run, tmp_path / "run")
    damage(run)
    forget_checksums(run)
    before = files_of(run)
    capsys.readouterr()
    assert kalm.main([*SMOKE, str(run), "--stage", stage, "--force"]) == 2
    said = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("kalm: ")]
    assert len(said) == 1 and named in said[0], said
    assert {k: v for k, v in files_of(run).items() if k.parts[0] != "unfinished"} == before


# --------------------------------------------------------------------------------------------------- the world around it

def test_a_cache_that_is_a_file_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setenv("KALM_CACHE", str(tmp_path / "cache"))
    assert kalm.main([*SMOKE, str(tmp_path / "run"), "--llm", "smollm2"]) == 2
    one_sentence(capsys, f"KALM_CACHE {tmp_path / 'cache'} is a file")
    assert not (tmp_path / "run").exists()


def test_a_model_folder_never_runs_its_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in llm.tiny(0):
        part.save_pretrained("LLM")
    config = json.loads((tmp_path / "LLM" / "config.json").read_text())
    config["auto_map"] = {name: f"mine.{name}" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoModel", "AutoTokenizer")}
    (tmp_path / "LLM" / "config.json").write_text(json.dumps(config))
    (tmp_path / "LLM" / "mine.py").write_text("open('was_run', 'w')\n")
    assert kalm.main([*SMOKE, "run", "--llm", "LLM", "--stage", "collect", "ground", "imagine"]) == 0  # by transformers' own Llama
    assert not (tmp_path / "was_run").exists()


def test_a_plain_locale_and_a_folder_with_spaces_and_unicode_are_no_obstacle(tmp_path, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    done = run_kalm(*SMOKE, tmp_path / "mein Lauf, 走行 №1", "--methods", "bc")
    assert done.returncode == 0, done.stderr
    assert "±" in (tmp_path / "mein Lauf, 走行 №1" / "report.html").read_text(encoding="utf-8")


def test_from_a_shell_bad_input_shows_one_line_and_debug_the_traceback(tmp_path):
    done = run_kalm("--stage", "dream", "--output_dir", tmp_path / "run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("kalm: ") and done.stdout == ""
    with pytest.raises(ValueError):
        kalm.main(["--stage", "dream", "--output_dir", str(tmp_path / "run"), "--debug"])
