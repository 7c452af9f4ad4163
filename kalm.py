"""KALM from start to end: collect, ground, imagine, learn, evaluate, report (NeurIPS 2024).

    python kalm.py --scale cpu                 everything, on this machine
    accelerate launch kalm.py --stage all      the same, on all its GPUs

Each stage is a function of files to files in --output_dir; what is done and unchanged is skipped.
This file is the method in the paper's order; its steps work in ground, rollout, rl, dt and env.
"""

import os
import sys

if sys.version_info < (3, 11):  # noqa: UP036, said before an import fails for it
    sys.exit(f"kalm: Python 3.11 to 3.13 is needed, this is {sys.version.split()[0]}")
from experiment import folder

if __name__ == "__main__":
    folder.stop_cleanly()  # before the imports below, which take seconds
    if os.environ.get("LOCAL_RANK", "0") != "0":
        os.environ["TQDM_DISABLE"] = "1"  # one bar is enough
    sys.stdout.reconfigure(errors="replace")  # goals may have characters that a terminal lacks
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait must not spin

import gc
import itertools
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object

import dt
import env
import ground
import rl
import rollout
from data import formats, grounded, llm
from data.rollouts import write_rollouts
from data.sources import by_source, kept_rollouts
from data.transitions import Buffer, GoalTable
from experiment import card, command, episode, launch, logs, memory, quality, report, words
from experiment.evaluation import EvaluateArguments, Evaluation, play_llm, read_policy, trials
from experiment.grounding import figures_on_the_way, grounding_figures, longer_log
from experiment.processes import in_batches
from experiment.report import ReportArguments
from experiment.run import Run
from experiment.settings import SettingsParser, absolute, at_least, help_text, is_on, parse, setting
from experiment.stages import Plan, Stage, do
from experiment.world_check import check_world
from explain import explain
from ground import GroundingArguments
from model import KalmForRollouts
from rl import LearnArguments
from rollout import ImagineArguments

# ----------------------------------------------------------------------------------------------
# Settings: one dial, and those of the stages that are short enough to be written here

SCALES = {  # what differs from the settings' own defaults, which are those of a laptop
    "smoke": {
        "llm": "tiny", "train_goals": 40, "rollouts_per_goal": 4, "keep_layers": 0, "lora_rank": 0,
        "max_steps": 8, "per_device_train_batch_size": 8, "learning_rate": 1e-3,
        "new_learning_rate": 1e-3, "logging_steps": 1, "save_steps": 4, "novel_goals": 6,
        "starts_per_goal": 2, "step_starts": 2, "temperatures": "1,1.3", "candidates": 3,
        "step_candidates": 4, "self_check": True, "imagined_steps": 4, "keep": "all",
        "encoder_layers": 0, "rl_steps": 60, "rl_batch": 64, "rl_of_goal": 2,
        "conservative_weight": 1.0, "seeds": 2, "rl_snapshot_steps": 20, "curve_points": 2,
        "last_checkpoints": 2, "methods": "bc,bc+relabel,bc+kalm,cql,cql+relabel,cql+kalm,dt,llm",
        "episodes": 6, "episode_steps": 10, "curve_episodes": 4,
    },
    "quick": {
        "train_goals": 1200, "novel_goals": 40, "starts_per_goal": 6, "step_starts": 10,
        "rl_steps": 3000, "seeds": 1, "curve_points": 0, "last_checkpoints": 1, "episodes": 50,
        "methods": "bc,bc+relabel,bc+kalm,llm", "adapter": "released",
    },
    "cpu": {"adapter": "released"},
    "gpu": {
        "train_goals": 16000, "keep_layers": 0, "lora_rank": 0, "max_steps": 6000,
        "per_device_train_batch_size": 64, "new_learning_rate": 1e-3, "save_steps": 500,
        "novel_goals": 480, "starts_per_goal": 20, "self_check": True, "imagined_steps": 50,
        "rl_steps": 30000, "episodes": 400,
    },
    "paper": {
        "llm": "meta-llama/Llama-2-7b-chat-hf", "train_goals": 16000, "keep_layers": 0,
        "lora_rank": 0, "num_train_epochs": 10.0, "per_device_train_batch_size": 24,
        "learning_rate": 2e-5, "new_learning_rate": 1e-3, "save_steps": 500, "novel_goals": 480,
        "starts_per_goal": 50, "step_starts": 50, "temperatures": "1", "candidates": 1,
        "step_candidates": 1, "self_check": True, "imagined_steps": 50, "rl_steps": 500000,
        "rl_batch": 32, "rl_of_goal": 1, "rl_learning_rate": 6.25e-5, "conservative_weight": 10.0,
        "imaginary_share": 0.5, "curve_points": 50, "episodes": 400, "report_last": 5,
    },
}  # fmt: skip


