"""Bad input: one sentence that says what, where and what to do, exit code 2, nothing is written.

Lines of a goals file, rows of a dataset and recordings have tables of their own, in test_env.py,
test_rollouts_on_disk.py and test_formats.py.
"""

import json
import shutil

import datasets
import pytest
from conftest import ROOT, run_kalm, tiny_llm
from test_kalm import MY_GOALS, files_of, smoke

import kalm
from data.grounded import load_grounded
from experiment import folder

BROKEN = json.dumps(MY_GOALS[0]) + '\n{"text": \n'
COMMANDS = {  # a command line, and what the sentence names
    "--stage dream": "'dream'",
    "--scale huge": "'huge'",
    "--stage collect colect": "'colect'",
    "--lr_scheduler_type square": "square is not a valid SchedulerType",
    "--output_dir": "expected one argument",
    "smoke": "unknown option smoke",
    "--nosuch 3": "unknown option --nosuch",
    "--ground-steps=300": "--ground-steps=300: it is --max_steps now",
    "--episodes many": "--episodes: invalid int value: 'many'",
    "--llm LLM --keep_layers 3": "2 layers",
    "--llm LLM --encoder_layers 3": "2 layers",
    "--llm LLM --keep_layers 1 --fresh_layers 2": "1 layers that are kept",
    "--llm photos": "photos: this folder has no config.json",
    "--llm no_weights": "no_weights: this folder has no *.safetensors",
    "--env mars": "--env mars: there is clevr_robot",
    "--goals photos": "photos: no such file",
    "--data absent.npz": "--data absent.npz: no such file or folder",
    "--stage collect ground learn": "run `--stage imagine` first",
    "--output_dir photos": "photos has files but no manifest.json",
    "--output_dir фото": "фото has files but no manifest.json",
    "--output_dir mine": "mine is a file",
    "--imaginary_share 0.05": "--imaginary_share is 2 of a batch's goals, for 3 sources",
    "--keep explained --self_check false": "needs --self_check true",
    "--dynamics_tolerance 0.1 --self_check no": "needs --self_check true",
    "--methods bc,cql+klam": "did you mean cql+kalm?",
    "--adapter photos": "photos holds no adapter",
    "--report_last 3": "--report_last 3: learning keeps --last_checkpoints 2",
    "--adapter released --lora_rank 8": "--adapter released was made with lora_rank 64, and",
    "--adapter released --keep_layers 2": "--adapter released was made with keep_layers 6, and",
    f"--adapter released --env {ROOT}/docs/tiles.py:Tiles": "made with observation_dim 10, and",
    "--fresh_layers 1 --lora_rank 2": "--lora_rank 0",
    "--random_weights --adapter photos": "--adapter none",
    "--report_to comet_ml": "pip install comet_ml",
    "--stage act": "takes a --goal in words",
    "--goal Red.": "--stage act stands alone",
    "--stage act --goal Red.": "run `--stage ground` first",
    "--stage act learn --goal Red.": "--stage act stands alone",
    "--config absent.yaml": "absent.yaml: No such file",
}
BY_NAME = """--stage; --seeds 1.5; --learning_rate fast; --self_check 2; --optim x
--gradient_checkpointing perhaps; --llm nosuchmodel; --encoder nosuchmodel; --env x.py:Mars
--goals x; --split train; --keep best; --train_goals -3; --episodes 0; --novel_goals 0; --seed -1
--keep_layers -1; --learning_rate nan; --rl_learning_rate inf; --num_train_epochs -1
--per_device_train_batch_size 0; --imaginary_share 1; --visited_share 1.5; --step_candidates 0
--temperatures 1;2; --temperatures inf; --temperatures=; --methods bc,sac; --methods bc,bc
--tasks dynamics,sleep; --report_to pigeon; --export csv; --episode 3; --steps 3; --seed 1e3"""
for command in BY_NAME.replace("\n", "; ").split("; "):  # the sentence names the option
    COMMANDS[command] = command.split()[0].strip("=")
