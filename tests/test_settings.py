"""Settings: Hugging Face's names and meanings, config files, defaults by scale, help, dry runs."""

import dataclasses
import re

import pytest
from transformers import HfArgumentParser, TrainingArguments

import ground
import kalm
import rl
from data import llm
from experiment import command, folder, launch, settings

HUGGING_FACE = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
OURS = [(each, name) for each in kalm.CLASSES for name in each.__annotations__]


def parsed(*arguments, renamed=command.RENAMED):
    """The settings of a command line, as one dict."""

    def defaults(given):
        return command.defaults_of(kalm.SCALES, given)

    found, _ = settings.parse([*map(str, arguments)], kalm.CLASSES, defaults, renamed)
    return {name: value for each in found for name, value in vars(each).items()}


# ------------------------------------------------------------------ Hugging Face's own


def test_every_setting_has_a_help_text_and_takes_no_name_of_hugging_face_for_something_else():
    names = [name for _, name in OURS]
    assert len(set(names)) == len(names)
    for each, name in OURS:
        assert each.__dataclass_fields__[name].metadata["help"], name
        assert each is kalm.GroundingArguments or name not in HUGGING_FACE, name
    assert HUGGING_FACE <= set(settings.SettingsParser(kalm.CLASSES).names.values())


SWITCHES = """--gradient_checkpointing true --gradient_accumulation_steps 2 --bf16 --optim sgd
--optim_args momentum=0.9 --max_steps 7 --num_train_epochs 2.5 --per_device_train_batch_size 3
--per-device-eval-batch-size=5 --save_steps 9 --save_strategy epoch --save_total_limit 2
--eval_steps 0.5 --eval_strategy no --logging_steps 11 --report_to tensorboard --learning_rate 1e-5
--lr_scheduler_type polynomial --lr_scheduler_kwargs {"power":2.0} --warmup_steps 0.1
--weight_decay 0.3 --adam_beta1 0.8 --adam_beta2 0.9 --adam_epsilon 1e-7 --max_grad_norm 2
--neftune_noise_alpha 5 --torch_compile false --seed 4 --data_seed 9 --dataloader_num_workers 1
--dataloader_drop_last true --hub_model_id me/mine --push_to_hub no --run_name mine --use_cpu
--disable_tqdm true --resume_from_checkpoint here --ddp_find_unused_parameters 0 --tf32 false"""