@dataclass
class CollectArguments:
    """The offline data."""

    train_goals: int = setting(6000, "goal sentences in the offline data")
    rollouts_per_goal: int = setting(6, "expert rollouts tried for each of them")
    expert_steps: int = setting(20, "actions of the expert in a rollout at most")
    data: str = setting("", "your rollouts instead: a dataset folder, .npy, .npz or Minari")

    def __post_init__(self):
        self.data = absolute(self.data)
        at_least(1, self, "train_goals", "rollouts_per_goal", "expert_steps")

    def inputs(self) -> dict[str, str]:
        """Rollouts from elsewhere count by their content."""
        return {"data": formats.content_hash(self.data)} if self.data else {}


CLASSES = (command.RunArguments, CollectArguments, GroundingArguments, ImagineArguments)
CLASSES += (LearnArguments, EvaluateArguments, ReportArguments)

# ----------------------------------------------------------------------------------------------
# Stage 1: collect


def collect(run: Run, settings: CollectArguments, work: Path) -> None:
    """Rollouts of the expert for training goals, or those of --data -> rollouts/real."""
    world = run.world
    if settings.data:
        kept, sentence = formats.read_offline(settings.data, world, run.seed)
        run.say(f"  {sentence}")
    else:
        rng = run.rng(0)
        goals = []
        for goal in world.sample_goals("offline", "train", settings.train_goals, rng):
            goals += [goal] * settings.rollouts_per_goal
        steps = min(settings.expert_steps, world.max_steps)
        states = env.unfulfilled_states(world, rng, goals)

        def play(rows):
            return env.expert_rollouts(world, [goals[row] for row in rows], states[rows], steps)

        batches = np.array_split(np.arange(len(goals)), min(len(goals), 16))
        records = in_batches(play, batches, list(map(len, batches)), True, "collect")
        kept = [record for record in records if record["success"]]
        if not kept:
            raise ValueError(f"the expert of {world.name} succeeds in none of {len(records)} goals")
        mean = np.mean([len(record["actions"]) for record in kept])
        run.say(f"  {len(kept)} of {len(records)} expert rollouts succeed, {mean:.1f} actions each")
    if PartialState().is_main_process:
        write_rollouts(run.folder / "rollouts" / "real", kept)


# ----------------------------------------------------------------------------------------------
# Stage 2: ground (paper, section 4.1)


