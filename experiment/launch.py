"""All of a machine for one plain command: workers through torch's own launcher, one a GPU or core.

This file knows processes and devices, and nothing of what workers do. Under a launcher of the
user's (`accelerate launch`, `torchrun`) it does nothing.
"""

import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Mapping

import psutil
import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from data import llm
from experiment.settings import is_on

CPU_WORKERS = "KALM_CPU_WORKERS"  # so many share one CPU, which is one device
WORKER_BYTES = 1.5e9  # of a worker on a CPU beside two copies of the language model
ALONE = ("report", "act")  # stages that one process does


def workers(given: Mapping[str, str]) -> int:
    """How many processes should do a command that gives these settings: as many as --processes
    says, else one a GPU, or one a core as long as memory lasts. 1 where there is little to share.
    """
    if "LOCAL_RANK" in os.environ:
        return 1
    asked = given.get("processes", "0")
    if asked != "0":
        return int(asked) if asked.isdigit() else 1  # which tells what is wrong
    is_small = given.get("scale") == "smoke" or given.get("llm") == llm.TINY
    is_alone = "stage" in given and set(given["stage"].split()) <= set(ALONE)
    if is_small or is_alone or is_on(given, "dry_run"):
        return 1
    if torch.accelerator.is_available():
        return torch.accelerator.device_count()
    each = WORKER_BYTES + 2 * llm.bytes_on_disk(given.get("llm", llm.DEFAULT))
    return max(1, min(cores(), int(psutil.virtual_memory().available // each)))


def cores() -> int:
    """How many CPU cores this process may use."""
    can_tell = hasattr(os, "sched_getaffinity")  # not on macOS and Windows
    return len(os.sched_getaffinity(0)) if can_tell else os.cpu_count() or 1


def start(script: str, arguments: list[str], count: int) -> int:
    """Run a script in so many processes. Returns the exit code of the first that failed, else 0."""
    if not torch.accelerator.is_available():
        os.environ[CPU_WORKERS] = str(count)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // count)))
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # workers speak themselves
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, sys.executable)("-u", script, *arguments)
    except ChildFailedError as error:
        return max(1, error.get_first_failure()[1].exitcode)
    except SignalException as error:
        return 128 + error.sigval
    return 0


def stop_with_launcher() -> None:
    """Let a worker end when the process that started it is gone, killed for example."""
    launcher = os.getppid()

    def watch():
        while os.getppid() == launcher:
            time.sleep(0.5)
        os._exit(1)

    if CPU_WORKERS in os.environ:
        threading.Thread(target=watch, daemon=True).start()


def leave(code: int) -> None:
    """End this process; a worker at once, or others would wait for what it tidies up."""
    if "LOCAL_RANK" not in os.environ:
        sys.exit(code)
    sys.stdout.flush()
    os._exit(code)


def cpu_workers() -> int:
    """How many processes of this command share one CPU."""
    return int(os.environ.get(CPU_WORKERS, "1"))


def is_first() -> bool:
    """Whether this process is the first of its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
