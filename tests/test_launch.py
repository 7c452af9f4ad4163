"""The plain command's own workers: how many, that they end together, what they say."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
from conftest import ROOT, run_kalm

from experiment import launch


@pytest.fixture
def machine(monkeypatch):
    """A function that sets cores and free bytes; there is no GPU, and models weigh nothing."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(launch.torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(launch.llm, "bytes_on_disk", lambda name: 0)

    def set_machine(cores, free):
        monkeypatch.setattr(launch, "cores", lambda: cores)
        memory = SimpleNamespace(available=free)
        monkeypatch.setattr(launch.psutil, "virtual_memory", lambda: memory)

    return set_machine


def test_one_worker_a_core_as_long_as_memory_lasts(machine):
    machine(8, 100e9)
    assert launch.workers({}) == 8 and launch.workers({"processes": "3"}) == 3
    machine(8, 4.6e9)
    assert launch.workers({}) == 3
    machine(8, 0.2e9)
    assert launch.workers({}) == 1


def test_one_worker_a_gpu(machine, monkeypatch):
    machine(8, 100e9)
    monkeypatch.setattr(launch.torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(launch.torch.accelerator, "device_count", lambda: 4)
    assert launch.workers({}) == 4


@pytest.mark.parametrize(
    "given", [{"scale": "smoke"}, {"llm": "tiny"}, {"dry_run": "true"}, {"stage": "report"}]
)
def test_little_work_is_done_by_one_process(machine, given):
    machine(8, 100e9)
    assert launch.workers(given) == 1


def test_a_users_launcher_is_left_alone(machine, monkeypatch):
    machine(8, 100e9)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert launch.workers({"processes": "4"}) == 1


def test_an_error_of_all_workers_is_said_once_with_its_exit_code(tmp_path):
    done = run_kalm(
        "--processes", 2, "--scale", "smoke", "--keep", "fish", "--output_dir", tmp_path
    )
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("kalm:")]
    assert len(said) == 1 and "--keep" in said[0] and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals as on POSIX")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (9, -9)])
def test_workers_end_with_the_command_that_started_them(tmp_path, number, code):
    arguments = ["--processes", "2", "--scale", "smoke", "--output_dir", str(tmp_path / "run")]
    arguments += ["--stage", "collect", "ground"]
    command = [sys.executable, str(ROOT / "kalm.py"), *arguments]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
    workers = []
    deadline = time.time() + 120
    while len(workers) < 2 or not (tmp_path / "run" / "manifest.json").exists():
        assert time.time() < deadline and run.poll() is None
        workers = psutil.Process(run.pid).children(recursive=True)
        time.sleep(0.1)
    run.send_signal(number)
    assert run.wait(60) == code
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert alive == []
    if number == 9:
        again = run_kalm(*arguments)
        assert again.returncode == 0, again.stderr