def ground_llm(run: Run, settings: GroundingArguments, work: Path) -> None:
    """The LLM, fine-tuned on the real rollouts or with an adapter added -> grounded/."""
    real, held_out = run.real_rollouts()
    own_data = run.recorded("collect")["data"]
    language_model, tokenizer = run.load_llm_to_train(settings)
    metrics = {"log": []}
    if settings.adapter != "none":
        adapter = grounded.adapter_folder(settings.adapter)
        model = KalmForRollouts.from_pretrained(adapter, llm=language_model)
        metrics = folder.read_json(adapter / "metrics.json")
        run.say(f"  with the adapter in {adapter}; --adapter none trains one instead")
    else:
        statistics = grounded.observation_statistics(real, run.world.objects)
        model = grounded.wrap_llm(language_model, run.world, statistics, settings)
    model.config.base = llm.describe(run.llm, settings.keep_layers, run.seed)
    steps = 0
    if settings.trains:
        log_path = run.folder / "logs" / "grounding.jsonl"
        where = (settings, work, log_path, figures_on_the_way)
        log = ground.train(model, tokenizer, run.world, real, held_out, *where)
        steps = log[-1]["step"]
        metrics["log"] = longer_log(metrics["log"], log)
    weights = grounded.weights_of(model)
    if not PartialState().is_main_process:
        return
    source = "" if settings.adapter == "none" else settings.adapter
    batch = settings.train_batch_size * settings.gradient_accumulation_steps * settings.world_size
    facts = {
        "llm": run.llm, "world": run.world.name, "data": own_data, "seed": run.seed, "steps": steps,
        "rollouts": (len(real), len(held_out)), "tasks": settings.task_names, "batch_size": batch,
        "adapter": source, **card.sizes(model.config),
    }  # fmt: skip
    with folder.replacing(run.folder / "grounded") as aside:
        model.save_pretrained(aside, state_dict=weights)
        tokenizer.save_pretrained(aside)
        is_measured = settings.trains or settings.adapter == "none" or own_data
        if is_measured:
            if grounded.is_sharded(model):
                model, _ = grounded.load_grounded(aside, run.world, run.dtype)
            model.to(PartialState().device)
            with run.autocast():
                figures = grounding_figures(model, tokenizer, run.world, held_out)
            metrics = {**figures, "log": metrics["log"]}
        whose = "" if is_measured else "the adapter on its "
        print(f"  {whose}held-out rollouts: {quality.in_words(metrics, ', ')}")
        folder.write_json(aside / "metrics.json", metrics)
        card.write_card(aside, facts, metrics)
    if settings.push_to_hub:
        grounded.upload(run.folder / "grounded", settings)


# ----------------------------------------------------------------------------------------------
# Stage 3: imagine (paper, section 4.2)


def imagine(run: Run, settings: ImagineArguments, work: Path) -> None:
    """Imagined rollouts for novel goals, figures -> rollouts/, goals.jsonl, *.json."""
    model, tokenizer = run.load_grounded()
    real, _ = run.real_rollouts()
    visited = np.concatenate([record["observations"][:-1] for record in real])
    novel = settings.novel_goals_of(run.world, run.seed)
    trained = run.world.sample_goals("offline", "train", settings.novel_goals, run.rng(2))
    figures = {}
    imagined = {}
    goals_of = {**novel, "offline": trained}
    asked = run.word_questions(vars(settings))
    new = novel.get(env.WORDS, [])
    heard = run.heard([goal.text for goal in new] + words.texts(asked), settings.restate)
    if new:
        goals_of[env.WORDS] = words.as_heard(new, heard)
    # words come last: a level's draws follow its place
    levels = sorted(goals_of, key=lambda level: level == env.WORDS)
    for number, level in enumerate(levels):
        where = (goals_of[level], visited, settings, [run.seed, 3, number], work)
        with run.autocast():
            rounds = rollout.imagine_rounds(model, tokenizer, run.world, level, *where)
        figures[level] = quality.rollout_figures(run.world, rounds[0], shared=True)
        imagined[level] = sum(rounds, [])
        run.say(f"  {level:9}{quality.in_words(figures[level], '  ')}")
    asked = words.questions_as_heard(asked, heard)
    with run.autocast():
        first_actions = words.figures(run.world, asked, [words.llm_values(model, tokenizer)])
    if not PartialState().is_main_process:
        return
    folder.write_json(run.folder / "words.json", {rl.LLM: first_actions} if asked else {})
    folder.write_json(run.folder / "heard.json", heard)
    for level in env.NOVEL_LEVELS:
        folder.remove(run.folder / "rollouts" / level)
        if level in imagined:
            write_rollouts(run.folder / "rollouts" / level, imagined[level])
    env.write_goals(run.folder / "goals.jsonl", sum(novel.values(), []))
    folder.write_json(run.folder / "quality.json", figures)


# ----------------------------------------------------------------------------------------------
# Stage 4: learn (paper, section 4.3)


