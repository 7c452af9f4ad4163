"""kalm.py in CPU processes that accelerate takes for GPUs, so that its DDP and FSDP2 paths run:
`torchrun --nproc_per_node 2 tests/as_if_gpus.py WAY STOP_AT ARGUMENTS`, for test_distributed.py.

WAY: ddp, fsdp, or sharded, which is fsdp as configs/fsdp.yaml has it. STOP_AT: the step of
grounding before which the processes die, as if killed, 0 for none.
"""

import os
import sys

import conftest  # noqa: F401, first, it sets the import path

way, stop_at, *arguments = sys.argv[1:]
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
    if self.state.global_step + 1 == int(stop_at):
        os._exit(9)
    return train_a_step(self, *args, **options)


ground.GroundingTrainer.training_step = training_step
code = kalm.main(arguments)
sys.stdout.flush()
os._exit(code)  # gloo's end can wait forever for a process that has gone already
