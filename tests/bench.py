"""Speed beside peers and limits, measured in one run: `python tests/bench.py`, once tests/bench_requirements.txt is installed.

Each row times ours and the other in turn, several times, and compares the medians. `--only WORD ...` takes the rows that have one of
the words in their name, `--json FILE` keeps the figures, `--memory` measures the peak memory of every stage and `--growth` how the
cost of each stage grows. `--growth --json docs/growth.json` is what RESULTS.md reads.
"""
import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mujoco  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

import env  # noqa: E402
import ground  # noqa: E402
import kalm  # noqa: E402
import rl  # noqa: E402
import rollout  # noqa: E402
from data import llm as llm_source  # noqa: E402
from data import store  # noqa: E402
from model import ACTION, STATE, KalmForRollouts, segment_mask  # noqa: E402

CORES = env.available_threads()
NEVER = [(0, 1, 0), (0, 1, 2)]  # red behind and in front of blue at once: a goal that keeps a rollout going


def in_turn(ours, other, repeats):
    """Median seconds of two functions that are called in turn, after a first call of each."""
    ours(), other()
    times = [[], []]
    for _ in range(repeats):
        for function, found in zip((ours, other), times):
            started = time.perf_counter()
            function()
            found.append(time.perf_counter() - started)
    return tuple(map(statistics.median, times))


# ------------------------------------------------------------------------------------------------------------------
# Environment

def scene(n, seed=0):
    rng = np.random.default_rng(seed)
    return env.initial_states(rng, n), rng.integers(env.NUM_ACTIONS, size=n)


def step_beside_bare_physics():
    """env.step_batch on one thread; a loop of mj_step over the same model from the same states."""
    states, actions = scene(512)
    model = env.physics_model()
    data = mujoco.MjData(model)

    def bare():
        for state, action in zip(states, actions):
            data.qpos, data.qvel, data.ctrl = state[:37], state[37:], env.PUSH_VECTORS[action % 8]
            for _ in range(env.PHYSICS_STEPS):
                mujoco.mj_step(model, data)
    return in_turn(lambda: env.step_batch(states, actions, threads=1), bare, 7)


def step_on_all_cores():
    """Seconds of env.step_batch on all cores, and on one divided by their number."""
    states, actions = scene(2048)
    many, one = in_turn(lambda: env.step_batch(states, actions, threads=CORES), lambda: env.step_batch(states, actions, threads=1), 7)
    return many, one / CORES


def reset_beside_step():
    """ClevrRobotEnv.reset; ClevrRobotEnv.step."""
    world = env.ClevrRobotEnv()
    world.reset(seed=0)
    return in_turn(lambda: [world.reset() for _ in range(100)], lambda: [world.step(i % 40) for i in range(100)], 9)


# ------------------------------------------------------------------------------------------------------------------
# Offline RL

