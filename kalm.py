"""KALM from start to end: collect, ground, imagine, learn, evaluate, report (Pang et al., NeurIPS 2024).

    python kalm.py --scale cpu                        everything, on this machine
    accelerate launch kalm.py --stage all             the same, on all its GPUs

Each stage is a function of files to files in --output_dir; what is done and unchanged is skipped. This file knows the
order of the stages, their options and the report; what a stage does is in env, ground, rollout and rl.
"""
import argparse
import base64
import collections
import hashlib
import html
import io
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets  # noqa: E402
import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from accelerate import PartialState  # noqa: E402
from accelerate.utils import gather_object  # noqa: E402

import env  # noqa: E402
import ground  # noqa: E402
import rl  # noqa: E402
import rollout  # noqa: E402
from data import account, card, logs, sentences  # noqa: E402
from data import config as config_file, llm as llm_source  # noqa: E402
from model import TASKS, KalmForRollouts  # noqa: E402

STAGES = ("collect", "ground", "imagine", "learn", "evaluate", "report")
READS = {"collect": (), "ground": ("collect",), "imagine": ("collect", "ground"), "learn": ("collect", "imagine"),
         "evaluate": ("ground", "learn"), "report": ("ground", "imagine", "learn", "evaluate"), "act": ("ground", "learn")}
METHODS = (*(f"{algorithm}{source}" for algorithm in ("bc", "cql") for source in ("", "+relabel", "+kalm", "+both")), "llm")
SCALES = ("smoke", "cpu", "gpu", "paper")
RELEASED = Path(__file__).resolve().parent / "data" / "adapter"

# ------------------------------------------------------------------------------------------------------------------
# Options


@dataclass(frozen=True)
class Option:
    """A command-line option of a stage; `values` holds one default for each of SCALES, or one for all."""
    name: str
    stage: str
    values: tuple
    help: str

    def default(self, scale):
        return self.values[SCALES.index(scale) if len(self.values) > 1 else 0]


OPTIONS = (
    Option("train_goals", "collect", (40, 6000, 16000, 16000), "goal sentences in the offline data"),
    Option("rollouts_per_goal", "collect", (4, 6, 6, 6), "expert rollouts tried for each of them"),
    Option("llm", "ground", ("tiny", "smollm2", "smollm2", "meta-llama/Llama-2-7b-chat-hf"), "smollm2, tiny, folder, .gguf, Hub name"),
    Option("keep_layers", "ground", (0, 6, 0, 0), "first layers of the LLM to keep; 0: all"),
    Option("fresh_layers", "ground", (0,), "so many of them, the last, start from random weights"),
    Option("random_weights", "ground", (0,), "1: forget the LLM's pre-trained weights first"),
    Option("lora_rank", "ground", (0, 64, 0, 0), "of the LoRA adapters to tune; 0: tune all weights"),
    Option("adapter", "ground", ("", "released", "", ""), "trained one to take: released (data/adapter) or a folder; '': train"),
    Option("adapter_steps", "ground", (0,), "gradient steps to train that adapter on"),
    Option("tasks", "ground", (",".join(TASKS),), "grounding tasks, with commas between"),
    Option("renamed_copies", "ground", (1,), "times the data come in a pass; from the second on, balls are renamed"),
    Option("ground_steps", "ground", (8, 3300, 6000, 40000), "gradient steps of training"),
    Option("batch_examples", "ground", (8, 32, 64, 24), "examples a step and process"),
    Option("learning_rate", "ground", (1e-3, 6e-4, 6e-4, 2e-5), "of the LLM's own weights"),
    Option("new_learning_rate", "ground", (1e-3, 1.5e-3, 1e-3, 1e-3), "of LoRA, embeddings and heads of states and actions"),
    Option("embedding_scale", "ground", (7.0,), "size of new embeddings at the start; 1: as tokens'"),
    Option("report_to", "ground", ("none",), "trackers of training here and in learn: tensorboard, wandb, trackio"),
    Option("goals", "imagine", ("",), "file of your own novel goals, see data/README.md"),
    Option("split", "imagine", ("test",), "of the built-in goals: validation (to choose) or test (to report)"),
    Option("novel_goals", "imagine", (6, 240, 480, 480), "novel goals a level"),
    Option("starts_per_goal", "imagine", (2, 16, 20, 50), "starts to imagine from for each goal"),
    Option("step_starts", "imagine", (2, 40, 40, 50), "the same at level easy"),
    Option("temperatures", "imagine", ("1,1.3", "1,1,1.2,1.2", "1,1,1.2,1.2", "1"), "of sampling, one for each round of imagining"),
    Option("step_tries", "imagine", (4, 40, 40, 1), "actions to try in later rounds for goals of one action"),
    Option("visited_share", "imagine", (0.5,), "of rollouts that start in a state of the data, not a new one"),
    Option("self_check", "imagine", (1, 0, 1, 1), "1: the model explains and checks what it imagined"),
    Option("max_steps", "imagine", (4, 20, 50, 50), "actions in an imagined rollout at most"),
    Option("keep", "learn", ("all", "matched", "matched", "matched"), "imagined ones: matched (judge), explained (own words), both, all"),
    Option("kept_per_goal", "learn", (0,), "at most so many of a goal; 0: all"),
    Option("dynamics_tolerance", "learn", (0.0,), "drop transitions that self_check finds further off (m); 0: none"),
    Option("balance_goals", "learn", (1,), "1: draw imaginary batches by goal; 0: by transition"),
    Option("encoder", "learn", ("llm",), "of goals: llm (the base LLM), or a transformers model"),
    Option("encoder_layers", "learn", (0, 4, 4, 4), "first layers of the base LLM to use; 0: all"),
    Option("rl_steps", "learn", (60, 16000, 30000, 500000), "gradient steps of offline RL"),
    Option("rl_batch", "learn", (32, 256, 256, 32), "transitions a step and seed"),
    Option("rl_learning_rate", "learn", (1e-3, 1e-3, 1e-3, 6.25e-5), "of the policies"),
    Option("conservative_weight", "learn", (1.0, 5.0, 5.0, 10.0), "alpha of CQL"),
    Option("imaginary_share", "learn", (0.25, 0.25, 0.25, 0.5), "of each batch"),
    Option("methods", "learn", (",".join(m for m in METHODS if "both" not in m),), "to learn and evaluate"),
    Option("seeds", "learn", (2, 3, 3, 3), "policies for each method"),
    Option("episodes", "evaluate", (6, 200, 400, 400), "for each method, level and seed"),
    Option("episode_steps", "evaluate", (10, env.MAX_STEPS, env.MAX_STEPS, env.MAX_STEPS), "actions in an episode at most"),
)
TYPES = {"stage": list, "goal": str, "output_dir": str, "scale": str, "seed": int, **{o.name: type(o.values[0]) for o in OPTIONS}}


