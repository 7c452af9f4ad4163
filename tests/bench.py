"""Speed beside peers and limits: `python tests/bench.py`, once bench_requirements.txt is installed.

Each row times ours and the other in turn, several times, and compares the medians. `--only WORD
...` takes the rows that have one of the words in their name, `--json FILE` keeps the figures,
`--busy` keeps a core busy beside. `--runs SCALE` times whole runs, `--memory` measures the peak
memory of every stage and `--growth` how the cost of each grows: docs/results.py reads what
`--growth --json docs/growth.json` keeps.
"""

# ruff: noqa: E402
import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mujoco
import numpy as np
import torch

import env
import kalm
import rl
import rollout
import tasks
from data import grounded, llm
from data.transitions import Buffer, GoalTable
from experiment import folder
from experiment.command import bf16_is_fast
from model import ACTION, KalmForRollouts, segment_mask
from sequences import Sequences
from worlds import clevr_robot

WORLD = env.make("clevr_robot")
CORES = clevr_robot.available_threads()
BF16 = bf16_is_fast()


def in_turn(ours, other, repeats):
    """Median seconds of two functions that are called in turn, after a first call of each."""
    ours()
    other()
    times = {ours: [], other: []}
    for _ in range(repeats):
        for function, found in times.items():
            found.append(timed(function))
    return [statistics.median(found) for found in times.values()]