FILES = {  # the content of a file, the option that takes it, what the sentence names
    "broken goal": (BROKEN, "--goals", "mine, line 2: not JSON"),
    "training level": ({**MY_GOALS[0], "level": "offline"}, "--goals", "level 'offline'"),
    "no UTF-8": (b'{"text": "caf\xe9"}', "--goals", "mine is not UTF-8"),
    "one array": (MY_GOALS, "--goals", "mine, line 1: a goal is a JSON object"),
    "nested too deep": ("[" * 100_000, "--goals", "mine, line 1: not JSON (nested too deep)"),
    "null bytes": (b"\0\0\0", "--goals", "mine, line 1: not JSON"),
    "goals of another world": (MY_GOALS[0], "--env tiles.py:Tiles --goals", "mine, line 1"),
    "broken YAML": ("seed: 1\nscale: [", "--config", "mine, line 2: neither YAML nor JSON"),
    "YAML of no UTF-8": (b"seed: \xff", "--config", "mine: neither YAML nor JSON"),
    "YAML of code": ("seed: !!python/object/apply:os.system [ls]", "--config", "mine, line 1"),
    "a list": ("- seed", "--config", "found a list"),
    "no name": ("5: 3", "--config", "there is no option 5"),
    "a word for a number": ("episodes: many", "--config", "--episodes: invalid int value: 'many'"),
    "half a step": ("rl_steps: 60.5", "--config", "--rl_steps/--rl-steps: invalid int value"),
    "no recording": ("a cat", "--data", "mine"),
}
CONFIGS = {
    "odd_type": '{"model_type": "nosuchmodel"}',
    "odd_json": '{"model_type": ',
    "no_weights": '{"model_type": "llama"}',
    "odd_code": '{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}',
}
MANIFESTS = {
    "foreign": b"{}",
    "manifest_cut": b'{"format": "kalm-run", "sta',
    "manifest_bytes": b"\xff\xfe\x00",
    "manifest_stages": b'{"format": "kalm-run", "stages": {"collect": 3}}',
}
COMMANDS |= {f"--output_dir {name}": "manifest.json is not a manifest" for name in MANIFESTS}
for name in ("odd_type", "odd_json", "odd_code"):
    COMMANDS[f"--llm {name}"] = f"{name}: its config.json"


