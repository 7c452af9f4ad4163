"""Work in batches, divided over the processes of a run: the same batches whatever their number."""

from collections.abc import Callable, Sequence

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm


def shares(costs: Sequence[float], processes: int) -> list[list[int]]:
    """Which jobs each process takes: the dearest first, always to the one with the least to do."""
    taken = [[] for _ in range(processes)]
    load = [0.0] * processes
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        process = load.index(min(load))
        taken[process].append(job)
        load[process] += costs[job]
    return taken


def in_batches(
    work: Callable[[np.ndarray], list],
    batches: Sequence[np.ndarray],
    costs: Sequence[float],
    shared: bool,
    description: str,
) -> list:
    """Results of work(rows) for all batches of rows, in the order of rows.

    shared: all processes call this, each does a part of the batches, and all get all results.
    """
    state = PartialState()
    mine = range(len(batches))
    if shared:
        mine = shares(costs, state.num_processes)[state.process_index]
    results = []
    is_quiet = len(batches) < 2 or not state.is_main_process  # one bar is enough
    for number in tqdm(mine, desc=description, disable=is_quiet):
        rows = batches[number]
        results += zip(rows.tolist(), work(rows))
    if shared:
        results = gather_object(results)
    ordered = dict(results)
    return [ordered[row] for row in sorted(ordered)]