def test_a_switch_of_hugging_face_means_here_what_it_means_there():
    arguments = SWITCHES.split()
    (theirs,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(arguments)
    ours = parsed(*arguments)
    names = re.findall(r"--([\w-]+)", SWITCHES)
    assert len(names) > 30
    for name in [name.replace("-", "_") for name in names]:
        assert ours[name] == getattr(theirs, name), name


def test_a_number_of_steps_and_one_of_passes_decide_as_in_hugging_face():
    smoke = ("--scale", "smoke")
    assert parsed(*smoke)["max_steps"] == 8  # and so the passes say nothing
    assert parsed(*smoke, "--num_train_epochs", 2)["max_steps"] == -1
    both = parsed(*smoke, "--num_train_epochs", 2, "--max_steps", 5)
    assert (both["max_steps"], both["num_train_epochs"]) == (5, 2)
    recorded = kalm.GroundingArguments(max_steps=5).recorded()
    assert recorded["max_steps"] == 5 and "num_train_epochs" not in recorded
    assert "max_steps" not in kalm.GroundingArguments().recorded()


@pytest.mark.parametrize("former, present", command.RENAMED.items())
def test_a_renamed_option_is_refused_with_its_present_name(tmp_path, former, present):
    with pytest.raises(ValueError, match=f"unknown option --{former}: it is --{present} now"):
        parsed(f"--{former}", "3")
    (tmp_path / "mine.yaml").write_text(f"{former}: 3")
    with pytest.raises(ValueError, match=f"mine.yaml: .* '{former}': it is {present} now"):
        parsed("--config", tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    "wrong, near",
    [
        ("--episode", "--episodes"),
        ("--rl-step=3", "--rl_steps"),
        ("--grad_checkpointing", "--gradi"),
    ],
)
def test_a_wrong_option_is_refused_with_the_nearest_name_if_one_is_near(wrong, near):
    with pytest.raises(ValueError, match=f"unknown option {wrong}: did you mean {near}"):
        parsed(wrong)
    with pytest.raises(ValueError, match="^unknown option --xyzzyx$"):
        parsed("--xyzzyx", 3)


# ------------------------------------------------------------------ where values come from

YAML = """scale: smoke
learning_rate: 1e-5
methods: [bc, cql]
balance_goals: false
temperatures: 2
goals:
episodes: 7
gradient_checkpointing: true
stage: learn evaluate
"""
JSON = """{\t"scale": "smoke", "learning_rate": 1e-5, "methods": "bc,cql", "balance_goals": false,
"temperatures": "2", "episodes": 7, "gradient_checkpointing": true, "stage": ["learn", "evaluate"]}
"""


BOM = "\ufeff"  # as editors of Windows begin a file


@pytest.mark.parametrize(
    "name, text",
    [("mine.yaml", YAML), ("mine.json", JSON), ("bom.yaml", BOM + YAML), ("bom.json", BOM + JSON)],
)
def test_settings_come_from_the_command_line_then_the_config_file_then_the_scale(
    tmp_path, name, text
):
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = parsed("--config", tmp_path / name, "--episodes", 3)
    assert found["episodes"] == 3
    assert (found["learning_rate"], found["methods"], found["temperatures"]) == (
        1e-5,
        "bc,cql",
        "2",
    )
    assert found["balance_goals"] is False and found["gradient_checkpointing"] is True
    assert found["stage"] == ["learn", "evaluate"]
    assert found["rl_steps"] == 60 and found["self_check"] is True  # of the scale
    assert found["goals"] == "" and found["visited_share"] == 0.5  # of the fields
    assert parsed("--config", tmp_path / name, "--scale", "gpu")["rl_steps"] == 30000


def test_a_dict_in_a_config_file_is_one_in_the_settings(tmp_path):
    (tmp_path / "mine.yaml").write_text("lr_scheduler_kwargs: {num_cycles: 2}\n")
    assert parsed("--config", tmp_path / "mine.yaml")["lr_scheduler_kwargs"] == {"num_cycles": 2}


def test_what_is_known_before_settings_are_read_counts_the_config_file_too(tmp_path):
    (tmp_path / "mine.yaml").write_text("processes: 3\ndry_run: true\ntraceback: false\n")
    parser = settings.SettingsParser(kalm.CLASSES)
    given = parser.all_given(["--config", str(tmp_path / "mine.yaml"), "--processes", "2"])
    assert given["processes"] == "2" and settings.is_on(given, "dry_run")
    assert not settings.is_on(given, "traceback") and not settings.is_on(given, "force")
    assert settings.is_on(parser.all_given(["--traceback"]), "traceback")
    wrong = ["--config", str(tmp_path / "none.yaml"), "--force"]  # which parse tells
    assert settings.is_on(parser.all_given(wrong), "force")


def test_the_order_of_examples_counts_where_it_differs_from_the_runs(tmp_path):
    options = {"output_dir": str(tmp_path), "seed": 3}
    recorded = lambda **more: ground.GroundingArguments(**options, **more).recorded()
    assert recorded() == recorded(data_seed=3) != recorded(data_seed=9)


def test_many_workers_of_a_cpu_take_one_example_each_at_least(tmp_path, monkeypatch):
    monkeypatch.setenv(launch.CPU_WORKERS, "48")
    made = ground.GroundingArguments(output_dir=str(tmp_path), per_device_train_batch_size=32)
    assert made.per_device_train_batch_size == 1
    with pytest.raises(ValueError, match="--per_device_train_batch_size must be at least 1"):
        ground.GroundingArguments(output_dir=str(tmp_path), per_device_train_batch_size=0)


def test_an_encoder_in_a_folder_counts_by_its_weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"one")
    inputs = lambda: rl.LearnArguments(encoder=str(tmp_path)).inputs()
    before = inputs()
    (tmp_path / "model.safetensors").write_bytes(b"another")
    assert inputs() != before and rl.LearnArguments().inputs() == {}


def test_every_scale_is_valid_and_sets_only_what_there_is():
    for name, scale in kalm.SCALES.items():
        assert set(scale) <= {name for _, name in OURS}
        found = parsed("--scale", name)
        assert {key: found[key] for key in scale} == scale


def adapter_of(*arguments):
    found = parsed("--scale", "cpu", *arguments)
    return found["adapter"], found["max_steps"], found["num_train_epochs"]