def timed(function):
    """Seconds of a call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def autocast():
    return torch.autocast("cpu", torch.bfloat16, enabled=BF16)


# ----------------------------------------------------------------------------------------------
# The world


def scene(count):
    rng = np.random.default_rng(0)
    return WORLD.initial_states(rng, count), rng.integers(WORLD.num_actions, size=count)


def step_beside_bare_physics():
    """World.step_batch on one thread; a loop of mj_step over the same model and states."""
    states, actions = scene(512)
    data = mujoco.MjData(clevr_robot.PHYSICS)

    def bare():
        for state, action in zip(states, actions):
            data.qpos, data.qvel = state[:37], state[37:]
            data.ctrl = clevr_robot.PUSH_VECTORS[action % 8]
            for _ in range(clevr_robot.PHYSICS_STEPS):
                mujoco.mj_step(clevr_robot.PHYSICS, data)

    return in_turn(lambda: WORLD.step_batch(states, actions, threads=1), bare, 7)


def step_on_all_cores():
    """World.step_batch on all cores; on one, divided by their number."""
    many, one = (partial(WORLD.step_batch, *scene(2048), threads=count) for count in (CORES, 1))
    ours, other = in_turn(many, one, 7)
    return ours, other / CORES


def reset_beside_step():
    """WorldEnv.reset; WorldEnv.step."""
    face = env.WorldEnv(WORLD)
    face.reset(seed=0)

    def steps():
        for number in range(100):
            face.step(number % WORLD.num_actions)

    return in_turn(lambda: [face.reset() for _ in range(100)], steps, 9)


# ----------------------------------------------------------------------------------------------
# Offline RL


def random_buffer(transitions=20000, texts=500, hidden=384):
    """A buffer of random transitions whose policy input has 394 numbers, and its goal table."""
    rng = np.random.default_rng(0)
    encodings = torch.randn(texts, hidden, generator=torch.Generator().manual_seed(0))
    records = []
    for _ in range(transitions // 10):
        record = {
            "observations": rng.normal(size=(11, 10)).astype(np.float32),
            "actions": rng.integers(40, size=10),
            "rewards": rng.normal(size=10).astype(np.float32),
            "success": bool(rng.random() < 0.5),
            "goal": str(rng.integers(texts)),
        }
        records.append(record)
    table = GoalTable([str(text) for text in range(texts)], encodings)
    return Buffer(records, table), encodings


def learning(algorithm, data, seeds=1, **config):
    """A function that learns, with as many steps as config says."""
    config = rl.RLConfig(observation_scale=WORLD.observation_scale, **config)
    buffer, table = data
    return lambda: rl.learn(algorithm, buffer, [], table, range(seeds), config, WORLD.num_actions)


def fits_of_d3rlpy(algorithm, data, batch, steps):
    """A function with so many updates of d3rlpy's algorithm with networks as ours, batches drawn
    as its `fit` does, without its logging: of one seed, as it trains them.
    """
    import d3rlpy

    columns = data[0].transitions
    inputs = torch.cat([columns.obs / WORLD.observation_scale, data[1][columns.goal]], -1).numpy()
    episodes = d3rlpy.dataset.MDPDataset(
        observations=inputs,
        actions=columns.action.numpy(),
        rewards=columns.reward.numpy(),
        terminals=np.arange(len(inputs)) % 10 == 9,
        action_size=WORLD.num_actions,
    )
    kinds = {"bc": d3rlpy.algos.DiscreteBCConfig, "cql": d3rlpy.algos.DiscreteCQLConfig}
    factory = d3rlpy.models.VectorEncoderFactory([256, 256])
    peer = kinds[algorithm](batch_size=batch, encoder_factory=factory).create()
    peer.build_with_dataset(episodes)

    def fit():
        for _ in range(steps):
            peer.update(episodes.sample_transition_batch(batch))

    return fit


def learn_beside_d3rlpy(batch, seeds=3, steps=100):
    """A step of BC and one of CQL with three seeds, batches drawn, as `--scale cpu` takes 8,000 of
    each four times; d3rlpy's steps of the same, a seed after the other.
    """
    data = random_buffer(hidden=576)
    options = {"steps": steps, "batch": batch, "bf16": BF16}
    ours = [learning(algorithm, data, seeds, **options) for algorithm in ("bc", "cql")]
    others = [fits_of_d3rlpy(algorithm, data, batch, steps) for algorithm in ("bc", "cql")]
    all_of = lambda functions: [function() for function in functions]
    mine, theirs = in_turn(partial(all_of, ours), partial(all_of, others), 3)
    return mine / steps, seeds * theirs / steps


def cql_beside_its_products(batch, seeds=3, steps=150):
    """A step of CQL; its matrix products alone (online network at s and s', target at s',
    gradients) with AdamW: what no code in torch can go below.
    """
    data = random_buffer(hidden=576)
    layers = [(10, 256), (data[1].shape[1], 256), (256, 256), (256, WORLD.num_actions)]
    dtype = torch.bfloat16 if BF16 else torch.float32
    tensors = []
    for layer, (fan_in, fan_out) in enumerate(layers):
        rows = batch // rl.RLConfig.of_goal if layer == 1 else batch  # goals are shared
        shapes = ((seeds, rows, fan_in), (seeds, fan_in, fan_out), (seeds, rows, fan_out))
        tensors.append([torch.randn(shape, dtype=dtype) for shape in shapes])
    flat = torch.nn.Parameter(torch.randn(seeds, sum(i * o + o for i, o in layers)))
    flat.grad = torch.randn_like(flat)
    optimizer = torch.optim.AdamW([flat], lr=1e-3, fused=True)

    def products():
        for _ in range(steps):
            for layer, (x, weight, gradient) in enumerate(tensors):
                for _ in range(2 if layer == 1 else 3):  # s and s' share their goal's part
                    torch.bmm(x, weight)
                torch.bmm(x.mT, gradient)
                if layer > 1:
                    torch.bmm(gradient, weight.mT)
            optimizer.step()

    ours = learning("cql", data, seeds, steps=steps, batch=batch, bf16=BF16)
    ours, floor = in_turn(ours, products, 5)
    return ours / steps, floor / steps


# ----------------------------------------------------------------------------------------------
# Imagining


def default_model(merged=False):
    """The grounded model and tokenizer of `--scale cpu`: SmolLM2's first layers with the released
    adapter, merged to imagine.
    """
    language_model, tokenizer = llm.load(llm.resolve("smollm2"), 6)
    model = KalmForRollouts.from_pretrained(grounded.RELEASED, llm=language_model)
    return model.merge_adapters() if merged else model, tokenizer


def prompts_of(tokenizer, goals):
    ids = [tasks.prompt_ids(tokenizer, "generation", goal.text) for goal in goals]
    return [tasks.text_positions(each) for each in ids]


def novel(count):
    """Rephrased goals, and observations to start from."""
    goals = WORLD.sample_goals("rephrase", "test", count, np.random.default_rng(0))
    states = env.unfulfilled_states(WORLD, np.random.default_rng(1), goals)
    return goals, WORLD.observe(states)


@torch.inference_mode()
def generate_without_cache(model, tokenizer, goals, observations, max_steps):
    """Greedy rollouts as the authors' loop makes them: for each action and each state the whole
    sequence runs again. Returns actions and observations.
    """
    paths = [[obs] for obs in observations]
    taken = [[] for _ in goals]
    prompts = prompts_of(tokenizer, goals)
    for _ in range(max_steps):
        sequences = []
        for prompt, path, actions in zip(prompts, paths, taken):
            sequences.append(prompt + tasks.rollout_positions(np.array(path), actions))
        chosen = model.action_logits(Sequences(model, sequences).hidden).argmax(-1).tolist()
        for sequence, action, path in zip(sequences, chosen, paths):
            sequence.append(tasks.Position(ACTION, action, path[-1]))
        seen = np.array([path[-1] for path in paths])
        hidden = Sequences(model, sequences).hidden[:, None]
        states = rollout.expected_states(model, hidden, torch.tensor(chosen)[:, None], seen)[:, 0]
        for path, actions, action, state in zip(paths, taken, chosen, states):
            path.append(state)
            actions.append(action)
    return np.array(taken), np.array(paths)


def imagine_beside_no_cache(count=64, steps=20):
    """Greedy rollouts for a goal that nothing fulfils; without a cache, once (longer ones favour
    the cache more).
    """
    model, tokenizer = default_model(merged=True)
    never = (("red", "blue", "behind"), ("red", "blue", "front"))
    text = "Put the red ball behind and in front of the blue ball."
    goals = [env.Goal(text, "hard", "relations", never)] * count
    starts = WORLD.observe(WORLD.initial_states(np.random.default_rng(0), count))
    rollout.generate(model, tokenizer, WORLD, goals[:2], starts[:2], max_steps=2)
    began = time.perf_counter()
    records = rollout.generate(model, tokenizer, WORLD, goals, starts, max_steps=steps)
    between = time.perf_counter()
    actions, _ = generate_without_cache(model, tokenizer, goals, starts, steps)
    ended = time.perf_counter()
    alike = [(record["actions"] == taken).all() for record, taken in zip(records, actions)]
    print(f"  greedy rollouts alike in all {steps} actions: {sum(alike)} of {count}")
    return between - began, ended - between


BEFORE = "308e543"  # the commit whose stage imagine had no trees, and read each prompt for each row


def imagine_beside_commit(commit=BEFORE):
    """The stage imagine of a small run on one core; the same in a clone of an older commit."""
    with tempfile.TemporaryDirectory() as place:
        older = Path(place) / "older"
        subprocess.run(["git", "clone", "-q", ROOT, older], check=True)
        subprocess.run(["git", "-C", older, "checkout", "-q", commit], check=True)
        seconds = []
        for code, options in ((ROOT, ["--processes", "1"]), (older, [])):
            command = [sys.executable, code / "kalm.py", "--scale", "cpu", "--train_goals", "600"]
            command += "--novel_goals 24 --adapter released --stage collect ground imagine".split()
            command += "--starts_per_goal 16 --step_starts 40 --temperatures 1,1,1.2,1.2".split()
            run = Path(place) / f"run of {code.name}"
            command += [*options, "--output_dir", run]
            alone = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, env=alone, stdout=subprocess.DEVNULL, check=True)
            manifest = folder.read_json(run / "manifest.json")
            seconds.append(manifest["stages"]["imagine"]["time_s"])
    return seconds


# ----------------------------------------------------------------------------------------------
# Grounding


def real_rollouts(goals=200):
    """Expert rollouts as `collect` makes them: six for each goal text."""
    rng = np.random.default_rng(0)
    wanted = WORLD.sample_goals("offline", "train", goals, rng)
    return [record for record in expert_rollouts(wanted * 6, rng) if record["success"]]


def expert_rollouts(goals, rng):
    encoded = WORLD.encode_goals(goals)
    states = env.unfulfilled_states(WORLD, rng, goals)

    def expert(obs, rows):
        return WORLD.expert_actions(encoded[rows], obs)

    return env.run_episodes(WORLD, expert, goals, states, 20)


def examples_of(tokenizer, records, count=32):
    """Grounding examples, and the numbers of some of them."""
    examples = tasks.GroundingExamples(records, tokenizer, WORLD)
    return examples, np.random.default_rng(0).permutation(len(examples))[:count]


def train_step(model, batch):
    with autocast():
        loss = model(**batch).loss
    loss.backward()
    model.zero_grad()


def packed_rows():
    """Forward and backward over 32 packed examples; over the same pairs of a rollout and a task,
    one a padded row.
    """
    model, tokenizer = default_model()
    examples, numbers = examples_of(tokenizer, real_rollouts())
    together = tasks.pack([examples[number] for number in numbers])
    pairs = []
    for number in numbers:
        task, rows = examples.examples[number]
        for row in rows:
            record = examples.rollouts[row]
            pairs.append(tasks.make_example(task, tokenizer, WORLD, [record]))
    alone = tasks.pack(pairs, row_length=1)
    shapes = [tuple(batch["input_ids"].shape) for batch in (together, alone)]
    print(f"  {len(pairs)} pairs of a rollout and a task: packed {shapes[0]}, padded {shapes[1]}")
    return in_turn(partial(train_step, model, together), partial(train_step, model, alone), 5)


def step_beside_backbone():
    """Forward, losses and backward over 32 packed examples; the bare backbone's over the same
    positions and mask.
    """
    model, tokenizer = default_model()
    examples, numbers = examples_of(tokenizer, real_rollouts())
    batch = tasks.pack([examples[number] for number in numbers])
    embeddings = model.embed(batch["input_ids"], batch["modality"], batch["states"]).detach()
    embeddings.requires_grad_()

    def bare():
        with autocast():
            out = model.backbone.base_model(
                inputs_embeds=embeddings,
                position_ids=batch["position_ids"],
                attention_mask=segment_mask(batch["segments"], embeddings.dtype),
            )
        out.last_hidden_state.sum().backward()
        model.zero_grad()
        embeddings.grad = None

    return in_turn(partial(train_step, model, batch), bare, 7)


def data_loading():
    """Making and packing 32 grounding examples; a fiftieth of the step that they serve."""
    model, tokenizer = default_model()
    examples, numbers = examples_of(tokenizer, real_rollouts())

    def load():
        return tasks.pack([examples[number] for number in numbers])

    loading, step = in_turn(load, partial(train_step, model, load()), 5)
    return loading, step / 50


# ----------------------------------------------------------------------------------------------
# How cost grows: functions that yield (what, sizes, seconds); largest: rollouts at most


def seconds(function, repeats=3):
    """Median of calls after a first one."""
    return in_turn(function, lambda: None, repeats)[0]


def grow_collect(largest):
    sizes = [largest // 100, largest // 10, largest]
    times = []
    for count in sizes:
        rng = np.random.default_rng(0)
        goals = WORLD.sample_goals("offline", "train", count, rng)
        times.append(timed(partial(expert_rollouts, goals, rng)))
    yield "collect, by rollouts", sizes, times


def grow_learn(largest):
    sizes = [largest // 100, largest // 10, largest]
    times = []
    for count in sizes:
        data = random_buffer(10 * count, texts=5000)
        times.append(seconds(learning("cql", data, steps=200, bf16=BF16)))
    yield "learn, 200 CQL steps of one seed, by rollouts in the buffer", sizes, times


def grow_layers(largest):
    records = real_rollouts(60)
    layers = [2, 6, 12, 30]
    grounding = []
    imagining = []
    statistics_of_states = grounded.observation_statistics(records, WORLD.objects)
    for kept in layers:
        language_model, tokenizer = llm.load(llm.resolve("smollm2"), kept)
        options = {"lora_rank": 64, "objects": WORLD.objects, **statistics_of_states}
        model = KalmForRollouts.from_llm(language_model, **options)
        model.get_input_embeddings().weight.requires_grad_(False)
        examples, numbers = examples_of(tokenizer, records, 8)
        batch = tasks.pack([examples[number] for number in numbers])
        grounding.append(seconds(partial(train_step, model, batch)))
        model.merge_adapters()
        imagine = partial(rollout.generate, model, tokenizer, WORLD, *novel(32), max_steps=10)
        with autocast():
            imagining.append(timed(imagine))
    positions = int((batch["modality"] >= 0).sum())
    yield (
        f"ground, a LoRA step of 8 examples ({positions:,} positions), by layers",
        layers,
        grounding,
    )
    yield "imagine, 32 rollouts of at most 10 actions, by layers", layers, imagining


def grow_imagine(largest):
    model, tokenizer = default_model(merged=True)
    sizes = [count for count in (64, 256, 1024) if count <= largest]
    times = []
    for count in sizes:
        imagine = partial(
            rollout.generate_all, model, tokenizer, WORLD, *novel(count), max_steps=10
        )
        with autocast():
            times.append(timed(imagine))
    yield "imagine, six layers, at most 10 actions, by rollouts", sizes, times


def grow_processes(largest):
    times = []
    for processes in (1, 2):
        launch = [sys.executable]
        if processes > 1:
            launch += f"-m torch.distributed.run --standalone --nproc_per_node {processes}".split()
        with tempfile.TemporaryDirectory() as run:
            command = [*launch, ROOT / "kalm.py", "--scale", "cpu", "--train_goals", "600"]
            command += f"--adapter none --max_steps 24 --output_dir {run}".split()
            command += ["--eval_strategy", "no"]
            command += ["--per_device_train_batch_size", str(16 // processes), "--stage"]
            threads = {"OMP_NUM_THREADS": str(max(1, CORES // processes))}
            done = subprocess.run(
                [*command, "collect", "ground"],
                env={**os.environ, **threads},
                capture_output=True,
                encoding="utf-8",
                check=True,
            )
        times.append(float(re.search(r"train_runtime': '?([0-9.]+)", done.stdout)[1]))
    yield "ground, 24 steps of 16 examples shared among processes", [1, 2], times


def measure_growth(options, found):
    print("| what | sizes | seconds | exponent |\n" + "| --- " * 4 + "|")
    for part in (grow_collect, grow_learn, grow_layers, grow_imagine, grow_processes):
        if not any(word in part.__name__ for word in options.only):
            continue
        for name, sizes, times in part(options.largest):
            exponent = np.polyfit(np.log(sizes), np.log(times), 1)[0]  # b of time ~ size^b
            found[name] = {"sizes": sizes, "seconds": times, "exponent": exponent}
            columns = [", ".join(f"{size:,}" for size in sizes)]
            columns.append(", ".join(f"{time:.3g}" for time in times))
            print(f"| {name} | {' | '.join(columns)} | {exponent:.2f} |", flush=True)


# ----------------------------------------------------------------------------------------------
# Memory

MEMORY_LIMIT = 4 * 2**30
BRIEFLY = "--adapter none --max_steps 20 --temperatures 1 --rl_steps 300"  # on as much data


def measure_memory(options, found):
    """The peak of each stage at `--scale cpu`, in a process of its own; long stages take fewer
    steps.
    """
    print("| stage | peak | at most | |\n" + "| --- " * 4 + "|")
    with tempfile.TemporaryDirectory() as run:
        for stage in list(kalm.STAGES)[:-1]:
            command = [sys.executable, ROOT / "kalm.py", "--scale", "cpu", *BRIEFLY.split()]
            command += ["--output_dir", run, "--stage", stage]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                sys.exit(f"stage {stage} failed while its memory was measured")
            peak = usage.ru_maxrss * 1024
            found[f"peak memory, {stage}"] = {"bytes": peak, "limit": MEMORY_LIMIT}
            verdict = "met" if peak <= MEMORY_LIMIT else "NOT MET"
            print(f"| {stage} | {peak / 2**30:.2f} GiB | 4 GiB | {verdict} |", flush=True)


# ----------------------------------------------------------------------------------------------
# Whole runs


@contextlib.contextmanager
def neighbour(is_there=True):
    """A process that keeps one core busy."""
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if is_there else None
    try:
        yield
    finally:
        if busy:
            busy.kill()


def measure_runs(options, found):
    """A whole run at a scale: on all cores, beside a busy process, on one; then as eight workers,
    whose CPU seconds tell what a stage would take on eight cores: those of the busiest.
    """
    print(
        f"--scale {options.runs}\n\n| how | seconds | collect | ground | imagine | learn |", end=""
    )
    print(" evaluate | report |\n" + "| --- " * 8 + "|")
    ways = [("all cores", 0, False), ("beside a busy process", 0, True), ("one worker", 1, False)]
    ways += [("eight workers, CPU seconds of the busiest", 8, False)]
    for name, workers, is_beside in ways:
        if not any(word in name for word in options.only):
            continue
        with tempfile.TemporaryDirectory() as run, neighbour(is_beside):
            command = [sys.executable, ROOT / "kalm.py", "--scale", options.runs]
            command += ["--processes", str(workers), "--output_dir", run]
            began = time.perf_counter()
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            seconds = time.perf_counter() - began
            log = (Path(run) / "logs" / "stages.jsonl").read_text(encoding="utf-8")
        stages = [json.loads(line) for line in log.splitlines()]
        of_stages = [stage["time_s"] for stage in stages]
        if workers == 8:
            of_stages = [max(stage["cpu_s"]) for stage in stages]
            seconds = sum(of_stages)
        found[name] = {"seconds": seconds, "stages": stages}
        columns = " | ".join(f"{each:.0f}" for each in (seconds, *of_stages))
        print(f"| {name} | {columns} |", flush=True)


# ----------------------------------------------------------------------------------------------
# The table

PEER, FLOOR = "d3rlpy 2.8.1, one after the other", "its products and AdamW"
ROWS = {  # name: (function, what the other is, how often its time ours may take at most)
    "env step, one thread": (step_beside_bare_physics, "loop of mj_step", 1.15),
    "env step, all cores": (step_on_all_cores, "one thread / cores", 1 / 0.85),
    "env reset": (reset_beside_step, "env step", 1),
    "learn, three seeds, batch 32": (partial(learn_beside_d3rlpy, 32), PEER, 0.17),
    "learn, three seeds, batch 256": (partial(learn_beside_d3rlpy, 256), PEER, 0.10),
    "learn, CQL, batch 32": (partial(cql_beside_its_products, 32), FLOOR, None),
    "learn, CQL, batch 256": (partial(cql_beside_its_products, 256), FLOOR, None),
    "imagine, 64 goals, 20 actions": (imagine_beside_no_cache, "no cache", 1 / 10),
    "imagine, a stage on one core": (imagine_beside_commit, f"commit {BEFORE}", 1 / 3),
    "ground, packed rows": (packed_rows, "one example a row", 1 / 4),
    "ground, step": (step_beside_backbone, "bare backbone", 1.15),
    "ground, data loading": (data_loading, "2% of the step", 1),
}


def measure_speed(options, found):
    print("| what | ms | beside | ms | ratio | at most | |\n" + "| --- " * 7 + "|")
    for name, (function, beside, limit) in ROWS.items():
        if not any(word in name for word in options.only):
            continue
        ours, other = function()
        ratio = ours / other
        found[name] = {"seconds": ours, "beside": beside, "other_seconds": other}
        found[name] |= {"ratio": ratio, "limit": limit}
        verdict = " | "
        if limit is not None:
            verdict = f"{limit:.3g} | {'met' if ratio <= limit else 'NOT MET'}"
        times = f"{1000 * ours:.3g} | {beside} | {1000 * other:.3g}"
        print(f"| {name} | {times} | {ratio:.3g} | {verdict} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    names = (
        f"rows with one of these in their name: {'; '.join(ROWS)}; of --growth: collect, learn, "
    )
    names += "layers, imagine, processes"
    parser.add_argument("--only", nargs="*", default=[""], metavar="WORD", help=names)
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures")
    peak = "instead, the peak memory of each stage at --scale cpu, some minutes"
    parser.add_argument("--memory", action="store_true", help=peak)
    growth = "instead, how the cost of each stage grows, a quarter of an hour"
    parser.add_argument("--growth", action="store_true", help=growth)
    largest = "rollouts in the largest rows of --growth"
    parser.add_argument("--largest", type=int, default=100000, metavar="N", help=largest)
    runs = "instead, whole runs at this scale: on all cores, beside a busy process, on one core"
    parser.add_argument("--runs", metavar="SCALE", help=runs)
    busy = "keep one core busy beside all that is measured"
    parser.add_argument("--busy", action="store_true", help=busy)
    options = parser.parse_args()
    machine = f"{CORES} cores, {platform.processor() or platform.machine()}"
    machine += f", torch {torch.__version__}, bf16 {'fast' if BF16 else 'not used'}"
    found = {"machine": machine, "date": time.strftime("%Y-%m-%d"), "rows": {}}
    print(f"{machine}, {found['date']}\n")
    measure = measure_speed
    if options.growth:
        measure = measure_growth
    elif options.memory:
        measure = measure_memory
    elif options.runs:
        measure = measure_runs
    with neighbour(options.busy):
        measure(options, found["rows"])
    if options.json:
        folder.write_json(options.json, found)


if __name__ == "__main__":
    main()
