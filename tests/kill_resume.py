"""Kills a smoke run at random moments and starts it again:

    python tests/kill_resume.py [--kills 30] [--seed 0]

A run that nobody touched comes first. Then one trial a kill: a new run, SIGKILL after a random part
of the time that the whole run took, every second time once more, and the same command to the end.
What it wrote and logged has to be what the untouched run wrote and logged, times apart. Exit code 0
if all are equal.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
OF_A_TRY = re.compile("time|train_(loss|runtime|(samples|steps)_per_second)")
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


def start(run):
    command = [sys.executable, "kalm.py", "--scale", "smoke", "--output_dir", str(run)]
    command += ["--save_steps", "1", "--rl_snapshot_steps", "5"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    return subprocess.Popen(command, cwd=ROOT, **pipes)


def finish(run):
    """Run to the end. Returns the seconds from the first line on, when all is imported."""
    process = start(run)
    output, began = process.stdout.readline(), time.monotonic()
    output += process.communicate(timeout=600)[0]
    if process.returncode:
        sys.exit(f"{run} ended with {process.returncode}:\n{output[-3000:]}")
    return time.monotonic() - began


def killed(run, seconds):
    """Kill a run so many seconds after its first line. Returns a sentence on where it was."""
    process = start(run)
    process.stdout.readline()
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    manifest = run / "manifest.json"
    done = json.loads(manifest.read_text("utf-8"))["stages"] if manifest.is_file() else {}
    pieces = sorted(path.name for path in run.glob("unfinished/*/*"))
    return f"after {seconds:5.2f} s, {len(done)} stages done, unfinished: {', '.join(pieces[:4])}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    equal = 0
    with tempfile.TemporaryDirectory() as folder:
        untouched = Path(folder) / "untouched"
        whole = finish(untouched)
        print(f"the stages of an untouched run take {whole:.1f} s", flush=True)
        for number in range(options.kills):
            run = Path(folder) / f"run {number}"
            where = [killed(run, rng.uniform(0, whole)) for _ in range(1 + number % 2)]
            finish(run)
            differ = differences(run, untouched)
            equal += not differ
            verdict = f"DIFFERENT in {', '.join(differ)}" if differ else "equal"
            print(f"{number + 1:2} {verdict}: killed {'; and '.join(where)}", flush=True)
    print(f"{equal} of {options.kills} equal")
    return 0 if equal == options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