def parse_options(arguments):
    """The options of a command line, then of its config file, then the defaults of its scale. Raises ValueError for a bad one."""
    def refuse(message):
        raise ValueError(message)
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], allow_abbrev=False, usage="%(prog)s [options]", add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, 2, 25, min(max(shutil.get_terminal_size().columns, 80), 120)))
    parser.error = refuse
    add = parser.add_argument_group("the run").add_argument
    add("--stage", nargs="+", default=["all"], metavar="", help=f"one or more of {', '.join(STAGES)}; all of these (default); or act")
    add("--goal", metavar="", help="for --stage act: a sentence to act on in the environment, once")
    add("--output_dir", "--run", default="runs/kalm", metavar="", help="the run's folder (runs/kalm)")
    add("--config", metavar="", help="YAML or JSON file of options, as a run's config.yaml; the command line wins")
    add("--scale", default="gpu" if torch.cuda.is_available() else "cpu", metavar="", help="one dial: smoke, cpu, gpu, paper (gpu, or cpu)")
    add("--seed", type=int, default=0, metavar="", help="of everything random (0)")
    for flag, does in (("dry_run", "print the plan, write nothing"), ("force", "redo the stages even if nothing changed"),
                       ("debug", "show the traceback of an error")):
        add(f"--{flag}", action="store_true", help=does)
    add("--help", action="help", help="show this")
    for stage in STAGES:
        group = [o for o in OPTIONS if o.stage == stage]
        section = parser.add_argument_group(f"{stage} (defaults: {' / '.join(SCALES)})") if group else None
        for option in group:
            section.add_argument(f"--{option.name}", type=type(option.values[0]), default=argparse.SUPPRESS, metavar="",
                                 help=f"{option.help} ({'/'.join(map(str, option.values))})")
    options, odd = parser.parse_known_args(arguments)
    if odd:
        raise ValueError(f"unknown option {odd[0]}{config_file.did_you_mean(odd[0], (*TYPES, 'run', 'dry_run', 'config'))}")
    named_methods, of_run = hasattr(options, "methods"), Path(options.output_dir) / "config.yaml"
    if options.config or options.stage == ["act"] and of_run.is_file():
        options = parser.parse_args(arguments, argparse.Namespace(**config_file.read(options.config or of_run, TYPES)))
    options.methods_to_act = options.methods.split(",") if named_methods else []
    if options.scale not in SCALES:
        raise ValueError(f"unknown scale {options.scale!r}; scales are {', '.join(SCALES)}")
    unknown = [s for s in options.stage if s not in (*STAGES, "all", "act")]
    if unknown:
        raise ValueError(f"unknown stage {unknown[0]!r}; stages are {', '.join(STAGES)}, all, or act")
    if (options.goal is None) == ("act" in options.stage):
        raise ValueError('--stage act takes a --goal in words, no other stage does: --stage act --goal "put red left of blue"')
    given = {o.stage for o in OPTIONS if hasattr(options, o.name)}
    options.adapter_is_settled = "ground" in given or "ground" in options.stage
    if options.adapter_is_settled and not hasattr(options, "adapter"):
        options.adapter = ""
    for option in OPTIONS:
        if not hasattr(options, option.name):
            setattr(options, option.name, option.default(options.scale))
        value, least = getattr(options, option.name), 0 if option.name in MAY_BE_ZERO else 1
        if isinstance(value, int) and value < least:
            raise ValueError(f"--{option.name} must be at least {least}, got {value}")
        if isinstance(value, float) and not 0 <= value < float("inf"):
            raise ValueError(f"--{option.name} must be a number from 0 on, got {value}")
        if option.name in SWITCHES and value > 1:
            raise ValueError(f"--{option.name} is 0 or 1, got {value}")
    for name, allowed in CHOICES.items():
        found = [getattr(options, name)] if name in ("split", "keep") else getattr(options, name).split(",")
        odd = [value for value in found if value not in allowed]
        if odd or len(set(found)) < len(found):
            raise ValueError(f"--{name} takes {' or '.join(allowed)}{', each once' if len(found) > 1 else ''}, got {','.join(found)!r}")
    if (options.fresh_layers or options.random_weights) and (options.lora_rank or options.adapter):
        raise ValueError("an adapter adds to what the LLM knows; with --fresh_layers or --random_weights give --lora_rank 0 and no "
                         "--adapter")
    if not options.self_check and (options.keep in ("explained", "both") or options.dynamics_tolerance):
        raise ValueError(f"--keep {options.keep} with --dynamics_tolerance {options.dynamics_tolerance} needs --self_check 1")
    if options.imaginary_share >= 1:
        raise ValueError(f"--imaginary_share must be below 1, got {options.imaginary_share}: some of each batch is real")
    if options.visited_share > 1:
        raise ValueError(f"--visited_share must be at most 1, got {options.visited_share}")
    if options.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {options.seed}")
    try:
        temperatures = [float(t) for t in options.temperatures.split(",")]
    except ValueError:
        temperatures = [-1]
    if not all(0 <= t < float("inf") for t in temperatures):
        raise ValueError(f"--temperatures takes numbers from 0 on with commas between, got {options.temperatures!r}")
    logs.check_trackers(options.report_to)
    options.stages = [s for s in (*STAGES, "act") if s in options.stage or "all" in options.stage and s != "act"]
    options.run, options.start_seed = Path(options.output_dir), options.seed
    return options


