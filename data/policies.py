"""Policies on disk: the layers of all seeds of a method in one safetensors file.

This file knows layers of numbers, and no algorithm.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from experiment import folder


def save_policy(path: Path, parts: Sequence[Tensor], seeds, method: str, config: Any) -> None:
    """parts: layer by layer weights (seeds, in, out) and biases (seeds, 1, out). config: of the
    algorithm, with an observation_scale.
    """
    tensors = {}
    for number, part in enumerate(parts):
        kind = "biases" if number % 2 else "weights"
        tensors[f"{kind}.{number // 2}"] = part.contiguous()
    metadata = {"method": method, "seeds": json.dumps([*seeds])}
    metadata["config"] = json.dumps(asdict(config))
    with folder.replacing(path) as aside:
        save_file(tensors, str(aside), metadata)


def load_policy(path: str | Path) -> tuple[list[Tensor], list[int], float]:
    """What `save_policy` got, in float32: the parts, the seeds and the scale of observations."""
    parts = []
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
        for layer in range(len(file.keys()) // 2):
            parts.append(file.get_tensor(f"weights.{layer}").float())
            parts.append(file.get_tensor(f"biases.{layer}").float())
    seeds = json.loads(metadata["seeds"])
    return parts, seeds, json.loads(metadata["config"])["observation_scale"]
