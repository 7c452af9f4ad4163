"""KALM from start to end: collect, ground, imagine, learn, evaluate, report (Pang et al., NeurIPS 2024).

    python kalm.py --scale cpu                        everything, on this machine
    accelerate launch kalm.py --stage all             the same, on all its GPUs

Each stage is a function of files to files in --output_dir; what is done and unchanged is skipped. This file knows the
order of the stages and their options; what a stage does is in env, ground, rollout and rl, the report's page in
data/report.py.
"""
import argparse
import collections
import hashlib
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from data import store

if __name__ == "__main__":
    store.stop_cleanly()  # before the imports below, which take seconds
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from accelerate import PartialState  # noqa: E402
from accelerate.utils import gather_object  # noqa: E402

import env  # noqa: E402
import ground  # noqa: E402
import rl  # noqa: E402
import rollout  # noqa: E402
from data import account, card, formats, logs, sentences  # noqa: E402
from data import config as config_file  # noqa: E402
from data import llm as llm_source  # noqa: E402
from data import report as report_page  # noqa: E402
from data.manifest import check_files, keep_unfinished, note_stage, open_run, read_manifest  # noqa: E402
from model import TASKS, KalmForRollouts  # noqa: E402

STAGES = ("collect", "ground", "imagine", "learn", "evaluate", "report")
WRITES = {"collect": ("rollouts/real",), "ground": ("grounded",), "learn": ("policies",), "evaluate": ("results.json",),
          "imagine": ("rollouts/rephrase", "rollouts/easy", "rollouts/hard", "quality.json"), "report": ("report.html",)}
READS = {"collect": (), "ground": ("collect",), "imagine": ("collect", "ground"), "learn": ("collect", "imagine"),
         "evaluate": ("ground", "learn"), "report": ("ground", "imagine", "learn", "evaluate"), "act": ("ground", "learn")}
METHODS = (*(f"{algorithm}{source}" for algorithm in ("bc", "cql", "iql") for source in ("", "+relabel", "+kalm", "+both")), "llm")
DEFAULT_METHODS = tuple(",".join(m for m in METHODS if not any(w in m for w in left_out)) for left_out in (("iql", "both"), ("iql",)))
SCALES = ("smoke", "cpu", "gpu", "paper")
RELEASED = Path(__file__).resolve().parent / "data" / "adapter"

# ------------------------------------------------------------------------------------------------------------------
# Options


@dataclass(frozen=True)
class Option:
    """A command-line option of a stage; `values` holds defaults for SCALES, the last one for the rest of them."""
    name: str
    stage: str
    values: tuple
    help: str

    def default(self, scale):
        return self.values[min(SCALES.index(scale), len(self.values) - 1)]


OPTIONS = (
    Option("train_goals", "collect", (40, 6000, 16000, 16000), "goal sentences in the offline data"),
    Option("rollouts_per_goal", "collect", (4, 6, 6, 6), "expert rollouts tried for each of them"),
    Option("data", "collect", ("",), "your rollouts instead of the expert's: dataset folder, .npy, .npz"),
    Option("llm", "ground", ("tiny", "smollm2", "smollm2", "meta-llama/Llama-2-7b-chat-hf"), "smollm2, tiny, folder, .gguf, Hub name"),
    Option("keep_layers", "ground", (0, 6, 0, 0), "first layers of the LLM to keep; 0: all"),
    Option("fresh_layers", "ground", (0,), "so many of them, the last, start from random weights"),
    Option("random_weights", "ground", (0,), "1: forget the LLM's pre-trained weights first"),
    Option("lora_rank", "ground", (0, 64, 0, 0), "of the LoRA adapters to tune; 0: tune all weights"),
    Option("adapter", "ground", ("", "released", "", ""), "trained one to take: released (data/adapter) or a folder; '': train"),
    Option("adapter_steps", "ground", (0,), "gradient steps to train that adapter on"),
    Option("tasks", "ground", ("dynamics,explanation,generation,consequence",), "grounding tasks, with commas between; also: description"),
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
    Option("candidates", "imagine", (3, 8, 8, 1), "actions to look ahead at in each step of later rounds"),
    Option("step_candidates", "imagine", (4, 40, 40, 1), "the same for goals of one action"),
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
    Option("imaginary_share", "learn", (0.2, 0.2, 0.2, 0.5), "of each batch"),
    Option("methods", "learn", DEFAULT_METHODS,
           "to learn and evaluate; bc, cql, iql with +relabel, +kalm, +both; llm"),
    Option("seeds", "learn", (2, 3, 3, 3), "policies for each method"),
    Option("episodes", "evaluate", (6, 200, 400, 400), "for each method, level and seed"),
    Option("episode_steps", "evaluate", (10, env.MAX_STEPS, env.MAX_STEPS, env.MAX_STEPS), "actions in an episode at most"),
    Option("export", "report", ("none",), "rollouts in other formats: npz, minari or both"),
)
TYPES = {"stage": list, "goal": str, "output_dir": str, "scale": str, "seed": int, "checkpoint_minutes": float,
         **{o.name: type(o.values[0]) for o in OPTIONS}}


