"""Several processes: a training step, sharded or not, against one process; shipped settings."""

import subprocess
import sys

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import ROOT
from safetensors.torch import load_file

LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def one_step(folder, way):
    path, script = folder / way, ROOT / "tests" / "sharded_step.py"
    command = [sys.executable, *(LAUNCHER if way != "alone" else ()), script, way, path]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    return load_file(path)


def test_a_step_on_two_processes_equals_one_processs(tmp_path):
    alone = one_step(tmp_path, "alone")
    assert alone["losses"][1] < alone["losses"][0] - 0.05
    for way in ("ddp", "fsdp"):
        torch.testing.assert_close(one_step(tmp_path, way), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, kind", [("ddp", "MULTI_GPU"), ("fsdp", "FSDP")])
def test_shipped_configurations_are_what_accelerate_takes(name, kind):
    path = ROOT / "configs" / f"{name}.yaml"
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert (config.distributed_type, config.mixed_precision) == (kind, "bf16")
    command = ["--config_file", str(path), "kalm.py", "--stage", "all"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(command))
    assert arguments.num_processes == config.num_processes > 1
    assert (arguments.use_fsdp, arguments.multi_gpu) == (kind == "FSDP", kind != "FSDP")
    if kind == "FSDP":
        known = {action.dest for action in launch_command_parser()._actions}
        given = yaml.safe_load(path.read_text("utf-8"))["fsdp_config"]
        assert set(given) <= known and arguments.fsdp_version in (2, "2")