CHOICES = {"split": ("validation", "test"), "keep": ("matched", "explained", "both", "all"), "tasks": TASKS,
           "methods": METHODS, "report_to": logs.TRACKERS}
SWITCHES = ("random_weights", "self_check", "balance_goals")
MAY_BE_ZERO = ("keep_layers", "fresh_layers", "lora_rank", "adapter_steps", "encoder_layers", "kept_per_goal", *SWITCHES)


def check_run_folder(options):
    """Refuse a folder that is not a KALM run, and stages whose input is missing or made otherwise. Writes nothing."""
    run = options.run
    if run.exists() and not run.is_dir():
        raise ValueError(f"--output_dir {run} is a file; give a folder")
    if run.is_dir() and any(run.iterdir()) and not (run / "manifest.json").is_file():
        raise ValueError(f"--output_dir {run} has files but no manifest.json, so it is not a KALM run; give a new folder")
    done = read_manifest(run)["stages"]
    if "ground" in done and not options.adapter_is_settled:
        options.adapter = done["ground"]["options"].get("adapter", "")  # what this run trained, it keeps
    for stage in options.stages:
        for needed in READS[stage]:
            if needed not in options.stages and needed not in done:
                raise ValueError(f"stage {stage!r} reads what stage {needed!r} writes, and {run} has none; "
                                 f"run `--stage {needed}` first")
    if options.stages == ["act"]:
        options.seed = done["learn"]["options"]["seed"]  # --seed chooses the start alone
        options.methods = done["learn"]["options"]["methods"]
    for stage in sorted({s for stage in options.stages for s in follows_from(stage)} - set(options.stages), key=STAGES.index):
        given = stage_options(stage, options)
        for name, value in done.get(stage, {"options": {}})["options"].items():
            if name in given and name != "adapter_sha256" and value != given[name]:
                raise ValueError(f"stage {stage!r} was run with --{name} {value}, and this command has {given[name]}; "
                                 f"repeat that option, or name {stage!r} in --stage too")


def follows_from(stage):
    """All stages whose output a stage depends on, directly or not."""
    return {s for needed in READS[stage] for s in (needed, *follows_from(needed))}


def novel_goals(options):
    """The novel goals of a run: {level: [Goal, ...]}, from --goals or built in."""
    if options.goals:
        if not Path(options.goals).is_file():
            raise ValueError(f"--goals {options.goals}: no such file")
        goals = env.read_goals(options.goals)
        trained = [g.text for g in goals if g.level == "offline"]
        if trained:
            raise ValueError(f"{options.goals}: level 'offline' is for training goals, found {trained[0]!r}; "
                             f"use {', '.join(env.NOVEL_LEVELS)}")
        return {level: found for level in env.NOVEL_LEVELS if (found := [g for g in goals if g.level == level])}
    return {level: env.sample_goals(level, options.split, options.novel_goals, np.random.default_rng([options.seed, 1, i]))
            for i, level in enumerate(env.NOVEL_LEVELS)}


# ------------------------------------------------------------------------------------------------------------------
# Manifest: what is done, and from what

def read_manifest(run):
    path = run / "manifest.json"
    if not path.is_file():
        return {"format": "kalm-run", "version": 1, "stages": {}}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        assert manifest["format"] == "kalm-run" and isinstance(manifest["stages"], dict)
    except (json.JSONDecodeError, KeyError, AssertionError, TypeError):
        raise ValueError(f"{path} is not a manifest of a KALM run; give another --output_dir") from None
    return manifest


def stage_options(stage, options):
    """The options that a stage's result follows from; a goals file and an adapter count by their content."""
    own = {o.name: getattr(options, o.name) for o in OPTIONS if o.stage == stage and o.name != "report_to"}
    if own.get("goals"):
        own["goals"] = hashlib.sha256(Path(options.goals).read_bytes()).hexdigest()
    if own.get("adapter"):
        files = (adapter_folder(options) / name for name in ("adapter_model.safetensors", "new_layers.safetensors"))
        own["adapter_sha256"] = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()]
    return {"seed": options.seed, **own}