def learn(run: Run, settings: LearnArguments, work: Path) -> None:
    """Policies of every method, all seeds at once, and the Decision Transformer -> policies/."""
    state = PartialState()
    real, held_out = run.real_rollouts()
    goals = run.novel_goals()
    goals.pop(env.WORDS, None)  # heard for the first time when policies act
    imagined = {}
    for level, records in run.imagined_rollouts().items():
        imagined[level] = kept_rollouts(run.world, records, settings.keep, settings.kept_per_goal)
    sources = by_source(run.world, real, imagined, goals, run.rng(4))
    run.say(f"  rollouts to learn from: real {len(real)}")
    for name in ("relabel", "kalm"):
        counts = [f"{level} {len(records)}" for level, records in sources[name].items()]
        run.say(f"    {name}: {', '.join(counts)}")
    trained_texts = [record["goal"] for record in real]
    others = [goal.text for level in goals.values() for goal in level]
    others += [record["goal"] for record in held_out]
    encoder = run.load_encoder(settings.encoder, settings.encoder_layers)
    with run.autocast():
        table = GoalTable.encode(trained_texts, others, *encoder, shared=True)
    buffer = Buffer(real, table, state.device)
    config = settings.config(run.world.observation_scale, run.dtype == torch.bfloat16)
    seeds = [run.seed + number for number in range(settings.seeds)]
    methods = settings.learned_methods
    curves = []
    for method in methods[state.process_index :: state.num_processes]:
        extra = []
        for records in sources[rl.source_of(method)].values():
            options = (settings.balance_goals, settings.dynamics_tolerance)
            extra.append(Buffer(records, table, state.device, *options))
        extra = [imaginary for imaginary in extra if len(imaginary)]
        files = {step: work / settings.policy_file(method, step) for step in settings.checkpoints}
        with logs.curve(run.folder / "logs", f"rl_{method}", run.trackers) as log:
            _, curve = rl.learn(
                rl.algorithm_of(method), buffer, extra, table.table, seeds, config,
                run.world.num_actions, method, work / f"{method}.pt", files, log,
            )  # fmt: skip
        curves.append((method, curve))
    curves = dict(gather_object(curves))
    if rl.DT in settings.method_list:
        curves[rl.DT] = dt.learn(run, settings.rl_steps, real, work / rl.DT)
    if state.is_main_process:
        with folder.replacing(run.folder / "policies") as aside:
            aside.mkdir()
            table.save(aside / "goals.safetensors")
            for method, step in itertools.product(methods, settings.checkpoints):
                name = settings.policy_file(method, step)
                (aside / name).parent.mkdir(exist_ok=True)
                shutil.copy(work / name, aside / name)
            if rl.DT in curves:
                shutil.copytree(work / rl.DT / "model", aside / rl.DT)
                methods.append(rl.DT)
            losses = {}
            norms = {}
            for method in methods:
                losses[method] = [entry[:2] for entry in curves[method]]
                norms[method] = [entry[::2] for entry in curves[method]]
            folder.write_json(aside / "curves.json", losses)
            folder.write_json(aside / "gradient_norms.json", norms)


# ----------------------------------------------------------------------------------------------
# Stage 5: evaluate (paper, section 5.2)


def evaluate(run: Run, settings: EvaluateArguments, work: Path) -> None:
    """Success rates of every policy, and of LLMs as policies, on all levels -> results.json."""
    state = PartialState()
    learned = LearnArguments(**run.recorded("learn"))
    goals = run.goals_to_evaluate(settings.episodes)
    all_goals = sum(goals.values(), [])
    rngs = [run.rng(7, number) for number in range(learned.seeds)]
    starts = [words.draw_starts(run.world, all_goals, rng) for rng in rngs]
    evaluation = Evaluation(learned, settings, goals, starts)
    all_trials = trials(learned, settings)
    of_models = [trial for trial in all_trials if trial.method in rl.MODELS]
    of_policies = [trial for trial in all_trials if trial.method not in rl.MODELS]
    mine = of_policies[state.process_index :: state.num_processes]
    policies = run.folder / "policies"
    asked = run.word_questions(run.recorded("imagine"))
    asked = words.questions_as_heard(asked, run.heard_before())
    texts = [goal.text for goal in all_goals] + words.texts(asked)
    table = run.goal_table(texts, learned.encoder, learned.encoder_layers, shared=True)
    won = evaluation.play(run.world, table, policies, mine)
    won = dict(gather_object(won))
    for trial in of_models:
        steps = min(settings.episode_steps, run.world.max_steps)
        model = dt.load(run) if trial.method == rl.DT else run.load_grounded()
        records = play_llm(run, model, all_goals, starts[0], steps, shared=True)
        won[trial] = np.array([record["success"] for record in records])
    if state.is_main_process:
        results = {**evaluation.results(won), **run.figures()}
        results["words"] |= evaluation.first_actions(run.world, table, policies, asked)
        folder.write_json(run.folder / "results.json", results)