def assert_refused(capsys, run, arguments, *names):
    """One sentence with these names, and nothing of a run."""
    before = files_of(run.parent)
    assert kalm.main(["--scale", "smoke", "--output_dir", run, *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("kalm: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert all(name in err for name in names), err
    assert "shows where" not in err and "Error" not in err.replace("(OSError)", ""), err
    assert files_of(run.parent) == before and not run.exists()


@pytest.fixture
def here(tmp_path, monkeypatch, stages_run):
    """An empty folder, in which no stage may begin and no hub can be reached."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield tmp_path
    assert stages_run == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bad_command_line_is_refused_before_anything_is_written(here, capsys, world, command):
    (here / "mine").touch()
    for name in {*command.split()} & {"photos", "фото", *CONFIGS, *MANIFESTS}:
        (here / name).mkdir()
        (here / name / "cat.txt").write_text("a cat")
        if name in CONFIGS:
            (here / name / "config.json").write_text(CONFIGS[name])
            (here / name / "mine.py").write_text("open('was_run', 'w')\nclass Config: pass\n")
        if name in MANIFESTS:
            (here / name / "manifest.json").write_bytes(MANIFESTS[name])
    if "LLM" in command:
        for part in tiny_llm(world):
            part.save_pretrained("LLM")
    assert_refused(capsys, here / "run", command.split(), COMMANDS[command])


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_of_goals_settings_or_data_is_refused(here, capsys, case):
    content, options, named = FILES[case]
    if not isinstance(content, (str, bytes)):
        content = json.dumps(content)
    (here / "mine").write_bytes(content if isinstance(content, bytes) else content.encode())
    shutil.copy(ROOT / "docs" / "tiles.py", "tiles.py")
    assert_refused(capsys, here / "run", [*options.split(), "mine"], named)


def test_a_world_that_is_none_is_refused_in_one_sentence(here, capsys):
    (here / "mine.py").write_text("class Mine:\n    pass\n")
    named = "Mine is not a class made from env.World"
    assert_refused(capsys, here / "run", ["--env", "mine.py:Mine"], named)


def test_a_grounded_model_is_refused_as_language_model(smoke_run, here, capsys):
    grounded = smoke_run / "grounded"
    named = f"--llm {grounded}: this folder is a grounded model of ours; give the language model"
    assert_refused(capsys, here / "run", ["--llm", grounded], named)


# ------------------------------------------------------------------ files of other stages


def forge_checksums(run):
    """As if whoever changed the files of a run had changed its manifest too."""
    manifest = folder.read_json(run / "manifest.json")
    for stage in manifest["stages"].values():
        stage["files"] = {}
    folder.write_json(run / "manifest.json", manifest)


def changed_rows(change):
    def damage(run, world):
        real = run / "rollouts" / "real"
        rows = datasets.load_from_disk(str(real)).to_list()
        shutil.rmtree(real)
        datasets.Dataset.from_list(change(rows)).save_to_disk(str(real))

    return damage


def not_a_number(rows):
    rows[3]["rewards"][0] = float("nan")
    return rows


def config_with(**changes):
    def damage(run, world):
        path = run / "grounded" / "config.json"
        config = folder.read_json(path)
        for name, value in changes.items():
            config[name] = {**config[name], **value} if isinstance(value, dict) else value
        path.write_text(json.dumps(config))

    return damage


def other_actions(run, world):
    model, _ = load_grounded(run / "grounded", world)
    config = type(model.config)(backbone_config=model.config.backbone_config, num_actions=41)
    type(model)(config).save_pretrained(run / "grounded")


def without(name):
    return lambda run, world: folder.remove(run / name)


def cut(name):
    return lambda run, world: (run / name).write_bytes((run / name).read_bytes()[:-50])


NOT_LOADED = "grounded is not a grounded model that can be loaded"
DAMAGE = {  # what happens to a finished run, the stage that is redone, what the sentence names
    "one row": (
        changed_rows(lambda rows: rows[:1]),
        "ground",
        "has 1 rollouts, and 2 are held out",
    ),
    "NaN": (changed_rows(not_a_number), "ground", "real, row 3: rewards has NaN"),
    "no dataset": (without("rollouts/real"), "ground", "real is not a rollouts dataset"),
    "cut": (cut("rollouts/real/data-00000-of-00001.arrow"), "ground", "rollouts/real"),
    "no weights": (without("grounded/model.safetensors"), "imagine", NOT_LOADED),
    "no config": (without("grounded/config.json"), "imagine", NOT_LOADED),
    "no tokenizer": (without("grounded/tokenizer.json"), "imagine", NOT_LOADED),
    "weights cut": (cut("grounded/model.safetensors"), "imagine", NOT_LOADED),
    "gpt2": (config_with(backbone_config={"model_type": "gpt2"}), "imagine", NOT_LOADED),
    "narrow": (config_with(backbone_config={"hidden_size": 32}), "imagine", NOT_LOADED),
    "41 in config": (config_with(num_actions=41), "imagine", NOT_LOADED),
    "41 actions": (other_actions, "imagine", "num_actions 41, and the environment has 40"),
    "no policy": (without("policies/bc.safetensors"), "evaluate", "bc.safetensors"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_refused_by_the_stage_that_reads_them_even_under_a_forged_manifest(
    smoke_run, tmp_path, capsys, world, case
):
    damage, stage, named = DAMAGE[case]
    run = shutil.copytree(smoke_run, tmp_path / "run")
    damage(run, world)
    forge_checksums(run)
    before = files_of(run)
    capsys.readouterr()
    assert smoke(run, "--stage", stage, "--force") == 2
    err = capsys.readouterr().err.replace("\r", "\n")
    (sentence,) = [line for line in err.splitlines() if line.startswith("kalm: ")]
    assert sentence.startswith(f"kalm: stage '{stage}': ") and named in sentence, sentence
    after = {path: found for path, found in files_of(run).items() if path.parts[0] != "unfinished"}
    assert after == before


# ------------------------------------------------------------------ the world around it


@pytest.mark.parametrize("variable, below", [("KALM_CACHE", "."), ("HOME", ".cache/kalm")])
def test_a_cache_that_cannot_be_written_is_named_before_anything_is_fetched(
    here, monkeypatch, capsys, variable, below
):
    monkeypatch.setattr(kalm.command.llm, "_from_hub_or_wheel", lambda _: pytest.fail("fetched"))
    (here / "file").touch()
    monkeypatch.delenv("KALM_CACHE", raising=False)
    monkeypatch.setenv(variable, str(here / "file"))
    cache = here / "file" / below
    named = ("the language model is kept in", str(cache), "set KALM_CACHE to a folder")
    assert_refused(capsys, here / "run", ["--llm", "smollm2"], *named)


def test_a_model_folder_never_runs_its_code(tmp_path, monkeypatch, world):
    monkeypatch.chdir(tmp_path)
    for part in tiny_llm(world):
        part.save_pretrained("LLM")
    config = folder.read_json(tmp_path / "LLM" / "config.json")
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoModel", "AutoTokenizer")
    config["auto_map"] = {name: f"mine.{name}" for name in names}
    (tmp_path / "LLM" / "config.json").write_text(json.dumps(config))
    (tmp_path / "LLM" / "mine.py").write_text("open('was_run', 'w')\n")
    assert smoke("run", "--llm", "LLM", "--stage", "collect", "ground", "imagine") == 0
    assert not (tmp_path / "was_run").exists()  # it was read by transformers' own Llama


def test_from_a_shell_bad_input_shows_one_line_and_traceback_the_rest(tmp_path):
    done = run_kalm("--stage", "dream", "--output_dir", tmp_path / "run")
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.splitlines()
    (said,) = [line for line in lines if "kernels-community" not in line]  # bitsandbytes' own
    assert said.startswith("kalm: ")
    with pytest.raises(ValueError):
        kalm.main(["--stage", "dream", "--output_dir", tmp_path / "run", "--traceback"])