def fingerprint(stage, options, manifest):
    """Hash of what a stage's result follows from: its options, and the fingerprints of the stages it reads."""
    read = {name: manifest["stages"].get(name, {}).get("fingerprint") for name in READS[stage]}
    return hashlib.sha256(json.dumps([stage, stage_options(stage, options), read], sort_keys=True).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------------
# Stages

def collect(options, state):
    """Expert rollouts of training goals, the successful ones kept -> rollouts/real."""
    if not state.is_main_process:
        return
    rng = np.random.default_rng([options.seed, 0])
    goals = [g for g in env.sample_goals("offline", "train", options.train_goals, rng) for _ in range(options.rollouts_per_goal)]
    array, states = env.goal_array(goals), env.unfulfilled_states(rng, goals)
    records = env.run_episodes(lambda obs, rows: env.expert_actions(array[rows], obs), goals, states, 20, "collect")
    kept = [r for r in records if r["success"]]
    print(f"  {len(kept)} of {len(records)} expert rollouts succeed, {np.mean([len(r['actions']) for r in kept]):.1f} actions each")
    rollout.write_rollouts(options.run / "rollouts" / "real", kept)


def split_real(options):
    """(training, held-out) real rollouts: the last twentieth is held out, for the figures of grounding."""
    records = rollout.read_rollouts(options.run / "rollouts" / "real")
    held = max(2, min(1200, len(records) // 20))
    if len(records) <= held:
        raise ValueError(f"{options.run / 'rollouts' / 'real'} has {len(records)} rollouts, and {held} are held out; "
                         "collect more (--train_goals)")
    return records[:-held], records[-held:]


def ground_llm(options, state):
    """The LLM, fine-tuned on the real rollouts, or with --adapter added -> grounded/, a from_pretrained folder with metrics.json."""
    records, held_out = split_real(options)
    llm, tokenizer = llm_source.load(options.llm_path, options.keep_layers, options.seed)
    if options.fresh_layers:
        llm_source.forget_layers(llm, options.fresh_layers, options.seed)
    if options.random_weights:
        llm = transformers.AutoModelForCausalLM.from_config(llm.config)
    steps = options.adapter_steps if options.adapter else options.ground_steps
    if options.adapter:
        adapter = adapter_folder(options)
        model = KalmForRollouts.from_adapter(llm, adapter)
        metrics = json.loads((adapter / "metrics.json").read_text(encoding="utf-8"))
        if state.is_main_process:
            print(f"  with the adapter in {adapter}; `--stage ground` trains one instead")
    else:
        metrics = {"log": []}
        model = KalmForRollouts.from_llm(llm, lora_rank=options.lora_rank, embedding_scale=options.embedding_scale,
                                         seed=options.seed, **ground.observation_statistics(records))
    if steps:
        log = ground.train(
            model, tokenizer, records, options.run / "logs", steps=steps, batch_examples=options.batch_examples,
            learning_rate=options.learning_rate, new_learning_rate=options.new_learning_rate, bf16=options.bf16,
            tasks=options.tasks.split(","), copies=options.renamed_copies, seed=options.seed, report_to=options.report_to)
        model = ground.gathered(model)
        before = metrics["log"][-1]["step"] if metrics["log"] else 0
        metrics = {"log": metrics["log"] + [{**entry, "step": before + entry["step"]} for entry in log if "loss" in entry]}
    if not state.is_main_process:
        return
    if steps:
        model.to(state.device)
        with torch.autocast(state.device.type, torch.bfloat16, enabled=options.bf16):
            metrics.update(ground.evaluate(model, tokenizer, held_out))
            for name, prompt in (("explanation", ground.PROMPTS["explanation"]), ("unseen_prompt", ground.UNSEEN_PROMPT)):
                figures = rollout.explanation_accuracy(held_out, rollout.explain(model, tokenizer, held_out, prompt))
                metrics.update({f"{name}_{k}": v for k, v in figures.items()})
    print("  held-out rollouts: " + ", ".join(f"{k} {v:.3f}" for k, v in metrics.items() if k != "log"))
    aside, folder = options.run / "grounded.partial", options.run / "grounded"
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    if model.config.lora_rank and steps:
        (aside / "adapter").mkdir()
        model.save_adapter(aside / "adapter")
        ground.write_json(aside / "adapter" / "metrics.json", metrics)
    ground.write_json(aside / "metrics.json", metrics)
    card.write(aside, metrics, options, model.config, (len(records), len(held_out)))
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def adapter_folder(options):
    """The folder that --adapter names. Raises ValueError if it has no adapter."""
    folder = RELEASED if options.adapter == "released" else Path(options.adapter)
    if (options.run / "grounded").resolve() in folder.resolve().parents:
        raise ValueError(f"--adapter {options.adapter}: ground would replace {options.run / 'grounded'}; copy the adapter elsewhere, "
                         "or give another --output_dir")
    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(f"--adapter {options.adapter}: {folder} has no adapter_model.safetensors; give the folder grounded/adapter "
                         "of a run with --lora_rank, or '' to train")
    return folder


def load_grounded(options, state):
    """The grounded model on this process's device, LoRA merged and with --bf16 its backbone so, and its tokenizer."""
    folder = options.run / "grounded"
    model = KalmForRollouts.from_pretrained(folder, dtype=torch.float32).merge_adapters()
    if options.bf16:
        model.backbone.to(torch.bfloat16)
    return model.to(state.device).eval(), transformers.AutoTokenizer.from_pretrained(folder)


def imagine(options, state):
    """Imagined rollouts for the novel goals, each level judged -> rollouts/<level>, quality.json."""
    model, tokenizer = load_grounded(options, state)
    visited = np.concatenate([r["observations"][:-1] for r in split_real(options)[0]])
    goals = novel_goals(options)
    goals["offline"] = env.sample_goals("offline", "train", options.novel_goals, np.random.default_rng([options.seed, 2]))
    figures, made = {}, {}
    for number, (level, level_goals) in enumerate(goals.items()):
        with torch.autocast(state.device.type, torch.bfloat16, enabled=options.bf16):
            rounds = imagine_level(options, state, model, tokenizer, level, level_goals, visited, [options.seed, 3, number])
        if state.is_main_process:
            figures[level], made[level] = rollout.quality(rounds[0]), sum(rounds, [])
            print(f"  {level:9}" + "  ".join(f"{k} {v:.3f}" for k, v in figures[level].items() if k != "rollouts"))
    if state.is_main_process:
        for level in env.NOVEL_LEVELS:
            shutil.rmtree(options.run / "rollouts" / level, ignore_errors=True)
            if level in made:
                rollout.write_rollouts(options.run / "rollouts" / level, made[level])
        ground.write_json(options.run / "quality.json", figures)


def imagine_level(options, state, model, tokenizer, level, goals, visited, seed):
    """Rounds of imagining, one a temperature: the first from every start, each later one from the starts without a match.

    So what is kept is spread over goals and starts as the starts are, not as the model's luck is. Goals of one action have one
    later round, in which every action is tried that --step_tries allows. Goals of level offline, for comparison, have one start
    and one round each. Returns records by round.
    """
    rng, rounds = np.random.default_rng(seed), []
    repeats = {"offline": 1, "easy": options.step_starts}.get(level, options.starts_per_goal)
    goals = [goal for goal in goals for _ in range(repeats)]
    starts = env.observe(env.unfulfilled_states(rng, goals))
    if level != "offline":
        elsewhere = rng.random(len(goals)) < options.visited_share
        starts[elsewhere] = env.unfulfilled_observations(rng, goals, visited)[elsewhere]
    rows, of_one_action = np.arange(len(goals)), np.array([goal.kind == "step" for goal in goals])
    for number, temperature in enumerate(map(float, options.temperatures.split(",")[:1 if level == "offline" else None])):
        mine = rows[state.process_index::state.num_processes]
        part = rollout.generate_all(
            model, tokenizer, [goals[i] for i in mine], starts[mine], temperature=temperature, max_steps=options.max_steps,
            tries=options.step_tries if number else 1, seed=int(rng.integers(2 ** 31)) + state.process_index, description=f"imagine {level}")
        if options.self_check or any(goal.kind == "unknown" for goal in goals):
            for record, text, error in zip(part, rollout.explain(model, tokenizer, part), rollout.dynamics_error(model, tokenizer, part)):
                record.update(explanation=text, dynamics_error=error)
        part = [r for _, r in sorted(gather_object(list(zip(mine, part))), key=lambda pair: pair[0])]
        rounds.append(part)
        rows = rows[[not (is_wanted(r, "matched") or number and of_one_action[i]) for i, r in zip(rows, part)]]
        if len(rows) == 0:
            break
    return rounds


def is_wanted(record, keep):
    """Whether --keep keeps an imagined rollout; for a goal without a judge its explanation decides, whatever --keep says."""
    keep = "explained" if record.get("kind") == "unknown" else keep
    return (keep in ("all", "explained") or record["success"]) and (keep in ("all", "matched") or rollout.explanation_fits(record))


def imagined_rollouts(options):
    """{level: (all imagined rollouts, those that --keep keeps)} of a run."""
    found = {}
    for level in env.NOVEL_LEVELS:
        if (options.run / "rollouts" / level).is_dir():
            records = rollout.read_rollouts(options.run / "rollouts" / level)
            kept, count = [], collections.Counter()
            for r in (r for r in records if is_wanted(r, options.keep)):
                count[r["goal"]] += 1
                if not options.kept_per_goal or count[r["goal"]] <= options.kept_per_goal:
                    kept.append(r)
            found[level] = records, kept
    return found


def learn(options, state):
    """Policies of every method, all seeds at once -> policies/METHOD.safetensors, goals.safetensors, curves.json."""
    real, _ = split_real(options)
    imagined = {level: kept for level, (_, kept) in imagined_rollouts(options).items()}
    goals = novel_goals(options)
    rng = np.random.default_rng([options.seed, 4])
    relabelled = {level: rl.relabel(real, goals[level], len(kept), rng) for level, kept in imagined.items()}
    table = rl.GoalTable.encode([r["goal"] for r in real], [g.text for level in goals.values() for g in level],
                                *load_encoder(options, state))
    both = {f"{name} {level}": rows for name, of in (("relabelled", relabelled), ("imagined", imagined)) for level, rows in of.items()}
    sources = {"": {}, "relabel": relabelled, "kalm": imagined, "both": both}
    if state.is_main_process:
        print(f"  rollouts to learn from: real {len(real)}" + "".join(
            f"; {name} " + ", ".join(f"{level} {len(rows)}" for level, rows in sources[name].items()) for name in ("relabel", "kalm")))
    config = rl.RLConfig(steps=options.rl_steps, batch=options.rl_batch, lr=options.rl_learning_rate,
                         conservative_weight=options.conservative_weight, imaginary_share=options.imaginary_share, bf16=options.bf16)
    folder, aside = options.run / "policies", options.run / "policies.partial"
    if state.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
    state.wait_for_everyone()
    buffer = rl.Buffer(real, table, state.device)
    seeds, curves = list(range(options.seeds)), []
    methods = [m for m in options.methods.split(",") if m != "llm"]
    for method in methods[state.process_index::state.num_processes]:
        algorithm, _, source = method.partition("+")
        extra = [rl.Buffer(rows, table, state.device, balanced=bool(options.balance_goals), dynamics_tolerance=options.dynamics_tolerance)
                 for rows in sources[source].values() if rows]
        extra = [imaginary for imaginary in extra if len(imaginary)]
        log = logs.Curve(options.run / "logs", f"rl_{method}", options.report_to)
        network, curve = rl.learn(algorithm, buffer, extra, table.table, [options.seed + s for s in seeds], config, method, log.log)
        log.finish()
        rl.save_policy(aside / f"{method}.safetensors", network, seeds, method, config)
        curves.append((method, curve))
    curves = dict(gather_object(curves))
    if state.is_main_process:
        table.save(aside / "goals.safetensors")
        ground.write_json(aside / "curves.json", {m: curves[m] for m in methods})
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)


def load_encoder(options, state):
    """The frozen encoder of goal texts and its tokenizer."""
    if options.encoder == "llm":
        llm, tokenizer = llm_source.load(options.llm_path, options.encoder_layers, options.seed)
        return llm.base_model.to(state.device), tokenizer
    return (transformers.AutoModel.from_pretrained(options.encoder, dtype=torch.float32).to(state.device),
            transformers.AutoTokenizer.from_pretrained(options.encoder))


def play(options, state, method, seed_index, goals, starts, table, model, tokenizer):
    """Episodes of a method in the environment, one a goal and start: rollout records."""
    if method == "llm":
        with torch.autocast(state.device.type, torch.bfloat16, enabled=options.bf16):
            return rollout.generate_all(model, tokenizer, goals, env.observe(starts), states=starts,
                                        max_steps=options.episode_steps, description="the LLM as policy")
    network, _ = rl.load_policy(options.run / "policies" / f"{method}.safetensors")
    policy = rl.policy_of(network, seed_index, table.table, table.rows([g.text for g in goals]))
    return env.run_episodes(policy, goals, starts, options.episode_steps, f"evaluate {method}" if len(goals) > 1 else None)


def evaluate(options, state):
    """Success rates of every policy, and of the LLM as policy, on all levels -> results.json."""
    table = rl.GoalTable.load(options.run / "policies" / "goals.safetensors")
    model, tokenizer = load_grounded(options, state)
    rng = np.random.default_rng([options.seed, 5])
    trained = list({r["goal"]: env.goal_of(r) for r in split_real(options)[0]}.values())
    goals = {"offline": [trained[i] for i in rng.permutation(len(trained))[:options.episodes]], **novel_goals(options)}
    goals = {level: judged for level, some in goals.items() if (judged := [g for g in some if g.kind != "unknown"])}
    episodes = [g for level in goals.values() for g in (level * -(-options.episodes // len(level)))[:options.episodes]]
    levels = np.repeat(list(goals), options.episodes)
    starts = {s: env.unfulfilled_states(np.random.default_rng([options.seed, 7, s]), episodes) for s in range(options.seeds)}
    methods = options.methods.split(",")
    jobs = [(method, s) for method in methods for s in range(options.seeds if method != "llm" else 1)]
    scores = []
    for method, s in jobs[state.process_index::state.num_processes]:
        won = np.array([r["success"] for r in play(options, state, method, s, episodes, starts[s], table, model, tokenizer)])
        scores.append((method, s, {level: float(won[levels == level].mean()) for level in goals}))
    scores = gather_object(scores)
    if not state.is_main_process:
        return
    success = {}
    for method in methods:
        success[method] = {}
        for level in goals:
            rates = [rate[level] for m, s, rate in sorted(scores, key=lambda x: x[1]) if m == method]
            success[method][level] = {"mean": float(np.mean(rates)), "std": float(np.std(rates)), "seeds": rates,
                                      "episodes": options.episodes * len(rates)}
    metrics = json.loads((options.run / "grounded" / "metrics.json").read_text(encoding="utf-8"))
    ground.write_json(options.run / "results.json", {
        "success": success, "quality": json.loads((options.run / "quality.json").read_text(encoding="utf-8")),
        "grounding": {k: v for k, v in metrics.items() if k != "log"},
        "time_s": {}, "config": {"seed": options.seed, "scale": options.scale, **{o.name: getattr(options, o.name) for o in OPTIONS}}})


def act(options, state):
    """One try at --goal in the environment by each of --methods, or the best policy and the LLM -> act/*.gif, words on the terminal."""
    if not state.is_main_process:
        return
    known = {g.text: g for level in novel_goals(options).values() for g in level}
    goal = known.get(options.goal) or sentences.goal_of_text(options.goal)
    print(f'  goal: "{goal.text}"\n  judge: {account.judge_of(goal, goal.text in known)}')
    table = rl.GoalTable.load(options.run / "policies" / "goals.safetensors")
    if goal.text not in table.index:
        table = table.with_text(goal.text, *load_encoder(options, state))
    model, tokenizer = load_grounded(options, state)
    start = env.unfulfilled_states(np.random.default_rng([options.start_seed, 8]), [goal])
    for method in account.actors(options.run, METHODS, options.methods_to_act):
        record, = play(options, state, method, 0, [goal], start, table, model, tokenizer)
        record["explanation"], = rollout.explain(model, tokenizer, [record])
        print(account.write(options.run, goal, method, record, rollout.explanation_fits(record), options.start_seed))


# ------------------------------------------------------------------------------------------------------------------
# Report

PUBLISHED = {"rephrase": 0.45, "easy": 0.35, "hard": 0.09, "offline": 0.60}  # the paper's best KALM policies, by eye


def results_table(results):
    """The success table as lines of text."""
    levels = [level for level in env.LEVELS if level in next(iter(results["success"].values()))]
    lines = ["method        " + "".join(f"{level:>16}" for level in levels)]
    for method, row in results["success"].items():
        cells = [f"{row[level]['mean']:.3f}" + (f" +-{row[level]['std']:.3f}" if len(row[level]["seeds"]) > 1 else " " * 8)
                 for level in levels]
        lines.append(f"{method:14}" + "".join(f"{cell:>16}" for cell in cells))
    return lines


def success_figure(results):
    """Success by level and method as an SVG string; error bars are the standard deviation over seeds."""
    levels = [level for level in env.LEVELS if level in next(iter(results["success"].values()))]
    figure, axes = plt.subplots(figsize=(9, 3.6))
    width = 0.85 / len(results["success"])
    for i, (method, row) in enumerate(results["success"].items()):
        x = np.arange(len(levels)) + (i - (len(results["success"]) - 1) / 2) * width
        axes.bar(x, [row[level]["mean"] for level in levels], 0.9 * width, yerr=[row[level]["std"] for level in levels], label=method,
                 color=plt.cm.tab20(METHODS.index(method)), capsize=2)
    for x, level in enumerate(levels):
        axes.hlines(PUBLISHED[level], x - 0.45, x + 0.45, color="gray", linestyle="dotted",
                    label="paper's best (other data, model and sentences)" if x == 0 else None)
    axes.set_xticks(range(len(levels)), levels)
    axes.set_ylim(0, 1)
    axes.set_ylabel("success rate")
    axes.legend(ncols=4, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
    return to_svg(figure)


def curves_figure(log, curves):
    """Learning curves of grounding and of the policies as an SVG string."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
    for name in ("text_loss", "action_loss", "state_loss"):
        left.plot([e["step"] for e in log], [e[name] for e in log], label=name.replace("_", " "))
    for method, curve in curves.items():
        steps, losses = np.array(curve).T
        right.plot(steps, losses, label=method)
    for axes, title in ((left, "grounding"), (right, "offline RL")):
        axes.set(title=title, xlabel="step", ylabel="loss", yscale="log")
        axes.legend(fontsize=7)
    return to_svg(figure)


def to_svg(figure):
    picture = io.StringIO()
    figure.savefig(picture, format="svg", bbox_inches="tight", transparent=False, metadata={"Date": None})
    plt.close(figure)
    text = picture.getvalue()
    return text[text.index("<svg"):]


def gallery(options, per_level=2):
    """For each level, imagined rollouts that met their goal and that did not, beside their execution in the physics."""
    cells = []
    for level, (records, _) in imagined_rollouts(options).items():
        met, missed = (sorted((r for r in records if r["success"] == good), key=lambda r: len(r["actions"]) > 12) for good in (True, False))
        for record in met[:per_level] + missed[:1]:
            start = env.state_from_observation(record["observations"][:1])
            played, = env.run_episodes(rollout.replay([record["actions"]]), [env.goal_of(record)], start, len(record["actions"]))
            pictures = "".join(f'<figure><img alt="{what} rollout" src="data:image/gif;base64,{gif_base64(r)}">'
                               f"<figcaption>{what}: {'goal met' if r['success'] else 'goal missed'}</figcaption></figure>"
                               for what, r in (("imagined", record), ("executed", played)))
            cells.append(f'<article><p><b>{level}</b> {html.escape(record["goal"])}</p><div class="pair">{pictures}</div></article>')
    return "\n".join(cells)


def gif_base64(record):
    picture = io.BytesIO()
    env.save_gif(picture, record, size=180)
    return base64.b64encode(picture.getvalue()).decode()


def html_table(header, rows):
    line = "".join
    return (f"<table><tr>{line(f'<th>{html.escape(str(c))}</th>' for c in header)}</tr>"
            + line(f"<tr>{line(f'<td>{html.escape(str(c))}</td>' for c in row)}</tr>" for row in rows) + "</table>")


def report(options, state):
    """Everything worth seeing in one self-contained page -> report.html; the table on the terminal."""
    if not state.is_main_process:
        return
    run = options.run
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    metrics = json.loads((run / "grounded" / "metrics.json").read_text(encoding="utf-8"))
    curves = json.loads((run / "policies" / "curves.json").read_text(encoding="utf-8"))
    levels = [level for level in env.LEVELS if level in next(iter(results["success"].values()))]
    success = html_table(["method", *levels], [
        [method, *(f"{row[v]['mean']:.3f} ± {row[v]['std']:.3f}" for v in levels)] for method, row in results["success"].items()])
    names = sorted({name for figures in results["quality"].values() for name in figures})
    quality = html_table(["imagined rollouts", *names], [
        [level, *(f"{figures[n]:.3f}".removesuffix(".000") if n in figures else "" for n in names)]
        for level, figures in results["quality"].items()])
    grounding = html_table(["held-out rollouts", "value"], [[k, f"{v:.3f}"] for k, v in results["grounding"].items()])
    settings = html_table(["option", "value"], results["config"].items())
    times = html_table(["stage", "seconds"], [[k, f"{v:.0f}"] for k, v in results["time_s"].items()])
    episodes = max(row[levels[0]]["episodes"] for row in results["success"].values())
    page = PAGE.format(bars=success_figure(results), curves=curves_figure(metrics["log"], curves), success=success, quality=quality,
                       grounding=grounding, settings=settings, times=times, gallery=gallery(options), episodes=episodes)
    aside = run / "report.html.partial"
    aside.write_text(page, encoding="utf-8")
    aside.replace(run / "report.html")
    print("\n".join(["", *results_table(results), "", f"success rates, {episodes} episodes a cell (llm: one seed of them), +- standard "
                     f"deviation over seeds; more in {run / 'report.html'}"]))


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>KALM run</title><style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0; font-size: .85rem; }}
th, td {{ padding: .2rem .6rem; border-bottom: 1px solid #8886; text-align: right; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
svg {{ max-width: 100%; height: auto; background: #fff; }}
.pair {{ display: flex; gap: .5rem; }} figure {{ margin: 0; }} img {{ width: 100%; max-width: 180px; }}
.gallery {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem; font-size: .85rem; }}
</style></head><body>
<h1>KALM run</h1>
<h2>Success</h2><p>{episodes} episodes a cell, mean and standard deviation over seeds.</p>{bars}{success}
<h2>Imagination</h2><p>match: the imagined rollout meets its goal. executed: its actions meet the goal in the physics.</p>{quality}
<div class="gallery">{gallery}</div>
<h2>Grounding</h2>{grounding}
<h2>Learning curves</h2>{curves}
<h2>Options</h2>{settings}<h2>Time</h2>{times}
</body></html>
"""

# ------------------------------------------------------------------------------------------------------------------
# The command

RUN_STAGE = {**dict(zip(STAGES, (collect, ground_llm, imagine, learn, evaluate, report))), "act": act}


def print_plan(options, todo):
    """Sizes and a rough time before a long run; the rates are those of two CPU cores and SmolLM2."""
    layers = (options.keep_layers or 30) / 8 if options.llm != "tiny" else 0.02
    policies, goals = len([m for m in options.methods.split(",") if m != "llm"]), options.novel_goals * options.starts_per_goal
    rounds, step_starts = len(options.temperatures.split(",")), options.novel_goals * options.step_starts
    actions = goals * 1.2 * options.max_steps * (rounds + 1) / 2 + step_starts * (2 + options.step_tries / 20)
    rollouts = goals * rounds + 2 * step_starts
    seconds = {
        "collect": options.train_goals * options.rollouts_per_goal * 2.7e-3,
        "ground": 20 + (options.adapter_steps if options.adapter else options.ground_steps) * options.batch_examples / 32 * 0.9 * layers,
        "imagine": actions * 0.0016 * layers + options.self_check * rollouts * 0.02 * layers,
        "learn": options.rl_steps * options.rl_batch / 256 * options.seeds / 3 * 0.01 * policies,
        "evaluate": options.episodes * (options.seeds * 0.037 * policies + 0.15 * layers), "report": 10, "act": 20}
    print(f"KALM, scale {options.scale}, {options.llm} -> {options.run}")
    for stage in options.stages:
        sizes = ", ".join(f"{o.name} {getattr(options, o.name)}" for o in OPTIONS if o.stage == stage and getattr(options, o.name) != "")
        estimate = "done before" if stage not in todo else "" if torch.cuda.is_available() else f"~{max(1, round(seconds[stage] / 60))} min"
        print(f"  {stage:9}{estimate:12}{sizes}")


def main(arguments=None):
    """Run the stages that a command line asks for. Returns the exit code: 0, or 2 after a message about bad input."""
    debug = "--debug" in (sys.argv if arguments is None else arguments)
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    try:
        options = parse_options(arguments)
        novel_goals(options)
        check_run_folder(options)
        if options.adapter and "ground" in options.stages:
            adapter_folder(options)
        if not (options.dry_run and llm_source.must_be_fetched(options.llm)):
            options.llm_path = llm_source.resolve(options.llm)
            llm_source.check_layers(options.llm_path, options.keep_layers, "--keep_layers")
            llm_source.check_layers(options.llm_path, options.fresh_layers, "--fresh_layers", options.keep_layers)
            llm_source.check_layers(options.llm_path, options.encoder_layers, "--encoder_layers")
            if options.encoder != "llm":
                llm_source.resolve(options.encoder, "--encoder")
        run_stages(options)
    except (ValueError, OSError) as error:
        if debug:
            raise
        print(f"kalm: {error}", file=sys.stderr)
        return 2
    return 0


def run_stages(options):
    state = PartialState(cpu=not torch.cuda.is_available())
    options.bf16 = options.llm != "tiny" and bf16_is_fast()
    manifest, todo, upstream = read_manifest(options.run), [], set()
    for stage in options.stages:
        record = manifest["stages"].get(stage)
        if options.force or upstream & set(READS[stage]) or not record or record["fingerprint"] != fingerprint(stage, options, manifest):
            todo.append(stage)
            upstream.add(stage)
    if state.is_main_process:
        print_plan(options, todo)
    if options.dry_run:
        return
    options.run.mkdir(parents=True, exist_ok=True)
    state.wait_for_everyone()  # all processes have read the manifest before the first stage changes it
    for stage in todo:
        started = time.time()
        if state.is_main_process:
            print(f"{stage} ...", flush=True)
        transformers.set_seed(options.seed)
        RUN_STAGE[stage](options, state)
        state.wait_for_everyone()
        if state.is_main_process and stage in STAGES:
            manifest = read_manifest(options.run)
            manifest["stages"][stage] = {"fingerprint": fingerprint(stage, options, manifest),
                                         "options": stage_options(stage, options), "time_s": round(time.time() - started, 1)}
            ground.write_json(options.run / "manifest.json", manifest)
            if stage == "evaluate":
                path = options.run / "results.json"
                results = json.loads(path.read_text(encoding="utf-8"))
                results["time_s"] = {s: manifest["stages"][s]["time_s"] for s in STAGES if s in manifest["stages"] and s != "report"}
                ground.write_json(path, results)
            config_file.remember(options, OPTIONS, [s for s in STAGES if s in manifest["stages"]])
            logs.write_line(options.run / "logs" / "stages.jsonl", stage=stage, time_s=manifest["stages"][stage]["time_s"])
            print(f"{stage} took {time.time() - started:.0f} s", flush=True)
        state.wait_for_everyone()
    if not todo and state.is_main_process and (options.run / "results.json").is_file():
        print("nothing to do: every stage is done and unchanged (--force redoes them)")
        print("\n".join(results_table(json.loads((options.run / "results.json").read_text(encoding="utf-8")))))


def bf16_is_fast():
    """Whether this machine multiplies bfloat16 faster than float32: GPUs since Ampere, CPUs with AVX512-BF16 or AMX."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


if __name__ == "__main__":
    sys.exit(main())