# ----------------------------------------------------------------------------------------------
# Stage 6: report; then act, one try at a goal of one's own


def write_report(run: Run, settings: ReportArguments, work: Path) -> None:
    """Everything worth seeing in one page -> report.html; the table on the terminal."""
    if not PartialState().is_main_process:
        return
    results = report.write(run.folder, run.world, run.imagined_rollouts())
    if settings.kinds:
        table = GoalTable.load(run.folder / "policies" / "goals.safetensors")
        formats.export(run.folder, settings.kinds, run.world, table.of_texts)
    print("\n".join(["", *report.results_table(results), ""]))
    print(f"rates of {report.most_episodes(results)} episodes (llm, dt: one seed); see report.html")


def act(run: Run, settings: episode.Acting, work: Path) -> None:
    """One try at a goal in the world by each method -> act/*.gif, words on the terminal."""
    if not PartialState().is_main_process:
        return
    known = {goal.text: goal for goals in run.novel_goals().values() for goal in goals}
    asked = known.get(settings.goal) or run.world.goal_of_text(settings.goal)
    restates = run.recorded("imagine")["restate"]
    (goal,) = words.as_heard([asked], run.heard([asked.text], restates))
    judge = episode.judge_in_words(run.world, asked, asked.text in known)
    print(f'  goal: "{asked.text}"\n  heard: "{goal.text}"\n  judge: {judge}')
    learned = LearnArguments(**run.recorded("learn"))
    table = run.goal_table([goal.text], learned.encoder, learned.encoder_layers)
    model = run.load_grounded()
    rng = np.random.default_rng([settings.start_seed, 8])
    start = env.unfulfilled_states(run.world, rng, [goal])
    for method in episode.actors(run.folder, rl.method_names(), settings.methods):
        if method in rl.MODELS:
            acting = dt.load(run) if method == rl.DT else model
            (record,) = play_llm(run, acting, [goal], start, run.world.max_steps)
        else:
            path = run.folder / "policies" / f"{method}.safetensors"
            policy = read_policy(path, 0, table, [goal])
            (record,) = env.run_episodes(run.world, policy, [goal], start)
        with run.autocast():
            record["explanation"] = explain(*model, [record])[0]
        print(episode.write_account(run.folder, run.world, method, record, settings.start_seed))


# ----------------------------------------------------------------------------------------------
# The command