def parse_options(arguments):
    """The options of a command line, then of its config file, then the defaults of its scale. Raises ValueError for a bad one."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], allow_abbrev=False, usage="%(prog)s [options]", add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, 2, 25, min(max(shutil.get_terminal_size().columns, 80), 120)))
    parser.error = refuse_arguments
    add = parser.add_argument_group("the run").add_argument
    add("--stage", nargs="+", default=["all"], metavar="", help=f"one or more of {', '.join(STAGES)}; all of these (default); or act")
    add("--goal", metavar="", help="for --stage act: a sentence to act on in the environment, once")
    add("--output_dir", "--run", default="runs/kalm", metavar="", help="the run's folder (runs/kalm)")
    add("--config", metavar="", help="YAML or JSON file of options, as a run's config.yaml; the command line wins")
    add("--scale", default="gpu" if torch.cuda.is_available() else "cpu", metavar="", help="one dial: smoke, cpu, gpu, paper (gpu, or cpu)")
    add("--seed", type=int, default=0, metavar="", help="of everything random (0)")
    add("--checkpoint_minutes", type=float, default=5.0, metavar="", help="between checkpoints; 0: each step (5)")
    for flag, does in (("dry_run", "print the plan, write nothing"), ("force", "redo the stages even if nothing changed"),
                       ("debug", "show the traceback of an error")):
        add(f"--{flag}", action="store_true", help=does)
    add("--help", action="help", help="show this")
    for stage in STAGES:
        group = [o for o in OPTIONS if o.stage == stage]
        section = parser.add_argument_group(f"{stage} (defaults: {' / '.join(SCALES)}; the last holds for the rest)") if group else None
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
    of_grounding = {o.name for o in OPTIONS if o.stage == "ground"} - {"adapter_steps", "report_to"}
    options.adapter_is_settled = "ground" in options.stage or bool(getattr(options, "data", "")) or any(hasattr(options, n) for n in of_grounding)
    if options.adapter_is_settled and not hasattr(options, "adapter"):
        options.adapter = ""
    for option in OPTIONS:
        vars(options).setdefault(option.name, option.default(options.scale))
    vars(options).update(config_file.absolute_paths(vars(options)))
    check_values(options)
    options.stages = [s for s in (*STAGES, "act") if s in options.stage or "all" in options.stage and s != "act"]
    options.run, options.start_seed = Path(options.output_dir), options.seed
    logs.check_trackers(options.report_to, options.run / "logs")
    return options


def check_values(options):
    """Raise ValueError for an option whose value is out of range, or contradicts that of another."""
    for option in OPTIONS:
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
    if options.adapter_steps and not options.adapter:
        raise ValueError(f"--adapter_steps {options.adapter_steps} trains an adapter on; name one, --adapter released or a folder")
    if not options.self_check and (options.keep in ("explained", "both") or options.dynamics_tolerance):
        raise ValueError(f"--keep {options.keep} with --dynamics_tolerance {options.dynamics_tolerance} needs --self_check 1")
    if options.imaginary_share >= 1:
        raise ValueError(f"--imaginary_share must be below 1, got {options.imaginary_share}: some of each batch is real")
    sources = len(env.NOVEL_LEVELS) * (("+" in options.methods) + ("+both" in options.methods))
    if 0 < options.imaginary_share and (imaginary := round(options.rl_batch * options.imaginary_share)) < sources:
        raise ValueError(f"--rl_batch times --imaginary_share is {imaginary} of a batch, for {sources} sources (levels, twice in +both); raise one")
    if options.visited_share > 1:
        raise ValueError(f"--visited_share must be at most 1, got {options.visited_share}")
    if max(options.candidates, options.step_candidates) > env.NUM_ACTIONS:
        raise ValueError(f"--candidates and --step_candidates are at most {env.NUM_ACTIONS}, the number of actions")
    for name in ("seed", "checkpoint_minutes"):
        if not getattr(options, name) >= 0:
            raise ValueError(f"--{name} must be at least 0, got {getattr(options, name)}")
    try:
        temperatures = [float(t) for t in options.temperatures.split(",")]
    except ValueError:
        temperatures = [-1]
    if not all(0 <= t < float("inf") for t in temperatures):
        raise ValueError(f"--temperatures takes numbers from 0 on with commas between, got {options.temperatures!r}")


def refuse_arguments(message):
    raise ValueError(f"{message}; `kalm.py --help` lists the options")


CHOICES = {"split": ("validation", "test"), "keep": ("matched", "explained", "both", "all"), "tasks": TASKS,
           "methods": METHODS, "export": ("none", "npz", "minari"), "report_to": logs.TRACKERS}
SWITCHES = ("random_weights", "self_check", "balance_goals")
MAY_BE_ZERO = ("keep_layers", "fresh_layers", "lora_rank", "adapter_steps", "encoder_layers", "kept_per_goal", *SWITCHES)


def check_run_folder(options):
    """Refuse a folder that is not a KALM run, and stages whose input is missing or made otherwise. Writes nothing."""
    run = options.run
    if run.exists() and not run.is_dir():
        raise ValueError(f"--output_dir {run} is a file; give a folder")
    if run.is_dir() and {p.name for p in run.iterdir()} - store.FIRST_FILES and not (run / "manifest.json").is_file():
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

def stage_options(stage, options):
    """The options that a stage's result follows from; a goals file, --data and an adapter count by their content."""
    own = {o.name: getattr(options, o.name) for o in OPTIONS if o.stage == stage and o.name != "report_to"}
    if own.get("goals"):
        own["goals"] = store.sha256(options.goals)
    if own.get("data"):
        own["data"] = formats.content_hash(options.data)
    if own.get("adapter"):
        files = (adapter_folder(options) / name for name in ("adapter_model.safetensors", "new_layers.safetensors"))
        own["adapter_sha256"] = [store.sha256(path) for path in files if path.is_file()]
    return {"seed": options.seed, **own}