def test_a_laptop_takes_the_released_adapter_unless_the_command_asks_for_training(tmp_path):
    run = ("--output_dir", tmp_path / "run")
    released, trained = ("released", -1, 0), ("none", 3300, 3)
    for options in ((), ("--stage", "all", "--keep", "all"), ("--stage", "imagine", "learn")):
        assert adapter_of(*run, *options) == released
    for options in (("--report_to", "none"), ("--seed", 3), ("--train_goals", 9)):
        assert adapter_of(*run, *options) == released
    for options in ("--stage collect ground", "--llm tiny", "--learning_rate 1e-4"):
        assert adapter_of(*run, *options.split()) == trained
    for option, value in (("data", tmp_path), ("env", "tiles.py:Tiles"), ("adapter", "none")):
        expected = ("none", -1, 3) if option == "adapter" else trained
        assert adapter_of(*run, f"--{option}", value) == expected
    assert adapter_of(*run, "--max_steps", 9) == ("none", 9, 3)
    assert adapter_of(*run, "--num_train_epochs", 2) == ("none", -1, 2)
    assert adapter_of(*run, "--adapter", "mine", "--max_steps", 9)[:2] == ("mine", 9)
    assert adapter_of(*run, "--adapter", "released", "--lora_rank", 8) == released


def test_naming_a_default_that_the_adapter_fits_trains_nothing(tmp_path):
    for options in (("--llm", "smollm2"), ("--env", "clevr_robot")):
        assert adapter_of("--output_dir", tmp_path, *options) == ("released", -1, 0)


def test_what_a_run_has_trained_it_keeps(tmp_path):
    run = ("--output_dir", tmp_path)
    for adapter, expected in (("none", 3300), ("released", -1)):
        ground = {"run": {}, "settings": {"adapter": adapter}, "files": {}}
        folder.write_json(tmp_path / "manifest.json", {"stages": {"ground": ground}})
        assert adapter_of(*run)[:2] == (adapter, expected)


def test_paths_hold_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "smollm2"):  # which is no folder here
        (tmp_path / name).mkdir()
    (tmp_path / "mine.py").touch()
    found = parsed("--adapter", "mine", "--data", "mine", "--env", "mine.py:Mine", "--llm", "mine")
    assert found["adapter"] == found["data"] == found["llm"] == str(tmp_path / "mine")
    assert found["env"] == f"{tmp_path / 'mine.py'}:Mine"
    assert parsed("--llm", "smollm2")["llm"] == "smollm2"
    assert parsed()["env"] == "clevr_robot" and parsed("--goals", "")["goals"] == ""


# ------------------------------------------------------------------ help and plans


@pytest.mark.parametrize("columns, screens", [(80, 2 * 55), (120, 2 * 50), (300, 2 * 50)])
def test_help_fits_two_screens_and_shows_every_setting_of_ours_by_scale(
    monkeypatch, capsys, columns, screens
):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert kalm.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert kalm.main(["--stage", "dream", "-h"]) == 0
    assert capsys.readouterr().out == shown
    lines, words = shown.splitlines(), "".join(shown.split())
    assert len(lines) <= screens and max(map(len, lines)) <= min(columns, 120)
    for each, name in OURS:
        text = "".join(each.__dataclass_fields__[name].metadata["help"].split())
        assert f"--{name}{text}(" in words, name
    assert "--rl_stepsgradientstepsofofflineRL(60/3000/8000/30000/500000)" in words
    assert "released,afolder,ornone(none/released/released/none)" in words
    assert "All other settings of transformers.TrainingArguments are accepted" in shown


@pytest.fixture
def plan_of(tmp_path, monkeypatch, capsys):
    """A function: what `--dry_run` prints for each stage, on one line, having written nothing."""
    monkeypatch.setattr(llm, "fetch_default", lambda: pytest.fail("a dry run must not fetch"))
    monkeypatch.setenv("KALM_CACHE", str(tmp_path / "empty"))

    def plan(*arguments):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        assert kalm.main(["--output_dir", tmp_path / "new", *arguments, "--dry_run"]) == 0
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        words = re.sub(r"\n {10,}", " ", capsys.readouterr().out)
        return {line.split()[0]: line for line in words.splitlines()}

    return plan


def test_a_dry_run_prints_what_would_happen_and_writes_nothing(plan_of):
    plan = plan_of("--scale", "cpu", "--rl_steps", 77)
    assert list(plan) == ["KALM,", *list(kalm.STAGES)[:-1], "memory:"]
    assert "rl_steps 77," in plan["learn"] and "episodes 120," in plan["evaluate"]
    settings_of_ground = re.split(" {3,}", plan["ground"])[-1]
    assert settings_of_ground == (  # no tasks, no batch size, nothing is trained
        "adapter released, keep_layers 6, max_steps -1, num_train_epochs 0.0, load_in_4bit False"
    )
    assert "max_steps 5," in plan_of("--scale", "cpu", "--max_steps", 5)["ground"]


def test_a_dry_run_says_what_is_done_before(smoke_run, plan_of):
    plan = plan_of("--scale", "smoke", "--output_dir", smoke_run, "--rl_steps", 77)
    done = [stage for stage, words in plan.items() if "done before" in words]
    assert done == ["collect", "ground", "imagine"]