IMAGINED = ("goals.jsonl", "rollouts/rephrase", "rollouts/easy", "rollouts/hard")
IMAGINED += ("quality.json", "words.json", "heard.json")
HELP = {"-h", "--help"}
OF_RUN = ("seed", "env", "world_file", "llm", "llm_weights")
STAGES = {  # function, what it reads and writes, settings of the run that it follows from
    "collect": Stage(collect, (), ("rollouts/real",)),
    "ground": Stage(ground_llm, ("collect",), ("grounded",), OF_RUN),
    "imagine": Stage(imagine, ("collect", "ground"), IMAGINED),
    "learn": Stage(learn, ("collect", "imagine"), ("policies",), OF_RUN),
    "evaluate": Stage(evaluate, ("collect", "ground", "imagine", "learn"), ("results.json",)),
    "report": Stage(
        write_report, ("ground", "imagine", "learn", "evaluate"), ("report.html", "export")
    ),
    "act": Stage(act, ("ground", "imagine", "learn")),
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, or 2 after a sentence on what is wrong."""
    arguments = sys.argv[1:] if arguments is None else [*map(str, arguments)]
    if HELP & set(arguments):
        print(help_text(__doc__.split("\n\n")[1], CLASSES, SCALES))
        return 0
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    stages_begun = []
    try:
        run_command(arguments, stages_begun.append)
    except Exception as error:
        if is_on(SettingsParser(CLASSES).all_given(arguments), "traceback"):
            raise
        sentence = str(error)
        if not isinstance(error, (ValueError, FloatingPointError, OSError)):
            sentence = f"{type(error).__name__}: {sentence} (--traceback shows where)"
        if memory.ran_out(error):
            sentence = f"out of memory ({error}); what helps: {memory.ADVICE}"
        if stages_begun:
            sentence = f"stage {stages_begun[-1]!r}: {sentence}; finished stages are kept"
        if not launch.is_first():
            time.sleep(5)  # if the first process fails too, it says so, and all are ended
        print(f"kalm: {sentence}", file=sys.stderr)
        return 2
    return 0


def run_command(arguments: list[str], begins: Callable[[str], None]) -> None:
    """Read a command line, check all that can be known, and do what it asks."""
    named = SettingsParser(CLASSES).given(arguments)
    acts = named.get("stage") == "act"
    config = Path(named.get("output_dir", GroundingArguments.output_dir)) / "config.yaml"
    if acts and "config" not in named and config.is_file():
        arguments = ["--config", str(config), *arguments]
    defaults = lambda given: command.defaults_of(SCALES, given)
    found, given = parse(arguments, CLASSES, defaults, command.RENAMED)
    shared, collecting, grounding, imagining, learning, evaluating, _ = found
    manifest = folder.Manifest(Path(grounding.output_dir))
    seed = grounding.seed
    if acts and "learn" in manifest.stages:
        seed = manifest.stages["learn"]["run"]["seed"]  # the given one chooses the start alone
    methods = [name for name in named.get("methods", "").split(",") if name]
    acting = episode.Acting(shared.goal, grounding.seed, methods)
    logs.check_trackers(grounding.report_to, manifest.run / "logs")
    world = env.make(shared.env)
    check_world(world, imagining.split)
    of_stages = dict(zip(STAGES, (*found[1:], acting)))
    of_run = {"scale": shared.scale, "seed": seed, "env": shared.env, "llm": shared.llm}
    of_run |= command.hashes(shared)
    plan = Plan(manifest, STAGES, shared.names(STAGES), of_stages, of_run, shared.force)
    plan.check(set(given) - {"methods"} if acts else given)  # who acts is chosen anew
    command.check(plan.names, world, shared, grounding, imagining, learning, given)
    if "collect" in plan.names and collecting.data:
        formats.read_offline(collecting.data, world, seed)
    if "learn" in plan.names:
        trials(learning, evaluating)  # finds checkpoints to report that would not be kept
    if "imagine" in plan.names:
        imagining.novel_goals_of(world, seed)
    dtype = command.dtype_of(grounding)
    run = Run(manifest.run, world, shared.llm, seed, dtype, [*grounding.report_to])
    todo = plan.to_do()
    command.check_llm(shared, grounding, imagining, learning, world, todo)
    run.say(f"KALM, scale {shared.scale}, {shared.llm} in {shared.env} -> {run.folder}")
    run.say(plan.in_words(todo))
    if shared.dry_run:
        run.say(memory.in_words(run, grounding, imagining))
        return
    with folder.locked(run.folder, mine=PartialState().is_main_process):
        do(plan, run, todo, begins)
    if not todo:
        run.say("nothing to do: all is done with these settings and files (code: give --force)")
        if (run.folder / "results.json").is_file():
            run.say("\n".join(report.results_table(folder.read_json(run.folder / "results.json"))))


if __name__ == "__main__":
    count = launch.workers(SettingsParser(CLASSES).all_given(sys.argv[1:]))
    if count > 1 and not HELP & set(sys.argv):
        sys.exit(launch.start(sys.argv[0], sys.argv[1:], count))
    launch.stop_with_launcher()
    gc.freeze()  # what the imports made stays, so no collection has to walk it
    launch.leave(main())
