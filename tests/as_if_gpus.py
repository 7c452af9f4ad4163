"""kalm.py in CPU processes that accelerate takes for GPUs, so that its DDP and FSDP2 paths run:
`as_if_gpus.py WAY COPY_AT COPY ARGUMENTS` in each of them, for test_distributed.py.

WAY: ddp, fsdp, or sharded, which is fsdp as configs/fsdp.yaml has it. COPY_AT: the step of
grounding before which the first process copies the run's folder to COPY: what a kill would leave.
"""

import os
import shutil
import sys

import conftest  # noqa: F401, first, it sets the import path

way, copy_at, copy, *arguments = sys.argv[1:]
if way != "ddp":
    kind = "SHARDED_STATE_DICT" if way == "sharded" else "FULL_STATE_DICT"
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": kind,
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false" if way == "fsdp" else "true",
        "FSDP_ACTIVATION_CHECKPOINTING": "false" if way == "fsdp" else "true",
    }

import torch
from accelerate.state import DistributedType, PartialState

import ground
import kalm

initialise = PartialState.__init__


def as_gpus(self, cpu=False, **options):
    initialise(self, cpu, **options)
    if self.distributed_type == DistributedType.MULTI_CPU and way != "ddp":
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = as_gpus
wait = torch.distributed.barrier
torch.distributed.barrier = lambda *args, device_ids=None, **options: wait(*args, **options)
train_a_step = ground.GroundingTrainer.training_step


def training_step(self, *args, **options):
    if self.state.global_step + 1 == int(copy_at):
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            run = arguments[arguments.index("--output_dir") + 1]
            shutil.copytree(run, copy)
        PartialState().wait_for_everyone()
    return train_a_step(self, *args, **options)


ground.GroundingTrainer.training_step = training_step
code = kalm.main(arguments)
sys.stdout.flush()
os._exit(code)  # gloo's end can wait forever for a process that has gone already
