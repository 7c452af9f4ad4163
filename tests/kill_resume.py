"""Kills a smoke run at random moments and starts it again: `python tests/kill_resume.py [--kills 30] [--seed 0]`.

A run that nobody touched comes first. Then one trial a kill: a new run, SIGKILL after a random part of the time that the stages
of that run took, the same command again, and its results.json compared with that of the untouched run (time_s apart). Every second
trial is killed a second time. Exit code 0 if all are equal.
"""
import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def start(run):
    command = [sys.executable, "kalm.py", "--scale", "smoke", "--checkpoint_minutes", "0", "--output_dir", str(run)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(run):
    """Run to the end. Returns the seconds from the first line on, which comes when all is imported."""
    process = start(run)
    first, began = process.stdout.readline(), time.monotonic()
    output = first + process.communicate(timeout=600)[0]
    if process.returncode:
        sys.exit(f"{run} ended with {process.returncode}:\n{output[-3000:]}")
    return time.monotonic() - began


def results_of(run):
    results = json.loads((run / "results.json").read_text())
    del results["time_s"]
    return results


def killed(run, seconds):
    """Kill a run so many seconds after its first line. Returns where it was: the finished stages, and what lay unfinished."""
    process = start(run)
    process.stdout.readline()
    time.sleep(seconds)
    process.kill()
    process.communicate()
    done = json.loads((run / "manifest.json").read_text())["stages"] if (run / "manifest.json").is_file() else {}
    pieces = sorted(p.name for p in run.glob("unfinished/*/*") if p.suffix != ".sealed")
    return f"after {seconds:5.2f} s, {len(done)} stages done" + (f", unfinished: {', '.join(pieces[:4])}" if pieces else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, equal = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        untouched = Path(folder) / "untouched"
        whole = finish(untouched)
        print(f"the stages of an untouched run take {whole:.1f} s", flush=True)
        for number in range(options.kills):
            run = Path(folder) / f"run {number}"
            where = [killed(run, rng.uniform(0, whole)) for _ in range(1 + number % 2)]
            finish(run)
            same = results_of(run) == results_of(untouched) and not list(run.rglob("*.partial")) and not (run / "unfinished").exists()
            equal += same
            print(f"{number + 1:2} {'equal' if same else 'DIFFERENT'}: killed {'; and '.join(where)}", flush=True)
    print(f"{equal} of {options.kills} equal")
    return 0 if equal == options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