def fingerprint(stage, options, manifest):
    """Hash of what a stage's result follows from: its options, and the fingerprints of the stages it reads."""
    read = {name: manifest["stages"].get(name, {}).get("fingerprint") for name in READS[stage]}
    return hashlib.sha256(json.dumps([stage, stage_options(stage, options), read], sort_keys=True).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------------
# Stages

def collect(options, state):
    """Expert rollouts of training goals, or those of --data, the successful ones kept -> rollouts/real."""
    if not state.is_main_process:
        return
    if options.data:
        kept, sentence = formats.read_offline(options.data, options.seed)
        print(f"  {sentence}")
        rollout.write_rollouts(options.run / "rollouts" / "real", kept)
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
    weights, moments = 4 * model.num_parameters(), 8 * model.num_parameters(only_trainable=True)
    if steps:
        with store.room_for(2 * (weights + moments), options.work, "stage 'ground'"):  # the last checkpoint stays until the next is done
            log = ground.train(
                model, tokenizer, records, options.run / "logs", steps=steps, batch_examples=options.batch_examples,
                learning_rate=options.learning_rate, new_learning_rate=options.new_learning_rate, bf16=options.bf16,
                tasks=options.tasks.split(","), copies=options.renamed_copies, seed=options.seed, report_to=options.report_to,
                checkpoints=options.work, checkpoint_minutes=options.checkpoint_minutes)
        model = ground.gathered(model)
        before = metrics["log"][-1]["step"] if metrics["log"] else 0
        metrics = {"log": metrics["log"] + [{**entry, "step": before + entry["step"]} for entry in log if "loss" in entry]}
    if not state.is_main_process:
        return
    is_measured = steps or options.data  # else the adapter's own figures stand
    if is_measured:
        model.to(state.device)
        with torch.autocast(state.device.type, torch.bfloat16, enabled=options.bf16):
            metrics.update(ground.evaluate(model, tokenizer, held_out))
            for name, prompt in (("explanation", ground.PROMPTS["explanation"]), ("unseen_prompt", ground.UNSEEN_PROMPT)):
                figures = rollout.explanation_accuracy(held_out, rollout.explain(model, tokenizer, held_out, prompt))
                metrics.update({f"{name}_{k}": v for k, v in figures.items()})
    print(f"  held-out rollouts{'' if is_measured else ' of its training'}: " + ", ".join(f"{k} {v:.3f}" for k, v in metrics.items() if k != "log"))
    with store.room_for(weights, options.run, "stage 'ground'"), store.replacing(options.run / "grounded") as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        if model.config.lora_rank and steps:
            (aside / "adapter").mkdir()
            model.save_adapter(aside / "adapter")
            store.write_json(aside / "adapter" / "metrics.json", metrics)
        store.write_json(aside / "metrics.json", metrics)
        card.write(aside, metrics, options, model.config, (len(records), len(held_out)))


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
    model, tokenizer = llm_source.load_grounded(options.run / "grounded")
    model.merge_adapters()
    if options.bf16:
        model.backbone.to(torch.bfloat16)
    return model.to(state.device).eval(), tokenizer


def imagine(options, state):
    """Imagined rollouts for the novel goals, each level judged -> rollouts/<level>, quality.json."""
    model, tokenizer = load_grounded(options, state)
    visited = np.concatenate([r["observations"][:-1] for r in split_real(options)[0]])
    goals = novel_goals(options)
    goals["offline"] = env.sample_goals("offline", "train", options.novel_goals, np.random.default_rng([options.seed, 2]))
    figures, made = {}, {}
    for number, (level, level_goals) in enumerate(goals.items()):
        with torch.autocast(state.device.type, torch.bfloat16, enabled=options.bf16):
            rounds = imagine_level(options, state, model, tokenizer, level, level_goals, visited, [options.seed, 3, number],
                                   options.work)
        if state.is_main_process:
            figures[level], made[level] = rollout.quality(rounds[0]), sum(rounds, [])
            print(f"  {level:9}" + "  ".join(f"{k} {v:.3f}" for k, v in figures[level].items() if k != "rollouts"))
    if state.is_main_process:
        for level in env.NOVEL_LEVELS:
            if level in made:
                rollout.write_rollouts(options.run / "rollouts" / level, made[level])
            else:
                store.remove(options.run / "rollouts" / level)
        store.write_json(options.run / "quality.json", figures)


def imagine_level(options, state, model, tokenizer, level, goals, visited, seed, work):
    """Rounds of imagining, one a temperature: the first from every start, each later one from the starts without a match.

    Later rounds look ahead: of several actions that the model would take, the reward picks the one with the best imagined outcome.
    So what is kept is spread over goals and starts as the starts are, not as the model's luck is. Goals of level offline, for
    comparison, have one start and one round each. A finished round is kept in the folder `work`, and read from
    there the next time. Returns records by round.
    """
    rng, rounds = np.random.default_rng(seed), []
    repeats = {"offline": 1, "easy": options.step_starts}.get(level, options.starts_per_goal)
    goals = [goal for goal in goals for _ in range(repeats)]
    starts = env.observe(env.unfulfilled_states(rng, goals))
    if level != "offline":
        elsewhere = rng.random(len(goals)) < options.visited_share
        starts[elsewhere] = env.unfulfilled_observations(rng, goals, visited)[elsewhere]
    rows = np.arange(len(goals))
    candidates = np.array([options.step_candidates if goal.kind == "step" else options.candidates for goal in goals])
    for number, temperature in enumerate(map(float, options.temperatures.split(",")[:1 if level == "offline" else None])):
        mine, draws, kept = rows[state.process_index::state.num_processes], int(rng.integers(2 ** 31)), work / f"{level}-{number}"
        if store.is_sealed(kept):
            part = rollout.read_rollouts(kept)
        else:
            part = rollout.generate_all(
                model, tokenizer, [goals[i] for i in mine], starts[mine], temperature=temperature, max_steps=options.max_steps,
                candidates=candidates[mine] if number else 1, seed=draws + state.process_index, description=f"imagine {level}")
            if options.self_check or any(goal.kind == "unknown" for goal in goals):
                for record, text, error in zip(part, rollout.explain(model, tokenizer, part), rollout.dynamics_error(model, tokenizer, part)):
                    record.update(explanation=text, dynamics_error=error)
            part = [r for _, r in sorted(gather_object(list(zip(mine, part))), key=lambda pair: pair[0])]
            if state.is_main_process:
                rollout.write_rollouts(kept, part)
                store.seal(kept)
        rounds.append(part)
        rows = rows[[not is_wanted(r, "matched") for r in part]]
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
    real, held_out = split_real(options)
    imagined = {level: kept for level, (_, kept) in imagined_rollouts(options).items()}
    goals = novel_goals(options)
    rng = np.random.default_rng([options.seed, 4])
    relabelled = {level: rl.relabel(real, goals[level], len(kept), rng) for level, kept in imagined.items()}
    table = rl.GoalTable.encode([r["goal"] for r in real], [*(g.text for level in goals.values() for g in level),
                                *(r["goal"] for r in held_out)], *load_encoder(options, state))
    both = {f"{name} {level}": rows for name, of in (("relabelled", relabelled), ("imagined", imagined)) for level, rows in of.items()}
    sources = {"": {}, "relabel": relabelled, "kalm": imagined, "both": both}
    if state.is_main_process:
        print(f"  rollouts to learn from: real {len(real)}" + "".join(
            f"; {name} " + ", ".join(f"{level} {len(rows)}" for level, rows in sources[name].items()) for name in ("relabel", "kalm")))
    config = rl.RLConfig(steps=options.rl_steps, batch=options.rl_batch, lr=options.rl_learning_rate,
                         conservative_weight=options.conservative_weight, imaginary_share=options.imaginary_share, bf16=options.bf16)
    buffer = rl.Buffer(real, table, state.device)
    seeds, curves = list(range(options.seeds)), []
    methods = [m for m in options.methods.split(",") if m != "llm"]
    for method in methods[state.process_index::state.num_processes]:
        algorithm, _, source = method.partition("+")
        extra = [rl.Buffer(rows, table, state.device, balanced=bool(options.balance_goals), dynamics_tolerance=options.dynamics_tolerance)
                 for rows in sources[source].values() if rows]
        extra = [imaginary for imaginary in extra if len(imaginary)]
        log = logs.Curve(options.run / "logs", f"rl_{method}", options.report_to)
        network, curve = rl.learn(algorithm, buffer, extra, table.table, [options.seed + s for s in seeds], config, description=method,
                                  snapshots=options.work, snapshot_minutes=options.checkpoint_minutes, log=log.log)
        log.finish()
        rl.save_policy(options.work / f"{method}.safetensors", network, seeds, method, config)
        curves.append((method, curve))
    curves = dict(gather_object(curves))
    if state.is_main_process:
        with store.replacing(options.run / "policies") as aside:
            aside.mkdir()
            table.save(aside / "goals.safetensors")
            for method in methods:
                shutil.copy(options.work / f"{method}.safetensors", aside)
            store.write_json(aside / "curves.json", {m: [entry[:2] for entry in curves[m]] for m in methods})
            store.write_json(aside / "gradient_norms.json", {m: [(step, norm) for step, _, norm in curves[m]] for m in methods})


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
    store.write_json(options.run / "results.json", {
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
        with torch.autocast(state.device.type, torch.bfloat16, enabled=options.bf16):
            record["explanation"], = rollout.explain(model, tokenizer, [record])
        print(account.write(options.run, goal, method, record, rollout.explanation_fits(record), options.start_seed))


# ------------------------------------------------------------------------------------------------------------------
# Report

def report(options, state):
    """Everything worth seeing in one self-contained page -> report.html; the table on the terminal."""
    if state.is_main_process:
        results = report_page.write(options.run, {level: records for level, (records, _) in imagined_rollouts(options).items()})
        if options.export != "none":
            table = rl.GoalTable.load(options.run / "policies" / "goals.safetensors")
            formats.export(options.run, options.export.split(","), lambda texts: table.table[table.rows(texts)])
            print(f"  rollouts written to {options.run / 'export'}")
        episodes = max(cell["episodes"] for row in results["success"].values() for cell in row.values())
        print("\n".join(["", *report_page.results_table(results), "", f"success rates, {episodes} episodes a cell (llm: one seed of them), "
                         f"+- standard deviation over seeds; more in {options.run / 'report.html'}"]))


# ------------------------------------------------------------------------------------------------------------------
# The command

RUN_STAGE = {**dict(zip(STAGES, (collect, ground_llm, imagine, learn, evaluate, report))), "act": act}


def print_plan(options, todo):
    """Sizes and a rough time before a long run; the rates are those of two CPU cores and SmolLM2."""
    layers = (options.keep_layers or 30) / 8 if options.llm != "tiny" else 0.02
    policies, goals = len([m for m in options.methods.split(",") if m != "llm"]), options.novel_goals * options.starts_per_goal
    rounds, step_starts = len(options.temperatures.split(",")), options.novel_goals * options.step_starts
    actions = goals * 1.2 * options.max_steps * (rounds + 1) / 2 + step_starts * (2 + options.step_candidates / 20)
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
        if options.data and "collect" in options.stages:
            formats.read_offline(options.data, options.seed)
        if "minari" in options.export:
            formats.hdf5()
        if not (options.dry_run and llm_source.must_be_fetched(options.llm)):
            options.llm_path = llm_source.resolve(options.llm)
            llm_source.check_layers(options.llm_path, options.keep_layers, "--keep_layers")
            llm_source.check_layers(options.llm_path, options.fresh_layers, "--fresh_layers", options.keep_layers)
            llm_source.check_layers(options.llm_path, options.encoder_layers, "--encoder_layers")
            if options.encoder != "llm":
                llm_source.resolve(options.encoder, "--encoder")
        state = PartialState(cpu=not torch.cuda.is_available())
        with store.locked(options.run, state.is_main_process and not options.dry_run):
            run_stages(options, state)
    except (ValueError, OSError, FloatingPointError) as error:
        if debug:
            raise
        print(f"kalm: {error}", file=sys.stderr)
        return 2
    return 0


def bytes_to_write(stage, options):
    """About what a stage writes; ground says more when it knows its model."""
    rounds, goals = len(options.temperatures.split(",")), options.novel_goals * (3 * options.starts_per_goal + options.step_starts)
    return {"collect": 8e3 * options.train_goals * options.rollouts_per_goal, "imagine": 2 * rounds * goals * (300 + 60 * options.max_steps),
            "learn": 6e6 * options.seeds * len(options.methods.split(",")), "report": 5e6}.get(stage, 1e6)


def run_stages(options, state):
    options.bf16 = options.llm != "tiny" and bf16_is_fast()
    if state.is_main_process and not options.dry_run:
        open_run(options.run)
    state.wait_for_everyone()
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
    for number, stage in enumerate(todo):
        started, manifest = time.time(), read_manifest(options.run)
        options.work = options.run / "unfinished" / f"{stage}-{fingerprint(stage, options, manifest)}"
        if state.is_main_process:
            print(f"{stage} ...", flush=True)
            check_files(options.run, manifest, set(READS[stage]) - set(todo[:number]))
            if stage in STAGES:  # `act` has nothing to go on from, and leaves what others have
                keep_unfinished(options.work, anew=options.force)
        state.wait_for_everyone()
        transformers.set_seed(options.seed)
        with store.room_for(bytes_to_write(stage, options), options.run, f"stage {stage!r}"):
            RUN_STAGE[stage](options, state)
            state.wait_for_everyone()
            if state.is_main_process and stage in STAGES:
                finish_stage(stage, options, manifest, time.time() - started)
        if state.is_main_process:
            print(f"{stage} took {time.time() - started:.0f} s", flush=True)
        state.wait_for_everyone()
    if not todo and state.is_main_process and (options.run / "results.json").is_file():
        check_files(options.run, manifest, ["evaluate"])
        print("nothing to do: every stage is done and unchanged (--force redoes them)")
        print("\n".join(report_page.results_table(json.loads((options.run / "results.json").read_text(encoding="utf-8")))))


def finish_stage(stage, options, manifest, seconds):
    """Note in the manifest that a stage is done, and from what; results.json also tells the seconds of all stages."""
    record = {"fingerprint": fingerprint(stage, options, manifest), "options": stage_options(stage, options), "time_s": round(seconds, 1)}
    if stage == "evaluate":
        path, done = options.run / "results.json", {**manifest["stages"], stage: record}
        results = json.loads(path.read_text(encoding="utf-8"))
        store.write_json(path, {**results, "time_s": {s: done[s]["time_s"] for s in STAGES if s in done and s != "report"}})
    note_stage(options.run, manifest, stage, record, WRITES[stage])
    config_file.remember(options, OPTIONS, [s for s in STAGES if s in manifest["stages"]])
    logs.write_line(options.run / "logs" / "stages.jsonl", stage=stage, time_s=record["time_s"])


def bf16_is_fast():
    """Whether this machine multiplies bfloat16 faster than float32: GPUs since Ampere, CPUs with AVX512-BF16 or AMX."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


if __name__ == "__main__":
    sys.exit(main())