def random_buffer(n=20000, texts=500, hidden=384):
    """A buffer of random transitions whose policy input has 394 numbers, with its goal table."""
    rng = np.random.default_rng(0)
    table = rl.GoalTable([str(i) for i in range(texts)], torch.randn(texts, hidden, generator=torch.Generator().manual_seed(0)))
    records = [{"observations": rng.normal(size=(11, 10)).astype(np.float32), "actions": rng.integers(40, size=10),
                "rewards": rng.normal(size=10).astype(np.float32), "success": bool(rng.random() < 0.5),
                "goal": str(rng.integers(texts))} for _ in range(n // 10)]
    return rl.Buffer(records, table), table.table


def cql_beside_d3rlpy(batch, bf16=kalm.bf16_is_fast(), steps=150, sampled_before=False):
    """Drawing a batch and a step of CQL with one seed, as `--scale cpu` takes it; the same of d3rlpy's DiscreteCQL with equal sizes, as
    its `fit` does, without its logging. sampled_before: d3rlpy's batches are drawn outside the time, ours within it."""
    import d3rlpy
    buffer, table = random_buffer()
    inputs = torch.cat([rl.scaled(buffer.obs), table[buffer.goal]], -1).numpy()
    episodes = d3rlpy.dataset.MDPDataset(observations=inputs, actions=buffer.action.numpy(), rewards=buffer.reward.numpy(),
                                         terminals=np.arange(len(buffer)) % 10 == 9, action_size=env.NUM_ACTIONS)
    peer = d3rlpy.algos.DiscreteCQLConfig(batch_size=batch, encoder_factory=d3rlpy.models.VectorEncoderFactory([256, 256])).create()
    peer.build_with_dataset(episodes)
    batches = [episodes.sample_transition_batch(batch) for _ in range(steps)]

    def fit():
        for drawn in batches:
            peer.update(drawn if sampled_before else episodes.sample_transition_batch(batch))
    config = rl.RLConfig(steps=steps, batch=batch, bf16=bf16)
    ours, other = in_turn(lambda: rl.learn("cql", buffer, [], table, [0], config), fit, 5)
    return ours / steps, other / steps


def cql_beside_its_products(batch, seeds=1, steps=150, dtype=torch.bfloat16 if kalm.bf16_is_fast() else torch.float32):
    """A step of CQL; its matrix products alone (online network at s and s', target at s', gradients) with AdamW: what no code in torch
    can go below."""
    buffer, table = random_buffer()
    layers = [(env.OBSERVATION_DIM, 256), (table.shape[1], 256), (256, 256), (256, env.NUM_ACTIONS)]
    tensors = [[torch.randn(seeds, *shape, dtype=dtype) for shape in ((batch, i), (i, o), (batch, o))] for i, o in layers]
    flat = torch.nn.Parameter(torch.randn(seeds, sum(i * o + o for i, o in layers)))
    flat.grad, optimizer = torch.randn_like(flat), torch.optim.AdamW([flat], lr=1e-3, fused=True)

    def products():
        for _ in range(steps):
            for layer, (x, weight, gradient) in enumerate(tensors):
                for _ in range(2 if layer == 1 else 3):  # s and s' share their goal's part
                    torch.bmm(x, weight)
                torch.bmm(x.mT, gradient)
                if layer > 1:
                    torch.bmm(gradient, weight.mT)
            optimizer.step()
    config = rl.RLConfig(steps=steps, batch=batch, bf16=dtype == torch.bfloat16)
    ours, floor = in_turn(lambda: rl.learn("cql", buffer, [], table, list(range(seeds)), config), products, 5)
    return ours / steps, floor / steps


def three_seeds(batch=256, steps=200):
    """A step of CQL with three seeds; with one."""
    buffer, table = random_buffer()
    config = rl.RLConfig(steps=steps, batch=batch, bf16=kalm.bf16_is_fast())
    three, one = in_turn(*(lambda seeds=seeds: rl.learn("cql", buffer, [], table, seeds, config) for seeds in ([0, 1, 2], [0])), 5)
    return three / steps, one / steps


# ------------------------------------------------------------------------------------------------------------------
# Imagining

def default_model(merged=False):
    """The grounded model and tokenizer of `--scale cpu`: SmolLM2's first layers with the released adapter, merged to imagine."""
    llm, tokenizer = llm_source.load(llm_source.resolve("smollm2"), 6)
    model = KalmForRollouts.from_adapter(llm, kalm.RELEASED).eval()
    return model.merge_adapters() if merged else model, tokenizer


@torch.inference_mode()
def generate_without_cache(model, tokenizer, goals, observations, max_steps):
    """Greedy rollouts as the authors' loop makes them: for each action and each state the whole sequence runs again."""
    paths, moves = [[o] for o in observations], [[] for _ in goals]
    prompts = [ground.text_positions(ground.prompt_ids(tokenizer, "generation", g.text)) for g in goals]
    for _ in range(max_steps):
        sequences = [p + ground.rollout_positions(np.array(path), a) for p, path, a in zip(prompts, paths, moves)]
        actions = rollout.prefill(model, sequences)[0].action_logits[:, -1].argmax(-1).tolist()
        sequences = [s + [(ACTION, a, path[-1], False)] for s, a, path in zip(sequences, actions, paths)]
        nexts = rollout.prefill(model, sequences)[0].state_pred[:, -1].numpy()
        for path, move, action, state in zip(paths, moves, actions, nexts):
            path.append(state)
            move.append(action)
    return [np.array(m) for m in moves], [np.array(p) for p in paths]


def imagine_beside_no_cache(goals=64, actions=20):
    """64 greedy rollouts of 20 actions for goals that nothing fulfils; without a cache, once (longer ones favour the cache more)."""
    model, tokenizer = default_model(merged=True)
    wanted = [env.Goal("Put the red ball behind and in front of the blue ball.", "hard", "relations", tuple(NEVER))] * goals
    starts = env.observe(env.initial_states(np.random.default_rng(0), goals))
    rollout.generate(model, tokenizer, wanted[:2], starts[:2], max_steps=2)
    began = time.perf_counter()
    records = rollout.generate(model, tokenizer, wanted, starts, max_steps=actions)
    between = time.perf_counter()
    moves, paths = generate_without_cache(model, tokenizer, wanted, starts, actions)
    ended = time.perf_counter()
    parted = [int(np.append(r["actions"] != m, True).argmax()) for r, m in zip(records, moves)]  # the first action that is another
    gap = max(np.abs(r["observations"][:n + 1] - p[:n + 1]).max() for r, p, n in zip(records, paths, parted))
    print(f"  greedy rollouts alike in all {actions} actions: {sum(n == actions for n in parted)} of {goals}; until their actions part "
          f"(first: {min(parted)}), their states differ by {gap:.1e} m at most")
    return between - began, ended - between


@torch.inference_mode()
def generate_keeping_rows(model, tokenizer, goals, observations, max_steps):
    """Greedy rollouts with a cache, all rows kept until the last one ends. Returns how many actions each row needed."""
    array, obs = env.goal_array(goals), torch.as_tensor(observations)
    out, mask, positions = rollout.prefill(model, [
        ground.text_positions(ground.prompt_ids(tokenizer, "generation", g.text)) + ground.rollout_positions([o])
        for g, o in zip(goals, observations)])
    cache, one, ended = out.cache, mask.new_ones(len(goals), 1), np.zeros(len(goals), int)
    for step in range(max_steps):
        actions = out.action_logits[:, -1].argmax(-1)
        mask = torch.cat([mask, one], 1)
        out = rollout.decode_one(model, ACTION, actions, obs, mask, positions, cache)
        judged = env.success(array, obs.numpy(), out.state_pred[:, -1].numpy(), actions.numpy(), imagined=True)
        ended[(ended == 0) & (judged | (step == max_steps - 1))] = step + 1
        obs = out.state_pred[:, -1]
        if (ended > 0).all():
            break
        mask = torch.cat([mask, one], 1)
        out = rollout.decode_one(model, STATE, torch.zeros_like(actions), obs, mask, positions + 1, cache)
        positions = positions + 2
    return ended


def imagine_mixed_lengths(goals=256, actions=50):
    """Greedy rollouts for rephrased goals, which end at different times; the same, all rows kept until the last ends."""
    model, tokenizer = default_model(merged=True)
    rng = np.random.default_rng(0)
    wanted = sorted(env.sample_goals("rephrase", "test", goals, rng), key=lambda g: len(g.text))
    starts = env.observe(env.unfulfilled_states(rng, wanted))
    lengths = [len(r["actions"]) for r in rollout.generate(model, tokenizer, wanted, starts, max_steps=actions)]
    alike = np.mean(lengths == generate_keeping_rows(model, tokenizer, wanted, starts, actions))
    print(f"  rollouts of {statistics.median(lengths):.0f} actions in the median, {max(lengths)} at most; {alike:.1%} alike")
    return in_turn(lambda: rollout.generate(model, tokenizer, wanted, starts, max_steps=actions),
                   lambda: generate_keeping_rows(model, tokenizer, wanted, starts, actions), 3)


# ------------------------------------------------------------------------------------------------------------------
# Grounding

def real_rollouts(goals=200):
    """Expert rollouts as `collect` makes them: six for each goal text."""
    rng = np.random.default_rng(0)
    wanted = [g for g in env.sample_goals("offline", "train", goals, rng) for _ in range(6)]
    array = env.goal_array(wanted)
    records = env.run_episodes(lambda obs, rows: env.expert_actions(array[rows], obs), wanted, env.unfulfilled_states(rng, wanted), 20)
    return [r for r in records if r["success"]]


def train_step(model, batch):
    with torch.autocast("cpu", torch.bfloat16, enabled=kalm.bf16_is_fast()):
        loss = model(**batch).loss
    loss.backward()
    model.zero_grad()


def packed_rows():
    """Forward and backward over 32 packed examples; over the same pairs of a rollout and a task, one a padded row."""
    model, tokenizer = default_model()
    records = real_rollouts()
    examples = ground.GroundingExamples(records, tokenizer)
    rows = np.random.default_rng(0).permutation(len(examples))[:32]
    together = ground.pack([examples[i] for i in rows])
    alone = ground.pack([ground.make_example(task, tokenizer, [records[r]]) for task, group in (examples.examples[i] for i in rows)
                         for r in group], row_length=1)
    print(f"  {len(alone['input_ids'])} pairs of a rollout and a task: {tuple(together['input_ids'].shape)} positions packed, "
          f"{tuple(alone['input_ids'].shape)} padded")
    return in_turn(lambda: train_step(model, together), lambda: train_step(model, alone), 5)


def step_beside_backbone():
    """Forward, losses and backward over 32 packed examples; the bare backbone's over the same positions and mask."""
    model, tokenizer = default_model()
    examples = ground.GroundingExamples(real_rollouts(), tokenizer)
    batch = ground.pack([examples[i] for i in np.random.default_rng(0).permutation(len(examples))[:32]])
    embeddings = model.embed(batch["input_ids"], batch["modality"], batch["states"]).detach()

    def bare():
        with torch.autocast("cpu", torch.bfloat16, enabled=kalm.bf16_is_fast()):
            hidden = model.backbone.base_model(inputs_embeds=embeddings.requires_grad_(), position_ids=batch["position_ids"],
                                               attention_mask=segment_mask(batch["segments"], embeddings.dtype)).last_hidden_state
        hidden.sum().backward()
        model.zero_grad()
        embeddings.grad = None
    return in_turn(lambda: train_step(model, batch), bare, 7)


def data_loading():
    """Making and packing 32 grounding examples; fifty times less than the step that they serve, which is the limit."""
    model, tokenizer = default_model()
    examples = ground.GroundingExamples(real_rollouts(), tokenizer)
    rows = np.random.default_rng(0).permutation(len(examples))[:32]
    batch = ground.pack([examples[i] for i in rows])
    loading, step = in_turn(lambda: ground.pack([examples[i] for i in rows]), lambda: train_step(model, batch), 5)
    return loading, step / 50


def goal_encoding(steps=200):
    """Encoding the goal texts of `--scale cpu`; a fiftieth of what its eight methods then take to learn from them."""
    llm, tokenizer = llm_source.load(llm_source.resolve("smollm2"), 4)
    rng = np.random.default_rng(0)
    texts = list({g.text for g in env.sample_goals("offline", "train", 6000, rng)}) + [
        g.text for level in env.NOVEL_LEVELS for g in env.sample_goals(level, "test", 240, rng)]
    buffer, table = random_buffer(hidden=576)
    config = rl.RLConfig(steps=steps, batch=256, bf16=kalm.bf16_is_fast())
    encoding, bc, cql = (in_turn(f, lambda: None, 2)[0] for f in (
        lambda: rl.encode_texts(texts, llm.base_model, tokenizer),
        *(lambda a=a: rl.learn(a, buffer, [], table, [0, 1, 2], config) for a in ("bc", "cql"))))
    return encoding, 4 * (bc + cql) * 16000 / steps / 50


# ------------------------------------------------------------------------------------------------------------------
# The table

ROWS = {  # name: (function, what the other is, how often its time ours may take at most)
    "env step, one thread": (step_beside_bare_physics, "loop of mj_step", 1.15),
    "env step, all cores": (step_on_all_cores, "one thread / cores", 1 / 0.85),
    "env reset": (reset_beside_step, "env step", 1),
    "CQL step, batch 32": (lambda: cql_beside_d3rlpy(32), "d3rlpy 2.8.1", 1 / 5),
    "CQL step, batch 256": (lambda: cql_beside_d3rlpy(256), "d3rlpy 2.8.1", 1 / 6),
    "CQL step, batch 256, float32": (lambda: cql_beside_d3rlpy(256, bf16=False), "d3rlpy 2.8.1", 1 / 6),
    "CQL step, batch 32, strictly": (lambda: cql_beside_d3rlpy(32, sampled_before=True), "d3rlpy, batches drawn before", 1 / 5),
    "CQL step, batch 256, strictly": (lambda: cql_beside_d3rlpy(256, sampled_before=True), "d3rlpy, batches drawn before", 1 / 6),
    "CQL step, batch 32, floor": (lambda: cql_beside_its_products(32), "its products and AdamW", None),
    "CQL step, batch 256, floor": (lambda: cql_beside_its_products(256), "its products and AdamW", None),
    "CQL step, three seeds": (three_seeds, "one seed", 1.6),
    "CQL step, three seeds, batch 32": (lambda: three_seeds(32), "one seed", 1.6),
    "imagine, 64 goals, 20 actions": (imagine_beside_no_cache, "no cache", 1 / 10),
    "imagine, mixed lengths": (imagine_mixed_lengths, "finished rows kept", 1 / 1.5),
    "ground, packed rows": (packed_rows, "one example a row", 1 / 4),
    "ground, step": (step_beside_backbone, "bare backbone", 1.15),
    "ground, data loading": (data_loading, "2% of the step", 1),
    "learn, goal encoding": (goal_encoding, "2% of the stage", 1),
}
MEMORY_LIMIT = 4 * 2 ** 30
BRIEFLY = {"ground": ["--adapter", "", "--ground_steps", "20"], "imagine": ["--temperatures", "1"], "learn": ["--rl_steps", "300"]}


def peak_memory():
    """{stage: peak bytes} at `--scale cpu`, each in a process of its own; long stages take fewer steps on as much data."""
    found = {}
    with tempfile.TemporaryDirectory() as run:
        options = ["--scale", "cpu", "--output_dir", run, *(word for words in BRIEFLY.values() for word in words)]
        for stage in kalm.STAGES:
            process = subprocess.Popen([sys.executable, str(ROOT / "kalm.py"), *options, "--stage", stage], stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                sys.exit(f"stage {stage} failed while its memory was measured")
            found[stage] = usage.ru_maxrss * 1024
    return found


# ------------------------------------------------------------------------------------------------------------------
# How cost grows

def seconds(function):
    """Median of three calls after a first one."""
    return in_turn(function, lambda: None, 3)[0]


def slope(sizes, times):
    """Exponent b of time ~ size^b, by least squares over logarithms."""
    return np.polyfit(np.log(sizes), np.log(times), 1)[0]


def timed(function, *arguments):
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


# Each yields (what, sizes, seconds); largest: rollouts at most

def grow_collect(largest):
    def collect(n):
        rng = np.random.default_rng(0)
        goals = env.sample_goals("offline", "train", n, rng)
        array = env.goal_array(goals)
        env.run_episodes(lambda obs, rows: env.expert_actions(array[rows], obs), goals, env.unfulfilled_states(rng, goals), 20)
    sizes = [largest // 100, largest // 10, largest]
    yield "collect, by rollouts", sizes, [timed(collect, n) for n in sizes]


def grow_learn(largest):
    steps, sizes, times = rl.RLConfig(steps=200, batch=256, bf16=kalm.bf16_is_fast()), [largest // 100, largest // 10, largest], []
    for n in sizes:
        buffer, table = random_buffer(10 * n, texts=5000)
        times.append(seconds(lambda: rl.learn("cql", buffer, [], table, [0], steps)))
    yield "learn, 200 CQL steps of one seed, by rollouts in the buffer", sizes, times


def grow_layers(largest):
    records, layers, grounding, imagining = real_rollouts(60), [2, 6, 12, 30], [], []
    goals = env.sample_goals("rephrase", "test", 32, np.random.default_rng(0))
    starts = env.observe(env.unfulfilled_states(np.random.default_rng(1), goals))
    for kept in layers:
        llm, tokenizer = llm_source.load(llm_source.resolve("smollm2"), kept)
        model = KalmForRollouts.from_llm(llm, lora_rank=64, **ground.observation_statistics(records))
        model.get_input_embeddings().weight.requires_grad_(False)
        examples = ground.GroundingExamples(records, tokenizer)
        batch = ground.pack([examples[i] for i in np.random.default_rng(0).permutation(len(examples))[:8]])
        grounding.append(seconds(lambda: train_step(model, batch)))
        with torch.autocast("cpu", torch.bfloat16, enabled=kalm.bf16_is_fast()):
            imagining.append(timed(lambda: rollout.generate(model.merge_adapters(), tokenizer, goals, starts, max_steps=10)))
    positions = int((batch["modality"] >= 0).sum())
    yield f"ground, a LoRA step of 8 examples ({positions:,} positions), by layers", layers, grounding
    yield "imagine, 32 rollouts of at most 10 actions, by layers", layers, imagining


def grow_imagine(largest):
    model, tokenizer = default_model(merged=True)
    sizes, times = [n for n in (64, 256, 1024) if n <= largest], []
    for n in sizes:
        goals = env.sample_goals("rephrase", "test", n, np.random.default_rng(0))
        starts = env.observe(env.unfulfilled_states(np.random.default_rng(1), goals))
        with torch.autocast("cpu", torch.bfloat16, enabled=kalm.bf16_is_fast()):
            times.append(timed(lambda: rollout.generate_all(model, tokenizer, goals, starts, max_steps=10)))
    yield "imagine, six layers, at most 10 actions, by rollouts", sizes, times


def grow_processes(largest):
    times = []
    for processes in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
        with tempfile.TemporaryDirectory() as run:
            command = [sys.executable, *launch, str(ROOT / "kalm.py"), "--scale", "cpu", "--output_dir", run, "--train_goals", "600"]
            for stages in (["collect"], ["ground", "--adapter", "", "--ground_steps", "24", "--batch_examples", str(16 // processes)]):
                log = subprocess.run([*command, "--stage", *stages], capture_output=True, text=True, check=True,
                                     env={**os.environ, "OMP_NUM_THREADS": str(max(1, CORES // processes))}).stdout
        times.append(float(re.search(r"train_runtime': '?([0-9.]+)", log)[1]))
    yield "ground, 24 steps of 16 examples shared among processes", [1, 2], times


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="*", default=[""], metavar="WORD", help=f"rows with one of these in their name: {'; '.join(ROWS)}; "
                        "with --growth, also collect, processes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures")
    parser.add_argument("--memory", action="store_true", help="instead, the peak memory of each stage at --scale cpu, some minutes")
    parser.add_argument("--growth", action="store_true", help="instead, how the cost of each stage grows, a quarter of an hour")
    parser.add_argument("--largest", type=int, default=100000, metavar="N", help="rollouts in the largest rows of --growth")
    options = parser.parse_args()
    found = {"machine": f"{CORES} cores, {platform.processor() or platform.machine()}, torch {torch.__version__}, "
                        f"bf16 {'fast' if kalm.bf16_is_fast() else 'not used'}", "date": time.strftime("%Y-%m-%d"), "rows": {}}
    if options.growth:
        print(f"{found['machine']}, {found['date']}\n\n| what | sizes | seconds | exponent |\n" + "| --- " * 4 + "|")
        for part in (grow_collect, grow_learn, grow_layers, grow_imagine, grow_processes):
            for name, sizes, times in part(options.largest) if any(w in part.__name__ for w in options.only) else ():
                found["rows"][name] = {"sizes": sizes, "seconds": times, "exponent": slope(sizes, times)}
                print(f"| {name} | {', '.join(f'{n:,}' for n in sizes)} | {', '.join(f'{t:.3g}' for t in times)} | "
                      f"{found['rows'][name]['exponent']:.2f} |", flush=True)
        if options.json:
            store.write_json(options.json, found)
        return
    print(f"{found['machine']}, {found['date']}\n\n| what | ms | beside | ms | ratio | at most | |\n" + "| --- " * 7 + "|")
    for name, (function, beside, limit) in ROWS.items():
        if not options.memory and any(word in name for word in options.only):
            ours, other = function()
            found["rows"][name] = {"seconds": ours, "beside": beside, "other_seconds": other, "ratio": ours / other, "limit": limit}
            print(f"| {name} | {1000 * ours:.3g} | {beside} | {1000 * other:.3g} | {ours / other:.3g} | {'' if limit is None else f'{limit:.3g}'} | "
                  f"{'' if limit is None else 'met' if ours <= limit * other else 'NOT MET'} |", flush=True)
    if options.memory:
        for stage, peak in peak_memory().items():
            found["rows"][f"peak memory, {stage}"] = {"bytes": peak, "limit": MEMORY_LIMIT}
            print(f"| peak memory, {stage} | {peak / 2 ** 30:.2f} GiB | | | | 4 GiB | {'met' if peak <= MEMORY_LIMIT else 'NOT MET'} |")
    if options.json:
        store.write_json(options.json, found)


if __name__ == "__main__":
    main()
