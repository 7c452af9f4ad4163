"""Kills smoke runs at random moments and starts them again:

    python tests/kill_resume.py [--kills 30] [--seed 0]

The runs train with LoRA or take the released adapter, on one worker or two. One of each that nobody
touched comes first. A trial is a new run, SIGKILL after a random part of the time that the whole
run took, in every second trial once more, and the same command to the end. Of two workers all are
killed, or one alone. What it wrote and logged has to be what the untouched run wrote and logged,
times apart. Exit code 0 if all are equal.
"""

import argparse
import itertools
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
OF_A_TRY = re.compile("time|cpu_s|train_(loss|runtime|(samples|steps)_per_second)")
LORA = ["--lora_rank", "4", "--save_steps", "1"]
RELEASED = ["--llm", "smollm2", "--adapter", "released", "--keep_layers", "6"]
RELEASED += ["--novel_goals", "3", "--methods", "bc+relabel,bc+kalm,cql+kalm,llm"]
KINDS = {  # of runs: workers, options
    "LoRA, one worker": (1, LORA),
    "LoRA, two workers": (2, LORA),
    "released adapter, one worker": (1, RELEASED),
    "released adapter, two workers": (2, RELEASED),
}
UNEQUAL = (".lock", "manifest.json", "report.html")  # they have times, and sums of what has times


def content(path):
    """What a file has to have again, number by number, when a run was killed and went on."""
    if path.suffix == ".safetensors":  # its metadata come in any order
        return {name: values.tolist() for name, values in load_file(path).items()}
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        return [{k: line[k] for k in line if not OF_A_TRY.match(k)} for line in lines]
    if path.name == "results.json":
        return {**json.loads(path.read_text("utf-8")), "time_s": None}
    return json.loads(path.read_text("utf-8")) if path.suffix == ".json" else path.read_bytes()


def differences(run, untouched):
    """The files that only one of two runs has, or that differ in what is no time."""
    files = []
    for folder in (run, untouched):
        paths = [path for path in folder.rglob("*") if path.is_file()]
        files.append({path.relative_to(folder).as_posix() for path in paths} - {*UNEQUAL})
    both = files[0] & files[1]
    unequal = {name for name in both if content(run / name) != content(untouched / name)}
    return sorted((files[0] ^ files[1]) | unequal)


def start(run, kind):
    """A run with its first line read: all is imported then."""
    workers, options = KINDS[kind]
    command = [sys.executable]
    if workers > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={workers}"]
    command += ["kalm.py", "--scale", "smoke", "--output_dir", str(run), *options]
    command += ["--rl_snapshot_steps", "5"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    for line in process.stdout:
        if line.startswith("KALM"):
            break
    return process


def finish(run, kind):
    """Run to the end. Returns the seconds from the first line on."""
    process, began = start(run, kind), time.monotonic()
    output = process.communicate(timeout=900)[0]
    if process.returncode:
        sys.exit(f"{run} ended with {process.returncode}:\n{output[-3000:]}")
    return time.monotonic() - began


def killed(run, kind, seconds, rng):
    """Kill a run so many seconds after its first line. Returns a sentence on where it was, or None
    where it had ended before.
    """
    process, who = start(run, kind), "all"
    try:
        process.communicate(timeout=seconds)
        return None
    except subprocess.TimeoutExpired:
        workers = psutil.Process(process.pid).children()
        if len(workers) > 1 and rng.random() < 0.5:  # the launcher stops the others
            who, workers = "a worker", [rng.choice(workers)]
        else:
            process.kill()
        for worker in workers:
            worker.kill()
        process.communicate(timeout=120)
    manifest = run / "manifest.json"
    done = json.loads(manifest.read_text("utf-8"))["stages"] if manifest.is_file() else {}
    pieces = sorted(path.name for path in run.glob("unfinished/*/*"))
    where = f"{len(done)} stages done, unfinished: {', '.join(pieces[:4])}"
    return f"{who} after {seconds:5.2f} s, {where}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    untouched, whole, equal, trials, kills = {}, {}, 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for number, kind in enumerate(KINDS):
            untouched[kind] = Path(folder) / f"untouched {number}"
            whole[kind] = finish(untouched[kind], kind)
            print(f"untouched, {kind}: {whole[kind]:.1f} s", flush=True)
        for kind, count in zip(itertools.cycle(KINDS), itertools.cycle([1, 1, 1, 1, 2, 2, 2, 2])):
            if kills >= options.kills:
                break
            trials += 1
            run = Path(folder) / f"run {trials}"
            where = [killed(run, kind, rng.uniform(0, whole[kind]), rng) for _ in range(count)]
            if None in where:
                whole[kind] *= 0.8  # it was measured on a busier machine
            where = [sentence for sentence in where if sentence]
            kills += len(where)
            finish(run, kind)
            differ = differences(run, untouched[kind])
            equal += not differ
            verdict = f"DIFFERENT in {', '.join(differ)}" if differ else "equal"
            print(f"{trials:2} {verdict}, {kind}: killed {'; and '.join(where)}", flush=True)
    print(f"{equal} of {trials} runs equal after {kills} kills")
    return 0 if equal == trials else 1


if __name__ == "__main__":
    sys.exit(main())
